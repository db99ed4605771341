"""What the roofline counts of a launch, against formulas of the architecture that know nothing of kernels."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pvt_fast
from benchmarks.case import Case
from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import Ceilings, Work
from pvt_fast import testing
from pvt_fast.config import VARIANTS, PVTConfig
from pvt_fast.kernels.launch import Launch

ROOT = Path(__file__).resolve().parents[2]
# Large enough that no form for small batches runs, which repeat work on processors that would idle.
BATCH = 64


@pytest.fixture(scope="module", params=["pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li"])
def recorded(request) -> tuple[PVTConfig, Case, list[Launch]]:
    case = Case(request.param, BATCH, 224, "bf16")
    return PVTConfig(**VARIANTS[request.param]), case, roofline.model_launches(case)


def hidden_elements(config: PVTConfig, hw: tuple[int, int]) -> int:
    """Of the MLPs' hidden maps of one image, all blocks together."""
    return sum(
        depth * math.prod(size) * hidden
        for depth, size, hidden in zip(config.depths, config.map_sizes(*hw), config.hidden_dims, strict=True)
    )


def test_every_launch_has_work(recorded):
    for launch in recorded[2]:
        work = roofline.work_of(launch)
        assert work.bytes > 0, launch.name
        assert work.lane_instructions > 0, launch.name
        assert min(work) >= 0, launch.name


def test_matrix_flop_are_the_models_without_its_depthwise_taps(recorded):
    """Exactly: the widths of the published models are multiples of every block that a kernel pads to."""
    config, case, _ = recorded
    flop = roofline.total(roofline.model_works(case)).matrix_flop
    depthwise = 2 * 9 * BATCH * hidden_elements(config, (224, 224))
    assert flop == testing.model_flops(config, BATCH, (224, 224)) - depthwise


def test_lanes_do_the_depthwise_taps_and_gelu(recorded):
    """At least what the hidden maps cost, at most that and 100 instructions per token and channel of each block."""
    config, case, _ = recorded
    lanes = roofline.total(roofline.model_works(case)).lane_instructions
    hidden = BATCH * hidden_elements(config, (224, 224))
    tokens = BATCH * sum(
        depth * math.prod(size) * dim
        for depth, size, dim in zip(config.depths, config.map_sizes(224, 224), config.embed_dims, strict=True)
    )
    least = hidden * (roofline.HIDDEN_HALF)
    assert least < lanes < least + 3 * hidden + 100 * tokens


def test_bytes_of_a_hidden_map_are_its_tokens_and_border(recorded):
    """Writing the first block's hidden map moves x, the map with one pixel of border, and the weights, in bf16."""
    config, _, launches = recorded
    fc1 = next(launch for launch in launches if "fc1" in launch.name)
    (height, width), dim, hidden = config.map_sizes(224, 224)[0], config.embed_dims[0], config.hidden_dims[0]
    least = 2 * (BATCH * height * width * (dim + hidden) + dim * hidden)
    most = 2 * (
        BATCH * (height * width * dim + (height + 6) * (width + 2) * hidden) + dim * hidden + 4 * (dim + hidden)
    )
    assert least < roofline.work_of(fc1).bytes <= most


def test_bytes_of_a_model_are_few_passes_over_its_maps(recorded):
    """The weights once, the hidden maps twice or four times, and all other maps together less than once those."""
    config, case, _ = recorded
    moved = roofline.total(roofline.model_works(case)).bytes
    hidden = 2 * BATCH * hidden_elements(config, (224, 224))
    with torch.device("meta"):
        weights = 2 * sum(parameter.numel() for parameter in pvt_fast.create_model(case.model).parameters())
    assert weights + 2 * hidden < moved < 1.1 * weights + 5 * hidden


def test_work_grows_with_the_batch():
    one, four = (roofline.total(roofline.model_works(Case("pvt_v2_b0", batch, 224, "bf16"))) for batch in (64, 256))
    assert four.matrix_flop == 4 * one.matrix_flop
    assert 3 * one.bytes < four.bytes < 4.1 * one.bytes  # sums of more tiles leave the cache


def test_true_fp32_products_are_work_of_the_lanes():
    half, full = (roofline.total(roofline.model_works(Case("pvt_v2_b0", 1, 64, dtype))) for dtype in ("bf16", "fp32"))
    classifier = roofline.classifier_work(PVTConfig(**VARIANTS["pvt_v2_b0"]), 1, torch.float32)
    assert full.matrix_flop == classifier.matrix_flop  # torch's product, which may use a matrix unit
    assert full.lane_instructions >= half.matrix_flop // 2


def test_every_kernel_of_the_package_has_an_entry():
    """All launches of all variants, and both ends of the sizes that are measured."""
    cases = [Case(name, batch, size, "bf16") for name in VARIANTS for batch, size in ((1, 224), (8, 512))]
    names = {launch.name for case in cases for launch in roofline.model_launches(case)}
    assert names == set(roofline.ENTRIES)


def test_a_kernel_without_an_entry_is_named():
    def new_kernel():
        """Stands for a kernel: a launch is known by its name and its parameters."""

    new_kernel.arg_names = []
    with pytest.raises(KeyError, match="new_kernel must have an entry"):
        roofline.work_of(Launch(new_kernel, (1,), (), {}))


def test_a_renamed_parameter_is_named(recorded):
    _, _, launches = recorded
    launch = next(launch for launch in launches if launch.name == "layer_norm_kernel")
    operands = roofline.Operands(launch)
    with pytest.raises(TypeError, match="gone_ptr of layer_norm_kernel must be a tensor, got NoneType"):
        operands.tensor("gone_ptr")


def test_in_place_counts_twice(recorded):
    launch = next(launch for launch in recorded[2] if launch.name == "layer_norm_kernel")
    places = {name: launch.kernel.arg_names.index(name) for name in ("x_ptr", "weight_ptr", "out_ptr")}
    x, weight = launch.args[places["x_ptr"]], launch.args[places["weight_ptr"]]
    arguments = list(launch.args)
    arguments[places["out_ptr"]] = x
    assert roofline.work_of(launch._replace(args=tuple(arguments))).bytes == 2 * x.nbytes + 2 * weight.nbytes


@pytest.mark.parametrize(("batch", "factor"), [(64, 2), (1, 0)])
def test_sums_that_programs_leave_count_twice_unless_they_stay_in_cache(batch, factor):
    launches = roofline.model_launches(Case("pvt_v2_b2", batch, 224, "bf16"))
    for launch in launches:
        operands = roofline.Operands(launch)
        if launch.name == "patch_embed_kernel" and not operands.values["WHOLE_ROWS"]:
            named = ("image_ptr", "weight_ptr", "bias_ptr", "norm_weight_ptr", "norm_bias_ptr", "out_ptr")
            others = sum(operands.tensor(name).nbytes for name in named)
            assert roofline.work_of(launch).bytes == others + factor * operands.tensor("partial_ptr").nbytes


def test_the_slowest_unit_bounds():
    ceilings = Ceilings(copy=1e12, product=1e14, lanes=1e13)
    assert ceilings.seconds(Work(2 * 10**12, 10**14, 10**13)) == 2.0
    assert ceilings.seconds(Work(10**12, 3 * 10**14, 10**13)) == 3.0
    assert ceilings.seconds(Work(10**12, 10**14, 4 * 10**13)) == 4.0


def test_the_command_calls_its_table_a_prediction():
    command = [sys.executable, "benchmarks/roofline.py", "--models", "b0", "--batch", "2", "--size", "64"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("**Prediction, nothing here was measured.**")
    assert "| b0 bf16 bs2 64px |" in done.stdout
