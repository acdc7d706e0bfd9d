// Layers that read all of one matrix, and the rows of the neurons that its scores select: Spark FFN (arXiv 2506.06644)
// by a threshold, SparseLM (arXiv 2603.23198) and ProSparse (arXiv 2402.13516) by a ReLU, CATS (arXiv 2404.08763) by the
// magnitude of the gate; and a product that reads the rows of units that are not 0.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "operations.h"
#include "users.h"

namespace sparsezoo {

namespace {

// One-sided soft threshold, Huber-smoothed where delta is not 0.
void shrink(const float* scores, const int* places, long n, float threshold, float delta, float* s) {
  for (long i = 0; i < n; i++) {
    const float above = scores[places[i]] - threshold;
    s[i] = above <= 0 ? 0 : delta == 0 ? above : above <= delta ? above * above / (2 * delta) : above - delta / 2;
  }
}

// Columns first .. first + width - 1 of the tokens.
struct Columns {
  long first, width;
};

// y = sum over selected neurons of gate (k2 . values) v; a width of 0 leaves the product out. `scored(scores, n)` changes
// n scores in place; `select(scores, places)` writes the places of a token's selected neurons and returns how many there
// are, and the threshold; `gates(scores, places, n, threshold, g)` makes the gates of n neurons.
template <class Scored, class Select, class Gates>
void selected_rows(const Pool& pool, const Tokens& x, Columns scored, Columns valued, const Matrix& k1, const Matrix& k2,
                   const Matrix& v, long neurons, double expected, const Scored& score, const Select& select,
                   const Gates& gates_of, const Tokens& y, int* active) {
  const long m = x.count, d = x.width;
  const Vectors in(x, k1.type, scored.first, scored.width), values(x, k2.type, valued.first, valued.width);
  const Vectors scores(m, neurons);

  const long row = k1.ld * size_of(k1.type), scanned = neurons * row;
  const long chunk = 1 + (128 << 10) / row, chunks = (neurons + chunk - 1) / chunk;
  const long row_bytes = valued.width * size_of(k2.type) + d * size_of(v.type);
  const long bytes = long(expected * double(row_bytes));
  const long parts = parts_for(bytes, neurons);
  Team team = pool.team(std::max(chunks, parts), scanned + bytes);
  team.run(chunks, [&](long i) {
    const long first = i * chunk, n = std::min(chunk, neurons - first);
    k1.dot(first, n, scored.width, in.pointers(), m, scores[0] + first, scores.stride(), k1.ahead_of(first));
    for (long j = 0; j < m; j++) score(scores[j] + first, n);
  });

  std::vector<float> thresholds(m);
  std::vector<int> places(neurons + 64);
  std::vector<unsigned char> selected(m > 1 ? neurons : 0);
  long count = 0;
  for (long j = 0; j < m; j++) {
    std::tie(count, thresholds[j]) = select(scores[j], places.data());
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
    for (long j = 0; j < m; j++) gates_of(scores[j], begin, n, thresholds[j], gates[j]);
    Users users(m);
    std::vector<float> hidden(m);
    // Rows lie far apart, where the processor does not foresee them: each is fetched while those before are used.
    const long ahead = rows_ahead(row_bytes);
    for (long i = 0; m == 1 && i < n; i += kTogether) {  // all of these rows are the one token's
      const long rows = std::min(kTogether, n - i);
      float* const h = gates[0] + i;
      if (valued.width) {
        float products[kTogether];
        k2.dot_at(begin + i, rows, n - i, valued.width, values[0], products);
        for (long r = 0; r < rows; r++) h[r] *= products[r];
      }
      v.axpy_at(begin + i, rows, n - i, d, h, out[0]);
    }
    for (long i = 0; m > 1 && i < n; i++) {
      const long next = begin[i + ahead < n ? i + ahead : i];
      const long used = users.find([&](long j) { return gates[j][i]; }, values.pointers(), out);
      float* const h = users.factors();
      if (valued.width) {
        k2.dot(begin[i], 1, valued.width, users.from(), used, hidden.data(), 1, k2.row(next));
        for (long j = 0; j < used; j++) h[j] *= hidden[j];
      }
      v.axpy(begin[i], 1, d, h, 1, used, users.to(), v.row(next));
    }
  });
  sums.write(y, v.type);
}

const auto as_they_are = [](float*, long) {};

}  // namespace

