"""What a launch of each kernel has to do, from its arguments: bytes, matrix FLOP, lane instructions. Nothing is timed.

    python benchmarks/roofline.py --models b0,b2 --batch 256 --size 224    # a prediction, without a GPU

A kernel cannot take less time than the largest of: its bytes over the bandwidth of a copy, its matrix FLOP over the
rate of a large product, its lane instructions over the rate of the fp32 lanes. The model of bytes: every tensor
argument crosses memory once, partial sums twice; what a small batch leaves in the L2 cache is not modelled, nor are
gaps between launches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

import pvt_fast
from pvt_fast.config import VARIANTS, PVTConfig
from pvt_fast.kernels import BACKEND
from pvt_fast.kernels.launch import Launch, recorded
from pvt_fast.testing import run_stages

from ..case import Case
from ..report import table

# Lane instructions per element: counted in the machine code of sm_90 where a kernel is nothing else, else assumed.
LAYER_NORM, SOFTMAX, EPILOGUE = 8, 10, 3
# Convolution and GELU of one hidden element, all of the main loop's instructions: with a map in fp16 beside bf16
# weights, with another, with erf (benchmarks/gates counts the first two).
HIDDEN_HALF, HIDDEN_FULL, HIDDEN_EXACT = 19, 35, 48
GELU, GELU_EXACT = 12, 25  # polynomial; erf
LANES_PER_PROCESSOR = 128


class Work(NamedTuple):
    """What has to be done, whatever does it."""

    bytes: int
    matrix_flop: int = 0
    lane_instructions: int = 0


class Ceilings(NamedTuple):
    """What a GPU does at most: bytes/s of a copy (read plus written), FLOP/s in 16 bits, lane instructions/s."""

    copy: float
    product: float
    lanes: float

    def seconds(self, work: Work) -> float:
        """The least time for this work, if everything overlaps."""
        return max(self.shares(work).values())

    def shares(self, work: Work) -> dict[str, float]:
        """Seconds that each unit alone would take."""
        return {
            "memory": work.bytes / self.copy,
            "matrix": work.matrix_flop / self.product,
            "lanes": work.lane_instructions / self.lanes,
        }


def lane_rate(processors: int, clock_hz: float) -> float:
    return processors * LANES_PER_PROCESSOR * clock_hz


# Copy and product were measured on random data; the clock is assumed.
CHIPS = {"H200": Ceilings(copy=4.3e12, product=790e12, lanes=lane_rate(132, 1.755e9))}


class Operands:
    """The arguments of a launch by their parameters' names."""

    def __init__(self, launch: Launch) -> None:
        self.kernel = launch.name
        self.values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants

    def tensor(self, name: str) -> Tensor:
        value = self.values.get(name)
        if not isinstance(value, Tensor):
            raise TypeError(f"roofline: {name} of {self.kernel} must be a tensor, got {type(value).__name__}")
        return value

    def rows(self, name: str) -> int:
        """Rows of a tensor: all but its last dimension."""
        return math.prod(self.tensor(name).shape[:-1])

    def product(self, weight: str, rows: int) -> int:
        """FLOP of that many rows by a weight, convolution kernels included."""
        return 2 * rows * self.tensor(weight).numel()

    def flag(self, name: str) -> bool:
        return bool(self.values.get(name))

    def gelu(self) -> int:
        return GELU_EXACT if self.flag("EXACT") else GELU

    def size(self, name: str) -> int:
        """Bytes of a tensor; 0 where there is none."""
        value = self.values.get(name)
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    def hidden_lanes(self) -> int:
        """Instructions of convolution and GELU per hidden element."""
        hidden = self.tensor("hidden_ptr").dtype
        if hidden == torch.float32:
            return HIDDEN_EXACT
        return HIDDEN_HALF if self.tensor("taps_ptr").dtype == torch.float16 else HIDDEN_FULL


# Of a kernel: (matrix FLOP, lane instructions).
Entry = Callable[[Operands], tuple[int, int]]


def _patch_embed(o: Operands) -> tuple[int, int]:
    return o.product("weight_ptr", o.rows("out_ptr")), LAYER_NORM * o.tensor("out_ptr").numel()


def _linear(o: Operands) -> tuple[int, int]:
    return o.product("weight_ptr", o.rows("out_ptr")), EPILOGUE * o.tensor("out_ptr").numel()


def _norm_linear(o: Operands) -> tuple[int, int]:
    lanes = LAYER_NORM * o.tensor("x_ptr").numel() + EPILOGUE * o.tensor("out_ptr").numel()
    return o.product("weight_ptr", o.rows("out_ptr")), lanes


