// BlockFFN (arXiv 2507.08771): the experts with a score that is not 0 for some token, each read once.
#include <algorithm>

#include "operations.h"

namespace sparsezoo {

namespace {

struct Expert {
  long index;
  std::vector<long> tokens;
  std::vector<const float*> to_up, to_gate;
};

std::vector<Expert> active_experts(const Vectors& to_up, const Vectors& to_gate, const Vectors& scores, long tokens,
                                   long experts) {
  std::vector<Expert> active;
  for (long e = 0; e < experts; e++) {
    Expert expert{e, {}, {}, {}};
    for (long j = 0; j < tokens; j++) {
      if (scores[j][e] == 0) continue;
      expert.tokens.push_back(j);
      expert.to_up.push_back(to_up[j]);
      expert.to_gate.push_back(to_gate[j]);
    }
    if (!expert.tokens.empty()) active.push_back(std::move(expert));
  }
  return active;
}

constexpr long kRows = 32;

}  // namespace

void block_ffn(const Pool& pool, const Tokens& x, const Tokens& scores, const Matrix& gate, const Matrix& up,
               const Matrix& down, long expert_width, const Tokens& y) {
  const Type gate_type = gate.data ? gate.type : up.type;
  const Vectors to_up(x, up.type), to_gate(x, gate_type), factors(scores, kFloat32);
  const long d = x.width;
  const std::vector<Expert> experts = active_experts(to_up, to_gate, factors, x.count, scores.width);
  const long expert_bytes = expert_width * d * (size_of(up.type) + size_of(down.type) + (gate.data ? size_of(gate.type) : 0));
  // A part is the same piece of every expert: all parts are alike, whichever experts are active.
  const long parts = std::min(expert_width, 8L);
  const Partials sums(parts, x.count, d);
  Team team = pool.team(parts, long(experts.size()) * expert_bytes);
  team.run(parts, [&](long p) {
    float* const* out = sums.begin(p);
    const Vectors hidden(2 * x.count, kRows);
    float *g = hidden[0], *h = hidden[x.count];
    const long ld = hidden.stride();
    std::vector<float*> to(x.count);
    for (const Expert& expert : experts) {
      const long m = long(expert.tokens.size()), base = expert.index * expert_width;
      for (long j = 0; j < m; j++) to[j] = out[expert.tokens[j]];
      const long end = first_of(p + 1, parts, expert_width);
      for (long f = first_of(p, parts, expert_width); f < end; f += kRows) {
        const long n = std::min(kRows, end - f);
        up.dot(base + f, n, d, expert.to_up.data(), m, h, ld);
        if (gate.data) gate.dot(base + f, n, d, expert.to_gate.data(), m, g, ld);
        for (long j = 0; j < m; j++) {
          float* const hj = h + j * ld;
          float* const gj = g + j * ld;
          if (!gate.data)
            for (long i = 0; i < n; i++) gj[i] = hj[i];
          loops().activate(kSilu, gj, n);
          const float score = factors[expert.tokens[j]][expert.index];
          for (long i = 0; i < n; i++) hj[i] = (gate.data ? gj[i] * hj[i] : gj[i]) * score;
        }
        down.axpy(base + f, n, d, h, ld, m, to.data());
      }
    }
  });
  sums.write(y, down.type);
}

}  // namespace sparsezoo
