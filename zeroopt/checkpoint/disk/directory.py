"""Directories of checkpoints: written aside and put in place at once, replaced at once, removed at once.

    checkpoints/
        .step-300.1f0c9a77.partial/    a checkpoint that is being written, or removed
        step-100/
        step-200/

A partial directory whose process was killed stays until the next save to the same path, or with `keep` in the same parent.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from ...errors import CheckpointError
from .exchange import exchange, try_exchange
from .files import sync_directory
from .manifest import NAME, Manifest

_log = logging.getLogger("zeroopt")

_ASIDE = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.partial", re.DOTALL)


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A new directory next to `target`, removed at the end with whatever is in it then. Of one rank alone.

    What killed runs have left of the same target is removed first. It is locked, so that nobody takes it for left over.

    Raises:
        CheckpointError: the target is in the way and no checkpoint, or could not be replaced at once.
        OSError: the directory cannot be made.
    """
    replaces = _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left_aside(target.parent, target.name)
    directory = _name_aside(target)
    directory.mkdir()
    try:
        with _locked(directory):
            if replaces:
                try_exchange(directory)
            yield directory
    finally:
        _remove_tree(directory)


def commit(directory: Path, target: Path) -> None:
    """Put a complete directory from aside at `target`, where there is nothing or an older checkpoint, which is aside then.

    Raises:
        CheckpointError: see `aside`.
        OSError: it cannot be put there.
    """
    sync_directory(directory)
    if _check_replaceable(target):
        exchange(directory, target)
    else:
        directory.rename(target)
    sync_directory(target.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint at once. Raises OSError when it stays."""
    doomed = _name_aside(path)
    path.rename(doomed)
    _remove_tree(doomed)


def remove_left_aside(parent: Path, target: str | None = None) -> None:
    """Remove the partial directories of one target, or of all, that no process works on.

    Where a file system has no locks, those of other targets stay: they may be written just now.
    """
    for path in parent.iterdir():
        match = _ASIDE.fullmatch(path.name)
        if match and target in (None, match["target"]) and path.is_dir() and not path.is_symlink():
            with suppress(OSError), _locked(path) as lock:
                if lock is _Lock.TAKEN or (lock is _Lock.UNKNOWN and target is not None):
                    _remove_tree(path)


def is_aside(path: Path) -> bool:
    """Whether the name is that of a partial directory."""
    return _ASIDE.fullmatch(path.name) is not None


def foreign_names(path: Path, manifest: Manifest | None) -> list[str]:
    """Names in a directory that its manifest does not account for. Raises OSError."""
    known = set() if manifest is None else {NAME, *manifest.files}
    return sorted(name for name in os.listdir(path) if name not in known)


def _check_replaceable(target: Path) -> bool:
    """Whether there is a checkpoint of ours at the target; raises CheckpointError where there is something else."""
    if not os.path.lexists(target):
        return False
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file. Choose another path for the checkpoint")
    manifest = None
    try:
        manifest = Manifest.read(target)
    except FileNotFoundError:
        pass
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. A checkpoint of which not all is known is not replaced: move it away"
        ) from error
    if foreign := foreign_names(target, manifest):
        raise CheckpointError(
            f"{target} holds {foreign[0]!r}, which is not part of a whole checkpoint of zeroopt: it would be lost. Move it away, "
            "or choose another path"
        )
    return manifest is not None


def _name_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        _log.warning("cannot remove %s, which is not needed any more", path)


class _Lock(Enum):
    TAKEN = "it is ours until it is closed or the process dies"
    HELD = "some process has it"
    UNKNOWN = "the file system has no locks"


@contextmanager
def _locked(directory: Path) -> Iterator[_Lock]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> _Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.HELD
    except OSError:
        return _Lock.UNKNOWN
    return _Lock.TAKEN
