"""Whatever ranges several ranks write, any other ranges read the same elements."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from written_checkpoints import shard, whole

from zeroopt import CheckpointError
from zeroopt.checkpoint.format.planning import ShardSavePlanner
from zeroopt.checkpoint.format.reading import Checkpoint, open_checkpoint
from zeroopt.checkpoint.format.writing import _PartWriter

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64]


def write_as_ranks(directory: Path, entries: Sequence[dict[str, Any]]) -> Checkpoint:
    """What ranks with these entries write, in one process and without a manifest."""
    planners = [ShardSavePlanner(mine, is_coordinator=rank == 0) for rank, mine in enumerate(entries)]
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    writers = [_PartWriter(directory, rank) for rank in range(len(entries))]
    parts = [
        writer.write_part(plan, planner, {})[0] for writer, plan, planner in zip(writers, plans, planners, strict=True)
    ]
    writers[0].finish(metadata, parts)
    return open_checkpoint(directory)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any shape with up to four dimensions, in any order in memory."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    numbers = torch.arange(-3, int(torch.Size(shape).numel()) - 3, dtype=draw(st.sampled_from(DTYPES)))
    in_memory = numbers.view([shape[dim] for dim in order])
    return in_memory.permute(sorted(range(len(order)), key=order.__getitem__))


@st.composite
def cuts(draw: st.DrawFn, numel: int) -> list[tuple[int, int]]:
    """Ranges of one to four ranks that make up all elements."""
    inner = sorted(draw(st.lists(st.integers(0, numel), max_size=3)))
    return list(zip([0, *inner], [*inner, numel], strict=True))


@given(st.data())
def test_elements_come_back_whoever_wrote_and_whoever_reads_them(data: st.DataObject) -> None:
    saved = data.draw(st.lists(tensors(), min_size=1, max_size=3))
    written = [data.draw(cuts(tensor.numel())) for tensor in saved]
    world_size = max(map(len, written))
    entries: list[dict[str, Any]] = [{"model": {}} for _ in range(world_size)]
    for number, (tensor, ranges) in enumerate(zip(saved, written, strict=True)):
        for rank, (start, stop) in enumerate(ranges):
            entries[rank]["model"][f"t{number}"] = shard(tensor, start, stop)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_as_ranks(Path(directory), entries)
        checkpoint.verify(None)
        for number, tensor in enumerate(saved):
            key = f"model.t{number}"
            full = torch.zeros(tensor.shape, dtype=tensor.dtype)
            assert checkpoint.read({key: full}) == {}
            assert torch.equal(full, tensor)
            for start, stop in data.draw(cuts(tensor.numel())):
                part = shard(torch.zeros_like(tensor), start, stop)
                checkpoint.read({key: part})
                assert torch.equal(part.local, shard(tensor, start, stop).local)


def test_what_all_ranks_have_is_written_once(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    entries = {"a": tensor, "b": tensor[1:3], "n": {"lr": 0.1, "all": shard(tensor, 0, 4)}}
    checkpoint = write_as_ranks(tmp_path, [entries] * 3)
    assert len(checkpoint.metadata.storage_data) == 4
    targets = {"a": torch.zeros(4), "b": torch.zeros(2), "n.all": torch.zeros(4)}
    assert checkpoint.read({**targets, "n.lr": None}) == {"n.lr": 0.1}
    assert [target.tolist() for target in targets.values()] == [[0, 1, 2, 3], [1, 2], [0, 1, 2, 3]]


def test_values_are_converted(tmp_path: Path) -> None:
    target = torch.zeros(4, dtype=torch.bfloat16)
    write_as_ranks(tmp_path, [{"a": torch.arange(4.0)}]).read({"a": target})
    assert target.tolist() == [0, 1, 2, 3]


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.extra is a builtins.function"):
        write_as_ranks(tmp_path, [{"model": {"extra": lambda: 1}}])


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_the_ranks_do_not_have_together_is_not_saved(ranks: int, tmp_path: Path) -> None:
    parts = [{"weight": shard(whole(1), 0, 20)}, {"weight": shard(whole(1), 20, 34)}][:ranks]
    with pytest.raises(
        CheckpointError, match=f"the ranks together give {[20, 34][ranks - 1]} of the 35 elements of 'weight'"
    ):
        write_as_ranks(tmp_path, parts)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"weight": shard(torch.zeros(5, 7), 0, 9), "bias": torch.zeros(5)}, "the checkpoint has no 'bias'"),
        ({"weight": torch.zeros(7, 5)}, r"'weight' has shape \[5, 7\] in the checkpoint, and \[7, 5\] was expected"),
        ({"weight": shard(torch.zeros(7, 5), 0, 9)}, r"'weight' has shape \[5, 7\] in the checkpoint, and \[7, 5\]"),
        ({"weight": None}, "'weight' is a tensor in the checkpoint, and a NoneType was given"),
        ({"lr": None, "weight": torch.zeros(5, 7)}, "the checkpoint has 30 of the 35 elements of 'weight'"),
        ({"weight": shard(torch.zeros(5, 7), 0, 31)}, "the checkpoint has 30 of the 31 elements of 'weight'"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_read(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    parts = [{"weight": shard(whole(1), 0, 30), "lr": 0.1}, {"weight": shard(whole(1), 30, 35)}]
    checkpoint = write_as_ranks(tmp_path, parts)
    saved = checkpoint.metadata.state_dict_metadata["weight"]
    saved.chunks = [chunk for chunk in saved.chunks if tuple(chunk.offsets) != (4, 2)]  # as if rank 1 had given nothing
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(entries)
    assert not any(tensor.any() for tensor in entries.values() if type(tensor) is Tensor)
    part = shard(torch.zeros(5, 7), 2, 30)
    checkpoint.read({"weight": part})
    assert torch.equal(part.local, whole(1).flatten()[2:30])
