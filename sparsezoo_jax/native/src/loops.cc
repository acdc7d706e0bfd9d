// Compiled once for each level (SPARSEZOO_LEVEL and its flags, see build.py): no function of the standard library that
// is defined in a header, for the linker would keep one copy of it, which may be of a level that the processor lacks.
#include "loops.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <utility>

extern "C" double erf(double);

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace sparsezoo {
namespace CONCAT(level_, SPARSEZOO_LEVEL) {
namespace {

#include "vectors.h"

#include "rows.h"

template <class F, int... I>
INLINE void each_of(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), ..., f(N - 1) with numbers that the compiler knows: gcc keeps an array in registers only if it never meets
// it in a loop.
template <int N, class F>
INLINE void each(F f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

#define UNROLLED(i) [&](auto i) __attribute__((always_inline))

// Writes the sums of products t to t + 3, of which there are R for each of M vectors.
template <int R, int M, int t>
INLINE void write_sums(Four four, float* out, long ld_out) {
  if constexpr (R == 4) {
    __builtin_memcpy(out + t / R * ld_out, &four, sizeof(four));
  } else {
    each<4>(UNROLLED(s) {
      if constexpr (t + s < R * M) out[(t + s) / R * ld_out + (t + s) % R] = four[int(s)];
    });
  }
}

#include "int8.h"

// Bytes of a row that a turn of `dot_of` reads: both of its sums take part in each.
template <class W>
constexpr int kUnroll = kGroup<W> == 1 ? 2 : 1;
template <class W>
constexpr long kPiece = kUnroll<W> * kGroup<W> * kLanes * long(sizeof(W));

// R rows times M vectors. Two sums for each product whatever R and M, so that all forms round alike.
template <class W, int R, int M, class Rows, class Next>
INLINE void dot_of(const Rows& w, const Next& next, long k, const float* const* x, float* out, long ld_out) {
  constexpr int P = kGroup<W>;
  constexpr long kGroupSize = P * kLanes;
  constexpr int kSums = (R * M + 3) / 4 * 4;
  Floats sum[kSums][2];
  each<kSums>(UNROLLED(t) { sum[t][0] = sum[t][1] = Floats{}; });
  long i = 0;
  for (; i + kUnroll<W> * kGroupSize <= k; i += kUnroll<W> * kGroupSize)
    each<R>(UNROLLED(r) {
      next.fetch(r, i * long(sizeof(W)), kPiece<W>);
      each<kUnroll<W>>(UNROLLED(u) {
        Floats v[P];
        load_group(w.at(r, i + u * kGroupSize), v);
        each<P>(UNROLLED(p) {
          constexpr int q = u * P + p;
          each<M>(UNROLLED(j) { sum[j * R + r][q % 2] += v[p] * load(x[j] + i + q * kLanes); });
        });
      });
    });
  for (; i < k; i += kGroupSize)
    each<R>(UNROLLED(r) {
      Floats v[P];
      load_group(w.at(r, i), k - i < kGroupSize ? k - i : kGroupSize, v);
      each<P>(UNROLLED(p) {
        each<M>(UNROLLED(j) { sum[j * R + r][p % 2] += v[p] * load(x[j] + i + p * kLanes); });
      });
    });
  each<kSums / 4>(UNROLLED(f) {
    constexpr int t = 4 * f;
    write_sums<R, M, t>(sums_of(sum[t][0] + sum[t][1], sum[t + 1][0] + sum[t + 1][1], sum[t + 2][0] + sum[t + 2][1],
                                sum[t + 3][0] + sum[t + 3][1]),
                        out, ld_out);
  });
}

template <int R, int M, class W>
INLINE void dot_of(const W* w, long ld, long k, const float* const* x, float* out, long ld_out, const char* ahead) {
  dot_of<W, R, M>(Apart<W>{w, ld}, Ahead<W, R>(ahead, ld, k, kPiece<W>), k, x, out, ld_out);
}

// Rows taken together with M vectors: as many as there are registers for.
template <int M>
constexpr int kTogether = kLanes == 16 ? (M == 4 ? 2 : 4) : 4 / M;

template <class W, int M>
INLINE void dot_rows(const W* w, long ld, long rows, long k, const float* const* x, float* out, long ld_out,
                     const char* ahead) {
  // One row of int8 after another is as fast as four together, for their sums are whole, and memory likes it better.
  constexpr int R = sizeof(W) == 1 && M == 1 ? 1 : kTogether<M>;
  const long row = ld * long(sizeof(W));
  long i = 0;
  for (; i + R <= rows; i += R) dot_of<R, M>(w + i * ld, ld, k, x, out + i, ld_out, ahead ? ahead + i * row : ahead);
  for (; i < rows; i++) dot_of<1, M>(w + i * ld, ld, k, x, out + i, ld_out, ahead ? ahead + i * row : ahead);
}

template <class W>
void dot(const void* weights, long ld, long rows, long k, const float* const* x, long m, float* out, long ld_out,
         const char* ahead) {
  const W* w = static_cast<const W*>(weights);
  // A few rows at a time, which stay in the nearest cache for the next vectors.
  constexpr long kRows = 4;
  for (long i = 0; i < rows; i += kRows) {
    const long n = rows - i < kRows ? rows - i : kRows;
    const W* at = w + i * ld;
    const char* next = ahead ? ahead + i * ld * long(sizeof(W)) : nullptr;
    long j = 0;
    for (; j + 4 <= m; j += 4, next = nullptr) dot_rows<W, 4>(at, ld, n, k, x + j, out + i + j * ld_out, ld_out, next);
    for (; j + 2 <= m; j += 2, next = nullptr) dot_rows<W, 2>(at, ld, n, k, x + j, out + i + j * ld_out, ld_out, next);
    for (; j < m; j++, next = nullptr) dot_rows<W, 1>(at, ld, n, k, x + j, out + i + j * ld_out, ld_out, next);
  }
}

#if defined(__AVX512BF16__)
// The same with vectors of bfloat16, which the processor multiplies in pairs. One sum for each product, so that all forms
// round alike.
template <int R, int M>
INLINE void dot_pairs_of(const bfloat16* w, long ld, long k, const float* const* x, float* out, long ld_out,
                         const char* ahead) {
  constexpr long kNumbers = 2 * kLanes;
  constexpr int kSums = (R * M + 3) / 4 * 4;
  const Ahead<bfloat16, R> next(ahead, ld, k, kLine);
  Floats sum[kSums];
  each<kSums>(UNROLLED(t) { sum[t] = Floats{}; });
  const auto add = [&](auto r, Words pairs, long i) __attribute__((always_inline)) {
    each<M>(UNROLLED(j) {
      const Words tokens = read<Words>(reinterpret_cast<const bfloat16*>(x[j]) + i);
      sum[j * R + r] = same_bits<Floats>(
          _mm512_dpbf16_ps(same_bits<__m512>(sum[j * R + r]), same_bits<__m512bh>(pairs), same_bits<__m512bh>(tokens)));
    });
  };
  long i = 0;
  for (; i + kNumbers <= k; i += kNumbers)
    each<R>(UNROLLED(r) {
      next.fetch(r, i * 2, kLine);
      add(r, read<Words>(w + r * ld + i), i);
    });
  if (i < k)
    each<R>(UNROLLED(r) {
      alignas(64) bfloat16 rest[kNumbers] = {};
      __builtin_memcpy(rest, w + r * ld + i, (k - i) * sizeof(bfloat16));
      add(r, read<Words>(rest), i);
    });
  each<kSums / 4>(UNROLLED(f) {
    constexpr int t = 4 * f;
    write_sums<R, M, t>(sums_of(sum[t], sum[t + 1], sum[t + 2], sum[t + 3]), out, ld_out);
  });
}

template <int M>
INLINE void dot_pairs_rows(const bfloat16* w, long ld, long rows, long k, const float* const* x, float* out, long ld_out,
                           const char* ahead) {
  long i = 0;
  for (; i + 4 <= rows; i += 4)
    dot_pairs_of<4, M>(w + i * ld, ld, k, x, out + i, ld_out, ahead ? ahead + i * ld * 2 : ahead);
  for (; i < rows; i++) dot_pairs_of<1, M>(w + i * ld, ld, k, x, out + i, ld_out, ahead ? ahead + i * ld * 2 : ahead);
}

void dot_pairs(const void* weights, long ld, long rows, long k, const float* const* x, long m, float* out, long ld_out,
               const char* ahead) {
  const bfloat16* w = static_cast<const bfloat16*>(weights);
  constexpr long kRows = 4;  // as in `dot`
  for (long i = 0; i < rows; i += kRows) {
    const long n = rows - i < kRows ? rows - i : kRows;
    const bfloat16* at = w + i * ld;
    const char* next = ahead ? ahead + i * ld * 2 : nullptr;
    long j = 0;
    for (; j + 4 <= m; j += 4, next = nullptr) dot_pairs_rows<4>(at, ld, n, k, x + j, out + i + j * ld_out, ld_out, next);
    for (; j + 2 <= m; j += 2, next = nullptr) dot_pairs_rows<2>(at, ld, n, k, x + j, out + i + j * ld_out, ld_out, next);
    for (; j < m; j++, next = nullptr) dot_pairs_rows<1>(at, ld, n, k, x + j, out + i + j * ld_out, ld_out, next);
  }
}
#endif

// y_j += sum over R rows, in the order of the rows.
template <class W, int R, int M, class Rows, class Next>
INLINE void axpy_of(const Rows& w, const Next& next, long k, const float* c, long ld_c, float* const* y) {
  constexpr int P = kGroup<W>;
  constexpr long kGroupSize = P * kLanes;
  Floats factor[R][M];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < M; j++) factor[r][j] = all(c[j * ld_c + r]);
  auto add = [&](long i, const Floats (&v)[R][P]) __attribute__((always_inline)) {
    for (int p = 0; p < P; p++)
      for (int j = 0; j < M; j++) {
        float* const to = y[j] + i + p * kLanes;
        Floats sum = load(to);
        for (int r = 0; r < R; r++) sum += factor[r][j] * v[r][p];
        write(to, sum);
      }
  };
  long i = 0;
  for (; i + kGroupSize <= k; i += kGroupSize) {
    Floats v[R][P];
    for (int r = 0; r < R; r++) {
      if (kLanes == 16 || i * long(sizeof(W)) % kLine == 0) next.fetch(r, i * long(sizeof(W)), 1);
      load_group(w.at(r, i), v[r]);
    }
    add(i, v);
  }
  if (i < k) {
    Floats v[R][P];
    for (int r = 0; r < R; r++) load_group(w.at(r, i), k - i, v[r]);
    add(i, v);
  }
}

template <int R, int M, class W>
INLINE void axpy_of(const W* w, long ld, long k, const float* c, long ld_c, float* const* y, const char* ahead) {
  if constexpr (R == 4 && sizeof(W) == 1) return axpy_four<M>(w, ld, k, c, ld_c, y, ahead);
  axpy_of<W, R, M>(Apart<W>{w, ld}, Ahead<W, R>(ahead, ld, k, kLine), k, c, ld_c, y);
}

template <int R, class W>
INLINE void axpy_vectors(const W* w, long ld, long k, const float* c, long ld_c, long m, float* const* y,
                         const char* ahead) {
  long j = 0;
  if constexpr (kLanes == 16)
    for (; j + 4 <= m; j += 4) axpy_of<R, 4>(w, ld, k, c + j * ld_c, ld_c, y + j, j ? nullptr : ahead);
  for (; j + 2 <= m; j += 2) axpy_of<R, 2>(w, ld, k, c + j * ld_c, ld_c, y + j, j ? nullptr : ahead);
  for (; j < m; j++) axpy_of<R, 1>(w, ld, k, c + j * ld_c, ld_c, y + j, j ? nullptr : ahead);
}

template <class W>
void axpy(const void* weights, long ld, long rows, long k, const float* c, long ld_c, long m, float* const* y,
          const char* ahead) {
  const W* w = static_cast<const W*>(weights);
  const long row = ld * long(sizeof(W));
  long i = 0;
  for (; i + 4 <= rows; i += 4)
    axpy_vectors<4>(w + i * ld, ld, k, c + i, ld_c, m, y, ahead ? ahead + i * row : nullptr);
  for (; i < rows; i++) axpy_vectors<1>(w + i * ld, ld, k, c + i, ld_c, m, y, ahead ? ahead + i * row : nullptr);
}

// Rows at `places` times one vector, four at a time: the sums of one row alone would wait for each other. Results are
// those of `dot`.
template <class W>
void dot_at(const void* weights, long ld, const int* places, long rows, long left, long ahead, long k, const float* x,
            float* out) {
  const W* w = static_cast<const W*>(weights);
  long i = 0;
  if constexpr (sizeof(W) > 1)
    for (; i + 4 <= rows; i += 4) {
      const Scattered<W, 4> four(w, ld, places + i, left - i, ahead);
      dot_of<W, 4, 1>(four, four, k, &x, out + i, 4);
    }
  for (; i < rows; i++) {
    const W* const next = w + places[i + ahead < left ? i + ahead : i] * ld;
    dot_of<1, 1>(w + places[i] * ld, ld, k, &x, out + i, 1, reinterpret_cast<const char*>(next));
  }
}

// y += sum_i c[i] w_places[i], four rows at a time, so that y is read and written once for these. Results are those of
// one row after another; four rows of int8 are rounded together, which would make others of them.
template <class W>
void axpy_at(const void* weights, long ld, const int* places, long rows, long left, long ahead, long k, const float* c,
             float* y) {
  const W* w = static_cast<const W*>(weights);
  long i = 0;
  if constexpr (sizeof(W) > 1)
    for (; i + 4 <= rows; i += 4) {
      const Scattered<W, 4> four(w, ld, places + i, left - i, ahead);
      axpy_of<W, 4, 1>(four, four, k, c + i, 4, &y);
    }
  for (; i < rows; i++) {
    const W* const next = w + places[i + ahead < left ? i + ahead : i] * ld;
    axpy_of<1, 1>(w + places[i] * ld, ld, k, c + i, 1, &y, reinterpret_cast<const char*>(next));
  }
}

// Applies f to vectors of s; the last one is filled up, so that a number's result does not depend on its place.
template <class F>
INLINE void map(float* s, long n, F f) {
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) write(s + i, f(load(s + i)));
  if (i < n) {
    float rest[kLanes] = {};
    __builtin_memcpy(rest, s + i, (n - i) * sizeof(float));
    write(rest, f(load(rest)));
    __builtin_memcpy(s + i, rest, (n - i) * sizeof(float));
  }
}

// Moves the numbers of each group to the places where `load_group` puts those that they are multiplied by, or back.
template <class W, bool kBack>
void arrange(float* x, long n) {
  constexpr int P = kGroup<W>;
  float group[P * kLanes];
  for (long i = 0; P > 1 && i < n; i += P * kLanes) {
    for (int t = 0; t < kLanes; t++)
      for (int p = 0; p < P; p++) {
        if (kBack) {
          group[P * t + p] = x[i + p * kLanes + t];
        } else {
          group[p * kLanes + t] = x[i + P * t + p];
        }
      }
    __builtin_memcpy(x + i, group, sizeof(group));
  }
}

void activate(Activation activation, float* h, long n) {
  switch (activation) {
    case kGeluTanh:
      // x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      map(h, n, [](Floats x) { return x * sigmoid_of(1.5957691216057308f * (x + 0.044715f * x * x * x)); });
      break;
    case kSilu:
      map(h, n, [](Floats x) { return x * sigmoid_of(x); });
      break;
    case kRelu:
      map(h, n, [](Floats x) { return x < Floats{} ? Floats{} : x; });
      break;
    case kRelu2:
      map(h, n, [](Floats x) { return x < Floats{} ? Floats{} : x * x; });
      break;
    case kGelu:
      for (long i = 0; i < n; i++) h[i] = float(h[i] * 0.5 * (1 + erf(h[i] * 0.70710678118654752440)));
      break;
  }
}

void softcap(float cap, float* s, long n) {
  map(s, n, [cap](Floats x) { return cap * tanh_of(x * (1 / cap)); });
}

void softplus(float* s, long n) {
  map(s, n, [](Floats x) { return softplus_of(x).value; });
}

double exponentials(float shift, float* s, long n) {
  double total = 0;
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats e = exp_of(load(s + i) - shift);
    write(s + i, e);
    total += sum_of(e);
  }
  for (; i < n; i++) {
    s[i] = exp_of(all(s[i] - shift))[0];
    total += s[i];
  }
  return total;
}

// Sums of a few hundred numbers in float, those in double: as exact as needed, and fast.
constexpr long kBlock = 64 * kLanes;

Moments moments(const float* s, long n) {
  Moments found;
  if (n == 0) return found;
  Floats largest = all(s[0]);
  float rest_largest = s[0];
  for (long start = 0; start < n; start += kBlock) {
    const long end = start + kBlock < n ? start + kBlock : n;
    Floats sum[2] = {Floats{}, Floats{}};
    long i = start;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      Floats a = load(s + i), b = load(s + i + kLanes);
      sum[0] += a;
      sum[1] += b;
      largest = a > largest ? a : largest;
      largest = b > largest ? b : largest;
    }
    float total = sum_of(sum[0] + sum[1]);
    for (; i < end; i++) {
      total += s[i];
      rest_largest = s[i] > rest_largest ? s[i] : rest_largest;
    }
    found.sum += total;
  }
  for (int i = 0; i < kLanes; i++) rest_largest = largest[i] > rest_largest ? largest[i] : rest_largest;
  found.largest = found.sum != found.sum ? float(found.sum) : rest_largest;
  return found;
}

