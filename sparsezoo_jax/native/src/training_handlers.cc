// The operations that train as XLA's typed foreign functions; those for a few rows are in handlers.cc.
#include "handlers.h"

namespace sparsezoo {
namespace {

ffi::Error ReluFfnForward(ffi::ThreadPool threads, Array x, Array z, Array up, Array down, Result y, Result l1,
                          Result other) {
  const ReluLayer layer{floats(x), floats(z), nullptr, floats(up), floats(down), rows_of(x), width_of(x), width_of(z)};
  relu_ffn_forward(pool_of(threads), layer, floats(*y), floats(*l1), floats(*other));
  return ffi::Error::Success();
}

ffi::Error ReluFfnBackward(ffi::ThreadPool threads, Array x, Array z, Array other, Array first, Array up, Array down,
                           Array dy, Array dl1, Result dx, Result d_first, Result d_up, Result d_down) {
  const ReluLayer layer{floats(x), floats(z), floats(first), floats(up), floats(down),
                        rows_of(x), width_of(x), width_of(z)};
  relu_ffn_backward(pool_of(threads), layer, floats(other), floats(dy), floats(dl1), floats(*dx), floats(*d_first),
                    floats(*d_up), floats(*d_down));
  return ffi::Error::Success();
}

// Positions of queries and keys, then segments of them.
struct Sight {
  Array query_positions, key_positions, query_segments, key_segments;
};

WholeAttention whole_attention(const Array& q, const Array& k, const Array& v, const Sight& sight, int64_t window,
                               const SparkAttention& form, bool selects) {
  return {q.dimensions()[0],           q.dimensions()[1],         k.dimensions()[1], q.dimensions()[2],
          k.dimensions()[2],           width_of(q),               width_of(v),       ints(sight.query_positions),
          ints(sight.key_positions),   ints(sight.query_segments), ints(sight.key_segments), long(window),
          form,                        selects};
}

ffi::Error AttentionForward(ffi::ThreadPool threads, Array q, Array k, Array v, Array q_positions, Array k_positions,
                            Array q_segments, Array k_segments, Result y, Result threshold, Result normaliser,
                            Result attended, int64_t window, bool selects, int64_t r, double top_k, int64_t ddof,
                            double predictor_scale, double value_scale, double softcap, double softcap_values,
                            bool softplus) {
  const SparkAttention form =
      spark_form(r, top_k, ddof, predictor_scale, value_scale, softcap, softcap_values, softplus);
  const Sight sight{q_positions, k_positions, q_segments, k_segments};
  attention_forward(pool_of(threads), whole_attention(q, k, v, sight, window, form, selects), tokens(q), tokens(k),
                    tokens(v), tokens(*y), {floats(*threshold), floats(*normaliser), ints(*attended)});
  return ffi::Error::Success();
}

ffi::Error AttentionBackward(ffi::ThreadPool threads, Array q, Array k, Array v, Array q_positions, Array k_positions,
                             Array q_segments, Array k_segments, Array threshold, Array normaliser, Array dy, Array delta,
                             Result dq, Result dk, Result dv, int64_t window, bool selects, int64_t r, double top_k,
                             int64_t ddof, double predictor_scale, double value_scale, double softcap,
                             double softcap_values, bool softplus) {
  const SparkAttention form =
      spark_form(r, top_k, ddof, predictor_scale, value_scale, softcap, softcap_values, softplus);
  const Sight sight{q_positions, k_positions, q_segments, k_segments};
  attention_backward(pool_of(threads), whole_attention(q, k, v, sight, window, form, selects), tokens(q), tokens(k),
                     tokens(v), tokens(dy), floats(delta), {floats(threshold), floats(normaliser), nullptr}, tokens(*dq),
                     tokens(*dk), tokens(*dv));
  return ffi::Error::Success();
}

Experts experts_of(const Array& chosen, const Array& w) {
  return {w.dimensions()[0], width_of(chosen), ints(chosen)};
}

ffi::Error ProductsByExpert(ffi::ThreadPool threads, Array x, Array chosen, Array w, Result y) {
  products_by_expert(pool_of(threads), experts_of(chosen, w), tokens(x), floats(w), tokens(*y));
  return ffi::Error::Success();
}

ffi::Error SumOfExperts(ffi::ThreadPool threads, Array x, Array chosen, Array w, Result y) {
  sum_of_experts(pool_of(threads), experts_of(chosen, w), tokens(x), floats(w), tokens(*y));
  return ffi::Error::Success();
}

ffi::Error SumsByExpert(ffi::ThreadPool threads, Array x, Array chosen, Array g, Result w) {
  sums_by_expert(pool_of(threads), experts_of(chosen, *w), tokens(x), tokens(g), floats(*w));
  return ffi::Error::Success();
}

Blocks blocks_of(const Array& routed, int64_t count, int64_t shared) {
  return {long(count), long(shared), width_of(routed), ints(routed)};
}

ffi::Error SumOfBlocks(ffi::ThreadPool threads, Array x, Array routed, Array w, Result y, int64_t count, int64_t shared) {
  sum_of_blocks(pool_of(threads), blocks_of(routed, count, shared), tokens(x), floats(w), tokens(*y));
  return ffi::Error::Success();
}

ffi::Error ProductsByBlock(ffi::ThreadPool threads, Array x, Array chosen, Array shared_w, Array routed_w, Result y,
                           int64_t count, int64_t shared) {
  products_by_block(pool_of(threads), blocks_of(chosen, count, shared), tokens(x), floats(shared_w), floats(routed_w),
                    tokens(*y));
  return ffi::Error::Success();
}

ffi::Error SumsByBlock(ffi::ThreadPool threads, Array x, Array routed, Array g, Result w, int64_t count, int64_t shared) {
  sums_by_block(pool_of(threads), blocks_of(routed, count, shared), tokens(x), tokens(g), floats(*w));
  return ffi::Error::Success();
}

}  // namespace

// Only these names, with those of handlers.cc, does the library show.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_relu_ffn_forward, ReluFfnForward,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_relu_ffn_backward, ReluFfnBackward,
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
                                  .Ret<Array>()
                                  .Ret<Array>());

#define SIGHT Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
#define WHOLE_ATTENTION                 \
  Attr<int64_t>("window")               \
      .Attr<bool>("selects")            \
      .Attr<int64_t>("r")               \
      .Attr<double>("top_k")            \
      .Attr<int64_t>("ddof")            \
      .Attr<double>("predictor_scale")  \
      .Attr<double>("value_scale")      \
      .Attr<double>("softcap")          \
      .Attr<double>("softcap_values")   \
      .Attr<bool>("softplus")

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_attention_forward, AttentionForward,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .SIGHT.Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .WHOLE_ATTENTION);

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_attention_backward, AttentionBackward,
                              BIND.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .SIGHT.Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .WHOLE_ATTENTION);

#define THREE Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_products_by_expert, ProductsByExpert, BIND.THREE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_sum_of_experts, SumOfExperts, BIND.THREE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_sums_by_expert, SumsByExpert, BIND.THREE);

#define CUT .Attr<int64_t>("count").Attr<int64_t>("shared")

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_sum_of_blocks, SumOfBlocks, BIND.THREE CUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_products_by_block, ProductsByBlock,
                              BIND.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>() CUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparsezoo_sums_by_block, SumsByBlock, BIND.THREE CUT);

#pragma GCC visibility pop

}  // namespace sparsezoo
