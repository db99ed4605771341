// The even part of GELU as a table of short polynomials: x Phi(x) = x / 2 + h(|x|), h(x) = x (Phi(x) - 1/2).
#pragma once

namespace pvt {

// x >= 0 in steps around nodes i * kStep: near node i, h(x) is a polynomial in x - i * kStep, coefficients[power][i].
// From the last node on it is x / 2, so that far to the left GELU is exactly 0; all of a step's multiples are exact.
template <int kDegree>
struct GeluTable {
  static constexpr int kNodes = 16;  // one vector register of 512 bits for each power
  static constexpr float kStep = kDegree == 4 ? 0.375f : 0.28125f;

  GeluTable();
  alignas(64) float coefficients[kDegree + 1][kNodes];
};

// Errors of GELU on [-9, 9]: 5e-7 at most, where torch's in float errs by 1.2e-6; and 1e-4, a fortieth of bfloat16's
// rounding at 1.
extern const GeluTable<4> kGelu;
extern const GeluTable<2> kRoughGelu;

}  // namespace pvt
