// The k largest entries of rows.
#include <algorithm>
#include <cstring>

#include "operations.h"

namespace sparsezoo {

namespace {

// Bits of a float that is not negative are ordered as the floats are; those of a bfloat16 are the upper half of a float's.
void bits_of(const Tokens& x, long row, unsigned* bits) {
  constexpr unsigned kSize = 0x7fffffff;  // -0 is 0
  const long n = x.width, at = row * n;
  if (x.type == kBfloat16) {
    const unsigned short* const from = static_cast<const unsigned short*>(x.data) + at;
    for (long i = 0; i < n; i++) bits[i] = unsigned(from[i]) << 16 & kSize;
  } else {
    const unsigned* const from = static_cast<const unsigned*>(x.data) + at;
    for (long i = 0; i < n; i++) bits[i] = from[i] & kSize;
  }
}

// Numbers are told apart by their upper bits first: exponent and three bits of the fraction.
constexpr int kLower = 20;
constexpr long kBins = 1L << (31 - kLower);

void mark_largest(const unsigned* bits, long n, long k, unsigned* candidates, bool* out) {
  unsigned counts[kBins] = {};
  for (long i = 0; i < n; i++) counts[bits[i] >> kLower]++;
  long bin = kBins - 1, above = 0;
  while (above + counts[bin] < k) above += counts[bin--];
  long count = 0;
  for (long i = 0; i < n; i++) {
    candidates[count] = bits[i];
    count += long(bits[i] >> kLower) == bin;
  }
  unsigned* const place = candidates + (k - above - 1);
  std::nth_element(candidates, place, candidates + count, std::greater<unsigned>());
  const unsigned kth = *place;
  above += std::count_if(candidates, place, [kth](unsigned candidate) { return candidate > kth; });
  const long tied = std::count(candidates, candidates + count, kth);
  if (!kth || above + tied == k) {
    for (long i = 0; i < n; i++) out[i] = bits[i] >= kth;
    return;
  }
  long room = k - above;  // of entries that equal the k-th
  for (long i = 0; i < n; i++) {
    const bool first = bits[i] == kth && room > 0;
    room -= first;
    out[i] = bits[i] > kth || first;
  }
}

}  // namespace

void top_k_mask(const Pool& pool, const Tokens& x, const int* k, bool* out) {
  const long n = x.width, each = std::max((16L << 10) / n, 1L);  // rows of an item of work
  const long items = (x.count + each - 1) / each;
  Team team = pool.team(items, 32 * x.count * n);
  team.run(items, [&](long item) {
    std::vector<unsigned> bits(n), candidates(n + 1);
    const long last = std::min((item + 1) * each, x.count);
    for (long row = item * each; row < last; row++) {
      bits_of(x, row, bits.data());
      mark_largest(bits.data(), n, std::clamp(long(k[row]), 1L, n), candidates.data(), out + row * n);
    }
  });
}

}  // namespace sparsezoo
