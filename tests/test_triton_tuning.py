"""Which block sizes are chosen: what is offered, measured, remembered and committed; and that all of it is right."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from pvt_fast import kernels
from pvt_fast.kernels import config, launch, tuned, tuning, tuning_records
from pvt_fast.kernels.linear import linear
from pvt_fast.ops import Linear
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase, assert_parity, expected, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
BF16, FP32 = torch.bfloat16, torch.float32
CHIP = launch.PRETENDED
SMALL_CHIP = launch.Chip("sm_89", 99 * 1024, 128)


def times(*milliseconds):
    return [({"BLOCK_M": 16 * (place + 1)}, ms) for place, ms in enumerate(milliseconds)]


@pytest.mark.parametrize(
    ("milliseconds", "place"),
    [
        ((1.0,), 0),
        ((1.0, 0.98), 0),  # within the margin
        ((1.0, 0.971), 0),
        ((1.0, 0.969), 1),
        ((1.0, 0.9, 0.8), 2),
        ((1.0, 0.8, 0.8), 1),  # a tie goes to the earlier
        ((1.0, 1.0, 1.0), 0),
        ((1.0, 2.0, 0.5), 2),
    ],
)
def test_a_candidate_must_beat_the_default_by_more_than_the_margin(milliseconds, place):
    assert tuning.best(times(*milliseconds)) == times(*milliseconds)[place][0]


DEFAULTS = (
    ("linear_kernel", config.linear(320, 1280, BF16, CHIP)),
    ("norm_linear_kernel", config.norm_linear(64, 128, BF16, CHIP)),
    ("norm_fc1_kernel", config.norm_linear(64, 512, BF16, CHIP)),
    ("dwconv_fc2_kernel", config.dwconv_fc2(64, BF16, True, CHIP)),
    ("dwconv_gelu_kernel", config.dwconv_gelu(True)),
    ("attention_kernel", config.attention(64, 64, True, BF16, CHIP)),
    ("head_attention_kernel", config.attention(320, 64, False, BF16, CHIP)),
    ("patch_embed_kernel", config.patch_embed(64, 128, BF16, CHIP)),
    ("spatial_reduction_kernel", config.spatial_reduction(64, BF16, True, False, CHIP)),
)
# constants that other launches, buffers or the kernels' own arithmetic depend on
FIXED = {"ROWS", "BLOCK_H", "BLOCK_K", "BLOCK_C", "BLOCK_D", "BLOCK_KEYS", "BLOCK_ROWS"}
FIXED |= {"HELD", "WHOLE_ROWS", "PER_TAP", "ONE_BLOCK"}


@pytest.mark.parametrize(("name", "default"), DEFAULTS, ids=[name for name, _ in DEFAULTS])
def test_candidates(name, default):
    before = dict(default)
    offered = tuning.candidates(name, default, CHIP)
    assert offered[0] == default == before
    assert 3 <= len(offered) <= 7
    assert all(shape not in offered[:place] for place, shape in enumerate(offered))
    for shape in offered:
        changed = {constant for constant in shape if shape[constant] != default[constant]}
        assert shape.keys() == default.keys()
        assert not changed & FIXED
        assert name != "head_attention_kernel" or "BLOCK_M" not in changed
    assert tuning.candidates(name, default, SMALL_CHIP) == [default], "no gate has looked at them there"


def test_every_tuned_kernel_has_a_default_here():
    assert {name for name, _ in DEFAULTS} == set(tuning._OVERRIDES)


def test_what_the_chip_cannot_hold_is_dropped():
    def start_with(shape):
        if shape["BLOCK_M"] == 32:
            raise OutOfResources(300, 227, "shared memory")

    offered = [shape for shape, _ in times(1, 1, 1)]
    measured = tuning.measure(offered, start_with, lambda start, device: 1.0, torch.device("cpu"))
    assert measured == [(offered[0], 1.0), (offered[2], 1.0)]


def test_a_default_that_the_chip_cannot_hold_raises():
    def start_with(shape):
        raise OutOfResources(300, 227, "shared memory")

    with pytest.raises(OutOfResources):
        tuning.measure([{"BLOCK_M": 64}, {"BLOCK_M": 32}], start_with, lambda start, device: 1.0, torch.device("cpu"))


def test_the_median_decides_and_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(tuning, "REPEATS", 3)
    order, clock = [], iter([9.0, 2.0, 1.0, 3.0, 1.5, 2.5])

    def timer(start, device):
        start()
        return next(clock)

    offered = [{"BLOCK_M": 64}, {"BLOCK_M": 128}]
    measured = tuning.measure(offered, lambda shape: order.append(shape["BLOCK_M"]), timer, torch.device("cpu"))
    assert order == [64, 128] * 4
    assert measured == [(offered[0], 1.5), (offered[1], 2.5)]


class Clock:
    """Really launches, and says that the launch took as long as its constants say: deterministic."""

    def __init__(self, **preferred):
        self.preferred, self.launches = preferred, []

    def __call__(self, start, device):
        with launch.recorded() as launches:
            start()
        (made,) = launches
        self.launches.append(made)
        for name, value in zip(made.kernel.arg_names, made.args, strict=False):
            assert name != "counter_ptr" or not value.any(), "counters are back at 0"
        return 1.0 if all(made.constants.get(name) == value for name, value in self.preferred.items()) else 2.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(tuning, "REPEATS", 1)


def call_linear(rows=20, columns=128, inner=32):
    draw = torch.Generator().manual_seed(3)
    shapes = ((1, rows, inner), (1, rows, columns), (columns, inner), (columns,))
    a, x, weight, bias = (torch.randn(shape, generator=draw).to(DEVICE) for shape in shapes)
    out = torch.empty_like(x)
    with launch.recorded() as launches:
        linear(launch.launch, a, Linear(weight, bias), out, x, None)
    unrecorded = torch.empty_like(x)
    linear(launch.launch, a, Linear(weight, bias), unrecorded, x, None)
    truth = x.double() + torch.nn.functional.linear(a.double(), weight.double(), bias.double())
    for result in (out, unrecorded):
        assert_parity(result, truth.cpu(), (x + torch.nn.functional.linear(a, weight, bias)).cpu())
    return launches[0].constants


def test_the_first_launch_tunes_and_later_ones_and_recordings_use_it(tmp_path):
    clock = Clock(BLOCK_N=128, BLOCK_M=64)
    with tuning.use(tuning.Tuner(tmp_path / "times.json", clock)):
        assert call_linear()["BLOCK_N"] == 64, "nothing is tuned in a recording"
        timed = len(clock.launches)
        assert timed == len({str(made.constants) for made in clock.launches}) >= 3
        assert (call_linear()["BLOCK_M"], call_linear()["BLOCK_N"]) == (64, 128)
        call_linear(rows=21)
        assert len(clock.launches) == timed
        call_linear(rows=90)  # another bucket
        assert len(clock.launches) == 2 * timed
    assert call_linear()["BLOCK_N"] == 64
    with tuning.use(tuning.Tuner(tmp_path / "times.json", clock)):
        assert call_linear()["BLOCK_N"] == 128, "read from the file"
    assert len(clock.launches) == 2 * timed


def test_warm_takes_what_is_known_and_times_nothing(tmp_path):
    clock = Clock(BLOCK_M=128, BLOCK_N=64)
    default = config.linear(128, 32, FP32, launch.chip_of(torch.device(DEVICE)))
    x = torch.zeros(1, 20, 32, device=DEVICE)

    def choice(start):
        return tuning.with_choice(start, kernels.linear.linear_kernel, (128, 32), x, default, lambda shape: shape)

    with tuning.use(tuning.Tuner(tmp_path / "times.json", clock)):
        assert choice(launch.warm) == default
        assert not clock.launches
        call_linear()
        assert choice(launch.warm)["BLOCK_M"] == 128


@pytest.mark.parametrize(
    "op_case",
    [
        MlpCase(1, (3, 5), 32, 128),
        AttentionCase(1, (4, 4), 64, 1, sr_ratio=2),
        AttentionCase(1, (2, 2), 136, 2),
        PatchEmbedCase(1, (5, 4), 24, 160, layout="nhwc"),
    ],
    ids=str,
)
def test_timing_leaves_results_right(op_case, tmp_path):
    """Each candidate of each launch runs on the op's own tensors, sums divided among programs among them."""
    clock, arguments = Clock(num_warps=8), op_case.make(BF16, DEVICE)
    with tuning.use(tuning.Tuner(tmp_path / "times.json", clock)):
        first, second = run(kernels, op_case, arguments), run(kernels, op_case, arguments)
    assert clock.launches
    assert torch.equal(first, second)
    assert_parity(first, *expected(op_case, arguments), what=str(op_case))


