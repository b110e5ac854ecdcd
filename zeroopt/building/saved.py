"""Values of a model that were saved: what of a model on the meta device is read from where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CheckpointError
from .call import Call, Needed
from .unmade import Unmade

_EXTRA = "_extra_state"  # torch's name for what a module's get_extra_state() gives


class Saved(ABC):
    """The tensors of a model's state dict, in files.

    Attributes:
        place: how messages call it.
        shapes: of the tensors, by name.
    """

    place: str
    shapes: Mapping[str, torch.Size]

    @abstractmethod
    def read(self, name: str, into: Tensor, begin: int, end: int) -> None:
        """Let elements [begin, end) of a tensor, as they lie in its memory, be those that were saved. Others may be set, too.

        Raises:
            CheckpointError: it cannot be read.
        """

    @abstractmethod
    def verify(self, group: dist.ProcessGroup) -> None:
        """Look whether it is whole. Collective.

        Raises:
            CheckpointError: on all ranks, with what is damaged.
        """

    @abstractmethod
    def describe(self) -> str:
        """What tells it from others, the same on all ranks."""


@dataclass(eq=False, kw_only=True)
class Reading(Call):
    """One tensor is read.

    Attributes:
        name: under which it was saved.
    """

    saved: Saved
    name: str
    tensor: Tensor

    def __post_init__(self) -> None:
        self.overwrites, self.written, self.is_alike = {self.tensor: True}, {self.tensor}, True

    def __call__(self, needed: Needed) -> None:
        """Read what is needed of it, and nothing where nothing is."""
        begin, end = needed(self.tensor)
        if begin < end:
            self.saved.read(self.name, self.tensor.detach(), begin, end)

    def __str__(self) -> str:
        return f"reading {self.name!r} from {self.saved.place}"


def readings(saved: Saved, model: nn.Module, unmade: Mapping[Tensor, Unmade], *, is_all: bool) -> list[Reading]:
    """What of a model on the meta device is read, one tensor after the other. Not collective.

    Args:
        is_all: nothing else gives the model values.

    Raises:
        CheckpointError: something has another shape there, is not there, or is there and not in the model.
    """
    aliases: dict[Tensor, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            aliases.setdefault(value, []).append(_clean(name))
    _check_names(saved, [names for tensor, names in aliases.items() if tensor in unmade and is_all], aliases)
    found = []
    for tensor, names in aliases.items():
        for name in [name for name in names if name in saved.shapes and tensor in unmade][:1]:
            if saved.shapes[name] != tensor.shape:
                raise CheckpointError(
                    f"{unmade[tensor]} is of shape {list(tensor.shape)}, and {name!r} in {saved.place} of shape "
                    f"{list(saved.shapes[name])}: that was saved of another model"
                )
            found.append(Reading(saved=saved, name=name, tensor=tensor))
    return found


def _check_names(saved: Saved, wanted: Sequence[Sequence[str]], aliases: Mapping[Tensor, Sequence[str]]) -> None:
    known = {name for names in aliases.values() for name in names}
    missing = [names[0] for names in wanted if not any(name in saved.shapes for name in names)]
    unexpected = [name for name in saved.shapes if name not in known and _EXTRA not in name.split(".")]
    if missing or unexpected:
        raise CheckpointError(
            f"the model and {saved.place} have different names: that lacks {_shown(missing)}, the model lacks "
            f"{_shown(unexpected)}. Where that is meant, give init a function that reads what is wanted, or a list of the path "
            "and of functions that make what was not saved"
        )


def _clean(name: str) -> str:
    """Without what torch.compile has put into it."""
    return name.replace("_orig_mod.", "")


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
