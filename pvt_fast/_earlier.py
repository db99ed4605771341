"""The modules that earlier versions had, and the ops in them, by the names that they had there.

For scripts and for models that were pickled whole. `import pvt_fast.cpp`, or from it, gives a module that hands on what
it is asked for; nothing of it is loaded before. What is put into it stays in it: patch the module of today.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "bench": "cli.bench",
    "capture": "graphs.cuda_graph",
    "checkpoint": "checkpoints.files",
    "cpp": "backend.cpp",
    "dispatch": "backend.dispatch",
    "doctor": "cli.doctor",
    "hub": "checkpoints.hub",
    "layouts": "checkpoints.key_maps",
    "library": "backend.registered",
    "pixels": "images.pixels",
    "preprocess": "images.preprocess",
    "program": "graphs.program",
    "reference": "ops.reference",
    "replacing": "checkpoints.replacing",
    "weights": "checkpoints.weights",
}
# Modules that the package no longer has, and where in the repository they are.
GONE = {"digits": "examples/digits.py"}
OPS = {"overlap_patch_embed": "patch_embed", "sr_attention": "attention", "dwconv_mlp": "mlp"}


def earlier_module(name: str) -> ModuleType:
    """The attribute of the package that this module is; AttributeError for other names."""
    if name in MODULES:
        return importlib.import_module(f"{__package__}.{name}")
    raise AttributeError(f"module {__package__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        if package == __package__ and module in GONE:
            # without its attribute `name`: `from pvt_fast import digits` would take this for a module that never was
            raise ModuleNotFoundError(
                f"{name} is no part of the package any more: see {GONE[module]} in its repository"
            )
        return ModuleSpec(name, self) if package == __package__ and module in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        now = importlib.import_module(f"{__package__}.{MODULES[module.__name__.rpartition('.')[2]]}")

        def hand_on(name: str) -> Any:
            return getattr(now, OPS.get(name, name))

        names = [name for name in vars(now) if not name.startswith("_")]
        names += [name for name, op in OPS.items() if op in names]
        vars(module).update(__doc__=f"{now.__name__}, by an earlier name.", __getattr__=hand_on, __all__=names)
        vars(module)["__dir__"] = lambda: names


sys.meta_path.append(_Finder())
