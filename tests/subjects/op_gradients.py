"""Gradients of ops by every tensor among their arguments, held to the parity rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvt_fast.ops import map_tensors, reference, tensors_in
from pvt_fast.testing import assert_parity

Call = Callable[[Any, tuple], Tensor]  # of ops and arguments: an op's tensor


def gradients(call: Call, ops: Any, arguments: tuple, frozen: tuple[int, ...] = ()) -> list[Tensor]:
    """Of a fixed random projection of call(ops, arguments), by the tensors in them but for the arguments `frozen`."""
    leaves = tuple(
        map_tensors(value, lambda tensor, need=place not in frozen: tensor.detach().clone().requires_grad_(need))
        for place, value in enumerate(arguments)
    )
    output = call(ops, leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [leaf for leaf in tensors_in(leaves) if leaf.requires_grad]
    return list(torch.autograd.grad(output, wanted, direction.to(output)))


def redrawn(arguments: tuple, seed: int) -> tuple:
    """Arguments near these, by half of each tensor's own spread; those themselves for seed 0."""
    generator = torch.Generator().manual_seed(seed)

    def near(tensor: Tensor) -> Tensor:
        if seed == 0 or not tensor.numel():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor + 0.5 * tensor.float().std(correction=0).to(tensor) * noise

    return map_tensors(arguments, near)


def assert_gradients(
    ours: Callable[[tuple], list[Tensor]],
    call: Call,
    drawn: list[tuple],
    plain: Callable[[tuple], list[Tensor]],
    frozen: tuple[int, ...] = (),
) -> None:
    """ours(arguments) within the parity rule against plain(arguments), each gradient over all that was `drawn`.

    Of one draw the largest of a bias's few errors is luck: of torch's own gradients, taken twice in another order of
    sums, one in two hundred would not pass. Over some draws it is not.
    """
    found = []
    for arguments in drawn:
        cpu = map_tensors(arguments, lambda tensor: tensor.cpu())
        truth = gradients(call, reference, map_tensors(cpu, lambda tensor: tensor.double()), frozen)
        given = ours(arguments)
        assert [gradient.dtype for gradient in given] == [
            tensor.dtype
            for place, value in enumerate(arguments)
            if place not in frozen
            for tensor in tensors_in((value,))
        ]
        found.append(tuple(zip(given, truth, plain(cpu), strict=True)))
    for index, draws in enumerate(zip(*found, strict=True)):
        trio = (torch.cat([gradient.cpu().flatten() for gradient in each]) for each in zip(*draws, strict=True))
        assert_parity(*trio, what=f"gradient {index}")