class Pick:
    """In the place of a Tuner that has chosen each kernel's candidate of that number (or the last)."""

    def __init__(self, number):
        self.number = number

    def known(self, key, bucket, chip):
        offered = tuning.candidates(key.kernel, dict(key.default), chip)
        return offered[min(self.number, len(offered) - 1)]


# With one processor every grid is large enough, with the pretended ones sums are divided.
CANDIDATE_CASES = (
    (PatchEmbedCase(1, (9, 12), 3, 32, kernel=7, stride=4), "idle", ("patch_embed_kernel",)),
    (PatchEmbedCase(1, (5, 4), 24, 160, layout="nhwc"), "idle", ("patch_embed_kernel",)),
    (AttentionCase(1, (4, 4), 64, 1, sr_ratio=2), "idle", ("spatial_reduction_kernel", "attention_kernel")),
    (AttentionCase(1, (2, 3), 64, 1), "idle", ("norm_linear_kernel", "attention_kernel")),
    (AttentionCase(1, (4, 2), 136, 2, sr_ratio=2), "idle", ("spatial_reduction_kernel", "head_attention_kernel")),
    (AttentionCase(1, (2, 3), 136, 2), "busy", ("head_attention_kernel",)),
    (MlpCase(1, (3, 5), 32, 96), "idle", ("norm_fc1_kernel", "dwconv_fc2_kernel")),
    (MlpCase(1, (3, 5), 136, 64), "busy", ("norm_fc1_kernel", "dwconv_gelu_kernel", "linear_kernel")),
)
CANDIDATE_ROWS = (
    *((*row, BF16) for row in CANDIDATE_CASES),
    *((*row, FP32) for row in CANDIDATE_CASES if row[0].channels <= 32),
)


