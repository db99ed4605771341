"""Checkpoint files: the state dict is found in them, what is damaged or dangerous is refused by name."""

import copy
import json
import os
import pickle
import sys
import threading
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pvt_fast.checkpoints.files import load_state, unnest

STATE = {"norm.weight": torch.arange(3.0), "norm.bias": torch.ones(3)}


def same(loaded: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("nest", [(), ("model",), ("state_dict",), ("module",), ("state_dict", "model")], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_torch_checkpoints(tmp_path, nest, suffix):
    content = STATE
    for name in reversed(nest):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / f"model{suffix}")
    loaded, metadata = load_state(tmp_path / f"model{suffix}")
    assert metadata == {}
    assert same(loaded)


def test_safetensors_bring_their_metadata(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, metadata = load_state(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert same(loaded)


def test_the_official_training_scripts_arguments_are_read(tmp_path):
    """Its checkpoints hold an argparse.Namespace, which runs no code; outside this file torch still refuses it."""
    torch.save({"model": STATE, "args": Namespace(lr=0.1, model="pvt_v2_b0")}, tmp_path / "model.pth")
    assert same(load_state(tmp_path / "model.pth")[0])
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "model.pth", weights_only=True)


class _Payload:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("place", ["beside", "as a tensor", "as an argument"])
def test_pickle_that_runs_code_is_refused(tmp_path, suffix, place):
    trace, path = tmp_path / "trace", tmp_path / f"bad{suffix}"
    payload = _Payload(trace)
    contents = {
        "beside": {"model": STATE, "payload": payload},
        "as a tensor": {"model": {**STATE, "head.weight": payload}},
        "as an argument": {"model": STATE, "args": Namespace(payload=payload)},
    }
    torch.save(contents[place], path)
    with pytest.raises(ValueError, match="checkpoint of tensors only"):
        load_state(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is harmless, so refusing it proves nothing"


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"epoch": 3}, {"model": {"a": 1.0}}, [torch.ones(1)], torch.ones(1)], ids=repr
)
def test_checkpoint_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="path must hold a state dict, bare or under one of state_dict, model, module"):
        load_state(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"two\nlines\n", bytes(4096)], ids=["empty", "text", "lines", "zeros"]
)
def test_damaged_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="load_state: path must be"):
        load_state(tmp_path / name)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=r"must end in \.pth, \.pt, \.bin or \.safetensors, got '.*weights\.npz'"):
        load_state(tmp_path / "weights.npz")
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ValueError, match="must be an existing file"):
            load_state(path)


# -- files that were made to do harm -----------------------------------------------------------------------------------


def holds_itself() -> dict:
    content: dict = {"model": STATE}
    content["model"] = content
    return content


def nested(depth: int) -> dict:
    content: dict = STATE
    for _ in range(depth):
        content = {"model": content}
    return content


def test_nesting_has_a_limit(tmp_path):
    assert unnest(nested(8)) == STATE
    torch.save(holds_itself(), tmp_path / "itself.pth")
    torch.save(nested(100), tmp_path / "deep.pth")
    for content in (holds_itself(), nested(10_000)):
        with pytest.raises(ValueError, match="source must nest its state dict at most 8 deep"):
            unnest(content)
    for name in ("itself.pth", "deep.pth"):
        with pytest.raises(ValueError, match=r"path must hold a state dict.*at most 8 deep"):
            load_state(tmp_path / name)


def pickled(path: Path, content: bytes, *others: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for entry in (*others, ("archive/data.pkl", content)):
            archive.writestr(*entry)
        archive.writestr("archive/version", "3\n")


def test_absurdly_nested_pickles(tmp_path):
    dicts = b"}X\x05\x00\x00\x00model" * 50_000 + b"}" + b"s" * 50_000
    for name, body in (("dicts", dicts), ("tuples", b"K\x01" + b"\x85" * 50_000)):
        pickled(tmp_path / f"{name}.pth", b"\x80\x02" + body + b".")
        with pytest.raises(ValueError, match="its pickle nests or repeats its values too often"):
            load_state(tmp_path / f"{name}.pth")


def test_names_from_files_are_short_in_messages():
    key: tuple = ()
    for _ in range(500):
        key = (key,)
    for name in (key, "x" * 10**6, "two\nlines"):
        with pytest.raises(ValueError, match="names to tensors, got") as info:
            unnest({name: 3})
        assert len(str(info.value)) < 200
        assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "pvt_fast.testing.run"]
)
def test_calls_that_a_pickle_names_are_refused_without_advice(name, tmp_path):
    module, _, function = name.rpartition(".")
    pickled(tmp_path / "bad.pth", f"\x80\x02c{module}\n{function}\nX\x01\x00\x00\x00x\x85R.".encode("latin1"))
    with pytest.raises(ValueError, match=rf"checkpoint of tensors only, got .*[ .]{function}\b") as info:
        load_state(tmp_path / "bad.pth")
    assert "weights_only" not in str(info.value)
    assert "safe_globals" not in str(info.value)


