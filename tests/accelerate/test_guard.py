"""Fused ops stand in only where they do what the modules do: each fact is honoured, and C++ and Python agree."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fused_models import MODELS, accelerated, assert_rounding, blocks, image, own, plain
from inside import program_of, stand_in_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pvt_fast
from pvt_fast import PVT_V2
from pvt_fast.accelerate import guard as guarding
from pvt_fast.accelerate.guard import Guard, ambient, settings_of
from pvt_fast.layers import DWConvMLP, SpatialReductionAttention

# changes one thing at the block; returns how to undo it, if it can be undone
Change = Callable[[nn.Module, nn.Module], Callable[[], None] | None]
CHANGED: dict[str, Change] = {}
DISTURBED: dict[str, Change] = {}
NEUTRAL: dict[str, Change] = {}


def fact(table: dict[str, Change]) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        table[change.__name__] = change
        return change

    return register


def whole(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(image())


def doubled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 2 * output


# -- other modules -----------------------------------------------------------------------------------------------------


@fact(CHANGED)
def module_replaced(model, block):
    before, block.attn.q = block.attn.q, nn.Linear(8, 8)
    return lambda: setattr(block.attn, "q", before)


@fact(CHANGED)
def deep_module_replaced(model, block):
    block.mlp.dwconv.dwconv = nn.Conv2d(32, 32, 3, padding=1, groups=32)


@fact(CHANGED)
def half_replaced(model, block):
    block.mlp = copy.deepcopy(block.mlp)
    with torch.no_grad():
        block.mlp.fc2.weight.mul_(2)


@fact(CHANGED)
def module_wrapped(model, block):
    block.attn.proj = nn.Sequential(block.attn.proj, nn.Tanh())


@fact(CHANGED)
def stochastic_depth_replaced(model, block):
    block.drop_path = nn.Tanh()


@fact(CHANGED)
def norm_left_out(model, block):
    block.norm1 = nn.Identity()


@fact(CHANGED)
def second_norm_left_out(model, block):
    block.norm2 = nn.Identity()


@fact(CHANGED)
def module_put_where_there_was_none(model, block):
    block.mlp.relu = nn.ReLU()


@fact(CHANGED)
def reduction_taken_away(model, block):
    block.attn.sr = None


@fact(CHANGED)
def dict_of_modules_replaced(model, block):
    block.attn._modules = {**block.attn._modules, "q": nn.Linear(8, 8)}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledAttention(SpatialReductionAttention):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return 2 * super().forward(x, height, width)


@fact(CHANGED)
def class_swapped(model, block):
    block.mlp.fc1.__class__ = Doubled
    return lambda: setattr(block.mlp.fc1, "__class__", nn.Linear)


@fact(CHANGED)
def class_of_a_half_swapped(model, block):
    block.attn.__class__ = DoubledAttention


def patching(kind: type[nn.Module]) -> Change:
    def change(model: nn.Module, block: nn.Module) -> Callable[[], None]:
        own_forward = kind.forward

        def patched(self, x, *args):
            return 1.5 * own_forward(self, x, *args)

        kind.forward = patched
        return lambda: setattr(kind, "forward", own_forward)

    change.__name__ = f"forward_of_{kind.__name__}_patched"
    return change


for _kind in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU, nn.Identity, SpatialReductionAttention, DWConvMLP):
    fact(CHANGED)(patching(_kind))


class Standardised(nn.Conv2d):
    """Weight standardisation, as it is commonly written."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Looked(nn.Linear):
    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        return 2 * found if name == "weight" else found


class Unreduced(SpatialReductionAttention):
    def _reduce(self, x: Tensor, height: int, width: int) -> Tensor:
        return x


def becoming(path: str, kind: type[nn.Module]) -> Change:
    def change(model: nn.Module, block: nn.Module) -> Callable[[], None]:
        module = block.get_submodule(path)
        before = type(module)
        module.__class__ = kind
        return lambda: setattr(module, "__class__", before)

    change.__name__ = f"{path}_becomes_{kind.__name__}"
    return change


for _path, _kind in (
    ("attn.sr", Standardised),
    ("attn.proj", Called),
    ("mlp.fc2", Looked),
    ("attn", Unreduced),
):
    fact(CHANGED)(becoming(_path, _kind))


def patching_method(kind: type[nn.Module], name: str, patched: Callable) -> Change:
    def change(model: nn.Module, block: nn.Module) -> Callable[[], None]:
        inherited, before = name not in vars(kind), getattr(kind, name)
        setattr(kind, name, patched(before))
        return lambda: delattr(kind, name) if inherited else setattr(kind, name, before)

    change.__name__ = f"{name}_of_{kind.__name__}_patched"
    return change


