"""One piece of the building of a model: what it writes, as far as that is known before anything is changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Needed = Callable[[Tensor], tuple[int, int]]
"""First and last element, plus one, of a tensor's, as they lie in memory, of which anybody needs the values that this rank writes."""


@dataclass(eq=False, kw_only=True)
class Call(ABC):
    """Writes tensors of a model.

    Attributes:
        overwrites: by the tensors that it reads or writes, whether it begins with writing all of it.
        written: those of them that it writes.
        discarded: those that it writes, but that keep the values that another call has made.
        is_alike: it gives tensors the same values on all ranks.
    """

    overwrites: dict[Tensor, bool] = field(default_factory=dict)
    written: set[Tensor] = field(default_factory=set)
    discarded: set[Tensor] = field(default_factory=set)
    is_alike: bool = False

    @abstractmethod
    def __call__(self, needed: Needed) -> None:
        """Write them. More than what is needed may be written."""
