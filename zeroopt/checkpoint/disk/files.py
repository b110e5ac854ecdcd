"""Files that are checksummed while they are written, and on the disk when they are closed; and ordinary ones, which end, to read."""

from __future__ import annotations

import errno
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch.distributed.checkpoint.filesystem import FileSystem

from ...errors import CheckpointError

_BUFFER_BYTES = 1 << 20


def open_ordinary(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading, without waiting for anybody. A pipe or a device, which may never end, is refused, as is a directory.

    Raises:
        OSError: it is not there, not an ordinary file, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not an ordinary file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_ordinary(path: Path, at_most: int) -> bytes:
    """All of an ordinary file. Raises OSError, see `open_ordinary`, also where it has more bytes than `at_most`."""
    with open_ordinary(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"longer than {at_most} bytes", str(path))
    return content


class FilePart(io.RawIOBase):
    """Some bytes of a file, as a file to read; those in use at a time share the file's position."""

    def __init__(self, file: IO[bytes], begin: int, size: int) -> None:
        super().__init__()
        self._file, self._begin, self._size, self._position = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to an offset from the part's beginning, from where one is, or from its end. Raises OSError before its beginning."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as there are bytes; returns how many."""
        view = memoryview(buffer).cast("B")[: max(self._size - self._position, 0)]
        self._file.seek(self._begin + self._position)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count


class FileRecord(NamedTuple):
    """What a manifest says of a file: its size, and the CRC-32 of its bytes as of `zlib.crc32`."""

    bytes: int
    crc32: int

    @staticmethod
    def of(path: Path) -> FileRecord:
        """Read a file through. Raises OSError, see `open_ordinary`."""
        total = crc32 = 0
        with open_ordinary(path) as file:
            while block := file.read(_BUFFER_BYTES):
                total += len(block)
                crc32 = zlib.crc32(block, crc32)
        return FileRecord(total, crc32)


class _Stream:
    """A file that is written from the beginning to the end, by writers that want no exceptions.

    torch.save writes from C++, and that an exception there ends well is not sure in all releases: an error is kept, later
    writes do nothing, and `check` raises.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None
        self._bytes = self._crc32 = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._attempt(lambda: self._file.write(data))
        self._crc32 = zlib.crc32(data, self._crc32)
        self._bytes += size
        return size

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._attempt(self._file.flush)

    def sync(self) -> None:
        self.flush()
        self._attempt(lambda: os.fsync(self._file.fileno()))

    def check(self) -> None:
        """Raise the first error that there was, if there was one."""
        if self._error is not None:
            raise self._error

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._crc32)

    def _attempt(self, call: Callable[[], Any]) -> None:
        if self._error is None:
            try:
                call()
            except OSError as error:
                self._error = error


class OrdinaryFiles(FileSystem):
    """The file system as DCP's reader uses it."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A file that is there, for reading. Raises OSError, see `open_ordinary`."""
        assert mode == "rb"
        with open_ordinary(path) as file:
            yield file


class CheckedFiles(FileSystem):
    """The file system as DCP's writer uses it, for files that do not yet exist.

    Attributes:
        records: of the files written so far, by name.
    """

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A stream that has `write`, `tell`, `flush` and `check`; its file is synced at the end.

        Raises:
            CheckpointError: the file exists already, or cannot be written; names it and the reason.
        """
        assert mode == "wb"
        path = Path(path)
        try:
            with path.open("xb", buffering=_BUFFER_BYTES) as file:
                stream = _Stream(file)
                yield stream
                stream.sync()
                stream.check()
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
        self.records[path.name] = stream.record

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file that was written, and its record."""
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
