"""Files of torch.save pass; those of which more would become than there is are refused."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest
import torch

from zeroopt.checkpoint.disk.torch_file_bounds import check_torch_file


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_saves_passes(is_zip: bool) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": [1, "c"]}, file, _use_new_zipfile_serialization=is_zip)
    names = [argument for operation, argument in check_torch_file(file) if operation == "GLOBAL"]
    assert "torch._utils _rebuild_tensor_v2" in names


def archive(*parts: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Any:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in parts:
            made.writestr(name, content)
    return file


PICKLE = ("archive/data.pkl", b"\x80\x02N.")


def overlapping() -> Any:
    """Its directory names the same bytes many times."""
    file = archive(PICKLE, ("archive/data/0", bytes(10_000)))
    content = file.getvalue()
    begin = content.index(b"PK\x01\x02", 10_000)
    entry = content[content.index(b"PK\x01\x02", begin + 1) : content.index(b"PK\x05\x06")]
    end = bytearray(content[content.index(b"PK\x05\x06") :])
    size = int.from_bytes(end[12:16], "little")
    end[8:12] = (102).to_bytes(2, "little") * 2
    end[12:16] = (size + 100 * len(entry)).to_bytes(4, "little")
    return io.BytesIO(content[: content.index(b"PK\x05\x06")] + entry * 100 + end)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (archive(PICKLE, ("archive/data/0", bytes(10_000)), compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (overlapping(), "longer than it is"),
        (archive(("archive/version", b"3")), "it has 0 parts 'data.pkl'"),
        (archive(PICKLE, ("other/data.pkl", b"")), "it has 2 parts 'data.pkl'"),
    ],
    ids=["compressed", "upon each other", "no pickle", "two pickles"],
)
def test_others_are_refused(file: Any, message: str) -> None:
    with pytest.raises(zipfile.BadZipFile, match=message):
        list(check_torch_file(file))
