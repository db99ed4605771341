"""What the ops are called with: every operand of the table spoiled in every way is refused, what torch computes is
computed, and nothing is read that is not an operand's own memory.

What might end the process runs in one of its own, which tells of each case before it and after it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest
import torch
from op_calls import Call, beside_unreadable, calls, flat, get, put, tensors
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pvt_fast import _C
from pvt_fast.backend import cpp, dispatch
from pvt_fast.backend import registered as library
from pvt_fast.ops import NAMES, AttentionSpec, Linear, MlpSpec, Norm, reference
from pvt_fast.ops.checks import OPERANDS, operands_of
from pvt_fast.ops.packing import span
from pvt_fast.testing import assert_parity

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, that sparse and nested tensors may still change

# Operands whose shapes tell an op's sizes: of a wrong one another is said not to fit it.
GIVE_SIZES = {"image", "x", "w.proj.weight", "w.q.weight", "w.fc1.weight", "w.sr.weight", "w.weight"}
# Tensors that torch lets nobody ask for a shape.
REFUSED_BY_TORCH = {"nested", "an uninitialized parameter"}
# Dimensions of the activations that may have any size.
FREE = {"patch_embed": {0, 2, 3}, "layer_norm": {0, 1}, "head": {0, 1}}

WAYS: dict[str, Callable[[str, Call, str], Any]] = {
    "direct": lambda op, call, backend: getattr(dispatch.load(backend), op)(**call),
    "torch.ops": lambda op, call, backend: getattr(torch.ops.pvt_fast, op)(*flat(op, call, backend)),
    "RegisteredOps": lambda op, call, backend: getattr(library.RegisteredOps(backend), op)(**call),
}


class Own(Tensor):
    """A class of a user's own, over plain memory."""


class Wrapper(Tensor):
    """Has no memory: its values are another tensor's, on which every operation runs."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        given = [value.values if isinstance(value, cls) else value for value in args]
        return func(*given, **(kwargs or {}))


def of_other_sizes(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dim, size in enumerate(tensor.shape):
        for other in (size + 1, size - 1, 0):
            shape = [*tensor.shape[:dim], other, *tensor.shape[dim + 1 :]]
            yield f"dim {dim} of {other}", torch.zeros(shape, dtype=tensor.dtype)


def with_memory(tensor: Tensor, spare: int, strided: bool = False) -> Tensor:
    """The same shape over a storage that was resized to so many bytes more than the values take."""
    made = torch.stack([tensor, tensor], -1)[..., 0] if strided else tensor.clone()
    values = made.numel() * (1 + strided) * made.element_size() - strided * made.element_size()
    made.untyped_storage().resize_(max(values + spare, 0))
    return made


def of_other_kinds(tensor: Tensor) -> Iterator[tuple[str, Any]]:
    yield "a str", "weight"
    yield "a number", 1.5
    yield "a list", tensor.tolist()
    yield "a NumPy array", tensor.numpy()
    yield "rank + 1", tensor[None]
    yield "rank + 1 at the end", tensor[..., None]
    yield "rank - 1", tensor[0]
    yield "a scalar", torch.tensor(1.0)
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64):
        yield str(dtype), tensor.to(dtype)
    yield "on meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    yield "mkldnn", tensor.to_mkldnn()
    yield "nested", torch.nested.nested_tensor([tensor[0], tensor[0]])
    yield "an uninitialized parameter", torch.nn.UninitializedParameter()
    yield "without memory", with_memory(tensor, -(2**20))
    yield "a byte short", with_memory(tensor, -1)
    yield "strided, a byte short", with_memory(tensor, -1, strided=True)


def of_other_float_types(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        yield str(dtype), tensor.to(dtype)


def without_plain_memory(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What torch's own ops can compute with, and kernels cannot read."""
    yield "a subclass", tensor.as_subclass(Own)
    yield "a wrapper", Wrapper(tensor)
    yield "a fake tensor", FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tensor)
    yield "a zero tensor", torch._efficientzerotensor(tensor.shape)
    yield "a functional tensor", torch._to_functional_tensor(tensor)


