// Vectors of float as gcc's and clang's vector extensions: the same source for every instruction set.
//
// Included by loops.cc alone, inside of the namespace of one level: nothing of it may be shared between levels.

// A level whose registers hold 16 floats has twice as many of them.
#if SPARSEZOO_LANES == 16
constexpr int kLanes = 16;
#elif SPARSEZOO_LANES == 8
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int Ints __attribute__((vector_size(4 * kLanes)));
typedef unsigned Words __attribute__((vector_size(4 * kLanes)));
typedef unsigned short Halves __attribute__((vector_size(2 * kLanes)));
typedef signed char Bytes __attribute__((vector_size(kLanes)));
typedef float Four __attribute__((vector_size(16)));

struct bfloat16 {
  unsigned short bits;
};

#define INLINE static inline __attribute__((always_inline))

template <class To, class From>
INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class To>
INLINE To read(const void* p) {
  To to;
  __builtin_memcpy(&to, p, sizeof(To));
  return to;
}

INLINE void write(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof(v)); }

INLINE Floats all(float x) { return x - Floats{}; }

INLINE Floats load(const float* p) { return read<Floats>(p); }
INLINE Floats load(const bfloat16* p) { return same_bits<Floats>(__builtin_convertvector(read<Halves>(p), Words) << 16); }
INLINE Floats load(const signed char* p) { return __builtin_convertvector(__builtin_convertvector(read<Bytes>(p), Ints), Floats); }

INLINE float one(const float* p) { return *p; }
INLINE float one(const bfloat16* p) { return same_bits<float>(unsigned(p->bits) << 16); }
INLINE float one(const signed char* p) { return *p; }

INLINE float sum_of_four(Four v) { return (v[0] + v[2]) + (v[1] + v[3]); }

INLINE Four quarter(Floats v) {
  Four parts[kLanes / 4];
  __builtin_memcpy(parts, &v, sizeof(v));
#if SPARSEZOO_LANES == 16
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
#elif SPARSEZOO_LANES == 8
  return parts[0] + parts[1];
#else
  return parts[0];
#endif
}

INLINE float sum_of(Floats v) { return sum_of_four(quarter(v)); }

// The sums of four vectors, each rounded as by `sum_of`.
INLINE Four sums_of(Floats v0, Floats v1, Floats v2, Floats v3) {
  Four a = quarter(v0), b = quarter(v1), c = quarter(v2), d = quarter(v3);
  Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// e^x within 2 units in the last place; NaN stays NaN, and results below the smallest number are 0.
INLINE Floats exp_of(Floats x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves whole numbers
  x = x > all(89.0f) ? all(89.0f) : x;
  x = x < all(-105.0f) ? all(-105.0f) : x;
  Floats shifted = x * 1.44269504088896341f + kRound;
  Floats whole = shifted - kRound;
  Floats r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^whole in two factors, for it may lie beyond what one number's exponent holds.
  Ints n = same_bits<Ints>(shifted) - same_bits<int>(kRound);
  Ints half = n >> 1;
  Floats low = same_bits<Floats>((half + 127) << 23), high = same_bits<Floats>((n - half + 127) << 23);
  return p * low * high;
}

INLINE Floats sigmoid_of(Floats x) { return 1.0f / (1.0f + exp_of(-x)); }
