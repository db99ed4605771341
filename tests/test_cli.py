"""The command: what it prints, and one line with exit status 2 for whatever it cannot use."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from sklearn import datasets

import pvt_fast
from pvt_fast import bench, cpp
from pvt_fast.cli import main
from pvt_fast.preprocess import Preprocess, read_image

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "examples" / "digits.safetensors")


def call(*arguments) -> int:
    """Exit status of the command, run in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def call_fresh(*arguments, **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, without triton's interpreter, which is not for timing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    program = [sys.executable, "-m", "pvt_fast", *map(str, arguments)]
    return subprocess.run(program, env=environment, cwd="/", capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory) -> dict[int, Path]:
    """A greyscale PNG of 64x64 pixels for each digit, as scikit-learn has it."""
    data = datasets.load_digits()
    folder = tmp_path_factory.mktemp("digits")
    files = {}
    for digit in range(10):
        grey = torch.from_numpy(data.images[data.target == digit][3] * (255 / 16)).round().to(torch.uint8)
        files[digit] = folder / f"{digit}.png"
        Image.fromarray(grey.numpy()).resize((64, 64), Image.Resampling.BILINEAR).save(files[digit])
    return files


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    names = datasets.load_sample_images()
    Image.fromarray(names.images[0]).save(path, quality=90)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, pvt_fast.PVT_V2]:
    """A pvt_v2_b0 for three classes, saved under "model" as training scripts do."""
    torch.manual_seed(0)
    model = pvt_fast.create_model("pvt_v2_b0", num_classes=3).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)  # so that the classes differ
    path = tmp_path_factory.mktemp("weights") / "b0.pth"
    torch.save({"model": model.state_dict(), "epoch": 7}, path)
    return path, model


# -- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_names_versions_and_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("PVT_FAST_ISA", "amx")
    assert call("doctor") == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for fact in (pvt_fast.__version__, torch.__version__, "python", "triton", "CPU", "threads", "GPU"):
        assert fact in out
    assert "PVT_FAST_ISA amx" in out
    for status in pvt_fast.backends():
        state = "usable" if status.available else "not usable: " + " ".join(status.reason.split())[:30]
        assert f"backend {status.name} {state}" in out


def test_a_bad_environment_is_one_line_and_doctor_explains_it(digit_files):
    """In a process of its own, as the variable is read at import."""
    run = call_fresh("classify", digit_files[0], "--weights", DIGITS, PVT_FAST_BACKEND="cuda")
    message = "PVT_FAST_BACKEND must be one of auto, triton, cpp, reference; got 'cuda'"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"pvt-fast classify: error: {message}\n")
    run = call_fresh("doctor", PVT_FAST_BACKEND="cuda")
    assert (run.returncode, run.stderr) == (0, "")
    assert message in " ".join(run.stdout.split())
    chosen = ("--weights", DIGITS, "--backend", "cpp", "--json")
    run = call_fresh("classify", digit_files[0], *chosen, PVT_FAST_BACKEND="cuda")
    assert run.returncode == 0, run.stderr


def test_doctor_shows_brackets_as_they_are(capsys, monkeypatch):
    statuses = [pvt_fast.BackendStatus("triton", False, "pip install 'pvt-fast[triton]'")]
    monkeypatch.setattr("pvt_fast.doctor.backends", lambda: statuses)
    assert call("doctor") == 0
    assert "pvt-fast[triton]" in capsys.readouterr().out


def test_doctor_names_the_isa(capsys, request):
    isas = [target.isa for target in request.config.targets if target.backend == "cpp"]
    assert call("doctor") == 0
    out = capsys.readouterr().out
    expected = ["ISA in use", ", ".join(isas)] if isas else ["ISA", "unknown"]
    assert all(text in out for text in expected)


def test_doctor_in_a_fresh_process():
    run = call_fresh("doctor")
    assert (run.returncode, run.stderr) == (0, "")
    assert "backend reference" in run.stdout


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"pvt-fast {pvt_fast.__version__}\n"


