"""What stands in a state dict for a tensor of which this rank has a part."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import StateError
from ..plan.regions import Box, FlatLayout

aten = torch.ops.aten

_COPIES = {aten.detach.default, aten.clone.default, aten._to_copy.default, aten.lift_fresh.default}


def _protocol() -> tuple[type, ...]:
    """torch 2.4 knows what torch.distributed.checkpoint understands by a base class, later ones by the names of methods."""
    if find_spec("torch.distributed._checkpointable") is not None:
        return ()
    from torch.distributed.checkpoint import planner

    return (vars(planner)["_Checkpointable"],)


class ShardTensor(Tensor, *_protocol()):  # type: ignore[misc]
    """A range of the elements of a tensor that several ranks hold together.

    It has the shape of the whole, and is understood by torch.distributed.checkpoint, which saves each rank's part as boxes
    of the whole, and loads into it from whatever boxes a checkpoint has. Copying it works; `torch.save` writes `local`, as a
    plain tensor; computing with it raises.

    Attributes:
        flat_layout: of the tensor whose elements are counted by `start`.
        start: the first element of this rank.
        local: this rank's elements, 1-D. With `read`, new memory each time.
    """

    flat_layout: FlatLayout
    start: int
    _local: Tensor
    _read: Callable[[int, int], Tensor] | None

    @staticmethod
    def __new__(  # noqa: PYI034  a static method has no Self
        cls,
        layout: FlatLayout,
        start: int,
        local: Tensor,
        read: Callable[[int, int], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> ShardTensor:
        """Make one.

        Args:
            local: 1-D; with `read` only its device and number of elements count.
            read: gives elements [begin, end) of `local`, 1-D, computed when they are asked for.
            dtype: of what it gives, where that is another one.
        """
        with torch.inference_mode(mode=False):  # whose tensors torch cannot detach where a class answers for them
            made: ShardTensor = Tensor._make_wrapper_subclass(
                cls, layout.full_shape, dtype=dtype or local.dtype, device=local.device
            )
        made.flat_layout, made.start, made._local, made._read = layout, start, local, read
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `__new__`."""

    @property
    def local(self) -> Tensor:
        """See the class."""
        return self._elements(0, self._local.numel())

    @property
    def stop(self) -> int:
        """The first element behind those of this rank."""
        return self.start + self._local.numel()

    @property
    def boxes(self) -> list[Box]:
        """This rank's elements as boxes of the whole."""
        return self.flat_layout.boxes(self.start, self.stop)

    def view_of(self, box: Box) -> Tensor:
        """The elements of one of the `boxes`, in its shape; a view of `local`, but with `read`."""
        return self.flat_layout.view(self._elements(box.first, box.first + box.numel), box)

    def _elements(self, begin: int, end: int) -> Tensor:
        return self._local[begin:end] if self._read is None else self._read(begin, end)

    def data_ptr(self) -> int:
        """0, as of a DTensor: it has no memory of its own."""
        return 0

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shard: ShardTensor = args[0]
        options = {name: value for name, value in (kwargs or {}).items() if name != "memory_format"}
        if op is aten.new_empty.default and tuple(args[1]) == tuple(shard.shape):
            return shard._with(op(shard.local, shard.local.shape, **options))
        if op in _COPIES:
            return shard._with(op(shard.local, *args[1:], **options))
        # In inference mode `to` comes as itself, and consists of such copies.
        made = op.decompose(*args, **(kwargs or {}))
        if made is NotImplemented:
            _refuse(str(op))
        return made

    def _with(self, local: Tensor) -> ShardTensor:
        """The same elements of another tensor."""
        return ShardTensor(self.flat_layout, self.start, local)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"ShardTensor(elements {self.start} to {self.stop} of shape={list(self.shape)}, dtype={self.dtype}, "
            f"local={self.local!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTensor:
        memo[id(self)] = copied = self._with(self.local.clone())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.local.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    # What torch.distributed.checkpoint asks for (torch/distributed/_checkpointable.py). It is imported by whoever asks.

    def __create_write_items__(self, fqn: str, object: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return next(self.view_of(box) for box in self.boxes if box.offsets == tuple(index.offset))

    # The same under torch 2.4's names.

    def _create_write_items(self, fqn: str, tensor: object) -> list[Any]:
        return self.__create_write_items__(fqn, tensor)

    def _create_chunk_list(self, tensor: object) -> list[Any]:
        return self.__create_chunk_list__()

    def _get_tensor_shard(self, tensor: object, index: Any) -> Tensor:
        return self.__get_tensor_shard__(index)


class OwnTensor(ShardTensor):
    """What is of this rank alone, such as the layout of its shard.

    `torch.save` writes it like any other. torch.distributed.checkpoint, which would keep that of one rank for all, sees a
    tensor of one element that means nothing, and leaves this rank's own as it is.
    """

    _ELEMENT = FlatLayout.of([1], [1])

    @staticmethod
    def __new__(cls, own: Tensor) -> OwnTensor:  # noqa: PYI034
        """Make one of a tensor of any shape."""
        with torch.inference_mode(mode=False):
            made: OwnTensor = Tensor._make_wrapper_subclass(cls, [1], dtype=own.dtype, device=own.device)
        made.flat_layout, made.start, made._local, made._read = cls._ELEMENT, 0, own, None
        return made

    @property
    def local(self) -> Tensor:
        """This rank's tensor."""
        return self._local

    @property
    def boxes(self) -> list[Box]:
        return self._ELEMENT.boxes(0, 1)

    def view_of(self, box: Box) -> Tensor:
        return self._local.new_zeros(1)

    def _with(self, local: Tensor) -> OwnTensor:
        return OwnTensor(local)


def _refuse(what: str) -> NoReturn:
    raise StateError(
        f"{what} of a ShardTensor: of this state the rank has the elements in `.local`, and no others. For the whole of it, call "
        "optimizer.consolidate_state_dict() on all ranks and then full_state_dict()"
    )
