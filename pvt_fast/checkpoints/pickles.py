"""What reading a checkpoint's pickles would take, found out before torch reads them.

torch.load(weights_only=True) calls only functions that do no harm, but does what a few bytes ask for: memory of any
size and content from `torch.FloatTensor(n)` or `bytearray(n)`, views of storages that are replaced under them, a hash
in 2^30 steps of a pair of pairs of pairs. Here each pickle's instructions are followed without doing any of them, and
held to what torch.save writes of state dicts, optimizers, schedulers and arguments: few calls, each of written-out
values, each tensor within its storage, each storage in the file.
"""

from __future__ import annotations

import mmap
import pickletools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_ENCODE, _DICT, _NAMESPACE = "_codecs.encode", "collections.OrderedDict", "argparse.Namespace"
# Called with values that are written out: of a tensor, say, `set` would make as many as its shape pretends to have.
_OF_WRITTEN = {
    *("collections.Counter", "torch.Size", "torch.device", _NAMESPACE, _ENCODE, _DICT),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "complex")),
}
_CALLED = {
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_meta_tensor_no_storage"),
    *(_OF_WRITTEN | _TENSORS),
}
_STORAGE = re.compile(r"torch\.((cuda|storage)\.)?\w+Storage")
_DTYPE = re.compile(r"torch\.(bool|(u?int|float|bfloat|complex)\d\w*)")
_UNWRITTEN = ("REDUCE", "NEWOBJ", "BINPERSID", "GLOBAL")
# What an instruction takes may have been taken before, as values are shared; in all so many times the instructions.
_REPEATS, _ALWAYS = 64, 100_000
_ADDS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")


@dataclass(slots=True)
class _Value:
    """A value as its pickle makes it. argument: of a call, what is called. size: what is in it, as often as it is."""

    made_by: str
    argument: Any
    parts: list[_Value] = field(default_factory=list)
    size: int = 1

    def take(self, values: list[_Value]) -> _Value:
        self.parts += values
        self.size += sum(value.size for value in values)
        return self

    def written(self) -> list[Any]:
        """What its parts are, where they are numbers and texts."""
        return [part.argument for part in self.parts]


def require_bounded(stream: IO[bytes] | mmap.mmap) -> None:
    """Raise ValueError where torch would need more memory or time for the next pickle in `stream` than it has bytes."""
    _Reading(stream)


