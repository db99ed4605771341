"""Calls of the ops that hypothesis draws and then spoils: refused by our sentence, or the reference's answer."""

from __future__ import annotations

import itertools
import math
import os
import re
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from op_calls import Call, get, named, put, tensors
from test_checks import LAYOUTS, of
from test_ops_any_shape import small_cases
from torch import Tensor

from pvt_fast import testing
from pvt_fast.backend import cpp
from pvt_fast.backend.dispatch import BackendUnavailable
from pvt_fast.ops import map_tensors, reference

pytestmark = pytest.mark.filterwarnings("ignore")

# At least so long, which is some hundreds of calls; `make fuzz` gives it ten minutes.
SECONDS = float(os.environ.get("PVT_FAST_FUZZ_SECONDS", "4"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 5, 7, 2**31, 2**62, 2**64, 1.5, math.nan, math.inf, True, None, "2")
PLACES = ("hw", "hw both", "stride", "spec.num_heads", "spec.scale", "spec.linear", "spec.relu", "w.norm.eps", "w.eps")


@st.composite
def valid_calls(draw: Any) -> tuple[str, Call]:
    dtype = draw(st.sampled_from(DTYPES[:3]))
    if draw(st.integers(0, 3)):
        case = draw(small_cases())
        return case.op, named(case.op, *case.make(dtype))
    batch, tokens, channels = (draw(st.integers(0 if i == 0 else 1, 40)) for i in range(3))
    drawn = testing.Draw(f"{batch} {tokens} {channels}", dtype, "cpu")
    x = drawn.normal(batch, tokens, channels)
    if draw(st.booleans()):
        return "layer_norm", named("layer_norm", x, drawn.norm(channels, 1e-5))
    weights = (
        drawn.linear(draw(st.integers(1, 30)), channels, bias=draw(st.booleans())) if draw(st.booleans()) else None
    )
    return "head", named("head", x, weights)


@st.composite
def spoiled_calls(draw: Any) -> tuple[str, Call]:
    op, call = draw(valid_calls())
    # each at most once: torch itself reads beyond the memory of a tensor that was spoiled
    for place in draw(st.lists(st.sampled_from(sorted(tensors(op, call))), max_size=3, unique=True)):
        call = put(call, place, draw(other_tensors(get(call, place))))
    if not draw(st.integers(0, 2)):
        place = draw(st.sampled_from(PLACES))
        call = spoil_number(call, place, draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(NUMBERS)))
    return op, call


def spoil_number(call: Call, place: str, value: Any, other: Any) -> Call:
    if place.startswith("hw") and "hw" in call:
        return put(call, "hw", (value, other) if place == "hw both" else (call["hw"][0], value))
    return put(call, place, value) if get(call, place) is not None else call


@st.composite
def other_tensors(draw: Any, tensor: Tensor) -> Tensor:
    """In another layout mostly, else of another size, rank or dtype, or over too little memory."""
    kind = draw(st.sampled_from(["layout"] * 6 + ["size", "rank", "dtype", "meta", "memory"]))
    if kind == "layout" and tensor.numel() and tensor.dim():
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](tensor.detach())
    if kind == "size" and tensor.dim():
        dim = draw(st.integers(0, tensor.dim() - 1))
        index = torch.arange(max(tensor.shape[dim] + draw(st.integers(-2, 2)), 0)) % max(tensor.shape[dim], 1)
        return tensor.detach().index_select(dim, index) if tensor.shape[dim] else tensor
    if kind == "rank":
        return tensor[None] if draw(st.booleans()) or not tensor.dim() or not len(tensor) else tensor[0]
    if kind == "dtype":
        return tensor.detach().to(draw(st.sampled_from(DTYPES)))
    if kind == "meta":
        return tensor.to("meta")
    if kind == "memory":
        short = tensor.detach().clone()
        short.untyped_storage().resize_(draw(st.integers(0, max(short.untyped_storage().nbytes() - 1, 0))))
        return short
    return tensor


def attempt(call: Any, *arguments: Any) -> tuple[Tensor | None, Exception | None]:
    try:
        return of(call(*arguments)), None
    except Exception as error:
        return None, error


@torch.no_grad()
def check(op: str, call: Call) -> str:
    """Hold the call to the rule; what came of it."""
    actual, error = attempt(lambda: getattr(cpp, op)(**call))
    if error is not None:
        ours = isinstance(error, (TypeError, ValueError)) and re.match(
            rf"{op}: .+ must .+, got ", str(error), re.DOTALL
        )
        assert ours or isinstance(error, BackendUnavailable), error
        return "refused"
    same, error = attempt(lambda: getattr(reference, op)(**call))
    assert error is None, f"answered where the reference raises {error!r}"
    truth = of(getattr(reference, op)(**{name: doubled(value) for name, value in call.items()}))
    assert (actual.shape, actual.dtype) == (truth.shape, same.dtype)
    if not truth.isfinite().all() or not same.isfinite().all():
        return "not finite"
    if truth.numel():
        # for wrong reads, not for rounding, which a norm of equal channels enlarges by 1 / sqrt(eps)
        unit = max(20 * torch.finfo(same.dtype).eps, 1e-3)
        bound = 40 * (same.double() - truth).abs().max() + unit * (truth.abs().max() + 1)
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=float(bound))
    return "computed"


def doubled(value: Any) -> Any:
    return map_tensors(value, Tensor.double)


def test_any_call_is_refused_or_computed():
    came: list[str] = []

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn=spoiled_calls())
    def some(drawn: tuple[str, Call]) -> None:
        came.append(check(*drawn))

    end = time.monotonic() + SECONDS
    for number in itertools.count():
        seed(number)(some)()
        if time.monotonic() > end:
            break
    assert min(came.count(kind) for kind in ("refused", "computed")) > len(came) / 20
