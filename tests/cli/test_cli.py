"""The command: what it prints, and one line with exit status 2 for whatever it cannot use."""

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from sklearn import datasets

import pvt_fast
from pvt_fast.backend import cpp
from pvt_fast.cli import bench, main
from pvt_fast.cli import interrupt as _command
from pvt_fast.images.preprocess import Preprocess, read_image
from pvt_fast.model_file import load_model, save_model

ROOT = Path(__file__).parents[2]
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
    monkeypatch.setattr("pvt_fast.cli.doctor.backends", lambda: statuses)
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


def test_a_backend_that_cannot_run_is_said_in_one_line(capsys, add_backend):
    resting = replace(cpp.BACKEND.support, device=lambda device: "it rests today")
    add_backend(replace(cpp.BACKEND, support=resting))
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


# -- what a user can cause ------------------------------------------------------------------------------------------


def call_shell(command: str, **variables: str) -> subprocess.CompletedProcess:
    """A line of bash in which `pvt-fast` is the command, its output buffered as it is by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    line = command.replace("pvt-fast", f"{sys.executable} -m pvt_fast")
    return subprocess.run(["bash", "-c", line], env=environment, cwd="/", capture_output=True, text=True, timeout=120)


# What reads to the end and what does not, on buffers that are written when they are full or at the end.
OUTPUTS = {
    "closed pipe": ("pvt-fast {} | true; exit ${{PIPESTATUS[0]}}", 141, ""),
    "full disk": ("pvt-fast {} > /dev/full", 1, "error: [Errno 28] No space left on device"),
    "closed": ("pvt-fast {} >&-", 1, "error: [Errno 9] standard output is closed"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_takes_nothing_is_one_line_or_none(name):
    """What is printed is in a buffer until the end: it fails when that is written."""
    line, status, message = OUTPUTS[name]
    run = call_shell(line.format("--version"))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (status, "", bool(message))
    assert message in run.stderr


def test_more_than_a_buffer_into_a_closed_pipe(digit_files, monkeypatch):
    """In this process: the write fails where the table or the JSON is printed, not at the end."""
    for options in (("--json",), ()):
        read, write = os.pipe()
        os.close(read)
        with monkeypatch.context() as patch, os.fdopen(write, "w") as pipe:
            patch.setattr(sys, "stdout", pipe)
            assert call("classify", *[digit_files[1]] * 40, "--weights", DIGITS, *options) == 141


@pytest.mark.parametrize("delay", [0.0, 3.0], ids=["importing", "running"])
def test_control_c_ends_it_quietly(delay):
    """From when torch is being loaded; before, Python itself starts."""
    program = [sys.executable, "-m", "pvt_fast", "bench", "--model", "pvt_v2_b0", "--rounds", "1000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, "cwd": "/"}
    # whatever these tests run under may ignore the signal, and hand that down
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(program, preexec_fn=heeded, **options) as process:
        try:
            while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.005)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (["-m", "pvt_fast", "doctor"], True),
        (["-B", "-mpvt_fast"], True),
        (["/usr/bin/pvt-fast", "bench"], True),
        (["-m", "training", "pvt_fast"], False),
        (["-m", "pvt_fast_training"], False),
        (["train.py"], False),
        (["-c", "import pvt_fast"], False),
    ],
    ids=str,
)
def test_only_the_command_handles_control_c(line, command, monkeypatch):
    """A program's own modules may import the package while Python looks for the one that it is to run."""
    at = next((i for i, word in enumerate(line) if word.startswith("-m")), None)
    arguments = line if at is None else ["-m", *line[at + (2 if line[at] == "-m" else 1) :]]
    monkeypatch.setattr(sys, "orig_argv", ["python", *line])
    monkeypatch.setattr(sys, "argv", arguments if line[0] != "-c" else line[:1])
    assert _command._is_command() == command


