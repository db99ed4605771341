"""The plan of `make gpu` and its command line: what comes when, what fits, and what it says without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_plan
import gpu_results
import pytest
import report
from case import Case
from gpu_plan import Clock, Request, Step

ROOT = Path(__file__).resolve().parent.parent


def test_phases_come_in_order_and_the_most_wanted_case_first():
    planned = gpu_plan.steps(Request())
    order = [step.phase for step in planned]
    assert order == sorted(order, key=gpu_plan.PHASES.index)
    assert list(dict.fromkeys(order)) == list(gpu_plan.PHASES)
    models = [step for step in planned if step.phase == "models"]
    assert [str(step.case) for step in models[:10]] == [
        *("b0 bf16 bs1 224px", "b2 bf16 bs1 224px", "b2_li bf16 bs1 224px"),
        *("b0 bf16 bs32 224px", "b2 bf16 bs32 224px", "b2_li bf16 bs32 224px"),
        *("b2 bf16 bs256 224px", "b0 bf16 bs256 224px", "b2_li bf16 bs256 224px"),
        "b0 bf16 bs8 512px",
    ]


def test_every_case_comes_with_a_baseline_before_any_comes_with_all():
    models = [step for step in gpu_plan.steps(Request()) if step.phase == "models"]
    half = len(models) // 2
    assert {step.contenders for step in models[:half]} == {gpu_plan.CORE}
    assert {step.contenders for step in models[half:]} == {gpu_plan.CONTENDERS}
    assert [step.case for step in models[:half]] == [step.case for step in models[half:]]
    assert len({step.case for step in models}) == half == 7 * 5
    assert {step.case for step in models} == {
        Case(f"pvt_v2_{model}", *shape, "bf16") for shape, models in gpu_results.TARGETS.items() for model in models
    }


def test_compiled_contenders_come_last():
    names = gpu_plan.CONTENDERS
    assert names == tuple(sorted(names, key=lambda name: name.startswith("compile")))
    ours = (*gpu_results.OURS, gpu_results.REPEAT)
    assert names[: len(ours)] == ours
    assert set(ours) <= set(report.ALL_OURS)


def test_a_narrow_request():
    request = Request(
        ("b0",), ((3, 64), (256, 224)), "fp16", ("captured", "eager", "again", "timm"), ("models", "kernels")
    )
    planned = gpu_plan.steps(request)
    assert [step.what for step in planned] == [
        "b0 fp16 bs256 224px: captured, eager, again, timm",
        "b0 fp16 bs3 64px: captured, eager, again, timm",
        "b0 fp16 bs256 224px: each launch alone",
    ]


def test_what_earlier_runs_measured_comes_last():
    request = Request(("b0", "b2"), ((1, 224),), contenders=gpu_plan.CORE)
    first, second = Case("pvt_v2_b0", 1, 224, "bf16"), Case("pvt_v2_b2", 1, 224, "bf16")
    planned = gpu_plan.steps(request, lambda step: step.case == first or step.phase == "tests")
    assert [step.case for step in planned if step.phase == "models"] == [second, first]
    assert (planned[0].phase, planned[-1].phase) == ("build", "tests")


def simulated(planned: list[Step], minutes: float, pace: float = 1.0) -> tuple[list[Step], list[Step]]:
    """(steps started, steps left out) where whole models take `pace` times what is expected."""
    now = [0.0]
    clock = Clock(minutes, lambda: now[0])
    started, left_out = [], []
    for step, limit in gpu_plan.schedule(planned, clock):
        if limit:
            taken = step.seconds * (pace if step.phase == "models" else 1)
            now[0] += taken
            clock.observe(step, taken)
        (started if limit else left_out).append(step)
    return started, left_out


def test_the_deadline_leaves_out_what_does_not_fit_and_keeps_time_for_kernels():
    planned = gpu_plan.steps(Request())
    for minutes in (6, 9, 20):
        started, left_out = simulated(planned, minutes)
        assert sum(step.seconds for step in started) <= 60 * minutes - gpu_plan.REPORT_S
        assert any(step.phase == "kernels" for step in started)
        assert left_out, "not everything fits"
        assert sorted(started + left_out, key=planned.index) == planned
    assert len(simulated(planned, 20)[0]) > len(simulated(planned, 9)[0])
    assert simulated(planned, 10_000)[1] == []


def test_slow_cases_are_expected_to_stay_slow():
    planned = [step for step in gpu_plan.steps(Request()) if step.phase == "models"]
    as_expected, slow, fast = (len(simulated(planned, 30, pace)[0]) for pace in (1.0, 2.0, 0.5))
    assert slow < as_expected < fast


def test_a_step_may_take_longer_than_expected_but_not_the_time_of_what_must_follow():
    step = Step("models", "a case", 100.0)
    kernels_step = Step("kernels", "launches", 30.0)
    clock = Clock(5, lambda: 0.0)
    limits = [limit for _, limit in gpu_plan.schedule([step, kernels_step], clock)]
    assert limits == [250.0, 75.0]
    limits = [limit for _, limit in gpu_plan.schedule([step, kernels_step], Clock(3, lambda: 0.0))]
    assert limits == [180.0 - gpu_plan.REPORT_S - 30.0, 75.0]


def command(*arguments: str) -> subprocess.CompletedProcess:
    whole = [sys.executable, "benchmarks/gpu.py", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # none, also on a machine that has one
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_dry_run_prints_the_plan(tmp_path):
    done = command("--dry-run", "--models", "b2", "--cases", "1x224,256x224", "--minutes", "7", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    request = Request(("b2",), ((1, 224), (256, 224)))
    assert done.stdout == gpu_plan.dry_run(gpu_plan.steps(request), 7.0) + "\n"
    lines = done.stdout.splitlines()
    assert lines[1] == "  0.0   build    setup.py build_ext --inplace  (1.5 min)"
    assert "Would not fit, and be reported as not measured: out of time:" in lines
    assert list(tmp_path.iterdir()) == []


def test_plans_need_neither_torch_nor_a_build():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import gpu; print({'torch', 'pvt_fast'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_a_gpu_it_ends_with_one_line():
    for arguments in ((), ("--sanitize-target",)):
        done = command(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("gpu.py: a CUDA GPU must be visible to torch, got none")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--models", "b9"), "--models must be among b0, b1, b2, b2_li, b3, b4, b5; got b9"),
        (("--peers", "eager"), "--peers must be among timm, compile"),
        (("--phases", ""), "--phases must name at least one of build, tests, sanitize, models, kernels; got none"),
        (("--cases", "256"), "must be BATCHxSIZE, comma-separated; got '256'"),
        (("--rounds", "4"), "--rounds must be at least 5; got 4"),
    ],
)
def test_wrong_options_are_named(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(list(arguments))
    assert complaint in capsys.readouterr().err


def test_results_of_other_sources_are_told_by_those_in_folders_too(tmp_path):
    def digest(changed: str | None = None) -> str:
        for name in ("pvt_fast/model.py", "pvt_fast/ops/checks.py", "kernels/launch.py", "kernels/mlp/forward.py"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("new" if name == changed else "old")
        return gpu_plan.sources_digest(tmp_path)

    assert digest() == digest()
    digests = {digest(name) for name in (None, "pvt_fast/ops/checks.py", "kernels/launch.py", "kernels/mlp/forward.py")}
    assert len(digests) == 4
