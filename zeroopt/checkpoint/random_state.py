"""`RandomState`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

_PYTHON_VERSION = 3  # of the state of Python's generator


class RandomState:
    """The state of this process's random number generators: torch's of the CPU and of its current CUDA device, Python's and numpy's.

    Give it to `save` and `resume` as `rank_extra={"random": RandomState()}`: each rank has its own. They come back where as many ranks
    go on as have saved; other numbers of ranks keep the generators that they have.
    """

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors."""
        version, words, normal = random.getstate()
        assert version == _PYTHON_VERSION
        _, key, place, has_normal, next_normal = np.random.get_state()
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, device="cpu"),
            "python_normal": normal,
            "numpy": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "numpy_place": (int(place), int(has_normal), float(next_normal)),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the generators go on from there."""
        torch.set_rng_state(state["torch"])
        random.setstate((_PYTHON_VERSION, tuple(state["python"].tolist()), state["python_normal"]))
        np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_place"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
