"""Weights of any published implementation into a model, and a model's weights out to each of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import choice, flag, instance, pathname, shown
from ..model import PVT_V2
from .description import EPS_KINDS, NORM_EPS, TRANSFORMERS_EPS, from_text, in_folder, require_rebuilt
from .files import METADATA_KEY, SUFFIXES, load_state, unnest
from .fitting import LoadReport, assign
from .hub import locate
from .key_maps import LAYOUTS, from_official

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


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
    instance("load_weights: model", model, PVT_V2, "a PVT_V2")
    flag("load_weights: strict", strict)
    state, norm_eps = _read(source)
    return assign(model, state, norm_eps, strict)


def export_weights(model: PVT_V2, layout: str = "official") -> dict[str, Tensor]:
    """A copy of the parameters under the names, and in the shapes, of another implementation.

    layout: "official", "timm" (`pvt_v2_*`), "transformers" (`PvtV2ForImageClassification`) or "mmdet"
        (`PyramidVisionTransformerV2`, which has no head).

    The epsilons are not part of it: `model.norm_eps()` has to be what the implementation has for equal answers.
    Raises ValueError for a model with modules that the implementation lacks: adapters, parametrizations, and but for
    "mmdet" a head that is neither a linear nor nn.Identity.
    """
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
