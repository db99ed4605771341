"""Damaged and forged files: each loads as a model that fits it, or is refused in a sentence and nothing is changed.

Every target takes valid files and damages them as drawn. PVT_FAST_FUZZ_SECONDS=600 looks for as long, in all targets
together; what fails is printed, shrunk, and becomes a test of its own in the file of what it damaged.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import resource
import shutil
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from peers import ours, randomised

from pvt_fast import PVT_V2, LoadReport, load_weights
from pvt_fast.checkpoints.files import load_state
from pvt_fast.images.preprocess import Preprocess
from pvt_fast.model_file import load_model, save_model

SECONDS = float(os.environ.get("PVT_FAST_FUZZ_SECONDS", "8"))
TARGETS = 5
# What the whole run may add to the process's memory: files of some kilobytes ask for no more.
MEMORY_MIB = 600
LONGEST_SENTENCE = 1500

TINY: dict[str, Any] = {"embed_dims": (4,), "num_heads": (1,), "mlp_ratios": (1,), "depths": (1,), "sr_ratios": (2,)}
SOURCE = randomised(ours(num_classes=2, img_size=32, **TINY)).eval()
MODEL = ours(num_classes=2, img_size=32, **TINY)
BEFORE = {name: value.clone() for name, value in MODEL.state_dict().items()}
EPS = {"block": 0.25, "patch_embed": 0.5, "reduction": 0.125}


def repeated(test: Callable[..., None], **drawn: st.SearchStrategy) -> None:
    """Run `test` on what hypothesis draws, with one seed after another, for this target's share of the time."""
    end, number = time.monotonic() + SECONDS / TARGETS, 0
    checks = settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while number == 0 or time.monotonic() < end:

        def once(**values):
            test(**values)

        seed(number)(checks(given(**drawn)(once)))()
        number += 1


def sentence(error: Exception) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < LONGEST_SENTENCE


def valid(model: PVT_V2) -> None:
    assert all(0 < eps < math.inf for eps in model.norm_eps().values())
    with torch.device("meta"):
        clone = PVT_V2(**vars(model.config))
    assert {name: value.shape for name, value in model.state_dict().items() if not name.startswith("head.")} == {
        name: value.shape for name, value in clone.state_dict().items() if not name.startswith("head.")
    }
    assert all(value.is_floating_point() and not value.is_meta for value in model.parameters())


def loads_or_is_refused(source: Path) -> LoadReport | None:
    """`load_weights` of it: the values of the file, or a sentence and nothing changed."""
    MODEL.load_state_dict(BEFORE)
    MODEL.set_norm_eps(**EPS)
    versions = [value._version for value in MODEL.state_dict().values()]
    try:
        report = load_weights(MODEL, source)
    except (ValueError, OSError) as error:
        sentence(error)
        assert [value._version for value in MODEL.state_dict().values()] == versions
        assert MODEL.norm_eps() == EPS
        return None
    valid(MODEL)
    state, _ = load_state(source / "model.safetensors" if source.is_dir() else source)
    for name in report.loaded:
        assert torch.equal(MODEL.state_dict()[name].nan_to_num(7), state[name].to(torch.float32).nan_to_num(7))
    return report


def makes_or_is_refused(load: Callable[[Path], PVT_V2], source: Path) -> None:
    """A model of a file's own description."""
    try:
        model = load(source)
    except (ValueError, OSError) as error:
        sentence(error)
        return
    valid(model)


