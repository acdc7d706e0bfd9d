// Spark attention (arXiv 2506.06644) of one query per sequence: the predictor's part of all visible keys, and the other
// part of key and value of those that it selects.
#include "attention.h"
#include "quantile.h"

namespace sparsezoo {

namespace {

// Keys of one query, and the predictor's softmax over them.
struct Chosen {
  std::vector<int> places;  // among the visible keys of the sequence
  std::vector<float> weights;
};

// `scores` of n visible keys; none is dropped where no more than top_k are visible, and the best key never is.
Chosen select_keys(const float* scores, long n, const SparkAttention& form) {
  Chosen chosen;
  if (n == 0) return chosen;
  chosen.places.resize(n + 64);
  const Moments moments = loops().moments(scores, n);
  long count = n;
  if (form.top_k == 0 || double(n) <= form.top_k) {
    for (long i = 0; i < n; i++) chosen.places[i] = int(i);
  } else {
    const float mean = float(moments.sum / double(n));
    const double variance = loops().squares(mean, scores, n) / double(std::max(n - form.ddof, 1L));
    const double share = std::min(std::max(form.top_k / double(n), 1e-6), 1 - 1e-6);
    float threshold = float(mean - std::sqrt(variance) * normal_quantile(share));
    if (threshold > moments.largest) threshold = moments.largest;
    count = loops().select(threshold, false, scores, 0, n, chosen.places.data());
  }
  chosen.places.resize(count);
  chosen.weights.resize(count);
  for (long i = 0; i < count; i++) chosen.weights[i] = scores[chosen.places[i]];
  const double total = loops().exponentials(moments.largest, chosen.weights.data(), count);
  multiply(chosen.weights.data(), count, float(1 / total));
  return chosen;
}

}  // namespace

void spark_attention(const Pool& pool, const Heads& heads, const SparkAttention& form, const Tokens& q, const Matrix& k1,
                     const Matrix& k2, const Matrix& v, const Tokens& y, int* attended) {
  constexpr long kKeys = 1024;
  const long group = heads.queries / heads.keyvalues, width = q.width, r = form.r;
  const Vectors in(q, k1.type, 0, r), values(q, k2.type, r, width - r);
  for (long j = 0; j < q.count; j++) {
    multiply(in[j], in.stride(), form.predictor_scale);
    multiply(values[j], values.stride(), form.value_scale);
  }
  const auto visible = visible_by_sequence(heads, kKeys);
  const auto items = head_runs(visible, heads.keyvalues);
  const Vectors scores(q.count, heads.keys);
  // Each query's keys are read in a few parts, for there may be fewer queries than threads.
  constexpr long kParts = 4;
  const long count = long(items.size()), row_bytes = r * size_of(k1.type);
  Team team = pool.team(std::max(count, kParts * q.count), count * kKeys * row_bytes);
  team.run(count, [&](long i) {
    const HeadRun& item = items[i];
    const Run& run = item.run;
    const long row = (item.sequence * heads.keyvalues + item.head) * heads.keys + run.first;
    const long first = item.sequence * heads.queries + item.head * group;
    k1.dot(row, run.length, r, in.pointers() + first, group, scores[first] + run.place, scores.stride(),
           k1.ahead_of(row));
    if (form.softcap != 0)
      for (long g = 0; g < group; g++) loops().softcap(form.softcap, scores[first + g] + run.place, run.length);
  });

  std::vector<Chosen> chosen(q.count);
  team.run(q.count, [&](long j) {
    chosen[j] = select_keys(scores[j], visible[j / heads.queries].count, form);
    attended[j] = int(chosen[j].places.size());
    // From places among visible keys to keys.
    const auto& runs = visible[j / heads.queries].runs;
    size_t at = 0;
    for (int& place : chosen[j].places) {
      while (place >= runs[at].place + runs[at].length) at++;
      place = int(runs[at].first + place - runs[at].place);
    }
  });

  constexpr long kTogether = 16;
  const Vectors mixed(kParts * q.count, width);
  team.run(kParts * q.count, [&](long item) {
    const long j = item / kParts, part = item % kParts;
    const Chosen& keys = chosen[j];
    const long n = long(keys.places.size());
    const long begin = first_of(part, kParts, n), end = first_of(part + 1, kParts, n);
    const long base = (j / heads.queries * heads.keyvalues + j % heads.queries / group) * heads.keys;
    mixed.zero(item, 1);
    // Some keys at a time: first what their values count, then the values. Rows lie far apart, where the processor does
    // not foresee them: those of the next keys are fetched while these are used.
    for (long at = begin; at < end; at += kTogether) {
      const long some = std::min(kTogether, end - at);
      const float* const softmax = keys.weights.data() + at;
      auto row = [&](long i) { return base + keys.places[std::min(at + i, end - 1)]; };
      float weights[kTogether];
      if (form.softplus) {
        for (long i = 0; i < some; i++)
          k2.dot(row(i), 1, width - r, values.pointers() + j, 1, weights + i, 1, k2.row(row(i + kTogether)));
        if (form.softcap_values != 0) loops().softcap(form.softcap_values, weights, some);
        loops().softplus(weights, some);
        for (long i = 0; i < some; i++) weights[i] *= softmax[i];
      } else {
        std::copy(softmax, softmax + some, weights);
      }
      for (long i = 0; i < some; i++)
        v.axpy(row(i), 1, width, weights + i, 1, 1, mixed.pointers() + item, v.row(row(i + kTogether)));
    }
  });
  for (long j = 0; j < q.count; j++) {
    float* const total = mixed[j * kParts];
    for (long p = 1; p < kParts; p++)
      for (long d = 0; d < mixed.stride(); d++) total[d] += mixed[j * kParts + p][d];
    std::copy(total, total + mixed.stride(), mixed[j]);
  }
  mixed.write(y, v.type);
}

}  // namespace sparsezoo
