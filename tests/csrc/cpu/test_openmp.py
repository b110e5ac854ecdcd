"""Kernels run on the threads of torch's own OpenMP runtime, on those of the system's without torch, and without any alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import PYTHON_PATH

from zeroopt import _C

pytestmark = pytest.mark.slow

WITH_TORCH = """
import json, os, re
import torch, zeroopt
from zeroopt import ops
ops.pack(torch.ones(10**6), torch.empty(10**6))
files = {line.split()[-1] for line in open("/proc/self/maps")}
loaded = sorted(os.path.realpath(file) for file in files if re.match(r"lib(g|i|)omp", os.path.basename(file)))
print(json.dumps({"openmp": os.path.realpath(zeroopt.build_info()["openmp"]), "loaded": loaded}))
"""

WITHOUT_TORCH = """
import importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
source, packed = np.arange(10**6, dtype=np.float32), np.zeros(10**6, np.float32)
module.pack(source.ctypes.data, 0, packed.ctypes.data, 0, source.size, 0.5, 5)
assert "torch" not in sys.modules
print(json.dumps({"openmp": module.build_info()["openmp"], "wrong": int((packed != source * 0.5).sum())}))
"""


def run(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_beside_torch_there_is_one_runtime_in_the_process() -> None:
    facts = run(WITH_TORCH)
    assert facts["loaded"] == [facts["openmp"]]


def test_a_runtime_may_give_fewer_threads_than_were_asked_for() -> None:
    facts = run(WITHOUT_TORCH, _C.__file__, OMP_THREAD_LIMIT="2")
    assert facts["wrong"] == 0
    assert not facts["openmp"] or Path(facts["openmp"]).name.startswith("libgomp.so")


def test_without_a_runtime_all_shares_are_done_on_one_thread(tmp_path: Path) -> None:
    (tmp_path / "libgomp.so.1").write_text("not a library, so that none is found")
    assert run(WITHOUT_TORCH, _C.__file__, LD_LIBRARY_PATH=str(tmp_path)) == {"openmp": "", "wrong": 0}