fact(CHANGED)(
    patching_method(nn.Conv2d, "_conv_forward", lambda before: lambda self, x, w, b: before(self, x, 0.5 * w, b))
)
fact(CHANGED)(
    patching_method(
        SpatialReductionAttention, "_reduce", lambda before: lambda self, *args: torch.tanh(before(self, *args))
    )
)


# -- settings ----------------------------------------------------------------------------------------------------------

# setting -> (path from the block, another value); a block is told by index where it is not the second
SETTINGS = {
    "eps": ("norm2", 0.5),
    "stride": ("attn.sr", (1, 1)),
    "padding": ("attn.sr", (1, 1)),
    "dilation": ("mlp.dwconv.dwconv", (2, 2)),
    "padding_mode": ("mlp.dwconv.dwconv", "circular"),
    "approximate": ("mlp.act", "tanh"),
    "num_heads": ("attn", 2),
    "scale": ("attn", 3.0),
    "normalized_shape": ("norm1", [8]),
    "groups": ("mlp.dwconv.dwconv", 16),
    "output_size": ("attn.pool", 5),
}
# of which the plain forward knows nothing, or takes for the same; or where the difference is as small as rounding
WITHOUT_EFFECT = ("normalized_shape", "output_size", "approximate")


def test_settings_are_the_plain_attributes_of_modules():
    block = blocks(own(linear=True))[1]
    for name, (path, _) in SETTINGS.items():
        assert name in settings_of(block.get_submodule(path))
    assert not {"training", "p", "drop_prob"} & settings_of(block.attn.attn_drop).keys()


def setting(name: str) -> Change:
    path, value = SETTINGS[name]

    def change(model: nn.Module, block: nn.Module) -> Callable[[], None]:
        module = block.get_submodule(path)
        before = getattr(module, name)
        setattr(module, name, value)
        if name == "dilation":
            module.padding = (2, 2)
            return lambda: (setattr(module, name, before), setattr(module, "padding", (1, 1)))
        return lambda: setattr(module, name, before)

    change.__name__ = f"{name}_changed"
    return change


for _name in SETTINGS:
    if _name not in (*WITHOUT_EFFECT, "groups"):
        fact(CHANGED)(setting(_name))


@fact(NEUTRAL)
def setting_as_it_was(model, block):
    block.norm1.eps = float(str(block.norm1.eps))


# -- hooks -------------------------------------------------------------------------------------------------------------


@fact(DISTURBED)
def forward_hook(model, block):
    return block.attn.q.register_forward_hook(doubled).remove


@fact(DISTURBED)
def forward_hook_with_kwargs(model, block):
    return block.mlp.register_forward_hook(lambda module, args, kwargs, output: 2 * output, with_kwargs=True).remove


@fact(DISTURBED)
def forward_hook_always_called(model, block):
    return block.mlp.fc1.register_forward_hook(doubled, always_call=True).remove


@fact(DISTURBED)
def forward_hook_prepended(model, block):
    return block.norm1.register_forward_hook(doubled, prepend=True).remove


@fact(DISTURBED)
def forward_pre_hook(model, block):
    return block.mlp.fc2.register_forward_pre_hook(lambda module, args: (2 * args[0],)).remove


@fact(DISTURBED)
def forward_pre_hook_with_kwargs(model, block):
    def hook(module, args, kwargs):
        return (2 * args[0], *args[1:]), kwargs

    return block.attn.register_forward_pre_hook(hook, with_kwargs=True).remove


@fact(DISTURBED)
def hook_on_an_identity(model, block):
    return block.drop_path.register_forward_hook(doubled).remove


@fact(DISTURBED)
def hook_on_a_dropout(model, block):
    return block.attn.attn_drop.register_forward_hook(doubled).remove


@fact(DISTURBED)
def dict_of_hooks_replaced(model, block):
    before, block.norm2._forward_hooks = block.norm2._forward_hooks, OrderedDict({0: doubled})
    return lambda: setattr(block.norm2, "_forward_hooks", before)


@fact(DISTURBED)
def forward_of_an_instance(model, block):
    linear = block.attn.kv
    linear.forward = lambda x: 2 * F.linear(x, linear.weight, linear.bias)
    return lambda: delattr(linear, "forward")


@fact(DISTURBED)
def forward_of_an_instance_bound(model, block):
    block.mlp.forward = MethodType(lambda self, x, *args: 2 * type(self).forward(self, x, *args), block.mlp)
    return lambda: delattr(block.mlp, "forward")


@fact(DISTURBED)
def method_of_an_instance(model, block):
    conv = block.mlp.dwconv.dwconv
    conv._conv_forward = lambda x, w, b: nn.Conv2d._conv_forward(conv, x, 2 * w, b)
    return lambda: delattr(conv, "_conv_forward")


@fact(DISTURBED)
def reduction_of_an_instance(model, block):
    block.attn._reduce = lambda x, height, width: x
    return lambda: delattr(block.attn, "_reduce")


