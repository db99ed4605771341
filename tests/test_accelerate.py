"""accelerate_ on models of others: the unpatched model's answers and gradients, and all that must keep working."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
import vendored
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as pruning

import pvt_fast
from pvt_fast import accelerate
from pvt_fast.adapters import FusedBlock
from pvt_fast.testing import assert_parity

IMAGE = (2, 3, 70, 101)  # not square, and with rows that the reducing convolutions drop

SMALL = {
    "depths": [1, 2],
    "hidden_sizes": [16, 24],
    "num_attention_heads": [1, 3],
    "mlp_ratios": [4, 2],
    "sr_ratios": [4, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_encoder_blocks": 2,
    "num_labels": 5,
}
TIMM = {
    "depths": (1, 2),
    "embed_dims": (16, 24),
    "num_heads": (1, 3),
    "mlp_ratios": (4, 2),
    "sr_ratios": (4, 1),
    "num_classes": 5,
}


def timm_pvt(**options) -> nn.Module:
    return timm.models.pvt_v2.PyramidVisionTransformerV2(**TIMM, **options)


def pvt_v2(**options) -> nn.Module:
    return transformers.PvtV2ForImageClassification(transformers.PvtV2Config(**SMALL, **options))


def segformer(**options) -> nn.Module:
    return transformers.SegformerForImageClassification(transformers.SegformerConfig(**SMALL, **options))


def segmenter() -> nn.Module:
    config = transformers.SegformerConfig(**SMALL, decoder_hidden_size=8)
    return transformers.SegformerForSemanticSegmentation(config)


def glpn() -> nn.Module:
    return transformers.GLPNModel(transformers.GLPNConfig(**SMALL))


# (model, name of its layout, number of its blocks)
PEERS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "official": (vendored.official, "official", 4),
    "official-linear": (lambda: vendored.official(linear=True), "official", 4),
    "maps": (vendored.on_maps, "segmentation_models_pytorch", 4),
    "openmmlab": (vendored.openmmlab, "mmdet / mmseg", 4),
    "openmmlab-no-bias": (lambda: vendored.openmmlab(bias=False), "mmdet / mmseg", 4),
    "timm": (timm_pvt, "timm", 3),
    "timm-linear": (lambda: timm_pvt(linear=True), "timm", 3),
    "pvt_v2": (pvt_v2, "transformers PvtV2", 3),
    "pvt_v2-linear": (lambda: pvt_v2(linear_attention=True), "transformers PvtV2", 3),
    "segformer": (segformer, "transformers SegFormer", 3),
    "segmenter": (segmenter, "transformers SegFormer", 3),
    "glpn": (glpn, "transformers SegFormer 4 / GLPN", 3),
}
peers = pytest.mark.parametrize("peer", PEERS)


def make(peer: str) -> nn.Module:
    """The peer's model in evaluation mode, with no parameter at a trivial value."""
    return randomised(PEERS[peer][0]())


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=1.3 * parameter[0].numel() ** -0.5)
    return model.eval()


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(3)).to(dtype)


