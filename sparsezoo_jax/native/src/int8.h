// Rows of int8: what they are multiplied by is rounded to 16 bits, and the products are summed exactly, in 32 bits.
// Widening every weight to a float takes 2.4 times as long (AVX2, from the nearest cache), so that memory would wait.
//
// Included by loops.cc alone, as vectors.h is.

// How numbers up to `largest` are rounded to 16 bits: the factor that they are multiplied by first, and the one that
// undoes it. Both are 0 where the first would be too large, and the second is NaN where `zero`, the sum of the numbers
// times 0, is: where one of them is not finite.
struct Rounding {
  float to, from;

  Rounding(float largest, float zero) : to(0), from(zero) {
    if (zero == 0 && largest > 1e-30f) to = 32767 / largest, from = largest / 32767;
  }
  short rounded(float x) const { return to == 0 ? short(0) : short(x < 0 ? x * to - 0.5f : x * to + 0.5f); }
};

// A vector that the rows are multiplied by: numbers of 16 bits in the order of `quantise`, and after them a factor for
// every kQuantised of them.
constexpr long kQuantised = 256;

constexpr long padded(long n) { return (n + kPadding - 1) / kPadding * kPadding; }

INLINE const short* shorts_of(const float* x) { return reinterpret_cast<const short*>(x); }
INLINE const float* factors_of(const float* x, long k) {
  return reinterpret_cast<const float*>(shorts_of(x) + padded(k));
}

void quantise(const float* x, float* quantised, long n) {
  constexpr long kHalf = 2 * kLanes;
  short* const to = reinterpret_cast<short*>(quantised);
  float* const factors = reinterpret_cast<float*>(to + n);
  for (long start = 0; start < n; start += kQuantised) {
    const long end = start + kQuantised < n ? start + kQuantised : n;
    Floats most = {}, zeros = {};
    for (long i = start; i < end; i += kLanes) {
      const Floats v = load(x + i), size = v < Floats{} ? -v : v;
      most = size > most ? size : most;
      zeros += v * 0.0f;  // NaN where a number is not finite
    }
    float largest = 0;
    for (int t = 0; t < kLanes; t++) largest = most[t] > largest ? most[t] : largest;
    const Rounding by(largest, sum_of(zeros));
    factors[start / kQuantised] = by.from;
    for (long i = start; i < end; i += 2 * kHalf)
      for (long t = 0; t < kHalf; t++)
        for (long p = 0; p < 2; p++) to[i + p * kHalf + t] = by.rounded(x[i + 2 * t + p]);
  }
}

template <int R, int M>
INLINE void dot_of(const signed char* w, long ld, long k, const float* const* x, float* out, long ld_out,
                   const char* ahead) {
  constexpr long kBytes = 4 * kLanes;
  constexpr int kSums = (R * M + 3) / 4 * 4;
  const Ahead<signed char, R> next(ahead, ld, k, kLine);
  Floats sum[kSums];
  each<kSums>(UNROLLED(t) { sum[t] = Floats{}; });
  for (long start = 0; start < k; start += kQuantised) {
    const long end = start + kQuantised < k ? start + kQuantised : k;
    Ints whole[R * M][2];
    each<R * M>(UNROLLED(t) { whole[t][0] = whole[t][1] = Ints{}; });
    const auto add = [&](auto r, Shorts pairs, long i) __attribute__((always_inline)) {
      const Shorts even = lower_bytes(pairs), odd = upper_bytes(pairs);
      each<M>(UNROLLED(j) {
        const short* at = shorts_of(x[j]) + i;
        whole[j * R + r][0] += pair_products(even, read<Shorts>(at));
        whole[j * R + r][1] += pair_products(odd, read<Shorts>(at + kBytes / 2));
      });
    };
    long i = start;
    for (; i + kLine <= end; i += kLine)
      each<R>(UNROLLED(r) {
        next.fetch(r, i, kLine);
        each<kLine / kBytes>(UNROLLED(u) { add(r, read<Shorts>(w + r * ld + i + u * kBytes), i + u * kBytes); });
      });
    for (; i < end; i += kBytes)
      each<R>(UNROLLED(r) {
        alignas(64) signed char rest[kBytes] = {};
        __builtin_memcpy(rest, w + r * ld + i, end - i < kBytes ? end - i : kBytes);
        add(r, read<Shorts>(rest), i);
      });
    each<M>(UNROLLED(j) {
      const Floats factor = all(factors_of(x[j], k)[start / kQuantised]);
      each<R>(UNROLLED(r) {
        const Ints all_of_it = whole[j * R + r][0] + whole[j * R + r][1];
        sum[j * R + r] += __builtin_convertvector(all_of_it, Floats) * factor;
      });
    });
  }
  each<kSums / 4>(UNROLLED(f) {
    constexpr int t = 4 * f;
    write_sums<R, M, t>(sums_of(sum[t], sum[t + 1], sum[t + 2], sum[t + 3]), out, ld_out);
  });
}

// Four rows of int8: factors are rounded to 16 bits by the largest of the four, and their products summed exactly.
template <int M>
INLINE void axpy_four(const signed char* w, long ld, long k, const float* c, long ld_c, float* const* y,
                      const char* ahead) {
  constexpr long kBytes = 4 * kLanes;
  Shorts factors[M][2];
  Floats unit[M];
  for (int j = 0; j < M; j++) {
    const float* const own = c + j * ld_c;
    float largest = 0, zero = 0;
    for (int r = 0; r < 4; r++) {
      const float size = own[r] < 0 ? -own[r] : own[r];
      largest = size > largest ? size : largest;
      zero += own[r] * 0.0f;
    }
    const Rounding by(largest, zero);
    unit[j] = all(by.from);
    for (int pair = 0; pair < 2; pair++) {
      const float* const two = own + 2 * pair;
      const unsigned low = (unsigned short)by.rounded(two[0]), high = (unsigned short)by.rounded(two[1]);
      factors[j][pair] = same_bits<Shorts>(Words{} + (low | high << 16));
    }
  }
  const auto add = [&](long i, const Words (&v)[4]) __attribute__((always_inline)) {
    const Shorts low[2] = {lower_halves(v[0], v[1]), lower_halves(v[2], v[3])};
    const Shorts high[2] = {upper_halves(v[0], v[1]), upper_halves(v[2], v[3])};
    each<4>(UNROLLED(p) {
      Shorts columns[2];
      each<2>(UNROLLED(pair) {
        const Shorts both = p < 2 ? low[pair] : high[pair];
        columns[pair] = p % 2 ? upper_bytes(both) : lower_bytes(both);
      });
      each<M>(UNROLLED(j) {
        const Ints whole = pair_products(columns[0], factors[j][0]) + pair_products(columns[1], factors[j][1]);
        float* const to = y[j] + i + p * kLanes;
        write(to, load(to) + __builtin_convertvector(whole, Floats) * unit[j]);
      });
    });
  };
  const Ahead<signed char, 4> next(ahead, ld, k, kLine);
  long i = 0;
  for (; i + kBytes <= k; i += kBytes) {
    Words v[4];
    each<4>(UNROLLED(r) {
      if (i % kLine == 0) next.fetch(r, i, 1);
      v[r] = read<Words>(w + r * ld + i);
    });
    add(i, v);
  }
  if (i < k) {
    Words v[4];
    each<4>(UNROLLED(r) {
      alignas(64) signed char rest[kBytes] = {};
      __builtin_memcpy(rest, w + r * ld + i, k - i);
      v[r] = read<Words>(rest);
    });
    add(i, v);
  }
}
