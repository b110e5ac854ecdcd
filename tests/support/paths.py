"""Where the repository lies, and what a process of its own needs to find tests and their helpers."""

from __future__ import annotations

import os
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]

# For the environment of scripts and of `python -c`: what pytest has put on its own path.
PYTHON_PATH = os.pathsep.join([str(ROOT), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