def require_filled(path: Path) -> None:
    """The same for a file of torch before 1.6, all of whose storages must be filled from it.

    It has five pickles (a number, a version, sizes of types, the content, the keys of the storages that follow).
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        *_, content, keys = [_Reading(stream) for _ in range(5)]
    listed = keys.value.parts if keys.value.made_by == "EMPTY_LIST" else []
    filled = {_text(value) for value in listed}
    if missing := content.storages.keys() - filled:
        raise ValueError(f"{len(missing)} of its {len(content.storages)} storages are not in the file")


class _Reading:
    """The next pickle of a stream. value: what it makes. storages: by key, types and numbers of elements.

    called, filled: what it may call; and what it may make and give attributes to.
    """

    def __init__(self, stream: IO[bytes] | mmap.mmap) -> None:
        self.storages: dict[str, tuple[str, int]] = {}
        trusted = {_name(kind) for kind in torch.serialization.get_safe_globals()}
        self.called, self.filled = _CALLED | trusted, {_NAMESPACE} | trusted
        self.value = self._follow(stream)

    def _follow(self, stream: IO[bytes] | mmap.mmap) -> _Value:
        stack: list[_Value] = []
        marks: list[int] = []
        memo: dict[Any, _Value] = {}
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
                if pickletools.markobject in needs:
                    first = marks.pop() - needs.index(pickletools.markobject)
                else:
                    first = len(stack) - len(needs)
                if first < 0:
                    raise ValueError("its pickle takes more values than it has")
                values, stack[first:] = stack[first:], []
                given = values[1:] if name in _ADDS else values
                taken += sum(value.size for value in given)
                if taken > _REPEATS * count + _ALWAYS:
                    raise ValueError("its pickle nests or repeats its values too often")
                if name == "STOP":
                    return values[0]
                argument = self._checked(name, argument, values)
                if name in _ADDS:
                    stack.append(values[0].take(given))
                else:
                    stack += [_Value(name, argument).take(values) for _ in opcode.stack_after]
        raise ValueError("its pickle has no end")

    def _checked(self, name: str, argument: Any, values: list[_Value]) -> Any:
        """Raise ValueError where torch must not do this. The `argument` of what it makes."""
        if name == "GLOBAL":  # torch joins module and name, wherever a pickle parts them
            return self._known(str(argument).replace(" ", "."))
        if name in ("REDUCE", "NEWOBJ"):
            function, arguments = values
            if function.made_by != "GLOBAL" or function.argument not in self.called:
                raise ValueError(f"its pickle must call what weights are saved with, got {function.argument}")
            if name == "NEWOBJ" and function.argument not in self.filled:
                raise ValueError(f"its pickle must make no {function.argument} in this way")
            self._check_call(function.argument, arguments)
            return function.argument
        if name == "BINPERSID":
            self._check_storage(values[0].parts)
        if name == "BUILD":
            target, state = values
            keys = [part.argument for part in state.parts[::2]] if state.made_by == "EMPTY_DICT" else [None]
            if target.argument == _DICT and keys != ["_metadata"]:
                raise ValueError("its pickle must give dicts no attributes but _metadata")
            if target.argument != _DICT and target.argument not in self.filled:
                raise ValueError(f"its pickle must give attributes to dicts and namespaces, got a {target.made_by}")
        if name in ("SETITEM", "SETITEMS"):
            keys = [value.argument for value in values[1::2]]
            if any(isinstance(key, int) and key.bit_length() > 64 for key in keys):  # any number may have one hash
                raise ValueError("its pickle must have keys of at most 64 bits")
        return argument

    def _known(self, name: str) -> str:
        if name in self.called or _STORAGE.fullmatch(name) or _DTYPE.fullmatch(name):
            return name
        raise ValueError(f"its pickle must name what weights are saved with, got {name}")

    def _check_call(self, name: str, arguments: _Value) -> None:
        parts = arguments.parts
        if name in _OF_WRITTEN and any(part.made_by in _UNWRITTEN for part in parts):
            raise ValueError(f"{name} in a pickle must be called with values that are written out")
        if name == _DICT and parts:
            raise ValueError(f"{name} in a pickle must be called without arguments")
        if name == _ENCODE and arguments.written()[1:] != ["latin1"]:  # others give more bytes than they get
            raise ValueError(f"{name} in a pickle must be called with 'latin1'")
        if name in _TENSORS:
            self._check_tensor(parts)

    def _check_tensor(self, parts: list[_Value]) -> None:
        if len(parts) < 4 or parts[0].made_by != "BINPERSID":
            raise ValueError("its tensors must have a storage each")
        _, numel = self.storages[_text(parts[0].parts[0].parts[2])]
        offset, sizes, strides = parts[1].argument, parts[2].written(), parts[3].written()
        if not all(type(number) is int and number >= 0 for number in (offset, *sizes, *strides)):
            raise ValueError("its tensors must have offsets, sizes and strides of integers")
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if 0 not in sizes and last >= numel:
            raise ValueError(
                f"its tensors must lie in their storages, got one of shape {tuple(sizes)} in {numel} elements"
            )

    def _check_storage(self, parts: list[_Value]) -> None:
        """("storage", type, key, location, elements[, None]), the same wherever it is named."""
        if len(parts) not in (5, 6) or parts[1].made_by != "GLOBAL" or not _STORAGE.fullmatch(parts[1].argument):
            raise ValueError("its storages must be named as torch names them")
        kind, elements = parts[1].argument, parts[4].argument
        if type(elements) is not int or elements < 0 or any(part.made_by != "NONE" for part in parts[5:]):
            raise ValueError("its storages must have a number of elements, and no views")
        if self.storages.setdefault(_text(parts[2]), (kind, elements)) != (kind, elements):
            raise ValueError("its storages must be the same wherever they are named")


def _text(value: _Value) -> str:
    """A text that is written out as such, so that no two are taken for one."""
    if value.made_by != "BINUNICODE":
        raise ValueError("its storages must be named by text")
    return value.argument


def _name(kind: Any) -> str:
    """The name of what a user has allowed: a class or function, or one with another name."""
    return kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"
