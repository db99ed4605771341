"""The ops that models are made of: their contract, and the packed forms of their weights."""

from .contract import (
    HW,
    AttentionSpec,
    AttentionWeights,
    Backend,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    check_attention,
    check_head,
    check_layer_norm,
    check_mlp,
    check_patch_embed,
    to_map,
    to_tokens,
)

__all__ = [
    "HW",
    "AttentionSpec",
    "AttentionWeights",
    "Backend",
    "Linear",
    "MlpSpec",
    "MlpWeights",
    "Norm",
    "PatchEmbedWeights",
    "check_attention",
    "check_head",
    "check_layer_norm",
    "check_mlp",
    "check_patch_embed",
    "to_map",
    "to_tokens",
]
