"""A file as torch.save writes it, of tensors that come one after the other.

torch.save wants all of them in memory. The format is a zip archive, described in torch's notes on serialization:

    name/data.pkl     the object, pickled; a storage is ("storage", type, number, device, elements)
    name/byteorder    of the storages
    name/data/0 …     their bytes, not compressed
    name/version
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # of the bytes of a storage in the file, as torch has it, for torch.load(mmap=True)
_PADDING_ID = 0x4246  # of a field of a header that holds nothing
_LOCAL_HEADER_BYTES = 30
_ZIP64_BYTES = 20  # what zipfile adds to a local header for sizes of 64 bits


def write_torch_file(file: IO[bytes], value: Any, fill: Callable[[Tensor], Tensor]) -> None:
    """Write what torch.save would write of `value`, tensor by tensor.

    Args:
        file: to write into, seekable, empty.
        value: plain containers. Their tensors say only shape and dtype, are contiguous, and on the CPU; they are not read,
            so those of `torch.empty` take no memory.
        fill: gives the values of one of these tensors, in a tensor of the same shape and dtype. Called once for each.
    """
    pickler = _StoragePickler()
    content = pickler.pickled(value)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, "data.pkl", content)
        _write(archive, "byteorder", sys.byteorder.encode())
        for number, tensor in enumerate(pickler.tensors):
            _write(archive, f"data/{number}", fill(tensor).reshape(-1).view(torch.uint8).numpy().data)
        _write(archive, "version", b"3\n")


class _StoragePickler(pickle.Pickler):
    """Pickles tensors as torch.save does, with numbers for their storages.

    Attributes:
        tensors: those that were met, by the number of their storage.
    """

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=2)
        self.tensors: list[Tensor] = []

    def pickled(self, value: Any) -> bytes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch pickles by a class that it calls deprecated
            self.dump(value)
        return self._buffer.getvalue()

    def reducer_override(self, value: Any) -> Any:
        """Note a tensor, whose storage comes next."""
        if type(value) is Tensor:
            self.tensors.append(value)
        return NotImplemented

    def persistent_id(self, value: Any) -> Any:
        """What stands for a storage: its type, number, device and number of elements."""
        number = str(len(self.tensors) - 1)
        if isinstance(value, torch.storage.TypedStorage):
            name: str = value.pickle_storage_type()  # type: ignore[no-untyped-call]
            return "storage", getattr(torch, name), number, "cpu", value.size()  # type: ignore[no-untyped-call]
        if isinstance(value, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, number, "cpu", value.nbytes()
        return None


def _write(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    record = zipfile.ZipInfo(f"archive/{name}")
    record.file_size = len(content)
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(record.filename) + _ZIP64_BYTES
    padding = -(begin + 4) % _ALIGNMENT
    record.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=True) as stream:
        stream.write(content)
