"""accelerate_ on models of others: the unpatched model's answers and gradients, its arguments and its report."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import vendored
from peer_models import (
    PEERS,
    accelerated_blocks,
    answer,
    change_activation,
    hook,
    image,
    make,
    other,
    peers,
    pvt_v2,
    randomised,
    segformer,
    timm_pvt,
)
from torch import Tensor, nn

import pvt_fast
from benchmarks.cpu import accelerated as benchmarked
from pvt_fast.testing import assert_parity


@peers
@pytest.mark.one_isa
@pytest.mark.not_interpreted
@torch.inference_mode()
def test_parity(peer, target, dtype, ran, poisoned_memory):
    """The parity rule, with the unpatched model for plain torch, whole."""
    model, x = make(peer).to(dtype), image(dtype)
    truth = answer(copy.deepcopy(model).double(), x.double())
    plain = answer(model, x)
    report = pvt_fast.accelerate_(model, backend=target.backend, strict=True)
    _, name, count = PEERS[peer]
    assert [(block.peer, block.halves) for block in report.accelerated] == [(name, ("attention", "mlp"))] * count
    with target.in_use():
        for _ in range(2):  # packs, then runs on what was packed
            assert_like(answer(model, x), truth, plain)
    assert ran == ["attention", "mlp"] * count * 2


@peers
@pytest.mark.one_isa
@pytest.mark.not_interpreted
def test_gradients(peer, target, ran):
    """Of the image and of every parameter: in float64 each for itself, in float32 by the parity rule over all."""
    dtype = torch.float64 if target.backend == "reference" else torch.float32
    model, x = make(peer).to(dtype), image(dtype)
    clones = [copy.deepcopy(model).double(), copy.deepcopy(model), model]
    pvt_fast.accelerate_(model, backend=target.backend, strict=True)
    with target.in_use():
        truth, plain, ours = (gradients(clone, x) for clone in clones)
    assert ran == ["attention", "mlp"] * PEERS[peer][2]
    assert list(ours) == list(plain)  # no gradient where there was none
    for name, parameter in model.named_parameters():
        assert name not in ours or ours[name].stride() == parameter.stride(), name
        if dtype == torch.float64:
            torch.testing.assert_close(ours[name], truth[name], rtol=1e-5, atol=1e-6, msg=name)
    assert_like(*(torch.cat([grad.flatten() for grad in grads.values()]) for grads in (ours, truth, plain)))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = x.to(next(model.parameters()).dtype).requires_grad_()
    answer(model, leaf).square().sum().backward()
    found = {"image": leaf.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    return {name: grad for name, grad in found.items() if grad is not None}


def assert_like(ours: Tensor, truth: Tensor, plain: Tensor) -> None:
    """The parity rule; in float64, where the truth is plain torch itself, agreement."""
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-8 * float(truth.abs().max()))
    else:
        assert_parity(ours, truth, plain)


@pytest.mark.parametrize("peer", ["official", "openmmlab"])
@pytest.mark.parametrize(("of_x", "of_weights"), [(True, False), (False, True)])
def test_gradients_of_the_input_or_the_weights_alone(peer, of_x, of_weights):
    block, size = make(peer).block1[0].requires_grad_(of_weights), ((9, 11),) if peer == "openmmlab" else (9, 11)
    x = torch.randn(2, 99, 16, requires_grad=of_x)
    leaves = [x] if of_x else list(block.parameters())
    expected = torch.autograd.grad(block(x, *size).square().sum(), leaves)
    pvt_fast.accelerate_(block, backend="cpp")
    for ours, theirs in zip(torch.autograd.grad(block(x, *size).square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("peer", ["segformer", "openmmlab"])
def test_gradients_reach_weights_whose_other_form_was_kept(peer):
    """Without gradients, keys and values together are computed once; that copy must not be what a backward ends at."""
    model, x = make(peer), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    with torch.no_grad():
        answer(model, x)
    answer(model, x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


DROPPING = {
    "official": lambda: vendored.official(drop_path=0.5),
    "openmmlab": lambda: vendored.openmmlab(drop_path=0.5),
    "timm": lambda: timm_pvt(drop_path_rate=0.5),
    "pvt_v2": lambda: pvt_v2(drop_path_rate=0.5),
    "segformer": lambda: segformer(drop_path_rate=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


@pytest.mark.parametrize("peer", DROPPING)
def test_stochastic_depth_draws_what_the_model_draws(peer, ran):
    model, x = randomised(DROPPING[peer]()).double().train(), image(torch.float64)
    outputs, grads = [], []
    for accelerate_it in (False, True):
        if accelerate_it:
            pvt_fast.accelerate_(model, backend="reference", strict=True)
        torch.manual_seed(7)
        outputs.append(answer(model, x))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), list(model.parameters()), allow_unused=True))
    assert len(ran) >= 6
    assert not torch.allclose(outputs[0], answer(model, x))  # it does drop: another draw, another answer
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@peers
@pytest.mark.parametrize("half", ["attention", "mlp"])
@torch.inference_mode()
def test_one_half(peer, half, ran):
    model, x = make(peer).double(), image(torch.float64)
    before = answer(model, x)
    with pvt_fast.accelerated(model, backend="reference", strict=True, **{half: True, other(half): False}) as report:
        torch.testing.assert_close(answer(model, x), before, rtol=1e-6, atol=1e-7)
    assert {block.halves for block in report.accelerated} == {(half,)}
    assert ran == [half] * PEERS[peer][2]


@pytest.mark.parametrize("name", ["twins_pcpvt_small", "twins_svt_small"])
@torch.inference_mode()
def test_blocks_with_a_plain_mlp_have_their_attention_accelerated(name, ran):
    model = timm.create_model(name, depths=(1, 2, 1, 1), img_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    report = pvt_fast.accelerate_(model, backend="reference")
    torch.testing.assert_close(model(x), before)
    assert {block.halves for block in report.accelerated} == {("attention",)}
    assert {block.reason for block in report.skipped} == {"mlp: it has no mlp.dwconv.dwconv or mlp.dwconv"}
    assert ran == ["attention"] * len(report.accelerated)


@pytest.mark.parametrize("name", benchmarked.MODELS)
def test_the_benchmarked_models_are_accelerated_as_a_whole(name):
    with torch.device("meta"):
        model = benchmarked.MODELS[name]()
    report = pvt_fast.accelerate_(model, strict=True)
    assert len(report.accelerated) == {"b0": 8, "b2": 16}[name[-2:]]


# -- arguments and the report ------------------------------------------------------------------------------------------


def test_the_report():
    model = make("official")
    change_activation(model.block1[1])
    hook(model.block2[0].attn, [])
    report = pvt_fast.accelerate_(model, filter_fn=lambda path, module: path != "block2.1")
    assert str(report).splitlines() == [
        "3 blocks accelerated, 2 times not",
        "  block1.0: official, attention and mlp",
        "  block1.1: official, attention",
        "  block2.0: official, attention and mlp (for now not: there are hooks on its attn)",
        "  block1.1: official, not: mlp: mlp.act must be the exact GELU, got GELU(approximate='tanh')",
        "  block2.1: official, not: filter_fn left it out",
    ]
    with pytest.raises(AttributeError):
        report.accelerated = ()
    assert len(accelerated_blocks(model)) == 3


def test_strict_accelerates_all_or_nothing():
    model = make("official")
    change_activation(model.block1[1])
    with pytest.raises(pvt_fast.AccelerationError, match="strict=True, got 4 blocks accelerated, 1 times not") as error:
        pvt_fast.accelerate_(model, strict=True)
    assert len(error.value.report.accelerated) == 4
    assert not accelerated_blocks(model)
    pvt_fast.accelerate_(model, strict=True, mlp=False)
    pvt_fast.accelerate_(model, strict=True, filter_fn=lambda path, module: path != "block1.1")
    assert len(accelerated_blocks(model)) == 4
    with pytest.raises(pvt_fast.AccelerationError, match="got no block of a known layout was found"):
        pvt_fast.accelerate_(nn.Linear(2, 2), strict=True)


def test_filter_fn_is_asked_about_recognised_blocks():
    model, asked = make("timm"), []
    report = pvt_fast.accelerate_(model, filter_fn=lambda path, module: asked.append((path, module)))
    assert asked == [(path, model.get_submodule(path)) for path, _ in asked]
    assert [path for path, _ in asked] == ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]
    assert not report.accelerated


def test_our_own_blocks_need_no_acceleration():
    model = pvt_fast.PVT_V2(depths=(1, 1, 1, 1), num_classes=2)
    report = pvt_fast.accelerate_(model)
    assert not report.accelerated
    assert {block.reason for block in report.skipped} == {"it runs on the ops by itself"}
    assert not accelerated_blocks(model)


def test_arguments_are_checked_before_anything_changes():
    model = make("timm")
    with pytest.raises(ValueError, match="accelerate_: backend must be one of auto, triton, cpp, reference; got 'gpu'"):
        pvt_fast.accelerate_(model, backend="gpu")
    with pytest.raises(ValueError, match="accelerate_: attention or mlp must be True, got False for both"):
        pvt_fast.accelerate_(model, attention=False, mlp=False)
    assert not accelerated_blocks(model)


def test_a_backend_that_cannot_be_loaded_is_refused(monkeypatch):
    monkeypatch.setitem(pvt_fast.backend.dispatch.ORDER, "absent", "tests_absent_backend")
    monkeypatch.setattr(pvt_fast.backend.dispatch, "loaded", lambda name: pvt_fast.BackendUnavailable("it is absent"))
    model = make("timm")
    with pytest.raises(pvt_fast.BackendUnavailable, match="backend 'absent' cannot run: it is absent"):
        pvt_fast.accelerate_(model, backend="absent")
    assert not accelerated_blocks(model)


@torch.no_grad()
def test_a_backend_by_name_runs_or_raises():
    model, x = make("timm").double(), image(torch.float64)
    pvt_fast.accelerate_(model, backend="cpp")
    with pytest.raises(pvt_fast.BackendUnavailable, match="backend 'cpp' cannot run: it takes float32, bfloat16"):
        model(x)


@torch.no_grad()
def test_auto_runs_the_blocks_own_code_where_only_the_reference_is_left(ran):
    model, x = make("timm").double(), image(torch.float64)
    pvt_fast.accelerate_(model)
    model(x)
    assert len(ran) == 6  # as the tests' default backend is the reference
    with pvt_fast.use_backend("auto"):
        pvt_fast.restore_(model)
        expected = model(x)
        pvt_fast.accelerate_(model)
        assert torch.equal(model(x), expected)
        assert len(ran) == 6
        model.float()(image())
    assert len(ran) == 12


def test_what_another_library_did_later_is_not_undone():
    model = make("timm")
    pvt_fast.accelerate_(model)
    block = accelerated_blocks(model)[1]
    own = type(block)
    block.__class__ = type("Foreign", (own,), {})
    with pytest.raises(
        RuntimeError, match=r"restore_: stages.1.blocks.0 must be of the class that accelerate_ gave it"
    ):
        pvt_fast.restore_(model)
    assert len(accelerated_blocks(model)) == 3
    report = pvt_fast.accelerate_(model)
    assert [block.path for block in report.skipped] == ["stages.1.blocks.0"] * 2
    block.__class__ = own
    pvt_fast.restore_(model)


@pytest.mark.parametrize("refuses", ["subclasses", "another class"])
def test_blocks_whose_class_cannot_be_replaced_are_left_alone(refuses):
    model = make("official")
    block = model.block1[1]

    class Frozen(type(block)):
        def __init_subclass__(cls) -> None:
            if refuses == "subclasses":
                raise TypeError("so it is")

        def __setattr__(self, name, value):
            if name == "__class__" and refuses == "another class":
                raise AttributeError("so it is")
            super().__setattr__(name, value)

    object.__setattr__(block, "__class__", Frozen)
    report = pvt_fast.accelerate_(model)
    assert len(accelerated_blocks(model)) == len(report.accelerated) == len(model.block1) + len(model.block2) - 1
    (skipped,) = {(block.path, block.reason.partition(": ")[2]) for block in report.skipped}
    assert skipped[0] == "block1.1"
    assert skipped[1].startswith("no subclass can take the place of its class Frozen: ")
    assert skipped[1].endswith("Error: so it is")
    assert type(block) is Frozen
