"""Reading checkpoint files without running code from them, and finding the state dict inside."""

from __future__ import annotations

import io
import os
import reprlib
import struct
import threading
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..ops.packing import available, extent
from .pickles import require_bounded, require_filled

# Metadata entry of a file of `model_file.save_model`.
METADATA_KEY = "pvt_fast"
# Names under which training scripts nest the state dict, and how often at most.
_NESTS = ("state_dict", "model", "module")
_DEEPEST = 8
_PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
_LONGEST_REASON = 300
_ARCHIVE, _PICKLE = b"PK\x03\x04", "data.pkl"  # how one begins, and what it holds beside storages
# What archives end with, where they are large and where not, and before it where the list of entries is that precedes.
_TAIL, _END, _END64, _PLACE64 = struct.Struct("<4s36xQQ4s4xQ4x4s8xLLH"), b"PK\5\6", b"PK\6\6", b"PK\6\7"
_END_SIZE = 22
_HEADER = "<26xHH"  # of an entry: the lengths of its name and of what else stands before its bytes
_FOLDER, _CHUNK = 0x10, 1 << 20  # the attribute of folders in archives; bytes
# How torch begins to advise to read a refused pickle as code.
_ADVICE = "Weights only load failed"
# torch's list of what a pickle may name is one for all threads.
_LOADING = threading.Lock()


def load_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(state dict on the CPU, metadata) of a .safetensors, .pth, .pt or .bin file; only safetensors has metadata.

    Pickled files are read with `weights_only=True`: one that would run code is refused. The state dict may be nested
    under "state_dict", "model" or "module". Memory and time are in proportion to the file (see `pickles`). Raises
    ValueError for a file that holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load_state: path must be an existing file, got {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except Exception as error:  # its own, the system's, and torch's for a dtype that it lacks
            raise ValueError(
                f"load_state: path must be a safetensors file, got {str(path)!r} ({reason(error)})"
            ) from error
    if path.suffix not in _PICKLES:
        raise ValueError(f"load_state: path must end in {', '.join(_PICKLES)} or .safetensors, got {str(path)!r}")
    try:
        content = _unpickle(path)
    except Exception as error:  # on a damaged file torch's unpickler fails in whatever it does next
        raise ValueError(
            f"load_state: path must be a checkpoint of tensors only, got {str(path)!r} ({reason(error)})"
        ) from error
    try:
        state = unnest(content)
        # tensors may share a storage, or repeat its values
        size = sum(value.nbytes for value in state.values() if _not_values(value) is None)
        if size > path.stat().st_size:
            raise ValueError(f"its tensors have {size} bytes, more than the file")
        return state, {}
    except ValueError as error:
        raise ValueError(
            f"load_state: path must hold a state dict, bare or under one of {', '.join(_NESTS)}; got {str(path)!r} "
            f"({reason(error)})"
        ) from error


def _unpickle(path: Path) -> Any:
    with open(path, "rb") as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE  # as torch decides it
    if is_archive:
        _require_whole(path)
    else:
        require_filled(path)
    with _LOADING:
        # the official training script keeps its arguments, a plain Namespace, beside the weights
        allowed = Namespace in torch.serialization.get_safe_globals()
        with nullcontext() if allowed else torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _require_whole(path: Path) -> None:
    """Raise where an archive is not as torch writes it, which torch itself does not look for.

    It takes what it finds in memory for an entry marked as a folder, takes changed bytes for good, and unpacks
    compressed or overlapping entries to any size.
    """
    _require_one_directory(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            folder = entry.is_dir() or entry.external_attr & _FOLDER
            if folder or entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"its entry {printable(entry.filename)} is not stored as torch stores it")
        if (size := sum(entry.file_size for entry in entries)) > path.stat().st_size:
            raise ValueError(f"its entries have {size} bytes, more than the file")
        for entry in entries:
            if entry.CRC:  # torch can be told to write none
                with archive.open(entry) as stream:
                    while stream.read(_CHUNK):
                        pass
            if entry.filename.lower().endswith(_PICKLE):  # torch's reader makes no difference of case
                require_bounded(_stored(path, entry))


def _require_one_directory(path: Path) -> None:
    """Raise where two readers could find two lists of entries: one must end where the records of its place begin."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(length - _TAIL.size, 0))
        tail = file.read().rjust(_TAIL.size, b"\0")
    sign64, size64, start64, sign_place, place64, sign, size, start, comment = _TAIL.unpack(tail)
    end = length - _TAIL.size
    if sign_place == _PLACE64:
        whole = sign64 == _END64 and place64 == end
        size, start = size64, start64
    else:
        whole, end = True, length - _END_SIZE
    if not whole or sign != _END or comment or start + size != end:
        raise ValueError("it must end with one list of its entries, as torch writes it")


def _stored(path: Path, entry: zipfile.ZipInfo) -> IO[bytes]:
    """An entry's bytes, which `zipfile` does not give where they have no checksum."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        name, extra = struct.unpack(_HEADER, file.read(struct.calcsize(_HEADER)))
        file.seek(name + extra, os.SEEK_CUR)
        return io.BytesIO(file.read(entry.file_size))


def unnest(content: Any) -> dict[str, Tensor]:
    """The state dict in what a training script saved. ValueError if there is none."""
    for _ in range(_DEEPEST + 1):
        inner = [content[name] for name in _NESTS if name in content] if isinstance(content, Mapping) else []
        inner = [nested for nested in inner if isinstance(nested, Mapping)]
        if not inner:
            break
        content = inner[0]
    else:
        raise ValueError(f"load_weights: source must nest its state dict at most {_DEEPEST} deep, got a deeper one")
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"load_weights: source must hold a state dict, got {type(content).__name__} without one")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"load_weights: source must be a state dict, names to tensors, got {reprlib.repr(name)}: "
                f"{type(value).__name__}"
            )
    return dict(content)


