"""Weights in the forms that kernels read: dense, or packed once and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pvt_fast.ops import Linear
from pvt_fast.ops.packing import packed

from .workspace import off_capture

T = TypeVar("T")


def packed_off_capture(
    kind: str, tensors: tuple[Tensor | None, ...], build: Callable[[], T], products: torch.dtype | None = None
) -> T:
    """The packed form of `tensors`, kept or from `build()`, made `off_capture`. The first tensor is never None. What is
    packed with `products` is kept beside what is without.
    """
    assert tensors[0] is not None
    device = tensors[0].device
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}

    def own(tensor: Any) -> Any:
        """A packed form lives until its weights' memory is freed: it must not be what keeps that alive."""
        shared = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in given
        return tensor.clone() if shared else tensor

    def build_own() -> T:
        form: Any = build()
        return type(form)(*map(own, form)) if isinstance(form, tuple) else own(form)

    kind = f"triton {kind}" if products is None else f"triton {kind} {products}"
    return packed(kind, None, tensors, lambda _: off_capture(build_own, device))


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Weights as kernels read them, one element after another; views of others' memory may be spread over it."""
    return tuple(None if tensor is None else tensor.resolve_neg().contiguous() for tensor in tensors)


def in_products(linear: Linear, products: torch.dtype | None) -> Linear:
    """The weight of a linear in the dtype of its products, converted once and kept. Kernels read a bias as it is."""
    weight = linear.weight
    if products is None or weight.dtype == products:
        return linear
    return Linear(packed_off_capture("linear", (weight,), lambda: weight.detach().to(products), products), linear.bias)


def inputs_last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weight (Cout, Cin, k, k) as (Cout, k, k, Cin)."""
    return weight.detach().permute(0, 2, 3, 1).to(dtype).contiguous()
