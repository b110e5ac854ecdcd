"""Parameters that hold several matrices: of what parts they consist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from ..errors import ConfigError


@dataclass(frozen=True)
class Split:
    """How a parameter is made of parts that an optimizer is to step each as a parameter of its own.

    Attributes:
        parts: how many, of equal size, or the size of each.
        dim: along which they lie: 0 for `nn.Linear`, whose rows they are; 1 for the `Conv1D` of GPT-2 in transformers.

    Raises:
        ConfigError: no such split.
    """

    parts: int | tuple[int, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.parts, Sequence) and not isinstance(self.parts, str):
            object.__setattr__(self, "parts", tuple(self.parts))
        given = self.parts if isinstance(self.parts, tuple) else (self.parts,)
        if not given or any(not isinstance(one, int) or isinstance(one, bool) or one < 1 for one in given):
            raise ConfigError(f"expected a split to be a number of parts, or the size of each, got {self.parts!r}")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 0:
            raise ConfigError(f"expected the dim of a split to be 0 or more, got {self.dim!r}")

    @property
    def count(self) -> int:
        """Of parts."""
        return len(self.parts) if isinstance(self.parts, tuple) else self.parts

    def sizes(self, name: str, shape: Sequence[int]) -> list[int]:
        """Of the parts of a parameter.

        Raises:
            ConfigError: it does not consist of such parts.
        """
        length = shape[self.dim] if self.dim < len(shape) else 0
        sizes = list(self.parts) if isinstance(self.parts, tuple) else [length // self.parts] * self.parts
        if not length or sum(sizes) != length:
            raise ConfigError(
                f"matrix_splits: parameter {name!r} of shape {list(shape)} does not consist of {self.parts} parts along "
                f"dimension {self.dim}"
            )
        return sizes


SplitLike: TypeAlias = int | Sequence[int] | Split
MatrixSplits: TypeAlias = Mapping[str, SplitLike]


def read_splits(given: MatrixSplits | None) -> dict[str, Split] | None:
    """The option as `Split`s by pattern.

    Raises:
        ConfigError: it says something else.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
        raise ConfigError(
            f"expected matrix_splits to be a dict from names of parameters to numbers of parts, or None, got {given!r}"
        )
    return {
        pattern: split if isinstance(split, Split) else Split(split)  # type: ignore[arg-type]
        for pattern, split in given.items()
    }


def split_of(splits: Mapping[str, Split], name: str) -> Split | None:
    """That of a parameter: of the first pattern that its name matches, as file names do (`fnmatch`)."""
    return next((split for pattern, split in splits.items() if fnmatchcase(name, pattern)), None)
