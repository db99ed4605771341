"""benchmarks/train.py: what is derived from its measurements, and small runs; nothing here is timed for its time."""

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import pytest
import torch

import pvt_fast
from benchmarks.case import TrainCase
from benchmarks.cpu import train, train_report, training
from benchmarks.server import Failed, Server
from pvt_fast.testing import assert_parity, parity_bounds

ROOT = Path(__file__).resolve().parents[2]
# an op's backward is tested elsewhere on every instruction set
pytestmark = pytest.mark.one_isa

SMALL = TrainCase("pvt_v2_b0", "fp32", 1, 32, 32)


def row(ours=(10.0, 11.0, 9.0), theirs=(20.0, 22.0, 18.0), **fields) -> dict:
    """A row in which compile was faster than plain torch, but wrong."""

    def cell(rounds, error: float, **told) -> dict:
        ms = sorted(rounds)[len(rounds) // 2]
        spread = {"ms": ms, "ms_10": min(rounds), "ms_90": max(rounds), "calls": 9, "rounds_ms": list(rounds)}
        return {**spread, "error": error, "note": "", "backward_ms": ms / 2, **told}

    return {
        "machine": "A CPU (avx2)",
        "threads": 2,
        "model": "pvt_v2_b0",
        "precision": "autocast",
        "batch": 8,
        "height": 224,
        "width": 224,
        "date": "2026-01-31",
        "versions": {"torch": "2.13.0"},
        "peaks": {"fp32": 240.0, "bf16": 3000.0, "read": 20.0},
        "bound": 1e-3,
        "backward_gflop": 3.0,
        "contenders": {
            "pvt_fast": cell(ours, 5e-4, saved_bytes=1_000_000),
            "plain": cell(theirs, 5e-4, saved_bytes=4_000_000),
            "compile": cell((1.0, 1.0, 1.0), 4.1e-3),
        },
    } | fields


def memory(**contenders) -> dict:
    case = {"model": "pvt_v2_b2", "precision": "fp32", "batch": 1, "height": 800, "width": 1344}
    where = {"machine": "A CPU (avx2)", "threads": 2, "date": "2026-01-31", "versions": {}, "peaks": {}}
    return {**where, **case, "limit_bytes": 2_000_000_000, "contenders": contenders}


def without(row: dict, *contenders: str) -> dict:
    kept = {name: cell for name, cell in row["contenders"].items() if name not in contenders}
    return row | {"contenders": kept}


def test_the_ratio_is_that_within_rounds_to_the_best_that_is_right():
    assert train_report.best_peer(row()) == "plain"
    assert train_report.ratio(row())._asdict() == pytest.approx({"ms": 2.0, "ms_10": 2.0, "ms_90": 2.0, "calls": 3})
    assert train_report.ratio(row(theirs=(5.0, 22.0, 9.0))).ms == pytest.approx(1.0)
    assert train_report.ratio(without(row(), "plain")) is None


def test_the_share_of_the_peak_is_that_of_our_backward():
    assert train_report.percent_of_peak(row()) == pytest.approx(100 * (3 / 5e-3) / 3000)
    assert train_report.percent_of_peak(row(precision="fp32")) == pytest.approx(100 * (3 / 5e-3) / 240)
    assert train_report.percent_of_peak(row(peaks={})) is None
    assert train_report.percent_of_peak(row(backward_gflop=None)) is None


def test_cases_in_which_ours_is_slower_wrong_or_missing_are_named():
    failed = row()
    failed["contenders"]["pvt_fast"] = {"failure": "pvt_fast: largest error 3 exceeds 1"}
    wrong = row()
    wrong["contenders"]["pvt_fast"]["error"] = float("nan")
    assert train_report.slower([row(), without(row(), "plain")]) == []
    assert train_report.slower([row(theirs=(8.0, 8.8, 9.0)), failed, wrong]) == [
        "b0 autocast bs8 224px: 0.80 (0.80-0.96) times as fast as plain",
        "b0 autocast bs8 224px: pvt_fast failed: pvt_fast: largest error 3 exceeds 1",
        "b0 autocast bs8 224px: pvt_fast is wrong: error nan",
    ]


@pytest.mark.parametrize(
    "told",
    [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you",
        "MemoryError: std::bad_alloc",
        "its process ended with status -9",
    ],
)
def test_memory_that_did_not_suffice_is_told_in_those_words(told):
    assert train_report.failure({"failure": told}) == "out of memory"
    text = train_report.markdown([], [memory(pvt_fast={"peak_bytes": 512_000_000}, plain={"failure": told})])
    assert "| b2 fp32 bs1 800x1344 | 512 | out of memory | 2000 | 2026-01-31 |" in text.splitlines()
    assert train_report.failure({"failure": "ValueError: x"}) == "ValueError: x"


def test_the_text_has_every_figure():
    lines = train_report.markdown([row()], [memory(pvt_fast={"peak_bytes": 5_000_000})]).splitlines()
    for line in (
        "## A CPU (avx2), 2 threads",
        "- 2026-01-31: torch 2.13.0",
        "- peak bf16: 3000.0 to 3000.0 GFLOP/s over the rows",
        "| case | pvt_fast | plain | compile | ratio | autograd keeps | % of peak | measured |",
        "| b0 autocast bs8 224px | 10.0 | 20.0 | **wrong**: error 4e-03 | 2.00 (2.00-2.00) of plain "
        "| 1.0 / 4.0 = 0.25 | 20 | 2026-01-31 |",
        "| b0 autocast bs8 224px | plain | 20.00 | 18.00-22.00 | 10.00 | 5.0e-04 |  |",
        "| b0 autocast bs8 224px | compile | 1.00 | 1.00-1.00 | 0.50 | 4.1e-03 | **wrong**, at most 1.0e-03 is right |",
        "| b2 fp32 bs1 800x1344 | 5 | 2000 | 2026-01-31 |",
    ):
        assert line in lines
    assert sum(line.startswith("## ") for line in lines) == 1


def test_a_folder_is_added_to(tmp_path):
    taken = memory(pvt_fast={"peak_bytes": 5_000_000}, plain={"failure": "MemoryError: "})
    train_report.save([row(), row(precision="fp32")], [taken], tmp_path)
    again = row(precision="fp32", date="2026-02-01")
    failed = row(model="segformer_b0", contenders={"pvt_fast": {"failure": "no answer within 9 s"}})
    train_report.save([again, failed], [], tmp_path)
    assert train_report.load(tmp_path) == ([again, row(), failed], [taken])
    assert (tmp_path / "train.md").read_text() == train_report.markdown([again, row(), failed], [taken])
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_cases_are_read_from_words():
    assert train.cases_of("b2:bf16:1:800x1344,segformer_b0:fp32:2:512") == [
        TrainCase("pvt_v2_b2", "bf16", 1, 800, 1344),
        TrainCase("segformer_b0", "fp32", 2, 512, 512),
    ]
    for wrong, complaint in (
        ("b2:bf16:0:224", "must be model:precision:batch:height\\[xwidth\\], got 'b2:bf16:0:224'"),
        ("b9:bf16:1:224", "model must be among .*; got pvt_v2_b9"),
        ("b2:fp16:1:224", "precision must be among fp32, bf16, autocast; got fp16"),
    ):
        with pytest.raises(ArgumentTypeError, match=complaint):
            train.cases_of(wrong)


def ask(monkeypatch, *arguments: str) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return train.parse()


def test_cases_that_are_asked_for(monkeypatch):
    everything = ask(monkeypatch)
    assert len(everything.cases) == 9
    assert [str(case) for case in everything.memory_cases[-3:]] == [
        "b2 fp32 bs1 224px",
        "b2 fp32 bs1 512px",
        "b2 fp32 bs1 1024x2048",
    ], "the fourth is also a case to be timed"
    some = ask(monkeypatch, "--models", "b2,segformer_b0", "--precision", "fp32", "--memory-cases", "")
    assert list(map(str, some.cases)) == ["b2 fp32 bs4 224px", "b2 fp32 bs1 800x1344", "segformer_b0 fp32 bs2 512px"]
    assert some.memory_cases == []
    own = ask(monkeypatch, "--cases", "b1:bf16:1:64")
    assert own.cases == own.memory_cases == [TrainCase("pvt_v2_b1", "bf16", 1, 64, 64)]
    with pytest.raises(SystemExit):
        ask(monkeypatch, "--models", "b9")
    with pytest.raises(SystemExit):
        ask(monkeypatch, "--models", "b5")


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """Processes run what users have by default, not triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("model", ["pvt_v2_b0", "segformer_b0"])
@pytest.mark.parametrize("precision", training.PRECISIONS)
def test_gradients_of_ours_keep_the_parity_rule_and_wrong_ones_do_not(model, precision):
    case = SMALL._replace(model=model, precision=precision)
    scales, (exact, plain) = training.truth(case)
    assert exact.dtype == torch.float64
    assert plain.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert 1 / 2 < float(exact.square().mean().sqrt()) < 2
    with pvt_fast.use_backend("reference" if precision == "autocast" else "cpp"):
        gradients = training.ours(case).gradients()
    assert_parity(training.vector(gradients, scales, case), exact, plain)
    name = min(scales, key=scales.__getitem__)  # the smallest are held to it as well
    gradients[name] = -gradients[name]
    odd = training.vector(gradients, scales, case).double() - exact
    assert float(odd.abs().max()) > parity_bounds(exact, plain)["largest"]


def test_gradients_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match="not in both: a, b"):
        training.vector({"a": torch.zeros(1)}, {"b": 1.0})


def test_a_step_learns_and_its_bytes_are_counted_without_parameters():
    step = training.plain(SMALL)
    before = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    step()
    assert len(step.backward_s) == 1
    assert any(not torch.equal(before[name], parameter) for name, parameter in step.model.named_parameters())
    linear = training.Step(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 5)), SMALL)
    answer = 5 * 4  # a view of the images, and the weights, are none; of the loss, the difference is kept
    assert training.saved_bytes(linear) == answer
    with pvt_fast.use_backend("cpp"):
        assert training.saved_bytes(training.ours(SMALL)) < training.saved_bytes(step)


def wrong(case: TrainCase) -> training.Step:
    step = training.plain(case)
    with torch.no_grad():
        step.model.head.weight.mul_(-1)
    return step


def broken(case: TrainCase) -> training.Step:
    raise ValueError("it cannot")


OPTIONS = Namespace(threads=1, rounds=1, seconds=0.01, limit=600, memory_limit=None, peers=[])


def test_contenders_that_are_wrong_or_fail_are_told_so_in_their_row():
    builds = {"pvt_fast": training.ours, "plain": wrong, "compile": broken}
    made = train.compare(SMALL, OPTIONS, builds=builds)
    assert not train_report.is_wrong(made, "pvt_fast")
    assert train_report.is_wrong(made, "plain")
    assert made["contenders"]["compile"] == {"failure": "ValueError: it cannot"}
    assert "| **wrong**: error " in train_report.markdown([made], [])
    assert train_report.slower([made]) == []
    ours_wrong = train.compare(SMALL, OPTIONS, builds={"pvt_fast": wrong})
    (line,) = train_report.slower([ours_wrong])
    assert "pvt_fast failed: pvt_fast: largest error" in line


def test_a_step_that_may_take_too_little_memory_fails_in_its_own_process():
    server = Server(training.take_memory, training.plain, SMALL._replace(height=512, width=512), 1, 30_000_000)
    try:
        server.receive()
        with pytest.raises(Failed) as told:
            server.ask("peak")
    finally:
        server.close()
    assert train_report.failure({"failure": str(told.value)}) == "out of memory"


def test_the_command_from_anywhere(tmp_path):
    """The table, the JSON and the figure; status and last lines tell what plain torch does faster."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    case = ["--cases", "b0:fp32:1:32", "--memory-cases", "b0:fp32:1:224", "--peers", "plain", "--threads", "1"]
    effort = ["--rounds", "3", "--seconds", "0.01", "--out", "new"]
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), *case, *effort]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    stored = json.loads((tmp_path / "new" / "train.json").read_text())
    (measured,), (taken,) = stored["rows"], stored["memory"]
    lines = train_report.slower([measured])
    assert done.returncode == (1 if lines else 0), done.stderr
    assert done.stdout == train_report.markdown([measured], [taken]) + "\n"
    assert done.stderr.endswith("\n".join(["Slower than plain torch, or not right:", *lines, ""]) if lines else "")
    assert list(measured["contenders"]) == ["pvt_fast", "plain"]
    assert len(measured["contenders"]["plain"]["rounds_ms"]) == 3
    assert 0 < measured["contenders"]["pvt_fast"]["saved_bytes"] < measured["contenders"]["plain"]["saved_bytes"]
    peaks = {name: cell["peak_bytes"] for name, cell in taken["contenders"].items()}
    assert list(peaks) == ["pvt_fast", "plain", "probabilities kept"]
    assert all(peak > 10_000_000 for peak in peaks.values())
    assert (tmp_path / "new" / "train.png").exists()
