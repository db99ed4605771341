"""Weights of any published implementation into a model, and a model's weights out to each of them."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from .arguments import choice, flag, instance, shown
from .checkpoint import METADATA_KEY, SUFFIXES, load_state, unnest
from .description import require_rebuilt
from .hub import CONFIG_FILE, WEIGHT_FILES, clear_errors, fetch
from .layouts import LAYOUTS, from_official, to_official

if TYPE_CHECKING:
    from .model import PVT_V2

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
    from .model import PVT_V2  # which imports this module

    instance("load_weights: model", model, PVT_V2, "a PVT_V2")
    flag("load_weights: strict", strict)
    state, norm_eps = _read(source)
    return assign(model, state, norm_eps, strict)


def assign(
    model: PVT_V2, state: Mapping[str, Tensor], norm_eps: Mapping[str, float] | None = None, strict: bool = True
) -> LoadReport:
    """`load_weights` of a state dict, with epsilons that go before the layout's."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("load_weights: model must have memory for its weights (to_empty), got one on the meta device")
    own = model.state_dict()
    official = to_official(state)
    values = dict(official.state)
    adapted = _fit_channels(values, model.config.in_channels)
    dropped = _drop_head(values, own)
    misfits = {name for name in own if name in values and values[name].shape != own[name].shape}
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
        norm_eps=dict(norm_eps or official.layout.norm_eps),
    )
    if strict and report.problems():
        raise ValueError(
            f"load_weights: source ({report.layout} layout) must have the model's {len(own)} parameters, "
            f"got {'; '.join(report.problems())}{_advice(report)}"
        )
    model.load_state_dict({name: values[name] for name in loaded}, strict=False)
    model.set_norm_eps(**report.norm_eps)
    logger.info("%s", report)
    return report


def export_weights(model: PVT_V2, layout: str = "official") -> dict[str, Tensor]:
    """A copy of the parameters under the names, and in the shapes, of another implementation.

    layout: "official", "timm" (`pvt_v2_*`), "transformers" (`PvtV2ForImageClassification`) or "mmdet"
        (`PyramidVisionTransformerV2`, which has no head).

    The epsilons are not part of it: `model.norm_eps()` has to be what the implementation has for equal answers.
    Raises ValueError for a model with modules that the implementation lacks: adapters, parametrizations, and but for
    "mmdet" a head that is neither a linear nor nn.Identity.
    """
    from .model import PVT_V2  # which imports this module

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
    path = Path(source)
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise ValueError(f"load_weights: source must hold {' or '.join(WEIGHT_FILES)}, got directory {source!r}")
        return _read_file(files[0], path / CONFIG_FILE)
    if path.is_file() or path.suffix in SUFFIXES or not isinstance(source, str):
        return _read_file(path)
    if not _REPOSITORY.fullmatch(source):
        raise ValueError(
            f'load_weights: source must be an existing file or directory, or a repository "org/name", got {source!r}'
        )
    with clear_errors("load_weights", source):
        weights = fetch(source)
    config = weights.with_name(CONFIG_FILE)
    if not config.is_file():
        with suppress(EntryNotFoundError):  # not every repository has one, nor every cache: timm fetches weights alone
            config = fetch(source, (CONFIG_FILE,))
    return _read_file(weights, config)


def _read_file(path: Path, config: Path | None = None) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    state, metadata = load_state(path)
    if METADATA_KEY in metadata:
        return state, json.loads(metadata[METADATA_KEY])["norm_eps"]
    if config is None or not config.is_file():
        return state, None
    described = json.loads(config.read_text(encoding="utf-8"))
    if "layer_norm_eps" in described:  # of transformers: one for all norms
        return state, dict.fromkeys(("block", "patch_embed", "reduction"), described["layer_norm_eps"])
    return state, described.get("norm_eps")


# -- fitting ---------------------------------------------------------------------------------------------------------


def _fit_channels(values: dict[str, Tensor], channels: int) -> tuple[str, ...]:
    """Fit an RGB first convolution, in place, to another number of channels; what was fitted."""
    weight = values.get(_STEM)
    if weight is None or weight.dim() != 4 or weight.shape[1] != _RGB or channels == _RGB:
        return ()
    wide = weight.float()
    if channels == 1:
        wide = wide.sum(dim=1, keepdim=True)
    else:
        wide = wide.repeat(1, math.ceil(channels / _RGB), 1, 1)[:, :channels] * (_RGB / channels)
    values[_STEM] = wide.to(weight.dtype)
    return (_STEM,)


def _drop_head(values: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Take a head that is not for the model's out of `values`; its names."""
    theirs, ours = values.get(_HEAD[0]), own.get(_HEAD[0])
    if theirs is None or (ours is not None and theirs.shape[0] == ours.shape[0]):
        return ()
    return tuple(name for name in _HEAD if values.pop(name, None) is not None)


def _advice(report: LoadReport) -> str:
    if not report.unexpected and not report.mismatched and report.missing == _HEAD:
        return " (the source has no head: make the model with num_classes=0, or load with strict=False)"
    return ""


def _few(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
