"""Mixed precision: ops with products, and models under torch.autocast, beside plain torch under the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fused_models import MODELS, image, own, plain
from op_gradients import assert_gradients, gradients, redrawn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pvt_fast import PVT_V2, testing
from pvt_fast.backend import registered
from pvt_fast.ops import PRODUCTS, Linear, map_tensors, packing, reference, result_dtype
from pvt_fast.testing import AttentionCase, Case, MlpCase, PatchEmbedCase, assert_parity, run

to_products = pytest.mark.parametrize("products", PRODUCTS, ids=["bf16", "f16"])
SMALL = [
    PatchEmbedCase(2, (9, 10), 3, 16, kernel=7, stride=4),
    PatchEmbedCase(1, (4, 4), 16, 136, layout="nhwc"),
    AttentionCase(2, (6, 5), 16, 2, sr_ratio=2, scale_residual=True),
    AttentionCase(1, (5, 4), 24, 2, linear=True),
    AttentionCase(1, (4, 4), 136, 2, bias=False, layout="sliced"),
    MlpCase(2, (6, 5), 16, 40, scale_residual=True),
    MlpCase(1, (4, 4), 136, 64, relu=True),
]


def mixed(case: Case, products: torch.dtype) -> list[tuple]:
    """The case's arguments, their parameters float32, activations of either dtype; all of the products' dtype last."""
    x, *rest = case.make(torch.float32)
    return [(x, *rest), (x.to(products), *rest), map_tensors((x, *rest), lambda tensor: tensor.to(products))]


# -- the ops ----------------------------------------------------------------------------------------------------------


@to_products
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_parity_with_torch_under_autocast(case, products, target):
    for arguments in mixed(case, products):
        with target.in_use():
            ours = run(target.ops, case, (*map_tensors(arguments, lambda t: t.to(target.device)), products))
        truth = run(reference, case, map_tensors(arguments, lambda tensor: tensor.double()))
        assert_parity(ours, truth, run(reference, case, (*arguments, products)), f"{case} on {target}")


@to_products
def test_parity_of_the_head(products, target):
    draw = testing.Draw("head", torch.float32, "cpu")
    x, w = draw.normal(2, 17, 33, mean=0.5), draw.linear(19, 33)
    for given in (x, x.to(products)):
        for weights in (w, None):
            with target.in_use():
                ours = target.ops.head(*map_tensors((given, weights), lambda t: t.to(target.device)), products)
            truth = reference.head(*map_tensors((given, weights), lambda tensor: tensor.double()))
            assert_parity(ours, truth, reference.head(given, weights, products))


@pytest.mark.only("cpp", "reference")
@to_products
def test_layer_norm_of_low_activations_with_float32_weights(products, target):
    draw = testing.Draw("norm", torch.float32, "cpu")
    x, w = draw.normal(2, 17, 33, mean=0.5).to(products), draw.norm(33, 1e-6)
    with target.in_use():
        ours = target.ops.layer_norm(x, w)
    assert_parity(ours, reference.layer_norm(*map_tensors((x, w), lambda t: t.double())), reference.layer_norm(x, w))


@pytest.mark.not_interpreted
@to_products
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_have_the_dtypes_of_their_arguments(case, products, target):
    def call(ops, given: tuple) -> Tensor:
        return run(ops, case, given)

    for arguments in mixed(case, products):

        def ours(drawn: tuple) -> list[Tensor]:
            with target.in_use(), torch.autocast("cpu", products):  # which a call with products does not look at
                return gradients(call, registered.registered(target.backend), (*drawn, products))

        drawn = [redrawn(arguments, seed) for seed in range(1 if target.interpreted else 4)]
        assert_gradients(ours, call, drawn, lambda given: gradients(call, reference, (*given, products)))


def test_dtypes_that_do_not_mix_are_refused(target):
    x, hw, w, spec, scale = MlpCase(1, (2, 2), 16, 16).make(torch.float32, target.device)
    low = map_tensors(w, lambda tensor: tensor.bfloat16())
    for given, products, message in (
        (
            (x, hw, w, spec, scale),
            torch.float32,
            "mlp: products must be torch.bfloat16 or torch.float16, got torch.flo",
        ),
        ((x.half(), hw, w, spec, scale), torch.bfloat16, "mlp: x must be torch.float32 or torch.bfloat16 .* got .*16"),
        ((x, hw, low, spec, scale), torch.bfloat16, "mlp: w must be torch.float32, or of the dtype torch.float32 that"),
        ((x, hw, w._replace(fc1=low.fc1), spec, scale), torch.bfloat16, "mlp: "),
        ((x, hw, w._replace(fc2=low.fc2), spec, scale), torch.bfloat16, "w.fc2.weight must have the other weights'"),
    ):
        with pytest.raises(TypeError, match=message), target.in_use():
            target.ops.mlp(*given, products)


def pieces(x: Tensor, conv: Linear, norm: tuple[Tensor, Tensor], linear: Linear) -> dict[str, torch.dtype]:
    """What torch gives for the operators that the dtypes of results hang on."""
    embedded = F.layer_norm(F.conv2d(x, *conv).flatten(2).transpose(1, 2), (4,), *norm)
    tokens = x.flatten(2).transpose(1, 2)
    residual = tokens + F.linear(F.layer_norm(tokens, (4,), *norm), *linear)
    return {"patch_embed": embedded.dtype, "mlp": residual.dtype, "head": F.linear(tokens.mean(1), *linear).dtype}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@to_products
def test_result_dtypes_are_torchs(device, products):
    """On fake tensors of a device that need not be there; torch.autocast itself would not begin without it."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with FakeTensorMode():
        weights = torch.empty(4, 4, 1, 1, device=device), torch.empty(4, device=device)
        linear = Linear(weights[0].flatten(1), weights[1])
        for dtype in (torch.float32, products):
            x = torch.empty(1, 4, 2, 2, device=device, dtype=dtype)
            torch.set_autocast_dtype(device, products)
            torch.set_autocast_enabled(device, True)
            try:
                found = pieces(x, Linear(*weights), (weights[1], weights[1]), linear)
            finally:
                torch.set_autocast_enabled(device, before[0])
                torch.set_autocast_dtype(device, before[1])
            assert found == {op: result_dtype(op, device, dtype, products) for op in found}


