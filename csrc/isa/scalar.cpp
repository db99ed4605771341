// The baseline of the target: no instruction set is assumed, vectors of four are lowered to what there is.
#include "isa/headers.h"

namespace pvt::scalar {
struct Target {
  static constexpr int kLanes = 4, kPanelVectors = 2;
  static constexpr bool kMatrixUnit = false, kFusedMultiplyAdd = false;
  // 16 registers, one more for the product: 4 x 2 accumulators + 2 of the panel + 1 broadcast + 1 = 12
  static constexpr int kTileRows = 4, kNarrowTileRows = kTileRows;
};
#include "simd/vec-inl.h"
#include "simd/portable-inl.h"
#include "simd/round_to_bf16-inl.h"
#include "gemm/tile-inl.h"
#include "isa/kernels-inl.h"
}  // namespace pvt::scalar

namespace pvt {
static bool runs_scalar() { return true; }
static const RegisterIsa kScalar({"scalar",
                                  0,
                                  runs_scalar,
                                  {&scalar::kFactories<float, float>, &scalar::kFactories<scalar::bf16, float>,
                                   &scalar::kFactories<float, float>}});
}  // namespace pvt
