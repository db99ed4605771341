"""The rooms of the house: what may import what, and how much reaches past what a module offers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a room imports from itself and from those before it.
FLOORS = (
    (
        "pvt_fast._version",
        "pvt_fast._install",
        "pvt_fast._earlier",
        "pvt_fast._C",
        "pvt_fast.cli.interrupt",
        "pvt_fast.arguments",
    ),
    ("pvt_fast.config",),
    ("pvt_fast.ops",),
    ("pvt_fast.backend",),
    ("pvt_fast.kernels",),
    ("pvt_fast.accelerate",),
    ("pvt_fast.graphs", "pvt_fast.images"),
    ("pvt_fast.layers",),
    ("pvt_fast.conventions",),
    ("pvt_fast.checkpoints",),
    ("pvt_fast.model",),
    ("pvt_fast.checkpoints.weights", "pvt_fast.model_file", "pvt_fast.variants", "pvt_fast.testing"),
    ("pvt_fast.cli", "pvt_fast", "pvt_fast.__main__"),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    files = [*(ROOT / "pvt_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    named = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "kernels" in parts and parts[0] == "pvt_fast":
            continue  # a link to the other
        parts = ("pvt_fast", *parts) if parts[0] == "kernels" else parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    named["pvt_fast._C"] = ROOT / "pvt_fast" / "_C.pyi"
    return named


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it, but for its types alone."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            # of `import pvt_fast` in _install: it is the package that is being imported
            yield from (a.name for a in node.names if a.name in MODULES and name != "pvt_fast._install")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
            yield from (each if each in MODULES else base for each in found if base in MODULES or each in MODULES)


def floor(name: str) -> int:
    """The number of the floor on which a module lies: that of the longest name that it begins with."""
    rooms = [(room, number) for number, floor in enumerate(FLOORS) for room in floor]
    return max((len(room), number) for room, number in rooms if f"{name}.".startswith(f"{room}."))[1]


def test_no_room_imports_from_above():
    above = {
        f"{name} -> {other}"
        for name, path in MODULES.items()
        for other in imports(name, path)
        if floor(other) > floor(name)
    }
    assert not above


def test_modules_import_each_other_in_no_circle():
    graph = {name: {other for other in imports(name, path) if other != name} for name, path in MODULES.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_the_top_floor_is_small():
    top = [path.name for path in (ROOT / "pvt_fast").glob("*.py")]
    assert len(top) <= 14, sorted(top)


def test_tests_mirror_the_rooms():
    rooms = {path.parent.name for path in (ROOT / "pvt_fast").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert folders - {"subjects"} <= rooms | {"kernels", "benchmarks", "examples"}


def test_nothing_among_the_tests_is_a_program():
    programs = re.compile(r"^if __name__ ==", re.MULTILINE)
    assert not [path.name for path in (ROOT / "tests").rglob("*.py") if programs.search(path.read_text())]
