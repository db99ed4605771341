"""Single ops: the cpp backend against plain torch, in one process, in turns; the part of `cpu.py --op`."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

from pvt_fast import testing
from pvt_fast.backend import cpp
from pvt_fast.cli.timing import burst, in_turns, spread
from pvt_fast.config import VARIANTS, PVTConfig
from pvt_fast.ops import reference, tensors_in

from .. import report
from ..case import Case
from . import peak


def op_cases(cases: list[Case]) -> list[tuple[testing.Case, str]]:
    """(op, dtype) for every different call that the models make."""
    return list(
        dict.fromkeys(
            (op, case.dtype)
            for case in cases
            for op in testing.model_cases(PVTConfig(**VARIANTS[case.model]), case.batch, (case.size, case.size))
        )
    )


def least_bytes(arguments: tuple, output: Tensor) -> int:
    """Bytes that a call has to move at least: input, weights and output, once each."""
    return sum(tensor.nbytes for tensor in (output, *tensors_in(arguments)))


def compare(cases: list[Case], options: argparse.Namespace, peaks: bool, progress: Progress) -> str:
    """A Markdown table with a line for each op, held to the parity rule before it is timed; the figures are cpp's."""
    lines = []
    for op, dtype in progress.track(op_cases(cases), description="ops"):
        arguments = op.make({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        with torch.inference_mode():
            output = testing.run(cpp, op, arguments)
            testing.assert_parity(output, *testing.expected(op, arguments), f"{op} {dtype}")
            meter = peak.Meter(cpp.isa(), options.threads)
            calls = [partial(testing.run, backend, op, arguments) for backend in (cpp, reference)]
            bursts = [partial(burst, call, options.seconds) for call in calls]
            ours, plain = in_turns(bursts, options.rounds, after_round=meter.measure if peaks else lambda: None)
        lines.append(line(op, dtype, ours, plain, least_bytes(arguments, output), meter.medians()))
    note = (
        "`ratio`: plain torch's time over ours. MB: input, weights and output, once each; what comes out of a cache "
        "may be faster than memory is (`% of read`)."
    )
    heading = [
        "op",
        "dtype",
        "ms",
        "10-90 %",
        "plain torch ms",
        "ratio",
        "GFLOP/s",
        "% of peak",
        "MB",
        "GB/s",
        "% of read",
    ]
    return f"{note}\n\n{report.table(heading, lines)}\n"


def line(
    op: testing.Case, dtype: str, ours: list[float], plain: list[float], moved: int, peaks: dict[str, float]
) -> list[str]:
    """The table's cells; `moved` in bytes, `peaks` as in a row of the report."""
    time, plain_time = spread(ours), spread(plain)
    gflops, gbytes = op.gemm_flops() / time.ms / 1e6, moved / time.ms / 1e6
    return [
        str(op),
        dtype,
        f"{time.ms:.3f}",
        f"{time.ms_10:.3f}-{time.ms_90:.3f}",
        f"{plain_time.ms:.3f}",
        f"{plain_time.ms / time.ms:.2f}",
        f"{gflops:.1f}",
        f"{100 * gflops / peaks[dtype]:.0f}" if peaks else "-",
        f"{moved / 1e6:.2f}",
        f"{gbytes:.2f}",
        f"{100 * gbytes / peaks['read']:.0f}" if peaks else "-",
    ]
