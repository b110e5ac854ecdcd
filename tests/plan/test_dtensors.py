"""A rank's part of a DTensor: where it is in the whole, and what of state and gradients belongs to it.

In one process, as one of the ranks of a group in which nothing travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from zeroopt import ConfigError, NotSupportedError, StateError
from zeroopt.plan.dtensors import (
    DistributedParam,
    check_state_parts,
    count_copies,
    describe_part,
    find_mesh,
    is_distributed,
    local_of,
    manage,
    mesh_groups,
    place_in_mesh,
)
from zeroopt.plan.params import ManagedParam

if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
    pytest.skip("needs torch 2.5", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, placement_types

WHOLE = torch.arange(30.0).view(5, 6)
PLACEMENTS = [
    [Replicate(), Replicate()],
    [Shard(0), Replicate()],
    [Replicate(), Shard(1)],
    [Shard(0), Shard(1)],
    [Shard(1), Shard(1)],
    [Shard(0), Shard(0)],
]


# This process is always rank 1, for DTensor remembers who it is in a mesh. So each place needs a mesh of its own.
MESHES = {0: [[1, 0], [2, 3]], 1: [[0, 1], [2, 3]], 2: [[0, 2], [1, 3]], 3: [[0, 2], [3, 1]]}


@contextmanager
def at_place(place: int) -> Iterator[DeviceMesh]:
    """In a mesh of 2 x 2 of the six ranks that there are, this one at (0, 0), (0, 1), (1, 0) or (1, 1)."""
    dist.init_process_group("fake", rank=1, world_size=6, store=FakeStore())
    try:
        yield DeviceMesh("cpu", MESHES[place], mesh_dim_names=("a", "b"))
    finally:
        dist.destroy_process_group()


def cut(whole: Tensor, placements: Sequence[Any], coordinate: Sequence[int]) -> Tensor:
    """The part of a rank, as torch.chunk cuts."""
    for placement, index in zip(placements, coordinate, strict=True):
        if isinstance(placement, Shard):
            chunks = whole.chunk(2, placement.dim)
            whole = chunks[index] if index < len(chunks) else whole.narrow(placement.dim, 0, 0)
    return whole


def distributed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    local = cut(whole, placements, mesh.get_coordinate() or ()).contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def managed_in(mesh: DeviceMesh, placements: Sequence[Any], whole: Tensor = WHOLE) -> DistributedParam:
    made = manage("weight", nn.Parameter(distributed(whole, mesh, placements)), 0, 0, 0)
    assert isinstance(made, DistributedParam)
    return made


def plain() -> ManagedParam:
    return manage("bias", nn.Parameter(torch.ones(3)), 1, 0, 1)


def test_plain_tensors_are_all_of_themselves() -> None:
    one = plain()
    assert type(one) is ManagedParam and (one.name, one.index, one.group, one.position) == ("bias", 1, 0, 1)
    assert not is_distributed(one.param) and not is_distributed(None)
    assert local_of(one.param) is one.param
    assert describe_part(one.param) == ""
    assert count_copies(one, None) == 1
    assert place_in_mesh([one]) == place_in_mesh([]) == "all"
    assert mesh_groups(None) == []
    check_state_parts([one], {one.param: {"exp_avg": torch.zeros(7)}})


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_a_parameter_is_its_part(placements: Sequence[Any], place: int) -> None:
    with at_place(place) as mesh:
        made = managed_in(mesh, placements)
        part = cut(WHOLE, placements, divmod(place, 2))
        assert is_distributed(made.param)
        assert (made.shape, made.numel) == (part.shape, part.numel())
        assert torch.equal(made.local, part) and torch.equal(local_of(made.param), part)
        assert made.address() == made.local.data_ptr()
        layout = made.flat_layout
        assert layout.full_shape == (5, 6) and layout.is_part == (part.shape != WHOLE.shape)
        seen = torch.full((5, 6), -1.0)
        flat = made.flatten(made.local)
        for box in layout.boxes(0, made.numel):
            place = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            seen[place] = layout.view(flat[box.first : box.first + box.numel], box)
        assert torch.equal(seen[seen >= 0], WHOLE[seen >= 0]), "boxes are those of the whole"
        assert int((seen >= 0).sum()) == part.numel()


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("place", [0, 3])
def test_state_comes_whole_or_cut(placements: Sequence[Any], place: int) -> None:
    with at_place(place) as mesh:
        made = managed_in(mesh, placements)
        part = made.local.clone()
        assert torch.equal(made.local_part(WHOLE), part)
        assert torch.equal(made.local_part(part), part)
        assert torch.equal(made.local_part(distributed(WHOLE, mesh, placements)), part)
        step = torch.tensor(3.0)
        assert made.local_part(step) is step


def test_state_of_other_placements_is_refused() -> None:
    with at_place(1) as mesh:
        made = managed_in(mesh, [Shard(0), Replicate()])
        other = distributed(WHOLE, mesh, [Replicate(), Shard(0)])
        with pytest.raises(
            StateError, match=r"'weight' of shape \[5, 6\] is placed .* redistribute it as the parameter"
        ):
            check_state_parts([made, plain()], {made.param: {"step": torch.tensor(1.0), "exp_avg": other}})
        check_state_parts([made], {made.param: {"exp_avg": distributed(WHOLE, mesh, [Shard(0), Replicate()])}})


def test_a_part_without_elements_is_at_the_end() -> None:
    with at_place(0):
        mesh = DeviceMesh("cpu", [0, 2, 3, 1])
        whole, local = torch.zeros(5, 6), torch.zeros(0, 6)
        value = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        made = manage("weight", nn.Parameter(value), 0, 0, 0)
        assert (made.numel, made.flat_layout.corner) == (0, (5, 0))
        assert made.local_part(whole).shape == (0, 6)


def test_parts_that_are_not_one_block_have_no_place_in_the_whole() -> None:
    strided = getattr(placement_types, "_StridedShard", None)
    if strided is None:
        pytest.skip("this torch has no such placement")
    with at_place(1) as mesh:
        local = WHOLE[:3]
        value = DTensor.from_local(local, mesh, [strided(0, split_factor=2), Replicate()], run_check=False)
        made = manage("weight", nn.Parameter(value), 0, 0, 0)
        assert torch.equal(made.local_part(torch.ones(3, 6)), torch.ones(3, 6))
        with pytest.raises(
            NotSupportedError, match="of which checkpoints cannot say where its parts are; redistribute"
        ):
            _ = made.flat_layout
        with pytest.raises(
            StateError, match="'weight' is placed .*: its state has to come as DTensors or local tensors"
        ):
            made.local_part(torch.zeros(made.param.shape))


def test_moving_into_a_bucket_of_another_dtype() -> None:
    with at_place(2) as mesh:
        made = managed_in(mesh, [Shard(0), Replicate()])
        param, flat = made.param, torch.zeros(40, dtype=torch.bfloat16)
        made.offset = 5
        view = made.view_in(flat)
        view.copy_(made.local)
        made.set_local(view)
        assert made.param is param and is_distributed(param) and param.dtype is torch.bfloat16
        assert param.shape == (5, 6)
        assert made.address() == view.data_ptr()
        assert torch.equal(made.local.float(), WHOLE[3:])
        assert made.layout_like(view).dtype is torch.bfloat16
        made.set_local(view.float())
        assert param.dtype is torch.float32 and local_of(param).dtype is torch.float32


def test_gradients_are_cut_as_the_parameter_is() -> None:
    with at_place(1) as mesh:
        placements = [Replicate(), Shard(0)]
        made = managed_in(mesh, placements)
        assert made.local_grad() is None
        made.set_local_grad(torch.ones(2, 6))
        grad = made.param.grad
        assert is_distributed(grad) and grad.shape == (5, 6) and grad.placements == tuple(placements)
        assert torch.equal(made.local_grad(), torch.ones(2, 6))  # type: ignore[arg-type]
        whole = distributed(WHOLE, mesh, [Replicate(), Replicate()])
        assert torch.equal(made.aligned(whole), WHOLE[3:])
        made.param.grad = whole
        assert torch.equal(made.local_grad(), WHOLE[3:])  # type: ignore[arg-type]
        assert made.param.grad.placements == tuple(placements)


@pytest.mark.parametrize("aligned", [True, False])
def test_gradients_arrive_cut_as_the_parameter_is(aligned: bool) -> None:
    with at_place(1) as mesh:
        made = managed_in(mesh, [Replicate(), Replicate()])
        if aligned:
            made.align_gradients()
        made.param.to_local(grad_placements=[Replicate(), Partial()]).sum().backward()
        assert made.param.grad is not None
        is_aligned = made.param.grad.placements == made.param.placements
        if is_aligned and not aligned:
            pytest.skip("this torch cuts such gradients by itself, as 2.9 does")
        assert is_aligned == aligned


def test_a_plain_gradient_of_a_dtensor_is_refused() -> None:
    with at_place(0) as mesh:
        made = managed_in(mesh, [Shard(0), Replicate()])
        made.param.grad = torch.ones(5, 6)
        with pytest.raises(StateError, match="'weight' is a DTensor, so its gradient has to be one; got Tensor"):
            made.local_grad()


@pytest.mark.parametrize(
    ("placements", "copies"),
    [
        ([Replicate(), Replicate()], 4),
        ([Shard(0), Replicate()], 2),
        ([Replicate(), Shard(1)], 2),
        ([Shard(0), Shard(1)], 1),
    ],
    ids=str,
)
def test_copies_are_counted_along_what_is_not_sharded(placements: Sequence[Any], copies: int) -> None:
    with at_place(0) as mesh:
        assert count_copies(managed_in(mesh, placements), mesh) == copies
        assert count_copies(plain(), mesh) == 4, "a plain parameter of such a model is on all ranks"


def test_who_a_rank_is_in_a_mesh() -> None:
    with at_place(2) as mesh:
        made = managed_in(mesh, [Shard(0), Replicate()])
        assert place_in_mesh([plain(), made]) == "[1, 0] in a mesh of [2, 2]"
        described = describe_part(made.param)
        assert described.startswith(
            ", the part at [1, 0] of shape [5, 6] on a mesh of [2, 2] with placements [Shard(dim=0)"
        )
        assert [(group.size, group.rank) for group in mesh_groups(mesh)] == [(2, 1), (2, 0)]


def test_dimensions_of_one_rank_have_no_group() -> None:
    with at_place(1):
        mesh = DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("a", "b"))
        assert [group.size for group in mesh_groups(mesh)] == [2]


def net_of(**tensors: Tensor) -> nn.Module:
    net = nn.Module()
    for name, value in tensors.items():
        if name.startswith("buffer"):
            net.register_buffer(name, value)
        else:
            net.register_parameter(name, nn.Parameter(value))
    return net


def test_the_mesh_of_a_model() -> None:
    with at_place(1) as mesh:
        group = dist.new_group([1, 4])
        assert find_mesh(net_of(a=torch.ones(3)), group) is None
        whole = distributed(WHOLE, mesh, [Shard(0), Replicate()])
        assert find_mesh(net_of(a=torch.ones(3), b=whole), group) == mesh
        assert find_mesh(net_of(a=torch.ones(3), buffer=whole), group) == mesh


def test_meshes_that_cannot_be_trained_on() -> None:
    with at_place(1) as mesh:
        group = dist.new_group([1, 4])
        sharded = distributed(WHOLE, mesh, [Shard(0), Replicate()])
        with pytest.raises(
            NotSupportedError, match=r"'sum' is a DTensor with placements \[.*Partial.*\]; redistribute"
        ):
            find_mesh(net_of(sum=DTensor.from_local(WHOLE, mesh, [Partial(), Replicate()], run_check=False)), group)
        with pytest.raises(
            ConfigError, match=r"'w' is a DTensor on .*, which holds ranks \[1, 3\] of the process group"
        ):
            find_mesh(net_of(w=sharded), dist.new_group([1, 3, 5]))
        other = distributed(WHOLE, DeviceMesh("cpu", [0, 1]), [Shard(0)])
        with pytest.raises(
            NotSupportedError, match="expected all DTensors of a model on one device mesh, got 'w' on .*'v'"
        ):
            find_mesh(net_of(w=sharded, v=other), group)
