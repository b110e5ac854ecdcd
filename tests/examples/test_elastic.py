"""The script that goes on whatever is killed, started by torchrun as a cluster does."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import IO
from unittest.mock import patch

import pytest
import torch
from paths import PYTHON_PATH, ROOT, SUPPORT
from worker_pool import WORKER_ENVIRONMENT, RunOnRanks

from zeroopt.checkpoint import latest
from zeroopt.checkpoint.format.reading import open_checkpoint

pytestmark = pytest.mark.slow

EXAMPLES = str(ROOT / "examples")
PATIENCE_S = 240.0
STEPS = 12
OPTIONS = {"steps": STEPS, "every": 4, "stage": 2, "context": 32, "batch": 12, "seed": 0}
HERE = {"copies": False}  # what torchrun's runs are told by a flag, or its absence


def run(checkpoints: Path, steps: int = STEPS) -> list[str]:
    """The lines that the example prints on this rank."""
    with patch.object(sys, "path", [EXAMPLES, *sys.path]), redirect_stdout(io.StringIO()) as printed:
        import elastic as example

        going_on = example.Run(
            Namespace(checkpoints=checkpoints, **{**OPTIONS, **HERE, "steps": steps}), torch.device("cpu")
        )
        going_on.resume()
        going_on.train()
    return printed.getvalue().splitlines()


def run_and_stop(checkpoints: Path) -> list[str]:
    with patch("zeroopt.checkpoint.StopRequest.came", lambda _: True):
        return run(checkpoints)


def losses_of(lines: list[str]) -> dict[int, float]:
    found = [re.fullmatch(r"step (\d+)  loss ([0-9.]+)", line) for line in lines]
    return {int(match[1]): float(match[2]) for match in found if match}


def test_it_stops_as_asked_and_goes_on_as_if_it_had_not(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = losses_of(run_on_ranks(2, run, tmp_path / "undisturbed", 6)[0])
    stopped = run_on_ranks(2, run_and_stop, tmp_path / "stopped")[0]
    assert stopped[-1] == "stopped as asked, and saved step 1"
    rest = run_on_ranks(2, run, tmp_path / "stopped", 6)[0]
    assert rest[0] == "beginning at step 1 with 2 ranks"
    assert losses_of(stopped) | losses_of(rest) == expected


def start_ranks(kind: str, checkpoints: Path) -> list[subprocess.Popen[str]]:
    """Two ranks with what torchrun tells them, and without its agent, whose own exit code says nothing after a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    options = OPTIONS | {"steps": 1_000_000, "every": 1_000_000}
    command = [sys.executable, str(SUPPORT / "elastic_host.py"), kind, f"--checkpoints={checkpoints}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment() | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def read_until(rank: subprocess.Popen[str], beginning: str) -> None:
    """Read what a rank prints, to a line that begins like this."""
    assert rank.stdout is not None
    lines = []
    while not (lines and lines[-1].startswith(beginning)):
        lines.append(rank.stdout.readline())
        assert lines[-1], "".join(lines)


@pytest.mark.parametrize("kind", ["trains", "waits"])
def test_a_signal_to_one_rank_has_all_save_and_end(tmp_path: Path, kind: str) -> None:
    """Whether that one trains, or waits for another one, which is stopped."""
    ranks = first, last = start_ranks(kind, tmp_path)
    try:
        read_until(first, "step 3 ")
        if kind == "waits":
            assert os.WIFSTOPPED(os.waitpid(last.pid, os.WUNTRACED)[1])
        first.terminate()
        read_until(first, "heard")  # while the other one is stopped
        if kind == "waits":
            last.send_signal(signal.SIGCONT)
        outputs = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(outputs)
    end = re.search(r"stopped as asked, and saved (step) (\d+)\n", outputs[0])
    assert end is not None, outputs
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "-".join(end.groups())
    assert open_checkpoint(newest).problems() == []


def start_host(kind: str, port: int, checkpoints: Path, output: IO[str]) -> subprocess.Popen[bytes]:
    """An agent of torchrun with one rank, as if it were a machine of its own."""
    torchrun = "--nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id test"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *torchrun.split(), "--rdzv-endpoint", f"127.0.0.1:{port}"),
        *("--rdzv-conf", f"last_call_timeout=1,is_host={int(kind == 'stays')}", "--local-addr", "127.0.0.1"),
        *(str(SUPPORT / "elastic_host.py"), kind, f"--checkpoints={checkpoints}"),
        *(f"--{name}={value}" for name, value in OPTIONS.items()),
    ]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment())


def environment() -> dict[str, str]:
    own = {"PYTHONPATH": PYTHON_PATH, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, **WORKER_ENVIRONMENT, **own}


def test_a_rank_is_killed_and_no_step_is_lost(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = losses_of(run_on_ranks(2, run, tmp_path / "undisturbed")[0])
    before = set(Path("/dev/shm").glob("zeroopt-*"))
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "2",
        ),
        *(str(SUPPORT / "elastic_host.py"), "killed", f"--checkpoints={tmp_path / 'checkpoints'}", "--copies"),
        *(f"--{name}={value}" for name, value in (OPTIONS | {"every": 1000}).items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("beginning")] == [
        f"beginning at step {step} with 2 ranks" for step in (0, 6)
    ]
    assert losses_of(lines) == expected
    assert set(Path("/dev/shm").glob("zeroopt-*")) <= before


def port_for_a_server() -> int:
    """Free, and none of those that connections get: these come and go all the time."""
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, first_of_connections)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            return port


def test_a_host_is_lost_and_the_other_goes_on(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = losses_of(run_on_ranks(2, run, tmp_path / "undisturbed")[0])
    port, agents = port_for_a_server(), []
    try:
        for kind in ("stays", "lost"):
            with (tmp_path / f"{kind}.log").open("w") as output:
                agents.append(start_host(kind, port, tmp_path / "checkpoints", output))
        codes = [agent.wait(PATIENCE_S) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # an agent ends its ranks
            agent.wait()
    stayed, lost = ((tmp_path / f"{kind}.log").read_text() for kind in ("stays", "lost"))
    assert codes == [0, -signal.SIGKILL], stayed + lost
    assert "beginning at step 4 with 1 ranks" in stayed
    assert losses_of((lost + stayed).splitlines()) == pytest.approx(expected, rel=1e-4)
