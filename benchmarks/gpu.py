"""Everything that wants a CUDA GPU, in one command and a few minutes: build, tests, sanitizer, models, kernels, report.

    python benchmarks/gpu.py                                     # or: make gpu
    python benchmarks/gpu.py --dry-run                           # what would run, in which order; needs no GPU
    python benchmarks/gpu.py --phases models --models b2 --cases 256x224 --peers timm,compile --minutes 5

Uses the Python that runs it and the packages that are there; nothing is downloaded. Results go to gpu.json, gpu.md and
gpu.png in --out as they come; a run adds to those of earlier runs and measures first what they lack. Logits are held
against float64 on the CPU before a contender is timed. Times of different runs do not compare, ratios of one row do.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_plan
import gpu_report
import gpu_results
import report
from gpu_checks import Check
from gpu_plan import FEWEST_ROUNDS, Clock, Place, Request, Step
from server import Server, first_line
from source_tree import ROOT

NEEDED = ("torch", "triton")
WANTED = {
    "timm": "without it there is no baseline",
    "pytest": "the tests are left out",
    "rich": "progress is told in plain lines",
    "matplotlib": "gpu.png is not drawn",
}


class Screen:
    """Progress on standard error: rich's bar where it is installed, else a line for each thing told."""

    def __init__(self, stack: ExitStack, total: int) -> None:
        self._progress: Any = None
        if importlib.util.find_spec("rich"):
            from rich.console import Console
            from rich.progress import Progress

            self._progress = stack.enter_context(Progress(console=Console(stderr=True)))
            self._task = self._progress.add_task("steps", total=total)

    def tell(self, text: str) -> None:
        if self._progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False)

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)


class Run:
    """One run: the results so far, and what each phase does."""

    def __init__(
        self,
        options: argparse.Namespace,
        results: gpu_results.Results,
        tell: Callable[[str], None],
        place: Place,
    ) -> None:
        self.options, self.results, self.tell, self.place = options, results, tell, place
        self.source = {**origin(place.device), "revision": gpu_plan.sources_digest(ROOT)}
        self.failed: list[Step] = []

    def perform(self, step: Step, limit_s: float) -> None:
        """Do a step within that time and put its row into the results; one that breaks is told of among the checks."""
        begin = time.monotonic()
        try:
            row = {"models": self._model, "kernels": self._kernels}.get(step.phase, self._check)(step, limit_s)
        except Exception as error:
            row = {"phase": step.phase, "what": step.what, **Check("failed", first_line(error))._asdict()}
        if "outcome" in row:
            seconds = time.monotonic() - begin
            self.tell(f"{step.phase} {step.what}: {row['outcome']} after {seconds:.0f} s: {row['told']}")
            self.failed += [step] if row["outcome"] == "failed" else []
        self.results.forget(self.source["machine"], step)
        self.results.add("checks" if "outcome" in row else step.phase, {**self.source, **row})
        self.save()

    def save(self) -> None:
        gpu_report.save(self.results, self.options.out, self.tell)

    def _check(self, step: Step, limit_s: float) -> dict[str, Any]:
        if step.phase == "sanitize":
            check = gpu_checks.sanitize(step.what, Path(__file__), limit_s)
        else:
            check = {"build": gpu_checks.build, "tests": gpu_checks.tests}[step.phase](limit_s)
        return {"phase": step.phase, "what": step.what, **check._asdict()}

    def _model(self, step: Step, limit_s: float) -> dict[str, Any]:
        from gpu_models import compare  # imports pvt_fast, which has to be built first

        end = time.monotonic() + limit_s
        rounds = (self.options.rounds, self.options.seconds)
        return compare(step.case, step.contenders, *rounds, lambda: end - time.monotonic(), self.place, self.tell)

    def _kernels(self, step: Step, limit_s: float) -> dict[str, Any]:
        from gpu_kernels import profile

        server = Server(profile, step.case, self.place)
        try:
            return {**step.case._asdict(), **server.receive(limit_s)}
        finally:
            server.kill()


def origin(device: str) -> dict[str, str]:
    """The GPU, what drives it, and the day."""
    import torch
    import triton

    told = [f"driver {gpu_checks.nvidia_smi('driver_version') or 'unknown'}", f"CUDA {torch.version.cuda}"]
    told += [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    if importlib.util.find_spec("timm"):
        told.append(f"timm {version('timm')}")
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"machine": machine, "origin": ", ".join(told), "date": date.today().isoformat()}


