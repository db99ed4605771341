"""`make gpu` without a GPU: everything of it that a CPU can run, run there."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_checks
import gpu_contenders
import gpu_kernels
import gpu_plan
import gpu_results
import gpu_sanitize
import pytest
import roofline
import torch
from case import Case
from gpu_checks import Check, Finished
from gpu_plan import Clock, Place, Request, Step
from gpu_report import Results
from server import Failed, Server

from pvt_fast.kernels import BACKEND
from pvt_fast.kernels.launch import recorded
from pvt_fast.testing import MlpCase, run

ROOT = Path(__file__).resolve().parents[2]


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
        (gpu_checks.FINDINGS, CLEAN.replace("0 errors", "12 errors"), "failed", "error summary: 12 errors"),
        (0, RACY.replace("1 hazard", "0 hazards").replace("1 error", "0 errors"), "passed",
         "racecheck summary: 0 hazards displayed (0 errors, 0 warnings)"),
        (gpu_checks.FINDINGS, RACY, "failed", "racecheck summary: 1 hazard displayed (1 error, 0 warnings)"),
        (139, CLEAN, "failed", "error summary: 0 errors, but the program ended with status 139"),
        (1, "Device not supported\n", "did not run", "racecheck gave no summary, status 1: Device not supported"),
        (None, "========= COMPUTE-SANITIZER\n", "failed", "ended after 40 s, its limit"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_tells(status, output, outcome, told):
    check = gpu_checks.parse_sanitizer("racecheck", Finished(status, output), 40)
    assert (check.outcome, check.told) == (outcome, told)
    assert check.outcome != "failed" or check.lines


def test_a_missing_sanitizer_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if gpu_checks.sanitizer_program() is None:  # unless /usr/local/cuda has it
        assert gpu_checks.sanitize("memcheck", ROOT, 1.0).outcome == "did not run"
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    assert gpu_checks.sanitizer_program() == str(program)


def test_programs_are_ended_at_their_limit_with_all_they_started(tmp_path):
    late = tmp_path / "late"
    code = (
        "import subprocess, sys, time; print('started', flush=True)\n"
        f"subprocess.Popen(['sh', '-c', 'sleep 3; touch {late}'])\n"
        "time.sleep(60)"
    )
    done = gpu_checks.run([sys.executable, "-c", code], 1.5)
    assert done.status is None
    check = gpu_checks.judge(done, 1.5)
    assert (check.outcome, check.lines) == ("failed", ("started",))
    subprocess.run(["sleep", "3"], check=True)
    assert not late.exists()


def test_programs_tell_by_their_status():
    fine = gpu_checks.judge(gpu_checks.run([sys.executable, "-c", "print('3 passed')"], 60), 60)
    assert fine == Check("passed", "3 passed", ("3 passed",))
    bad = gpu_checks.judge(gpu_checks.run([sys.executable, "-c", "raise SystemExit('1 failed')"], 60), 60)
    assert (bad.outcome, bad.told) == ("failed", "1 failed")


def test_tests_that_cannot_be_imported_are_left_out_by_name(tmp_path):
    (tmp_path / "test_a.py").write_text("import os.path\nfrom pathlib import Path\nimport pytest\n")
    (tmp_path / "test_b.py").write_text("from no_such_package.part import x\n")
    found, told = gpu_checks.runnable_tests(tmp_path, ("test_a.py", "test_b.py", "test_c.py"))
    assert found == [tmp_path / "test_a.py"]
    assert told == ["test_b.py was left out: it imports no_such_package, not installed", "test_c.py is not there"]


def test_the_sanitizers_target_launches_every_kernel():
    with recorded() as launches:
        assert len(list(gpu_sanitize.results("meta"))) == 2 * len(gpu_sanitize.CASES) + 2
    assert {launch.name for launch in launches} == set(roofline.ENTRIES)


@pytest.mark.full
def test_the_sanitizers_target_runs():
    assert gpu_sanitize.target("cpu") == 0


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


def options(out: Path) -> argparse.Namespace:
    return argparse.Namespace(rounds=gpu_plan.FEWEST_ROUNDS, seconds=0.01, out=out)


def test_whole_models_for_real_with_one_contender_that_fails(tmp_path):
    """As on a GPU, but on the CPU: a graph cannot be captured there, and the others go on."""
    contenders = ("captured", "eager", "timm")
    planned = gpu_plan.steps(Request(("b0",), ((3, 32),), "fp32", contenders, ("models",)))
    told: list[str] = []
    run_ = gpu.Run(options(tmp_path), Results(), told.append, Place("cpu", "reference"))
    gpu.carry_out(planned, run_, Clock(5), lambda: None)
    (row,) = gpu_results.load(tmp_path).models
    assert list(row["contenders"]) == list(contenders)
    assert "failure" in row["contenders"]["captured"]
    for name in ("eager", "timm"):
        cell = row["contenders"][name]
        assert cell["calls"] == gpu_plan.FEWEST_ROUNDS
        assert 0 < cell["ms_10"] <= cell["ms"] <= cell["ms_90"]
        assert cell["error"] <= row["bound"] * 20
    assert row["contenders"]["eager"]["error"] <= row["bound"]
    assert gpu_results.ours(row) == "eager"
    assert gpu_results.baseline(row) == "timm"
    assert any(line.startswith("b0 fp32 bs3 32px: captured did not run: ") for line in told)
    assert run_.results.unmeasured == []
    assert "| b0 fp32 bs3 32px | " in (tmp_path / "gpu.md").read_text()


def test_a_step_that_breaks_is_reported_and_the_rest_goes_on(tmp_path):
    good = Step("models", "good", 30.0, Case("pvt_v2_b0", 1, 32, "fp32"), ("eager",))
    bad = Step("models", "bad", 30.0, Case("pvt_v2_b0", 1, 8, "fp32"), ("eager",))  # too small for four stages
    late = Step("models", "late", 1e9, Case("pvt_v2_b2", 1, 32, "fp32"), ("eager",))
    run_ = gpu.Run(options(tmp_path), Results(), lambda text: None, Place("cpu", "reference"))
    gpu.carry_out([bad, good, late], run_, Clock(5), lambda: None)
    results = gpu_results.load(tmp_path)
    assert [(check["what"], check["outcome"]) for check in results.checks] == [("bad", "failed")]
    assert results.checks[0]["told"].startswith("ValueError: ")
    assert [gpu_results.case_of(row) for row in results.models] == [good.case]
    assert results.unmeasured == ["models b2 fp32 bs1 32px: eager"]
    assert run_.failed == [bad]


def test_images_from_both_ends_are_checked():
    from gpu_models import checked_rows

    assert checked_rows(Case("pvt_v2_b0", 256, 224, "bf16")) == [0, 1, 254, 255]
    assert checked_rows(Case("pvt_v2_b0", 3, 224, "bf16")) == [0, 1, 2]
    assert checked_rows(Case("pvt_v2_b0", 8, 1024, "bf16")) == [0, 7]
    assert checked_rows(Case("pvt_v2_b0", 1, 1024, "bf16")) == [0]


def test_bursts_go_through_the_inputs():
    seen: list[int] = []
    inputs = [torch.tensor(i) for i in range(3)]
    assert gpu_contenders.burst(lambda x: seen.append(int(x)), inputs, 4, "cpu") > 0
    assert seen == [2, 0, 1, 2, 0]


def test_launches_alone_are_timed_and_described():
    """Two blocks of one shape and one of another, in the interpreter."""
    with recorded() as launches:
        for case in (MlpCase(1, (3, 4), 32, 64), MlpCase(1, (3, 4), 32, 64), MlpCase(1, (2, 2), 32, 64)):
            run(BACKEND, case, case.make(torch.bfloat16))
    groups = gpu_kernels.distinct(launches)
    assert sorted(len(group) for group in groups) == sorted([2, 1] * (len(launches) // 3))
    effort = gpu_kernels.Effort(repeats=3, flush_bytes=1 << 16, copy_bytes=1 << 16, product_side=32)
    told, limits = gpu_kernels.measure_ceilings("cpu", effort)
    assert min(told["copy_gbs"], told["product_tflops"], told["floor_us"]) > 0
    flush = gpu_kernels.make_flush("cpu", effort.flush_bytes)
    times = gpu_kernels.time_launches(groups[0], "cpu", flush, effort.repeats)
    assert len(times) == 3
    row = gpu_kernels.describe(groups[0], limits, times)
    assert row["us_10"] <= row["us"] <= row["us_90"]
    assert row["count"] == 2
    assert row["roofline_us"] == pytest.approx(1e6 * limits.seconds(roofline.work_of(groups[0][0])))
    assert "BLOCK" not in row["shape"]
    json.dumps(row, default=str)


def test_counters_are_cleared_between_launches():
    values, counters = torch.ones(3), torch.ones(3, dtype=torch.int32)
    launch = launches_of_anything()._replace(args=(values, counters, 5))
    gpu_kernels.clear_counters(launch)
    assert values.tolist() == [1, 1, 1]
    assert counters.tolist() == [0, 0, 0]


def launches_of_anything():
    return roofline.model_launches(Case("pvt_v2_b0", 1, 32, "bf16"))[0]
