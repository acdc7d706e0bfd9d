// Tiles of attention's scores while it trains; the lanes of vectors are rows (a query of one head).
//
// Included by loops.cc alone, inside of the namespace of one level. Rows go in panels of kPanel: what there is of each of
// them, such as the maximum of its scores, is a vector of lanes, so that nothing is ever summed across lanes. A tile of
// scores of n keys is [n, kPanel]. Scores of keys that a row does not see are kHidden.

constexpr int kParts = 2;  // vectors of a panel
constexpr long kPanel = kParts * kLanes;

// sums[r][c] (+)= sum over o and i of a[r][o][i] x[o, i][c], for R rows and V vectors of columns.
template <int R, int V>
INLINE void products_of(const Factors& a, long first, long outer, long inner, const float* x, long ld_x, float* sums,
                        long ld, bool add) {
  Floats sum[R][V];
  each<R>(UNROLLED(r) {
    each<V>(UNROLLED(v) { sum[r][v] = add ? load(sums + r * ld + v * kLanes) : Floats{}; });
  });
  for (long o = 0; o < outer; o++) {
    const float* at = a.data + first * a.row + o * a.outer;
    for (long i = 0; i < inner; i++, at += a.inner, x += ld_x) {
      Floats columns[V];
      each<V>(UNROLLED(v) { columns[v] = load(x + v * kLanes); });
      each<R>(UNROLLED(r) {
        const Floats factor = all(at[r * a.row]);
        each<V>(UNROLLED(v) { sum[r][v] += factor * columns[v]; });
      });
    }
  }
  each<R>(UNROLLED(r) {
    each<V>(UNROLLED(v) { write(sums + r * ld + v * kLanes, sum[r][v]); });
  });
}

template <int V>
INLINE void products_by_rows(const Factors& a, long rows, long outer, long inner, const float* x, long ld_x, float* sums,
                             long ld, bool add) {
  long r = 0;
  if constexpr (kLanes == 16)
    for (; r + 12 <= rows; r += 12) products_of<12, V>(a, r, outer, inner, x, ld_x, sums + r * ld, ld, add);
  // Eight rows are twice four: the sums of two rows would wait for each other.
  for (; r + 6 <= rows && r + 8 != rows; r += 6)
    products_of<6, V>(a, r, outer, inner, x, ld_x, sums + r * ld, ld, add);
  for (; r + 4 <= rows; r += 4) products_of<4, V>(a, r, outer, inner, x, ld_x, sums + r * ld, ld, add);
  for (; r + 2 <= rows; r += 2) products_of<2, V>(a, r, outer, inner, x, ld_x, sums + r * ld, ld, add);
  for (; r < rows; r++) products_of<1, V>(a, r, outer, inner, x, ld_x, sums + r * ld, ld, add);
}

void score_products(const Factors& a, long rows, long outer, long inner, const float* x, long ld_x, long columns,
                    float* sums, long ld, bool add) {
  long c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes)
    products_by_rows<2>(a, rows, outer, inner, x + c, ld_x, sums + c, ld, add);
  for (; c < columns; c += kLanes) products_by_rows<1>(a, rows, outer, inner, x + c, ld_x, sums + c, ld, add);
}

