"""How small may the pieces be in which ranks share an optimizer's work: elements, or whole parameters?

Rather than keep a list of names, ask the optimizer. For each of its param_groups it steps small tensors, and some as large as
its parameters within bounds, since there are rules that begin at a size: by themselves, next to others, and cut into flat pieces.
A rule that looks at rows, matrices or norms of a parameter gives other numbers for the pieces, and gets whole parameters. One for
which it matters what else is stepped cannot be shared by ranks at all, whether that shows in what it does to a parameter, in
the parameter's state or in the options of the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from math import isclose, isnan, prod
from typing import Any

import torch
from torch import Tensor

from ..errors import NotSupportedError
from ..plan.params import Grain
from .probe import Outcome, Place, Trial, is_per_element, try_out
from .shapes import SMALL_NUMEL, Shape, large_shapes, small_shape
from .stray_state import find_stray_state

_FIRST_STEPS = 8  # of small tensors
_LATER_STEPS = 3  # after each setting ahead of the counters, and all of large tensors
# Of the gradients of other parameters, in each step: they change a norm over all, and not by the same factor each time,
# which would be lost on rules that normalise.
_SCALES = (1e4, 1.0, 1e2)
# Far above rounding, far below what a different rule gives.
_TOLERANCE = 1e-4
_ADVICE = (
    "zeroopt lets ranks step different parameters, or different pieces of one, which is right only where a step needs "
    "the gradient and the state of that parameter and nothing else"
)
# Exactly these classes, which a test tries out once and for all: a subclass may have changed the rule.
ELEMENT_WISE = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)


def find_grains(
    optimizer: torch.optim.Optimizer, groups: Sequence[int] | None = None, home: torch.device | None = None
) -> list[Grain]:
    """For each param_group the smallest pieces that it can be stepped in. The optimizer itself is left alone.

    Args:
        groups: positions of the param_groups that are tried; all of them when None.
        home: the device on which it is to step; None: that of its parameters.

    Raises:
        NotSupportedError: it cannot step a parameter by itself, or steps it differently when there are others; it draws
            random numbers; or it keeps state where ranks do not find it.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotSupportedError(f"LBFGS calls the model several times a step and looks at all parameters. {_ADVICE}")
    positions = range(len(optimizer.param_groups)) if groups is None else groups
    if type(optimizer) in ELEMENT_WISE:
        return [Grain.ELEMENT for _ in positions]
    _check_strays(optimizer, [param for group in optimizer.param_groups for param in group["params"]], name)
    verdicts: list[_Verdict] = []
    return [_find_grain(optimizer, number, home, verdicts) for number in positions]


def _find_grain(
    optimizer: torch.optim.Optimizer, group: int, home: torch.device | None, verdicts: list[_Verdict]
) -> Grain:
    params = [param for param in optimizer.param_groups[group]["params"] if param.requires_grad]
    device = _device_for(params) if home is None else home
    kinds = {_Kind(small_shape(param.dim()), torch.float32, device) for param in params}
    # Rounding hides much in 16 bits, but some rules do something else there.
    others = [param for param in params if param.dtype is not torch.float32]
    kinds |= {_Kind(small_shape(param.dim()), param.dtype, device) for param in others}
    small = {kind: _ask(optimizer, group, kind, verdicts) for kind in sorted(kinds, key=_Kind.order)}
    # Where small ones are stepped whole already, large ones would be, too; and matrices take their time.
    cut = {len(kind.shape) for kind in small} - {
        len(k.shape) for k, grain in small.items() if grain is not Grain.ELEMENT
    }
    large = [_Kind(shape, torch.float32, device) for shape in large_shapes(params) if len(shape) in cut]
    return max(
        (*small.values(), *(_ask(optimizer, group, kind, verdicts) for kind in sorted(large, key=_Kind.order))),
        default=Grain.ELEMENT,
    )


def _device_for(params: Sequence[Tensor]) -> torch.device:
    """Of parameters, but for those on the meta device, which are only planned with."""
    return next((param.device for param in params if param.device.type != "meta"), torch.device("cpu"))


