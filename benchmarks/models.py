"""The network that contenders of every kind build: weights, images and truth of a case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pvt_fast
from pvt_fast.testing import model_truth

from .case import Case
from .torchvision_ops import let_torchvision_be_imported


def make_model(case: Case) -> pvt_fast.PVT_V2:
    """The case's model with weights drawn from a fixed seed, rounded to the case's dtype, in float32."""
    torch.manual_seed(0)
    model = pvt_fast.create_model(case.model).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if parameter.eq(1).all() else 0.0, 0.1)
    return model.to(case.torch_dtype).float()


def make_images(case: Any) -> Tensor:
    """Random images, rounded to the case's dtype, in float32."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
    return images.to(case.torch_dtype).float()


def truth(case: Case, rows: slice | list[int] = slice(None)) -> tuple[Tensor, Tensor]:
    """(logits in float64, logits of plain torch in the case's dtype) of those images, from the reference backend."""
    return model_truth(make_model(case), make_images(case)[rows].to(case.torch_dtype))


def timm_model(case: Case) -> nn.Module:
    """timm's model with our weights."""
    let_torchvision_be_imported()
    import timm

    model = timm.create_model(case.model).eval()
    model.load_state_dict(pvt_fast.export_weights(make_model(case), "timm"))
    return model
