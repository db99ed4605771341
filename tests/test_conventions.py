"""What tools around a model expect of it: timm's conventions, tracing, the meta device, and heads put by users."""

import copy
import json
import pickle
import warnings
from functools import partial

import pytest
import timm
import torch
import torchinfo
from peers import TWO_STAGES, ours, peer, randomised
from timm.data import resolve_data_config
from timm.models import group_modules, group_parameters
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor

import pvt_fast
from pvt_fast import PVT_V2, export_weights, load_weights
from pvt_fast.images.preprocess import Preprocess
from pvt_fast.model_file import load_model, save_model

CHANNELS = 32  # of the features of `ours()`


def image_of(batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, height, width)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# -- layer-wise rates ------------------------------------------------------------------------------------------------


def test_layers_lie_in_the_order_of_depth():
    model = ours()
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    modules = {}
    for name, layer in layers.items():
        modules.setdefault(".".join(name.split(".")[: 2 if name.startswith("block") else 1]), set()).add(layer)
    assert modules == {
        "patch_embed1": {0},
        "block1.0": {1},
        "norm1": {1},
        "patch_embed2": {2},
        "block2.0": {3},
        "block2.1": {4},
        "norm2": {4},
        "patch_embed3": {5},
        "block3.0": {6},
        "norm3": {6},
        "patch_embed4": {7},
        "block4.0": {8},
        "norm4": {8},
        "head": {9},
    }


def test_coarse_layers_are_the_stem_the_stages_and_the_head():
    model = ours()
    layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert {layer: {name.split(".")[0] for name in layers if layers[name] == layer} for layer in range(6)} == {
        0: {"patch_embed1"},
        1: {"block1", "norm1"},
        **{stage: {f"patch_embed{stage}", f"block{stage}", f"norm{stage}"} for stage in (2, 3, 4)},
        5: {"head"},
    }
    assert len(group_modules(model, model.group_matcher(coarse=True))) == 6


def test_ten_stages_are_in_order_too():
    """A number is compared as one, not letter by letter."""
    stages = 11
    sizes = {"embed_dims": (4,), "num_heads": (1,), "mlp_ratios": (1,), "depths": (1,), "sr_ratios": (1,)}
    with torch.device("meta"):
        model = PVT_V2(num_stages=stages, **{name: value * stages for name, value in sizes.items()})
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    depth = [layers[f"block{stage}.0.norm1.weight"] for stage in range(1, stages + 1)]
    assert depth == sorted(set(depth))


def test_timms_optimizers_take_a_rate_per_layer():
    model = ours()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert scales[id(model.head.bias)] == 1.0
    assert scales[id(model.norm4.weight)] == scales[id(model.block4[0].attn.q.weight)] == 0.5
    assert scales[id(model.patch_embed1.proj.weight)] == 0.5**9
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (decays[id(model.norm1.weight)], decays[id(model.head.weight)]) == (0.0, 0.05)


# -- the classifier --------------------------------------------------------------------------------------------------


def test_pooling_goes_with_the_classifier():
    model, image = ours(), image_of()
    features = model.forward_features(image)
    model.reset_classifier(0, "")
    assert (model.global_pool, model.num_classes) == ("", 0)
    assert torch.equal(model(image), features)
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(image), features.mean(dim=(2, 3)))
    model.reset_classifier(5)
    assert (model.global_pool, model(image).shape) == ("avg", (2, 5))
    assert not model.head.training
    assert model.train() is model
    model.reset_classifier(6)
    assert model.head.training


@pytest.mark.parametrize(("classes", "pool"), [(5, ""), (5, "max"), (0, "max"), (0, False)], ids=str)
def test_poolings_that_there_are_not(classes, pool):
    model = ours()
    with pytest.raises(ValueError, match='reset_classifier: global_pool must be "avg", or "" for 0 classes, got'):
        model.reset_classifier(classes, pool)
    assert (model.num_classes, model.global_pool) == (7, "avg")


