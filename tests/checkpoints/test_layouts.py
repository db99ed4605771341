"""The key maps: there and back is the identity, the names are the implementations' own, strangers are refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import LAYOUT_PEERS, ours, peer
from torch import Tensor

from pvt_fast import PVT_V2
from pvt_fast.checkpoints.key_maps import LAYOUTS, from_official, to_official


@st.composite
def architectures(draw) -> dict:
    stages = draw(st.integers(1, 5))
    heads = draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages))
    linear = draw(st.booleans())
    return {
        "img_size": 128,
        "num_stages": stages,
        "num_heads": heads,
        "embed_dims": [head * draw(st.integers(1, 4)) for head in heads],
        "mlp_ratios": draw(st.lists(st.sampled_from([1, 1.5, 2]), min_size=stages, max_size=stages)),
        "depths": draw(st.lists(st.integers(1, 11), min_size=stages, max_size=stages)),
        "sr_ratios": draw(st.lists(st.sampled_from([1, 2]), min_size=stages, max_size=stages)),
        "qkv_bias": draw(st.booleans()),
        "num_classes": draw(st.sampled_from([0, 1, 5])),
        "in_channels": draw(st.integers(1, 4)),
        "patch_size": draw(st.sampled_from([5, 7, 8])),
        "linear": linear,
    }


PREFIXES = ("", "module.", "backbone.", "model.backbone.", "module._orig_mod.")


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


@settings(max_examples=40, deadline=None)
@given(arguments=architectures(), layout=st.sampled_from(list(LAYOUTS)), prefix=st.sampled_from(PREFIXES))
def test_there_and_back(arguments, layout, prefix):
    with torch.device("meta"):
        shapes = PVT_V2(**arguments).state_dict()
    state = {name: torch.randn(value.shape) for name, value in shapes.items()}
    theirs = {prefix + name: value for name, value in from_official(state, LAYOUTS[layout]).items()}
    back = to_official(theirs)
    expected = without_head(state) if layout == "mmdet" else state
    assert back.layout.name == layout
    assert back.state.keys() == expected.keys()
    assert all(torch.equal(back.state[name], value) for name, value in expected.items())
    assert (back.unexpected, back.outside) == ((), ())
    assert sorted(name for names in back.sources.values() for name in set(names)) == sorted(
        # mmdet's stacked rows are the source of two tensors
        [*theirs, *(name for name in theirs if "in_proj" in name)]
    )


@pytest.mark.parametrize("layout", LAYOUT_PEERS)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"linear": True}, {"qkv_bias": False}, {"depths": (1, 1, 12, 1)}],
    ids=["sr", "linear", "nobias", "deep"],
)
def test_names_and_shapes_are_the_implementations(layout, overrides):
    theirs = peer(layout, **overrides).state_dict()
    state = from_official(ours(**overrides).state_dict(), LAYOUTS[layout])
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in theirs.items()}


# The parameters of mmdet 3.3.0's PyramidVisionTransformerV2(embed_dims=8, num_layers=[1, 2], num_heads=[1, 2],
# mlp_ratios=(2, 2), sr_ratios=[2, 1]) as that library lists them, biases left out; here mmdet is not installed.
MMDET_WEIGHTS = {
    "layers.0.0.projection.weight": (8, 3, 7, 7),
    "layers.0.0.norm.weight": (8,),
    "layers.0.1.0.norm1.weight": (8,),
    "layers.0.1.0.attn.attn.in_proj_weight": (24, 8),
    "layers.0.1.0.attn.attn.out_proj.weight": (8, 8),
    "layers.0.1.0.attn.sr.weight": (8, 8, 2, 2),
    "layers.0.1.0.attn.norm.weight": (8,),
    "layers.0.1.0.norm2.weight": (8,),
    "layers.0.1.0.ffn.layers.0.weight": (16, 8, 1, 1),
    "layers.0.1.0.ffn.layers.1.weight": (16, 1, 3, 3),
    "layers.0.1.0.ffn.layers.4.weight": (8, 16, 1, 1),
    "layers.0.2.weight": (8,),
    "layers.1.0.projection.weight": (16, 8, 3, 3),
    "layers.1.0.norm.weight": (16,),
    **{
        f"layers.1.1.{block}.{name}": shape
        for block in (0, 1)
        for name, shape in {
            "norm1.weight": (16,),
            "attn.attn.in_proj_weight": (48, 16),
            "attn.attn.out_proj.weight": (16, 16),
            "norm2.weight": (16,),
            "ffn.layers.0.weight": (32, 16, 1, 1),
            "ffn.layers.1.weight": (32, 1, 3, 3),
            "ffn.layers.4.weight": (16, 32, 1, 1),
        }.items()
    },
    "layers.1.2.weight": (16,),
}
TWO_STAGES = {
    "embed_dims": (8, 16),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "depths": (1, 2),
    "sr_ratios": (2, 1),
}


def test_names_and_shapes_are_mmdets():
    state = from_official(ours(**TWO_STAGES).state_dict(), LAYOUTS["mmdet"])
    weights = {name: tuple(value.shape) for name, value in state.items() if name.endswith("weight")}
    assert weights == MMDET_WEIGHTS
    biases = {name: tuple(value.shape) for name, value in state.items() if name.endswith("bias")}
    assert biases == {name[: -len("weight")] + "bias": shape[:1] for name, shape in MMDET_WEIGHTS.items()}


def mmdet_by_hand(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to mmdet's, written apart from the package's table."""
    renamed = {}
    for key, value in without_head(state).items():
        stage = int(re.match(r"[a-z_]+(\d)", key)[1]) - 1
        if key.startswith("patch_embed"):
            renamed[f"layers.{stage}.0." + key.partition(".")[2].replace("proj.", "projection.")] = value
            continue
        if key.startswith("norm"):
            renamed[f"layers.{stage}.2.{key.rpartition('.')[2]}"] = value
            continue
        _, block, rest = key.split(".", 2)
        if rest.startswith("attn.kv."):
            continue
        if rest.startswith("attn.q."):
            name = rest.replace("attn.q.", "attn.attn.in_proj_")
            value = torch.cat([value, state[key.replace(".q.", ".kv.")]])
        else:
            name = rest.replace("attn.proj.", "attn.attn.out_proj.")
            for ours_name, theirs in {"fc1": "0", "dwconv.dwconv": "1", "fc2": "4"}.items():
                name = name.replace(f"mlp.{ours_name}.", f"ffn.layers.{theirs}.")
            if value.dim() == 2 and name.startswith("ffn."):
                value = value.unsqueeze(2).unsqueeze(3)
        renamed[f"layers.{stage}.1.{block}.{name}"] = value
    return renamed


