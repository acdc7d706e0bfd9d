// Attention over whole sequences while they train or a prompt is read: dense (FlashAttention, arXiv 2205.14135) and Spark
// (arXiv 2506.06644), tile by tile, so that memory is linear in the lengths.
//
// Work is divided by sequences, heads of keys, and tiles of queries; in the backward pass by fixed sets of such tiles, each
// of which has its own sums of the keys' gradients. No result depends on the threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "operations.h"
#include "quantile.h"

namespace sparsezoo {

namespace {

// Rows (queries times the heads that share a key) and keys of a tile.
constexpr long kRows = 128, kKeys = 96;
// The threshold of rows that attend to all they see: below every score, above kHidden.
constexpr float kAll = 0.1f * kHidden;
// exp() of scores within it neither over- nor underflows, and sums need no best score.
constexpr float kLargestCap = 56;

long round_up(long n, long to) { return (n + to - 1) / to * to; }

// Floats of a thread, taken one piece after another; kept for the next item.
class Scratch {
 public:
  explicit Scratch(long floats) {
    thread_local std::unique_ptr<float[]> memory;
    thread_local long size = 0;
    if (floats > size) {
      memory.reset(new float[floats + kLine]);
      size = floats;
    }
    const std::uintptr_t line = kLine * sizeof(float), start = reinterpret_cast<std::uintptr_t>(memory.get());
    next_ = memory.get() + (line - start % line) % line / sizeof(float);
    end_ = next_ + floats;
  }
  float* take(long n) {
    float* const taken = next_;
    next_ += round_up(n, kLine);
    if (next_ > end_) __builtin_trap();  // the sum that it was made for is wrong
    return taken;
  }

 private:
  static constexpr long kLine = 16;  // floats of a line of the cache
  float *next_, *end_;
};

// The least and the largest of positions and segments.
struct Range {
  long low, high, first, last;

  static Range of(const Places& places, long n) {
    const auto p = std::minmax_element(places.positions, places.positions + n);
    const auto s = std::minmax_element(places.segments, places.segments + n);
    return {*p.first, *p.second, *s.first, *s.second};
  }
  Range with(const Range& other) const {
    return {std::min(low, other.low), std::max(high, other.high), std::min(first, other.first),
            std::max(last, other.last)};
  }
  // Whether any of these queries may see any of those keys: true is no promise, but false is.
  bool may_see(const Range& keys, long window) const {
    return high >= keys.low && last >= keys.first && first <= keys.last && (!window || low - keys.high < window);
  }
  // Whether each of them sees each of those.
  bool all_see(const Range& keys, long window) const {
    return low >= keys.high && first == last && keys.first == keys.last && first == keys.first &&
           (!window || high - keys.low < window);
  }
};

// Sizes that follow from those of an operation.
struct Sizes {
  const WholeAttention& a;
  long group, panel;           // G, rows of a panel
  long rest;                   // H - r, the width of the softplus's part
  long wide_r, wide_rest, wide_values;  // the widths, filled up to whole vectors
  long tile, tiles, panels;    // queries of a tile, tiles of a sequence, panels of a tile
  long key_tiles;

  explicit Sizes(const WholeAttention& a)
      : a(a), group(a.heads / a.keyvalues), panel(loops().scores.rows), rest(a.form.softplus ? a.width - a.form.r : 0) {
    const long lanes = loops().lanes;
    wide_r = round_up(a.form.r, lanes);
    wide_rest = round_up(rest, lanes);
    wide_values = round_up(a.value_width, lanes);
    tile = std::min(std::max(kRows / group, 1L), a.queries);
    tiles = (a.queries + tile - 1) / tile;
    panels = (tile * group + panel - 1) / panel;
    key_tiles = (a.keys + kKeys - 1) / kKeys;
  }
  long rows() const { return panels * panel; }
};

// Part of rows of numbers that are `ld` apart, as floats in rows of `width`; ends in zeros.
void read_rows(const Tokens& from, long first, long count, long ld, long offset, long n, float* to, long width) {
  for (long i = 0; i < count; i++, to += width) {
    const char* const row = static_cast<const char*>(from.data) + (first + i * ld + offset) * size_of(from.type);
    if (from.type == kFloat32)
      std::memcpy(to, row, n * sizeof(float));
    else
      loops().widen[from.type](row, to, n);
    for (long c = n; c < width; c++) to[c] = 0;
  }
}

// A tile of keys, and of their values.
class Keys {
 public:
  Keys(const Sizes& s, Scratch& scratch)
      : s_(s), k1(scratch.take(kKeys * s.wide_r)), k2(scratch.take(kKeys * s.wide_rest)),
        v(scratch.take(kKeys * s.wide_values)) {}