# -- valid files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("valid")
    SOURCE.save_pretrained(folder)
    save_model(SOURCE, folder / "one.safetensors", Preprocess(size=32))
    torch.save({"model": SOURCE.state_dict(), "args": Namespace(lr=0.1), "epoch": 3}, folder / "new.pth")
    torch.save(SOURCE.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def _little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_MIB * 1024


def test_the_files_are_valid(files, tmp_path):
    for name in ("model.safetensors", "one.safetensors", "new.pth", "old.pth"):
        (tmp_path / name).write_bytes(files[name])
        assert loads_or_is_refused(tmp_path / name).problems() == []
    (tmp_path / "config.json").write_bytes(files["config.json"])
    assert loads_or_is_refused(tmp_path).norm_eps == SOURCE.norm_eps()


# -- damage ------------------------------------------------------------------------------------------------------------

PLACES = st.floats(0, 1, exclude_max=True)  # in a file, of whatever size
EDITS = st.one_of(
    st.tuples(st.just("put"), PLACES, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("end"), PLACES, st.none()),
)
NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([10**9, 2**31, 2**63, 10**30, -(2**63)]),
    st.floats(),
    st.sampled_from([True, False]),
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=4), st.sampled_from(["F32", "I8", "avg", "F16", "BOOL"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
CHANGES = st.lists(st.tuples(PLACES, JSON), min_size=1, max_size=3)


def damaged(content: bytes, edits: list[tuple[str, float, Any]]) -> bytes:
    for kind, place, what in edits:
        at = int(place * len(content))
        if kind == "put":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << what)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + what :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "end":
            content = content[:at]
    return content


def places_of(value: Any, place: tuple = ()) -> list[tuple]:
    """The places of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, nested in inner for found in places_of(nested, (*place, key)))]


def changed(value: Any, changes: list[tuple[float, Any]]) -> Any:
    value = copy.deepcopy(value)
    for where, new in changes:
        places = places_of(value)
        place = places[int(where * len(places))]
        if not place:
            value = new
            continue
        owner = value
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = new
    return value


def header_of(content: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_bytes(files, tmp_path):
    def load(name: str, edits: list) -> None:
        path = tmp_path / f"damaged{Path(name).suffix}"
        path.write_bytes(damaged(files[name], edits))
        loads_or_is_refused(path)

    names = st.sampled_from(["model.safetensors", "one.safetensors", "new.pth", "old.pth"])
    repeated(load, name=names, edits=st.lists(EDITS, min_size=1, max_size=4))


def test_pickles_in_whole_archives(files, tmp_path):
    """Damage that is not found by the archive's checksums."""
    with zipfile.ZipFile(io.BytesIO(files["new.pth"])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}

    def load(entry: str, edits: list) -> None:
        with zipfile.ZipFile(tmp_path / "damaged.pth", "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, damaged(content, edits) if name.endswith(entry) else content)
        loads_or_is_refused(tmp_path / "damaged.pth")

    entries_drawn = st.sampled_from(["data.pkl", "data.pkl", "data.pkl", "data/0", "byteorder", "version"])
    repeated(load, entry=entries_drawn, edits=st.lists(EDITS, min_size=1, max_size=4))


def test_headers(files, tmp_path):
    def load(name: str, changes: list) -> None:
        header, data = header_of(files[name])
        (tmp_path / "damaged.safetensors").write_bytes(with_header(changed(header, changes), data))
        loads_or_is_refused(tmp_path / "damaged.safetensors")

    repeated(load, name=st.sampled_from(["model.safetensors", "one.safetensors"]), changes=CHANGES)


def test_descriptions(files, tmp_path):
    header, data = header_of(files["one.safetensors"])
    described = json.loads(header["__metadata__"]["pvt_fast"])

    def load(changes: list) -> None:
        header["__metadata__"]["pvt_fast"] = json.dumps(changed(described, changes))
        (tmp_path / "damaged.safetensors").write_bytes(with_header(header, data))
        makes_or_is_refused(lambda path: load_model(path)[0], tmp_path / "damaged.safetensors")
        loads_or_is_refused(tmp_path / "damaged.safetensors")

    repeated(load, changes=CHANGES)


def test_configs(files, tmp_path):
    config = json.loads(files["config.json"])
    header, data = header_of(files["model.safetensors"])
    bare = {**header, "__metadata__": {"format": "pt"}}  # of an earlier version, which has the config alone

    def load(changes: list, edits: list, carried: bool) -> None:
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        (tmp_path / "folder").mkdir()
        text = json.dumps(changed(config, changes), indent=2).encode()
        (tmp_path / "folder" / "config.json").write_bytes(damaged(text, edits))
        (tmp_path / "folder" / "model.safetensors").write_bytes(with_header(header if carried else bare, data))
        makes_or_is_refused(PVT_V2.from_pretrained, tmp_path / "folder")
        loads_or_is_refused(tmp_path / "folder")

    repeated(load, changes=CHANGES, edits=st.lists(EDITS, max_size=1), carried=st.booleans())
