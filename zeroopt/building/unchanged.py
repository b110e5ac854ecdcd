"""A model through which something runs, and which is then as it was before."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn

_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, deque)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """At its end, modules have the attributes, parameters and buffers that they had, and their lists, dicts and sets what was in these:
    what modules keep of a forward without values would be of no use later. What is in tensors is not looked after, nor what is kept
    outside of modules.
    """
    containers: list[Any] = []
    for module in model.modules():
        attributes = vars(module)
        containers += [attributes, *filter(_is_container, attributes.values())]
    before = [copy(container) for container in containers]
    try:
        yield
    finally:
        for container, content in zip(containers, before, strict=True):
            container.clear()
            container.extend(content) if type(container) in _SEQUENCES else container.update(content)


def _is_container(value: object) -> bool:
    return type(value) in (*_MAPPINGS, *_SEQUENCES, set)
