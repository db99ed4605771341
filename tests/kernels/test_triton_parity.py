"""Parity of the kernels where `testing.CASES` is too large for the interpreter: every published width on a small map,
every number of keys and size of head that takes another way, the tails of every mask; each as part of a batch that
leaves processors idle and of one that does not. The op cases themselves run in test_ops.py."""

import pytest
import torch

from pvt_fast.kernels import BACKEND, launch
from pvt_fast.kernels.chip import Chip
from pvt_fast.kernels.mlp.forward import hidden_bound
from pvt_fast.ops import Linear, Norm
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase, assert_parity, expected, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (32, 64, 128, 160, 256, 320, 512, 50)

# With one processor ("busy") every grid is large enough, with 132 ("idle") none of these is: sums are divided then.
# "small" is a chip whose matrix units do not read shared memory: normalised rows are not held.
FORMS = ((FP32, "idle"), (BF16, "busy"), (FP16, "small"))


def heads(channels: int) -> int:
    return channels // 64 if channels % 64 == 0 else channels // 32 if channels % 32 == 0 else 1


PATCH_EMBEDS = (
    *(PatchEmbedCase(1, (5, 4), 24, channels, layout="nhwc") for channels in WIDTHS),
    PatchEmbedCase(1, (9, 12), 3, 32, kernel=7, stride=4),
    PatchEmbedCase(1, (3, 3), 320, 512, layout="nhwc"),
    PatchEmbedCase(2, (2, 3), 17, 130, layout="sliced"),
    PatchEmbedCase(1, (1, 1), 64, 160),
    PatchEmbedCase(0, (4, 4), 64, 160),
)
ATTENTIONS = (
    *(AttentionCase(1, (4, 2), channels, heads(channels), sr_ratio=2) for channels in WIDTHS),
    *(AttentionCase(1, (3, 5), channels, heads(channels), linear=True) for channels in WIDTHS),
    *(AttentionCase(2, (2, 3), channels, heads(channels), scale_residual=True) for channels in (64, 160, 512, 50)),
    AttentionCase(1, (8, 8), 64, 1, sr_ratio=8),
    AttentionCase(1, (4, 8), 128, 2, sr_ratio=4),
    AttentionCase(2, (9, 7), 36, 2, sr_ratio=3),
    AttentionCase(1, (1, 3), 136, 2, bias=False),
    AttentionCase(2, (2, 2), 160, 5, sr_ratio=2, scale_residual=True, layout="sliced"),
    AttentionCase(0, (2, 2), 160, 5, sr_ratio=2),
)
# Maps, whose tokens are the keys too, and sizes of head; rows of one head take the kernel of whole rows.
KEYS = (
    *((hw, size) for hw in ((1, 1), (7, 1), (7, 7), (5, 10)) for size in (32, 64, 20)),
    ((16, 16), 64),
    ((32, 32), 32),
)
WIDE_KEYS = (((1, 1), 32), ((7, 1), 64), ((7, 7), 20), ((5, 10), 64), ((10, 26), 32))
MLPS = (
    *(MlpCase(1, (3, 5), channels, 96) for channels in WIDTHS),
    *(MlpCase(2, (2, 2), channels, 64, relu=True, scale_residual=True) for channels in WIDTHS),
    *(MlpCase(1, hw, 32, 40) for hw in ((1, 1), (1, 9), (9, 1), (4, 4), (6, 35))),
    MlpCase(2, (6, 1), 20, 17, layout="sliced"),
    MlpCase(1, (1, 9), 130, 33),
    MlpCase(0, (4, 4), 160, 64),
)


# Of a width that is no multiple of anything, every form is tested.
IN_EVERY_FORM = (50,)


def parity_rows():
    """Each case in one form, the forms in turn; of some widths in all, and of narrow ones also on the other chip."""
    for index, case in enumerate((*PATCH_EMBEDS, *ATTENTIONS, *MLPS)):
        more = ((BF16, "idle"), (FP16, "busy")) if case.channels < 160 else ()
        for place, (dtype, chip_name) in enumerate((*FORMS, *more)):
            covers = place == index % len(FORMS) or (place < len(FORMS) and case.channels in IN_EVERY_FORM)
            yield pytest.param(case, dtype, chip_name, marks=[] if covers else pytest.mark.full)


def by_keys_rows(keys):
    """Each number of keys in one form, the forms in turn."""
    for index, (hw, head_dim) in enumerate(keys):
        for place, (dtype, chip_name) in enumerate(FORMS):
            marks = [] if place == index % len(FORMS) else pytest.mark.full
            yield pytest.param(hw, head_dim, dtype, chip_name, marks=marks)


def chip(name: str) -> Chip:
    """What the kernels are to take for the device's."""
    device = launch.chip_of(torch.device(DEVICE))
    return {
        "idle": device,
        "busy": device._replace(processors=1),
        "small": device._replace(shared=min(device.shared, 99 * 1024)),
    }[name]


