"""A state dict fitted to a model: what of it goes where, what does not fit, and all or nothing of it copied."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .files import memory_of, printable, require_memory, require_values
from .key_maps import to_official

if TYPE_CHECKING:
    from ..model import PVT_V2

logger = logging.getLogger("pvt_fast")

_STEM = "patch_embed1.proj.weight"
_HEAD = ("head.weight", "head.bias")
_RGB = 3


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
    unstated = {kind for kind, _ in model.named_norms()} - report.norm_eps.keys()
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
    epsilons = [(norm, norm.eps) for _, norm in model.named_norms()]
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
