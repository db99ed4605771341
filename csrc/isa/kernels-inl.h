// Everything that is compiled once per ISA, in order; included inside its namespace and target region, after vec-inl.h
// and the ISA's own definitions.
#ifndef PVT_AMX
struct MatrixUnit {  // no state to hold without a matrix unit
  MatrixUnit() {}
};
#endif

#include "simd/math-inl.h"

#include "gemm/layout-inl.h"
#include "gemm/epilogue-inl.h"
#include "gemm/tile-inl.h"
#ifdef PVT_AMX
#include "gemm/amx-inl.h"
#endif
#include "gemm/panels-inl.h"
#include "ops/rows-inl.h"
#include "gemm/pack-inl.h"
#include "ops/mlp-inl.h"
#include "ops/attention-inl.h"
#include "ops/patch_embed-inl.h"
#include "ops/head-inl.h"

// T: element of activations and weights; E: element that the ISA multiplies.
template <class T, class E>
Factories make_factories() {
  Factories f;
  f.patch_embed = [](const PatchEmbedWeights& w, bool channels_last) -> std::unique_ptr<PatchEmbed> {
    return std::make_unique<PatchEmbedOp<T, E>>(w, channels_last);
  };
  f.attention = [](const AttentionWeights& w) -> std::unique_ptr<ResidualOp> {
    return std::make_unique<AttentionOp<T, E>>(w);
  };
  f.mlp = [](const MlpWeights& w) -> std::unique_ptr<ResidualOp> { return std::make_unique<MlpOp<T, E>>(w); };
  f.layer_norm = [](const Norm& norm, int channels) -> std::unique_ptr<LayerNorm> {
    return std::make_unique<LayerNormOp<T>>(norm, channels);
  };
  f.head = [](const Linear& classifier, int channels, int classes) -> std::unique_ptr<Head> {
    return std::make_unique<HeadOp<T, E>>(classifier, channels, classes);
  };
  return f;
}
