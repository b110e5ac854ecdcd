"""Where checkpoints can be: directories of a file system that all ranks see, and files in these."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...errors import CheckpointError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two; C:/ is no scheme


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path, which has to be one of a file system. Not collective.

    Raises:
        CheckpointError: it is a URL such as s3://bucket/name.
    """
    text = os.fspath(path)
    if _URL.match(text) or (not isinstance(path, str) and _URL_AS_PATH.match(text)):
        raise CheckpointError(
            f"{text} is a URL, and checkpoints are directories of a file system that all ranks see: give a path that is mounted "
            "there, and copy the directory to or from elsewhere by one rank, after save has returned and before load is called. "
            "(A local directory of that name is meant by its absolute path.)"
        )
    return Path(text)


def is_file_name(name: object) -> bool:
    """Whether it is the name of a file in a directory, and leads nowhere else."""
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name
