"""From an image file to the model's input, as timm evaluates the published PVT v2 weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..arguments import choice, entries, instance, integer, number, pathname, shown
from .pixels import IMAGENET_MEAN, IMAGENET_STD, normalise

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = {1: "L", 3: "RGB"}
# Modes of PIL whose black and white are known; 16-bit ones come to "L" first.
_READABLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")

# Longer side over shorter, of what is resized as a whole.
_MAX_ASPECT = 16
# Shorter side of what is resized, in pixels: with _MAX_ASPECT the bound of the memory that it takes.
MAX_SIDE = 4096
# What PIL takes unless told otherwise.
_MAX_PIXELS = 178_956_970
# Means and deviations beyond this, or deviations below its inverse, are no statistics of pixels.
_MOST = 1e6


def _statistics(where: str, value: Any) -> tuple[float, ...]:
    values = entries(where, value, "a sequence with one entry per channel")
    if len(values) > max(_MODES):
        raise ValueError(f"{where} must have 1 or 3 entries, got {len(values)}: {shown(values)}")
    return tuple(number(where, value, -_MOST, _MOST) for value in values)


# What each field of `Preprocess` may be.
_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "size": partial(integer, minimum=1),
    "crop": number,
    "interpolation": partial(choice, names=tuple(_RESAMPLING)),
    "mean": _statistics,
    "std": _statistics,
}


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side to floor(size / crop), centre-crop size x size, scale to [0, 1], normalise.

    The defaults are timm's for the published weights: 224 of 248 pixels, bicubic with antialiasing, ImageNet's mean
    and deviation.
    `mean` and `std` have one entry per channel of the model: 1 (greyscale) or 3 (RGB).
    Raises ValueError or TypeError, naming the field, for values that describe no preprocessing.
    """

    size: int = 224
    crop: float = 0.9
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for field, check in _FIELDS.items():
            object.__setattr__(self, field, check(f"Preprocess: {field}", getattr(self, field)))
        if not 0 < self.crop <= 1:
            raise ValueError(f"Preprocess: crop must lie in (0, 1], got {self.crop}")
        if self.size > MAX_SIDE * self.crop:
            raise ValueError(
                f"Preprocess: size and crop must make a shorter side of at most {MAX_SIDE} pixels, "
                f"got {self.size} and {self.crop}"
            )
        if len(self.mean) not in _MODES or len(self.mean) != len(self.std):
            raise ValueError(
                f"Preprocess: mean and std must both have 1 or 3 entries, got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) < 1 / _MOST:
            raise ValueError(f"Preprocess: std must be positive, at least {1 / _MOST}, got {self.std}")

    @property
    def in_channels(self) -> int:
        """Channels of the result."""
        return len(self.mean)

    def __call__(self, image: Image.Image) -> Tensor:
        """An upright image of any size, in a mode of `to_mode`'s -> float32 (in_channels, size, size).

        Of an image more than 16 times as long as wide only the middle is looked at. Raises ValueError for an image
        without pixels.
        """
        instance("Preprocess: image", image, Image.Image, "a PIL image")
        if not all(image.size):
            raise ValueError(f"Preprocess: image must have pixels, got a size of {image.width}x{image.height}")
        image = to_mode(_middle(image), _MODES[self.in_channels])
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


def _middle(image: Image.Image) -> Image.Image:
    """What the centre crop can see: of a 1 x 20000 image, resized as a whole, millions of rows would be made for it."""
    shorter, longer = sorted(image.size)
    kept = _MAX_ASPECT * shorter
    kept += (longer - kept) % 2  # as much is cut off at either end: the centre stays where it is
    if longer <= kept:
        return image
    cut = (longer - kept) // 2
    if image.width == longer:
        return image.crop((cut, 0, cut + kept, shorter))
    return image.crop((0, cut, shorter, cut + kept))


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image as "RGB" or "L"; 16-bit greyscale keeps its upper 8 bits, transparency is dropped.

    Raises ValueError for images of floats or of more than 16 bits, whose white is not known, and for other colour
    spaces than RGB, CMYK, YCbCr and HSV.
    """
    if image.mode.startswith("I"):  # "I;16", and "I", which older versions of PIL read 16-bit files as
        image = _upper_bits(image)
    if image.mode not in _READABLE:
        raise ValueError(f"Preprocess: image must have one of the modes {', '.join(_READABLE)}, got {image.mode}")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _upper_bits(image: Image.Image) -> Image.Image:
    if image.mode not in ("I", "I;16"):  # other orders of bytes
        image = image.convert("I")
    low, high = cast("tuple[int, int]", image.getextrema())  # of one channel
    if not 0 <= low <= high < 2**16:
        raise ValueError(f"Preprocess: image must have at most 16 bits a channel, got values from {low} to {high}")
    return image.point(lambda value: value / 256).convert("L")


def read_image(path: str | os.PathLike) -> Image.Image:
    """The image of a file, of an animation the first, upright by its EXIF orientation.

    Raises ValueError if there is none that can be decoded, or one of more than 178,956,970 pixels, PIL's limit.
    """
    pathname("read_image: path", path)
    if not os.path.exists(path):
        raise ValueError(f"read_image: path must be an existing file, got {str(path)!r}")
    must = f"read_image: path must be a readable image, got {str(path)!r}"
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise ValueError(f"{must} (not a regular file)")
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, of at most {_MAX_PIXELS}")
            image.load()
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file PIL fails in whatever it does next
        raise ValueError(f"{must} ({' '.join(str(error).split()) or type(error).__name__})") from error