  // Where tile `number` of sequence b is, without its numbers.
  void place(long b, long number) {
    const WholeAttention& a = s_.a;
    first = number * kKeys;
    count = std::min(kKeys, a.keys - first);
    places = {a.key_positions + b * a.keys + first, a.key_segments + b * a.keys + first};
    range = Range::of(places, count);
  }
  void read(const Tokens& keys, const Tokens& values, long b, long head, bool with_values = true) {
    const WholeAttention& a = s_.a;
    const long row = (b * a.keys + first) * a.keyvalues + head, r = a.form.r;
    read_rows(keys, row * a.width, count, a.keyvalues * a.width, 0, r, k1, s_.wide_r);
    if (!with_values) return;
    if (s_.rest) read_rows(keys, row * a.width, count, a.keyvalues * a.width, r, s_.rest, k2, s_.wide_rest);
    read_rows(values, row * a.value_width, count, a.keyvalues * a.value_width, 0, a.value_width, v, s_.wide_values);
  }

 private:
  const Sizes& s_;

 public:
  float *const k1, *const k2, *const v;  // [kKeys, width]
  long first = 0, count = 0;
  Places places{};
  Range range{};
};

// Numbers of the rows of a tile, [rows, width], and the same as panels [panels, width, rows of a panel].
struct Rows {
  float *rows, *panels;
  long width, wide;

  Rows(const Sizes& s, long width, long wide, bool keep_rows, Scratch& scratch)
      : rows(scratch.take((keep_rows ? s.rows() : s.panel) * wide)), panels(scratch.take(s.rows() * width)),
        width(width), wide(wide), keep_(keep_rows) {}

  // From numbers [B, T, N, ld], columns from `offset` on: rows of `count` queries from number `first` of all on.
  void read(const Sizes& s, const Tokens& x, long first, long count, long head, long offset) {
    const long used = count * s.group;
    for (long p = 0; p < s.panels; p++) {
      float* const to = rows + (keep_ ? p * s.panel * wide : 0);
      for (long i = 0; i < s.panel; i++) {
        const long row = p * s.panel + i, t = first + row / s.group, n = head * s.group + row % s.group;
        if (row < used)
          read_rows(x, (t * s.a.heads + n) * x.width, 1, 0, offset, width, to + i * wide, wide);
        else
          std::fill(to + i * wide, to + (i + 1) * wide, 0.0f);
      }
      loops().floats.pack_tokens[kFloat32](to, wide, s.panel, width, reinterpret_cast<unsigned*>(of_panel(s, p)));
    }
  }
  float* of_panel(const Sizes& s, long p) const { return panels + p * width * s.panel; }
  static long floats(const Sizes& s, long width, long wide, bool keep_rows) {
    return (keep_rows ? s.rows() : s.panel) * wide + s.rows() * width + 32;
  }

 private:
  bool keep_;
};

// Queries of a tile: where its rows stand, and which of all rows they are.
class Queries {
 public:
  Queries(const Sizes& s, long b, long head, long tile)
      : s_(s), b_(b), head_(head), first_(tile * s.tile), count_(std::min(s.tile, s.a.queries - first_)),
        positions_(s.rows()), segments_(s.rows()) {
    const WholeAttention& a = s.a;
    const long used = count_ * s.group;
    for (long row = 0; row < s.rows(); row++) {
      // Rows that fill up the last panel stand where the last query does, and are zeros.
      const long t = b * a.queries + first_ + std::min(row, used - 1) / s.group;
      positions_[row] = a.query_positions[t];
      segments_[row] = a.query_segments[t];
    }
    for (long p = 0; p < s.panels; p++) ranges_.push_back(Range::of(places(p), s.panel));
    range = ranges_[0];
    for (const Range& other : ranges_) range = range.with(other);
  }
  Places places(long p) const { return {positions_.data() + p * s_.panel, segments_.data() + p * s_.panel}; }
  const Range& range_of(long p) const { return ranges_[p]; }
  // The first of them, of all.
  long first() const { return b_ * s_.a.queries + first_; }
  long count() const { return count_; }
  // Rows of panel p that are queries', and the place of row i of it among [B, T, N].
  long used(long p) const { return std::min(s_.panel, count_ * s_.group - p * s_.panel); }
  long place(long p, long i) const {
    const long row = p * s_.panel + i;
    return (first() + row / s_.group) * s_.a.heads + head_ * s_.group + row % s_.group;
  }
  // Numbers of a panel's rows from an array [B, T, N], or `other` where a row is none.
  void gather(const float* from, long p, float other, float* to) const {
    for (long i = 0; i < s_.panel; i++) to[i] = i < used(p) ? from[place(p, i)] : other;
  }

