"""Names of the package whose types pyright does not know: `python -m tests.typed.completeness` (`make types`), which needs pyright.

Types that pyright calls ambiguous, those of attributes that it has to infer, are known to whoever uses them, and count as such.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

# Classes on top of classes that have no types, or are another one in each release of torch.
ON_OTHERS = ("zeroopt.integrations.accelerate.", "zeroopt.integrations.axolotl.", "zeroopt.state.shard_tensor.")


def looked_at() -> dict[str, Any]:
    """What pyright tells of the package, which it has to find as an installed one of the Python that comes first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--verifytypes", "zeroopt", "--ignoreexternal", "--outputjson"],
        cwd=ROOT / "tests" / "typed",
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,  # its status tells of what is ambiguous, too
    )
    told: dict[str, Any] = json.loads(done.stdout)["typeCompleteness"]
    return told


def main() -> int:
    """The exit status."""
    symbols = looked_at()["symbols"]
    unknown = [s["name"] for s in symbols if not s["isTypeKnown"] and not s.get("isTypeAmbiguous")]
    ours = [name for name in unknown if not name.startswith(ON_OTHERS)]
    print(f"{len(symbols)} names, {len(unknown)} of unknown type, {len(ours)} of them zeroopt's own", *ours, sep="\n")
    return int(not symbols or bool(ours))


if __name__ == "__main__":
    sys.exit(main())
