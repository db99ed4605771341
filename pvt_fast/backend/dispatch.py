"""Which backend runs: the only place that decides, once per forward of the model.

`select(facts, own)` answers a module that implements the contract of `ops`. "auto" takes the first backend in
`ORDER` that supports the facts and logs each refusal once; a backend asked for by name runs or raises
`BackendUnavailable` with the same sentence, it never falls back.
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
from types import ModuleType
from typing import NamedTuple

import torch

from ..arguments import choice, shown

logger = logging.getLogger("pvt_fast")

# Auto order; each name's module. Adding a backend is one module and one line here.
ORDER = {"triton": "pvt_fast.kernels", "cpp": "pvt_fast.backend.cpp", "reference": "pvt_fast.ops.reference"}


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here, or not on this input; the message says why."""


class BackendMisconfigured(BackendUnavailable):
    """A setting asks of a backend what this machine cannot do: "auto" does not pass over it."""


class Facts(NamedTuple):
    """All that a choice of backend may look at."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    dropout: bool = False  # a dropout rate above 0 is in force
    autocast: bool = False


class BackendStatus(NamedTuple):
    """A backend's `name`, whether it can run on this machine, and if not the `reason`."""

    name: str
    available: bool
    reason: str | None


def _check_name(name: str, source: str) -> str:
    return choice(source, name, ("auto", *ORDER))


# The environment is read once, at import, and checked when it is first followed, so that the command can still say
# what is wrong with it. `use_backend` overrides it, a model's own `backend` overrides both.
_environment = os.environ.get("PVT_FAST_BACKEND") or "auto"
_default: ContextVar[str] = ContextVar("pvt_fast_backend", default=_environment)


class _Traced(threading.local):
    """`_default` as the compiler can see it: it guards on attributes of thread-local objects, not on context variables.

    So a change of default retraces a compiled model. Tasks that take turns on one thread share this copy.
    """

    def __init__(self) -> None:
        self.default = _environment


traced = _Traced()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, models whose own `backend` is "auto" run on `name`, compiled ones too: they retrace."""
    token = _default.set(_check_name(name, "use_backend: name"))
    traced.default = name
    try:
        yield
    finally:
        _default.reset(token)
        traced.default = _default.get()


def check_environment() -> None:
    """Raise BackendMisconfigured where the variable PVT_FAST_BACKEND names no backend."""
    try:
        _check_name(_environment, "PVT_FAST_BACKEND")
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
def load(name: str) -> ModuleType | BackendUnavailable:
    """The backend's module, or the error that says why it cannot be loaded here."""
    try:
        if name != "reference":  # what the others pack is compared, or not, by this variable
            environment_switch("PVT_FAST_CHECK_WEIGHTS")
        return importlib.import_module(ORDER[name])
    except BackendUnavailable as error:
        return error


def cannot_run(name: str, reason: object) -> BackendUnavailable:
    """The error of a backend that was asked for by name."""
    return BackendUnavailable(f"backend {name!r} cannot run: {reason}")


def named(name: str, source: str) -> ModuleType:
    """The module of a backend asked for by name. ValueError where there is none of that name; BackendUnavailable, with
    why, where it cannot be loaded here.
    """
    module = load(choice(source, name, tuple(ORDER)))
    if isinstance(module, BackendUnavailable):
        raise cannot_run(name, module)
    return module


def select(facts: Facts, own: str = "auto") -> ModuleType:
    """The backend module that runs for these facts; `own` is a model's own choice.

    Raises BackendUnavailable when a backend is requested by name and cannot run.
    """
    name = requested(own)
    if name != "auto":
        if name not in ORDER:
            check_environment()
        asked = named(name, "select: own")
        if (reason := asked.unsupported(facts)) is not None:
            raise cannot_run(name, reason)
        return asked
    for candidate in ORDER:
        module = load(candidate)
        if isinstance(module, BackendMisconfigured):
            raise module
        reason = str(module) if isinstance(module, BackendUnavailable) else module.unsupported(facts)
        if reason is None and isinstance(module, ModuleType):
            return module
        _log_refusal(candidate, reason)
    raise BackendUnavailable(f"no backend supports {facts}")


@cache
def _log_refusal(name: str, reason: str | None) -> None:
    logger.info("backend %r is not used: %s", name, reason)


def backends() -> list[BackendStatus]:
    """Every backend with whether it can run on this machine (float32 on its best device), and if not why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    statuses = []
    for name in ORDER:
        module = load(name)
        if isinstance(module, BackendUnavailable):
            reason: str | None = str(module)
        else:
            facts = [Facts(kind, torch.float32) for kind in dict.fromkeys((device, "cpu"))]
            reasons = [module.unsupported(fact) for fact in facts]
            reason = None if None in reasons else reasons[0]
        statuses.append(BackendStatus(name, reason is None, reason))
    return statuses
