"""When a backward is through: the outermost one, where others run within it, as those of reentrant activation checkpointing do.

Autograd tells the end of a backward to whoever asks while it runs. Who asks within a node that runs one of its own is told the end of
that. Then the node that comes next asks again, in the backward around it:

    backward        node ──────────────────▶ next node ──▶ … ──▶ end: told again
    within it         └─▶ gradients ─▶ end      asks again
                             ask        told
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..untraced import untraced_hook


class BackwardEnd:
    """Calls something once, when the backward that runs now is through, with those around it. Made while it runs.

    Autograd keeps it until then, and drops it when that backward raises. Where the node that runs a backward within another has no node
    behind it, the end of the inner one counts.

    Args:
        call: what is called.
        ended_within: called when the backward in which this was made is through, and one around it is not.
    """

    __slots__ = ("__weakref__", "_backward", "_call", "_ended_within", "_handles")

    def __init__(self, call: Callable[[], None], ended_within: Callable[[], None] | None = None) -> None:
        self._call, self._ended_within = call, ended_within
        self._handles: list[Any] = []
        self._backward = -1  # autograd's number of the one whose end will be told, while it is known
        self._ask()

    def forget(self) -> None:
        """The backward has raised: call nothing from one that comes later by the same nodes."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def runs_within(self) -> bool:
        """Whether the backward that runs now is within the one whose end will be told, or is one of several within it."""
        return torch._C._current_graph_task_id() != self._backward

    def _ask(self) -> None:
        self._backward = torch._C._current_graph_task_id()
        torch.autograd.Variable._execution_engine.queue_callback(self._told)

    @untraced_hook
    def _told(self) -> None:
        around = torch._C._current_autograd_node()
        following = [] if around is None else [node for node, _ in around.next_functions if node is not None]
        if not following:
            self._call()
            return
        self._backward = -1
        self._handles = [node.register_prehook(self._ask_again) for node in following]
        if self._ended_within is not None:
            self._ended_within()

    @untraced_hook
    def _ask_again(self, gradients: Any) -> None:
        self.forget()
        self._ask()
