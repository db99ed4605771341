"""Saving: at every moment the old model or the new one is there, whole; what is no plain file is not replaced."""

import copy
import errno
import io
import json
import os
import resource
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peers import TWO_STAGES, ours, peer, randomised
from safetensors.torch import save_file

from pvt_fast import PVT_V2, load_weights
from pvt_fast.checkpoints import description
from pvt_fast.checkpoints.replacing import replacing
from pvt_fast.images.preprocess import Preprocess
from pvt_fast.model_file import load_model, save_model

PREPROCESS = Preprocess(size=64)


def made(seed: float, eps: float, **overrides) -> PVT_V2:
    model = randomised(ours(**{**TWO_STAGES, "depths": (1, 1), **overrides}))
    with torch.no_grad():
        model.norm1.weight += seed
    model.set_norm_eps(block=eps, patch_embed=2 * eps, reduction=3 * eps)
    return model.eval()


def equal(model: PVT_V2, other: PVT_V2) -> bool:
    state, theirs = model.state_dict(), other.state_dict()
    return (
        (model.config, model.norm_eps()) == (other.config, other.norm_eps())
        and state.keys() == theirs.keys()
        and all(torch.equal(value, theirs[name]) for name, value in state.items())
    )


NEW = made(1.0, 1e-3)
# Of the same architecture, so that its description fits the other's weights, and of another one.
OLD = {"alike": made(2.0, 1e-4), "another": made(2.0, 1e-4, embed_dims=(16, 32), num_classes=3)}


def save_as_before(model: PVT_V2, folder: Path) -> None:
    """A folder of an earlier version: the weights do not carry their description."""
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    described = description.describe("test", model, PVT_V2)
    (folder / "config.json").write_text(json.dumps({**described["config"], "norm_eps": described["norm_eps"]}))


STARTS: dict[str, tuple[PVT_V2 | None, Callable[[Path], object]]] = {
    "alike": (OLD["alike"], OLD["alike"].save_pretrained),
    "another": (OLD["another"], OLD["another"].save_pretrained),
    "of an earlier version": (OLD["alike"], lambda folder: save_as_before(OLD["alike"], folder)),
    "empty": (None, lambda folder: None),
}


class Killed(BaseException):
    """No handler of errors, and nothing that cleans up, may get in the way of it."""


