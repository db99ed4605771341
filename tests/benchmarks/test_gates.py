"""The gates of benchmarks/gates and their table: what a gate lets pass, when the table is stale, and a few kernels
compiled to see that it is true. `make gpu-gates` does it for all variants, dtypes and targets."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.gates.__main__ import PARTS, Place, changed_since, differences, part_of
from benchmarks.gates.compilations import CHIPS, Compilation, source_digest
from benchmarks.gates.limits import GATES, NO_MATRIX_PRODUCT
from benchmarks.gates.table import SUMMARY, TABLE, parse, summary_text, table_text

ROOT = TABLE.parents[2]
ALL_KERNELS = NO_MATRIX_PRODUCT | {
    "attention_kernel",
    "dwconv_fc2_kernel",
    "head_attention_kernel",
    "linear_kernel",
    "norm_fc1_kernel",
    "norm_linear_kernel",
    "patch_embed_kernel",
    "spatial_reduction_kernel",
}

# One process for all that must see the kernels as they are compiled, without Triton's interpreter.
AS_COMPILED = """
import json
import torch
from benchmarks.gates.__main__ import compiled, list_compilations, row
from benchmarks.gates.compilations import CHIPS, compilations
from benchmarks.gates.table import TABLE, parse

table = parse(TABLE.read_text())
listed = list_compilations(["sm_90", "gfx942"], ["bf16"])
rows = [row(place, made, table[place]) for place, made in listed.items() if place in table]
chosen = {}
for place, made in listed.items():
    if place.kernel in ("dwconv_gelu_kernel", "pool_kernel", "norm_linear_kernel"):
        chosen.setdefault((place.target, place.kernel), place)

def keys(variant, batch=8, sizes=(224, 512), whole=False):
    return {made.key() for made in compilations([variant], torch.bfloat16, CHIPS["sm_90"], (batch,), sizes, whole)}