def test_the_cases_below_have_every_kernel():
    assert set().union(*(names for *_, names in CANDIDATE_CASES)) == set(tuning._OVERRIDES)


@pytest.mark.parametrize(("op_case", "chip_name", "names", "op_dtype"), CANDIDATE_ROWS, ids=str)
def test_parity_of_every_candidate(op_case, chip_name, names, op_dtype):
    chip = launch.chip_of(torch.device(DEVICE))
    chip = chip._replace(processors=1) if chip_name == "busy" else chip
    arguments = op_case.make(op_dtype, DEVICE)
    truth, seen, number = expected(op_case, arguments), set(), 0
    while True:
        with tuning.use(Pick(number)), launch.recorded(chip) as launches:
            actual = run(kernels, op_case, arguments)
        new = {f"{made.name} {made.constants}" for made in launches} - seen
        if not new:
            break
        assert_parity(actual, *truth, what=f"{op_case}, candidate {number}")
        assert {*names} <= {made.name for made in launches}
        seen, number = seen | new, number + 1
    assert number >= 2


def a_key(**changes):
    default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    key = tuning_records.Key("sm_90", "linear_kernel", (128, 32), "float32", tuple(default.items()))
    return key._replace(**changes)


def some_times(key, *milliseconds):
    return list(zip(tuning.candidates(key.kernel, dict(key.default), CHIP), milliseconds, strict=False))


