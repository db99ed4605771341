"""Train the small PVT_V2(linear=True) whose weights lie beside this file, on the digits bundled with scikit-learn.

    python examples/train_digits.py

The same seed, thread count, torch and kind of CPU give the same file, bit for bit. The held-out images are used once,
at the end, to print the accuracy: nothing is chosen by them.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import PREPROCESS, SIZE, Digits, load_digits
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import pvt_fast
from pvt_fast.model_file import save_model

OUT = Path(__file__).with_name("digits.safetensors")


def make_model() -> pvt_fast.PVT_V2:
    """1 x 32 x 32 -> 10 logits in 243,002 parameters; most of the width early, where the maps are not yet 1x1."""
    model = pvt_fast.PVT_V2(
        img_size=SIZE,
        in_channels=1,
        num_classes=10,
        embed_dims=(32, 48, 64, 64),
        num_heads=(1, 1, 2, 2),
        mlp_ratios=(4, 4, 4, 4),
        qkv_bias=True,
        depths=(1, 1, 1, 1),
        drop_path_rate=0.05,
        linear=True,
    )
    model.backend = "reference"
    return model


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12 degrees, scale by up to 12 %, shift by up to 3 pixels; each image (N, 1, H, W) its own way."""
    unit = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = unit[0] * math.radians(12), 1 + 0.12 * unit[1]
    shift = unit[2:] * 3 / (SIZE / 2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # the background is -1, and grid_sample pads with 0
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train(model: pvt_fast.PVT_V2, digits: Digits, epochs: int, batch: int, seed: int, progress: Progress) -> None:
    """AdamW with weight decay on matrices only, one cosine cycle with a short rise, label smoothing."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    steps = epochs * math.ceil(len(digits.labels) / batch)
    rise = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3),
    )
    task = progress.add_task("training", total=epochs, loss=math.nan)
    model.train()
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(digits.labels), generator=generator).split(batch):
            logits = model(augment(digits.images[rows], generator))
            loss = F.cross_entropy(logits, digits.labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        progress.update(task, advance=1, loss=sum(losses) / len(losses))
    model.eval()


def accuracy(model: pvt_fast.PVT_V2, digits: Digits) -> float:
    """Share of the images that the model classifies right."""
    with torch.inference_mode():
        return (model(digits.images).argmax(dim=1) == digits.labels).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result depends on their number")
    parser.add_argument("--limit", type=int, default=None, help="train on the first so many images only")
    parser.add_argument("--out", type=Path, default=OUT, help="safetensors file to write")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch, args.threads, args.limit or 1) < 1:
        parser.error("--epochs, --batch, --threads and --limit must be at least 1")

    console = Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training, held_out = load_digits()
    training = Digits(training.images[: args.limit], training.labels[: args.limit])
    model = make_model()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        train(model, training, args.epochs, args.batch, args.seed, progress)
    seconds = time.perf_counter() - start
    save_model(model, args.out, PREPROCESS)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"trained {parameters:,} parameters on {len(training.labels)} digits in {seconds:.0f} s; "
        f"accuracy {accuracy(model, training):.2%} on them, "
        f"{accuracy(model, held_out):.2%} on the {len(held_out.labels)} held out"
    )
    console.print(f"wrote {args.out} ({args.out.stat().st_size:,} bytes)", soft_wrap=True)


if __name__ == "__main__":
    main()
