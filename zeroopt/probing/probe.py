"""An optimizer tried out: a copy of it steps small tensors, while its own parameters and state stay as they are. They lie where it
will step: some optimizers step CUDA tensors only, and some those on the CPU.

A rule may change after a warm-up, or do something every so many steps. So some steps are taken, then every counter is set far
ahead, where warm-ups are over and most periods end, and some more are taken.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import NotSupportedError
from ..plan.dtensors import local_of
from ..untraced import uncompiled

_LR = 0.01
# The next step but one is the thousandth, then one that most periods divide.
_AHEAD = (998, 5_039_998)

Place = tuple[Any, ...]
"""Where a value lies in an optimizer: "option" or "attribute" and its name, or a name in a parameter's state."""


@dataclass(frozen=True)
class Outcome:
    """What some steps have done.

    Attributes:
        changes: of each parameter, by these steps alone.
        starts: the parameters before.
        states: of each parameter, values by their place.
        numbers: in the options of its group and in the attributes of the optimizer.
    """

    changes: list[Tensor]
    starts: list[Tensor]
    states: list[dict[Place, Any]]
    numbers: dict[Place, float]


@dataclass
class Trial:
    """What an optimizer has done with some tensors: in the first steps, and in those after its counters were set ahead.

    Attributes:
        outcomes: at least that of the first steps; fewer than usual where it cannot count so far.
        reads: names of the options that it has looked at.
        with_state: the state that the optimizer had was needed.
    """

    outcomes: list[Outcome]
    probe: torch.optim.Optimizer
    params: list[nn.Parameter]
    reads: set[str] = field(default_factory=set)
    with_state: bool = False


def try_out(
    optimizer: torch.optim.Optimizer,
    group: int,
    groups: Sequence[Sequence[Tensor]],
    grads: Sequence[Sequence[Tensor]],
    *,
    later_steps: int = 0,
    seed: int = 0,
    watched: bool = False,
) -> Trial:
    """Step tensors by a copy of an optimizer with the options of one of its groups.

    Args:
        group: position of that group.
        groups: the tensors to begin with, by param_group.
        grads: for each of the first steps those of all tensors; the later ones go through them again.
        later_steps: after each setting ahead of the counters.
        seed: of random numbers, which go on afterwards as if none had been drawn.
        watched: refuse communication, which takes time.
    """
    own_state = any(optimizer.state.get(param) for param in optimizer.param_groups[group]["params"])
    try:
        return _try_out(optimizer, group, groups, grads, later_steps, seed, watched=watched, with_state=False)
    except Exception:
        # Some optimizers make their state in the constructor and count on it.
        if not own_state:
            raise
        return _try_out(optimizer, group, groups, grads, later_steps, seed, watched=watched, with_state=True)


@uncompiled
def _try_out(
    optimizer: torch.optim.Optimizer,
    group: int,
    groups: Sequence[Sequence[Tensor]],
    grads: Sequence[Sequence[Tensor]],
    later_steps: int,
    seed: int,
    *,
    watched: bool,
    with_state: bool,
) -> Trial:
    params = [[nn.Parameter(start.clone()) for start in starts] for starts in groups]
    reads: set[str] = set()
    probe = copy_with(optimizer, group, params, reads, with_state=with_state)
    trial = Trial([], probe, [param for part in params for param in part], reads, with_state)
    communication = _NoCommunication() if watched else nullcontext()  # type: ignore[no-untyped-call]
    with _own_random_numbers(seed, trial.params[0].device), communication:
        before = _take_steps(trial, grads)
        counters = [at for at, number in before.items() if at.read() == number + 1]
        for ahead in _AHEAD if later_steps else ():
            for counter in counters:
                counter.write(ahead)
            try:
                _take_steps(trial, list(islice(cycle(grads), later_steps)))
            except NotSupportedError:
                raise
            except Exception:  # noqa: BLE001  it cannot count so far
                break
    return trial


