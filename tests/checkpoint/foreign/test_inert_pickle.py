"""Files are read without running what they say, and without the classes that they name."""

from __future__ import annotations

import fractions
import os
import shutil
import zipfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zeroopt.checkpoint.foreign.inert_pickle import StandIn, load_inert
from zeroopt.errors import StateError


class Stage(IntEnum):
    ONE = 1


@dataclass
class Address:
    numel: int
    start: int


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


IS_OLD = not hasattr(
    torch.serialization, "safe_globals"
)  # torch 2.4 has stand-ins for bytes and for functions of the system


@pytest.mark.parametrize("is_zip", [True, False])
def test_other_classes_are_stood_in_for(tmp_path: Path, is_zip: bool) -> None:
    values = {
        "tensor": torch.arange(5.0),
        "ordered": OrderedDict(a=torch.Size([2, 3])),
        "stage": Stage.ONE,
        "address": Address(3, 4),
        "path": Path("somewhere"),
        "fraction": fractions.Fraction(1, 3),
        "array": np.ones(3),
        "plain": [1, 2.0, "three", None, (True, 4 if IS_OLD else b"4")],
    }
    torch.save(values, tmp_path / "file", _use_new_zipfile_serialization=is_zip)
    read = load_inert(tmp_path / "file")
    assert torch.equal(read["tensor"], values["tensor"])
    assert read["ordered"] == values["ordered"] and read["plain"] == values["plain"]
    assert read["stage"].args == (1,)
    assert read["address"].state == {"numel": 3, "start": 4}
    assert all(isinstance(read[name], StandIn) for name in ("stage", "address", "path", "fraction", "array"))
    assert repr(read["address"]).endswith(".Address>")


@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_is_called(tmp_path: Path, is_zip: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "file"
    calls = [Calls(shutil.copyfile, __file__, str(mark)), Calls(eval, f"open({str(mark)!r}, 'w')")]
    torch.save(calls, path, _use_new_zipfile_serialization=is_zip)
    assert [value.args for value in load_inert(path)] == [call.call[1] for call in calls]
    assert not mark.exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_functions_of_the_system_give_is_nothing(tmp_path: Path, is_zip: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "file"
    # Functions of the system are not even named, and what a function gives cannot be called.
    for call, reason in ((Calls(os.system, f"touch {mark}"), "system"), (Calls(Path.touch, mark), "builtins.getattr")):
        torch.save(call, path, _use_new_zipfile_serialization=is_zip)
        with suppress(StateError) if IS_OLD else pytest.raises(StateError, match=rf"without running code.*{reason}"):
            load_inert(path)
    assert not mark.exists()


@pytest.mark.skipif(IS_OLD, reason="torch 2.5 has such a list in a context")
def test_the_list_of_safe_classes_stays(tmp_path: Path) -> None:
    torch.save(Address(1, 2), tmp_path / "file")
    (tmp_path / "cut").write_bytes((tmp_path / "file").read_bytes()[:200])
    with torch.serialization.safe_globals([Address]):
        known = set(torch.serialization.get_safe_globals())
        assert isinstance(load_inert(tmp_path / "file"), StandIn)  # whether or not it could be imported
        with pytest.raises(StateError, match=r"cannot read .*cut \(200 bytes\)"):
            load_inert(tmp_path / "cut")
        assert set(torch.serialization.get_safe_globals()) == known


def test_files_are_not_changed_by_writing_into_tensors(tmp_path: Path) -> None:
    torch.save(torch.zeros(4), tmp_path / "file")
    load_inert(tmp_path / "file").add_(1)
    assert torch.equal(load_inert(tmp_path / "file"), torch.zeros(4))


def test_what_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    torch.save(Calls(bytearray, 1 << 28), tmp_path / "told")
    with pytest.raises(StateError, match=r"would become 26\d+ bytes in memory"):
        load_inert(tmp_path / "told")
    torch.save("a" * (1 << 20), tmp_path / "file")
    with (
        zipfile.ZipFile(tmp_path / "file") as made,
        zipfile.ZipFile(tmp_path / "compressed", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in made.namelist():
            compressed.writestr(name, made.read(name))
    with pytest.raises(StateError, match="is compressed, which torch.save does not do"):
        load_inert(tmp_path / "compressed")