def test_archives_that_unpack_to_more_than_they_have_are_refused(tmp_path):
    torch.save({"norm.weight": torch.zeros(10**6)}, tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in good.infolist():
            bomb.writestr(entry.filename, good.read(entry))
    assert torch.load(tmp_path / "bomb.pth", weights_only=True), "torch itself unpacks it"
    with pytest.raises(ValueError, match=r"its entry \S* is not stored as torch stores it"):
        load_state(tmp_path / "bomb.pth")


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    """Each of a hundred names in the directory leads to the same megabyte."""
    with zipfile.ZipFile(tmp_path / "shared.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(2**20))
        first = archive.infolist()[-1]
        for number in range(1, 100):
            again = copy.copy(first)
            again.filename = f"archive/data/{number}"
            archive.filelist.append(again)
    with pytest.raises(ValueError, match=r"its entries have 1048\d+ bytes, more than the file"):
        load_state(tmp_path / "shared.pth")


def at(path: Path, place: int, change: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= change
    path.write_bytes(content)


def test_one_changed_bit_of_an_archive_is_seen(tmp_path):
    """torch checks no sums, and for an entry marked as a folder it takes whatever lies in memory."""
    path = tmp_path / "model.pth"
    torch.save(STATE, path)
    content = path.read_bytes()
    at(path, content.index(STATE["norm.weight"].numpy().tobytes()) + 4, 1)
    assert not same(torch.load(path, weights_only=True)), "torch itself sees it"
    with pytest.raises(ValueError, match=r"checkpoint of tensors only, got .*Bad CRC-32"):
        load_state(path)
    path.write_bytes(content)
    last = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/1"))  # the directory's header of that entry
    at(path, last + 38, 0x10)
    with pytest.raises(ValueError, match=r"its entry model/data/1 is not stored as torch stores it"):
        load_state(path)


def test_archives_without_sums_are_read(tmp_path):
    with torch.utils.serialization.config.patch({"save.compute_crc32": False}):
        torch.save(STATE, tmp_path / "model.pth")
    assert same(load_state(tmp_path / "model.pth")[0])


def test_tensors_as_large_as_anybody_says_are_refused(tmp_path):
    torch.save({**STATE, "head.weight": torch.ones(1).expand(10**12, 32)}, tmp_path / "huge.pth")
    with pytest.raises(ValueError, match=r"its tensors have 128000000\d+ bytes, more than the file"):
        load_state(tmp_path / "huge.pth")


def test_the_list_of_what_pickles_may_name_is_as_it_was(tmp_path):
    torch.save({"model": STATE, "args": Namespace(lr=0.1)}, tmp_path / "model.pth")
    errors = []

    def load() -> None:
        try:
            for _ in range(10):
                assert same(load_state(tmp_path / "model.pth")[0])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert Namespace not in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([Namespace]):
        load_state(tmp_path / "model.pth")
        assert Namespace in torch.serialization.get_safe_globals(), "the user's own entry was taken away"


HEADERS = {
    "a larger shape": {"shape": [10**12, 3]},
    "a negative shape": {"shape": [-1]},
    "another dtype": {"dtype": "I64"},
    "an unknown dtype": {"dtype": "X9"},
    "bytes past the end": {"data_offsets": [0, 10**12]},
    "bytes before the beginning": {"data_offsets": [-12, 12]},
}


@pytest.mark.parametrize("lie", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie_are_refused(lie, tmp_path):
    save_file(STATE, path := tmp_path / "model.safetensors")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["norm.weight"] |= lie
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ValueError, match="path must be a safetensors file"):
        load_state(path)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pth")
    with pytest.raises(ValueError, match="path must be an existing file"):
        load_state(tmp_path / "model.pth")


INT = b"\x8a\x05\x00\x00\x00\x00\x01"  # 2^32
PAIRS = b")" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(60))  # ((x, x), (x, x)), 60 deep


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def storage(kind: str = "FloatStorage", key: bytes = text("0"), elements: bytes = b"K\x04", more: bytes = b"") -> bytes:
    names = text("storage") + b"ctorch\n" + kind.encode() + b"\n" + key + text("cpu")
    return b"(" + names + elements + more + b"tQ"


def tensor(where: bytes, size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", offset: bytes = b"K\x00") -> bytes:
    arguments = where + offset + size + stride + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


HOSTILE = {
    **{
        f"names {name}": (f"c{module}\n{name}\n".encode() + INT + b"\x85R", f"must name .* got {module}.{name}")
        for module, name in (
            ("builtins", "bytearray"),
            ("__builtin__", "bytearray"),
            ("torch", "FloatTensor"),
            ("torch", "sparse.HalfTensor"),
            ("torch.sparse", "HalfTensor"),
            ("torch._utils", "_rebuild_qtensor"),
            ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
            ("torch._tensor", "_rebuild_from_type_v2"),
        )
    },
    "a storage called": (
        b"ctorch.storage\nTypedStorage\n" + INT + b"\x85R",
        "must call .* got torch.storage.TypedStorage",
    ),
    "a storage made": (
        b"ctorch.storage\nUntypedStorage\n" + INT + b"\x85\x81",
        "must call what weights are saved with",
    ),
    "a dict made": (b"ccollections\nOrderedDict\n)\x81", "must make no collections.OrderedDict in this way"),
    "hex": (b"c_codecs\nencode\nU\x01aU\x03hex\x86R", "_codecs.encode in a pickle must be called with 'latin1'"),
    "set of a tensor": (
        b"cbuiltins\nset\n" + tensor(storage(), INT + b"\x85", b"K\x00\x85") + b"\x85R",
        "builtins.set in a pickle must be called with values that are written out",
    ),
    "attributes of a tensor": (tensor(storage()) + b")b", "must give attributes to dicts and namespaces"),
    "attributes of a dict": (
        b"ccollections\nOrderedDict\n)R}" + text("items") + b"K\x01sb",
        "must give dicts no attributes but _metadata",
    ),
    "a tensor beyond its storage": (
        tensor(storage(), b"K\x05\x85"),
        r"must lie in their storages, got one of shape \(5,\)",
    ),
    "an offset beyond": (tensor(storage(), offset=b"K\x01"), "must lie in their storages"),
    "strides beyond": (tensor(storage(), stride=b"K\x02\x85"), "must lie in their storages"),
    "sizes of no int": (tensor(storage(), b"G\x40\x00\x00\x00\x00\x00\x00\x00\x85"), "sizes and strides of integers"),
    "no storage": (tensor(b"K\x01"), "must have a storage each"),
    "a view of a storage": (
        tensor(storage(more=text("view") + b"K\x00K\x04\x87")),
        "must have a number of elements, and no",
    ),
    "a storage of two sizes": (
        storage() + b"0" + storage(elements=b"K\x05"),
        "must be the same wherever they are named",
    ),
    "a storage of two types": (storage() + b"0" + storage("HalfStorage"), "must be the same wherever they are named"),
    "a storage with another key": (storage(key=b"K\x01"), "must be named by text"),
    "keys of one hash": (b"}\x8a\x09" + b"\x00" * 8 + b"\x01Ns", "must have keys of at most 64 bits"),
    "pairs as a key": (b"}" + PAIRS + b"Ns", "nests or repeats its values too often"),
    "no value": (b"h\x05", "takes value 5, which it has not kept"),
    "too few values": (b"\x86", "takes more values than it has"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_that_no_save_writes_are_refused(name, tmp_path):
    body, got = HOSTILE[name]
    pickled(tmp_path / "lower.pth", b"\x80\x02" + body + b".")
    pickled(tmp_path / "upper.pth", b"\x80\x02}.", ("archive/DATA.PKL", b"\x80\x02" + body + b"."))
    for path in (tmp_path / "lower.pth", tmp_path / "upper.pth"):
        with pytest.raises(ValueError, match=rf"path must be a checkpoint of tensors only, .* \(.*{got}"):
            load_state(path)


def test_tensors_that_share_a_storage_are_counted_each(tmp_path):
    pool = torch.randn(100_000)
    torch.save({f"{i}": pool[: 90_000 + i] for i in range(50)}, tmp_path / "shared.pth")
    with pytest.raises(ValueError, match=r"its tensors have 18004900 bytes, more than the file"):
        load_state(tmp_path / "shared.pth")


def test_files_of_old_torch(tmp_path):
    torch.save({"state_dict": STATE, "epoch": 3}, path := tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_state(path)[0])
    content = path.read_bytes()
    keys = content.index(b"\x80\x02]", content.index(b"epoch"))
    for list_of_keys in (b"\x80\x02].", b"\x80\x02}.", b"\x80\x02]X\x01\x00\x00\x000a."):
        path.write_bytes(content[:keys] + list_of_keys + content[keys:])
        with pytest.raises(ValueError, match=r"\d+ of its \d+ storages are not in the file"):
            load_state(path)
    path.write_bytes(content[:keys] + b"\x80\x02]U\x010a." + content[keys:])
    with pytest.raises(ValueError, match="its storages must be named by text"):
        load_state(path)
    for there in (b"", b"hello", b"<!DOCTYPE html>", content[:100], content[: keys + 40]):
        path.write_bytes(there)
        with pytest.raises(ValueError, match="load_state: path must be a checkpoint of tensors only"):
            load_state(path)


def test_what_looks_like_an_archive_at_its_end_only(tmp_path):
    """torch decides by the first bytes, Python's zipfile by the last."""
    pickled(tmp_path / "end.pth", b"\x80\x02}.")
    old = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    old += b"\x80\x02cbuiltins\nbytearray\n" + INT + b"\x85R." + b"\x80\x02]."
    (tmp_path / "both.pth").write_bytes(old + (tmp_path / "end.pth").read_bytes())
    with pytest.raises(ValueError, match=r"must name what weights are saved with, got builtins\.bytearray"):
        load_state(tmp_path / "both.pth")


def test_what_people_save_beside_weights_is_read(tmp_path):
    tied = torch.randn(4, 4)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    beside = {
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "args": Namespace(lr=0.1, layers=[1, 2], nested={"a": (1, None)}),
        "rng": torch.get_rng_state(),
        "bytes": b"\x00\xff" * 100,
        "set": {1, 2},
        "sizes": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), 3 + 4j],
        "meta": torch.empty(3, device="meta"),
        "tied": [tied, tied.t(), tied[1:]],
        "names": ["class"] * 300_000,
        "losses": [0.5] * 300_000,
        "table": {f"{index}": index for index in range(200_000)},
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    for new in (True, False):
        path = tmp_path / f"{new}.pth"
        torch.save({"state_dict": STATE, **beside}, path, _use_new_zipfile_serialization=new)
        assert same(load_state(path)[0])


def test_classes_that_a_user_allows_are_read(tmp_path):
    class Average:
        def __init__(self):
            self.mean = 0.5

    Average.__qualname__ = Average.__name__ = "Average"
    sys.modules[__name__].Average = Average
    torch.save({"state_dict": STATE, "loss": Average()}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"must name what weights are saved with, got .*Average"):
        load_state(tmp_path / "model.pth")
    with torch.serialization.safe_globals([Average]):
        assert same(load_state(tmp_path / "model.pth")[0])


@pytest.mark.parametrize("which", ["before", "after", "elsewhere"])
def test_archives_with_two_lists_of_entries_are_refused(which, tmp_path):
    torch.save(STATE, path := tmp_path / "model.pth")
    content = path.read_bytes()
    if which == "elsewhere":  # the record of the list's place names another
        at = content.index(b"PK\6\7") + 8
        changed = content[:at] + (7).to_bytes(8, "little") + content[at + 8 :]
    else:
        changed = content + content if which == "before" else content + b"\0"
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="it must end with one list of its entries"):
        load_state(path)
