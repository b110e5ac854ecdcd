"""A universal checkpoint, as DeepSpeed's `ds_to_universal` writes it: files for each parameter and each of its states.

zero/<parameter>/fp32.pt, exp_avg.pt, …   {"param": tensor}
zero/<parameter>/step.pt                  the step count
zero/optimizer_state.pt                   what the optimizer has besides
mp_rank_00_model_states.pt                as in the checkpoint that it was made from
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import StateError
from .deepspeed_ranks import ModelFile, check_stage, entry, load_mapping
from .inert_pickle import load_inert
from .plain_state import make_step

_COMMON = Path("zero", "optimizer_state.pt")
_MASTER = "fp32"


class UniversalFiles:
    """A universal checkpoint. Files are mapped when they are asked for, and tensors are views of them."""

    def __init__(self, folder: Path) -> None:
        """Open the files that are common to all parameters.

        Raises:
            StateError: one is missing or damaged, or of a layout that is not known.
            NotSupportedError: it was made from stage 3, or the model was split over ranks.
        """
        self.folder = folder
        common = load_mapping(folder / _COMMON)
        check_stage(common, folder / _COMMON)
        self.options: Sequence[Mapping[str, Any]] | None = common.get("param_groups")
        self.model = ModelFile.read(folder)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a directory holds a universal checkpoint."""
        return (folder / "zero").is_dir()

    def master(self, name: str) -> Tensor:
        """A trained parameter in float32."""
        return self._read(name, self.folder / "zero" / name / f"{_MASTER}.pt")

    def state(self, name: str) -> dict[str, Any]:
        """The optimizer's state of a parameter, in its shape."""
        keys = self._keys(name)
        expected = self._keys(next(iter(self.model.groups)))
        if keys and keys != expected:
            raise StateError(
                f"{self.folder / 'zero' / name} has files of {keys}, those of other parameters are of {expected}: copy "
                "it again from where it was made"
            )
        paths = {key: self.folder / "zero" / name / f"{key}.pt" for key in keys}
        return {
            key: make_step(load_inert(path), path) if key == "step" else self._read(name, path)
            for key, path in paths.items()
        }

    def _keys(self, name: str) -> list[str]:
        return sorted(p.stem for p in (self.folder / "zero" / name).glob("*.pt") if p.stem != _MASTER)

    def _read(self, name: str, path: Path) -> Tensor:
        value = entry(load_inert(path), "param", path, self.model.version)
        shape = self.model.shapes[self.model.groups[name]][name]
        if not isinstance(value, Tensor) or value.numel() != math.prod(shape):
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise StateError(f"{path} holds {found}, expected {math.prod(shape)} elements of parameter {name!r}")
        return value.view(shape)
