"""DiLoCo in one process, as its papers have it: obvious code, to which outer steps are compared.

Douillard et al. 2023, arXiv:2311.08105, algorithm 1; 2025, arXiv:2501.18512, algorithm 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

OuterFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Fragment:
    """Some parameters that have their outer steps together.

    Attributes:
        names: of the parameters.
        first: the step at which it first sets out; 0: after a whole period.
        travelling: by the step at which it arrives, what it will be.
    """

    names: list[str]
    anchor: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    first: int
    travelling: dict[int, list[Tensor]] = field(default_factory=dict)


class Diloco:
    """Workers that train copies of a model, and what they have in common.

    Attributes:
        workers: each a model and its optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        make_inner: Callable[[nn.Module], torch.optim.Optimizer],
        make_outer: OuterFactory,
        num_workers: int,
        every: int,
        *,
        fragments: Sequence[Sequence[str]] | None = None,
        delay: int = 0,
        kept: float = 0.0,
    ) -> None:
        models = [copy.deepcopy(model) for _ in range(num_workers)]
        self.workers = [(one, make_inner(one)) for one in models]
        self.every, self.delay, self.kept = every, delay, kept
        self.steps = 0
        params = dict(model.named_parameters())
        named = [list(params)] if fragments is None else fragments
        self.fragments = []
        for number, names in enumerate(named):
            anchor = [nn.Parameter(params[name].detach().clone()) for name in names]
            self.fragments.append(Fragment(list(names), anchor, make_outer(anchor), number * every // len(named)))

    def step(self, backward: Callable[[nn.Module, int], None], training: Iterable[int] | None = None) -> None:
        """A step of the workers that train, all of them where none are named.

        Args:
            backward: gives a model, which is that of a worker, its gradients.
        """
        for number in range(len(self.workers)) if training is None else training:
            model, optimizer = self.workers[number]
            optimizer.zero_grad()
            backward(model, number)
            optimizer.step()
        self.steps += 1
        for fragment in self.fragments:
            if (self.steps - fragment.first) % self.every == 0:
                fragment.travelling[self.steps + self.delay] = self.outer_step(fragment, range(len(self.workers)))
        for fragment in self.fragments:
            if self.steps in fragment.travelling:
                self.arrive(fragment, fragment.travelling.pop(self.steps))

    @torch.no_grad()
    def outer_step(self, fragment: Fragment, contributors: Iterable[int]) -> list[Tensor]:
        """What the workers will have in common."""
        who = list(contributors)
        for position, name in enumerate(fragment.names):
            anchor = fragment.anchor[position]
            changes = [anchor - dict(self.workers[number][0].named_parameters())[name] for number in who]
            total = changes[0].clone()
            for change in changes[1:]:
                total += change
            anchor.grad = total / len(who)
        fragment.optimizer.step()
        return [anchor.detach().clone() for anchor in fragment.anchor]

    @torch.no_grad()
    def arrive(self, fragment: Fragment, values: list[Tensor]) -> None:
        """All workers take over what they have in common, and keep some of their own."""
        for model, _ in self.workers:
            params = dict(model.named_parameters())
            for name, value in zip(fragment.names, values, strict=True):
                params[name].copy_(self.kept * params[name] + (1 - self.kept) * value)