def exact(model: nn.Module, x: Tensor) -> Tensor:
    model = copy.deepcopy(model).double()
    if isinstance(model, PVT_V2):
        model.backend = "reference"
    return plain(lambda: model(x.double())).detach()


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("x_dtype", ["float32", "low"])
@pytest.mark.parametrize("parameters", ["float32", "low"])
@to_products
def test_a_model_under_autocast_gives_what_plain_torch_does(kind, x_dtype, parameters, products):
    model, x = MODELS[kind](), image()
    model.eval().to(torch.float32 if parameters == "float32" else products)
    x = x if x_dtype == "float32" else x.to(products)
    truth = exact(model, x)
    with torch.autocast("cpu", products):
        theirs = plain(lambda: model(x))
        with torch.inference_mode():
            ours = [model(x), model(x)]
        trained = model.train()(x)
    assert torch.equal(*ours)
    for output in (*ours, trained):
        assert_parity(output.detach(), truth, theirs.detach())


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_packed_once_and_changes_are_seen(kind):
    model, x = MODELS[kind]().eval(), image()

    def forms() -> list[object]:
        with packing.collected() as records:
            (model.forward_intermediates if kind == "own" else model)(x)
        return [record.form for record in records]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = forms()
        assert first
        assert [form is before for form, before in zip(forms(), first, strict=True)] == [True] * len(first)
        with torch.autocast("cpu", enabled=False):
            assert not set(map(id, forms())) & set(map(id, first))  # beside them
        assert all(form is before for form, before in zip(forms(), first, strict=True))
        before = model(x)
        next(p for name, p in model.named_parameters() if name.endswith("fc1.weight")).mul_(2)
        changed = model(x)
        assert not torch.equal(before, changed)
        theirs = plain(lambda: model(x))
    assert_parity(changed, exact(model, x), theirs)


def test_accelerated_within_autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = MODELS["accelerated"]().eval()  # strict: all of its blocks
        assert_parity(model(image()), exact(model, image()), plain(lambda: model(image())))


def test_a_whole_forward_follows_autocast():
    model, x = own().eval(), image()
    with torch.no_grad():
        model(x)
        program = model._whole.program
        assert program is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
            assert model._whole.program not in (None, program)
            with torch.autocast("cpu", enabled=False):
                assert model(x).dtype == torch.float32
        with torch.autocast("cpu", torch.float16):
            assert model(x).dtype == torch.float16


@pytest.mark.parametrize("kind", MODELS)
def test_training_with_a_scaler(kind):
    """float16 with scaled losses: gradients in float32, and a loss that falls."""
    model, x = MODELS[kind]().train(), image(4)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu")
    labels, losses = torch.tensor([0, 1, 2, 3]), []
    for _ in range(8):
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


def test_stochastic_depth_draws_what_the_modules_draw():
    model, x = own(drop_path_rate=0.5).train(), image(8)
    outputs = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in (lambda: model(x), lambda: plain(lambda: model(x))):
            torch.manual_seed(5)
            outputs.append(call().float())
    assert (outputs[0] - outputs[1]).abs().max() <= 0.1 * outputs[1].abs().max()


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_outside_and_inside_autocast(gradients):
    model, x = own().eval(), image()
    truth = exact(model, x)

    def inside(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
            with torch.autocast("cpu", enabled=False):
                return low, model(x)

    torch._dynamo.reset()
    with torch.set_grad_enabled(gradients):
        with torch.autocast("cpu", torch.bfloat16):
            theirs = plain(lambda: model(x)).detach()
            outside = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        low, full = torch.compile(inside, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    assert full.dtype == torch.float32
    for output in (outside, low):
        assert_parity(output.detach(), truth, theirs)
    if gradients:
        (outside.float().sum() + low.float().sum() + full.sum()).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_exported_under_autocast():
    model, x = own().eval(), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(model, (x,))
        ours = model(x)
    assert "pvt_fast.mixed_mlp" in str(program.graph)
    with torch.no_grad():
        given = program.module()(x)
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given, ours, rtol=0.05, atol=0.05)
