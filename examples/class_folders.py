"""Images in folders named like their classes, in a folder or a zip, as one tensor: what a training keeps in memory."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_TRAINING, _HELD_OUT = "train", "test"
_SHARE_HELD_OUT = 0.2


class Images(NamedTuple):
    """`pixels` uint8 (N, 3, side, side), `labels` int64 (N,)."""

    pixels: Tensor
    labels: Tensor


class Data(NamedTuple):
    """The images to train on, those to judge by, and the names of the classes, in the order of their labels."""

    training: Images
    held_out: Images
    classes: list[str]


class _Found(NamedTuple):
    """An image: the folders that it lies in and its name, and where its bytes are."""

    parts: tuple[str, ...]
    source: Path | str

    def __str__(self) -> str:
        return "/".join(self.parts)


Track = Callable[[Sequence[_Found]], Iterable[_Found]]


def load(path: Path, side: int, seed: int = 0, track: Track | None = None) -> Data:
    """Images of a folder or zip with `train/<class>/<image>` and `test/<class>/<image>`; or only `<class>/<image>`, of
    which 20 % of each class, drawn by the seed, are held out.

    All may lie within further folders. Images come as RGB of side x side pixels, others than square ones cropped about
    their centre. `track` wraps the loop over the images, to show progress. Raises ValueError for what is no such data.
    """
    if path.is_dir():
        found = [_Found(p.relative_to(path).parts, p) for p in sorted(path.rglob("*")) if p.is_file()]
        return _read(path, found, lambda source: Path(source).read_bytes(), side, seed, track)
    if not path.exists():
        raise ValueError(f"DATA must be a folder or a zip, got {path}, which does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            found = [_Found(tuple(n.split("/")), n) for n in sorted(archive.namelist()) if not n.endswith("/")]
            return _read(path, found, archive.read, side, seed, track)
    except zipfile.BadZipFile as error:
        raise ValueError(f"DATA must be a folder or a zip, got {path}: {error}") from error


def _read(
    path: Path,
    found: list[_Found],
    read: Callable[[Any], bytes],
    side: int,
    seed: int,
    track: Track | None,
) -> Data:
    images = _without_outer_folders([each for each in found if _is_image(each)])
    if not images:
        raise ValueError(f"DATA must have images ({', '.join(sorted(SUFFIXES))}), got {path} without any")
    split = {each.parts[0] for each in images} == {_TRAINING, _HELD_OUT}
    depth = 3 if split else 2
    for each in images:
        if len(each.parts) != depth:
            wanted = "train/<class>/<image> and test/<class>/<image>" if split else "<class>/<image>"
            raise ValueError(f"DATA must have its images as {wanted}, got {each} in {path}")
    classes = sorted({each.parts[-2] for each in images})
    if len(classes) < 2:
        raise ValueError(f"DATA must have folders of at least two classes, got {', '.join(classes)} in {path}")
    labels = torch.tensor([classes.index(each.parts[-2]) for each in images])
    held_out = (
        torch.tensor([each.parts[0] == _HELD_OUT for each in images]) if split else _drawn(labels, len(classes), seed)
    )
    for part, of in (("trained on", ~held_out), ("judged by", held_out)):
        counts = labels[of].bincount(minlength=len(classes))
        if not counts.all():
            raise ValueError(
                f"DATA must have images to be {part} of each class, got none of {classes[counts.argmin()]}"
            )
    pixels = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    for row, each in enumerate(images if track is None else track(images)):
        pixels[row] = _decoded(each, read(each.source), side)
    return Data(Images(pixels[~held_out], labels[~held_out]), Images(pixels[held_out], labels[held_out]), classes)


def _is_image(found: _Found) -> bool:
    """Hidden files, and those that macOS adds to a zip, are none."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in found.parts)
    return not hidden and Path(found.parts[-1]).suffix.lower() in SUFFIXES


def _without_outer_folders(images: list[_Found]) -> list[_Found]:
    """The same without the folders that all of them lie in, but for the last one."""
    while images and len({each.parts[0] for each in images}) == 1 and all(len(each.parts) > 2 for each in images):
        images = [each._replace(parts=each.parts[1:]) for each in images]
    return images


def _drawn(labels: Tensor, classes: int, seed: int) -> Tensor:
    """Which images are held out: 20 % of each class, one at least."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: max(1, round(_SHARE_HELD_OUT * len(members)))]]] = True
    return held_out


def _decoded(found: _Found, content: bytes, side: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(content)) as image:
            fitted = image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"DATA must have images that can be read, got {found}: {error}") from error
    if fitted.size != (side, side):
        fitted = ImageOps.fit(fitted, (side, side), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
