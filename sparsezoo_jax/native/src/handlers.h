// What the bindings of operations to XLA's typed foreign functions share.
#ifndef SPARSEZOO_HANDLERS_H_
#define SPARSEZOO_HANDLERS_H_

#include "operations.h"
#include "xla/ffi/api/ffi.h"

namespace sparsezoo {

namespace ffi = xla::ffi;
using Array = ffi::AnyBuffer;
using Result = ffi::Result<Array>;

inline Type type_of(ffi::DataType type) {
  return type == ffi::DataType::F32 ? kFloat32 : type == ffi::DataType::BF16 ? kBfloat16 : kInt8;
}

inline long rows_of(const Array& a) {
  long rows = 1;
  for (size_t i = 0; i + 1 < a.dimensions().size(); i++) rows *= a.dimensions()[i];
  return rows;
}

inline long width_of(const Array& a) { return a.dimensions().back(); }

inline Tokens tokens(Array a) { return {a.untyped_data(), type_of(a.element_type()), rows_of(a), width_of(a)}; }

// Columns from `offset` on of an array of rows; `scale` has no elements where there is none, and `scales` a row.
inline Matrix matrix(Array a, Array scale, long offset = 0, long scales = 1) {
  const Type type = type_of(a.element_type());
  const bool scaled = scale.element_count() > 0;
  const float* factors = scaled ? static_cast<const float*>(scale.untyped_data()) + (offset ? 1 : 0) : nullptr;
  return {static_cast<const char*>(a.untyped_data()) + offset * size_of(type), type, width_of(a), factors, scales};
}

inline Pool pool_of(ffi::ThreadPool& threads) {
  return {[&threads](std::function<void()> task) { threads.Schedule(std::move(task)); }, threads.num_threads()};
}

inline float* floats(Array a) { return a.element_count() ? static_cast<float*>(a.untyped_data()) : nullptr; }

inline int* ints(Array a) { return static_cast<int*>(a.untyped_data()); }

inline SparkAttention spark_form(int64_t r, double top_k, int64_t ddof, double predictor_scale, double value_scale,
                          double softcap, double softcap_values, bool softplus) {
  return {long(r), top_k, long(ddof), float(predictor_scale), float(value_scale), float(softcap), float(softcap_values),
          softplus};
}

}  // namespace sparsezoo

#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()

#endif  // SPARSEZOO_HANDLERS_H_
