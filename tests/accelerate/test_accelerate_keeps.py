"""What keeps working on an accelerated model: hooks, optimizers, copies, pickles, tracing, compiling."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vendored
from peer_models import PEERS, accelerated_blocks, answer, hook, image, make, peers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.segformer.modeling_segformer import eager_attention_forward

import pvt_fast


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
    assert len(accelerated_blocks(model)) == PEERS[peer][2]
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
    block, log = accelerated_blocks(model)[1], []
    block.register_forward_pre_hook(lambda module, args: log.append(("pre", len(args))))
    block.register_forward_hook(lambda module, args, output: log.append(("forward", type(output))))
    block.register_full_backward_hook(lambda module, grad_in, grad_out: log.append(("backward", len(grad_out))))
    answer(model, image().requires_grad_()).sum().backward()
    assert log == [("pre", 3), ("forward", Tensor), ("backward", 1)]
    assert ran == ["attention", "mlp"] * 3


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


# (peer, class of the module, one of its attributes, another value): what the attention's own forward decides by
DECIDING = [
    ("official", "Attention", "sr_ratio", 1),
    ("pvt_v2", "PvtV2SelfAttention", "spatial_reduction_ratio", 1),
    ("segformer", "SegformerAttention", "sequence_reduction_ratio", 1),
    ("segformer", "SegformerAttention", "is_causal", True),
]


@pytest.mark.parametrize(("peer", "kind", "name", "value"), DECIDING)
@torch.no_grad()
def test_settings_that_only_the_blocks_own_code_reads(peer, kind, name, value):
    model, x = make(peer), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    before = answer(model, x)
    changed = [module for module in model.modules() if type(module).__name__ == kind]
    assert changed
    for module in changed:
        setattr(module, name, value)
    after = answer(model, x)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert any(name in piece.reason for piece in pvt_fast.explain(model).pieces)
    pvt_fast.restore_(model)
    torch.testing.assert_close(after, answer(model, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_by_a_function_of_ones_own():
    calls = []

    def tripled(module, query, *args, scaling=None, **options):
        calls.append(module)
        return eager_attention_forward(module, query, *args, scaling=3 * scaling, **options)

    AttentionInterface.register("tripled", tripled)
    model, x = make("segformer"), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    before = answer(model, x)
    model.set_attn_implementation("tripled")
    after = answer(model, x)
    assert len(calls) == PEERS["segformer"][2]
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert "'tripled'" in pvt_fast.explain(model).pieces[0].reason
    model.set_attn_implementation("eager")
    assert torch.equal(answer(model, x), before)
    model.set_attn_implementation("tripled")
    pvt_fast.restore_(model)
    report = pvt_fast.accelerate_(model, backend="cpp")
    assert [block.halves for block in report.accelerated] == [("mlp",)] * 3
    assert "its attention by a function of its own, 'tripled'" in str(report)
    torch.testing.assert_close(answer(model, x), after, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_method_of_an_inner_module_is_called():
    model, x = make("timm"), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    before = answer(model, x)
    conv = model.stages[0].blocks[0].mlp.dwconv
    conv._conv_forward = lambda x, weight, bias: nn.Conv2d._conv_forward(conv, x, 2 * weight, bias)
    after = answer(model, x)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    pvt_fast.restore_(model)
    torch.testing.assert_close(after, answer(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "path", ["attn", *(pytest.param(path, marks=pytest.mark.full) for path in ("attn.q", "mlp.fc2"))]
)
@torch.no_grad()
def test_a_forward_set_after_compiling(path):
    """As accelerate's hooks do."""
    torch._dynamo.reset()
    model, x = make("timm"), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    inner = model.stages[0].blocks[0].get_submodule(path)
    own_forward = inner.forward
    inner.forward = lambda *args: 0.1 * own_forward(*args)
    assert not torch.allclose(compiled(x), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    del inner.forward
    torch.testing.assert_close(compiled(x), before, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


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
    clone = copied(model)
    count = len(ran)
    assert torch.equal(ask(clone), before)
    assert len(ran) == 2 * count
    for parameter in clone.parameters():
        parameter.mul_(1.5)
    assert not torch.equal(ask(clone), before)
    assert torch.equal(ask(model), before)
    assert len(ran) == 4 * count
    pvt_fast.restore_(clone)
    assert not accelerated_blocks(clone)
    assert len(accelerated_blocks(model)) > 0


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
    assert not accelerated_blocks(model)
    with pytest.raises(ZeroDivisionError), pvt_fast.accelerated(model):
        raise ZeroDivisionError
    assert not accelerated_blocks(model)


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


@torch.no_grad()
def test_attentions_asked_for_by_the_configuration(ran):
    model, x = make("segformer"), image()
    model.set_attn_implementation("eager")
    pvt_fast.accelerate_(model, backend="reference", strict=True)
    model(x, output_attentions=True)
    model.config.output_attentions = True  # no argument tells of it
    assert len(model(x).attentions) == 3
    assert ran == []
    reasons = {piece.reason for piece in pvt_fast.explain(model).pieces}
    assert reasons == {"its model's configuration asks for attentions"}


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
    alive = weakref.ref(accelerated_blocks(model)[0])
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
    assert not accelerated_blocks(model)  # restored: TorchScript takes a module as it is


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
    assert len(accelerated_blocks(model)) == 3


def test_tracing_a_block_by_itself(ran):
    class Fixed(nn.Module):
        """The size is no tensor while this is traced."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, 9, 11)

    block, x = make("official").block1[0], torch.randn(2, 99, 16)
    pvt_fast.accelerate_(block, backend="cpp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Fixed(block), x, check_trace=False)
    assert ran == []
    other = torch.randn(2, 99, 16)
    torch.testing.assert_close(traced(other), block(other, 9, 11), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_records_the_blocks_own_code(strict, ran):
    model, x = make("timm"), image()
    before = torch.export.export(model, (x,), strict=strict)
    pvt_fast.accelerate_(model, backend="cpp")
    after = torch.export.export(model, (x,), strict=strict)
    assert [str(node.target) for node in after.graph.nodes] == [str(node.target) for node in before.graph.nodes]
    assert list(after.state_dict) == list(before.state_dict)
    assert ran == []


@pytest.mark.parametrize(("peer", "ops"), [("timm", ["attention", "mlp"] * 3), ("segformer", ["mlp"] * 3)])
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
    clone = copy.deepcopy(model)
    clone.stages[0].blocks[0].attn.q.register_forward_hook(lambda module, args, output: output * 0)
    torch._dynamo.reset()
    assert not torch.allclose(torch.compile(clone, backend="eager")(x), expected, rtol=1e-4, atol=1e-5)


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