@fact(DISTURBED)
def attribute_that_hides_a_parameter(model, block):
    vars(block.attn.kv)["weight"] = 2 * block.attn.kv.weight.detach()
    return lambda: vars(block.attn.kv).pop("weight")


@fact(DISTURBED)
def hook_on_all_modules(model, block):
    def hook(module, args, output):
        return 2 * output if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(hook).remove


@fact(DISTURBED)
def pre_hook_on_all_modules(model, block):
    def hook(module, args):
        return (2 * args[0],) if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_pre_hook(hook).remove


@fact(NEUTRAL)
def hook_removed_again(model, block):
    block.attn.register_forward_hook(doubled).remove()


@fact(NEUTRAL)
def dict_of_hooks_replaced_by_an_empty_one(model, block):
    block.attn.q._forward_hooks = OrderedDict()


@fact(NEUTRAL)
def attributes_of_a_users(model, block):
    block.attn.q.tag = "frozen"
    block.mlp._seen = [1, 2]
    block.norm1.log = print


@fact(NEUTRAL)
def same_module_set_again(model, block):
    block.attn.q = block.attn.q


@fact(NEUTRAL)
def hook_on_the_block(model, block):
    """It is the block itself that is called."""
    block.register_forward_hook(lambda module, args, output: output)


# -- the table ---------------------------------------------------------------------------------------------------------


def agree(guard: Guard, owner: nn.Module) -> bool:
    """What `intact` says, once it is sure that the Python specification says so too."""
    expected = guard.changed(owner) is None and guard.disturbed(owner) is None
    assert guard.intact(owner) == expected
    assert guard.intact(owner) == expected
    return expected


def with_program() -> tuple[PVT_V2, nn.Module, Tensor]:
    """A model with its program, its second block, and its answer."""
    model = own()
    for _ in range(3):
        before = whole(model)
    assert program_of(model) is not None
    block = blocks(model)[1]
    guard = stand_in_of(block).fused.guard
    assert agree(guard, block)
    assert guard.snapshot is not None
    return model, block, before


@pytest.mark.parametrize("name", [*CHANGED, *DISTURBED])
def test_what_is_done_to_modules_is_honoured(name):
    model, block, before = with_program()
    program, guard = program_of(model), stand_in_of(block).fused.guard
    undo = {**CHANGED, **DISTURBED}[name](model, block)
    try:
        assert not agree(guard, block)
        assert not program.holds(model, image(), program.kind[0])
        assert (guard.changed(block) is not None) == (name in CHANGED)
        after = whole(model)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        for _ in range(3):
            assert_rounding(after, plain(lambda: whole(model)))
            after = whole(model)
    finally:
        if undo:
            undo()
    if undo:
        assert agree(guard, block)
        for _ in range(3):
            assert_rounding(whole(model), before)


@pytest.mark.parametrize("name", ["module_replaced", "class_swapped", "stride_changed", "forward_hook"])
def test_what_is_undone_is_fused_again(name):
    """After an adapter was taken off, say, a model is as fast as it was, its whole forward one call."""
    model, block, before = with_program()
    undo = {**CHANGED, **DISTURBED}[name](model, block)
    whole(model)
    undo()
    for _ in range(2):
        assert torch.equal(whole(model), before)
    assert program_of(model) is not None
    assert stand_in_of(block).fused.whole


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_nothing_keeps_modules_fused(name):
    model, block, before = with_program()
    guard = stand_in_of(block).fused.guard
    NEUTRAL[name](model, block)
    assert agree(guard, block)
    for _ in range(3):
        assert torch.equal(whole(model), before)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_settings_that_change_nothing_to_be_seen(name):
    path, value = SETTINGS[name]
    model = own(linear=True)
    for _ in range(3):
        whole(model)
    block = blocks(model)[1]
    guard = stand_in_of(block).fused.guard
    setattr(block.get_submodule(path), name, value)
    agree(guard, block)
    assert_rounding(whole(model), plain(lambda: whole(model)))
    fused = stand_in_of(block).current(block)
    assert fused is None or name != "approximate" or fused.names == ("attention",)


def test_groups_that_do_not_fit_meet_torchs_own_error():
    model, block, _ = with_program()
    setting("groups")(model, block)
    assert not agree(stand_in_of(block).fused.guard, block)
    with pytest.raises(RuntimeError, match="groups"):
        whole(model)


def add_a_child(block: nn.Module) -> None:
    block.mlp.extra = nn.Identity()


def add_a_child_below(block: nn.Module) -> None:
    block.mlp.dwconv.extra = nn.Linear(2, 2)


def take_a_child_away(block: nn.Module) -> None:
    del block.attn.attn_drop
    block.attn.attn_drop = lambda x: x  # a function instead of a module


