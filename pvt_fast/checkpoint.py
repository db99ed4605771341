"""Reading checkpoint files without running code from them, and finding the state dict inside."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Metadata entry of a file of `model_file.save_model`.
METADATA_KEY = "pvt_fast"
# Names under which training scripts nest the state dict.
_NESTS = ("state_dict", "model", "module")
_PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)


def load_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(state dict on the CPU, metadata) of a .safetensors, .pth, .pt or .bin file; only safetensors has metadata.

    Pickled files are read with `weights_only=True`: one that would run code is refused. The state dict may be nested
    under "state_dict", "model" or "module". Raises ValueError for a file that holds no state dict.
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
    if path.suffix not in _PICKLES:
        raise ValueError(f"load_state: path must end in {', '.join(_PICKLES)} or .safetensors, got {str(path)!r}")
    try:
        # the official training script keeps its arguments, a plain Namespace, beside the weights
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch's unpickler fails in whatever it does next
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"load_state: path must be a checkpoint of tensors only, got {str(path)!r} ({reason[0]})"
        ) from error
    try:
        return unnest(content), {}
    except ValueError as error:
        raise ValueError(
            f"load_state: path must hold a state dict, bare or under one of {', '.join(_NESTS)}; got {str(path)!r}"
        ) from error


def unnest(content: Any) -> dict[str, Tensor]:
    """The state dict in what a training script saved. ValueError if there is none."""
    while isinstance(content, Mapping):
        inner = [content[name] for name in _NESTS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"load_weights: source must hold a state dict, got {type(content).__name__} without one")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"load_weights: source must be a state dict, names to tensors, got {name!r}: {type(value).__name__}"
            )
    return dict(content)
