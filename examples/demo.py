"""Classify the held-out digits, then a photograph, on every backend that runs here; write a picture of the digits.

python examples/demo.py --out demo.png
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is written, no window is opened

import torch
from digits import Digits, load_digits
from matplotlib import pyplot
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images
from torch import Tensor

import pvt_fast
from pvt_fast.cli import bench
from pvt_fast.cli.doctor import cpu_name
from pvt_fast.images.preprocess import Preprocess
from pvt_fast.model_file import load_model

WEIGHTS = Path(__file__).with_name("digits.safetensors")
PHOTOGRAPH = "china.jpg"
PHOTOGRAPH_MODEL = "pvt_v2_b2_li"
DTYPES = (torch.float32, torch.bfloat16)
TRUTH = ("reference", torch.float32, "cpu")
# Seconds of timing, for all contenders together, per table; as many rounds as fit.
BUDGET_S = {"digits": 1.5, "photograph": 2.5}
MOST_ROUNDS = 100
# Of the held-out digits; the float64 truth is what takes long.
PARITY_DIGITS = 64
GRID = (6, 12)


def contenders() -> list[bench.Contender]:
    """Every backend in every dtype on every device; those that cannot run are refused later, with the reason."""
    names = [status.name for status in reversed(pvt_fast.backends())]
    return [bench.Contender(name, dtype, device) for device in bench.devices() for dtype in DTYPES for name in names]


def agreement(comparison: bench.Comparison) -> dict[str, Callable[[bench.Result], str]]:
    """Columns: how the answers compare with those of the reference in float32 on the CPU."""
    truth = comparison.find(*TRUTH)
    if truth is None:
        raise RuntimeError("demo: the reference must run in float32 on the CPU, and it did not")

    def same(result: bench.Result) -> str:
        share = (result.output.argmax(dim=1) == truth.output.argmax(dim=1)).double().mean().item()
        return f"{share:.2%}"

    def difference(result: bench.Result) -> str:
        return f"{(result.output - truth.output).abs().max().item():.1e}"

    return {"same class": same, "logit diff": difference}


def show(console: Console, title: str, comparison: bench.Comparison, columns: dict) -> None:
    """The table, and under it the backends that cannot run here."""
    console.print(bench.timing_table(title, comparison, columns))
    for reason in comparison.refused().values():
        console.print(f"  not in the table: {reason}", highlight=False, markup=False, soft_wrap=True)
    console.print()


def classify_digits(console: Console, digits: Digits) -> Tensor:
    """Print the digits' table; the reference's predictions (N,)."""
    model, _ = load_model(WEIGHTS)
    count = len(digits.labels)
    comparison = bench.compare(
        model, digits.images, contenders(), MOST_ROUNDS, BUDGET_S["digits"], parity_images=PARITY_DIGITS
    )

    def accuracy(result: bench.Result) -> str:
        return f"{(result.output.argmax(dim=1) == digits.labels).double().mean().item():.2%}"

    title = f"{count} held-out handwritten digits in one batch, 32 px, trained weights"
    show(console, title, comparison, {"accuracy": accuracy, **agreement(comparison)})
    return next(r.output.argmax(dim=1) for r in comparison.results if r.contender == TRUTH)


def classify_photograph(console: Console) -> None:
    """Print the table of a published variant with random weights on a photograph."""
    photographs = load_sample_images()
    names = [Path(name).name for name in photographs.filenames]
    pixels = photographs.images[names.index(PHOTOGRAPH)]
    image = Preprocess()(Image.fromarray(pixels)).unsqueeze(0)
    torch.manual_seed(0)
    model = pvt_fast.create_model(PHOTOGRAPH_MODEL)
    comparison = bench.compare(model, image, contenders(), MOST_ROUNDS, BUDGET_S["photograph"])
    title = (
        f"{PHOTOGRAPH_MODEL} on a photograph ({PHOTOGRAPH}), {image.shape[-1]} px, batch 1\n"
        "random weights: timing and agreement only, no accuracy"
    )
    show(console, title, comparison, agreement(comparison))


def draw(digits: Digits, predictions: Tensor, out: Path) -> None:
    """Write a grid of digits, each under its prediction: green where right, red with the truth where wrong."""
    rows, columns = GRID
    wrong = (predictions != digits.labels).nonzero().squeeze(1)
    right = (predictions == digits.labels).nonzero().squeeze(1)
    chosen = torch.cat([wrong, right])[: rows * columns]  # the errors first: they are the interesting ones
    tiles = digits.images[chosen, 0] / 2 + 0.5
    side, head = tiles.shape[-1], 12  # a tile's pixels, and the room above it for its title
    page = torch.ones(rows * (side + head), columns * (side + head))
    figure, axis = pyplot.subplots(figsize=(columns * 0.9, rows * 0.9 + 0.6))
    for place, index in enumerate(chosen.tolist()):
        top, left = (place // columns) * (side + head) + head, (place % columns) * (side + head) + head // 2
        page[top : top + side, left : left + side] = tiles[place]
        prediction, label = int(predictions[index]), int(digits.labels[index])
        text, colour = (f"{prediction}", "green") if prediction == label else (f"{prediction}, is {label}", "red")
        axis.text(left + side / 2, top - 2, text, color=colour, ha="center", va="bottom")
    axis.imshow(page.numpy(), cmap="gray", vmin=0, vmax=1)
    axis.axis("off")
    share = len(right) / len(predictions)
    axis.set_title(
        "Held-out digits, above each its prediction (green: right, red: wrong); "
        f"{share:.2%} of all {len(predictions)} right"
    )
    figure.savefig(out, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write (default: demo.png)")
    args = parser.parse_args(argv)
    if not args.out.parent.is_dir():
        parser.error(f"--out must lie in an existing folder, got {args.out}")
    start = time.perf_counter()
    console = bench.console()
    console.print(
        f"pvt_fast {pvt_fast.__version__}, torch {torch.__version__}, {cpu_name()}, "
        f"CPU threads: {torch.get_num_threads()}",
        highlight=False,
    )
    console.print(
        "Answers were checked against float64 before timing. Agreement is with the reference in float32 on the CPU; "
        "speed-up is over the reference of the same dtype and device.\n",
        highlight=False,
    )
    _, digits = load_digits()
    predictions = classify_digits(console, digits)
    draw(digits, predictions, args.out)
    classify_photograph(console)
    console.print(
        f"wrote {args.out}; {time.perf_counter() - start:.1f} s", highlight=False, markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
