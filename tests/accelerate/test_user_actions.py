"""What users do to models, in random order: after each action the fused answer is that of the plain forward.

A sequence is a list of actions, tuples of a name and arguments, that says all there is to say: a failure prints the
shortest that it found, to be pasted into `FOUND`. PVT_FAST_SEQUENCES=300 runs as many of each kind of model.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_models import MODELS, blocks, plain
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import pvt_fast
from pvt_fast import PVT_V2

SEQUENCES = int(os.environ.get("PVT_FAST_SEQUENCES", "8"))  # of each kind
KINDS = {
    "own": lambda: MODELS["own"](drop_path_rate=0.3, depths=(2, 1)),
    "own-linear": lambda: MODELS["own"](linear=True, depths=(2, 1)),
    "accelerated": lambda: MODELS["accelerated"](depths=(2, 1)),
    "accelerated-linear": lambda: MODELS["accelerated"](linear=True, depths=(2, 1)),
}

Action = tuple[Any, ...]

# -- sequences that failed once ----------------------------------------------------------------------------------------

FOUND: dict[str, tuple[str, list[Action]]] = {
    "swap_tensors refuses what weak references lead to": ("own", [("write", "swap_tensors", 3)]),
    "so does loading by swapping": ("accelerated", [("load", "swap")]),
    "a weight read in another order": ("own", [("write", "transposed", 0)]),
    "an attention without a norm": ("own", [("leave_out", 0, "norm1")]),
    "an mlp without a norm": ("own-linear", [("leave_out", 1, "norm2")]),
    "another forward_features": ("own", [("override", "forward_features")]),
    "a pickle of blocks accelerated twice": ("accelerated-linear", [("backend", "cpp"), ("copy", "pickle")]),
    "another forward_head": ("own", [("override", "forward_head")]),
}


# -- what modules are wrapped in: classes, so that models can be pickled -----------------------------------------------


class LoRA(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        rows, columns = base.weight.shape[:2]
        self.a = nn.Parameter(torch.randn(2, columns) * 0.3)
        self.b = nn.Parameter(torch.randn(rows, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


class Hook:
    """Counts its calls, and changes what goes through."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        self.calls += 1
        if self.kind == "pre":
            return (1.25 * args[0][0], *args[0][1:])
        if self.kind == "pre kwargs":
            return (1.25 * args[0][0], *args[0][1:]), args[1]
        if self.kind == "kwargs":
            return 1.25 * args[2]
        if self.kind in ("forward", "always"):
            return 1.25 * args[1]
        return None  # a backward hook, or one on all modules


class Method:
    """A method of an instance's own."""

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        self.module, self.name = module, name

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        return 0.5 * getattr(type(self.module), self.name)(self.module, *args, **options)


# -- a model in use ----------------------------------------------------------------------------------------------------

