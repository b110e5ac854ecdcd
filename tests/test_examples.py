"""The scripts that a user starts from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def torchrun(world_size: int, script: str, *arguments: str) -> list[str]:
    """Lines that a script prints."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}", "--master-port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [*command, str(EXAMPLES / script), *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_resume_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "runs")
    first = torchrun(2, "resume.py", "--checkpoints", checkpoints, "--steps", "7")
    assert [line.split("  ")[0] for line in first] == [f"step {number}" for number in range(1, 8)]
    second = torchrun(2, "resume.py", "--checkpoints", checkpoints, "--steps", "10")
    assert second[0] == f"going on from {checkpoints}/step-5, step 5"
    assert second[1:3] == first[5:7], "the steps behind the checkpoint, taken twice"
    other = torchrun(3, "resume.py", "--checkpoints", checkpoints, "--steps", "11", "--stage", "1")
    assert other[0] == f"going on from {checkpoints}/step-10, step 10"
    assert sorted(path.name for path in Path(checkpoints).iterdir()) == ["step-10", "step-5"]
