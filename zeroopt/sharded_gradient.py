"""What `param.grad` is in stages 1 and 2: an object that stands for the mean over all ranks, of which each rank has a slice.

It has the parameter's shape and no elements of its own. What training loops do between backward and step works on it and means
what it means under DistributedDataParallel: `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`, `GradScaler`, `zero_grad`,
multiplying and dividing by a number, norms. Whatever would need all elements raises, and says what to call instead.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .bucket import Bucket, ManagedParam, Segment
from .collectives import Transport
from .errors import StateError
from .grad_clip import is_finite
from .gradient_store import GradientStore
from .join import Join, Phase
from .loss_scaling import agree_on_overflow

aten = torch.ops.aten


class ShardedGradient(Tensor):
    """The gradient of one parameter. Norms of it are collective, as those of a DTensor are: every rank must ask for them.

    It must not keep its parameter alive, for the garbage collector does not look there.

    Attributes:
        param_name, param_index: the parameter's.
    """

    param_name: str
    param_index: int
    _owner: weakref.ref[ShardedGradients]
    _sum_dtype: torch.dtype

    @staticmethod
    def __new__(  # noqa: PYI034  a static method has no Self
        cls, managed: ManagedParam, sum_dtype: torch.dtype, gradients: ShardedGradients
    ) -> ShardedGradient:
        param = managed.param
        made: ShardedGradient = Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )
        made.param_index = managed.index
        made._owner = weakref.ref(gradients)
        made.param_name = managed.name
        made._sum_dtype = sum_dtype
        return made

    def __init__(self, managed: ManagedParam, sum_dtype: torch.dtype, gradients: ShardedGradients) -> None:
        """See `__new__`."""

    # Python sees what the sum is kept in. For autograd it is of the parameter's dtype, or it could not be `param.grad`.
    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the sum over ranks: float32 for 16-bit parameters with `param_dtype`."""
        return self._sum_dtype

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        change = _OPS.get(op)
        if change is None or not isinstance(args[0], (cls, list, tuple)):
            _refuse(str(op))
        if isinstance(args[0], cls):
            return _on_one(change, *args, **(kwargs or {}))
        return _on_many(op, *args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedGradient({self.param_name!r}, shape={list(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        _refuse("copying or pickling")

    def __deepcopy__(self, memo: Any) -> None:
        if not memo:
            _refuse("a deep copy")
        # Copied along with a DTensor, in a model: like that of a plain parameter, the copy has no gradient.

    @property
    def owner(self) -> ShardedGradients:
        """All gradients of the model."""
        owner = self._owner()
        if owner is None:
            raise StateError(
                f"the gradient of {self.param_name!r} is gone: nothing refers to the wrapped model any more; set param.grad "
                "to None before you train the model without it"
            )
        return owner

    @property
    def local(self) -> Tensor | None:
        """What autograd has added on this rank and no reduce has taken up yet, as `no_sync()` leaves it."""
        return self.owner.local.get(self.param_index)

    def take_local(self) -> Tensor:
        """What autograd has added, which is no longer kept."""
        return self.owner.local.pop(self.param_index)


def _refuse(what: str) -> NoReturn:
    raise StateError(
        f"{what} of a sharded gradient: in stages 1 and 2 each rank holds a slice of every gradient, and param.grad has none "
        "of its elements. Call optimizer.full_grad(param) on all ranks for the whole gradient (param.grad may be set to "
        "another tensor), or optimizer.clip_grad_norm_ or optimizer.grad_norm"
    )


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(_: ShardedGradient, *__: Any, **___: Any) -> NoReturn:
        _refuse(name)

    return refuse


# Methods of tensors that use memory without asking the dispatcher first. (torch.compile looks for the storage.)
for _name in ("__array__", "__dlpack__", "data_ptr", "numpy", "share_memory_", "tolist"):
    setattr(ShardedGradient, _name, _refusal(_name))


class ShardedGradients:
    """The gradient objects of one wrapped model, and what is done to gradients through them.

    Attributes:
        checked: indices of those that a GradScaler has checked since the last backward.
        local: by index of the parameter, what autograd has added to the objects and no reduce has taken up yet.

    Args:
        finish: a method that waits until every gradient that has been produced is reduced.
        mesh_groups: of the ranks that hold other parts of parameters that are DTensors.
    """

    def __init__(
        self,
        transport: Transport,
        finish: Callable[[], None],
        join: Join,
        mesh_groups: Sequence[dist.ProcessGroup],
    ) -> None:
        self._transport = transport
        self._join = join
        self._mesh_groups = mesh_groups
        self._wait = weakref.WeakMethod(finish)
        self._norms: dict[float, dict[int, Tensor]] = {}  # by p and parameter, of those that have not changed since
        self._params: Sequence[ManagedParam] = ()
        self._objects: list[ShardedGradient] = []
        self._shown: list[bool] = []
        self.local: dict[int, Tensor] = {}
        self.checked: set[int] = set()

    def adopt(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket], stores: Sequence[GradientStore]) -> None:
        """Take up buckets in which the same parameters lie, and more."""
        self._params = params
        self._stores = stores
        self._params_of = [[managed.index for managed in bucket.params] for bucket in buckets]
        self._bucket_of = {m.index: bucket.index for bucket in buckets for m in bucket.params}
        self._segments = {segment.owner.index: segment for bucket in buckets for segment in bucket.segments}
        for managed in params[len(self._objects) :]:
            self._objects.append(ShardedGradient(managed, self._store(managed.index).reduced.dtype, self))
            self._shown.append(False)
        self.changed()

    def show(self, managed: ManagedParam) -> None:
        """Make the object the parameter's gradient."""
        managed.param.grad = self._objects[managed.index]
        self._shown[managed.index] = True

    def is_shown(self, managed: ManagedParam) -> bool:
        """Whether the parameter's gradient is the object, and nobody has replaced it."""
        return managed.param.grad is self._objects[managed.index]

    def shape_of(self, index: int) -> torch.Size:
        """That of the whole gradient."""
        return self._objects[index].shape

    def was_cleared(self, managed: ManagedParam) -> bool:
        """Whether somebody has replaced the object by None or by a tensor since it was shown."""
        return self._shown[managed.index] and not self.is_shown(managed)

    def forget(self, index: int) -> None:
        """A parameter has no gradient any more."""
        self._shown[index] = False
        self.local.pop(index, None)

    def changed(self, indices: Iterable[int] | None = None) -> None:
        """These gradients, or all, are other ones from now on."""
        if indices is None:
            self._norms.clear()
            return
        for norms in self._norms.values():
            for index in indices:
                norms.pop(index, None)

    def piece(self, index: int) -> Tensor | None:
        """This rank's piece of a reduced gradient, 1-D, to be read or changed in place; None where it has none."""
        segment = self._segments.get(index)
        return None if segment is None else self._store(index).part(segment)

    def replace(self, managed: ManagedParam, grad: Tensor | None) -> None:
        """Set a gradient to a tensor that this rank has whole, which then counts as one of this step, or to zero."""
        store, segment = self._store(managed.index), self._segments.get(managed.index)
        if grad is not None and not store.holds_sum:
            store.zero()  # what else lies there is of an earlier step
            store.holds_sum = True
        if segment is not None:
            piece = store.part(segment)
            if grad is None:
                piece.zero_()
            else:
                piece.copy_(managed.flatten(grad)[segment.start : segment.start + segment.numel])
        self.changed([managed.index])

    # What torch's functions do to the objects, by the parameters' indices.

    def add_local(self, indices: Sequence[int], grad: Tensor) -> None:
        """Keep what autograd adds until the parameter's hook, or a later backward, takes it up."""
        if not _is_in_backward():
            _refuse("adding to the elements")
        for index in indices:
            before, aligned = self.local.get(index), self._params[index].aligned(grad)
            self.local[index] = aligned if before is None else before + aligned

    def keep_local(self, index: int) -> None:
        """What autograd has added to a gradient stays there when backward is through. Until then it may be anyone's tensor."""
        if index in self.local:
            self.local[index] = self.local[index].clone()

    def norms(self, indices: Sequence[int], norm_type: float, dtype: torch.dtype | None) -> list[Tensor]:
        """The p-norm of each gradient, 0-dim, of `dtype` or that of its sum. Collective: one exchange for all gradients, the
        first time that one is asked for after it has changed."""
        self._join.check_outside("a norm of param.grad")
        if not norm_type > 0:
            raise StateError(f"a norm of a sharded gradient is a p-norm with p > 0 or inf, got p = {norm_type}")
        self._prepare(indices)
        known = self._norms.setdefault(norm_type, {})
        if not known.keys() >= set(indices):
            known.update(self._norms_over_ranks(known.keys(), norm_type))
        return [known[index].to(dtype or self._objects[index].dtype) for index in indices]

    def zero(self, indices: Sequence[int]) -> None:
        """Set gradients to zero, local ones too."""
        for index in indices:
            self.local.pop(index, None)
        self._change(indices, Tensor.zero_)

    def clamp(self, indices: Sequence[int], low: float | None, high: float | None) -> None:
        """Limit every element."""
        self._join.check_outside("clamping param.grad")
        self._prepare(indices)
        self._change(indices, lambda piece: piece.clamp_(low, high))

    def scale(self, indices: Sequence[int], factor: Tensor) -> None:
        """Multiply gradients by a 0-dim tensor: whole buckets when they are used, others at once."""
        self._join.check_outside("multiplying param.grad")
        self._scale(indices, factor)

    def _scale(self, indices: Sequence[int], factor: Tensor) -> None:
        self._prepare(indices)
        for bucket, chosen in self._by_bucket(indices):
            if self._is_all_of(bucket, chosen):
                self._stores[bucket].scale(factor)
                self.changed(chosen)
            else:
                self._change(chosen, lambda piece: piece.mul_(factor.to(piece.device)))

    def check_and_unscale(self, indices: Sequence[int], found_inf: Tensor, inv_scale: Tensor) -> None:
        """What a GradScaler asks for: set `found_inf` to 1 when an element on any rank is not finite, and multiply by
        `inv_scale`. Collective."""
        self._prepare(indices)
        if self._join.is_on:
            self._join.announce(Phase.UNSCALE, list(indices), inv_scale.item())
        finite = [flag for bucket, chosen in self._by_bucket(indices) for flag in self._are_finite(bucket, chosen)]
        found = bool(found_inf) or (bool(finite) and not torch.stack(finite).all())
        device, scale = self._stores[0].reduced.device, inv_scale.double().reciprocal().item()
        if agree_on_overflow(self._transport, device, found=found, scale=scale):
            found_inf.fill_(1.0)
        self.checked.update(indices)
        if not (inv_scale.is_cpu and inv_scale == 1):
            self._scale(indices, inv_scale)

    def _prepare(self, indices: Sequence[int]) -> None:
        """Before gradients are used: have them all reduced."""
        if _is_in_backward():
            raise StateError(
                "a sharded gradient was used while backward runs; it is reduced, and may be used, when backward is through"
            )
        for index in indices:
            if not self._shown[index]:
                raise StateError(
                    f"the gradient of {self._params[index].name!r} was cleared; it is not param.grad any more"
                )
        for index in self.local.keys() & set(indices):
            if self.is_shown(self._params[index]):
                raise StateError(
                    f"the last backward ran under no_sync(), so the gradient of {self._params[index].name!r} is not reduced "
                    "yet on any rank; run the last backward before a step outside of no_sync()"
                )
        self._finish()

    def _finish(self) -> None:
        finish = self._wait()
        if finish is not None:
            finish()

    def _change(self, indices: Sequence[int], change: Callable[[Tensor], Any]) -> None:
        """Change gradients element by element, in place."""
        self._finish()
        for index in indices:
            piece = self.piece(index)
            if piece is not None:
                change(piece)
        self.changed(indices)

    def _by_bucket(self, indices: Sequence[int]) -> Iterable[tuple[int, list[int]]]:
        chosen: defaultdict[int, list[int]] = defaultdict(list)
        for index in indices:
            chosen[self._bucket_of[index]].append(index)
        return chosen.items()

    def _is_all_of(self, bucket: int, chosen: Sequence[int]) -> bool:
        """Whether nothing else in the bucket has a gradient."""
        members = self._params_of[bucket]
        if len(chosen) == 1 and len(members) > 1:  # loops over the gradients of a large bucket come here often
            return False
        return len(set(chosen)) == sum(self._shown[index] for index in members)

    def _are_finite(self, bucket: int, chosen: Sequence[int]) -> Iterator[Tensor]:
        """0-dim bools, of elements on this rank."""
        if self._is_all_of(bucket, chosen):
            yield is_finite(self._stores[bucket])
            return
        for piece in map(self.piece, chosen):
            if piece is not None:
                yield piece.isfinite().all()

    def _norms_over_ranks(self, known: Collection[int], norm_type: float) -> dict[int, Tensor]:
        """0-dim float64, of all gradients but the known ones."""
        missing = [index for index, shown in enumerate(self._shown) if shown and index not in known]
        # Of all parameters, so that ranks exchange as much whatever each knows.
        powers = torch.zeros(len(self._objects), dtype=torch.float64, device=self._stores[0].reduced.device)
        for index in missing:
            segment = self._segments.get(index)
            if segment is not None:
                powers[index] = _power(self._store(index), segment, norm_type)
        is_max = math.isinf(norm_type)
        if self._transport.world_size > 1:
            by_rank = [torch.empty_like(powers) for _ in range(self._transport.world_size)]
            dist.all_gather(by_rank, powers, group=self._transport.group)
            together = torch.stack(by_rank)  # not reduced on the way, where a maximum may lose a NaN
            powers = together.amax(dim=0) if is_max else together.sum(dim=0)
        for group in self._mesh_groups:
            dist.all_reduce(powers, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=group)
        norms = powers if is_max else powers.pow(1.0 / norm_type)
        return {index: norms[index] for index in missing}

    def _store(self, index: int) -> GradientStore:
        return self._stores[self._bucket_of[index]]


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _power(store: GradientStore, segment: Segment, norm_type: float) -> Tensor:
    """sum |g|^p of one segment, or the largest |g| for inf; 0-dim float64."""
    piece = store.reduced[segment.offset : segment.offset + segment.numel]
    wide = torch.float64 if piece.dtype is torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(piece, norm_type, dtype=wide).double()
    if store.factor is not None:
        norm = norm * store.factor.abs()
    power: Tensor = norm if math.isinf(norm_type) else norm.pow(norm_type) * store.norm_weight
    return power


# Torch's operators, for the gradients of one model. Those that change gradients return nothing.

_Results = list[Tensor] | None


def _multiply(gradients: ShardedGradients, indices: Sequence[int], factor: Tensor | float) -> None:
    gradients.scale(indices, _number(factor))


def _divide(gradients: ShardedGradients, indices: Sequence[int], divisor: Tensor | float) -> None:
    gradients.scale(indices, _number(divisor).double().reciprocal())


def _number(value: Tensor | float) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, ShardedGradient) or value.numel() != 1:
        what = "another sharded gradient" if isinstance(value, ShardedGradient) else f"a tensor of {list(value.shape)}"
        raise StateError(
            f"expected a number or a tensor of one element to multiply a sharded gradient by, got {what}; for more, set "
            "param.grad to a tensor made from optimizer.full_grad(param)"
        )
    return value.reshape(())


def _clamp(gradients: ShardedGradients, indices: Sequence[int], low: Any = None, high: Any = None) -> None:
    gradients.clamp(indices, low, high)


def _clamp_above(gradients: ShardedGradients, indices: Sequence[int], high: Any) -> None:
    gradients.clamp(indices, None, high)


def _norm(
    gradients: ShardedGradients,
    indices: Sequence[int],
    norm_type: float = 2,
    dims: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    (index,) = indices
    if keepdim or (dims and len(dims) != len(gradients.shape_of(index))):
        _refuse("a norm over some dimensions")
    return gradients.norms(indices, float(norm_type), dtype)


def _norm_of_each(
    gradients: ShardedGradients, indices: Sequence[int], norm_type: float = 2, dtype: torch.dtype | None = None
) -> list[Tensor]:
    return gradients.norms(indices, float(norm_type), dtype)


def _accumulate(gradients: ShardedGradients, indices: Sequence[int], grad: Tensor, alpha: float = 1) -> None:
    if alpha != 1:
        _refuse("adding to the elements")
    gradients.add_local(indices, grad)


def _nothing(gradients: ShardedGradients, indices: Sequence[int]) -> None:
    """Detached gradients are the same objects."""


_OPS: dict[Any, Callable[..., _Results]] = {
    aten.add_.Tensor: _accumulate,  # by which autograd adds to a gradient that is there
    aten.detach.default: _nothing,
    aten.mul_.Tensor: _multiply,
    aten.mul_.Scalar: _multiply,
    aten.div_.Tensor: _divide,
    aten.div_.Scalar: _divide,
    aten.zero_.default: ShardedGradients.zero,
    aten.clamp_.default: _clamp,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_mul_.Tensor: _multiply,
    aten._foreach_mul_.Scalar: _multiply,
    aten._foreach_div_.Tensor: _divide,
    aten._foreach_div_.Scalar: _divide,
    aten._foreach_zero_.default: ShardedGradients.zero,
    aten._foreach_clamp_min_.Scalar: _clamp,
    aten._foreach_clamp_max_.Scalar: _clamp_above,
    aten._foreach_norm.Scalar: _norm_of_each,
    aten._amp_foreach_non_finite_check_and_unscale_.default: ShardedGradients.check_and_unscale,
}


def _on_one(change: Callable[..., _Results], gradient: ShardedGradient, *args: Any, **kwargs: Any) -> Tensor:
    results = change(gradient.owner, [gradient.param_index], *args, **kwargs)
    return gradient if results is None else results[0]


def _on_many(op: Any, gradients: Sequence[Tensor], *args: Any, **kwargs: Any) -> _Results:
    """Gradients of several models, and tensors that a user has put in the place of some, may stand side by side."""
    results: dict[int, Tensor] = {}
    places: defaultdict[ShardedGradients | None, list[int]] = defaultdict(list)
    for place, gradient in enumerate(gradients):
        places[gradient.owner if isinstance(gradient, ShardedGradient) else None].append(place)
    # Other tensors first: what a GradScaler finds in them, all ranks are to hear of.
    for owner, chosen in sorted(places.items(), key=lambda item: item[0] is not None):
        some = [gradients[place] for place in chosen]
        if owner is None:
            values = op(some, *args, **kwargs)
        else:
            indices = [gradient.param_index for gradient in some if isinstance(gradient, ShardedGradient)]
            values = _OPS[op](owner, indices, *args, **kwargs)
        results.update(zip(chosen, values or (), strict=False))
    return [results[place] for place in range(len(gradients))] if results else None
