"""The whole model: parity on every backend, every argument, and what users of timm expect."""

import copy
import inspect
import io
import math
import pickle
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor, nn

import pvt_fast
import pvt_fast.ops.reference
from pvt_fast import PVT_V2
from pvt_fast.images.pixels import IMAGENET_MEAN, IMAGENET_STD
from pvt_fast.layers import Block
from pvt_fast.testing import assert_parity

TINY = {
    "img_size": 32,
    "embed_dims": (8, 16, 32, 48),
    "num_heads": (1, 2, 2, 3),
    "mlp_ratios": (2, 2, 2, 1.5),
    "depths": (1, 2, 1, 1),
    "sr_ratios": (4, 2, 1, 1),
    "num_classes": 40,
    "qkv_bias": True,
}


def tiny(**arguments) -> PVT_V2:
    return PVT_V2(**TINY | arguments)


@lru_cache(maxsize=16)
def randomised(kind: str, dtype: torch.dtype) -> PVT_V2:
    """A model whose every parameter is non-trivial, rounded to `dtype`."""
    torch.manual_seed(5)
    models = {
        "sr": lambda: tiny(),
        "linear": lambda: tiny(linear=True, sr_ratios=(1, 1, 1, 1)),
        "odd": lambda: tiny(embed_dims=(10, 15, 21, 33), num_heads=(1, 3, 3, 1), patch_size=8, qkv_bias=False),
        "three": lambda: tiny(
            num_stages=3,
            **{name: TINY[name][:3] for name in ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")},
        ),
        "b0": lambda: pvt_fast.pvt_v2_b0(),
    }
    model = models[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.to(dtype)


def image_of(batch: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(batch + sum(size)))


def check_parity(model: PVT_V2, image: Tensor, target) -> Tensor:
    model = copy.deepcopy(model)
    model.backend = "reference"
    plain = model(image)
    truth = copy.deepcopy(model).double()(image.double())
    fast = copy.deepcopy(model).to(target.device)
    fast.backend = target.backend
    with target.in_use():
        actual = fast(image.to(target.device))
    assert_parity(actual, truth, plain, what=f"logits on {target}")
    return actual


SIZES = [(1, (32, 32)), (3, (33, 58)), (1, (45, 31)), (0, (32, 40)), (2, (64, 37))]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", [pytest.param("sr", marks=pytest.mark.full("triton")), "linear"])
@torch.no_grad()
def test_parity_of_a_small_image(kind, target, dtype):
    check_parity(randomised(kind, dtype), image_of(1, (18, 16)).to(dtype), target)


@pytest.mark.not_interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", ["sr", "linear", "odd", "three"])
@pytest.mark.parametrize(("batch", "size"), SIZES, ids=lambda value: str(value).replace(" ", ""))
@torch.no_grad()
def test_parity(kind, batch, size, target, dtype):
    actual = check_parity(randomised(kind, dtype), image_of(batch, size).to(dtype), target)
    assert actual.shape == (batch, 40)


@pytest.mark.not_interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("size", [(64, 64), (96, 72)], ids=str)
@torch.no_grad()
def test_parity_of_a_published_variant(size, target, dtype):
    # several images: the largest of one image's errors is a single draw of a few correlated roundings
    check_parity(randomised("b0", dtype), image_of(4, size).to(dtype), target)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced"])
@torch.no_grad()
def test_image_strides_do_not_matter(layout, target, dtype):
    image = image_of(2, (32, 40)).to(dtype)
    if layout == "channels_last":
        view = image.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        view = torch.zeros(2, 3, 64, 80, dtype=dtype)[:, :, ::2, ::2].copy_(image)
    else:
        image = image[:1].repeat(2, 1, 1, 1)
        view = image[:1].expand(2, -1, -1, -1)
    assert torch.equal(view, image)
    check_parity(randomised("sr", dtype), view, target)


@pytest.mark.one_isa
@pytest.mark.not_interpreted
@torch.no_grad()
def test_maps_of_every_stage_agree(target):
    model = copy.deepcopy(randomised("linear", torch.float32))
    image = image_of(2, (40, 33))
    for norm in (True, False):
        plain = model.forward_intermediates(image, norm=norm, intermediates_only=True)
        truth = copy.deepcopy(model).double().forward_intermediates(image.double(), norm=norm, intermediates_only=True)
        fast = copy.deepcopy(model).to(target.device)
        fast.backend = target.backend
        with target.in_use():
            ours = fast.forward_intermediates(image.to(target.device), norm=norm, intermediates_only=True)
        for stage, trio in enumerate(zip(ours, truth, plain, strict=True)):
            assert_parity(*trio, what=f"map of stage {stage}, norm={norm}")


# -- construction ----------------------------------------------------------------------------------------------------

SIGNATURE = {
    "img_size": 224,
    "patch_size": 7,
    "in_channels": 3,
    "num_classes": 1000,
    "embed_dims": (64, 128, 256, 512),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratios": (4, 4, 4, 4),
    "qkv_bias": False,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_layer": nn.LayerNorm,
    "depths": (3, 4, 6, 3),
    "sr_ratios": (8, 4, 2, 1),
    "num_stages": 4,
    "linear": False,
}


def test_the_signature_is_the_published_one():
    parameters = inspect.signature(PVT_V2).parameters
    assert list(parameters) == list(SIGNATURE)
    assert {name: parameter.default for name, parameter in parameters.items()} == SIGNATURE
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


COUNTS = {
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "pvt_v2_b2_li": 22_553_512,
    "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072,
    "pvt_v2_b5": 81_956_008,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        created = getattr(pvt_fast, name)()
    assert sum(parameter.numel() for parameter in created.parameters()) == COUNTS[name]
    assert not list(created.buffers())
    block_norm = {module.eps for key, module in created.named_modules() if "block" in key and key.endswith("norm1")}
    inner = {module.eps for key, module in created.named_modules() if key.endswith("attn.norm")}
    assert (block_norm, inner, created.patch_embed2.norm.eps, created.norm4.eps) == ({1e-6}, {1e-5}, 1e-5, 1e-6)


def test_parameter_count_of_the_class_default():
    with torch.device("meta"):
        model = PVT_V2()
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_768_552
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_create_model():
    assert pvt_fast.list_models() == list(COUNTS)
    model = pvt_fast.create_model("pvt_v2_b0", 64, 3, 1, depths=(1, 1, 1, 1), drop_path_rate=0.2)
    assert model.config.img_size == 64
    assert model.head.out_features == 3
    assert model.patch_embed1.proj.in_channels == 1
    assert model.config.depths == (1, 1, 1, 1)
    assert model.block4[0].drop_path.drop_prob == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"create_model: name must be one of pvt_v2_b0, .*; got 'pvt_v2_b9'"):
        pvt_fast.create_model("pvt_v2_b9")
    assert "depths (2, 2, 2, 2)" in pvt_fast.pvt_v2_b0.__doc__
    assert pvt_fast.pvt_v2_b0.__name__ == "pvt_v2_b0"


def test_official_state_dict_keys():
    keys = set(tiny(linear=True).state_dict())
    for key in (
        "patch_embed1.proj.weight",
        "patch_embed4.norm.bias",
        "block1.0.norm1.weight",
        "block2.1.attn.q.weight",
        "block2.1.attn.kv.bias",
        "block4.0.attn.sr.weight",
        "block4.0.attn.norm.weight",
        "block3.0.mlp.fc1.weight",
        "block3.0.mlp.dwconv.dwconv.weight",
        "norm4.weight",
        "head.bias",
    ):
        assert key in keys
    plain = set(tiny(qkv_bias=False).state_dict())
    assert not {key for key in plain if key.startswith(("block3", "block4")) and ".sr." in key}
    assert not {key for key in plain if key.endswith(("attn.q.bias", "attn.kv.bias"))}
    assert "block1.0.attn.proj.bias" in plain


# -- every argument has its effect -----------------------------------------------------------------------------------


def outputs_differ(left: PVT_V2, right: PVT_V2, image: Tensor) -> bool:
    right.load_state_dict(left.state_dict())
    with torch.no_grad():
        return not torch.equal(left(image), right(image))


def test_img_size_is_advisory():
    with pytest.raises(ValueError, match="image must be large enough for stage 1"):
        tiny(img_size=12)
    assert not outputs_differ(tiny(img_size=32).eval(), tiny(img_size=(64, 96)).eval(), image_of(1, (40, 50)))


def test_patch_size_is_the_first_kernel():
    model = tiny(patch_size=9)
    assert model.patch_embed1.proj.kernel_size == (9, 9)
    assert model.patch_embed1.proj.padding == (4, 4)
    assert model.patch_embed1.proj.stride == (4, 4)
    assert {embed.proj.kernel_size for embed in (model.patch_embed2, model.patch_embed4)} == {(3, 3)}


def test_in_channels_and_num_classes():
    model = tiny(in_channels=5, num_classes=7).eval()
    assert model(image_of(2, (32, 32), channels=5)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"PVT_V2: image must have shape \(B, 5, H, W\), got \(1, 3, 32, 32\)"):
        model(image_of(1, (32, 32)))
    with pytest.raises(ValueError, match="must have shape"):
        model(torch.zeros(5, 32, 32))


def test_widths_heads_depths_and_ratios_shape_the_model():
    model = tiny()
    assert [model.get_submodule(f"norm{stage}").normalized_shape for stage in range(1, 5)] == [
        (8,),
        (16,),
        (32,),
        (48,),
    ]
    assert [len(model.get_submodule(f"block{stage}")) for stage in range(1, 5)] == [1, 2, 1, 1]
    assert [model.get_submodule(f"block{stage}")[0].mlp.fc1.out_features for stage in range(1, 5)] == [16, 32, 64, 72]
    assert [model.get_submodule(f"block{stage}")[0].attn.num_heads for stage in range(1, 5)] == [1, 2, 2, 3]
    assert model.block1[0].attn.sr.kernel_size == (4, 4)
    assert model.block2[0].attn.sr.stride == (2, 2)
    assert model.block3[0].attn.sr is None


@pytest.mark.parametrize(
    "arguments",
    [{"num_heads": (2, 4, 4, 6)}, {"qk_scale": 0.9}, {"norm_layer": partial(nn.LayerNorm, eps=0.1)}],
    ids=str,
)
def test_arguments_without_parameters_change_the_output(arguments):
    assert outputs_differ(
        copy.deepcopy(randomised("sr", torch.float32)), tiny(**arguments).eval(), image_of(1, (32, 32))
    )


def test_default_scale():
    base, image = copy.deepcopy(randomised("sr", torch.float32)), image_of(1, (32, 32))
    assert not outputs_differ(base, tiny(qk_scale=0).eval(), image)
    assert not outputs_differ(base, tiny(qk_scale=None).eval(), image)
    assert base.block2[0].attn.scale == 8**-0.5
    assert tiny(qk_scale=0.3).block2[0].attn.scale == 0.3


def test_qkv_bias():
    assert tiny(qkv_bias=True).block1[0].attn.kv.bias is not None
    assert tiny(qkv_bias=False).block1[0].attn.kv.bias is None


def test_linear_ignores_sr_ratios_pools_and_rectifies():
    model = tiny(linear=True)
    assert [model.get_submodule(f"block{stage}")[0].attn.sr.kernel_size for stage in range(1, 5)] == [(1, 1)] * 4
    assert isinstance(model.block1[0].mlp.relu, nn.ReLU)
    assert tiny().block1[0].mlp.relu is None
    assert not outputs_differ(model.eval(), tiny(linear=True, sr_ratios=(8, 8, 8, 8)).eval(), image_of(1, (32, 32)))
    assert model(image_of(1, (4, 3))).shape == (1, 40)


@pytest.mark.parametrize("bad", [nn.Identity, lambda dim: nn.LayerNorm(dim, elementwise_affine=False), nn.BatchNorm1d])
def test_norm_layer_must_be_an_affine_layer_norm(bad):
    with pytest.raises(TypeError, match=r"PVT_V2: norm_layer must make an nn\.LayerNorm with weight and bias"):
        tiny(norm_layer=bad)


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_rates_act_in_training_only(rate):
    model = tiny(**{rate: 0.5}).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        image = image_of(4, (32, 32))
        assert not torch.equal(model(image), model(image))
        model.eval()
        assert torch.equal(model(image), model(image))


@pytest.mark.parametrize(
    ("rates", "attention", "mlp"),
    [({"drop_rate": 0.2}, (0.0, 0.2), 0.2), ({"attn_drop_rate": 0.3}, (0.3, 0.0), 0.0)],
    ids=["drop_rate", "attn_drop_rate"],
)
def test_where_dropout_acts(rates, attention, mlp):
    """drop_rate: after GELU, fc2 and proj; attn_drop_rate: on the probabilities."""
    seen = []
    model = tiny(**rates).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.register_forward_hook(
                lambda module, args, output: seen.append((module.p, bool((output == 0).any())))
            )
    block = model.block1[0]
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p) == attention
    assert block.mlp.drop.p == mlp
    model(image_of(1, (32, 32)))
    assert {rate for rate, _ in seen} == {max(*attention, mlp)}
    assert any(dropped for _, dropped in seen)
    assert len(seen) == 5 * ((attention[0] > 0) + (attention[1] > 0) + 2 * (mlp > 0))
    seen.clear()
    model.eval()(image_of(1, (32, 32)))
    assert not any(dropped for _, dropped in seen)


def test_stochastic_depth_rises_linearly_and_keeps_the_mean():
    model = tiny(drop_path_rate=0.4, depths=(2, 1, 1, 1)).train()
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    x = torch.ones(20_000, 1, 48)
    assert isinstance(blocks[0].drop_path, nn.Identity)
    scale = blocks[-1].drop_path(x)
    assert scale.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(scale, scale[:, :, :1].expand_as(scale))  # whole samples
    # the mean of 20,000 draws of variance rate / (1 - rate) is within 5 standard deviations of 1
    assert abs(float(scale[:, 0, 0].mean()) - 1) < 5 * math.sqrt(0.4 / 0.6 / 20_000)
    assert torch.equal(blocks[-1].eval().drop_path(x), x)
    assert isinstance(tiny(drop_path_rate=0.5, depths=(1,), num_stages=1, embed_dims=(8,), num_heads=(1,),
                           mlp_ratios=(1,), sr_ratios=(1,)).block1[0].drop_path, nn.Identity)  # fmt: skip


def test_initialisation():
    """As official: linears truncated normal of std 0.02, convolutions normal by fan-out, biases 0, norms 1 and 0."""
    model = pvt_fast.pvt_v2_b0()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            expected = 0.02
        elif isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels / module.groups))
        elif isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
            continue
        else:
            continue
        assert module.bias is None or bool((module.bias == 0).all())
        count = module.weight.numel()
        # the standard deviation of n normal values is known to 1 / sqrt(2 n); 5 times that
        assert float(module.weight.detach().std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
        assert abs(float(module.weight.detach().mean())) < 5 * expected / math.sqrt(count)


# -- what users of timm expect ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_parts_make_the_whole():
    model, image = randomised("three", torch.float32), image_of(2, (40, 56))
    features = model.forward_features(image)
    assert features.shape == (2, 32, 3, 4)
    assert torch.equal(model.forward_head(features), model(image))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(image))
    final, maps = model.forward_intermediates(image)
    assert torch.equal(final, features)
    assert torch.equal(maps[-1], features)
    assert [tuple(map_.shape) for map_ in maps] == [(2, 8, 10, 14), (2, 16, 5, 7), (2, 32, 3, 4)]
    assert [info["num_chs"] for info in model.feature_info] == [8, 16, 32]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16]
    assert [model.get_submodule(info["module"]).normalized_shape[0] for info in model.feature_info] == [8, 16, 32]
    assert model.num_features == 32
    assert model.no_weight_decay() == set()


