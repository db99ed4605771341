// AVX2 with FMA: 16 registers of 8 floats; bf16 is widened to float.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa/headers.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace pvt::avx2 {
#define PVT_LANES 8
#define PVT_HAS_MIN_MAX
#define PVT_HAS_WIDEN
#include "simd/vec-inl.h"

PVT_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
PVT_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PVT_INLINE VecBits widen(VecHalf h) {  // GCC 12 does it in halves
  return reinterpret_cast<VecBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
}

#include "isa/kernels-inl.h"
}  // namespace pvt::avx2
#pragma GCC pop_options

namespace pvt {
static bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static const RegisterIsa kAvx2({"avx2", 10, runs_avx2, avx2::make_factories<float, float>(),
                                avx2::make_factories<avx2::bf16, float>()});
}  // namespace pvt
#endif