@pytest.mark.one_isa
@pytest.mark.not_interpreted
@torch.no_grad()
def test_a_linear_head_on_a_map_is_refused(target):
    """On a map of as many columns as there are channels it would run, along the wrong dimension."""
    model, image = ours().to(target.device), image_of(1, 32, 32).to(target.device)
    model.backend = target.backend
    with target.in_use():
        model(image)
        model.global_pool = ""
        with pytest.raises(ValueError, match='forward_head: global_pool must be "avg" before a linear head, got ""'):
            model(image)
        model.head = nn.Conv2d(CHANNELS, 3, 1)
        assert model.cpu()(image.cpu()).shape == (1, 3, 1, 1)


def test_the_input_size_is_told_and_checked():
    model = ours()
    model.set_input_size((96, 64))
    assert model.config.img_size == (96, 64)
    assert model.pretrained_cfg["input_size"] == (3, 96, 64)
    model.set_input_size(128)
    assert model.config.img_size == 128
    with pytest.raises(ValueError, match="image must be large enough for stage 1"):
        model.set_input_size(8)
    assert model.config.img_size == 128


def test_timm_finds_the_data():
    theirs = timm.create_model("pvt_v2_b0")
    with torch.device("meta"):
        model = PVT_V2()
        grey = PVT_V2(in_channels=1)
    assert resolve_data_config(model=model) == resolve_data_config(model=theirs)
    assert resolve_data_config(model=grey)["input_size"] == (1, 224, 224)
    names = ("num_classes", "input_size", "pool_size", "interpolation", "crop_pct", "mean", "std", "classifier")
    assert {name: model.default_cfg[name] for name in names} == {name: theirs.default_cfg[name] for name in names}
    assert (model.num_classes, model.global_pool) == (theirs.num_classes, theirs.global_pool)
    assert model.head_hidden_size == model.num_features == 512


# -- stages ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stages_as_timm_gives_them():
    theirs = peer("timm")
    model, image = ours(), image_of(2, 64, 96)
    load_weights(model, theirs.state_dict())
    for options in ({"indices": [0, 2]}, {"indices": 2}, {"indices": [1], "stop_early": True}, {"indices": [-3, 3]}):
        final, maps = model.forward_intermediates(image, **options)
        their_final, their_maps = theirs.forward_intermediates(image, **options)
        for one, other in zip((final, *maps), (their_final, *their_maps), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_stages_as_tokens():
    model, image = ours(), image_of(2, 64, 96)
    for norm in (True, False):
        final, maps = model.forward_intermediates(image, [0, 3], norm=norm)
        same_final, tokens = model.forward_intermediates(image, [0, 3], norm=norm, output_fmt="NLC")
        assert torch.equal(same_final, final)
        assert [value.shape for value in tokens] == [(2, 16 * 24, 8), (2, 2 * 3, 32)]
        assert all(torch.equal(one, other.flatten(2).mT) for one, other in zip(tokens, maps, strict=True))
    with pytest.raises(ValueError, match='output_fmt must be "NCHW" or "NLC", got \'NHWC\''):
        model.forward_intermediates(image, output_fmt="NHWC")


@torch.no_grad()
def test_pruned_stages(tmp_path):
    model, image = randomised(ours(drop_path_rate=0.4)).eval(), image_of()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in (*model.block1, *model.block2)]
    expected = model.forward_intermediates(image, [0, 1])[1]
    assert model.prune_intermediate_layers([0, -3]) == [0, 1]
    assert [name for name, _ in model.named_children()] == [
        *("patch_embed1", "block1", "norm1", "patch_embed2", "block2", "norm2"),
        "head",
    ]
    assert (model.num_features, model.num_classes, model.config.depths) == (16, 0, (1, 2))
    assert [info["num_chs"] for info in model.feature_info] == [8, 16]
    assert torch.equal(model(image), expected[1])
    model.save_pretrained(tmp_path)
    again = PVT_V2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(image), model(image))
    kept = [getattr(block.drop_path, "drop_prob", 0.0) for block in (*again.block1, *again.block2)]
    assert kept == pytest.approx(rates)
    model.reset_classifier(3, "avg")
    assert model(image).shape == (2, 3)


