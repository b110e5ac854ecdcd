"""SLURM's scripts start ranks that train together, where `srun` and `scontrol` are small stand-ins that start tasks on this host."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launched import notes
from paths import PYTHON_PATH, ROOT

FOLDER = ROOT / "recipes" / "launch"
SCRIPTS = ("slurm_torchrun.sh", "slurm_srun.sh")
TIMEOUT_S = 240

SRUN = """#!/usr/bin/env bash
set -u
[[ $1 == --kill-on-bad-exit=1 ]] && shift
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
WHO = "import os, sys; sys.stdout.write('{RANK} {LOCAL_RANK}\\n'.format(**os.environ))"  # in one piece
SCONTROL = '#!/usr/bin/env bash\n[[ "$*" == "show hostnames nodes[1-2]" ]] && printf "localhost\\nelsewhere\\n"\n'


def free_job() -> int:
    """The number of a job whose port, as the scripts make it of that, nobody uses."""
    for port in range(20_000 + os.getpid() % 5_000, 30_000):
        with socket.socket() as trial:
            if trial.connect_ex(("localhost", port)) != 0:
                return port - 20_000
    raise AssertionError("no port is free")


def submit(script: str, tasks_per_node: int, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What sbatch would do, with two nodes."""
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(free_job()),
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": str(2 * tasks_per_node),
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "RANKS_PER_NODE": "1",
    }
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    environment = os.environ | job | {"PATH": path, "PYTHONPATH": PYTHON_PATH, "GLOO_SOCKET_IFNAME": "lo"}
    command = ["bash", str(FOLDER / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_nodes_train_together(script: str, tmp_path: Path) -> None:
    done = submit(script, 1, tmp_path, "-m", "launched", str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = notes(tmp_path)
    assert first["weight"] == second["weight"]
    ranks = [
        [note[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] for note in (first, second)
    ]
    assert ranks == [[0, 2, 0, 1], [1, 2, 0, 1]]


def test_srun_tells_each_rank_its_place_among_several_of_a_node(tmp_path: Path) -> None:
    done = submit("slurm_srun.sh", 2, tmp_path, "-c", WHO)
    assert sorted(done.stdout.splitlines()) == ["0 0", "1 1", "2 0", "3 1"]


def test_a_failed_rank_is_a_failed_job(tmp_path: Path) -> None:
    assert submit("slurm_srun.sh", 1, tmp_path, "-c", "raise SystemExit(3)").returncode == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_understands_it_and_sbatch_its_options(script: str) -> None:
    subprocess.run(["bash", "-n", FOLDER / script], check=True)
    text = (FOLDER / script).read_text()
    head = text[: text.index("set -euo pipefail")]
    assert text.startswith("#!/usr/bin/env bash\n") and os.access(FOLDER / script, os.X_OK)
    assert text.count("#SBATCH --") == head.count("#SBATCH --"), "sbatch reads none after the first command"
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.MULTILINE)
    assert len(options) == text.count("#SBATCH")
    assert {name for name, _ in options} <= {
        *("job-name", "nodes", "ntasks-per-node", "time", "output", "open-mode", "requeue"),
    }
    assert dict(options)["ntasks-per-node"] == ("1" if script == "slurm_torchrun.sh" else "8")
