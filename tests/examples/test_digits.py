"""The digits: their split, the weights in examples/, the script that makes these weights, the demo that shows them."""

import os
import subprocess
import sys
from pathlib import Path

import demo
import pytest
import torch
import train_digits
from digits import PREPROCESS, Digits, load_digits
from PIL import Image

import pvt_fast
from pvt_fast.images.preprocess import read_image
from pvt_fast.model_file import load_model

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "examples" / "digits.safetensors"
LEAST_ACCURACY = 0.975


@pytest.fixture(scope="module")
def split() -> tuple[Digits, Digits]:
    return load_digits()


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_split_is_stratified_and_always_the_same(split):
    training, held_out = split
    assert len(training.labels) + len(held_out.labels) == 1797
    shares = held_out.labels.bincount(minlength=10) / torch.cat([training.labels, held_out.labels]).bincount()
    assert ((shares - 0.2).abs() < 0.003).all(), shares
    torch.manual_seed(123)
    again = load_digits()
    assert all(torch.equal(a.images, b.images) for a, b in zip(split, again, strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(split, again, strict=True))


def test_no_held_out_image_is_trained_on(split):
    training, held_out = ({image.numpy().tobytes() for image in part.images} for part in split)
    assert not training & held_out


def test_images_are_what_the_preprocessing_gives_for_a_file(split, tmp_path):
    _, held_out = split
    assert held_out.images.shape[1:] == (1, 32, 32)
    from sklearn import datasets

    data = datasets.load_digits()
    grey = torch.from_numpy(data.images[7] * (255 / 16)).round().to(torch.uint8)
    Image.fromarray(grey.numpy()).save(tmp_path / "digit.png")
    from_file = PREPROCESS(read_image(tmp_path / "digit.png"))
    both = torch.cat([split[0].images, held_out.images])
    nearest = (both - from_file).abs().amax(dim=(1, 2, 3)).min().item()
    # 8-bit grey is rounded three times: in the file, and after each direction of PIL's resize; 2 / 255 is one level
    assert nearest <= 3 * 0.5 * 2 / 255


def test_weights_are_small_and_of_the_model_that_the_script_trains():
    assert WEIGHTS.stat().st_size <= 1_000_000
    model, preprocess = load_model(WEIGHTS)
    assert model.config == train_digits.make_model().config
    assert model.config.linear
    assert preprocess == PREPROCESS


@pytest.mark.not_interpreted
def test_held_out_accuracy(split, target, dtype):
    model, _ = load_model(WEIGHTS)
    model.to(target.device, dtype)
    model.backend = target.backend
    images, labels = split[1]
    with target.in_use(), torch.inference_mode():
        predictions = model(images.to(target.device, dtype)).argmax(dim=1).cpu()
    assert (predictions == labels).double().mean().item() >= LEAST_ACCURACY


def test_training_is_reproducible(tmp_path, keep_threads, capsys):
    files = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        out = tmp_path / f"{name}.safetensors"
        train_digits.main(["--epochs", "1", "--limit", "96", "--batch", "32", "--seed", str(seed), "--out", str(out)])
        files[name] = out.read_bytes()
    assert files["first"] == files["again"]
    assert files["first"] != files["other"]
    assert "on the 359 held out" in capsys.readouterr().out


def test_training_lowers_the_loss(split, keep_threads):
    torch.set_num_threads(1)
    few = Digits(split[0].images[:64], split[0].labels[:64])
    model = train_digits.make_model()
    untrained = train_digits.accuracy(model.eval(), few)
    with train_digits.Progress(disable=True) as progress:
        train_digits.train(model, few, 12, 16, 0, progress)
    assert train_digits.accuracy(model, few) > untrained + 0.3


def test_augmentation_moves_each_image_its_own_way(split):
    images = split[0].images[:1].expand(4, -1, -1, -1)
    moved = train_digits.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert all(not torch.allclose(moved[i], other, atol=0.1) for i in range(4) for other in (images[0], moved[i - 1]))
    again = train_digits.augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def test_picture_shows_wrong_predictions_in_red(split, tmp_path):
    labels = split[1].labels
    pictures = {}
    for name, predictions in (("right", labels), ("wrong", (labels + 1) % 10)):
        demo.draw(split[1], predictions, tmp_path / f"{name}.png")
        pixels = Image.open(tmp_path / f"{name}.png").convert("RGB")
        colours = {colour for _, colour in pixels.getcolors(maxcolors=2**24)}
        pictures[name] = ((255, 0, 0) in colours, (0, 128, 0) in colours)
    assert pictures == {"right": (False, True), "wrong": (True, False)}  # (red, green)


def test_demo_runs_every_backend(tmp_path):
    # not in the interpreter: a demo is for what runs at speed
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    program = [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path / "demo.png")]
    run = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    digits, photograph = run.stdout.split("pvt_v2_b2_li")
    assert "random weights: timing and agreement only, no accuracy" in photograph
    for status in pvt_fast.backends():
        interpreted = status.name == "triton" and not torch.cuda.is_available()
        for table in (digits, photograph):
            if status.available and not interpreted:
                assert table.count(f"\n  {status.name} ") >= 2  # float32 and bfloat16
            else:
                assert f"not in the table: backend '{status.name}' cannot run: " in table
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 300
