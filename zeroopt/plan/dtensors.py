"""Parameters under tensor parallelism: `torch.distributed.tensor.DTensor`s, of which a rank holds one local tensor.

zeroopt works on local tensors alone. The ranks of a data-parallel group hold the same part of every parameter, so for them
local tensors are like the parameters of a smaller model; what happens between the parts is DTensor's business. All that
zeroopt has to know of DTensors is here. Importing DTensor takes long: who has none does not pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives import ControlGroup
from ..errors import ConfigError, NotSupportedError, StateError
from ..own_storage import with_own_storage
from .params import ManagedParam
from .regions import FlatLayout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_distributed(value: object) -> bool:
    """Whether something is a DTensor. In torch 2.4, which has them elsewhere, nothing is."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local_of(value: Tensor) -> Tensor:
    """What this rank holds of a tensor: the tensor itself, unless it is a DTensor. Shares its memory."""
    if not is_distributed(value):
        return value
    local = cast("DTensor", value)._local_tensor
    # The result of a collective may be one that somebody has to wait for.
    return cast(Tensor, local.wait()) if hasattr(local, "wait") else local


def describe_part(value: Tensor) -> str:
    """Which part of a DTensor a rank holds, as text that is the same on all data-parallel ranks; "" for other tensors."""
    if not is_distributed(value):
        return ""
    tensor = cast("DTensor", value)
    mesh = tensor.device_mesh
    return (
        f", the part at {_coordinate(mesh)} of shape {list(tensor.shape)} on a mesh of {list(mesh.shape)} "
        f"with placements {list(tensor.placements)}"
    )


def manage(name: str, param: nn.Parameter, index: int, group: int, position: int) -> ManagedParam:
    """The ManagedParam or DistributedParam for a parameter."""
    kind = DistributedParam if is_distributed(param) else ManagedParam
    return kind(name, param, index, group, position)


