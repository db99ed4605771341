"""What `pvt-fast doctor` shows: versions, processor, GPUs, and for each backend whether it can run here or why not."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from .. import __version__, backends
from ..backend.dispatch import BackendUnavailable, check_environment

_VARIABLES = ("PVT_FAST_BACKEND", "PVT_FAST_ISA", "PVT_FAST_CHECK_WEIGHTS")


def report() -> Table:
    """The facts as a table of two columns."""
    table = Table(show_header=False, title="pvt-fast doctor", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (*_versions(), *_machine(), *_backends(), *_environment()):
        table.add_row(name, escape(value))
    return table


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> list[tuple[str, str]]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    versions = {"pvt_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return [*versions.items(), ("triton", triton)]


def _machine() -> list[tuple[str, str]]:
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} logical processors"
    rows = [("system", platform.platform()), ("CPU", cpu_name()), ("threads", threads)]
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for index in gpus:
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory / 2**30
        rows.append((f"GPU {index}", f"{properties.name}, {memory:.0f} GiB, compute capability {capability}"))
    if not gpus:
        rows.append(("GPU", "none that torch can use"))
    return rows


def _backends() -> list[tuple[str, str]]:
    rows = []
    for status in backends():
        rows.append((f"backend {status.name}", "usable" if status.available else f"not usable: {status.reason}"))
        if status.name == "cpp":
            rows += _isas(status.available)
    return rows


def _isas(usable: bool) -> list[tuple[str, str]]:
    if not usable:
        return [("ISA", "unknown, as the cpp backend is not usable")]
    from ..backend import cpp  # importable only where it is usable

    return [("ISA in use", cpp.isa()), ("ISAs of this CPU", ", ".join(cpp.isas()))]


def _environment() -> list[tuple[str, str]]:
    rows = {name: os.environ.get(name) or "not set" for name in _VARIABLES}
    try:
        check_environment()
    except BackendUnavailable as error:
        rows["PVT_FAST_BACKEND"] = f"not usable: {error}"
    return list(rows.items())
