// AVX-512 F, BW, VL, DQ: 32 registers of 16 floats; bf16 is widened to float.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa/headers.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2,prefer-vector-width=512")
namespace pvt::avx512 {
#define PVT_LANES 16
#define PVT_HAS_MIN_MAX
#define PVT_HAS_WIDEN
#include "simd/vec-inl.h"

PVT_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
PVT_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PVT_INLINE VecBits widen(VecHalf h) {  // GCC 12 does it in halves
  return reinterpret_cast<VecBits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
}

#include "isa/kernels-inl.h"
}  // namespace pvt::avx512
#pragma GCC pop_options

namespace pvt {
static bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static const RegisterIsa kAvx512({"avx512", 20, runs_avx512, avx512::make_factories<float, float>(),
                                  avx512::make_factories<avx512::bf16, float>()});
}  // namespace pvt
#endif
