"""Another package of this folder's name, where this folder comes first on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path


def hand_over(name: str, file: str) -> None:
    """Called by the package `name` at `file` while it is imported: put the installed package of that name in its place.

    That is what Python itself does past a folder that holds no package. Where no other is installed the one being
    imported stays, empty: who then asks it for a version or a function is told that there is none.
    """
    spec = next(_others(name, Path(file).resolve()), None)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the import system returns what stands there after a module has run
    spec.loader.exec_module(module)


def _others(name: str, file: Path) -> Iterator[ModuleSpec]:
    """The packages of that name that are not at `file`, the first to be imported first."""
    root = file.parent.parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    for finder in sys.meta_path:
        spec = finder.find_spec(name, elsewhere)
        if spec is not None and spec.has_location and spec.origin and Path(spec.origin).resolve() != file:
            yield spec