def spoiled(name: str, op: str, call: Call, plain: bool) -> Iterator[tuple[str, str, Any]]:
    """(place, kind, value) of everything that an op must refuse; plain: also of what only kernels cannot read."""
    any_rank = op == "layer_norm"
    optional = {operand.name for operand in OPERANDS[op] if operand.optional} | {"residual_scale"}
    for place, tensor in tensors(op, call).items():
        if place not in optional:
            yield place, "None", None
        free = FREE.get(op, set()) if place in ("image", "x") else set()
        for kind, value in of_other_sizes(tensor):
            if int(kind.split()[1]) not in free:
                yield place, kind, value
        others = [of_other_kinds] if place == "residual_scale" else [of_other_kinds, of_other_float_types]
        for kinds in (*others, without_plain_memory) if plain else others:
            for kind, value in kinds(tensor):
                # on CPUs it takes float32 weights with low activations
                allowed = ("rank + 1", "rank - 1", "torch.float16", "torch.bfloat16")
                if not (any_rank and place == "x" and kind in allowed):
                    yield place, kind, value


def refusal(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def says(error: Exception | None, op: str, place: str) -> bool:
    """Is it our sentence of this op and operand?"""
    named = r"\S+|\S+ and weights" if place in GIVE_SIZES else re.escape(place)
    said = isinstance(error, (TypeError, ValueError)) and re.fullmatch(f"{op}: ({named}) must .+, got .+", str(error))
    return bool(said)


def of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


CALLS = calls()


def test_the_table_has_every_tensor_of_the_schemas():
    for op, call in CALLS.values():
        schema = getattr(torch.ops.pvt_fast, op).default._schema
        count = sum("Tensor" in str(argument.type) for argument in schema.arguments)
        activations = sum(name in call for name in ("image", "x", "residual_scale"))
        assert len(OPERANDS[op]) + activations == count
        assert len(tensors(op, call)) == count or op == "attention"


@pytest.mark.only("cpp", "triton")
@pytest.mark.one_isa
@pytest.mark.parametrize("name", CALLS)
def test_a_spoiled_operand_is_refused_before_anything_is_allocated(name, target, monkeypatch):
    op, call = CALLS[name]
    cases = list(spoiled(name, op, call, plain=True))
    monkeypatch.setattr(torch, "empty", None)
    accepted = {}
    for place, kind, value in cases:
        error = refusal(lambda: WAYS["direct"](op, put(call, place, value), target.backend))  # noqa: B023
        if not says(error, op, place):
            accepted[f"{place} {kind}"] = error
    assert not accepted
    assert len(cases) > 30 * len(tensors(op, call))


@pytest.mark.parametrize("way", ["torch.ops", "RegisteredOps"])
@pytest.mark.parametrize("name", CALLS)
def test_a_registered_op_refuses_spoiled_operands(name, way):
    """By our sentence, or where torch refuses first by its."""
    op, call = CALLS[name]
    accepted = []
    for place, kind, value in spoiled(name, op, call, plain=False):
        error = refusal(lambda: WAYS[way](op, put(call, place, value), "cpp"))  # noqa: B023
        torchs = isinstance(error, RuntimeError) and (kind in REFUSED_BY_TORCH or f"pvt_fast::{op}" in str(error))
        if not torchs and not isinstance(error, (TypeError, ValueError)):
            accepted.append((place, kind, error))
    assert not accepted


@pytest.mark.parametrize("way", ["torch.ops", "RegisteredOps"])
@pytest.mark.parametrize("name", CALLS)
def test_a_registered_op_takes_what_torch_dispatches(name, way):
    """Wrappers, zeros and functional tensors come to it as plain ones; fake ones give a fake one of the right shape."""
    op, call = CALLS[name]
    for place, tensor in tensors(op, call).items():
        for kind, value in without_plain_memory(tensor):
            given = put(call, place, value)
            if kind == "a subclass":  # of no dispatch of its own
                assert isinstance(refusal(lambda: WAYS[way](op, given, "cpp")), TypeError)  # noqa: B023
                continue
            actual = of(WAYS[way](op, given, "cpp"))
            plain = put(call, place, torch.zeros_like(tensor) if kind == "a zero tensor" else tensor)
            truth = of(getattr(reference, op)(**plain))
            assert actual.shape == truth.shape
            if kind != "a fake tensor":
                torch.testing.assert_close(torch.as_tensor(actual), truth, rtol=1e-3, atol=1e-4, msg=f"{place} {kind}")


@pytest.mark.parametrize("name", CALLS)
def test_a_fake_call_is_checked_too(name):
    op, call = CALLS[name]
    for place, tensor in tensors(op, call).items():
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            WAYS["torch.ops"](op, put(call, place, tensor.to("meta")), "cpp")
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises((TypeError, ValueError, RuntimeError)):
            WAYS["torch.ops"](op, put(call, place, tensor[..., None]), "cpp")


def test_a_bias_without_its_weight_is_not_dropped():
    _, call = CALLS["head"]
    with pytest.raises(TypeError, match=r"head: w.weight must be a Tensor, got None"):
        torch.ops.pvt_fast.head(call["x"], None, call["w"].bias, "cpp")
    _, call = CALLS["attention"]
    for place in ("w.sr.weight", "w.sr_norm.weight", "w.sr_norm.bias"):
        with pytest.raises(TypeError, match=f"attention: {place} must be a Tensor, got None"):
            WAYS["torch.ops"]("attention", put(call, place, None), "cpp")


@pytest.mark.parametrize("backend", ["", "auto", "CPP", "cuda", "cpp ", "none in a graph"])
def test_an_unknown_backend_is_refused(backend):
    op, call = CALLS["layer_norm"]
    with pytest.raises(ValueError, match="pvt_fast::layer_norm: backend must be one of"):
        WAYS["torch.ops"](op, call, backend)


# -- numbers -----------------------------------------------------------------------------------------------------------

HUGE = (2**31, 2**40, 2**62, 2**63, 2**70)
NOT_NUMBERS = ("1", None, 1j, [1.0], torch.tensor(1.0), 2**64, 2**2000)
NUMBERS: dict[str, tuple] = {
    "stride": (0, -2, 2.0, True, None, "2", np.int64(2), torch.tensor(2), *HUGE),
    "hw": (
        (-6, -5), (0, 30), (30, 0), (6.0, 5), (True, 30), (30, True), (6, 5, 1), (30,), 30, None, "65", {6, 5},
        (np.int64(6), 5), (2**32 + 6, 5), (2**64 + 6, 5), (-(2**31), -2), (5, 5), (None, 5), (torch.tensor(6), 5),
        *((huge, 5) for huge in HUGE), *((5, huge) for huge in HUGE), (2**32, 2**32), (2**63, 2),
    ),
    "spec": (None, "spec", 2, (2, 1.0, False), [2, 1.0, False]),
    "spec.num_heads": (0, -1, -16, 3, 2.0, True, None, "2", np.int64(2), *HUGE),
    "spec.scale": NOT_NUMBERS,
    "spec.linear": (None, 1, 0, "yes", torch.tensor(True)),
    "spec.relu": (None, 1, 0, "yes", torch.tensor(True)),
    "spec.attn_drop": (*NOT_NUMBERS, -0.1, 1.5, float("nan")),
    "spec.proj_drop": (*NOT_NUMBERS, -0.1, 1.5, float("nan")),
    "spec.drop": (*NOT_NUMBERS, -0.1, 1.5, float("nan")),
    "w": ("w", 1, (1, 2), Norm, [1, 2]),
    "w.norm.eps": NOT_NUMBERS,
    "w.sr_norm.eps": NOT_NUMBERS,
    "w.eps": NOT_NUMBERS,
}  # fmt: skip


def numbers_of(call: Call) -> dict[str, tuple]:
    return {place: values for place, values in NUMBERS.items() if get(call, place) is not None}


@pytest.mark.one_isa
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_number_is_refused_before_anything_is_allocated(name, target, monkeypatch):
    op, call = CALLS[name]
    monkeypatch.setattr(torch, "empty", None)
    for place, values in numbers_of(call).items():
        for value in values:
            error = refusal(lambda: WAYS["direct"](op, put(call, place, value), target.backend))  # noqa: B023
            # of a product of sides x is said not to fit it, of heads the channels
            named = rf"{re.escape(place)}|x|channels" if place in ("hw", "spec.num_heads") else re.escape(place)
            assert isinstance(error, (TypeError, ValueError)), (place, value, error)
            assert re.match(f"{op}: ({named}) must .+, got ", str(error), re.DOTALL), (place, value, error)


def test_a_spec_of_another_op_is_refused(target):
    for name, other in (("attention", MlpSpec(False)), ("mlp", AttentionSpec(2, 1.0, False))):
        op, call = CALLS[name]
        with pytest.raises(TypeError, match=f"{op}: spec must be a"):
            WAYS["direct"](op, {**call, "spec": other}, target.backend)


@pytest.mark.only("cpp", "triton")
@pytest.mark.one_isa
@pytest.mark.parametrize("place", ["spec.attn_drop", "spec.proj_drop", "spec.drop"])
def test_dropout_is_refused_by_name(place, target):
    op, call = CALLS["mlp" if place == "spec.drop" else "attention"]
    with pytest.raises(dispatch.BackendUnavailable, match=f"{op}: backend '{target.backend}' cannot run"):
        WAYS["direct"](op, put(call, place, 0.1), target.backend)
    with pytest.raises(ValueError, match=f"{op}: spec must be without dropout"):
        WAYS["RegisteredOps"](op, put(call, place, 0.1), target.backend)


@pytest.mark.only("cpp")
@pytest.mark.one_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, 0, True, 1e300, 2**62], ids=str)
def test_any_float_is_computed_as_torch_does(value, target):
    for op, call in CALLS.values():
        for place in ("w.eps", "w.norm.eps", "w.sr_norm.eps", "spec.scale"):
            if get(call, place) is None or (place == "spec.scale" and value > 1):  # differences of rounding, enlarged
                continue
            given = put(call, place, value)
            with target.in_use():
                actual = of(WAYS["direct"](op, given, "cpp"))
            truth = of(getattr(reference, op)(**given))
            torch.testing.assert_close(actual, truth, rtol=1e-3, atol=1e-3, equal_nan=True, msg=f"{op} {place}")


