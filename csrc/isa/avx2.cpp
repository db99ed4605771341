// AVX2 with FMA: 16 registers of 8 floats; bf16 is widened to float.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa/headers.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace pvt::avx2 {
struct Target {
  static constexpr int kLanes = 8, kPanelVectors = 2;
  static constexpr bool kMatrixUnit = false, kFusedMultiplyAdd = true;
  // 16 registers: 6 x 2 accumulators + 2 of the panel + 1 broadcast = 15; 20 instructions for 12 multiply-adds
  static constexpr int kTileRows = 6, kNarrowTileRows = kTileRows;
};
#include "simd/vec-inl.h"
#include "simd/round_to_bf16-inl.h"

PVT_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
PVT_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PVT_INLINE VecBits widen(VecHalf h) {  // GCC 12 does it in halves
  return reinterpret_cast<VecBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
}

#include "gemm/tile-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::avx2
#pragma GCC pop_options

namespace pvt {
static const RegisterIsa kAvx2({"avx2",
                                10,
                                has_avx2,
                                {&avx2::kFactories<float, float>, &avx2::kFactories<avx2::bf16, float>,
                                 &avx2::kFactories<float, float>}});
}  // namespace pvt
#endif
