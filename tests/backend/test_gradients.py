"""The C++ backend's own gradients on every instruction set: parity at the stages' sizes, the same bits each time."""

import pytest
import torch
from op_gradients import assert_gradients, gradients, redrawn
from torch import Tensor

from pvt_fast.backend import registered as library
from pvt_fast.ops import Linear, Norm, reference
from pvt_fast.testing import CASES, AttentionCase, Case, MlpCase, PatchEmbedCase, run

pytestmark = [pytest.mark.not_interpreted, pytest.mark.usefixtures("poisoned_memory")]

# Shapes that are cut up in more ways than those of the stages: chunks that begin within an image and bands of unequal
# height, images of one row and of one column, more keys than fit a panel, images' gradients by bands.
CUT = [
    MlpCase(1, (61, 9), 40, 136, relu=True),
    MlpCase(3, (2, 3), 17, 15),
    MlpCase(3, (33, 1), 24, 70),
    MlpCase(5, (7, 7), 64, 256),
    MlpCase(3, (1, 1), 48, 96),
    AttentionCase(1, (23, 21), 48, 3),
    AttentionCase(3, (13, 10), 64, 1, sr_ratio=4),
    AttentionCase(3, (9, 11), 96, 2, linear=True),
    PatchEmbedCase(1, (70, 33), 3, 24, kernel=7, stride=4),
    PatchEmbedCase(3, (37, 21), 20, 40, layout="nhwc"),
    PatchEmbedCase(1, (40, 9), 4, 12, kernel=5, stride=1),
]
# A single token is a vector to torch, which it multiplies in partial sums that err by a third of ours: they go on in
# order, so that a row's result does not depend on its batch. Three tokens are among the above.
PARITY = [case for case in (*CASES, *CUT) if case != MlpCase(1, (1, 1), 48, 96)]
# residual_scale, whose gradient is the reference's: stochastic depth wants none
FROZEN = (4,)


def check(call, arguments: tuple, target, draws: int) -> None:
    def ours(drawn: tuple) -> list[Tensor]:
        with target.in_use():
            return gradients(call, library.registered(target.backend), drawn, FROZEN)

    drawn = [redrawn(arguments, seed) for seed in range(draws)]
    assert_gradients(ours, call, drawn, lambda given: gradients(call, reference, given, FROZEN), FROZEN)


@pytest.mark.parametrize("case", PARITY, ids=str)
def test_parity(case: Case, target, dtype):
    arguments = case.make(dtype, target.device)
    check(lambda ops, given: run(ops, case, given), arguments, target, 8 if arguments[0].numel() < 20_000 else 3)


@pytest.mark.parametrize("shape", [(3, 7, 20), (2, 50, 64), (1, 3, 33)], ids=str)
@pytest.mark.parametrize("classes", [None, 1, 10, 130])
def test_parity_of_the_norm_and_the_head(shape, classes, target, dtype):
    generator = torch.Generator().manual_seed(3)
    channels = shape[-1]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(target.device, dtype)

    x = draw(*shape)
    if classes is None:
        norm = Norm(draw(channels), draw(channels), 1e-6)
        check(lambda ops, given: ops.layer_norm(*given), (x, norm), target, 8)
        check(lambda ops, given: ops.head(*given), (x, None), target, 8)
    else:
        w = Linear(draw(classes, channels), draw(classes))
        check(lambda ops, given: ops.head(*given), (x, w), target, 8)
        check(lambda ops, given: ops.head(*given), (x, w._replace(bias=None)), target, 8)


@pytest.mark.only("cpp")
@pytest.mark.parametrize("case", CUT, ids=str)
def test_the_same_bits_each_time(case: Case, target):
    """With the same number of threads, and with up to eight: small calls are cut up in the same way for all."""
    arguments = case.make(torch.float32)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3, 8):
            torch.set_num_threads(count)
            with target.in_use():
                ops = library.registered("cpp")
                found.append(gradients(lambda ops, given: run(ops, case, given), ops, arguments, FROZEN))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
