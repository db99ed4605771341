"""Packed forms of weights: one table, keyed by the weights themselves, and never stale.

A backend asks for the packed form of some weights through `packed`. The guarantee: **a change of a weight that torch
records, or that writes values all over it, is seen by the next call; any other change, down to one element, within
`CALLS` calls of the same kind** (a model's forward, its `forward_features`, an image of another memory layout: each
compares on its own). Three things together give it:

- Hints, at every use: each tensor is the same object, with the same storage, address, shape, strides and version. That
  sees in-place operations, `load_state_dict`, `.to()` and replaced parameters. It misses fused optimizers, writes
  through `.data`, through NumPy views and by other processes, which leave all of these alone.
- Comparison of a part, at every use: the values of one part in `CALLS` of every tensor, another part each time, are
  held against what was packed. On devices other than the CPU, where that would wait for the device, all of them at
  every `CALLS`-th use instead.
- Comparison of all values, at the first use after `doubt`: after a step of any of torch's optimizers (and at each use
  within one), after a module of ours switches between training and evaluation, and after a compiled graph that may have
  changed what it packed.

A step of an optimizer also drops what was packed of parameters that need gradients: in training nothing is packed for
longer than a step. Records die with their weights; copies and pickles of a model know nothing of them.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .. import _C
from .contract import Norm

# Within as many uses every value has been compared.
CALLS: int = _C.Watch.PARTS

# So many packed forms are kept of a kind of op and the first of its weights: of modules that are mixed at random (as in
# the search for an architecture, or by functional_call) each mixture is packed.
MIXTURES = 16

# Classes whose instances are what they look like. Tensor: a parameter that torch.func.functional_call, or a compiled
# graph, put in place of another
PLAIN = (torch.nn.Parameter, Tensor)

Tensors = tuple[Tensor | None, ...]
Alias = Callable[[Tensor], Tensor]


class UnannouncedChange(RuntimeError):
    """Under `checked_weights`: a weight changed in a way that torch does not record."""


class Sources:
    """The tensors that something was made of, and whether they are still what they were."""

    __slots__ = (
        "_addresses",
        "_calls",
        "_compact",
        "_kept",
        "_objects",
        "_shapes",
        "_storages",
        "_sure",
        "_versions",
        "_watch",
    )

    def __init__(
        self,
        tensors: Sequence[Tensor],
        seen: Sequence[Tensor],
        gone: Callable[[Any], object] | None = None,
        keep: bool = False,
    ) -> None:
        """seen: `aliases` of the tensors. gone: called when the memory of one of them is freed. keep: let the memory
        live as long as this, for `hold_values`.
        """
        # a graph may have raised the version of a weight whose values it changes later
        self._sure = _UNSURE if _thread.in_graph else _doubts.count
        self._calls = itertools.count()
        # before the values: of what changes from here on the versions differ
        self._objects = [_object(tensor) for tensor in tensors]
        self._versions = [_version(tensor) for tensor in tensors]
        self._storages = [ref(tensor.untyped_storage(), gone) for tensor in seen]
        self._addresses = [tensor.data_ptr() for tensor in seen]
        # another order of the same memory; a vector has but one
        self._compact = [(i, tensor.is_contiguous()) for i, tensor in enumerate(seen) if tensor.dim() > 1]
        self._shapes = [_shape(tensor) for tensor in seen]
        self._kept = seen if keep else None
        on_cpu = all(tensor.device.type == "cpu" for tensor in seen)
        self._watch = _C.Watch([_region(tensor) for tensor in seen]) if on_cpu else Snapshot(seen)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Are `tensors` these, with the values that they had, as far as the module's guarantee goes?"""
        # alive until the values have been compared, whatever another thread puts into the tensors
        storages = [storage() for storage in self._storages]
        for tensor, storage in zip(tensors, storages, strict=True):
            if tensor.untyped_storage() is not storage:
                return False
        return self.hold_values(tensors)

    def _hold_for(self, tensors: Sequence[Tensor]) -> bool:
        """The same for other tensors over the same memory, whose changes are counted anew: all values are compared."""
        if [tensor.data_ptr() for tensor in tensors] != self._addresses or not all(
            _shape(tensor) == shape for tensor, shape in zip(tensors, self._shapes, strict=True)
        ):
            return False
        objects, versions = [_object(tensor) for tensor in tensors], [_version(tensor) for tensor in tensors]
        if self._first_changed(tensors) >= 0:
            return False
        self._objects, self._versions = objects, versions
        return True

    def hold_values(self, tensors: Sequence[Tensor]) -> bool:
        """The same where the memory was kept, so that no other tensor can have its address."""
        # a plain loop: it runs for every weight of every forward
        for tensor, known, address, version in zip(
            tensors, self._objects, self._addresses, self._versions, strict=True
        ):
            if tensor._cdata != known and not _is(tensor, known):
                return self._hold_for(tensors)
            if tensor.data_ptr() != address or (version is not None and tensor._version != version):
                return False
        for index, compact in self._compact:
            if tensors[index].is_contiguous() != compact:
                return False
        return self._same_shapes(tensors) and self._same_values(tensors)

    def _same_shapes(self, tensors: Sequence[Tensor]) -> bool:
        """All of an op's weights are compared, of a model's a part at a time: this costs more than addresses and
        versions.
        """
        count = len(tensors)
        part = range(count)
        if count > CALLS:
            size = -(-count // CALLS)
            first = next(self._calls) * size % count
            part = range(first, min(first + size, count))
        return all(_shape(tensors[i]) == self._shapes[i] for i in part)

    def _same_values(self, tensors: Sequence[Tensor]) -> bool:
        doubts = _doubts.count
        if doubts != self._sure or _doubts.stepping or _checking.on:
            if (index := self._first_changed(tensors)) >= 0:
                if _checking.on and self._sure != _UNSURE and not _doubts.stepping:
                    raise UnannouncedChange(
                        f"checked_weights: weights must change in ways that torch records, got other values in the "
                        f"weight of shape {tuple(self._shapes[index][0])} at the same version; call pvt_fast.refresh "
                        "after such a write"
                    )
                return False
            if not _thread.in_graph:
                self._sure = doubts
            return True
        return self._watch.next() if isinstance(self._watch, _C.Watch) else self._watch.next(tensors)

    def hold_all(self, tensors: Sequence[Tensor]) -> bool:
        """Are `tensors` these, with all the values that they had?"""
        storages = [storage() for storage in self._storages]  # alive until the values have been compared
        return None not in storages and self.hold(tensors) and self._first_changed(tensors) < 0

    def _first_changed(self, tensors: Sequence[Tensor]) -> int:
        """The index of the first tensor with a changed value, all compared; -1 where there is none."""
        if isinstance(self._watch, _C.Watch):
            return self._watch.first_changed()
        return self._watch.first_changed(tensors)


class Snapshot:
    """What `_C.Watch` is for memory that the CPU does not read: copies, compared on the device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [tensor.detach().clone() for tensor in tensors]
        self._uses = itertools.count(1)

    def next(self, tensors: Sequence[Tensor]) -> bool:
        """Are all values the same? Asked of the device at every `CALLS`-th use only."""
        if next(self._uses) % CALLS or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return True
        return self.first_changed(tensors) < 0

    def first_changed(self, tensors: Sequence[Tensor]) -> int:
        for index, (tensor, copied) in enumerate(zip(tensors, self._copies, strict=True)):
            if tensor.is_meta:  # no values
                continue
            # as integers, so that NaN equals itself
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            if tensor.shape != copied.shape or not torch.equal(tensor.detach().view(bits), copied.view(bits)):
                return index
        return -1


class Record:
    """A packed form and the weights that it was made of."""

    __slots__ = ("addresses", "dropped", "form", "key", "memory", "sources", "trains")

    def __init__(
        self, key: Any, memory: tuple, tensors: Sequence[Tensor], seen: Sequence[Tensor], form: Any, sources: Sources
    ) -> None:
        self.key, self.memory, self.form, self.sources = key, memory, form, sources
        self.dropped = False  # as its weights were said to have changed
        self.addresses = [tensor.data_ptr() for tensor in seen]
        self.trains = any(tensor.requires_grad for tensor in tensors)


_UNSURE = -1


class _Doubts:
    """How often packed forms came into doubt: a form that was compared at another count is compared as a whole.

    stepping: does an optimizer, or one of its own hooks, run now? Each use is in doubt then.
    """

    count = 0
    stepping = False


class _Checking:
    on = os.environ.get("PVT_FAST_CHECK_WEIGHTS", "0") not in ("", "0")


class _Thread(threading.local):
    in_graph = False  # see `within_graph`
    used: list[Record] | None = None


_doubts, _checking, _thread = _Doubts(), _Checking(), _Thread()
# Gone through as a copy, which no weight that dies and no other thread interrupts, as they do a list of its items.
records: dict[tuple, Record] = {}
# By storages: what is given other memory (FSDP does so around each forward) has another place, and leaves the old one.
places: dict[tuple, tuple] = {}


def is_plain(tensor: Any) -> bool:
    """Does memory hold a value for each element (of negative-bit views its negative)?"""
    return type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_nested


def aliases(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors over the memory that `tensors` have now, whatever another thread puts into those."""
    return [tensor.detach() for tensor in tensors]


def packed(
    kind: str,
    key: Any,
    tensors: Tensors,
    build: Callable[[Alias], Any],
    check: Callable[[Alias], object] = lambda alias: None,
) -> Any:
    """The packed form of `tensors`: what is kept of them while it holds, else what `build(alias)` gives.

    One form is kept of a `kind` of op and its weights; `key` names its layout (ISA, options), and under another key it
    is built anew. What is read is to be `alias(tensor)` of each: that is what later is compared with. check(alias)
    raises where they cannot be packed, before anything else is asked of them.
    """
    if not all(tensor is None or is_plain(tensor) for tensor in tensors):
        check(lambda tensor: tensor)
    present = [tensor for tensor in tensors if tensor is not None]
    place = (kind, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
    record = records.get(place)
    if record is None or record.key != key or not record.sources.hold(present):
        seen = aliases(present)
        by_id = {id(tensor): other for tensor, other in zip(present, seen, strict=True)}

        def alias(tensor: Tensor) -> Tensor:
            return by_id[id(tensor)]

        check(alias)
        memory = (kind, *((tensor.untyped_storage()._cdata, tensor.storage_offset()) for tensor in seen))

        def gone(_: Any) -> None:
            records.pop(place, None)
            places.pop(memory, None)

        # before they are read: another thread's change meanwhile is seen at the next use
        sources = Sources(present, seen, gone)
        record = Record(key, memory, present, seen, build(alias), sources)
        if (before := places.get(memory, place)) != place:
            records.pop(before, None)
        records[place], places[memory] = record, place
        mixtures = [(other, used) for other, used in records.copy().items() if other[:2] == place[:2]]
        for oldest, used in mixtures[:-MIXTURES]:
            records.pop(oldest, None)
            places.pop(used.memory, None)
    if _thread.used is not None:
        _thread.used.append(record)
    return record.form


def key_of(isa: str, w: Any, *numbers: Any) -> tuple:
    """All that an op's packed form depends on but for the tensors of its weights."""
    norms = (w,) if isinstance(w, Norm) else (part for part in w if isinstance(part, Norm))
    return isa, *(norm.eps for norm in norms), *numbers


@contextmanager
def collected() -> Iterator[list[Record]]:
    """The records that this thread uses within the block, in order."""
    before, _thread.used = _thread.used, []
    try:
        yield _thread.used
    finally:
        _thread.used = before


@contextmanager
def within_graph() -> Iterator[None]:
    """Within the block this thread runs a part of a compiled graph that may also change weights, after the block."""
    before, _thread.in_graph = _thread.in_graph, True
    try:
        yield
    finally:
        _thread.in_graph = before


def doubt() -> None:
    """All values of all packed weights are compared at their next use."""
    _doubts.count += 1
    _doubts.stepping = False  # no hook tells of a step that raised


def forget(tensors: Sequence[Tensor]) -> None:
    """Drop what is packed of any of `tensors`."""
    addresses = {_address(tensor) for tensor in tensors}
    _drop(lambda record: not addresses.isdisjoint(record.addresses))


def _drop(which: Callable[[Record], bool]) -> None:
    for place, record in records.copy().items():
        if which(record):
            record.dropped = True
            records.pop(place, None)
            places.pop(record.memory, None)


def _address(tensor: Tensor) -> int:
    """0 for tensors of which nothing can be packed: of classes of their own, sparse, without values."""
    return tensor.data_ptr() if is_plain(tensor) and not tensor.is_meta else 0


@contextmanager
def checked_weights() -> Iterator[None]:
    """Within the block every forward compares all values of all packed weights with what was packed.

    Raises `UnannouncedChange` at the first forward after a write that torch does not record, which otherwise may take
    some calls to be seen (README, "Weights that change"). For tests and for finding such writes: it reads all weights
    at every call. The environment variable PVT_FAST_CHECK_WEIGHTS=1 does the same for a whole process.
    """
    before, _checking.on = _checking.on, True
    try:
        yield
    finally:
        _checking.on = before


def _version(tensor: Tensor) -> int | None:
    """How often torch recorded a change; None for tensors made under torch.inference_mode(), which do not count."""
    return None if tensor.is_inference() else tensor._version


def _object(tensor: Tensor) -> Any:
    """What tells a tensor from another over the same memory: each counts its own changes.

    For a parameter that is the address of its C++ part alone: torch.utils.swap_tensors refuses tensors that have weak
    references, and swaps those parts. A view of a parameter shares its count, and is made anew for each call.
    """
    base = tensor if isinstance(tensor, torch.nn.Parameter) else tensor._base  # None where it is no view
    return base._cdata if isinstance(base, torch.nn.Parameter) else ref(tensor)


def _is(tensor: Tensor, known: Any) -> bool:
    """Was `known` given by `_object` for this tensor?"""
    now = _object(tensor)
    return now == known if isinstance(now, int) or isinstance(known, int) else now() is known()


def _shape(tensor: Tensor) -> tuple:
    """All that tells which values the same memory stands for."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()


def span(tensor: Tensor) -> tuple[int, int]:
    """Address of a strided tensor's first value, and the bytes from there to the end of its memory."""
    return tensor.data_ptr(), available(tensor)


def available(tensor: Tensor) -> int:
    """Bytes of memory from a strided tensor's first value; none where it has no address (but on meta)."""
    if not tensor.is_meta and tensor.data_ptr() == 0:
        return 0
    return max(int(tensor.untyped_storage().nbytes()) - int(tensor.storage_offset()) * tensor.element_size(), 0)


def extent(tensor: Tensor) -> int:
    """Bytes from a strided tensor's first value to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _region(tensor: Tensor) -> tuple[int, int]:
    """The part of its span in which a strided tensor's values lie. RuntimeError where the memory is too small."""
    address, there = span(tensor)
    if (needed := extent(tensor)) > there:
        raise RuntimeError(
            f"pvt_fast: a weight of shape {tuple(tensor.shape)} must have {needed} bytes of memory, got {there}"
        )
    return (address, needed) if needed else (0, 0)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        _doubts.stepping = True


def _stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if torch.compiler.is_compiling():
        plain = [parameter for parameter in parameters if type(parameter) in PLAIN]
        if plain:
            _stepped_in_graph(plain[0])
        return
    doubt()
    stepped = {_address(parameter) for parameter in parameters} - {0}
    _drop(lambda record: record.trains or not stepped.isdisjoint(record.addresses))


@torch.library.custom_op("pvt_fast::stepped", mutates_args=("parameter",))
def _stepped_in_graph(parameter: Tensor) -> None:
    """Runs where an optimizer's step was compiled. That `parameter` is said to change keeps it in the graph."""
    doubt()
    _drop(lambda record: record.trains)


@_stepped_in_graph.register_fake
def _(parameter: Tensor) -> None:
    return None


# torch's hooks for the steps of all optimizers: its fused ones leave the versions of what they change alone. An
# optimizer's own hooks run between them.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_stepped)
