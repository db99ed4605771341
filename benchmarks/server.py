"""Work in a process of its own, asked over a pipe: what it does to the process, or the GPU to it, stays there."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[..., Generator[Any, Any, None]]


class Failed(RuntimeError):
    """The work raised, its process ended, or it did not answer in time; says which in one line."""


class Server:
    """Runs a generator in a process: its first value answers `receive()`, each later one a request sent to it."""

    def __init__(self, work: Work, *arguments: Any) -> None:
        context = mp.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, work, arguments), daemon=True)
        self._process.start()
        child.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def receive(self, seconds: float | None = None) -> Any:
        """The next answer; raises Failed, also where there is none within `seconds`, and then the process is ended."""
        if not self._connection.poll(seconds):
            self.kill()
            raise Failed(f"no answer within {seconds:.0f} s")
        try:
            fine, value = self._connection.recv()
        except EOFError:
            self._process.join(timeout=10)
            raise Failed(f"its process ended with status {self._process.exitcode}") from None
        if not fine:
            raise Failed(value)
        return value

    def ask(self, request: Any, seconds: float | None = None) -> Any:
        """Send a request, which is not None, and receive its answer."""
        try:
            self._connection.send(request)
        except BrokenPipeError:
            raise Failed(f"its process ended with status {self._process.exitcode}") from None
        return self.receive(seconds)

    def close(self) -> None:
        """Let the generator end, or end its process."""
        if self._process.is_alive():
            with suppress(BrokenPipeError):  # it has failed by itself and told so
                self._connection.send(None)
            self._process.join(timeout=10)
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, in 200 characters; where that line announces the next, both."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {told}"[:200]


def _serve(connection: Connection, work: Work, arguments: tuple) -> None:
    try:
        answers = work(*arguments)
        connection.send((True, next(answers)))
        while (request := connection.recv()) is not None:
            connection.send((True, answers.send(request)))
        answers.close()
    except Exception as error:
        connection.send((False, first_line(error)))
