// BlockFFN (arXiv 2507.08771) and other mixtures: the experts with a score that is not 0 for some token, each read once.
#include <algorithm>

#include "experts.h"
#include "operations.h"

namespace sparsezoo {

namespace {

constexpr long kRows = 32;

// y_j += sum_i h[j * ld + i] row (first + i). Where units can be 0, as ReLU leaves many, rows whose h is 0 for all tokens
// are not read.
void add_active(const Matrix& down, long first, long n, long d, float* h, long ld, long m, float* const* y,
                const char* ahead, bool zeros) {
  auto used = [&](long i) {
    for (long j = 0; j < m; j++)
      if (!(h[j * ld + i] == 0)) return true;
    return false;
  };
  // Rows of int8 are rounded by fours: which ones these are must not depend on the other tokens.
  const long most = zeros && down.type == kInt8 ? 1 : n;
  for (long i = 0; i < n;) {
    while (zeros && i < n && !used(i)) i++;
    const long start = i;
    while (i < n && i - start < most && (!zeros || used(i))) i++;
    if (i == start) continue;
    const char* const next = ahead ? ahead + start * down.ld * size_of(down.type) : nullptr;
    down.axpy(first + start, i - start, d, h + start, ld, m, y, next);
  }
}

void block_ffn_slice(const Pool& pool, const Tokens& x, const Tokens& scores, const Matrix& gate, const Matrix& up,
               const Matrix& down, long expert_width, Activation activation, const Tokens& y, int* active) {
  const Type gate_type = gate.data ? gate.type : up.type;
  const Vectors to_up(x, up.type), to_gate(x, gate_type), factors(scores, kFloat32);
  const long d = x.width;
  const std::vector<Expert> experts = active_experts(factors, x.count, scores.width);
  const long expert_bytes = expert_width * d * (size_of(up.type) + size_of(down.type) + (gate.data ? size_of(gate.type) : 0));
  // A part is the same piece of every expert: all parts are alike, whichever experts are active.
  const long parts = std::min(expert_width, 8L);
  // Each piece is a short run of rows, which the processor does not foresee: while one is used, the next is fetched.
  // Those of `down` only where the activation leaves (nearly) all of them in use.
  const Matrix& first_read = gate.data ? gate : up;
  const bool all_used = activation != kRelu && activation != kRelu2;
  const Partials sums(parts, x.count, d);
  std::vector<int> counts(parts * x.count);
  Team team = pool.team(parts, long(experts.size()) * expert_bytes);
  team.run(parts, [&](long p) {
    float* const* out = sums.begin(p);
    const Vectors hidden(2 * x.count, kRows);
    float *g = hidden[0], *h = hidden[x.count];
    const long ld = hidden.stride();
    for (size_t e = 0; e < experts.size(); e++) {
      const Expert& expert = experts[e];
      const long m = long(expert.tokens.size()), base = expert.index * expert_width;
      const std::vector<float*> to = expert.of<float*>(out);
      const std::vector<const float*> from_gate = expert.of(to_gate.pointers()), from_up = expert.of(to_up.pointers());
      const long end = first_of(p + 1, parts, expert_width);
      for (long f = first_of(p, parts, expert_width); f < end; f += kRows) {
        const long n = std::min(kRows, end - f);
        const char* const rows_down = all_used ? down.row(base + f) : nullptr;
        if (gate.data) gate.dot(base + f, n, d, from_gate.data(), m, g, ld, up.row(base + f));
        up.dot(base + f, n, d, from_up.data(), m, h, ld, rows_down);
        for (long j = 0; j < m; j++) {
          float* const hj = h + j * ld;
          float* const gj = g + j * ld;
          if (!gate.data)
            for (long i = 0; i < n; i++) gj[i] = hj[i];
          loops().activate(activation, gj, n);
          const float score = factors[expert.tokens[j]][expert.index];
          int& count = counts[p * x.count + expert.tokens[j]];
          for (long i = 0; i < n; i++) {
            const float unit = gate.data ? gj[i] * hj[i] : gj[i];
            count += unit != 0;
            hj[i] = unit * score;
          }
        }
        const char* next = nullptr;
        if (f + n < end) {
          next = first_read.row(base + f + n);
        } else if (e + 1 < experts.size()) {
          next = first_read.row(experts[e + 1].index * expert_width + first_of(p, parts, expert_width));
        }
        add_active(down, base + f, n, d, h, ld, m, to.data(), next, !all_used);
      }
    }
  });
  sums.write(y, down.type);
  for (long j = 0; j < x.count; j++) {
    active[j] = 0;
    for (long p = 0; p < parts; p++) active[j] += counts[p * x.count + j];
  }
}

}  // namespace

void block_ffn(const Pool& pool, const Tokens& x, const Tokens& scores, const Matrix& gate, const Matrix& up,
               const Matrix& down, long expert_width, Activation activation, const Tokens& y, int* active) {
  each_slice(x.count, [&](long first, long n) {
    block_ffn_slice(pool, x.slice(first, n), scores.slice(first, n), gate, up, down, expert_width, activation,
                    y.slice(first, n), active + first);
  });
}

}  // namespace sparsezoo
