// Matrix products of float rows that belong to groups, as layers with experts and blocks train with them; the lanes of
// vectors are columns.
//
// Included by loops.cc alone, inside of the namespace of one level.

// How far a product goes before the next columns are taken: these columns of so many rows stay in the nearest cache.
constexpr long kGroupDepth = 128;

// A vector, of which kPart has the first n lanes alone.
template <bool kPart>
INLINE Floats load_lanes(const float* p, long n) {
  if constexpr (!kPart) return load(p);
  Floats v = {};
  __builtin_memcpy(&v, p, n * sizeof(float));
  return v;
}
template <bool kPart>
INLINE void write_lanes(float* p, Floats v, long n) {
  if constexpr (kPart)
    __builtin_memcpy(p, &v, n * sizeof(float));
  else
    write(p, v);
}

// y[r][c] (+)= sum over i of a(r, i) x(i)[c], for R rows and V vectors of columns, the last one with `lanes` lanes.
template <int R, int V, bool kPart, class A, class X>
INLINE void grouped_tile(const A& a, const X& x, long k, float* const (&y)[R], long lanes, bool add) {
  Floats sum[R][V];
  each<R>(UNROLLED(r) {
    each<V>(UNROLLED(v) {
      sum[r][v] = add ? load_lanes<(kPart && v == V - 1)>(y[r] + v * kLanes, lanes) : Floats{};
    });
  });
  for (long i = 0; i < k; i++) {
    const float* const row = x(i);
    Floats columns[V];
    each<V>(UNROLLED(v) { columns[v] = load_lanes<(kPart && v == V - 1)>(row + v * kLanes, lanes); });
    const auto factors = a(i);
    each<R>(UNROLLED(r) {
      const Floats factor = all(factors[r]);
      each<V>(UNROLLED(v) { sum[r][v] += factor * columns[v]; });
    });
  }
  each<R>(UNROLLED(r) {
    each<V>(UNROLLED(v) { write_lanes<(kPart && v == V - 1)>(y[r] + v * kLanes, sum[r][v], lanes); });
  });
}

// f(R, first) for tiles of R rows, a number that the compiler knows, from row `first` on.
template <class F>
INLINE void by_tiles_of_rows(long rows, F f) {
  long r = 0;
  if constexpr (kLanes == 16)
    for (; r + 12 <= rows; r += 12) f(std::integral_constant<int, 12>{}, r);
  // Eight rows are twice four: the sums of two rows would wait for each other.
  for (; r + 6 <= rows && r + 8 != rows; r += 6) f(std::integral_constant<int, 6>{}, r);
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
  for (; r + 2 <= rows; r += 2) f(std::integral_constant<int, 2>{}, r);
  for (; r < rows; r++) f(std::integral_constant<int, 1>{}, r);
}

// f(V, part, first, lanes) for V vectors of columns from `first` on; with `part` the last has `lanes` lanes only.
template <class F>
INLINE void by_vectors_of_columns(long columns, F f) {
  long c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes)
    f(std::integral_constant<int, 2>{}, std::false_type{}, c, long(kLanes));
  if (c + kLanes <= columns) {
    f(std::integral_constant<int, 1>{}, std::false_type{}, c, long(kLanes));
    c += kLanes;
  }
  if (c < columns) f(std::integral_constant<int, 1>{}, std::true_type{}, c, columns - c);
}

void grouped_products(const float* a, long ld_a, long rows, long k, const float* w, long ld_w, long columns, float* y,
                      long ld_y, const int* places, bool add) {
  for (long at = 0; at < k || at == 0; at += kGroupDepth) {
    const long depth = k - at < kGroupDepth ? k - at : kGroupDepth;
    by_vectors_of_columns(columns, [&](auto vectors, auto part, long c, long lanes) __attribute__((always_inline)) {
      by_tiles_of_rows(rows, [&](auto count, long first) __attribute__((always_inline)) {
        constexpr int R = decltype(count)::value;
        float* to[R];
        for (int r = 0; r < R; r++) to[r] = y + (places ? places[first + r] : first + r) * ld_y + c;
        struct Column {
          const float* top;
          long ld;
          float operator[](long r) const { return top[r * ld]; }
        };
        const float* const from = a + first * ld_a + at;
        grouped_tile<R, decltype(vectors)::value, decltype(part)::value>(
            [&](long i) __attribute__((always_inline)) { return Column{from + i, ld_a}; },
            [&](long i) __attribute__((always_inline)) { return w + (at + i) * ld_w + c; }, depth, to, lanes, add || at);
      });
    });
  }
}

void grouped_sums(const float* const* a, const float* const* x, long n, long rows, long first_column, long columns,
                  float* sums, long ld, bool add) {
  for (long at = 0; at < n || at == 0; at += kGroupDepth) {
    const long depth = n - at < kGroupDepth ? n - at : kGroupDepth;
    by_vectors_of_columns(columns, [&](auto vectors, auto part, long c, long lanes) __attribute__((always_inline)) {
      by_tiles_of_rows(rows, [&](auto count, long first) __attribute__((always_inline)) {
        constexpr int R = decltype(count)::value;
        float* to[R];
        for (int r = 0; r < R; r++) to[r] = sums + (first + r) * ld + c;
        grouped_tile<R, decltype(vectors)::value, decltype(part)::value>(
            [&](long i) __attribute__((always_inline)) { return a[at + i] + first; },
            [&](long i) __attribute__((always_inline)) { return x[at + i] + first_column + c; }, depth, to, lanes,
            add || at);
      });
    });
  }
}
