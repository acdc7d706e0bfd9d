// Spark FFN (arXiv 2506.06644): all of the predictor, and the rows of the neurons that it selects.
#include <algorithm>
#include <cmath>

#include "operations.h"

namespace sparsezoo {

namespace {

// One-sided soft threshold, Huber-smoothed where delta is not 0.
void shrink(const float* scores, const int* places, long n, float threshold, float delta, float* s) {
  for (long i = 0; i < n; i++) {
    const float above = scores[places[i]] - threshold;
    s[i] = above <= 0 ? 0 : delta == 0 ? above : above <= delta ? above * above / (2 * delta) : above - delta / 2;
  }
}

}  // namespace

void spark_ffn(const Pool& pool, const Tokens& x, long r, const Matrix& k1, const Matrix& k2, const Matrix& v,
               long neurons, double top_k, const Selection& selection, const Tokens& y, int* active) {
  const long m = x.count, d = x.width;
  const Vectors in(x, k1.type, 0, r), values(x, k2.type, r, d - r), scores(m, neurons);

  const long row = k1.ld * size_of(k1.type), scanned = neurons * row;
  const long chunk = 1 + (128 << 10) / row, chunks = (neurons + chunk - 1) / chunk;
  const long bytes = long(top_k * double((d - r) * size_of(k2.type) + d * size_of(v.type)));
  const long parts = parts_for(bytes, neurons);
  Team team = pool.team(std::max(chunks, parts), scanned + bytes);
  team.run(chunks, [&](long i) {
    const long first = i * chunk, n = std::min(chunk, neurons - first);
    k1.dot(first, n, r, in.pointers(), m, scores[0] + first, scores.stride(), k1.ahead_of(first));
  });

  std::vector<float> thresholds(m);
  std::vector<int> places(neurons + 64);
  std::vector<unsigned char> selected(m > 1 ? neurons : 0);
  long count = 0;
  for (long j = 0; j < m; j++) {
    const float mean = float(loops().moments(scores[j], neurons).sum / double(neurons));
    const double variance = loops().squares(mean, scores[j], neurons) / double(std::max(neurons - selection.ddof, 1L));
    thresholds[j] = mean + float(std::sqrt(variance)) * selection.quantile;
    count = loops().select(thresholds[j], true, scores[j], 0, neurons, places.data());
    active[j] = int(count);
    if (m > 1)
      for (long i = 0; i < count; i++) selected[places[i]] = 1;
  }
  if (m > 1) {
    count = 0;
    for (long f = 0; f < neurons; f++) {
      places[count] = int(f);
      count += selected[f];
    }
  }

  const Partials sums(parts, m, d);
  team.run(parts, [&](long p) {
    float* const* out = sums.begin(p);
    const int* const begin = std::lower_bound(places.data(), places.data() + count, int(first_of(p, parts, neurons)));
    const int* const end = std::lower_bound(begin, static_cast<const int*>(places.data()) + count,
                                            int(first_of(p + 1, parts, neurons)));
    const long n = end - begin;
    const Vectors gates(m, n + 1);
    for (long j = 0; j < m; j++) {
      shrink(scores[j], begin, n, thresholds[j], selection.huber_delta, gates[j]);
      loops().activate(kGeluTanh, gates[j], n);
    }
    std::vector<float> hidden(m);
    // Rows lie far apart, where the processor does not foresee them: each is fetched while those before are used.
    const long ahead = rows_ahead((d - r) * size_of(k2.type) + d * size_of(v.type));
    for (long i = 0; i < n; i++) {
      const long next = begin[i + ahead < n ? i + ahead : i];
      k2.dot(begin[i], 1, d - r, values.pointers(), m, hidden.data(), 1, k2.row(next));
      for (long j = 0; j < m; j++) hidden[j] *= gates[j][i];
      v.axpy(begin[i], 1, d, hidden.data(), 1, m, out, v.row(next));
    }
  });
  sums.write(y, v.type);
}

}  // namespace sparsezoo