def answer(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    output = model(x, **options)
    return output if isinstance(output, Tensor) else output[0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The accelerated blocks."""
    return [module for module in model.modules() if isinstance(module, accelerate._Accelerated)]


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Halves of blocks that ran on the ops, in order."""
    log: list[str] = []

    def run(self, block, args, kwargs, run=FusedBlock.run):
        result = run(self, block, args, kwargs)
        log.extend(() if result is None else self.halves)
        return result

    monkeypatch.setattr(FusedBlock, "run", run)
    return log


# -- the same answers and gradients ------------------------------------------------------------------------------------


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
    twins = [copy.deepcopy(model).double(), copy.deepcopy(model), model]
    pvt_fast.accelerate_(model, backend=target.backend, strict=True)
    with target.in_use():
        truth, plain, ours = (gradients(twin, x) for twin in twins)
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


def other(half: str) -> str:
    return {"attention": "mlp", "mlp": "attention"}[half]


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


# -- what must keep working --------------------------------------------------------------------------------------------


@peers
def test_the_model_is_the_same_but_for_its_blocks_forward(peer):
    model = make(peer)
    facts = [
        lambda: list(model.state_dict()),
        lambda: [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        lambda: [(name, id(module), module._get_name()) for name, module in model.named_modules()],
        lambda: repr(model),
        lambda: [(type(module).__name__, type(module).__module__, type(module).__doc__) for module in model.modules()],
    ]
    before = [fact() for fact in facts]
    kinds = {id(module): type(module) for module in model.modules()}
    contents = {id(module): dict(vars(module)) for module in model.modules()}
    pvt_fast.accelerate_(model)
    assert [fact() for fact in facts] == before
    assert len(blocks(model)) == PEERS[peer][2]
    assert all(isinstance(module, kinds[id(module)]) for module in model.modules())
    pvt_fast.restore_(model)
    assert [fact() for fact in facts] == before
    assert {id(module): type(module) for module in model.modules()} == kinds
    assert {id(module): dict(vars(module)) for module in model.modules()} == contents


@torch.inference_mode()
def test_restored_is_as_before_to_the_bit():
    model, x = make("timm"), image()
    before = model(x)
    pvt_fast.accelerate_(model, backend="cpp")
    assert not torch.equal(model(x), before)
    pvt_fast.restore_(model)
    pvt_fast.restore_(model)  # nothing left to do
    assert torch.equal(model(x), before)


def test_hooks_on_blocks_fire(ran):
    model = make("segformer")
    pvt_fast.accelerate_(model, backend="reference")
    block, log = blocks(model)[1], []
    block.register_forward_pre_hook(lambda module, args: log.append(("pre", len(args))))
    block.register_forward_hook(lambda module, args, output: log.append(("forward", type(output))))
    block.register_full_backward_hook(lambda module, grad_in, grad_out: log.append(("backward", len(grad_out))))
    answer(model, image().requires_grad_()).sum().backward()
    assert log == [("pre", 3), ("forward", Tensor), ("backward", 1)]
    assert ran == ["attention", "mlp"] * 3


def hook(module: nn.Module, seen: list) -> Any:
    return module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))


def backward_hook(module: nn.Module, seen: list) -> Any:
    return module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(type(module).__name__))


INNER = ("norm1", "attn", "attn.q", "attn.sr", "norm2", "mlp", "mlp.dwconv.dwconv", "mlp.act", "drop_path")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", INNER)
def test_hooks_on_inner_modules_are_served_by_the_blocks_own_forward(path, when, ran):
    model, x, seen = make("official"), image(), []
    inner = model.block1[0].get_submodule(path)
    if when == "before":
        handle = hook(inner, seen)
    report = pvt_fast.accelerate_(model, backend="reference", strict=True)
    assert [bool(block.note) for block in report.accelerated] == [when == "before", False, False, False]
    if when == "after":
        handle = hook(inner, seen)
    model(x)
    assert set(seen) == {type(inner).__name__}
    assert ran == ["attention", "mlp"] * 3
    handle.remove()
    model(x)
    assert ran == ["attention", "mlp"] * 7


def test_backward_hooks_on_inner_modules_are_served_too(ran):
    model, seen = make("official"), []
    pvt_fast.accelerate_(model, backend="reference")
    backward_hook(model.block1[0].mlp.fc1, seen)
    model(image()).sum().backward()
    assert seen == ["Linear"]
    assert len(ran) == 6


def test_hooks_on_all_modules_are_served(ran):
    model, seen = make("official"), []
    pvt_fast.accelerate_(model, backend="reference")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(image())
    finally:
        handle.remove()
    assert model.block1[0].attn.q in seen
    assert ran == []


@pytest.mark.parametrize("peer", ["timm", "segformer", "openmmlab"])
def test_an_optimizer_trains_the_same(peer, ran):
    models = [make(peer).double(), make(peer).double()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    pvt_fast.accelerate_(models[1], backend="reference", strict=True)
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            answer(model, image(torch.float64)).square().sum().backward()
            optimizer.step()
    assert len(ran) == 3 * 2 * PEERS[peer][2]
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.25)


def by_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()})


def by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


def by_replacement(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter * 1.25))


