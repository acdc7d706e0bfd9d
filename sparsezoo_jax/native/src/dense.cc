// Operations that read all of their weights.
#include "operations.h"

namespace sparsezoo {

namespace {
constexpr long kRows = 32;  // neurons whose sums are kept between the matrices of a layer
}

void linear(const Pool& pool, const Tokens& x, const Matrix& w, const Tokens& y) {
  const Operand in(x, w);
  const Vectors out(y.count, y.width);
  const long bytes = y.width * x.width * size_of(w.type);
  const long chunk = 1 + (256 << 10) / (x.width * size_of(w.type));
  const long chunks = (y.width + chunk - 1) / chunk;
  Team team = pool.team(chunks, bytes);
  team.run(chunks, [&](long i) {
    const long first = i * chunk, rows = first + chunk < y.width ? chunk : y.width - first;
    in.dot(first, rows, out[0] + first, out.stride());
  });
  out.write(y);
}

void gated_ffn(const Pool& pool, const Tokens& x, const Matrix& gate, const Matrix& up, const Matrix& down, long neurons,
               Activation activation, const Tokens& y) {
  const Operand to_gate(x, gate), to_up(x, up);
  const long m = x.count, d = x.width;
  const long bytes = neurons * d * (size_of(gate.type) + size_of(up.type) + size_of(down.type));
  const long parts = parts_for(bytes, neurons);
  const Partials sums(parts, m, d);
  Team team = pool.team(parts, bytes);
  team.run(parts, [&](long p) {
    const Vectors hidden(2 * m, kRows);
    float *g = hidden[0], *h = hidden[m];
    float* const* out = sums.begin(p);
    const long end = first_of(p + 1, parts, neurons);
    for (long f = first_of(p, parts, neurons); f < end; f += kRows) {
      const long n = end - f < kRows ? end - f : kRows;
      to_gate.dot(f, n, g, hidden.stride());
      to_up.dot(f, n, h, hidden.stride());
      for (long j = 0; j < m; j++) {
        loops().activate(activation, hidden[j], n);
        for (long i = 0; i < n; i++) hidden[m + j][i] *= hidden[j][i];
      }
      down.axpy(f, n, d, h, hidden.stride(), m, out, down.ahead_of(f));
    }
  });
  sums.write(y, down.type);
}

}  // namespace sparsezoo
