"""Small models whose pieces run fused on cpp, one of ours and one of timm's, and the same answer with nothing fused."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from peer_models import randomised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pvt_fast
from pvt_fast import PVT_V2

# with more parameters than `packing.CALLS`
SIZES = {
    "embed_dims": (8, 16),
    "num_heads": (1, 2),
    "depths": (2, 2),
    "mlp_ratios": (4, 2),
    "sr_ratios": (2, 1),
    "num_classes": 5,
}


def own(**options) -> PVT_V2:
    """Ours."""
    model = randomised(PVT_V2(**SIZES | options, num_stages=2, img_size=32, qkv_bias=True))
    model.backend = "cpp"
    return model


def accelerated(**options) -> nn.Module:
    """timm's, its blocks accelerated."""
    model = randomised(timm.models.pvt_v2.PyramidVisionTransformerV2(**SIZES | options))
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {"own": own, "accelerated": accelerated}


def image(batch: int = 2, height: int = 36, width: int = 44) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


class _Watching(TorchDispatchMode):
    """Sees every operation, and changes none: under it modules run their own forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def plain(call: Callable[[], Tensor]) -> Tensor:
    """The answer of `call()` with nothing fused in it."""
    with _Watching() as watching:
        answer = call()
    assert "pvt_fast" not in watching.seen
    assert "aten" in watching.seen
    return answer


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of either model, in order."""
    lists = (model.block1, model.block2) if isinstance(model, PVT_V2) else (stage.blocks for stage in model.stages)
    return [block for some in lists for block in some]


def assert_rounding(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