# -- what torch computes -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda t: torch._neg_view(-t),
    "every second": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "reversed dimensions": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(
        *reversed(range(t.dim()))
    ),
    "expanded": lambda t: t[:1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, [1] * t.dim()),
    "at an offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "needing a gradient": lambda t: t.clone().requires_grad_(),
    "a parameter": lambda t: torch.nn.Parameter(t.clone()),
    "a negative parameter": lambda t: torch.nn.Parameter(torch._neg_view(-t)),
    "a buffer": lambda t: torch.nn.Buffer(t.clone()),
}  # fmt: skip


@pytest.mark.only("cpp")
@pytest.mark.one_isa
@pytest.mark.parametrize("layout", [*LAYOUTS, "made for inference"])
def test_any_layout_of_any_operand_is_computed(layout, target):
    for dtype in target.dtypes:
        for name, (op, call) in calls(dtype).items():
            for place, tensor in tensors(op, call).items():
                with torch.inference_mode(layout == "made for inference"):
                    given = put(call, place, LAYOUTS.get(layout, Tensor.clone)(tensor))
                with target.in_use(), torch.no_grad():
                    WAYS["direct"](op, call, "cpp")  # so that the plain operand's memory is packed
                    actual = of(WAYS["direct"](op, given, "cpp"))
                    double = {key: _map(value, Tensor.double) for key, value in given.items()}
                    truth, same = (of(getattr(reference, op)(**each)) for each in (double, given))
                assert_parity(actual, truth, same, f"{name} with {place} {layout}")