@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
def test_mmdet_by_another_way(linear):
    state = ours(linear=linear).state_dict()
    theirs = mmdet_by_hand(state)
    exported = from_official(state, LAYOUTS["mmdet"])
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[name], value) for name, value in theirs.items())
    back = to_official(theirs).state
    assert all(torch.equal(back[name], value) for name, value in without_head(state).items())


# -- what is recognised, and what is not -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_beside_the_model_is_told_apart(layout):
    state = from_official(ours().state_dict(), LAYOUTS[layout])
    whole = {f"backbone.{name}": value for name, value in state.items()}
    stranger = f"backbone.{LAYOUTS[layout].root}extra"
    whole |= {"neck.conv.weight": torch.ones(1), "head.weight": torch.ones(3, 3), stranger: torch.ones(1)}
    found = to_official(whole)
    assert found.outside == ("neck.conv.weight", "head.weight")
    extra = found.unexpected if layout != "official" else tuple(found.sources["extra"])
    assert extra == (stranger,)


@pytest.mark.parametrize("prefix", ["", "model.", "module.student."])
def test_transformers_head_lies_beside_its_root(prefix):
    state = {prefix + name: value for name, value in peer("transformers").state_dict().items()}
    found = to_official(state)
    assert torch.equal(found.state["head.weight"], state[prefix + "classifier.weight"])
    assert not found.outside


def test_transformers_backbone_without_root():
    whole = peer("transformers").state_dict()
    bare = {name.removeprefix("pvt_v2."): value for name, value in whole.items() if name.startswith("pvt_v2.")}
    found = to_official(bare)
    assert found.state.keys() == without_head(ours().state_dict()).keys()


def test_wrappers_inside_names_are_removed():
    state = ours().state_dict()
    wrapped = {
        re.sub(r"^(block\d\.\d+)\.", r"\1._orig_mod._checkpoint_wrapped_module.", name): state[name] for name in state
    }
    assert wrapped.keys() != state.keys()
    assert to_official(wrapped).state.keys() == state.keys()
    with pytest.raises(ValueError, match="must name each parameter once, got 1 of"):
        to_official({**wrapped, "_orig_mod.head.weight": state["head.weight"]})


def test_halves_without_their_counterpart_stay_apart():
    state = peer("transformers").state_dict()
    del state["pvt_v2.encoder.layers.0.blocks.0.attention.value.weight"]
    found = to_official(state)
    assert "block1.0.attn.kv.weight" not in found.state
    assert found.sources["block1.0.attn.k.weight"] == ("pvt_v2.encoder.layers.0.blocks.0.attention.key.weight",)


def test_strangers_are_refused():
    with pytest.raises(ValueError, match=r"in one of the layouts official, timm, transformers, mmdet; got 2 tensors"):
        to_official({"conv1.weight": torch.ones(1), "patch_embed.proj.weight": torch.ones(1)})
    # a name that only ends like the one that tells
    with pytest.raises(ValueError, match="must hold a PVT v2"):
        to_official({"my_patch_embed1.proj.weight": torch.ones(1)})
    state = ours().state_dict()
    two = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(ValueError, match=r"must hold one PVT v2, got 2, under 'student\.', 'teacher\.'"):
        to_official(two)


def test_two_names_of_one_parameter_are_refused():
    state, norm = peer("timm").state_dict(), torch.ones(8)
    again = "stages.0.downsample.proj.weight"
    with pytest.raises(ValueError, match=rf"must name each parameter once, got patch_embed\.proj\.weight and {again}"):
        to_official({**state, again: torch.ones(8, 3, 7, 7)})
    found = to_official({**state, "stages.00.norm.weight": norm, f"stages.{'9' * 5000}.norm.weight": norm})
    assert len(found.unexpected) == 2
