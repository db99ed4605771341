"""From an image file to the model's input, as timm evaluates the published PVT v2 weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from .pixels import IMAGENET_MEAN, IMAGENET_STD, normalise

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side to floor(size / crop), centre-crop size x size, scale to [0, 1], normalise.

    The defaults are timm's for the published weights: 224 of 248 pixels, bicubic with antialiasing, ImageNet's mean
    and deviation.
    `mean` and `std` have one entry per channel of the model: 1 (greyscale) or 3 (RGB).
    Raises ValueError, naming the field, for values that describe no preprocessing.
    """

    size: int = 224
    crop: float = 0.9
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Preprocess: size must be an int of at least 1, got {self.size!r}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"Preprocess: crop must lie in (0, 1], got {self.crop}")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(
                f"Preprocess: interpolation must be one of {', '.join(_RESAMPLING)}; got {self.interpolation!r}"
            )
        if len(self.mean) not in _MODES or len(self.mean) != len(self.std):
            raise ValueError(
                f"Preprocess: mean and std must both have 1 or 3 entries, got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"Preprocess: std must be positive, got {self.std}")

    @property
    def in_channels(self) -> int:
        """Channels of the result."""
        return len(self.mean)

    def __call__(self, image: Image.Image) -> Tensor:
        """An upright image of any size and mode -> float32 (in_channels, size, size)."""
        image = to_mode(image, _MODES[self.in_channels])
        shorter = math.floor(self.size / self.crop)
        width, height = image.size
        # the longer side is rounded down, as torchvision's Resize does
        if width <= height:
            width, height = shorter, shorter * height // width
        else:
            width, height = shorter * width // height, shorter
        image = image.resize((width, height), _RESAMPLING[self.interpolation])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.size, self.size, self.in_channels).permute(2, 0, 1)
        return normalise(pixels, self.mean, self.std).contiguous()


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image as "RGB" or "L"; 16-bit greyscale keeps its upper 8 bits, transparency is dropped."""
    if image.mode.startswith("I"):  # "I;16", and "I", which older versions of PIL read 16-bit files as
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def read_image(path: str | os.PathLike) -> Image.Image:
    """The image of a file, upright by its EXIF orientation. ValueError if there is none that can be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"read_image: path must be an existing file, got {str(path)!r}") from None
    # PIL reports damaged files as OSError, SyntaxError or ValueError by format, oversized ones by an error of its own
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"read_image: path must be a readable image, got {str(path)!r} ({error})") from error
