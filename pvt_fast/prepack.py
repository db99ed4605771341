"""Cache of packed weights: built once per layer, dropped when the weights change, never part of a state_dict.

A layer owns one `PackCache` and hands it out inside its weight tuple; a backend asks for its packed form through
`packed`. The packed form stays valid while every tensor is the same object at the same address and version: an
in-place update, `load_state_dict`, `.to()` or a replaced parameter each change one of the three.

A compiled graph that changes a weight raises its version before it runs, not when it comes to the change. So what is
packed within a graph may be of a weight that the graph goes on to change: it is used within graphs alone, where the
next run sees a new version.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class PackCache:
    """A slot for one packed form. Copies and pickles of it are empty: packed weights are derived data."""

    __slots__ = ("key", "of_graph", "packed", "stamps", "storages", "tensors")

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget the packed form."""
        self.key: Any = None
        self.tensors: tuple[Tensor | None, ...] = ()
        self.stamps: tuple[tuple[int, int], ...] = ()
        # `.to()` swaps a parameter's storage and not its version: a storage that lives on lends no one its address
        self.storages: tuple[Tensor | None, ...] = ()
        self.packed: Any = None
        self.of_graph = False  # packed within a compiled graph

    def __deepcopy__(self, memo: dict) -> PackCache:
        return PackCache()

    def __reduce__(self) -> tuple:
        return (PackCache, ())


class _Thread(threading.local):
    in_graph = False


_thread = _Thread()


@contextmanager
def within_graph() -> Iterator[None]:
    """Within the block this thread runs a part of a compiled graph that may also change weights."""
    before, _thread.in_graph = _thread.in_graph, True
    try:
        yield
    finally:
        _thread.in_graph = before


def usable(of_graph: bool) -> bool:
    """May this thread use what was packed within a graph, or was not?"""
    return not of_graph or _thread.in_graph


def packed(cache: PackCache | None, key: Any, tensors: tuple[Tensor | None, ...], build: Callable[[], Any]) -> Any:
    """The packed form of `tensors`, from the cache when it still holds, else from `build()`.

    `key` names the layout (backend, ISA, options): a cache filled under another key is rebuilt. Without a cache the
    weights are packed at each call.
    """
    if cache is None:
        return build()
    if cache.key == key and usable(cache.of_graph) and unchanged(cache.tensors, tensors, cache.stamps):
        return cache.packed
    stamps = tuple(stamp(tensor) for tensor in tensors)
    form = build()
    # the key goes first and comes back last, so that another thread never sees it beside a form that is not its own
    cache.key = None
    cache.packed, cache.tensors, cache.stamps, cache.of_graph = form, tensors, stamps, _thread.in_graph
    cache.storages = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    cache.key = key
    return form


def unchanged(known: tuple, tensors: tuple, stamps: tuple[tuple[int, int], ...]) -> bool:
    """Are `tensors` the `known` ones, with the storage and version of `stamps`?"""
    if len(known) != len(tensors):
        return False
    # a plain loop: it runs for every weight of every forward
    for tensor, before, (address, version) in zip(tensors, known, stamps, strict=True):
        if tensor is not before:
            return False
        if tensor is not None and (tensor.data_ptr() != address or (version >= 0 and tensor._version != version)):
            return False
    return True


def stamp(tensor: Tensor | None) -> tuple[int, int]:
    """(address, version) of a tensor."""
    if tensor is None:  # a linear without bias
        return 0, 0
    # tensors made under torch.inference_mode() have no version counter; they cannot be updated outside of it
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version
