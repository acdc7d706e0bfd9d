// Quantile of the standard normal distribution.
#ifndef SPARSEZOO_QUANTILE_H_
#define SPARSEZOO_QUANTILE_H_

#include <cmath>

namespace sparsezoo {

// Algorithm AS 241 (Wichura, Applied Statistics 37, 1988), PPND16, without its third interval: 1e-10 < p < 1 - 1e-10.
inline double normal_quantile(double p) {
  static const double kCentre[2][8] = {
      {3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
       45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727},
      {1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077, 21213.794301586595867,
       39307.895800092710610, 28729.085735721942674, 5226.4952788528545610}};
  static const double kTail[2][8] = {
      {1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
       1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 0.000774545014278341407640},
      {1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550, 0.148103976427480074590,
       0.0151986665636164571966, 0.000547593808499534494600, 1.05075007164441684324e-9}};
  auto ratio = [](const double (&c)[2][8], double r) {
    double above = 0, below = 0;
    for (int i = 7; i >= 0; i--) {
      above = above * r + c[0][i];
      below = below * r + c[1][i];
    }
    return above / below;
  };
  const double q = p - 0.5;
  if (std::fabs(q) <= 0.425) return q * ratio(kCentre, 0.180625 - q * q);
  const double tail = ratio(kTail, std::sqrt(-std::log(q < 0 ? p : 1 - p)) - 1.6);
  return q < 0 ? -tail : tail;
}

}  // namespace sparsezoo

#endif  // SPARSEZOO_QUANTILE_H_