  Range range{};

 private:
  const Sizes& s_;
  long b_, head_, first_, count_;
  std::vector<int> positions_, segments_;
  std::vector<Range> ranges_;
};

// x[v][row] of a panel to rows of y.
void write_panel(const Sizes& s, const Queries& queries, long p, const float* x, long width, long offset, float factor,
                 const Tokens& y, float* turned) {
  const long lanes = loops().lanes;
  for (long first = 0; first < queries.used(p); first += lanes) {
    loops().transpose_sums(x + first, s.panel, width, turned, width);
    for (long i = first; i < std::min(first + lanes, queries.used(p)); i++) {
      float* const row = turned + (i - first) * width;
      if (factor != 1)
        for (long c = 0; c < width; c++) row[c] *= factor;
      loops().narrow[y.type](row, static_cast<char*>(y.data) + (queries.place(p, i) * y.width + offset) * size_of(y.type),
                             width);
    }
  }
}

// Scores of a panel's rows and a tile of keys: the predictor's, hidden where a row does not see a key.
void scores_of(const Sizes& s, const float* q1, const Queries& queries, long p, const Keys& keys, float* scores) {
  const ScoreTiles& tiles = loops().scores;
  tiles.products({keys.k1, s.wide_r, 0, 1}, keys.count, 1, s.a.form.r, q1, s.panel, s.panel, scores, s.panel, false);
  if (s.a.form.softcap != 0) tiles.cap(s.a.form.softcap, scores, keys.count);
  if (!queries.range_of(p).all_see(keys.range, s.a.window))
    tiles.hide(scores, queries.places(p), keys.places, keys.count, s.a.window);
}

void arguments_of(const Sizes& s, const float* q2, const Keys& keys, float* arguments) {
  const ScoreTiles& tiles = loops().scores;
  tiles.products({keys.k2, s.wide_rest, 0, 1}, keys.count, 1, s.rest, q2, s.panel, s.panel, arguments, s.panel, false);
  if (s.a.form.softcap_values != 0) tiles.cap(s.a.form.softcap_values, arguments, keys.count);
}

// The score from which on a row's keys are selected; the best one always is.
float threshold_of(const WholeAttention& a, float count, float mean, float squares, float best) {
  if (double(count) <= a.form.top_k) return kAll;
  const float deviation = std::sqrt(squares / std::max(count - float(a.form.ddof), 1.0f));
  const double share = std::min(std::max(a.form.top_k / double(count), 1e-6), 1 - 1e-6);
  const float threshold = mean + deviation * float(-normal_quantile(share));
  return threshold < best ? threshold : best;
}

class Forward {
 public:
  Forward(const WholeAttention& a, const Tokens& q, const Tokens& k, const Tokens& v, const Tokens& y,
          const RowStatistics& statistics)
      : s_(a), q_(q), k_(k), v_(v), y_(y), statistics_(statistics) {}

  void run(const Pool& pool) const {
    const long heads = s_.a.batch * s_.a.keyvalues, items = heads * s_.tiles;
    Team team = pool.team(items, items * s_.tile * s_.a.keys);
    // The longest first, for the last ones to end together: late queries see more keys.
    team.run(items, [&](long i) { attend(i % heads, s_.tiles - 1 - i / heads); });
  }

