"""The models of others that accelerate_ is tested on, small and with weights that leave no parameter trivial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
import vendored
from torch import Tensor, nn

from pvt_fast.accelerate.api import _Accelerated

IMAGE = (2, 3, 70, 101)  # not square, and with rows that the reducing convolutions drop

SMALL = {
    "depths": [1, 2],
    "hidden_sizes": [16, 24],
    "num_attention_heads": [1, 3],
    "mlp_ratios": [4, 2],
    "sr_ratios": [4, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_encoder_blocks": 2,
    "num_labels": 5,
}
TIMM = {
    "depths": (1, 2),
    "embed_dims": (16, 24),
    "num_heads": (1, 3),
    "mlp_ratios": (4, 2),
    "sr_ratios": (4, 1),
    "num_classes": 5,
}


def timm_pvt(**options) -> nn.Module:
    return timm.models.pvt_v2.PyramidVisionTransformerV2(**TIMM, **options)


def pvt_v2(**options) -> nn.Module:
    return transformers.PvtV2ForImageClassification(transformers.PvtV2Config(**SMALL, **options))


def segformer(**options) -> nn.Module:
    return transformers.SegformerForImageClassification(transformers.SegformerConfig(**SMALL, **options))


def segmenter() -> nn.Module:
    config = transformers.SegformerConfig(**SMALL, decoder_hidden_size=8)
    return transformers.SegformerForSemanticSegmentation(config)


def glpn() -> nn.Module:
    return transformers.GLPNModel(transformers.GLPNConfig(**SMALL))


# (model, name of its layout, number of its blocks)
PEERS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "official": (vendored.official, "official", 4),
    "official-linear": (lambda: vendored.official(linear=True), "official", 4),
    "maps": (vendored.on_maps, "segmentation_models_pytorch", 4),
    "openmmlab": (vendored.openmmlab, "mmdet / mmseg", 4),
    "openmmlab-no-bias": (lambda: vendored.openmmlab(bias=False), "mmdet / mmseg", 4),
    "timm": (timm_pvt, "timm", 3),
    "timm-linear": (lambda: timm_pvt(linear=True), "timm", 3),
    "pvt_v2": (pvt_v2, "transformers PvtV2", 3),
    "pvt_v2-linear": (lambda: pvt_v2(linear_attention=True), "transformers PvtV2", 3),
    "segformer": (segformer, "transformers SegFormer", 3),
    "segmenter": (segmenter, "transformers SegFormer", 3),
    "glpn": (glpn, "transformers SegFormer 4 / GLPN", 3),
}
peers = pytest.mark.parametrize("peer", PEERS)


def make(peer: str) -> nn.Module:
    """The peer's model in evaluation mode, with no parameter at a trivial value."""
    return randomised(PEERS[peer][0]())


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=1.3 * parameter[0].numel() ** -0.5)
    return model.eval()


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(3)).to(dtype)


def answer(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    output = model(x, **options)
    return output if isinstance(output, Tensor) else output[0]


def accelerated_blocks(model: nn.Module) -> list[nn.Module]:
    """The accelerated blocks."""
    return [module for module in model.modules() if isinstance(module, _Accelerated)]


def other(half: str) -> str:
    return {"attention": "mlp", "mlp": "attention"}[half]


def hook(module: nn.Module, seen: list) -> Any:
    return module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))


def change_activation(block: nn.Module) -> None:
    block.mlp.act = nn.GELU(approximate="tanh")