@torch.no_grad()
def test_intermediates_before_their_norm():
    model, image = randomised("sr", torch.float32), image_of(1, (32, 32))
    raw = model.forward_intermediates(image, norm=False, intermediates_only=True)
    normed = model.forward_intermediates(image, norm=True, intermediates_only=True)
    for stage, (before, after) in enumerate(zip(raw, normed, strict=True)):
        norm = model.get_submodule(f"norm{stage + 1}")
        torch.testing.assert_close(norm(before.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), after)


@torch.no_grad()
def test_intermediates_stop_early(monkeypatch):
    model = copy.deepcopy(randomised("sr", torch.float32))
    monkeypatch.setattr(type(model.patch_embed1), "forward", spy := _Spy(type(model.patch_embed1).forward))
    model.forward_intermediates(image_of(1, (32, 32)), [1], intermediates_only=True)
    assert spy.calls == 2
    model.forward_intermediates(image_of(1, (32, 32)), [1])
    assert spy.calls == 2 + 4


class _Spy:
    """Counts the calls of a method."""

    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __get__(self, instance, owner=None):
        def call(*arguments):
            self.calls += 1
            return self.function(instance, *arguments)

        return call


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], []], ids=str)
def test_bad_indices(indices):
    with pytest.raises(ValueError, match="forward_intermediates: indices must"):
        tiny().forward_intermediates(image_of(1, (32, 32)), indices)


