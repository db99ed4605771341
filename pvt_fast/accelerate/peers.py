"""The table of layouts. A new peer is one entry here."""

from __future__ import annotations

import copyreg
from dataclasses import replace

from .block_names import MAP, PAIR, SIZES, AttentionNames, BlockLayout, MlpNames

# The official repository's names (whai362/PVT, NVlabs/SegFormer and the files copied from them), which timm and
# segmentation_models_pytorch took over.
_OFFICIAL_ATTENTION = AttentionNames(
    norm="norm1",
    module="attn",
    q="attn.q",
    kv=("attn.kv",),
    proj="attn.proj",
    sr="attn.sr",
    sr_norm="attn.norm",
    pool="attn.pool",
    act="attn.act",
    heads="attn.num_heads",
    scale="attn.scale",
    drop_path=("drop_path1", "drop_path"),
)
_OFFICIAL_MLP = MlpNames(
    norm="norm2",
    module="mlp",
    fc1="mlp.fc1",
    relu="mlp.relu",
    dwconv=("mlp.dwconv.dwconv", "mlp.dwconv"),
    act="mlp.act",
    fc2="mlp.fc2",
    drop_path=("drop_path2", "drop_path"),
)

_DENSE_MLP = MlpNames(
    norm="layer_norm_2",
    module="mlp",
    fc1="mlp.dense1",
    relu="mlp.relu",
    dwconv=("mlp.dwconv.dwconv",),
    act="mlp.intermediate_act_fn",
    fc2="mlp.dense2",
)

# transformers 5
_PVT_V2 = BlockLayout(
    "transformers PvtV2",
    SIZES,
    AttentionNames(
        norm="layer_norm_1",
        module="attention",
        q="attention.query",
        kv=("attention.key", "attention.value"),
        proj="attention.proj",
        sr="attention.spatial_reduction",
        sr_norm="attention.layer_norm",
        pool="attention.pool",
        act="attention.act",
        heads="attention.num_attention_heads",
    ),
    _DENSE_MLP,
)
_SEGFORMER = BlockLayout(
    "transformers SegFormer",
    SIZES,
    AttentionNames(
        norm="layernorm_before",
        module="attention",
        q="attention.q_proj",
        kv=("attention.k_proj", "attention.v_proj"),
        proj="attention.o_proj",
        sr="attention.sequence_reduction.sequence_reduction",
        sr_norm="attention.sequence_reduction.layer_norm",
        heads="attention.num_attention_heads",
        scale="attention.scaling",
        rates=("attention.attention_dropout",),
        after=("hidden_dropout",),
    ),
    replace(_DENSE_MLP, norm="layernorm_after", fc1="mlp.fc1", relu="", act="mlp.activation_fn", fc2="mlp.fc2"),
    ignored=("output_hidden_states", "num_items_in_batch"),
)

# transformers' SegFormer until 4, and its GLPN until now
_SEGFORMER_4 = BlockLayout(
    "transformers SegFormer 4 / GLPN",
    SIZES,
    AttentionNames(
        norm="layer_norm_1",
        module="attention",
        q="attention.self.query",
        kv=("attention.self.key", "attention.self.value"),
        proj="attention.output.dense",
        sr="attention.self.sr",
        sr_norm="attention.self.layer_norm",
        heads="attention.self.num_attention_heads",
    ),
    _DENSE_MLP,
)

# mmdet's PVTv2 and mmseg's MixVisionTransformer
_OPENMMLAB = BlockLayout(
    "mmdet / mmseg",
    PAIR,
    AttentionNames(
        norm="norm1",
        module="attn",
        in_proj="attn.attn",
        proj="attn.attn.out_proj",
        sr="attn.sr",
        sr_norm="attn.norm",
        heads="attn.attn.num_heads",
        rates=("attn.attn.dropout",),
        drop_path=("attn.dropout_layer",),
        residual_inside=True,
    ),
    MlpNames(
        norm="norm2",
        module="ffn",
        fc1="ffn.layers.0",
        dwconv=("ffn.layers.1",),
        act="ffn.layers.2",
        fc2="ffn.layers.4",
        drop_path=("ffn.dropout_layer",),
        residual_inside=True,
    ),
)

LAYOUTS = (
    BlockLayout("official", SIZES, _OFFICIAL_ATTENTION, _OFFICIAL_MLP),
    BlockLayout("timm", PAIR, _OFFICIAL_ATTENTION, _OFFICIAL_MLP),
    BlockLayout("segmentation_models_pytorch", MAP, _OFFICIAL_ATTENTION, _OFFICIAL_MLP),
    _PVT_V2,
    _SEGFORMER,
    _SEGFORMER_4,
    _OPENMMLAB,
)


# our own model: the official layout, but read and not tried out
PVT_FAST = BlockLayout("pvt_fast", SIZES, _OFFICIAL_ATTENTION, _OFFICIAL_MLP)


def named(name: str) -> BlockLayout:
    """The layout of that name."""
    return next(layout for layout in (*LAYOUTS, PVT_FAST) if layout.name == name)


# a copy or a pickle of an accelerated block refers to the table
copyreg.pickle(BlockLayout, lambda layout: (named, (layout.name,)))
