"""What newcomers see when Python finds the sources before what was installed, and what `import zeroopt` finds later."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zeroopt

pytestmark = pytest.mark.slow

# An editable installation brings a finder that knows where its kernels are; another installation has none.
WITHOUT_FINDERS_OF_EDITABLE_INSTALLATIONS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__.startswith("_frozen_importlib")]
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_sources_without_kernels_say_what_to_do(tmp_path: Path) -> None:
    sources = Path(zeroopt.__file__).parent
    shutil.copytree(sources, tmp_path / "zeroopt", ignore=shutil.ignore_patterns("_C*.so", "_C*.pyd", "__pycache__"))
    done = run(WITHOUT_FINDERS_OF_EDITABLE_INSTALLATIONS + "import zeroopt", tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: zeroopt was imported from {tmp_path / 'zeroopt'}, where there are sources but no"
    )
    assert "pip install --editable ." in last


def test_checkpoint_is_imported_when_it_is_used(tmp_path: Path) -> None:
    script = """
import sys, zeroopt
assert "torch.distributed.checkpoint" not in sys.modules
zeroopt.checkpoint.save
assert "torch.distributed.checkpoint" in sys.modules
try:
    zeroopt.nothing
except AttributeError as error:
    print(error)
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "module 'zeroopt' has no attribute 'nothing'"), done.stderr