def test_reset_classifier():
    model = tiny().double()
    model.reset_classifier(9)
    assert model.head.weight.shape == (9, 48)
    assert model.head.weight.dtype == torch.float64
    assert model.config.num_classes == 9
    assert float(model.head.weight.detach().abs().max()) < 0.12
    assert not model.head.bias.detach().any()
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.eval()(image_of(2, (32, 32)).double()).shape == (2, 48)
    with pytest.raises(ValueError, match="reset_classifier: num_classes must be at least 0, got -1"):
        model.reset_classifier(-1)
    for bad in (True, 2.0):
        with pytest.raises(TypeError, match="reset_classifier: num_classes must be an int, got"):
            model.reset_classifier(bad)


@pytest.mark.one_isa
@torch.no_grad()
def test_no_classes_means_pooled_features(target):
    model = tiny(num_classes=0).to(target.device).eval()
    image = image_of(2, (32, 32)).to(target.device)
    assert not [key for key in model.state_dict() if key.startswith("head")]
    expected = model.forward_features(image).mean(dim=(2, 3))
    model.backend = target.backend
    with target.in_use():
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def test_set_norm_eps_reaches_each_group():
    model = tiny(linear=True)
    model.set_norm_eps(block=1e-1, patch_embed=1e-2, reduction=1e-3)
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, value in eps.items():
        assert value == (1e-2 if name.startswith("patch_embed") else 1e-3 if name.endswith("attn.norm") else 1e-1), name
    model.set_norm_eps(reduction=1.0)
    assert (model.norm1.eps, model.patch_embed1.norm.eps, model.block1[0].attn.norm.eps) == (1e-1, 1e-2, 1.0)


