// The k largest entries of rows.
#include <algorithm>
#include <cstring>

#include "operations.h"

namespace sparsezoo {

namespace {

// Bits of a float that is not negative are ordered as the floats are; those of a bfloat16 are the upper half of a float's.
inline unsigned bits_at(const Tokens& x, long row, long i) {
  const long at = row * x.width + i;
  if (x.type == kBfloat16) return unsigned(static_cast<const unsigned short*>(x.data)[at]) << 16;
  return static_cast<const unsigned*>(x.data)[at];
}

// Numbers are told apart by their upper bits first: exponent and three bits of the fraction.
constexpr int kLower = 20;
constexpr long kBins = 1L << (31 - kLower);

void mark_largest(const Tokens& x, long row, long k, std::vector<unsigned>& bits, std::vector<unsigned>& candidates,
                  bool* out) {
  const long n = x.width;
  unsigned counts[kBins] = {};
  for (long i = 0; i < n; i++) {
    bits[i] = bits_at(x, row, i) & 0x7fffffff;  // -0 is 0
    counts[bits[i] >> kLower]++;
  }
  long bin = kBins - 1, above = 0;
  while (above + counts[bin] < k) above += counts[bin--];
  long count = 0;
  for (long i = 0; i < n; i++) {
    candidates[count] = bits[i];
    count += long(bits[i] >> kLower) == bin;
  }
  const auto begin = candidates.begin(), end = begin + count, kth_place = begin + (k - above - 1);
  std::nth_element(begin, kth_place, end, std::greater<unsigned>());
  const unsigned kth = *kth_place;
  above += std::count_if(begin, kth_place, [kth](unsigned candidate) { return candidate > kth; });
  long room = kth ? k - above : n;  // of entries that equal the k-th; all of them where it is 0
  for (long i = 0; i < n; i++) {
    const bool tied = bits[i] == kth && room > 0;
    room -= tied;
    out[i] = bits[i] > kth || tied;
  }
}

}  // namespace

void top_k_mask(const Pool& pool, const Tokens& x, const int* k, bool* out) {
  constexpr long kRows = 16;  // of an item of work
  const long items = (x.count + kRows - 1) / kRows;
  Team team = pool.team(items, 16 * x.count * x.width);
  team.run(items, [&](long item) {
    std::vector<unsigned> bits(x.width), candidates(x.width + 1);
    const long last = std::min((item + 1) * kRows, x.count);
    for (long row = item * kRows; row < last; row++)
      mark_largest(x, row, std::clamp(long(k[row]), 1L, x.width), bits, candidates, out + row * x.width);
  });
}

}  // namespace sparsezoo
