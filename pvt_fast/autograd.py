"""Gradients for backends that have none of their own: their forward, the reference's backward.

`differentiable(module)` offers a backend's ops with autograd. The backward recomputes the op with the reference, so
a training step keeps only each op's arguments alive, not its inner activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference

_OPS = ("overlap_patch_embed", "sr_attention", "dwconv_mlp", "layer_norm", "head")


@cache
def differentiable(module: ModuleType) -> Any:
    """`module` itself if it is the reference; else its ops wrapped so that gradients flow through them."""
    if module is reference:
        return module
    wrapped = {name: _wrap(getattr(module, name), getattr(reference, name)) for name in _OPS}
    return SimpleNamespace(__name__=module.__name__, **wrapped)


def _wrap(fast: Callable, slow: Callable) -> Callable:
    def op(*args: Any) -> Any:
        tensors: list[Tensor] = []
        template = _flatten(args, tensors)
        return _ReferenceBackward.apply(fast, slow, template, *tensors)

    op.__name__ = fast.__name__
    return op


class _Slot(int):
    """The place of a tensor in the flat list of an op's tensors."""


def _flatten(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    if isinstance(value, tuple):
        items = [_flatten(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _unflatten(template: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(template, _Slot):
        return tensors[template]
    if isinstance(template, tuple):
        items = [_unflatten(item, tensors) for item in template]
        return type(template)(*items) if hasattr(template, "_fields") else tuple(items)
    return template


class _ReferenceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Callable, slow: Callable, template: tuple, *tensors: Tensor) -> Any:
        ctx.slow, ctx.template = slow, template
        ctx.save_for_backward(*tensors)
        # the original tensors, not detached copies, so that the backend finds its packed weights again
        return fast(*_unflatten(template, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        template = ctx.template

        def recompute(*tensors: Tensor) -> Tensor:
            output = ctx.slow(*_unflatten(template, tensors))
            return output[0] if isinstance(output, tuple) else output

        grads = reference_gradients(recompute, ctx.saved_tensors, ctx.needs_input_grad[3:], grad_outputs[0])
        return (None, None, None, *grads)


def reference_gradients(
    recompute: Callable[..., Tensor], arguments: Sequence[Any], needed: Sequence[bool], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `recompute(*arguments)` by autograd; None for the arguments whose gradient is not needed."""
    leaves = tuple(
        value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
        for value, need in zip(arguments, needed, strict=True)
    )
    with torch.enable_grad():
        output = recompute(*leaves)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, allow_unused=True))
    return tuple(next(grads) if need else None for need in needed)