def test_what_came_and_went_while_it_was_read_is_read_again():
    model, block, before = with_program()
    stand_in, norm = stand_in_of(block), block.norm1
    reader = stand_in.reader

    def read(owner, settings):
        owner.norm1 = copy.deepcopy(norm)
        try:
            return reader(owner, settings)
        finally:
            owner.norm1 = norm

    stand_in.reader, stand_in._read_from = read, None
    assert stand_in.current(block).guard.changed(block) == "its norm1 was replaced"
    stand_in.reader = reader
    for _ in range(3):
        assert torch.equal(whole(model), before)
    assert stand_in.current(block).guard.changed(block) is None
    assert program_of(model) is not None


def test_a_norm_over_other_dimensions_is_refused_as_torch_does():
    model, block, _ = with_program()
    block.norm1.normalized_shape = (4, *block.norm1.normalized_shape)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="Expected weight to be of same shape as normalized_shape"):
            whole(model)


@pytest.mark.parametrize("change", [add_a_child, add_a_child_below, take_a_child_away])
def test_other_children_are_a_change(change):
    model, block, before = with_program()
    guard = stand_in_of(block).fused.guard
    change(block)
    assert not agree(guard, block)
    assert_rounding(whole(model), before)
    assert_rounding(whole(model), plain(lambda: whole(model)))


# -- what a model was called with before it was changed ---------------------------------------------------------------

# (first change, after which the model is called, second change), each of a block of our linear model.
TWICE: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {}


def twice(first: Callable[[nn.Module], Any]) -> Callable:
    """Decorates the second change."""

    def register(second: Callable[[nn.Module], Any]) -> Callable:
        TWICE[second.__name__] = (first, second)
        return second

    return register


@twice(lambda block: setattr(block.mlp, "relu", None))
def a_module_put_back_where_none_was(block):
    block.mlp.relu = nn.ReLU()


@twice(lambda block: setattr(block.attn, "tag", 1))
def a_forward_for_another_attribute(block):
    del block.attn.tag
    block.attn.forward = lambda x, height, width: 0.5 * x


@twice(lambda block: setattr(block.mlp.fc1, "tag", 1))
def a_weight_for_another_attribute(block):
    del block.mlp.fc1.tag
    vars(block.mlp.fc1)["weight"] = 2 * block.mlp.fc1._parameters["weight"]


def by_a_function(path: str, name: str, function: Callable) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        owner = block.get_submodule(path)
        owner.__delattr__(name)
        setattr(owner, name, function)

    return change


@twice(by_a_function("mlp", "act", nn.functional.gelu))
def another_function_as_activation(block):
    block.mlp.act = torch.tanh


@twice(by_a_function("mlp", "relu", nn.functional.relu))
def no_function_where_one_was(block):
    block.mlp.relu = None


@twice(lambda block: None)
def a_function_as_dropout(block):
    by_a_function("attn", "attn_drop", lambda probabilities: 0.5 * probabilities)(block)


@twice(lambda block: None)
def a_function_as_the_mlps_dropout(block):
    by_a_function("mlp", "drop", lambda x: 0.5 * x)(block)


@twice(lambda block: setattr(block.norm1, "eps", torch.tensor(1e-5)))
def a_tensor_as_epsilon(block):
    block.norm1.eps.fill_(0.5)


@twice(lambda block: setattr(block.norm1, "eps", np.float32(1e-5)))
def a_number_of_numpys_as_epsilon(block):
    block.norm1.eps = np.float32(0.5)


class EpsilonOfTheClass(nn.LayerNorm):
    eps = 1e-5


def take_the_epsilon_from_the_class(block):
    EpsilonOfTheClass.eps = 1e-5
    block.norm1.__class__ = EpsilonOfTheClass
    del block.norm1.eps


@twice(take_the_epsilon_from_the_class)
def an_epsilon_of_the_class(block):
    EpsilonOfTheClass.eps = 0.5


class ComputedEpsilon(nn.LayerNorm):
    value = 1e-5
    eps = property(lambda self: self.value, lambda self, value: None)


def compute_the_epsilon(block):
    ComputedEpsilon.value = 1e-5
    block.norm1.__class__ = ComputedEpsilon
    del vars(block.norm1)["eps"]


@twice(compute_the_epsilon)
def an_epsilon_that_is_computed(block):
    ComputedEpsilon.value = 0.5


class WeightOnTheWay(nn.Linear):
    factor = 1.0

    def __getattribute__(self, name: str) -> Any:
        value = nn.Linear.__getattr__(self, name) if name == "weight" else super().__getattribute__(name)
        return WeightOnTheWay.factor * value if name == "weight" else value


def weigh_on_the_way(block):
    WeightOnTheWay.factor = 1.0
    block.mlp.fc1.__class__ = WeightOnTheWay