def test_times_survive_the_file(tmp_path):
    measured = {
        (a_key(), 12): some_times(a_key(), 2.0, 1.0),
        (a_key(form=(8, True, "kv")), 3): some_times(a_key(), 1.0),
    }
    path = tmp_path / "deep" / "times.json"
    tuning_records.write_times(path, measured)
    assert tuning_records.read_times(path) == measured
    assert [file.name for file in path.parent.iterdir()] == ["times.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "[{}]", '{"a": 1}', '[{"kernel": "x", "times": []}]', "\0\xff"])
def test_a_broken_file_is_told_and_ignored(content, tmp_path, caplog):
    path = tmp_path / "times.json"
    path.write_text(content, encoding="latin-1")
    with caplog.at_level(logging.WARNING, "pvt_fast"):
        tuner = tuning.Tuner(path, Clock())
    assert "cannot be used" in caplog.text
    with tuning.use(tuner):
        call_linear()
    assert len(tuning_records.read_times(path)) == 1, "and replaced"


def test_a_stale_choice_is_told_and_ignored(tmp_path, caplog):
    path, key = tmp_path / "times.json", a_key()
    tuning_records.write_times(
        path, {(key, 12): [(dict(key.default), 2.0), ({**dict(key.default), "BLOCK_K": 8}, 1.0)]}
    )
    tuner = tuning.Tuner(path, Clock())
    assert tuner.known(key, 12, CHIP) is None
    assert "none of its candidates" in caplog.text


def test_a_directory_that_cannot_be_written_costs_no_forward_pass(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with tuning.use(tuning.Tuner(tmp_path / "file" / "times.json", Clock(BLOCK_M=128, BLOCK_N=64))):
        call_linear()
        assert call_linear()["BLOCK_M"] == 128
    assert "cannot be written" in caplog.text


def test_the_file_belongs_to_gpu_triton_and_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("PVT_FAST_CACHE", str(tmp_path))
    path = tuning_records.cache_file("NVIDIA H100 80GB/HBM3")
    assert path.parent == tmp_path
    assert path.name.startswith(f"NVIDIA_H100_80GB_HBM3-triton{tuning_records.triton.__version__}-")
    (tmp_path / "a.py").write_text("1")
    one = tuning_records.digest.__wrapped__(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert one != tuning_records.digest.__wrapped__(tmp_path)
    monkeypatch.setattr(tuning_records, "digest", lambda: one)
    assert path != tuning_records.cache_file("NVIDIA H100 80GB/HBM3")


def test_the_directory_follows_the_environment(monkeypatch):
    monkeypatch.delenv("PVT_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tuning_records.directory() == Path("/x/pvt_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning_records.directory() == Path.home() / ".cache" / "pvt_fast"


def linear_key():
    chip = launch.chip_of(torch.device(DEVICE))
    default = config.linear(128, 32, FP32, chip)
    return a_key(arch=chip.arch, default=tuple(default.items()))


def test_the_committed_table_overrides_the_default_at_every_size():
    key = linear_key()
    table = {key: {**dict(key.default), "BLOCK_M": 128, "num_warps": 8}}
    with tuning.use(table=table):
        assert {call_linear(rows)["BLOCK_M"] for rows in (1, 20, 90)} == {128}
        assert call_linear(columns=64)["BLOCK_M"] == 64
    with tuning.use(table={key._replace(arch="sm_1"): table[key]}):
        assert call_linear()["BLOCK_M"] == 64


def test_a_stale_entry_of_the_table_is_told_once(caplog):
    key = linear_key()
    with tuning.use(table={key: {**dict(key.default), "BLOCK_K": 16}}):
        assert call_linear()["BLOCK_K"] == call_linear()["BLOCK_K"] == 32
    assert caplog.text.count("none of its candidates") == 1


def test_the_table_is_read_as_it_is_written(tmp_path):
    keys = (a_key(), a_key(arch="gfx942"), a_key(form=(64, 64, "kv", True)))
    table = {key: {**dict(key.default), "BLOCK_M": 128} for key in keys}
    (tmp_path / "tuned.json").write_text(tuning_records.table_text(table.items()))
    assert tuning_records.read_table(tmp_path / "tuned.json") == table
    assert json.loads(tuning_records.table_text([])) == {}


def test_the_committed_table_is_sound():
    for key, choice in tuning_records.read_table().items():
        chip = CHIP._replace(arch=key.arch)
        assert choice in tuning.candidates(key.kernel, dict(key.default), chip)[1:]


@pytest.mark.parametrize(
    ("measured", "place"),
    [
        (((1.0, 0.9, 0.8),), 2),
        (((1.0, 0.9, 0.8), (1.0, 0.9, 1.1)), 1),  # slower at one size
        (((1.0, 0.99), (1.0, 0.96)), 0),  # within the margin on average
        (((1.0, 0.99), (1.0, 0.9)), 1),
        (((1.0, 0.9, 0.8), (1.0, 0.9)), 1),  # could not run everywhere
        (((1.0, 1.2), (10.0, 9.9)), 0),
    ],
)
def test_one_choice_for_all_sizes(measured, place):
    measured = [times(*row) for row in measured]
    assert tuned.overall(measured) == times(0, 0, 0)[place][0]


def test_the_command_prints_the_table(tmp_path, capsys, monkeypatch):
    key = a_key()
    faster, slower = some_times(key, 1.0, 0.5), some_times(key._replace(form=(1,)), 1.0, 2.0)
    tuning_records.write_times(tmp_path / "t.json", {(key, 9): faster, (key._replace(form=(1,)), 9): slower})
    monkeypatch.setattr(sys, "argv", ["tuned", str(tmp_path / "t.json")])
    tuned.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["sm_90"][-1]["choice"] == faster[1][0]
    assert [row["form"] for row in printed["sm_90"] if row["kernel"] == "linear_kernel"] == [[128, 32]]


SETTINGS = """
import importlib, os, torch
from pvt_fast.dispatch import BackendMisconfigured
from pvt_fast.kernels import tuning, tuning_records
assert (tuning._setting is None) == (not tuning_records.read_table()), "off by default"
os.environ["PVT_FAST_AUTOTUNE"] = "1"
importlib.reload(tuning)
assert tuning._setting.tuner_of(torch.zeros(1)) is None
os.environ["PVT_FAST_AUTOTUNE"] = "yes"
try:
    importlib.reload(tuning)
except BackendMisconfigured as error:
    print(error)
"""

SECOND_PROCESS = """
import torch
from pvt_fast.kernels import launch, tuning, tuning_records, linear
from pvt_fast.ops import Linear
def timer(start, device):
    raise AssertionError("timed again")
device = "cpu" if launch.INTERPRETED else "cuda"
x = torch.zeros(1, 20, 128, device=device)
weights = Linear(torch.zeros(128, 32, device=device), None)
with tuning.use(tuning.Tuner(tuning_records.cache_file("a GPU"), timer)):
    linear.linear(launch.launch, torch.zeros(1, 20, 32, device=device), weights, torch.empty_like(x), x, None)
    with launch.recorded() as launches:
        linear.linear(launch.launch, torch.zeros(1, 20, 32, device=device), weights, torch.empty_like(x), x, None)
print(launches[0].constants["BLOCK_M"])
"""


def python(code, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PVT_FAST_AUTOTUNE"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=inherited | environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_off_by_default_and_another_value_is_refused():
    assert python(SETTINGS) == "PVT_FAST_AUTOTUNE must be 0 or 1, got 'yes'"


def test_another_process_uses_what_this_one_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("PVT_FAST_CACHE", str(tmp_path))
    with tuning.use(tuning.Tuner(tuning_records.cache_file("a GPU"), Clock(BLOCK_M=128, BLOCK_N=64))):
        call_linear()
    assert python(SECOND_PROCESS, PVT_FAST_CACHE=str(tmp_path)) == "128"
