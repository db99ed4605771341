"""Infinities, NaN and overflow travel through the ops as through the reference.

An output may be what the reference gives in the same dtype, or what it gives in float64: torch's own kernels disagree
about sums that overflow on their way, about GELU of infinity (NaN in whole vectors, infinity in what is left over) and
about infinite weights at a padded border. A variance that overflows is NaN, whatever the width; torch gives NaN or, at
some widths, the bias.
"""

import math

import pytest
import torch
from torch import Tensor

from pvt_fast import testing
from pvt_fast.ops import AttentionSpec, AttentionWeights, Linear, MlpSpec, MlpWeights, Norm, map_tensors, reference
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase, run

pytestmark = [
    pytest.mark.only("cpp", "triton"),
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, under Triton's interpreter
]

INF, NAN = math.inf, math.nan
BF16, FP32 = torch.bfloat16, torch.float32
# Every weight and every norm; widths with tails, and without; heads, hidden channels and keys that are padded.
SMALL_CASES = (
    MlpCase(1, (2, 3), 20, 38, scale_residual=True),
    MlpCase(1, (2, 2), 16, 32, relu=True),
    AttentionCase(1, (4, 2), 36, 3, sr_ratio=2, scale_residual=True),
    AttentionCase(1, (2, 2), 20, 1, linear=True),
    PatchEmbedCase(1, (9, 5), 3, 20, kernel=7, stride=4),
)
CASES = (
    *SMALL_CASES,
    MlpCase(2, (3, 4), 64, 128),
    AttentionCase(2, (3, 5), 64, 2),
    AttentionCase(1, (3, 5), 24, 2, bias=False),
    PatchEmbedCase(1, (6, 5), 5, 16, layout="nhwc"),
)


def kinds(x: Tensor) -> Tensor:
    """0 where x is finite, 1 NaN, 2 infinity, 3 minus infinity."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def replaced(arguments, index: int, value: float):
    """The arguments, one element in the middle of their `index`-th tensor replaced; None past the last tensor."""
    seen = 0

    def replace(tensor: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen - 1 == index:
            tensor = tensor.clone()
            tensor[tuple(size // 2 for size in tensor.shape)] = value
        return tensor

    changed = map_tensors(arguments, replace)
    return changed if index < seen else None


def travels(target, case, arguments, what: str) -> None:
    with target.in_use():
        actual = run(target.ops, case, arguments)
    alike = torch.zeros(actual.shape, dtype=torch.bool)
    for like in (arguments, map_tensors(arguments, lambda tensor: tensor.double())):
        alike |= kinds(actual) == kinds(run(reference, case, like).to(actual.dtype))
    assert alike.all(), f"{what} of {case} on {target}: {(~alike).sum()} of {alike.numel()} values of another kind"


DTYPES = pytest.mark.parametrize("op_dtype", [FP32, BF16], ids=["f32", "bf16"])


@DTYPES
@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.not_interpreted
def test_a_value_in_any_argument_travels_as_in_the_reference(target, op_dtype, value):
    for case in CASES:
        arguments, index = case.make(op_dtype), 0
        while (changed := replaced(arguments, index, value)) is not None:
            travels(target, case, changed, f"{value} in tensor {index}")
            index += 1


@DTYPES
@pytest.mark.only("triton")
def test_a_value_in_x_travels_as_in_the_reference(target, op_dtype):
    for case in SMALL_CASES:
        travels(target, case, replaced(case.make(op_dtype), 0, -INF), "-inf in x")


@DTYPES
@pytest.mark.parametrize("channels", [16, 24, 33, 64])
@pytest.mark.parametrize("size", [1e20, 1e25, 1e37])
def test_a_variance_that_overflows_is_nan(target, op_dtype, channels, size):
    norm = Norm(torch.ones(channels, dtype=op_dtype), torch.full((channels,), 0.5, dtype=op_dtype), 1e-5)
    x = torch.randn(1, 5, channels)
    x[0, 2] *= size
    with target.in_use():
        y = target.ops.layer_norm(x.to(op_dtype), norm)
    assert y[0, 2].isnan().all()
    assert y[0, [0, 1, 3, 4]].isfinite().all()


@DTYPES
def test_a_token_whose_variance_overflows_reaches_its_neighbours_only(target, op_dtype):
    case = MlpCase(1, (5, 4), 24, 40)
    x, hw, *rest = case.make(op_dtype)
    x[0, 5] *= 1e25  # row 1, column 1
    with target.in_use():
        y = run(target.ops, case, (x, hw, *rest))[0].unflatten(0, hw)
    reached = torch.zeros(hw, dtype=torch.bool)
    reached[:3, :3] = True
    assert torch.equal(y.isnan().all(-1), reached)
    assert torch.equal(y.isfinite().all(-1), ~reached)


@DTYPES
@pytest.mark.parametrize("channels", [16, 24, 33, 64])
@pytest.mark.only("cpp")
def test_equal_values_are_their_own_mean(target, op_dtype, channels):
    norm = Norm(torch.ones(channels, dtype=op_dtype), torch.full((channels,), 0.5, dtype=op_dtype), 1e-5)
    x = torch.tensor([3e38, -1e30, 1e3, 0.1], dtype=op_dtype).view(1, 4, 1).expand(1, 4, channels).contiguous()
    with target.in_use():
        y = target.ops.layer_norm(x, norm)
    assert (y == 0.5).all()


def gelu(target, values: list[float], dtype: torch.dtype) -> list[float]:
    """What the op's GELU gives, each value in a call of its own: one hidden channel, its bias the value."""
    results = []
    for value in values:
        taps = torch.zeros(1, 1, 3, 3, dtype=dtype)
        taps[..., 1, 1] = 1
        zeros, ones = torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)
        fc1 = Linear(zeros.view(1, 8), torch.tensor([value], dtype=dtype))
        w = MlpWeights(Norm(ones, zeros, 1e-5), fc1, Linear(taps, zeros[:1]), Linear(ones.view(8, 1), zeros))
        with target.in_use():
            results.append(target.ops.mlp(zeros.view(1, 1, 8), (1, 1), w, MlpSpec(False))[0, 0, 0].item())
    return results