 private:
  void attend(long sequence_head, long tile) const {
    const WholeAttention& a = s_.a;
    const long b = sequence_head / a.keyvalues, head = sequence_head % a.keyvalues, rows = s_.rows();
    Scratch scratch(kKeys * (s_.wide_r + s_.wide_rest + s_.wide_values + 2 * s_.panel) +
                    Rows::floats(s_, a.form.r, s_.wide_r, false) + Rows::floats(s_, s_.rest, s_.wide_rest, false) +
                    rows * (s_.wide_values + 8) + 16 * s_.wide_values + 512);
    Keys keys(s_, scratch);
    Rows q1(s_, a.form.r, s_.wide_r, false, scratch), q2(s_, s_.rest, s_.wide_rest, false, scratch);
    const Queries queries(s_, b, head, tile);
    q1.read(s_, q_, queries.first(), queries.count(), head, 0);
    if (s_.rest) q2.read(s_, q_, queries.first(), queries.count(), head, a.form.r);
    float* const scores = scratch.take(kKeys * s_.panel);
    float* const arguments = scratch.take(kKeys * s_.panel);
    float* const mixed = scratch.take(rows * s_.wide_values);  // [panels, V, rows of a panel]
    float* const turned = scratch.take(16 * s_.wide_values);
    std::fill(mixed, mixed + rows * s_.wide_values, 0.0f);
    float* numbers[6];
    for (float*& of_rows : numbers) of_rows = scratch.take(rows);
    auto [best, total, threshold, count, mean, squares] = numbers;
    std::vector<int> attended(rows);
    const bool bounded = a.form.softcap != 0 && a.form.softcap <= kLargestCap;
    std::fill(best, best + rows, !a.selects && bounded ? 0.0f : kLowest);
    std::fill(total, total + rows, 0.0f);
    const ScoreTiles& tiles = loops().scores;

    auto over_keys = [&](bool with_values, auto step) {
      for (long j = 0; j < s_.key_tiles; j++) {
        keys.place(b, j);
        if (!queries.range.may_see(keys.range, a.window)) continue;
        keys.read(k_, v_, b, head, with_values);
        for (long p = 0; p < s_.panels; p++) {
          if (queries.used(p) <= 0 || !queries.range_of(p).may_see(keys.range, a.window)) continue;
          scores_of(s_, q1.of_panel(s_, p), queries, p, keys, scores);
          step(p, p * s_.panel);
        }
      }
    };

    if (a.selects) {
      for (float* of_rows : {count, mean, squares}) std::fill(of_rows, of_rows + rows, 0.0f);
      over_keys(false, [&](long, long at) { tiles.measure(scores, keys.count, count + at, mean + at, squares + at, best + at); });
      for (long i = 0; i < rows; i++) threshold[i] = threshold_of(a, count[i], mean[i], squares[i], best[i]);
    }
    over_keys(true, [&](long p, long at) {
      float* const into = mixed + at * s_.wide_values;
      if (a.selects) {
        tiles.weigh(scores, keys.count, threshold + at, best + at, total + at, attended.data() + at);
      } else if (bounded) {
        tiles.exponentials(scores, keys.count, total + at);
      } else if (tiles.exponentials_so_far(scores, keys.count, best + at, total + at, squares + at)) {
        tiles.multiply(into, a.value_width, squares + at);
      }
      if (s_.rest) {
        arguments_of(s_, q2.of_panel(s_, p), keys, arguments);
        tiles.softplus(scores, arguments, keys.count);
      }
      tiles.products({keys.v, 1, 0, s_.wide_values}, a.value_width, 1, keys.count, scores, s_.panel, s_.panel, into,
                     s_.panel, true);
    });
    for (long p = 0; p < s_.panels; p++) {
      float *const into = mixed + p * s_.panel * s_.wide_values, *const factor = squares;
      for (long i = 0; i < s_.panel; i++) {
        // A row that sees nothing has a softmax over nothing: its values are zero.
        const float sum = total[p * s_.panel + i];
        factor[i] = sum == 0 ? 0 : 1 / sum;
      }
      tiles.multiply(into, a.value_width, factor);
      write_panel(s_, queries, p, into, a.value_width, 0, 1, y_, turned);
      for (long i = 0; i < queries.used(p); i++) {
        const long row = p * s_.panel + i, place = queries.place(p, i);
        const float sum = total[row] == 0 ? 1 : total[row];
        statistics_.normaliser[place] = best[row] + std::log(sum);
        statistics_.threshold[place] = a.selects ? threshold[row] : kAll;
        statistics_.attended[place] = attended[row];
      }
    }
  }

