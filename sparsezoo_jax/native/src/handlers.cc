// The operations as XLA's typed foreign functions; those that train are in training_handlers.cc. Shapes and types are
// checked in Python, where errors are readable.
#include <cstring>

#include "handlers.h"

namespace sparsezoo {
namespace {

ffi::Error Linear(ffi::ThreadPool threads, Array x, Array w, Array scale, Result y) {
  linear(pool_of(threads), tokens(x), matrix(w, scale), tokens(*y));
  return ffi::Error::Success();
}

// Columns from `offset` on of rows of weights that may have others beside them, and as many factors as `parts`.
ffi::Error Gemm(ffi::ThreadPool threads, Array x, Array w, Array scale, Result y, bool transposed, int64_t offset,
                int64_t parts) {
  gemm(pool_of(threads), tokens(x), matrix(w, scale, offset, parts), transposed, tokens(*y));
  return ffi::Error::Success();
}

ffi::Error GatedFfn(ffi::ThreadPool threads, Array x, Array gate, Array up, Array down, Array gate_scale, Array up_scale,
                    Array down_scale, Result y, int64_t activation) {
  gated_ffn(pool_of(threads), tokens(x), matrix(gate, gate_scale), matrix(up, up_scale), matrix(down, down_scale),
            rows_of(gate), Activation(activation), tokens(*y));
  return ffi::Error::Success();
}

ffi::Error SparkFfn(ffi::ThreadPool threads, Array x, Array k1, Array rows, Array k1_scale, Array rows_scale, Result y,
                    Result active, double top_k, double quantile, int64_t ddof, double huber_delta) {
  const long r = width_of(k1);
  spark_ffn(pool_of(threads), tokens(x), r, matrix(k1, k1_scale), matrix(rows, rows_scale, 0, 2),
            matrix(rows, rows_scale, width_of(x) - r, 2), rows_of(k1), top_k,
            {float(quantile), long(ddof), float(huber_delta)}, tokens(*y), static_cast<int*>(active->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error ReluFfn(ffi::ThreadPool threads, Array x, Array first, Array rows, Array first_scale, Array rows_scale,
                   Result y, Result active, double bound) {
  const bool gated = width_of(rows) > width_of(x);
  const Matrix up = matrix(rows, rows_scale, 0, gated ? 2 : 1);
  relu_ffn(pool_of(threads), tokens(x), matrix(first, first_scale), up,
           gated ? matrix(rows, rows_scale, width_of(x), 2) : up, gated, rows_of(first), float(bound), tokens(*y),
           static_cast<int*>(active->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error ThresholdedFfn(ffi::ThreadPool threads, Array x, Array gate, Array rows, Array gate_scale, Array rows_scale,
                          Array bound, Result y, Result active, int64_t activation) {
  thresholded_ffn(pool_of(threads), tokens(x), matrix(gate, gate_scale), matrix(rows, rows_scale, 0, 2),
                  matrix(rows, rows_scale, width_of(x), 2), rows_of(gate), Activation(activation),
                  *static_cast<const float*>(bound.untyped_data()), tokens(*y),
                  static_cast<int*>(active->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error ActiveRows(ffi::ThreadPool threads, Array hidden, Array w, Array scale, Result y) {
  active_rows(pool_of(threads), tokens(hidden), matrix(w, scale), tokens(*y));
  return ffi::Error::Success();
}

ffi::Error TopKMask(ffi::ThreadPool threads, Array x, Array k, Result mask) {
  top_k_mask(pool_of(threads), tokens(x), static_cast<const int*>(k.untyped_data()),
             static_cast<bool*>(mask->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error ExpertRows(ffi::ThreadPool threads, Array x, Array experts, Array w, Array scale, Result y) {
  expert_rows(pool_of(threads), tokens(x), static_cast<const int*>(experts.untyped_data()), w.dimensions()[0],
              matrix(w, scale), tokens(*y));
  return ffi::Error::Success();
}

ffi::Error ExpertProducts(ffi::ThreadPool threads, Array x, Array experts, Array needed, Array w, Array scale, Result y) {
  expert_products(pool_of(threads), tokens(x), static_cast<const int*>(experts.untyped_data()), w.dimensions()[0],
                  tokens(needed), matrix(w, scale), tokens(*y));
  return ffi::Error::Success();
}

// `x` has no elements where nothing is gated.
ffi::Error TokenRows(ffi::ThreadPool threads, Array x, Array gates, Array rows, Array scale, Result y) {
  const bool gated = x.element_count() > 0;
  const Matrix up = matrix(rows, scale, 0, gated ? 2 : 1);
  token_rows(pool_of(threads), tokens(x), tokens(gates), up, gated ? matrix(rows, scale, width_of(x), 2) : up, gated,
             tokens(*y));
  return ffi::Error::Success();
}

ffi::Error BlockFfn(ffi::ThreadPool threads, Array x, Array scores, Array gate, Array up, Array down, Array gate_scale,
                    Array up_scale, Array down_scale, Result y, Result active, int64_t activation) {
  Matrix gates = matrix(gate, gate_scale);
  if (gate.element_count() == 0) gates.data = nullptr;
  block_ffn(pool_of(threads), tokens(x), tokens(scores), gates, matrix(up, up_scale), matrix(down, down_scale),
            up.dimensions()[1], Activation(activation), tokens(*y), static_cast<int*>(active->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error DecoFfn(ffi::ThreadPool threads, Array x, Array scores, Array up, Array down, Array up_scale, Array down_scale,
                   Array mean_row, Array scale, Array none, Result y, double eps) {
  NormSilu form{matrix(mean_row, none), floats(scale), eps};
  if (mean_row.element_count() == 0) form.mean_row.data = nullptr;
  deco_ffn(pool_of(threads), tokens(x), tokens(scores), matrix(up, up_scale), matrix(down, down_scale),
           rows_of(up) / width_of(scores), form, tokens(*y));
  return ffi::Error::Success();
}

Heads heads_of(const Array& q, const Array& k, const Array& mask) {
  return {q.dimensions()[0], q.dimensions()[1], k.dimensions()[1], k.dimensions()[2],
          static_cast<const unsigned char*>(mask.untyped_data())};
}

ffi::Error AttentionRows(ffi::ThreadPool threads, Array q, Array k, Array v, Array mask, Array none, Result y,
                         double scale, double softcap) {
  attention(pool_of(threads), heads_of(q, k, mask), tokens(q), matrix(k, none), matrix(v, none), float(scale),
            float(softcap), tokens(*y));
  return ffi::Error::Success();
}

ffi::Error SparkAttentionRows(ffi::ThreadPool threads, Array q, Array k1, Array rest, Array mask, Array none, Result y,
                              Result attended, double top_k, int64_t ddof, double predictor_scale, double value_scale,
                              double softcap, double softcap_values, bool softplus) {
  const long r = width_of(k1);
  const SparkAttention form =
      spark_form(r, top_k, ddof, predictor_scale, value_scale, softcap, softcap_values, softplus);
  spark_attention(pool_of(threads), heads_of(q, k1, mask), form, tokens(q), matrix(k1, none), matrix(rest, none),
                  matrix(rest, none, width_of(q) - r), tokens(*y), static_cast<int*>(attended->untyped_data()));
  return ffi::Error::Success();
}

template <void (*kMap)(const Pool&, const Blocks&, const Tokens&, const Matrix&, const Tokens&)>
ffi::Error OfBlocks(ffi::ThreadPool threads, Array x, Array routed, Array w, Array scale, Result y, int64_t count,
                    int64_t shared) {
  const Blocks blocks{long(count), long(shared), width_of(routed), static_cast<const int*>(routed.untyped_data())};
  kMap(pool_of(threads), blocks, tokens(x), matrix(w, scale), tokens(*y));
  return ffi::Error::Success();
}

// `kept` [outer, S, inner] is `y` already, or is copied to it; then the T slots of `added` go to where they belong.
ffi::Error PutSlots(Array kept, Array added, Array slot, Result y, int64_t outer, int64_t inner) {
  const long slots = long(kept.element_count()) / (outer * inner), count = long(added.element_count()) / (outer * inner);
  const long asked = *static_cast<const int*>(slot.untyped_data()), last = slots - count;
  const long first = asked < 0 ? 0 : asked > last ? last : asked, width = inner * size_of(type_of(kept.element_type()));
  char* const out = static_cast<char*>(y->untyped_data());
  if (out != kept.untyped_data()) std::memcpy(out, kept.untyped_data(), kept.size_bytes());
  for (long i = 0; i < outer; i++)
    std::memcpy(out + (i * slots + first) * width,
                static_cast<const char*>(added.untyped_data()) + i * count * width, count * width);
  return ffi::Error::Success();
}

// Reads all of an array, and sums it up so that the compiler has to: how fast that can be.
ffi::Error Stream(ffi::ThreadPool threads, Array data, Result sums) {
  const Pool pool = pool_of(threads);
  const long bytes = long(data.size_bytes()), chunk = 1 << 20, chunks = (bytes + chunk - 1) / chunk;
  Team team = pool.team(chunks, bytes);
  std::atomic<unsigned> total{0};
  team.run(chunks, [&](long i) {
    const long n = bytes - i * chunk < chunk ? bytes - i * chunk : chunk;
    total += loops().stream(static_cast<const char*>(data.untyped_data()) + i * chunk, n);
  });
  *static_cast<unsigned*>(sums->untyped_data()) = total;
  return ffi::Error::Success();
}

}  // namespace

// Only these names, with those of training_handlers.cc, does the library show.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_linear, Linear, BIND.Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_gemm, Gemm,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("offset")
                                  .Attr<int64_t>("parts"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_gated_ffn, GatedFfn,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_spark_ffn, SparkFfn,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<double>("top_k")
                                  .Attr<double>("quantile")
                                  .Attr<int64_t>("ddof")
                                  .Attr<double>("huber_delta"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_relu_ffn, ReluFfn,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<double>("bound"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_thresholded_ffn, ThresholdedFfn,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_active_rows, ActiveRows,
                              BIND.Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_top_k_mask, TopKMask, BIND.Arg<Array>().Arg<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_expert_rows, ExpertRows,
                              BIND.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_expert_products, ExpertProducts,
                              BIND.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_token_rows, TokenRows,
                              BIND.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_block_ffn, BlockFfn,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_deco_ffn, DecoFfn,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<double>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_attention, AttentionRows,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<double>("scale")
                                  .Attr<double>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_spark_attention, SparkAttentionRows,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<double>("top_k")
                                  .Attr<int64_t>("ddof")
                                  .Attr<double>("predictor_scale")
                                  .Attr<double>("value_scale")
                                  .Attr<double>("softcap")
                                  .Attr<double>("softcap_values")
                                  .Attr<bool>("softplus"));

#define BIND_BLOCKS \
  BIND.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Attr<int64_t>("count").Attr<int64_t>("shared")

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_from_blocks, OfBlocks<from_blocks>, BIND_BLOCKS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_to_blocks, OfBlocks<to_blocks>, BIND_BLOCKS);

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_put_slots, PutSlots,
                              ffi::Ffi::Bind()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("outer")
                                  .Attr<int64_t>("inner"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_stream, Stream, BIND.Arg<Array>().Ret<Array>());

// What this was built with: it runs on that version of jaxlib and newer ones.
extern "C" const char* sparsezoo_built_for() { return SPARSEZOO_JAXLIB; }
extern "C" const char* sparsezoo_sources() { return SPARSEZOO_SOURCES; }
extern "C" const char* sparsezoo_level() { return loops().level; }
extern "C" int sparsezoo_matrix_units() { return has_matrix_units(); }

#pragma GCC visibility pop

}  // namespace sparsezoo
