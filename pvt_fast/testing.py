"""The op cases and the parity rule, shared by tests and benchmarks.

A case is the description of one op call; `case.make(dtype)` builds its arguments from a fixed seed, and
`case.run(backend, arguments)` calls the op. Arguments are made in float64 and rounded, so that every dtype sees the
same problem; `to_float64` gives the truth for the *rounded* arguments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .accelerate.fused import FusedBlock, FusedEmbed, FusedNorm
from .accelerate.halves import linear_of, norm_of
from .backend import dispatch
from .config import LINEAR_POOL_SIZE, PVTConfig, conv_size
from .model import PVT_V2
from .ops import (
    AttentionSpec,
    AttentionWeights,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    map_tensors,
    reference,
    to_map,
    to_tokens,
)
from .ops.checks import OPERANDS


@dataclass(frozen=True)
class PatchEmbedCase:
    """`patch_embed` of a (batch, in_channels, *hw) image to `channels`."""

    batch: int
    hw: tuple[int, int]
    in_channels: int
    channels: int
    kernel: int = 3
    stride: int = 2
    layout: str = "nchw"  # or "nhwc": channels-last strides; or "sliced": no dimension compact

    op = "patch_embed"

    def __str__(self) -> str:
        size = f"B{self.batch}_{self.hw[0]}x{self.hw[1]}_C{self.in_channels}-{self.channels}"
        return f"embed-{size}_k{self.kernel}s{self.stride}_{self.layout}"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        draw = Draw(str(self), dtype, device)
        image = draw.strided((self.batch, self.in_channels, *self.hw), self.layout)
        weights = draw.weights(self.op, {"C": self.channels, "Cin": self.in_channels, "k": self.kernel})
        return image, PatchEmbedWeights(**weights), self.stride

    def gemm_flops(self) -> int:
        tokens = math.prod(conv_size(size, self.kernel, self.stride) for size in self.hw)
        return 2 * self.batch * tokens * self.channels * self.in_channels * self.kernel**2


@dataclass(frozen=True)
class AttentionCase:
    """`attention` of a (batch, H * W, channels) map; `scale_residual` draws a residual_scale."""

    batch: int
    hw: tuple[int, int]
    channels: int
    heads: int
    sr_ratio: int = 1
    linear: bool = False
    bias: bool = True
    scale_residual: bool = False
    layout: str = "compact"

    op = "attention"

    def __str__(self) -> str:
        kind = "linear" if self.linear else f"sr{self.sr_ratio}"
        flags = ("" if self.bias else "_nobias") + ("_scaled" if self.scale_residual else "")
        size = f"B{self.batch}_{self.hw[0]}x{self.hw[1]}_C{self.channels}_h{self.heads}"
        return f"attention-{size}_{kind}{flags}_{self.layout}"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        draw = Draw(str(self), dtype, device)
        c = self.channels
        x = draw.strided((self.batch, self.hw[0] * self.hw[1], c), self.layout)
        sizes = {"C": c, "2C": 2 * c, "R": 1 if self.linear else self.sr_ratio}
        absent = () if self.linear or self.sr_ratio > 1 else ("sr", "sr_norm")
        weights = AttentionWeights(**draw.weights(self.op, sizes, absent, () if self.bias else ("q", "kv")))
        # a scale that spreads the softmax, so that a wrong score shows
        spec = AttentionSpec(self.heads, 2.0 * (c // self.heads) ** -0.5, self.linear)
        return x, self.hw, weights, spec, draw.residual_scale(self.batch) if self.scale_residual else None

    def keys(self) -> int:
        return LINEAR_POOL_SIZE**2 if self.linear else (self.hw[0] // self.sr_ratio) * (self.hw[1] // self.sr_ratio)

    def gemm_flops(self) -> int:
        tokens, keys, c = math.prod(self.hw), self.keys(), self.channels
        reduction = keys * c * c * (1 if self.linear else self.sr_ratio**2 if self.sr_ratio > 1 else 0)
        return 2 * self.batch * (2 * tokens * c * c + 2 * keys * c * c + 2 * tokens * keys * c + reduction)


@dataclass(frozen=True)
class MlpCase:
    """`mlp` of a (batch, H * W, channels) map with `hidden` channels inside."""

    batch: int
    hw: tuple[int, int]
    channels: int
    hidden: int
    relu: bool = False
    scale_residual: bool = False
    layout: str = "compact"

    op = "mlp"

    def __str__(self) -> str:
        flags = ("_relu" if self.relu else "") + ("_scaled" if self.scale_residual else "")
        return f"mlp-B{self.batch}_{self.hw[0]}x{self.hw[1]}_C{self.channels}_hid{self.hidden}{flags}_{self.layout}"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        draw = Draw(str(self), dtype, device)
        x = draw.strided((self.batch, self.hw[0] * self.hw[1], self.channels), self.layout)
        weights = MlpWeights(**draw.weights(self.op, {"C": self.channels, "hidden": self.hidden}))
        scale = draw.residual_scale(self.batch) if self.scale_residual else None
        return x, self.hw, weights, MlpSpec(self.relu), scale

    def gemm_flops(self) -> int:
        return 2 * self.batch * math.prod(self.hw) * self.hidden * (2 * self.channels + 9)


Case = PatchEmbedCase | AttentionCase | MlpCase


class Draw:
    """Draws the tensors of one case: normal, seeded by the case's name, rounded to `dtype`."""

    def __init__(self, name: str, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std + mean
        return values.to(self.device, self.dtype)

    def linear(self, out: int, *inner: int, bias: bool = True) -> Linear:
        weight = self.normal(out, *inner, std=math.prod(inner) ** -0.5)
        return Linear(weight, self.normal(out, std=0.5) if bias else None)

    def norm(self, channels: int, eps: float) -> Norm:
        return Norm(self.normal(channels, std=0.2, mean=1.0), self.normal(channels, std=0.2), eps)

    def weights(
        self, op: str, sizes: dict[str, int], absent: tuple[str, ...] = (), without_bias: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The norms and linears of an op's weights by their names, in their order."""
        drawn: dict[str, Any] = {}
        for operand in OPERANDS[op]:
            name, _, field = operand.name.removeprefix("w.").partition(".")
            shape = [sizes[size] if isinstance(size, str) else size for size in operand.shape]
            if name in absent:
                drawn[name] = None
            elif field == "weight" and operand.kind is Norm:
                # published epsilons: those of blocks, and of the norms behind convolutions
                drawn[name] = self.norm(shape[0], 1e-6 if op != "patch_embed" and name == "norm" else 1e-5)
            elif field == "weight":
                drawn[name] = self.linear(*shape, bias=name not in without_bias)
        return drawn

    def residual_scale(self, batch: int) -> Tensor:
        return torch.tensor([0.0, 1.25, 0.75] * batch, dtype=self.dtype, device=self.device)[:batch]

    def strided(self, shape: tuple[int, ...], layout: str) -> Tensor:
        """Normal values of mean 0.5 in the given memory layout."""
        values = self.normal(*shape, mean=0.5)
        if layout == "nhwc":
            return values.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            room = torch.full([2 * size + 1 for size in shape], math.nan, dtype=self.dtype, device=self.device)
            view = room[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
            return view.copy_(values)
        return values


# Shapes that each take another way through some kernel: published widths and maps, odd widths, tails in every
# dimension, one-token maps, empty batches, non-compact input.
CASES: tuple[Case, ...] = (
    PatchEmbedCase(1, (64, 64), 3, 64, kernel=7, stride=4),
    PatchEmbedCase(2, (37, 51), 1, 32, kernel=7, stride=4),
    PatchEmbedCase(1, (40, 24), 3, 20, kernel=8, stride=4),
    PatchEmbedCase(2, (14, 14), 64, 128, layout="nhwc"),
    PatchEmbedCase(1, (13, 7), 33, 50, layout="nhwc"),
    PatchEmbedCase(1, (7, 9), 160, 256, layout="sliced"),
    PatchEmbedCase(3, (1, 1), 8, 16),
    PatchEmbedCase(0, (8, 8), 3, 16),
    AttentionCase(1, (56, 56), 64, 1, sr_ratio=8),
    AttentionCase(2, (14, 14), 160, 5, sr_ratio=2),
    AttentionCase(1, (7, 7), 512, 8),
    AttentionCase(2, (15, 9), 32, 1, sr_ratio=8, scale_residual=True),
    AttentionCase(1, (28, 28), 128, 2, linear=True),
    AttentionCase(2, (5, 11), 64, 2, linear=True, scale_residual=True),
    AttentionCase(3, (6, 5), 36, 3, sr_ratio=2, bias=False, layout="sliced"),
    AttentionCase(1, (10, 25), 40, 2, layout="sliced"),
    AttentionCase(1, (1, 1), 24, 3),
    AttentionCase(1, (32, 32), 64, 2),
    AttentionCase(0, (4, 4), 16, 1, sr_ratio=2),
    MlpCase(1, (56, 56), 32, 256),
    MlpCase(2, (28, 28), 128, 512),
    MlpCase(2, (14, 14), 320, 1280),
    MlpCase(1, (7, 7), 256, 1024, relu=True),
    MlpCase(2, (9, 13), 64, 256, relu=True, scale_residual=True),
    MlpCase(3, (5, 3), 30, 77, layout="sliced"),
    MlpCase(2, (1, 70), 20, 52, relu=True),
    MlpCase(1, (1, 1), 48, 96),
    MlpCase(0, (4, 4), 16, 64),
)


def model_cases(config: PVTConfig, batch: int, hw: tuple[int, int]) -> list[Case]:
    """Every call of these three ops in one forward pass on images (batch, in_channels, *hw), in order."""
    cases: list[Case] = []
    channels = config.in_channels
    for stage, size in enumerate(config.map_sizes(*hw)):
        kernel, stride = config.patch(stage)
        dim, heads, sr_ratio = config.embed_dims[stage], config.num_heads[stage], config.sr_ratios[stage]
        # later stages read the tokens of the one before, which are channels-last
        cases.append(PatchEmbedCase(batch, hw, channels, dim, kernel, stride, "nhwc" if stage else "nchw"))
        attention = AttentionCase(
            batch, size, dim, heads, 1 if config.linear else sr_ratio, config.linear, config.qkv_bias
        )
        mlp = MlpCase(batch, size, dim, config.hidden_dims[stage], relu=config.linear)
        cases += [attention, mlp] * config.depths[stage]
        hw, channels = size, dim
    return cases


def model_flops(config: PVTConfig, batch: int, hw: tuple[int, int]) -> int:
    """Multiplications and additions of a forward pass in its matrix products and convolutions; nothing else counts."""
    head = 2 * batch * config.embed_dims[-1] * config.num_classes
    return head + sum(case.gemm_flops() for case in model_cases(config, batch, hw))


def run(backend: Any, case: Case, arguments: tuple) -> Tensor:
    """Call the case's op on a backend; the tokens it gives."""
    output = getattr(backend, case.op)(*arguments)
    return output[0] if isinstance(output, tuple) else output


def run_stages(model: PVT_V2, image: Tensor, backend: str) -> Tensor:
    """The stages of a model on a backend's ops, on whatever device: tokens of the last one after its norm.

    For recordings of launches on tensors without memory, where the model itself would run its own modules.
    """
    ops: Any = dispatch.load(backend)
    x, hw = image, (0, 0)
    for owner, stand_in in model.stand_ins():
        fused = stand_in.current(owner)
        if isinstance(fused, FusedEmbed):
            weights = PatchEmbedWeights(linear_of(fused.proj), norm_of(fused.norm))
            x, hw = ops.patch_embed(x, weights, owner.proj.stride[0])  # type: ignore[index]
        elif isinstance(fused, FusedBlock):
            x = fused.compute(owner, backend, x, hw)
        elif isinstance(fused, FusedNorm):
            x = to_map(ops.layer_norm(x, norm_of(fused.norm)), hw)
    return to_tokens(x)


def expected(case: Case, arguments: tuple) -> tuple[Tensor, Tensor]:
    """(float64 truth, plain torch in the arguments' own dtype), both on the CPU."""
    cpu = map_tensors(arguments, lambda t: t.cpu())
    truth = run(reference, case, map_tensors(cpu, lambda t: t.double()))
    return truth, run(reference, case, cpu)


@torch.no_grad()
def model_truth(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(float64 truth on the CPU, plain torch in the dtype and on the device of the images), of a model's answer.

    Weights are rounded to that dtype for both. PVT_V2 runs on the reference; the model is left as it is.
    """
    rounded = copy.deepcopy(model).eval().to(images.device, images.dtype)
    for module in rounded.modules():
        if isinstance(module, PVT_V2):
            module.backend = "reference"
    same_dtype = rounded(images)
    return rounded.cpu().double()(images.cpu().double()), same_dtype


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": torch.max,
    "root mean square": lambda error: error.square().mean().sqrt(),
}


def _error(actual: Tensor, truth: Tensor) -> Tensor:
    return (actual.detach().cpu().double() - truth).abs()


def parity_bounds(truth: Tensor, same_dtype: Tensor) -> dict[str, float]:
    """What the parity rule allows the "largest" and the "root mean square" error, of values that are not empty."""
    unit = torch.finfo(same_dtype.dtype).eps
    theirs, size = _error(same_dtype, truth), truth.abs()
    return {name: 2 * float(reduce(theirs)) + unit * float(reduce(size)) for name, reduce in _REDUCTIONS.items()}


def assert_parity(actual: Tensor, truth: Tensor, same_dtype: Tensor, what: str = "output") -> None:
    """Raise AssertionError unless the parity rule holds (no `assert`: `python -O` keeps this check).

    Error against float64 at most twice that of plain torch in the same dtype, plus one rounding unit.

    Held for the largest error and for the root mean square. One rounding unit is eps(dtype) times the largest
    (root-mean-square) true value.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if actual.dtype != same_dtype.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype}, expected {same_dtype.dtype}")
    if truth.numel() == 0:
        return
    ours = _error(actual, truth)
    if ours.isnan().any():
        raise AssertionError(f"{what}: {int(ours.isnan().sum())} of {ours.numel()} values are NaN")
    bounds = parity_bounds(truth, same_dtype)
    for name, reduce in _REDUCTIONS.items():
        if (error := float(reduce(ours))) > bounds[name]:
            theirs = float(reduce(_error(same_dtype, truth)))
            raise AssertionError(
                f"{what}: {name} error {error:.3e} exceeds {bounds[name]:.3e} "
                f"(plain torch in {actual.dtype}: {theirs:.3e})"
            )
