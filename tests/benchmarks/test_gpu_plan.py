"""The plan of `make gpu` and its command line: what comes when, what fits, and what it says without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.case import Case
from benchmarks.gpu import command, plan
from benchmarks.gpu.plan import CONTENDERS, CORE, Step
from benchmarks.gpu.report import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def test_phases_come_in_order_and_the_most_wanted_case_first():
    planned = plan.steps()
    order = [step.phase for step in planned]
    assert order == sorted(order, key=plan.PHASES.index)
    assert list(dict.fromkeys(order)) == list(plan.PHASES)
    models = [step for step in planned if step.phase == "models"]
    assert [str(step.case) for step in models[:10]] == [
        *("b0 bf16 bs1 224px", "b2 bf16 bs1 224px", "b2_li bf16 bs1 224px"),
        *("b0 bf16 bs32 224px", "b2 bf16 bs32 224px", "b2_li bf16 bs32 224px"),
        *("b2 bf16 bs256 224px", "b0 bf16 bs256 224px", "b2_li bf16 bs256 224px"),
        "b0 bf16 bs8 512px",
    ]


def test_every_case_comes_with_a_baseline_before_any_comes_with_all():
    models = [step for step in plan.steps() if step.phase == "models"]
    half = len(models) // 2
    assert [step.contenders for step in models] == [CORE] * half + [CONTENDERS] * half
    assert [step.case for step in models[:half]] == [step.case for step in models[half:]]
    assert len({step.case for step in models}) == half == 7 * 5
    assert {step.case for step in models} == set(TARGETS)


def test_compiled_contenders_come_last_and_ours_are_no_peers():
    assert tuple(sorted(CONTENDERS, key=lambda name: name.startswith("compile"))) == CONTENDERS
    assert [name for name in CONTENDERS if name in report.ALL_OURS] == ["captured", "eager", "again"]


def test_a_narrow_request():
    planned = plan.steps(("b0",), ((3, 64), (256, 224)), ("models", "kernels"))
    assert [step.what for step in planned] == [
        "b0 bf16 bs256 224px: captured, eager, again, timm, compile",
        "b0 bf16 bs3 64px: captured, eager, again, timm, compile",
        "b0 bf16 bs256 224px: again, with all",
        "b0 bf16 bs3 64px: again, with all",
        "b0 bf16 bs256 224px: each launch alone",
    ]


def test_what_earlier_runs_measured_comes_last_in_its_phase():
    first, second = Case("pvt_v2_b0", 1, 224, "bf16"), Case("pvt_v2_b2", 1, 224, "bf16")
    planned = plan.steps(("b0", "b2"), ((1, 224),), held=lambda step: step.case == first or step.what == "memcheck")
    assert [step.case for step in planned if step.phase == "models"] == [second, second, first, first]
    assert [step.what for step in planned if step.phase == "sanitize"] == ["racecheck", "memcheck"]
    assert planned[0].phase == "build"


def simulated(minutes: float) -> tuple[list[Step], list[Step]]:
    """(steps started, steps left out) where each takes what is expected."""
    started: list[Step] = []
    left_out = []
    for step, limit in plan.schedule(plan.steps(), lambda: 60 * minutes - sum(step.seconds for step in started)):
        (started if limit else left_out).append(step)
    return started, left_out


@pytest.mark.parametrize("minutes", [6, 9, 20])
def test_the_deadline_leaves_out_what_does_not_fit_and_keeps_time_for_kernels(minutes):
    started, left_out = simulated(minutes)
    assert sum(step.seconds for step in started) <= 60 * minutes - plan.REPORT_S
    assert any(step.phase == "kernels" for step in started)
    assert left_out, "not everything fits"
    assert len(started) < len(simulated(minutes + 10)[0])
    assert simulated(10_000)[1] == []


def test_a_step_may_take_longer_than_expected_but_not_the_time_of_what_must_follow():
    planned = [Step("models", "a case", 100.0), Step("kernels", "launches", 30.0)]
    assert [limit for _, limit in plan.schedule(planned, lambda: 300.0)] == [250.0, 75.0]
    assert [limit for _, limit in plan.schedule(planned, lambda: 180.0)] == [180.0 - plan.REPORT_S - 30.0, 75.0]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command as a user types it, but from another folder, and without a GPU also where there is one."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    whole = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_dry_run_prints_the_plan(tmp_path):
    done = run(tmp_path, "--dry-run", "--models", "b2", "--cases", "1x224,256x224", "--minutes", "7", "--out", "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout == plan.dry_run(plan.steps(("b2",), ((1, 224), (256, 224))), 7.0) + "\n"
    lines = done.stdout.splitlines()
    assert lines[1] == "  0.0   build    setup.py build_ext --inplace  (1.5 min)"
    assert "Would not fit, and be reported as not measured: out of time:" in lines
    assert list(tmp_path.iterdir()) == []


def test_plans_need_neither_torch_nor_a_build():
    code = "import sys; import benchmarks.gpu.command; print({'torch', 'pvt_fast'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpu.py: a CUDA GPU must be visible to torch, got none")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--models", "b9"), "--models: must be among b0, b1, b2, b2_li, b3, b4, b5; got 'b9'"),
        (("--phases", ""), "--phases: must be among build, tests, sanitize, models, kernels; got ''"),
        (("--cases", "256"), "--cases: must be BATCHxSIZE, comma-separated; got '256'"),
    ],
)
def test_wrong_options_are_named(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        command.parse(list(arguments))
    assert complaint in capsys.readouterr().err


def test_results_of_other_sources_are_told_by_those_in_folders_too(tmp_path):
    def digest(changed: str | None = None) -> str:
        for name in ("pvt_fast/model.py", "pvt_fast/ops/checks.py", "kernels/launch.py", "kernels/mlp/forward.py"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("new" if name == changed else "old")
        return plan.sources_digest(tmp_path)

    assert digest() == digest()
    digests = {digest(name) for name in (None, "pvt_fast/ops/checks.py", "kernels/launch.py", "kernels/mlp/forward.py")}
    assert len(digests) == 4
