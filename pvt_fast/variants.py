"""The published variants: their factories and their published weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from .arguments import choice, instance
from .checkpoints.weights import load_weights
from .config import VARIANT_NORM_EPS, VARIANTS
from .model import PVT_V2

logger = logging.getLogger("pvt_fast")


def create_model(
    name: str,
    img_size: Any = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    pretrained: bool | str | os.PathLike = False,
    **overrides: Any,
) -> PVT_V2:
    """A published variant by name; `overrides` are further arguments of `PVT_V2`.

    pretrained: False for newly initialised weights; True for timm's, trained on ImageNet-1k ("timm/<name>.in1k" on
        the Hugging Face hub, or in its cache); or another source of `load_weights`, such as "OpenGVLab/pvt_v2_b2".
        Another num_classes leaves the head newly initialised, and another in_channels fits the first convolution, as
        `load_weights` tells.
    """
    choice("create_model: name", name, list_models())
    instance(
        "create_model: pretrained", pretrained, (bool, str, os.PathLike, Mapping), "True, False or a source of weights"
    )
    arguments = {"norm_layer": partial(nn.LayerNorm, eps=VARIANT_NORM_EPS), **VARIANTS[name], **overrides}
    model = PVT_V2(img_size=img_size, num_classes=num_classes, in_channels=in_channels, **arguments)
    if pretrained is not False:
        report = load_weights(model, f"timm/{name}.in1k" if pretrained is True else pretrained)
        if report.dropped and num_classes:
            logger.warning("%s: the head for %d classes is newly initialised, not pretrained", name, num_classes)
    return model


def list_models() -> list[str]:
    """Names of the published variants."""
    return list(VARIANTS)


def _factory(name: str) -> Callable[..., PVT_V2]:
    def factory(
        img_size: Any = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        pretrained: bool | str | os.PathLike = False,
        **overrides: Any,
    ) -> PVT_V2:
        return create_model(name, img_size, num_classes, in_channels, pretrained=pretrained, **overrides)

    factory.__name__ = factory.__qualname__ = name
    variant = VARIANTS[name]
    factory.__doc__ = (
        f"PVT_V2 with embed_dims {variant['embed_dims']}, depths {variant['depths']}, "
        f"mlp_ratios {variant['mlp_ratios']}{', linear' if variant['linear'] else ''}; "
        "arguments as of `create_model`."
    )
    return factory


pvt_v2_b0 = _factory("pvt_v2_b0")
pvt_v2_b1 = _factory("pvt_v2_b1")
pvt_v2_b2 = _factory("pvt_v2_b2")
pvt_v2_b2_li = _factory("pvt_v2_b2_li")
pvt_v2_b3 = _factory("pvt_v2_b3")
pvt_v2_b4 = _factory("pvt_v2_b4")
pvt_v2_b5 = _factory("pvt_v2_b5")
