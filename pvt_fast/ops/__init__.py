"""The ops that models are made of: their contract, the checks of their arguments, and packed forms of their weights."""

from .checks import (
    check_attention,
    check_head,
    check_layer_norm,
    check_mlp,
    check_patch_embed,
    forward_mode,
    refuse_forward_mode,
)
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
    map_tensors,
    tensors_in,
    to_map,
    to_tokens,
)
from .packing import PLAIN, is_plain

__all__ = [
    "HW",
    "PLAIN",
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
    "forward_mode",
    "is_plain",
    "map_tensors",
    "refuse_forward_mode",
    "tensors_in",
    "to_map",
    "to_tokens",
]