def require_values(op: str, name: str, value: Tensor) -> None:
    """Raise ValueError, as `op`, where a tensor is no plain one with real floating-point values in memory."""
    if (got := _not_values(value)) is not None:
        raise ValueError(f"{op}: {printable(name)} must be a plain tensor of floating-point values, got {got}")


def require_memory(op: str, name: str, parameter: Tensor) -> None:
    """Raise ValueError, as `op`, for a plain tensor that cannot be written into; of others their class decides."""
    if not _is_plain(parameter):
        return
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        got = "an inference tensor outside torch.inference_mode()"
    elif extent(parameter) > available(parameter):
        got = "one whose memory was released"
    elif is_expanded(parameter):
        got = "one with more elements than memory"
    else:
        return
    raise ValueError(f"{op}: model must have memory of its own to write for {name}, got {got}")


def _not_values(value: Tensor) -> str | None:
    if not _is_plain(value):
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        return f"a {type(value).__name__} ({kind})"
    if not value.dtype.is_floating_point:
        return f"one of {value.dtype}"
    if value.is_meta:
        return "one on the meta device"
    return "one whose memory was released" if extent(value) > available(value) else None


def _is_plain(value: Tensor) -> bool:
    """Does one storage hold all of a tensor's values, and nothing else?"""
    wrapper = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not (wrapper or value.is_nested or value.is_quantized) and value.layout == torch.strided


def memory_of(value: Tensor) -> int | None:
    """The address of a plain tensor's storage, by which two are known to share it."""
    return value.untyped_storage().data_ptr() if _is_plain(value) else None


def is_expanded(value: Tensor) -> bool:
    """Does a plain tensor have more elements than its memory? Such a tensor is as large as its shape pretends."""
    return value.numel() * value.element_size() > value.untyped_storage().nbytes()


def reason(error: Exception) -> str:
    """An error's first line, or its kind where it says nothing; of torch's unpickler what it met, not its advice."""
    said = str(error).partition("WeightsUnpickler error: ")
    lines = [line for line in (said[2] or said[0]).splitlines() if line.strip() and not line.startswith(_ADVICE)]
    lines = lines or [type(error).__name__]
    return "".join(filter(str.isprintable, lines[0].partition(". Please use")[0]))[:_LONGEST_REASON]


def printable(name: str) -> str:
    """A name from a file as it can stand in a sentence."""
    return name if len(name) <= _LONGEST_REASON and name.isprintable() else reprlib.repr(name)
