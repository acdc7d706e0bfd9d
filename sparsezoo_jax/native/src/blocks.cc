// Linear maps from and to active blocks of a width (MoHD, arXiv 2412.05644): only blocks that some token uses are read.
#include <algorithm>

#include "operations.h"

namespace sparsezoo {

namespace {

// For each block the tokens that use it, ascending.
std::vector<std::vector<long>> tokens_of(const Blocks& blocks, long tokens) {
  std::vector<std::vector<long>> users(blocks.count);
  for (long j = 0; j < tokens; j++) {
    for (long b = 0; b < blocks.shared; b++) users[b].push_back(j);
    for (long k = 0; k < blocks.routed; k++) {
      const long b = blocks.chosen[j * blocks.routed + k];
      if (b >= 0 && b < blocks.count && (users[b].empty() || users[b].back() != j)) users[b].push_back(j);
    }
  }
  return users;
}

}  // namespace

void from_blocks(const Pool& pool, const Blocks& blocks, const Tokens& x, const Matrix& w, const Tokens& y) {
  const Vectors in(x, kFloat32), out(y.count, y.width);
  const auto users = tokens_of(blocks, x.count);
  const long size = x.width / blocks.count;
  long used = 0;
  for (const auto& tokens : users) used += !tokens.empty();
  // Pieces of the rows, whose sums stay in the nearest cache.
  const long columns = 1024;
  const long pieces = (y.width + columns - 1) / columns;
  Team team = pool.team(pieces, used * size * y.width * size_of(w.type));
  team.run(pieces, [&](long i) {
    const long first = i * columns, n = std::min(columns, y.width - first);
    for (long j = 0; j < y.count; j++) std::fill_n(out[j] + first, std::min(columns, out.stride() - first), 0.0f);
    std::vector<float> factors(x.count * size);
    std::vector<float*> to(x.count);
    Matrix piece = w;
    piece.data += first * size_of(w.type);
    for (long b = 0; b < blocks.count; b++) {
      const long m = long(users[b].size());
      if (m == 0) continue;
      for (long j = 0; j < m; j++) {
        const float* const from = in[users[b][j]] + b * size;
        std::copy(from, from + size, factors.data() + j * size);
        to[j] = out[users[b][j]] + first;
      }
      piece.axpy(b * size, size, n, factors.data(), size, m, to.data());
    }
  });
  out.write(y, w.type);
}

void to_blocks(const Pool& pool, const Blocks& blocks, const Tokens& x, const Matrix& w, const Tokens& y) {
  const Vectors in(x, w.type), out(y.count, y.width);
  out.zero(0, y.count);
  const auto users = tokens_of(blocks, x.count);
  const long size = y.width / blocks.count, row = x.width * size_of(w.type);
  const long chunk = std::min(size, 1 + (64 << 10) / row);
  struct Piece {
    long block, first, rows;
  };
  std::vector<Piece> pieces;
  for (long b = 0; b < blocks.count; b++)
    for (long first = 0; first < size && !users[b].empty(); first += chunk)
      pieces.push_back({b, first, std::min(chunk, size - first)});
  Team team = pool.team(long(pieces.size()), long(pieces.size()) * chunk * row);
  team.run(long(pieces.size()), [&](long i) {
    const Piece& piece = pieces[i];
    const auto& tokens = users[piece.block];
    std::vector<const float*> from;
    for (long j : tokens) from.push_back(in[j]);
    const long first = piece.block * size + piece.first;
    std::vector<float> sums(tokens.size() * piece.rows);
    w.dot(first, piece.rows, x.width, from.data(), long(tokens.size()), sums.data(), piece.rows);
    for (size_t j = 0; j < tokens.size(); j++)
      std::copy_n(sums.data() + j * piece.rows, piece.rows, out[tokens[j]] + first);
  });
  out.write(y);
}

}  // namespace sparsezoo
