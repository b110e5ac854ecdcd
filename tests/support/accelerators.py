"""Accelerators of Hugging Face on the ranks of a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@contextmanager
def as_started() -> Iterator[None]:
    """As torchrun starts a process: Accelerate keeps what it knows of the processes, and of precision, from one test to the next."""
    _forget()
    # As torchrun sets them, on the ranks of a test; in a process of its own, there are none.
    with patch.dict(os.environ, LOCAL_WORLD_SIZE=os.environ.get("WORLD_SIZE", "1"), OMP_NUM_THREADS="1"):
        try:
            yield
        finally:
            _forget()


@contextmanager
def accelerator(**options: Any) -> Iterator[Accelerator]:
    """A new one, on the CPU."""
    with as_started():
        yield Accelerator(cpu=True, **options)


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
