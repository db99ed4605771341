"""Training steps to be measured: their contenders, the gradients' truth, and what a step keeps and takes of memory.

A step is zero_grad, forward, loss, backward and a step of SGD, in training mode. All contenders of a case have the
same weights and images; the loss is the mean square of the answer less fixed random numbers, so that all of it has
gradients.

Gradients are compared as one vector: the parameters one after the other by name, each divided by a power of two near
the root mean square of its true gradient, so that the parity rule over the vector holds small gradients as well as
large ones. Parameters whose true gradient is zero but for rounding (the biases of keys, which softmax ignores) have the
largest scale of all instead.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import pvt_fast
from pvt_fast import testing
from pvt_fast.cli.timing import burst
from pvt_fast.config import VARIANTS, PVTConfig

from .. import models
from ..case import TrainCase
from ..comparison import Ready, Truth
from ..report import OURS
from ..torchvision_ops import let_torchvision_be_imported

SEGFORMER = "segformer_b0"
MODELS = (*VARIANTS, SEGFORMER)
PRECISIONS = ("fp32", "bf16", "autocast")
RATE = 1e-6  # of SGD: so small that step after step is the same work
NO_GRADIENT = 1e-9  # of the largest: less is what float64 leaves of a gradient that is zero


class Step:
    """A model with its images and optimizer: a call makes a step. `backward_s` has the seconds of each backward."""

    def __init__(self, model: nn.Module, case: TrainCase, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model = model.train()
        self.backward_s: list[float] = []
        self._forward = model if forward is None else forward
        self._autocast = case.precision == "autocast"
        parameter = next(model.parameters())
        self.images = make_images(case).to(parameter.dtype)
        self._aim: Tensor | None = None
        self._optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            answer = self._forward(self.images)
        if self._aim is None:
            self._aim = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2))
        exact = answer if answer.dtype == torch.float64 else answer.float()
        return (exact - self._aim).square().mean()

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        loss = self.loss()
        start = time.perf_counter()
        loss.backward()
        self.backward_s.append(time.perf_counter() - start)
        self._optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter by its name, at the weights as they are; no step is made."""
        self.model.zero_grad()
        self.loss().backward()
        found = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found


def make_images(case: TrainCase) -> Tensor:
    """Random images, rounded to the dtype of the case's weights, in float32."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.height, case.width, generator=generator)
    return images.to(case.torch_dtype).float()


# -- contenders -------------------------------------------------------------------------------------------------------


class _LastMap(nn.Module):
    """A transformers encoder whose answer is its last map."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).last_hidden_state


