"""What the scripts of benchmarks/ derive from measurements: counts, ratios, reports. Nothing here is timed."""

import dataclasses
import json

import instructions
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pvt_fast import PVT_V2, testing
from pvt_fast.config import VARIANTS, PVTConfig


def test_committed_counts_agree_with_themselves():
    committed = json.loads(instructions.COMMITTED.read_text())["instructions"]
    assert committed
    assert instructions.compare(committed, committed) == []


@pytest.mark.parametrize("counted", [9_701, 10_000, 10_299])
def test_counts_within_the_band_pass(counted):
    assert instructions.compare({"mlp": counted}, {"mlp": 10_000}) == []


@pytest.mark.parametrize(
    ("counted", "complaint"),
    [
        (10_301, "mlp: 10,301 instructions, 10,000 committed: +3.0%, more than the band of 3% allows"),
        (5_000, "mlp: 5,000 instructions, 10,000 committed: -50.0%, fewer than the band of 3% allows"),
    ],
)
def test_counts_outside_the_band_are_told_either_way(counted, complaint):
    assert instructions.compare({"mlp": counted, "head": 7}, {"mlp": 10_000, "head": 7}) == [complaint]


def test_calls_come_and_go_only_with_the_committed_file():
    assert instructions.compare({"new": 5}, {"old": 7}) == [
        "old: no longer counted",
        "new: 5 instructions, none committed",
    ]


def test_reads_the_sum_of_a_callgrind_file():
    assert instructions.instructions("events: Ir\nfn=(1)\n0 12\n\nsummary: 4711\ntotals: 4711\n") == 4711
    with pytest.raises(ValueError, match="'summary: N', got 'events: Ir'"):
        instructions.instructions("events: Ir")


@pytest.mark.parametrize("linear", [False, True])
def test_flops_are_those_that_torch_counts(linear):
    config = PVTConfig(**{**VARIANTS["pvt_v2_b0"], "linear": linear, "num_classes": 10})
    model = PVT_V2(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}).eval()
    model.backend = "reference"
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 64, 96))
    assert testing.model_flops(config, 2, (64, 96)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "billions"),
    [("b0", 0.6), ("b1", 2.1), ("b2", 4.0), ("b2_li", 3.9), ("b3", 6.9), ("b4", 10.1), ("b5", 11.8)],
)
def test_flops_are_about_the_published_ones(model, billions):
    """Table 2 of the paper, which counts a multiplication with its addition as one."""
    config = PVTConfig(**VARIANTS[f"pvt_v2_{model}"])
    assert testing.model_flops(config, 1, (224, 224)) / 2e9 == pytest.approx(billions, rel=0.1)
