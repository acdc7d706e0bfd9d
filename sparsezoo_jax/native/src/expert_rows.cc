// Maps of experts whose inputs or outputs are masked: of each input's expert only the rows that the mask leaves are read,
// each once for all inputs of that expert.
#include <algorithm>
#include <numeric>

#include "experts.h"
#include "operations.h"
#include "users.h"

namespace sparsezoo {

namespace {

// What an expert's rows are wanted for: its results, by their places, and the rows that some of them wants, ascending.
struct Wanted {
  Expert expert;
  std::vector<int> rows;

  // The inputs of its results, of which `each` consecutive ones share one.
  std::vector<const float*> inputs(const Vectors& x, long each) const {
    std::vector<const float*> found;
    for (long p : expert.tokens) found.push_back(x[p / each]);
    return found;
  }
};

// The experts of these results, without their rows; one whose number is no expert's has none.
std::vector<Wanted> experts_of(const int* chosen, long results, long experts) {
  std::vector<std::vector<long>> places(experts);
  for (long p = 0; p < results; p++)
    if (chosen[p] >= 0 && chosen[p] < experts) places[chosen[p]].push_back(p);
  std::vector<Wanted> found;
  for (long e = 0; e < experts; e++)
    if (!places[e].empty()) found.push_back({{e, std::move(places[e])}, {}});
  return found;
}

// Finds the rows of those of `count` that have a mark which is not 0.
void find_rows(Wanted& wanted, const std::vector<const float*>& of, long count) {
  wanted.rows.resize(count);
  long found = 0;
  for (long i = 0; i < count; i++) {
    bool used = false;
    for (const float* mark : of) used |= mark[i] != 0;
    // Without a branch, which half of the channels would mispredict.
    wanted.rows[found] = int(wanted.expert.index * count + i);
    found += used;
  }
  wanted.rows.resize(found);
}

long rows_of_all(const std::vector<Wanted>& experts) {
  return std::accumulate(experts.begin(), experts.end(), 0L,
                         [](long sum, const Wanted& wanted) { return sum + long(wanted.rows.size()); });
}

constexpr long kItems = 4;  // for each thread, where there are fewer experts: threads differ in speed

}  // namespace

void expert_rows(const Pool& pool, const Tokens& x, const int* chosen, long experts, const Matrix& w, const Tokens& y) {
  const long channels = x.width, width = y.width, each = y.count / x.count;
  const Vectors in(x, kFloat32), out(y.count, width);
  out.zero(0, y.count);
  std::vector<Wanted> taken = experts_of(chosen, y.count, experts);
  for (Wanted& wanted : taken) find_rows(wanted, wanted.inputs(in, each), channels);
  // Pieces of columns: sums do not depend on where they are cut.
  const long count = long(taken.size()), most = std::max((width + 511) / 512, 1L);
  const long pieces = std::clamp(kItems * pool.threads / std::max(count, 1L), 1L, most);
  const long columns = (width + pieces * kPadding - 1) / (pieces * kPadding) * kPadding;
  Team team = pool.team(count * pieces, rows_of_all(taken) * width * size_of(w.type));
  team.run(count * pieces, [&](long item) {
    const Wanted& wanted = taken[item / pieces];
    const std::vector<int>& rows = wanted.rows;
    const long first = item % pieces * columns, n = std::min(columns, width - first), base = wanted.expert.index * channels;
    if (n <= 0) return;
    Matrix piece = w;
    piece.data += first * size_of(w.type);
    const std::vector<const float*> from = wanted.inputs(in, each);
    std::vector<float*> to = wanted.expert.of<float*>(out.pointers());
    for (float*& sums : to) sums += first;
    const long m = long(from.size()), used = long(rows.size()), ahead = rows_ahead(n * size_of(w.type));
    Users users(m);
    for (long i = 0; m == 1 && i < used; i += kTogether) {
      const long together = std::min(kTogether, used - i);
      float own[kTogether];
      for (long r = 0; r < together; r++) own[r] = from[0][rows[i + r] - base];
      piece.axpy_at(&rows[i], together, used - i, n, own, to[0]);
    }
    for (long i = 0; m > 1 && i < used; i++) {
      const long k = users.find([&](long j) { return from[j][rows[i] - base]; }, from.data(), to.data());
      piece.axpy(rows[i], 1, n, users.factors(), 1, k, users.to(), piece.row(rows[i + ahead < used ? i + ahead : i]));
    }
  });
  out.write(y, w.type);
}

void expert_products(const Pool& pool, const Tokens& x, const int* chosen, long experts, const Tokens& needed,
                     const Matrix& w, const Tokens& y) {
  const long outputs = y.width, each = y.count / x.count, row_bytes = x.width * size_of(w.type);
  const Vectors in(x, w.type), marks(needed, kFloat32), out(y.count, outputs);
  out.zero(0, y.count);
  std::vector<Wanted> taken = experts_of(chosen, y.count, experts);
  for (Wanted& wanted : taken) find_rows(wanted, wanted.inputs(marks, 1), outputs);
  const long count = long(taken.size());
  const long pieces = std::clamp(kItems * pool.threads / std::max(count, 1L), 1L, std::max(outputs / 64, 1L));
  Team team = pool.team(count * pieces, rows_of_all(taken) * row_bytes);
  team.run(count * pieces, [&](long item) {
    const Wanted& wanted = taken[item / pieces];
    const long all = long(wanted.rows.size()), base = wanted.expert.index * outputs;
    const long first = first_of(item % pieces, pieces, all), used = first_of(item % pieces + 1, pieces, all) - first;
    const int* const rows = wanted.rows.data() + first;
    const std::vector<const float*> from = wanted.inputs(in, each), marked = wanted.inputs(marks, 1);
    const std::vector<float*> to = wanted.expert.of<float*>(out.pointers());
    const long m = long(from.size()), ahead = rows_ahead(row_bytes);
    Users users(m);
    std::vector<float> products(std::max(m, kTogether));
    for (long i = 0; m == 1 && i < used; i += kTogether) {
      const long together = std::min(kTogether, used - i);
      w.dot_at(rows + i, together, used - i, x.width, from[0], products.data());
      for (long r = 0; r < together; r++) to[0][rows[i + r] - base] = products[r];
    }
    for (long i = 0; m > 1 && i < used; i++) {
      const long k = users.find([&](long j) { return marked[j][rows[i] - base]; }, from.data(), to.data());
      w.dot(rows[i], 1, x.width, users.from(), k, products.data(), 1, w.row(rows[i + ahead < used ? i + ahead : i]));
      for (long j = 0; j < k; j++) users.to()[j][rows[i] - base] = products[j];
    }
  });
  out.write(y);
}

}  // namespace sparsezoo
