// NEON, which every 64-bit ARM CPU has: 32 registers of 4 floats; bf16 is widened to float. `min` and `max` are the
// portable ones, as NEON's own return NaN for a NaN on either side.
#if defined(__aarch64__)
#include "isa/headers.h"

namespace pvt::neon {
struct Target {
  static constexpr int kLanes = 4, kPanelVectors = 2;
  static constexpr bool kMatrixUnit = false, kFusedMultiplyAdd = true;
  // 32 registers, a row's value in a register of its own, of which fmla takes one lane: 10 x 2 accumulators + 2 of the
  // panel + 10; at 12 x 2 GCC 12 spills accumulators inside the loop, as it loads the rows' values ahead
  static constexpr int kTileRows = 10, kNarrowTileRows = kTileRows;
};
#include "simd/vec-inl.h"
#include "simd/portable-inl.h"
#include "simd/round_to_bf16-inl.h"
#include "gemm/tile-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::neon

namespace pvt {
static bool runs_neon() { return true; }
static const RegisterIsa kNeon({"neon",
                                10,
                                runs_neon,
                                {&neon::kFactories<float, float>, &neon::kFactories<neon::bf16, float>,
                                 &neon::kFactories<float, float>}});
}  // namespace pvt
#endif