def test_what_pruning_leaves():
    model = ours()
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert (model.num_classes, model.global_pool) == (7, "avg")
    model.prune_intermediate_layers(1)
    assert (model.num_classes, model.global_pool) == (0, "")
    with pytest.raises(ValueError, match="prune_intermediate_layers: indices must be 1 to 4 stages, got 5"):
        model.prune_intermediate_layers(5)


@torch.no_grad()
def test_timms_wrappers_for_stages():
    model, image = randomised(ours()).eval(), image_of()
    tokens = model.forward_intermediates(image, [0, 2], output_fmt="NLC", intermediates_only=True)
    for norm in (True, False):
        expected = model.forward_intermediates(image, [0, 2], norm=norm, intermediates_only=True)
        getter = FeatureGetterNet(copy.deepcopy(model), [0, 2], norm=norm)
        assert all(torch.equal(one, other) for one, other in zip(getter(image), expected, strict=True))
        assert getter.feature_info.channels() == [8, 24]
        assert getter.feature_info.reduction() == [4, 16]
        assert not hasattr(getter.model, "block4")
    hooked = FeatureHookNet(copy.deepcopy(model), out_indices=(0, 2))
    # below a hook it is the norm's own forward that runs
    for one, other in zip(hooked(image), tokens, strict=True):
        torch.testing.assert_close(one, other)


# -- tracing and counting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
@torch.no_grad()
def test_symbolic_tracing(linear):
    model, image = randomised(ours(linear=linear)).eval(), image_of()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(image), model(image))
    extractor = create_feature_extractor(model, {"norm2": "tokens", "head": "logits"})
    found = extractor(image)
    torch.testing.assert_close(found["logits"], model(image))
    torch.testing.assert_close(found["tokens"], model.forward_intermediates(image, [1], output_fmt="NLC")[1][0])


@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
def test_torchinfo_counts_every_parameter(linear):
    model = ours(linear=linear)
    summary = torchinfo.summary(model, input_size=(1, 3, 64, 64), verbose=0)
    assert summary.total_params == sum(parameter.numel() for parameter in model.parameters())
    seen = {id(layer.module) for layer in summary.summary_list if layer.executed}
    with_weights = {name: module for name, module in model.named_modules() if module._parameters}
    assert [name for name, module in with_weights.items() if id(module) not in seen] == []


@pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_a_forward_on_the_meta_device(linear, dtype):
    with torch.device("meta"):
        model = ours(linear=linear)
        image = torch.empty(2, 3, 64, 96, dtype=dtype)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert model(image).shape == (2, 7)
            assert model.train()(image).device.type == "meta"
            assert [map_.shape[1:] for map_ in model.eval().forward_intermediates(image)[1]] == [
                (8, 16, 24),
                (16, 8, 12),
                (24, 4, 6),
                (32, 2, 3),
            ]
    with pytest.raises(TypeError, match="must have the dtype of"):
        model(image.double())


# -- heads that users put there --------------------------------------------------------------------------------------