@twice(weigh_on_the_way)
def a_weight_changed_on_the_way(block):
    WeightOnTheWay.factor = 2.0


class Switched(SpatialReductionAttention):
    switch = 1.0

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.switch * super().forward(x, height, width)


@twice(lambda block: setattr(block.attn, "__class__", Switched))
def an_attribute_of_a_class_above(block):
    block.attn.switch = 0.5


@pytest.mark.parametrize("name", TWICE)
@torch.no_grad()
def test_a_second_change_is_honoured_after_calls(name):
    model, (first, second) = own(linear=True), TWICE[name]
    block = blocks(model)[1]
    for _ in range(3):
        whole(model)
    first(block)
    for _ in range(3):
        before = whole(model)
        assert_rounding(before, plain(lambda: whole(model)))
    second(block)
    for _ in range(3):
        after = whole(model)
        assert_rounding(after, plain(lambda: whole(model)))
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


MISSING = {"drop_path": "", "attn_drop": "attn", "proj_drop": "attn", "drop": "mlp"}


@pytest.mark.parametrize("name", MISSING)
@torch.no_grad()
def test_without_a_module_that_is_called_the_call_fails_as_pythons(name):
    model = own()
    whole(model)
    delattr(blocks(model)[1].get_submodule(MISSING[name]), name)
    for _ in range(3):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            whole(model)


# -- the pieces around the blocks, and the model itself ----------------------------------------------------------------


def append_a_block(model):
    model.block1.append(copy.deepcopy(model.block1[0]))


def insert_a_block(model):
    model.block2.insert(1, copy.deepcopy(model.block2[0]))


def drop_a_block(model):
    del model.block2[0]


def swap_blocks(model):
    model.block1[0], model.block1[1] = model.block1[1], model.block1[0]


def replace_a_list(model):
    model.block1 = nn.ModuleList(reversed(model.block1))


def append_another_module(model):
    class Squash(nn.Module):
        def forward(self, x, height, width):
            return torch.tanh(x)

    model.block1.append(Squash())


def replace_the_head(model):
    model.reset_classifier(7)


def remove_the_head(model):
    model.reset_classifier(0)


def wrap_the_head(model):
    model.head = nn.Sequential(nn.Tanh(), model.head)


def replace_a_stage_norm(model):
    model.norm1 = nn.LayerNorm(8, eps=0.5)


def leave_a_stage_norm_out(model):
    model.norm2 = nn.Identity()


def replace_a_projection(model):
    model.patch_embed1.proj = nn.Conv2d(3, 8, 7, 4, padding=3)


def leave_the_norm_of_an_embed_out(model):
    model.patch_embed2.norm = nn.Identity()


def change_the_stride_of_an_embed(model):
    model.patch_embed1.proj.stride = (2, 2)


def hook_an_embed(model):
    model.patch_embed1.norm.register_forward_hook(doubled)


def hook_a_stage_norm(model):
    model.norm2.register_forward_hook(doubled)


def hook_the_head(model):
    model.head.register_forward_hook(doubled)


def hook_a_block(model):
    model.block1[0].register_forward_hook(doubled)


def hook_the_model(model):
    model.register_forward_hook(doubled)


def another_forward_of_a_block(model):
    block = model.block1[0]
    block.forward = lambda x, height, width: torch.tanh(x)


def another_class_of_a_block(model):
    class Twice(type(model.block1[0])):
        def forward(self, x, height, width):
            return super().forward(super().forward(x, height, width), height, width)

    model.block1[0].__class__ = Twice


def another_class_of_a_list(model):
    class Reversed(nn.ModuleList):
        def __iter__(self):
            return iter(reversed([*super().__iter__()]))

    model.block1.__class__ = Reversed


def another_class_of_the_model(model):
    class Negative(PVT_V2):
        def forward_features(self, image):
            return -super().forward_features(image)

    model.__class__ = Negative


def another_forward_features(model):
    model.forward_features = lambda image: -PVT_V2.forward_features(model, image)


def another_forward_head(model):
    model.forward_head = lambda x, pre_logits=False: -PVT_V2.forward_head(model, x, pre_logits)


def another_stage(model):
    own_stage = model._stage
    model._stage = lambda stage, x: tuple(-y for y in own_stage(stage, x))


def hide_a_bias(model):
    q = model.block1[0].attn.q
    del q.bias
    q.bias = torch.full((8,), 3.0)


def hide_a_bias_by_a_buffer(model):
    q = model.block1[0].attn.q
    del q.bias
    q.register_buffer("bias", torch.full((8,), 3.0))


def a_weight_of_the_class(model):
    class Positive(nn.Linear):
        @property
        def weight(self):
            return self._parameters["weight"].abs()

    model.block1[0].mlp.fc1.__class__ = Positive


