"""From 8-bit pixels to the values that a model is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (..., C, H, W) -> float32 (pixel / 255 - mean) / std, mean and std per channel."""
    # filled, not copied from the host: a copy would wait for the GPU, and may not be part of a CUDA graph
    centre, scale = (
        torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=pixels.device) for value in values])
        for values in (mean, std)
    )
    return (pixels.float() / 255 - centre) / scale
