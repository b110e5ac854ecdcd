"""The checkpoints of one directory: the latest, and how many are kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import CheckpointError
from .directory import foreign_names, is_aside, remove, remove_left_aside
from .manifest import Manifest, NewerFormatError
from .paths import local_path

_log = logging.getLogger("zeroopt")


def latest(root: str | os.PathLike[str], names: str = "*") -> Path | None:
    """The newest complete checkpoint directly in a directory; None when there is none.

    Args:
        names: only of checkpoints whose names match this pattern, such as "lr3-step-*" where jobs share a directory.

    That is by numbers in the manifests, for each save takes one more than the largest that it finds beside it. Clocks count
    only for checkpoints that were saved before there were numbers, and these are older than all others.

    Not collective: let one rank ask and tell the others, should checkpoints be written or removed meanwhile. Partial
    checkpoints, those of which files are missing or of another size, and everything else in there do not count.

    Raises:
        CheckpointError: there is a checkpoint of a newer zeroopt, or the directory cannot be read, or is a URL.
    """
    found = []
    try:
        for path in local_path(root).iterdir():
            if not fnmatchcase(path.name, names):
                continue
            manifest = _manifest_of(path)
            if manifest is not None and _is_complete(path, manifest):
                found.append((manifest.order, path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {root}: {error.strerror or error}") from error
    return max(found)[1] if found else None


def next_number(target: Path) -> int:
    """The number of a checkpoint that is to be put at `target`. Of one rank alone.

    Raises:
        OSError: the directory cannot be read.
    """
    numbers = [0]
    for path in filter(Path.is_dir, target.parent.iterdir()):
        with suppress(NewerFormatError):
            manifest = _manifest_of(path)
            numbers.append(0 if manifest is None else manifest.number)
    return max(numbers) + 1


def keep_newest(target: Path, count: int, runs: Sequence[str]) -> None:
    """Remove the oldest checkpoints next to `target`, so that with it `count` of these runs remain, and what killed runs have left.

    Of one rank alone. Those that other runs have written stay and do not count. What has no valid manifest stays, as do
    directories that hold anything else besides. What cannot be removed is logged, not raised: the new checkpoint is safe.
    """
    try:
        others = []
        for path in target.parent.iterdir():
            with suppress(NewerFormatError):
                manifest = _manifest_of(path)
                if manifest is None or path == target or manifest.runs[-1] not in runs:
                    continue
                if not foreign_names(path, manifest):
                    others.append((manifest.order, path))
        for _, path in sorted(others, reverse=True)[count - 1 :]:
            remove(path)
        remove_left_aside(target.parent)
    except OSError as error:
        _log.warning("cannot remove old checkpoints in %s: %s", target.parent, error)


def _manifest_of(path: Path) -> Manifest | None:
    """That of a checkpoint, None for everything else; raises NewerFormatError."""
    if is_aside(path):
        return None
    try:
        return Manifest.read(path)
    except NewerFormatError:
        raise
    except (CheckpointError, FileNotFoundError):
        return None


def _is_complete(path: Path, manifest: Manifest) -> bool:
    try:
        return all((path / name).stat().st_size == record.bytes for name, record in manifest.files.items())
    except OSError:
        return False