def test_importing_the_package_leaves_signals_alone():
    state = "signal.getsignal(2), sys.excepthook"
    code = f"import signal, sys; before = {state}; import pvt_fast; print(before == ({state}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.stdout == "True\n", run.stderr


def test_control_c_in_a_program_that_calls_main(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("pvt_fast.cli.command.doctor.report", interrupted)
    assert call("doctor") == 130
    assert capsys.readouterr() == ("", "")


VARIABLES = [f"PVT_FAST_{name}" for name in ("BACKEND", "ISA", "CHECK_WEIGHTS")]


@pytest.mark.parametrize("name", VARIABLES[1:])
def test_nonsense_in_a_variable_is_one_line(name, digit_files):
    run = call_fresh("classify", digit_files[0], "--weights", DIGITS, **{name: "banana"})
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(f"pvt-fast classify: error: {name} must be ")
    assert run.stderr.endswith("got 'banana'\n")


def test_nonsense_in_all_variables_is_no_obstacle_to_doctor():
    run = call_fresh("doctor", **dict.fromkeys(VARIABLES, "banana"))
    assert (run.returncode, run.stderr) == (0, "")
    out = " ".join(run.stdout.replace("│", " ").split())
    assert "backend cpp not usable: PVT_FAST_CHECK_WEIGHTS must be 0 or 1, got 'banana'" in out
    assert "PVT_FAST_BACKEND not usable: PVT_FAST_BACKEND must be one of" in out


def test_names_that_the_terminal_cannot_show_are_escaped(digit_files, tmp_path, capsys):
    paths = [tmp_path / "ü.png", tmp_path / os.fsdecode(b"\xff.png")]
    for path in paths:
        path.write_bytes(digit_files[3].read_bytes())
    run = call_fresh("classify", *paths, "--weights", DIGITS, PYTHONIOENCODING="ascii")
    assert (run.returncode, run.stderr) == (0, "")
    assert call("classify", *paths, "--weights", DIGITS) == 0
    for out, umlaut in ((run.stdout, "\\xfc.png"), (capsys.readouterr().out, "ü.png")):
        folded = "".join(out.replace("|", " ").replace("│", " ").split())
        assert umlaut in folded
        assert "\\udcff.png" in folded


LABELS = {
    "binary": (bytes(range(256)), "must be UTF-8 lines or a JSON list"),
    "empty": (b"", "must name the model's 10 classes, got 0"),
    "nested": (b"[" * 100_000, "must be UTF-8 lines or a JSON list"),
    "numbers": (b"[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]", "must name the model's 10 classes"),
    "huge": (b"x\n" * 2**16, "must name the model's 10 classes, got 65536"),
}


@pytest.mark.parametrize("name", LABELS)
def test_odd_labels(name, digit_files, tmp_path, capsys):
    content, message = LABELS[name]
    (tmp_path / "labels").write_bytes(content)
    assert call(*CLASSIFY[:1], digit_files[0], *CLASSIFY[2:], "--labels", tmp_path / "labels") == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err


def test_labels_without_an_end_and_in_no_file(digit_files, tmp_path, capsys):
    for path, message in (("/dev/zero", "must have at most 67108864 bytes"), (tmp_path, "Is a directory")):
        assert call("classify", digit_files[0], "--weights", DIGITS, "--labels", path) == 2
        assert message in capsys.readouterr().err


def test_labels_with_a_byte_order_mark(digit_files, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("\n".join("abcdefghij"), encoding="utf-8-sig")
    options = ("--weights", DIGITS, "--labels", tmp_path / "labels.txt", "--json", "--topk", 10)
    assert call("classify", digit_files[0], *options) == 0
    assert sorted(entry["label"] for entry in json.loads(capsys.readouterr().out)[0]["top"]) == list("abcdefghij")


ABSURD = {
    "batch": (("--batch", "99999999"), "--batch and --size must make images that fit into"),
    "batch of 20 digits": (("--batch", "9" * 20), "--batch: must be at most 1000000000, got"),
    "batch of 5,000 digits": (("--batch", "9" * 5000), "--batch: must be at most 1000000000, got"),
    "size": (("--size", "99999999"), "--batch and --size must make images that fit into"),
    "threads": (("--threads", "9999"), f"--threads: must be at most 8 a processor, {8 * os.cpu_count()}, got 9999"),
    "rounds": (("--rounds", "1" + "0" * 20), "--rounds: must be at most 1000000000, got"),
    "JSON in a folder": (("--json", "/"), "--json must be a file that can be written, got /"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_numbers_are_refused_before_anything_is_allocated(name, capsys):
    options, message = ABSURD[name]
    assert call(*BENCH, *options) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
    assert len(captured.err) < 300


@pytest.mark.parametrize(
    "call_that_fails", [lambda: torch.empty(2**50), lambda: bytearray(2**60)], ids=["torch", "Python"]
)
def test_a_lack_of_memory_is_one_line(call_that_fails, capsys, monkeypatch):
    monkeypatch.setattr(bench, "compare", lambda *arguments: call_that_fails())
    assert call(*BENCH) == 1
    assert capsys.readouterr().err.startswith("pvt-fast bench: error: out of memory (")


def test_too_little_memory_for_the_imports_is_one_line():
    run = call_shell("ulimit -v 200000; pvt-fast doctor")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("pvt-fast: error: out of memory during the imports (")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), ZeroDivisionError(), AttributeError("x")], ids=repr)
def test_a_fault_of_ours_is_not_hidden(error, monkeypatch):
    def faulty(*arguments):
        raise error

    monkeypatch.setattr(bench, "compare", faulty)
    with pytest.raises(type(error)):
        call(*BENCH)


def test_what_cannot_be_written_ends_with_status_1(capsys):
    assert call(*BENCH, "--backend", "reference", "--rounds", "1", "--json", "/dev/full") == 1
    assert capsys.readouterr().err == "pvt-fast bench: error: [Errno 28] No space left on device\n"


def test_figures_that_do_not_fit_on_the_disk_leave_the_old_ones(tmp_path, capsys):
    (tmp_path / "old.json").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert call(*BENCH, "--backend", "reference", "--rounds", "1", "--json", tmp_path / "old.json") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert (tmp_path / "old.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_logits_that_are_no_numbers_are_no_answer(digit_files, tmp_path, capsys):
    model, preprocess = load_model(DIGITS)
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    save_model(model, tmp_path / "nan.safetensors", preprocess)
    assert call("classify", digit_files[5], "--weights", tmp_path / "nan.safetensors", "--json") == 2
    assert (
        f"--weights must give finite logits in this dtype, got others for {digit_files[5]}" in capsys.readouterr().err
    )


def test_names_of_classes_may_have_what_breaks_lines_elsewhere(digit_files, tmp_path, capsys):
    names = ["a\u2028b", "c\rd", "e\x0cf", *"ghijkl", ""]
    for kind, text in (("txt", "\r\n".join([*names[:-1], "m"]) + "\r\n\n"), ("json", json.dumps(names))):
        (tmp_path / f"labels.{kind}").write_text(text, newline="")
        labels = ("--labels", tmp_path / f"labels.{kind}", "--topk", 10)
        assert call("classify", digit_files[5], "--weights", DIGITS, *labels, "--json") == 0
        top = json.loads(capsys.readouterr().out)[0]["top"]
        assert {entry["label"] for entry in top} == {*names[:-1], "m" if kind == "txt" else ""}


def test_images_are_read_a_few_at_a_time(digit_files, monkeypatch, capsys):
    """Thousands of files take no more memory than a batch."""
    held = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda images: held.append(len(images)) or stack(images))
    assert call("classify", *[digit_files[5]] * 35, "--weights", DIGITS, "--backend", "reference", "--json") == 0
    assert {answer["top"][0]["index"] for answer in json.loads(capsys.readouterr().out)} == {5}
    assert [count for count in held if count > 3] == [16, 16]