PLAIN_HEADS = {
    "linear": partial(nn.Linear, CHANNELS, 10),
    "without bias": partial(nn.Linear, CHANNELS, 10, bias=False),
    "as wide as before": partial(nn.Linear, CHANNELS, 7, bias=False),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("head", PLAIN_HEADS.values(), ids=PLAIN_HEADS)
@torch.no_grad()
def test_a_replaced_head_comes_back(head, tmp_path):
    model, image = randomised(ours()).eval(), image_of()
    model.head = head()
    model.eval()
    classes = getattr(model.head, "out_features", 0)
    assert model.num_classes == model.config.num_classes == model.pretrained_cfg["num_classes"] == classes
    assert f"num_classes={classes}" in repr(model)
    model.save_pretrained(tmp_path)
    save_model(model, tmp_path / "one.safetensors", Preprocess(size=64))
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == classes
    for again in (PVT_V2.from_pretrained(tmp_path), load_model(tmp_path / "one.safetensors")[0]):
        assert again.config == model.config
        assert same(again.state_dict(), model.state_dict())
        assert torch.equal(again(image), model(image))
    other = ours(num_classes=classes)
    other.head = head()
    for source in (tmp_path, tmp_path / "one.safetensors", export_weights(model), export_weights(model, "timm")):
        assert load_weights(other, source).problems() == []
        assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@torch.no_grad()
def test_a_first_convolution_of_other_channels(backend, tmp_path):
    model = randomised(ours(img_size=64)).eval()
    model.backend = backend
    model(image_of())
    model.patch_embed1.proj = nn.Conv2d(4, model.patch_embed1.proj.out_channels, 7, 4, 3)
    assert model.config.in_channels == model.default_cfg["input_size"][0] == 4
    image = torch.randn(2, 4, 64, 64)
    logits = model(image)
    with pytest.raises(ValueError, match=r"image must have shape \(B, 4, H, W\), got \(2, 3, 64, 64\)"):
        model(image_of())
    with pytest.raises(TypeError, match="unless in_channels is 3"):
        model(torch.zeros(2, 4, 64, 64, dtype=torch.uint8))
    model.save_pretrained(tmp_path)
    again = PVT_V2.from_pretrained(tmp_path)
    again.backend = backend
    assert torch.equal(again(image), logits)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_sizes_are_those_of_the_modules(compiled):
    """A first stride of 2 leaves maps of images that are too small by the configuration; a reduction's kernel, too."""
    model = randomised(ours(**TWO_STAGES | {"sr_ratios": (8, 1)})).eval()
    finer = copy.deepcopy(model)
    finer.patch_embed1.proj.stride = (2, 2)
    coarser = copy.deepcopy(model)
    coarser.block1[0].attn.sr = nn.Conv2d(8, 8, 16, 16)
    small, large = (torch.randn(1, 3, size, size) for size in (32, 64))
    with pytest.raises(ValueError, match="image must be large enough for stage 1"):
        model(torch.randn(1, 3, 16, 16))
    for changed in (finer, coarser):
        expected = copy.deepcopy(changed)
        expected.backend = "reference"
        forward = torch.compile(changed, backend="aot_eager") if compiled else changed
        for _ in range(3):
            torch.testing.assert_close(forward(large), expected(large))
    tiny = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(finer(tiny), finer.forward_head(finer.forward_features(tiny)))
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=r"sr_ratio|[Kk]ernel size"):
            coarser(small)


def test_another_number_of_classes_than_the_saved():
    """Under the one that the file has as well as that of the model, what is at `head` is what counts."""
    source, model = randomised(ours(num_classes=7)), ours(num_classes=7)
    model.head = nn.Linear(CHANNELS, 3, bias=False)
    before = model.head.weight.detach().clone()
    report = load_weights(model, source.state_dict())
    assert report.dropped == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.norm4.bias, source.norm4.bias)


def test_the_trunk_loads_below_a_head_of_several_modules():
    source, model = randomised(ours()), ours()
    model.head = nn.Sequential(nn.Dropout(), nn.Linear(CHANNELS, 3))
    report = load_weights(model, export_weights(source, "timm"))
    assert (report.dropped, report.problems()) == (("head.weight", "head.bias"), [])
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    assert same(own, {name: source.state_dict()[name] for name in own})
    again = ours()
    again.head = copy.deepcopy(model.head)
    nn.init.zeros_(again.head[1].weight)
    assert load_weights(again, model.state_dict()).dropped == ()
    assert same(again.state_dict(), model.state_dict())


def test_parameters_of_several_dtypes_come_back(tmp_path):
    model = ours().bfloat16()
    model.head.float()
    model.save_pretrained(tmp_path)
    assert same(PVT_V2.from_pretrained(tmp_path).state_dict(), model.state_dict())
    double = randomised(ours()).double()
    save_model(double, tmp_path / "double.safetensors", Preprocess(size=64))
    assert same(load_model(tmp_path / "double.safetensors")[0].state_dict(), double.state_dict())


