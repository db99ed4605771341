"""A model in one file: what is written comes back, what is damaged is refused by name."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pvt_fast import PVT_V2
from pvt_fast.checkpoints.files import METADATA_KEY, load_state
from pvt_fast.images.preprocess import Preprocess
from pvt_fast.model_file import build_model, has_config, load_model, save_model

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


def test_damaged_descriptions_are_refused(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors", PREPROCESS)
    state, metadata = load_state(tmp_path / "model.safetensors")
    good = json.loads(metadata[METADATA_KEY])
    damaged = {
        "{": "build_model: metadata must be a JSON object, got Expecting property name",
        "[]": "build_model: metadata must be a JSON object, got a list",
        json.dumps({**good, "config": {**good["config"], "depth": 3}}): "unexpected keyword argument 'depth'",
        json.dumps({**good, "config": {**good["config"], "embed_dims": [8]}}): "embed_dims must have num_stages",
        json.dumps({**good, "preprocess": {}}): "preprocess must give the model's 1 channels, got 3",
        json.dumps({"config": good["config"]}): "norm_eps",
    }
    for text, message in damaged.items():
        with pytest.raises(ValueError, match=message):
            build_model(state, {METADATA_KEY: text})


def test_description_of_images_too_small_for_the_model_is_refused(tmp_path):
    save_model(small_model(), tmp_path / "model.safetensors", Preprocess(size=1, mean=(0.5,), std=(0.5,)))
    with pytest.raises(ValueError, match="image must be large enough for stage 1"):
        load_model(tmp_path / "model.safetensors")


def test_file_without_description_builds_no_model(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    assert not has_config(load_state(tmp_path / "bare.safetensors")[1])
    with pytest.raises(ValueError, match="must be a file written by save_model"):
        load_model(tmp_path / "bare.safetensors")


def test_a_description_that_does_not_fit_is_refused_before_memory_is_taken(model, tmp_path):
    save_model(model, tmp_path / "model.safetensors", PREPROCESS)
    state, metadata = load_state(tmp_path / "model.safetensors")
    good = json.loads(metadata[METADATA_KEY])
    for other in ({"depths": [10**9, 1]}, {"num_classes": 10**9}, {"in_channels": 10**8}, {"embed_dims": [10**8] * 2}):
        text = json.dumps({**good, "config": {**good["config"], **other}})
        with pytest.raises(ValueError, match="build_model: the weights' description must be that of a PVT_V2"):
            build_model(state, {METADATA_KEY: text})


def test_weights_that_are_no_numbers_are_refused(model, tmp_path):
    save_model(model, path := tmp_path / "model.safetensors", PREPROCESS)
    state, metadata = load_state(path)
    save_file({name: value.to(torch.int8) for name, value in state.items()}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"must be a plain tensor of floating-point values, got one of torch\.int8"):
        load_model(path)


def test_half_precision_comes_back_in_float32(model, tmp_path):
    save_model(model.bfloat16(), tmp_path / "model.safetensors", PREPROCESS)
    again, _ = load_model(tmp_path / "model.safetensors")
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    assert all(torch.equal(value, model.state_dict()[name].float()) for name, value in again.state_dict().items())