def _take_steps(trial: Trial, grads: Sequence[Sequence[Tensor]]) -> dict[_Number, float]:
    """Add an outcome. Returns what was countable before the last step."""
    starts = [param.detach().clone() for param in trial.params]
    before: dict[_Number, float] = {}
    for step, grads_of_step in enumerate(grads, 1):
        for param, grad in zip(trial.params, grads_of_step, strict=True):
            param.grad = grad.clone()
        if step == len(grads):
            before = {number: number.read() for number in _numbers(trial.probe)}
        step_without_hooks(trial.probe)
    options, attributes = dict(_own_options(trial.probe)), vars(trial.probe)
    trial.outcomes.append(
        Outcome(
            [param.detach() - start for param, start in zip(trial.params, starts, strict=True)],
            starts,
            [dict(_leaves(_copied(trial.probe.state.get(param, {})))) for param in trial.params],
            {
                **_numbers_in(("option",), options),
                **_numbers_in(("attribute",), {k: v for k, v in attributes.items() if not is_torchs_own(k)}),
            },
        )
    )
    return before


def is_torchs_own(name: str) -> bool:
    """Whether every optimizer has an attribute of that name."""
    return name in ("param_groups", "state", "defaults", "_opt_called", "_step_count") or name.endswith("_hooks")


@dataclass(frozen=True, eq=False)
class _Number:
    """One that an optimizer keeps, and may count in."""

    holder: dict[Any, Any]
    name: Any

    def read(self) -> float:
        value = dict.get(self.holder, self.name)
        return float(value) if value is not None and _is_number(value) else float("nan")

    def write(self, number: int) -> None:
        value = dict.__getitem__(self.holder, self.name)
        if isinstance(value, Tensor):
            value.fill_(number)
        else:
            self.holder[self.name] = type(value)(number)


def _numbers(probe: torch.optim.Optimizer) -> Iterator[_Number]:
    entries = [entry for entry in probe.state.values() if isinstance(entry, dict)]
    attributes = {k: v for k, v in vars(probe).items() if not is_torchs_own(k)}
    for holder, items in (
        *((part, part) for entry in entries for part in (entry, *_dicts_in(entry))),
        *((group, dict(dict.items(group))) for group in probe.param_groups),
        (vars(probe), attributes),
    ):
        for name, value in dict.items(items):
            if _is_number(value):
                yield _Number(holder, name)


def _dicts_in(entry: dict[Any, Any]) -> list[dict[Any, Any]]:
    return [value for value in entry.values() if isinstance(value, dict)]


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers_in(place: Place, values: dict[str, Any]) -> dict[Place, float]:
    """All numbers in options or attributes, in dicts there too. (What grows in a list is a record of what was done.)"""
    found: dict[Place, float] = {}
    for name, value in dict.items(values):
        if isinstance(value, dict):
            found |= _numbers_in((*place, name), value)
        elif _is_number(value) or isinstance(value, bool):
            found[(*place, name)] = float(value)
    return found


def _leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """What is in dicts, lists and tuples, and where."""
    if isinstance(value, dict):
        for name, part in dict.items(value):
            yield from _leaves(part, (*path, name))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _leaves(part, (*path, i))
    else:
        yield path, value


