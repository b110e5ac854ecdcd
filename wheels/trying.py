"""Each wheel in an environment of its own, in which nothing else is but what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from wheels.building import run
from wheels.interpreters import ROOT, Interpreter, make_environment

DIGESTS = ROOT / "tests" / "support" / "kernel_digests.py"
SMOKE = ROOT / "wheels" / "smoke.py"
# The package is not imported, for it needs torch: where its module lies, and of which version that and the package say they are.
INSTALLED = """
import importlib.metadata, importlib.util, json, pathlib
(folder,) = importlib.util.find_spec("zeroopt").submodule_search_locations
(path,) = pathlib.Path(folder).glob("_C*.so")
spec = importlib.util.spec_from_file_location("_C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([str(path), module.build_info()["version"], importlib.metadata.version("zeroopt")]))
"""


def try_wheel(wheel: Path, interpreter: Interpreter, work: Path, torch: str | None) -> str:
    """Install a wheel and run its kernels; returns what was found well.

    Without torch, every kernel must give the bits that the build gives that the tests ran on. With torch, a small training
    must give what plain torch gives.

    Args:
        torch: what pip is to install as torch; None for none.

    Raises:
        RuntimeError: another result.
        subprocess.CalledProcessError: the wheel cannot be installed, or its code fails.
    """
    python = make_environment(interpreter, work / "trial" / interpreter.version)
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    run([*pip, "--no-deps", wheel])
    run([*pip, "numpy"])
    module, built, version = json.loads(_output([python, "-c", INSTALLED]))
    if built != version:
        raise RuntimeError(f"{wheel.name}: its module is of version {built}")
    if _output([python, DIGESTS, module]) != _digests_of_development():
        raise RuntimeError(f"{wheel.name}: kernels give other bits than those of the build that the tests ran on")
    if torch is None:
        return "kernels"
    run([*pip, torch, wheel])
    run([python, SMOKE], folder=work)
    return f"kernels, training with {torch}"


@cache
def _digests_of_development() -> str:
    (module,) = (ROOT / "zeroopt").glob(f"_C.cpython-{sys.version_info[0]}{sys.version_info[1]}-*.so")
    return _output([sys.executable, DIGESTS, module])


def _output(command: Sequence[str | Path]) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ZEROOPT_CPU_ISA")}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd="/"
    ).stdout.strip()