class System:
    """The calls that change files: the `last` raises `error`; where it is `Killed`, so do all after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int, error: BaseException) -> None:
        self.left, self.error, self.dead = last, error, isinstance(error, Killed)
        removals = ("unlink", "rmdir") if self.dead else ()  # which no full disk stops
        for owner, name in (
            *((os, name) for name in ("open", "fsync", "chmod", "replace", "mkdir", *removals)),
            (io, "open"),
        ):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))
        monkeypatch.setattr(description, "save_file", self.write)

    def step(self) -> None:
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.dead):
            raise self.error

    def counted(self, call: Callable) -> Callable:
        def counted(*args, **kwargs):
            only_reads = call is os_open and not args[1] & os.O_CREAT
            if self.dead or not only_reads:
                self.step()
            return call(*args, **kwargs)

        os_open = os.open
        return counted

    def write(self, state, path, metadata) -> None:
        """Weights, with moments at which a part of them is written."""
        self.step()
        save_file(state, path, metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        self.step()
        path.write_bytes(content)


def steps(save: Callable[[], object], error: BaseException):
    """After each way in which `save` can be stopped; at last after it came to its end."""
    for last in range(1, 100):
        with pytest.MonkeyPatch.context() as monkeypatch:
            system = System(monkeypatch, last, error)
            with suppress(type(error)):
                save()
        yield
        if system.left > 0:
            assert last > 10, "nothing was stopped"
            return
    raise AssertionError("no end")


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("start", "error"),
    [*((start, Killed()) for start in STARTS), ("alike", FULL)],
    ids=[*(f"{start}, killed" for start in STARTS), "alike, disk full"],
)
def test_a_stopped_save_leaves_the_old_model_or_the_new(start, error, tmp_path):
    old, save_old = STARTS[start]
    (tmp_path / "old").mkdir()
    save_old(tmp_path / "old")
    fitting = {model: copy.deepcopy(model) for model in (old, NEW) if model is not None}
    folder, found = tmp_path / "0", []

    def save() -> None:
        nonlocal folder
        folder = tmp_path / str(len(found))
        NEW.save_pretrained(folder)

    for number in range(100):
        shutil.copytree(tmp_path / "old", tmp_path / str(number))
    for _ in steps(save, error):
        if old is None and not (folder / "model.safetensors").exists():
            found.append(None)
        else:
            again = PVT_V2.from_pretrained(folder)
            (match,) = (model for model in fitting if equal(model, again))
            found.append(match)
            fitting[match].set_norm_eps(block=0.5, patch_embed=0.5, reduction=0.5)
            load_weights(fitting[match], folder)
            assert equal(fitting[match], match)
        if error is FULL:
            assert not [path for path in folder.iterdir() if path.name.startswith(".")], "unfinished files"
    first = found.index(NEW)
    assert first > 0 or error is FULL  # a folder that cannot be made, but is there, is no error
    assert error is FULL or found == [old] * first + [NEW] * (len(found) - first)


@pytest.mark.parametrize("error", [Killed(), FULL], ids=["killed", "disk full"])
def test_a_stopped_save_to_one_file_leaves_the_old_model_or_the_new(error, tmp_path):
    path, old, changed = tmp_path / "model.safetensors", OLD["alike"], 0
    save_model(old, path, PREPROCESS)
    content = path.read_bytes()
    for _ in steps(lambda: save_model(NEW, path, PREPROCESS), error):
        again, _ = load_model(path)
        assert equal(again, old) or equal(again, NEW)
        changed += equal(again, NEW)
        path.write_bytes(content)
    assert changed


def test_a_config_of_other_weights_is_seen_and_an_edited_one_holds(tmp_path, caplog):
    for model, folder in ((NEW, "new"), (OLD["alike"], "old")):
        model.save_pretrained(tmp_path / folder)
    config = tmp_path / "new" / "config.json"
    edited = {**json.loads(config.read_text()), "drop_path_rate": 0.25}
    config.write_text(json.dumps(edited))
    assert PVT_V2.from_pretrained(tmp_path / "new").config.drop_path_rate == 0.25
    assert not caplog.messages
    config.write_text((tmp_path / "old" / "config.json").read_text())
    assert equal(PVT_V2.from_pretrained(tmp_path / "new"), NEW)
    assert caplog.messages == [
        f"from_pretrained: {config} belongs to other weights; those beside it carry their own, which holds"
    ]


def test_equal_models_give_equal_folders(tmp_path):
    for name in "ab":
        NEW.save_pretrained(tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_reader_beside_writers_sees_one_model(tmp_path):
    models = [NEW, *OLD.values()]
    NEW.save_pretrained(tmp_path)
    done, seen = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            again = PVT_V2.from_pretrained(tmp_path)
            seen.append(next((model for model in models if equal(again, model)), None))

    def write(model: PVT_V2) -> None:
        for _ in range(8):
            model.save_pretrained(tmp_path)

    writers = [threading.Thread(target=write, args=(model,)) for model in models]
    reader = threading.Thread(target=read)
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert len(seen) >= 3
    assert None not in seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


# -- what a file is put in place of ----------------------------------------------------------------------------------


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_modes_are_the_umasks_or_the_old_files(tmp_path):
    def modes() -> set[int]:
        return {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}

    NEW.save_pretrained(tmp_path)
    save_model(NEW, tmp_path / "one.safetensors", PREPROCESS)
    assert modes() == {0o640}
    for path in tmp_path.iterdir():
        path.chmod(0o604)
    NEW.save_pretrained(tmp_path)
    save_model(NEW, tmp_path / "one.safetensors", PREPROCESS)
    assert modes() == {0o604}


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    elsewhere.mkdir()
    OLD["alike"].save_pretrained(elsewhere)
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).symlink_to(os.path.relpath(elsewhere / name, folder))
    NEW.save_pretrained(folder)
    assert all((folder / name).is_symlink() for name in ("model.safetensors", "config.json"))
    assert equal(PVT_V2.from_pretrained(elsewhere), NEW)
    (tmp_path / "dangling.safetensors").symlink_to("there.safetensors")
    save_model(NEW, tmp_path / "dangling.safetensors", PREPROCESS)
    assert equal(load_model(tmp_path / "there.safetensors")[0], NEW)


def test_links_in_a_loop_stay(tmp_path):
    (tmp_path / "config.json").symlink_to("other")
    (tmp_path / "other").symlink_to("config.json")
    with pytest.raises(OSError, match="save_pretrained: path must lead to a file, got a link that is part of a loop"):
        NEW.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "other"]


def test_a_name_that_could_not_be_read_again_is_not_written(tmp_path):
    for path in (tmp_path / "\udcff.safetensors", tmp_path / "\udc80" / "one.safetensors"):
        path.parent.mkdir(exist_ok=True)
        with pytest.raises(OSError, match="save_model: path must be UTF-8 to be read again"):
            save_model(NEW, path, PREPROCESS)
        assert not path.exists()


def test_a_pipe_stays_and_is_written_into(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    save_model(NEW, pipe, PREPROCESS)
    reader.join()
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    (tmp_path / "copy.safetensors").write_bytes(*got)
    assert equal(load_model(tmp_path / "copy.safetensors")[0], NEW)


def test_what_cannot_be_written_is_refused_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match=r"^save_model: path must be a file or a new name, got the folder '"):
        save_model(NEW, tmp_path, PREPROCESS)
    with pytest.raises(FileNotFoundError, match=r"^save_model: path must lie in an existing folder, got '"):
        save_model(NEW, tmp_path / "absent" / "one.safetensors", PREPROCESS)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError, match="save_pretrained: path must be a file or a new name"):
        NEW.save_pretrained(tmp_path)
    (tmp_path / "one.safetensors").write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write what nobody else may
    with pytest.raises(PermissionError, match="save_model: path must be writable, got"):
        save_model(NEW, tmp_path / "one.safetensors", PREPROCESS)
    assert (tmp_path / "one.safetensors").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "one.safetensors"]


def test_a_limit_on_the_size_of_files(tmp_path):
    OLD["alike"].save_pretrained(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"weights must be written to their end, got .*File too large"):
            NEW.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert equal(PVT_V2.from_pretrained(tmp_path), OLD["alike"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_an_interrupt_removes_what_is_unfinished(tmp_path):
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with replacing("test", tmp_path / "a", tmp_path / "b") as (first, _):
            first.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_of_another_library_is_replaced(tmp_path):
    peer("transformers").save_pretrained(tmp_path)
    stale = (tmp_path / "config.json").read_text()
    NEW.save_pretrained(tmp_path)
    assert equal(PVT_V2.from_pretrained(tmp_path), NEW)
    (tmp_path / "config.json").write_text(stale)  # as between the two renamings
    assert equal(PVT_V2.from_pretrained(tmp_path), NEW)