@pytest.mark.one_isa
@pytest.mark.not_interpreted
@pytest.mark.parametrize("group", ["block", "patch_embed", "reduction"])
@torch.no_grad()
def test_a_changed_eps_is_not_hidden_by_packed_weights(group, target):
    model = copy.deepcopy(randomised("sr", torch.float32)).to(target.device)
    model.backend = target.backend
    image = image_of(1, (32, 32)).to(target.device)
    with target.in_use():
        before = model(image)
        model.set_norm_eps(**{group: 0.5})
        assert float((model(image) - before).abs().max()) > 1e-3


@pytest.mark.one_isa
@pytest.mark.not_interpreted
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_copies_compute_the_same_and_are_independent(how, target):
    model = copy.deepcopy(randomised("linear", torch.float32)).to(target.device)
    model.backend = target.backend
    image = image_of(1, (32, 32)).to(target.device)
    with target.in_use():
        expected = model(image)
        if how == "deepcopy":
            clone = copy.deepcopy(model)
        elif how == "pickle":
            clone = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            clone = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert clone.backend == model.backend
        assert clone.config == model.config
        assert torch.equal(clone(image), expected)
        clone.block1[0].mlp.fc2.weight.mul_(2)
        assert not torch.equal(clone(image), expected)
        assert torch.equal(model(image), expected)