LINEARS = ("attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODULES = (*LINEARS, "norm1", "norm2", "attn", "mlp", "mlp.act", "attn.attn_drop")
SIDES = ((2, 36, 44), (1, 32, 32), (3, 50, 33))


class User:
    """A model, and what its user has put aside."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        torch.manual_seed(0)
        self.model: nn.Module = KINDS[kind]()
        self.teacher: nn.Module | None = None
        self.handles: list[Any] = []
        self.hooks: list[Hook] = []
        self.size, self.layout, self.mode = SIDES[0], "nchw", "no_grad"
        self.compiled: Callable | None = None

    # -- where things are

    def block(self, index: int) -> nn.Module:
        found = blocks(self.model)
        return found[index % len(found)]

    def owner(self, index: int, path: str) -> tuple[nn.Module, str]:
        outer, _, name = path.rpartition(".")
        return self.block(index).get_submodule(outer), name

    def module(self, index: int, path: str) -> nn.Module:
        return getattr(*self.owner(index, path))

    def image(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(self.size[0], 3, *self.size[1:], generator=generator)
        x = x.contiguous(memory_format=torch.channels_last) if self.layout == "nhwc" else x
        return x.to(next(self.model.parameters()).dtype)

    def weights(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.is_floating_point()]

    def restructured(self) -> None:
        """Compiled graphs are not guarded by hooks and forwards of instances: torch's own rule."""
        self.compiled = None

    # -- actions on weights

    def step(self, name: str, flavour: str, times: int) -> None:
        if next(self.model.parameters()).dtype != torch.float32:
            return
        options = {} if flavour == "plain" else {flavour: True}
        optimizer = getattr(torch.optim, name)(self.weights(), lr=0.01, **options)
        was = self.model.training
        self.model.train()
        for _ in range(times):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = self.model(self.image()).square().mean()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        self.model.train(was)

    def write(self, how: str, which: int) -> None:
        every = self.weights()
        parameter = every[which % len(every)]
        values = parameter.detach() * 1.5 + 0.1
        if how == "in place":
            with torch.no_grad():
                parameter.mul_(1.5).add_(0.1)
        elif how == "data":
            parameter.data.copy_(values)
        elif how == "data replaced":
            parameter.data = values
        elif how == "numpy" and parameter.dtype == torch.float32:
            parameter.detach().numpy()[...] = values.numpy()
        elif how == "transposed":
            square = [weight for weight in every if weight.dim() == 2 and weight.shape[0] == weight.shape[1]]
            square[which % len(square)].data = square[which % len(square)].data.T
        elif how == "set_":
            with torch.no_grad():
                parameter.set_(values)
        elif how == "swap_tensors":
            torch.utils.swap_tensors(parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))
        elif how == "replaced":
            for module in self.model.modules():
                for name, own in list(module._parameters.items()):
                    if own is parameter:
                        setattr(module, name, nn.Parameter(values))
        elif how == "foreach":
            with torch.no_grad():
                torch._foreach_mul_(every, 1.1)
        elif how == "vector":
            vector = nn.utils.parameters_to_vector(every).detach()
            nn.utils.vector_to_parameters(vector * 1.1, every)

    def load(self, how: str) -> None:
        state = {name: value * 0.9 for name, value in self.model.state_dict().items()}
        if how == "inference":
            with torch.inference_mode():
                state = {name: value * 1 for name, value in state.items()}
        torch.__future__.set_swap_module_params_on_conversion(how == "swap")
        try:
            self.model.load_state_dict(state, assign=how == "assign")
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    def cast(self, *dtypes: str) -> None:
        for dtype in dtypes:
            self.model.to(getattr(torch, dtype))

    def ema(self, how: str) -> None:
        if self.teacher is None or [p.shape for p in self.teacher.parameters()] != [p.shape for p in self.weights()]:
            self.teacher = copy.deepcopy(self.model)
            return
        ours, theirs = list(self.teacher.parameters()), [weight.to(torch.float32) for weight in self.weights()]
        if any(own.dtype != torch.float32 for own in ours):
            return
        with torch.no_grad():
            if how == "lerp":
                torch._foreach_lerp_(ours, theirs, 0.5)
            else:
                for own, other in zip(ours, theirs, strict=True):
                    own.data.mul_(0.5).add_(other, alpha=0.5)

    def exchange(self) -> None:
        """The student and the teacher change places."""
        if self.teacher is not None:
            self.model, self.teacher = self.teacher, self.model
            self.restructured()

    def freeze(self, index: int | None, needs: bool) -> None:
        (self.model if index is None else self.block(index)).requires_grad_(needs)

    # -- actions on modules

    def replace(self, index: int, path: str) -> None:
        module = self.module(index, path)
        if isinstance(module, nn.Linear) and type(module) is nn.Linear:
            fresh: nn.Module = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, nn.LayerNorm):
            fresh = nn.LayerNorm(module.normalized_shape, eps=1e-3)
        else:
            fresh = copy.deepcopy(module) if not self.hooks else module
        setattr(*self.owner(index, path), fresh.to(next(self.model.parameters()).dtype).train(self.model.training))
        self.restructured()

    def leave_out(self, index: int, path: str) -> None:
        setattr(*self.owner(index, path), nn.Identity())
        self.restructured()

    def wrap(self, index: int, path: str, how: str) -> None:
        module = self.module(index, path)
        if type(module) is not nn.Linear:
            return
        wrapped = {"lora": LoRA, "sequential": nn.Sequential}[how](module)
        setattr(*self.owner(index, path), wrapped.to(next(self.model.parameters()).dtype))
        self.restructured()

    def unwrap(self, index: int, path: str, merge: bool) -> None:
        module = self.module(index, path)
        if isinstance(module, LoRA):
            if merge:
                module.base.weight.data += (module.b @ module.a).detach()
            setattr(*self.owner(index, path), module.base)
        elif isinstance(module, nn.Sequential):
            setattr(*self.owner(index, path), module[0])
        self.restructured()

    def hook(self, index: int, path: str, kind: str) -> None:
        module, hook = self.module(index, path), Hook(kind)
        self.hooks.append(hook)
        self.handles.append(
            {
                "forward": lambda: module.register_forward_hook(hook),
                "always": lambda: module.register_forward_hook(hook, always_call=True),
                "kwargs": lambda: module.register_forward_hook(hook, with_kwargs=True),
                "pre": lambda: module.register_forward_pre_hook(hook),
                "pre kwargs": lambda: module.register_forward_pre_hook(hook, with_kwargs=True),
                "backward": lambda: module.register_full_backward_hook(hook),
                "global": lambda: nn.modules.module.register_module_forward_hook(hook),
            }[kind]()
        )
        self.restructured()

    def unhook(self, all_of_them: bool) -> None:
        while self.handles:
            self.handles.pop().remove()
            self.hooks.pop()
            if not all_of_them:
                break
        self.restructured()

    def setting(self, index: int, path: str, name: str, value: float) -> None:
        module = self.module(index, path)
        if hasattr(module, name):
            setattr(module, name, value)
        if name == "num_heads" and hasattr(module, "head_dim"):  # timm's attention reads both
            module.head_dim = module.dim // value

    def become(self, index: int, path: str) -> None:
        """Another class, or again its own."""
        module = self.module(index, path)
        if type(module) in (nn.Linear, Twice):
            module.__class__ = Twice if type(module) is nn.Linear else nn.Linear
        self.restructured()

    def forward(self, index: int, path: str) -> None:
        """A forward of its own on the instance, or none again."""
        module = self.module(index, path)
        if "forward" in vars(module):
            del module.forward
        else:
            module.forward = Method(module)
        self.restructured()

    def override(self, name: str) -> None:
        """A method of its own on the model, or none again."""
        if name in vars(self.model):
            delattr(self.model, name)
        else:
            setattr(self.model, name, Method(self.model, name))
        self.restructured()

    def parametrize(self, index: int, path: str) -> None:
        module = self.module(index, path)
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
        elif type(module) is nn.Linear and not prune.is_pruned(module):
            parametrize.register_parametrization(module, "weight", Scaled())
        self.restructured()

    def prune(self, index: int, path: str) -> None:
        module = self.module(index, path)
        if type(module) is nn.Linear and not module._forward_pre_hooks:
            prune.l1_unstructured(module, "weight", 0.3)
            prune.remove(module, "weight")
        self.restructured()

    def depth(self, how: str) -> None:
        every = self.model.block1 if isinstance(self.model, PVT_V2) else self.model.stages[0].blocks
        if how == "append" and len(every) < 3 and not self.hooks:
            every.append(copy.deepcopy(every[0]))
        elif how == "drop" and len(every) > 1:
            del every[-1]
        elif how == "swap" and len(every) > 1:
            every[0], every[1] = every[1], every[0]
        self.restructured()

    def head(self, classes: int) -> None:
        self.model.reset_classifier(classes)

    # -- actions on the model

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def grad(self, mode: str) -> None:
        self.mode = mode

    def backend(self, name: str) -> None:
        if isinstance(self.model, PVT_V2):
            self.model.backend = name
        elif name == "auto":
            pvt_fast.restore_(self.model)
        else:
            pvt_fast.accelerate_(self.model, backend=name)
        self.restructured()

    def copy(self, how: str) -> None:
        if any(isinstance(value, Method) for module in self.model.modules() for value in vars(module).values()):
            return  # a copy would call the other's methods
        if how == "deepcopy":
            clone = copy.deepcopy(self.model)
        elif how == "pickle":
            if any(parametrize.is_parametrized(module) for module in self.model.modules()):
                return  # torch refuses
            clone = pickle.loads(pickle.dumps(self.model))
        else:
            file = io.BytesIO()
            if any(parametrize.is_parametrized(module) for module in self.model.modules()):
                return
            torch.save(self.model, file)
            file.seek(0)
            clone = torch.load(file, weights_only=False)
        self.unhook(True)  # of the original
        for module in clone.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()
        self.model = clone
        self.restructured()

    def input(self, size: tuple[int, int, int], layout: str) -> None:
        self.size, self.layout = size, layout

    def compile(self, backend: str) -> None:
        if any(hook.kind == "global" for hook in self.hooks):
            return  # what torch.compile gives back is one module more
        torch._dynamo.reset()
        self.compiled = torch.compile(self.model, backend=backend)

    # -- answers

    def answer(self, call: Callable) -> tuple[Tensor, list[Tensor], list[int]]:
        """What the model says, the gradients where there are any, and how often each hook was called."""
        for hook in self.hooks:
            hook.calls = 0
        x = self.image()
        torch.manual_seed(11)  # of stochastic depth
        grads: list[Tensor] = []
        if self.mode == "grad":
            x.requires_grad_()
            output = call(x)
            grads = list(torch.autograd.grad(output.float().square().mean(), x))
        elif self.mode == "inference":
            with torch.inference_mode():
                output = call(x)
        else:
            with torch.no_grad():
                output = call(x)
        return output.detach(), grads, [hook.calls for hook in self.hooks]

    def check(self) -> None:
        call = self.model if self.compiled is None else self.compiled
        twice = [self.answer(call) for _ in range(2)]  # the second by what the first has recorded
        # of the same module; the call has its gradients outside of the mode that keeps everything plain
        expected = self.answer(lambda x: plain(lambda: self.model(x)))
        tolerance = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1
        for output, grads, calls in twice:
            assert calls == expected[2]
            if output.dtype != torch.float32:  # roundings of the forward change which way gradients go through ReLU
                grads, expected = [], (expected[0], [], expected[2])
            for ours, theirs in zip((output, *grads), (expected[0], *expected[1]), strict=True):
                bound = tolerance * float(theirs.abs().max().float()) + 1e-6
                torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
        if self.teacher is not None:
            dtype = next(self.teacher.parameters()).dtype
            with torch.no_grad():
                x = self.image().to(dtype)
                torch.manual_seed(11)
                ours = self.teacher(x)
                torch.manual_seed(11)
                theirs = plain(lambda: self.teacher(x))
            bound = (1e-3 if dtype == torch.float32 else 0.1) * float(theirs.abs().max().float()) + 1e-6
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)

    def close(self) -> None:
        self.unhook(True)


