"""Which backend runs: the only place that decides, once per forward of the model.

`select(facts, own)` answers a backend of the contract of `ops`. "auto" takes the first in `ORDER` that supports the
facts and logs each refusal once; a backend asked for by name runs or raises `BackendUnavailable` with the same
sentence, it never falls back.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

from ..arguments import choice, shown
from ..ops import Backend, BackendMisconfigured, BackendUnavailable, Facts, cannot_run

logger = logging.getLogger("pvt_fast")

# Auto order; of each name the module that has it as `BACKEND`. Adding a backend is one module and one line here.
ORDER = {"triton": "pvt_fast.kernels", "cpp": "pvt_fast.backend.cpp", "reference": "pvt_fast.ops.reference"}


class BackendStatus(NamedTuple):
    """A backend's `name`, whether it can run on this machine, and if not the `reason`."""

    name: str
    available: bool
    reason: str | None


def check_name(name: str, source: str) -> str:
    return choice(source, name, ("auto", *ORDER))


# The environment is read once, at import, and checked when it is first followed, so that the command can still say
# what is wrong with it. `use_backend` overrides it, a model's own `backend` overrides both.
_environment = os.environ.get("PVT_FAST_BACKEND") or "auto"
_default: ContextVar[str] = ContextVar("pvt_fast_backend", default=_environment)


class _SeenByCompiler(threading.local):
    """`_default` as the compiler can see it: it guards on attributes of thread-local objects, not on context variables.

    So a change of default retraces a compiled model. Tasks that take turns on one thread share this copy.
    """

    def __init__(self) -> None:
        self.default = _environment


seen_by_compiler = _SeenByCompiler()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, models whose own `backend` is "auto" run on `name`, compiled ones too: they retrace."""
    token = _default.set(check_name(name, "use_backend: name"))
    seen_by_compiler.default = name
    try:
        yield
    finally:
        _default.reset(token)
        seen_by_compiler.default = _default.get()


def check_environment() -> None:
    """Raise BackendMisconfigured where the variable PVT_FAST_BACKEND names no backend."""
    try:
        check_name(_environment, "PVT_FAST_BACKEND")
    except ValueError as error:
        raise BackendMisconfigured(str(error)) from error


def environment_switch(name: str) -> bool:
    """Is the environment variable 1? BackendMisconfigured unless it is 0, 1, empty or not set."""
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise BackendMisconfigured(f"{name} must be 0 or 1, got {shown(value)}")
    return value == "1"


def requested(own: str) -> str:
    """The backend asked for, or "auto": by a model's `own` choice, by `use_backend`, or by the environment."""
    return _default.get() if own == "auto" else own


@cache
def loaded(name: str) -> Backend | BackendUnavailable:
    try:
        if name != "reference":  # what the others pack is compared, or not, by this variable
            environment_switch("PVT_FAST_CHECK_WEIGHTS")
        return importlib.import_module(ORDER[name]).BACKEND
    except BackendUnavailable as error:
        return error


def load(name: str, source: str = "load: name") -> Backend:
    """The backend of that name. ValueError where there is none; BackendUnavailable, with why, where it cannot be loaded
    here. source: what asks, for the words of the first.
    """
    backend = loaded(name if name in ORDER else choice(source, name, tuple(ORDER)))
    if isinstance(backend, BackendUnavailable):
        raise cannot_run(name, backend) from backend
    return backend


def select(facts: Facts, own: str = "auto") -> Backend:
    """The backend that runs for these facts; `own` is a model's own choice.

    Raises BackendUnavailable when a backend is requested by name and cannot run.
    """
    name = requested(own)
    if name != "auto":
        if name not in ORDER:
            check_environment()
        asked = load(name, "select: own")
        if (reason := asked.unsupported(facts)) is not None:
            raise cannot_run(name, reason)
        return asked
    for candidate in ORDER:
        backend, reason = usable(candidate, facts)
        if backend is not None:
            return backend
        log_refusal(candidate, reason)
    raise BackendUnavailable(f"no backend supports {facts}")


def usable(name: str, facts: Facts) -> tuple[Backend | None, str | None]:
    """(backend, None) where it can run on these facts, else (None, why not). BackendMisconfigured is raised."""
    # errors that are kept are never raised themselves: each time would add its frames to their traceback
    backend = loaded(name)
    if isinstance(backend, BackendMisconfigured):
        raise BackendMisconfigured(*backend.args)
    if isinstance(backend, BackendUnavailable):
        return None, str(backend)
    reason = backend.unsupported(facts)
    return (backend, None) if reason is None else (None, reason)


@cache
def log_refusal(name: str, reason: str | None) -> None:
    logger.info("backend %r is not used: %s", name, reason)


def backends() -> list[BackendStatus]:
    """Every backend with whether it can run on this machine (float32 on its best device), and if not why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    statuses = []
    for name in ORDER:
        try:
            reasons = [usable(name, Facts(kind, torch.float32))[1] for kind in dict.fromkeys((device, "cpu"))]
        except BackendMisconfigured as error:
            reasons = [str(error)]
        reason = None if None in reasons else reasons[0]
        statuses.append(BackendStatus(name, reason is None, reason))
    return statuses