@pytest.mark.one_isa
@torch.no_grad()
def test_state_dict_is_the_same_after_use_and_loads_weights_only(target):
    model = copy.deepcopy(randomised("sr", torch.float32)).to(target.device)
    model.backend = target.backend
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with target.in_use():
        model(image_of(1, (32, 32)).to(target.device))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert list(loaded) == list(before)
    assert all(torch.equal(loaded[name], before[name]) for name in before)


@pytest.mark.not_interpreted
@torch.no_grad()
def test_updated_weights_are_used(target):
    model = copy.deepcopy(randomised("sr", torch.float32)).to(target.device)
    model.backend = target.backend
    image = image_of(1, (32, 32)).to(target.device)
    for name in ("patch_embed2.proj.weight", "block1.0.attn.kv.bias", "block2.1.mlp.dwconv.dwconv.weight", "head.bias"):
        with target.in_use():
            before = model(image)
            parameter = model.get_parameter(name)
            parameter.add_(torch.randn_like(parameter))
            assert float((model(image) - before).abs().max()) > 1e-4, name
            check_parity(model.cpu(), image.cpu(), target)
        model.to(target.device)


@pytest.mark.one_isa
@pytest.mark.not_interpreted
@torch.no_grad()
def test_inference_mode(target):
    model = copy.deepcopy(randomised("linear", torch.float32)).to(target.device)
    model.backend = target.backend
    image = image_of(1, (32, 32)).to(target.device)
    with target.in_use():
        expected = model(image)
        with torch.inference_mode():
            assert torch.equal(model(image.clone()), expected)
            made = copy.deepcopy(model)
            assert torch.equal(made(image), expected)


