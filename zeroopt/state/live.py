"""What `optimizer.state` is: the state that a rank has now, by parameter, to be read, changed in place, and reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NoReturn, Protocol

from torch import Tensor

from ..errors import StateError
from ..plan.params import ParamState

_ADVICE = (
    "of this state a rank holds 1-D pieces: change those in place, reset it with optimizer.state.clear(), or give "
    "load_state_dict() a state dict"
)


class StateHolder(Protocol):
    """Who has the state."""

    def params_with_state(self) -> Iterator[Tensor]:
        """Parameters of which some rank may have state."""

    def entry_of(self, param: Tensor) -> ParamState | None:
        """What this rank has of a parameter's state, in live tensors; empty where others have it; None where nobody does."""

    def extend_entry(self, param: Tensor, name: str, value: Any) -> bool:
        """Keep a further value with a parameter's state; False where this rank has none."""

    def reset(self, params: Iterator[Tensor]) -> None:
        """Forget the state of parameters: it begins anew when they are next stepped."""


class LiveState(MutableMapping[Tensor, ParamState]):
    """State by parameter. As torch's, it has an (empty) entry for whatever it is asked for.

    Tensors in it are written in place by whatever is assigned to them; entries are removed whole. Do as much on all ranks.
    """

    def __init__(self, holder: StateHolder) -> None:
        self._holder = holder

    def __getitem__(self, param: Tensor) -> ParamState:
        def write(name: str, value: Any) -> None:
            self._write(param, name, value)

        def clear() -> None:
            self._holder.reset(iter((param,)))

        return StateEntry(self._holder.entry_of(param) or {}).bind(write, clear)

    def __setitem__(self, param: Tensor, entry: Mapping[str, Any]) -> None:
        here = self._holder.entry_of(param)
        if not entry:
            self._holder.reset(iter((param,)))
            return
        if here is None or entry.keys() != here.keys():
            _refuse(f"an entry of {sorted(entry)}", f"{sorted(here or ())}")
        for name, value in entry.items():
            _check_fits(name, here[name], value)
        for name, value in entry.items():
            self._write(param, name, value)

    def __delitem__(self, param: Tensor) -> None:
        if param not in self:
            raise KeyError(param)
        self._holder.reset(iter((param,)))

    def __iter__(self) -> Iterator[Tensor]:
        return self._holder.params_with_state()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, param: object) -> bool:
        return isinstance(param, Tensor) and self._holder.entry_of(param) is not None

    def get(self, param: Tensor, default: Any = None) -> Any:
        """As of a dict: the default where there is no state."""
        if param not in self:
            return default
        return self[param]

    def pop(self, param: Tensor, *default: Any) -> Any:
        """As of a dict. What is returned is not the optimizer's any longer."""
        if param not in self and default:
            return default[0]
        entry = dict(self[param])
        del self[param]
        return entry

    def clear(self) -> None:
        """Forget all of it, as with torch's optimizers: the next step begins anew. What completes 16-bit parameters stays."""
        self._holder.reset(self._holder.params_with_state())

    def __repr__(self) -> str:
        return repr(dict(self))

    def _write(self, param: Tensor, name: str, value: Any) -> None:
        entry = self._holder.entry_of(param) or {}
        live = entry.get(name)
        if isinstance(live, Tensor):
            _check_fits(name, live, value)
            if value is not live:
                live.copy_(value) if isinstance(value, Tensor) else live.fill_(value)
        elif not self._holder.extend_entry(param, name, value):
            _refuse(f"{name!r}", "nothing, for this rank has no state of the parameter")


class StateEntry(dict[str, Any]):
    """The state of one parameter. Without having been bound, a dict like any other."""

    _write: Callable[[str, Any], None] | None = None
    _clear: Callable[[], None] | None = None

    def bind(self, write: Callable[[str, Any], None], clear: Callable[[], None]) -> StateEntry:
        """Let changes be those of the optimizer's state. Returns itself."""
        self._write, self._clear = write, clear
        return self

    def __setitem__(self, name: str, value: Any) -> None:
        if self._write is not None:
            self._write(name, value)
            value = self[name] if isinstance(self.get(name), Tensor) else value
        super().__setitem__(name, value)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *others: Any, **more: Any) -> None:
        """As of a dict."""
        for name, value in dict(*others, **more).items():
            self[name] = value

    def clear(self) -> None:
        """Forget the state of the parameter."""
        if self._clear is not None:
            self._clear()
        super().clear()

    def __delitem__(self, name: str) -> None:
        if self._write is not None:
            _refuse(f"the removal of {name!r} alone", "entries to be removed whole")
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        """As of a dict."""
        if name not in self and default:
            return default[0]
        value = self[name]
        del self[name]
        return value

    def popitem(self) -> tuple[str, Any]:
        """As of a dict."""
        name = next(reversed(self))
        return name, self.pop(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def _check_fits(name: str, live: Any, value: Any) -> None:
    """Raise StateError when a value cannot take the place of a live tensor."""
    if not isinstance(live, Tensor) or value is live:
        return
    if isinstance(value, Tensor):
        fits = value.shape == live.shape and value.dtype == live.dtype
        got = f"{value.dtype} of shape {list(value.shape)}"
    else:
        fits, got = live.dim() == 0 and isinstance(value, (bool, int, float)), type(value).__name__
    if not fits:
        _refuse(f"{name!r} of {got}", f"{live.dtype} of shape {list(live.shape)}")


def _refuse(got: str, expected: str) -> NoReturn:
    raise StateError(f"optimizer.state got {got}, expected {expected}; {_ADVICE}")
