"""A model in one file: weights, configuration and preprocessing.

A file written by `save_model` is safetensors with one metadata entry, `pvt_fast`: JSON that holds the arguments of
`PVT_V2`, the norms' epsilons and the preprocessing, so that `build_model` needs nothing else.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import torch
from safetensors.torch import save_file

from .arguments import instance
from .checkpoint import METADATA_KEY, load_state
from .description import describe, settle, take_dtypes, tensors
from .model import PVT_V2
from .preprocess import Preprocess
from .weights import assign


def save_model(model: PVT_V2, path: str | os.PathLike, preprocess: Preprocess) -> None:
    """Write the weights with the model's configuration and preprocessing as safetensors.

    Raises ValueError, and writes nothing, for a model that `load_model` would not bring back: see `save_pretrained`.
    """
    instance("save_model: model", model, PVT_V2, "a PVT_V2")
    instance("save_model: path", path, (str, os.PathLike), "a path")
    instance("save_model: preprocess", preprocess, Preprocess, "a Preprocess")
    description = {**describe("save_model", model, PVT_V2), "preprocess": asdict(preprocess)}
    # one entry only: the order of several is not fixed, and equal weights shall give equal files
    save_file(tensors(model), path, metadata={METADATA_KEY: json.dumps(description, sort_keys=True)})


def has_config(metadata: dict[str, str]) -> bool:
    """Whether the metadata are those of `save_model`."""
    return METADATA_KEY in metadata


def build_model(metadata: dict[str, str]) -> tuple[PVT_V2, Preprocess]:
    """The model that `save_model` described, with fresh weights, and its preprocessing. ValueError if it fits none."""
    try:
        description = json.loads(metadata[METADATA_KEY])
        model = PVT_V2(**description["config"])
        settle(model, description)
        model.set_norm_eps(**description["norm_eps"])
        preprocess = Preprocess(**description["preprocess"])
        model.config.map_sizes(preprocess.size, preprocess.size)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"build_model: metadata must describe a PVT_V2, got {error!r}") from error
    if preprocess.in_channels != model.config.in_channels:
        raise ValueError(
            f"build_model: preprocess must give the model's {model.config.in_channels} channels, "
            f"got {preprocess.in_channels}"
        )
    return model, preprocess


def load_model(path: str | os.PathLike) -> tuple[PVT_V2, Preprocess]:
    """The model in evaluation mode, and its preprocessing, from a file of `save_model`.

    In float32, which float16 and bfloat16 fit into; parameters that the file has in float64 stay so.
    """
    instance("load_model: path", path, (str, os.PathLike), "a path")
    state, metadata = load_state(path)
    if not has_config(metadata):
        raise ValueError(f"load_model: path must be a file written by save_model, got {str(path)!r}")
    model, preprocess = build_model(metadata)
    take_dtypes(model, {name: value for name, value in state.items() if value.dtype == torch.float64})
    assign(model, state, model.norm_eps())
    return model.eval(), preprocess