double squares(float mean, const float* s, long n) {
  double found = 0;
  for (long start = 0; start < n; start += kBlock) {
    const long end = start + kBlock < n ? start + kBlock : n;
    Floats sum[2] = {Floats{}, Floats{}};
    long i = start;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      Floats a = load(s + i) - mean, b = load(s + i + kLanes) - mean;
      sum[0] += a * a;
      sum[1] += b * b;
    }
    float total = sum_of(sum[0] + sum[1]);
    for (; i < end; i++) total += (s[i] - mean) * (s[i] - mean);
    found += total;
  }
  return found;
}

long select(float threshold, bool strictly, const float* s, long from, long n, int* places) {
  long count = 0, i = from;
  for (; i + kLanes <= n; i += kLanes) {
    Floats a = load(s + i);
    Ints below = strictly ? Ints(a <= threshold) : Ints(a < threshold);
    // Most vectors have nothing to select: all of their lanes are -1.
    Ints some = ~below;
    typedef long long Longs __attribute__((vector_size(4 * kLanes)));
    Longs wide = same_bits<Longs>(some);
    long long any = 0;
    for (int t = 0; t < kLanes / 2; t++) any |= wide[t];
    if (!any) continue;
    for (int t = 0; t < kLanes; t++) {
      places[count] = int(i + t);
      count += some[t] & 1;
    }
  }
  for (; i < n; i++) {
    places[count] = int(i);
    count += strictly ? !(s[i] <= threshold) : !(s[i] < threshold);
  }
  return count;
}

