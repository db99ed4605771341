// The baseline of the target: no instruction set is assumed, vectors of four are lowered to what there is.
#include "isa/headers.h"

namespace pvt::scalar {
#define PVT_LANES 4
#include "simd/vec-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::scalar

namespace pvt {
static bool runs_scalar() { return true; }
static const RegisterIsa kScalar({"scalar", 0, runs_scalar, scalar::make_factories<float, float>(),
                                  scalar::make_factories<scalar::bf16, float>()});
}  // namespace pvt