void spark_ffn(const Pool& pool, const Tokens& x, long r, const Matrix& k1, const Matrix& k2, const Matrix& v,
               long neurons, double top_k, const Selection& selection, const Tokens& y, int* active) {
  const auto select = [&](const float* scores, int* places) {
    const float mean = float(loops().moments(scores, neurons).sum / double(neurons));
    const double variance = loops().squares(mean, scores, neurons) / double(std::max(neurons - selection.ddof, 1L));
    const float threshold = mean + float(std::sqrt(variance)) * selection.quantile;
    return std::pair(loops().select(threshold, true, scores, 0, neurons, places), threshold);
  };
  const auto gates = [&](const float* scores, const int* places, long n, float above, float* g) {
    shrink(scores, places, n, above, selection.huber_delta, g);
    loops().activate(kGeluTanh, g, n);
  };
  selected_rows(pool, x, {0, r}, {r, x.width - r}, k1, k2, v, neurons, top_k, as_they_are, select, gates, y, active);
}

void relu_ffn(const Pool& pool, const Tokens& x, const Matrix& first, const Matrix& up, const Matrix& down, bool gated,
              long neurons, float bound, const Tokens& y, int* active) {
  const auto select = [&](const float* scores, int* places) {
    return std::pair(loops().select(bound, true, scores, 0, neurons, places), bound);
  };
  const auto gates = [](const float* scores, const int* places, long n, float above, float* g) {
    // Neurons of other tokens are among them.
    for (long i = 0; i < n; i++) g[i] = scores[places[i]] > above ? scores[places[i]] : 0;
  };
  // How many there are decides how the work is cut: a tenth is more than such layers have once they are trained.
  const double expected = double(neurons) / 10;
  selected_rows(pool, x, {0, x.width}, {0, gated ? x.width : 0}, first, up, down, neurons, expected, as_they_are, select,
                gates, y, active);
}

void thresholded_ffn(const Pool& pool, const Tokens& x, const Matrix& gate, const Matrix& up, const Matrix& down,
                     long neurons, Activation activation, float bound, const Tokens& y, int* active) {
  const auto activated = [&](float* scores, long n) { loops().activate(activation, scores, n); };
  const auto select = [&](const float* scores, int* places) {
    long count = 0;
    for (long f = 0; f < neurons; f++) {
      places[count] = int(f);
      count += !(std::abs(scores[f]) <= bound);
    }
    return std::pair(count, bound);
  };
  const auto gates = [](const float* scores, const int* places, long n, float above, float* g) {
    // Neurons of other tokens are among them.
    for (long i = 0; i < n; i++) g[i] = std::abs(scores[places[i]]) <= above ? 0 : scores[places[i]];
  };
  // How many there are decides how the work is cut; half of them is what the method is used for.
  selected_rows(pool, x, {0, x.width}, {0, x.width}, gate, up, down, neurons, double(neurons) / 2, activated, select,
                gates, y, active);
}

void active_rows(const Pool& pool, const Tokens& hidden, const Matrix& w, const Tokens& y) {
  const long m = hidden.count, neurons = hidden.width, d = y.width;
  const Vectors units(m, neurons);
  for (long j = 0; j < m; j++)
    loops().widen[hidden.type](static_cast<const char*>(hidden.data) + j * neurons * size_of(hidden.type), units[j], neurons);
  std::vector<int> places;
  for (long f = 0; f < neurons; f++)
    for (long j = 0; j < m; j++)
      if (units[j][f] != 0) {
        places.push_back(int(f));
        break;
      }
  const long count = long(places.size()), row_bytes = d * size_of(w.type);
  // Cut as if a tenth were active, however many there are: sums of a token do not depend on the others.
  const long parts = parts_for(neurons / 10 * row_bytes, neurons);
  Team team = pool.team(parts, count * row_bytes);
  const Partials sums(parts, m, d);
  team.run(parts, [&](long p) {
    float* const* out = sums.begin(p);
    const auto begin = std::lower_bound(places.begin(), places.end(), int(first_of(p, parts, neurons)));
    const long n = std::lower_bound(begin, places.end(), int(first_of(p + 1, parts, neurons))) - begin;
    Users users(m);
    const long ahead = rows_ahead(row_bytes);
    for (long i = 0; m == 1 && i < n; i += kTogether) {
      const long rows = std::min(kTogether, n - i);
      float own[kTogether];
      for (long r = 0; r < rows; r++) own[r] = units[0][begin[i + r]];
      w.axpy_at(&begin[i], rows, n - i, d, own, out[0]);
    }
    for (long i = 0; m > 1 && i < n; i++) {
      const long used = users.find([&](long j) { return units[j][begin[i]]; }, units.pointers(), out);
      w.axpy(begin[i], 1, d, users.factors(), 1, used, users.to(), w.row(begin[i + ahead < n ? i + ahead : i]));
    }
  });
  sums.write(y, w.type);
}

}  // namespace sparsezoo
