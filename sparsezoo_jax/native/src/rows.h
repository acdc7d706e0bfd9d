// Where the rows of a product are, and what is prefetched while they are read.
//
// Included by loops.cc alone, as vectors.h is.

constexpr long kLine = 64;

INLINE void prefetch(const char* ahead, long bytes) {
  for (long b = 0; b < bytes; b += kLine) __builtin_prefetch(ahead + b, 0, 2);
}

// What to prefetch while piece i of `bytes` bytes is read of each of R rows: a piece for every row. Where rows follow
// each other without gaps these are consecutive pieces, whatever rows they are of: memory streams a sixth faster so.
template <class W, int R>
struct Ahead {
  const char* start;
  long of_byte, of_row;

  Ahead(const char* ahead, long ld, long k, long bytes)
      : start(ahead), of_byte(ld == k ? R : 1), of_row(ld == k ? bytes : ld * long(sizeof(W))) {}
  inline __attribute__((always_inline)) void fetch(int r, long byte, long bytes) const {
    if (start) prefetch(start + byte * of_byte + r * of_row, bytes);
  }
};

// Rows of weights that are `ld` elements apart.
template <class W>
struct Apart {
  const W* first;
  long ld;

  inline __attribute__((always_inline)) const W* at(int r, long i) const { return first + r * ld + i; }
};

// R rows that lie anywhere, and such rows to prefetch.
template <class W, int R>
struct Scattered {
  const W *rows[R], *next[R];

  // Those at `places`, and of the `left` places that are known those that are `ahead` further on.
  Scattered(const W* w, long ld, const int* places, long left, long ahead) {
    for (int r = 0; r < R; r++) {
      rows[r] = w + places[r] * ld;
      next[r] = w + places[r + ahead < left ? r + ahead : r] * ld;
    }
  }
  inline __attribute__((always_inline)) const W* at(int r, long i) const { return rows[r] + i; }
  inline __attribute__((always_inline)) void fetch(int r, long byte, long bytes) const {
    prefetch(reinterpret_cast<const char*>(next[r]) + byte, bytes);
  }
};
