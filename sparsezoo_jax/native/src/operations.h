// The operations, free of XLA's interface (which handlers.cc binds them to) and of instruction sets (loops.h).
//
// M tokens, D model width, F neurons, E experts of W neurons, B sequences, N query heads, K key/value heads of width H,
// S keys.
#ifndef SPARSEZOO_OPERATIONS_H_
#define SPARSEZOO_OPERATIONS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "loops.h"
#include "team.h"

namespace sparsezoo {

inline long size_of(Type type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

// Where an operation's threads come from.
struct Pool {
  std::function<void(std::function<void()>)> schedule;
  long threads;

  // A team for phases of up to `items` items, with no more threads than have `kEnough` of `bytes` to read each.
  Team team(long items, long bytes) const {
    constexpr long kEnough = 64 << 10;  // waking a thread takes as long as reading this
    return Team(schedule, threads < bytes / kEnough ? threads : bytes / kEnough + 1, items);
  }
};

// An array of tokens, row by row.
struct Tokens {
  void* data;
  Type type;
  long count, width;

  // `n` of them.
  Tokens slice(long first, long n) const {
    return {static_cast<char*>(data) + first * width * size_of(type), type, n, width};
  }
};

// How many rows of `bytes` each to prefetch ahead of the one that is being read: four, for so many are multiplied
// together, or 8 KB of shorter rows.
inline long rows_ahead(long bytes) {
  const long rows = (8 << 10) / bytes;
  return rows < 4 ? 4 : rows > 64 ? 64 : rows;
}

// Rows of weights: `ld` elements apart, with a factor for each row at scale[row * scale_step] unless null.
struct Matrix {
  const char* data;
  Type type;
  long ld;
  const float* scale = nullptr;
  long scale_step = 1;

  const char* row(long i) const { return data + i * ld * size_of(type); }
  // The row to prefetch while row i is read, where all rows are read one after another.
  const char* ahead_of(long i) const { return row(i + rows_ahead(ld * size_of(type))); }

  // out[j * ld_out + i] = row (first + i) . x_j, for x in the order of the matrix's type
  void dot(long first, long rows, long k, const float* const* x, long m, float* out, long ld_out,
           const char* ahead = nullptr) const {
    loops().dot[type](row(first), ld, rows, k, x, m, out, ld_out, ahead);
    scaled(first, rows, out, m, ld_out);
  }

  // y_j += sum_i c[j * ld_c + i] row (first + i), with y in the order of the matrix's type; c is overwritten.
  void axpy(long first, long rows, long k, float* c, long ld_c, long m, float* const* y,
            const char* ahead = nullptr) const {
    scaled(first, rows, c, m, ld_c);
    loops().axpy[type](row(first), ld, rows, k, c, ld_c, m, y, ahead);
  }

  // out[i] = row places[i] . x, and y += sum_i c[i] row places[i], for one vector; see `Loops`.
  void dot_at(const int* places, long rows, long left, long k, const float* x, float* out) const {
    loops().dot_at[type](data, ld, places, rows, left, rows_ahead(k * size_of(type)), k, x, out);
    for (long i = 0; scale && i < rows; i++) out[i] *= scale[places[i] * scale_step];
  }
  void axpy_at(const int* places, long rows, long left, long k, float* c, float* y) const {
    for (long i = 0; scale && i < rows; i++) c[i] *= scale[places[i] * scale_step];
    loops().axpy_at[type](data, ld, places, rows, left, rows_ahead(k * size_of(type)), k, c, y);
  }

 private:
  void scaled(long first, long rows, float* values, long m, long ld_values) const {
    if (!scale) return;
    for (long j = 0; j < m; j++)
      for (long i = 0; i < rows; i++) values[j * ld_values + i] *= scale[(first + i) * scale_step];
  }
};

// `count` vectors of floats, each padded with room up to a multiple of kPadding, and pointers to them.
class Vectors {
 public:
  Vectors(long count, long width)
      : stride_((width + kPadding - 1) / kPadding * kPadding),
        data_(new float[count * stride_]),
        pointers_(count) {
    for (long i = 0; i < count; i++) pointers_[i] = data_.get() + i * stride_;
  }
  // Columns first .. first + width - 1 of tokens, as rows of `type` are multiplied by them.
  Vectors(const Tokens& x, Type type, long first, long width) : Vectors(x.count, width) {
    const std::unique_ptr<float[]> wide(type == kInt8 ? new float[stride_] : nullptr);
    for (long i = 0; i < x.count; i++) {
      float* const to = wide ? wide.get() : pointers_[i];
      loops().widen[x.type](static_cast<const char*>(x.data) + (i * x.width + first) * size_of(x.type), to, width);
      for (long j = width; j < stride_; j++) to[j] = 0;
      if (wide) loops().quantise(to, pointers_[i], stride_);
    }
    if (!wide) arrange(type);
  }
  Vectors(const Tokens& x, Type type) : Vectors(x, type, 0, x.width) {}

  float* operator[](long i) const { return pointers_[i]; }
  float* const* pointers() const { return pointers_.data(); }
  long stride() const { return stride_; }
  void zero(long first, long count) const {
    for (long i = first * stride_; i < (first + count) * stride_; i++) data_[i] = 0;
  }
  void arrange(Type type) const { loops().arrange[type](data_.get(), long(pointers_.size()) * stride_); }
  // Writes the first y.count vectors, which are in the order of `type`, to the rows of y.
  void write(const Tokens& y, Type type) const {
    for (long i = 0; i < y.count; i++) {
      loops().restore[type](pointers_[i], stride_);
      write(y, i);
    }
  }
  void write(const Tokens& y) const {
    for (long i = 0; i < y.count; i++) write(y, i);
  }

 private:
  void write(const Tokens& y, long i) const {
    loops().narrow[y.type](pointers_[i], static_cast<char*>(y.data) + i * y.width * size_of(y.type), y.width);
  }

  long stride_;
  std::unique_ptr<float[]> data_;
  std::vector<float*> pointers_;
};

// Tokens that all rows of a matrix are multiplied by: pairs of bfloat16 where tokens, weights and the processor have them.
class Operand {
 public:
  Operand(const Tokens& x, const Matrix& w)
      : w_(w),
        width_(x.width),
        count_(x.count),
        pairs_(loops().dot_pairs && x.type == kBfloat16 && w.type == kBfloat16),
        vectors_(pairs_ ? Vectors(x.count, x.width) : Vectors(x, w.type)) {
    if (!pairs_) return;
    vectors_.zero(0, x.count);
    const long bytes = x.width * size_of(x.type);
    for (long i = 0; i < x.count; i++) __builtin_memcpy(vectors_[i], static_cast<const char*>(x.data) + i * bytes, bytes);
  }

  // out[j * ld_out + i] = row (first + i) . x_j
  void dot(long first, long rows, float* out, long ld_out) const {
    const char* const ahead = w_.ahead_of(first);
    if (!pairs_) return w_.dot(first, rows, width_, vectors_.pointers(), count_, out, ld_out, ahead);
    loops().dot_pairs(w_.row(first), w_.ld, rows, width_, vectors_.pointers(), count_, out, ld_out, ahead);
  }

 private:
  const Matrix& w_;
  long width_, count_;
  bool pairs_;
  Vectors vectors_;
};

// Sums that several threads make together. Each part of the work has sums of its own, which are added in the order of
// the parts, so that a result depends neither on the threads nor on how many tokens there are.
class Partials {
 public:
  Partials(long parts, long tokens, long width) : parts_(parts), tokens_(tokens), sums_(parts * tokens, width) {}

  // The sums of one part, set to zero.
  float* const* begin(long part) const {
    sums_.zero(part * tokens_, tokens_);
    return sums_.pointers() + part * tokens_;
  }

  // Writes the total of all parts, whose rows of weights were of `type`, to y.
  void write(const Tokens& y, Type type) const {
    for (long p = 1; p < parts_; p++) {
      float* const total = sums_[0];
      const float* const part = sums_[p * tokens_];
      for (long i = 0; i < tokens_ * sums_.stride(); i++) total[i] += part[i];
    }
    sums_.write(y, type);
  }

 private:
  long parts_, tokens_;
  Vectors sums_;
};

// Into how many parts to cut a sum over `bytes` of weights, `most` at most.
inline long parts_for(long bytes, long most) {
  long parts = bytes / (512 << 10);
  parts = parts < 8 ? 8 : parts > 32 ? 32 : parts;
  return parts < most ? parts : most;
}

// The first item of part `p`, of `n` items cut into `parts`.
inline long first_of(long p, long parts, long n) { return n * p / parts; }

void linear(const Pool& pool, const Tokens& x, const Matrix& w, const Tokens& y);

// y = x w^T for w [N, K] if `transposed`, y = x w for w [K, N] otherwise.
void gemm(const Pool& pool, const Tokens& x, const Matrix& w, bool transposed, const Tokens& y);

// Which entries of each row are among its k[row] largest, [M, N]; entries are at least 0. Of those that equal the k-th the
// first are taken, but all where it is 0.
void top_k_mask(const Pool& pool, const Tokens& x, const int* k, bool* out);

void gated_ffn(const Pool& pool, const Tokens& x, const Matrix& gate, const Matrix& up, const Matrix& down, long neurons,
               Activation activation, const Tokens& y);

struct Selection {
  float quantile;  // Q(1 - k / n) of the normal distribution
  long ddof;
  float huber_delta;
};

// `k2` and `v` are the two parts of the same rows; `active` [M] counts neurons.
void spark_ffn(const Pool& pool, const Tokens& x, long r, const Matrix& k1, const Matrix& k2, const Matrix& v,
               long neurons, double top_k, const Selection& selection, const Tokens& y, int* active);

// `up` and `down` are the two parts of the same rows, or `down` is all of them; gates up to `bound`, at least 0, are 0;
// `active` [M] counts the neurons above it.
void relu_ffn(const Pool& pool, const Tokens& x, const Matrix& first, const Matrix& up, const Matrix& down, bool gated,
              long neurons, float bound, const Tokens& y, int* active);

// Gates `act(gate . x)` whose magnitude is not above `bound` are 0, and their rows of `up` and `down`, the two parts of
// the same rows, are not read; `active` [M] counts the others.
void thresholded_ffn(const Pool& pool, const Tokens& x, const Matrix& gate, const Matrix& up, const Matrix& down,
                     long neurons, Activation activation, float bound, const Tokens& y, int* active);

// A layer whose hidden units are a ReLU's, all float32; weights are rows of neurons [F, D].
struct ReluLayer {
  const float *x, *z;  // [M, D], and the scores before the ReLU [M, F]
  const float *first, *up, *down;  // the map that made z; `up` is null without a gate
  long tokens, width, neurons;
};

// y [M, D], the L1 norms of the hidden units [M], and what is beside the gate [M, F], 0 where the ReLU is; `first` and,
// without a gate, `other` are not used.
void relu_ffn_forward(const Pool& pool, const ReluLayer& layer, float* y, float* l1, float* other);

// Gradients from those of y [M, D] and of the norms [M]; `d_up` is not used without a gate.
void relu_ffn_backward(const Pool& pool, const ReluLayer& layer, const float* other, const float* dy, const float* dl1,
                       float* dx, float* d_first, float* d_up, float* d_down);

// y = hidden w for hidden [M, F]; rows of units that are 0 in all tokens are not read.
void active_rows(const Pool& pool, const Tokens& hidden, const Matrix& w, const Tokens& y);

// y_p = x_j w_e for P results, of experts e = chosen [P] (none where there is no such number: 0), whose matrices [I, O] lie
// one after another; of inputs x [M, I] each is that of P / M consecutive results. Rows of channels that are 0 in all
// inputs of an expert are not read.
void expert_rows(const Pool& pool, const Tokens& x, const int* chosen, long experts, const Matrix& w, const Tokens& y);

// y_p = w_e x_j for matrices [O, I] likewise, where `needed` [P, O] is not 0, and 0 elsewhere: no other rows are read.
void expert_products(const Pool& pool, const Tokens& x, const int* chosen, long experts, const Tokens& needed,
                     const Matrix& w, const Tokens& y);

// y = (gates * (x up^T)) down, or y = gates down where nothing is gated, for many tokens; a neuron's rows are multiplied
// with those tokens only whose gate [M, F] is not 0. `up` and `down` are the two parts of the same rows.
void token_rows(const Pool& pool, const Tokens& x, const Tokens& gates, const Matrix& up, const Matrix& down, bool gated,
                const Tokens& y);

// `scores` [M, E]; `gate.data` may be null; `active` [M] counts the hidden units of a token's experts that are not 0.
void block_ffn(const Pool& pool, const Tokens& x, const Tokens& scores, const Matrix& gate, const Matrix& up,
               const Matrix& down, long expert_width, Activation activation, const Tokens& y, int* active);

struct NormSilu {
  Matrix mean_row;     // [1, D], the mean of all rows of `up`; `data` is null where the mean stays
  const float* scale;  // [W]; null where units are not normalised
  double eps;
};

// `scores` [M, E], `up` and `down` [E * width, D].
void deco_ffn(const Pool& pool, const Tokens& x, const Tokens& scores, const Matrix& up, const Matrix& down, long width,
              const NormSilu& form, const Tokens& y);

struct Heads {
  long batch, queries, keyvalues, keys;  // B, N, K, S
  const unsigned char* mask;             // [B, S]
};

// Cache rows of head h of sequence b begin at row (b K + h) S.
void attention(const Pool& pool, const Heads& heads, const Tokens& q, const Matrix& k, const Matrix& v, float scale,
               float softcap, const Tokens& y);

struct SparkAttention {
  long r;         // width of the predictor's part of a head
  double top_k;   // 0: all visible keys
  long ddof;
  float predictor_scale, value_scale, softcap, softcap_values;  // a cap of 0 is none
  bool softplus;
};

// `k2` and `v` are the two parts of the same rows; `attended` [B, N] counts keys.
void spark_attention(const Pool& pool, const Heads& heads, const SparkAttention& form, const Tokens& q, const Matrix& k1,
                     const Matrix& k2, const Matrix& v, const Tokens& y, int* attended);

// Attention over whole sequences, forward and backward: T queries and S keys of each, G = N / K queries' heads to a head of
// keys, and V the width of values. A query sees the keys of its segment that are not ahead of it and less than `window`
// behind (0: any).
struct WholeAttention {
  long batch, queries, keys, heads, keyvalues, width, value_width;  // B, T, S, N, K, H, V
  const int *query_positions, *key_positions, *query_segments, *key_segments;  // [B, T], [B, S]
  long window;
  SparkAttention form;  // r = H and no softplus where a head's whole width makes the scores
  bool selects;         // by a threshold, so that about `form.top_k` keys are left
};

// What the forward pass leaves for the backward one, and the number of attended keys, all [B, T, N].
struct RowStatistics {
  float *threshold, *normaliser;
  int* attended;
};

// Queries [B, T, N, H] are scaled already; keys [B, S, K, H], values [B, S, K, V], y [B, T, N, V].
void attention_forward(const Pool& pool, const WholeAttention& a, const Tokens& q, const Tokens& k, const Tokens& v,
                       const Tokens& y, const RowStatistics& statistics);

// `delta` [B, T, N] is the sum of y dy; `dq` is that of the queries before they were scaled.
void attention_backward(const Pool& pool, const WholeAttention& a, const Tokens& q, const Tokens& k, const Tokens& v,
                        const Tokens& dy, const float* delta, const RowStatistics& statistics, const Tokens& dq,
                        const Tokens& dk, const Tokens& dv);

struct Blocks {
  long count, shared, routed;  // `routed` of each token
  const int* chosen;           // [M, routed]
};

// w [D, O]: rows of inputs.
void from_blocks(const Pool& pool, const Blocks& blocks, const Tokens& x, const Matrix& w, const Tokens& y);
// w [D, I]: rows of outputs.
void to_blocks(const Pool& pool, const Blocks& blocks, const Tokens& x, const Matrix& w, const Tokens& y);

// The rest trains, in float32.

struct Experts {
  long count, each;   // `each` of a token, M tokens
  const int* chosen;  // [M, each]; numbers that no expert has choose none
};

// y [M each, O]: x [M, I] times the matrix of each choice of w [count, I, O]; zeros for none.
void products_by_expert(const Pool& pool, const Experts& experts, const Tokens& x, const float* w, const Tokens& y);
// y [M, O]: the sum over a token's choices of x [M each, I] times their matrix of w [count, I, O].
void sum_of_experts(const Pool& pool, const Experts& experts, const Tokens& x, const float* w, const Tokens& y);
// w [count, I, O]: for each expert x^T g over its choices, where x and g have a row of each token, [M, I], or choice,
// [M each, I].
void sums_by_expert(const Pool& pool, const Experts& experts, const Tokens& x, const Tokens& g, float* w);

// y [M, O]: the sum over each token's blocks of x [M, D] times their rows of w [D, O].
void sum_of_blocks(const Pool& pool, const Blocks& blocks, const Tokens& x, const float* w, const Tokens& y);
// y [M, D]: x [M, O] times `shared` [O, shared blocks] and, of the others, `routed` [count - shared, O, D / count], in the
// blocks of each token; zeros elsewhere.
void products_by_block(const Pool& pool, const Blocks& blocks, const Tokens& x, const float* shared, const float* routed,
                       const Tokens& y);
// w [D, O]: for each block x_b^T g over the tokens that have it, for x [M, D] and g [M, O].
void sums_by_block(const Pool& pool, const Blocks& blocks, const Tokens& x, const Tokens& g, float* w);

}  // namespace sparsezoo

#endif  // SPARSEZOO_OPERATIONS_H_
