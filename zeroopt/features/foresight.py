"""What the first forward tells of the first backward: in which order gradients will come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..feature import Feature
from ..parameters.first_uses import FirstUses
from ..parameters.gathers import has_compiled

Follow = Callable[[Sequence[nn.Parameter]], None]


class Foresight(Feature):
    """Watches forwards until the next backward, and has the order followed that they foretell."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._uses: FirstUses | None = None
        self._follow: Follow | None = None

    def watch(self, follow: Follow) -> None:
        """From now on, until a backward begins.

        Args:
            follow: is called then, on all ranks, with the parameters that this rank has used, in the order in which their
                gradients are expected.
        """
        self.forget()
        self._uses, self._follow = FirstUses(self._model), follow

    def forget(self) -> None:
        """Watch no more."""
        self._follow = None
        if self._uses is not None:
            self._uses.stop()
            self._uses = None

    @torch.no_grad()
    def backward_begins(self) -> None:
        """The graph is there."""
        uses, follow = self._uses, self._follow
        if uses is None or follow is None:
            return
        expected = uses.params()[::-1]
        self._follow = None
        if not has_compiled():  # code that was compiled with these hooks would be compiled again without them
            self.forget()
        follow(expected)