@pytest.mark.only("cpp")
def test_the_stride_of_a_side_of_one_pixel_is_of_no_matter(target):
    """torch calls such an image contiguous whatever it is."""
    _, call = CALLS["patch_embed"]
    for size in ((1, 3, 9, 1), (1, 3, 1, 9), (1, 3, 1, 1)):
        narrow = torch.randn(size)
        for image in (narrow, torch.stack([narrow, narrow], -1)[..., 0]):
            given = {**call, "image": image}
            with target.in_use():
                actual = of(WAYS["direct"]("patch_embed", given, "cpp"))
            torch.testing.assert_close(actual, of(reference.patch_embed(**given)), rtol=1e-3, atol=1e-4)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(each, change) for each in value))
    return value


@torch.no_grad()
def test_a_negative_view_of_packed_weights_is_other_weights():
    """It shares their memory, version, shape and strides."""
    for op, call in CALLS.values():
        for operand in OPERANDS[op]:
            weight = torch.nn.Parameter(get(call, operand.name))
            for own in (weight, weight.detach()):
                plain, negative = put(call, operand.name, own), put(call, operand.name, torch._neg_view(own))
                for given in (plain, negative, plain):
                    truth = of(getattr(reference, op)(**given))
                    torch.testing.assert_close(of(WAYS["direct"](op, given, "cpp")), truth, rtol=1e-3, atol=1e-4)


