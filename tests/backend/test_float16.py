"""float16 on CPUs: the float32 kernels behind a conversion. Parity is in test_ops.py and test_model.py."""

import copy
import logging

import pytest
import torch

from pvt_fast import PVT_V2
from pvt_fast.backend import cpp
from pvt_fast.ops import packing

IMAGE = torch.linspace(-1, 1, 3 * 40 * 33).reshape(1, 3, 40, 33).half()


@pytest.fixture
def model() -> PVT_V2:
    model = PVT_V2(embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), num_classes=5)
    model.backend = "cpp"
    return model.half().eval()


def forms(model: PVT_V2) -> list[object]:
    """The packed forms that a forward uses, in order."""
    with packing.collected() as records:
        model(IMAGE)
    return [record.form for record in records]


@torch.no_grad()
def test_every_result_is_float16(model):
    assert model(IMAGE).dtype == torch.float16
    assert {stage.dtype for stage in model.forward_intermediates(IMAGE, intermediates_only=True)} == {torch.float16}


@torch.no_grad()
def test_weights_are_packed_once_and_again_when_they_change(model):
    first = forms(model)
    assert len(first) == 4 * 4 + 1
    assert forms(model) == first
    model.block2[0].mlp.fc1.weight.mul_(2)
    changed = model(IMAGE)
    assert [form is before for form, before in zip(forms(model), first, strict=True)] == [i != 6 for i in range(17)]
    assert torch.equal(copy.deepcopy(model)(IMAGE), changed)  # copies pack anew


@torch.no_grad()
def test_the_conversion_is_logged_once(model, caplog):
    cpp.log_float16.cache_clear()
    with caplog.at_level(logging.INFO, logger="pvt_fast"):
        model(IMAGE)
        model(IMAGE)
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'cpp' computes float16 in float32, by conversion"
    ]