# -- classify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_digits_are_recognised_from_files(digit_files, capsys, dtype):
    assert call("classify", *digit_files.values(), "--weights", DIGITS, "--dtype", dtype, "--json") == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == [str(path) for path in digit_files.values()]
    assert [answer["top"][0]["index"] for answer in answers] == list(digit_files)
    for answer in answers:
        probabilities = [entry["probability"] for entry in answer["top"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1


def test_classify_on_every_backend(digit_files, capsys, request):
    # triton's interpreter would take half a minute; its digits are in test_digits.py
    targets = [target for target in request.config.targets if not target.interpreted]
    for backend in dict.fromkeys(["auto", *(target.backend for target in targets)]):
        assert call("classify", digit_files[4], "--weights", DIGITS, "--backend", backend, "--json") == 0
        assert json.loads(capsys.readouterr().out)[0]["top"][0]["index"] == 4


def test_turned_photograph_of_a_digit_is_recognised(digit_files, capsys, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(digit_files[7])
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "seven.jpg", exif=exif, quality=95)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "seven.jpg")).size == upright.size
    assert call("classify", tmp_path / "seven.jpg", "--weights", DIGITS, "--topk", 1, "--json") == 0
    assert [entry["label"] for entry in json.loads(capsys.readouterr().out)[0]["top"]] == ["7"]


def test_table_shows_labels(digit_files, capsys, tmp_path):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    labels = ("--labels", tmp_path / "names.txt")
    assert call("classify", digit_files[3], "--weights", DIGITS, *labels, "--topk", 2) == 0
    out = capsys.readouterr().out
    assert "three" in out
    assert out.count("%") == 2


@pytest.mark.parametrize("layout", ["nested", "official", "timm", "transformers"])
def test_published_layouts(photo, checkpoint, capsys, tmp_path, layout):
    path, model = checkpoint
    if layout != "nested":
        path = tmp_path / "b0.safetensors"
        save_file(pvt_fast.export_weights(model, layout), path)
    if layout == "transformers":
        model = copy.deepcopy(model)
        model.set_norm_eps(block=1e-6, patch_embed=1e-6, reduction=1e-6)
    (tmp_path / "names.json").write_text(json.dumps(["cat", "dog", "temple"]))
    labels = ("--labels", tmp_path / "names.json")
    assert call("classify", photo, "--model", "pvt_v2_b0", "--weights", path, *labels, "--json") == 0
    top = json.loads(capsys.readouterr().out)[0]["top"]
    with torch.inference_mode():
        expected = model(Preprocess()(read_image(photo))[None])[0].softmax(dim=0)
    assert sorted(entry["index"] for entry in top) == [0, 1, 2]
    for entry in top:
        assert entry["label"] == ["cat", "dog", "temple"][entry["index"]]
        assert entry["probability"] == pytest.approx(expected[entry["index"]].item(), rel=1e-4)


# -- bench ----------------------------------------------------------------------------------------------------------


def test_bench_writes_its_figures(capsys, tmp_path):
    threads = torch.get_num_threads()
    options = ("--batch", 2, "--size", 32, "--rounds", 3, "--threads", 1, "--json", tmp_path / "figures.json")
    assert call("bench", "--model", "pvt_v2_b0", "--backend", "reference", "--device", "cpu", *options) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "pvt_v2_b0 (random weights), batch 2, 32 px, CPU threads: 1" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {name: figures[name] for name in ("model", "batch", "size", "threads")} == {
        "model": "pvt_v2_b0",
        "batch": 2,
        "size": 32,
        "threads": 1,
    }
    (row,) = figures["results"]
    assert (row["backend"], row["dtype"], row["device"], row["speedup"]) == ("reference", "float32", "cpu", 1.0)
    assert len(row["samples_ms"]) == 3
    assert row["p10_ms"] <= row["median_ms"] == sorted(row["samples_ms"])[1] <= row["p90_ms"]
    assert row["images_per_s"] == pytest.approx(2 / row["median_ms"] * 1e3)


def test_bench_runs_all_that_can_by_default(tmp_path):
    options = ("--size", 32, "--rounds", 2, "--dtype", "bfloat16", "--json", tmp_path / "figures.json")
    run = call_fresh("bench", "--model", "pvt_v2_b0", *options)
    assert (run.returncode, run.stderr) == (0, "")
    figures = json.loads((tmp_path / "figures.json").read_text())
    ran = [row["backend"] for row in figures["results"]]
    assert sorted({*ran, *figures["not_runnable"]}) == sorted(status.name for status in pvt_fast.backends())
    assert "reference" in ran
    for name, reason in figures["not_runnable"].items():
        assert f"backend '{name}' cannot run: " in reason
        assert reason in run.stdout


