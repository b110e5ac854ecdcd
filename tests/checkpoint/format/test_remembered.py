"""What ranks know of the last checkpoint they tell no more, and the next one is whole all the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import RunOnRanks
from written_checkpoints import entries, version_of, whole, write

from zeroopt import CheckpointError
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.format.remembered import Remembered
from zeroopt.checkpoint.format.writing import write_checkpoint
from zeroopt.collectives import ControlGroup

FEW_BYTES = 700  # the record of a file, the number of a save


class Collected:
    """Within it, how many bytes this rank sends to rank 0 each time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        collect = ControlGroup.collect

        def noting(control: ControlGroup, value: Any, to: int, what: str) -> Any:
            self.sizes.append(len(pickle.dumps(value)))
            return collect(control, value, to, what)

        self._patch = patch.object(ControlGroup, "collect", noting)

    def __enter__(self) -> list[int]:
        self._patch.start()
        return self.sizes

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def save_thrice(path: Path, between: Callable[[Remembered], None]) -> list[list[int]]:
    """What is sent in each of three saves, before the third of which something happens."""
    known = Remembered()
    sizes = []
    for version in range(1, 4):
        if version == 3:
            between(known)
        with Collected() as sent:
            write(path, version, dist.group.WORLD, remembered=known)
        sizes.append(sent)
        dist.barrier()
        assert version_of(path) == version
        dist.barrier()
    return sizes


def nothing(known: Remembered) -> None:
    pass


def rank_1_forgets(known: Remembered) -> None:
    if dist.get_rank() == 1:
        known.forget()


def rank_0_forgets(known: Remembered) -> None:
    if dist.get_rank() == 0:
        known.forget()


def a_save_fails(known: Remembered) -> None:
    with pytest.raises(CheckpointError):
        write(Path("/proc/nowhere"), 9, dist.group.WORLD, remembered=known)
    assert known.number is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_second_save_tells_little(world_size: int, tmp_path: Path, run_on_ranks: RunOnRanks) -> None:
    for first, second, third in run_on_ranks(world_size, save_thrice, tmp_path / "a", nothing):
        assert len(first) == len(second) == len(third) == 2  # plans, and what was written
        assert first[0] > FEW_BYTES
        assert max(*second, *third) < FEW_BYTES


@pytest.mark.parametrize(("happens", "rounds"), [(rank_1_forgets, 3), (rank_0_forgets, 3), (a_save_fails, 2)])
def test_where_one_rank_knows_nothing_all_tell_all(
    happens: Callable[[Remembered], None], rounds: int, tmp_path: Path, run_on_ranks: RunOnRanks
) -> None:
    for first, _, third in run_on_ranks(2, save_thrice, tmp_path / "a", happens):
        assert len(third) == rounds
        assert third[-2:] == pytest.approx(first, abs=100)


def change(path: Path) -> list[Any]:
    """Saves with a value that gets longer on rank 0, whose file changes, then with a further tensor on all ranks."""
    rank, size, known, found = dist.get_rank(), dist.get_world_size(), Remembered(), []
    for number, note in enumerate(["a", "a", "a" * 1000, "b", "b"]):
        given = entries(1, rank, size)
        given["note"] = note
        if number >= 3:
            given["more"] = torch.full((3,), float(number))
        write_checkpoint(path, given, {"version": 1}, {}, dist.group.WORLD, remembered=known)
        dist.barrier()
        checkpoint = open_checkpoint(path)
        checkpoint.verify(None)
        weight, more = torch.empty(5, 7), torch.empty(3)
        wanted: dict[str, Tensor | None] = {
            "model.weight": weight,
            "note": None,
            **({"more": more} if number >= 3 else {}),
        }
        values = checkpoint.read(wanted)
        found.append((values["note"], float(weight.sum()), float(more[0]) if number >= 3 else None))
        dist.barrier()
    return found


def test_what_changes_is_told(tmp_path: Path, run_on_ranks: RunOnRanks) -> None:
    total = float(whole(1).sum())
    notes = ["a", "a", "a" * 1000, "b", "b"]
    expected = [(note, total, None if number < 3 else float(number)) for number, note in enumerate(notes)]
    assert run_on_ranks(2, change, tmp_path / "a") == [expected] * 2
