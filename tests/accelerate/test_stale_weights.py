"""Packed weights are never stale: every route by which a weight changes, seen by the very next call.

A route is a function that changes the weights of a model which has been called before. What the model answers after it
is held against the model's plain forward, and to the bit against a copy, which never has anything packed.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import socket
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from fused_models import MODELS, SIZES, assert_rounding, blocks, image, own, plain
from inside import program_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pvt_fast
from pvt_fast import PVT_V2
from pvt_fast.ops import packing

Route = Callable[[nn.Module], None]
ROUTES: dict[str, Route] = {}
# Those after which a copy cannot be made, or is another model (DTensors, views with gradients).
UNCOPIED: set[str] = set()
# Those that leave other modules or layouts behind: not tried on the models that are compiled once.
RESHAPING: set[str] = set()
# Those that leave tensors of which torch takes no gradients.
UNTRAINED: set[str] = set()


def route(*marks: set[str]) -> Callable[[Route], Route]:
    def register(function: Route) -> Route:
        ROUTES[function.__name__] = function
        for mark in marks:
            mark.add(function.__name__)
        return function

    return register


def other_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value * 1.25 for name, value in model.state_dict().items()}


def backward(model: nn.Module) -> None:
    with torch.enable_grad():
        model(image()).square().mean().backward()


# -- writes by hand ----------------------------------------------------------------------------------------------------


@route()
@torch.no_grad()
def in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.25)


@route()
@torch.no_grad()
def copy_(model):
    for parameter in model.parameters():
        parameter.copy_(parameter * 1.25)


@route()
def data_in_place(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


@route()
def data_augmented(model):
    for parameter in model.parameters():
        parameter.data *= 1.25


@route()
def data_replaced(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


@route(RESHAPING)
def data_transposed(model):
    """The same memory, read in another order."""
    for block in blocks(model):
        block.attn.q.weight.data = block.attn.q.weight.data.T


@route(UNTRAINED, RESHAPING)
def data_within_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.25


@route()
def detached(model):
    for parameter in model.parameters():
        parameter.detach().mul_(1.25)


@route()
@torch.no_grad()
def through_a_view(model):
    for parameter in model.parameters():
        parameter.view(-1).mul_(1.25)


@route()
def through_numpy(model):
    for parameter in model.parameters():
        array = parameter.detach().numpy()
        array *= np.float32(1.25)


@route()
def numpy_owns_the_memory(model):
    arrays = [parameter.detach().numpy() * np.float32(1.125) for parameter in model.parameters()]
    for parameter, array in zip(model.parameters(), arrays, strict=True):
        parameter.data = torch.from_numpy(array)
    with torch.no_grad():
        model(image())
    for array in arrays:
        array *= np.float32(1.125)


@route()
def through_the_storage(model):
    for parameter in model.parameters():
        parameter.untyped_storage().copy_((parameter.detach() * 1.25).untyped_storage())


@route()
def by_address(model):
    for parameter in model.parameters():
        values = parameter.detach() * 1.25
        ctypes.memmove(parameter.data_ptr(), values.data_ptr(), values.numel() * values.element_size())


@route()
@torch.no_grad()
def set_(model):
    for parameter in model.parameters():
        parameter.set_(parameter * 1.25)


@route()
def swap_tensors(model):
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.25))


@route()
def parameters_replaced(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() * 1.25))


@route(RESHAPING)
def dicts_of_parameters_replaced(model):
    """As DeepSpeed does."""
    for module in model.modules():
        module._parameters = {n: None if p is None else nn.Parameter(p * 1.25) for n, p in module._parameters.items()}


@route()
def weights_tied(model):
    for block in blocks(model):
        block.norm1.weight = block.norm2.weight
        block.attn.q.weight = block.attn.proj.weight


@route()
@torch.no_grad()
def foreach(model):
    torch._foreach_mul_(list(model.parameters()), 1.25)


@route()
@torch.no_grad()
def fused_kernel(model):
    """What fused optimizers call, without an optimizer: no hook tells of it."""
    parameters = list(model.parameters())
    backward(model)
    torch._fused_sgd_(
        parameters,
        [parameter.grad for parameter in parameters],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    )


@route()
def initialised(model):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)


@route()
def applied(model):
    model._apply(lambda tensor: tensor * 1.25)


@route()
def emptied_and_loaded(model):
    state = other_state(model)
    model.to_empty(device="cpu")
    model.load_state_dict(state)


# -- loading -----------------------------------------------------------------------------------------------------------


@contextmanager
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@route()
def load_state_dict(model):
    model.load_state_dict(other_state(model))


@route()
def load_state_dict_assign(model):
    model.load_state_dict(other_state(model), assign=True)


@route()
def load_state_dict_swapping(model):
    with swapping():
        model.load_state_dict(other_state(model))


@route()
def load_of_inference_tensors(model):
    with torch.inference_mode():
        state = other_state(model)
    model.load_state_dict(state)


@route()
def load_within_inference_mode(model):
    with torch.inference_mode():
        model.load_state_dict(other_state(model))


@route()
def load_one_layer(model):
    head = {name: value for name, value in other_state(model).items() if name.startswith("head")}
    model.load_state_dict(head, strict=False)


@route()
def load_safetensors(model):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.safetensors")
        safetensors.torch.save_file(other_state(model), path)
        safetensors.torch.load_model(model, path)


@route()
def load_mapped(model):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(other_state(model), path)
        model.load_state_dict(torch.load(path, mmap=True), assign=True)


@route()
def vector_to_parameters(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 1.25, model.parameters())


# -- conversions: values are rounded -----------------------------------------------------------------------------------


@route()
def to_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


@route()
def half_float(model):
    in_place(model)
    model(image())
    model.half().float()
    assert_rounded(model, torch.float16)


@route()
def to_and_back_swapping(model):
    with swapping():
        model.to(torch.bfloat16).to(torch.float32)


def assert_rounded(model: nn.Module, dtype: torch.dtype) -> None:
    assert all(torch.equal(parameter, parameter.to(dtype).float()) for parameter in model.parameters())


# -- optimizers --------------------------------------------------------------------------------------------------------

LEARNING = {"SGD": 0.1, "Adam": 0.05, "AdamW": 0.05, "Adagrad": 0.05}
OTHERS = ("Adadelta", "Adafactor", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop")


def stepping(name: str, **options) -> Route:
    def step(model: nn.Module) -> None:
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=LEARNING.get(name, 0.5), **options)
        for _ in range(1 + options.get("fused", False)):  # a second one with state
            model(image())
            backward(model)
            optimizer.step(*([lambda: model(image()).square().mean()] if name == "LBFGS" else []))

    step.__name__ = "_".join((name, *options))
    return step


for _name in LEARNING:
    for _kind in ("foreach", "fused"):
        route()(stepping(_name, **{_kind: True}))
    route()(stepping(_name, foreach=False, maximize=True))
route()(stepping("SGD", fused=True, momentum=0.9, nesterov=True))
for _name in OTHERS:
    route()(stepping(_name))


@route()
def scaled_step(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        scaler.scale(model(image()).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()


@route()
def an_optimizer_of_ones_own(model):
    backward(model)
    for parameter in model.parameters():
        parameter.data.add_(parameter.grad, alpha=-0.1)


@route()
def within_the_backward(model):
    """An optimizer step of each parameter as soon as its gradient is there."""
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1, fused=True) for parameter in model.parameters()}
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: optimizers[parameter].step())
        for parameter in optimizers
    ]
    backward(model)
    for handle in handles:
        handle.remove()


# -- averages of weights -----------------------------------------------------------------------------------------------


def student_of(model: nn.Module) -> nn.Module:
    student = copy.deepcopy(model)
    student.load_state_dict(other_state(model))
    return student


@route()
@torch.no_grad()
def mean_teacher(model):
    for ours, theirs in zip(model.parameters(), student_of(model).parameters(), strict=True):
        ours.mul_(0.2).add_(theirs, alpha=0.8)


@route()
def mean_teacher_by_data(model):
    for ours, theirs in zip(model.parameters(), student_of(model).parameters(), strict=True):
        ours.data.mul_(0.2).add_(theirs.data, alpha=0.8)


@route()
@torch.no_grad()
def averaged_by_foreach(model):
    torch._foreach_lerp_(list(model.parameters()), list(student_of(model).parameters()), 0.8)


def averaging(model: nn.Module, **options) -> None:
    averaged = AveragedModel(model, **options)
    averaged.module = model
    for _ in range(2):
        averaged.update_parameters(student_of(model))


@route()
def averaged_model(model):
    averaging(model)


@route()
def averaged_model_multi(model):
    averaging(model, multi_avg_fn=get_ema_multi_avg_fn(0.3))


@route()
def averaged_by_timm(model):
    averaged = timm.utils.ModelEmaV3(model, decay=0.3)
    averaged.module = model
    averaged.update(student_of(model))


@route()
def averaged_weights_swapped_in(model):
    """Evaluated with the average, trained without: exponential moving averages as projects write them."""
    average = [parameter.detach() * 1.25 for parameter in model.parameters()]
    backup = [parameter.data.clone() for parameter in model.parameters()]
    for values in (average, backup, average):
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data.copy_(value)
        with torch.no_grad():
            model(image())


# -- modules that compute their weights --------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


class LoRA(nn.Module):
    """A low-rank addition to a linear, which can be merged into its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.merged = base, False
        self.a = nn.Parameter(torch.full((2, base.in_features), 0.2))
        self.b = nn.Parameter(torch.full((base.out_features, 2), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T

    def merge(self, sign: float = 1.0) -> None:
        self.base.weight.data += sign * (self.b @ self.a).detach()
        self.merged = sign > 0


def linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [pair for block in blocks(model) for pair in ((block.attn, "q"), (block.mlp, "fc2"))]


@route(UNCOPIED, RESHAPING)
def pruned(model):
    for owner, name in linears(model):
        prune.l1_unstructured(getattr(owner, name), "weight", 0.5)


@route(RESHAPING)
def pruned_for_good(model):
    pruned(model)
    model(image())
    for owner, name in linears(model):
        prune.remove(getattr(owner, name), "weight")


@route(RESHAPING)
def parametrized(model):
    for owner, name in linears(model):
        parametrize.register_parametrization(getattr(owner, name), "weight", Scaled())


@route(RESHAPING)
def a_parametrization_changes(model):
    parametrized(model)
    model(image())
    with torch.no_grad():
        for owner, name in linears(model):
            getattr(owner, name).parametrizations.weight[0].factor.mul_(1.5)


@route(RESHAPING)
def a_parametrization_is_left(model):
    parametrized(model)
    model(image())
    for owner, name in linears(model):
        parametrize.remove_parametrizations(getattr(owner, name), "weight")


@route(RESHAPING)
def weight_norm(model):
    for owner, name in linears(model):
        parametrizations.weight_norm(getattr(owner, name))
    model(image())
    with torch.no_grad():
        for owner, name in linears(model):
            getattr(owner, name).parametrizations.weight.original0.mul_(1.5)


@route(RESHAPING)
def weights_assigned_through_a_parametrization(model):
    parametrizations.orthogonal(blocks(model)[0].attn.q)
    model(image())
    blocks(model)[0].attn.q.weight = torch.linalg.qr(torch.randn(8, 8))[0]


@route(RESHAPING)
def lora(model):
    for owner, name in linears(model):
        setattr(owner, name, LoRA(getattr(owner, name)))


@route(RESHAPING)
def lora_merged_and_taken_off(model):
    lora(model)
    model(image())
    for owner, name in linears(model):
        getattr(owner, name).merge()
        setattr(owner, name, getattr(owner, name).base)


@route(RESHAPING)
def lora_unmerged(model):
    lora(model)
    adapters = [getattr(owner, name) for owner, name in linears(model)]
    for adapter in adapters:
        adapter.merge()
    for (owner, name), adapter in zip(linears(model), adapters, strict=True):
        setattr(owner, name, adapter.base)
    for _ in range(3):
        model(image())
    for adapter in adapters:  # a weight that the model has been called with changes
        adapter.merge(-2.0)


# -- other processes ---------------------------------------------------------------------------------------------------


def in_another_process(function: Callable[[], None]) -> multiprocessing.Process:
    with warnings.catch_warnings():  # of threads, from Python 3.12 on; the child starts none of torch's
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
    return process


def joined(process: multiprocessing.Process) -> None:
    process.join(60)
    assert process.exitcode == 0


@route()
def shared_memory(model):
    model.share_memory()
    for _ in range(2):
        with torch.no_grad():
            model(image())

    def change() -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1.25)

    joined(in_another_process(change))


# When a group's last reference goes, torch joins its threads while it holds the GIL, for which they may wait to drop
# what the last operation kept. So groups live on; and a forked process, which lacks these threads, must not drop one.
_ended: list[Any] = []


@contextmanager
def process_group(port: int, rank: int = 0, size: int = 1) -> Iterator[None]:
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        _ended.append(dist.group.WORLD)
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@route()
def ddp_broadcast(model):
    """The first process has other weights, which DistributedDataParallel gives to all."""
    port = free_port()

    def first() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        with process_group(port, 0, 2):
            nn.parallel.DistributedDataParallel(model)

    process = in_another_process(first)
    with process_group(port, 1, 2):
        nn.parallel.DistributedDataParallel(model)
    joined(process)


@route()
def ddp_training(model):
    with process_group(free_port()):
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, fused=True)
        backward(wrapped)
        optimizer.step()