class DistributedParam(ManagedParam):
    """A DTensor that zeroopt trains. `shape`, `stride` and `numel` are those of this rank's local tensor."""

    @property
    def local(self) -> Tensor:
        return self._dtensor._local_tensor

    def set_local(self, view: Tensor) -> None:
        local = with_own_storage(view)
        if local.dtype is not self.param.dtype:
            self._set_dtype(local)
        self._dtensor._local_tensor = local

    def _set_dtype(self, local: Tensor) -> None:
        """Make the parameter, which stays the same object, a DTensor of another dtype."""
        module = sys.modules["torch.distributed.tensor"]
        old = self._dtensor
        cast_to: DTensor = module.DTensor.from_local(
            local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
        self.param.data = cast_to  # the outside: dtype and autograd's view of it
        self._dtensor._spec = cast_to._spec

    @property
    def address(self) -> Callable[[], int]:
        return lambda: self._dtensor._local_tensor.data_ptr()

    def local_grad(self) -> Tensor | None:
        grad = self.param.grad
        if grad is None:
            return None
        if not is_distributed(grad):
            raise StateError(
                f"parameter {self.name!r} is a DTensor, so its gradient has to be one; got {type(grad).__name__}"
            )
        _match_placements(self.param)
        assert self.param.grad is not None
        return local_of(self.param.grad)

    def set_local_grad(self, view: Tensor) -> None:
        self.param.grad = self.layout_like(view)

    def layout_like(self, local: Tensor) -> Tensor:
        module = sys.modules["torch.distributed.tensor"]
        return cast(Tensor, module.DTensor(with_own_storage(local), self._dtensor._spec, requires_grad=False))

    @property
    def flat_layout(self) -> FlatLayout:
        param = self._dtensor
        return FlatLayout.of(self.shape, self.stride, param.shape, _corner(param))

    def aligned(self, grad: Tensor) -> Tensor:
        dtensor = cast("DTensor", grad)
        placements = self._dtensor.placements
        return local_of(dtensor if dtensor.placements == placements else dtensor.redistribute(placements=placements))

    def align_gradients(self) -> None:
        self.param.register_post_accumulate_grad_hook(_match_placements)  # type: ignore[no-untyped-call]

    def local_part(self, value: Tensor) -> Tensor:
        param = self._dtensor
        if value.shape != param.shape:
            return local_of(value)  # cut already, or one number for all elements
        if not is_distributed(value):
            return value if value.shape == self.shape else self._cut(value)
        state = cast("DTensor", value)
        if (state.placements, state.device_mesh) != (param.placements, param.device_mesh):
            raise StateError(
                f"parameter {self.name!r} of shape {list(param.shape)} is placed {list(param.placements)} on "
                f"{param.device_mesh}, its state {list(state.placements)} on {state.device_mesh}: redistribute it as the "
                "parameter is, or give the full tensor"
            )
        return local_of(value)

    def _cut(self, full: Tensor) -> Tensor:
        """This rank's part of a tensor of the global shape: chunk after chunk, as DTensor cuts."""
        mesh = self._dtensor.device_mesh
        for size, index, placement in zip(mesh.shape, _coordinate(mesh), self._dtensor.placements, strict=True):
            if placement.is_replicate():
                continue
            if not _is_plain_shard(placement):
                raise StateError(
                    f"parameter {self.name!r} is placed {placement}: its state has to come as DTensors or local tensors, "
                    "not as full tensors"
                )
            dim = cast(Any, placement).dim
            chunks = full.chunk(size, dim)
            full = chunks[index] if index < len(chunks) else full.narrow(dim, 0, 0)
        return full

    @property
    def _dtensor(self) -> DTensor:
        return cast("DTensor", self.param)


@torch.no_grad()
def _match_placements(param: Tensor) -> None:
    """Let a gradient have its parameter's placements. The hook of each DTensor: collective in the parameter's mesh.

    A parameter that is replicated, but was used on a part of a sequence, has a gradient that has yet to be summed (Partial).
    That is done here, when the gradient arrives, because it is then that all ranks of the mesh do the same in the same order.
    """
    if not is_distributed(param.grad):  # the object of stages 1 and 2, which aligns what it takes up
        return
    param, grad = cast("DTensor", param), cast("DTensor", param.grad)
    if grad.placements != param.placements:
        param.grad = grad.redistribute(placements=param.placements)


def find_mesh(model: nn.Module, group: dist.ProcessGroup) -> DeviceMesh | None:
    """The device mesh of a model's DTensors, None where there are none. Not collective.

    Raises:
        ConfigError: DTensors on a mesh that contains other ranks of the data-parallel group.
        NotSupportedError: DTensors on several meshes, or sums that are still to be taken (Partial).
    """
    found: dict[DeviceMesh, str] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not is_distributed(value):
            continue
        tensor = cast("DTensor", value)
        if any(placement.is_partial() for placement in tensor.placements):
            raise NotSupportedError(
                f"{name!r} is a DTensor with placements {list(tensor.placements)}; redistribute it, for parameters can only "
                "be sharded or replicated"
            )
        found.setdefault(tensor.device_mesh, name)
    for mesh, name in found.items():
        _check_mesh(mesh, name, group)
    if len(found) > 1:
        places = ", ".join(f"{name!r} on {mesh}" for mesh, name in found.items())
        raise NotSupportedError(f"expected all DTensors of a model on one device mesh, got {places}")
    return next(iter(found), None)


def _check_mesh(mesh: DeviceMesh, name: str, group: dist.ProcessGroup) -> None:
    shared = set(mesh.mesh.flatten().tolist()) & set(dist.get_process_group_ranks(group))
    if shared - {dist.get_rank()}:
        raise ConfigError(
            f"{name!r} is a DTensor on {mesh}, which holds ranks {sorted(shared)} of the process group that zeroopt trains "
            "over. zeroopt replicates over that group, and takes DTensors that are distributed over other ranks only: give "
            "the data-parallel dimension of the device mesh as process_group, and do not use fully_shard, FSDP or replicate"
        )


def mesh_groups(mesh: DeviceMesh | None) -> list[ControlGroup]:
    """The groups of this rank along the dimensions of a mesh, without those of one rank."""
    groups = [] if mesh is None else [ControlGroup(mesh.get_group(dim)) for dim in range(mesh.ndim)]
    return [group for group in groups if group.size > 1]


def count_copies(managed: ManagedParam, mesh: DeviceMesh | None) -> int:
    """On how many ranks of the mesh each element of a parameter lies. A plain parameter of a model with DTensors is on all."""
    if mesh is None:
        return 1
    copies = 1
    placements = cast("DTensor", managed.param).placements if is_distributed(managed.param) else [None] * mesh.ndim
    for size, placement in zip(mesh.shape, placements, strict=True):
        copies *= size if placement is None or placement.is_replicate() else 1
    return copies


def place_in_mesh(params: Iterable[ManagedParam]) -> str:
    """Which parts of the parameters this rank holds: "all", or its place in the mesh of its DTensors."""
    for managed in params:
        if is_distributed(managed.param):
            mesh = cast("DTensor", managed.param).device_mesh
            return f"{_coordinate(mesh)} in a mesh of {list(mesh.shape)}"
    return "all"


def check_state_parts(params: Sequence[ManagedParam], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Raise StateError when state that an optimizer already has is not distributed as its parameters are."""
    for managed in params:
        for value in state.get(managed.param, {}).values():
            if isinstance(value, Tensor):
                managed.local_part(value)


def _coordinate(mesh: DeviceMesh) -> list[int]:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank has no parameters on a mesh that it is not in"
    return list(coordinate)


def _corner(tensor: DTensor) -> list[int]:
    """Where the first element of this rank's part is in the whole."""
    corner, sizes = [0] * tensor.dim(), list(tensor.shape)
    mesh = tensor.device_mesh
    for count, index, placement in zip(mesh.shape, _coordinate(mesh), tensor.placements, strict=True):
        if placement.is_replicate():
            continue
        if not _is_plain_shard(placement):
            raise NotSupportedError(
                f"a DTensor of shape {list(tensor.shape)} is placed {placement}, of which checkpoints cannot say where its parts "
                "are; redistribute it"
            )
        dim = cast(Any, placement).dim
        chunk = -(-sizes[dim] // count)  # as torch.chunk cuts
        before = min(chunk * index, sizes[dim])
        corner[dim] += before
        sizes[dim] = min(chunk, sizes[dim] - before)
    return corner


def _is_plain_shard(placement: Any) -> bool:
    return type(placement) is sys.modules["torch.distributed.tensor"].Shard
