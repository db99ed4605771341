"""What runs under compute-sanitizer: every op once on small shapes, in bf16, without a CUDA graph.

python -m benchmarks.gpu.sanitize
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from pvt_fast.kernels import BACKEND, launch
from pvt_fast.ops import Linear, Norm
from pvt_fast.testing import AttentionCase, Case, MlpCase, PatchEmbedCase, run

# Narrow and wide rows take different kernels; maps that no block divides; every form of attention.
CASES: tuple[Case, ...] = (
    PatchEmbedCase(2, (13, 18), 3, 32, kernel=7, stride=4),
    PatchEmbedCase(1, (5, 6), 64, 160, layout="nhwc"),
    AttentionCase(2, (8, 9), 32, 1, sr_ratio=8),
    AttentionCase(1, (4, 6), 160, 5, sr_ratio=2, scale_residual=True),
    AttentionCase(1, (3, 3), 128, 2),
    AttentionCase(1, (9, 10), 64, 1),
    AttentionCase(1, (9, 8), 64, 2, linear=True),
    MlpCase(2, (5, 7), 32, 64),
    MlpCase(1, (3, 5), 160, 96, relu=True, scale_residual=True),
)


def results(device: str) -> Iterator[Tensor]:
    """What every case gives there."""
    dtype = torch.bfloat16
    chip = launch.chip_of(torch.device(device))
    with torch.inference_mode():
        # with one processor every grid is large enough: the forms for large batches run
        for form in (chip, chip._replace(processors=1)):
            for case in CASES:
                with launch.recorded(form):
                    result = run(BACKEND, case, case.make(dtype, device))
                yield result
        x = torch.randn(2, 9, 160, device=device, dtype=dtype)
        norm = Norm(torch.ones(160, device=device, dtype=dtype), torch.zeros(160, device=device, dtype=dtype), 1e-6)
        classifier = Linear(torch.randn(10, 160, device=device, dtype=dtype), None)
        yield BACKEND.layer_norm(x, norm)
        yield BACKEND.head(x, classifier)


def main(device: str = "cuda") -> None:
    """Run every case; ends the process with a complaint where values are not finite."""
    if bad := sum(int((~result.isfinite()).sum()) for result in results(device)):
        sys.exit(f"gpu.sanitize: {bad} values are not finite")


if __name__ == "__main__":
    main()
