"""Checkpoints: read them without running code from them, put them into a model, write them with their configuration.

A file written by `save_model` is safetensors with one metadata entry, `pvt_fast`: JSON that holds the arguments of
`PVT_V2`, the norms' epsilons and the preprocessing, so that `build_model` needs nothing else.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .model import PVT_V2
from .preprocess import Preprocess

METADATA_KEY = "pvt_fast"
# Names under which training scripts nest the state dict inside a .pth file.
_NESTS = ("model", "state_dict")


def load_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(state dict on the CPU, metadata) of a .safetensors, .pth or .pt file; metadata is empty unless safetensors.

    A .pth is read with `weights_only=True`: a pickle that would run code is refused. The state dict may be nested
    under "model" or "state_dict". Raises ValueError for a file that holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load_state: path must be an existing file, got {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"load_state: path must be a safetensors file, got {str(path)!r} ({error})") from error
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"load_state: path must end in .safetensors, .pth or .pt, got {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch's unpickler fails in whatever it does next
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"load_state: path must be a checkpoint of tensors only, got {str(path)!r} ({reason[0]})"
        ) from error
    return _state_dict(content, path), {}


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    nested = [content[name] for name in _NESTS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    state = nested[0] if nested else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"load_state: path must hold a state dict, bare or under one of {', '.join(_NESTS)}; got {str(path)!r}"
        )
    return dict(state)


def assign_state(model: PVT_V2, state: dict[str, Tensor]) -> None:
    """Copy a state dict with the official key names into the model.

    Raises ValueError, with the first names, when a key is missing, unknown or of another shape; the model is then
    unchanged.
    """
    own = model.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"assign_state: state must have the model's {len(own)} keys, got {'; '.join(found)}")
    model.load_state_dict(state)


def save_model(model: PVT_V2, path: str | os.PathLike, preprocess: Preprocess) -> None:
    """Write the weights with the model's configuration and preprocessing as safetensors."""
    description = {"config": asdict(model.config), "norm_eps": _norm_eps(model), "preprocess": asdict(preprocess)}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    # one entry only: the order of several is not fixed, and equal weights shall give equal files
    save_file(state, path, metadata={METADATA_KEY: json.dumps(description, sort_keys=True)})


def has_config(metadata: dict[str, str]) -> bool:
    """Whether the metadata are those of `save_model`."""
    return METADATA_KEY in metadata


def build_model(metadata: dict[str, str]) -> tuple[PVT_V2, Preprocess]:
    """The model that `save_model` described, with fresh weights, and its preprocessing. ValueError if it fits none."""
    try:
        description = json.loads(metadata[METADATA_KEY])
        model = PVT_V2(**description["config"])
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
    """The model in evaluation mode, and its preprocessing, from a file of `save_model`."""
    state, metadata = load_state(path)
    if not has_config(metadata):
        raise ValueError(f"load_model: path must be a file written by save_model, got {str(path)!r}")
    model, preprocess = build_model(metadata)
    assign_state(model, state)
    return model.eval(), preprocess


def _norm_eps(model: PVT_V2) -> dict[str, float]:
    """The arguments of `set_norm_eps` that restore the model's epsilons."""
    found: dict[str, set[float]] = {"block": set(), "patch_embed": set(), "reduction": set()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            kind = "patch_embed" if name.startswith("patch_embed") else "block"
            found["reduction" if name.endswith("attn.norm") else kind].add(module.eps)
    for kind, values in found.items():
        if len(values) > 1:
            raise ValueError(f"save_model: model must have one epsilon for its {kind} norms, got {sorted(values)}")
    return {kind: values.pop() for kind, values in found.items() if values}
