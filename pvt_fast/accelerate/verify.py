"""Does a block compute what its structure suggests? Tried out before its forward is replaced.

Modules with a peer's names may do something else with them: add a residual around the convolution, gate, pool in
another way. So each kind of block runs once on random numbers, its own forward against the reference of the ops, in
float64 and with random weights. Only then are its halves accelerated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import to_map
from .block_names import MAP, PAIR, Refusal
from .fused import FusedBlock
from .guard import is_constant, rate_of

# Relative to what the block adds to its input. Some peers compute the softmax in float32; a different meaning is orders
# of magnitude away.
_TOLERANCE = 1e-5


# In place of a block's own rates, some of which are 0: in evaluation none does anything.
_RATE = 0.25


def kind(block: nn.Module) -> tuple:
    """What two blocks share if trying one of them is enough."""

    def of(module: nn.Module) -> tuple:
        other = {k: v for k, v in vars(module).items() if is_constant(v) and k not in ("training", rate_of(module))}
        shapes = tuple(None if p is None else p.shape for p in module._parameters.values())
        return type(module), shapes, tuple(sorted(other.items(), key=lambda item: item[0]))

    return tuple((name, *of(module)) for name, module in block.named_modules())


def clone(block: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, with random weights, the block's buffers and no hooks. Raises Refusal."""
    try:
        copied = copy.deepcopy(block).to_empty(device="cpu").double()
    except Exception as error:
        raise Refusal(f"it cannot be copied to be tried out: {type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.normal_(0.0 if parameter.dim() > 1 else 0.5, fan_in**-0.5, generator=generator)
        for buffer, given in zip(copied.buffers(), block.buffers(), strict=True):
            if given.is_meta:
                buffer.zero_()
            else:
                buffer.copy_(given)
    for module in copied.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    return copied


def _scales_samples(module: nn.Module) -> bool:
    """Does stochastic depth, in training, multiply each sample by a number that it draws?"""
    x = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    module.train()
    with torch.random.fork_rng(devices=[]):
        for seed in range(4):
            torch.manual_seed(seed)
            scaled = module(x)
            torch.manual_seed(seed)
            if not torch.allclose(scaled, x * module(torch.ones_like(x[:, :1, :1]))):
                return False
    return True


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # which may be on where a model is accelerated
def verify(block: nn.Module, forward: Any, fused: FusedBlock) -> bool:
    """`forward(block, ...)`, on a `clone`, against the ops of `fused`; whether it returns a tuple. Raises Refusal."""
    depths = [module for module in fused.drop_paths.values() if module is not None]
    rates = [*fused.dropouts, *((module, "drop_prob") for module in depths)]
    for module, name in rates:
        setattr(module, name, _RATE)
    for module in depths:
        if not _scales_samples(module):
            raise Refusal(f"its {type(module).__name__} must multiply each sample by a number")
    returns_tuple = _compare(block.eval(), forward, fused)
    for module, name in rates:
        setattr(module, name, 0.0)
    _compare(block.train(), forward, fused)  # with no rate in force that is known
    return returns_tuple


def _compare(block: nn.Module, forward: Any, fused: FusedBlock) -> bool:
    """In the mode that the block is in; whether its forward returns a tuple. Raises Refusal."""
    ratio = max((m.kernel_size[0] for m in block.modules() if isinstance(m, nn.Conv2d)), default=1)
    hw = (2 * ratio + 3, ratio + 2)  # not square, and with a tail that the reduction drops
    tokens = torch.randn(
        2, hw[0] * hw[1], fused.channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    x = to_map(tokens, hw) if fused.layout.call == MAP else tokens
    size: tuple = {MAP: (), PAIR: (hw,)}.get(fused.layout.call, hw)
    try:
        with torch.random.fork_rng(devices=[]):  # what is not among the halves may draw
            torch.manual_seed(3)
            own = forward(block, x, *size)
            torch.manual_seed(3)
            ours = fused.compute(block, "reference", tokens, hw)
    except Exception as error:
        raise Refusal(f"it cannot be tried out: {type(error).__name__}: {error}") from error
    returns_tuple = isinstance(own, tuple)
    if isinstance(own, tuple) and len(own) == 1:
        own = own[0]
    if not isinstance(own, Tensor) or own.shape != x.shape:
        raise Refusal(f"its forward must return tokens as it takes them, got {type(own).__name__}")
    expected = to_map(ours, hw) if fused.layout.call == MAP else ours
    difference, added = float((own - expected).abs().max()), float((own - x).abs().max())
    if not difference <= _TOLERANCE * added:
        raise Refusal(
            f"its forward computes something else than its structure suggests (off by {difference / added:.0e})"
        )
    return returns_tuple
