// The last maps of a feed-forward layer for many tokens, each of which has few active neurons.
#include "operations.h"

namespace sparsezoo {

namespace {
// Tokens of a task: their sums stay in the nearer caches while all neurons pass by, each of which is then read for as
// many of them as use it.
constexpr long kMostTokens = 32, kFewestTokens = 4;
constexpr long kNeurons = 64;  // whose lists of tokens are made together

long group_of(long tokens, long threads) {
  const long fair = (tokens + 4 * threads - 1) / (4 * threads);
  return fair < kFewestTokens ? kFewestTokens : fair > kMostTokens ? kMostTokens : fair;
}
}  // namespace

void token_rows(const Pool& pool, const Tokens& x, const Tokens& gates, const Matrix& up, const Matrix& down, bool gated,
                const Tokens& y) {
  const long m = gates.count, neurons = gates.width, d = y.width;
  const long group = group_of(m, pool.threads), groups = (m + group - 1) / group;
  const long row_bytes = gated * x.width * size_of(up.type) + d * size_of(down.type), ahead = rows_ahead(row_bytes);
  Team team = pool.team(groups, m * neurons * size_of(gates.type) + neurons * row_bytes);
  team.run(groups, [&](long i) {
    const long first = i * group, n = first + group < m ? group : m - first;
    const Vectors in = gated ? Vectors(x.slice(first, n), up.type) : Vectors(1, 1), out(n, d), wide(n, kNeurons);
    const Vectors used(kNeurons, n);  // gates of the tokens that use a neuron
    out.zero(0, n);
    std::vector<const float*> from(kNeurons * n);
    std::vector<float*> to(kNeurons * n);
    std::vector<float> hidden(n);
    for (long f = 0; f < neurons; f += kNeurons) {
      const long count = neurons - f < kNeurons ? neurons - f : kNeurons;
      long users[kNeurons] = {};
      for (long j = 0; j < n; j++) {
        const long at = (first + j) * neurons + f;
        loops().widen[gates.type](static_cast<const char*>(gates.data) + at * size_of(gates.type), wide[j], count);
        for (long k = 0; k < count; k++) {
          if (wide[j][k] == 0) continue;
          const long place = users[k]++;
          used[k][place] = wide[j][k];
          if (gated) from[k * n + place] = in[j];
          to[k * n + place] = out[j];
        }
      }
      for (long k = 0; k < count; k++) {
        if (!users[k]) continue;
        const long next = f + k + ahead < neurons ? f + k + ahead : f + k;
        float* h = used[k];
        if (gated) {
          up.dot(f + k, 1, x.width, from.data() + k * n, users[k], hidden.data(), 1, up.row(next));
          for (long j = 0; j < users[k]; j++) h[j] *= hidden[j];
        }
        down.axpy(f + k, 1, d, h, 1, users[k], to.data() + k * n, down.row(next));
      }
    }
    out.write(y.slice(first, n), down.type);
  });
}

}  // namespace sparsezoo