# -- in a process of its own -------------------------------------------------------------------------------------------

Case = tuple[str, Callable[[], bool]]  # a name, and: is it as it should be?


def guarded() -> Iterator[Case]:
    """Each operand flush against pages that cannot be read, at either end."""
    for isa in cpp.isas():
        for dtype in (torch.float32, torch.bfloat16):
            for name, (op, call) in calls(dtype).items():
                truth = of(getattr(reference, op)(**call)).float()
                for place, tensor in tensors(op, call).items():
                    for end in (False, True):
                        given = put(call, place, beside_unreadable(tensor, end))
                        yield f"{isa} {dtype} {name} {place} {end}", partial(_agrees, isa, op, given, truth)


def _agrees(isa: str, op: str, given: Call, truth: Tensor) -> bool:
    with cpp.use_isa(isa):
        return torch.allclose(of(WAYS["direct"](op, given, "cpp")).float(), truth, rtol=0.05, atol=0.1)


def resized() -> Iterator[Case]:
    """Storages that shrink after their tensors were packed, and with unreadable memory where they ended."""
    for name, (op, call) in calls().items():
        for place, tensor in tensors(op, call).items():
            for left in (0, 1, tensor.numel() * 4 - 1):
                yield f"{name} {place} {left}", partial(_shrinks, op, call, place, left)


def _shrinks(op: str, call: Call, place: str, left: int) -> bool:
    own = get(call, place).clone()
    given = put(call, place, own)
    for _ in range(2):
        WAYS["direct"](op, given, "cpp")
    own.untyped_storage().resize_(left)
    return all(says(refusal(lambda: WAYS["direct"](op, given, "cpp")), op, place) for _ in range(2))


BAD_SPANS: list[Callable[[tuple[int, int]], Any]] = [
    lambda s: (s[0], s[1] - 1),
    lambda s: (s[0], 0),
    lambda s: (0, s[1]),
    lambda s: (-1, s[1]),
    lambda s: (s[0], -1),
    lambda s: (2**64, s[1]),
    lambda s: (s[0],),
    lambda s: "memory",
]
BAD_SIZES = (-1, -(2**31), 2**31, 2**40, 2**62, 2**63, 2**64, 1.5, "1", None)


