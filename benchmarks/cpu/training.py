"""Training steps to be measured: their cases, contenders, truth, and what a step keeps and takes of memory.

A step is zero_grad, forward, loss, backward and a step of SGD, in training mode. All contenders of a case have the same
weights and images; the loss is the mean square of the answer less fixed random numbers, so that all of it has gradients.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pvt_fast
from pvt_fast import testing
from pvt_fast.cli.timing import burst
from pvt_fast.config import VARIANTS, PVTConfig

from .. import models
from ..comparison import Ready
from ..torchvision_ops import let_torchvision_be_imported

PRECISIONS = ("fp32", "bf16", "autocast")
SEGFORMER = "segformer_b0"
RATE = 1e-6  # of SGD: so small that steps do the same work again and again
MATERIALISED = "probabilities kept"


class TrainCase(NamedTuple):
    """One step of a model on images (batch, 3, height, width): in fp32, with bf16 weights, or under autocast."""

    model: str
    batch: int
    height: int
    width: int
    precision: str

    def __str__(self) -> str:
        side = f"{self.height}px" if self.height == self.width else f"{self.height}x{self.width}"
        return f"{self.model.removeprefix('pvt_v2_')} {self.precision} bs{self.batch} {side}"

    @property
    def dtype(self) -> str:
        """Of weights and images."""
        return "bf16" if self.precision == "bf16" else "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Step:
    """A model with its images: `__call__` makes a step."""

    def __init__(self, model: nn.Module, case: TrainCase, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model = model.train().to(case.torch_dtype)
        self.forward = forward or self.model
        self.images = make_images(case).to(case.torch_dtype)
        self.case = case
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.precision == "autocast"):
            answer = self.forward(self.images)
        generator = torch.Generator().manual_seed(2)
        aim = torch.randn(answer.shape, generator=generator).to(answer.device)
        return (answer.float() - aim).square().mean() if answer.dtype != torch.float64 else (answer - aim).square().mean()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter by its name, at the weights as they are; no step is made."""
        self.model.zero_grad()
        self.loss().backward()
        found = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found


def make_images(case: TrainCase) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.height, case.width, generator=generator)
    return images.to(case.torch_dtype).float()


class _Maps(nn.Module):
    """The last map of a transformers encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).last_hidden_state


def segformer(case: TrainCase) -> nn.Module:
    """transformers' SegFormer-b0 encoder with weights drawn from a fixed seed, without dropout or stochastic depth."""
    let_torchvision_be_imported()
    from transformers import SegformerConfig, SegformerModel

    torch.manual_seed(0)
    config = SegformerConfig(drop_path_rate=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _Maps(SegformerModel(config).to(case.torch_dtype).float())


def _ours(case: TrainCase) -> Step:
    if case.model == SEGFORMER:
        model = segformer(case).train().to(case.torch_dtype)
        pvt_fast.accelerate_(model)
        return Step(model, case)
    return Step(models.make_model(case), case)


def _plain_model(case: TrainCase) -> nn.Module:
    return segformer(case) if case.model == SEGFORMER else models.timm_model(case)


def _eager(case: TrainCase) -> Step:
    return Step(_plain_model(case), case)


def _compiled(case: TrainCase) -> Step:
    model = _plain_model(case).train().to(case.torch_dtype)
    return Step(model, case, torch.compile(model))


def _materialised(case: TrainCase) -> Step:
    """softmax(q k^T) as a tensor that autograd keeps, as in mmdet's and the official code: our reference is such a one."""
    if case.model == SEGFORMER:
        raise NotImplementedError("transformers' own attention is timed as it comes")
    model = models.make_model(case)
    model.backend = "reference"
    return Step(model, case)


CONTENDERS: dict[str, Callable[[TrainCase], Step]] = {
    "pvt_fast": _ours,
    "eager": _eager,
    "compile": _compiled,
    MATERIALISED: _materialised,
}
PEERS = ("eager", "compile")


# -- truth ------------------------------------------------------------------------------------------------------------


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients, each parameter's over its own largest true value, are compared by `errors`; this is for one."""
    return torch.cat([g.flatten() for g in gradients.values()])


def truth(case: TrainCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients in float64, those of plain torch in the case's precision), by our names, of the case's weights."""
    make = segformer if case.model == SEGFORMER else models.make_model
    made = []
    for exact in (True, False):
        model = make(case)
        if isinstance(model, pvt_fast.PVT_V2):
            model.backend = "reference"
        step = Step(model, case._replace(precision="fp32") if exact else case)
        if exact:
            step.model.double()
            step.images = step.images.double()
        made.append(step.gradients())
    return made[0], made[1]


def error_over_bound(
    gradients: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], unit: float
) -> float:
    """The largest, over the parameters, of an error over what the parity rule allows; infinite for values that are none.

    Parameters are taken together whose gradients are as large as rounding only (keys' biases have no gradient at all):
    what is allowed is never less than `unit` of the largest gradient of the model.
    """
    if not gradients or gradients.keys() != exact.keys():
        return float("inf")
    floor = unit * max(float(g.abs().max()) for g in exact.values())
    worst = 0.0
    for name, value in gradients.items():
        if value.shape != exact[name].shape or not bool(value.isfinite().all()):
            return float("inf")
        bounds = testing.parity_bounds(exact[name], plain[name])
        error = (value.double() - exact[name]).abs()
        worst = max(worst, float(error.max()) / max(bounds["largest"], floor))
    return worst


def in_our_names(case: TrainCase, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of timm's parameters by the names that they have in our model."""
    ours = models.make_model(case)
    names = {name for name, _ in ours.named_parameters()}
    if case.model == SEGFORMER or gradients.keys() == names:
        return gradients
    # loading is by name and shape: a state with the gradients as weights comes back renamed
    report = pvt_fast.load_weights(ours, gradients, strict=False)
    del report
    return {name: p.detach().clone() for name, p in ours.named_parameters()}


# -- a contender's process --------------------------------------------------------------------------------------------


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps between forward and backward: distinct storages that are not parameters' or the image's."""
    own = {p.untyped_storage().data_ptr() for p in step.model.parameters()} | {step.images.untyped_storage().data_ptr()}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is given twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step.loss()
    del loss
    return sum(size for size, _ in kept.values())


def contend(build: Callable[[TrainCase], Step], case: TrainCase, threads: int) -> Generator[Any, Any, None]:
    """A contender's process, as `comparison.Worker` asks it: its answer are its gradients."""
    torch.set_num_threads(threads)
    yield None
    step = build(case)
    gradients = step.gradients()
    told = {"note": "", "saved_bytes": saved_bytes(step)}
    seconds = yield Ready(gradients, told)  # type: ignore[arg-type]
    while True:
        seconds = yield burst(step, seconds)


def _resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def take_memory(build: Callable[[TrainCase], Step], case: TrainCase, limit: int | None) -> Generator[Any, Any, None]:
    """A process of its own that makes one step: bytes at its peak above those before. limit: bytes of address space."""
    torch.set_num_threads(1)
    yield None
    step = build(case)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    yield max(peak, _resident()) - before


# -- arithmetic -------------------------------------------------------------------------------------------------------


def gflop(case: TrainCase, replay: bool) -> float | None:
    """Of a step by formula, in 1e9: forward, twice that backward, and with `replay` the forward again; None for others.

    A multiplication and its addition count as two.
    """
    if case.model not in VARIANTS:
        return None
    forward = testing.model_flops(PVTConfig(**VARIANTS[case.model]), case.batch, (case.height, case.width)) / 1e9
    return (4 if replay else 3) * forward
