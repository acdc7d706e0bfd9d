// Rows that only some tokens are multiplied with.
#ifndef SPARSEZOO_USERS_H_
#define SPARSEZOO_USERS_H_

#include <vector>

namespace sparsezoo {

constexpr long kTogether = 4;  // rows of one token

// The tokens that use a row, with their factors: others are not multiplied with it.
class Users {
 public:
  explicit Users(long tokens) : tokens_(tokens), factors_(tokens), from_(tokens), to_(tokens) {}

  // Finds those whose factor is not 0, and their vectors among those of all tokens; returns how many there are.
  template <class F>
  long find(const F& factor, const float* const* from, float* const* to) {
    long count = 0;
    for (long j = 0; j < tokens_; j++) {
      factors_[count] = factor(j);
      from_[count] = from[j];
      to_[count] = to[j];
      count += !(factors_[count] == 0);
    }
    return count;
  }
  float* factors() { return factors_.data(); }
  const float* const* from() const { return from_.data(); }
  float* const* to() const { return to_.data(); }

 private:
  long tokens_;
  std::vector<float> factors_;
  std::vector<const float*> from_;
  std::vector<float*> to_;
};

}  // namespace sparsezoo

#endif  // SPARSEZOO_USERS_H_