template <class W>
void widen(const void* src, float* x, long n) {
  const W* from = static_cast<const W*>(src);
  for (long i = 0; i < n; i++) x[i] = one(from + i);
}

void narrow_float(const float* x, void* dst, long n) { __builtin_memcpy(dst, x, n * sizeof(float)); }

void narrow_bfloat16(const float* x, void* dst, long n) {
  bfloat16* to = static_cast<bfloat16*>(dst);
  for (long i = 0; i < n; i++) {
    unsigned bits = same_bits<unsigned>(x[i]);
    // To the nearest, ties to even; a NaN stays one.
    unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i].bits = (unsigned short)(x[i] != x[i] ? (bits >> 16 | 0x40) : rounded);
  }
}

unsigned stream(const void* data, long bytes) {
  const char* p = static_cast<const char*>(data);
  Words sum[4] = {};
  long i = 0;
  for (; i + 16 * kLanes <= bytes; i += 16 * kLanes)
    for (int t = 0; t < 4; t++) sum[t] += read<Words>(p + i + 4 * kLanes * t);
  Words total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  unsigned found = 0;
  for (int t = 0; t < kLanes; t++) found += total[t];
  return found;
}

#include "tiles.h"

#include "score_tiles.h"

#include "grouped_tiles.h"

}  // namespace
}  // namespace CONCAT(level_, SPARSEZOO_LEVEL)

