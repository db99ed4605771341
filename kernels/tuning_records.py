"""What tuning writes down: measured times in the user's cache directory, choices in the committed table tuned.json.

A file of times belongs to one GPU, one Triton and one state of the kernels' sources; all three are in its name. What
cannot be read or does not fit is told and ignored: it costs a measurement, never a forward pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton

from .config import Config

logger = logging.getLogger("pvt_fast")

TABLE = Path(__file__).with_name("tuned.json")

Times = list[tuple[Config, float]]  # medians in milliseconds, the default's first
Form = tuple[int | str | bool, ...]


class Key(NamedTuple):
    """What a choice holds for. The default is part of it: where config.py changes, old choices no longer apply."""

    arch: str  # of launch.Chip
    kernel: str
    form: Form  # widths, and what else the kernel is compiled for
    dtype: str
    default: tuple[tuple[str, Any], ...]


Measured = dict[tuple[Key, int], Times]  # by key and bucket of the launch's size


def directory() -> Path:
    """$PVT_FAST_CACHE, else pvt_fast in $XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("PVT_FAST_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pvt_fast"


@cache
def digest(folder: Path = TABLE.parent) -> str:
    """Of all sources of the kernels."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def cache_file(gpu: str) -> Path:
    """Where the times of this GPU are kept."""
    return directory() / f"{re.sub('[^A-Za-z0-9]+', '_', gpu)}-triton{triton.__version__}-{digest()}.json"


def read_times(path: Path) -> Measured:
    """What an earlier process measured; nothing if there is no such file or it makes no sense."""
    try:
        return dict(map(_measurement, json.loads(path.read_text())))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("kernels are tuned anew: the cache %s cannot be used (%s)", path, error)
        return {}


def write_times(path: Path, measured: Measured) -> None:
    """Replace the file as a whole, so that no process reads a part of it."""
    rows = [{**_key_row(key), "bucket": bucket, "times": times} for (key, bucket), times in measured.items()]
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            json.dump(rows, file, indent=1)
        os.replace(part, path)
    except OSError as error:
        logger.warning("choices of kernels are not kept for the next process: %s cannot be written (%s)", path, error)
        if part is not None:
            part.unlink(missing_ok=True)


def read_table(path: Path = TABLE) -> dict[Key, Config]:
    """The committed choices. The file is a part of the package: what is wrong with it raises."""
    table = json.loads(path.read_text())
    return {_key(row, arch): dict(row["choice"]) for arch, rows in table.items() for row in rows}


def table_text(choices: Iterable[tuple[Key, Config]]) -> str:
    """The committed table as a file: an entry to a line, in a fixed order."""
    by_arch: dict[str, list[str]] = {}
    for key, choice in sorted(choices, key=lambda item: str(item[0])):
        row = {name: value for name, value in _key_row(key).items() if name != "arch"}
        by_arch.setdefault(key.arch, []).append(json.dumps({**row, "choice": choice}))
    parts = [f"{json.dumps(arch)}: [\n" + ",\n".join(rows) + "\n]" for arch, rows in by_arch.items()]
    return "{" + ",\n".join(parts) + "}\n"


def _key_row(key: Key) -> dict[str, Any]:
    return {**key._asdict(), "default": dict(key.default)}


def _key(row: dict[str, Any], arch: str) -> Key:
    return Key(arch, row["kernel"], tuple(row["form"]), row["dtype"], tuple(row["default"].items()))


def _measurement(row: dict[str, Any]) -> tuple[tuple[Key, int], Times]:
    times = [(dict(shape), float(milliseconds)) for shape, milliseconds in row["times"]]
    if not times or tuple(times[0][0].items()) != tuple(row["default"].items()):
        raise ValueError(f"the first time of {row['kernel']} is not the default's")
    return (_key(row, row["arch"]), int(row["bucket"])), times
