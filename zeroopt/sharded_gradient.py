"""What `param.grad` is in stages 1 and 2: an object that stands for the mean over all ranks, of which each rank has a slice.

It has the parameter's shape and no elements of its own. What training loops do between backward and step works on it and means
what it means under DistributedDataParallel: `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`, `GradScaler`, `zero_grad`,
multiplying and dividing by a number, norms. Whatever would need all elements raises, and says what to call instead.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .bucket import Bucket, ManagedParam, Segment
from .collectives import Transport
from .errors import StateError
from .grad_clip import is_finite
from .gradient_store import GradientStore

aten = torch.ops.aten


class ShardedGradient(Tensor):
    """The gradient of one parameter. Norms of it are collective, as those of a DTensor are: every rank must ask for them.

    Attributes:
        param_name, param_index: the parameter's.
        local: what autograd has added on this rank and no reduce has taken up yet, as `no_sync()` leaves it.
    """

    param_name: str
    param_index: int
    local: Tensor | None
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
        made.local = None
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
        known = _OPS.get(op)
        first = args[0][0] if args and isinstance(args[0], (list, tuple)) else args[0]
        if known is None or not isinstance(first, cls):
            raise StateError(
                f"{op} of a sharded gradient: in stages 1 and 2 each rank holds a slice of every gradient, and param.grad "
                "has none of its elements. Call optimizer.full_grad(param) on all ranks for the whole gradient, or "
                "optimizer.clip_grad_norm_ or optimizer.grad_norm"
            )
        return known(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedGradient({self.param_name!r}, shape={list(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError(
            f"the gradient of {self.param_name!r} lies on all ranks: save optimizer.full_grad(param) instead"
        )

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a parameter has no gradient."""

    @property
    def owner(self) -> ShardedGradients:
        """All gradients of the model."""
        owner = self._owner()
        if owner is None:
            raise StateError(
                f"the gradient of {self.param_name!r} is gone: nothing refers to the wrapped model any more"
            )
        return owner

    def add_local(self, grad: Tensor) -> None:
        """Keep what autograd adds until the parameter's hook, or a later backward, takes it up."""
        self.local = grad if self.local is None else self.local + grad

    def take_local(self) -> Tensor:
        """What autograd has added, which is no longer kept."""
        taken = self.local
        assert taken is not None
        self.local = None
        return taken


