"""Blocks of other implementations, recognised by their structure: which layout, and what of it can run on the ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .block_names import BlockLayout, Refusal
from .fused import FusedBlock, Settings
from .peers import LAYOUTS
from .read import read_attention, read_mlp, require_nothing_else
from .verify import clone, kind, verify

HALVES = ("attention", "mlp")


class Outcome(NamedTuple):
    """A block's new forward, if any half could be accelerated, and why others could not be."""

    fused: FusedBlock | None
    refusals: dict[str, str]


def recognise(block: nn.Module, forward: Any) -> BlockLayout | None:
    """The layout that `block`, whose class has this `forward`, is of."""
    if not block._modules or isinstance(block, torch.jit.ScriptModule):
        return None
    best = max(LAYOUTS, key=lambda layout: layout.fits(block, forward))
    return best if best.fits(block, forward) else None


def adapt(
    block: nn.Module,
    forward: Any,
    layout: BlockLayout,
    settings: Settings,
    halves: tuple[str, ...],
    tried: dict[Any, Verdict],
) -> Outcome:
    """Read `halves` of a block and try them out; the block stays as it is. `tried` keeps verdicts on kinds of block."""
    found, refusals = _read(block, layout, halves)
    if not found:
        return Outcome(None, refusals)
    key = (kind(block), layout.name, tuple(found))
    if key not in tried:
        tried[key] = _try_out(block, forward, layout, tuple(found))
    verdict = tried[key]
    refusals |= verdict.refusals
    sound = {name: half for name, half in found.items() if name in verdict.sound}
    if not sound:
        return Outcome(None, refusals)
    fused = FusedBlock(layout, settings, block, forward, sound)
    fused.refusals = refusals
    fused.returns_tuple = verdict.returns_tuple
    return Outcome(fused, refusals)


class Verdict(NamedTuple):
    """Which halves of a kind of block compute what they seem to, and why others were refused."""

    sound: tuple[str, ...]
    refusals: dict[str, str]
    returns_tuple: bool = False


def _read(block: nn.Module, layout: BlockLayout, halves: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        require_nothing_else(block, layout.attention, layout.mlp)
    except Refusal as refusal:
        return {}, dict.fromkeys(halves, str(refusal))
    readers: dict[str, Any] = {"attention": read_attention, "mlp": read_mlp}
    found, refusals = {}, {}
    for name in halves:
        try:
            found[name] = readers[name](block, getattr(layout, name))
        except Refusal as refusal:
            refusals[name] = str(refusal)
    return found, refusals


def _try_out(block: nn.Module, forward: Any, layout: BlockLayout, halves: tuple[str, ...]) -> Verdict:
    try:
        copied = clone(block)
    except Refusal as refusal:
        return Verdict((), dict.fromkeys(halves, str(refusal)))

    def trial(names: tuple[str, ...]) -> str | bool:
        """Whether the forward returns a tuple; or why it cannot be replaced."""
        try:
            fused = FusedBlock(layout, Settings("reference"), copied, forward, _read(copied, layout, names)[0])
            return verify(copied, forward, fused)
        except Refusal as refusal:
            return str(refusal)

    together = trial(halves)
    if isinstance(together, bool):
        return Verdict(halves, {}, together)
    if len(halves) == 1:
        return Verdict((), {halves[0]: together})
    alone = {name: trial((name,)) for name in halves}
    sound = [name for name, result in alone.items() if isinstance(result, bool)]
    if len(sound) == len(halves):  # each alone, and not both: nothing is known of such a block
        return Verdict((), dict.fromkeys(halves, together))
    refusals = {name: str(result) for name, result in alone.items() if name not in sound}
    return Verdict(tuple(sound), refusals, any(alone[name] is True for name in sound))