@torch.no_grad()
def test_shared_parameters_are_saved_for_each(tmp_path):
    model, image = randomised(ours()).eval(), image_of()
    model.block2[1] = model.block2[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(PVT_V2.from_pretrained(tmp_path)(image), model(image))


class LowRank(nn.Module):
    """An adapter beside a linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def quantised(head: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(head), {nn.Linear})[0]


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def pruned(head: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(head, "weight", 0.5)


# What is put at head, a word of it in the message, its classes.
OTHER_HEADS = {
    "sequential": (lambda head: nn.Sequential(nn.ReLU(), nn.Linear(CHANNELS, 5)), "Sequential", 5),
    "adapter": (LowRank, "LowRank", 7),
    "parametrized": (parametrizations.weight_norm, "ParametrizedLinear", 7),
    "pruned": (pruned, "Linear", 7),
    "quantised": (quantised, "DynamicQuantizedLinear", 7),
    "of its own": (lambda head: Scaled(CHANNELS, 9), "Scaled", 9),
    "of other features": (lambda head: nn.Linear(CHANNELS + 1, 9), f"in_features={CHANNELS + 1}", 9),
    "without outputs": (lambda head: nn.Softmax(dim=1), "Softmax", 7),
}


def refusals(model: PVT_V2, directory):
    """What each way out of the model says."""
    directory.mkdir()
    (directory / "config.json").write_text("kept")
    ways = {
        "save_pretrained": lambda: model.save_pretrained(directory),
        "push_to_hub": lambda: model.push_to_hub("someone/pvt"),
        "save_model": lambda: save_model(model, directory / "one.safetensors", Preprocess(size=64)),
        "export_weights": lambda: export_weights(model, "transformers"),
    }
    for op, way in ways.items():
        with pytest.raises(ValueError, match=rf"^{op}: model") as info:
            way()
        yield str(info.value)
    assert {path.name: path.read_text() for path in directory.iterdir()} == {"config.json": "kept"}


@pytest.mark.parametrize(("put", "word", "classes"), OTHER_HEADS.values(), ids=OTHER_HEADS)
def test_a_head_that_would_be_lost_is_refused(put, word, classes, tmp_path):
    model = ours()
    model.head = put(model.head)
    assert model.num_classes == classes
    for message in refusals(model, tmp_path / "kept"):
        assert f"model.head must be an nn.Linear of {CHANNELS} channels in plain tensors, or nn.Identity" in message
        assert word in message
    assert not [name for name in export_weights(model, "mmdet") if "head" in name]  # which has none


def replaced(path: str, make):
    def change(model: PVT_V2) -> None:
        model.set_submodule(path, make(model.get_submodule(path)))

    return change


def replaced_by(path: str, make):
    def change(model: PVT_V2) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, make())

    return change


def set_to(path: str, setting: str, value):
    return lambda model: setattr(model.get_submodule(path), setting, value)


class Tagged(torch.Tensor):
    pass


def tag(model: PVT_V2) -> None:
    weight = model.block1[0].mlp.fc1.weight.detach().as_subclass(Tagged)
    model.block1[0].mlp.fc1.weight = nn.Parameter(weight)


def turn_around(model: PVT_V2) -> None:
    model.block2._modules["0"] = model.block2._modules.pop("0")


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed([*super().__iter__()])


OTHER_TRUNKS = {
    "an adapter": (replaced("block2.0.attn.q", LowRank), "block2.0.attn.q.base.weight"),
    "a parametrization": (replaced("block1.0.mlp.fc2", parametrizations.weight_norm), "parametrizations.weight"),
    "a pruned linear": (replaced("block1.0.attn.proj", pruned), "block1.0.attn.proj.weight_orig"),
    "fewer channels": (replaced("block1.0.attn.q", lambda old: nn.Linear(8, 4)), "(4, 8) for (8, 8)"),
    "another activation": (replaced("block2.1.mlp.act", lambda old: nn.ReLU()), "act as a ReLU for a GELU"),
    "a forward of its own": (replaced("block2.0.attn.kv", lambda old: Scaled(16, 32)), "as a Scaled for a Linear"),
    "a buffer": (lambda model: model.register_buffer("mean", torch.zeros(3)), "an unknown mean"),
    "a module more": (replaced_by("block1.0.mlp.relu", nn.ReLU), "a ReLU added at block1.0.mlp.relu"),
    "a forward of an instance": (set_to("block2.0.attn", "forward", torch.tanh), "forward of its own in block2.0.attn"),
    "another stride": (set_to("patch_embed1.proj", "stride", (2, 2)), "a stride of (2, 2) for (4, 4) in patch_embed1"),
    "other heads": (set_to("block3.0.attn", "num_heads", 1), "a num_heads of 1 for 3 in block3.0.attn"),
    "blocks in another order": (turn_around, "another order, in block2"),
    "a list of a class": (lambda model: setattr(model.block2, "__class__", Backwards), "another order, in block2"),
    "features of its own": (lambda model: setattr(model, "forward_features", torch.tanh), "a forward_features of its"),
    "tensors of a class": (tag, "a Tagged at block1.0.mlp.fc1.weight"),
}


@pytest.mark.parametrize(("change", "word"), OTHER_TRUNKS.values(), ids=OTHER_TRUNKS)
def test_a_trunk_that_would_be_lost_is_refused(change, word, tmp_path):
    model = ours()
    change(model)
    for message in refusals(model, tmp_path / "kept"):
        assert "must consist of what PVT_V2(**config) makes, for it to be kept; got" in message
        assert word in message


@pytest.mark.parametrize("path", ["block1.0.mlp.relu", "block1.0.attn.act", "block1.0.attn.pool"])
def test_modules_without_parameters_that_were_taken_away_are_a_loss(path, tmp_path):
    model = ours(linear=True)
    replaced_by(path, lambda: None)(model)
    for message in refusals(model, tmp_path / "kept"):
        assert f"at {path}" in message


def test_a_head_with_a_forward_of_its_own_is_refused(tmp_path):
    model = ours()
    model.head.forward = torch.tanh
    for message in refusals(model, tmp_path / "kept"):
        assert "model.head must be an nn.Linear" in message


@pytest.mark.parametrize("name", ["head", "norm4", "patch_embed1", "block1"])
def test_a_model_without_one_of_its_modules_is_copied_and_explained(name):
    """As feature extraction deletes heads; calls that come to it fail as Python's."""
    model = ours()
    delattr(model, name)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(clone.state_dict(), model.state_dict())
    assert name not in {piece.path.partition(".")[0] for piece in pvt_fast.explain(model).pieces if piece.fused}
    image = image_of(1, 64, 64)
    if name == "head":
        assert torch.equal(model.forward_features(image), copy.deepcopy(model).forward_features(image))
    with pytest.raises(AttributeError, match=name):
        model(image)


def test_what_changes_no_answer_is_no_loss(tmp_path):
    model = ours(drop_path_rate=0.2, drop_rate=0.1)
    model.block2[0].drop_path = nn.Identity()
    model.block1[0].mlp.drop = nn.Identity()
    model.block2[1].register_forward_hook(lambda *_: None)
    model.criterion = nn.CrossEntropyLoss()
    draw = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), draw)
    assert same(PVT_V2.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_class_with_arguments_of_its_own_is_refused(tmp_path):
    class Small(PVT_V2):
        def __init__(self) -> None:
            super().__init__(depths=(1, 1, 1, 1), img_size=64)

    with pytest.raises(ValueError, match="save_pretrained: model must be of a class that takes PVT_V2's arguments"):
        Small().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [{"head_bias": "no"}, {"global_pool": "max"}], ids=str)
def test_a_damaged_description_is_refused(bad, tmp_path):
    ours().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | bad))
    with pytest.raises(ValueError, match='PVT_V2: head_bias must be true or false and global_pool "avg" or ""'):
        PVT_V2.from_pretrained(tmp_path)
