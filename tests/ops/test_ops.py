"""The ops of the contract on every backend: parity, and what holds whatever the values are."""

import inspect
import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvt_fast import testing
from pvt_fast.backend import registered
from pvt_fast.ops import AttentionSpec, Linear, MlpSpec, MlpWeights, Norm, map_tensors, reference, tensors_in
from pvt_fast.testing import AttentionCase, Case, MlpCase, PatchEmbedCase, assert_parity, expected, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CONTRACT = ("patch_embed", "attention", "mlp", "layer_norm", "head")


def make(case: Case, target, dtype: torch.dtype) -> tuple:
    return _make(case, dtype, target.device)


# every target asks for the same arguments (no op may change them: tested below) and the same truth
_make = lru_cache(maxsize=8)(lambda case, dtype, device: case.make(dtype, device))


@lru_cache(maxsize=256)
def truth_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return expected(case, case.make(dtype))


def check_parity(case: Case, target, arguments: tuple) -> None:
    with target.in_use():
        actual = run(target.ops, case, arguments)
    assert_parity(actual, *expected(case, arguments), what=f"{case} on {target}")


# -- the specification itself ----------------------------------------------------------------------------------------


def formula(case: Case, arguments: tuple) -> Tensor:
    """The op written out index by index, sharing no operator but the matrix product with the reference."""
    if isinstance(case, PatchEmbedCase):
        image, w, stride = arguments
        return normalise(convolve(image, w.proj, stride, w.proj.weight.shape[2] // 2).flatten(2).mT, w.norm)
    if isinstance(case, AttentionCase):
        return attention_formula(*arguments)
    x, (height, width), w, spec, scale = arguments
    hidden = normalise(x, w.norm) @ w.fc1.weight.T + w.fc1.bias
    hidden = hidden.clamp(min=0) if spec.relu else hidden
    padded = F.pad(hidden.mT.unflatten(2, (height, width)), (1, 1, 1, 1))
    hidden = w.dwconv.bias.view(-1, 1, 1) + sum(
        padded[:, :, i : i + height, j : j + width] * w.dwconv.weight[:, 0, i, j].view(-1, 1, 1)
        for i in range(3)
        for j in range(3)
    )
    z = gelu(hidden.flatten(2).mT) @ w.fc2.weight.T + w.fc2.bias
    return x + z * (1 if scale is None else scale[:, None, None])


def attention_formula(x, hw, w, spec, scale) -> Tensor:
    y = normalise(x, w.norm)
    reduced = y
    if w.sr is not None:
        grid = y.mT.unflatten(2, hw)
        if spec.linear:
            rows, columns = ([(i * side // 7, -(-(i + 1) * side // 7)) for i in range(7)] for side in hw)
            bins = [[grid[:, :, r0:r1, c0:c1].mean(dim=(2, 3)) for c0, c1 in columns] for r0, r1 in rows]
            grid = torch.stack([torch.stack(row, -1) for row in bins], -2)
        reduced = normalise(convolve(grid, w.sr, w.sr.weight.shape[2], 0).flatten(2).mT, w.sr_norm)
        reduced = gelu(reduced) if spec.linear else reduced
    q, kv = (t @ layer.weight.T + (0 if layer.bias is None else layer.bias) for t, layer in ((y, w.q), (reduced, w.kv)))
    width, channels = x.shape[2] // spec.num_heads, x.shape[2]
    heads = []
    for head in range(spec.num_heads):
        at = slice(head * width, (head + 1) * width)
        scores = spec.scale * q[:, :, at] @ kv[:, :, :channels][:, :, at].mT
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ kv[:, :, channels:][:, :, at])
    z = torch.cat(heads, -1) @ w.proj.weight.T + w.proj.bias
    return x + z * (1 if scale is None else scale[:, None, None])


def convolve(image: Tensor, layer: Linear, stride: int, padding: int) -> Tensor:
    kernel = layer.weight.shape[2]
    image = F.pad(image, (padding,) * 4)
    height, width = ((side - kernel) // stride + 1 for side in image.shape[2:])
    out = layer.bias.view(-1, 1, 1)
    for i in range(kernel):
        for j in range(kernel):
            taps = image[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            out = out + torch.einsum("bihw,oi->bohw", taps[:, :, :height, :width], layer.weight[:, :, i, j])
    return out


def normalise(x: Tensor, norm: Norm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_the_reference_is_the_formula(case):
    arguments = case.make(torch.float64)
    torch.testing.assert_close(run(reference, case, arguments), formula(case, arguments), rtol=1e-11, atol=1e-11)


def test_reference_layer_norm_and_head_are_the_formula():
    x, norm = torch.randn(2, 5, 12, dtype=torch.float64), Norm(torch.randn(12).double(), torch.randn(12).double(), 1e-3)
    torch.testing.assert_close(reference.layer_norm(x, norm), normalise(x, norm), rtol=1e-12, atol=1e-12)
    weight, bias = torch.randn(7, 12).double(), torch.randn(7).double()
    pooled = x.sum(1) / 5
    torch.testing.assert_close(reference.head(x, None), pooled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        reference.head(x, Linear(weight, bias)), pooled @ weight.T + bias, rtol=1e-12, atol=1e-12
    )


# -- parity ----------------------------------------------------------------------------------------------------------


def test_parity(case, target, dtype):
    with target.in_use():
        actual = run(target.ops, case, make(case, target, dtype))
    assert_parity(actual, *truth_of(case, dtype), what=f"{case} on {target}")


@pytest.mark.parametrize("shape", [(2, 49, 64), (1, 1, 24), (3, 17, 33), (0, 4, 16), (1, 196, 320)], ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "head", "head without classifier"])
def test_parity_of_the_small_ops(op, shape, target, dtype):
    draw = testing.Draw(f"{op}{shape}", dtype, target.device)
    x = draw.normal(*shape, mean=0.5)
    channels = shape[2]
    weights = {"layer_norm": draw.norm(channels, 1e-6), "head": draw.linear(19, channels)}.get(op)
    call = op.partition(" ")[0]
    with target.in_use():
        actual = getattr(target.ops, call)(x, weights)
    cpu = map_tensors((x, weights), lambda t: t.cpu())
    truth = getattr(reference, call)(*map_tensors(cpu, lambda t: t.double()))
    assert_parity(actual, truth, getattr(reference, call)(*cpu))


HOSTILE = {
    "large mean": lambda x: x + 100,
    "tiny": lambda x: x * 1e-3,
    "large": lambda x: x * 1e3,
    "constant": lambda x: torch.full_like(x, 3),
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("values", HOSTILE)
@pytest.mark.parametrize(
    "small",
    [
        PatchEmbedCase(1, (9, 10), 3, 24, kernel=7, stride=4),
        AttentionCase(1, (6, 6), 32, 2, sr_ratio=2),
        AttentionCase(1, (6, 6), 32, 2, linear=True),
        MlpCase(1, (6, 6), 32, 64, relu=True),
    ],
    ids=str,
)
def test_parity_on_hostile_values(small, values, target, dtype):
    x, *rest = make(small, target, dtype)
    check_parity(small, target, (HOSTILE[values](x), *rest))


@pytest.mark.not_interpreted
def test_gelu_on_a_grid(target, dtype):
    """A block whose hidden map is a grid of values and whose last linear is the identity: GELU's own error."""
    grid = torch.cat([torch.linspace(-9, 9, 1021), torch.tensor([1e-6, -1e-6, 0.0])]).to(dtype)
    count = len(grid)
    delta = torch.zeros(count, 1, 3, 3, dtype=dtype)
    delta[:, 0, 1, 1] = 1
    identity, nothing = torch.eye(count, dtype=dtype), torch.zeros(count, dtype=dtype)
    norm = Norm(nothing, grid, 1e-6)  # whatever the row, the grid
    w = MlpWeights(norm, Linear(identity, nothing), Linear(delta, nothing), Linear(identity, nothing))
    arguments = (torch.zeros(1, 1, count, dtype=dtype), (1, 1), w, MlpSpec(relu=False))
    with target.in_use():
        actual = target.ops.mlp(*map_tensors(arguments, lambda t: t.to(target.device)))
    exact = F.gelu(grid.double()).reshape(1, 1, -1)
    assert_parity(actual, exact, F.gelu(grid).reshape(1, 1, -1), what=f"GELU on {target}")


# -- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CONTRACT)
def test_signatures_are_those_of_the_contract(op, target):
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(getattr(target.ops, op)) == parameters(getattr(reference, op))
    assert parameters(getattr(registered.RegisteredOps, op))[1:] == parameters(getattr(reference, op))  # after self


def test_arguments_are_never_modified(case, target, dtype):
    arguments = make(case, target, dtype)
    tensors = tensors_in(arguments)
    before = [tensor.clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    with target.in_use():
        output = run(target.ops, case, arguments)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
    assert [tensor._version for tensor in tensors] == versions
    assert output.data_ptr() == 0 or all(
        output.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() for tensor in tensors
    )


@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    "small",
    [
        PatchEmbedCase(2, (9, 10), 3, 24, kernel=7, stride=4, layout="sliced"),
        AttentionCase(2, (6, 5), 32, 2, sr_ratio=2, layout="sliced"),
        AttentionCase(2, (6, 5), 32, 2, linear=True, layout="sliced"),
        MlpCase(2, (6, 5), 32, 64, layout="sliced"),
    ],
    ids=str,
)
def test_strides_do_not_matter(small, target, dtype):
    """Bitwise the same from a view with gaps, an expanded batch and a compact copy."""
    arguments = make(small, target, dtype)
    assert not arguments[0].is_contiguous()
    compact = map_tensors(arguments, lambda tensor: tensor.contiguous())
    expanded = (compact[0][:1].expand_as(compact[0]), *compact[1:])
    repeated = (compact[0][:1].repeat(2, *[1] * (compact[0].dim() - 1)), *compact[1:])
    with target.in_use():
        outputs = [run(target.ops, small, each) for each in (arguments, compact, expanded, repeated)]
    if target.backend == "reference":  # plain torch may take another algorithm for another layout
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(outputs[2], outputs[3])
    else:
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3])


def test_weights_with_strides(target, dtype):
    """Weights may be views: a transposed matrix, channels-last convolutions, every second row."""
    case = MlpCase(1, (4, 5), 16, 24)
    x, hw, w, spec, _ = make(case, target, dtype)
    wide = torch.zeros(24, 32, dtype=dtype, device=target.device)
    wide[:, ::2] = w.fc1.weight
    strided = w._replace(
        fc1=Linear(wide[:, ::2], w.fc1.bias),
        fc2=Linear(w.fc2.weight.T.contiguous().T, w.fc2.bias),
        dwconv=Linear(w.dwconv.weight.to(memory_format=torch.channels_last), w.dwconv.bias),
    )
    check_parity(case, target, (x, hw, strided, spec, None))
    attention = AttentionCase(1, (6, 5), 16, 2, sr_ratio=2)
    x, hw, w, spec, _ = make(attention, target, dtype)
    strided = w._replace(sr=Linear(w.sr.weight.to(memory_format=torch.channels_last), w.sr.bias))
    check_parity(attention, target, (x, hw, strided, spec, None))


EMBED = PatchEmbedCase(1, (8, 8), 3, 16)
ATTENTION = AttentionCase(2, (4, 4), 16, 2, sr_ratio=2)
LINEAR = AttentionCase(2, (4, 4), 16, 2, linear=True)
MLP = MlpCase(2, (4, 4), 16, 32)

REFUSED = {
    "image rank": (EMBED, lambda x, w, s: (x[0], w, s), ValueError,
        "patch_embed: image must have shape (B, Cin, H, W), got (3, 8, 8)"),
    "image channels": (EMBED, lambda x, w, s: (x[:, :2], w, s), ValueError,
        "patch_embed: image must have 3 channels, got 2"),
    "image dtype": (EMBED, lambda x, w, s: (x.half(), w, s), TypeError,
        "patch_embed: image must have the weights' dtype torch.float32, got torch.float16"),
    "image size": (EMBED, lambda x, w, s: (x[:, :, :0], w, s), ValueError,
        "patch_embed: image must give at least one token with a 3x3 kernel of stride 2, got 0x8"),
    "token rank": (ATTENTION, lambda x, *a: (x[0], *a), ValueError,
        "attention: x must have shape (B, N, C), got (16, 16)"),
    "token count": (ATTENTION, lambda x, hw, *a: (x, (4, 5), *a), ValueError,
        "attention: x must have H * W = 4 * 5 tokens, got 16"),
    "token channels": (ATTENTION, lambda x, *a: (x[:, :, :8], *a), ValueError,
        "attention: x must have 16 channels, got 8"),
    "token dtype": (ATTENTION, lambda x, *a: (x.double(), *a), TypeError,
        "attention: x must have the weights' dtype torch.float32, got torch.float64"),
    "heads": (ATTENTION, lambda x, hw, w, spec, r: (x, hw, w, spec._replace(num_heads=3), r), ValueError,
        "attention: channels must be divisible by num_heads = 3, got 16"),
    "map below sr": (ATTENTION, lambda x, hw, *a: (x, (1, 16), *a), ValueError,
        "attention: hw must be at least sr_ratio = 2 each way, got (1, 16)"),
    "linear without sr": (LINEAR, lambda x, hw, w, *a: (x, hw, w._replace(sr=None), *a), ValueError,
        "attention: w.sr must be a 1x1 convolution in the linear form, got None"),
    "attention residual": (ATTENTION, lambda x, hw, w, spec, r: (x, hw, w, spec, torch.ones(3)), ValueError,
        "attention: residual_scale must have shape (B,) = (2,), got (3,)"),
    "mlp count": (MLP, lambda x, hw, *a: (x, (2, 4), *a), ValueError,
        "mlp: x must have H * W = 2 * 4 tokens, got 16"),
    "mlp channels": (MLP, lambda x, *a: (x[:, :, :8], *a), ValueError,
        "mlp: x must have 16 channels, got 8"),
    "mlp dtype": (MLP, lambda x, *a: (x.half(), *a), TypeError,
        "mlp: x must have the weights' dtype torch.float32, got torch.float16"),
    "mlp residual": (MLP, lambda x, hw, w, spec, r: (x, hw, w, spec, torch.ones(2, 1)), ValueError,
        "mlp: residual_scale must have shape (B,) = (2,), got (2, 1)"),
    "device": (MLP, lambda x, *a: (x.to("meta"), *a), ValueError,
        "mlp: x must be on the weights' device "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_sentence(name, target):
    valid, spoil, error, message = REFUSED[name]
    arguments = spoil(*make(valid, target, torch.float32))
    with target.in_use(), pytest.raises(error) as caught:
        getattr(target.ops, valid.op)(*arguments)
    assert str(caught.value).startswith(message)


def test_an_empty_batch_is_not_an_excuse(target, dtype):
    """Arguments are checked, and shapes right, also when there is nothing to compute."""
    with target.in_use():
        x, hw, w, spec, _ = make(MlpCase(0, (4, 4), 16, 32), target, dtype)
        assert target.ops.mlp(x, hw, w, spec).shape == (0, 16, 16)
        with pytest.raises(ValueError, match="tokens"):
            target.ops.mlp(x, (3, 4), w, spec)
        image, w, stride = make(PatchEmbedCase(0, (9, 8), 3, 16), target, dtype)
        tokens, hw = target.ops.patch_embed(image, w, stride)
        assert (tokens.shape, tuple(hw)) == ((0, 20, 16), (5, 4))


# -- order of summation ----------------------------------------------------------------------------------------------

REPEATABLE = [
    PatchEmbedCase(3, (37, 29), 3, 24, kernel=7, stride=4),
    PatchEmbedCase(3, (13, 9), 20, 40),
    AttentionCase(3, (14, 11), 32, 2, sr_ratio=2, scale_residual=True),
    AttentionCase(3, (11, 9), 48, 3, linear=True),
    MlpCase(3, (14, 11), 40, 90, relu=True),
]


def fused(target) -> bool:
    return target.backend != "reference"


@pytest.mark.not_interpreted
@pytest.mark.parametrize("several", REPEATABLE, ids=str)
def test_runs_repeat_bitwise(several, target, dtype):
    arguments = make(several, target, dtype)
    with target.in_use():
        first, second = (run(target.ops, several, arguments) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("several", REPEATABLE, ids=str)
def test_a_sample_does_not_depend_on_its_batch(several, target, dtype):
    """Bitwise, on fused backends; plain torch chooses its algorithms by batch size."""
    x, *rest = make(several, target, dtype)
    rest = [None if isinstance(item, Tensor) else item for item in rest]
    with target.in_use():
        together = run(target.ops, several, (x, *rest))
        alone = torch.cat([run(target.ops, several, (x[i : i + 1], *rest)) for i in range(len(x))])
        shuffled = run(target.ops, several, (x[[2, 0, 1]], *rest))
    if fused(target):
        assert torch.equal(together, alone)
        assert torch.equal(together[[2, 0, 1]], shuffled)
    else:
        tolerance = 8 * torch.finfo(dtype).eps * float(together.abs().max())
        torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
        torch.testing.assert_close(together[[2, 0, 1]], shuffled, rtol=0, atol=tolerance)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("several", REPEATABLE, ids=str)
def test_the_number_of_threads_does_not_matter(several, target, dtype):
    arguments = make(several, target, dtype)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with target.in_use():
                outputs.append(run(target.ops, several, arguments))
    finally:
        torch.set_num_threads(threads)
    if fused(target):
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
    else:
        for other in outputs[1:]:
            assert_parity(other, expected(several, arguments)[0], outputs[0])


# -- the tools of these tests ----------------------------------------------------------------------------------------


def test_poisoned_memory_reaches_the_package_only():
    allocate = "import torch\nmade = [torch.empty(2), torch.empty_like(torch.zeros(2)), torch.zeros(1).new_empty(2)]"
    inside, outside = {"__name__": "pvt_fast.somewhere"}, {"__name__": "elsewhere"}
    exec(allocate, inside)
    assert all(tensor.isnan().all() for tensor in inside["made"])
    with torch.no_grad():
        torch.zeros(2)
    exec("import torch\nmade = torch.empty(2, dtype=torch.int64)", inside)
    assert inside["made"].dtype == torch.int64
    exec("import torch\nmade = torch.empty(0)", outside)
    assert outside["made"].shape == (0,)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y + 1e-3, "largest error"),
        (lambda y: y[:, :-1], "shape"),
        (lambda y: y.double(), "dtype"),
        (lambda y: torch.where(y == y.max(), torch.nan, y), "NaN"),
    ],
    ids=["shifted", "cut", "dtype", "nan"],
)
def test_parity_notices(spoil, message):
    arguments = MLP.make(torch.float32)
    truth, same_dtype = expected(MLP, arguments)
    assert_parity(same_dtype, truth, same_dtype)
    with pytest.raises(AssertionError, match=message):
        assert_parity(spoil(same_dtype), truth, same_dtype)


def test_specs_are_without_dropout_unless_said():
    assert AttentionSpec._field_defaults == {"attn_drop": 0.0, "proj_drop": 0.0}
    assert MlpSpec._field_defaults == {"drop": 0.0}
