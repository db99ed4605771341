"""Parity on shapes that hypothesis draws; apart from test_ops.py, which runs also where hypothesis is not installed."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import check_parity, make

from pvt_fast.testing import AttentionCase, Case, MlpCase, PatchEmbedCase

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIDES = st.integers(1, 9)


@st.composite
def small_cases(draw) -> Case:
    batch, hw = draw(st.integers(1, 2)), (draw(SIDES), draw(SIDES))
    kind = draw(st.sampled_from(["embed", "attention", "mlp"]))
    if kind == "embed":
        kernel, stride = draw(st.sampled_from([(3, 2), (7, 4), (5, 4), (8, 4)]))
        layout = draw(st.sampled_from(["nchw", "nhwc", "sliced"]))
        return PatchEmbedCase(batch, hw, draw(st.integers(1, 9)), draw(st.integers(1, 40)), kernel, stride, layout)
    layout, scaled = draw(st.sampled_from(["compact", "sliced"])), draw(st.booleans())
    if kind == "mlp":
        channels, hidden = draw(st.integers(1, 40)), draw(st.integers(1, 70))
        return MlpCase(batch, hw, channels, hidden, draw(st.booleans()), scaled, layout)
    heads = draw(st.integers(1, 3))
    channels, linear = heads * draw(st.integers(1, 20)), draw(st.booleans())
    ratio = 1 if linear else draw(st.integers(1, min(4, *hw)))
    return AttentionCase(batch, hw, channels, heads, ratio, linear, draw(st.booleans()), scaled, layout)


@pytest.mark.not_interpreted
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(small=small_cases())
def test_parity_on_any_small_shape(target, dtype, small):
    check_parity(small, target, make(small, target, dtype))
