// Matrix products of many tokens, tile by tile; the lanes of a vector are tokens.
//
// Included by loops.cc alone, inside of the namespace of one level. A "word" is what one multiply-add takes of a weight row
// and of a token: a float, or, where the processor sums up products of pairs, two bfloat16 that follow one another in k.

template <int V>
constexpr int kTileRows = kLanes == 16 ? (V <= 2 ? 12 : V == 3 ? 8 : 6) : 12 / V;

// Most vectors of tokens in a panel. Weight rows that meet them at once are so many that all sums are in registers.
constexpr int kVectors = kLanes == 16 ? 4 : 2;

INLINE Words all_of(const unsigned* word) { return *word - Words{}; }

template <bool kPairs>
INLINE Floats add_products(Floats sum, Words w, Words x) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs)
    return same_bits<Floats>(_mm512_dpbf16_ps(same_bits<__m512>(sum), same_bits<__m512bh>(w), same_bits<__m512bh>(x)));
#endif
  return sum + same_bits<Floats>(w) * same_bits<Floats>(x);
}

// sums[r][t] += sum over k of w[r][k] x[k][t] for R rows and V vectors of tokens; sums begin at 0 if `first`. Each sum is
// made in the order of k, whatever R and V are, so that a token's results do not depend on how many there are.
// One vector of tokens takes no longer than its weights come from memory, so that the next ones are fetched meanwhile.
template <bool kPairs, int R, int V>
INLINE void tile(const unsigned* w, long k, const unsigned* x, float* sums, long ld_sums, bool first, const Next& next) {
  Floats sum[R][V];
  each<R>(UNROLLED(r) {
    each<V>(UNROLLED(v) { sum[r][v] = first ? Floats{} : load(sums + r * ld_sums + v * kLanes); });
  });
  const auto add = [&](long i) __attribute__((always_inline)) {
    Words tokens[V];
    each<V>(UNROLLED(v) { tokens[v] = read<Words>(x + (i * V + v) * kLanes); });
    each<R>(UNROLLED(r) {
      const Words weight = all_of(w + r * kBlockStride + i);
      each<V>(UNROLLED(v) { sum[r][v] = add_products<kPairs>(sum[r][v], weight, tokens[v]); });
    });
  };
  long i = 0;
  if (V == 1 && next.rows)
    for (; i + kLine / 4 <= k; i += kLine / 4) {
      each<R>(UNROLLED(r) { __builtin_prefetch(next.rows + r * next.ld + i * next.word, 0, 2); });
      for (long j = i; j < i + kLine / 4; j++) add(j);
    }
  for (; i < k; i++) add(i);
  each<R>(UNROLLED(r) {
    each<V>(UNROLLED(v) { write(sums + r * ld_sums + v * kLanes, sum[r][v]); });
  });
}

template <bool kPairs, int V>
void tiles_of(const unsigned* w, long rows, long k, const unsigned* x, float* sums, long ld_sums, bool first,
              const Next& next) {
  constexpr int R = kTileRows<V>;
  static_assert(kBlockRows % R == 0, "a block has whole tiles");
  // One vector of tokens and the rows of a tile should stay in the nearest cache.
  constexpr long kDepth = V == 1 ? kBlockDepth / 2 : kBlockDepth;
  for (long i = 0; i < k; i += kDepth)
    for (long r = 0; r < rows; r += R) {
      const Next own{next.rows ? next.rows + r * next.ld + i * next.word : nullptr, next.ld, next.word};
      tile<kPairs, R, V>(w + r * kBlockStride + i, k - i < kDepth ? k - i : kDepth, x + i * V * kLanes, sums + r * ld_sums,
                         ld_sums, first && i == 0, own);
    }
}

template <bool kPairs>
void tiles(const unsigned* w, long rows, long k, const unsigned* x, long vectors, float* sums, long ld_sums, bool first,
           const Next& next) {
  if (vectors == 1) return tiles_of<kPairs, 1>(w, rows, k, x, sums, ld_sums, first, next);
  if (vectors == 2) return tiles_of<kPairs, 2>(w, rows, k, x, sums, ld_sums, first, next);
  if constexpr (kVectors == 4) {
    if (vectors == 3) return tiles_of<kPairs, 3>(w, rows, k, x, sums, ld_sums, first, next);
    return tiles_of<kPairs, 4>(w, rows, k, x, sums, ld_sums, first, next);
  }
}

// A bfloat16 with the value of a weight: exact for int8.
INLINE unsigned bits_of(bfloat16 x) { return x.bits; }
INLINE unsigned bits_of(signed char x) { return same_bits<unsigned>(float(x)) >> 16; }

// `count` tokens that are `ld` numbers apart, k numbers of each, become a panel: word i of all tokens, then word i + 1.
// Lanes without a token, and an odd last half of a pair, are 0.
template <class X, bool kPairs>
void pack_tokens(const void* x, long ld, long count, long k, unsigned* panel) {
  const X* from = static_cast<const X*>(x);
  const long words = kPairs ? (k + 1) / 2 : k, width = (count + kLanes - 1) / kLanes * kLanes;
  // A line of each token at a time, for the panel's lines are written from all of them.
  constexpr long kWords = kLine / (kPairs ? 4 : sizeof(X));
  for (long first = 0; first < words; first += kWords) {
    const long end = first + kWords < words ? first + kWords : words;
    for (long t = 0; t < width; t++) {
      const X* token = from + t * ld;
      for (long i = first; i < end; i++) {
        unsigned word = 0;
        if (t < count) {
          if constexpr (!kPairs) {
            word = same_bits<unsigned>(one(token + i));
          } else {
            word = bits_of(token[2 * i]) | (2 * i + 1 < k ? bits_of(token[2 * i + 1]) << 16 : 0);
          }
        }
        panel[i * width + t] = word;
      }
    }
  }
}