@pytest.mark.parametrize("change", [in_place, by_state_dict, by_data, by_replacement])
@pytest.mark.parametrize("peer", ["timm", "segformer", "openmmlab"])
@torch.no_grad()
def test_changed_weights_are_packed_anew(peer, change, ran):
    model, x = make(peer), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    before = answer(model, x)
    change(model)
    after = answer(model, x)
    assert len(ran) == 4 * PEERS[peer][2]
    pvt_fast.restore_(model)
    torch.testing.assert_close(after, answer(model, x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("peer", ["timm", "maps", "segformer", "openmmlab"])
@torch.no_grad()
def test_copies_are_accelerated_and_their_own(peer, copied, ran):
    if peer in ("maps", "openmmlab"):  # their Backbone is made of lambdas: take a block's list
        model, x = make(peer).block1, torch.randn(2, 16, 9, 11)
        run = {"maps": vendored.run_map, "openmmlab": vendored.run_pair}[peer]
        ask = lambda model: run(model[0], vendored.as_tokens(x), 9, 11)  # noqa: E731
    else:
        model = make(peer)
        ask = lambda model: answer(model, image())  # noqa: E731
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    before = ask(model)
    twin = copied(model)
    count = len(ran)
    assert torch.equal(ask(twin), before)
    assert len(ran) == 2 * count
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert not torch.equal(ask(twin), before)
    assert torch.equal(ask(model), before)
    assert len(ran) == 4 * count
    pvt_fast.restore_(twin)
    assert not blocks(twin)
    assert len(blocks(model)) > 0


@torch.no_grad()
def test_shallow_copies_and_replicas_run_on_their_own_weights():
    """As torch.nn.DataParallel makes them: another module dict and other parameters, over the same state."""
    block, x = make("official").block1[0], torch.randn(2, 99, 16)
    pvt_fast.accelerate_(block, backend="cpp")
    assert torch.equal(copy.copy(block)(x, 9, 11), block(x, 9, 11))
    replica, expected = block._replicate_for_data_parallel(), copy.deepcopy(block)
    replica.attn, expected.attn.proj.weight[:] = copy.deepcopy(block.attn), 0.5
    replica.attn.proj.weight[:] = 0.5
    torch.testing.assert_close(replica(x, 9, 11), expected(x, 9, 11))
    assert not torch.allclose(replica(x, 9, 11), block(x, 9, 11))


@torch.no_grad()
def test_settings_can_change_and_contexts_nest(ran):
    model, x = make("timm"), image()
    with pvt_fast.accelerated(model, backend="cpp", mlp=False):
        model(x)
        assert ran == ["attention"] * 3
        with pvt_fast.accelerated(model, backend="reference") as report:
            assert len(report.accelerated) == 3
            model(x)
        assert ran[3:] == ["attention", "mlp"] * 3
        model(x)
        assert ran[9:] == ["attention"] * 3
        pvt_fast.accelerate_(model, attention=False, backend="reference")
        model(x)
        assert ran[12:] == ["mlp"] * 3
    assert not blocks(model)
    with pytest.raises(ZeroDivisionError), pvt_fast.accelerated(model):
        raise ZeroDivisionError
    assert not blocks(model)


@pytest.mark.parametrize("peer", ["pvt_v2", "segformer", "glpn"])
@torch.no_grad()
def test_attentions_and_hidden_states_are_those_of_the_model(peer, ran):
    model, x, count = make(peer), image(), PEERS[peer][2]
    model.set_attn_implementation("eager") if peer == "segformer" else None
    before = model(x, output_attentions=True, output_hidden_states=True)
    pvt_fast.accelerate_(model, backend="reference", strict=True)
    after = model(x, output_attentions=True, output_hidden_states=True)
    assert ran == []
    assert len(flat(after.attentions)) == count
    for kind in ("attentions", "hidden_states"):
        for ours, theirs in zip(flat(after[kind]), flat(before[kind]), strict=True):
            assert torch.equal(ours, theirs)
    # the hooks that transformers leaves behind rest until attentions are asked for again
    hidden = model(x, output_hidden_states=True).hidden_states
    assert ran == ["attention", "mlp"] * count
    for ours, theirs in zip(hidden, before.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def flat(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else [tensor for item in tensors for tensor in flat(item)]


@pytest.mark.parametrize("peer", ["segformer", "timm"])
def test_gradient_checkpointing(peer, ran):
    model, x = make(peer).double(), image(torch.float64)
    if peer == "segformer":
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.set_grad_checkpointing()
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    grads = [torch.autograd.grad(answer(model, x).square().sum(), list(model.parameters()))]
    pvt_fast.accelerate_(model, backend="reference", strict=True)
    grads.append(torch.autograd.grad(answer(model, x).square().sum(), list(model.parameters())))
    assert ran == ["attention", "mlp"] * 3  # a recomputation ends before it returns
    for ours, theirs in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_other_parameters_may_be_called_with(ran):
    model, x = make("segformer").double(), image(torch.float64)
    others = {name: value * 1.1 for name, value in model.named_parameters()}
    expected = torch.func.functional_call(model, others, (x,)).logits
    pvt_fast.accelerate_(model, backend="reference")
    torch.testing.assert_close(torch.func.functional_call(model, others, (x,)).logits, expected, rtol=1e-6, atol=1e-7)
    assert ran == ["attention", "mlp"] * 3


def test_a_model_is_freed_without_the_garbage_collector():
    import gc
    import weakref

    model = make("timm")
    pvt_fast.accelerate_(model, backend="cpp")
    model(image())
    alive = weakref.ref(blocks(model)[0])
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


# -- tracing, scripting, exporting, compiling --------------------------------------------------------------------------


def test_scripting_compiles_the_blocks_own_code(ran):
    model, x = make("timm"), image()
    expected = model(x)
    pvt_fast.accelerate_(model, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), expected)
    assert ran == []
    assert not blocks(model)  # restored: TorchScript takes a module as it is


def test_tracing_records_the_blocks_own_code(ran):
    model, x = make("timm"), image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.jit.trace(model, x)
        pvt_fast.accelerate_(model, backend="reference")
        after = torch.jit.trace(model, x, check_trace=False)
    assert [node.kind() for node in after.inlined_graph.nodes()] == [
        node.kind() for node in before.inlined_graph.nodes()
    ]
    assert ran == []
    assert len(blocks(model)) == 3


@pytest.mark.parametrize("strict", [False, True])
def test_export_records_the_blocks_own_code(strict, ran):
    model, x = make("timm"), image()
    before = torch.export.export(model, (x,), strict=strict)
    pvt_fast.accelerate_(model, backend="cpp")
    after = torch.export.export(model, (x,), strict=strict)
    assert [str(node.target) for node in after.graph.nodes] == [str(node.target) for node in before.graph.nodes]
    assert list(after.state_dict) == list(before.state_dict)
    assert ran == []


@pytest.mark.parametrize(
    ("peer", "ops"), [("timm", ["sr_attention", "dwconv_mlp"] * 3), ("segformer", ["dwconv_mlp"] * 3)]
)
@torch.no_grad()
def test_compiled(peer, ops):
    """One graph with registered ops in it; attention that would be packed at each call keeps its own code."""
    model, x, graphs = make(peer), image(), []
    expected = answer(model, x)
    pvt_fast.accelerate_(model, backend="cpp", strict=True)

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(answer(compiled, x), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [found[1] for target in targets if (found := re.search(r"pvt_fast\W+(\w+)", target))] == ops
    wider = torch.cat((x, x), dim=3)  # another size: the graph becomes a dynamic one
    with pvt_fast.accelerated(model, backend="reference"):
        expected = answer(model, wider)
    torch.testing.assert_close(answer(compiled, wider), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_copy_and_a_compiled_hook():
    model, x = copy.deepcopy(make("timm")), image()
    expected = model(x)
    pvt_fast.accelerate_(model, backend="cpp")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    twin.stages[0].blocks[0].attn.q.register_forward_hook(lambda module, args, output: output * 0)
    torch._dynamo.reset()
    assert not torch.allclose(torch.compile(twin, backend="eager")(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_run_the_blocks_own_code(transform, ran):
    block, x = make("official").block1[0], torch.randn(3, 99, 16)
    call: Callable = {
        "vmap": lambda: torch.func.vmap(lambda row: block(row[None], 9, 11)[0])(x),
        "grad": lambda: torch.func.grad(lambda rows: block(rows, 9, 11).sum())(x),
    }[transform]
    expected = call()
    pvt_fast.accelerate_(block, backend="cpp")
    torch.testing.assert_close(call(), expected)
    assert ran == []


# -- calls that the ops cannot take ------------------------------------------------------------------------------------


@torch.no_grad()
def test_autocast_runs_the_blocks_own_code(ran):
    model, x = make("segformer"), image()
    with torch.autocast("cpu", torch.bfloat16):
        expected = answer(model, x)
        pvt_fast.accelerate_(model, backend="cpp")
        assert torch.equal(answer(model, x), expected)
    assert ran == []
    answer(model, x)
    assert ran


@pytest.mark.parametrize(
    "build",
    [
        lambda: vendored.official(drop=0.3),
        lambda: vendored.openmmlab(drop=0.3),
        lambda: timm_pvt(proj_drop_rate=0.3),
        lambda: segformer(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3),
        lambda: segformer(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0),
        lambda: pvt_v2(attention_probs_dropout_prob=0.3),
    ],
)
@torch.no_grad()
def test_dropout_runs_the_blocks_own_code_while_it_is_in_force(build, ran):
    model, x = build(), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    model.train()
    answers = [answer(model, x) for _ in range(2)]
    assert not torch.equal(*answers)
    assert ran == []
    model.eval()
    answer(model, x)
    assert len(ran) in (6, 8)


@torch.no_grad()
def test_calls_by_keyword_and_odd_calls(ran):
    block, x = make("pvt_v2").pvt_v2.encoder.layers[0].blocks[0], torch.randn(2, 99, 16)
    own = block(x, 9, 11)
    pvt_fast.accelerate_(block, backend="reference")
    for output in (
        block(x, 9, 11),
        block(x, height=9, width=11),
        block(hidden_states=x, width=11, height=9, output_attentions=False),
        block(x, 9, 11, False),
    ):
        assert type(output) is tuple
        torch.testing.assert_close(output, own)
    assert len(ran) == 8
    assert len(block(x, 9, 11, True)) == 2
    assert len(ran) == 8
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'width'"):
        block(x, 9)
    with pytest.raises(TypeError, match="multiple values for argument 'height'"):
        block(x, 9, 11, height=9)
    with pytest.raises(RuntimeError):  # the block's own error
        block(x, 9, 12)
    assert len(ran) == 8


class Tagged(Tensor):
    """A tensor that is more than one."""


@torch.no_grad()
def test_subclasses_of_tensor_run_the_blocks_own_code(ran):
    block, x = make("official").block1[0], torch.randn(2, 99, 16).as_subclass(Tagged)
    pvt_fast.accelerate_(block, backend="reference")
    assert type(block(x, 9, 11)) is Tagged
    assert ran == []


@torch.no_grad()
def test_settings_are_read_at_every_call():
    block, x = make("official").block1[0].double(), torch.randn(2, 99, 16, dtype=torch.float64)
    pvt_fast.accelerate_(block, backend="reference")
    for change in (
        lambda: setattr(block.norm1, "eps", 0.3),
        lambda: setattr(block.norm2, "eps", 0.3),
        lambda: setattr(block.attn.norm, "eps", 0.3),
        lambda: setattr(block.attn, "scale", 2.0),
    ):
        before = block(x, 9, 11)
        change()
        after = block(x, 9, 11)
        assert not torch.allclose(after, before, rtol=1e-3)
        with pvt_fast.accelerated(block, backend="reference"):
            torch.testing.assert_close(block(x, 9, 11), after)
        twin = copy.deepcopy(block)
        pvt_fast.restore_(twin)
        torch.testing.assert_close(twin(x, 9, 11), after)


class Low(nn.Module):
    """A linear with a low-rank addition, as adapters wrap it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def wrap(block: nn.Module) -> None:
    block.attn.q = Low(block.attn.q)


def parametrise(block: nn.Module) -> None:
    parametrize.register_parametrization(block.mlp.fc1, "weight", Half())


def weight_norm(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block.attn.kv)


def prune(block: nn.Module) -> None:
    pruning.l1_unstructured(block.mlp.fc2, "weight", 0.5)


def override(block: nn.Module) -> None:
    linear = block.attn.proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias) * 2


def change_activation(block: nn.Module) -> None:
    block.mlp.act = nn.GELU(approximate="tanh")


def shrink(block: nn.Module) -> None:
    """Fewer hidden channels by parameters of another shape."""
    mlp, keep = block.mlp, slice(0, 12)
    mlp.fc1.weight, mlp.fc1.bias = nn.Parameter(mlp.fc1.weight[keep]), nn.Parameter(mlp.fc1.bias[keep])
    conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    conv.weight, conv.bias = nn.Parameter(mlp.dwconv.dwconv.weight[keep]), nn.Parameter(mlp.dwconv.dwconv.bias[keep])
    mlp.dwconv.dwconv = conv
    mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, keep])


CHANGES = [wrap, parametrise, weight_norm, prune, override, change_activation, shrink]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_block_changed_later_runs_its_own_code(change, ran):
    model, x = make("official"), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    model(x)
    ran.clear()
    change(model.block1[1])
    after = model(x)
    assert ran == ["attention", "mlp"] * 3
    pvt_fast.restore_(model)
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-5)


REASONS = {
    wrap: "attention: attn.q must be a plain Linear, got Low",
    parametrise: "mlp: mlp.fc1 must be a plain Linear, got ParametrizedLinear",
    weight_norm: "attention: attn.kv must be a plain Linear, got ParametrizedLinear",
    change_activation: "mlp: mlp.act must be the exact GELU, got GELU(approximate='tanh')",
}


@pytest.mark.parametrize("change", REASONS)
@torch.no_grad()
def test_a_half_that_cannot_be_accelerated_is_reported_and_runs_its_own_code(change, ran):
    model, x = make("official"), image()
    change(model.block1[1])
    before = model(x)
    report = pvt_fast.accelerate_(model, backend="cpp")
    assert [(block.path, block.reason) for block in report.skipped] == [("block1.1", REASONS[change])]
    assert len(report.accelerated) == 4
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert len(ran) == 7


def set_attribute(path: str, value: Any) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(block.get_submodule(owner), name, value)

    return change


def quantise(block: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block.mlp = torch.ao.quantization.quantize_dynamic(block.mlp, {nn.Linear})


ODD = [
    (prune, "mlp: mlp.fc2 must be a plain Linear, got Linear"),
    (quantise, "mlp: mlp.fc1 must be a plain Linear, got Linear"),
    (
        set_attribute("norm2", nn.BatchNorm1d(16)),
        "mlp: norm2 must be a LayerNorm with weight and bias, got BatchNorm1d",
    ),
    (
        set_attribute("norm1", nn.LayerNorm(16, elementwise_affine=False)),
        "attention: norm1 must be a LayerNorm with weight and bias, got LayerNorm",
    ),
    (
        set_attribute("attn.scale", nn.Parameter(torch.ones(1))),
        "attention: attn.scale must be a plain float, got Parameter",
    ),
    (set_attribute("attn.num_heads", 3), "attention: attn.num_heads must divide the 16 channels, got 3"),
    (
        set_attribute("attn.sr", nn.Conv2d(16, 16, 4, stride=2)),
        "attention: attn.sr must have stride 4, zero padding of 0 and 1 groups, got Conv2d(",
    ),
    (
        set_attribute("mlp.dwconv.dwconv", nn.Conv2d(32, 32, 3, padding=1, groups=32, padding_mode="reflect")),
        "mlp: mlp.dwconv.dwconv must have stride 1, zero padding of 1 and 32 groups, got Conv2d(",
    ),
    (
        set_attribute("mlp.dwconv.dwconv", nn.Conv2d(32, 32, 5, padding=2, groups=32)),
        "mlp: mlp.dwconv.dwconv must have a weight of shape 32x1x3x3, got 32x1x5x5",
    ),
    (set_attribute("mlp.gamma", nn.Parameter(torch.ones(1))), "mlp: mlp is of an unknown purpose, Mlp"),
    (set_attribute("mlp.extra", nn.SiLU()), "mlp: mlp.extra is of an unknown purpose, SiLU"),
    (set_attribute("drop_path", nn.Tanh()), "drop_path must be stochastic depth with a drop_prob, got Tanh"),
    (set_attribute("forward", lambda *args: args[0]), "it has a forward of its own, set on the instance"),
]


@pytest.mark.parametrize(("change", "reason"), ODD)
def test_reasons(change, reason):
    model = make("official")
    change(model.block1[1])
    report = pvt_fast.accelerate_(model, backend="reference")
    assert report.skipped
    assert {block.path for block in report.skipped} == {"block1.1"}
    assert any(reason in block.reason for block in report.skipped)
    assert reason in str(report)


@pytest.mark.parametrize(
    ("options", "refused", "difference"),
    [
        ({"mlp": vendored.ResidualMlp}, "mlp", "something else"),
        ({"attention": vendored.CosineAttention}, "attention", "something else"),
    ],
)
@torch.no_grad()
def test_blocks_that_compute_something_else_are_found_out(options, refused, difference, ran):
    model, x = randomised(vendored.official(**options)), image()
    before = model(x)
    report = pvt_fast.accelerate_(model, backend="cpp")
    assert [block.halves for block in report.accelerated] == [(other(refused),)] * 4
    assert all(block.reason.startswith(f"{refused}: ") and difference in block.reason for block in report.skipped)
    assert len(report.skipped) == 4
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert ran == [other(refused)] * 4


def test_trying_out_leaves_no_trace():
    model, seen = make("official"), []
    hook(model.block1[0].mlp.fc1, seen)
    state = torch.get_rng_state()
    grads = [parameter.requires_grad for parameter in model.parameters()]
    values = copy.deepcopy(model.state_dict())
    pvt_fast.accelerate_(model)
    assert seen == []
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_models_without_values_can_be_accelerated(ran):
    with torch.device("meta"):
        model = timm_pvt()
    pvt_fast.accelerate_(model, backend="reference", strict=True)
    assert model.eval()(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 5)
    assert len(ran) == 6
    model = model.to_empty(device="cpu")
    model.load_state_dict(make("timm").state_dict())
    got = model(image())
    pvt_fast.restore_(model)
    torch.testing.assert_close(got, model(image()), rtol=1e-4, atol=1e-5)


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
    assert len(blocks(model)) == 3


def test_strict_accelerates_all_or_nothing():
    model = make("official")
    change_activation(model.block1[1])
    with pytest.raises(pvt_fast.AccelerationError, match="strict=True, got 4 blocks accelerated, 1 times not") as error:
        pvt_fast.accelerate_(model, strict=True)
    assert len(error.value.report.accelerated) == 4
    assert not blocks(model)
    pvt_fast.accelerate_(model, strict=True, mlp=False)
    pvt_fast.accelerate_(model, strict=True, filter_fn=lambda path, module: path != "block1.1")
    assert len(blocks(model)) == 4
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
    assert not blocks(model)


def test_arguments_are_checked_before_anything_changes():
    model = make("timm")
    with pytest.raises(ValueError, match="accelerate_: backend must be one of auto, triton, cpp, reference; got 'gpu'"):
        pvt_fast.accelerate_(model, backend="gpu")
    with pytest.raises(ValueError, match="accelerate_: attention or mlp must be True, got False for both"):
        pvt_fast.accelerate_(model, attention=False, mlp=False)
    assert not blocks(model)


def test_a_backend_that_cannot_be_loaded_is_refused(monkeypatch):
    monkeypatch.setitem(pvt_fast.dispatch.ORDER, "absent", "tests_absent_backend")
    monkeypatch.setattr(pvt_fast.dispatch, "load", lambda name: pvt_fast.BackendUnavailable("it is absent"))
    model = make("timm")
    with pytest.raises(pvt_fast.BackendUnavailable, match="backend 'absent' cannot run: it is absent"):
        pvt_fast.accelerate_(model, backend="absent")
    assert not blocks(model)


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
    block = blocks(model)[1]
    own = type(block)
    block.__class__ = type("Foreign", (own,), {})
    with pytest.raises(
        RuntimeError, match=r"restore_: stages.1.blocks.0 must be of the class that accelerate_ gave it"
    ):
        pvt_fast.restore_(model)
    assert len(blocks(model)) == 3
    report = pvt_fast.accelerate_(model)
    assert [block.path for block in report.skipped] == ["stages.1.blocks.0"] * 2
    block.__class__ = own
    pvt_fast.restore_(model)