  const Sizes s_;
  const Tokens &q_, &k_, &v_, &y_;
  const RowStatistics& statistics_;
};

class Backward {
 public:
  Backward(const WholeAttention& a, const Tokens& q, const Tokens& k, const Tokens& v, const Tokens& dy, const float* delta,
           const RowStatistics& statistics, const Tokens& dq, const Tokens& dk, const Tokens& dv)
      : s_(a), q_(q), k_(k), v_(v), dy_(dy), delta_(delta), statistics_(statistics), dq_(dq), dk_(dk), dv_(dv),
        heads_(a.batch * a.keyvalues), parts_(std::min(s_.tiles, (kItems + heads_ - 1) / heads_)),
        wide_(s_.wide_r + s_.wide_rest + s_.wide_values) {}

  void run(const Pool& pool) const {
    const WholeAttention& a = s_.a;
    // [heads, parts, tiles of keys, keys of a tile, widths]
    const long of_part = s_.key_tiles * kKeys * wide_;
    const std::unique_ptr<float[]> sums(new float[heads_ * parts_ * of_part]);
    Team team = pool.team(std::max(heads_ * parts_, heads_ * s_.key_tiles), heads_ * a.queries * a.keys);
    team.run(heads_ * parts_, [&](long i) {
      float* const own = sums.get() + i * of_part;
      std::fill(own, own + of_part, 0.0f);
      // Every so many tiles, so that each part has early and late queries.
      for (long tile = i % parts_; tile < s_.tiles; tile += parts_) differentiate(i / parts_, tile, own);
    });
    team.run(heads_ * s_.key_tiles, [&](long i) {
      write_keys(i / s_.key_tiles, i % s_.key_tiles, sums.get() + i / s_.key_tiles * parts_ * of_part, of_part);
    });
  }

 private:
  static constexpr long kItems = 8;  // to divide among threads, at least

  // Gradients of one tile of queries, and its part of those of the keys, [S, widths], which are added up.
  void differentiate(long sequence_head, long tile, float* sums) const {
    const WholeAttention& a = s_.a;
    const long b = sequence_head / a.keyvalues, head = sequence_head % a.keyvalues, rows = s_.rows(), r = a.form.r;
    const long of_panel = kKeys * s_.panel;
    Scratch scratch(kKeys * wide_ + Rows::floats(s_, r, s_.wide_r, true) + Rows::floats(s_, s_.rest, s_.wide_rest, true) +
                    Rows::floats(s_, a.value_width, s_.wide_values, true) + 3 * s_.panels * of_panel +
                    rows * (r + s_.rest + 8) + 16 * std::max(r, s_.rest) + 512);
    Keys keys(s_, scratch);
    Rows q1(s_, r, s_.wide_r, true, scratch), q2(s_, s_.rest, s_.wide_rest, true, scratch);
    Rows dy(s_, a.value_width, s_.wide_values, true, scratch);
    const Queries queries(s_, b, head, tile);
    q1.read(s_, q_, queries.first(), queries.count(), head, 0);
    if (s_.rest) q2.read(s_, q_, queries.first(), queries.count(), head, r);
    dy.read(s_, dy_, queries.first(), queries.count(), head, 0);
    float* const weights = scratch.take(s_.panels * of_panel);  // [panels, keys, rows of a panel]
    float* const dscores = scratch.take(s_.panels * of_panel);
    float* const darguments = scratch.take(s_.panels * of_panel);
    float *const dq1 = scratch.take(rows * r), *const dq2 = scratch.take(rows * s_.rest);
    float* const turned = scratch.take(16 * std::max(r, s_.rest));
    std::fill(dq1, dq1 + rows * r, 0.0f);
    std::fill(dq2, dq2 + rows * s_.rest, 0.0f);
    float* numbers[3];
    for (float*& of_rows : numbers) of_rows = scratch.take(rows);
    auto [threshold, normaliser, delta] = numbers;
    for (long p = 0; p < s_.panels; p++) {
      queries.gather(statistics_.threshold, p, kAll, threshold + p * s_.panel);
      queries.gather(statistics_.normaliser, p, 0, normaliser + p * s_.panel);
      queries.gather(delta_, p, 0, delta + p * s_.panel);
    }
    const ScoreTiles& tiles = loops().scores;
    for (long j = 0; j < s_.key_tiles; j++) {
      keys.place(b, j);
      if (!queries.range.may_see(keys.range, a.window)) continue;
      keys.read(k_, v_, b, head);
      auto visible = [&](long p) { return queries.used(p) > 0 && queries.range_of(p).may_see(keys.range, a.window); };
      for (long p = 0; p < s_.panels; p++) {
        if (!visible(p)) continue;
        const long at = p * of_panel, row = p * s_.panel;
        scores_of(s_, q1.of_panel(s_, p), queries, p, keys, weights + at);
        tiles.products({keys.v, s_.wide_values, 0, 1}, keys.count, 1, a.value_width, dy.of_panel(s_, p), s_.panel, s_.panel,
                       dscores + at, s_.panel, false);
        if (s_.rest) arguments_of(s_, q2.of_panel(s_, p), keys, darguments + at);
        tiles.gradients({weights + at, dscores + at, s_.rest ? darguments + at : nullptr, threshold + row,
                         normaliser + row, delta + row, a.form.softcap, a.form.softcap_values},
                        keys.count);
        tiles.products({keys.k1, 1, 0, s_.wide_r}, r, 1, keys.count, dscores + at, s_.panel, s_.panel, dq1 + row * r,
                       s_.panel, true);
        if (s_.rest)
          tiles.products({keys.k2, 1, 0, s_.wide_rest}, s_.rest, 1, keys.count, darguments + at, s_.panel, s_.panel,
                         dq2 + row * s_.rest, s_.panel, true);
      }
      // The keys' gradients, over runs of panels that see them.
      float* const own = sums + j * kKeys * wide_;
      for (long p = 0; p < s_.panels;) {
        long end = p;
        while (end < s_.panels && visible(end)) end++;
        auto add = [&](const float* factors, const Rows& x, long offset) {
          tiles.products({factors + p * of_panel, s_.panel, of_panel, 1}, keys.count, end - p, s_.panel,
                         x.rows + p * s_.panel * x.wide, x.wide, x.wide, own + offset, wide_, true);
        };
        if (end > p) {
          add(dscores, q1, 0);
          if (s_.rest) add(darguments, q2, s_.wide_r);
          add(weights, dy, s_.wide_r + s_.wide_rest);
        }
        p = end + 1;
      }
    }
    for (long p = 0; p < s_.panels; p++) {
      write_panel(s_, queries, p, dq1 + p * s_.panel * r, r, 0, a.form.predictor_scale, dq_, turned);
      if (s_.rest)
        write_panel(s_, queries, p, dq2 + p * s_.panel * s_.rest, s_.rest, r, a.form.value_scale, dq_, turned);
    }
  }