// f(v) for each vector of lanes of a panel, with the place of the vector.
template <class F>
INLINE void by_part(F f) {
  each<kParts>(UNROLLED(v) { f(long(v) * kLanes); });
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

void cap_scores(float cap, float* s, long n) {
  const float inverse = 1 / cap;
  for (long i = 0; i < n * kPanel; i += kLanes) write(s + i, cap * tanh_of(load(s + i) * inverse));
}

void hide(float* s, const Places& rows, const Places& keys, long n, long window) {
  by_part([&](long v) __attribute__((always_inline)) {
    const Ints position = read<Ints>(rows.positions + v), segment = read<Ints>(rows.segments + v);
    // What a row sees lies less than `window` behind it; without one, anywhere behind it.
    const int within = window && window < 0x7fffffff ? int(window) : 0x7fffffff;
    for (long j = 0; j < n; j++) {
      const Ints distance = position - keys.positions[j];
      const Ints visible = (position >= keys.positions[j]) & (distance < within) & (segment == keys.segments[j]);
      float* const at = s + j * kPanel + v;
      write(at, visible ? load(at) : all(kHidden));
    }
  });
}

bool exponentials_so_far(float* s, long n, float* best, float* total, float* shrunk) {
  bool shrinks = false;
  by_part([&](long v) __attribute__((always_inline)) {
    const Floats before = load(best + v);
    Floats now = before;
    for (long j = 0; j < n; j++) now = larger(load(s + j * kPanel + v), now);
    const Floats factor = exp_below(before - now);
    Floats sum = load(total + v) * factor;
    for (long j = 0; j < n; j++) {
      const Floats e = exp_below(load(s + j * kPanel + v) - now);
      sum += e;
      write(s + j * kPanel + v, e);
    }
    write(best + v, now);
    write(total + v, sum);
    write(shrunk + v, factor);
    const Ints changed = factor != all(1.0f);
    for (int t = 0; t < kLanes; t++) shrinks |= changed[t] != 0;
  });
  return shrinks;
}

void exponentials_of(float* s, long n, float* total) {
  by_part([&](long v) __attribute__((always_inline)) {
    Floats sum = load(total + v);
    for (long j = 0; j < n; j++) {
      const Floats e = exp_below(load(s + j * kPanel + v));
      sum += e;
      write(s + j * kPanel + v, e);
    }
    write(total + v, sum);
  });
}

void multiply_rows(float* x, long n, const float* by) {
  by_part([&](long v) __attribute__((always_inline)) {
    const Floats factor = load(by + v);
    for (long j = 0; j < n; j++) write(x + j * kPanel + v, load(x + j * kPanel + v) * factor);
  });
}

void measure(const float* s, long n, float* count, float* mean, float* squares, float* best) {
  by_part([&](long v) __attribute__((always_inline)) {
    Floats here{}, sum{}, largest = load(best + v);
    for (long j = 0; j < n; j++) {
      const Floats x = load(s + j * kPanel + v);
      const Ints visible = x != all(kHidden);
      here += visible ? all(1.0f) : Floats{};
      sum += visible ? x : Floats{};
      largest = larger(x, largest);
    }
    const Floats own = sum / larger(here, all(1.0f));
    Floats spread{};
    for (long j = 0; j < n; j++) {
      const Floats x = load(s + j * kPanel + v), distance = x - own;
      spread += x != all(kHidden) ? distance * distance : Floats{};
    }
    // By differences of means, so that no large numbers are subtracted (Chan, Golub and LeVeque, 1983).
    const Floats before = load(count + v), after = before + here, share = here / larger(after, all(1.0f));
    const Floats delta = own - load(mean + v);
    write(count + v, after);
    write(mean + v, load(mean + v) + delta * share);
    write(squares + v, load(squares + v) + (spread + delta * delta * before * share));
    write(best + v, largest);
  });
}

void weigh(float* s, long n, const float* threshold, const float* best, float* total, int* attended) {
  by_part([&](long v) __attribute__((always_inline)) {
    const Floats lowest = load(threshold + v), shift = load(best + v);
    Floats sum = load(total + v);
    Ints count = read<Ints>(attended + v);
    for (long j = 0; j < n; j++) {
      const Floats x = load(s + j * kPanel + v);
      // What is no number is not selected, and shows all the same.
      const Floats e = x < lowest ? Floats{} : exp_below(x - shift);
      sum += e;
      count -= x >= lowest;
      write(s + j * kPanel + v, e);
    }
    write(total + v, sum);
    __builtin_memcpy(attended + v, &count, sizeof(count));
  });
}

void multiply_softplus(float* weights, const float* x, long n) {
  for (long i = 0; i < n * kPanel; i += kLanes)
    write(weights + i, load(weights + i) * softplus_of(load(x + i)).value);
}

// x times the slope of a cap, from what is left of its argument: 1 - (capped / cap)^2.
INLINE Floats times_slope(Floats x, Floats capped, float inverse) {
  const Floats share = capped * inverse;
  return x - x * (share * share);
}

void score_gradients(const Gradients& g, long n) {
  const float inverse = g.cap != 0 ? 1 / g.cap : 0, inverse_values = g.cap_values != 0 ? 1 / g.cap_values : 0;
  by_part([&](long v) __attribute__((always_inline)) {
    const Floats lowest = load(g.threshold + v), shift = load(g.normaliser + v), own = load(g.delta + v);
    for (long j = 0; j < n; j++) {
      const long at = j * kPanel + v;
      const Floats s = load(g.scores + at);
      const Ints left_out = s < lowest;
      const Floats softmax = left_out ? Floats{} : exp_below(s - shift);
      Floats weight = softmax, dsoftmax = load(g.dweights + at);
      if (g.arguments) {
        const Floats argument = load(g.arguments + at);
        const Softplus found = softplus_of(argument);
        Floats dargument = softmax * dsoftmax * found.slope;
        if (inverse_values != 0) dargument = times_slope(dargument, argument, inverse_values);
        write(g.arguments + at, dargument);
        weight = softmax * found.value;
        dsoftmax *= found.value;
      }
      Floats dscore = softmax * (dsoftmax - own);
      // A hidden score's slope is no number.
      if (inverse != 0) dscore = left_out ? Floats{} : times_slope(dscore, s, inverse);
      write(g.scores + at, weight);
      write(g.dweights + at, dscore);
    }
  });
}