def an_activation_without_pooling(model):
    model.block1[0].attn.act = nn.GELU()


def a_lazy_head(model):
    model.head = nn.LazyLinear(4)


def a_lazy_linear_within(model):
    model.block1[0].attn.q = nn.LazyLinear(8)


def sparse_weights(model):
    for linear in (model.block1[0].attn.q, model.head):
        weight = torch.where(linear.weight > 0, linear.weight, 0).detach()
        linear.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)


def weights_with_the_negative_bit(model):
    linear = model.block1[0].attn.q
    linear.weight = nn.Parameter(torch._neg_view(linear.weight.detach()), requires_grad=False)


def one_module_trains(model):
    model.block1[0].attn.attn_drop.p = 0.5
    model.block1[0].attn.attn_drop.train()


def replace_the_dict_of_modules(model):
    model._modules = {**model._modules, "head": nn.Linear(16, 5)}


def hide_the_head(model):
    object.__setattr__(model, "head", nn.Linear(16, 5))


def hide_a_stage_norm(model):
    object.__setattr__(model, "norm2", nn.LayerNorm(16, eps=0.5))


def hide_an_mlp(model):
    object.__setattr__(model.block1[0], "mlp", DWConvMLP(8, 16, False, 0.0).eval())


def a_head_of_the_class(model):
    class Negated(PVT_V2):
        @property
        def head(self):
            return lambda x: -self._modules["head"](x)

    model.__class__ = Negated


def another_order_of_a_list(model):
    model.block1._modules["0"] = model.block1._modules.pop("0")


AROUND = [
    append_a_block,
    insert_a_block,
    drop_a_block,
    swap_blocks,
    replace_a_list,
    append_another_module,
    replace_the_head,
    remove_the_head,
    wrap_the_head,
    replace_a_stage_norm,
    leave_a_stage_norm_out,
    replace_a_projection,
    leave_the_norm_of_an_embed_out,
    change_the_stride_of_an_embed,
    hook_an_embed,
    hook_a_stage_norm,
    hook_the_head,
    hook_a_block,
    hook_the_model,
    another_forward_of_a_block,
    another_class_of_a_block,
    another_class_of_a_list,
    another_class_of_the_model,
    another_forward_features,
    another_forward_head,
    another_stage,
    hide_a_bias,
    hide_a_bias_by_a_buffer,
    a_weight_of_the_class,
    an_activation_without_pooling,
    a_lazy_head,
    a_lazy_linear_within,
    sparse_weights,
    weights_with_the_negative_bit,
    one_module_trains,
    replace_the_dict_of_modules,
    another_order_of_a_list,
    hide_the_head,
    hide_a_stage_norm,
    hide_an_mlp,
    a_head_of_the_class,
]


@pytest.mark.parametrize("change", AROUND, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:.*requires padding", "ignore:Lazy modules", "ignore:Sparse CSR")
def test_what_is_done_around_the_blocks_is_honoured(change):
    model, _, before = with_program()
    change(model)
    for _ in range(3):
        torch.manual_seed(7)
        after = whole(model)
        assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        torch.manual_seed(7)
        assert_rounding(after, plain(lambda: whole(model)))


@torch.no_grad()
def test_without_pooling_linear_attention_keeps_its_own_forward():
    model = own(linear=True)
    for _ in range(3):
        before = whole(model)
    for pool in (None, nn.Identity()):
        model.block1[0].attn.pool = pool
        after = whole(model)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        assert_rounding(after, plain(lambda: whole(model)))


@torch.no_grad()
def test_an_image_with_the_negative_bit():
    model, _, _ = with_program()
    for _ in range(2):
        assert_rounding(model(torch._neg_view(image())), model(-image()))


def test_a_copied_block_follows_its_model():
    model = own()
    model.block1.append(copy.deepcopy(model.block1[0]))
    for _ in range(2):
        whole(model)
    model.backend = "reference"
    assert {stand_in.fused.settings.backend for _, stand_in in model.stand_ins()} == {"reference"}
    assert {piece.backend for piece in pvt_fast.explain(model).pieces} == {"reference"}


@pytest.mark.parametrize("part", ["attn", "norm2"])
def test_what_cannot_be_called_meets_pythons_own_error(part):
    model, block, _ = with_program()
    setattr(block, part, None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        whole(model)


def test_an_unknown_pooling_is_refused():
    model = own()
    model.global_pool = "max"
    with pytest.raises(ValueError, match='forward_head: global_pool must be "avg" or "", got \'max\''):
        whole(model)


@pytest.mark.parametrize("kind", ["Block", "OverlapPatchEmbed", "PVT_V2"])
def test_patched_forwards_of_whole_pieces_are_honoured(kind, monkeypatch):
    model, block, before = with_program()
    owner = {"Block": type(block), "OverlapPatchEmbed": type(model.patch_embed1), "PVT_V2": PVT_V2}[kind]
    name = "forward_features" if kind == "PVT_V2" else "forward"
    own_forward = getattr(owner, name)

    def patched(self, *args):
        result = own_forward(self, *args)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    monkeypatch.setattr(owner, name, patched)
    after = whole(model)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert_rounding(after, plain(lambda: whole(model)))


def test_a_patched_forward_of_an_accelerated_block_is_honoured(monkeypatch):
    model = accelerated()
    before = whole(model)
    kind = type(blocks(model)[0]).__mro__[2]
    own_forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, size: 2 * own_forward(self, x, size))
    after = whole(model)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert_rounding(after, plain(lambda: whole(model)))


# -- backward hooks ----------------------------------------------------------------------------------------------------


def with_full_hook(module, seen):
    return module.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))


