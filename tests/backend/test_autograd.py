"""Gradients on every backend: equal to the reference's, never silently missing."""

import copy
from dataclasses import replace

import pytest
import torch
from op_gradients import assert_gradients, gradients, redrawn
from torch import Tensor

import pvt_fast
from pvt_fast import PVT_V2
from pvt_fast import model as model_module
from pvt_fast.backend import registered as library
from pvt_fast.ops import map_tensors, reference
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase, assert_parity, run

# the backward is the reference's, whatever the instruction set
pytestmark = [pytest.mark.one_isa, pytest.mark.usefixtures("poisoned_memory")]

SMALL = [
    PatchEmbedCase(2, (9, 10), 3, 16, kernel=7, stride=4),
    PatchEmbedCase(1, (5, 7), 8, 12, layout="nhwc"),
    AttentionCase(2, (6, 5), 16, 2, sr_ratio=2, scale_residual=True),
    AttentionCase(1, (5, 4), 24, 2, linear=True),
    AttentionCase(2, (3, 4), 16, 1, bias=False, layout="sliced"),
    MlpCase(2, (6, 5), 16, 40, scale_residual=True),
    MlpCase(1, (5, 4), 24, 48, relu=True),
]


def leaves_of(arguments: tuple) -> tuple[tuple, list[Tensor]]:
    """The arguments with every tensor a leaf that wants a gradient, and those leaves."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    return map_tensors(arguments, leaf), leaves


@pytest.mark.parametrize("small", SMALL, ids=str)
def test_gradients_of_every_argument(small, target, dtype):
    """Weights, biases, norms, residual_scale and the input: each within the parity rule."""
    arguments = small.make(dtype, target.device)

    def call(ops, given: tuple) -> Tensor:
        return run(ops, small, given)

    def ours(drawn: tuple) -> list[Tensor]:
        with target.in_use():
            return gradients(call, library.registered(target.backend), drawn)

    drawn = [redrawn(arguments, seed) for seed in range(1 if target.interpreted else 8)]
    assert_gradients(ours, call, drawn, lambda given: gradients(call, reference, given))


@pytest.mark.parametrize("small", SMALL, ids=str)
def test_the_reference_passes_gradcheck(small):
    arguments, leaves = leaves_of(small.make(torch.float64))

    def op(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return run(reference, small, map_tensors(arguments, lambda _: next(rest)))

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("frozen", range(2, 6))
def test_only_the_gradients_asked_for(frozen, target):
    """Freezing some arguments neither detaches nor changes the gradients of the others."""
    case = replace(SMALL[2], scale_residual=False)  # the gradient of that is the reference's, and with it all others
    arguments, leaves = leaves_of(case.make(torch.float32, target.device))
    ops = library.registered(target.backend)
    with target.in_use():
        run(ops, case, arguments).sum().backward()
        every = [leaf.grad for leaf in leaves]
        for index, leaf in enumerate(leaves):
            leaf.grad = None
            leaf.requires_grad_(index % frozen == 0)
        run(ops, case, arguments).sum().backward()
    for index, (leaf, grad) in enumerate(zip(leaves, every, strict=True)):
        assert (leaf.grad is not None) == (index % frozen == 0)
        assert leaf.grad is None or torch.equal(leaf.grad, grad)


def test_no_gradient_is_recorded_where_none_is_wanted(target):
    case = SMALL[5]
    with target.in_use():
        output = run(library.registered(target.backend), case, case.make(torch.float32, target.device))
        assert not output.requires_grad


def test_the_reference_needs_no_wrapper():
    assert library.registered("reference") is reference.BACKEND


# -- the model -------------------------------------------------------------------------------------------------------


def tiny(linear: bool = False, **arguments) -> PVT_V2:
    torch.manual_seed(7)
    settings = {
        "img_size": 32,
        "embed_dims": (8, 16, 24),
        "num_heads": (1, 2, 2),
        "mlp_ratios": (2, 2, 2),
        "depths": (1, 1, 1),
        "sr_ratios": (4, 2, 1),
        "num_stages": 3,
        "num_classes": 4,
        "qkv_bias": True,
    }
    model = PVT_V2(**settings | arguments, linear=linear)
    with torch.no_grad():  # initial biases are zero, which hides mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def model_gradients(model: PVT_V2, image: Tensor) -> dict[str, Tensor]:
    image = image.clone().requires_grad_()
    model.zero_grad()
    output = model(image)
    direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    output.backward(direction.to(output))
    return {"image": image.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_model_gradients(linear, checkpointing, target):
    model = tiny(linear).to(target.device)
    image = torch.randn(2, 3, 33, 40, device=target.device)
    truth = model_gradients(copy.deepcopy(model).cpu().double(), image.cpu().double())
    plain = model_gradients(copy.deepcopy(model).cpu(), image.cpu())
    model.backend = target.backend
    model.set_grad_checkpointing(checkpointing)
    with target.in_use():
        ours = model_gradients(model, image)
    assert list(ours) == list(truth)
    assert None not in ours.values(), [name for name in ours if ours[name] is None]
    # each gradient in units of its own largest value, so that small ones count as much as large ones
    sizes = {name: float(grad.abs().max()) for name, grad in truth.items()}
    assert min(sizes.values()) > 0
    trio = (torch.cat([grads[name].cpu().flatten() / sizes[name] for name in sizes]) for grads in (ours, truth, plain))
    assert_parity(*trio, what="gradients")
    for name in truth:
        like = image if name == "image" else model.get_parameter(name)
        assert ours[name].stride() == like.stride(), f"{name}: gradient strides {ours[name].stride()}"


def test_checkpointing_recomputes_blocks_and_not_without_gradients(add_backend, monkeypatch):
    calls = []
    counting = replace(reference.BACKEND, mlp=lambda *arguments: calls.append(1) or reference.mlp(*arguments))
    add_backend(counting)
    monkeypatch.setattr(reference, "BACKEND", counting)
    model, image = tiny(), torch.randn(1, 3, 32, 32)
    for enable, forward, backward in ((False, 3, 0), (True, 3, 3)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        loss = model(image).sum()
        assert len(calls) == forward
        loss.backward()
        assert len(calls) == forward + backward
    calls.clear()
    with torch.no_grad():
        model(image)
    assert len(calls) == 3


def test_checkpointing_that_saves_little_says_so(caplog):
    model_module.log_little_to_save.cache_clear()
    with caplog.at_level("INFO", "pvt_fast"):
        model = tiny()
        model.backend = "reference"
        model.set_grad_checkpointing()
        assert not caplog.messages
        model.backend = "cpp"
        model.set_grad_checkpointing(False)
        model.set_grad_checkpointing()
        model.set_grad_checkpointing()
    assert len(caplog.messages) == 1
    assert "saves one map of two in each block on backend 'cpp'" in caplog.messages[0]


@pytest.mark.not_interpreted
def test_stochastic_depth_scales_gradients(target):
    """The same draw of samples to drop gives the same gradients on every backend; dropped branches get none."""
    model = tiny(drop_path_rate=0.6).to(target.device).train()
    image = torch.randn(3, 3, 32, 32, device=target.device)
    collected = []
    for backend in ("reference", target.backend):
        model.backend = backend
        torch.manual_seed(3)
        with target.in_use():
            collected.append(model_gradients(model, image))
    for name, expected in collected[0].items():
        torch.testing.assert_close(collected[1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.not_interpreted
def test_frozen_backbone(target):
    model = tiny().to(target.device)
    model.backend = target.backend
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    with target.in_use():
        model(torch.randn(2, 3, 32, 32, device=target.device)).sum().backward()
    with_grad = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_grad == ["head.weight", "head.bias"]
    assert float(model.head.weight.grad.abs().max()) > 0


@pytest.mark.not_interpreted
def test_outputs_are_never_detached(target):
    """Gradients flow to the image of a frozen model, through every way of calling it."""
    model = tiny().to(target.device).requires_grad_(False).eval()
    model.backend = target.backend
    image = torch.randn(1, 3, 32, 32, device=target.device, requires_grad=True)
    with target.in_use():
        final, maps = model.forward_intermediates(image)
        outputs = [model(image), model.forward_features(image), final, *maps]
        for output in outputs:
            (grad,) = torch.autograd.grad(output.sum(), image, retain_graph=True)
            assert float(grad.abs().max()) > 0
        features = torch.randn(1, 24, 2, 2, device=target.device, requires_grad=True)
        (grad,) = torch.autograd.grad(model.forward_head(features).sum(), features)
        assert float(grad.abs().max()) > 0
        with torch.no_grad():
            assert not model(image).requires_grad
        assert not model(image.detach()).requires_grad


@pytest.mark.not_interpreted
def test_accumulated_gradients_add_up(target):
    model = tiny().to(target.device)
    model.backend = target.backend
    image = torch.randn(2, 3, 32, 32, device=target.device)
    with target.in_use():
        model(image).sum().backward()
        once = [parameter.grad.clone() for parameter in model.parameters()]
        model(image).sum().backward()
    for parameter, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_lowers_the_loss(dropout, target):
    """Stripes across or along, told apart in a few steps; with dropout the reference is what can train."""
    model = tiny(drop_rate=dropout, attn_drop_rate=dropout, in_channels=1, num_classes=2).to(target.device).train()
    if dropout and target.backend != "reference":
        model.backend = target.backend
        with pytest.raises(pvt_fast.BackendUnavailable, match="drop"), target.in_use():
            model(torch.zeros(1, 1, 32, 32, device=target.device))
        return
    model.backend = target.backend
    stripes = torch.tensor([0.0, 1.0]).repeat_interleave(4).repeat(4).expand(32, 32)
    image = torch.stack([stripes, stripes.T] * 2)[:, None] + 0.1 * torch.randn(4, 1, 32, 32)
    labels = torch.tensor([0, 1, 0, 1], device=target.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with target.in_use():
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(image.to(target.device)), labels)
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert losses[-1] < 0.5 * losses[0], losses
