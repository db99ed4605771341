"""Agreement with two independent implementations, timm and transformers, on identical random weights, in float64."""

import re
from functools import lru_cache

import pytest
import timm
import torch
from peers import transformers_config
from torch import Tensor, nn
from transformers import PvtV2ForImageClassification

import pvt_fast
from pvt_fast.config import VARIANTS

# Logits and maps are of order 1 here, and float64 rounds at 2e-16: agreement is far below any difference in meaning.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
SMALL = (64, 64)
# not a multiple of 32, not square, not multiples of 7, and a last row or column that the reducing convolutions drop
ODD = ((61, 97), (90, 45), (33, 130), (100, 100))


def no_initialisation() -> torch.device:
    """Models are built without values: every one is drawn here, or taken over from the model drawn here."""
    return torch.device("meta")


@lru_cache(maxsize=1)
def ours(name: str) -> pvt_fast.PVT_V2:
    """The variant at full depth in float64, with no parameter left at a trivial value."""
    torch.manual_seed(11)
    with no_initialisation():
        model = pvt_fast.create_model(name, num_classes=13).double().eval()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return model


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official keys to timm's: stages hold their patch embed (but the first), blocks and norm; one dwconv level."""
    renamed = {}
    for key, value in state.items():
        new = key.replace("patch_embed1.", "patch_embed.").replace("dwconv.dwconv.", "dwconv.")
        new = re.sub(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.", new)
        new = re.sub(r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", new)
        renamed[re.sub(r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm.", new)] = value
    return renamed


TRANSFORMERS_NAMES = {
    "attn.q.": "attention.query.",
    "attn.proj.": "attention.proj.",
    "attn.sr.": "attention.spatial_reduction.",
    "attn.norm.": "attention.layer_norm.",
    "mlp.fc1.": "mlp.dense1.",
    "mlp.dwconv.dwconv.": "mlp.dwconv.dwconv.",
    "mlp.fc2.": "mlp.dense2.",
    "norm1.": "layer_norm_1.",
    "norm2.": "layer_norm_2.",
}


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official keys to transformers': key and value are separate there, the first and second half of kv here."""
    renamed = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        layer = f"pvt_v2.encoder.layers.{int(head[-1]) - 1}" if head != "head" else "classifier"
        if head == "head":
            renamed[f"classifier.{rest}"] = value
        elif head.startswith("patch_embed"):
            renamed[f"{layer}.patch_embedding.{rest.replace('norm.', 'layer_norm.')}"] = value
        elif head.startswith("norm"):
            renamed[f"{layer}.layer_norm.{rest}"] = value
        else:
            block, _, rest = rest.partition(".")
            prefix = f"{layer}.blocks.{block}."
            if rest.startswith("attn.kv."):
                kind = rest.rpartition(".")[2]
                for name, half in zip(("key", "value"), value.chunk(2), strict=True):
                    renamed[f"{prefix}attention.{name}.{kind}"] = half
            else:
                own = next(name for name in TRANSFORMERS_NAMES if rest.startswith(name))
                renamed[prefix + TRANSFORMERS_NAMES[own] + rest.removeprefix(own)] = value
    return renamed


@lru_cache(maxsize=1)
def timm_model(name: str) -> nn.Module:
    with no_initialisation():
        peer = timm.create_model(name, num_classes=13)
    peer.load_state_dict(to_timm(ours(name).state_dict()), strict=True, assign=True)
    return peer.eval()


@lru_cache(maxsize=1)
def transformers_model(name: str) -> nn.Module:
    config = transformers_config(VARIANTS[name], num_labels=13)
    with no_initialisation():
        peer = PvtV2ForImageClassification(config)
    peer.load_state_dict(to_transformers(ours(name).state_dict()), strict=True, assign=True)
    return peer.eval()


def image_of(size: tuple[int, int], batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


def sizes_of(name: str) -> list[tuple[int, int]]:
    """Every variant at full depth on an odd image; the smallest and the linear one at 224 and on every odd one."""
    thorough = name in ("pvt_v2_b0", "pvt_v2_b2_li")
    return [(224, 224), *ODD] if thorough else [ODD[list(VARIANTS).index(name) % 2]]


# b3 and b4 are b2 with more blocks
GRID = [
    pytest.param(
        name,
        size,
        marks=pytest.mark.full if name in ("pvt_v2_b3", "pvt_v2_b4") else [],
        id=f"{name}-{size[0]}x{size[1]}",
    )
    for name in VARIANTS
    for size in sizes_of(name)
]


@pytest.mark.parametrize(("name", "size"), GRID, scope="module")  # one variant after the other in memory
@torch.no_grad()
def test_timm(name, size):
    model, peer, image = ours(name), timm_model(name), image_of(size)
    final, maps = model.forward_intermediates(image)
    their_final, their_maps = peer.forward_intermediates(image)
    for ours_map, their_map in zip([final, *maps], [their_final, *their_maps], strict=True):
        torch.testing.assert_close(ours_map, their_map, **TOLERANCE)
    logits = model(image)
    assert float(logits.std()) > 0.1
    torch.testing.assert_close(logits, peer(image), **TOLERANCE)


@pytest.mark.parametrize(("name", "size"), GRID, scope="module")  # one variant after the other in memory
@torch.no_grad()
def test_transformers(name, size):
    """transformers has eps 1e-6 in every norm; timm and the official code have 1e-5 in the inner ones."""
    model, peer, image = ours(name), transformers_model(name), image_of(size)
    model.set_norm_eps(block=1e-6, patch_embed=1e-6, reduction=1e-6)
    try:
        logits = model(image)
    finally:
        model.set_norm_eps(block=1e-6, patch_embed=1e-5, reduction=1e-5)
    torch.testing.assert_close(logits, peer(image).logits, **TOLERANCE)


@torch.no_grad()
def test_the_epsilons_matter():
    """The agreement above is fine enough to see a wrong epsilon."""
    model, image = ours("pvt_v2_b0"), image_of(SMALL)
    before = model(image)
    for group in ("block", "patch_embed", "reduction"):
        published = {"block": 1e-6, "patch_embed": 1e-5, "reduction": 1e-5}
        model.set_norm_eps(**{group: 1e-7})
        try:
            assert float((model(image) - before).abs().max()) > 100 * TOLERANCE["atol"]
        finally:
            model.set_norm_eps(**published)
    assert torch.equal(model(image), before)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_agree(name):
    with no_initialisation():
        mine, peer = pvt_fast.create_model(name), timm.create_model(name)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in peer.parameters())


@pytest.mark.parametrize("indices", [None, 1, 3, [0], [1, 3], [-1], [2, 0], [3, -1]], ids=str)
@pytest.mark.parametrize("intermediates_only", [False, True])
@torch.no_grad()
def test_forward_intermediates_takes_and_gives_what_timms_does(indices, intermediates_only):
    model, peer, image = ours("pvt_v2_b0"), timm_model("pvt_v2_b0"), image_of(SMALL)
    mine = model.forward_intermediates(image, indices, intermediates_only=intermediates_only)
    theirs = peer.forward_intermediates(image, indices, intermediates_only=intermediates_only)
    if not intermediates_only:
        torch.testing.assert_close(mine[0], theirs[0], **TOLERANCE)
        mine, theirs = mine[1], theirs[1]
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@torch.no_grad()
def test_feature_info_and_head_agree_with_timm():
    model, peer = ours("pvt_v2_b0"), timm_model("pvt_v2_b0")
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [
        (info["num_chs"], info["reduction"]) for info in peer.feature_info
    ]
    assert model.num_features == peer.num_features
    features = model.forward_features(image_of(SMALL, batch=2))
    torch.testing.assert_close(features, peer.forward_features(image_of(SMALL, batch=2)), **TOLERANCE)
    for pre_logits in (False, True):
        torch.testing.assert_close(
            model.forward_head(features, pre_logits), peer.forward_head(features, pre_logits), **TOLERANCE
        )


def test_gradients_agree_with_timm():
    model, peer, image = ours("pvt_v2_b0"), timm_model("pvt_v2_b0"), image_of((61, 45))
    state = dict(peer.named_parameters())
    grads = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    names = list(to_timm(dict(model.named_parameters())))
    their_grads = torch.autograd.grad(peer(image).square().sum(), [state[name] for name in names])
    for name, grad, theirs in zip(names, grads, their_grads, strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-7, atol=1e-9 * float(theirs.abs().max()), msg=name)
