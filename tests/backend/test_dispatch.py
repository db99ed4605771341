"""Which backend runs: `select` as a table of facts, and the ways to ask for one."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import pvt_fast
from pvt_fast import PVT_V2, BackendUnavailable
from pvt_fast.backend import dispatch
from pvt_fast.backend.dispatch import Facts, select

F32 = Facts("cpu", torch.float32)


class StandIn(NamedTuple):
    """Of a backend what the choice asks."""

    unsupported: Callable[[Facts], str | None]


@pytest.fixture
def machine(monkeypatch):
    """A machine with three backends of known abilities, "broken" being one that cannot be loaded."""
    modules = {
        "gpu": StandIn(lambda facts: None if facts.device == "cuda" else f"no kernels for {facts.device}"),
        "broken": BackendUnavailable("the extension is missing"),
        "simd": StandIn(
            lambda facts: (
                "needs a CPU tensor"
                if facts.device != "cpu"
                else f"no kernels for {facts.dtype}"
                if facts.dtype not in (torch.float32, torch.bfloat16)
                else "dropout is in force"
                if facts.dropout
                else None
            ),
        ),
        "plain": StandIn(lambda facts: None),
    }
    monkeypatch.setattr(dispatch, "ORDER", {name: f"tests_{name}" for name in modules})
    monkeypatch.setattr(dispatch, "loaded", modules.__getitem__)
    dispatch.log_refusal.cache_clear()
    with dispatch.use_backend("auto"):
        yield modules
    dispatch.log_refusal.cache_clear()


AUTO = [
    (Facts("cuda", torch.float32), "gpu"),
    (Facts("cuda", torch.float64, dropout=True), "gpu"),
    (Facts("cpu", torch.float32), "simd"),
    (Facts("cpu", torch.bfloat16), "simd"),
    (Facts("cpu", torch.float64), "plain"),
    (Facts("cpu", torch.float16), "plain"),
    (Facts("cpu", torch.float32, dropout=True), "plain"),
    (Facts("cpu", torch.float32, products=torch.bfloat16), "simd"),
    (Facts("mps", torch.float32), "plain"),
]


@pytest.mark.parametrize(("facts", "chosen"), AUTO, ids=lambda value: str(value))
def test_auto_takes_the_first_that_supports_the_facts(machine, facts, chosen):
    assert select(facts) is machine[chosen]


REFUSED = [
    ("gpu", F32, "backend 'gpu' cannot run: no kernels for cpu"),
    ("broken", F32, "backend 'broken' cannot run: the extension is missing"),
    ("simd", Facts("cpu", torch.float64), "backend 'simd' cannot run: no kernels for torch.float64"),
    ("simd", Facts("cpu", torch.float32, dropout=True), "backend 'simd' cannot run: dropout is in force"),
]


@pytest.mark.parametrize(("name", "facts", "message"), REFUSED, ids=lambda value: str(value))
@pytest.mark.parametrize("how", ["argument", "use_backend"])
def test_explicit_never_falls_back(machine, name, facts, message, how):
    default, argument = ("auto", name) if how == "argument" else (name, "auto")
    with dispatch.use_backend(default), pytest.raises(BackendUnavailable) as caught:
        select(facts, argument)
    assert str(caught.value) == message


def test_no_backend_at_all(machine):
    machine["plain"] = StandIn(lambda facts: "on strike")
    with pytest.raises(BackendUnavailable, match="no backend supports Facts"):
        select(Facts("mps", torch.float32))


def test_a_models_own_choice_wins_over_use_backend(machine):
    with dispatch.use_backend("simd"):
        assert select(F32) is machine["simd"]
        assert select(F32, "plain") is machine["plain"]
        assert select(F32, "auto") is machine["simd"]


def test_use_backend_nests_and_restores(machine):
    with dispatch.use_backend("plain"):
        with dispatch.use_backend("simd"):
            assert select(F32) is machine["simd"]
            with dispatch.use_backend("auto"):
                assert select(Facts("cuda", torch.float32)) is machine["gpu"]
        assert select(F32) is machine["plain"]
        with pytest.raises(KeyError), dispatch.use_backend("simd"):
            raise KeyError
        assert select(F32) is machine["plain"]
    assert select(F32) is machine["simd"]


def test_auto_logs_each_refusal_once(machine, caplog):
    with caplog.at_level(logging.INFO, logger="pvt_fast"):
        for _ in range(3):
            select(Facts("mps", torch.float32))
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'gpu' is not used: no kernels for mps",
        "backend 'broken' is not used: the extension is missing",
        "backend 'simd' is not used: needs a CPU tensor",
    ]


def test_an_error_that_is_kept_does_not_grow(machine):
    """Each time that one is raised its traceback takes up the frames, and all that they hold."""
    for _ in range(3):
        select(F32)
        dispatch.backends()
        with pytest.raises(BackendUnavailable):
            select(F32, "broken")
    assert machine["broken"].__traceback__ is None


def test_backends_gives_reasons(machine):
    statuses = {status.name: status for status in dispatch.backends()}
    assert list(statuses) == ["gpu", "broken", "simd", "plain"]
    assert statuses["broken"] == ("broken", False, "the extension is missing")
    assert statuses["plain"] == ("plain", True, None)
    assert statuses["simd"].available
    assert statuses["gpu"].available == torch.cuda.is_available()


# -- the real backends -----------------------------------------------------------------------------------------------


def test_every_backend_here_has_a_verdict():
    statuses = pvt_fast.backends()
    assert [status.name for status in statuses] == ["triton", "cpp", "reference"]
    assert statuses[-1].available
    for status in statuses:
        assert status.available == (status.reason is None)
        assert status.available or len(status.reason) > 10


def test_the_backend_under_test_is_selected(target, dtype):
    facts = Facts(target.device, dtype)
    assert select(facts, target.backend) is target.ops


BAD_NAME = "must be one of auto, triton, cpp, reference; got 'cuda'"


def test_bad_names_list_the_good_ones():
    with pytest.raises(ValueError, match="use_backend: name " + BAD_NAME), pvt_fast.use_backend("cuda"):
        pass
    model = PVT_V2(embed_dims=(8,), num_heads=(1,), mlp_ratios=(1,), depths=(1,), sr_ratios=(1,), num_stages=1)
    with pytest.raises(ValueError, match="PVT_V2: backend " + BAD_NAME):
        model.backend = "cuda"
    assert model.backend == "auto"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process that has none of this one's backend settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PVT_FAST_")}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)


SELECTED = """
import torch
from pvt_fast.backend import dispatch
print(dispatch.select(dispatch.Facts("cpu", torch.float64)).name)
with dispatch.use_backend("auto"):
    print(dispatch._default.get())
"""


def test_the_environment_sets_the_default():
    result = run_python(SELECTED, PVT_FAST_BACKEND="reference")
    assert result.stdout.split() == ["reference", "auto"], result.stderr


def test_an_explicit_environment_does_not_fall_back():
    """float64 is the reference's alone: asked for by environment, another backend refuses it."""
    result = run_python(SELECTED, PVT_FAST_BACKEND="cpp")
    assert result.returncode == 1
    assert "BackendUnavailable: backend 'cpp' cannot run: " in result.stderr


def test_a_bad_environment_is_refused_where_it_is_followed():
    """Not at import, as the command's own error could not be a line then; and not where another choice is made."""
    result = run_python(SELECTED, PVT_FAST_BACKEND="cuda")
    assert result.returncode == 1
    assert f"BackendMisconfigured: PVT_FAST_BACKEND {BAD_NAME}" in result.stderr
    chosen = SELECTED.replace("torch.float64)", 'torch.float64), "reference"')
    assert run_python(chosen, PVT_FAST_BACKEND="cuda").stdout.split() == ["reference", "auto"]