# -- the table ---------------------------------------------------------------------------------------------------------


def by_ops(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(model, PVT_V2):
            return model.forward_head(model.forward_features(image()))
        return model(image())


def whole(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(image())


def training(model: nn.Module) -> Tensor:
    if not model.training:  # train() itself has weights compared
        model.train()
    with torch.enable_grad():
        return model(image()).detach()


# (what asks a model, how often before the route)
STATES: dict[str, tuple[Callable[[nn.Module], Tensor], int]] = {
    "op-by-op": (by_ops, 2),
    "whole": (whole, 3),
    "training": (training, 2),
}
CASES = [
    (kind, state, change)
    for kind in MODELS
    for state in STATES
    for change in ROUTES
    if (kind, state) != ("accelerated", "whole")  # such models have no whole
    and (state != "training" or change not in UNTRAINED)
]


def assert_seen(ask: Callable[[nn.Module], Tensor], model: nn.Module, before: Tensor, change: str) -> None:
    after = ask(model)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3), f"{change} was not seen, or changes too little"
    assert_rounding(after, plain(lambda: ask(model)))
    if change not in UNCOPIED:
        assert torch.equal(after, ask(copy.deepcopy(model)))


@pytest.mark.parametrize(("kind", "state", "change"), CASES, ids=map("-".join, CASES))
def test_the_very_next_call_sees_changed_weights(kind, state, change):
    model, (ask, times) = MODELS[kind](), STATES[state]
    assert len(list(model.parameters())) > packing.CALLS  # shapes are looked at a part at a time
    for _ in range(times):
        before = ask(model)
    if state == "whole":
        assert program_of(model) is not None
    ROUTES[change](model)
    assert_seen(ask, model, before, change)


# -- compiled ----------------------------------------------------------------------------------------------------------

IGNORED = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own imports


class Compiled:
    """A model compiled once for all routes; `runs` counts calls of its graphs."""

    def __init__(self, kind: str, backend: str) -> None:
        self.model, self.runs = MODELS[kind](depths=(1, 1)), 0
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.backend = torch._dynamo.lookup_backend(backend)
        self.call = torch.compile(self.model, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled = self.backend(graph, inputs)

        def run(*args):
            self.runs += 1
            return compiled(*args)

        return run

    def restored(self) -> nn.Module:
        """The model as it was first, with parameters of its own."""
        for name, value in self.start.items():
            path, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(path), last, nn.Parameter(value.clone()))
        return self.model

    def ask(self, training: bool) -> Tensor:
        before = self.runs
        if self.model.training != training:
            self.model.train(training)
        with torch.set_grad_enabled(training):
            answer = self.call(image()).detach()
        assert self.runs > before, "no graph has run"
        return answer


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[str, str], Compiled]]:
    torch._dynamo.reset()
    made: dict[tuple[str, str], Compiled] = {}
    yield lambda *key: made.setdefault(key, None) or made.__setitem__(key, Compiled(*key)) or made[key]
    torch._dynamo.reset()


