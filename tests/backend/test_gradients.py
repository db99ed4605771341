"""The C++ backend's own gradients on every instruction set: parity at the stages' sizes, the same bits each time."""

import pytest
import torch
from torch import Tensor

from pvt_fast.backend import registered as library
from pvt_fast.ops import Linear, Norm, map_tensors, reference, tensors_in
from pvt_fast.testing import CASES, AttentionCase, Case, MlpCase, PatchEmbedCase, assert_parity, run

pytestmark = [pytest.mark.not_interpreted, pytest.mark.usefixtures("poisoned_memory")]

# Shapes that are cut up in more ways than those of the stages: chunks that begin within an image and bands of unequal
# height, images of one row and of one column, more keys than fit a panel, images' gradients by bands.
CUT = [
    MlpCase(1, (61, 9), 40, 136, relu=True),
    MlpCase(3, (2, 3), 17, 15),
    MlpCase(3, (33, 1), 24, 70),
    MlpCase(5, (7, 7), 64, 256),
    AttentionCase(1, (23, 21), 48, 3),
    AttentionCase(3, (13, 10), 64, 1, sr_ratio=4),
    AttentionCase(3, (9, 11), 96, 2, linear=True),
    PatchEmbedCase(1, (70, 33), 3, 24, kernel=7, stride=4),
    PatchEmbedCase(3, (37, 21), 20, 40, layout="nhwc"),
    PatchEmbedCase(1, (40, 9), 4, 12, kernel=5, stride=1),
]


def gradients(ops, call, arguments: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Of a fixed random projection of call(ops, arguments), by every tensor in them."""
    leaves = map_tensors(arguments, lambda tensor: tensor.detach().to(dtype).requires_grad_())
    output = call(ops, leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [leaf for leaf in tensors_in(leaves) if leaf.shape != (output.shape[0],) or output.dim() == 2]
    return list(torch.autograd.grad(output, wanted, direction.to(output)))


def check(call, arguments: tuple, target, dtype: torch.dtype) -> None:
    with target.in_use():
        ours = gradients(library.registered(target.backend), call, arguments, dtype)
    cpu = map_tensors(arguments, lambda tensor: tensor.cpu())
    truth, plain = (gradients(reference, call, cpu, kind) for kind in (torch.float64, dtype))
    for index, trio in enumerate(zip(ours, truth, plain, strict=True)):
        assert_parity(*trio, what=f"gradient {index}")


@pytest.mark.parametrize("case", [*CASES, *CUT], ids=str)
def test_parity(case: Case, target, dtype):
    """Not by residual_scale, which turns to the reference: stochastic depth wants none."""
    check(lambda ops, arguments: run(ops, case, arguments), case.make(dtype, target.device), target, dtype)


@pytest.mark.parametrize("shape", [(3, 7, 20), (2, 50, 64), (1, 1, 33)], ids=str)
@pytest.mark.parametrize("classes", [None, 1, 10, 130])
def test_parity_of_the_norm_and_the_head(shape, classes, target, dtype):
    generator = torch.Generator().manual_seed(3)
    channels = shape[-1]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(target.device, dtype)

    x = draw(*shape)
    if classes is None:
        check(
            lambda ops, all: ops.layer_norm(all[0], all[1]),
            (x, Norm(draw(channels), draw(channels), 1e-6)),
            target,
            dtype,
        )
        check(lambda ops, all: ops.head(all[0], None), (x,), target, dtype)
    else:
        w = Linear(draw(classes, channels), draw(classes))
        check(lambda ops, all: ops.head(*all), (x, w), target, dtype)
        check(lambda ops, all: ops.head(*all), (x, w._replace(bias=None)), target, dtype)


@pytest.mark.parametrize("case", CUT, ids=str)
def test_the_same_bits_each_time(case: Case, target):
    """With the same number of threads, and with up to eight: small calls are cut up in the same way for all."""
    if target.backend != "cpp":
        pytest.skip("the promise is the C++ backend's")
    arguments = case.make(torch.float32)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3, 8):
            torch.set_num_threads(count)
            with target.in_use():
                found.append(
                    gradients(library.registered("cpp"), lambda ops, all: run(ops, case, all), arguments, torch.float32)
                )
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
