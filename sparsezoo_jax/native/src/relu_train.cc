// SparseLM's layer (arXiv 2603.23198) while it trains: of each token the rows of the neurons that its ReLU leaves, in
// every product but the one before the ReLU. Gradients of weights are summed neuron by neuron, over the tokens that use
// them in their order, so that results do not depend on the threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "operations.h"

namespace sparsezoo {

namespace {

constexpr long kTokens = 16, kNeurons = 8;  // of an item of work

float dot(const float* row, long d, const float* padded) {
  float found;
  loops().dot[kFloat32](row, d, 1, d, &padded, 1, &found, 1, nullptr);
  return found;
}

// y_j += c_j row
template <int M>
void axpy(const float* row, long d, const float (&c)[M], float* const (&y)[M]) {
  loops().axpy[kFloat32](row, d, 1, d, c, 1, M, y, nullptr);
}

// What a token's neuron adds to gradients of weights.
struct Entry {
  int neuron, token;
  float hidden, d_other, d_first;
};

long items(long n, long size) { return (n + size - 1) / size; }

}  // namespace

void relu_ffn_forward(const Pool& pool, const ReluLayer& layer, float* y, float* l1, float* other) {
  const long d = layer.width, f = layer.neurons, chunks = items(layer.tokens, kTokens);
  const bool gated = layer.up != nullptr;
  Team team = pool.team(chunks, layer.tokens * f * 4);
  team.run(chunks, [&](long chunk) {
    const Vectors local(2, d);
    std::vector<int> places(f + kPadding);
    for (long t = chunk * kTokens; t < layer.tokens && t < (chunk + 1) * kTokens; t++) {
      local.zero(0, 2);
      std::memcpy(local[0], layer.x + t * d, d * sizeof(float));
      const float* const z = layer.z + t * f;
      if (gated) std::memset(other + t * f, 0, f * sizeof(float));
      const long count = loops().select(0, true, z, 0, f, places.data());
      double norm = 0;
      for (long i = 0; i < count; i++) {
        const long n = places[i];
        float hidden = z[n];
        if (gated) hidden *= other[t * f + n] = dot(layer.up + n * d, d, local[0]);
        norm += std::abs(hidden);
        axpy<1>(layer.down + n * d, d, {hidden}, {local[1]});
      }
      l1[t] = float(norm);
      std::memcpy(y + t * d, local[1], d * sizeof(float));
    }
  });
}

void relu_ffn_backward(const Pool& pool, const ReluLayer& layer, const float* other, const float* dy, const float* dl1,
                       float* dx, float* d_first, float* d_up, float* d_down) {
  const long d = layer.width, f = layer.neurons, chunks = items(layer.tokens, kTokens);
  const bool gated = layer.up != nullptr;
  std::vector<std::vector<Entry>> found(chunks);
  Team team = pool.team(std::max(chunks, items(f, kNeurons)), layer.tokens * f * 4);
  team.run(chunks, [&](long chunk) {
    const Vectors local(2, d);
    std::vector<int> places(f + kPadding);
    for (long t = chunk * kTokens; t < layer.tokens && t < (chunk + 1) * kTokens; t++) {
      local.zero(0, 2);
      std::memcpy(local[0], dy + t * d, d * sizeof(float));
      const float* const z = layer.z + t * f;
      const long count = loops().select(0, true, z, 0, f, places.data());
      for (long i = 0; i < count; i++) {
        const long n = places[i];
        const float beside = gated ? other[t * f + n] : 1, hidden = z[n] * beside;
        const float sign = hidden > 0 ? 1.0f : hidden < 0 ? -1.0f : 0.0f;
        const float d_hidden = dot(layer.down + n * d, d, local[0]) + dl1[t] * sign;
        const Entry entry{int(n), int(t), hidden, d_hidden * z[n], d_hidden * beside};
        found[chunk].push_back(entry);
        axpy<1>(layer.first + n * d, d, {entry.d_first}, {local[1]});
        if (gated) axpy<1>(layer.up + n * d, d, {entry.d_other}, {local[1]});
      }
      std::memcpy(dx + t * d, local[1], d * sizeof(float));
    }
  });

  // The entries of each neuron, in the order of their tokens.
  std::vector<long> begin(f + 1);
  for (const auto& entries : found)
    for (const Entry& entry : entries) begin[entry.neuron + 1]++;
  for (long n = 0; n < f; n++) begin[n + 1] += begin[n];
  std::vector<Entry> sorted(begin[f]);
  std::vector<long> next(begin.begin(), begin.end() - 1);
  for (const auto& entries : found)
    for (const Entry& entry : entries) sorted[next[entry.neuron]++] = entry;

  team.run(items(f, kNeurons), [&](long chunk) {
    const Vectors sums(3, d);
    for (long n = chunk * kNeurons; n < f && n < (chunk + 1) * kNeurons; n++) {
      sums.zero(0, 3);
      for (long i = begin[n]; i < begin[n + 1]; i++) {
        const Entry& entry = sorted[i];
        const float* const x = layer.x + entry.token * d;
        if (gated)
          axpy<2>(x, d, {entry.d_first, entry.d_other}, {sums[0], sums[1]});
        else
          axpy<1>(x, d, {entry.d_first}, {sums[0]});
        axpy<1>(dy + entry.token * d, d, {entry.hidden}, {sums[2]});
      }
      std::memcpy(d_first + n * d, sums[0], d * sizeof(float));
      if (gated) std::memcpy(d_up + n * d, sums[1], d * sizeof(float));
      std::memcpy(d_down + n * d, sums[2], d * sizeof(float));
    }
  });
}

}  // namespace sparsezoo
