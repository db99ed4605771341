// NEON with BF16 (Armv8.6): products of bf16 pairs accumulate in float. Float kernels are those of NEON.
#if defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>

#include "isa/headers.h"

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
namespace pvt::neon_bf16 {
struct Target {
  static constexpr int kLanes = 4, kPanelVectors = 2;
  static constexpr bool kMatrixUnit = false, kFusedMultiplyAdd = true;
  static constexpr int kTileRows = 10, kNarrowTileRows = kTileRows;  // as neon.cpp's
};
#include "simd/vec-inl.h"
#include "simd/portable-inl.h"

PVT_INLINE VecHalf round_to_bf16(Vec v) { return reinterpret_cast<VecHalf>(vcvt_bf16_f32(v)); }

// 4 pairs of bf16
using VecPairs = bfloat16x8_t;
PVT_INLINE VecPairs load_pairs(const bf16* p) { return reinterpret_cast<VecPairs>(vld1q_u16(&p->bits)); }
PVT_INLINE VecPairs splat_pair(const bf16* p) {
  std::uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<VecPairs>(vdupq_n_u32(pair));
}
PVT_INLINE Vec dot(Vec acc, VecPairs a, VecPairs b) { return vbfdotq_f32(acc, a, b); }

#include "gemm/tile-inl.h"
#include "gemm/dot-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::neon_bf16
#pragma GCC pop_options

namespace pvt {
static bool runs_neon_bf16() {
  constexpr unsigned long kHasBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kHasBf16) != 0;
}
static const RegisterIsa kNeonBf16({"neon_bf16",
                                    20,
                                    runs_neon_bf16,
                                    {nullptr, &neon_bf16::kFactories<neon_bf16::bf16, neon_bf16::bf16>,
                                     &neon_bf16::kFactories<float, neon_bf16::bf16>}});
}  // namespace pvt
#endif
