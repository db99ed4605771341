"""PVTConfig: what it refuses and how it says so, and the sizes it derives."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from pvt_fast import PVT_V2
from pvt_fast.config import VARIANTS, PVTConfig, conv_size

REFUSED = [
    ({"patch_size": 4}, ValueError, "patch_size must be at least 5, got 4"),
    ({"patch_size": 7.0}, TypeError, "patch_size must be an int, got 7.0"),
    ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    ({"in_channels": True}, TypeError, "in_channels must be an int, got True"),
    ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
    ({"num_stages": 0}, ValueError, "num_stages must be at least 1, got 0"),
    ({"num_stages": 3}, ValueError, "embed_dims must have num_stages = 3 entries, got 4: (64, 128, 256, 512)"),
    ({"embed_dims": 64}, TypeError, "embed_dims must be a sequence with one entry per stage, got 64"),
    ({"embed_dims": "1234"}, TypeError, "embed_dims must be a sequence with one entry per stage, got '1234'"),
    ({"embed_dims": (64, 128, 256, 0)}, ValueError, "embed_dims must be at least 1, got 0"),
    ({"depths": (3, 4, 6)}, ValueError, "depths must have num_stages = 4 entries, got 3: (3, 4, 6)"),
    ({"depths": (3, 4, 6, 0)}, ValueError, "depths must be at least 1, got 0"),
    ({"sr_ratios": (8, 4, 2, 0.5)}, TypeError, "sr_ratios must be an int, got 0.5"),
    ({"num_heads": (1, 2, 4, 7)}, ValueError, "embed_dims[3] must be divisible by num_heads[3], got 512 and 7"),
    ({"mlp_ratios": (4, 4, 4, -1)}, ValueError, "mlp_ratios[3] must give at least one hidden channel, got -1"),
    ({"mlp_ratios": (0.001, 4, 4, 4)}, ValueError, "mlp_ratios[0] must give at least one hidden channel, got 0.001"),
    ({"drop_rate": 1.0}, ValueError, "drop_rate must lie in [0, 1), got 1.0"),
    ({"attn_drop_rate": -0.1}, ValueError, "attn_drop_rate must lie in [0, 1), got -0.1"),
    ({"drop_path_rate": 2}, ValueError, "drop_path_rate must lie in [0, 1), got 2"),
    ({"img_size": 0}, ValueError, "img_size must be at least 1, got 0"),
    (
        {"img_size": 28},
        ValueError,
        "image must be large enough for stage 1, whose map must be at least 8x8; got a 28x28",
    ),
    ({"img_size": (224, 20)}, ValueError, "got a 224x20 image, which gives 56x5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refuses_with_a_sentence(arguments, error, message):
    with pytest.raises(error) as caught:
        PVTConfig(**arguments)
    assert str(caught.value).startswith("PVT_V2: ")
    assert message in str(caught.value)


def test_the_model_refuses_what_the_config_refuses():
    with pytest.raises(ValueError, match=r"PVT_V2: drop_rate must lie in \[0, 1\), got 1.5"):
        PVT_V2(drop_rate=1.5)


def test_lists_become_tuples_and_the_config_is_frozen():
    config = PVTConfig(embed_dims=[8, 16, 24, 32], img_size=[64, 96])
    assert config.embed_dims == (8, 16, 24, 32)
    assert config.img_hw == (64, 96)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_classes = 3


@pytest.mark.parametrize("size", [1, 2, 7, 28, 29, 31, 32, 33, 63, 64, 65, 100, 223, 224, 225])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 4), (3, 2), (5, 4), (8, 4), (11, 4)])
def test_conv_size_is_torchs(size, kernel, stride):
    conv = nn.Conv2d(1, 1, kernel, stride, padding=kernel // 2)
    assert conv_size(size, kernel, stride) == conv(torch.zeros(1, 1, size, size)).shape[-1]


@pytest.mark.parametrize("size", [(29, 29), (224, 224), (256, 832), (61, 97), (33, 130)])
def test_map_sizes_are_ceilings(size):
    """Every published variant has maps of ceil(H / 4), ceil(H / 8), ceil(H / 16), ceil(H / 32) rows."""
    ceilings = [tuple(-(-side // (4 * 2**stage)) for side in size) for stage in range(4)]
    assert PVTConfig().map_sizes(*size) == ceilings


def test_linear_takes_images_that_the_reducing_convolution_does_not():
    assert PVTConfig(linear=True, img_size=1).map_sizes(1, 1) == [(1, 1)] * 4
    with pytest.raises(ValueError, match="stage 1, whose map must be at least 8x8"):
        PVTConfig().map_sizes(28, 224)
    assert PVTConfig().map_sizes(29, 29)[0] == (8, 8)


@pytest.mark.parametrize("ratio", [0.5, 1, 2.5, 4])
def test_hidden_width_is_truncated(ratio):
    assert PVTConfig(embed_dims=(5, 10, 15, 20), num_heads=(1, 1, 1, 1), mlp_ratios=(ratio,) * 4).hidden_dims == tuple(
        int(dim * ratio) for dim in (5, 10, 15, 20)
    )


def test_variants_are_the_published_ones():
    assert list(VARIANTS) == [f"pvt_v2_{name}" for name in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")]
    assert VARIANTS["pvt_v2_b5"]["mlp_ratios"] == (4, 4, 4, 4)
    assert [name for name in VARIANTS if VARIANTS[name]["linear"]] == ["pvt_v2_b2_li"]


@pytest.mark.parametrize("name", [*VARIANTS, "linear", "odd"])
def test_parameters_are_counted_without_a_model(name):
    others = {
        "linear": {"linear": True},
        "odd": {"patch_size": 9, "mlp_ratios": (0.5, 1.7, 2, 3), "sr_ratios": (1, 2, 3, 1)},
    }
    arguments = VARIANTS.get(name) or {**others[name], "in_channels": 5, "num_classes": 0}
    with torch.device("meta"):
        model = PVT_V2(**arguments)
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_kept_is_plain_python():
    config = PVTConfig(drop_rate=np.float64(0.25), img_size=[224, np.int64(224).item()], embed_dims=range(64, 320, 64))
    assert type(config.drop_rate) is float
    assert config.embed_dims == (64, 128, 192, 256)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["img_size"] == [224, 224]
