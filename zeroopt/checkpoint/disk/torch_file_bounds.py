"""Files of torch.save that take no more memory than they are long: looked through before torch reads them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import IO, Any

from .pickle_bounds import check_pickle

_LEGACY_PICKLES = 5  # magic number, protocol, facts of the system, the object, and its storages, one behind the other


def check_torch_file(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Look through a file as torch.save writes it, and give the operations of its pickles, by name and argument.

    Args:
        file: seekable, read from its beginning.

    Raises:
        ValueError, BadZipFile, UnpicklingError: it is none, or its parts are compressed or lie upon each other, so that more may
            become of them than there is; see `check_pickle`.
    """
    file.seek(0)
    if zipfile.is_zipfile(file):
        yield from check_pickle(io.BytesIO(_pickle_of(file)))
    else:
        file.seek(0)
        bounded = _Bounded(file)
        for _ in range(_LEGACY_PICKLES):
            yield from check_pickle(bounded)  # type: ignore[arg-type]


class _Bounded:
    """A file whose buffer is not made as large as what is asked for, where that is more than there is."""

    def __init__(self, file: IO[bytes]) -> None:
        position = file.tell()
        self._file, self._size = file, file.seek(0, io.SEEK_END)
        file.seek(position)
        self.readline, self.tell = file.readline, file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._size - self._file.tell()))


def _pickle_of(file: IO[bytes]) -> bytes:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        size = file.seek(0, io.SEEK_END)
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise zipfile.BadZipFile(f"its part {member.filename!r} is compressed, which torch.save does not do")
        if sum(member.file_size for member in members) > size:
            raise zipfile.BadZipFile(f"its parts are longer than it is, which has {size} bytes")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it has {len(pickles)} parts 'data.pkl', expected one")
        return archive.read(pickles[0])
