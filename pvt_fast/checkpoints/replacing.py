"""Files replaced whole: what was there stays readable until what takes its place is on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

_PREFIX = ".pvt_fast-"  # of folders with unfinished files, which only a killed process leaves behind


@contextmanager
def replacing(op: str, *paths: str | os.PathLike) -> Iterator[tuple[Path, ...]]:
    """Names to write files under, which take the places of `paths`, in this order, when the block ends.

    Each is renamed into place, after its bytes are on the disk, and is on the disk there before the next. Where the
    block, or one of these steps, raises, what was not yet put into place is removed and the old files stay. A new file
    has the mode that the umask gives, another that of the file it replaces. What a symbolic link leads to is replaced,
    not the link; devices and pipes are written into. Raises OSError, before anything is written, for folders and for
    what may not be written.
    """
    targets = [_target(op, path) for path in paths]
    with ExitStack() as stack:
        names = [_unfinished(stack, target) for target in targets]
        yield tuple(names)
        pairs = [*zip(names, targets, strict=True)]
        for name, target in pairs:
            _finish(name, target)
        for name, target in pairs:
            _put(name, target)


def _target(op: str, path: str | os.PathLike) -> Path:
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, f"{op}: path must lead to a file, got a link that is part of a loop", str(path))
    if not _is_text(str(path)):
        raise OSError(errno.EILSEQ, f"{op}: path must be UTF-8 to be read again, got", str(path))
    if target.is_dir():
        raise IsADirectoryError(f"{op}: path must be a file or a new name, got the folder {str(path)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{op}: path must lie in an existing folder, got {str(path)!r}")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{op}: path must be writable, got {str(path)!r}")
    return target


def _is_text(name: str) -> bool:
    """Else the system's name has bytes that stand for no character."""
    return not any("\udc80" <= character <= "\udcff" for character in name)


def _is_special(target: Path) -> bool:
    return target.exists() and not target.is_file()


def _unfinished(stack: ExitStack, target: Path) -> Path:
    """A name in a new folder beside the target, on its file system and nobody else's; for a device anywhere."""
    beside = None if _is_special(target) else target.parent
    folder = TemporaryDirectory(prefix=_PREFIX, dir=beside, ignore_cleanup_errors=True)
    return Path(stack.enter_context(folder), "unfinished" + target.suffix)


def _finish(name: Path, target: Path) -> None:
    """Give the file its mode and bring its bytes to the disk."""
    if target.is_file():
        mode = target.stat().st_mode & 0o7777
    else:  # writers of temporary files of their own choose 0600; what the umask gives is only known from a file made
        name.with_suffix(".mode").touch()
        mode = name.with_suffix(".mode").stat().st_mode & 0o7777
    _sync(name)
    os.chmod(name, mode)


def _put(name: Path, target: Path) -> None:
    if _is_special(target):
        with open(name, "rb") as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
        return
    os.replace(name, target)
    with suppress(OSError):  # some file systems sync no folders, and the file is in place
        _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
