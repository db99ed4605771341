"""torch.compile and torch.export: one graph, the same numbers, and the backend's own packed weights."""

import copy
import gc
import pickle
import threading
from dataclasses import replace

import pytest
import torch

import pvt_fast
from pvt_fast import PVT_V2
from pvt_fast.backend import registered as library
from pvt_fast.graphs import compiled as whole
from pvt_fast.ops import Support, map_tensors, packing, reference, tensors_in
from pvt_fast.ops.packing import packed
from pvt_fast.ops.traceable import constant_while_traced
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase, run

pytestmark = pytest.mark.one_isa

IMAGE = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def tiny(linear: bool = False, **arguments) -> PVT_V2:
    torch.manual_seed(2)
    settings = {
        "img_size": 32,
        "embed_dims": (8, 16),
        "num_heads": (1, 2),
        "mlp_ratios": (2, 2),
        "depths": (1, 1),
        "sr_ratios": (2, 1),
        "num_stages": 2,
        "num_classes": 4,
        "qkv_bias": True,
    }
    return PVT_V2(**settings | arguments, linear=linear).eval()


ONE_STAGE = {
    "embed_dims": (8,),
    "num_heads": (1,),
    "mlp_ratios": (2,),
    "depths": (1,),
    "sr_ratios": (2,),
    "num_stages": 1,
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graph_ops(exported: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).split(".")[0] for node in exported.graph.nodes if node.op == "call_function"}


def compiled(model, **options):
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
@torch.no_grad()
def test_compiles_into_one_graph(linear, target):
    model, image = tiny(linear).to(target.device), IMAGE.to(target.device)
    model.backend = target.backend
    with target.in_use():
        torch.testing.assert_close(compiled(model)(image), model(image))


@pytest.mark.not_interpreted
@torch.no_grad()
def test_one_graph_serves_many_sizes(target):
    model = tiny(**ONE_STAGE).to(target.device)
    model.backend = target.backend
    fast = compiled(model, dynamic=True)
    with target.in_use():
        for batch, height, width in ((2, 32, 40), (3, 50, 64), (4, 37, 35)):
            image = torch.randn(batch, 3, height, width, device=target.device)
            torch.testing.assert_close(fast(image), model(image))