def _norm_fc1(o: Operands) -> tuple[int, int]:
    """The hidden map's border counts as bytes only."""
    rows, x, hidden = o.rows("x_ptr"), o.tensor("x_ptr"), o.tensor("hidden_ptr").shape[-1]
    return o.product("weight_ptr", rows), LAYER_NORM * x.numel() + EPILOGUE * rows * hidden


def _dwconv_gelu(o: Operands) -> tuple[int, int]:
    return 0, o.hidden_lanes() * o.tensor("out_ptr").numel()


def _dwconv_fc2(o: Operands) -> tuple[int, int]:
    """Each column of tiles convolves anew."""
    rows, hidden, channels = o.rows("out_ptr"), o.tensor("hidden_ptr").shape[-1], o.tensor("out_ptr").shape[-1]
    columns = -(-channels // o.values["BLOCK_C"])
    lanes = o.hidden_lanes() * columns * rows * hidden + EPILOGUE * o.tensor("out_ptr").numel()
    return o.product("weight_ptr", rows), lanes


def _spatial_reduction(o: Operands) -> tuple[int, int]:
    """Each block of columns normalises anew."""
    x, channels = o.tensor("x_ptr"), o.values["C"]
    rows = x.numel() // channels // o.values["R"] ** 2 if not o.flag("LINEAR") else o.rows("x_ptr")
    blocks = 0 if o.flag("LINEAR") else -(-channels // o.values["BLOCK_N"])
    flop, lanes = o.product("weight_ptr", rows), blocks * LAYER_NORM * x.numel() + o.tensor("partial_ptr").numel()
    if o.flag("TO_KV"):
        gelu = o.gelu() if o.flag("LINEAR") else 0
        flop, lanes = flop + o.product("kv_weight_ptr", rows), lanes + (LAYER_NORM + gelu) * rows * channels
    return flop, lanes


def _attend(o: Operands, keys: int) -> tuple[int, int]:
    """Scores and values of all heads of x (B, N, C), with q."""
    rows, channels = o.rows("x_ptr"), o.tensor("x_ptr").shape[-1]
    heads = channels // o.values["HEAD_DIM"]
    lanes = (LAYER_NORM + EPILOGUE) * rows * channels + SOFTMAX * rows * keys * heads
    return 4 * rows * keys * channels + o.product("q_weight_ptr", rows), lanes


def _head_attention(o: Operands) -> tuple[int, int]:
    """Keys and values are counted once for each program that makes them: a tile of queries."""
    images, tokens, channels = o.tensor("x_ptr").shape
    keys = o.values["keys"]
    flop, lanes = _attend(o, keys)
    if o.values["SOURCE"] != "kv":
        tiles = -(-tokens // o.values["BLOCK_M"])
        flop += o.product("kv_weight_ptr", images * tiles * keys)
    if o.values["projects"]:
        flop += o.product("proj_weight_ptr", images * tokens)
        lanes += EPILOGUE * images * tokens * channels
    return flop, lanes


def _attention(o: Operands) -> tuple[int, int]:
    flop, lanes = _attend(o, o.tensor("kv_ptr").shape[1])
    return flop + o.product("proj_weight_ptr", o.rows("x_ptr")), lanes + EPILOGUE * o.tensor("out_ptr").numel()


def _layer_norm(o: Operands) -> tuple[int, int]:
    return 0, LAYER_NORM * o.tensor("out_ptr").numel()


def _pool(o: Operands) -> tuple[int, int]:
    return 0, (LAYER_NORM + 2) * o.tensor("x_ptr").numel()


def _token_mean(o: Operands) -> tuple[int, int]:
    return 0, 2 * o.tensor("x_ptr").numel()  # a conversion and a sum


ENTRIES: dict[str, Entry] = {
    "attention_kernel": _attention,
    "dwconv_fc2_kernel": _dwconv_fc2,
    "dwconv_gelu_kernel": _dwconv_gelu,
    "head_attention_kernel": _head_attention,
    "layer_norm_kernel": _layer_norm,
    "linear_kernel": _linear,
    "norm_fc1_kernel": _norm_fc1,
    "norm_linear_kernel": _norm_linear,
    "patch_embed_kernel": _patch_embed,
    "pool_kernel": _pool,
    "spatial_reduction_kernel": _spatial_reduction,
    "token_mean_kernel": _token_mean,
}


def moved(o: Operands) -> int:
    """Bytes that cross memory: every tensor argument once that this form of the kernel touches, sums written and read
    again twice. Sums in several parts are those of few tiles and stay in the L2 cache."""
    total = sum(map(o.size, o.values)) - o.size("counter_ptr")
    to_kv = o.kernel != "spatial_reduction_kernel" or o.flag("TO_KV")
    if not to_kv:
        total -= o.size("kv_ptr") + o.size("kv_weight_ptr")
    elif "partial_ptr" in o.values:
        total += o.size("partial_ptr") * (1 if o.values["parts"] == 1 else -1)
    if o.kernel == "head_attention_kernel":
        total += o.size("heads_ptr") if o.values["projects"] else -o.size("out_ptr") - o.size("proj_weight_ptr")
        total -= {"kv": o.size("kv_weight_ptr"), "self": o.size("source_ptr")}.get(o.values["SOURCE"], 0)
    return total


def work_of(launch: Launch) -> Work:
    """What the launch has to do; raises KeyError for a kernel without an entry."""
    if launch.name not in ENTRIES:
        raise KeyError(f"roofline: {launch.name} must have an entry in ENTRIES (benchmarks/roofline.py), got none")
    operands = Operands(launch)
    flop, lanes = ENTRIES[launch.name](operands)
    weights = [v for name, v in operands.values.items() if "weight" in name and isinstance(v, Tensor) and v.dim() > 1]
    if any(weight.dtype == torch.float32 for weight in weights):  # no matrix unit multiplies true fp32
        flop, lanes = 0, lanes + flop // 2
    return Work(moved(operands), flop, lanes)


def classifier_work(config: PVTConfig, batch: int, dtype: torch.dtype) -> Work:
    """The head's linear, which is torch's and no launch of ours."""
    width, classes = config.embed_dims[-1], config.num_classes
    elements = (width + 1) * classes + batch * (width + classes)
    return Work(elements * dtype.itemsize, 2 * batch * width * classes)


def model_launches(case: Case) -> list[Launch]:
    """The launches of one forward, recorded without memory; their tensors are on the meta device."""
    dtype = case.torch_dtype
    with torch.device("meta"), torch.no_grad(), recorded() as launches:
        model = pvt_fast.create_model(case.model).eval().to(dtype)
        tokens = run_stages(model, torch.empty(case.batch, 3, case.size, case.size, dtype=dtype), "triton")
        BACKEND.head(tokens, None)
    return launches


def total(works: Iterable[Work]) -> Work:
    return Work(*(sum(column) for column in zip(*works, strict=True)))


def model_works(case: Case) -> list[Work]:
    works = [work_of(launch) for launch in model_launches(case)]
    return [*works, classifier_work(PVTConfig(**VARIANTS[case.model]), case.batch, case.torch_dtype)]


def prediction(cases: list[Case], chip: str) -> str:
    """A Markdown table of what the chip allows, labelled as what it is."""
    ceilings = CHIPS[chip]
    lines = []
    for case in cases:
        works = model_works(case)
        summed, seconds = total(works), sum(map(ceilings.seconds, works))
        limits = dict.fromkeys(ceilings.shares(summed), 0.0)
        for work in works:
            shares = ceilings.shares(work)
            limits[max(shares, key=shares.__getitem__)] += ceilings.seconds(work) / seconds
        lines.append(
            [
                str(case),
                str(len(works)),
                f"{summed.bytes / case.batch / 1e6:.2f}",
                f"{summed.matrix_flop / case.batch / 1e9:.2f}",
                f"{summed.lane_instructions / case.batch / 1e9:.2f}",
                f"{1e3 * seconds:.3f}",
                f"{case.batch / seconds:,.0f}",
                ", ".join(f"{name} {100 * share:.0f} %" for name, share in limits.items()),
            ]
        )
    heading = ["case", "kernels", "MB/image", "matrix GFLOP/image", "G lane instr./image", "ms", "images/s"]
    note = (
        f"**Prediction, nothing here was measured.** The least time of {chip} for the launches of one forward, each at "
        f"the slowest of copy {ceilings.copy / 1e12:.2f} TB/s, product {ceilings.product / 1e12:.0f} TFLOP/s and "
        f"{ceilings.lanes / 1e12:.1f} T lane instructions/s, one after the other; `bound by` is of that time."
    )
    return f"{note}\n\n{table([*heading, 'bound by'], lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="b0,b2,b2_li", help="comma-separated")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--chip", default="H200", choices=tuple(CHIPS))
    options = parser.parse_args()
    names = [f"pvt_v2_{model.removeprefix('pvt_v2_')}" for model in options.models.split(",")]
    for name in names:
        if name not in VARIANTS:
            parser.error(f"--models must be among {', '.join(VARIANTS)}; got {name}")
    print(prediction([Case(name, options.batch, options.size, options.dtype) for name in names], options.chip))
