"""An image's result on the C++ kernels is the same bits whatever runs beside it: threads, other images, other runs.

The ops are held to the same in test_ops.py; here it is whole models, on images of odd sides: a map tall enough that
threads share it by bands of rows, and one so low that they share it by panels of hidden channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from pvt_fast import PVT_V2
from pvt_fast.testing import AttentionCase, run

pytestmark = pytest.mark.only("cpp")

BATCH = 5  # two threads take two images each and share the last; three take one each and share two


@lru_cache
def model_of(kind: str, dtype: torch.dtype) -> PVT_V2:
    torch.manual_seed(2)
    model = PVT_V2(
        embed_dims=(24, 40, 66, 96),
        num_heads=(1, 2, 3, 6),
        mlp_ratios=(4, 3, 4, 2.5),
        depths=(1, 1, 2, 1),
        sr_ratios=(8, 4, 2, 1),
        linear=kind == "linear",
        num_classes=11,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.backend = "cpp"
    return model.to(dtype).eval()


def images_of(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, 3, *size, generator=torch.Generator().manual_seed(4)).to(dtype)


@torch.no_grad()
def results(model: PVT_V2, images: Tensor) -> list[Tensor]:
    """Every stage's map, before and after its norm, and the logits."""
    before = model.forward_intermediates(images, norm=False, intermediates_only=True)
    after = model.forward_intermediates(images, intermediates_only=True)
    return [*before, *after, model(images)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one, other), f"{what}: result {index} differs by up to {(one - other).abs().max()}"


# each kind of attention on one map, each way to share a map with one kind; the other pairs show nothing more
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("sr", (235, 37)),
        ("linear", (45, 71)),
        pytest.param("sr", (45, 71), marks=pytest.mark.full),
        pytest.param("linear", (235, 37), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_threads_runs_and_companions_change_no_bit(kind, size, target, dtype):
    model, images = model_of(kind, dtype), images_of(size, dtype)
    with target.in_use():
        with threads(1):
            alone = [results(model, images[i : i + 1]) for i in range(BATCH)]
        assert all(result.isfinite().all() for result in alone[0])
        assert not torch.equal(alone[0][-1], alone[1][-1])
        expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
        order = [3, 0, 4, 2, 1]
        for count in (1, 2, 3):
            with threads(count):
                for repeat in range(2):
                    what = f"{count} threads, run {repeat}"
                    assert_same_bits(results(model, images[:1]), alone[0], f"{what}, one image")
                    assert_same_bits(results(model, images), expected, f"{what}, batch")
                shuffled = results(model, images[order])
                assert_same_bits(shuffled, [result[order] for result in expected], f"{count} threads, other places")


def test_an_image_is_the_same_in_every_wave(target, dtype):
    """Attention takes a batch in waves, as many images at a time as 8 MiB of tokens, packed keys and values allow.

    Heads of one channel are padded to whole panels: 64 of them take at least 110 KiB an image, so
    150 images are two waves or more.
    """
    case = AttentionCase(150, (7, 7), 64, 64, linear=True)
    x, *rest = case.make(dtype)
    with target.in_use():
        with threads(1):
            alone = torch.cat([run(target.ops, case, (x[i : i + 1], *rest)) for i in range(len(x))])
        for count in (1, 2, 3):
            with threads(count):
                assert_same_bits([run(target.ops, case, (x, *rest))], [alone], f"{count} threads")
