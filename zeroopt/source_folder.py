"""The package imported from a clone, where Python finds the sources before what was installed: there are no kernels beside them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def check_kernels() -> None:
    """Raise ImportError, which says what to do, when the compiled kernels are not in the folder that zeroopt is imported from."""
    if find_spec("zeroopt._C") is not None:
        return
    folder = Path(__file__).parent
    raise ImportError(
        f"zeroopt was imported from {folder}, where there are sources but no compiled kernels (zeroopt._C): Python looks into the "
        f"current folder first. If zeroopt is installed, start Python outside of {folder.parent}; to work on these sources, "
        "install them in place: pip install --editable . (or make venv)"
    )