def _segformer(case: TrainCase) -> nn.Module:
    """transformers' SegFormer-b0 encoder, weights from a fixed seed, without dropout; in the case's dtype."""
    let_torchvision_be_imported()
    from transformers import SegformerConfig, SegformerModel

    torch.manual_seed(0)
    config = SegformerConfig(drop_path_rate=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _LastMap(SegformerModel(config)).to(case.torch_dtype)


def _plain_model(case: TrainCase) -> nn.Module:
    model = _segformer(case) if case.model == SEGFORMER else models.timm_model(case)
    return model.to(case.torch_dtype)


def ours(case: TrainCase) -> Step:
    """Our model on its default backend; of transformers' model, that one after accelerate_."""
    if case.model == SEGFORMER:
        model = _segformer(case)
        pvt_fast.accelerate_(model, strict=True)
    else:
        model = models.make_model(case).to(case.torch_dtype)
    return Step(model, case)


def plain(case: TrainCase) -> Step:
    """timm's or transformers' model as it comes."""
    return Step(_plain_model(case), case)


def compiled(case: TrainCase) -> Step:
    """That one under torch.compile."""
    model = _plain_model(case).train()
    return Step(model, case, torch.compile(model))


def materialised(case: TrainCase) -> Step:
    """Our reference: softmax(q k^T) is a tensor that autograd keeps, as in mmdet's and the official code."""
    model = models.make_model(case).to(case.torch_dtype)
    model.backend = "reference"
    return Step(model, case)


Build = Callable[[TrainCase], Step]
CONTENDERS: dict[str, Build] = {OURS: ours, "plain": plain, "compile": compiled}


def in_memory(case: TrainCase) -> dict[str, Build]:
    """The contenders whose memory is weighed: a compiler's own cannot be told from its step's."""
    found = {name: build for name, build in CONTENDERS.items() if build is not compiled}
    return found if case.model == SEGFORMER else found | {"probabilities kept": materialised}


# -- truth ------------------------------------------------------------------------------------------------------------


def truth(case: TrainCase) -> tuple[dict[str, float], Truth]:
    """The parameters' scales, by our names in order, and the vectors in float64 and of plain torch as it comes."""
    exact = _plain_model(case).double()
    gradients = in_our_names(case, Step(exact, case._replace(precision=_exactly(case))).gradients())
    sizes = {name: float(gradient.square().mean().sqrt()) for name, gradient in sorted(gradients.items())}
    largest = max(sizes.values())
    scales = {
        name: 2.0 ** round(math.log2(size if size > NO_GRADIENT * largest else largest)) for name, size in sizes.items()
    }
    return scales, (vector(gradients, scales), vector(plain(case).gradients(), scales, case))


def _exactly(case: TrainCase) -> str:
    """The precision in which weights and images are the case's, without its autocast."""
    return "bf16" if case.precision == "bf16" else "fp32"


def vector(gradients: dict[str, Tensor], scales: dict[str, float], case: TrainCase | None = None) -> Tensor:
    """All gradients, scaled: as they are or, with a case, by that one's names and in the dtype of its products.

    Gradients under autocast are float32, but no more exact than bfloat16, whose rounding unit the parity rule takes.
    """
    if case is not None:
        gradients = in_our_names(case, gradients)
    if gradients.keys() != scales.keys():
        odd = sorted(gradients.keys() ^ scales.keys())
        raise ValueError(f"gradients must be of the same parameters as the true ones; not in both: {', '.join(odd)}")
    whole = torch.cat([gradients[name].flatten() / scale for name, scale in scales.items()])
    return whole.bfloat16() if case is not None and case.computed_in == "bf16" else whole


def in_our_names(case: TrainCase, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of timm's parameters by the names that they have in our model."""
    if case.model == SEGFORMER:
        return gradients
    like = pvt_fast.create_model(case.model)
    if gradients.keys() != {name for name, _ in like.named_parameters()}:
        like.to(next(iter(gradients.values())).dtype)
        pvt_fast.load_weights(like, gradients)  # renames a state dict: here gradients are the values
        gradients = {name: parameter.detach() for name, parameter in like.named_parameters()}
    return gradients


# -- a contender's process --------------------------------------------------------------------------------------------


def contend(build: Build, case: TrainCase, threads: int, scales: dict[str, float]) -> Generator[Any, Any, None]:
    """A contender's process, as `comparison.Worker` asks it: its logits are its gradients.

    "backward" is answered by the median seconds of the backwards so far.
    """
    torch.set_num_threads(threads)
    yield None
    step = build(case)
    gradients = vector(step.gradients(), scales, case)
    told: dict[str, Any] = {"note": ""}
    if build is not compiled:  # hooks on saved tensors make it compile something else
        told["saved_bytes"] = saved_bytes(step)
    request = yield Ready(gradients, told)
    del gradients
    while True:
        request = yield median(step.backward_s) if request == "backward" else burst(step, request)


def saved_bytes(step: Step) -> int:
    """Bytes that autograd keeps from forward to backward: of distinct storages, parameters and images left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*step.model.parameters(), step.images)}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # an output that is kept as it is would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step.loss()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def take_memory(build: Build, case: TrainCase, threads: int, limit: int | None) -> Generator[Any, Any, None]:
    """A process that makes one step and answers with the bytes of memory at its peak above those before it.

    limit: bytes that it may take at most above those before; then it fails, as it does on a machine that has no more.
    """
    torch.set_num_threads(threads)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if the system must end one for memory, this one
    yield None
    build(case._replace(batch=1, height=64, width=64))()  # what is loaded and set up once is not the step's
    step = build(case)
    if limit is not None:
        limit += _status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of before is forgotten
    before = _status("VmRSS")
    step()
    yield _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of this process by that name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def backward_gflop(case: TrainCase) -> float | None:
    """Of our backward, in 1e9: twice the forward's, and the forward again as our ops replay it; None for other models.

    A multiplication and its addition count as two.
    """
    if case.model == SEGFORMER:
        return None
    return 3 * testing.model_flops(PVTConfig(**VARIANTS[case.model]), case.batch, (case.height, case.width)) / 1e9
