// AMX-BF16: the matrix unit multiplies bf16 tiles; the rest is AVX-512 with BF16, float kernels are those of AVX-512.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "isa/headers.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,bmi2,prefer-vector-width=512")
namespace pvt::amx {
struct Target {
  static constexpr int kLanes = 16, kPanelVectors = 2;  // a panel is two tiles wide
  static constexpr bool kMatrixUnit = true;
};
#include "simd/vec-inl.h"
#include "simd/avx512-inl.h"

PVT_INLINE VecHalf round_to_bf16(Vec v) { return reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(v)); }

#include "gemm/amx-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::amx
#pragma GCC pop_options

namespace pvt {
// The CPU has the unit, and the kernel lets this process use its registers once asked.
static bool runs_amx() {
  static const bool runs = [] {
#if defined(PVT_EMULATED)
    return has_avx512_bf16();
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
    if (!has_avx512_bf16()) return false;
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
#endif
  }();
  return runs;
}
static const RegisterIsa kAmx(
    {"amx", 40, runs_amx, {nullptr, &amx::kFactories<amx::bf16, amx::bf16>, &amx::kFactories<float, amx::bf16>}});
}  // namespace pvt
#endif
