// NEON, which every 64-bit ARM CPU has: 32 registers of 4 floats; bf16 is widened to float. `min` and `max` stay the
// generic ones, as NEON's own return NaN for a NaN on either side.
#if defined(__aarch64__)
#include "isa/headers.h"

namespace pvt::neon {
#define PVT_LANES 4
#define PVT_NEON
#include "simd/vec-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::neon

namespace pvt {
static bool runs_neon() { return true; }
static const RegisterIsa kNeon({"neon", 10, runs_neon, neon::make_factories<float, float>(),
                                neon::make_factories<neon::bf16, float>()});
}  // namespace pvt
#endif
