"""float16 on CPUs: the float32 kernels behind a conversion. Parity is in test_ops.py and test_model.py."""

import copy
import logging

import pytest
import torch

from pvt_fast import PVT_V2, cpp

IMAGE = torch.linspace(-1, 1, 3 * 40 * 33).reshape(1, 3, 40, 33).half()


@pytest.fixture
def model() -> PVT_V2:
    model = PVT_V2(embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), num_classes=5)
    model.backend = "cpp"
    return model.half().eval()


def forms(model: PVT_V2) -> dict[str, object]:
    """The packed form of every layer that has one."""
    return {name: layer._cache.packed for name, layer in model.named_modules() if hasattr(layer, "_cache")}


@torch.no_grad()
def test_every_result_is_float16(model):
    assert model(IMAGE).dtype == torch.float16
    assert {stage.dtype for stage in model.forward_intermediates(IMAGE, intermediates_only=True)} == {torch.float16}


@torch.no_grad()
def test_weights_are_packed_once_and_again_when_they_change(model):
    model(IMAGE)
    first = forms(model)
    model(IMAGE)
    assert forms(model) == first
    model.block2[0].mlp.fc1.weight.mul_(2)
    changed = model(IMAGE)
    assert [name for name, form in forms(model).items() if form is not first[name]] == ["block2.0.mlp"]
    assert torch.equal(copy.deepcopy(model)(IMAGE), changed)  # copies pack anew


@torch.no_grad()
def test_the_conversion_is_logged_once(model, caplog):
    cpp._log_float16.cache_clear()
    with caplog.at_level(logging.INFO, logger="pvt_fast"):
        model(IMAGE)
        model(IMAGE)
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'cpp' computes float16 in float32, by conversion"
    ]
