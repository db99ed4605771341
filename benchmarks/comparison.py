"""Contenders in processes of their own, from their parent's side: the answers are checked, then timed in turns.

One process would not do: OpenMP and TBB threads that spin while they wait would disturb each other, and a GPU's memory
and a compiler's settings would be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from pvt_fast.cli.timing import in_turns, spread
from pvt_fast.testing import assert_parity

from .report import ALL_OURS
from .server import Failed, Server, Work

Truth = tuple[Tensor, Tensor]  # in float64, and of plain torch in the dtype that is compared


class Ready(NamedTuple):
    """What a contender answers before it is timed: logits, and what its cell of the row tells beside times."""

    logits: Tensor
    told: dict[str, Any]


class Worker:
    """A contender's process. Once `failure` is set it takes no more part, and its cell says why.

    Its work yields None once it has loaded, then answers "prepare" by Ready, and each number of seconds by the times of
    calls, in seconds, over about that long. Processes may load side by side, but get ready one by one: some tune what
    they compile by timing it.
    """

    def __init__(self, name: str, work: Work, *arguments: Any) -> None:
        self.name = name
        self.failure: str | None = None
        self.server = Server(work, *arguments)
        self._told: dict[str, Any] = {}

    def prepare(self, truth: Truth, seconds: float | None = None) -> None:
        """Make it ready within that time and look at its logits; ours must keep the parity rule."""
        exact, plain = truth
        try:
            self.server.receive(seconds)
            ready = self.server.ask("prepare", seconds)
            if self.name in ALL_OURS:
                assert_parity(ready.logits, exact, plain, self.name)
        except (Failed, AssertionError) as error:
            self.failure = str(error)
        else:
            self._told = {"error": float((ready.logits.double() - exact).abs().max()), **ready.told}

    def burst(self, seconds: float, limit_s: float | None = None) -> list[float]:
        """Seconds of calls over about that long; none from a worker that has failed."""
        if self.failure is not None:
            return []
        try:
            return self.server.ask(seconds, limit_s)
        except Failed as failed:
            self.failure = str(failed)
            return []

    def cell(self, times: Sequence[float]) -> dict[str, Any]:
        """Its part of the row."""
        if self.failure is not None:
            return {"failure": self.failure}
        return {**spread(times)._asdict(), **self._told}


def cells(
    workers: Sequence[Worker],
    rounds: int,
    seconds: float,
    budget_s: float = float("inf"),
    limit_s: float | None = None,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Time workers that are ready, in turns: `contenders` of a row. A burst that takes `limit_s` fails its worker."""
    bursts = [partial(worker.burst, seconds, limit_s) for worker in workers]
    times = in_turns(bursts, rounds, budget_s, after_round)
    return {worker.name: worker.cell(each) for worker, each in zip(workers, times, strict=True)}