COMPILED = [
    (kind, backend, state, change)
    for kind in MODELS
    for backend, state in (("eager", "evaluation"), ("aot_eager", "training"))
    for change in ROUTES
    if change not in RESHAPING and (state == "evaluation" or change not in UNTRAINED)
]


@IGNORED
@pytest.mark.parametrize(("kind", "backend", "state", "change"), COMPILED, ids=map("-".join, COMPILED))
def test_compiled_models_see_changed_weights(kind, backend, state, change, compiled):
    case, trains = compiled(kind, backend), state == "training"
    model = case.restored()
    for _ in range(2):
        before = case.ask(trains)
    ROUTES[change](model)
    after = case.ask(trains)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3), f"{change} was not seen, or changes too little"
    assert_rounding(after, plain(lambda: (training if trains else whole)(model)))


@IGNORED
@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=lambda o: next(iter(o))
)
def test_compiled_steps_of_optimizers_are_seen(options):
    """Capturable ones run on a CPU only so."""
    model = own()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, **options)
    for _ in range(3):
        before = whole(model)
    backward(model)
    torch._dynamo.reset()
    torch.compile(optimizer.step, backend="eager")()
    torch._dynamo.reset()
    assert_seen(whole, model, before, "a compiled step")


def one_element_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Gradients of zeros, but for one."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.block2[0].mlp.fc1.weight.grad[-1, -1] = 1.0


