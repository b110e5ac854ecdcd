"""A pickle of a few bytes that would fill the memory, or overflow the stack, is refused; what picklers write is not."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroopt.checkpoint.disk.pickle_bounds import check_pickle

_COPIED = b"(" + b"K\x01" * 10_000 + b"t\x94"  # a tuple, noted
BOMBS = {
    "notes of 2 GB": b"\x80\x04}r\xff\xff\xff\x0f.",
    "bytes as told": b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x10\x85R.",
    "copies of a tuple": b"\x80\x04ctorch\nSize\n\x94" + _COPIED + b"0h\x00h\x01\x85R" * 2000 + b".",
    "copies of copies": b"\x80\x04ctorch\nSize\n\x94" + _COPIED + b"0h\x00h\x01\x85R\x940" + b"h\x00h\x02\x85R" * 2000 + b".",
    "attributes": b"\x80\x04cm\nA\n\x94}(" + b"".join(b"K%cK\x01" % (i % 256) for i in range(10_000)) + b"u\x94"
    b"0" + b"h\x00)\x81h\x01b" * 2000 + b".",
    "nested tuples": b"\x80\x04)" + b"\x85" * 100_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        list(check_pickle(io.BytesIO(content)))


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.frozensets(leaves)
        | st.sets(leaves)
        | st.dictionaries(leaves, inner)
        | st.builds(OrderedDict, st.dictionaries(leaves, inner))
        | st.builds(Path, st.sampled_from(["a/b", "."]))
    ),
)


@given(values, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_what_python_pickles_passes(value: Any, protocol: int) -> None:
    content = pickle.dumps([value, value], protocol)
    file = io.BytesIO(content + b"more")
    operations = list(check_pickle(file))
    assert operations[-1] == ("STOP", None)
    assert file.tell() == len(content)


def test_so_does_what_names_things_often() -> None:
    name = "a" * 100
    size = torch.Size([3, 4])
    list(check_pickle(io.BytesIO(pickle.dumps([(name, size, Path("/a/b/c") / name) for _ in range(5000)]))))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"h\x00.", b"R.", b"u.", b"\x80\x04\x8c\xffabc", b"]" * 10])
def test_what_is_no_pickle_is_refused(content: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        list(check_pickle(io.BytesIO(content)))
