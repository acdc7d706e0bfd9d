// DECO (arXiv 2605.10933): experts of NormSiLU units with a score that is not 0 for some token, each read once.
#include <algorithm>
#include <cmath>

#include "experts.h"
#include "operations.h"

namespace sparsezoo {

namespace {

void deco_ffn_slice(const Pool& pool, const Tokens& x, const Tokens& scores, const Matrix& up, const Matrix& down, long width,
              const NormSilu& form, const Tokens& y) {
  const Vectors in(x, up.type), factors(scores, kFloat32);
  const long d = x.width;
  const std::vector<Expert> experts = active_experts(factors, x.count, scores.width);
  // The mean over the units of all experts, those that are not read included, is one product with their mean row.
  std::vector<float> means(x.count);
  if (form.mean_row.data) {
    const Vectors plain(x, form.mean_row.type);
    form.mean_row.dot(0, 1, d, plain.pointers(), x.count, means.data(), 1);
  }
  std::vector<long> firsts;  // of each expert's vectors of units
  long taken = 0;
  for (const Expert& expert : experts) {
    firsts.push_back(taken);
    taken += long(expert.tokens.size());
  }
  const Vectors units(taken, width);
  // A part is the same piece of every expert: all parts are alike, whichever experts are active. Each piece is a short
  // run of rows, which the processor does not foresee: while one is used, the next is fetched.
  const long parts = std::min(width, 8L), bytes = long(experts.size()) * width * d;
  auto next_of = [&](const Matrix& w, size_t e, long first) {
    return e + 1 < experts.size() ? w.row(experts[e + 1].index * width + first) : nullptr;
  };
  Team team = pool.team(parts, bytes * (size_of(up.type) + size_of(down.type)));
  team.run(parts, [&](long p) {
    const long first = first_of(p, parts, width), rows = first_of(p + 1, parts, width) - first;
    for (size_t e = 0; e < experts.size(); e++) {
      const std::vector<const float*> from = experts[e].of(in.pointers());
      up.dot(experts[e].index * width + first, rows, d, from.data(), long(from.size()), units[firsts[e]] + first,
             units.stride(), next_of(up, e, first));
    }
  });
  const Partials sums(parts, x.count, d);
  team.run(parts, [&](long p) {
    const long first = first_of(p, parts, width), rows = first_of(p + 1, parts, width) - first;
    const Vectors hidden(x.count, rows);
    float* const* const out = sums.begin(p);
    for (size_t e = 0; e < experts.size(); e++) {
      const Expert& expert = experts[e];
      const std::vector<float*> to = expert.of<float*>(out);
      const long m = long(to.size());
      for (long j = 0; j < m; j++) {
        const long token = expert.tokens[j];
        const float mean = means[token], *const all = units[firsts[e] + j];
        // Every part works out the size of whole experts, which is less than to wait for one that does it for all.
        const float size = form.scale ? float(1 / std::sqrt(loops().squares(mean, all, width) / width + form.eps)) : 1;
        for (long i = 0; i < rows; i++)
          hidden[j][i] = (all[first + i] - mean) * size * (form.scale ? form.scale[first + i] : 1);
        loops().activate(kSilu, hidden[j], rows);
        for (long i = 0; i < rows; i++) hidden[j][i] *= factors[token][expert.index];
      }
      down.axpy(expert.index * width + first, rows, d, hidden[0], hidden.stride(), m, to.data(), next_of(down, e, first));
    }
  });
  sums.write(y, down.type);
}

}  // namespace

void deco_ffn(const Pool& pool, const Tokens& x, const Tokens& scores, const Matrix& up, const Matrix& down, long width,
              const NormSilu& form, const Tokens& y) {
  each_slice(x.count, [&](long first, long n) {
    deco_ffn_slice(pool, x.slice(first, n), scores.slice(first, n), up, down, width, form, y.slice(first, n));
  });
}

}  // namespace sparsezoo
