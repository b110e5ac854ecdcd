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
from .files import CheckedFiles, FileRecord

NAME = "zeroopt.json"
FORMAT = 1


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
        """Write it into the directory. Raises CheckpointError when it cannot be written."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "zeroopt": self.zeroopt,
            "torch": self.torch,
            "number": self.number,
            "saved_at": self.saved_at,
            "facts": self.facts,
            "files": {name: record._asdict() for name, record in sorted(self.files.items())},
        }
        text = json.dumps({**content, "crc32": _checksum(content)}, indent=1)
        with files.create_stream(directory / NAME, "wb") as stream:
            stream.write(text.encode())

    @staticmethod
    def read(directory: Path) -> Manifest:
        """That of a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            NewerFormatError: it is of a newer zeroopt.
            CheckpointError: it is damaged.
        """
        path = directory / NAME
        try:
            content = json.loads(path.read_bytes())
            expected = content.pop("crc32")
            if not isinstance(content["format"], int) or expected != _checksum(content):
                raise ValueError("its checksum is wrong")
            if content["format"] > FORMAT:
                raise NewerFormatError(
                    f"{path} has format {content['format']}, of zeroopt {content.get('zeroopt')}; this zeroopt "
                    f"({build_info()['version']}) reads formats up to {FORMAT}. Install a newer one"
                )
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            number, saved_at = int(content.get("number", 0)), int(content["saved_at"])
            return Manifest(content["facts"], files, number, saved_at, content["zeroopt"], content["torch"])
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
