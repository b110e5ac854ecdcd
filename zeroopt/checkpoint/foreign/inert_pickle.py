"""Reading what `torch.save` has written, without running anything of it, nor needing the classes that are in it."""

from __future__ import annotations

import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import StateError
from ..disk.files import open_ordinary
from ..disk.torch_file_bounds import check_torch_file


class StandIn:
    """What an object of a class or function that is not torch's own is read as.

    Attributes:
        args: with which it was made.
        state: its attributes, or what else its class has pickled; None for nothing.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> StandIn:  # noqa: PYI034  subclasses are made from names, one for each
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any) -> None:
        """See `__new__`."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<stands for a {type(self).__module__}.{type(self).__name__}>"


def load_inert(path: Path) -> Any:
    """The object in a file, its tensors on the CPU and, where the file is a zip archive, mapped from it.

    Not collective. Such a file is a pickle, which can name any class or function to call. torch's restricted unpickler
    (`weights_only=True`) reads it, and all that is named and is not torch's own is replaced by a `StandIn`: nothing is
    imported, and no code but torch's runs; and a file that would take more memory than it is long is refused. While it reads, `torch.serialization`'s list of safe globals is another one,
    as within `safe_globals`.

    Tensors must not outlive a change of the file; writing into them does not change it.

    Raises:
        StateError: the file is not there, or cannot be read.
    """
    if not path.is_file():
        raise StateError(f"there is no file {path}")
    try:
        with _only_safe(_stand_in(*name) for name in _names_in(path)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a broken pickle makes the unpickler do
        reason = " ".join(str(error.__context__ or error).split())  # torch wraps the unpickler's in advice
        raise StateError(
            f"cannot read {path} ({path.stat().st_size} bytes): it is cut off, damaged, not written by torch.save, or "
            "holds objects that cannot be read without running code of the file. Copy it again from where it was "
            "saved, or, if you trust it, read it with torch.load(weights_only=False), take those objects out and save "
            f"it ({type(error).__name__}: {reason})"
        ) from error


def _names_in(path: Path) -> set[tuple[str, str]]:
    """Module and name of the classes and functions that a file names, which takes no more memory than it is long."""
    with open_ordinary(path) as file:
        return {_name(str(argument)) for operation, argument in check_torch_file(file) if operation == "GLOBAL"}


def _name(argument: str) -> tuple[str, str]:
    module, _, name = argument.rpartition(" ")
    # In the protocol of torch.save, modules have the names that they had in Python 2.
    return NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))


def _stand_in(module: str, name: str) -> type[StandIn]:
    return type(name, (StandIn,), {"__module__": module, "__qualname__": name})


@contextmanager
def _only_safe(classes: Iterable[type[StandIn]]) -> Iterator[None]:
    """Have torch's restricted unpickler know these besides torch's own, which it looks for first."""
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(list(classes))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(known)