def with_full_pre_hook(module, seen):
    return module.register_full_backward_pre_hook(lambda module, outputs: seen.append("backward"))


def with_backward_hook(module, seen):
    return module.register_backward_hook(lambda module, grads, outputs: seen.append("backward"))


def with_global_hook(module, seen):
    def hook(other, grads, outputs):
        seen.append("backward") if other is module else None

    return nn.modules.module.register_module_full_backward_hook(hook)


def with_global_pre_hook(module, seen):
    def hook(other, outputs):
        seen.append("backward") if other is module else None

    return nn.modules.module.register_module_full_backward_pre_hook(hook)


BACKWARD = [with_full_hook, with_full_pre_hook, with_backward_hook, with_global_hook, with_global_pre_hook]


@pytest.mark.parametrize("hook", BACKWARD)
@pytest.mark.parametrize("path", ["norm1", "attn", "attn.q", "mlp.dwconv.dwconv", "mlp.act"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:Using a? ?non-full backward hook", "ignore:Full backward hook is firing")
def test_backward_hooks_fire(kind, path, hook):
    model, seen = MODELS[kind](), []
    block = blocks(model)[1]
    if kind == "accelerated":
        path = path.replace("dwconv.dwconv", "dwconv")
    for _ in range(2):
        model(image()).sum().backward()
        whole(model)
    handle = hook(block.get_submodule(path), seen)
    try:
        model(image()).sum().backward()
        assert seen == ["backward"]
        whole(model)
        model(image()).sum().backward()
        assert seen == 2 * ["backward"]
    finally:
        handle.remove()
    model(image()).sum().backward()
    assert seen == 2 * ["backward"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_full_backward_hook_may_change_gradients(kind):
    model = MODELS[kind]()
    blocks(model)[1].mlp.fc1.register_full_backward_hook(lambda module, grads, outputs: (3 * grads[0],))
    x = image().requires_grad_()
    (fused,) = torch.autograd.grad(model(x).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(lambda: model(x)).square().sum(), x)
    assert_rounding(fused / expected.abs().max(), expected / expected.abs().max())


# -- what torch's states are asked by ----------------------------------------------------------------------------------


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def within(transform: Callable) -> Iterator[Callable[[], str | None]]:
    """`ambient` as seen from within a transform."""
    seen: list[str | None] = []

    def ask(x: Tensor) -> Tensor:
        seen.append(ambient())
        return (x * x).sum()

    transform(ask)(torch.ones(3))
    yield lambda: seen[0]


# torch's own use of it, at its first derivative in forward mode
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
TRANSFORMS = {
    "vmap": lambda f: torch.func.vmap(f),
    "grad": lambda f: torch.func.grad(f),
    "jacrev": lambda f: torch.func.jacrev(f),
    "jacfwd": lambda f: torch.func.jacfwd(f),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x),
    "functionalize": lambda f: torch.func.functionalize(f),
    "hessian": lambda f: torch.func.hessian(f),
}


@DEPRECATED
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_seen(name):
    with within(TRANSFORMS[name]) as ask:
        assert ask() == "it runs under a transform of torch.func"
    assert ambient() is None


def test_modes_are_seen():
    assert ambient() is None
    with Passing():
        assert ambient() == "a TorchDispatchMode is to see its operations"
    with Counting():
        assert ambient() == "a TorchFunctionMode is to see its operations"
    with torch.device("cpu"), Counting():
        assert ambient() == "a TorchFunctionMode is to see its operations"
    with FlopCounterMode(display=False):
        assert ambient() is not None
    with torch._subclasses.FakeTensorMode():
        assert ambient() is not None
    with forward_ad.dual_level():
        assert ambient() == "forward-mode derivatives are asked for"
    assert ambient() is None


def test_tracing_is_seen():
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(ambient())
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(ask, torch.ones(1), check_trace=False)
    assert seen == ["it is being traced"]


def test_devices_for_new_tensors_disturb_nothing():
    with torch.device("cpu"):
        assert ambient() is None
    before = torch.get_default_device()
    torch.set_default_device("cpu")
    try:
        assert ambient() is None
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)
    assert torch._C._len_torch_function_stack() == 0


def test_hooks_on_all_modules_are_seen():
    module = nn.modules.module
    for register in (
        module.register_module_forward_hook,
        functools.partial(module.register_module_forward_hook, with_kwargs=True),
        functools.partial(module.register_module_forward_hook, always_call=True),
        module.register_module_forward_pre_hook,
        module.register_module_full_backward_hook,
        module.register_module_full_backward_pre_hook,
    ):
        assert not guarding.hooks_on_all_modules()
        handle = register(lambda *args: None)
        try:
            assert guarding.hooks_on_all_modules()
        finally:
            handle.remove()
            module._global_forward_hooks_with_kwargs.pop(handle.id, None)  # which torch leaves
    assert not guarding.hooks_on_all_modules()
    assert not module._has_any_global_hook()


def test_all_hooks_that_a_module_has_are_among_those_looked_at():
    """A new kind of hook of torch's is a name that the guard must learn."""
    names = {name for name in vars(nn.Linear(1, 1)) if name.endswith("_hooks")}
    known = {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
    assert names == {*guarding.HOOKS, *known}
    everywhere = {name for name in vars(nn.modules.module) if name.startswith("_global_") and name.endswith("_hooks")}
    looked_at = {
        name for name in everywhere for hooks in guarding.GLOBAL_HOOKS if vars(nn.modules.module)[name] is hooks
    }
    registering = {name for name in everywhere if "registration" in name}
    assert everywhere == looked_at | registering


def test_transformers_still_keeps_its_hooks_where_the_guard_looks():
    import transformers.utils.output_capturing as capturing

    assert capturing.__name__ == guarding.CAPTURING
    assert capturing._active_collector.get() is None


# -- and honoured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_flops_are_counted(kind):
    model = MODELS[kind]()
    for _ in range(3):
        whole(model)
    counts = []
    for count in (lambda: whole(model), lambda: plain(lambda: whole(model))):
        with FlopCounterMode(display=False) as counter:
            count()
        counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", MODELS)
def test_function_modes_see_operations(kind):
    model = MODELS[kind]()
    for _ in range(3):
        expected = whole(model)
    with Counting() as counting:
        answer = whole(model)
    assert "layer_norm" in counting.seen
    assert counting.seen.count("linear") > 10
    assert_rounding(answer, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_a_device_for_new_tensors_keeps_models_fused(kind):
    model = MODELS[kind]()
    for _ in range(3):
        expected = whole(model)
    with torch.device("cpu"):
        assert torch.equal(whole(model), expected)
    torch.set_default_device("cpu")
    try:
        assert torch.equal(whole(model), expected)
    finally:
        torch.set_default_device(None)


def differentiable(kind: str) -> nn.Module:
    """Without torch's scaled_dot_product_attention, which has no derivatives in forward mode on a CPU."""
    model = MODELS[kind]()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@DEPRECATED
@pytest.mark.parametrize("kind", MODELS)
def test_dual_tensors_have_tangents(kind):
    model, x = differentiable(kind), image()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        whole(model)

    def tangent(call: Callable) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent

    fused = tangent(model)
    assert_rounding(fused, tangent(lambda dual: plain(lambda: model(dual))))
    step = 1e-2  # and by differences
    with torch.no_grad():
        differences = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    torch.testing.assert_close(fused, differences, rtol=0.05, atol=0.05 * float(fused.detach().abs().max()))


@DEPRECATED
@pytest.mark.parametrize("kind", MODELS)
def test_dual_parameters_have_tangents(kind):
    model, x = differentiable(kind), image()
    whole(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def tangent(call: Callable) -> Tensor:
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(value, 0.1 * value) for name, value in parameters.items()}
            output = call(lambda: torch.func.functional_call(model, duals, (x,)))
            return forward_ad.unpack_dual(output).tangent

    assert_rounding(tangent(lambda call: call()), tangent(plain))


@pytest.mark.parametrize("kind", MODELS)
def test_traced_models_are_plain_ones(kind):
    model, x = MODELS[kind](), image()
    for _ in range(3):
        expected = whole(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x, check_trace=False)
    assert "pvt_fast::" not in str(traced.inlined_graph)
    other = image().flip(3)
    with torch.no_grad():
        assert_rounding(traced(x), expected)
        assert_rounding(traced(other), model(other))


def test_fused_answers_are_those_of_the_ops():
    """What the tests here compare is not the same thing twice."""
    for kind in MODELS:
        model = MODELS[kind]()
        assert not torch.equal(whole(model), plain(lambda model=model: whole(model)))
    assert pvt_fast.explain(own()).pieces