@IGNORED
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_steps_that_change_one_element_are_seen(compiler, training, options):
    model = own()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0, **options)
    one_element_steps(optimizer, model)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend=compiler)
    for _ in range(3):
        for _ in range(3):
            before = whole(model)
        if training:
            model.train()
            before = model(image())
        step()
        if training:
            assert_rounding(model(image()), plain(lambda: model(image())))
            model.eval()
        after = whole(model)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        assert_rounding(after, plain(lambda: whole(model)))
    torch._dynamo.reset()


def test_an_optimizers_own_hooks_see_its_step():
    """They run before torch's hooks for all optimizers; a closure is called within a step, too."""
    model, seen = own(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0, fused=True)
    optimizer.register_step_post_hook(lambda *_: seen.append((whole(model), plain(lambda: whole(model)))))
    one_element_steps(optimizer, model)
    for _ in range(3):
        for _ in range(3):
            before = whole(model)
        optimizer.step()
        after, expected = seen.pop()
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        assert_rounding(after, expected)


# -- FSDP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_fully_sharded_models_see_their_steps(kind):
    """FSDP2 gathers into the same tensors before each forward and frees their storages after it."""
    with process_group(free_port()):
        model = MODELS[kind]()
        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            for _ in range(2):
                before = whole(model)
            model(image()).square().mean().backward()
            optimizer.step()
            after = whole(model)
            assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
            assert_rounding(after, plain(lambda: whole(model)))
            optimizer.zero_grad()


