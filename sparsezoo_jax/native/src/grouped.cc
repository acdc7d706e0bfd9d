// Products of rows with the matrix of their group while layers train: experts, whose rows are sorted, and the blocks of a
// width of which each token has some (MoHD, arXiv 2412.05644). All float32. What a task writes no other one does, and
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

// A part of the rows of one group.
struct Part {
  long group, first, count;
};

// The first row of each group, and the end of the last one; sizes that name more rows than there are count as far as they go.
std::vector<long> begins(const int* sizes, long groups, long rows) {
  std::vector<long> begin(groups + 1);
  for (long e = 0; e < groups; e++) begin[e + 1] = std::min(rows, begin[e] + std::max(0, sizes[e]));
  return begin;
}

// Tokens of a task over blocks.
long chunk_of(const Pool& pool, long tokens) { return std::clamp(tokens / (4 * pool.threads), 48L, kTokens); }

// For each routed block those of tokens [first, first + count) that have it, counted from `first`.
std::vector<std::vector<int>> users_of(const Blocks& blocks, long first, long count) {
  std::vector<std::vector<int>> users(blocks.count - blocks.shared);
  for (long t = 0; t < count; t++)
    for (long k = 0; k < blocks.routed; k++) {
      const long block = blocks.chosen[(first + t) * blocks.routed + k] - blocks.shared;
      if (block >= 0 && block < blocks.count - blocks.shared) users[block].push_back(int(t));
    }
  return users;
}

// `width` floats from `column` on of each of these rows after `first`, one after another.
void gather(const Tokens& x, long first, const std::vector<int>& users, long column, long width, std::vector<float>& to) {
  to.resize(std::max(to.size(), users.size() * width));
  for (size_t i = 0; i < users.size(); i++)
    std::memcpy(to.data() + i * width, row(x, first + users[i]) + column, width * sizeof(float));
}

}  // namespace

void ragged_products(const Pool& pool, const Tokens& x, const int* sizes, long groups, const float* w, const Tokens& y) {
  const std::vector<long> begin = begins(sizes, groups, x.count);
  std::vector<Part> parts;
  for (long e = 0; e < groups; e++)
    for (long at = begin[e]; at < begin[e + 1]; at += kRows) parts.push_back({e, at, std::min(kRows, begin[e + 1] - at)});
  if (begin[groups] < x.count) parts.push_back({-1, begin[groups], x.count - begin[groups]});
  Team team = pool.team(parts.size(), x.count * x.width * y.width);
  team.run(parts.size(), [&](long i) {
    const Part& p = parts[i];
    if (p.group < 0)
      std::memset(place(y, p.first), 0, p.count * y.width * sizeof(float));
    else
      loops().grouped.products(row(x, p.first), x.width, p.count, x.width, w + p.group * x.width * y.width, y.width,
                               y.width, place(y, p.first), y.width, nullptr, false);
  });
}

void ragged_sums(const Pool& pool, const Tokens& x, const Tokens& g, const int* sizes, long groups, float* w) {
  const std::vector<long> begin = begins(sizes, groups, x.count);
  std::vector<const float*> from(x.count), beside(x.count);
  for (long i = 0; i < x.count; i++) from[i] = row(x, i), beside[i] = row(g, i);
  const long slices = pieces(x.width, kGradientRows), columns = pieces(g.width, kGradientColumns), each = slices * columns;
  Team team = pool.team(groups * each, x.count * x.width * g.width);
  team.run(groups * each, [&](long i) {
    const long e = i / each, r = i % each / columns * kGradientRows, c = i % columns * kGradientColumns;
    const long n = begin[e + 1] - begin[e], height = std::min(kGradientRows, x.width - r);
    std::vector<const float*> rows(from.begin() + begin[e], from.begin() + begin[e + 1]);
    for (const float*& at : rows) at += r;
    loops().grouped.sums(rows.data(), beside.data() + begin[e], n, height, c, std::min(kGradientColumns, g.width - c),
                         w + (e * x.width + r) * g.width + c, g.width, false);
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
