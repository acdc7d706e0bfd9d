// Matrix products of many tokens. Tokens are laid out once, in panels of a few vectors whose lanes are tokens; weights
// block by block, widened to what the processor multiplies, and used for all panels while they are in its caches.
#include "operations.h"

namespace sparsezoo {
namespace {

// Tokens that are multiplied together: a block of weights is widened again for the next so many.
constexpr long kTokens = 1024;
// The least common multiple of the rows that tiles have.
constexpr long kFewestRows = 24;

long round_up(long n, long to) { return (n + to - 1) / to * to; }

// Rows of a task: a block, or less where there would not be a few tasks for every thread.
long chunk_of(long rows, long threads) {
  const long fair = round_up(rows / (4 * threads), kFewestRows);
  return fair < kFewestRows ? kFewestRows : fair > kBlockRows ? kBlockRows : fair;
}

// Memory that a thread has for the blocks and the sums of its tasks, kept for the next ones.
class Scratch {
 public:
  unsigned* block() {
    if (!block_) block_.reset(new unsigned[kBlockRows * kBlockStride]());
    return block_.get();
  }
  float* sums(long count) {
    if (count > count_) {
      sums_.reset(new float[count]);
      count_ = count;
    }
    return sums_.get();
  }

 private:
  std::unique_ptr<unsigned[]> block_;
  std::unique_ptr<float[]> sums_;
  long count_ = 0;
};

// One product y = x w^T, or y = x w, of up to kTokens tokens.
class Product {
 public:
  Product(const Pool& pool, const Tokens& x, const Matrix& w, bool transposed, const Tokens& y)
      : x_(x), w_(w), transposed_(transposed), y_(y), tiles_(tiles_for(x.type, w.type)),
        words_((x.width + tiles_.numbers - 1) / tiles_.numbers), lanes_(loops().lanes), panel_(lanes_ * loops().vectors),
        panels_((x.count + panel_ - 1) / panel_), chunk_(chunk_of(y.width, pool.threads)),
        packed_(new unsigned[words_ * round_up(x.count, lanes_)]) {}

  void run(const Pool& pool) const {
    const long chunks = (y_.width + chunk_ - 1) / chunk_;
    Team team = pool.team(chunks > panels_ ? chunks : panels_, x_.count * x_.width * y_.width);
    team.run(panels_, [&](long p) { pack(p); });
    team.run(chunks, [&](long c) { multiply(c * chunk_); });
  }

 private:
  static const Tiles& tiles_for(Type x, Type w) {
    const Tiles* const pairs = loops().pairs;
    return pairs && pairs->pack_tokens[x] && pairs->pack_rows[w] ? *pairs : loops().floats;
  }

  // The vectors of tokens that panel p has.
  long vectors_of(long p) const {
    const long rest = x_.count - p * panel_;
    return rest < panel_ ? (rest + lanes_ - 1) / lanes_ : panel_ / lanes_;
  }

  void pack(long p) const {
    const long first = p * panel_, count = x_.count - first < panel_ ? x_.count - first : panel_;
    tiles_.pack_tokens[x_.type](static_cast<const char*>(x_.data) + first * x_.width * size_of(x_.type), x_.width, count,
                                x_.width, packed_.get() + first * words_);
  }

  // Outputs `first` and following, for all tokens.
  void multiply(long first) const {
    thread_local Scratch scratch;
    const long rows = y_.width - first < chunk_ ? y_.width - first : chunk_;
    // Rows of sums that lie a power of two apart would compete for the same places of the caches.
    const long ld = round_up(x_.count, lanes_) + 16;
    unsigned* const block = scratch.block();
    float* const sums = scratch.sums(kBlockRows * ld);
    for (long at = 0; at < words_; at += kBlockDepth) {
      const long words = words_ - at < kBlockDepth ? words_ - at : kBlockDepth;
      lay_out(first, rows, at * tiles_.numbers, block);
      const Next next = after(first, at);
      for (long p = 0; p < panels_; p++) {
        const long vectors = vectors_of(p);
        tiles_.multiply(block, rows, words, packed_.get() + p * panel_ * words_ + at * vectors * lanes_, vectors,
              sums + p * panel_, ld, at == 0, next);
      }
    }
    write(first, rows, sums, ld);
  }

  // The weights of the next block of outputs `first` and following, or of those after them, where a row holds them.
  Next after(long first, long at) const {
    if (!transposed_) return {nullptr, 0, 0};
    const long size = size_of(w_.type), more = at + kBlockDepth < words_ ? (at + kBlockDepth) * tiles_.numbers : 0;
    if (!more && first + chunk_ >= y_.width) return {nullptr, 0, 0};
    return {w_.row(more ? first : first + chunk_) + more * size, w_.ld * size, tiles_.numbers * size};
  }

  void lay_out(long first, long rows, long from, unsigned* block) const {
    const long most = kBlockDepth * tiles_.numbers, k = x_.width - from < most ? x_.width - from : most;
    const long size = size_of(w_.type);
    if (transposed_) {
      tiles_.pack_rows[w_.type](w_.row(first) + from * size, w_.ld, rows, k, block);
    } else {
      tiles_.pack_columns[w_.type](w_.row(from) + first * size, w_.ld, rows, k,
                                   w_.scale ? w_.scale + from * w_.scale_step : nullptr, w_.scale_step, block);
    }
  }

  void write(long first, long rows, const float* sums, long ld) const {
    float turned[16 * kBlockRows];
    for (long t = 0; t < x_.count; t += lanes_) {
      loops().transpose_sums(sums + t, ld, rows, turned, kBlockRows);
      for (long i = 0; i < lanes_ && t + i < x_.count; i++) {
        float* const row = turned + i * kBlockRows;
        if (transposed_ && w_.scale)
          for (long r = 0; r < rows; r++) row[r] *= w_.scale[(first + r) * w_.scale_step];
        loops().narrow[y_.type](row, static_cast<char*>(y_.data) + ((t + i) * y_.width + first) * size_of(y_.type), rows);
      }
    }
  }

  const Tokens &x_;
  const Matrix& w_;
  const bool transposed_;
  const Tokens& y_;
  const Tiles& tiles_;
  const long words_, lanes_, panel_, panels_, chunk_;
  const std::unique_ptr<unsigned[]> packed_;
};

Tokens part_of(const Tokens& x, long first, long count) {
  return {static_cast<char*>(x.data) + first * x.width * size_of(x.type), x.type, count, x.width};
}

}  // namespace

void gemm(const Pool& pool, const Tokens& x, const Matrix& w, bool transposed, const Tokens& y) {
  for (long first = 0; first < x.count; first += kTokens) {
    const long count = x.count - first < kTokens ? x.count - first : kTokens;
    const Tokens tokens = part_of(x, first, count), results = part_of(y, first, count);
    Product(pool, tokens, w, transposed, results).run(pool);
  }
}

}  // namespace sparsezoo