def check(case, dtype, chip_name="idle"):
    arguments = case.make(dtype, DEVICE)
    with launch.recorded(chip(chip_name)):
        actual = run(BACKEND, case, arguments)
    assert_parity(actual, *expected(case, arguments), what=str(case))


@pytest.mark.parametrize(("op_case", "op_dtype", "chip_name"), list(parity_rows()), ids=str)
def test_parity(op_case, op_dtype, chip_name):
    check(op_case, op_dtype, chip_name)


@pytest.mark.parametrize(("hw", "head_dim", "op_dtype", "chip_name"), list(by_keys_rows(KEYS)), ids=str)
def test_parity_by_keys(hw, head_dim, op_dtype, chip_name):
    check(AttentionCase(1, hw, head_dim, 1), op_dtype, chip_name)


@pytest.mark.parametrize(("hw", "head_dim", "op_dtype", "chip_name"), list(by_keys_rows(WIDE_KEYS)), ids=str)
def test_parity_by_keys_of_wide_rows(hw, head_dim, op_dtype, chip_name):
    heads = -(-160 // head_dim)
    check(AttentionCase(1, hw, head_dim * heads, heads), op_dtype, chip_name)


@pytest.mark.parametrize("op_dtype", [FP32, BF16, FP16], ids=str)
def test_layer_norm_of_a_mean_far_above_the_spread(op_dtype):
    x = (torch.randn(3, 5, 70, dtype=torch.float64) + 100).to(op_dtype)
    norm = Norm(torch.randn(70).to(op_dtype), torch.randn(70).to(op_dtype), 1e-6)
    actual = BACKEND.layer_norm(x.to(DEVICE), Norm(norm.weight.to(DEVICE), norm.bias.to(DEVICE), norm.eps))
    truth = torch.nn.functional.layer_norm(x.double(), (70,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert_parity(actual, truth, torch.nn.functional.layer_norm(x, (70,), norm.weight, norm.bias, norm.eps))


def test_a_border_written_by_an_earlier_call_does_not_leak():
    """The same memory, first as the hidden map of one shape and then of another."""
    for case in (MlpCase(1, (4, 4), 16, 32), MlpCase(1, (2, 8), 16, 32), MlpCase(4, (1, 1), 16, 32)):
        check(case, FP32)


def scaled(case: MlpCase, **factors: float):
    """The case's arguments in bf16, some layers' weights (and biases) multiplied."""
    x, hw, w, spec, scale = case.make(BF16, DEVICE)
    layers: dict[str, Norm | Linear] = {}
    for name, factor in factors.items():
        layer = getattr(w, name)
        if isinstance(layer, Norm):
            layers[name] = Norm(layer.weight * factor, layer.bias * factor, layer.eps)
        else:
            layers[name] = Linear(layer.weight * factor, layer.bias * factor)
    return x, hw, w._replace(**layers), spec, scale


@pytest.mark.parametrize(
    ("factors", "half"),
    [
        ({}, True),
        ({"fc1": 300.0}, True),
        ({"fc1": 3e5}, False),
        ({"norm": 3e5}, False),
        ({"fc1": 100.0, "dwconv": 1e4}, False),
        ({"dwconv": 1e-5, "fc1": 1e4}, False),
        ({"fc2": 1e5}, False),
        ({"fc2": 1e-6}, False),
    ],
    ids=str,
)
def test_the_hidden_map_is_fp16_only_where_the_weights_prove_that_it_fits(factors, half):
    case = MlpCase(1, (5, 6), 32, 64)
    arguments = scaled(case, **factors)
    with launch.recorded() as launches:
        actual = run(BACKEND, case, arguments)
    (hidden,) = {dict(zip(item.kernel.arg_names, item.args, strict=False))["hidden_ptr"].dtype for item in launches}
    assert hidden == (FP16 if half else BF16)
    assert_parity(actual, *expected(case, arguments), what=str(factors))


def test_the_proof_bounds_the_hidden_map():
    """No input exceeds what `_fits_half` reckons with: not the one that aligns a row of fc1, nor a random one."""
    case = MlpCase(1, (1, 64), 24, 48)
    _, _, w, *_ = case.make(FP32)
    centred = w.fc1.weight * w.norm.weight
    tokens = torch.cat([centred - centred.mean(1, keepdim=True), torch.randn(200, 24)])
    normed = torch.nn.functional.layer_norm(tokens, (24,), w.norm.weight, w.norm.bias, w.norm.eps)
    largest = torch.nn.functional.linear(normed, w.fc1.weight, w.fc1.bias).abs().amax(0)
    bound = hidden_bound(w)
    assert (largest <= bound * (1 + 1e-6)).all()
    assert (largest > 0.3 * bound).any(), "the bound is not idle"
