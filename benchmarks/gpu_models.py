"""Whole models on a GPU, contenders in turns: the parent's end. One case gives one row of `gpu_results`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from case import Case
from contenders import truth
from gpu_contenders import Ready, contend
from gpu_plan import FEWEST_ROUNDS, Place
from gpu_results import OURS, OUT_OF_TIME
from report import Row
from server import Failed, Server

from pvt_fast import testing
from pvt_fast.cli.timing import spread
from pvt_fast.config import VARIANTS, PVTConfig

# Of a batch so many images from both ends are held against float64, of large images fewer.
CHECKED, CHECKED_LARGE, LARGE = 4, 2, 512


def checked_rows(case: Case) -> list[int]:
    """Places in the batch of the images whose logits are checked: half from each end."""
    count = min(case.batch, CHECKED if case.size < LARGE else CHECKED_LARGE)
    return [*range((count + 1) // 2), *range(case.batch - count // 2, case.batch)]


class Contender:
    """The parent's end of a contender; once `failure` is set it takes no more part."""

    def __init__(self, name: str, case: Case, place: Place) -> None:
        self.name = name
        self.times: list[float] = []
        self.failure: str | None = None
        self.error = float("nan")
        self._ready: Ready | None = None
        self._server = Server(contend, name, case, place, checked_rows(case))

    def _answer(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Failed as failed:
            self.failure = str(failed)
            return None

    def prepare(self, exact: Any, plain: Any, seconds: float) -> None:
        """Make it ready within that time and check its logits; ours must keep the parity rule to be timed."""
        if seconds <= 0:
            self.failure = OUT_OF_TIME
            return
        self._answer(lambda: self._server.receive(seconds))
        if self.failure is None:
            self._ready = self._answer(lambda: self._server.ask("prepare", seconds))
        if self._ready is not None:
            self.error = float((self._ready.logits - exact).abs().max())
            if self.name in OURS:
                try:
                    testing.assert_parity(self._ready.logits, exact, plain, self.name)
                except AssertionError as error:
                    self.failure = str(error)

    def burst(self, seconds: float, limit_s: float) -> None:
        if self.failure is None:
            time = self._answer(lambda: self._server.ask(seconds, limit_s))
            if time is not None:
                self.times.append(time)

    def close(self) -> None:
        self._server.kill()  # there is nothing to wait for, and a GPU process takes seconds to end by itself

    def cell(self) -> dict[str, Any]:
        """Its part of the row."""
        if self.failure is not None or self._ready is None:
            return {"failure": self.failure}
        memory = {"peak": self._ready.peak, "reserved": self._ready.reserved}
        return {**spread(self.times)._asdict(), "error": self.error, "note": "", **memory}


def compare(
    case: Case,
    names: Sequence[str],
    rounds: int,
    seconds: float,
    left: Callable[[], float],
    place: Place,
    told: Callable[[str], None] = lambda text: None,
) -> Row:
    """Check and time the contenders on one case.

    rounds: bursts of each, of about that many seconds. left: seconds that remain; contenders that are not ready when
    only the rounds' time remains are left out, and the rounds end early rather than late (but not before the fifth).
    """
    contenders = [Contender(name, case, place) for name in names]
    try:
        exact, plain = truth(case, checked_rows(case))
        bound = testing.parity_bounds(exact, plain)["largest"]
        for contender in contenders:
            told(f"{case}: {contender.name} gets ready")
            contender.prepare(exact, plain, left() - 2 * rounds * seconds * len(names))
            if contender.failure:
                told(f"{case}: {contender.name} did not run: {contender.failure}")
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and left() <= 0:
                break
            told(f"{case}: round {done + 1} of {rounds}")
            for contender in contenders:
                contender.burst(seconds, max(60.0, 20 * seconds))
    finally:
        for contender in contenders:
            contender.close()
    flop = testing.model_flops(PVTConfig(**VARIANTS[case.model]), case.batch, (case.size, case.size))
    cells = {contender.name: contender.cell() for contender in contenders}
    return {**case._asdict(), "gflop": flop / 1e9, "bound": bound, "rounds": rounds, "contenders": cells}
