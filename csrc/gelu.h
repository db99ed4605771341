// Phi(x) - 1/2, the normal distribution's integral from 0 to x, as a table of short polynomials.
#pragma once

namespace pvt {

// x >= 0 in steps of kStep, each with its node in the middle: near node i, Phi(x) - 1/2 is a polynomial in
// u = x / kStep - i of [-1/2, 1/2], coefficients[power][i]. From the last node on it is 1/2.
template <int kDegree>
struct PhiTable {
  static constexpr int kNodes = 16;  // one vector register of 512 bits for each power
  static constexpr float kStep = kDegree == 4 ? 0.36f : 0.29f;

  PhiTable();
  alignas(64) float coefficients[kDegree + 1][kNodes];
};

// Errors of x Phi(x) on [-9, 9]: 3e-7 at most, where torch's erf in float errs by 1.2e-6; and 5e-5, a hundredth of
// bfloat16's rounding at 1.
extern const PhiTable<4> kPhi;
extern const PhiTable<2> kRoughPhi;

}  // namespace pvt
