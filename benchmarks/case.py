"""What is measured: one model on images of one size, in one dtype. Plans are made of these before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Case(NamedTuple):
    """One model on images (batch, 3, size, size) in float32, bfloat16 or float16."""

    model: str
    batch: int
    size: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.model.removeprefix('pvt_v2_')} {self.dtype} bs{self.batch} {self.size}px"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
