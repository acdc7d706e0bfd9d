// Products of rows with the matrix of their group while layers train: experts that each token has chosen, and the blocks of
// a width of which it has some (MoHD, arXiv 2412.05644). All float32. What a task writes no other one does, and
// every sum is made in the order of its rows, so that results do not depend on the threads.
#include <algorithm>
#include <cstring>

#include "operations.h"

namespace sparsezoo {

namespace {

// Rows of a task: whole tiles, and few enough for all threads to get some.
constexpr long kRows = 96;
// Rows and columns of a gradient that a task makes.
constexpr long kGradientRows = 48, kGradientColumns = 256;
// Tokens of a task over blocks, at most: a block's weights are read again for each.
constexpr long kTokens = 256;

long pieces(long n, long size) { return (n + size - 1) / size; }

const float* row(const Tokens& x, long i) { return static_cast<const float*>(x.data) + i * x.width; }
float* place(const Tokens& x, long i) { return static_cast<float*>(x.data) + i * x.width; }

// For each of `count` groups from `base` on the users among choices [from, to), counted from there; every `each` choices
// are one user's.
std::vector<std::vector<int>> users_of(const int* chosen, long base, long count, long from, long to, long each) {
  std::vector<std::vector<int>> users(count);
  for (long i = from; i < to; i++) {
    const long group = chosen[i] - base;
    if (group >= 0 && group < count) users[group].push_back(int((i - from) / each));
  }
  return users;
}

// Those of tokens [first, first + count) that have each routed block, counted from `first`.
std::vector<std::vector<int>> users_of(const Blocks& b, long first, long count) {
  return users_of(b.chosen, b.shared, b.count - b.shared, first * b.routed, (first + count) * b.routed, b.routed);
}

// The choices of tokens [first, first + count) that are of each expert, counted from the first of them.
std::vector<std::vector<int>> choices_of(const Experts& e, long first, long count) {
  return users_of(e.chosen, 0, e.count, first * e.each, (first + count) * e.each, 1);
}

// Tokens of a task over blocks.
long chunk_of(const Pool& pool, long tokens) { return std::clamp(tokens / (4 * pool.threads), 48L, kTokens); }

// `width` floats from `column` on of each of these rows after `first`, one after another.
void gather(const Tokens& x, long first, const std::vector<int>& users, long column, long width, std::vector<float>& to) {
  to.resize(std::max(to.size(), users.size() * width));
  for (size_t i = 0; i < users.size(); i++)
    std::memcpy(to.data() + i * width, row(x, first + users[i]) + column, width * sizeof(float));
}

}  // namespace

void products_by_expert(const Pool& pool, const Experts& experts, const Tokens& x, const float* w, const Tokens& y) {
  struct Part {
    long expert, first, count;
  };
  const auto users = choices_of(experts, 0, x.count);
  std::vector<Part> parts;
  for (long e = 0; e < experts.count; e++)
    for (long at = 0, n = users[e].size(); at < n; at += kRows) parts.push_back({e, at, std::min(kRows, n - at)});
  for (long i = 0; i < y.count; i++)
    if (experts.chosen[i] < 0 || experts.chosen[i] >= experts.count) std::memset(place(y, i), 0, y.width * sizeof(float));
  Team team = pool.team(parts.size(), y.count * x.width * y.width);
  team.run(parts.size(), [&](long i) {
    const Part& p = parts[i];
    const int* const places = users[p.expert].data() + p.first;
    std::vector<int> tokens(places, places + p.count);
    for (int& t : tokens) t /= experts.each;
    // Rows that were sorted by expert lie one after another already.
    const bool sorted = experts.each == 1 && tokens.back() - tokens.front() == p.count - 1;
    std::vector<float> own;
    if (!sorted) gather(x, 0, tokens, 0, x.width, own);
    loops().grouped.products(sorted ? row(x, tokens.front()) : own.data(), x.width, p.count, x.width,
                             w + p.expert * x.width * y.width, y.width, y.width, place(y, 0), y.width, places, false);
  });
}

void sum_of_experts(const Pool& pool, const Experts& experts, const Tokens& x, const float* w, const Tokens& y) {
  // Of every expert a task has some rows, on average, so that it is worth reading; but no thread is to be left out.
  const long rows = std::max(chunk_of(pool, y.count), 48 * experts.count / experts.each);
  const long chunk = std::max(1L, std::min(rows, pieces(y.count, pool.threads))), chunks = pieces(y.count, chunk);
  Team team = pool.team(chunks, x.count * x.width * y.width);
  team.run(chunks, [&](long i) {
    const long first = i * chunk, count = std::min(chunk, y.count - first);
    std::memset(place(y, first), 0, count * y.width * sizeof(float));
    const auto users = choices_of(experts, first, count);
    std::vector<float> own;
    for (long e = 0; e < experts.count; e++) {
      gather(x, first * experts.each, users[e], 0, x.width, own);
      std::vector<int> tokens = users[e];
      for (int& t : tokens) t /= experts.each;
      // A token that chose the expert twice begins another product: within one, every row is added to once.
      for (size_t at = 0, end; at < tokens.size(); at = end) {
        for (end = at + 1; end < tokens.size() && tokens[end] != tokens[end - 1];) end++;
        loops().grouped.products(own.data() + at * x.width, x.width, end - at, x.width, w + e * x.width * y.width, y.width,
                                 y.width, place(y, first), y.width, tokens.data() + at, true);
      }
    }
  });
}

void sums_by_expert(const Pool& pool, const Experts& experts, const Tokens& x, const Tokens& g, float* w) {
  const long tokens = std::min(x.count, g.count), of_x = x.count / tokens, of_g = g.count / tokens;
  const auto users = choices_of(experts, 0, tokens);
  const long slices = pieces(x.width, kGradientRows), columns = pieces(g.width, kGradientColumns), each = slices * columns;
  Team team = pool.team(experts.count * each, tokens * experts.each * x.width * g.width);
  team.run(experts.count * each, [&](long i) {
    const long e = i / each, r = i % each / columns * kGradientRows, c = i % columns * kGradientColumns;
    const long n = users[e].size();
    std::vector<const float*> from(n), beside(n);
    for (long j = 0; j < n; j++) {
      from[j] = row(x, of_x > 1 ? users[e][j] : users[e][j] / experts.each) + r;
      beside[j] = row(g, of_g > 1 ? users[e][j] : users[e][j] / experts.each);
    }
    loops().grouped.sums(from.data(), beside.data(), n, std::min(kGradientRows, x.width - r), c,
                         std::min(kGradientColumns, g.width - c), w + (e * x.width + r) * g.width + c, g.width, false);
  });
}

void sum_of_blocks(const Pool& pool, const Blocks& blocks, const Tokens& x, const float* w, const Tokens& y) {
  const long size = x.width / blocks.count, chunk = chunk_of(pool, x.count), chunks = pieces(x.count, chunk);
  Team team = pool.team(chunks, x.count * (blocks.shared + blocks.routed) * size * y.width);
  team.run(chunks, [&](long i) {
    const long first = i * chunk, count = std::min(chunk, x.count - first);
    // Without shared blocks this writes zeros.
    loops().grouped.products(row(x, first), x.width, count, blocks.shared * size, w, y.width, y.width, place(y, first),
                             y.width, nullptr, false);
    const auto users = users_of(blocks, first, count);
    std::vector<float> own;
    for (size_t b = 0; b < users.size(); b++) {
      const long column = (blocks.shared + b) * size;
      gather(x, first, users[b], column, size, own);
      loops().grouped.products(own.data(), size, users[b].size(), size, w + column * y.width, y.width, y.width,
                               place(y, first), y.width, users[b].data(), true);
    }
  });
}

void products_by_block(const Pool& pool, const Blocks& blocks, const Tokens& x, const float* shared, const float* routed,
                       const Tokens& y) {
  const long size = y.width / blocks.count, chunk = chunk_of(pool, x.count), chunks = pieces(x.count, chunk);
  const long common = blocks.shared * size;
  Team team = pool.team(chunks, x.count * (blocks.shared + blocks.routed) * size * x.width);
  team.run(chunks, [&](long i) {
    const long first = i * chunk, count = std::min(chunk, x.count - first);
    loops().grouped.products(row(x, first), x.width, count, x.width, shared, common, common, place(y, first), y.width,
                             nullptr, false);
    for (long t = first; t < first + count; t++) std::memset(place(y, t) + common, 0, (y.width - common) * sizeof(float));
    const auto users = users_of(blocks, first, count);
    std::vector<float> own;
    for (size_t b = 0; b < users.size(); b++) {
      gather(x, first, users[b], 0, x.width, own);
      loops().grouped.products(own.data(), x.width, users[b].size(), x.width, routed + b * x.width * size, size, size,
                               place(y, first) + common + b * size, y.width, users[b].data(), false);
    }
  });
}

void sums_by_block(const Pool& pool, const Blocks& blocks, const Tokens& x, const Tokens& g, float* w) {
  const long size = x.width / blocks.count, common = blocks.shared * size;
  // For each part of the rows of w the tokens that have it: slices of the shared blocks, then each of the others.
  struct Rows {
    long first, count;
    std::vector<int> users;
  };
  std::vector<Rows> parts;
  for (long r = 0; r < common; r += kGradientRows) parts.push_back({r, std::min(kGradientRows, common - r), {}});
  const long slices = parts.size();
  auto users = users_of(blocks, 0, x.count);
  for (size_t b = 0; b < users.size(); b++) parts.push_back({common + long(b) * size, size, std::move(users[b])});
  const long columns = pieces(g.width, kGradientColumns);
  Team team = pool.team(parts.size() * columns, x.count * (blocks.shared + blocks.routed) * size * g.width);
  team.run(parts.size() * columns, [&](long i) {
    const Rows& part = parts[i / columns];
    const long c = i % columns * kGradientColumns, n = i / columns < slices ? x.count : part.users.size();
    std::vector<const float*> from(n), beside(n);
    for (long j = 0; j < n; j++) {
      const long t = i / columns < slices ? j : part.users[j];
      from[j] = row(x, t) + part.first;
      beside[j] = row(g, t);
    }
    loops().grouped.sums(from.data(), beside.data(), n, part.count, c, std::min(kGradientColumns, g.width - c),
                         w + part.first * g.width + c, g.width, false);
  });
}

}  // namespace sparsezoo