def spoiled_arguments(value: Any) -> Iterator[Any]:
    """The arguments of a function of `_C` with one span, size or flag made wrong."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int) and value[0] > 2**20:
        yield from (bad(value) for bad in BAD_SPANS)
    elif isinstance(value, dict):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
            yield from ({**value, key: bad} for bad in spoiled_arguments(value[key]))
    elif isinstance(value, tuple):
        yield from (
            (*value[:i], bad, *value[i + 1 :]) for i in range(len(value)) for bad in spoiled_arguments(value[i])
        )
        yield value[1:]
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (bad for bad in BAD_SIZES if bad != value)


def packed_ops() -> dict[str, tuple[Callable[..., Any], tuple, tuple]]:
    """(what makes it, arguments for that, arguments of its `run`) of every op of `_C`."""
    memory = torch.zeros(2**14)
    _alive.append(memory)

    def at(count: int) -> tuple[int, int]:
        return memory.data_ptr(), 4 * count

    def linear(out: int, inner: int) -> tuple:
        return at(out * inner), at(out)

    norm, isa = (at(16), at(16), 1e-5), cpp.isas()[0]
    out = torch.zeros(2 * 30 * 16)
    _alive.append(out)
    attention = {
        "norm": norm, "q": linear(16, 16), "kv": linear(32, 16), "sr": linear(16, 64), "sr_norm": norm,
        "proj": linear(16, 16), "channels": 16, "heads": 2, "sr_ratio": 2, "linear": False, "scale": 1.0,
    }  # fmt: skip
    mlp = {
        "norm": norm, "fc1": linear(24, 16), "dwconv": linear(24, 9), "fc2": linear(16, 24), "channels": 16,
        "hidden": 24, "relu": False,
    }  # fmt: skip
    residual = (at(2 * 30 * 16), 2, 6, 5, at(2), span(out))
    return {
        "PatchEmbed": (
            _C.PatchEmbed,
            (isa, _C.DType.f32, linear(16, 3 * 49), norm, (3, 16, 7, 4), False),
            (at(2 * 3 * 9 * 10), (2, 9, 10), (270, 90, 10, 1), (out.data_ptr(), 4 * 2 * 9 * 16)),
        ),
        "attention": (_C.attention, (isa, _C.DType.f32, attention), residual),
        "mlp": (_C.mlp, (isa, _C.DType.f32, mlp), residual),
        "LayerNorm": (_C.LayerNorm, (isa, _C.DType.f32, norm, 16), (at(60 * 16), 60, span(out))),
        "Head": (_C.Head, (isa, _C.DType.f32, linear(7, 16), 16, 7), (at(960), 2, 30, (out.data_ptr(), 4 * 14))),
    }


_alive: list[Tensor] = []


def second_wall() -> Iterator[Case]:
    """What is below the checks, called by itself: a span too short, an address that is none, sizes of any value."""
    for name, (make, arguments, run) in packed_ops().items():
        make(*arguments).run(*run)
        for index, bad in enumerate(spoiled_arguments(arguments)):
            yield f"{name} made {index}: {bad}", partial(_throws, make, *bad)
        for index, bad in enumerate(spoiled_arguments(run)):
            yield f"{name} run {index}: {bad}", partial(_throws, make(*arguments).run, *bad)
    yield from forwards()


def forwards() -> Iterator[Case]:
    """A model's ops in a wrong order, of wrong channels, of two element types, or no ops."""
    made = {name: (make, arguments) for name, (make, arguments, _) in packed_ops().items()}
    ops = {name: make(*arguments) for name, (make, arguments) in made.items()}
    order = ("PatchEmbed", "attention", "mlp", "LayerNorm", "Head")
    right = [ops[name] for name in order]
    out = torch.zeros(2 * 7)
    _alive.append(out)
    image = packed_ops()["PatchEmbed"][2][:3]
    _C.Forward(right).run(*image, span(out))
    bf16 = {name: make(arguments[0], _C.DType.bf16, *arguments[2:]) for name, (make, arguments) in made.items()}
    wide = _C.LayerNorm(
        cpp.isas()[0], _C.DType.f32, ((_alive[0].data_ptr(), 128), (_alive[0].data_ptr(), 128), 1e-5), 32
    )
    lists: dict[str, Any] = {
        "none": [],
        "one": right[:1],
        "without a head": right[:-1],
        "two heads": [*right, right[-1]],
    }
    for i in range(5):
        lists[f"without {order[i]}"] = [*right[:i], *right[i + 1 :]] if order[i] not in ("attention", "mlp") else []
        lists[f"bf16 {order[i]}"] = [*right[:i], bf16[order[i]], *right[i + 1 :]]
        lists[f"None for {order[i]}"] = [*right[:i], None, *right[i + 1 :]]
        lists[f"{order[i]} first"] = [right[i], *right] if i else [*right, right[0]]
    lists |= {"wide norm": [*right[:3], wide, right[4]], "numbers": [1, 2], "no list": 5, "reversed": right[::-1]}
    for name, given in lists.items():
        yield f"Forward {name}", partial(_throws, _C.Forward, given)
    for index, bad in enumerate(spoiled_arguments((*image, span(out)))):
        yield f"Forward run {index}: {bad}", partial(_throws, _C.Forward(right).run, *bad)


