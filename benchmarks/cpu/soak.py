"""Mixed work for a given time: every answer held against the reference, and memory to staying what it is.

Models of several sizes and dtypes are called by one to four threads on images of changing sizes and layouts, cast,
loaded, changed in place, copied, dropped, saved, accelerated, and moved to other instruction sets. A line every ten
seconds, and a summary; exit status 1 on a wrong answer, a model that outlives its last reference, or memory that grows.

    python benchmarks/soak.py --seconds 600 --seed 7

Steps follow from the seed, so that `--seed S --steps N` repeats the steps up to a fault, without the clock.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import itertools
import os
import random
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

import pvt_fast
from pvt_fast import PVT_V2
from pvt_fast.backend import cpp
from pvt_fast.testing import model_truth, parity_bounds

from ..report import WRONG_FACTOR
from ..torchvision_ops import let_torchvision_be_imported

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    {"embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8), "depths": (1, 2, 1, 1)},
    {"embed_dims": (32, 64, 80, 128), "num_heads": (1, 2, 5, 8), "depths": (2, 1, 1, 2), "mlp_ratios": (8, 8, 4, 4)},
    {
        "embed_dims": (24, 48),
        "num_heads": (1, 3),
        "depths": (1, 1),
        "mlp_ratios": (4, 4),
        "sr_ratios": (2, 1),
        "num_stages": 2,
        "linear": True,
        "img_size": 64,
    },
)
MODELS = 3
HUGE = 1024  # pixels a side; once in so many steps:
HUGE_EVERY = 100
# Memory may grow so much over what it was at most in the first half: the allocator's own doing.
GROWTH, SLACK = 1.1, 32 << 20
MIB = 1 << 20


class Fault(Exception):
    """What a run is for."""


class Soak:
    """The state of a run: models, and the draws that decide what is done with them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.models = [self.new_model() for _ in range(MODELS)]
        self.calls = 0
        self.isa = ExitStack()
        self.actions: list[Callable[[], None]] = [
            *[self.forwards] * 8,
            self.cast,
            self.load,
            self.change_in_place,
            self.change_data,
            self.change_epsilon,
            self.replace_block,
            self.replace_head,
            self.copy,
            self.drop,
            self.instruction_set,
            self.threads_of_torch,
            self.save_and_load,
            self.accelerated,
            self.train_a_step,
        ]

    def step(self, number: int) -> None:
        action = self.huge_image if number % HUGE_EVERY == HUGE_EVERY - 1 else self.random.choice(self.actions)
        try:
            action()
        except Exception as error:
            raise Fault(f"step {number}, {action.__name__}: {type(error).__name__}: {error}") from error

    # -- models and images ---------------------------------------------------------------------------------------------

    def new_model(self) -> PVT_V2:
        options = self.random.choice(SIZES)
        model = PVT_V2(**options, qkv_bias=self.random.random() < 0.5, num_classes=50).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():  # so that every part of the network shows in the answer
                parameter.copy_(torch.randn(parameter.shape) * max(parameter[0].numel(), 25) ** -0.5)
                if parameter.dim() == 1:
                    parameter += 0.5
        model.backend = "cpp"
        return model.to(self.random.choice(DTYPES))

    def pick(self) -> PVT_V2:
        return self.random.choice(self.models)

    def image(self, model: PVT_V2, side: int | None = None) -> Tensor:
        # at least sr_ratio tokens a side in each stage
        height, width = (side or self.random.randint(64, 160) for _ in range(2))
        batch = 1 if side else self.random.randint(1, 3)
        image = torch.randn(batch, 3, height, width).to(next(model.parameters()).dtype)
        layouts: list[Callable[[Tensor], Tensor]] = [
            lambda x: x,
            lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: x.mT.contiguous().mT,
            lambda x: torch.stack([x, x], -1)[..., 0],
            lambda x: x[:1].expand_as(x),
        ]
        return self.random.choice(layouts)(image)

    def check(self, model: nn.Module, image: Tensor, answer: Tensor) -> None:
        """The parity rule is for ops; a model that is wrong is beyond it by far."""
        self.hold(answer, *model_truth(model, image))

    def hold(self, answer: Tensor, truth: Tensor, plain: Tensor) -> None:
        if answer.shape != truth.shape or answer.dtype != plain.dtype:
            raise RuntimeError(f"logits must be {plain.dtype} {tuple(truth.shape)}, got {answer.dtype} {answer.shape}")
        error, bound = float((answer - truth).abs().max()), WRONG_FACTOR * parity_bounds(truth, plain)["largest"]
        if not error <= bound:
            raise RuntimeError(f"logits in {plain.dtype} must be off by at most {bound:.2e}, got {error:.2e}")
        self.calls += 1

    # -- what is done --------------------------------------------------------------------------------------------------

    def forwards(self) -> None:
        """One to four threads, each with an image of its own, some with the same model."""
        work = [(model := self.pick(), self.image(model)) for _ in range(self.random.randint(1, 4))]
        answers: dict[int, Tensor | Exception] = {}

        def call(index: int, model: PVT_V2, image: Tensor) -> None:
            try:
                with torch.inference_mode():
                    answers[index] = [model(image) for _ in range(3)][-1]
            except Exception as error:
                answers[index] = error

        threads = [threading.Thread(target=call, args=(i, *each)) for i, each in enumerate(work)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, (model, image) in enumerate(work):
            answer = answers[index]
            if isinstance(answer, Exception):
                raise answer
            self.check(model, image, answer)

    def forward(self, model: nn.Module, image: Tensor) -> None:
        with torch.no_grad():
            self.check(model, image, model(image))

    def huge_image(self) -> None:
        """Far above what the rest needs; what it took must come back."""
        model = self.pick()
        with torch.no_grad():
            model(self.image(model, HUGE))

    def cast(self) -> None:
        model = self.pick()
        model.to(self.random.choice(DTYPES))
        self.forward(model, self.image(model))

    def load(self) -> None:
        model = self.pick()
        scale = self.random.choice([0.5, 0.9, -1.0])
        state = {name: value * scale for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=self.random.random() < 0.5)
        self.forward(model, self.image(model))

    @torch.no_grad()
    def change_in_place(self) -> None:
        model = self.pick()
        parameter = self.random.choice(list(model.parameters()))
        parameter.mul_(-1)
        self.forward(model, self.image(model))

    @torch.no_grad()
    def change_data(self) -> None:
        model = self.pick()
        parameter = self.random.choice(list(model.parameters()))
        parameter.data = parameter.data * -1
        self.forward(model, self.image(model))

    def change_epsilon(self) -> None:
        model = self.pick()
        model.set_norm_eps(block=self.random.choice([1e-6, 1e-5, 1e-2]))
        self.forward(model, self.image(model))

    def replace_block(self) -> None:
        model = self.pick()
        model.block1[0] = copy.deepcopy(model.block1[0])  # type: ignore[operator,index]
        self.forward(model, self.image(model))

    def replace_head(self) -> None:
        model = self.pick()
        dtype = model.head.weight.dtype
        model.reset_classifier(self.random.randint(10, 60))
        model.to(dtype)  # type: ignore[arg-type]
        self.forward(model, self.image(model))

    def copy(self) -> None:
        self.forward(copy.deepcopy(model := self.pick()), self.image(model))

    def drop(self) -> None:
        """A model that nobody refers to is gone at once, without the collector."""
        index = self.random.randrange(MODELS)
        self.forward(self.models[index], self.image(self.models[index]))
        gone = weakref.ref(self.models[index])
        gc.collect()
        gc.disable()
        try:
            self.models[index] = self.new_model()
            if gone() is not None:
                raise RuntimeError("a dropped model must be gone at once, but is alive until gc.collect()")
        finally:
            gc.enable()

    def instruction_set(self) -> None:
        self.isa.close()
        self.isa.enter_context(cpp.use_isa(self.random.choice([name for name in cpp.isas() if name != "scalar"])))
        self.forward(model := self.pick(), self.image(model))

    def threads_of_torch(self) -> None:
        torch.set_num_threads(self.random.randint(1, 2))

    def save_and_load(self) -> None:
        model = self.pick()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = PVT_V2.from_pretrained(folder)
            again.backend = "cpp"
            torch.save(model.state_dict(), Path(folder) / "state.pth")
            pvt_fast.load_weights(model, str(Path(folder) / "state.pth"))
        self.forward(again, self.image(again))
        self.forward(model, self.image(model))

    def accelerated(self) -> None:
        if importlib.util.find_spec("timm") is None:
            return
        let_torchvision_be_imported()
        from timm.models.pvt_v2 import PyramidVisionTransformerV2

        sizes = {"embed_dims": (16, 32), "num_heads": (1, 2), "mlp_ratios": (4, 4), "sr_ratios": (2, 1)}
        peer = PyramidVisionTransformerV2(**sizes, depths=(1, 1), num_classes=50).eval()
        image = torch.randn(2, 3, self.random.randint(64, 120), self.random.randint(64, 120))
        truth, plain = model_truth(peer, image)
        pvt_fast.accelerate_(peer, backend="cpp")
        with torch.no_grad():
            self.hold(peer(image), truth, plain)

    def train_a_step(self) -> None:
        model = self.pick()
        if model.head.weight.dtype != torch.float32:
            return
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model.train()
        with torch.enable_grad():
            model(self.image(model)).square().mean().backward()
        optimizer.step()
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
        self.forward(model, self.image(model))


def resident() -> int:
    """Bytes of memory that this process has, after what was freed was given back: the allocator keeps it for later."""
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(samples: list[int]) -> str | None:
    """How memory grew, if it did; of the samples the first tenth is warming up."""
    flat = samples[len(samples) // 10 :]
    first, second = max(flat[: len(flat) // 2]), max(flat[len(flat) // 2 :])
    if second <= first * GROWTH + SLACK:
        return None
    return f"memory must stay, got {second // MIB} MiB at most in the second half after {first // MIB} in the first"


def run(seed: int, going: Callable[[int], bool]) -> str | None:
    """Steps while `going(number)`; the fault, if there was one."""
    soak, start, samples = Soak(seed), time.monotonic(), [resident()]
    shown = start
    number = 0
    try:
        for number in itertools.takewhile(going, itertools.count()):
            soak.step(number)
            samples.append(resident())
            if time.monotonic() - shown >= 10:
                shown = time.monotonic()
                seconds = shown - start
                print(f"{seconds:5.0f} s  step {number}  {soak.calls} answers  {samples[-1] // MIB} MiB", flush=True)
    except Fault as fault:
        return str(fault)
    finally:
        soak.isa.close()
    print(f"{number + 1} steps, {soak.calls} answers, {min(samples) // MIB} to {max(samples) // MIB} MiB")
    return grown(samples) if len(samples) > 40 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--steps", type=int, help="so many steps, however long they take")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    steps = options.steps
    print(f"seed {options.seed}, instruction sets {' '.join(cpp.isas())}", flush=True)
    # oneDNN keeps what it made for each of the last 1,024 shapes, half a gigabyte that would hide what else grows
    with torch.backends.mkldnn.flags(enabled=False):
        fault = run(options.seed, lambda number: number < steps if steps else time.monotonic() < end)
    if fault is not None:
        print(f"FAULT: {fault}\nrepeat with --seed {options.seed} --steps <one more than that step>")
    return fault is not None
