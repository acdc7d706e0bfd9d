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
typedef short Shorts __attribute__((vector_size(4 * kLanes)));
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

INLINE float one(const float* p) { return *p; }
INLINE float one(const bfloat16* p) { return same_bits<float>(unsigned(p->bits) << 16); }

// Numbers of a storage type in as many bytes as a vector has: a group of kGroup<W> * kLanes of them.
template <class W>
constexpr int kGroup = 4 / int(sizeof(W));

// A group as vectors: number kGroup * i + p is lane i of vector p. Widening numbers in their own order would take a
// shuffle for each vector, which fewer units can do than shifts, and which not every level has.
INLINE void load_group(const void* p, Floats (&v)[1], const float*) { v[0] = read<Floats>(p); }
INLINE void load_group(const void* p, Floats (&v)[2], const bfloat16*) {
  Words pairs = read<Words>(p);
  v[0] = same_bits<Floats>(pairs << 16);
  v[1] = same_bits<Floats>(pairs & 0xffff0000u);
}
INLINE void load_group(const void* p, Floats (&v)[4], const signed char*) {
  Ints fours = read<Ints>(p);
  v[0] = __builtin_convertvector((fours << 24) >> 24, Floats);
  v[1] = __builtin_convertvector((fours << 16) >> 24, Floats);
  v[2] = __builtin_convertvector((fours << 8) >> 24, Floats);
  v[3] = __builtin_convertvector(fours >> 24, Floats);
}
template <class W>
INLINE void load_group(const W* p, Floats (&v)[kGroup<W>]) {
  load_group(static_cast<const void*>(p), v, p);
}
// The first n numbers of a group, and zeros.
template <class W>
INLINE void load_group(const W* p, long n, Floats (&v)[kGroup<W>]) {
  alignas(64) W rest[kGroup<W> * kLanes] = {};
  __builtin_memcpy(rest, p, n * sizeof(W));
  load_group(rest, v);
}

