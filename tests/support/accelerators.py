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
def accelerator(**options: Any) -> Iterator[Accelerator]:
    """A new one, on the CPU; Accelerate keeps what it knows of the processes, and of precision, for all that are made later."""
    _forget()
    with patch.dict(
        os.environ, LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"], OMP_NUM_THREADS="1"
    ):  # as torchrun sets them
        try:
            yield Accelerator(cpu=True, **options)
        finally:
            _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