def carry_out(planned: list[Step], run: Run, clock: Clock, advance: Callable[[], None]) -> None:
    """Perform what fits; the rest is told of in the report, each case once."""
    left_out: dict[Any, Step] = {}
    for step, limit_s in gpu_plan.schedule(planned, clock):
        if limit_s:
            run.tell(f"{step.phase} {step.what}, expected to take {clock.expected(step):.0f} s")
            begin = clock.left()
            run.perform(step, limit_s)
            clock.observe(step, begin - clock.left())
            if step.phase == "build" and step in run.failed:
                run.tell("gpu.py: the extension was not built, and the package does not import without it")
                break
        else:
            left_out[step.phase, step.case or step.what] = step  # the later wave has all contenders of the earlier
        advance()
    lacking = ((step, run.results.lacking(step, run.source["revision"])) for step in left_out.values())
    run.results.unmeasured = [
        f"{step.phase} {step.case or step.what}: {', '.join(parts)}" for step, parts in lacking if parts
    ]
    run.save()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def shapes(text: str) -> list[tuple[int, int]]:
        pairs = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word) for word in words(text)]
        if not pairs or None in pairs:
            raise argparse.ArgumentTypeError(f"must be BATCHxSIZE, comma-separated; got {text!r}")
        return [(int(pair[1]), int(pair[2])) for pair in pairs]

    peers = [name for name in gpu_plan.CONTENDERS if name not in report.ALL_OURS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=words, default=list(gpu_plan.MODELS), help="comma-separated, e.g. b0,b2_li")
    parser.add_argument("--cases", type=shapes, default=list(gpu_plan.SHAPES), help="BATCHxSIZE, e.g. 256x224,8x512")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("--peers", type=words, default=peers, help=f"of {', '.join(peers)}")
    parser.add_argument("--phases", type=words, default=list(gpu_plan.PHASES), help=f"of {', '.join(gpu_plan.PHASES)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--rounds", type=int, default=7, help="bursts of each contender, at least 5")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a burst, about")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of gpu.json, .md, .png"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, in which order; needs no GPU")
    parser.add_argument("--sanitize-target", action="store_true", help="run every op once; for compute-sanitizer")
    options = parser.parse_args(arguments)
    options.models = [model.removeprefix("pvt_v2_") for model in options.models]
    for option, given, known in (
        ("--models", options.models, gpu_plan.MODELS),
        ("--peers", options.peers, peers),
        ("--phases", options.phases, gpu_plan.PHASES),
    ):
        if not given:
            parser.error(f"{option} must name at least one of {', '.join(known)}; got none")
        for word in given:
            if word not in known:
                parser.error(f"{option} must be among {', '.join(known)}; got {word}")
    if options.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}; got {options.rounds}")
    return options


def request(options: argparse.Namespace) -> Request:
    contenders = [c for c in gpu_plan.CONTENDERS if c in report.ALL_OURS or c in options.peers]
    lists = (options.models, options.cases, contenders, options.phases)
    models, cases, contenders, phases = map(tuple, lists)
    return Request(models, cases, options.dtype, contenders, phases)


def require_gpu() -> None:
    """End with one line where this Python cannot run anything on a GPU."""
    absent = gpu_checks.missing(NEEDED)
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
    results = gpu_results.load(options.out)
    revision = gpu_plan.sources_digest(ROOT)
    planned = gpu_plan.steps(request(options), lambda step: not results.lacking(step, revision))
    if options.dry_run:
        print(gpu_plan.dry_run(planned, options.minutes))
        return
    require_gpu()
    if options.sanitize_target:
        from gpu_sanitize import target

        sys.exit(f"gpu.py: {bad} values are not finite" if (bad := target("cuda")) else 0)
    clock = Clock(options.minutes)
    with ExitStack() as stack:
        screen = Screen(stack, len(planned))
        for package in gpu_checks.missing(tuple(WANTED)):
            screen.tell(f"{package} is not installed: {WANTED[package]}")
        run = Run(options, results, screen.tell, Place())
        carry_out(planned, run, clock, screen.advance)
    print(gpu_report.markdown(results))
    if run.failed:
        raise SystemExit(f"gpu.py: failed: {', '.join(f'{step.phase} {step.what}' for step in run.failed)}")


if __name__ == "__main__":
    main()
