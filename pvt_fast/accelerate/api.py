"""Accelerate a model that one already has: its PVT v2 and SegFormer blocks run on the ops of this package.

    report = pvt_fast.accelerate_(model)
    print(report)                        # what runs on the ops now, and what does not, and why
    pvt_fast.restore_(model)

A block is replaced in nothing but its class, by a subclass of it with another forward, as torch's parametrizations and
`fully_shard` do: parameters, state_dict keys, hooks on the block, optimizers and `isinstance` know no difference.
Copies and pickles are accelerated too. Where a call cannot run on the ops (see `fused`) the block's own
forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..arguments import flag, function, instance
from ..backend import dispatch
from ..ops import packing
from .fused import FusedBlock, Settings, StandIn
from .guard import ACCELERATED_FROM, own_class
from .recognise import HALVES, LAYOUTS, Outcome, adapt, recognise

STATE = "_pvt_fast"


@dataclass(frozen=True)
class AcceleratedBlock:
    """A block that runs on the ops: its path in the model, the layout it was recognised by, its accelerated halves.

    `note` says what keeps it on its own forward for now, such as hooks on inner modules; else it is empty.
    """

    path: str
    peer: str
    halves: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class SkippedBlock:
    """A block, or one half of it, that keeps its own code: its path, its layout, and the reason."""

    path: str
    peer: str
    reason: str


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate_` did, block by block; `str` of it is for reading."""

    accelerated: tuple[AcceleratedBlock, ...]
    skipped: tuple[SkippedBlock, ...]

    def __str__(self) -> str:
        if not self.accelerated and not self.skipped:
            known = ", ".join(layout.name for layout in LAYOUTS)
            return f"no block of a known layout was found ({known})"
        lines = [f"{len(self.accelerated)} blocks accelerated, {len(self.skipped)} times not"]
        for block in self.accelerated:
            note = f" (for now not: {block.note})" if block.note else ""
            lines.append(f"  {block.path or 'the model'}: {block.peer}, {' and '.join(block.halves)}{note}")
        lines += [f"  {block.path or 'the model'}: {block.peer}, not: {block.reason}" for block in self.skipped]
        return "\n".join(lines)


class AccelerationError(RuntimeError):
    """`accelerate_` with strict=True could not accelerate all; `report` tells what it could, the model is unchanged."""

    def __init__(self, report: AccelerationReport) -> None:
        super().__init__(f"accelerate_: model must be accelerated as a whole with strict=True, got {report}")
        self.report = report


def accelerate_(
    model: nn.Module,
    *,
    backend: str = "auto",
    attention: bool = True,
    mlp: bool = True,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
) -> AccelerationReport:
    """Let the PVT v2 and SegFormer blocks of `model` run on this package's ops, in place.

    Blocks are recognised by structure, whatever package or file they come from: the official layout, timm's,
    transformers' PvtV2, SegFormer and GLPN, mmdet's and mmseg's, segmentation_models_pytorch's. Each kind of block is
    tried out on random numbers against its own forward before it is changed.

    backend: "auto", "reference", "cpp" or "triton". With "auto" a block keeps its own forward where only the reference
        would be left; a backend by name runs or raises BackendUnavailable.
    attention, mlp: which halves of a block; the other runs the block's own modules.
    filter_fn: called with the path and the module of each recognised block; False leaves the block alone.
    strict: raise AccelerationError, and change nothing, unless some block was found and all of them can be accelerated.

    A block accelerated before takes the new settings.
    """
    instance("accelerate_: model", model, nn.Module, "an nn.Module")
    dispatch.check_name(backend, "accelerate_: backend")
    if backend != "auto":
        dispatch.load(backend, "accelerate_: backend")
    for name, value in (("attention", attention), ("mlp", mlp), ("strict", strict)):
        flag(f"accelerate_: {name}", value)
    if filter_fn is not None:
        function("accelerate_: filter_fn", filter_fn, "callable with a path and a module, or None")
    halves = tuple(name for name, wanted in zip(HALVES, (attention, mlp), strict=True) if wanted)
    if not halves:
        raise ValueError("accelerate_: attention or mlp must be True, got False for both")
    settings = Settings(backend)
    ready: list[tuple[nn.Module, FusedBlock]] = []
    accelerated, skipped, failed = [], [], False
    tried: dict[Any, Any] = {}
    for path, block in model.named_modules():
        base = own_class(block)
        layout = recognise(block, base.forward)
        if layout is None:
            continue
        if isinstance(vars(block).get("_fused"), StandIn):
            skipped.append(SkippedBlock(path, "pvt_fast", "it runs on the ops by itself"))
            continue
        if filter_fn is not None and not filter_fn(path, block):
            skipped.append(SkippedBlock(path, layout.name, "filter_fn left it out"))
            continue
        taken = _taken(block)
        if taken:
            outcome = Outcome(None, dict.fromkeys(halves, taken))
        else:
            outcome = adapt(block, base.forward, layout, settings, halves, tried)
        failed = failed or bool(outcome.refusals)
        skipped += [SkippedBlock(path, layout.name, f"{half}: {why}") for half, why in outcome.refusals.items()]
        if outcome.fused is not None:
            ready.append((block, outcome.fused))
            note = outcome.fused.guard.disturbed(block) or ""
            accelerated.append(AcceleratedBlock(path, layout.name, tuple(outcome.fused.halves), note))
    report = AccelerationReport(tuple(accelerated), tuple(skipped))
    if strict and (failed or not accelerated):
        raise AccelerationError(report)
    for block, fused in ready:
        _attach(block, fused)
    return report