def test_fully_sharded_models_do_not_grow():
    """Their weights get other memory at each forward: what was packed of the old is dropped."""
    with process_group(free_port()):
        model = own()
        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)
        counts = []
        for _ in range(6):
            whole(model)
            counts.append(len(packing.records))
        assert counts[-1] == counts[1], counts


# -- models of inference tensors, which count no changes ---------------------------------------------------------------

UNCOUNTED = [
    "in_place",
    "copy_",
    "data_replaced",
    "detached",
    "through_a_view",
    "set_",
    "foreach",
    "initialised",
    "load_state_dict",
    "load_state_dict_assign",
    "load_within_inference_mode",
    "load_one_layer",
    "vector_to_parameters",
    "to_and_back",
    "mean_teacher",
    "averaged_by_foreach",
]


@pytest.mark.parametrize("change", UNCOUNTED)
@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_models_made_within_inference_mode(kind, change):
    model = MODELS[kind]()
    assert next(model.parameters()).is_inference()
    for _ in range(3):
        before = whole(model)
    ROUTES[change](model)
    assert_seen(whole, model, before, change)


# -- one element -------------------------------------------------------------------------------------------------------


def wide(kind: str) -> nn.Module:
    """With a weight of more than one chunk for each call that the comparison takes."""
    sizes = {**SIZES, "embed_dims": (8, 192), "depths": (1, 1), "mlp_ratios": (1, 4)}
    if kind == "own":
        model = PVT_V2(**sizes, num_stages=2, img_size=32).eval()
        model.backend = "cpp"
    else:
        model = timm.models.pvt_v2.PyramidVisionTransformerV2(**sizes).eval()
        pvt_fast.accelerate_(model, backend="cpp", strict=True)
    return model


