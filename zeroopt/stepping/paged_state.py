"""Where the state lies that an optimizer's own step makes.

Optimizers make it array by array in the C heap, where the memory of one goes back only when its neighbours go, too. So what a step
has made moves into pages behind it: array by array, so that only one of them is there twice at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..pages import move_to_pages, trim_heap
from ..plan.params import ParamState


@contextmanager
def new_state_in_pages(optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor]) -> Iterator[None]:
    """Let the arrays that come to the state of these leaves within it lie in pages of their own afterwards. Tensors stay the same
    objects, and so do the dicts that they are in."""
    state = optimizer.state
    before = [set(state.get(leaf, ())) for leaf in leaves]
    yield
    has_moved = False
    for leaf, names in zip(leaves, before, strict=True):
        entry = state.get(leaf, {})
        if entry.keys() - names:
            _move(entry, entry.keys() - names, leaf)
            has_moved = True
    if has_moved:
        trim_heap()


def _move(entry: ParamState, names: Collection[str], leaf: Tensor) -> None:
    inside = [value for value in tree_leaves(entry) if isinstance(value, Tensor)]
    # What shares its memory with something else would part from it.
    distinct = {id(tensor): tensor.untyped_storage().data_ptr() for tensor in (leaf, *inside)}
    sharing = Counter(distinct.values())
    for value in tree_leaves([entry[name] for name in names]):
        if isinstance(value, Tensor) and sharing[distinct[id(value)]] == 1 and value is not leaf:
            move_to_pages(value)
