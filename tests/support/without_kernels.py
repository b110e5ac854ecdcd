"""zeroopt as it is where it was built without CUDA."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import zeroopt._C
from zeroopt.ops.devices import missing_kernels


@contextmanager
def built_without_cuda() -> Iterator[list[str]]:
    """The build has no CUDA kernels; yields what goes to the log of zeroopt meanwhile. Whoever launches one gets an error."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    facts = {**zeroopt._C.build_info(), "cuda": False, "cuda_version": "", "cuda_archs": []}
    kernels = {name: _refuse for name in dir(zeroopt._C) if name.startswith("cuda_")}
    logging.getLogger("zeroopt").addHandler(handler)
    try:
        with patch.multiple(zeroopt._C, build_info=lambda: facts, **kernels):
            missing_kernels.cache_clear()
            yield messages
    finally:
        logging.getLogger("zeroopt").removeHandler(handler)
        missing_kernels.cache_clear()


def _refuse(*_: object) -> None:
    raise AssertionError("a CUDA kernel was launched")
