"""Prints the committed table tuned.json anew, with what was measured on this machine's GPUs.

    PVT_FAST_AUTOTUNE=1 python ...            # forward passes of all that is to be tuned, at several batch sizes
    python -m pvt_fast.kernels.tuned > new.json && mv new.json kernels/tuned.json    # it is read while this is printed

The table has one choice for all sizes of a launch, or none: a candidate enters it that beats the default by more than
tuning.MARGIN on average over all sizes and GPUs measured, and is slower by more than that in none.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import triton

from .config import Config
from .tuning import MARGIN
from .tuning_records import Key, Times, digest, directory, read_table, read_times, table_text


def overall(measured: list[Times]) -> Config:
    """The choice for all sizes together, the default (the first of each) included."""
    default = measured[0][0][0]
    shapes = [shape for shape, _ in measured[0] if all(any(shape == s for s, _ in times) for times in measured)]
    chosen, least = default, 1 - MARGIN
    for shape in shapes:
        ratios = [next(ms for s, ms in times if s == shape) / times[0][1] for times in measured]
        mean = statistics.geometric_mean(ratios)
        if mean < least and max(ratios) <= 1 + MARGIN:
            chosen, least = shape, mean
    return chosen


def merged(table: dict[Key, Config], files: list[Path]) -> dict[Key, Config]:
    """The table with the choices of what is measured in the files; what they do not have stays."""
    groups: dict[Key, list[Times]] = {}
    for path in files:
        for (key, _), times in read_times(path).items():
            groups.setdefault(key, []).append(times)
    choices = table | {key: overall(measured) for key, measured in groups.items()}
    return {key: choice for key, choice in choices.items() if choice != dict(key.default)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pvt_fast.kernels.tuned", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="files of times; default: this version's in the cache")
    files = parser.parse_args().files
    if not files:
        files = sorted(directory().glob(f"*-triton{triton.__version__}-{digest()}.json"))
    print(table_text(merged(read_table(), files).items()), end="")


if __name__ == "__main__":
    main()