// Lane t: a[2 t] b[2 t] + a[2 t + 1] b[2 t + 1].
INLINE Ints pair_products(Shorts a, Shorts b) {
#if SPARSEZOO_LANES == 16 && defined(__AVX512BW__)
  return Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif SPARSEZOO_LANES == 8 && defined(__AVX2__)
  return Ints(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif SPARSEZOO_LANES == 4 && defined(__SSE2__)
  return Ints(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
  const Ints p = same_bits<Ints>(a), q = same_bits<Ints>(b);
  return ((p << 16) >> 16) * ((q << 16) >> 16) + (p >> 16) * (q >> 16);
#endif
}

// Lane t: those of the 16 bits of `first` and `second` that are the lower half of lane t, side by side.
INLINE Shorts lower_halves(Words first, Words second) {
#if SPARSEZOO_LANES == 16 && defined(__AVX512BW__)
  return Shorts(_mm512_mask_blend_epi16(0xaaaaaaaau, __m512i(first), __m512i(second << 16)));
#elif SPARSEZOO_LANES == 8 && defined(__AVX2__)
  return Shorts(_mm256_blend_epi16(__m256i(first), __m256i(second << 16), 0xaa));
#else
  return same_bits<Shorts>((first & 0xffffu) | (second << 16));
#endif
}
// The same of the upper halves.
INLINE Shorts upper_halves(Words first, Words second) {
#if SPARSEZOO_LANES == 16 && defined(__AVX512BW__)
  return Shorts(_mm512_mask_blend_epi16(0xaaaaaaaau, __m512i(first >> 16), __m512i(second)));
#elif SPARSEZOO_LANES == 8 && defined(__AVX2__)
  return Shorts(_mm256_blend_epi16(__m256i(first >> 16), __m256i(second), 0xaa));
#else
  return same_bits<Shorts>((first >> 16) | (second & 0xffff0000u));
#endif
}
// The lower and the upper bytes of all 16 bits, as numbers.
INLINE Shorts lower_bytes(Shorts pairs) { return (pairs << 8) >> 8; }
INLINE Shorts upper_bytes(Shorts pairs) { return pairs >> 8; }

// The sums of four vectors. All sums of vectors are made by this, so that they round alike.
INLINE Four sums_of(Floats a, Floats b, Floats c, Floats d) {
#if SPARSEZOO_LANES == 16
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define FIRST 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define SECOND 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif SPARSEZOO_LANES == 8
#define LOW 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH 2, 10, 3, 11, 6, 14, 7, 15
#define FIRST 0, 1, 8, 9, 4, 5, 12, 13
#define SECOND 2, 3, 10, 11, 6, 7, 14, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define FIRST 0, 1, 4, 5
#define SECOND 2, 3, 6, 7
#endif
  Floats ab = __builtin_shufflevector(a, b, LOW) + __builtin_shufflevector(a, b, HIGH);
  Floats cd = __builtin_shufflevector(c, d, LOW) + __builtin_shufflevector(c, d, HIGH);
  Floats v = __builtin_shufflevector(ab, cd, FIRST) + __builtin_shufflevector(ab, cd, SECOND);
#undef LOW
#undef HIGH
#undef FIRST
#undef SECOND
#if SPARSEZOO_LANES == 16
  return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 8, 9, 10, 11)) +
         (__builtin_shufflevector(v, v, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 12, 13, 14, 15));
#elif SPARSEZOO_LANES == 8
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

INLINE float sum_of(Floats v) { return sums_of(v, v, v, v)[0]; }

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

// tanh by a ratio of polynomials, within 3 units in the last place; beyond +-7.9 it is +-1 to that accuracy.
INLINE Floats tanh_of(Floats x) {
  x = x > all(7.90531110763549805f) ? all(7.90531110763549805f) : x;
  x = x < all(-7.90531110763549805f) ? all(-7.90531110763549805f) : x;
  const Floats square = x * x;
  Floats above = all(-2.76076847742355e-16f);
  above = above * square + 2.00018790482477e-13f;
  above = above * square - 8.60467152213735e-11f;
  above = above * square + 5.12229709037114e-08f;
  above = above * square + 1.48572235717979e-05f;
  above = above * square + 6.37261928875436e-04f;
  above = above * square + 4.89352455891786e-03f;
  Floats below = all(1.19825839466702e-06f);
  below = below * square + 1.18534705686654e-04f;
  below = below * square + 2.26843463243900e-03f;
  below = below * square + 4.89352518554385e-03f;
  return x * above / below;
}

// e^x for x up to 88, as `exp_of` with less work, and with terms that do not wait for each other; what is smaller than
// the smallest normal number is 0.
INLINE Floats exp_below(Floats x) {
  // 1.5 * 2^23 + 127: the last bits of the sum are the exponent of 2^whole as floats hold it, which is 0 at -127.
  const float kRound = 12582912.0f + 127.0f;
  x = all(-88.0f) > x ? all(-88.0f) : x;
  const Floats shifted = x * 1.44269504088896341f + kRound, whole = shifted - kRound;
  const Floats r = x - whole * 0.693359375f - whole * -2.12194440e-4f, square = r * r;
  const Floats high = r * 1.9875691500e-4f + 1.3981999507e-3f, middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const Floats low = r * 1.6666665459e-1f + 5.0000001201e-1f;
  const Floats p = (high * (square * square) + (middle * square + low)) * square + (r + 1.0f);
  return p * same_bits<Floats>(same_bits<Ints>(shifted) << 23);
}

// log(1 + e^x) and its derivative.
struct Softplus {
  Floats value, slope;
};
INLINE Softplus softplus_of(Floats x) {
  // max(x, 0) + log(1 + e^-|x|), by the polynomial for log(1 + t) / t on [0, 1] of least relative error (3e-8)
  const Floats t = exp_below(same_bits<Floats>(same_bits<Words>(x) | 0x80000000u));
  const Floats square = t * t, fourth = square * square;
  const Floats low = (t * -4.999949336e-01f + 9.999999404e-01f) + (t * -2.484297901e-01f + 3.331909776e-01f) * square;
  const Floats high = (t * -1.366321445e-01f + 1.910599321e-01f) + (t * -2.950498648e-02f + 7.822556049e-02f) * square;
  const Floats p = low + (high + fourth * 5.232629366e-03f) * fourth;
  const Floats larger_half = 1.0f / (1.0f + t);
  return {(x > Floats{} ? x : Floats{}) + p * t, x < Floats{} ? 1.0f - larger_half : larger_half};
}