alone = {variant: keys(variant) for variant in ("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b5")}
print(json.dumps({
    "rows": rows,
    "missing": [place for place in listed if place not in table],
    "compiled": [
        (place, resources, table.get(place))
        for place, resources in compiled({place: listed[place] for place in chosen.values()})
    ],
    "of_other_sizes": {
        variant: [len(keys(variant, batch, sizes) ^ expected) for batch, sizes in SIZES]
        for variant, expected in alone.items()
    },
    "beside_b2": {
        variant: len(keys(variant, whole=True) ^ alone["pvt_v2_b2"])
        for variant in ("pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b3", "pvt_v2_b4")
    },
}))
"""
# a batch of one and one that fills the chip, both kinds of key maps, odd ones
SIZES = [(batch, sizes) for batch in (1, 2, 7, 48, 256) for sizes in ((224,), (250,), (256, 512), (1024,))]


@pytest.fixture(scope="module")
def as_compiled() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"SIZES = {SIZES}\n{AS_COMPILED}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_the_table_has_every_kernel_as_it_is_now(as_compiled):
    assert not as_compiled["missing"], "`make gpu-gates-update` writes the table anew"
    for target in ("sm_90", "gfx942"):
        assert {row["kernel"] for row in as_compiled["rows"] if row["target"] == target} == ALL_KERNELS


@pytest.mark.parametrize("gate", GATES)
def test_the_table_is_within_the_gates(as_compiled, gate):
    beyond = [row for row in as_compiled["rows"] if gate(row)]
    assert not beyond, "\n".join(map(json.dumps, beyond))


def test_compiling_gives_what_the_table_has(as_compiled):
    assert len(as_compiled["compiled"]) == 6
    for place, resources, committed in as_compiled["compiled"]:
        assert resources == committed, place


def test_instructions_are_counted_for_both_types_of_map(as_compiled):
    counts = {
        (row["constants"]["BLOCK_C"], row["per_element"] < 25) for row in as_compiled["rows"] if "per_element" in row
    }
    assert {(64, True), (128, True), (64, False), (128, False)} <= counts


def test_a_new_batch_or_map_size_compiles_nothing(as_compiled):
    assert as_compiled["of_other_sizes"] == dict.fromkeys(as_compiled["of_other_sizes"], [0] * len(SIZES))


def test_whole_variants_of_the_same_widths_share_their_kernels(as_compiled):
    assert set(as_compiled["beside_b2"].values()) == {0}


GOOD = {
    "target": "sm_90",
    "dtype": "bf16",
    "kernel": "dwconv_fc2_kernel",
    "constants": {"BLOCK_C": 64, "BLOCK_H": 32},
    "shared": 8192,
    "registers": 168,
    "spills": 0,
    "matrix": True,
    "matrix_in_loop": True,
    "load": 16,
    "per_element": 18.3,
}


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({}, None),
        ({"shared": 227 * 1024}, None),
        ({"shared": 227 * 1024 + 1}, "over_shared_memory"),
        ({"spills": 8}, "spills"),
        ({"matrix_in_loop": False}, "has_wrong_matrix_instructions"),
        ({"kernel": "linear_kernel", "matrix_in_loop": False}, None),  # a loop of known length, unrolled
        ({"kernel": "pool_kernel"}, "has_wrong_matrix_instructions"),
        ({"dtype": "fp32"}, "has_wrong_matrix_instructions"),
        ({"load": 8}, "has_narrow_loads"),
        ({"load": 4, "constants": {"BLOCK_C": 64, "BLOCK_H": 32, "PER_TAP": False}}, None),
        ({"per_element": 19.4}, "has_many_instructions"),
        ({"per_element": 19.4, "target": "sm_80"}, None),
        ({"per_element": 35.4, "constants": {"BLOCK_C": 64, "BLOCK_H": 16}}, "has_many_instructions"),
    ],
    ids=str,
)
def test_what_is_beyond_a_gate(change, gate):
    assert [found.__name__ for found in GATES if found({**GOOD, **change})] == ([] if gate is None else [gate])


def test_the_files_are_as_they_would_be_written():
    table = parse(TABLE.read_text())
    assert table_text(table) == TABLE.read_text()
    assert summary_text(table) == SUMMARY.read_text()


MODULE = '''
import triton
import triton.language as tl

LIMIT: tl.constexpr = tl.constexpr(4)


@triton.jit
def halved(x):
    """A half."""
    return x * 0.5


@triton.jit(do_not_specialize=["n"])
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    """Halves x."""
    offs = tl.arange(0, BLOCK)  # one block
    x = tl.load(x_ptr + offs, mask=offs < tl.minimum(n, LIMIT))
    tl.store(x_ptr + offs, halved(x))
'''


def digest_of(folder: Path, *changes: tuple[str, str]) -> str:
    text = MODULE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / f"module{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return source_digest(module.kernel)


def test_the_key_knows_the_code_and_all_that_it_calls(tmp_path):
    digest = partial(digest_of, tmp_path)
    assert digest() == digest()
    for same in (("Halves x.", "x / 2."), ("  # one block", ""), ('    """A half."""\n', ""), ("LIMIT:", "\n\nLIMIT:")):
        assert digest(same) == digest(), same
    for other in (("offs <", "offs <="), ("0.5", "0.25"), ("constexpr(4)", "constexpr(5)"), ("BLOCK)", "2 * BLOCK)")):
        assert digest(other) != digest(), other


def test_a_key_that_would_not_know_a_dependency_is_refused(tmp_path):
    with pytest.raises(TypeError, match="halved in a kernel must be a jitted function, a constexpr or triton's"):
        digest_of(tmp_path, ("@triton.jit\ndef halved", "def halved"))


def place(key: str) -> Place:
    return Place("sm_90", "bf16", "pool_kernel", key)


def test_what_is_wrong_with_a_table():
    made = Compilation(CHIPS["sm_90"], None, {}, {"C": 64, "eps": 1e-6}, (), {"num_warps": 4})
    listed = dict.fromkeys(map(place, "abc"), made)
    table = {at: {"shared": 0, "registers": 32} for at in listed}
    assert differences(listed, table, dict(list(table.items())[:2])) == []
    [missing] = differences(listed, {at: table[at] for at in list(listed)[1:]}, {})
    assert missing == "not in the table, `make gpu-gates-update` writes the table anew: sm_90 bf16 pool_kernel a"
    [unused] = differences({at: listed[at] for at in list(listed)[1:]}, table, {})
    assert unused == "of no kernel any more, `make gpu-gates-update` writes the table anew: sm_90 bf16 pool_kernel a"
    [wrong] = differences(listed, table, {place("b"): {"shared": 0, "registers": 33}})
    assert wrong.startswith("compiles to something else: ")
    assert '"constants": {"C": 64}, "num_warps": 4, "shared": 0, "registers": 33}' in wrong


def test_parts_are_all_there_is():
    parts = [part_of(at) for at in parse(TABLE.read_text())]
    assert set(parts) == set(range(PARTS))
    assert max(map(parts.count, range(PARTS))) < 100


def test_changes_since_a_commit_are_those_of_the_table(capsys):
    table = parse(TABLE.read_text())
    assert changed_since("no-such-commit", table) == []
    assert "no-such-commit has no table to compare with" in capsys.readouterr().out
