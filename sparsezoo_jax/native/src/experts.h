// The experts that some token takes.
#ifndef SPARSEZOO_EXPERTS_H_
#define SPARSEZOO_EXPERTS_H_

#include <vector>

#include "operations.h"

namespace sparsezoo {

struct Expert {
  long index;
  std::vector<long> tokens;  // that take it, ascending

  // The vectors of its tokens.
  template <class P = const float*>
  std::vector<P> of(float* const* vectors) const {
    std::vector<P> found;
    for (long j : tokens) found.push_back(vectors[j]);
    return found;
  }
};

// Those with a score that is not 0, ascending; `scores` has a vector for each token.
inline std::vector<Expert> active_experts(const Vectors& scores, long tokens, long experts) {
  std::vector<Expert> active;
  for (long e = 0; e < experts; e++) {
    Expert expert{e, {}};
    for (long j = 0; j < tokens; j++)
      if (scores[j][e] != 0) expert.tokens.push_back(j);
    if (!expert.tokens.empty()) active.push_back(std::move(expert));
  }
  return active;
}

// f(first, n) for slices of a prompt's tokens: each expert is read once for a slice, whose sums stay in the caches.
template <class F>
void each_slice(long tokens, const F& f) {
  constexpr long kSlice = 256;
  for (long first = 0; first < tokens; first += kSlice) f(first, first + kSlice < tokens ? kSlice : tokens - first);
}

}  // namespace sparsezoo

#endif  // SPARSEZOO_EXPERTS_H_