def _copied(value: Any) -> Any:
    """State as it is now, since the next steps go on with it. Tensors of classes of their own, some of which cannot be copied, stay."""
    if type(value) in (Tensor, nn.Parameter):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _own_options(probe: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Options of the group that is tried, the last one."""
    yield from ((name, value) for name, value in dict.items(probe.param_groups[-1]) if name != "params")


class _NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses collectives: ranks that step different parameters would wait in them for each other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            raise NotSupportedError("its step communicates with other ranks, which is zeroopt's part")
        return func(*args, **(kwargs or {}))


@contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    try:
        with nullcontext() if device.type == "cpu" else _own_numbers_on(device, seed):
            yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)


@contextmanager
def _own_numbers_on(device: torch.device, seed: int) -> Iterator[None]:
    """The same for those that are drawn on a device itself."""
    module = torch.get_device_module(device)
    state = module.get_rng_state(device)
    module.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
    try:
        yield
    finally:
        module.set_rng_state(state, device)


class _NotedOptions(dict[str, Any]):
    """A param_group that notes the names of the options that are read; what goes through all of them reads all of them."""

    reads: set[str]

    def __getitem__(self, name: str) -> Any:
        self.reads.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.reads.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.reads.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.reads.add(name)
        return super().pop(name, *default)

    def setdefault(self, name: str, default: Any = None) -> Any:
        self.reads.add(name)
        return super().setdefault(name, default)

    def __iter__(self) -> Iterator[str]:
        self.reads.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self.reads.update(super().keys())
        return super().keys()

    def values(self) -> Any:
        self.reads.update(super().keys())
        return super().values()

    def items(self) -> Any:
        self.reads.update(super().keys())
        return super().items()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:  # for `copy`
        return dict, (self.copy(),)


def copy_with(
    optimizer: torch.optim.Optimizer,
    group: int,
    params: Sequence[list[nn.Parameter]],
    reads: set[str],
    *,
    with_state: bool,
) -> torch.optim.Optimizer:
    """An optimizer of the same class and options over other parameters, without hooks.

    Args:
        params: by group; all groups have the options of one of the optimizer's.
        reads: takes the names of the options that are read.
    """
    probe: torch.optim.Optimizer = object.__new__(type(optimizer))
    own = {p: p for g in optimizer.param_groups for p in g["params"]}
    memo: dict[int, Any] = {id(p): p for p in own}  # references to parameters stay references
    for name, value in vars(optimizer).items():
        # A scheduler has replaced `step` by a closure over the real optimizer, and zeroopt.wrap some other methods.
        if name in ("param_groups", "state", "step", "zero_grad", "add_param_group", "train", "eval"):
            continue
        vars(probe)[name] = OrderedDict() if name.endswith("_hooks") else copy.deepcopy(value, memo)
    options = {k: v for k, v in optimizer.param_groups[group].items() if k not in ("params", "param_names")}
    is_on_host = all(param.device.type in ("cpu", "meta") for part in params for param in part)
    probe.param_groups = []
    for part in params:
        trial_options = _trial_options(copy.deepcopy(options, dict(memo)), is_on_host=is_on_host)
        noted = _NotedOptions({**trial_options, "params": part})
        noted.reads = reads
        probe.param_groups.append(noted)
    probe.state = defaultdict(dict)
    if with_state:
        probe.state.update({param: _state_like(optimizer, group, param) for part in params for param in part})
    train = getattr(probe, "train", None)
    if callable(train):  # schedule-free ones do not step before
        train()
    return probe


def _trial_options(options: dict[str, Any], *, is_on_host: bool) -> dict[str, Any]:
    """A warm-up may have set lr to 0, with which all rules look alike; capturable steps want a device."""
    lr = options.get("lr")
    if isinstance(lr, Tensor):
        options["lr"] = torch.full_like(lr, _LR, device="cpu" if is_on_host else None)
    elif lr is not None:
        options["lr"] = _LR
    if is_on_host and "capturable" in options:
        options["capturable"] = False
    return options


def _state_like(optimizer: torch.optim.Optimizer, group: int, param: nn.Parameter) -> dict[str, Any]:
    """State for a probe's parameter, like what the optimizer has."""
    state = optimizer.state
    # 0-dim parameters show least of what is kept for each element.
    models = sorted(optimizer.param_groups[group]["params"], key=lambda p: p.dim(), reverse=True)
    model = next((p for p in models if state.get(p) and local_of(p).numel()), None)
    if model is None:
        return {}
    return {
        name: torch.full_like(param, local_of(value).flatten()[0].item())
        if is_per_element(name, value, model)
        else copy.deepcopy(value)
        for name, value in state[model].items()
    }


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's own step, without its step hooks, the global ones and its range in a profile: those belong to a step of
    the user's."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):  # by torch, when the first optimizer of the class was made
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


def is_per_element(name: str, value: Any, param: Tensor) -> bool:
    """Whether an entry of a parameter's state holds one value for each of its elements, as moments do."""
    # The step count of a 0-dim parameter has the parameter's shape too.
    return isinstance(value, Tensor) and name != "step" and value.shape == param.shape
