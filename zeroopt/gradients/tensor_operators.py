"""Torch's operators on the gradients of stages 1 and 2, by what they need.

all gradients at once   multiplying by a number, zeroing, a GradScaler's look, norms: done to whole buckets where possible
one element at a time   any in-place operator that torch knows to be element-wise (`add_`, `clamp_`, `nan_to_num_`, `copy_`,
                        `masked_fill_`, their `torch._foreach_*` and `out=` forms): done to this rank's piece, all other
                        operands cut as the gradient is
random numbers          `normal_` and the like: drawn for the whole gradient on every rank, as under DistributedDataParallel

Operands have to be the same on all ranks, as they have to be there. All else is refused: no tensor comes out that a rank could
have without hearing from the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sharded_tensor import ShardedGradient, flat, refuse

if TYPE_CHECKING:
    from .sharded_view import ShardedView

aten = torch.ops.aten

_Results = list[Tensor] | None


def is_in_backward() -> bool:
    """Whether autograd is at work."""
    return torch._C._current_graph_task_id() != -1


def apply(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator does that has a gradient among its arguments.

    Raises:
        StateError: it needs elements of other ranks, or comes at a wrong time.
    """
    if args and isinstance(args[0], (list, tuple)):
        return _on_many(op, args[0], args[1:], kwargs)
    target = args[0] if args else None
    if isinstance(target, ShardedGradient):
        if _is_for_all(op, args[1:], kwargs):
            results = _FOR_ALL[op](target.owner, [target.param_index], *args[1:], **kwargs)
            return target if results is None else results[0]
        if op is aten.index_put_.default:
            return _put(target, *args[1:], **kwargs)
        if _name_of(op) in _RANDOM:
            whole = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype, device=target.device)
            return _change(aten.copy_.default, target, [target, op(whole, *args[1:], **kwargs)], {})
    if not _is_element_wise(op):
        refuse(_name_of(op))
    if "out" in kwargs:
        return _change_out(op, args, dict(kwargs))
    return _change(op, target, args, kwargs)


# All gradients at once. Functions that change gradients return nothing.


def _multiply(gradients: ShardedView, indices: Sequence[int], factor: Tensor | float) -> None:
    gradients.scale(indices, _number(factor))


def _divide(gradients: ShardedView, indices: Sequence[int], divisor: Tensor | float) -> None:
    gradients.scale(indices, _number(divisor).double().reciprocal())


def _number(value: Tensor | float) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    scalar = value if value.dim() == 0 else value.reshape(())  # the same object where it can be: it may come again
    return scalar if scalar.is_floating_point() else scalar.double()  # a mask, say


def _zero(gradients: ShardedView, indices: Sequence[int]) -> None:
    gradients.zero(indices)


def _look(gradients: ShardedView, indices: Sequence[int], found_inf: Tensor, inv_scale: Tensor) -> None:
    gradients.check_and_unscale(indices, found_inf, inv_scale)