@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.full("reference"))], ids=["", "checkpointing"]
)
def test_compiled_gradients(checkpointing, target):
    model, image = tiny().to(target.device), IMAGE.to(target.device)
    model.backend = target.backend
    model.set_grad_checkpointing(checkpointing)
    collected = []
    with target.in_use():
        for call in (model, compiled(model)):
            leaf = image.clone().requires_grad_()
            model.zero_grad()
            call(leaf).square().sum().backward()
            collected.append([leaf.grad, *(parameter.grad for parameter in model.parameters())])
    for eager, traced in zip(*collected, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.full("reference")
@pytest.mark.not_interpreted
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's own import
@torch.no_grad()
def test_inductor(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what an interrupted run left is not trusted
    model, image = tiny().to(target.device), IMAGE.to(target.device)
    model.backend = target.backend
    with target.in_use():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(image), model(image))


@pytest.mark.not_interpreted
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.full("reference")
@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
@torch.no_grad()
def test_inductor_at_any_size(linear, target, tmp_path, monkeypatch):
    """One graph; on the reference too, whose pooling inductor would fix to the first size."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny(linear, **ONE_STAGE).to(target.device)
    torch.nn.init.normal_(model.head.weight)  # so that a wrong map shows in the logits
    model.backend = target.backend
    fast = torch.compile(model, fullgraph=True, dynamic=True)
    with target.in_use(), torch.compiler.set_stance("default"):
        for shape in ((2, 3, 50, 66), (3, 3, 96, 64)):
            image = torch.randn(shape, device=target.device)
            torch.testing.assert_close(fast(image), model(image))
            torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.not_interpreted
@torch.no_grad()
def test_export(target):
    """The exported graph holds the backend's ops, or for the reference plain torch."""
    model, image = tiny(linear=True).to(target.device), IMAGE.to(target.device)
    model.backend = target.backend
    exported = torch.export.export(model, (image,), strict=False)
    assert ("pvt_fast" in graph_ops(exported)) == (target.backend != "reference")
    with target.in_use():
        torch.testing.assert_close(exported.module()(image), model(image))


@torch.no_grad()
def test_export_with_a_free_batch_size():
    model = tiny()
    exported = torch.export.export(model, (IMAGE,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, *IMAGE.shape[1:])
    torch.testing.assert_close(exported.module()(more), model(more))


@torch.no_grad()
def test_a_change_of_backend_retraces():
    model = tiny()
    fast = compiled(model)
    model.backend = "reference"
    torch.testing.assert_close(fast(IMAGE), model(IMAGE))
    model.backend = "triton" if torch.cuda.is_available() else "cpp"
    with pytest.raises(Exception, match=f"backend .{model.backend}. cannot run: "):
        compiled(model.double())(IMAGE.double())


@pytest.mark.not_interpreted
def test_eager_calls_reach_the_registered_ops_for_gradients_only(monkeypatch, target):
    called, ours = [], library.registered
    monkeypatch.setattr(library, "registered", lambda name: called.append(name) or ours(name))
    model = tiny().to(target.device)
    model.backend = target.backend
    with target.in_use():
        with torch.no_grad():
            model(IMAGE.to(target.device))
        assert not called
        model(IMAGE.to(target.device)).sum().backward()
        assert set(called) == {target.backend}


# -- the registered ops ----------------------------------------------------------------------------------------------

SMALL = [
    PatchEmbedCase(2, (9, 10), 3, 16, kernel=7, stride=4),
    AttentionCase(2, (4, 3), 16, 2, sr_ratio=2, scale_residual=True),
    AttentionCase(1, (3, 4), 16, 2, linear=True, bias=False),
    AttentionCase(1, (3, 2), 16, 1),
    MlpCase(2, (4, 3), 16, 24, relu=True, scale_residual=True),
]


def permuted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the strides of the reversed shape."""
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


STRIDES = pytest.mark.parametrize("strides", [torch.Tensor.contiguous, permuted], ids=["compact", "permuted"])


@pytest.mark.full("reference")
@pytest.mark.not_interpreted
@STRIDES
@pytest.mark.parametrize("small", SMALL, ids=str)
def test_opcheck(small, strides, target):
    """Schema, fake implementation, autograd registration and tracing of each fused op, by torch's own checker."""
    arguments = map_tensors(
        small.make(torch.float32, target.device), lambda t: strides(t.detach().clone()).requires_grad_()
    )
    assert arguments[0].is_contiguous() == (strides is not permuted)
    with target.in_use():
        flat = library.SIGNATURES[small.op].flat(arguments)
        torch.library.opcheck(getattr(torch.ops.pvt_fast, small.op).default, (*flat, target.backend))


@pytest.mark.not_interpreted
@STRIDES
def test_opcheck_of_the_small_ops(strides, target):
    x, weight, bias, matrix, shift = (
        strides(torch.randn(shape, device=target.device)).requires_grad_()
        for shape in ((2, 5, 8), (8,), (8,), (3, 8), (3,))
    )
    with target.in_use():
        torch.library.opcheck(torch.ops.pvt_fast.layer_norm.default, (x, weight, bias, 1e-5, target.backend))
        torch.library.opcheck(torch.ops.pvt_fast.head.default, (x, matrix, shift, target.backend))
        torch.library.opcheck(torch.ops.pvt_fast.head.default, (x, None, None, target.backend))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("small", SMALL, ids=str)
def test_registered_ops_give_what_the_backend_gives(small, target):
    arguments, ops = small.make(torch.float32, target.device), library.RegisteredOps(target.backend)
    with target.in_use():
        assert torch.equal(run(ops, small, arguments), run(target.ops, small, arguments))
        leaves = [map_tensors(arguments, lambda t: t.detach().clone().requires_grad_()) for _ in range(2)]
        output = run(ops, small, leaves[0])
        output.sum().backward()
        tensors = tensors_in(leaves[1])
        own = None if getattr(small, "scale_residual", False) else target.ops.backward.get(small.op)
        if own is None:
            run(reference, small, leaves[1]).sum().backward()
            expected = [tensor.grad for tensor in tensors]
        else:
            expected = own(torch.ones_like(output), [True] * len(tensors), *leaves[1], None)
    for ours, gradient in zip(tensors_in(leaves[0]), expected, strict=True):
        assert torch.equal(ours.grad, gradient)


def test_registered_ops_refuse_what_they_cannot_do():
    attention, mlp = SMALL[1].make(torch.float32), SMALL[4].make(torch.float32)
    ops = library.RegisteredOps("reference")
    with pytest.raises(ValueError, match="attention: spec must be without dropout on 'reference', got"):
        ops.attention(*attention[:3], attention[3]._replace(attn_drop=0.1))
    with pytest.raises(ValueError, match="mlp: spec must be without dropout on 'reference', got"):
        ops.mlp(*mlp[:3], mlp[3]._replace(drop=0.1))
    with pytest.raises(ValueError, match="mlp: x must have H"):
        ops.mlp(mlp[0], (1, 1), *mlp[2:])


# -- a whole model as one op -----------------------------------------------------------------------------------------


def on_cpp(**arguments) -> PVT_V2:
    model = tiny(**arguments)
    torch.nn.init.normal_(model.head.weight)  # so that any change shows in the logits
    model.backend = "cpp"
    return model


def traced_calls(function, *arguments) -> list[torch.fx.Node]:
    """The calls in the one graph that `function(*arguments)` is traced into."""
    graphs = []

    def keep(module: torch.fx.GraphModule, _):
        graphs.append(module.graph)
        return module.forward

    torch.compile(function, fullgraph=True, backend=keep)(*arguments)
    (graph,) = graphs
    return [node for node in graph.nodes if node.op == "call_function"]


def holds_a_whole_model(calls: list[torch.fx.Node]) -> bool:
    return any("run_model" in str(call.target) for call in calls)


class Around(torch.nn.Module):
    def __init__(self, model: PVT_V2) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image) + 1


@torch.no_grad()
def test_a_model_is_one_op_and_alone_its_parameters_are_no_inputs():
    model = on_cpp()
    (alone,) = traced_calls(model, IMAGE)
    assert "run_model" in str(alone.target)
    assert alone.args[1] == []
    called, added = traced_calls(Around(model), IMAGE)
    assert "run_model" in str(called.target)
    assert "add" in str(added.target)
    assert len(called.args[1]) == len(list(model.parameters()))


@pytest.mark.parametrize("around", [lambda model: model, Around], ids=["alone", "among others"])
@torch.no_grad()
def test_changes_of_a_model_that_is_one_op_are_seen(around):
    model, seen = on_cpp(), []
    whole = around(model)
    fast = compiled(whole)

    def update():
        model.block1[0].mlp.fc1.weight.mul_(1.5)

    def replace():
        model.norm2.bias = torch.nn.Parameter(torch.ones(16))

    def replace_head():
        model.head = torch.nn.Linear(16, 4)

    def hook():
        model.block2[0].register_forward_hook(lambda module, arguments, output: seen.append(1) or output * 2)

    def more_classes():
        model.reset_classifier(5)
        torch.nn.init.normal_(model.head.weight)

    for change in (update, replace, replace_head, hook, more_classes):
        before = fast(IMAGE)
        assert torch.equal(fast(IMAGE), before)
        change()
        after = fast(IMAGE)
        assert torch.equal(after, whole(IMAGE)), change.__name__
        assert after.shape != before.shape or not torch.equal(after, before), change.__name__
    assert seen


@torch.no_grad()
def test_copies_of_a_model_that_is_one_op_are_models_of_their_own():
    model = on_cpp()
    fast = compiled(model)
    logits = fast(IMAGE)
    clones = [copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert len({model.graph_number, *(clone.graph_number for clone in clones)}) == 4
    model.head.weight = torch.nn.Parameter(-model.head.weight)  # the shallow copy shares its head
    for clone in clones[1:]:
        assert torch.equal(compiled(clone)(IMAGE), logits)
    assert not torch.equal(fast(IMAGE), logits)


@torch.no_grad()
def test_parameters_put_in_place_within_the_graph_are_used():
    model = on_cpp()
    others = {name: parameter * 1.5 for name, parameter in model.named_parameters()}

    def call(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (image,))

    fast = torch.compile(call, fullgraph=True, backend="aot_eager")
    for parameters in (others, dict(model.named_parameters()), {"head.bias": torch.ones(4)}):
        assert torch.equal(fast(parameters, IMAGE), call(parameters, IMAGE))
    assert not torch.equal(fast(others, IMAGE), model(IMAGE))


def change_epsilons(model: PVT_V2) -> None:
    model.set_norm_eps(block=0.25)


def replace_norm(model: PVT_V2) -> None:
    model.norm2 = torch.nn.LayerNorm(model.norm2.weight.shape[0], eps=0.5)


def hook_block(model: PVT_V2) -> None:
    model.block1[0].register_forward_hook(lambda module, arguments, output: 2 * output)


def put_forward(model: PVT_V2) -> None:
    model.block1[0].mlp.forward = lambda x, height, width: 2 * x


@pytest.mark.parametrize("change", [change_epsilons, replace_norm, hook_block, put_forward])
@torch.no_grad()
def test_other_parameters_copy_a_model_once_for_each_state_of_it(change, monkeypatch):
    model = on_cpp()
    others = {name: parameter * 1.5 for name, parameter in model.named_parameters()}
    copied, deepcopy = [], copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda of, *memo: (copied.append(of), deepcopy(of, *memo))[1])

    def answer() -> torch.Tensor:
        return torch.ops.pvt_fast.run_model(IMAGE, list(others.values()), model.graph_number, 4)

    def check() -> int:
        copied.clear()
        for _ in range(3):
            assert torch.equal(answer(), torch.func.functional_call(model, others, (IMAGE,)))
        return sum(each is model for each in copied)

    assert check() == 1
    before = answer()
    change(model)
    # what a hook or a forward of its own reads may change without a trace: a copy for each call
    assert check() == (3 if change in (hook_block, put_forward) else 1)
    assert not torch.equal(answer(), before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@torch.no_grad()
def test_parameters_changed_within_the_graph_are_used(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = on_cpp()
    clone = copy.deepcopy(model)

    def step(model: PVT_V2, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = model(image)
        model.block1[0].mlp.fc1.weight.mul_(1.5)
        return before, model(image)

    fast = torch.compile(step, fullgraph=True, backend=compiler)
    for ours, expected in zip(fast(model, IMAGE), step(clone, IMAGE), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(model(IMAGE), clone(IMAGE))


@torch.no_grad()
def test_a_forward_that_is_not_the_models_own_is_traced_around_it():
    class Doubled(PVT_V2):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(image)

    model = on_cpp()
    doubled = copy.deepcopy(model)
    doubled.__class__ = Doubled
    called, _ = traced_calls(doubled, IMAGE)
    assert called.args[1]
    assert torch.equal(compiled(doubled)(IMAGE), 2 * model(IMAGE))
    model.forward = lambda image: 3 * PVT_V2.forward(model, image)
    called, _ = traced_calls(model, IMAGE)
    assert called.args[1]

    others = [parameter * 1.5 for parameter in model.parameters()]
    doubled.register_forward_hook(lambda module, arguments, output: 2 * output)
    of_both = [torch.ops.pvt_fast.run_model(IMAGE, others, each.graph_number, 4) for each in (doubled, on_cpp(), model)]
    assert torch.equal(of_both[0], of_both[1])
    assert torch.equal(of_both[0], of_both[2])


def test_gradients_training_features_and_export_are_op_by_op():
    model = on_cpp()
    assert not holds_a_whole_model(traced_calls(model, IMAGE))
    with torch.no_grad():
        assert not holds_a_whole_model(traced_calls(model.forward_features, IMAGE))
        assert not holds_a_whole_model(traced_calls(on_cpp().train(), IMAGE))
        headless = tiny(num_classes=0)
        headless.backend = "cpp"
        assert not holds_a_whole_model(traced_calls(headless, IMAGE))
        exported = torch.export.export(model, (IMAGE,))
    assert "pvt_fast" in graph_ops(exported)
    assert not holds_a_whole_model(list(exported.graph.nodes))


@torch.no_grad()
def test_opcheck_of_a_whole_model():
    model = on_cpp()
    for parameters in ([], list(model.parameters()), [parameter * 2 for parameter in model.parameters()]):
        for image in (IMAGE, permuted(IMAGE)):
            arguments = (image, parameters, model.graph_number, 4)
            torch.library.opcheck(torch.ops.pvt_fast.run_model.default, arguments)


@torch.no_grad()
def test_a_models_number_dies_with_it():
    model = on_cpp()
    torch.ops.pvt_fast.run_model(IMAGE, [parameter * 1.5 for parameter in model.parameters()], model.graph_number, 4)
    number = model.graph_number
    assert whole.models[number] is model
    del model
    gc.collect()
    assert number not in whole.models


def test_the_compiler_knows_the_mark_of_constants():
    def marked() -> None: ...

    assert vars(constant_while_traced(lambda: None)) == vars(torch.compiler.assume_constant_result(marked))


# -- packed weights in a compiled model ------------------------------------------------------------------------------


@pytest.fixture
def builds(add_backend) -> list[str]:
    """A backend that packs its MLP weights (into nothing) and lists each time it does."""
    log: list[str] = []

    def mlp(x, hw, w, spec, residual_scale=None, products=None):
        def build(_):
            log.append("mlp")
            return w.fc1.weight.detach().clone()

        assert torch.equal(packed("fc1", "layout", (w.fc1.weight,), build), w.fc1.weight), "stale"
        return reference.mlp(x, hw, w, spec, residual_scale, products)

    add_backend(replace(reference.BACKEND, support=Support("packing"), mlp=mlp))
    return log


def test_a_compiled_model_packs_once_and_sees_updates(builds):
    model = tiny()
    model.backend = "packing"
    fast = compiled(model)
    with torch.no_grad():
        first = fast(IMAGE)
        assert builds == ["mlp"] * 2
        assert torch.equal(fast(IMAGE), first)
        assert len(builds) == 2
        model.block1[0].mlp.fc1.weight.mul_(1.5)
        assert not torch.equal(fast(IMAGE), first)
        assert len(builds) == 3
    fast(IMAGE).sum().backward()
    assert len(builds) == 3


def test_packed_weights_die_with_their_model(target):
    gc.collect()
    before = len(packing.records)
    model, ops = tiny().to(target.device), library.RegisteredOps(target.backend)
    cases = [(case, case.make(torch.float32, target.device)) for case in SMALL]
    with target.in_use(), torch.no_grad():
        for case, arguments in cases:
            run(ops, case, arguments)
    if target.backend != "reference":
        assert len(packing.records) > before
    del model, ops, cases, arguments
    gc.collect()
    assert len(packing.records) == before


def test_copies_of_a_compiled_models_weights_are_packed_apart(builds):
    model = tiny()
    model.backend = "packing"
    clone = copy.deepcopy(model)
    with torch.no_grad():
        compiled(model)(IMAGE)
        compiled(clone)(IMAGE)
    assert len(builds) == 4


@torch.no_grad()
def test_use_backend_is_followed_when_traced_and_after(builds):
    model = tiny()
    fast = compiled(model)
    with pvt_fast.use_backend("packing"):
        fast(IMAGE)
        assert len(builds) == 2
    fast(IMAGE)
    with pvt_fast.use_backend("packing"):
        model.block1[0].mlp.fc1.weight.mul_(1.5)
        with pvt_fast.use_backend("reference"):
            fast(IMAGE)
        assert len(builds) == 2
        fast(IMAGE)
        assert len(builds) == 3


@torch.no_grad()
def test_use_backend_holds_for_its_thread_alone_when_traced(builds):
    model = tiny()
    fast = compiled(model)
    fast(IMAGE)

    def elsewhere():
        with pvt_fast.use_backend("packing"), torch.no_grad():
            fast(IMAGE)
            entered.set()
            assert leave.wait(60)

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert entered.wait(60)
    assert len(builds) == 2
    model.block1[0].mlp.fc1.weight.mul_(1.5)
    fast(IMAGE)  # on the reference still: nothing is packed anew
    assert len(builds) == 2
    leave.set()
    thread.join()