INLINE float weight_of(const float* w) { return *w; }
INLINE float weight_of(const bfloat16* w) { return one(w); }
INLINE float weight_of(const signed char* w) { return *w; }

// Words of weight rows [rows, k] in rows of a block.
template <class W, bool kPairs>
void pack_rows(const void* w, long ld, long rows, long k, unsigned* block) {
  for (long r = 0; r < rows; r++) {
    const W* row = static_cast<const W*>(w) + r * ld;
    unsigned* to = block + r * kBlockStride;
    if constexpr (sizeof(W) == (kPairs ? 2 : 4)) {  // words as they are stored
      __builtin_memcpy(to, row, k / (kPairs ? 2 : 1) * sizeof(unsigned));
      if (kPairs && k % 2) to[k / 2] = bits_of(row[k - 1]);
    } else if constexpr (!kPairs) {
      for (long i = 0; i < k; i++) to[i] = same_bits<unsigned>(weight_of(row + i));
    } else {
      for (long i = 0; i < k / 2; i++) to[i] = bits_of(row[2 * i]) | bits_of(row[2 * i + 1]) << 16;
      if (k % 2) to[k / 2] = bits_of(row[k - 1]);
    }
  }
}

typedef unsigned FourWords __attribute__((vector_size(16)));

INLINE FourWords four_of(const float* w, float factor) { return same_bits<FourWords>(read<Four>(w) * factor); }
INLINE FourWords four_bits(const bfloat16* w) {
  typedef unsigned short Halves __attribute__((vector_size(8)));
  return __builtin_convertvector(read<Halves>(w), FourWords);
}
INLINE FourWords four_of(const bfloat16* w, float) { return four_bits(w) << 16; }
INLINE FourWords four_of(const signed char* w, float factor) {
  typedef signed char Bytes __attribute__((vector_size(4)));
  return same_bits<FourWords>(__builtin_convertvector(read<Bytes>(w), Four) * factor);
}

// Four words of row i of weights that are summed over; pairs are those of rows i and i + 1.
template <bool kPairs, class W>
INLINE FourWords words_of(const W* w, long ld, long i, const float* scale, long step) {
  if constexpr (!kPairs) {
    return four_of(w + i * ld, scale ? scale[i * step] : 1.0f);
  } else if constexpr (sizeof(W) == 2) {
    return four_bits(w + i * ld) | four_bits(w + (i + 1) * ld) << 16;
  } else {
    auto rounded = [](FourWords bits) { return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; };
    return rounded(four_of(w + i * ld, scale ? scale[i * step] : 1.0f)) |
           rounded(four_of(w + (i + 1) * ld, scale ? scale[(i + 1) * step] : 1.0f)) << 16;
  }
}

// Words of weight rows that are summed over, [k, columns], times their factors unless null: of each column a block's row.
template <class W, bool kPairs>
void pack_columns(const void* w, long ld, long columns, long k, const float* scale, long step, unsigned* block) {
  const W* from = static_cast<const W*>(w);
  constexpr long kNumbers = kPairs ? 2 : 1;
  auto four_rows = [&](const W* rows, long ld_rows, const float* factors, unsigned* to) __attribute__((always_inline)) {
    FourWords in[4];
    each<4>(UNROLLED(i) { in[i] = words_of<kPairs>(rows, ld_rows, i * kNumbers, factors, step); });
    const FourWords a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5), b = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
    const FourWords c = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7), d = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
    const FourWords out[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                              __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
    each<4>(UNROLLED(r) { __builtin_memcpy(to + r * kBlockStride, &out[r], sizeof(out[r])); });
  };
  for (long first = 0; first < k; first += 4 * kNumbers) {
    const long rows = k - first < 4 * kNumbers ? k - first : 4 * kNumbers;
    for (long c = 0; c < columns; c += 4) {
      const W* at = from + first * ld + c;
      unsigned* to = block + c * kBlockStride + first / kNumbers;
      if (rows == 4 * kNumbers && c + 4 <= columns) {
        four_rows(at, ld, scale ? scale + first * step : nullptr, to);
        continue;
      }
      // At the edges of the matrix: what is there, and zeros.
      W edge[4 * kNumbers * 4] = {};
      float factors[4 * kNumbers] = {};
      for (long i = 0; i < rows; i++) {
        for (long r = 0; r < 4 && c + r < columns; r++) edge[4 * i + r] = at[i * ld + r];
        factors[i] = scale ? scale[(first + i) * step] : 1.0f;
      }
      each<4>(UNROLLED(i) {
        const FourWords words = words_of<kPairs>(edge, 4, i * kNumbers, factors, 1);
        for (int r = 0; r < 4; r++) to[r * kBlockStride + i] = words[r];
      });
    }
  }
}

// out[t][r] = sums[r][t] for `rows` rows and one vector of tokens.
void transpose_sums(const float* sums, long ld_sums, long rows, float* out, long ld_out) {
  for (long r = 0; r < rows; r++) {
    const float* from = sums + r * ld_sums;
    for (int t = 0; t < kLanes; t++) out[t * ld_out + r] = from[t];
  }
}
