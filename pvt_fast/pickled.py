"""What reading a checkpoint's pickles would take, found out before torch reads them.

torch.load(weights_only=True) calls only functions that do no harm, but does what a few bytes ask for: memory of any
size and content from `torch.FloatTensor(n)` or `bytearray(n)`, a hash in 2^30 steps of a pair of pairs of pairs,
storages that a file of torch before 1.6 names and then does not fill. Here each pickle's instructions are followed
without doing any of them, in time in proportion to the file.
"""

from __future__ import annotations

import mmap
import pickletools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

# What takes memory for a number that it is called with, or gives more bytes than it is given.
_TAKES_MEMORY = re.compile(
    r"(__builtin__|builtins)\.bytearray|torch(\.\w+)*\.\w*Tensor|torch\._utils\._rebuild_qtensor"
)
# Gives bytes, to "hex" twice as many as it gets; pickles write bytes by it, to "latin1".
_ENCODE, _SHORTER = "_codecs.encode", "latin1"
# What an instruction takes may have been taken before, as values are shared; in all so many times the instructions.
_REPEATS, _ALWAYS = 64, 100_000
_CHANGES_ITS_FIRST = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")


@dataclass(slots=True)
class _Value:
    """A value as its pickle makes it. size: how much is in it, what is in it twice counted twice."""

    made_by: str
    argument: Any
    parts: list[_Value] = field(default_factory=list)
    size: int = 1

    def take(self, values: list[_Value]) -> _Value:
        self.parts += values
        self.size += sum(value.size for value in values)
        return self


def require_bounded(stream: IO[bytes] | mmap.mmap) -> None:
    """Raise ValueError where torch would need more memory or time for the next pickle in `stream` than it has bytes."""
    _follow(stream)


def require_filled(path: Path) -> None:
    """The same for a file of torch before 1.6, all of whose storages must be filled from it.

    It has five pickles (a number, a version, sizes of types, the content, the keys of the storages that follow).
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        *_, (_, storages), (filled, _) = [_follow(stream) for _ in range(5)]
    named, keys = _texts(storages), _texts(filled.parts) if filled.made_by == "EMPTY_LIST" else set()
    if missing := named - keys:
        raise ValueError(f"{len(missing)} of its {len(named)} storages are not in the file")


def _texts(values: list[_Value]) -> set[Any]:
    """What the values are, where they are written out as text; else two could be taken for one."""
    if any(value.made_by != "BINUNICODE" for value in values):
        raise ValueError("its storages must be named by text")
    return {value.argument for value in values}


def _follow(stream: IO[bytes] | mmap.mmap) -> tuple[_Value, list[_Value]]:
    """The value of the next pickle in `stream`, and the keys of the storages in it."""
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    keys: list[_Value] = []
    taken = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):  # type: ignore[arg-type]
        name, needs = opcode.name, opcode.stack_before
        if name == "MARK":
            marks.append(len(stack))
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            if argument not in memo:
                raise ValueError(f"its pickle takes value {argument}, which it has not kept")
            stack.append(memo[argument])
        else:
            if name == "GLOBAL":  # torch joins module and name, wherever a pickle parts them
                argument = str(argument).replace(" ", ".")
                if _TAKES_MEMORY.fullmatch(argument):
                    raise ValueError(f"{argument} in a pickle can take memory that the file does not have")
            if pickletools.markobject in needs:
                first = marks.pop() - needs.index(pickletools.markobject)
            else:
                first = len(stack) - len(needs)
            if first < 0:
                raise ValueError("its pickle takes more values than it has")
            values, stack[first:] = stack[first:], []
            taken += sum(value.size for value in values)
            if taken > _REPEATS * count + _ALWAYS:
                raise ValueError("its pickle nests or repeats its values too often")
            encodes = any(value.made_by == "GLOBAL" and value.argument == _ENCODE for value in values)
            if encodes and (name != "REDUCE" or [part.argument for part in values[1].parts[1:]] != [_SHORTER]):
                raise ValueError(f"_codecs.encode in a pickle must be called with {_SHORTER!r}, got another use")
            if name == "STOP":
                return values[0], keys
            if name == "BINPERSID" and len(values[0].parts) > 2:
                keys.append(values[0].parts[2])
            if name in _CHANGES_ITS_FIRST:
                stack.append(values[0].take(values[1:]))
            else:
                stack += [_Value(name, argument).take(values) for _ in opcode.stack_after]
    raise ValueError("its pickle has no end")
