"""Blocks and calls that the ops cannot take: they run their own code, and the report says why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vendored
from peer_models import answer, change_activation, hook, image, make, other, pvt_v2, randomised, segformer, timm_pvt
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as pruning

import pvt_fast
from pvt_fast.accelerate import fused, verify


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


@pytest.mark.parametrize(
    ("block_dtype", "x_dtype", "why"),
    [
        (torch.bfloat16, torch.float32, "w must be torch.float32, or of the dtype torch.float32 that its norms read"),
        (torch.float32, torch.float16, "x must be torch.float32 or torch.bfloat16 as the products, got torch.float16"),
        (torch.float64, torch.float32, "w must be torch.float32, torch.bfloat16 or torch.float16 beside products"),
    ],
)
@torch.no_grad()
def test_under_autocast_dtypes_that_do_not_mix_run_the_blocks_own_code(block_dtype, x_dtype, why, ran, caplog):
    fused.log.cache_clear()
    block, x = make("official").block1[0].to(block_dtype), torch.randn(2, 99, 16, dtype=x_dtype)

    def outcome() -> Any:
        try:
            return block(x, 9, 11)
        except RuntimeError as error:
            return str(error)

    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome()
    pvt_fast.accelerate_(block, backend="cpp", strict=True)
    with torch.autocast("cpu", torch.bfloat16), caplog.at_level("INFO", logger="pvt_fast"):
        for _ in range(2):
            answered = outcome()
            same = torch.equal(answered, expected) if isinstance(expected, Tensor) else answered == expected
            assert same
    assert ran == []
    said = [record.getMessage() for record in caplog.records if "autocast is on, and" in record.getMessage()]
    assert len(said) == 1
    assert why in said[0]


@torch.no_grad()
def test_parameters_of_another_dtype_or_shape_meet_the_blocks_own_errors(ran):
    block, x = make("official").block1[0], torch.randn(2, 99, 16)
    pvt_fast.accelerate_(block, backend="cpp")
    for path, change in (
        ("attn.proj", lambda linear: linear.to(torch.bfloat16)),
        ("mlp.fc2", lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight[:, :20].clone()))),
        ("mlp.fc1", lambda linear: setattr(linear, "bias", nn.Parameter(linear.bias[:20].clone()))),
    ):
        clone = copy.deepcopy(block)
        change(clone.get_submodule(path))
        with pytest.raises(RuntimeError):
            clone(x, 9, 11)
    clone = copy.deepcopy(block)
    clone.attn.q.weight = nn.Parameter(clone.attn.q.weight.as_subclass(Tagged))
    assert type(clone(x, 9, 11)) is Tagged
    assert ran == []
    block.attn.q.bias = None  # one that was there is no more
    expected = copy.deepcopy(block)
    pvt_fast.restore_(expected)
    assert torch.equal(block(x, 9, 11), expected(x, 9, 11))
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
        clone = copy.deepcopy(block)
        pvt_fast.restore_(clone)
        torch.testing.assert_close(clone(x, 9, 11), after)


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
    (set_attribute("attn.q.weight_fake_quant", nn.Identity()), "attention: attn.q must be a plain Linear, got Linear"),
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


# -- modules of users, and state that nobody tells of ------------------------------------------------------------------


class Masked(nn.Linear):
    """Of a user: its mask is no parameter."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.load_state_dict(like.state_dict())
        self.mask = torch.ones_like(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class Tap(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class CountedGELU(nn.GELU):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Expected(nn.Module):
    """Stochastic depth that scales in evaluation, as the paper does."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * (1 - self.drop_prob)


class PerToken(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        return x * torch.empty(x.shape[:2]).bernoulli_(1 - self.drop_prob)[..., None]


def in_every_block(model: nn.Module, path: str, make: Callable[[nn.Module, int], nn.Module]) -> None:
    blocks = [block for stage in model.stages for block in stage.blocks]
    for index, block in enumerate(blocks):
        block.set_submodule(path, make(block.get_submodule(path), index).eval())


class Called(nn.Conv2d):
    calls = 0

    def _conv_forward(self, *args: Any) -> Tensor:
        self.calls += 1
        return super()._conv_forward(*args)


def counted_convolution(old: nn.Conv2d, _: int) -> nn.Conv2d:
    new = Called(old.in_channels, old.out_channels, 3, padding=1, groups=old.groups)
    new.load_state_dict(old.state_dict())
    return new


OF_USERS: dict[str, tuple[str, Callable[[nn.Module, int], nn.Module], str]] = {
    "a mask": ("mlp.fc1", lambda old, _: Masked(old), "mlp: mlp.fc1 reads what may change unseen, a Tensor at mask"),
    "a tap": ("attn.proj_drop", lambda *_: Tap(), "attention: attn.proj_drop has methods of another package's, Tap"),
    "an activation": ("mlp.act", lambda *_: CountedGELU(), "mlp: mlp.act has methods of another package's, Counted"),
    "a method": ("mlp.dwconv", counted_convolution, "mlp: mlp.dwconv has methods of another package's, Called"),
    "a depth": (
        "drop_path1",
        lambda _, n: Expected(0.1 * n),
        "attention: drop_path1 has methods of another package's",
    ),
    "a mask of tokens": ("drop_path2", lambda *_: PerToken(0.5), "mlp: drop_path2 has methods of another package's"),
}


@pytest.mark.parametrize("name", OF_USERS)
@torch.no_grad()
def test_modules_of_users_are_called(name):
    path, put, reason = OF_USERS[name]
    model, x = make("timm"), image()
    in_every_block(model, path, put)
    expected = model(x)
    report = pvt_fast.accelerate_(model, backend="cpp")
    assert reason in str(report)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    module = model.stages[0].blocks[0].get_submodule(path)
    if hasattr(module, "calls"):
        before = module.calls
        model(x)
        assert module.calls == before + 1


@pytest.mark.parametrize(
    ("depth", "reason"),
    [(Expected, "something else than its structure suggests"), (PerToken, "must multiply each sample")],
)
def test_stochastic_depth_of_a_blocks_own_package_is_tried_out(depth, reason, monkeypatch):
    """At a rate, though that of the first block is 0; in training, too."""
    monkeypatch.setattr(depth, "forward", with_module(depth.forward, vendored.__name__))
    model = make("official")
    for block in model.modules():
        if hasattr(block, "drop_path"):
            block.drop_path = depth(0.0).eval()
    assert reason in str(pvt_fast.accelerate_(model, backend="cpp"))


def with_module(function: Callable, name: str) -> Callable:
    function.__module__ = name
    return function


class Adapted(vendored.Block):
    """Has a place for a module, which does nothing as yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = self.make()

    @staticmethod
    def make() -> nn.Module | None:
        return nn.Identity()

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = super().forward(x, H, W)
        return x if self.adapter is None else self.adapter(x)


class Placed(Adapted):
    @staticmethod
    def make() -> None:
        return None


class Offset(vendored.Block):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(x, H, W) + self.offset


class Dropping(vendored.Block):
    """By a function, in training only."""

    rate = 0.3

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return nn.functional.dropout(super().forward(x, H, W), self.rate, self.training)


class Numbered(vendored.Block):
    """Its number has the name of a dropout's rate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.p = 1.0

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return self.p * super().forward(x, H, W)


class Weighted(vendored.Block):
    """Looks for a parameter that it does not have as yet."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return getattr(self, "gamma", 1.0) * super().forward(x, H, W)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Adapted, "adapter is of an unknown purpose, Identity"),
        (Offset, "offset is of an unknown purpose, a tensor of the block's own"),
        (Dropping, "something else than its structure suggests"),
    ],
)
def test_blocks_with_more_than_their_halves_are_left(kind, reason, monkeypatch):
    monkeypatch.setattr(vendored, "Block", kind)
    report = pvt_fast.accelerate_(make("official"), backend="cpp")
    assert not report.accelerated
    assert reason in str(report)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Placed, lambda block: setattr(block, "adapter", nn.Hardtanh(-0.1, 0.1))),
        (Weighted, lambda block: block.register_parameter("gamma", nn.Parameter(torch.tensor(2.0)))),
        (Numbered, lambda block: setattr(block, "p", 2.0)),
    ],
)
@torch.no_grad()
def test_what_a_block_is_given_later_is_used(kind, change, monkeypatch):
    monkeypatch.setattr(vendored, "Block", kind)
    model, x = make("official"), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    for _ in range(3):
        before = answer(model, x)
    change(model.block1[0])
    expected = copy.deepcopy(model)
    pvt_fast.restore_(expected)
    for _ in range(3):
        torch.testing.assert_close(answer(model, x), answer(expected, x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer(model, x), before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_dropout_whose_module_was_frozen_is_in_force_where_its_owner_trains():
    """timm's attention asks its own mode, and its dropout for the rate only."""
    model, x = randomised(timm_pvt(attn_drop_rate=0.5)), image()
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    expected = copy.deepcopy(model)
    pvt_fast.restore_(expected)
    for seed in range(3):
        torch.manual_seed(seed)
        ours = model(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours, expected(x), rtol=1e-4, atol=1e-4)


class Gated(vendored.Block):
    """A block with a switch, a number and a method of its own."""

    gain = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip, self.factor = False, 1.0

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor * self.gain

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        if self.skip:
            return x
        return self.scaled(super().forward(x, H, W))


class Derived(Gated):
    """The attributes are named in what it calls by super()."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(x, H, W)


BLOCKS_OWN: dict[str, Callable[[nn.Module], Any]] = {
    "a flag": lambda block: setattr(block, "skip", True),
    "a number": lambda block: setattr(block, "factor", 2.0),
    "a method": lambda block: setattr(block, "scaled", lambda x: 2 * x),
    "a method of the class": lambda block: setattr(type(block), "scaled", lambda self, x: 2 * x),
    "a number of the class": lambda block: setattr(type(block), "gain", 2.0),
}


class Computed(vendored.Block):
    strength = 1.0
    factor = property(lambda self: self.strength)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(x, H, W) * self.factor


def test_a_block_that_computes_what_it_reads_is_left(monkeypatch):
    monkeypatch.setattr(vendored, "Block", Computed)
    report = pvt_fast.accelerate_(make("official"), backend="cpp")
    assert not report.accelerated
    assert "attention: it reads what may change unseen, a property at factor" in str(report)


@pytest.mark.parametrize("kind", [Gated, Derived])
@pytest.mark.parametrize("name", BLOCKS_OWN)
@torch.no_grad()
def test_what_is_the_blocks_own_is_watched(name, kind, monkeypatch):
    monkeypatch.setattr(vendored, "Block", kind)
    model, x = make("official"), image()
    block = model.block1[0]
    pvt_fast.accelerate_(model, backend="cpp", strict=True)
    for _ in range(3):
        before = answer(model, x)
    kept = {key: vars(Gated)[key] for key in ("scaled", "gain")}
    try:
        BLOCKS_OWN[name](Gated.__new__(Gated) if "class" in name else block)
        expected = copy.deepcopy(model)
        pvt_fast.restore_(expected)
        for _ in range(3):
            torch.testing.assert_close(answer(model, x), answer(expected, x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(answer(model, x), before, rtol=1e-3, atol=1e-3)
    finally:
        for key, value in kept.items():
            setattr(Gated, key, value)


def test_blocks_are_tried_out_with_their_buffers():
    block = make("official").block1[0]
    block.register_buffer("table", torch.arange(3))
    block.mlp.register_buffer("scale", torch.full((4,), 0.5, dtype=torch.bfloat16))
    tried = verify.clone(block)
    assert tried.table.tolist() == [0, 1, 2]
    assert tried.mlp.scale.tolist() == [0.5] * 4