@DTYPES
def test_gelu_far_from_zero(target, op_dtype):
    """A slip of the polynomial at its ends grows with x: 0.35 at -1e6, 1e32 at -3e38."""
    assert gelu(target, [-1e3, -1e6, -1e20, -3e38], op_dtype) == [0, 0, 0, 0]
    large = torch.tensor([1e6, 1e20, 3e38], dtype=op_dtype).tolist()
    assert gelu(target, large, op_dtype) == large
    infinite = gelu(target, [INF, -INF, NAN], op_dtype)
    assert infinite[0] == INF
    assert math.isnan(infinite[1])
    assert math.isnan(infinite[2])


@DTYPES
@pytest.mark.only("cpp")
def test_padded_channels_do_not_turn_infinity_into_nan(target, op_dtype):
    """All that is real is plus infinity, weighed by ones; only the zero weights of padding could make NaN of it."""
    zeros, ones = torch.zeros(8, dtype=op_dtype), torch.ones(3, 8, dtype=op_dtype)
    norm, taps = Norm(ones[0], zeros + INF, 1e-5), torch.ones(3, 1, 3, 3, dtype=op_dtype)
    w = MlpWeights(norm, Linear(ones, None), Linear(taps, None), Linear(ones.mT.contiguous(), zeros))
    with target.in_use():
        y = target.ops.mlp(torch.randn(2, 6, 8).to(op_dtype), (2, 3), w, MlpSpec(False))
    assert (y == INF).all()


@DTYPES
@pytest.mark.parametrize("value", [INF, NAN], ids=str)
@pytest.mark.only("cpp")
def test_a_tap_outside_the_map_counts_for_nothing(target, op_dtype, value):
    """torch leaves such taps out: a row and a column stay finite beside an infinite corner."""
    for case in (MlpCase(1, (4, 5), 24, 40), MlpCase(2, (9, 3), 16, 64)):
        arguments = case.make(op_dtype)
        arguments[2].dwconv.weight[0, 0, 0, 0] = value
        with target.in_use():
            y = run(target.ops, case, arguments)
        finite = y.isfinite().all(-1).unflatten(1, case.hw)
        assert finite[:, 0].all()
        assert finite[:, :, 0].all()
        assert not finite[:, 1:, 1:].any()


@DTYPES
@pytest.mark.parametrize("heavy", [0, 30])
def test_keys_of_weight_zero(target, op_dtype, heavy):
    """Scores of minus infinity, of whole blocks of keys too, weigh nothing; where all are, the answer is NaN."""
    channels, hw = 32, (10, 13)
    zeros, draw = torch.zeros(channels, dtype=op_dtype), testing.Draw("keys", op_dtype, target.device)
    x = torch.tensor([0, *[1, -1] * 15, 0], dtype=op_dtype).repeat(1, 130, 1)  # y[0] is 0
    x[:, : 130 - heavy, 0] = 1000
    q = Linear(torch.zeros(channels, channels, dtype=op_dtype), zeros.index_fill(0, torch.tensor([0]), -10))
    kv = Linear(draw.normal(2 * channels, channels), None)
    kv.weight[:channels] = 0
    kv.weight[0, 0] = 3e38
    w = AttentionWeights(Norm(zeros + 1, zeros, 1e-6), q, kv, None, None, draw.linear(channels, channels))
    with target.in_use():
        y = target.ops.attention(x, hw, w, AttentionSpec(1, 1.0, False))
    truth = reference.attention(x, hw, w, AttentionSpec(1, 1.0, False))
    assert y.isfinite().all() if heavy else y.isnan().all()
    torch.testing.assert_close(y, truth, equal_nan=True, rtol=2e-2, atol=2e-2 if op_dtype == FP32 else 0.1)
