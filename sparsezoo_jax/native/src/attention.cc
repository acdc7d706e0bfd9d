// Attention of one query per sequence to all visible keys: each run of keys with its own largest score, then joined.
#include "attention.h"

namespace sparsezoo {

void attention(const Pool& pool, const Heads& heads, const Tokens& q, const Matrix& k, const Matrix& v, float scale,
               float softcap, const Tokens& y) {
  constexpr long kKeys = 512;
  const Vectors in(q, k.type), out(q.count, q.width);
  const long group = heads.queries / heads.keyvalues, width = q.width;
  for (long j = 0; j < q.count; j++) multiply(in[j], in.stride(), scale);
  const auto visible = visible_by_sequence(heads, kKeys);
  const auto items = head_runs(visible, heads.keyvalues);
  const long count = long(items.size());
  const Vectors mixed(count * group, width);
  struct Weight {
    float largest;
    double total;
  };
  std::vector<Weight> weights(count * group);
  Team team = pool.team(count, count * kKeys * width * (size_of(k.type) + size_of(v.type)));
  team.run(count, [&](long i) {
    const HeadRun& item = items[i];
    const long n = item.run.length, row = (item.sequence * heads.keyvalues + item.head) * heads.keys + item.run.first;
    float* const* queries = in.pointers() + item.sequence * heads.queries + item.head * group;
    const Vectors scores(group, kKeys);
    // The last keys are read while the first values are asked for.
    const long ahead = std::min(n, rows_ahead(width * size_of(k.type)));
    k.dot(row, n - ahead, width, queries, group, scores[0], scores.stride(), k.row(row + ahead));
    k.dot(row + n - ahead, ahead, width, queries, group, scores[0] + n - ahead, scores.stride(), v.row(row));
    mixed.zero(i * group, group);
    for (long g = 0; g < group; g++) {
      if (softcap != 0) loops().softcap(softcap, scores[g], n);
      Weight& weight = weights[i * group + g];
      weight.largest = loops().moments(scores[g], n).largest;
      weight.total = loops().exponentials(weight.largest, scores[g], n);
    }
    v.axpy(row, n, width, scores[0], scores.stride(), group, mixed.pointers() + i * group, v.row(row + ahead));
  });

  out.zero(0, q.count);
  std::vector<Weight> joined(q.count, {-std::numeric_limits<float>::infinity(), 0});
  auto query_of = [&](long i, long g) { return items[i].sequence * heads.queries + items[i].head * group + g; };
  for (long i = 0; i < count; i++)
    for (long g = 0; g < group; g++) {
      float& largest = joined[query_of(i, g)].largest;
      const float own = weights[i * group + g].largest;
      if (!(own <= largest)) largest = own;
    }
  for (long i = 0; i < count; i++)
    for (long g = 0; g < group; g++) {
      const long j = query_of(i, g);
      const Weight& weight = weights[i * group + g];
      const float factor = std::exp(weight.largest - joined[j].largest);
      joined[j].total += weight.total * factor;
      for (long d = 0; d < out.stride(); d++) out[j][d] += factor * mixed[i * group + g][d];
    }
  for (long j = 0; j < q.count; j++)
    if (joined[j].total != 0) multiply(out[j], out.stride(), float(1 / joined[j].total));
  out.write(y, v.type);
}

}  // namespace sparsezoo
