"""Weights of any published implementation into a model, and a model's weights out to each of them."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..arguments import choice, flag, instance, pathname, shown
from .description import EPS_KINDS, NORM_EPS, TRANSFORMERS_EPS, from_text, in_folder, require_rebuilt
from .files import METADATA_KEY, SUFFIXES, load_state, memory_of, printable, require_memory, require_values, unnest
from .hub import locate
from .key_maps import LAYOUTS, from_official, to_official

if TYPE_CHECKING:
    from ..model import PVT_V2

logger = logging.getLogger("pvt_fast")

_STEM = "patch_embed1.proj.weight"
_HEAD = ("head.weight", "head.bias")
_RGB = 3
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did; all names are the model's, but for `renamed`'s keys, `unexpected` and `outside`.

    layout: "official", "timm", "transformers" or "mmdet".
    loaded: parameters that took a value.
    renamed: names in the source that differ from the model's, with the model's.
    adapted: the first convolution, when its channels were fitted to the model's.
    dropped: the head, when the model's is for another number of classes, or no linear: its own stays as it was.
    missing: the model's parameters that the source lacks; they stay as they were.
    unexpected: names in the source that the model lacks.
    mismatched: parameters of another shape in the source, with both shapes; they stay as they were.
    outside: names beside the PVT v2 in the source, such as a detector's; they are no error.
    norm_eps: the epsilons that were set (see `PVT_V2.set_norm_eps`).
    """

    layout: str
    loaded: tuple[str, ...]
    renamed: dict[str, str]
    adapted: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    outside: tuple[str, ...]
    norm_eps: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{self.layout} layout: {len(self.loaded)} loaded, {len(self.renamed)} names of the source renamed"]
        for kind in ("adapted", "dropped", "missing", "unexpected", "mismatched", "outside"):
            names = getattr(self, kind)
            if names:
                lines.append(f"{kind}: {_few(names)}")
        return "\n".join(lines)

    def problems(self) -> list[str]:
        """What `strict` does not accept, one sentence part each."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        return [f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds.items() if names]


def load_weights(model: PVT_V2, source: str | os.PathLike | Mapping[str, Any], strict: bool = True) -> LoadReport:
    """Copy weights of the official, timm, transformers or mmdet (mmseg) implementation into the model.

    source: a state dict; a file (.safetensors, .pth, .pt, .bin); a directory that `save_pretrained` of this package
        or of transformers wrote; or a Hugging Face repository, "org/name" or "org/name@revision", from the cache or
        the hub. Pickled files are read as tensors only. The weights may be nested under "state_dict", "model" or
        "module", and lie under any prefix ("module.", "backbone.", ...).
    strict: raise for missing, unexpected or mismatched parameters. Else they are only reported.

    Values are converted to the model's dtype and device. An RGB first convolution is fitted to another number of
    channels n as timm does it: for 1 summed, else repeated and scaled by 3 / n. A head for another number of classes
    is dropped, and so is one for a model that has no linear at `head`: the model's own stays. The norms take the
    epsilons of the implementation: those of the source's configuration where it has one, else the layout's (official
    and timm 1e-6, in patch embeds and spatial reduction 1e-5; transformers and mmdet 1e-6 throughout). A file of
    `save_model` or `save_pretrained` brings its own.

    Raises ValueError for a source that holds no PVT v2 or, strictly, does not fit, and OSError for a repository that
    is not in the cache when there is no network. The model is then unchanged.
    """
    from ..model import PVT_V2  # which imports this module

    instance("load_weights: model", model, PVT_V2, "a PVT_V2")
    flag("load_weights: strict", strict)
    state, norm_eps = _read(source)
    return assign(model, state, norm_eps, strict)


def assign(
    model: PVT_V2, state: Mapping[str, Tensor], norm_eps: Mapping[str, float] | None = None, strict: bool = True
) -> LoadReport:
    """`load_weights` of a state dict, with epsilons that go before the layout's."""
    if any(parameter.is_meta or is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError(
            "load_weights: model must have memory for its weights (to_empty), got one on the meta device, or lazy"
        )
    values, report = fit(model, state, norm_eps, strict)
    for name in report.adapted:
        values[name] = _with_channels(values[name], model.config.in_channels)
    with _changed(model, values, report.norm_eps):
        logger.info("%s", report)  # which a user's handler may make raise
    return report


def fit(
    model: PVT_V2, state: Mapping[str, Tensor], norm_eps: Mapping[str, float] | None = None, strict: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    """What `assign` copies, but for what is adapted, and its report.

    Nothing is changed or computed, and the model may be on the meta device.
    """
    own = model.state_dict()
    official = to_official(state)
    values = dict(official.state)
    for name in own.keys() & values.keys():
        require_values("load_weights", name, values[name])
    adapted = _adapted(values, own)
    dropped = _drop_head(values, own)
    misfits = {name for name in own if name in values and values[name].shape != own[name].shape} - {*adapted}
    loaded = tuple(name for name in own if name in values and name not in misfits)
    report = LoadReport(
        layout=official.layout.name,
        loaded=loaded,
        renamed={old: new for new in loaded for old in official.sources[new] if old != new},
        adapted=adapted,
        dropped=dropped,
        missing=tuple(name for name in own if name not in values and not (dropped and name.startswith("head."))),
        unexpected=official.unexpected
        + tuple(old for new in values if new not in own for old in official.sources[new]),
        mismatched=tuple(
            f"{name} {tuple(values[name].shape)} for {tuple(own[name].shape)}" for name in own if name in misfits
        ),
        outside=official.outside,
        norm_eps=dict(official.layout.norm_eps if norm_eps is None else norm_eps),
    )
    if strict and report.problems():
        raise ValueError(
            f"load_weights: source ({report.layout} layout) must have the model's {len(own)} parameters, "
            f"got {'; '.join(report.problems())}{_advice(report)}"
        )
    unstated = {kind for kind, _ in model._norms()} - report.norm_eps.keys()
    if unstated:
        raise ValueError(f"load_weights: source must state the epsilons of all norms, got none of {sorted(unstated)}")
    return {name: values[name] for name in loaded}, report


@contextmanager
def _changed(model: PVT_V2, values: Mapping[str, Tensor], norm_eps: Mapping[str, float]) -> Iterator[None]:
    """Copy the values and set the epsilons; where that or the block raises, by an interrupt, say, all is as it was."""
    own = model.state_dict()
    for name in values:
        require_memory("load_weights", name, own[name])
    memory = {memory_of(value) for value in own.values()}
    # a source made of the model's own tensors would change while it is read
    values = {name: value.clone() if memory_of(value) in memory else value for name, value in values.items()}
    before = {name: own[name].clone() for name in values}
    epsilons = [(norm, norm.eps) for _, norm in model._norms()]
    try:
        model.load_state_dict(values, strict=False)
        model.set_norm_eps(**norm_eps)
        yield
    except BaseException as error:
        for norm, eps in epsilons:
            norm.eps = eps
        own = model.state_dict()
        with torch.no_grad():
            for name, value in before.items():
                with suppress(RuntimeError):  # what cannot be written was not
                    own[name].copy_(value)
        if isinstance(error, RuntimeError):
            raise ValueError(f"load_weights: model must take its weights, got {_sentence(error)}") from error
        raise


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def export_weights(model: PVT_V2, layout: str = "official") -> dict[str, Tensor]:
    """A copy of the parameters under the names, and in the shapes, of another implementation.

    layout: "official", "timm" (`pvt_v2_*`), "transformers" (`PvtV2ForImageClassification`) or "mmdet"
        (`PyramidVisionTransformerV2`, which has no head).

    The epsilons are not part of it: `model.norm_eps()` has to be what the implementation has for equal answers.
    Raises ValueError for a model with modules that the implementation lacks: adapters, parametrizations, and but for
    "mmdet" a head that is neither a linear nor nn.Identity.
    """
    from ..model import PVT_V2  # which imports this module

    instance("export_weights: model", model, PVT_V2, "a PVT_V2")
    choice("export_weights: layout", layout, tuple(LAYOUTS))
    require_rebuilt("export_weights", model, PVT_V2, head=layout != "mmdet")
    state = from_official(model.state_dict(), LAYOUTS[layout])
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


# -- where weights come from -----------------------------------------------------------------------------------------


def _read(source: str | os.PathLike | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    """(state dict, the epsilons that the source states)."""
    if isinstance(source, Mapping):
        return unnest(source), None
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load_weights: source must be a path, a repository or a state dict, got {shown(source)}")
    path = Path(pathname("load_weights: source", source))
    if not path.is_dir() and (path.is_file() or path.suffix in SUFFIXES or not isinstance(source, str)):
        return _read_file(path)
    if not path.is_dir() and not _REPOSITORY.fullmatch(str(source)):
        raise ValueError(
            f'load_weights: source must be an existing file or directory, or a repository "org/name", got {source!r}'
        )
    return _read_file(*locate("load_weights", str(source)))


def _read_file(path: Path, config: Path | None = None) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    state, metadata = load_state(path)
    if METADATA_KEY in metadata:
        described = from_text("load_weights", metadata[METADATA_KEY], f"the description in {path}")
        if NORM_EPS not in described:
            raise ValueError(f"load_weights: the description in {path} must state {NORM_EPS}, got none")
    else:
        described = in_folder("load_weights", metadata, config) or {}
    if TRANSFORMERS_EPS in described:  # one for all norms
        return state, dict.fromkeys(EPS_KINDS, described[TRANSFORMERS_EPS])
    return state, described.get(NORM_EPS)


# -- fitting ---------------------------------------------------------------------------------------------------------


def _adapted(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The first convolution where it is for RGB and the model's for another number of channels."""
    if _STEM not in values or _STEM not in own:
        return ()
    theirs, ours = values[_STEM].shape, own[_STEM].shape
    same_but_channels = len(theirs) == len(ours) == 4 and (theirs[0], *theirs[2:]) == (ours[0], *ours[2:])
    return (_STEM,) if same_but_channels and theirs[1] == _RGB != ours[1] else ()


def _with_channels(weight: Tensor, channels: int) -> Tensor:
    """An RGB convolution's weight for another number of channels."""
    wide = weight.float()
    if channels == 1:
        wide = wide.sum(dim=1, keepdim=True)
    else:
        wide = wide.repeat(1, math.ceil(channels / _RGB), 1, 1)[:, :channels] * (_RGB / channels)
    return wide.to(weight.dtype)


def _drop_head(values: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Take a head that is not for the model's out of `values`; its names."""
    theirs, ours = values.get(_HEAD[0]), own.get(_HEAD[0])
    if theirs is None or theirs.dim() != 2 or (ours is not None and theirs.shape[:1] == ours.shape[:1]):
        return ()
    return tuple(name for name in _HEAD if values.pop(name, None) is not None)


def _advice(report: LoadReport) -> str:
    if not report.unexpected and not report.mismatched and report.missing == _HEAD:
        return " (the source has no head: make the model with num_classes=0, or load with strict=False)"
    return ""


def _few(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(printable, names[:3]))}{', ...' if len(names) > 3 else ''}"
