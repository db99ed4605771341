"""One model used by several threads: what another thread does at any point of a call, no later call gets wrong.

In turn: at a line of the package's code that a forward runs, the other thread's whole action is done, so that each
line can be tried. And at once, in a process of its own: threads that call, beside one that changes what they call.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import mmap
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pvt_fast
from pvt_fast import PVT_V2
from pvt_fast.backend import cpp

SIZES = {
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "depths": (2, 1),
    "mlp_ratios": (2, 2),
    "sr_ratios": (2, 1),
    "num_stages": 2,
    "num_classes": 10,
    "img_size": 32,
}
PACKAGE = os.path.dirname(pvt_fast.__file__)
# Lines, of the hundred thousand, at which each action is tried; `make fuzz` tries more.
POINTS = int(os.environ.get("PVT_FAST_POINTS", "4"))


def make(seed: int = 0) -> PVT_V2:
    torch.manual_seed(seed)
    model = PVT_V2(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1))
    model.backend = "cpp"
    return model


def image(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(1, 3, 33, 37, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=layout)


def run(model: PVT_V2, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.to(model.patch_embed1.proj.weight.dtype))


# -- in turn -----------------------------------------------------------------------------------------------------------

Action = Callable[[PVT_V2, ExitStack], Any]


def other_layout(model: PVT_V2, _: ExitStack) -> None:
    model.patch_embed1(image(torch.channels_last).to(model.patch_embed1.proj.weight.dtype))


def forward_of_another_layout(model: PVT_V2, _: ExitStack) -> None:
    run(model, image(torch.channels_last))


def other_size(model: PVT_V2, _: ExitStack) -> None:
    run(model, image().repeat(2, 1, 2, 1))


def instruction_set(_: PVT_V2, stack: ExitStack) -> None:
    stack.enter_context(cpp.use_isa(cpp.isas()[-1]))


def instruction_set_and_back(model: PVT_V2, _: ExitStack) -> None:
    with cpp.use_isa(cpp.isas()[-1]):
        run(model, image())


def cast(model: PVT_V2, _: ExitStack) -> None:
    model.bfloat16()


def cast_there_and_back(model: PVT_V2, _: ExitStack) -> None:
    model.bfloat16()
    run(model, image())
    model.float()


def load(model: PVT_V2, _: ExitStack) -> None:
    model.load_state_dict(make(7).state_dict())


def load_by_assignment(model: PVT_V2, _: ExitStack) -> None:
    model.load_state_dict(make(7).state_dict(), assign=True)


def in_place(model: PVT_V2, _: ExitStack) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


def other_data(model: PVT_V2, _: ExitStack) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def another_parameter(model: PVT_V2, _: ExitStack) -> None:
    model.block1[1].mlp.fc2.weight = nn.Parameter(torch.ones_like(model.block1[1].mlp.fc2.weight))


def another_norm(model: PVT_V2, _: ExitStack) -> None:
    model.norm1 = nn.LayerNorm(16, eps=0.3)


def another_block(model: PVT_V2, _: ExitStack) -> None:
    model.block1[0] = make(7).block1[0]


def one_more_block(model: PVT_V2, _: ExitStack) -> None:
    model.block2.append(make(7).block2[0])


def one_block_less(model: PVT_V2, _: ExitStack) -> None:
    model.block1 = model.block1[:1]


def blocks_in_other_order(model: PVT_V2, _: ExitStack) -> None:
    model.block1[0], model.block1[1] = model.block1[1], model.block1[0]


def other_epsilon(model: PVT_V2, _: ExitStack) -> None:
    model.set_norm_eps(block=0.5)


def other_scale(model: PVT_V2, _: ExitStack) -> None:
    model.block1[0].attn.scale = 3.0


def other_heads(model: PVT_V2, _: ExitStack) -> None:
    model.block2[0].attn.num_heads = 4


def other_stride(model: PVT_V2, _: ExitStack) -> None:
    model.patch_embed1.proj.stride = (5, 5)


def another_head(model: PVT_V2, _: ExitStack) -> None:
    model.reset_classifier(4)


def another_class(model: PVT_V2, _: ExitStack) -> None:
    block = model.block1[0]
    block.__class__ = type("Doubling", (type(block),), {"forward": doubled})


def doubled(self: Any, *args: Any) -> Any:
    return 2 * super(type(self), self).forward(*args)


def another_dict(model: PVT_V2, _: ExitStack) -> None:
    model.__dict__["_modules"] = {**model._modules, "norm2": nn.LayerNorm(32, eps=0.3)}


def another_dict_of_a_block(model: PVT_V2, _: ExitStack) -> None:
    attention = model.block1[1].attn
    attention.__dict__["_parameters"] = dict(attention._parameters)
    attention.__dict__["_modules"] = {**attention._modules, "q": nn.Linear(16, 16)}


def a_hook(model: PVT_V2, stack: ExitStack) -> None:
    stack.callback(model.block2[0].mlp.register_forward_hook(tripled).remove)


def tripled(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
    return 3 * output


def a_hook_on_all(_: PVT_V2, stack: ExitStack) -> None:
    stack.callback(nn.modules.module.register_module_forward_hook(tripled_norm).remove)


def tripled_norm(module: nn.Module, _: tuple, output: Tensor) -> Tensor | None:
    return 3 * output if isinstance(module, nn.LayerNorm) else None


def another_backend(model: PVT_V2, _: ExitStack) -> None:
    model.backend = "reference"


def training(model: PVT_V2, _: ExitStack) -> None:
    model.train()
    model.eval()


def what_is_packed_dropped(model: PVT_V2, _: ExitStack) -> None:
    pvt_fast.refresh(model)


def a_copy(model: PVT_V2, _: ExitStack) -> None:
    run(copy.deepcopy(model), image())


ACTIONS: list[Action] = [
    other_layout,
    forward_of_another_layout,
    other_size,
    instruction_set,
    instruction_set_and_back,
    cast,
    cast_there_and_back,
    load,
    load_by_assignment,
    in_place,
    other_data,
    another_parameter,
    another_norm,
    another_block,
    one_more_block,
    one_block_less,
    blocks_in_other_order,
    other_epsilon,
    other_scale,
    other_heads,
    other_stride,
    another_head,
    another_class,
    another_dict,
    another_dict_of_a_block,
    a_hook,
    a_hook_on_all,
    another_backend,
    training,
    what_is_packed_dropped,
    a_copy,
]


def at_line(number: int | None, action: Callable[[], Any], call: Callable[[], Any]) -> int:
    """`call()`, with `action()` before the package's line of that number that it runs; how many lines it ran."""
    seen = itertools.count()
    total = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal total
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            total = next(seen) + 1
            if total - 1 == number:
                sys.settrace(None)
                action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return total