def _norm(
    gradients: ShardedView,
    indices: Sequence[int],
    norm_type: float = 2,
    dims: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    (index,) = indices
    if keepdim or (dims and len(dims) != len(gradients.shape_of(index))):
        refuse("a norm over some dimensions")
    return gradients.norms(indices, float(norm_type), dtype)


def _norm_of_each(
    gradients: ShardedView, indices: Sequence[int], norm_type: float = 2, dtype: torch.dtype | None = None
) -> list[Tensor]:
    return gradients.norms(indices, float(norm_type), dtype)


def _accumulate(gradients: ShardedView, indices: Sequence[int], grad: Tensor) -> None:
    gradients.add_local(indices, grad)


def _nothing(gradients: ShardedView, indices: Sequence[int]) -> None:
    """Detached gradients are the same objects."""


_FOR_ALL: dict[Any, Callable[..., _Results]] = {
    aten.add_.Tensor: _accumulate,  # by which autograd adds to a gradient that is there
    aten.detach.default: _nothing,
    aten.detach_.default: _nothing,
    aten.mul_.Tensor: _multiply,
    aten.mul_.Scalar: _multiply,
    aten.div_.Tensor: _divide,
    aten.div_.Scalar: _divide,
    aten.zero_.default: _zero,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_mul_.Tensor: _multiply,
    aten._foreach_mul_.Scalar: _multiply,
    aten._foreach_div_.Tensor: _divide,
    aten._foreach_div_.Scalar: _divide,
    aten._foreach_zero_.default: _zero,
    aten._foreach_norm.Scalar: _norm_of_each,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _look,
}


def _is_for_all(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    change = _FOR_ALL.get(op)
    if change is _accumulate:
        is_gradient = isinstance(args[0], Tensor) and not isinstance(args[0], ShardedGradient) and not kwargs
        return is_in_backward() and is_gradient
    if change is _multiply or change is _divide:
        factor = args[0]
        return not isinstance(factor, Tensor) or (factor.numel() == 1 and not isinstance(factor, ShardedGradient))
    return change is not None


def _on_many(op: Any, gradients: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Results:
    """Gradients of several models, and tensors that a user has put in the place of some, may stand side by side."""
    if not _is_for_all(op, args, kwargs):
        _one_by_one(op, gradients, args, kwargs)
        return None
    results: dict[int, Tensor] = {}
    places: defaultdict[ShardedView | None, list[int]] = defaultdict(list)
    for place, gradient in enumerate(gradients):
        places[gradient.owner if isinstance(gradient, ShardedGradient) else None].append(place)
    # Other tensors first: what a GradScaler finds in them, all ranks are to hear of.
    for owner, chosen in sorted(places.items(), key=lambda item: item[0] is not None):
        some = [gradients[place] for place in chosen]
        if owner is None:
            values = op(some, *args, **kwargs)
        else:
            indices = [gradient.param_index for gradient in some if isinstance(gradient, ShardedGradient)]
            values = _FOR_ALL[op](owner, indices, *args, **kwargs)
        results.update(zip(chosen, values or (), strict=False))
    return [results[place] for place in range(len(gradients))] if results else None


# One element at a time.


# Besides those that torch marks so.
_ELEMENT_WISE = {"copy_", "fill_", "masked_fill_"}
# Operators on many tensors that take numbers for each in one tensor, and their forms with lists.
_NUMBERS_IN_TENSORS = {
    aten._foreach_addcdiv_.Tensor: aten._foreach_addcdiv_.ScalarList,
    aten._foreach_addcmul_.Tensor: aten._foreach_addcmul_.ScalarList,
}
# They do not look at what was there.
_RANDOM = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"}


def _name_of(op: Any) -> str:
    return str(op._schema.name).removeprefix("aten::")


@cache
def _is_element_wise(op: Any) -> bool:
    """Whether an operator writes each element of its result from the same elements of its operands alone, in a tensor that is
    there."""
    name, writes_out = _name_of(op), "out" in op._overloadname
    if op.namespace != "aten" or torch.Tag.nondeterministic_seeded in op.tags or not (name.endswith("_") or writes_out):
        return False
    if name in _ELEMENT_WISE or name.startswith("_foreach_"):
        return not writes_out
    # Of some, only the form that gives a new tensor is marked.
    packet = getattr(aten, name.removesuffix("_"), None)
    forms = [op, *(getattr(packet, form) for form in packet.overloads())] if packet is not None else [op]
    return any(torch.Tag.pointwise in form.tags for form in forms)


def _change(op: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ShardedGradient:
    """Have an operator change a gradient, which is among its arguments."""
    if not isinstance(target, ShardedGradient):
        refuse(f"changing another tensor by elements ({_name_of(op)})")

    def change(piece: Tensor, cut: Callable[[Tensor], Tensor]) -> None:
        def own(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [own(one) for one in value]
            if isinstance(value, ShardedGradient):
                if value is not target:  # other ranks have those elements of it
                    refuse(f"{_name_of(op)} with elements")
                return piece
            return cut(value) if isinstance(value, Tensor) else value

        op(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    target.owner.edit(target.param_index, _name_of(op), change)
    return target


def _change_out(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ShardedGradient:
    """Have an operator write its result into a gradient."""
    target = kwargs.pop("out")

    def write(out: Tensor, *operands: Any, **options: Any) -> None:
        result = op(*operands, **options, out=torch.empty_like(out))
        out.copy_(result)

    write._schema = op._schema  # type: ignore[attr-defined]
    return _change(write, target, [target, *args], kwargs)


def _one_by_one(op: Any, gradients: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """An operator on many tensors, and as many operands, or one for all."""
    if not _is_element_wise(op):
        refuse(_name_of(op))
    if op in _NUMBERS_IN_TENSORS:
        op, args = _NUMBERS_IN_TENSORS[op], [*args[:-1], args[-1].tolist()]
    for place, gradient in enumerate(gradients):
        own = [_at(place, arg) for arg in args]
        options = {name: _at(place, arg) for name, arg in kwargs.items()}
        if any(isinstance(value, ShardedGradient) for value in flat([gradient, *own, *options.values()])):
            _change(op, gradient, [[gradient], *own], options)
        else:
            op([gradient], *own, **options)


def _at(place: int, arg: Any) -> Any:
    return [arg[place]] if isinstance(arg, (list, tuple)) else arg


def _put(target: ShardedGradient, indices: Sequence[Any], value: Tensor, accumulate: bool = False) -> ShardedGradient:
    """`grad[mask] = number`."""
    mask = indices[0]
    if (
        len(indices) > 1
        or mask.dtype is not torch.bool
        or mask.shape != target.shape
        or value.numel() > 1
        or accumulate
    ):
        refuse("setting elements by their index")
    return _change(aten.masked_fill_.Tensor, target, [target, mask, value.reshape(())], {})