@dataclass(frozen=True)
class _Kind:
    """Parameters that are tried out by one tensor."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def order(self) -> tuple[int, Shape, str]:
        """The same on all ranks."""
        return len(self.shape), self.shape, str(self.dtype)


@dataclass(frozen=True)
class _Verdict:
    """What was found for parameters of one kind, with the options that were looked at."""

    kind: _Kind
    options: dict[str, Any]
    grain: Grain


def _ask(optimizer: torch.optim.Optimizer, group: int, kind: _Kind, verdicts: list[_Verdict]) -> Grain:
    """What was found for another group holds for one that differs only in what a step does not read, and in its rate."""
    options = optimizer.param_groups[group]
    for known in verdicts:
        if known.kind == kind and all(_is_alike(k, options.get(k, _MISSING), v) for k, v in known.options.items()):
            return known.grain
    question = _Question(optimizer, group, kind)
    grain = question.answer()
    if not question.asked_state:
        read = {name: options.get(name, _MISSING) for name in question.reads - {"params"}}
        verdicts.append(_Verdict(kind, read, grain))
    return grain


_MISSING = object()


def _is_alike(name: str, one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if name == "lr":
        return True  # it is the same number in all trials
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


class _Question:
    """How small the pieces may be of parameters of one kind, under the options of one group.

    Attributes:
        reads: the names of the options that were looked at.
        asked_state: the state that the optimizer had was needed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: int, kind: _Kind) -> None:
        self._optimizer, self._group, self._kind = optimizer, group, kind
        self._name = type(optimizer).__name__
        self._tolerance = max(_TOLERANCE, 2 * torch.finfo(kind.dtype).eps)
        self._is_small = prod(kind.shape) <= SMALL_NUMEL
        self.reads: set[str] = set()
        self.asked_state = False

    def answer(self) -> Grain:
        """Raises NotSupportedError where no pieces will do."""
        start, *grads = self._draw(self._kind.shape, 1 + (_FIRST_STEPS if self._is_small else _LATER_STEPS))
        alone = self._alone(start, grads)
        self._check_company(start, grads, alone.outcomes)
        try:
            pieces = self._try([self._cut(start)], [self._cut(grad) for grad in grads])
        except Exception:  # noqa: BLE001
            return Grain.MATRIX
        same = len(pieces.outcomes) == len(alone.outcomes) and all(
            self._has_stepped_pieces(one, other) for one, other in zip(alone.outcomes, pieces.outcomes, strict=True)
        )
        return Grain.ELEMENT if same else Grain.PARAMETER

    def _alone(self, start: Tensor, grads: Sequence[Tensor]) -> Trial:
        try:
            alone = self._try([[start]], [[grad] for grad in grads], watched=True)
            again = self._try([[start]], [[grad] for grad in grads], later=0, seed=1) if self._is_small else alone
        except Exception as error:
            raise NotSupportedError(
                f"{self._name} could not step a parameter of {len(self._kind.shape)} dimensions by itself "
                f"({type(error).__name__}: {error}). {_ADVICE}"
            ) from error
        _check_strays(alone.probe, alone.params, self._name, SMALL_NUMEL if start.numel() == SMALL_NUMEL else 0)
        for one, other in zip(alone.outcomes, again.outcomes, strict=False):
            if not torch.equal(one.changes[0].nan_to_num(), other.changes[0].nan_to_num()):
                raise NotSupportedError(
                    f"{self._name} draws random numbers in its step. Ranks that step different pieces would draw other ones "
                    "than one that steps all, and ranks that step the same would not agree"
                )
        if not any(bool(outcome.changes[0].any()) for outcome in alone.outcomes):
            raise NotSupportedError(
                f"{self._name} was tried out on small tensors and did not change any in {len(grads)} steps and more. It has to "
                "step what is in its param_groups by the gradients in `grad`"
            )
        if not bool(alone.outcomes[0].changes[0].isfinite().all()):
            raise NotSupportedError(
                f"{self._name} was tried out on small tensors and stepped one of {len(self._kind.shape)} dimensions to what is "
                "infinite or not a number, so it is not known how it may be shared by ranks"
            )
        return alone

    def _check_company(self, start: Tensor, grads: Sequence[Tensor], alone: Sequence[Outcome]) -> None:
        """Raise where it matters what else is stepped, in the same group or in others."""
        if self._is_small:
            other_start, other_grads = start, [grad.roll(1) for grad in grads]
        else:
            other_start, *other_grads = self._draw(small_shape(start.dim()), 1 + len(grads))
        scales = islice(cycle(_SCALES), len(grads))
        others = [-grad * scale for grad, scale in zip(other_grads, scales, strict=True)]
        within = [-2 * other_start, start, 3 * other_start]
        between = [[other, grad, other] for other, grad in zip(others, grads, strict=True)]
        company: Trial | None = None
        if len(self._optimizer.param_groups) > 1:  # what steps the first group alone may do so where there is no other
            with suppress(Exception):  # some want as many groups as they were built with
                company = self._try(
                    [[other_start], within], [[other, *three] for other, three in zip(others, between, strict=True)]
                )
        try:
            company = company or self._try([within], between)
        except Exception as error:
            raise NotSupportedError(
                f"{self._name} could step a parameter of {start.dim()} dimensions by itself, but not next to others "
                f"({type(error).__name__}: {error}). {_ADVICE}"
            ) from error
        index = len(company.params) - 2
        what = next(self._differences(alone, company.outcomes, index), None)
        if what is not None:
            raise NotSupportedError(
                f"{self._name} steps a parameter differently when others are stepped with it: {what}. {_ADVICE}"
            )

    def _try(
        self,
        groups: list[list[Tensor]],
        grads: Sequence[list[Tensor]],
        *,
        later: int = _LATER_STEPS,
        seed: int = 0,
        watched: bool = False,
    ) -> Trial:
        trial = try_out(self._optimizer, self._group, groups, grads, later_steps=later, seed=seed, watched=watched)
        self.reads |= trial.reads
        self.asked_state |= trial.with_state
        return trial

    def _draw(self, shape: Shape, count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        kind = self._kind
        return [torch.randn(shape, generator=generator, device="cpu").to(kind.device, kind.dtype) for _ in range(count)]

    @staticmethod
    def _cut(value: Tensor) -> list[Tensor]:
        """Flat pieces, of which some have one element or begin within a block."""
        numel = value.numel()
        cuts = sorted({0, numel // 4, numel // 4 + 1, numel})
        return [value.flatten()[begin:end] for begin, end in pairwise(cuts)]

    def _differences(self, alone: Sequence[Outcome], company: Sequence[Outcome], index: int) -> Iterator[str]:
        """What comes out differently for one parameter next to others, in words."""
        if len(alone) != len(company):
            yield "it could not go on"
        for one, other in zip(alone, company, strict=False):
            if not self._has_same_change(one, other.changes[index]):
                yield (
                    "what it makes of the parameter differs, as with a norm over all gradients (for clipping, call "
                    "clip_grad_norm_ of the optimizer that zeroopt.wrap returns)"
                )
            for place in sorted(one.states[0].keys() | other.states[index].keys(), key=str):
                if not self._is_same(one.states[0].get(place), other.states[index].get(place)):
                    yield f"the parameter's state {_words(place)!r} differs"
            for place in sorted(one.numbers.keys() | other.numbers.keys(), key=str):
                if not self._is_same(one.numbers.get(place), other.numbers.get(place)):
                    yield f"the {place[0]} {_words(place[1:])!r} differs, which it learns from all of them"

    def _has_stepped_pieces(self, whole: Outcome, pieces: Outcome) -> bool:
        """Whether pieces have become what the whole has, and so has their state."""
        if not self._has_same_change(whole, torch.cat(pieces.changes)):
            return False
        param, entry = whole.starts[0], whole.states[0]
        if any(piece.keys() != entry.keys() for piece in pieces.states):
            return False
        for place, value in entry.items():
            parts = [piece[place] for piece in pieces.states]
            if is_per_element(place[-1], value, param):
                if not self._is_same(value.flatten(), torch.cat([part.flatten() for part in parts])):
                    return False
            elif not all(self._is_same(value, part) for part in parts):
                return False
        return True

    def _has_same_change(self, alone: Outcome, change: Tensor) -> bool:
        expected = alone.changes[0].flatten()
        rounding = torch.finfo(self._kind.dtype).eps * float(alone.starts[0].abs().max())
        return self._is_close(expected, change.flatten(), rounding)

    def _is_same(self, one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return one.shape == other.shape and self._is_close(one, other)
        if isinstance(one, float) and isinstance(other, float):
            return one == other or isclose(one, other, rel_tol=self._tolerance) or (isnan(one) and isnan(other))
        return type(one) is type(other) and (not isinstance(one, (bool, int, str, bytes)) or one == other)

    def _is_close(self, one: Tensor, other: Tensor, rounding: float = 0.0) -> bool:
        if not one.is_floating_point():
            return torch.equal(one, other)
        largest = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
        atol = self._tolerance * largest * 1e-3 + rounding
        return one.shape == other.shape and torch.allclose(one, other, rtol=self._tolerance, atol=atol, equal_nan=True)


def _words(place: Place) -> str:
    return ".".join(map(str, place))


def _check_strays(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], name: str, numel: int = 0) -> None:
    stray = find_stray_state(optimizer, params, numel)
    if stray is not None:
        raise NotSupportedError(
            f"{name} keeps {stray} where ranks do not see it. zeroopt puts pieces in the place of parameters, and moves and "
            "saves what is in optimizer.state[param], in plain tensors; keep state there, and wrap what is inside of an "
            "optimizer around another one"
        )
