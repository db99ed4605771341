"""What scripts and pickles of earlier versions import and name."""

import importlib
import pickle
import subprocess
import sys

import pytest
import torch

import pvt_fast
from pvt_fast import _earlier
from pvt_fast.ops import reference
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase


@pytest.mark.parametrize("name", _earlier.MODULES)
def test_modules_are_to_be_had_by_their_earlier_names(name):
    earlier = importlib.import_module(f"pvt_fast.{name}")
    now = importlib.import_module(f"pvt_fast.{_earlier.MODULES[name]}")
    public = [attribute for attribute in vars(now) if not attribute.startswith("_")]
    assert public
    for attribute in public:
        assert getattr(earlier, attribute) is getattr(now, attribute)
    assert getattr(pvt_fast, name) is earlier
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        earlier.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_ops_are_to_be_had_by_their_earlier_names(name):
    backend = importlib.import_module(f"pvt_fast.{name}")
    cases = {
        "overlap_patch_embed": PatchEmbedCase(1, (8, 8), 3, 8),
        "sr_attention": AttentionCase(1, (4, 4), 8, 1),
        "dwconv_mlp": MlpCase(1, (4, 4), 8, 16),
    }
    assert cases.keys() == _earlier.OPS.keys()
    for op, case in cases.items():
        arguments = case.make(torch.float32)
        ours, earlier = (getattr(backend, each)(*arguments) for each in (case.op, op))
        torch.testing.assert_close(ours, earlier, rtol=0, atol=0)


def test_a_script_of_before_runs():
    script = """
import sys
import pvt_fast
assert not {"pvt_fast.cpp", "pvt_fast.backend.cpp"} & set(sys.modules)
from pvt_fast import cpp, reference
from pvt_fast.preprocess import Preprocess
from pvt_fast.cli import main
import pvt_fast.dispatch
pvt_fast.dispatch.select
print(cpp.isa() in cpp.ISAS, callable(main), Preprocess().crop > 0, reference.dwconv_mlp.__name__)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True True True mlp\n", "")


def test_models_that_were_pickled_whole_name_what_was_in_program():
    assert pickle.loads(b"cpvt_fast.program\nWhole\n.") is importlib.import_module("pvt_fast.graphs.program").Whole


@pytest.mark.parametrize(
    "statement", ["import pvt_fast.digits", "from pvt_fast import digits", "from pvt_fast.digits import x"]
)
def test_a_module_that_went_says_where_it_is(statement):
    with pytest.raises(
        ModuleNotFoundError, match=r"^pvt_fast.digits is no part of the package any more: see examples/"
    ):
        exec(statement)


def test_other_names_are_none():
    with pytest.raises(AttributeError, match="module 'pvt_fast' has no attribute 'banana'"):
        pvt_fast.banana  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pvt_fast.banana")


def test_all_of_an_earlier_module_can_be_imported_and_listed():
    names: dict = {}
    exec("from pvt_fast.reference import *", names)
    assert names["sr_attention"] is names["attention"] is reference.attention
    assert {"attention", "sr_attention", "mlp"} <= set(dir(importlib.import_module("pvt_fast.reference")))