def _throws(function: Callable[..., Any], *arguments: Any) -> bool:
    # RuntimeError, LookupError: pybind11's, for items of tuples and dicts
    return isinstance(refusal(lambda: function(*arguments)), (TypeError, ValueError, RuntimeError, LookupError))


class Gated(NamedTuple):
    """Weights as of an op that is not there yet."""

    norm: Annotated[Norm, "C"]
    gate: Annotated[Linear | None, "hidden", "C"]


class Shapeless(NamedTuple):
    norm: Annotated[Norm, "C"]
    gate: Linear


def test_every_op_declares_its_weights():
    assert tuple(OPERANDS) == NAMES


def test_a_new_weight_field_is_checked_by_its_declaration_alone():
    for kind in (Gated, Shapeless):
        kind.__annotations__.update(norm=Annotated[Norm, "C"])  # names of this file are not looked up
    Gated.__annotations__.update(gate=Annotated[Linear | None, "hidden", "C"])
    Shapeless.__annotations__.update(gate=Linear)
    assert [operand.name for operand in operands_of(Gated)] == [
        "w.norm.weight",
        "w.norm.bias",
        "w.gate.weight",
        "w.gate.bias",
    ]
    assert operands_of(Gated)[3].shape == ("hidden",)
    assert operands_of(Gated)[2].part_optional
    with pytest.raises(TypeError, match="Shapeless: gate must be annotated with its shape"):
        operands_of(Shapeless)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "guarded": guarded,
    "resized": resized,
    "second_wall": second_wall,
}


def report() -> None:
    """Print a line before each case, and one after it unless it is as it should be."""
    torch.set_grad_enabled(False)
    for group, cases in GROUPS.items():
        for name, case in cases():
            print(json.dumps([group, name, "ran"]), flush=True)
            if not case():
                print(json.dumps([group, name, "wrong"]), flush=True)


@pytest.fixture(scope="module")
def reported() -> list[list[str]]:
    command = [sys.executable, "-W", "ignore", "-c", "import test_checks; test_checks.report()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # where this file and what it imports lie
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"exit status {child.returncode} at {lines[-1:]}: {child.stderr[-2000:]}"
    return lines


@pytest.mark.parametrize("group", GROUPS)
def test_no_memory_but_the_operands_own_is_read(group, reported):
    wrong = [name for of_group, name, state in reported if of_group == group and state == "wrong"]
    assert not wrong
    assert sum(of_group == group for of_group, _, _ in reported) > 50
