"""Where in a host's memory a job's copies are: a directory of a file system in memory, with a file for each rank.

    /dev/shm/zeroopt-1000-run7/
        1876a5f3c0d2e481-00000003-of-2-rank-0       third layout of a run, of two ranks
        1876a5f3c0d2e481-00000003-of-2-rank-1

It is the job's as long as the job's name is used; where the name is that of a process, as long as this lives.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

MEMORY = "/dev/shm"
_JOB = re.compile(r"[A-Za-z0-9._-]+")
_FILE = re.compile(r"(?P<run>[0-9a-f]{16})-(?P<layout>[0-9]{8})-of-(?P<ranks>[0-9]+)-rank-(?P<rank>[0-9]+)")
_OF_PROCESS = re.compile(r"of-process-(?P<namespace>[0-9]+)-(?P<pid>[0-9]+)-(?P<start>[0-9]+)")
_BLOCK_BYTES = 512  # of `st_blocks`, whatever blocks the file system has
_OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_START_FIELD = 19  # of /proc/PID/stat, counted from behind the name of the program


@dataclass(frozen=True, order=True)
class FileName:
    """Whose copy a file holds.

    Attributes:
        run: tells runs of a job apart: a later one has a larger number. One that goes on from copies is the same run; one that begins
            anew, goes back, or goes on from something else is another one.
        layout: counts how often what ranks hold was laid out anew since the run began.
        ranks: how many there were.
        rank: whose it is.
    """

    run: int
    layout: int
    ranks: int
    rank: int

    def __str__(self) -> str:
        return f"{self.run:016x}-{self.layout:08}-of-{self.ranks}-rank-{self.rank}"

    @staticmethod
    def parse(name: str) -> FileName | None:
        """None for the name of something else."""
        match = _FILE.fullmatch(name)
        if match is None:
            return None
        run, *numbers = match.groups()
        return FileName(int(run, 16), *map(int, numbers))


def directory_of(job: str, memory: str | os.PathLike[str] = MEMORY) -> Path:
    """That of a job of this user. Raises ConfigError for what cannot be part of a file's name."""
    if not _JOB.fullmatch(job):
        raise ConfigError(f"a job's name may have letters, digits and . _ - in it, got {job!r}")
    return Path(memory) / f"{_prefix()}{job}"


def make_directory(directory: Path) -> None:
    """Make that of a job, if it is not there.

    Raises:
        OSError: it cannot be made, or others have part in it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(directory)


def check_private(directory: Path) -> None:
    """Who can guess a job's name can make its directory first: read what is put there, or put values of their own there.

    Raises:
        PermissionError: it is there, and another user's, open to others, or no directory.
    """
    try:
        facts = os.lstat(directory)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & _OF_OTHERS:
        return
    raise PermissionError(
        f"{directory} is to be a directory of user {os.geteuid()} alone, got one of user {facts.st_uid} with the mode "
        f"{stat.filemode(facts.st_mode)}: remove it, or choose another job= or memory="
    )


def files_in(directory: Path) -> list[FileName]:
    """The copies in a directory, which need not exist."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(found for name in names if (found := FileName.parse(name)) is not None)


def job_of_agent() -> str:
    """The name of a job that is as old as the parent of this process: torchrun's agent, which starts ranks again.

    Raises:
        ConfigError: torchrun has not started this process. What has, a shell for one, may start other trainings, too.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError(
            "torchrun has not started this process, so nothing says which processes are of one training: pass job=, a name of this "
            "training that it has again when it is started again"
        )
    return _name_of_process(os.getppid())


def remove_job(directory: Path) -> None:
    """Remove all that a job has left on this host."""
    shutil.rmtree(directory, ignore_errors=True)


def remove_all_but(directory: Path, names: Collection[FileName]) -> None:
    """Remove what a directory has besides these, also what was being made when its maker was killed."""
    kept = {str(name) for name in names}
    with suppress(FileNotFoundError):
        for path in directory.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


def remove_ended(memory: str | os.PathLike[str] = MEMORY) -> None:
    """Remove what jobs of this user have left whose name is that of a process that has ended."""
    for job in jobs(memory):
        match = _OF_PROCESS.fullmatch(job)
        if match and int(match["namespace"]) == _namespace() and _name_of_process(int(match["pid"])) != job:
            remove_job(directory_of(job, memory))


def jobs(memory: str | os.PathLike[str] = MEMORY) -> Iterator[str]:
    """The names of this user's jobs that have something on this host."""
    for path in sorted(Path(memory).glob(f"{_prefix()}*")):
        yield path.name.removeprefix(_prefix())


def bytes_of(job: str, memory: str | os.PathLike[str] = MEMORY) -> int:
    """What the files of a job take, which is less than they are long where a slot has no memory."""
    return bytes_in(directory_of(job, memory))


def bytes_in(directory: Path) -> int:
    """Likewise, of all files of a directory."""
    return sum(path.stat().st_blocks for path in directory.iterdir()) * _BLOCK_BYTES


def _prefix() -> str:
    return f"zeroopt-{os.getuid()}-"


def _name_of_process(pid: int) -> str:
    """A process number may come again; with the time of its start it does not."""
    start = "0"
    with suppress(OSError):
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_FIELD]
    return f"of-process-{_namespace()}-{pid}-{start}"


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
