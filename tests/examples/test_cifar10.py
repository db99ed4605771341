"""examples/train_cifar10.py: on a few made images it trains, goes on after it was interrupted, and tells wrong data."""

import json
import zipfile
from pathlib import Path

import class_folders
import pytest
import torch
import train_cifar10
from PIL import Image

from pvt_fast.model_file import load_model


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight images to train on and two to judge by, of each of two classes."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")
    return root


def train(data: Path, out: Path, *more: str) -> list[dict]:
    train_cifar10.main(
        [str(data), "--out", str(out), "--epochs", "2", "--batch", "8", "--threads", "1", "--judge-every", "0", *more]
    )
    return json.loads((out / "history.json").read_text())


@pytest.mark.parametrize("precision", train_cifar10.PRECISIONS)
def test_every_precision_trains_and_saves(folder, tmp_path, precision, capsys):
    history = train(folder, tmp_path / "run", "--precision", precision, "--backend", "reference")
    assert [len(epoch["losses"]) for epoch in history] == [2, 2]
    assert "test accuracy of" in capsys.readouterr().out
    model, preprocess = load_model(tmp_path / "run" / "model.safetensors")
    assert (model.config.num_classes, preprocess) == (2, train_cifar10.PREPROCESS)
    assert (tmp_path / "run" / "model.safetensors").stat().st_size <= 5_000_000
    assert (tmp_path / "run" / "classes.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_training_goes_on_to_the_same_losses_and_weights(folder, tmp_path, monkeypatch, precision):
    options = ("--precision", precision, "--backend", "reference")
    whole = train(folder, tmp_path / "whole", *options)
    step = train_cifar10.Training.train_step

    def interrupted(self, pixels, labels):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self, pixels, labels)

    monkeypatch.setattr(train_cifar10.Training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "parts", *options)
    monkeypatch.undo()
    parts = train(folder, tmp_path / "parts", "--resume", *options)
    assert [epoch["losses"] for epoch in parts] == [epoch["losses"] for epoch in whole]
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_zip_is_the_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, Path("outer") / path.relative_to(folder))
    of_folder, of_zip = class_folders.load(folder, 32), class_folders.load(tmp_path / "data.zip", 32)
    assert of_folder.classes == of_zip.classes
    assert torch.equal(of_folder.training.pixels, of_zip.training.pixels)
    assert torch.equal(of_folder.held_out.labels, of_zip.held_out.labels)


def test_classes_alone_are_split(folder):
    data = class_folders.load(folder / "train", 32)
    assert (len(data.training.labels), data.held_out.labels.tolist()) == (12, [0, 0, 1, 1])


def test_wrong_data_is_told(folder, tmp_path, capsys):
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    for name, told in (
        ("nowhere", "which does not exist"),
        ("text.zip", "must be a folder or a zip"),
        ("empty", "must have images"),
    ):
        with pytest.raises(SystemExit):
            train(tmp_path / name, tmp_path / "run")
        assert told in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=r"must have its images as <class>/<image>, got 0\.png"):
        class_folders.load(folder / "train" / "cat", 32)
