"""What `param.grad` is in stages 1 and 2: an object that stands for the mean over all ranks, of which each rank has a slice.

It has the parameter's shape and no elements of its own. What training loops do between backward and step works on it and means
what it means under DistributedDataParallel; `tensor_operators` says what that is. Whatever would need elements of other ranks
raises, and says what to call instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..errors import StateError
from ..plan.params import ManagedParam

if TYPE_CHECKING:
    from .sharded_view import ShardedView


class ShardedGradient(Tensor):
    """The gradient of one parameter. Norms of it are collective, as those of a DTensor are: every rank must ask for them.

    It must not keep its parameter alive, for the garbage collector does not look there.

    Attributes:
        param_name, param_index: the parameter's.
    """

    param_name: str
    param_index: int
    _owner: Callable[[], ShardedView | None]
    _sum_dtype: torch.dtype

    @staticmethod
    def __new__(  # noqa: PYI034  a static method has no Self
        cls, managed: ManagedParam, sum_dtype: torch.dtype, gradients: ShardedView
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

    def __init__(self, managed: ManagedParam, sum_dtype: torch.dtype, gradients: ShardedView) -> None:
        """See `__new__`."""

    # Python sees what the sum is kept in. For autograd it is of the parameter's dtype, or it could not be `param.grad`.
    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the sum over ranks: float32 for 16-bit parameters with `param_dtype`."""
        return self._sum_dtype

    @property
    def data(self) -> Tensor:
        """Itself. Setting it to another tensor, which every rank has whole, sets the gradient to that."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:
            self.owner.set(self.param_index, value)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        gradient = next(value for value in flat((*args, *(kwargs or {}).values())) if isinstance(value, cls))
        return gradient.owner.apply(op, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedGradient({self.param_name!r}, shape={list(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse("copying or pickling")

    def __deepcopy__(self, memo: Any) -> None:
        if not memo:
            refuse("a deep copy")
        # Copied along with a DTensor, in a model: like that of a plain parameter, the copy has no gradient.

    @property
    def owner(self) -> ShardedView:
        """All gradients of the model."""
        owner = self._owner()
        if owner is None:
            raise StateError(
                f"the gradient of {self.param_name!r} is gone: nothing refers to the wrapped model any more, or the parameter is in "
                "none of its optimizer's groups; set param.grad to None before you train without it"
            )
        return owner

    def forget_owner(self) -> None:
        """The parameter has left its bucket."""
        self._owner = _nobody

    @property
    def is_stray(self) -> bool:
        """Whether the wrapped model is gone."""
        return self._owner() is None

    @property
    def local(self) -> Tensor | None:
        """What autograd has added on this rank and no reduce has taken up yet, as `no_sync()` leaves it."""
        return self.owner.local.get(self.param_index)

    def take_local(self) -> Tensor | None:
        """What autograd has added, which is no longer kept."""
        return self.owner.local.pop(self.param_index, None)


def _nobody() -> None:
    return None


def refuse(what: str) -> NoReturn:
    """Raise StateError for what needs elements that other ranks have."""
    raise StateError(
        f"{what} of a sharded gradient: in stages 1 and 2 each rank holds a slice of every gradient, and param.grad has none "
        "of its elements. Call optimizer.full_grad(param) on all ranks for the whole gradient (param.grad may be set to "
        "another tensor), or optimizer.clip_grad_norm_ or optimizer.grad_norm. Element by element, it can be changed in place: "
        "param.grad.add_(tensor), with the same tensor on all ranks"
    )


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """The arguments of an operator, those in lists one by one."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _refusal(name: str) -> Callable[..., NoReturn]:
    def method(_: ShardedGradient, *__: Any, **___: Any) -> NoReturn:
        refuse(name)

    return method


# Methods of tensors that use memory without asking the dispatcher first. (torch.compile looks for the storage.)
for _name in ("__array__", "__dlpack__", "data_ptr", "numpy", "share_memory_", "tolist"):
    setattr(ShardedGradient, _name, _refusal(_name))
