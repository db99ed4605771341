#include "simd/gelu.h"

#include <cmath>

namespace pvt {

// Interpolation at Chebyshev's points, whose error is within a small factor of the least one.
template <int kDegree>
GeluTable<kDegree>::GeluTable() {
  constexpr int kPoints = kDegree + 1;
  for (int node = 0; node < kNodes; ++node) {
    double point[kPoints], divided[kPoints], power[kPoints] = {};
    for (int i = 0; i < kPoints; ++i) {
      point[i] = std::cos(M_PI * (i + 0.5) / kPoints) * kStep / 2;
      const double x = node * double{kStep} + point[i];
      divided[i] = x * std::erf(x * M_SQRT1_2) / 2;
    }
    for (int order = 1; order < kPoints; ++order)  // Newton's divided differences
      for (int i = kPoints - 1; i >= order; --i)
        divided[i] = (divided[i] - divided[i - 1]) / (point[i] - point[i - order]);
    for (int i = kPoints - 1; i >= 0; --i) {  // power = power * (u - point[i]) + divided[i]
      for (int j = kPoints - 1; j > 0; --j) power[j] = power[j - 1] - point[i] * power[j];
      power[0] = divided[i] - point[i] * power[0];
    }
    for (int i = 0; i < kPoints; ++i) coefficients[i][node] = float(power[i]);
  }
  coefficients[0][0] = coefficients[1][0] = 0;  // an even function: small x keep their precision
  for (int i = 0; i < kPoints; ++i) coefficients[i][kNodes - 1] = 0;
  coefficients[0][kNodes - 1] = (kNodes - 1) * kStep / 2;
  coefficients[1][kNodes - 1] = 0.5f;
}

template struct GeluTable<4>;
template struct GeluTable<2>;
const GeluTable<4> kGelu;
const GeluTable<2> kRoughGelu;

}  // namespace pvt
