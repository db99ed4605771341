"""Everything that wants a CUDA GPU, in one command and a few minutes: build, tests, sanitizer, models, kernels, report.

    python benchmarks/gpu.py                                     # or: make gpu
    python benchmarks/gpu.py --dry-run                           # what would run, in which order; needs no GPU
    python benchmarks/gpu.py --phases models --models b2 --cases 256x224 --minutes 5

Uses the Python that runs it and the packages that are there; nothing is downloaded. Results go to gpu.json, gpu.md and
gpu.png in --out as they come; a run adds to those of earlier runs and measures first what they lack. Logits are held
against float64 on the CPU before a contender is timed. Times of different runs do not compare, ratios of one row do.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import ROOT
from ..server import Server, first_line
from . import checks, plan, report
from .checks import Check
from .plan import Place, Step


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Run:
    """One run: the results so far, and what each phase does."""

    def __init__(self, results: report.Results, out: Path, place: Place, tell: Callable[[str], None] = tell) -> None:
        self.results, self.out, self.place, self.tell = results, out, place, tell
        self.source = source(place.device)
        self.failed: list[Step] = []

    def carry_out(self, planned: list[Step], left: Callable[[], float]) -> None:
        """Perform what fits into the seconds left; the rest is told of in the report."""
        self.results.unmeasured = []
        for step, limit_s in plan.schedule(planned, left):
            if limit_s:
                self.tell(f"{step}, expected to take {step.seconds:.0f} s")
                self.perform(step, limit_s)
            elif not self.results.hold(step, self.source["versions"]["sources"]):
                self.results.unmeasured.append(str(step))
            if step.phase == "build" and step in self.failed:
                self.tell("gpu.py: the extension was not built, and the package does not import without it")
                break
        report.save(self.results, self.out, self.tell)

    def perform(self, step: Step, limit_s: float) -> None:
        """Do a step within that time and save its row; one that breaks is told of among the checks."""
        begin = time.monotonic()
        kind = step.phase if step.case else "checks"
        try:
            row = {"models": self._models, "kernels": self._kernels}.get(step.phase, self._check)(step, limit_s)
        except Exception as error:
            kind, row = "checks", _row(step, Check("failed", first_line(error)))
        if kind == "checks":
            self.tell(f"{step}: {row['outcome']} after {time.monotonic() - begin:.0f} s: {row['told']}")
            self.failed += [step] if row["outcome"] == "failed" else []
        self.results.forget(self.source["machine"], step)
        self.results.add(kind, {**self.source, **row})
        report.save(self.results, self.out, self.tell)

    def _check(self, step: Step, limit_s: float) -> dict[str, Any]:
        if step.phase == "sanitize":
            return _row(step, checks.sanitize(step.what, limit_s))
        return _row(step, {"build": checks.build, "tests": checks.tests}[step.phase](limit_s))

    def _models(self, step: Step, limit_s: float) -> dict[str, Any]:
        from .models import compare  # imports pvt_fast, which has to be built first

        end = time.monotonic() + limit_s
        return compare(step.case, step.contenders, lambda: end - time.monotonic(), self.place, self.tell)

    def _kernels(self, step: Step, limit_s: float) -> dict[str, Any]:
        from .kernels import profile

        server = Server(profile, step.case, self.place)
        try:
            return {**step.case._asdict(), **server.receive(limit_s)}
        finally:
            server.kill()


def _row(step: Step, check: Check) -> dict[str, Any]:
    return {"phase": step.phase, "what": step.what, **check._asdict()}


def source(device: str) -> dict[str, Any]:
    """What every row tells of where it comes from: the GPU, the day, and versions."""
    import torch

    versions = {package: version(package) for package in ("torch", "triton", "timm") if find_spec(package)}
    versions |= {"driver": checks.nvidia_smi("driver_version") or "unknown", "sources": plan.sources_digest(ROOT)}
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"machine": machine, "threads": 0, "date": date.today().isoformat(), "versions": versions}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def shapes(text: str) -> list[tuple[int, int]]:
        pairs = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word) for word in text.split(",")]
        if None in pairs:
            raise argparse.ArgumentTypeError(f"must be BATCHxSIZE, comma-separated; got {text!r}")
        return [(int(pair[1]), int(pair[2])) for pair in pairs]

    def among(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parsed(text: str) -> list[str]:
            given = [word.removeprefix("pvt_v2_") for word in text.split(",")]
            for word in given:
                if word not in known:
                    raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}; got {word!r}")
            return given

        return parsed

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=among(plan.MODELS), default=plan.MODELS, help="comma-separated: b0,b2_li")
    parser.add_argument("--cases", type=shapes, default=plan.SHAPES, help="BATCHxSIZE, e.g. 256x224,8x512")
    parser.add_argument("--phases", type=among(plan.PHASES), default=plan.PHASES, help=f"of {', '.join(plan.PHASES)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of gpu.json, .md, .png"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, in which order; needs no GPU")
    return parser.parse_args(arguments)


def require_gpu() -> None:
    """End with one line where this Python cannot run anything on a GPU."""
    absent = [name for name in ("torch", "triton", "pybind11") if find_spec(name) is None]
    if absent:
        raise SystemExit(f"gpu.py: {', '.join(absent)} must be installed for {sys.executable}")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"gpu.py: a CUDA GPU must be visible to torch, got none (torch {torch.__version__}); "
            "--dry-run lists what would run"
        )


def main() -> None:
    options = parse()
    end = time.monotonic() + 60 * options.minutes
    results = report.load(options.out)
    revision = plan.sources_digest(ROOT)
    planned = plan.steps(options.models, options.cases, options.phases, lambda step: results.hold(step, revision))
    if options.dry_run:
        print(plan.dry_run(planned, options.minutes))
        return
    require_gpu()
    if find_spec("timm") is None:
        tell("timm is not installed: without it there is no baseline")
    run = Run(results, options.out, Place())
    run.carry_out(planned, lambda: end - time.monotonic())
    print(report.markdown(results))
    if run.failed:
        raise SystemExit(f"gpu.py: failed: {', '.join(map(str, run.failed))}")