def test_bench_times_nothing_when_the_answers_are_wrong(capsys, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("largest error 1.0 exceeds 0.1")

    monkeypatch.setattr(bench, "assert_parity", refuse)
    assert call("bench", "--model", "pvt_v2_b0", "--size", 32, "--backend", "reference", "--rounds", 1) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("pvt-fast bench: parity failed, nothing was timed: largest error 1.0 exceeds 0.1\n")


# -- bad arguments --------------------------------------------------------------------------------------------------

CLASSIFY = ("classify", "{digit}", "--weights", DIGITS)
BENCH = ("bench", "--model", "pvt_v2_b0", "--size", "32")
BAD_ARGUMENTS = {
    "no command": ((), "arguments are required: command"),
    "unknown command": (("train",), "invalid choice: 'train'"),
    "no weights": (("classify", "{digit}"), "arguments are required: --weights"),
    "unknown model": (
        ("classify", "{digit}", "--model", "resnet50", "--weights", DIGITS),
        "invalid choice: 'resnet50'",
    ),
    "model missing": (("classify", "{digit}", "--weights", "{checkpoint}"), "--model must be given"),
    "model superfluous": ((*CLASSIFY, "--model", "pvt_v2_b0"), "--model must be left out"),
    "other model": (
        ("classify", "{digit}", "--model", "pvt_v2_b1", "--weights", "{checkpoint}"),
        "of another shape: patch_embed1.proj.weight (32, 3, 7, 7) for (64, 3, 7, 7)",
    ),
    "image missing": (("classify", "{tmp}/absent.png", "--weights", DIGITS), "must be an existing file"),
    "image unreadable": (("classify", "{text}", "--weights", DIGITS), "must be a readable image"),
    "weights missing": (("classify", "{digit}", "--weights", "{tmp}/absent.pth"), "must be an existing file"),
    "weights unreadable": (("classify", "{digit}", "--weights", "{text}.pth"), "load_state: path must"),
    "weights headless": (
        ("classify", "{digit}", "--model", "pvt_v2_b0", "--weights", "{headless}"),
        "must include a head",
    ),
    "labels missing": ((*CLASSIFY, "--labels", "{tmp}/absent.txt"), "No such file"),
    "labels too few": ((*CLASSIFY, "--labels", "{text}"), "must name the model's 10 classes, got 2"),
    "labels no JSON": ((*CLASSIFY, "--labels", "{brackets}"), "must be UTF-8 lines or a JSON list, got"),
    "topk zero": ((*CLASSIFY, "--topk", "0"), "--topk: must be an integer of at least 1, got '0'"),
    "topk too large": ((*CLASSIFY, "--topk", "11"), "at most the model's 10 classes, got 11"),
    "bad dtype": ((*CLASSIFY, "--dtype", "int8"), "invalid choice: 'int8'"),
    "bad backend": ((*CLASSIFY, "--backend", "tpu"), "invalid choice: 'tpu'"),
    "batch zero": ((*BENCH, "--batch", "0"), "--batch: must be an integer of at least 1, got '0'"),
    "batch no number": ((*BENCH, "--batch", "two"), "--batch: must be an integer of at least 1, got 'two'"),
    "rounds negative": ((*BENCH, "--rounds", "-1"), "--rounds"),
    "threads zero": ((*BENCH, "--threads", "0"), "--threads: must be an integer of at least 1, got '0'"),
    "size too small": ((*BENCH[:3], "--size", "8"), "image must be large enough"),
    "bench dtype": ((*BENCH, "--dtype", "float64"), "invalid choice: 'float64'"),
    "folder missing": ((*BENCH, "--json", "{tmp}/absent/figures.json"), "must lie in an existing folder"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_end_with_one_line_and_status_2(name, digit_files, checkpoint, tmp_path, capsys):
    arguments, message = BAD_ARGUMENTS[name]
    places = {
        "digit": digit_files[0],
        "checkpoint": checkpoint[0],
        "tmp": tmp_path,
        "text": tmp_path / "text",
        "brackets": tmp_path / "brackets",
        "headless": tmp_path / "headless.pth",
    }
    for path in (places["text"], tmp_path / "text.pth"):
        path.write_text("two\nlines\n")
    places["brackets"].write_text("[no json")
    body = {key: value for key, value in checkpoint[1].state_dict().items() if not key.startswith("head.")}
    torch.save(body, places["headless"])

    assert call(*(argument.format(**places) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pvt-fast")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_backend_that_cannot_run_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cpp, "unsupported", lambda facts: "it rests today")
    assert call(*BENCH, "--backend", "cpp", "--device", "cpu") == 2
    assert capsys.readouterr().err == "pvt-fast bench: error: backend 'cpp' cannot run: it rests today\n"


def test_no_gpu_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(bench, "devices", lambda: ["cpu"])
    assert call(*BENCH, "--device", "cuda") == 2
    assert capsys.readouterr().err.endswith("got cuda, and torch finds no GPU\n")


def test_bad_arguments_in_a_fresh_process():
    run = call_fresh("classify", "absent.png", "--weights", DIGITS)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "pvt-fast classify: error: read_image: path must be an existing file, got 'absent.png'\n"
