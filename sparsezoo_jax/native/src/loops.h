// The inner loops over rows of weights, compiled once for each level of the instruction set; see loops.cc.
#ifndef SPARSEZOO_LOOPS_H_
#define SPARSEZOO_LOOPS_H_

namespace sparsezoo {

// How a weight or an activation is stored.
enum Type { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kTypes = 3 };

// Non-linearities; the numbers are those of sparsezoo_jax/native/__init__.py.
enum Activation { kGeluTanh = 0, kSilu = 1, kRelu = 2, kRelu2 = 3, kGelu = 4 };

// Sums over one row of scores.
struct Moments {
  double sum = 0;
  float largest = 0;
};

// Vectors that rows of a storage type are multiplied by, or added to, lie in that type's order (`arrange`), and end in
// zeros up to a multiple of kPadding; those that rows of int8 are multiplied by are whole numbers (`quantise`). All results are the same, bit for bit, however many vectors a call has: each
// product is summed in one order.
// `ahead`, where not null, is prefetched as the weights are read: the byte at ahead + i together with that at w + i.
constexpr long kPadding = 64;

// Weights of a matrix product are laid out by blocks of so many outputs, and words that are summed over; a word is a
// float or a pair of bfloat16.
constexpr long kBlockRows = 96, kBlockDepth = 512;
// Words from one row of a block to the next: with a power of two they would compete for the same places of the caches.
constexpr long kBlockStride = kBlockDepth + 16;

// Weights that are multiplied after those of a block: rows that are `ld` bytes apart, `word` bytes for a word; null: none.
struct Next {
  const char* rows;
  long ld, word;
};

// Matrix products of many tokens in one kind of words; see tiles.h.
struct Tiles {
  long numbers;  // in a word
  // Null for a type that such words can't hold.
  void (*pack_tokens[kTypes])(const void* x, long ld, long count, long k, unsigned* panel);
  void (*pack_rows[kTypes])(const void* w, long ld, long rows, long k, unsigned* block);
  void (*pack_columns[kTypes])(const void* w, long ld, long columns, long k, const float* scale, long scale_step,
                               unsigned* block);
  // `sums` [rows, tokens] of `vectors` vectors of tokens, added to unless `first`.
  void (*multiply)(const unsigned* block, long rows, long words, const unsigned* panel, long vectors, float* sums,
                   long ld_sums, bool first, const Next& next);
};

// The score of a key that a row does not see, and what is below every other score.
constexpr float kHidden = -1e30f, kLowest = -5e29f;

// A matrix of factors: its entry [r][o][i] is data[r * row + o * outer + i * inner].
struct Factors {
  const float* data;
  long row, outer, inner;
};

// Where rows and keys stand in their sequence, and in which document.
struct Places {
  const int *positions, *segments;
};

// A tile of scores while it is differentiated.
struct Gradients {
  float *scores, *dweights, *arguments;  // become weights, and gradients of scores and of the softplus's arguments
  const float *threshold, *normaliser, *delta;  // of rows
  float cap, cap_values;                        // 0: none
};

// Attention over whole sequences, a panel of `rows` rows and n keys at a time; see score_tiles.h. Arrays by row are
// [rows], tiles [n, rows].
struct ScoreTiles {
  long rows;
  // sums[r][c] (+)= sum over o and i of a[r][o][i] x[o * inner + i][c], for a multiple of `lanes` columns.
  void (*products)(const Factors& a, long rows, long outer, long inner, const float* x, long ld_x, long columns,
                   float* sums, long ld, bool add);
  // s = cap tanh(s / cap) with the relative accuracy of a float.
  void (*cap)(float cap, float* s, long n);
  // Scores of keys that a row does not see become kHidden.
  void (*hide)(float* s, const Places& rows, const Places& keys, long n, long window);
  // s = exp(s - best), for the best so far with these, and their sum beside that so far, which shrinks with what it is a
  // sum of. Whether any does: `shrunk` are the factors.
  bool (*exponentials_so_far)(float* s, long n, float* best, float* total, float* shrunk);
  // s = exp(s), added to `total`.
  void (*exponentials)(float* s, long n, float* total);
  // x *= by, for each row its factor.
  void (*multiply)(float* x, long n, const float* by);
  // Number of visible scores, mean, sum of squared distances from it, and largest, with these added.
  void (*measure)(const float* s, long n, float* count, float* mean, float* squares, float* best);
  // s = exp(s - best) from the threshold on, and 0 below it; their sums and numbers are added.
  void (*weigh)(float* s, long n, const float* threshold, const float* best, float* total, int* attended);
  // weights *= log(1 + exp(x)).
  void (*softplus)(float* weights, const float* x, long n);
  void (*gradients)(const Gradients& g, long n);
};

// Products of rows that belong to groups; see grouped_tiles.h.
struct GroupedTiles {
  // y[places[r]] (+)= sum over k of a[r][k] w[k] for `rows` rows and so many columns; `places` null: one after another.
  void (*products)(const float* a, long ld_a, long rows, long k, const float* w, long ld_w, long columns, float* y,
                   long ld_y, const int* places, bool add);
  // sums[r][c] (+)= sum over i of a[i][r] x[i][first_column + c], for n rows of each, wherever they lie.
  void (*sums)(const float* const* a, const float* const* x, long n, long rows, long first_column, long columns,
               float* sums, long ld, bool add);
};

struct Loops {
  // out[j * ld_out + i] = w_i . x_j for `rows` rows w_i of length k that are `ld` elements apart, and m vectors.
  void (*dot[kTypes])(const void* w, long ld, long rows, long k, const float* const* x, long m, float* out, long ld_out,
                      const char* ahead);
  // The same of bfloat16 for vectors of bfloat16 as they are, with zeros up to a multiple of kPadding; null where the
  // processor can't multiply such pairs.
  void (*dot_pairs)(const void* w, long ld, long rows, long k, const float* const* x, long m, float* out, long ld_out,
                    const char* ahead);
  // y_j += sum_i c[j * ld_c + i] w_i.
  void (*axpy[kTypes])(const void* w, long ld, long rows, long k, const float* c, long ld_c, long m, float* const* y,
                       const char* ahead);
  // The same for one vector and rows that lie anywhere: out[i] = w_places[i] . x, and y += sum_i c[i] w_places[i]. Of
  // the `left` places that are known the one `ahead` further on is prefetched while a row is read.
  void (*dot_at[kTypes])(const void* w, long ld, const int* places, long rows, long left, long ahead, long k,
                         const float* x, float* out);
  void (*axpy_at[kTypes])(const void* w, long ld, const int* places, long rows, long left, long ahead, long k,
                          const float* c, float* y);
  // Puts n numbers, a multiple of kPadding, into the order of a type, and back.
  void (*arrange[kTypes])(float* x, long n);
  void (*restore[kTypes])(float* x, long n);
  // What rows of int8 are multiplied by: n numbers, a multiple of kPadding, rounded to 16 bits by the largest of some
  // hundreds. `quantised` has room for n floats.
  void (*quantise)(const float* x, float* quantised, long n);
  // h = act(h).
  void (*activate)(Activation activation, float* h, long n);
  // s = cap tanh(s / cap).
  void (*softcap)(float cap, float* s, long n);
  // s = log(1 + exp(s)).
  void (*softplus)(float* s, long n);
  // s = exp(s - shift); returns their sum.
  double (*exponentials)(float shift, float* s, long n);
  // Sum and largest of s; a NaN makes both NaN.
  Moments (*moments)(const float* s, long n);
  // Sum of (s - mean)^2.
  double (*squares)(float mean, const float* s, long n);
  // Writes the places i in [from, n) with !(s[i] < threshold) to `places`, or those with !(s[i] <= threshold) if
  // `strictly`; returns how many.
  long (*select)(float threshold, bool strictly, const float* s, long from, long n, int* places);
  // x = src and dst = x for m numbers; kInt8 is not used.
  void (*widen[kTypes])(const void* src, float* x, long n);
  void (*narrow[kTypes])(const float* x, void* dst, long n);
  // A checksum of 64-byte lines, to measure how fast memory can be read.
  unsigned (*stream)(const void* data, long bytes);
  // Tokens in a vector, most vectors of a panel; products in floats, and in pairs where the processor has them.
  long lanes, vectors;
  Tiles floats;
  const Tiles* pairs;
  // out[t * ld_out + r] = sums[r * ld_sums + t] for `rows` rows and one vector of tokens.
  void (*transpose_sums)(const float* sums, long ld_sums, long rows, float* out, long ld_out);
  ScoreTiles scores;
  GroupedTiles grouped;
  const char* level;
};

// The loops for this processor.
const Loops& loops();

// Whether the processor has units for matrix products of bfloat16, which these loops do not use.
bool has_matrix_units();

// Those of one level, or null where the compiler or the processor does not have it.
const Loops* loops_default();
const Loops* loops_v3();
const Loops* loops_v4();
const Loops* loops_v4_bf16();

}  // namespace sparsezoo

#endif  // SPARSEZOO_LOOPS_H_
