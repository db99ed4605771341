"""Checkpoints: what is written comes back, what is damaged or dangerous is refused by name."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pvt_fast import PVT_V2
from pvt_fast.preprocess import Preprocess
from pvt_fast.weights import METADATA_KEY, assign_state, build_model, has_config, load_model, load_state, save_model

PREPROCESS = Preprocess(size=32, crop=0.8, mean=(0.4,), std=(0.3,))


def small_model(**overrides) -> PVT_V2:
    arguments = {
        "img_size": 32,
        "in_channels": 1,
        "num_classes": 4,
        "embed_dims": (8, 16),
        "num_heads": (1, 2),
        "mlp_ratios": (2, 1.5),
        "depths": (1, 2),
        "sr_ratios": (2, 1),
        "num_stages": 2,
        **overrides,
    }
    return PVT_V2(**arguments)


@pytest.fixture(params=[False, True], ids=["sr", "linear"])
def model(request) -> PVT_V2:
    model = small_model(linear=request.param, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-4))
    model.set_norm_eps(patch_embed=1e-3, reduction=1e-2)
    return model.eval()


def test_saved_model_comes_back_whole(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors", PREPROCESS)
    again, preprocess = load_model(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert preprocess == PREPROCESS
    assert not again.training
    image = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(image), model(image))  # the epsilons too, as they change the answer
    state, metadata = load_state(tmp_path / "model.safetensors")
    assert has_config(metadata)
    assert state.keys() == model.state_dict().keys()


def test_equal_weights_give_equal_files(model, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_model(model, tmp_path / name, PREPROCESS)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_uneven_epsilons_cannot_be_saved(model, tmp_path):
    model.norm1.eps = 0.5
    with pytest.raises(ValueError, match="one epsilon for its block norms, got"):
        save_model(model, tmp_path / "model.safetensors", PREPROCESS)


@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_checkpoints(model, tmp_path, nest, suffix):
    path = tmp_path / f"model{suffix}"
    state = model.state_dict()
    torch.save(state if nest is None else {nest: state, "epoch": 3}, path)
    loaded, metadata = load_state(path)
    assert metadata == {}
    fresh = small_model(linear=model.config.linear, qkv_bias=True)
    assign_state(fresh, loaded)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())


class _Payload:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickle_that_runs_code_is_refused(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"model": {"head.weight": torch.ones(1)}, "payload": _Payload(trace)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="checkpoint of tensors only"):
        load_state(tmp_path / "bad.pth")
    assert not trace.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert trace.exists(), "the payload is harmless, so refusing it proves nothing"


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [torch.ones(1)], torch.ones(1)], ids=repr)
def test_checkpoint_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="path must hold a state dict"):
        load_state(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"two\nlines\n", bytes(4096)], ids=["empty", "text", "lines", "zeros"]
)
def test_damaged_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="load_state: path must be"):
        load_state(tmp_path / name)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pth or \.pt, got '.*weights\.bin'"):
        load_state(tmp_path / "weights.bin")
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ValueError, match="must be an existing file"):
            load_state(path)


def test_states_that_do_not_fit_are_refused_and_leave_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["norm1.weight"]
    state["extra.weight"] = torch.ones(1)
    state["head.bias"] = torch.ones(5)
    with pytest.raises(ValueError, match="assign_state: state must have the model's") as info:
        assign_state(model, state)
    assert str(info.value).endswith(
        "got 1 missing: norm1.weight; 1 unknown: extra.weight; 1 of another shape: head.bias (5,) for (4,)"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_checkpoint_fills_a_float32_model(model):
    halves = {name: value.bfloat16() for name, value in model.state_dict().items()}
    assign_state(model, halves)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, halves["head.weight"].float())


def test_damaged_descriptions_are_refused(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors", PREPROCESS)
    _, metadata = load_state(tmp_path / "model.safetensors")
    good = json.loads(metadata[METADATA_KEY])
    damaged = {
        "{": "build_model: metadata must describe",
        "[]": "build_model: metadata must describe",
        json.dumps({**good, "config": {**good["config"], "depth": 3}}): "unexpected keyword argument 'depth'",
        json.dumps({**good, "config": {**good["config"], "embed_dims": [8]}}): "embed_dims must have num_stages",
        json.dumps({**good, "preprocess": {}}): "preprocess must give the model's 1 channels, got 3",
        json.dumps({"config": good["config"]}): "norm_eps",
    }
    for text, message in damaged.items():
        with pytest.raises(ValueError, match=message):
            build_model({METADATA_KEY: text})


def test_description_of_images_too_small_for_the_model_is_refused(tmp_path):
    save_model(small_model(), tmp_path / "model.safetensors", Preprocess(size=1, mean=(0.5,), std=(0.5,)))
    with pytest.raises(ValueError, match="image must be large enough for stage 1"):
        load_model(tmp_path / "model.safetensors")


def test_file_without_description_builds_no_model(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    assert not has_config(load_state(tmp_path / "bare.safetensors")[1])
    with pytest.raises(ValueError, match="must be a file written by save_model"):
        load_model(tmp_path / "bare.safetensors")