const Loops* CONCAT(loops_, SPARSEZOO_LEVEL)() {
  using namespace CONCAT(level_, SPARSEZOO_LEVEL);
#if defined(__AVX512BF16__)
  static const Tiles pairs = {2,
                              {nullptr, pack_tokens<bfloat16, true>, nullptr},
                              {nullptr, pack_rows<bfloat16, true>, pack_rows<signed char, true>},
                              {nullptr, pack_columns<bfloat16, true>, pack_columns<signed char, true>},
                              tiles<true>};
  const Tiles* const has_pairs = &pairs;
  const auto dot_of_pairs = dot_pairs;
#else
  const Tiles* const has_pairs = nullptr;
  constexpr auto dot_of_pairs = nullptr;
#endif
  static const Loops table = {
      {dot<float>, dot<bfloat16>, dot<signed char>},
      dot_of_pairs,
      {axpy<float>, axpy<bfloat16>, axpy<signed char>},
      {dot_at<float>, dot_at<bfloat16>, dot_at<signed char>},
      {axpy_at<float>, axpy_at<bfloat16>, axpy_at<signed char>},
      {arrange<float, false>, arrange<bfloat16, false>, arrange<signed char, false>},
      {arrange<float, true>, arrange<bfloat16, true>, arrange<signed char, true>},
      quantise,
      activate,
      softcap,
      softplus,
      exponentials,
      moments,
      squares,
      select,
      {widen<float>, widen<bfloat16>, nullptr},
      {narrow_float, narrow_bfloat16, nullptr},
      stream,
      kLanes,
      kVectors,
      {1,
       {pack_tokens<float, false>, pack_tokens<bfloat16, false>, nullptr},
       {pack_rows<float, false>, pack_rows<bfloat16, false>, pack_rows<signed char, false>},
       {pack_columns<float, false>, pack_columns<bfloat16, false>, pack_columns<signed char, false>},
       tiles<false>},
      has_pairs,
      transpose_sums,
      {kPanel, score_products, cap_scores, hide, exponentials_so_far, exponentials_of, multiply_rows, measure, weigh,
       multiply_softplus, score_gradients},
      {grouped_products, grouped_sums},
      TEXT(SPARSEZOO_LEVEL),
  };
  return &table;
}

}  // namespace sparsezoo