  // The sums of all parts.
  void write_keys(long sequence_head, long tile, float* sums, long of_part) const {
    const WholeAttention& a = s_.a;
    const long b = sequence_head / a.keyvalues, head = sequence_head % a.keyvalues, first = tile * kKeys;
    float* const total = sums + first * wide_;
    const long count = std::min(kKeys, a.keys - first);
    for (long part = 1; part < parts_; part++)
      for (long i = 0; i < count * wide_; i++) total[i] += total[part * of_part + i];
    for (long i = 0; i < count; i++) {
      const float* const row = total + i * wide_;
      const long place = (b * a.keys + first + i) * a.keyvalues + head;
      auto write = [&](const Tokens& to, const float* from, long offset, long n) {
        loops().narrow[to.type](from, static_cast<char*>(to.data) + (place * to.width + offset) * size_of(to.type), n);
      };
      write(dk_, row, 0, a.form.r);
      if (s_.rest) write(dk_, row + s_.wide_r, a.form.r, s_.rest);
      write(dv_, row + s_.wide_r + s_.wide_rest, 0, a.value_width);
    }
  }

  const Sizes s_;
  const Tokens &q_, &k_, &v_, &dy_;
  const float* const delta_;
  const RowStatistics& statistics_;
  const Tokens &dq_, &dk_, &dv_;
  const long heads_, parts_, wide_;
};

}  // namespace

void attention_forward(const Pool& pool, const WholeAttention& a, const Tokens& q, const Tokens& k, const Tokens& v,
                       const Tokens& y, const RowStatistics& statistics) {
  Forward(a, q, k, v, y, statistics).run(pool);
}

void attention_backward(const Pool& pool, const WholeAttention& a, const Tokens& q, const Tokens& k, const Tokens& v,
                        const Tokens& dy, const float* delta, const RowStatistics& statistics, const Tokens& dq,
                        const Tokens& dk, const Tokens& dv) {
  Backward(a, q, k, v, dy, delta, statistics, dq, dk, dv).run(pool);
}

}  // namespace sparsezoo