def change_one(model: nn.Module, at: float) -> None:
    """One element, at a fraction of the weight's length, so that no one is told."""
    weight = blocks(model)[1].mlp.fc1.weight
    flat = weight.detach().view(-1).numpy()
    flat[int(at * (flat.size - 1))] += 100.0


def change_one_by_data(model: nn.Module, at: float) -> None:
    flat = blocks(model)[1].mlp.fc1.weight.data.view(-1)
    flat[int(at * (flat.numel() - 1))] += 100.0


ONE = [change_one, change_one_by_data]


@pytest.mark.parametrize("at", [0.0, 0.37, 0.77, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_one_changed_element_is_seen_within_as_many_calls_as_promised(kind, at):
    model = wide(kind)
    for _ in range(3 + int(5 * at)):
        before = whole(model)
    change_one(model, at)
    answers = [whole(model) for _ in range(packing.CALLS)]
    assert not torch.allclose(answers[-1], before, rtol=1e-3, atol=1e-3)
    assert_rounding(answers[-1], plain(lambda: whole(model)))
    seen = [not torch.equal(answer, before) for answer in answers]
    assert seen == sorted(seen)  # once seen, seen


def test_a_recording_is_not_of_older_weights_than_it_compares_with():
    """A call op by op packs, one element changes unseen, and the next call records all ops and the values of now."""
    model = wide("own")
    before = by_ops(model)
    change_one(model, 0.6)
    answers = [whole(model) for _ in range(packing.CALLS)]
    assert not torch.allclose(answers[-1], before, rtol=1e-3, atol=1e-3)
    assert_rounding(answers[-1], plain(lambda: whole(model)))


@torch.no_grad()
def one_in_place(model: nn.Module) -> None:
    blocks(model)[1].mlp.fc1.weight[400, 100].add_(100.0)


@torch.inference_mode()
def one_within_inference_mode(model: nn.Module) -> None:
    blocks(model)[1].mlp.fc1.weight[400, 100].add_(100.0)


def one_of_a_detached_tensor(model: nn.Module) -> None:
    blocks(model)[1].mlp.fc1.weight.detach()[400, 100].add_(100.0)


def one_and_a_new_parameter(model: nn.Module) -> None:
    """Which is over the same memory, and has seen no change."""
    one_in_place(model)
    layer = blocks(model)[1].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


def one_and_swapped_tensors(model: nn.Module) -> None:
    one_in_place(model)
    weight = blocks(model)[1].mlp.fc1.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.data))


def one_of_a_twin(model: nn.Module) -> None:
    """Another model over the same memory, which is called last, has counted as many changes as this one will have."""
    clone = copy.deepcopy(model)
    for own_parameter, parameter in zip(model.parameters(), clone.parameters(), strict=True):
        parameter.data = own_parameter.data
    with torch.no_grad():
        blocks(clone)[1].mlp.fc1.weight.mul_(1.0)
    whole(clone)
    one_in_place(model)


def one_loaded(model: nn.Module) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (name,) = (n for n, p in model.named_parameters() if p is blocks(model)[1].mlp.fc1.weight)
    state[name][400, 100] += 100.0
    model.load_state_dict(state)


