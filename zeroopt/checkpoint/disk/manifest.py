"""The file that is written last, and says of which files a checkpoint consists."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..._C import build_info
from ...errors import CheckpointError
from .files import CheckedFiles, FileRecord, read_ordinary
from .paths import is_file_name

NAME = "zeroopt.json"
FORMAT = 1
_MOST_BYTES = 64 << 20  # of 10,000 ranks' files it has some 2 MB
_MOST_NUMBER = (1 << 63) - 1


class NewerFormatError(CheckpointError):
    """Raised for a manifest that is whole, and can only be read by a newer zeroopt."""


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as they are read again: lists for tuples, strings for keys. Raises CheckpointError for what is not JSON."""
    try:
        made: dict[str, Any] = json.loads(json.dumps(facts))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the facts of a checkpoint have to be plain JSON: {error}") from error
    return made


def runs_in(facts: dict[str, Any]) -> list[str]:
    """The names of the runs from which a checkpoint descends, that which wrote it last; one without a name where nothing is known of
    them."""
    return list(facts.get("runs") or [""])


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        facts: of the run that wrote it, as `as_json` gives them.
        files: all files but the manifest, by name.
        number: larger than those of all checkpoints that were beside it when it was written; 0 where it was written before
            there were numbers.
        saved_at: when it was complete, in nanoseconds since 1970, by a clock that may have been set back since.
        zeroopt, torch: versions that wrote it.
    """

    facts: dict[str, Any]
    files: dict[str, FileRecord]
    number: int
    saved_at: int
    zeroopt: str
    torch: str

    @staticmethod
    def of(facts: dict[str, Any], files: dict[str, FileRecord], number: int, saved_at: int) -> Manifest:
        """That of a checkpoint which is written now."""
        return Manifest(facts, files, number, saved_at, build_info()["version"], torch.__version__)

    @property
    def runs(self) -> list[str]:
        """From which it descends, see `runs_in`."""
        return runs_in(self.facts)

    @property
    def order(self) -> tuple[int, int]:
        """Later checkpoints of a directory have larger ones."""
        return self.number, self.saved_at

    def write(self, directory: Path, files: CheckedFiles) -> None:
        """Write it into the directory. Raises CheckpointError when it cannot be written, or is longer than 64 MB: by facts."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "zeroopt": self.zeroopt,
            "torch": self.torch,
            "number": self.number,
            "saved_at": self.saved_at,
            "facts": self.facts,
            "files": {name: record._asdict() for name, record in sorted(self.files.items())},
        }
        text = json.dumps({**content, "crc32": _checksum(content)}, indent=1).encode()
        if len(text) > _MOST_BYTES:
            raise CheckpointError(
                f"{NAME} would have {len(text)} bytes, and {_MOST_BYTES} are read again: it has too many facts. Save them as extra values"
            )
        with files.create_stream(directory / NAME, "wb") as stream:
            stream.write(text)

    @staticmethod
    def read(directory: Path) -> Manifest:
        """That of a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            NewerFormatError: it is of a newer zeroopt.
            CheckpointError: it is damaged, leads out of the directory, or is longer than 64 MB.
        """
        path = directory / NAME
        try:
            content = json.loads(read_ordinary(path, _MOST_BYTES))
            expected = content.pop("crc32")
            if not isinstance(content["format"], int) or expected != _checksum(content):
                raise ValueError("its checksum is wrong")
            if content["format"] > FORMAT:
                raise NewerFormatError(
                    f"{path} has format {content['format']}, of zeroopt {content.get('zeroopt')}; this zeroopt "
                    f"({build_info()['version']}) reads formats up to {FORMAT}. Install a newer one"
                )
            files = {_file_name(name): _record(record) for name, record in content["files"].items()}
            number, saved_at = _number(content.get("number", 0)), _number(content["saved_at"])
            facts, versions = content["facts"], (content["zeroopt"], content["torch"])
            if not (isinstance(facts, dict) and all(isinstance(text, str) for text in (*versions, *runs_in(facts)))):
                raise TypeError("facts or versions are not of the kind that is written")
            return Manifest(facts, files, number, saved_at, *versions)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def _file_name(name: str) -> str:
    if not is_file_name(name) or name == NAME:
        raise ValueError(f"{name!r} is no name of a file beside it")
    return name


def _record(record: Any) -> FileRecord:
    return FileRecord(**{key: _number(value) for key, value in record.items()})


def _number(value: Any) -> int:
    """What is written as a count or a time."""
    if type(value) is not int or not 0 <= value <= _MOST_NUMBER:
        raise ValueError(f"{value!r} is no count, time or checksum")
    return value


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
