// What dense and Spark attention share: which keys are visible, and the queries of a key/value head.
#ifndef SPARSEZOO_ATTENTION_H_
#define SPARSEZOO_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "operations.h"

namespace sparsezoo {

// Visible keys that lie side by side; the first of them is number `place` among the visible ones of its sequence.
struct Run {
  long first, length, place;
};

struct Visible {
  std::vector<Run> runs;  // of `longest` keys at most
  long count = 0;
};

inline Visible visible_keys(const unsigned char* mask, long keys, long longest) {
  Visible found;
  for (long s = 0; s < keys;) {
    const void* const next = std::memchr(mask + s, 1, keys - s);
    if (!next) break;
    const long first = static_cast<const unsigned char*>(next) - mask;
    const void* const hidden = std::memchr(next, 0, keys - first);
    s = hidden ? static_cast<const unsigned char*>(hidden) - mask : keys;
    for (long at = first; at < s; at += longest) {
      const long length = std::min(longest, s - at);
      found.runs.push_back({at, length, found.count});
      found.count += length;
    }
  }
  return found;
}

// A run of visible keys of one key/value head: an item of work.
struct HeadRun {
  long sequence, head;
  Run run;
};

inline std::vector<HeadRun> head_runs(const std::vector<Visible>& visible, long heads) {
  std::vector<HeadRun> items;
  for (long b = 0; b < long(visible.size()); b++)
    for (long h = 0; h < heads; h++)
      for (const Run& run : visible[b].runs) items.push_back({b, h, run});
  return items;
}

inline std::vector<Visible> visible_by_sequence(const Heads& heads, long longest) {
  std::vector<Visible> visible;
  for (long b = 0; b < heads.batch; b++) visible.push_back(visible_keys(heads.mask + b * heads.keys, heads.keys, longest));
  return visible;
}

inline void multiply(float* v, long n, float by) {
  for (long i = 0; i < n; i++) v[i] *= by;
}

}  // namespace sparsezoo

#endif  // SPARSEZOO_ATTENTION_H_
