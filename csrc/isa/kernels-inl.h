// Every op, in the order in which one is built on another, and the table of their factories.
// Compiled once per ISA: included last by isa/<isa>.cpp, inside its namespace and target region, after its vectors
// (simd/vec-inl.h and what belongs to it) and its matrix multiplication (gemm/tile-inl.h or gemm/amx-inl.h).
#include "simd/math-inl.h"

#include "gemm/panels-inl.h"
#include "gemm/pack-inl.h"
#include "ops/rows-inl.h"
#include "ops/depthwise-inl.h"
#include "ops/gradients-inl.h"
#include "ops/mlp-inl.h"
#include "ops/mlp_gradients-inl.h"
#include "ops/heads-inl.h"
#include "ops/keys_values-inl.h"
#include "ops/spatial_reduction-inl.h"
#include "ops/reduction_gradients-inl.h"
#include "ops/attention-inl.h"
#include "ops/attention_gradients-inl.h"
#include "ops/patches-inl.h"
#include "ops/patch_embed-inl.h"
#include "ops/patch_embed_gradients-inl.h"
#include "ops/head-inl.h"
#include "ops/head_gradients-inl.h"

template <class Op, class Interface, class... Args>
std::unique_ptr<Interface> make(Args... args) {
  return std::make_unique<Op>(args...);
}

// T: element of activations and weights; E: element that the ISA multiplies. A constant, as code would run while the
// library is loaded, on CPUs without this ISA too.
template <class T, class E>
constexpr Factories kFactories{&make<PatchEmbedOp<T, E>>,
                               &make<AttentionOp<T, E>>,
                               &make<MlpOp<T, E>>,
                               &make<LayerNormOp<T>>,
                               &make<HeadOp<T, E>>,
                               &make<PatchEmbedGradientsOp<T, E>>,
                               &make<AttentionGradientsOp<T, E>>,
                               &make<MlpGradientsOp<T, E>>,
                               &make<LayerNormGradientsOp<T>>,
                               &make<HeadGradientsOp<T, E>>};
