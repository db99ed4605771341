"""`make gpu` without a GPU: everything of it that a CPU can run, run there."""

import json
import os
import sys
import time

import pytest
import torch

from benchmarks import comparison
from benchmarks.case import Case
from benchmarks.gpu import checks, command, contenders, kernels, plan, report, roofline, sanitize
from benchmarks.gpu.checks import Check, Finished
from benchmarks.gpu.models import ROUNDS, checked_rows
from benchmarks.gpu.plan import Place, Step
from benchmarks.report import ours
from benchmarks.server import Failed, Server
from pvt_fast.kernels import BACKEND
from pvt_fast.kernels.launch import recorded
from pvt_fast.testing import MlpCase, run

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACY = (
    "========= COMPUTE-SANITIZER\n========= Error: Race reported between Write access at dwconv_fc2_kernel+0x140\n"
    "=========     and Read access at dwconv_fc2_kernel+0x1f0 [5 hazards]\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)


@pytest.mark.parametrize(
    ("status", "output", "outcome", "told"),
    [
        (0, CLEAN, "passed", "error summary: 0 errors"),
        (0, CLEAN.replace("0 errors", "1 error"), "failed", "error summary: 1 error"),
        (checks.FINDINGS, CLEAN.replace("0 errors", "12 errors"), "failed", "error summary: 12 errors"),
        (0, RACY.replace("1 hazard", "0 hazards").replace("1 error", "0 errors"), "passed",
         "racecheck summary: 0 hazards displayed (0 errors, 0 warnings)"),
        (checks.FINDINGS, RACY, "failed", "racecheck summary: 1 hazard displayed (1 error, 0 warnings)"),
        (139, CLEAN, "failed", "error summary: 0 errors, but the program ended with status 139"),
        (1, "Device not supported\n", "did not run", "no summary, status 1: Device not supported"),
        (None, "========= COMPUTE-SANITIZER\n", "failed", "ended at its limit of time"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_tells(status, output, outcome, told):
    check = checks.parse_sanitizer(Finished(status, output))
    assert (check.outcome, check.told) == (outcome, told)
    assert check.outcome != "failed" or check.lines


def test_a_missing_sanitizer_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if checks.sanitizer_program() is None:  # unless /usr/local/cuda has it
        assert checks.sanitize("memcheck", 1.0).outcome == "did not run"
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    assert checks.sanitizer_program() == str(program)


def test_programs_are_ended_at_their_limit_with_all_they_started(tmp_path):
    late = tmp_path / "late"
    code = (
        "import subprocess, sys, time; print('started', flush=True)\n"
        f"subprocess.Popen(['sh', '-c', 'sleep 3; touch {late}'])\n"
        "time.sleep(60)"
    )
    check = checks.judge(checks.run([sys.executable, "-c", code], 1.5))
    assert check == Check("failed", "ended at its limit of time", ("started",))
    time.sleep(3)
    assert not late.exists()


def test_programs_tell_by_their_status():
    fine = checks.judge(checks.run([sys.executable, "-c", "print('3 passed')"], 60))
    assert fine == Check("passed", "3 passed", ("3 passed",))
    bad = checks.judge(checks.run([sys.executable, "-c", "raise SystemExit('1 failed')"], 60))
    assert (bad.outcome, bad.told) == ("failed", "1 failed")


def test_the_sanitizers_program_launches_every_kernel():
    with recorded() as launches:
        assert len(list(sanitize.results("meta"))) == 2 * len(sanitize.CASES) + 2
    assert {launch.name for launch in launches} == set(roofline.ENTRIES)


@pytest.mark.full
def test_the_sanitizers_program_runs():
    sanitize.main("cpu")


def broken(message: str):
    """A server's work that fails at its second request."""
    yield "ready"
    yield "first"
    raise ValueError(f"{message}:\n  the reason\n  and more")


def killed():
    yield os.getpid()
    os._exit(7)


def test_a_failing_server_tells_its_first_line():
    server = Server(broken, "it broke")
    assert server.receive(120) == "ready"
    assert server.ask(1) == "first"
    with pytest.raises(Failed, match=r"^ValueError: it broke: the reason$"):
        server.ask(2)
    server.close()


def test_a_server_that_dies_tells_its_status():
    server = Server(killed)
    server.receive(120)
    with pytest.raises(Failed, match="its process ended with status 7"):
        server.ask(1)
    server.close()


def test_a_server_that_does_not_answer_is_ended():
    server = Server(broken, "never asked")
    with pytest.raises(Failed, match="no answer within 0 s"):
        server.receive(0.01)
    server.close()


def wrong(error: float):
    """A worker's work that answers zeros, but for one logit, and then is timed."""
    yield None
    yield comparison.Ready(torch.tensor([[0.0, error]]), {"note": "a note"})
    while True:
        yield [0.25]


@pytest.mark.parametrize(("name", "told"), [("eager", "eager: largest error 1.000e-01 exceeds "), ("timm", None)])
def test_ours_is_not_timed_unless_it_is_right(name, told):
    """A peer that errs is timed: the report tells how far off it is."""
    worker = comparison.Worker(name, wrong, 0.1)
    worker.prepare((torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2)), 120)
    cells = comparison.cells([worker], 3, 1.0)
    worker.server.kill()
    if told:
        assert cells[name].keys() == {"failure"}
        assert cells[name]["failure"].startswith(told)
    else:
        error = pytest.approx(0.1)
        assert cells[name] == {"ms": 250, "ms_10": 250, "ms_90": 250, "calls": 3, "error": error, "note": "a note"}


def test_the_whole_plan_for_real_with_steps_that_break_and_a_contender_that_fails(tmp_path):
    """As on a GPU, but on the CPU: a graph cannot be captured there, and the others go on. Results come as they do."""
    good = Step("models", "good", 240.0, Case("pvt_v2_b0", 3, 32, "fp32"), ("captured", "eager", "timm"))
    bad = Step("models", "bad", 30.0, Case("pvt_v2_b0", 1, 8, "fp32"), ("eager",))  # too small for four stages
    late = Step("models", "late", 1e9, Case("pvt_v2_b2", 1, 32, "fp32"), ("eager",))
    saved: list[report.Results] = []
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        saved.append(report.load(tmp_path))

    run = command.Run(report.Results(), tmp_path, Place("cpu", "reference"), tell)
    run.carry_out([bad, good, late], lambda: 600.0)
    assert [bool(results.checks) for results in saved] == sorted(bool(results.checks) for results in saved)
    assert saved[-1].checks, "the first step's outcome was saved before the second ended"
    results = report.load(tmp_path)
    assert [(check["what"], check["outcome"]) for check in results.checks] == [("bad", "failed")]
    assert results.checks[0]["told"].startswith("ValueError: ")
    assert results.unmeasured == ["models late"]
    assert run.failed == [bad]
    (row,) = results.models
    assert list(row["contenders"]) == list(good.contenders)
    assert "failure" in row["contenders"]["captured"]
    assert any(line.startswith("b0 fp32 bs3 32px: captured did not run: ") for line in told)
    for name in ("eager", "timm"):
        cell = row["contenders"][name]
        assert cell["calls"] == ROUNDS
        assert 0 < cell["ms_10"] <= cell["ms"] <= cell["ms_90"]
        assert cell["error"] <= row["bound"] * 20
    assert ours(row) == "eager"
    assert "| b0 fp32 bs3 32px | " in (tmp_path / "gpu.md").read_text()


def test_a_failed_build_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "build", lambda limit_s: Check("failed", "no compiler"))
    monkeypatch.setattr(checks, "tests", lambda limit_s: pytest.fail("ran without the extension"))
    run = command.Run(report.Results(), tmp_path, Place("cpu", "reference"), lambda text: None)
    run.carry_out(plan.steps(phases=("build", "tests")), lambda: 600.0)
    assert [(check["phase"], check["told"]) for check in report.load(tmp_path).checks] == [("build", "no compiler")]


def test_images_from_both_ends_are_checked():
    assert checked_rows(Case("pvt_v2_b0", 256, 224, "bf16")) == [0, 1, 254, 255]
    assert checked_rows(Case("pvt_v2_b0", 3, 224, "bf16")) == [0, 1, 2]
    assert checked_rows(Case("pvt_v2_b0", 8, 1024, "bf16")) == [0, 7]
    assert checked_rows(Case("pvt_v2_b0", 1, 1024, "bf16")) == [0]


def test_bursts_go_through_the_inputs():
    seen: list[int] = []
    inputs = [torch.tensor(i) for i in range(3)]
    assert contenders.burst(lambda x: seen.append(int(x)), inputs, 4, "cpu") > 0
    assert seen == [2, 0, 1, 2, 0]


def test_every_contender_of_the_plan_can_be_built():
    assert tuple(contenders.BUILDS) == plan.CONTENDERS


def test_launches_alone_are_timed_and_described():
    """Two blocks of one shape and one of another, in the interpreter."""
    with recorded() as launches:
        for case in (MlpCase(1, (3, 4), 32, 64), MlpCase(1, (3, 4), 32, 64), MlpCase(1, (2, 2), 32, 64)):
            run(BACKEND, case, case.make(torch.bfloat16))
    groups = kernels.distinct(launches)
    assert sorted(len(group) for group in groups) == sorted([2, 1] * (len(launches) // 3))
    effort = kernels.Effort(repeats=3, flush_bytes=1 << 16, copy_bytes=1 << 16, product_side=32)
    told, limits = kernels.measure_ceilings("cpu", effort)
    assert min(told["copy_gbs"], told["product_tflops"], told["floor_us"]) > 0
    times = kernels.time_launches(groups[0], "cpu", kernels.make_flush("cpu", effort.flush_bytes), effort.repeats)
    assert len(times) == 3
    row = kernels.describe(groups[0], limits, times)
    assert row["us_10"] <= row["us"] <= row["us_90"]
    assert row["count"] == 2
    assert row["roofline_us"] == pytest.approx(1e6 * limits.seconds(roofline.work_of(groups[0][0])))
    assert "BLOCK" not in row["shape"]
    json.dumps(row, default=str)


def test_counters_are_cleared_between_launches():
    values, counters = torch.ones(3), torch.ones(3, dtype=torch.int32)
    launch = roofline.model_launches(Case("pvt_v2_b0", 1, 32, "bf16"))[0]
    kernels.clear_counters(launch._replace(args=(values, counters, 5)))
    assert values.tolist() == [1, 1, 1]
    assert counters.tolist() == [0, 0, 0]
