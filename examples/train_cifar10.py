"""Train a small PVT_V2 on CIFAR-10, or on other small images of some classes, within an hour on two cores.

    python examples/train_cifar10.py cifar10.zip --out run
    python examples/train_cifar10.py cifar10.zip --out run --resume    # after it was interrupted, or killed

DATA is a folder or a zip with train/<class>/<image> and test/<class>/<image>, or with <class>/<image>, of which 20 %
are held out. DIR gets checkpoint.pt after each epoch, history.json, and at the end model.safetensors in float16 with
classes.txt, for `pvt-fast classify IMAGE --weights DIR/model.safetensors --labels DIR/classes.txt`. A resumed training
goes on as if it had never ended: the same seed, thread count, torch and kind of CPU give the same losses and weights,
bit for bit. The test images choose nothing: they are looked at to print the accuracy. On cores that others use too,
OMP_WAIT_POLICY=passive keeps torch's threads from waiting for each other at full speed.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from class_folders import Data, Images, load
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import pvt_fast
from pvt_fast.checkpoints.replacing import replacing
from pvt_fast.images.pixels import normalise
from pvt_fast.images.preprocess import Preprocess
from pvt_fast.model_file import load_model, save_model

PIXELS = 32  # a side of the images that are kept
SIZE = 48  # a side of what the model sees: the first patch embed's stride of 4 leaves 12 x 12 tokens
PREPROCESS = Preprocess(size=SIZE, crop=1.0, interpolation="bilinear")
SHIFT = 4  # pixels that a crop moves by at most
EMA_DECAY = 0.998  # of a step: the average is over some 500 steps
WEIGHT_DECAY = 0.05
CLIP = 1.0  # largest norm of all gradients together
PRECISIONS = ("fp32", "bf16", "autocast")


def make_model(classes: int, backend: str = "auto") -> pvt_fast.PVT_V2:
    """3 x 48 x 48 -> logits in 1.3 million parameters: three stages of 12 x 12, 6 x 6 and 3 x 3 tokens, most of the
    arithmetic in the second, whose tokens all see each other.
    """
    model = pvt_fast.PVT_V2(
        img_size=SIZE,
        num_classes=classes,
        num_stages=3,
        embed_dims=(32, 96, 192),
        num_heads=(1, 3, 6),
        mlp_ratios=(2, 3, 3),
        qkv_bias=True,
        depths=(1, 3, 2),
        sr_ratios=(4, 1, 1),
    )
    model.backend = backend
    return model


def model_input(pixels: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32) -> float32 (N, 3, 48, 48), as PREPROCESS makes it of a file."""
    values = normalise(pixels, PREPROCESS.mean, PREPROCESS.std)
    return F.interpolate(values, size=SIZE, mode="bilinear", align_corners=False)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move by up to 4 pixels each way, the edge mirrored, and flip; each image (N, 3, H, W) its own way."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels.float(), [SHIFT] * 4, mode="reflect").to(torch.uint8)
    down, right = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(count, -1)
    rows, columns = down + torch.arange(height), right + torch.where(flipped, width - 1 - columns, columns)
    image = torch.arange(count)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def average(averaged: Any, current: Any, count: Any) -> None:
    """A step of the moving average of weights, which is shorter at first, so that the first weights are forgotten."""
    decay = min(EMA_DECAY, (1 + float(count)) / (10 + float(count)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


class Training:
    """All that a training is made of: what `state` tells of it is enough to go on as if it had not been left.

    model: the weights in float32, which the optimizer changes.
    averaged: their moving average, which is what the training is for.
    working: the model that runs; in bf16 a rounded copy of `model`, else that itself.
    """

    def __init__(self, model: pvt_fast.PVT_V2, options: argparse.Namespace, images: int) -> None:
        self.options = options
        self.model = model
        self.averaged = AveragedModel(model, multi_avg_fn=average)
        self.working = copy.deepcopy(model).bfloat16() if options.precision == "bf16" else model
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.steps_per_epoch = math.ceil(images / options.batch)
        self.steps = options.epochs * self.steps_per_epoch
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def learning_rate(self) -> float:
        """Of the coming step: a rise over the first tenth, then down along a cosine."""
        rise = max(1, self.steps // 10)
        if self.step < rise:
            return self.options.lr * (self.step + 1) / rise
        return self.options.lr * (0.5 * (1 + math.cos(math.pi * (self.step - rise) / (self.steps - rise))) + 1e-3)

    def train_step(self, pixels: Tensor, labels: Tensor) -> float:
        """One step on a batch; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        images = model_input(augment(pixels, self.generator))
        if self.working is not self.model:
            images = images.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.precision == "autocast"):
            logits = self.working(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        self.working.zero_grad()
        loss.backward()
        if self.working is not self.model:
            for weight, rounded in zip(self.model.parameters(), self.working.parameters(), strict=True):
                weight.grad = rounded.grad.float()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self._round()
        self.averaged.update_parameters(self.model)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def _round(self) -> None:
        if self.working is not self.model:
            torch._foreach_copy_(list(self.working.parameters()), list(self.model.parameters()))

    def train_epoch(self, images: Images, progress: Progress) -> None:
        """One pass over the images in an order of its own; adds its losses to the history."""
        self.working.train()
        losses: list[float] = []
        start = time.perf_counter()
        epoch = len(self.history) + 1
        task = progress.add_task(f"epoch {epoch}", total=self.steps_per_epoch, loss=math.nan, rate=0)
        for rows in torch.randperm(len(images.labels), generator=self.generator).split(self.options.batch):
            losses.append(self.train_step(images.pixels[rows], images.labels[rows]))
            rate = len(losses) * self.options.batch / (time.perf_counter() - start)
            progress.update(task, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]), rate=rate)
        progress.remove_task(task)
        seconds = time.perf_counter() - start
        self.history.append({"epoch": epoch, "loss": sum(losses) / len(losses), "losses": losses, "seconds": seconds})

    def state(self) -> dict[str, Any]:
        return {
            "options": fixed(self.options),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "step": self.step,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there; ValueError where the options are not those that it was made with."""
        if (was := state["options"]) != (now := fixed(self.options)):
            differ = [f"--{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name) != now[name]]
            raise ValueError(f"--resume wants the options of the training that it resumes: {'; '.join(differ)}")
        self.model.load_state_dict(state["model"])
        self._round()
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        self.step, self.history = state["step"], state["history"]


def fixed(options: argparse.Namespace) -> dict[str, Any]:
    """The options that the losses depend on."""
    names = ("seed", "epochs", "batch", "lr", "precision", "backend", "threads", "limit")
    return {name: getattr(options, name) for name in names}


def accuracy(model: nn.Module, images: Images, batch: int = 250) -> float:
    """Share of the images that the model classifies right."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for pixels, labels in zip(images.pixels.split(batch), images.labels.split(batch), strict=True):
            right += int((model(model_input(pixels)).argmax(dim=1) == labels).sum())
    return right / len(images.labels)


def write_text(path: Path, text: str) -> None:
    with replacing("train_cifar10", path) as (unfinished,):
        unfinished.write_text(text, encoding="utf-8")


def train(data: Data, options: argparse.Namespace, console: Console) -> pvt_fast.PVT_V2:
    """The model with averaged weights, after all epochs; what was done is in `options.out` after each of them."""
    torch.manual_seed(options.seed)
    training = Training(make_model(len(data.classes), options.backend), options, len(data.training.labels))
    checkpoint = options.out / "checkpoint.pt"
    if options.resume:
        training.load_state(torch.load(checkpoint, weights_only=True))
        console.print(f"resumed after epoch {len(training.history)} of {options.epochs}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[rate]:.0f} images/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for epoch in range(len(training.history) + 1, options.epochs + 1):
            training.train_epoch(data.training, progress)
            done = training.history[-1]
            told = f"epoch {epoch}: loss {done['loss']:.4f}, {done['seconds']:.0f} s"
            if options.judge_every and epoch % options.judge_every == 0:
                done["accuracy"] = accuracy(training.averaged.module, data.held_out)
                told += f", accuracy {done['accuracy']:.2%}"
            console.print(told)
            with replacing("train_cifar10", checkpoint) as (unfinished,):
                torch.save(training.state(), unfinished)
            write_text(options.out / "history.json", json.dumps(training.history, indent=1) + "\n")
    return training.averaged.module


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="folder or zip of train/ and test/, or of classes")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write into")
    parser.add_argument("--resume", action="store_true", help="go on from DIR's checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    parser.add_argument("--epochs", type=int, default=26, help="passes over the training images")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="bf16: weights rounded from float32 ones at each step; autocast: torch's, with bfloat16",
    )
    parser.add_argument("--backend", choices=("auto", "cpp", "reference"), default="auto", help="what runs the model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="the result depends on them")
    parser.add_argument("--limit", type=int, default=None, help="train on so many images only, drawn by the seed")
    parser.add_argument(
        "--judge-every", type=int, default=1, help="epochs between looks at the test images; 0: at the end"
    )
    options = parser.parse_args(argv)
    if min(options.epochs, options.batch, options.threads, options.limit or 1) < 1:
        parser.error("--epochs, --batch, --threads and --limit must be at least 1")
    if options.judge_every < 0 or not 0 < options.lr < math.inf:
        parser.error("--judge-every must be at least 0, --lr above 0")
    if options.resume != (options.out / "checkpoint.pt").exists():
        parser.error(
            f"--resume wants {options.out / 'checkpoint.pt'}, which does not exist"
            if options.resume
            else f"--out must be a folder without a training, or --resume given; {options.out} has a checkpoint.pt"
        )
    return parser, options


def main(argv: list[str] | None = None) -> None:
    parser, options = parse(argv)
    console = Console()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    try:
        with Progress(console=console, transient=True) as progress:
            data = load(options.data, PIXELS, track=lambda images: progress.track(images, description="reading"))
        if options.limit:
            order = torch.randperm(len(data.training.labels), generator=torch.Generator().manual_seed(options.seed))
            kept = order[: options.limit]
            data = data._replace(training=Images(data.training.pixels[kept], data.training.labels[kept]))
        console.print(
            f"read {len(data.training.labels):,} images to train on and {len(data.held_out.labels):,} to judge by, of "
            f"{len(data.classes)} classes, in {time.perf_counter() - start:.0f} s"
        )
        options.out.mkdir(parents=True, exist_ok=True)
        model = train(data, options, console)
    except ValueError as error:
        parser.error(str(error))
    out = options.out / "model.safetensors"
    save_model(model.half(), out, PREPROCESS)
    write_text(options.out / "classes.txt", "".join(f"{name}\n" for name in data.classes))
    saved, _ = load_model(out)
    console.print(
        f"trained {sum(p.numel() for p in saved.parameters()):,} parameters in {time.perf_counter() - start:.0f} s; "
        f"averaged weights have a test accuracy of {accuracy(saved, data.held_out):.2%}"
    )
    console.print(f"wrote {out} ({out.stat().st_size:,} bytes)", soft_wrap=True)


if __name__ == "__main__":
    main()
