"""The comparison of backends: checked before it is timed, in turns, and honest about what did not run."""

from dataclasses import replace

import pytest
import torch

from pvt_fast import PVT_V2
from pvt_fast.backend import dispatch
from pvt_fast.cli import bench, timing
from pvt_fast.cli.bench import Comparison, Contender, ParityError, Result, compare, interleave
from pvt_fast.ops import Facts, Support, reference

REFERENCE = Contender("reference", torch.float32, "cpu")


@pytest.fixture
def model() -> PVT_V2:
    return PVT_V2(
        img_size=32,
        num_classes=10,
        embed_dims=(16, 32),
        num_heads=(1, 2),
        mlp_ratios=(2, 2),
        depths=(1, 1),
        sr_ratios=(2, 1),
        num_stages=2,
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32)


def result(backend: str, seconds: tuple[float, ...], dtype=torch.float32, images: int = 8) -> Result:
    return Result(Contender(backend, dtype, "cpu"), torch.zeros(images, 10), seconds)


def test_calls_take_turns_after_a_warm_up():
    order = []
    seconds = interleave([lambda: order.append("A"), lambda: order.append("B")], rounds=3)
    assert order == ["A", "B"] + ["A", "B"] * 3
    assert [len(times) for times in seconds] == [3, 3]
    assert all(time > 0 for times in seconds for time in times)


@pytest.mark.parametrize(("rounds", "expected"), [(1, 1), (100, timing.FEWEST)])
def test_spent_budget_ends_the_rounds(rounds, expected):
    assert [len(times) for times in interleave([lambda: None], rounds, budget_s=0.0)] == [expected]


def test_figures_of_a_result():
    actual = result("cpp", (0.004, 0.001, 0.002, 0.003, 0.005))
    assert actual.median == pytest.approx(0.003)
    assert actual.images_per_s == pytest.approx(8 / 0.003)
    assert actual.spread == pytest.approx((3.0, 1.4, 4.6, 5))
    assert result("cpp", (0.004,)).spread == pytest.approx((4.0, 4.0, 4.0, 1))


def test_speedup_is_over_the_reference_of_the_same_dtype():
    fast, half = result("cpp", (1.0,)), result("cpp", (1.0,), torch.bfloat16)
    comparison = Comparison([result("reference", (3.0,)), fast, half], {})
    assert comparison.speedup(fast) == pytest.approx(3.0)
    assert comparison.speedup(half) is None


def test_only_backends_that_ran_nowhere_are_refused():
    refusals = {
        Contender("cpp", torch.float32, "cuda"): "CPU only",
        Contender("triton", torch.float32, "cpu"): "no GPU",
        Contender("triton", torch.bfloat16, "cpu"): "no GPU",
    }
    assert Comparison([result("cpp", (1.0,))], refusals).refused() == {"triton": "no GPU"}


@pytest.mark.not_interpreted
def test_compare_on_every_target(model, images, target):
    model.train()
    contenders = [REFERENCE, Contender(target.backend, torch.float32, target.device)]
    with target.in_use():
        comparison = compare(model, images, contenders, rounds=1)
    assert comparison.refusals == {}
    assert [r.contender for r in comparison.results] == list(dict.fromkeys(contenders))
    with torch.inference_mode():
        truth = model.eval().double()(images.double())
    for actual in comparison.results:
        assert len(actual.seconds) == 1
        # parity itself is checked inside; here only that these are the answers of this model
        assert torch.equal(actual.output.argmax(dim=1), truth.argmax(dim=1))


def test_compare_leaves_the_model_alone(model, images):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare(model, images, [REFERENCE, REFERENCE._replace(dtype=torch.bfloat16)], rounds=1)
    assert model.training
    assert model.backend == "auto"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def outputs_of(model: PVT_V2, images: torch.Tensor) -> dict[Contender, torch.Tensor]:
    model.backend = "reference"
    with torch.no_grad():
        return {Contender("cpp", torch.float32, "cpu"): model(images)}


def test_right_answers_pass_the_check(model, images):
    bench.check(model.eval(), images, outputs_of(model, images))


@pytest.mark.parametrize("parity_images", [2, 4])
@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("error", [1e-3, torch.nan])
def test_one_wrong_image_fails_the_check(model, images, row, error, parity_images):
    outputs = outputs_of(model.eval(), images)
    next(iter(outputs.values()))[row, 3] += error
    with pytest.raises(ParityError, match="cpp float32 on cpu: "):
        bench.check(model, images, outputs, parity_images)


def test_wrong_answers_are_not_timed(model, images, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("made to fail")

    monkeypatch.setattr(bench, "assert_parity", refuse)
    monkeypatch.setattr(bench, "interleave", lambda *arguments: pytest.fail("timed before the answers were right"))
    with pytest.raises(ParityError, match="made to fail"):
        compare(model, images, [REFERENCE], rounds=1)


@pytest.fixture
def picky(add_backend) -> str:
    """A backend that runs float32 only."""

    class Picky(Support):
        def refusal(self, facts: Facts) -> str | None:
            return None if facts.dtype == torch.float32 else "it wants float32"

    add_backend(replace(reference.BACKEND, support=Picky("picky")))
    return "picky"


def test_a_refused_dtype_is_reported_and_the_rest_runs(model, images, picky):
    contenders = [Contender(picky, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)]
    comparison = compare(model, images, contenders, rounds=1)
    assert [r.contender for r in comparison.results] == contenders[:1]
    assert comparison.refusals == {contenders[1]: "backend 'picky' cannot run: it wants float32"}
    assert comparison.refused() == {}


def test_a_backend_absent_here_is_reported(model, images, monkeypatch):
    absent = dispatch.BackendStatus("cpp", False, "no compiler was here")
    monkeypatch.setattr(bench, "backends", lambda: [absent])
    comparison = compare(model, images, [REFERENCE, REFERENCE._replace(backend="cpp")], rounds=1)
    assert [r.contender for r in comparison.results] == [REFERENCE]
    assert comparison.refused() == {"cpp": "backend 'cpp' cannot run: no compiler was here"}
