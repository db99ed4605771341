"""load_weights and export_weights: the source's numbers and epsilons, its logits, and a report of what was done."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import timm.models._manipulate
import torch
from peers import LAYOUT_PEERS, logits_of, ours, peer, randomised
from safetensors.torch import save_file
from torch import nn
from torch._subclasses import FakeTensorMode

import pvt_fast
from pvt_fast import PVT_V2, LoadReport, export_weights, load_weights
from pvt_fast.checkpoints.key_maps import LAYOUTS
from pvt_fast.images.preprocess import Preprocess
from pvt_fast.model_file import save_model
from pvt_fast.testing import assert_parity

MIXED = {"block": 1e-6, "patch_embed": 1e-5, "reduction": 1e-5}
EVEN = {"block": 1e-6, "patch_embed": 1e-6, "reduction": 1e-6}
PUBLISHED_EPS = {"official": MIXED, "timm": MIXED, "transformers": EVEN, "mmdet": EVEN}
IMAGE = torch.randn(2, 3, 90, 77, generator=torch.Generator().manual_seed(1))

VARIETIES = pytest.mark.parametrize(
    "overrides",
    [{}, {"linear": True}, {"qkv_bias": False}, {"depths": (2, 1, 3, 1), "mlp_ratios": (4, 2, 1, 1)}],
    ids=["sr", "linear", "nobias", "deeper"],
)
TO_PEERS = pytest.mark.parametrize("layout", LAYOUT_PEERS)


def values_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


# -- the same answers ------------------------------------------------------------------------------------------------


@TO_PEERS
@VARIETIES
@torch.no_grad()
def test_logits_are_the_sources(layout, overrides):
    source, model = peer(layout, **overrides), ours(**overrides)
    report = load_weights(model, source.state_dict())
    assert (report.layout, report.problems()) == (layout, [])
    same_dtype = logits_of(source, IMAGE)
    truth = logits_of(source.double(), IMAGE.double())
    assert float(truth.std()) > 0.1
    assert_parity(model(IMAGE), truth, same_dtype)
    # and it is the epsilons that make them so: the other implementation's give other logits
    model.set_norm_eps(**(MIXED if layout == "transformers" else EVEN))
    with pytest.raises(AssertionError, match="error"):
        assert_parity(model(IMAGE), truth, same_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_epsilons_are_the_implementations(layout):
    model = ours(num_classes=0)
    model.set_norm_eps(block=0.1, patch_embed=0.2, reduction=0.3)
    report = load_weights(model, export_weights(model, layout))
    assert report.norm_eps == model.norm_eps() == PUBLISHED_EPS[layout]


@TO_PEERS
@VARIETIES
def test_export_goes_into_the_peer_and_back_to_the_bit(layout, overrides):
    model = randomised(ours(**overrides))
    target = peer(layout, **overrides)
    exported = export_weights(model, layout)
    target.load_state_dict(exported, strict=True)
    assert equal(target.state_dict(), exported)
    again = ours(**overrides)
    load_weights(again, target.state_dict())
    assert equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_are_copies_that_can_be_saved(layout, tmp_path):
    model = randomised(ours())
    before, exported = values_of(model), export_weights(model, layout)
    save_file(exported, tmp_path / "model.safetensors")  # refuses tensors that share memory
    for value in exported.values():
        assert not value.requires_grad
        value.zero_()
    assert equal(model.state_dict(), before)
    again = ours()
    load_weights(again, tmp_path / "model.safetensors", strict=layout != "mmdet")
    assert torch.equal(again.block1[0].attn.kv.weight, model.block1[0].attn.kv.weight)


def test_official_export_is_the_state_dict():
    model = ours()
    assert equal(export_weights(model), model.state_dict())
    with pytest.raises(ValueError, match="layout must be one of official, timm, transformers, mmdet; got 'paddle'"):
        export_weights(model, "paddle")


# -- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@TO_PEERS
def test_files(layout, suffix, tmp_path):
    source, model, path = peer(layout), ours(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}}, path)
    for given in (path, str(path)):
        report = load_weights(model, given)
        assert report.layout == layout
        assert equal(export_weights(model, layout), source.state_dict())


def test_a_directory_of_transformers_brings_its_epsilon(tmp_path):
    source = peer("transformers")
    source.config.layer_norm_eps = 3e-5
    source.save_pretrained(tmp_path)
    model = ours()
    assert load_weights(model, tmp_path).norm_eps == dict.fromkeys(EVEN, 3e-5)
    assert equal(export_weights(model, "transformers"), source.state_dict())


def test_a_file_of_this_package_brings_its_epsilons(tmp_path):
    source = randomised(ours())
    source.set_norm_eps(block=1e-4, patch_embed=1e-3, reduction=1e-2)
    save_model(source, tmp_path / "model.safetensors", Preprocess(size=64))
    model = ours()
    load_weights(model, tmp_path / "model.safetensors")
    assert model.norm_eps() == source.norm_eps() == {"block": 1e-4, "patch_embed": 1e-3, "reduction": 1e-2}


def test_nested_state_dicts():
    state = ours().state_dict()
    for source in ({"model": state}, {"state_dict": state, "epoch": 3}, {"state_dict": {"model": state}}):
        assert load_weights(ours(), source).loaded == tuple(state)


def test_sources_that_are_none(tmp_path):
    model = ours()
    with pytest.raises(TypeError, match="source must be a path, a repository or a state dict, got 3"):
        load_weights(model, 3)
    with pytest.raises(ValueError, match=r"source must hold model.safetensors or pytorch_model.bin, got directory"):
        load_weights(model, tmp_path)
    with pytest.raises(ValueError, match=r"must be an existing file, got '.*absent\.pth'"):
        load_weights(model, str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match='must be an existing file or directory, or a repository "org/name", got'):
        load_weights(model, "weights")
    with pytest.raises(ValueError, match="source must hold a state dict"):
        load_weights(model, {})
    with pytest.raises(ValueError, match="names to tensors, got 'epoch': int"):
        load_weights(model, {"epoch": 3})


# -- what does not fit -----------------------------------------------------------------------------------------------


def altered() -> dict[str, torch.Tensor]:
    state = {name: value + 1 for name, value in ours().state_dict().items()}
    del state["norm1.weight"]
    state["extra.weight"] = torch.ones(1)
    state["norm2.bias"] = torch.ones(5)
    return state


def test_strictly_nothing_is_loaded_that_does_not_fit():
    model = ours()
    before = values_of(model)
    with pytest.raises(ValueError, match=r"load_weights: source \(official layout\) must have the model's") as info:
        load_weights(model, altered())
    assert str(info.value).endswith(
        "got 1 missing: norm1.weight; 1 unexpected: extra.weight; 1 of another shape: norm2.bias (5,) for (16,)"
    )
    assert equal(model.state_dict(), before)
    assert model.norm_eps() == dict.fromkeys(EVEN, 1e-5)


FC1, NORM = "block1.0.mlp.fc1.weight", "norm1.weight"


def released(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.untyped_storage().resize_(0)  # read without a look, this ends the process
    return value


def faked(value: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(value)


NO_VALUES = {
    "meta": (lambda value: value.to("meta"), "one on the meta device"),
    "int8": (lambda value: value.to(torch.int8), "one of torch.int8"),
    "bool": (lambda value: value.bool(), "one of torch.bool"),
    "complex": (lambda value: value.to(torch.complex64), "one of torch.complex64"),
    "sparse": (lambda value: value.to_sparse(), "a Tensor (torch.sparse_coo)"),
    "mkldnn": (lambda value: value.to_mkldnn(), "a Tensor (torch._mkldnn)"),
    "nested": (lambda value: torch.nested.nested_tensor([value, value]), "a Tensor (nested)"),
    "released": (released, "one whose memory was released"),
    "fake": (faked, "a FakeTensor (torch.strided)"),
}


@contextmanager
def unchanged(model: PVT_V2) -> Iterator[None]:
    """Neither values, nor their versions, epsilons, mode or dtypes."""

    def now():
        state = model.state_dict()
        return {name: (value._version, value.dtype) for name, value in state.items()}, model.norm_eps(), model.training

    before, values = now(), values_of(model)
    yield
    assert now() == before
    assert equal(model.state_dict(), values)


@pytest.mark.parametrize(("change", "got"), NO_VALUES.values(), ids=NO_VALUES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_holds_no_values_changes_nothing(change, got):
    model, source = ours(), randomised(ours())
    for layout in LAYOUTS:
        refuses_changed(model, export_weights(source, layout), change, got)


def refuses_changed(model: PVT_V2, state: dict, change: Callable, got: str) -> None:
    # the last in order, among them what is joined or cut: all before it could have been copied
    for name in [name for name in state if re.search(r"attn.*weight|attention.*weight", name)][-4:]:
        for strict in (True, False):
            with (
                unchanged(model),
                pytest.raises(ValueError, match=r"^load_weights: \S* must be a plain tensor") as info,
            ):
                load_weights(model, {**state, name: change(state[name])}, strict)
            assert str(info.value).endswith(f"got {got}")


@pytest.mark.parametrize(
    "change",
    [lambda value: torch.tensor(1.0), lambda value: value[:1], lambda value: torch.ones(1, 1).expand(10**9, 10**6)],
    ids=["of rank 0", "cut", "without bounds"],
)
def test_other_shapes_change_nothing_and_take_no_memory(change):
    model, source = ours(), randomised(ours())
    for layout in LAYOUTS:
        state = export_weights(source, layout)
        # what is joined, cut, or compared with another size
        for name in [name for name in state if re.search(r"kv|key.weight|value.bias|in_proj|dense1|fc1", name)]:
            with unchanged(model), pytest.raises(ValueError, match=r"load_weights: source \(.* must have the model's"):
                load_weights(model, {**state, name: change(state[name])})
    state = {**ours().state_dict(), "patch_embed1.proj.weight": torch.ones(1).expand(8, 3, 10**6, 10**6)}
    for other in (ours(in_channels=1), ours(in_channels=5)):
        with unchanged(other), pytest.raises(ValueError, match=r"1 of another shape: patch_embed1\.proj\.weight"):
            load_weights(other, state)


@pytest.mark.parametrize("shape", [(), (9,), (9, 32, 1)], ids=str)
def test_a_head_that_is_no_matrix_is_no_head_for_other_classes(shape):
    model = ours()
    with unchanged(model), pytest.raises(ValueError, match=r"1 of another shape: head\.weight"):
        load_weights(model, {**ours().state_dict(), "head.weight": torch.ones(shape)})


def test_values_that_are_read_as_they_are():
    model, state = ours(), randomised(ours()).state_dict()
    like = state[NORM]
    for value in (torch.full_like(like, torch.nan), torch.ones(1).expand(8), torch._neg_view(like), like.double()):
        load_weights(model, {**state, NORM: value})
        assert torch.equal(model.norm1.weight.nan_to_num(5), value.float().nan_to_num(5))


def test_a_source_made_of_the_models_own_tensors():
    """Blocks in another order: each is read before it is written."""
    model = randomised(ours(depths=(1, 2, 1, 1)))
    state = model.state_dict()
    other = {"block2.0": "block2.1", "block2.1": "block2.0"}
    swapped = {other.get(name[:8], name[:8]) + name[8:]: value for name, value in state.items()}
    expected = {name: value.clone() for name, value in swapped.items()}
    load_weights(model, swapped)
    assert equal(model.state_dict(), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_what_comes_in_between_changes_nothing(error):
    model = randomised(ours())
    model.set_norm_eps(block=0.1, patch_embed=0.2, reduction=0.3)
    before, eps = values_of(model), model.norm_eps()
    state = {name: value * 2 for name, value in model.state_dict().items()}

    def interrupt(*_):
        assert not torch.equal(model.norm1.weight, before[NORM]), "nothing was changed yet"
        raise error("so it is")

    handle = model.norm4.register_load_state_dict_pre_hook(interrupt)
    with pytest.raises(ValueError if error is RuntimeError else error, match="so it is"):
        load_weights(model, state)
    assert equal(model.state_dict(), before)
    assert model.norm_eps() == eps
    handle.remove()
    load_weights(model, state)
    assert equal(model.state_dict(), state)


def expanded_norm(model: PVT_V2) -> None:
    model.norm1.weight = nn.Parameter(torch.ones(1).expand(8))


def released_norm(model: PVT_V2) -> None:
    model.norm1.weight.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("spoil", "got"),
    [(expanded_norm, "one with more elements than memory"), (released_norm, "one whose memory was released")],
)
def test_a_model_that_cannot_be_written_is_refused_first(spoil, got):
    model = ours()
    spoil(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if name != NORM}
    with pytest.raises(ValueError, match=f"model must have memory of its own to write for {NORM}, got {got}"):
        load_weights(model, ours().state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_inference_tensors_are_written_in_inference_mode_only():
    state = randomised(ours()).state_dict()
    with torch.inference_mode():
        model = ours()
    with pytest.raises(ValueError, match=r"got an inference tensor outside torch\.inference_mode"):
        load_weights(model, state)
    with torch.inference_mode():
        load_weights(model, state)
    assert equal(model.state_dict(), state)


WRONG_EPS = {
    "kind": {**EVEN, "head": 1e-6},
    "text": {**EVEN, "block": "x"},
    "nan": {**EVEN, "block": float("nan")},
    "infinite": {**EVEN, "reduction": float("inf")},
    "negative": {**EVEN, "patch_embed": -1e-5},
    "zero": {**EVEN, "block": 0},
    "truth": {**EVEN, "block": True},
    "huge": {**EVEN, "block": 10**400},
    "list": [1e-6],
    "none": None,
    "empty": {},
    "some": {"block": 1e-6},
}


@pytest.mark.parametrize("eps", WRONG_EPS.values(), ids=WRONG_EPS)
def test_epsilons_of_files_are_checked(eps, tmp_path):
    model, state = ours(), randomised(ours()).state_dict()
    described = json.dumps({"norm_eps": eps})
    for metadata in ({"pvt_fast": described}, {"config.json": described}, {"format": "pt"}):
        save_file(state, tmp_path / "model.safetensors", metadata=metadata)
        (tmp_path / "config.json").write_text(described)
        for source in (tmp_path / "model.safetensors", tmp_path):
            if source == tmp_path or "format" not in metadata:
                with unchanged(model), pytest.raises(ValueError, match=r"^load_weights: .*(norm_eps|epsilons)"):
                    load_weights(model, source)
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": eps}))
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"^load_weights: layer_norm_eps must be a finite number"),
    ):
        load_weights(model, tmp_path)


def test_a_description_without_epsilons_is_refused(tmp_path):
    save_file(ours().state_dict(), tmp_path / "model.safetensors", metadata={"pvt_fast": "{}"})
    with pytest.raises(ValueError, match=r"the description in .* must state norm_eps, got none"):
        load_weights(ours(), tmp_path / "model.safetensors")


def test_leniently_the_rest_is_loaded_and_reported():
    model = ours()
    before, state = values_of(model), altered()
    report = load_weights(model, state, strict=False)
    assert report.missing == ("norm1.weight",)
    assert report.unexpected == ("extra.weight",)
    assert report.mismatched == ("norm2.bias (5,) for (16,)",)
    assert len(report.loaded) == len(before) - 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] if name in report.loaded else before[name])
    assert str(report).splitlines()[1:] == [
        "missing: norm1.weight",
        "unexpected: extra.weight",
        "mismatched: norm2.bias (5,) for (16,)",
    ]


def test_names_of_the_source_are_reported():
    source = {f"module.{name}": value for name, value in peer("transformers").state_dict().items()}
    stray = "module.pvt_v2.encoder.layers.0.pos_embed"
    report = load_weights(ours(), {**source, stray: torch.ones(1)}, strict=False)
    assert report.unexpected == (stray,)
    block = "module.pvt_v2.encoder.layers.1.blocks.0.attention"
    assert report.renamed[f"{block}.key.bias"] == report.renamed[f"{block}.value.bias"] == "block2.0.attn.kv.bias"
    assert report.renamed.keys() == source.keys()
    assert isinstance(report, LoadReport)


def test_a_detector_gives_its_backbone_to_a_model_without_head():
    source = randomised(ours())
    detector = {f"backbone.{name}": value for name, value in export_weights(source, "mmdet").items()}
    detector |= {"neck.lateral.weight": torch.ones(2), "bbox_head.cls.weight": torch.ones(3)}
    report = load_weights(ours(num_classes=0), {"state_dict": detector, "meta": {"epoch": 12}})
    assert report.outside == ("neck.lateral.weight", "bbox_head.cls.weight")
    with pytest.raises(ValueError, match=r"2 missing: head.weight, head.bias \(the source has no head: make the model"):
        load_weights(ours(), detector)
    assert load_weights(ours(), detector, strict=False).missing == ("head.weight", "head.bias")


@pytest.mark.parametrize("layout", ["official", "timm", "transformers"])
def test_a_head_for_other_classes_is_dropped(layout):
    source = export_weights(randomised(ours(num_classes=9)), layout)
    model = ours(num_classes=4)
    before = model.head.weight.clone()
    report = load_weights(model, source)
    assert report.dropped == ("head.weight", "head.bias")
    assert report.missing == ()
    assert "dropped: head.weight, head.bias" in str(report)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.norm4.weight, randomised(ours(num_classes=9)).norm4.weight)
    assert load_weights(ours(num_classes=0), source).dropped == ("head.weight", "head.bias")
    assert load_weights(ours(num_classes=9), source).dropped == ()


def test_a_head_of_another_width_is_a_mismatch():
    state = {**ours().state_dict(), "head.weight": torch.ones(7, 5)}
    with pytest.raises(ValueError, match=r"1 of another shape: head.weight \(7, 5\) for \(7, 32\)"):
        load_weights(ours(), state)


@TO_PEERS
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_are_fitted_as_timm_does(layout, channels, dtype):
    source = {name: value.to(dtype) for name, value in peer(layout).state_dict().items()}
    model = ours(in_channels=channels).to(dtype)
    report = load_weights(model, source)
    assert report.adapted == ("patch_embed1.proj.weight",)
    (stem,) = (value for value in source.values() if value.shape[1:] == (3, 7, 7))
    expected = timm.models._manipulate.adapt_input_conv(channels, stem.clone())
    assert torch.equal(model.patch_embed1.proj.weight, expected)


def test_other_channels_than_rgb_are_not_fitted():
    with pytest.raises(ValueError, match=r"patch_embed1.proj.weight \(8, 4, 7, 7\) for \(8, 1, 7, 7\)"):
        load_weights(ours(in_channels=1), ours(in_channels=4).state_dict())
    assert load_weights(ours(in_channels=4), ours(in_channels=4).state_dict()).adapted == ()


def test_the_models_dtype_stays():
    source = {name: value.bfloat16() for name, value in randomised(ours()).state_dict().items()}
    model = ours()
    load_weights(model, source)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, source["head.weight"].float())


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        model = ours()
    with pytest.raises(ValueError, match="model must have memory for its weights"):
        load_weights(model, ours().state_dict())


@pytest.mark.not_interpreted
@pytest.mark.one_isa
@torch.no_grad()
def test_a_model_that_has_run_sees_new_weights_and_epsilons(target):
    """Packed weights are derived data: nothing of the first weights may be left in them."""
    model, source = randomised(ours()), peer("transformers")
    model.backend = target.backend
    with target.in_use():
        model(IMAGE)
        model(IMAGE)
        load_weights(model, source.state_dict())
        again = ours()
        load_weights(again, source.state_dict())
        again.backend = target.backend
        assert torch.equal(model(IMAGE), again(IMAGE))
        assert_parity(model(IMAGE), logits_of(source.double(), IMAGE.double()), logits_of(source.float(), IMAGE))


def test_the_public_names():
    assert pvt_fast.load_weights is load_weights
    assert pvt_fast.export_weights is export_weights
    assert json.loads(json.dumps(load_weights(ours(), ours().state_dict()).norm_eps)) == MIXED


def test_a_log_handler_that_raises_changes_nothing(caplog):
    def refuse(record):
        raise KeyboardInterrupt

    model = randomised(ours())
    before = values_of(model)
    caplog.set_level("INFO", "pvt_fast")
    caplog.handler.addFilter(refuse)
    with pytest.raises(KeyboardInterrupt):
        load_weights(model, {name: value * 2 for name, value in model.state_dict().items()})
    caplog.handler.removeFilter(refuse)
    assert equal(model.state_dict(), before)
