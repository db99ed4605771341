"""A model in one file: weights, configuration and preprocessing.

A file written by `save_model` is safetensors with one metadata entry, `pvt_fast`: JSON that holds the arguments of
`PVT_V2`, the norms' epsilons and the preprocessing, so that `build_model` needs nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from .arguments import instance, pathname
from .checkpoints.description import describe, from_text, tensors, to_text, write_tensors
from .checkpoints.files import METADATA_KEY, load_state
from .checkpoints.rebuild import rebuilt
from .checkpoints.replacing import replacing
from .images.preprocess import Preprocess
from .model import PVT_V2


def save_model(model: PVT_V2, path: str | os.PathLike, preprocess: Preprocess) -> None:
    """Write the weights with the model's configuration and preprocessing as safetensors.

    The file at `path` is replaced whole (see `replacing`): whatever ends this call, one of the two is there. Raises
    ValueError, and writes nothing, for a model that `load_model` would not bring back: see `save_pretrained`. Raises
    OSError where the file cannot be written; what was there is then as it was.
    """
    instance("save_model: model", model, PVT_V2, "a PVT_V2")
    pathname("save_model: path", path)
    instance("save_model: preprocess", preprocess, Preprocess, "a Preprocess")
    description = {**describe("save_model", model, PVT_V2), "preprocess": asdict(preprocess)}
    text = to_text("save_model", description)
    with replacing("save_model", path) as (unfinished,):
        write_tensors("save_model", tensors(model), unfinished, {METADATA_KEY: text})


def has_config(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata are those of `save_model`."""
    return METADATA_KEY in metadata


def build_model(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[PVT_V2, Preprocess]:
    """The model and its preprocessing of what `load_state` read from a file of `save_model`; see `load_model`."""
    described = from_text("build_model", metadata[METADATA_KEY], "metadata")
    model = rebuilt("build_model", PVT_V2, described, state)
    for parameter in model.parameters():
        if parameter.dtype != torch.float64:
            parameter.data = parameter.data.float()
    try:
        preprocess = Preprocess(**described["preprocess"])
        model.config.map_sizes(preprocess.size, preprocess.size)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"build_model: metadata must describe a preprocessing, got {error!r}") from error
    if preprocess.in_channels != model.config.in_channels:
        raise ValueError(
            f"build_model: preprocess must give the model's {model.config.in_channels} channels, "
            f"got {preprocess.in_channels}"
        )
    return model, preprocess


def load_model(path: str | os.PathLike) -> tuple[PVT_V2, Preprocess]:
    """The model in evaluation mode, on the CPU, and its preprocessing, from a file of `save_model`.

    In float32, which float16 and bfloat16 fit into; parameters that the file has in float64 stay so. Raises ValueError
    for a file that is none, or is damaged, before memory is taken for a model that its weights do not fit.
    """
    pathname("load_model: path", path)
    state, metadata = load_state(path)
    if not has_config(metadata):
        raise ValueError(f"load_model: path must be a file written by save_model, got {str(path)!r}")
    return build_model(state, metadata)
