"""ShardTensor: copied and saved like a tensor, understood by torch.distributed.checkpoint, and refused by all else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from worker_pool import RunOnRanks

from zeroopt.errors import StateError
from zeroopt.plan.regions import FlatLayout
from zeroopt.state.shard_tensor import OwnTensor, ShardTensor

LAYOUT = FlatLayout.of([4, 5], [5, 1])


def shard(start: int = 3, stop: int = 17, **options: Any) -> ShardTensor:
    """Elements of a 4 x 5 matrix that is numbered."""
    return ShardTensor(LAYOUT, start, torch.arange(20.0)[start:stop], **options)


def test_shows_the_whole_tensors_shape() -> None:
    one = shard()
    assert isinstance(one, Tensor) and one.shape == (4, 5) and one.dtype is torch.float32 and one.numel() == 20
    assert (one.start, one.stop) == (3, 17)
    assert torch.equal(one.local, torch.arange(3.0, 17.0))
    assert [view.tolist() for view in map(one.view_of, one.boxes)] == [
        [[3.0, 4.0]],
        [[5.0, 6.0, 7.0, 8.0, 9.0], [10.0, 11.0, 12.0, 13.0, 14.0]],
        [[15.0, 16.0]],
    ]
    assert one.data_ptr() == 0
    assert repr(one).startswith("ShardTensor(elements 3 to 17 of shape=[4, 5], dtype=torch.float32, local=tensor(")


def test_views_share_memory() -> None:
    one = shard()
    one.view_of(one.boxes[1]).fill_(-1)
    assert one.local.tolist() == [3, 4, *[-1] * 10, 15, 16]


COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": lambda value: value.clone(),
    "deepcopy": copy.deepcopy,
    "to": lambda value: value.to("cpu", copy=True),
    "detached": lambda value: value.detach().to("cpu", copy=True),
    "channels_last": lambda value: value.clone(memory_format=torch.preserve_format),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_copies_have_memory_of_their_own(name: str, inference: bool) -> None:
    one = shard()
    for kind in (one, OwnTensor(torch.arange(6).view(2, 3))):
        with torch.inference_mode(inference):
            copied = COPIES[name](kind)
        assert type(copied) is type(kind) and copied.shape == kind.shape
        assert copied.start == kind.start and copied.flat_layout == kind.flat_layout
        assert torch.equal(copied.local, kind.local)
        kind.local.zero_()
        assert copied.local.any()


def test_detach_and_conversion() -> None:
    one = shard()
    detached = one.detach()
    assert detached.local.data_ptr() == one.local.data_ptr()
    narrow = one.to(torch.bfloat16)
    assert isinstance(narrow, ShardTensor) and narrow.dtype is narrow.local.dtype is torch.bfloat16
    assert narrow.local.tolist() == one.local.tolist()
    fresh = one.new_empty(one.shape)
    assert isinstance(fresh, ShardTensor) and fresh.local.shape == one.local.shape
    assert fresh.local.data_ptr() != one.local.data_ptr()


def test_one_object_is_copied_once() -> None:
    one = shard()
    first, second = copy.deepcopy([one, one])
    assert first is second


def test_saved_as_a_plain_tensor() -> None:
    one = shard()
    own = OwnTensor(torch.tensor([[1, 2], [3, 4]]))
    file = io.BytesIO()
    torch.save({"one": one, "own": own}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["one"]) is type(loaded["own"]) is Tensor
    assert torch.equal(loaded["one"], one.local)
    assert loaded["own"].tolist() == [[1, 2], [3, 4]]
    assert torch.equal(pickle.loads(pickle.dumps(one)), one.local)


@pytest.mark.parametrize(
    "operation",
    [
        lambda one: one + 1,
        lambda one: one.sum(),
        lambda one: one.mul_(2),
        lambda one: one[0],
        lambda one: one.view(-1),
        lambda one: one.new_empty([2]),
        lambda one: torch.zeros(4, 5).copy_(one),
        lambda one: torch.cat([one, one]),
        lambda one: torch.zeros(2).add(one),
    ],
)
def test_computing_is_refused(operation: Callable[[Any], Any]) -> None:
    for one in (shard(), OwnTensor(torch.zeros(3))):
        with pytest.raises(
            StateError, match=r"of a ShardTensor: .* call optimizer.consolidate_state_dict\(\) on all ranks"
        ):
            operation(one)
    assert torch.equal(shard().local, torch.arange(3.0, 17.0))


def test_read_when_asked() -> None:
    calls = []

    def read(begin: int, end: int) -> Tensor:
        calls.append((begin, end))
        return torch.arange(3.0 + begin, 3.0 + end, dtype=torch.float64)

    one = ShardTensor(LAYOUT, 3, torch.empty(14, dtype=torch.int8), read, torch.float64)
    assert one.dtype is torch.float64 and one.stop == 17 and calls == []
    assert one.view_of(one.boxes[2]).tolist() == [[15.0, 16.0]]
    assert calls == [(12, 14)]
    assert one.local.tolist() == list(range(3, 17))
    assert one.clone().local.dtype is torch.float64


# torch.distributed.checkpoint

CUTS = {1: [0, 20], 2: [0, 3, 20], 3: [0, 3, 17, 20], 4: [0, 3, 3, 17, 20]}


def own_part(rank: int, world_size: int, value: float | None = None) -> dict[str, Any]:
    start, stop = CUTS[world_size][rank], CUTS[world_size][rank + 1]
    own = OwnTensor(torch.full((2 + rank,), float(rank)))
    one = shard(start, stop)
    if value is not None:
        one.local.fill_(value)
    # A rank that has nothing of a tensor has no key for it either.
    return {"own": own, **({"x": {"exp_avg": one}} if stop > start else {})}


def save_part(path: str) -> None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dcp.save(own_part(rank, world_size), checkpoint_id=path)


def load_part(path: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """This rank's elements, its own tensor, and the whole in a plain one."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = own_part(rank, world_size, -1.0)
    dcp.load(mine, checkpoint_id=path)
    plain = {"x": {"exp_avg": torch.zeros(4, 5)}}
    dcp.load(plain, checkpoint_id=path)
    return mine["x"]["exp_avg"].local.clone() if "x" in mine else None, mine["own"].local, plain["x"]["exp_avg"]


def test_any_ranks_load_what_any_ranks_saved(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for saved in (1, 3, 4):
        path = str(tmp_path / str(saved))
        run_on_ranks(saved, save_part, path)
        for world_size in (1, 2, 3):
            for rank, (mine, own, plain) in enumerate(run_on_ranks(world_size, load_part, path)):
                begin, end = CUTS[world_size][rank : rank + 2]
                assert mine is not None and torch.equal(mine, torch.arange(20.0)[begin:end])
                assert own.tolist() == [rank] * (2 + rank), "what is of one rank alone was overwritten"
                assert torch.equal(plain, torch.arange(20.0).view(4, 5))
