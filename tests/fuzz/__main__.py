"""`python -m tests.fuzz`: attack each target for some time, and say which have failed."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.targets import TARGETS
from tests.support.paths import PYTHON_PATH, ROOT

MOST_SECONDS_OF_ONE = 60
MOST_MB = 4096  # of a process that has imported torch


def attack(name: str, seconds: int, folder: Path) -> bool:
    """Whether nothing was found. What was lies in the folder, and so do inputs that found new ways, for the next time."""
    corpus, begin = folder / name / "corpus", folder / name / "examples"
    for path in (corpus, begin):
        path.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(TARGETS[name].examples()):
        (begin / str(number)).write_bytes(example)
    command = [
        *(sys.executable, "-m", "tests.fuzz.one", name, str(corpus), str(begin)),
        f"-max_total_time={seconds}",
        f"-timeout={MOST_SECONDS_OF_ONE}",
        f"-rss_limit_mb={MOST_MB}",
        f"-artifact_prefix={folder / name}/",
        "-print_final_stats=1",
    ]
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    log = folder / name / "log"
    with log.open("w") as output:
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    told = log.read_text(errors="replace")
    runs = re.findall(r"stat::number_of_executed_units: +(\d+)", told)
    ways = re.findall(r" cov: (\d+) ", told)
    found = "nothing found" if status == 0 else f"FAILED, see {log}"
    print(f"{name:20} {(runs or ['?'])[-1]:>10} inputs, {(ways or ['?'])[-1]:>6} branches, {found}", flush=True)
    return status == 0


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all of them if none is given")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "fuzz", help="of inputs that were found")
    args = parser.parse_args()
    if find_spec("atheris") is None:
        parser.error("there is no atheris: pip install atheris (it has wheels for CPython 3.11 to 3.13 on Linux)")
    unknown = set(args.targets) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}, but {', '.join(TARGETS)}")
    failed = [name for name in args.targets or TARGETS if not attack(name, args.seconds, args.folder.resolve())]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