def restore_(model: nn.Module) -> None:
    """Undo `accelerate_` in all of `model`, exactly.

    Raises RuntimeError, and changes nothing, if another library has since put a class of its own over an accelerated
    block.
    """
    instance("restore_: model", model, nn.Module, "an nn.Module")
    blocks = [(path, block) for path, block in model.named_modules() if isinstance(block, _Accelerated)]
    for path, block in blocks:
        if _subclass(own_class(block)) is not type(block):
            raise RuntimeError(
                f"restore_: {path or 'model'} must be of the class that accelerate_ gave it, got {type(block)}"
            )
    for _, block in blocks:
        _detach(block)


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[AccelerationReport]:
    """Within the block, `model` is accelerated; `options` are those of `accelerate_`. After it, it is as before."""
    instance("accelerated: model", model, nn.Module, "an nn.Module")
    before = {block: vars(block)[STATE] for block in model.modules() if isinstance(block, _Accelerated)}
    report = accelerate_(model, **options)
    try:
        yield report
    finally:
        restore_(model)
        for block, fused in before.items():
            _attach(block, fused)


class _Accelerated(nn.Module):
    """What the classes of accelerated blocks have in common."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _blank, (own_class(self),), self.__getstate__()

    def train(self, mode: bool = True) -> Any:
        packing.doubt()
        return super().train(mode)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks for this: TorchScript compiles a block's own code, so the block is restored."""
        _detach(self)
        return self


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    """The class of accelerated blocks of class `base`, under the same name."""
    if base not in _subclasses:
        _subclasses[base] = _make_subclass(base)
    return _subclasses[base]


def _make_subclass(base: type[nn.Module]) -> type[nn.Module]:
    known = base.forward

    @functools.wraps(known)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if base.forward is not known:  # replaced on the class since
            return base.forward(self, *args, **kwargs)
        result = self.__dict__[STATE].run(self, args, kwargs)
        return known(self, *args, **kwargs) if result is None else result

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (_Accelerated, base), {**names, "forward": forward, ACCELERATED_FROM: base})


def _blank(base: type[nn.Module]) -> nn.Module:
    """An accelerated block of class `base` without its state, which a copy or a pickle brings."""
    kind = _subclass(base)
    return kind.__new__(kind)


def _taken(block: nn.Module) -> str | None:
    """Why another forward must not be put in place of this block's."""
    if "forward" in vars(block):
        return "it has a forward of its own, set on the instance"
    if isinstance(block, _Accelerated) and type(block) is not _subclass(own_class(block)):
        return "another library has put a class over the accelerated one"
    given = type(block)
    try:  # its class, metaclass or __setattr__ may refuse
        block.__class__ = _subclass(own_class(block))
        block.__class__ = given
    except Exception as error:
        return f"no subclass can take the place of its class {given.__name__}: {type(error).__name__}: {error}"
    return None


def _attach(block: nn.Module, fused: FusedBlock) -> None:
    block.__class__ = _subclass(own_class(block))
    vars(block)[STATE] = fused


def _detach(block: nn.Module) -> None:
    block.__class__ = own_class(block)
    del vars(block)[STATE]
