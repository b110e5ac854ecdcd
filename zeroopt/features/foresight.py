"""What the first forward tells of the first backward: in which order gradients will come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..collectives import Transport
from ..feature import Feature
from ..parameters.compiled import has_compiled
from ..parameters.first_uses import FirstUses
from ..plan.buckets import agree_on_order
from ..plan.params import ManagedParam
from ..profiling import named_range

Follow = Callable[[Sequence[int]], None]


class Foresight(Feature):
    """Watches forwards until the next backward, and has the order followed that those of rank 0 foretell."""

    def __init__(self, model: nn.Module, transport: Transport) -> None:
        self._model = model
        self._transport = transport
        self._params: Sequence[ManagedParam] = ()
        self._uses: FirstUses | None = None
        self._follow: Follow | None = None
        self._here: Tensor | None = None

    def watch(self, params: Sequence[ManagedParam], follow: Follow) -> None:
        """From now on, until a backward begins. Collective.

        Args:
            params: by their index; all that the model has.
            follow: is called then, on all ranks, with their indices in the order in which gradients are expected.
        """
        self.forget()
        self._params, self._follow = params, follow
        self._uses = FirstUses(self._model)
        self._here = self._transport.allocate(1, torch.uint8, params[0].param.device)

    def forget(self) -> None:
        """Watch no more, and be told nothing. All ranks do so."""
        self._follow = None
        if self._uses is not None:
            self._uses.stop()
            self._uses = None
        if self._here is not None:
            self._transport.free(self._here)
            self._here = None

    @torch.no_grad()
    def backward_begins(self) -> None:
        """The graph is there."""
        follow, uses = self._follow, self._uses
        if follow is None or uses is None:
            return
        with named_range("replan"):
            order = self._agree(uses.params()[::-1])
            self._follow = None
            if not has_compiled():  # code that was compiled with these hooks would be compiled again without them
                self.forget()
            follow(order)

    def _agree(self, expected: Sequence[nn.Parameter]) -> list[int]:
        """What rank 0 expects."""
        assert self._here is not None
        # Through the transport, which notices when another rank has gone on to something else.
        everyone_came = self._transport.start_max(
            self._here, torch.empty_like(self._here), label="the order of gradients"
        )
        everyone_came.finish()
        everyone_came.wait_until_read()
        index_of = {managed.param: managed.index for managed in self._params}
        came = [index_of[param] for param in expected if param in index_of]
        return agree_on_order(came, self._params, self._transport.control)
