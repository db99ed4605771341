"""Lets timm and transformers import torchvision where its compiled ops cannot load.

They cannot where it was built for CUDA and torch was not. At import it attaches fake implementations to two ops, and
fails where they do not exist: they get their schemas here. Nothing here calls them.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path

import torch

# kept alive: a Library that is collected takes its schemas with it
_library = torch.library.Library("torchvision", "FRAGMENT")


def let_torchvision_be_imported() -> None:
    """Load torchvision's compiled ops, or define the schemas that its import needs. Call it before timm is imported."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        with suppress(OSError):
            torch.ops.load_library(extension)
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
