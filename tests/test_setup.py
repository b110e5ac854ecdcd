"""Versions that builds of the same sources go by."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("label", ["", "cu130"])
def test_a_version_has_the_label_that_is_asked_for_in_a_source_distribution_too(tmp_path: Path, label: str) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    # As setuptools writes it into every source distribution.
    (tmp_path / "setup.cfg").write_text("[egg_info]\ntag_build = \ntag_date = 0\n")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info"],
        cwd=tmp_path,
        env={**os.environ, "ZEROOPT_LOCAL_VERSION": label},
        check=True,
        timeout=300,
    )
    metadata = (tmp_path / "zeroopt.egg-info" / "PKG-INFO").read_text()
    version = next(line for line in metadata.splitlines() if line.startswith("Version: "))
    assert version == f"Version: 0.1.0{label and '+'}{label}"