def test_extra_repr_shows_the_configuration():
    model = tiny(linear=True)
    model.backend = "reference"
    text = repr(model)
    for name, value in TINY.items():
        assert f"{name}={value}" in text
    assert "linear=True" in text
    assert "backend='reference'" in text


def test_the_image_must_survive_the_stages():
    model = tiny()
    with pytest.raises(
        ValueError, match="image must be large enough for stage 1, whose map must be at least 4x4; got a"
    ):
        model(image_of(1, (12, 32)))
    with pytest.raises(TypeError, match=r"PVT_V2: image must have the dtype of patch_embed1\.proj\.weight"):
        model(image_of(1, (32, 32)).double())


@pytest.mark.not_interpreted
@pytest.mark.one_isa
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_pixels_are_normalised_as_for_the_published_weights(memory_format, target, dtype):
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (2, 3, 37, 32), generator=draw, dtype=torch.uint8).to(memory_format=memory_format)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    image = ((pixels / 255 - mean) / std).to(dtype)
    model = copy.deepcopy(randomised("sr", dtype)).to(target.device)
    model.backend = target.backend
    image, pixels = image.to(target.device), pixels.to(target.device)
    with target.in_use():
        assert torch.equal(model(pixels), model(image))
        assert torch.equal(model.forward_features(pixels), model.forward_features(image))
        stages = zip(model.forward_intermediates(pixels)[1], model.forward_intermediates(image)[1], strict=True)
        assert all(torch.equal(one, other) for one, other in stages)


def test_pixels_must_be_rgb():
    with pytest.raises(TypeError, match=r"unless in_channels is 3 \(RGB\), got torch.uint8 with in_channels 1"):
        tiny(in_channels=1)(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def spread(vector: Tensor) -> Tensor:
    """The same values, a column of a matrix."""
    return torch.stack((vector, vector + 1), dim=1)[:, 0]


def repeated(vector: Tensor) -> Tensor:
    """One value, once in memory."""
    return vector[:1].clone().expand(len(vector))


@pytest.mark.one_isa
@pytest.mark.parametrize("change", [spread, repeated])
@pytest.mark.parametrize("kind", ["sr", pytest.param("linear", marks=pytest.mark.full("triton"))])
@torch.no_grad()
def test_vectors_that_are_spread_over_memory(kind, change, target):
    model = copy.deepcopy(randomised(kind, torch.float32))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = change(parameter.data)
            assert not parameter.is_contiguous()
    model.to(target.device)
    compact = copy.deepcopy(model)
    for parameter in compact.parameters():
        parameter.data = parameter.data.contiguous()
    image = image_of(1, (18, 16)).to(target.device)
    model.backend = compact.backend = target.backend
    with target.in_use():
        assert torch.equal(model(image), compact(image))
