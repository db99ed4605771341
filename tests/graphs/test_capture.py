"""What a captured model refuses. The capture itself is tested where there is a CUDA device (test_gpu.py)."""

import pytest
import torch

from pvt_fast import PVT_V2
from pvt_fast.graphs.cuda_graph import check_like


def model() -> PVT_V2:
    return PVT_V2(embed_dims=(16, 16, 16, 16), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), num_classes=3)


def test_an_example_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="capture: example must be on a CUDA device, got cpu"):
        model().eval().capture(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(1, 3, 64, 64), ValueError, r"must have the captured shape \(2, 3, 64, 64\), got \(1, 3, 64, 64\)"),
        (torch.zeros(2, 3, 64, 64).half(), TypeError, "must have the captured dtype torch.float32, got torch.float16"),
        (torch.zeros(2, 3, 64, 64, device="meta"), ValueError, "must be on the captured device cpu, got meta"),
    ],
)
def test_an_image_unlike_the_example_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        check_like("captured model", image, torch.zeros(2, 3, 64, 64))


def test_any_memory_layout_is_like_the_example():
    check_like("captured model", torch.zeros(2, 64, 64, 3).permute(0, 3, 1, 2), torch.zeros(2, 3, 64, 64))
