"""What is measured: one model on images of one size. Plans are made of these before torch is imported."""

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


class TrainCase(NamedTuple):
    """One training step on images (batch, 3, height, width): in fp32, with bf16 weights, or under autocast to bf16."""

    model: str
    precision: str
    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.model.removeprefix('pvt_v2_')} {self.precision} bs{self.batch} {self.image}"

    @property
    def image(self) -> str:
        return f"{self.height}px" if self.height == self.width else f"{self.height}x{self.width}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and images."""
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def computed_in(self) -> str:
        """The dtype of most products, as a peak is named."""
        return "fp32" if self.precision == "fp32" else "bf16"
