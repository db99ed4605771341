"""Calls of the five ops by the names of their arguments, so that a test can change any of them, and guarded memory."""

from __future__ import annotations

import ctypes
import inspect
import mmap
from typing import Any

import torch
from torch import Tensor

from pvt_fast import testing
from pvt_fast.backend import registered
from pvt_fast.ops import reference
from pvt_fast.ops.checks import OPERANDS
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase

Call = dict[str, Any]  # arguments of an op by their names


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[str, Call]]:
    """By name (op, arguments) of small valid calls, which together have every operand that there is."""
    cases = {
        "patch_embed": PatchEmbedCase(2, (9, 10), 3, 16, kernel=7, stride=4),
        "attention": AttentionCase(2, (6, 5), 16, 2, sr_ratio=2, scale_residual=True),
        "attention linear": AttentionCase(2, (6, 5), 16, 2, linear=True, scale_residual=True),
        "mlp": MlpCase(2, (6, 5), 16, 24, scale_residual=True),
    }
    made = {name: named(case.op, *case.make(dtype)) for name, case in cases.items()}
    draw = testing.Draw("small ops", dtype, "cpu")
    made["layer_norm"] = named("layer_norm", draw.normal(2, 5, 16), draw.norm(16, 1e-5))
    made["head"] = named("head", draw.normal(2, 5, 16), draw.linear(7, 16))
    return {name: (name.partition(" ")[0], call) for name, call in made.items()}


def named(op: str, *arguments: Any) -> Call:
    names = [name for name in inspect.signature(getattr(reference, op)).parameters if name != "products"]
    return dict(zip(names, arguments, strict=True))


def tensors(op: str, call: Call) -> dict[str, Tensor]:
    """The tensors of a call by their places: activations, every weight of the table, residual_scale."""
    places = ["image", "x", *(operand.name for operand in OPERANDS[op]), "residual_scale"]
    found = {place: get(call, place) for place in places}
    return {place: value for place, value in found.items() if value is not None}


def get(value: Any, place: str) -> Any:
    """`call["w"].norm.eps` for place "w.norm.eps"; None where there is nothing."""
    for name in place.split("."):
        if isinstance(value, dict):
            value = value.get(name)
        elif name.isdigit():
            value = value[int(name)]
        else:
            value = getattr(value, name, None)
    return value


def put(value: Any, place: str, new: Any) -> Any:
    """A call with another value in that place."""
    name, _, rest = place.partition(".")
    if isinstance(value, dict):
        return {**value, name: put(value[name], rest, new) if rest else new}
    return value._replace(**{name: put(getattr(value, name), rest, new) if rest else new})


def flat(op: str, call: Call, backend: str) -> list[Any]:
    """The arguments of `torch.ops.pvt_fast.<op>`."""
    return [*registered.SIGNATURES[op].flat(tuple(call.values())), backend]


_guarded: list[mmap.mmap] = []  # alive, as their pages are never to be used for anything else


def beside_unreadable(values: Tensor, end: bool) -> Tensor:
    """The same values, flush against a page that cannot be read: after their end, or before their begin."""
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, mmap.PAGESIZE + pages + mmap.PAGESIZE)
    _guarded.append(memory)
    offset = mmap.PAGESIZE + (pages - size if end else 0)
    copied = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    copied.copy_(values)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + mmap.PAGESIZE + pages):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
    return copied
