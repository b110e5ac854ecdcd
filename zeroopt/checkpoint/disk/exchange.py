"""Two directories change places at once."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from ...errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(one: Path, other: Path) -> None:
    """Exchange two directories by renameat2(2): whoever looks finds one or the other, whole.

    Raises:
        CheckpointError: this system or file system cannot.
        OSError: it could, but not these.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise _unable(other, "this C library has no renameat2")
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise _unable(other, os.strerror(code))
        raise OSError(code, os.strerror(code), str(other))


def try_exchange(directory: Path) -> None:
    """Raise CheckpointError where `exchange` cannot work, without touching anything but two new directories in this one."""
    one, other = directory / "one", directory / "other"
    one.mkdir()
    other.mkdir()
    exchange(one, other)
    one.rmdir()
    other.rmdir()


def _unable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the file system of {path.parent} cannot exchange two directories at once ({reason}), so that an old checkpoint cannot "
        "be replaced safely. Save to a path that does not exist yet, with keep=1 to have the old one removed afterwards"
    )
