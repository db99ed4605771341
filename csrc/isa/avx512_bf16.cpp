// AVX-512 with BF16: products of bf16 pairs accumulate in float. Float kernels are those of AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa/headers.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2,prefer-vector-width=512")
namespace pvt::avx512_bf16 {
struct Target {
  static constexpr int kLanes = 16, kPanelVectors = 4;
  static constexpr bool kMatrixUnit = false, kFusedMultiplyAdd = true;
  static constexpr int kTileRows = 6, kNarrowTileRows = 14;  // as avx512.cpp's
};
#include "simd/vec-inl.h"
#include "simd/avx512-inl.h"

PVT_INLINE VecHalf round_to_bf16(Vec v) { return reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(v)); }

// 16 pairs of bf16
using VecPairs = __m512bh;
PVT_INLINE VecPairs load_pairs(const bf16* p) { return reinterpret_cast<VecPairs>(_mm512_loadu_si512(p)); }
PVT_INLINE VecPairs splat_pair(const bf16* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<VecPairs>(_mm512_set1_epi32(pair));
}
PVT_INLINE Vec dot(Vec acc, VecPairs a, VecPairs b) { return _mm512_dpbf16_ps(acc, a, b); }

#include "gemm/tile-inl.h"
#include "gemm/dot-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::avx512_bf16
#pragma GCC pop_options

namespace pvt {
static const RegisterIsa kAvx512Bf16({"avx512_bf16",
                                      30,
                                      has_avx512_bf16,
                                      {nullptr, &avx512_bf16::kFactories<avx512_bf16::bf16, avx512_bf16::bf16>,
                                       &avx512_bf16::kFactories<float, avx512_bf16::bf16>}});
}  // namespace pvt
#endif