def twice(model: PVT_V2) -> None:
    """The first call records, the second compares and runs what was recorded."""
    run(model, image())
    run(model, image())


@pytest.fixture(scope="module")
def lines() -> int:
    """Lines of the package that `twice` runs."""
    twice(make())  # what is done once in a process
    count = at_line(None, lambda: None, lambda: twice(make()))
    assert count > 500
    return count


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
@torch.no_grad()
def test_what_another_thread_does_at_any_line_is_seen_by_the_next_call(action, lines):
    # other lines for each action, spread over all
    offset = ACTIONS.index(action) * lines // POINTS // len(ACTIONS)
    for number in range(offset, lines, max(lines // POINTS, 1)):
        model = make()
        with ExitStack() as stack:
            try:
                at_line(number, lambda: action(model, stack), lambda: twice(model))  # noqa: B023
            except (RuntimeError, ValueError, TypeError) as error:
                # of sizes or types that changed between two layers: torch would raise it, too
                assert re.search("shape|size|type", str(error)), error  # noqa: PT017
            for layout in (torch.contiguous_format, torch.channels_last):
                for _ in range(2):
                    actual, expected = run(model, image(layout)), run(copy.deepcopy(model), image(layout))
                    assert torch.equal(actual, expected), f"line {number} of {lines}, then {layout}"


# -- at once -----------------------------------------------------------------------------------------------------------

Change = Callable[[], Any]


def head_replaced(model: PVT_V2) -> tuple[Change, Change]:
    heads = model.head, nn.Linear(32, 10)
    return lambda: setattr(model, "head", heads[1]), lambda: setattr(model, "head", heads[0])


def block_replaced(model: PVT_V2) -> tuple[Change, Change]:
    own, other = model.block1[0], make(7).block1[0]
    return lambda: model.block1.__setitem__(0, other), lambda: model.block1.__setitem__(0, own)


def parameter_replaced(model: PVT_V2) -> tuple[Change, Change]:
    norm, own, other = model.norm1, model.norm1.weight, nn.Parameter(torch.ones(16))
    return lambda: setattr(norm, "weight", other), lambda: setattr(norm, "weight", own)


def epsilon(model: PVT_V2) -> tuple[Change, Change]:
    norm = model.block1[1].norm2
    return lambda: setattr(norm, "eps", 0.5), lambda: setattr(norm, "eps", 1e-5)


def data_swapped(model: PVT_V2) -> tuple[Change, Change]:
    """Into memory that faults once it is freed."""
    weight = model.block1[0].mlp.fc1.weight
    values = weight.detach().clone(), weight.detach() * 2
    return lambda: setattr(weight, "data", mapped(values[1])), lambda: setattr(weight, "data", mapped(values[0]))


def mapped(values: Tensor) -> Tensor:
    memory = mmap.mmap(-1, values.numel() * 4)
    return torch.frombuffer(memory, dtype=torch.float32).view(values.shape).copy_(values)


def isa(model: PVT_V2) -> tuple[Change, Change]:
    stack = ExitStack()
    return lambda: stack.enter_context(cpp.use_isa(cpp.isas()[-1])), stack.close


def backend(model: PVT_V2) -> tuple[Change, Change]:
    return lambda: setattr(model, "backend", "reference"), lambda: setattr(model, "backend", "cpp")


def functional(model: PVT_V2) -> tuple[Change, Change]:
    """Parameters of another for the time of a call, which torch puts into the model for all threads."""
    other = {"norm1.weight": torch.ones(16)}
    return lambda: functional_call(model, other, (image(),)), lambda: None


def copied(model: PVT_V2) -> tuple[Change, Change]:
    def there() -> None:
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            run(clone, image())
        torch.save(model.state_dict(), io.BytesIO())

    return there, lambda: None


def hooked(model: PVT_V2) -> tuple[Change, Change]:
    handles: list[Any] = []
    module = model.block2[0].mlp
    return lambda: handles.append(module.register_forward_hook(tripled)), lambda: handles.pop().remove()


def loaded(model: PVT_V2) -> tuple[Change, Change]:
    states = copy.deepcopy(model.state_dict()), make(7).state_dict()
    return lambda: model.load_state_dict(states[1]), lambda: model.load_state_dict(states[0])


def casted(model: PVT_V2) -> tuple[Change, Change]:
    return model.bfloat16, model.float


# Those that are one change for torch, too: an answer is of the state before or after.
ATOMIC = [head_replaced, block_replaced, parameter_replaced, epsilon, data_swapped, isa, backend, functional, copied]
# Those between whose steps torch's own answers are of neither state.
GRADUAL = [hooked, loaded, casted]


def beside(change: Callable[[PVT_V2], tuple[Change, Change]], seconds: float) -> list[str]:
    """What went wrong in three threads that call a model of two layouts of an image, beside one that changes it."""
    model = make()
    there, back = change(model)
    images = [image(), image(torch.channels_last), image()]
    states = [run(copy.deepcopy(model), images[0])]
    there()
    states.append(run(copy.deepcopy(model), images[0].to(model.head.weight.dtype)))
    if change is functional:
        states.append(functional_call(model, {"norm1.weight": torch.ones(16)}, (images[0],)))
    back()
    states.append(run(copy.deepcopy(model), images[0]))
    end, wrong = time.monotonic() + seconds, []

    def call(x: Tensor) -> None:
        torch.set_grad_enabled(False)
        while time.monotonic() < end:
            try:
                y = model(x)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                if change in ATOMIC:
                    wrong.append(f"{type(error).__name__}: {error}"[:200])
                continue
            if change in ATOMIC and not any(near(y, state) for state in states):
                wrong.append("an answer of neither state")

    threads = [threading.Thread(target=call, args=(x,)) for x in images]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        there()
        back()
    for thread in threads:
        thread.join()
    wrong += ["wrong afterwards, too" for x in images if not torch.equal(model(x), copy.deepcopy(model)(x))]
    return wrong


def near(y: Tensor, state: Tensor) -> bool:
    return y.shape == state.shape and torch.allclose(y, state, rtol=1e-3, atol=1e-3)


def report(seconds: float) -> None:
    """Print a line before each change and one after it, with what went wrong."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-6)
    for change in (*ATOMIC, *GRADUAL):
        print(json.dumps([change.__name__, None]), flush=True)
        wrong = beside(change, seconds)
        print(json.dumps([change.__name__, {each: wrong.count(each) for each in set(wrong)}]), flush=True)


@pytest.fixture(scope="module")
def reported() -> Iterator[dict[str, dict[str, int]]]:
    command = [sys.executable, "-W", "ignore", "-c", f"import test_threads; test_threads.report({POINTS / 10})"]
    child = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"exit status {child.returncode} at {lines[-1:]}: {child.stderr[-2000:]}"
    return dict(lines)


@pytest.mark.parametrize("change", [*ATOMIC, *GRADUAL], ids=lambda change: change.__name__)
def test_threads_beside_a_change_answer_for_one_state_or_the_other(change, reported):
    assert reported[change.__name__] == {}