# -- sequences ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = (("SGD", "fused"), ("AdamW", "fused"), ("AdamW", "foreach"), ("Adam", "plain"), ("RMSprop", "plain"))
WRITES = (
    "in place",
    "data",
    "data replaced",
    "numpy",
    "transposed",
    "set_",
    "swap_tensors",
    "replaced",
    "foreach",
    "vector",
)
HOOKS = ("forward", "always", "kwargs", "pre", "pre kwargs", "backward", "global")
SETTINGS = (
    ("norm1", "eps", 0.1),
    ("norm2", "eps", 0.1),
    ("attn", "scale", 1.5),
    ("attn", "num_heads", 2),
    ("mlp.act", "approximate", "tanh"),
)


def draw(random: random.Random) -> Action:
    """One action."""
    index, linear = random.randrange(4), random.choice(LINEARS)
    actions: list[tuple[int, Callable[[], Action]]] = [
        (4, lambda: ("step", *random.choice(OPTIMIZERS), random.randint(1, 2))),
        (6, lambda: ("write", random.choice(WRITES), random.randrange(100))),
        (2, lambda: ("load", random.choice(("copy", "assign", "inference", "swap")))),
        (1, lambda: ("cast", random.choice(("bfloat16", "float16")), "float32")),
        (1, lambda: ("cast", random.choice(("bfloat16", "float32")))),
        (3, lambda: ("ema", random.choice(("lerp", "data")))),
        (1, lambda: ("exchange",)),
        (1, lambda: ("freeze", random.choice((None, index)), random.random() < 0.5)),
        (3, lambda: ("replace", index, random.choice((*MODULES,)))),
        (1, lambda: ("leave_out", index, random.choice(("norm1", "norm2", "mlp.act")))),
        (3, lambda: ("wrap", index, linear, random.choice(("lora", "sequential")))),
        (3, lambda: ("unwrap", index, linear, random.random() < 0.5)),
        (4, lambda: ("hook", index, random.choice(MODULES), random.choice(HOOKS))),
        (3, lambda: ("unhook", random.random() < 0.5)),
        (2, lambda: ("setting", index, *random.choice(SETTINGS))),
        (1, lambda: ("become", index, linear)),
        (1, lambda: ("forward", index, random.choice(("attn", "mlp", *LINEARS)))),
        (1, lambda: ("override", random.choice(("forward_features", "forward_head")))),
        (2, lambda: ("parametrize", index, linear)),
        (1, lambda: ("prune", index, linear)),
        (1, lambda: ("depth", random.choice(("append", "drop", "swap")))),
        (1, lambda: ("head", random.choice((3, 7)))),
        (2, lambda: ("train", random.random() < 0.4)),
        (2, lambda: ("grad", random.choice(("grad", "no_grad", "inference")))),
        (2, lambda: ("backend", random.choice(("cpp", "cpp", "reference", "auto")))),
        (2, lambda: ("copy", random.choice(("deepcopy", "pickle", "save")))),
        (1, lambda: ("input", random.choice(SIDES), random.choice(("nchw", "nhwc")))),
    ]
    return random.choices([make for _, make in actions], [weight for weight, _ in actions])[0]()


