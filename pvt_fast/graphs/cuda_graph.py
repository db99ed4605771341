"""A model's forward as a CUDA graph: one launch for all its kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..accelerate.guard import products_now
from ..arguments import instance
from ..ops.packing import collected, is_plain
from .state import Recorded, State

if TYPE_CHECKING:
    from ..model import PVT_V2

# Forwards before the capture: the first compiles kernels and packs weights.
_WARMUP_FORWARDS = 3


class CapturedModel:
    """What `PVT_V2.capture` returns: call it with an image like the example.

    Its input and output lie in memory of its own: an image is copied in, and the logits that a call returns are
    overwritten by the next call (`.clone()` keeps them). Some kernels read parameters, others what was made of them: a
    call raises RuntimeError where the model has changed since, in its weights, modules, hooks or settings, or where
    autocast is another; capture it again then. Not for several threads or streams at once.
    """

    def __init__(self, model: PVT_V2, example: Tensor) -> None:
        _check_capturable(model, example)
        self._model = model
        self._products = products_now(example)
        # before the kernels read it; weights of other kinds than packed ones are read by their own modules
        self._recorded = Recorded(State(model), [p for p in model.parameters() if is_plain(p)])
        with torch.inference_mode(False):
            self._image = torch.empty_like(example).copy_(example.detach())
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.device(example.device), torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP_FORWARDS):
                    model(self._image)
            torch.cuda.current_stream().wait_stream(stream)
            with collected() as records, torch.cuda.graph(self._graph, stream=stream):
                self._logits = model(self._image)
        # the graph knows addresses only: what lies there has to live as long
        self._kept = [*(p.detach() for p in model.parameters()), *(record.form for record in records)]
        self._require_unchanged()

    def __call__(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes) of an image of the example's shape, dtype and device, in any memory layout."""
        check_like("captured model", image, self._image)
        check_products("captured model", products_now(image), self._products)
        self._require_unchanged()
        self._image.copy_(image.detach(), non_blocking=True)
        self._graph.replay()
        return self._logits

    def _require_unchanged(self) -> None:
        if not self._recorded.holds(self._model):
            change = self._recorded.change(self._model)
            raise RuntimeError(f"captured model: the model must be as it was captured, got a changed one: {change}")


def check_like(op: str, image: Tensor, example: Tensor) -> None:
    """Raise ValueError or TypeError, naming what differs, unless `image` has the example's shape, dtype and device."""
    instance(f"{op}: image", image, Tensor, "a torch.Tensor")
    if image.shape != example.shape:
        raise ValueError(f"{op}: image must have the captured shape {tuple(example.shape)}, got {tuple(image.shape)}")
    if image.dtype != example.dtype:
        raise TypeError(f"{op}: image must have the captured dtype {example.dtype}, got {image.dtype}")
    if image.device != example.device:
        raise ValueError(f"{op}: image must be on the captured device {example.device}, got {image.device}")


def check_products(op: str, now: torch.dtype | None, captured: torch.dtype | None) -> None:
    """Raise RuntimeError unless autocast is as it was at the capture: the graph's kernels are of its dtypes."""
    if now != captured:
        was, is_ = (f"on, to {dtype}" if dtype is not None else "off" for dtype in (captured, now))
        raise RuntimeError(f"{op}: autocast must be as at the capture, {was}, got {is_}")


def _check_capturable(model: PVT_V2, example: Tensor) -> None:
    instance("capture: example", example, Tensor, "a torch.Tensor")
    if example.device.type != "cuda":
        raise ValueError(f"capture: example must be on a CUDA device, got {example.device}")
    if model.training:
        raise ValueError("capture: model must be in evaluation mode (model.eval()), got training mode")