RECORDED_ONE = [
    one_in_place,
    one_within_inference_mode,
    one_of_a_detached_tensor,
    one_and_a_new_parameter,
    one_and_swapped_tensors,
    one_of_a_twin,
    one_loaded,
]


@pytest.mark.parametrize("change", RECORDED_ONE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("state", ["op-by-op", "whole", "training"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_recorded_element_is_seen_at_once(kind, state, change):
    model, (ask, times) = copy.deepcopy(wide(kind)), STATES[state]
    assert not any(parameter._version for parameter in model.parameters())
    for _ in range(times):
        before = ask(model)
    change(model)
    assert_seen(ask, model, before, change.__name__)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_parameters_given_for_one_call_are_seen_whatever_they_count(kind):
    model = wide(kind)
    for _ in range(3):
        given = {name: parameter.data for name, parameter in model.named_parameters()}
        before = torch.func.functional_call(model, given, (image(),))
    one_in_place(model)
    given = {name: parameter.data for name, parameter in model.named_parameters()}
    after = torch.func.functional_call(model, given, (image(),))
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert_rounding(after, plain(lambda: whole(model)))


@pytest.mark.parametrize("change", ONE)
@pytest.mark.parametrize("kind", MODELS)
def test_refresh_shows_it_at_once(kind, change):
    model = wide(kind)
    for _ in range(3):
        before = whole(model)
    change(model, 0.6)
    pvt_fast.refresh(model)
    assert_seen(whole, model, before, "refresh")


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_change_of_mode_shows_it_at_once(kind, mode):
    model = wide(kind)
    for _ in range(3):
        before = whole(model)
    change_one(model, 0.6)
    model.train(mode).eval()
    assert_seen(whole, model, before, "train")


def test_refresh_of_a_part_refreshes_the_part():
    model, other = wide("own"), wide("own")
    for _ in range(3):
        before = whole(model)
        whole(other)
    change_one(model, 0.6)
    pvt_fast.refresh(blocks(model)[1])
    assert_seen(whole, model, before, "refresh")


# -- checked_weights ---------------------------------------------------------------------------------------------------

UNANNOUNCED = ["data_in_place", "through_numpy", "through_the_storage", "by_address", "mean_teacher_by_data"]
ANNOUNCED = [
    "in_place",
    "copy_",
    "detached",
    "set_",
    "data_replaced",
    "parameters_replaced",
    "foreach",
    "SGD_foreach",
    "AdamW_fused",
    "load_state_dict",
    "load_state_dict_assign",
    "vector_to_parameters",
    "half_float",
    "averaged_model",
    "weight_norm",
]
ASKED = [(kind, state) for kind in MODELS for state in ("op-by-op", "whole", "training")]


@pytest.mark.parametrize("change", UNANNOUNCED)
@pytest.mark.parametrize(("kind", "state"), ASKED, ids=map("-".join, ASKED))
def test_checked_weights_raise_at_the_first_call_after_an_unannounced_change(kind, state, change):
    model, (ask, times) = MODELS[kind](), STATES[state]
    with pvt_fast.checked_weights():
        for _ in range(times):
            ask(model)
        with torch.no_grad():
            ROUTES[change](model)
        with pytest.raises(pvt_fast.UnannouncedChange, match="weight of shape"):
            ask(model)
    ask(model)


@pytest.mark.parametrize("change", ONE)
@pytest.mark.parametrize("kind", MODELS)
def test_checked_weights_raise_for_one_element(kind, change):
    model = wide(kind)
    for _ in range(3):
        whole(model)
    change(model, 0.6)
    with pvt_fast.checked_weights(), pytest.raises(pvt_fast.UnannouncedChange):
        whole(model)


def evaluation(model: nn.Module) -> None:
    model.eval()


def evaluation_of_another(model: nn.Module) -> None:
    copy.deepcopy(model).eval()


def refreshing_another(model: nn.Module) -> None:
    pvt_fast.refresh(copy.deepcopy(model))


def a_step_of_another(model: nn.Module) -> None:
    """As a student's, before the teacher takes its average behind torch's back."""
    student = copy.deepcopy(model).requires_grad_()
    with torch.enable_grad():
        student(image()).sum().backward()
    torch.optim.AdamW(student.parameters(), fused=True).step()


@pytest.mark.parametrize("between", [evaluation, evaluation_of_another, refreshing_another, a_step_of_another])
@pytest.mark.parametrize("kind", MODELS)
def test_checked_weights_raise_whatever_lies_between(kind, between):
    model = MODELS[kind]().requires_grad_(False)
    with pvt_fast.checked_weights():
        for _ in range(3):
            whole(model)
        ROUTES["data_in_place"](model)
        between(model)
        with pytest.raises(pvt_fast.UnannouncedChange):
            whole(model)


def test_an_announced_step_does_not_raise_in_evaluation():
    """Weights that train while the model is in evaluation mode, by a fused optimizer."""
    model = own()
    with pvt_fast.checked_weights():
        for _ in range(3):
            before = whole(model)
            backward(model)
            torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
            model.zero_grad()
            assert_seen(whole, model, before, "a fused step")


@pytest.mark.parametrize("change", ANNOUNCED)
@pytest.mark.parametrize(("kind", "state"), ASKED, ids=map("-".join, ASKED))
def test_checked_weights_do_not_raise_after_announced_changes(kind, state, change):
    model, (ask, times) = MODELS[kind](), STATES[state]
    with pvt_fast.checked_weights():
        for _ in range(times):
            before = ask(model)
        ROUTES[change](model)
        assert_seen(ask, model, before, change)


# -- what is kept, and how long ----------------------------------------------------------------------------------------


def kept(model: nn.Module) -> int:
    """How many records there are of the model's parameters."""
    return len(kinds_kept(model))


def kinds_kept(model: nn.Module) -> list[str]:
    """What each of them is packed for."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    return [place[0] for place, record in packing.records.items() if not own.isdisjoint(record.addresses)]


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_packed_for_longer_than_a_step_of_training(kind, options):
    model = MODELS[kind]().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    for _ in range(3):
        model(image()).square().mean().backward()
        assert kept(model) > 0
        optimizer.step()
        assert kept(model) == 0


def test_no_program_outlives_the_first_step():
    """An evaluation between epochs leaves nothing behind."""
    model = own()
    whole(model)
    assert program_of(model) is not None
    form = weakref.ref(program_of(model))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(image()).square().mean().backward()
    optimizer.step()
    assert form() is None


def test_frozen_weights_stay_packed():
    model = own()
    for module in model.children():
        module.requires_grad_(module is model.head)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.01)
    model(image()).square().mean().backward()
    count = kept(model)
    optimizer.step()
    assert kept(model) == count - 1  # the head's for its forward: for its backward nothing was kept


def test_the_backward_keeps_what_is_packed_of_frozen_weights_only():
    model = own()
    model(image().requires_grad_()).square().mean().backward()
    assert not any("gradients" in kind for kind in kinds_kept(model))
    model.requires_grad_(False)
    for _ in range(2):  # a record for each op, and no other for a second pass
        model(image().requires_grad_()).square().mean().backward()
        kinds = kinds_kept(model)
        assert sum("gradients" in kind for kind in kinds) == sum("gradients" not in kind for kind in kinds) > 0


@pytest.mark.parametrize("kind", MODELS)
def test_records_die_with_their_model(kind):
    gc.collect()
    before = len(packing.records)
    model = MODELS[kind]()
    for ask in (whole, training):
        ask(model)
    assert kept(model) > 0
    gc.disable()
    try:
        del model
        assert len(packing.records) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", MODELS)
def test_old_weights_are_not_kept(kind):
    """Of weights that were replaced nothing is left after the next call."""
    model = MODELS[kind]()
    for _ in range(3):
        whole(model)
    storage = torch.multiprocessing.reductions.StorageWeakRef(model.head.weight.untyped_storage())
    parameters_replaced(model)
    whole(model)
    gc.collect()
    assert storage.expired()
