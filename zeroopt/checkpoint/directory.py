"""Directories of checkpoints: written aside and put in place at once, replaced at once, removed at once.

    checkpoints/
        .step-300.1f0c9a77.partial/    a checkpoint that is being written, or removed
        step-100/
        step-200/

A partial directory whose process was killed stays until the next save to the same path, or with `keep` in the same parent.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError
from .files import sync_directory
from .manifest import NAME, Manifest

_log = logging.getLogger("zeroopt")

_ASIDE = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.partial")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A new directory next to `target`, removed at the end with whatever is in it then. Of one rank alone.

    What killed runs have left of the same target is removed first. It is locked, so that nobody takes it for left over.

    Raises:
        CheckpointError: the target is in the way and no checkpoint, or could not be replaced at once.
        OSError: the directory cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left_aside(target.parent, target.name)
    directory = _name_aside(target)
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor)
        if _check_replaceable(target):
            _try_exchange(directory)
        yield directory
    finally:
        _remove_tree(directory)
        os.close(descriptor)


def commit(directory: Path, target: Path) -> None:
    """Put a complete directory from aside at `target`, where there is nothing or an older checkpoint, which is aside then.

    Raises:
        CheckpointError: see `aside`.
        OSError: it cannot be put there.
    """
    sync_directory(directory)
    if _check_replaceable(target):
        _exchange(directory, target)
    else:
        directory.rename(target)
    sync_directory(target.parent)


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint directly in a directory, by what its manifest says, or None.

    Not collective: let one rank ask and tell the others, should checkpoints be written or removed meanwhile. Partial
    checkpoints, those of which files are missing or of another size, and everything else in there do not count.

    Raises:
        CheckpointError: there is a checkpoint of a newer zeroopt.
    """
    found = [(manifest.saved_at, path) for path, manifest in _checkpoints(Path(root)) if _is_complete(path, manifest)]
    return max(found)[1] if found else None


def keep_newest(target: Path, count: int) -> None:
    """Remove the oldest checkpoints next to `target`, so that with it `count` remain, and what killed runs have left.

    Of one rank alone. What has no valid manifest stays, as do directories that hold anything else besides. What cannot be
    removed is logged: the new checkpoint is safe.
    """
    others = [(manifest.saved_at, path) for path, manifest in _checkpoints(target.parent) if path != target]
    for _, path in sorted(others, reverse=True)[max(count - 1, 0) :]:
        try:
            if not _foreign(path):
                removed = _name_aside(path)
                path.rename(removed)
                _remove_tree(removed)
        except (OSError, CheckpointError) as error:
            _log.warning("cannot remove the old checkpoint %s: %s", path, error)
    remove_left_aside(target.parent)


def remove_left_aside(parent: Path, target: str | None = None) -> None:
    """Remove the partial directories that no process works on, of all targets or one of them."""
    for path in parent.iterdir():
        match = _ASIDE.fullmatch(path.name)
        if match and target in (None, match["target"]) and path.is_dir() and not path.is_symlink():
            with suppress(OSError), _opened(path) as descriptor:
                _lock(descriptor)
                _remove_tree(path)


def is_aside(path: Path) -> bool:
    """Whether the name is that of a partial directory."""
    return _ASIDE.fullmatch(path.name) is not None


def _name_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def _checkpoints(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Those directly in a directory that have a valid manifest."""
    for path in root.iterdir():
        if not is_aside(path) and (path / NAME).is_file():
            with suppress(CheckpointError, FileNotFoundError):
                yield path, Manifest.read(path)


def _is_complete(path: Path, manifest: Manifest) -> bool:
    try:
        return all((path / name).stat().st_size == record.bytes for name, record in manifest.files.items())
    except OSError:
        return False


def _check_replaceable(target: Path) -> bool:
    """Whether there is a checkpoint of ours at the target; raises CheckpointError where there is something else."""
    if not os.path.lexists(target):
        return False
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file. Choose another path for the checkpoint")
    if not any(target.iterdir()):
        return False
    if foreign := _foreign(target):
        raise CheckpointError(
            f"{target} holds {foreign[0]!r}, which is not part of a checkpoint of zeroopt: it would be lost. Move it away, or "
            "choose another path"
        )
    return True


def _foreign(path: Path) -> list[str]:
    """Names in a directory that no valid manifest accounts for."""
    try:
        files = {NAME, *Manifest.read(path).files}
    except (CheckpointError, FileNotFoundError):
        files = set()
    return sorted(name for name in os.listdir(path) if name not in files)


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        _log.warning("cannot remove %s; it is not needed any more", path)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a directory until the descriptor is closed or the process dies; raises BlockingIOError when somebody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks


def _try_exchange(directory: Path) -> None:
    """Find out whether directories can be exchanged, before all is written and cannot be put in place."""
    one, other = directory / "one", directory / "other"
    one.mkdir()
    other.mkdir()
    _exchange(one, other)
    one.rmdir()
    other.rmdir()


def _exchange(one: Path, other: Path) -> None:
    """Exchange two directories, at once.

    Raises:
        CheckpointError: this system cannot.
        OSError: it could, but not these.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise _no_exchange(other, "this C library has no renameat2")
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise _no_exchange(other, os.strerror(code))
        raise OSError(code, os.strerror(code), str(other))


def _no_exchange(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the file system of {path.parent} cannot exchange two directories at once ({reason}), so that an old checkpoint cannot "
        "be replaced safely. Save to a path that does not exist yet, with keep=1 to have the old one removed afterwards"
    )