def sequence(seed: int) -> list[Action]:
    dice = random.Random(seed)
    actions = [draw(dice) for _ in range(dice.randint(6, 14))]
    if dice.random() < 0.1:
        actions.insert(dice.randrange(len(actions)), ("compile", dice.choice(("eager", "aot_eager"))))
    return actions


def run(kind: str, actions: list[Action]) -> None:
    """The actions one after the other, checked after each."""
    user = User(kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, on hooks and on conversions
            user.check()
            for name, *arguments in actions:
                getattr(user, name)(*arguments)
                user.check()
    finally:
        user.close()


def fails(kind: str, actions: list[Action]) -> Exception | None:
    try:
        run(kind, actions)
    except Exception as error:
        return error
    return None


def shortest(kind: str, actions: list[Action]) -> tuple[list[Action], Exception]:
    """What still fails after every action that can be left out has been."""
    error = fails(kind, actions)
    assert error is not None
    index = len(actions) - 1
    while index >= 0:
        fewer = actions[:index] + actions[index + 1 :]
        if (other := fails(kind, fewer)) is not None:
            actions, error = fewer, other
        index -= 1
    return actions, error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_any_sequence_of_actions_leaves_the_answers_right(kind, seed):
    actions = sequence(seed)
    if fails(kind, actions) is not None:
        found, error = shortest(kind, actions)
        text = "\n".join(f"        {action!r}," for action in found)
        raise AssertionError(f'FOUND must have this too:\n    "": ("{kind}", [\n{text}\n    ]),') from error


@pytest.mark.parametrize("name", FOUND)
def test_sequences_that_failed_once(name):
    run(*FOUND[name])
