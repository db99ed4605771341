"""Checkpoint files: the state dict is found in them, what is damaged or dangerous is refused by name."""

import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pvt_fast.checkpoint import load_state

STATE = {"norm.weight": torch.arange(3.0), "norm.bias": torch.ones(3)}


def same(loaded: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("nest", [(), ("model",), ("state_dict",), ("module",), ("state_dict", "model")], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_torch_checkpoints(tmp_path, nest, suffix):
    content = STATE
    for name in reversed(nest):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / f"model{suffix}")
    loaded, metadata = load_state(tmp_path / f"model{suffix}")
    assert metadata == {}
    assert same(loaded)


def test_safetensors_bring_their_metadata(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, metadata = load_state(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert same(loaded)


def test_the_official_training_scripts_arguments_are_read(tmp_path):
    """Its checkpoints hold an argparse.Namespace, which runs no code; outside this file torch still refuses it."""
    torch.save({"model": STATE, "args": Namespace(lr=0.1, model="pvt_v2_b0")}, tmp_path / "model.pth")
    assert same(load_state(tmp_path / "model.pth")[0])
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "model.pth", weights_only=True)


class _Payload:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("place", ["beside", "as a tensor", "as an argument"])
def test_pickle_that_runs_code_is_refused(tmp_path, suffix, place):
    trace, path = tmp_path / "trace", tmp_path / f"bad{suffix}"
    payload = _Payload(trace)
    contents = {
        "beside": {"model": STATE, "payload": payload},
        "as a tensor": {"model": {**STATE, "head.weight": payload}},
        "as an argument": {"model": STATE, "args": Namespace(payload=payload)},
    }
    torch.save(contents[place], path)
    with pytest.raises(ValueError, match="checkpoint of tensors only"):
        load_state(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is harmless, so refusing it proves nothing"


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"epoch": 3}, {"model": {"a": 1.0}}, [torch.ones(1)], torch.ones(1)], ids=repr
)
def test_checkpoint_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="path must hold a state dict, bare or under one of state_dict, model, module"):
        load_state(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"two\nlines\n", bytes(4096)], ids=["empty", "text", "lines", "zeros"]
)
def test_damaged_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="load_state: path must be"):
        load_state(tmp_path / name)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=r"must end in \.pth, \.pt, \.bin or \.safetensors, got '.*weights\.npz'"):
        load_state(tmp_path / "weights.npz")
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ValueError, match="must be an existing file"):
            load_state(path)
