"""What a public argument may be: each function answers the value as it is kept, or raises what is wrong with it.

Numbers are Python's own: an int is an `int`, a number is an `int` or a finite `float`; subclasses (np.float64 is one of
float) are kept as their plain values. A bool is no number, and nothing but True and False is a bool: what NumPy, torch
or a string make of them is refused, as it is mostly a slip, and cannot be written to a configuration file.

Errors read `<where> must <condition>, got <value>`, where `where` is "op: argument": TypeError for a value of another
type, ValueError for one of the right type that does not do.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Sequence
from typing import Any

# No length, width or count is larger; what is computed of them stays far from the end of 64 bits.
MAX_INT = 2**31 - 1

_BYTES = (str, bytes, bytearray, memoryview)


class _Short(reprlib.Repr):
    """A repr of bounded length, so that any value fits into one line of an error message."""

    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = 12
        self.maxstring = self.maxother = 120

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print very long ones
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an int of {x.bit_length()} bits"


_short = _Short()


def shown(value: Any) -> str:
    """The value for an error message: its repr, shortened, in one line."""
    return " ".join(_short.repr(value).split())


def integer(where: str, value: Any, minimum: int, maximum: int = MAX_INT) -> int:
    """An int in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an int, got {shown(value)}")
    if value < minimum:
        raise ValueError(f"{where} must be at least {minimum}, got {shown(value)}")
    if value > maximum:
        raise ValueError(f"{where} must be at most {maximum}, got {shown(value)}")
    return int(value)


def number(where: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """An int or a finite float in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, got {shown(value)}")
    plain = int(value) if isinstance(value, int) else float(value)
    try:
        finite = math.isfinite(plain)
    except OverflowError:  # an int beyond all floats
        finite = False
    if not finite:
        raise ValueError(f"{where} must be finite, got {shown(value)}")
    if plain < minimum:
        raise ValueError(f"{where} must be at least {minimum}, got {shown(plain)}")
    if plain > maximum:
        raise ValueError(f"{where} must be at most {maximum}, got {shown(plain)}")
    return plain


def rate(where: str, value: Any) -> float:
    """A number in [0, 1)."""
    plain = number(where, value)
    if not 0 <= plain < 1:
        raise ValueError(f"{where} must lie in [0, 1), got {shown(plain)}")
    return plain


def flag(where: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where} must be True or False, got {shown(value)}")
    return value


def choice(where: str, value: Any, names: Sequence[str]) -> str:
    """One of the names."""
    if not isinstance(value, str) or value not in names:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{where} must be one of {', '.join(names)}; got {shown(value)}")
    return value


def entries(where: str, value: Any, kind: str) -> Sequence[Any]:
    """A sequence, but no string or bytes, and of a length that `len` can tell. `kind` says in the error what it must
    be.
    """
    try:
        if isinstance(value, Sequence) and not isinstance(value, _BYTES) and len(value) >= 0:
            return value
    except OverflowError:  # such as range(10**20)
        pass
    raise TypeError(f"{where} must be {kind}, got {shown(value)}")


def instance(where: str, value: Any, kinds: type | tuple[type, ...], kind: str) -> Any:
    """An object of these classes; `kind` says in the error what it must be."""
    if not isinstance(value, kinds):
        raise TypeError(f"{where} must be {kind}, got {shown(value)}")
    return value


def pathname(where: str, value: Any, kind: str = "a path") -> str:
    """A path that a file may have; `kind` says in the error what it must be."""
    text = os.fspath(instance(where, value, (str, os.PathLike), kind))
    if not isinstance(text, str):
        raise TypeError(f"{where} must be {kind} of str, got {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"{where} must be {kind}, got {shown(value)}")
    return text


def function(where: str, value: Any, kind: str = "callable") -> Any:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(f"{where} must be {kind}, got {shown(value)}")
    return value