class ShardedGradients:
    """The gradient objects of one wrapped model, and what is done to gradients through them.

    Args:
        finish: a method that waits until every gradient that has been produced is reduced.
    """

    def __init__(self, transport: Transport, finish: Callable[[], None]) -> None:
        self._transport = transport
        self._wait = weakref.WeakMethod(finish)
        self._norms: dict[float, Tensor] = {}
        self._objects: list[ShardedGradient] = []
        self._shown: list[bool] = []
        self._scaler_checks: list[tuple[set[int], Tensor, Tensor]] = []

    def adopt(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket], stores: Sequence[GradientStore]) -> None:
        """Take up buckets in which the same parameters lie, and more."""
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

    def was_cleared(self, managed: ManagedParam) -> bool:
        """Whether somebody has replaced the object by None or by a tensor since it was shown."""
        return self._shown[managed.index] and not self.is_shown(managed)

    def forget(self, index: int) -> None:
        """A parameter has no gradient any more."""
        self._shown[index] = False
        self._objects[index].local = None

    def changed(self) -> None:
        """Gradients are other ones from now on."""
        self._norms.clear()

    def piece(self, index: int) -> Tensor | None:
        """This rank's piece of a reduced gradient, 1-D, to be read or changed in place; None where it has none."""
        segment = self._segments.get(index)
        return None if segment is None else self._store(index).part(segment)

    def replace(self, managed: ManagedParam, grad: Tensor | None) -> None:
        """Set this rank's piece of a gradient, which then counts as one of this step."""
        piece, segment = self.piece(managed.index), self._segments.get(managed.index)
        if piece is not None and segment is not None:
            if grad is None:
                piece.zero_()
            else:
                piece.copy_(managed.flatten(grad)[segment.start : segment.start + segment.numel])
        self.changed()

    # What torch's functions do to the objects.

    def norms(self, indices: Sequence[int], norm_type: float) -> list[Tensor]:
        """The p-norm of each gradient, 0-dim, of the dtype of its sum. Collective: one exchange for all gradients, the first
        time that any is asked for after they have changed."""
        self._check_reduced(indices)
        if norm_type not in self._norms:
            self._finish()
            self._norms[norm_type] = self._norms_over_ranks(norm_type)
        return [self._norms[norm_type][i].to(self._objects[i].dtype) for i in indices]

    def zero(self, indices: Sequence[int]) -> None:
        """Set gradients to zero, local ones too."""
        for index in indices:
            self._objects[index].local = None
        self.edit(indices, Tensor.zero_)

    def edit(self, indices: Sequence[int], change: Callable[[Tensor], Any]) -> None:
        """Change gradients element by element, in place."""
        self._check_reduced(indices)
        self._finish()
        for index in indices:
            piece = self.piece(index)
            if piece is not None:
                change(piece)
        self.changed()

    def scale(self, indices: Sequence[int], factor: Tensor) -> None:
        """Multiply gradients by a 0-dim tensor: whole buckets when they are used, others at once."""
        self._check_reduced(indices)
        self._finish()
        self.changed()
        chosen = set(indices)
        for store, members in zip(self._stores, self._params_of, strict=True):
            wanted = [index for index in members if self._shown[index]]
            if not chosen.isdisjoint(wanted):
                if chosen.issuperset(wanted):
                    store.scale(factor)
                else:
                    self._scale_pieces(chosen.intersection(wanted), factor)

    def check_and_unscale(self, indices: Sequence[int], found_inf: Tensor, inv_scale: Tensor) -> None:
        """What a GradScaler asks for: set `found_inf` to 1 when an element on this rank is not finite, and multiply by
        `inv_scale`. The step has the ranks agree on both."""
        self._check_reduced(indices)
        self._finish()
        finite = [is_finite(self._stores[bucket]) for bucket in sorted({self._bucket_of[index] for index in indices})]
        if finite and not torch.stack(finite).all():
            found_inf.fill_(1.0)
        self._scaler_checks.append((set(indices), found_inf, inv_scale))
        if not (inv_scale.is_cpu and inv_scale == 1):
            self.scale(indices, inv_scale)

    def take_scaler_checks(self, indices: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
        """`found_inf` and `inv_scale` of the checks of these gradients that a GradScaler has asked for since the last call."""
        own = set(indices)
        taken = [(found_inf, inv_scale) for checked, found_inf, inv_scale in self._scaler_checks if checked & own]
        self._scaler_checks = [check for check in self._scaler_checks if not check[0] & own]
        return taken

    def _finish(self) -> None:
        finish = self._wait()
        if finish is not None:
            finish()

    def _check_reduced(self, indices: Sequence[int]) -> None:
        for index in indices:
            if self._objects[index].local is not None:
                raise StateError(
                    f"the last backward ran under no_sync(), so the gradient of {self._objects[index].param_name!r} is not reduced "
                    "yet on any rank; run the last backward before a step outside of no_sync()"
                )

    def _scale_pieces(self, indices: set[int], factor: Tensor) -> None:
        for index in indices:
            piece = self.piece(index)
            if piece is not None:
                piece.mul_(factor.to(piece.dtype))

    def _norms_over_ranks(self, norm_type: float) -> Tensor:
        """float64 [number of parameters]."""
        device = self._stores[0].reduced.device
        powers = torch.zeros(len(self._objects), dtype=torch.float64, device=device)
        for index, segment in self._segments.items():
            if self._shown[index]:
                powers[index] = _power(self._store(index), segment, norm_type)
        is_max = math.isinf(norm_type)
        if self._transport.world_size > 1:
            operation = dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM
            dist.all_reduce(powers, op=operation, group=self._transport.group)
        norms: Tensor = powers if is_max else powers.pow(1.0 / norm_type)
        return norms

    def _store(self, index: int) -> GradientStore:
        return self._stores[self._bucket_of[index]]


def _power(store: GradientStore, segment: Segment, norm_type: float) -> Tensor:
    """sum |g|^p of one segment, or the largest |g| for inf; 0-dim float64."""
    piece = store.reduced[segment.offset : segment.offset + segment.numel]
    wide = torch.float64 if piece.dtype is torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(piece, norm_type, dtype=wide).double()
    if store.factor is not None:
        norm = norm * store.factor.abs()
    power: Tensor = norm if math.isinf(norm_type) else norm.pow(norm_type)
    return power


# Torch's operators, for one gradient or a list of them.

_OneOrMany = ShardedGradient | Sequence[ShardedGradient]


def _all(gradients: _OneOrMany) -> tuple[ShardedGradients, list[int]]:
    several = [gradients] if isinstance(gradients, ShardedGradient) else list(gradients)
    return several[0].owner, [gradient.param_index for gradient in several]


def _number(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise StateError(
                f"expected a number to multiply a sharded gradient by, got a tensor of shape {list(value.shape)}"
            )
        return value.reshape(())
    return torch.tensor(float(value), dtype=torch.float64)


def _multiply(gradients: _OneOrMany, factor: Tensor | float) -> ShardedGradient | None:
    owner, indices = _all(gradients)
    owner.scale(indices, _number(factor))
    return _changed(gradients)


def _divide(gradients: _OneOrMany, divisor: Tensor | float) -> ShardedGradient | None:
    return _multiply(gradients, _number(divisor).double().reciprocal())


def _zero(gradients: _OneOrMany) -> ShardedGradient | None:
    owner, indices = _all(gradients)
    owner.zero(indices)
    return _changed(gradients)


def _clamp(gradients: _OneOrMany, low: Any = None, high: Any = None) -> ShardedGradient | None:
    owner, indices = _all(gradients)
    owner.edit(indices, lambda piece: piece.clamp_(low, high))
    return _changed(gradients)


def _changed(gradients: _OneOrMany) -> ShardedGradient | None:
    """What an operator in place returns."""
    return gradients if isinstance(gradients, ShardedGradient) else None


def _norm(gradient: ShardedGradient, norm_type: float = 2, *_: Any, **__: Any) -> Tensor:
    owner, indices = _all(gradient)
    return owner.norms(indices, float(norm_type))[0]


def _norm_of_each(gradients: Sequence[ShardedGradient], norm_type: float = 2, dtype: Any = None) -> list[Tensor]:
    owner, indices = _all(gradients)
    return [norm.to(dtype) for norm in owner.norms(indices, float(norm_type))]


def _check_and_unscale(gradients: Sequence[ShardedGradient], found_inf: Tensor, inv_scale: Tensor) -> None:
    owner, indices = _all(gradients)
    owner.check_and_unscale(indices, found_inf, inv_scale)


def _accumulate(gradient: ShardedGradient, grad: Tensor) -> ShardedGradient:
    gradient.add_local(grad)
    return gradient


def _same(gradient: ShardedGradient) -> ShardedGradient:
    return gradient


_OPS: dict[Any, Callable[..., Any]] = {
    aten.add_.Tensor: _accumulate,  # by which autograd adds to a gradient that is there
    aten.detach.default: _same,
    aten.mul_.Tensor: _multiply,
    aten.mul_.Scalar: _multiply,
    aten.div_.Tensor: _divide,
    aten.div_.Scalar: _divide,
    aten.zero_.default: _zero,
    aten.clamp_.default: _clamp,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_mul_.Tensor: _multiply,
    aten._foreach_mul_.Scalar: _multiply,
    aten._foreach_div_.Tensor: _divide,
    aten._foreach_div_.Scalar: _divide,
    aten._foreach_zero_.default: _zero,
    aten._foreach_clamp_min_.Scalar: lambda gradients, low: _clamp(gradients, low, None),
    aten._foreach_clamp_max_.Scalar: lambda gradients, high: _clamp(gradients, None, high),
    aten._foreach_norm.Scalar: _norm_of_each,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _check_and_unscale,
}
