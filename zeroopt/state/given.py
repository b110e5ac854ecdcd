"""What `load_state_dict` was given: one state dict, or those of all ranks of a run, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from ..errors import StateError
from .layout import ShardLayout

Prepare = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class GivenState:
    """State dicts to be read. Whatever goes wrong with them is kept, until all ranks can hear of it.

    Attributes:
        of_all_ranks: whether several were given.
        layout: of a single one; None where plain torch saved it, or it cannot be read.

    Args:
        prepare: what is done with each before it is read.
    """

    def __init__(self, given: Mapping[str, Any] | Iterable[Mapping[str, Any]], prepare: Prepare) -> None:
        self.of_all_ranks = not isinstance(given, Mapping)
        self.layout: ShardLayout | None = None
        self._problem: Exception | None = None
        self._shards: Iterator[Mapping[str, Any]] = iter(())
        try:
            shards = map(prepare, map(_checked, [given] if isinstance(given, Mapping) else given))
            first = next(shards, None)
            if first is None:
                raise StateError("expected a state dict, or those of all ranks of a run; got none")
            self.layout = None if self.of_all_ranks else ShardLayout.of(first)
            self._shards = chain(iter([first]), shards)
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
            self._problem = error

    def shards(self) -> Iterator[Mapping[str, Any]]:
        """The state dicts, once. Each goes before the next one comes.

        Raises:
            Exception: what went wrong.
        """
        if self._problem is not None:
            raise self._problem
        yield from self._shards


def _checked(state_dict: Any) -> Mapping[str, Any]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = f"{list(state_dict)[:5]}" if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise StateError(f"expected state dicts of an optimizer, with 'state' and 'param_groups'; got {got}")
    return state_dict
