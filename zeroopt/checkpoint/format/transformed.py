"""Parts that extensions of DCP have compressed or otherwise transformed: made into files of torch.save again, no longer than they may be,
and looked through as all others are."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ...errors import CheckpointError
from ..disk.torch_file_bounds import check_torch_file

_MORE_BYTES = 1 << 20  # than a tensor's own, or than values compress to
_MOST_TIMES = 64  # as long as what lies in the file, of values that say nowhere how long they are


class CheckedTransforms:
    """Takes the place of what DCP's reader transforms by.

    Args:
        transforms: of DCP's reader.
        metadata: of the checkpoint, as `check_metadata` has let them pass.
    """

    def __init__(self, transforms: Any, metadata: Metadata) -> None:
        self._transforms = transforms
        self._entries = metadata.state_dict_metadata
        self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data

    def transform_load_stream(self, item: ReadItem, descriptors: Sequence[str], stream: IO[bytes]) -> IO[bytes]:
        """What an extension has made a part of. Raises CheckpointError where that is longer than it can be, and as `check_torch_file`."""
        made: IO[bytes] = self._transforms.transform_load_stream(item, descriptors, stream)
        if not descriptors:
            return made
        part = io.BytesIO(_read(made, self._longest(item.storage_index)))
        for _ in check_torch_file(part):
            pass
        part.seek(0)
        return part

    def _longest(self, index: MetadataIndex) -> int:
        """How many bytes a part may become."""
        entry = self._entries[index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            return math.prod(entry.size) * dtype.itemsize + _MORE_BYTES
        return self._places[index].length * _MOST_TIMES + _MORE_BYTES


def _read(stream: IO[bytes], longest: int) -> bytes:
    """To the end, of a stream that may give less than it is asked for."""
    pieces, left = [], longest
    while piece := stream.read(min(left + 1, _MORE_BYTES)):
        left -= len(piece)
        if left < 0:
            raise CheckpointError(f"what was transformed becomes longer than {longest} bytes")
        pieces.append(piece)
    return b"".join(pieces)
