"""Memory with two slots, of which one is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from paths import PYTHON_PATH

from zeroopt.elastic.place import MEMORY, bytes_in
from zeroopt.elastic.slots import NOT_WHOLE, Slots


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory of the file system in memory."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_what_was_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    made = Slots.make(tmp_path / "file", b"table" * 2000, 5000)
    assert made.steps == (NOT_WHOLE, NOT_WHOLE)
    for step in (1, 2, 3):
        slot = made.older
        made.begin(slot)[:] = step
        assert made.steps[slot] == NOT_WHOLE
        made.finish(slot, step)
    opened = Slots.open(tmp_path / "file")
    assert opened.table == b"table" * 2000
    assert opened.steps == (3, 2) and opened.older == 1 and opened.slot_of(1) is None
    assert opened.bytes_of(0).tolist() == [3] * opened.slot_bytes and opened.slot_bytes >= 5000
    assert opened.bytes_of(1).tolist() == [2] * opened.slot_bytes


def test_what_is_only_to_be_read_takes_one_slot(tmp_path: Path) -> None:
    made = Slots.make(tmp_path / "file", b"table", 5000, slots=1)
    made.begin(0)[:] = 7
    made.finish(0, 4)
    opened = Slots.open(tmp_path / "file")
    assert opened.slot_of(4) == 0 and set(opened.bytes_of(0).tolist()) == {7}
    two = Slots.make(tmp_path / "two", b"table", 5000)
    assert (tmp_path / "file").stat().st_size == opened.bytes_with_one == two.bytes_with_one


def test_no_more_than_what_is_asked_for_takes_memory(in_memory: Path) -> None:
    size = 1 << 20
    made = Slots.make(in_memory / "file", b"table", size)
    head = made.bytes_with_one - size
    assert bytes_in(in_memory) == head + size
    made.begin(0)[:] = 1
    made.finish(0, 1)
    made.take_second()
    assert bytes_in(in_memory) == head + 2 * size
    made.begin(1)[:] = 2
    made.finish(1, 2)
    made.give_back(all_but=2)
    assert bytes_in(in_memory) == head + size
    left = Slots.open(in_memory / "file")
    assert left.steps == (NOT_WHOLE, 2) and set(left.bytes_of(1).tolist()) == {2}
    left.forget()
    assert made.steps == (NOT_WHOLE, NOT_WHOLE)


def test_of_one_slot_nothing_is_given_back(in_memory: Path) -> None:
    made = Slots.make(in_memory / "file", b"table", 5000, slots=1)
    made.begin(0)[:] = 7
    made.finish(0, 4)
    made.give_back(all_but=4)
    assert set(Slots.open(in_memory / "file").bytes_of(0).tolist()) == {7}


def test_without_memory_nothing_is_left(tmp_path: Path) -> None:
    full = patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(OSError, match="No space left"):
        Slots.make(tmp_path / "file", b"", 1)
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    with pytest.raises(OSError, match="is no file of slots"):
        Slots.open(tmp_path / "file")


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    from zeroopt.elastic.slots import Slots

    slots = Slots.make(Path(sys.argv[1]), b"", 100)
    slots.begin(0)[:] = 7
    slots.finish(0, 7)
    slots.begin(1)[:50] = 8
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_slot(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "file")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    left = Slots.open(tmp_path / "file")
    assert left.steps == (7, NOT_WHOLE)
    assert set(left.bytes_of(0).tolist()) == {7}
