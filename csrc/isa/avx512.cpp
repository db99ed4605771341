// AVX-512 F, BW, VL, DQ: 32 registers of 16 floats; bf16 is widened to float.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa/headers.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2,prefer-vector-width=512")
namespace pvt::avx512 {
struct Target {
  static constexpr int kLanes = 16, kPanelVectors = 4;
  static constexpr bool kMatrixUnit = false, kFusedMultiplyAdd = true;
  // 32 registers: 6 x 4 accumulators + 4 of the panel + 1 broadcast = 29; 34 instructions for 24 multiply-adds
  static constexpr int kTileRows = 6;
  // for the last panel of a matrix, where 4 vectors are too wide: 14 x 2 + 2 + 1 = 31; 44 for 28
  static constexpr int kNarrowTileRows = 14;
};
#include "simd/vec-inl.h"
#include "simd/avx512-inl.h"
#include "simd/round_to_bf16-inl.h"
#include "gemm/tile-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::avx512
#pragma GCC pop_options

namespace pvt {
static const RegisterIsa kAvx512({"avx512",
                                  20,
                                  has_avx512,
                                  {&avx512::kFactories<float, float>, &avx512::kFactories<avx512::bf16, float>,
                                   &avx512::kFactories<float, float>}});
}  // namespace pvt
#endif
