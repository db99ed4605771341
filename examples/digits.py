"""The handwritten digits of scikit-learn as images for a small model: what the examples and their tests share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pvt_fast.images.preprocess import Preprocess

SIZE = 32  # pixels a side, from the data set's 8
_HIGHEST = 16  # of the data set's grey levels
_HELD_OUT = 0.2
# Fixed, and apart from the seed of a training: every training is judged on the same images.
_SPLIT_SEED = 0

# What turns a greyscale file of such a digit (ink bright) into the same input.
PREPROCESS = Preprocess(size=SIZE, crop=1.0, interpolation="bilinear", mean=(0.5,), std=(0.5,))


class Digits(NamedTuple):
    """`images` float32 (N, 1, 32, 32) in [-1, 1], `labels` int64 (N,)."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """(training, held-out): 80 % and 20 % of each class of the 1,797 digits, always the same ones."""
    from sklearn import datasets

    data = datasets.load_digits()
    labels = torch.from_numpy(data.target).long()
    grey = torch.from_numpy(data.images).float().unsqueeze(1) / _HIGHEST
    grey = F.interpolate(grey, size=SIZE, mode="bilinear", align_corners=False)
    images = (grey - PREPROCESS.mean[0]) / PREPROCESS.std[0]
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = (labels == digit).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: round(_HELD_OUT * len(members))]]] = True
    return Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out])
