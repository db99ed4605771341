"""What the scripts of benchmarks/ derive from measurements: counts, ratios, reports. Nothing here is timed."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.case import Case
from benchmarks.counts import instructions
from benchmarks.cpu import peak, single_ops
from benchmarks.cpu.contenders import CONTENDERS
from pvt_fast import PVT_V2, testing
from pvt_fast.cli import timing
from pvt_fast.config import VARIANTS, PVTConfig
from pvt_fast.ops import reference

ROOT = Path(__file__).resolve().parents[2]


def test_committed_counts_agree_with_themselves():
    committed = json.loads(instructions.COMMITTED.read_text())["instructions"]
    assert committed
    assert instructions.compare(committed, committed) == []


@pytest.mark.parametrize("counted", [9_701, 10_000, 10_299])
def test_counts_within_the_band_pass(counted):
    assert instructions.compare({"mlp": counted}, {"mlp": 10_000}) == []


@pytest.mark.parametrize(
    ("counted", "complaint"),
    [
        (10_301, "mlp: 10,301 instructions, 10,000 committed: +3.0%, more than the band of 3% allows"),
        (5_000, "mlp: 5,000 instructions, 10,000 committed: -50.0%, fewer than the band of 3% allows"),
    ],
)
def test_counts_outside_the_band_are_told_either_way(counted, complaint):
    assert instructions.compare({"mlp": counted, "head": 7}, {"mlp": 10_000, "head": 7}) == [complaint]


def test_calls_come_and_go_only_with_the_committed_file():
    assert instructions.compare({"new": 5}, {"old": 7}) == [
        "old: no longer counted",
        "new: 5 instructions, none committed",
    ]


def test_reads_the_sum_of_a_callgrind_file():
    assert instructions.instructions("events: Ir\nfn=(1)\n0 12\n\nsummary: 4711\ntotals: 4711\n") == 4711
    with pytest.raises(ValueError, match="'summary: N', got 'events: Ir'"):
        instructions.instructions("events: Ir")


@pytest.mark.parametrize("linear", [False, True])
def test_flops_are_those_that_torch_counts(linear):
    config = PVTConfig(**{**VARIANTS["pvt_v2_b0"], "linear": linear, "num_classes": 10})
    model = PVT_V2(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}).eval()
    model.backend = "reference"
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 64, 96))
    assert testing.model_flops(config, 2, (64, 96)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "billions"),
    [("b0", 0.6), ("b1", 2.1), ("b2", 4.0), ("b2_li", 3.9), ("b3", 6.9), ("b4", 10.1), ("b5", 11.8)],
)
def test_flops_are_about_the_published_ones(model, billions):
    """Table 2 of the paper, which counts a multiplication with its addition as one."""
    config = PVTConfig(**VARIANTS[f"pvt_v2_{model}"])
    assert testing.model_flops(config, 1, (224, 224)) / 2e9 == pytest.approx(billions, rel=0.1)


def row(case="b0", ours=10.0, **fields) -> report.Row:
    """A row in which pvt_fast took `ours` ms, and peers more, less, nothing as they failed, and less but wrongly."""

    def cell(ms: float, error: float, note: str = "") -> dict:
        return {"ms": ms, "ms_10": 0.9 * ms, "ms_90": 1.1 * ms, "calls": 5, "error": error, "note": note}

    return {
        "machine": "A CPU (avx2)",
        "threads": 2,
        "model": f"pvt_v2_{case}",
        "batch": 1,
        "size": 224,
        "dtype": "fp32",
        "date": "2026-01-31",
        "versions": {"torch": "2.13.0"},
        "gflop": 1.2,
        "peaks": {"fp32": 240.0, "bf16": 3000.0, "read": 20.0},
        "bound": 1e-6,
        "contenders": {
            "pvt_fast": cell(ours, 5e-7),
            "timm": cell(20.0, 5e-7),
            "openvino": cell(8.0, 1.9e-5, "asked for latency"),
            "onnxruntime": {"failure": "NotImplementedError: it | cannot"},
            "compile": cell(1.0, 2.1e-5),
        },
    } | fields


def test_what_is_derived_from_a_row():
    assert report.name(row()) == "b0 fp32 bs1 224px"
    assert report.ratio(row(), "timm") == 2.0
    assert report.ratio(row(ours=40.0), "timm") == 0.5
    assert report.gflops(row(), "timm") == pytest.approx(60.0)
    assert report.percent_of_peak(row(), "pvt_fast") == pytest.approx(50.0)
    assert report.percent_of_peak(row(dtype="bf16"), "pvt_fast") == pytest.approx(4.0)
    assert report.percent_of_peak(row(peaks={}), "pvt_fast") is None


@pytest.mark.parametrize(("error", "wrong"), [(0.0, False), (1.9e-5, False), (2.1e-5, True), (float("nan"), True)])
def test_an_answer_far_out_of_the_bound_is_wrong(error, wrong):
    odd = row()
    odd["contenders"]["timm"]["error"] = error
    assert report.is_wrong(odd, "timm") is wrong


def test_the_best_peer_answered_and_was_right():
    assert report.best_peer(row()) == "openvino"
    assert report.best_peer(row(contenders={"pvt_fast": row()["contenders"]["pvt_fast"]})) is None


def test_another_way_to_run_pvt_fast_is_no_peer(tmp_path):
    ours = row()["contenders"]["pvt_fast"]
    both = row(contenders={"pvt_fast": ours, "pvt_fast_compiled": ours | {"ms": 11.0}})
    assert report.best_peer(both) is None
    assert report.best_peer(both | {"contenders": both["contenders"] | row()["contenders"]}) == "openvino"
    assert "| b0 fp32 bs1 224px | 10.0 | 11.0 (1.10) | - | 50 | 2026-01-31 |" in report.markdown([both])
    report.save([both], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"], "nothing to draw"


def test_every_way_to_run_pvt_fast_on_a_cpu_is_known_to_be_ours():
    assert {name for name in CONTENDERS if name.startswith("pvt_fast")} == {"pvt_fast", "pvt_fast_compiled"}
    assert [name for name in CONTENDERS if name in report.ALL_OURS] == ["pvt_fast", "pvt_fast_compiled"]


def test_a_case_measured_again_replaces_its_row_and_no_other():
    earlier = [row(), row("b2"), row(dtype="bf16"), row(threads=4), row(size=512), row(machine="B")]
    again = row("b2", ours=11.0, date="2026-02-01")
    merged = report.merge(earlier, [again, row("b2", batch=8)])
    assert len(merged) == 7
    assert again in merged
    assert earlier[1] not in merged
    assert all(kept in merged for kept in earlier if kept is not earlier[1])
    assert [(r["machine"], r["threads"], report.name(r)) for r in merged] == [
        ("A CPU (avx2)", 2, "b0 fp32 bs1 224px"),
        ("A CPU (avx2)", 2, "b0 bf16 bs1 224px"),
        ("A CPU (avx2)", 2, "b0 fp32 bs1 512px"),
        ("A CPU (avx2)", 2, "b2 fp32 bs1 224px"),
        ("A CPU (avx2)", 2, "b2 fp32 bs8 224px"),
        ("A CPU (avx2)", 4, "b0 fp32 bs1 224px"),
        ("B", 2, "b0 fp32 bs1 224px"),
    ]


def test_markdown_has_every_figure():
    lines = report.markdown([row(), row("b2", peaks={}, date="2026-02-01"), row(threads=1)]).splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "## A CPU (avx2), 2 threads",
        "## A CPU (avx2), 1 thread",
    ]
    for line in (
        "- 2026-01-31: torch 2.13.0",
        "- 2026-02-01: torch 2.13.0",
        "- peak fp32: 240.0 to 240.0 GFLOP/s over the rows",
        "- memory read: 20.0 to 20.0 GB/s over the rows",
        "| case | pvt_fast | timm | openvino | onnxruntime | compile | best peer | % of peak | measured |",
        "| b0 fp32 bs1 224px | 10.0 | 20.0 (2.00) | 8.0 (0.80) | - | **wrong**: error 2e-05 | openvino 0.80 | 50 "
        "| 2026-01-31 |",
        "| b2 fp32 bs1 224px | 10.0 | 20.0 (2.00) | 8.0 (0.80) | - | **wrong**: error 2e-05 | openvino 0.80 | - "
        "| 2026-02-01 |",
        "| b0 fp32 bs1 224px | openvino | 8.00 | 7.20-8.80 | 0.80 | 150 | 62 | 1.9e-05 | asked for latency |",
        "| b0 fp32 bs1 224px | compile | 1.00 | 0.900-1.10 | 0.10 | 1200 | 500 | 2.1e-05 "
        "| **wrong**, at most 1.0e-06 is right |",
        "| b0 fp32 bs1 224px | onnxruntime | - | - | - | - | - | - | did not run: NotImplementedError: it \\| cannot |",
    ):
        assert line in lines


def test_a_row_without_some_peer_leaves_its_column_empty():
    alone = row("b2", contenders={"pvt_fast": row()["contenders"]["pvt_fast"]})
    assert "| b2 fp32 bs1 224px | 10.0 | - | - | - | - | - | 50 | 2026-01-31 |" in report.markdown([row(), alone])


def test_a_folder_is_added_to(tmp_path):
    assert report.load(tmp_path / "new") == []
    report.save([row(), row(threads=1, contenders={"pvt_fast": row()["contenders"]["pvt_fast"]})], tmp_path / "new")
    rows = report.load(tmp_path / "new")
    assert len(rows) == 2
    assert rows[0] == row()
    assert (tmp_path / "new" / "cpu.md").read_text() == report.markdown(rows)
    assert (tmp_path / "new" / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_and_the_processes_it_starts_find_this_tree_from_anywhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    case = ["--models", "b0", "--size", "32", "--dtype", "fp32", "--peers", "", "--threads", "1"]
    effort = ["--rounds", "1", "--seconds", "0.01", "--out", "new"]
    command = [sys.executable, str(ROOT / "benchmarks" / "cpu.py"), *case, *effort]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (measured,) = report.load(tmp_path / "new")
    assert measured["contenders"]["pvt_fast"]["calls"] >= timing.FEWEST
    assert done.stdout == report.markdown([measured]) + "\n"


def test_spread_of_calls():
    seconds = [0.011, 0.001, 0.006, 0.002, 0.010, 0.004, 0.008, 0.003, 0.009, 0.005, 0.007]
    assert timing.spread(seconds)._asdict() == pytest.approx({"ms": 6.0, "ms_10": 2.0, "ms_90": 10.0, "calls": 11})


def test_ops_of_the_models_are_timed_once_each():
    ops = single_ops.op_cases([Case("pvt_v2_b1", 1, 64, dtype) for dtype in ("fp32", "bf16")] * 2)
    assert len(ops) == len(set(ops)) == 2 * 3 * 4
    assert single_ops.op_cases([Case(f"pvt_v2_{m}", 1, 64, "fp32") for m in ("b1", "b3")]) == ops[:12]


def test_a_line_of_single_ops():
    op = testing.MlpCase(2, (4, 6), 8, 32)
    arguments = op.make(torch.float32)
    x = 2 * 24 * 8
    weights = (8 + 8) + (32 * 8 + 32) + (32 * 9 + 32) + (8 * 32 + 8)
    moved = single_ops.least_bytes(arguments, testing.run(reference, op, arguments))
    assert moved == 4 * (2 * x + weights)
    gflop = 2 * 48 * 32 * (8 + 9 + 8) / 1e9
    peaks = {"fp32": gflop / 2e-3, "bf16": 1.0, "read": moved / 1e9 / 1e-3}
    assert single_ops.line(op, "fp32", [4e-3] * 3, [6e-3] * 3, moved, peaks) == [
        str(op), "fp32", "4.000", "4.000-4.000", "6.000", "1.50", f"{gflop / 4e-3:.1f}", "50",
        f"{moved / 1e6:.2f}", f"{moved / 4e-3 / 1e9:.2f}", "25",
    ]  # fmt: skip
    assert single_ops.line(op, "fp32", [4e-3] * 3, [6e-3] * 3, moved, {})[7::3] == ["-", "-"]


def test_peaks_without_a_compiler_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "PROGRAM", tmp_path / "peak")
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(peak.Unavailable, match="no-such-compiler was not found; CXX names the C"):
        peak.build()


def test_peaks_are_medians(monkeypatch):
    answers = iter([3, 1, 2])
    monkeypatch.setattr(peak, "_run", lambda command: json.dumps({"fp32": next(answers), "read": 5}))
    meter = peak.Meter("avx2", threads=2)
    assert meter.medians() == {}
    for _ in range(3):
        meter.measure()
    assert meter.medians() == {"fp32": 2, "read": 5}
