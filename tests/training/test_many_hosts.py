"""Two hosts, on one machine: network namespaces that a cable joins, with a PID namespace each.

    zeroopt-...-0                                    zeroopt-...-1
    ranks 0, 1      10.231.0.1 ──── cable ──── 10.231.0.2      ranks 2, 3

Ranks of different hosts see neither each other's processes nor memory, as in containers. All that passes between them goes
over the cable, where the kernel counts it; what ranks of one host send each other does not.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple, TypeVar

import many_hosts_rank
import pytest
import torch
import torch.distributed as dist
from many_hosts_rank import Job
from paths import PYTHON_PATH
from short_timeouts import lose_patience
from torch import Tensor, nn
from training import loss_of
from worker_pool import (
    NO_ANSWER,
    SHOWN_OUTPUT,
    START_TIMEOUT_S,
    TIMEOUT_S,
    WORKER_DIED,
    Failure,
    RankError,
    RunOnRanks,
    WorkerError,
)

import zeroopt

pytestmark = pytest.mark.slow

T = TypeVar("T")

NUM_HOSTS = 2
ADDRESSES = ("10.231.0.1", "10.231.0.2")
CABLE = "cable0"  # the network device, on both hosts
FIRST_PORT = 29500
LATE_S = 60.0  # what a busy machine may add to a time limit

MAX_TRAFFIC = 1.05  # of what the transport has to send
STEPS = 3

FAULT_STEP = 2
FAULT_TIMEOUT_S = 3.0
FAULTY_RANK = 3
NOTICED_S = 0.5  # after which the kernel has told peers of a broken connection


# Hosts.


class Host:
    """One host, and the process on it that forks ranks."""

    def __init__(self, namespace: str, log: Path) -> None:
        self.log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [*within(namespace), sys.executable, many_hosts_rank.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE, "PYTHONPATH": PYTHON_PATH},
            )

    def say(self, *words: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, and will not reply
            print(*words, file=self._process.stdin, flush=True)

    def replies(self, deadline: float) -> bool:
        """Whether it says something in time."""
        stdout = self._process.stdout
        assert stdout is not None
        return bool(wait([stdout], max(0.0, deadline - time.monotonic()))) and stdout.readline() != ""

    def close(self) -> None:
        self._process.kill()  # unshare takes the namespace's first process along, and that one all others
        self._process.communicate()


class Hosts:
    """Runs functions on the ranks of all hosts.

    Attributes:
        namespaces: the network namespace of each host.
    """

    def __init__(self, namespaces: tuple[str, str], scratch: Path) -> None:
        self.namespaces = namespaces
        self._scratch = scratch  # a folder that all ranks see
        self._hosts: list[Host] = []
        self._jobs = 0

    def run(self, ranks_per_host: int, function: Callable[..., T], *args: Any) -> list[T]:
        """Values by rank; raises one `WorkerError` that shows every failing rank."""
        answers = self.answers(ranks_per_host, function, *args)
        raise_failures(answers)
        return answers

    def answers(self, ranks_per_host: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """By rank a value or a `Failure`. Ranks 0, 1, ... are on the first host, and as many on the second."""
        if not self._hosts:
            self._start()
        self._jobs += 1
        folder = self._scratch / f"job{self._jobs}"
        folder.mkdir()
        world_size = NUM_HOSTS * ranks_per_host
        address = f"tcp://{ADDRESSES[0]}:{FIRST_PORT + self._jobs}"
        (folder / "job").write_bytes(pickle.dumps(Job(function, args, world_size, address, TIMEOUT_S)))
        for number, host in enumerate(self._hosts):
            host.say(folder, *range(number * ranks_per_host, (number + 1) * ranks_per_host))
        deadline = time.monotonic() + TIMEOUT_S + LATE_S
        answered = [host.replies(deadline) for host in self._hosts]
        answers = [self._answer(rank, folder) for rank in range(world_size)]
        if not all(answered):
            self.close()
        return answers

    def close(self) -> None:
        while self._hosts:
            self._hosts.pop().close()

    def _start(self) -> None:
        for namespace in self.namespaces:
            self._hosts.append(Host(namespace, self._scratch / f"{namespace}.log"))
        deadline = time.monotonic() + START_TIMEOUT_S
        if not all(host.replies(deadline) for host in self._hosts):
            output = self._output()
            self.close()
            raise RuntimeError(f"a host's first process does not start:\n{output}")

    def _answer(self, rank: int, folder: Path) -> Any:
        with suppress(FileNotFoundError):
            answer = pickle.loads((folder / f"rank{rank}.answer").read_bytes())
            if not isinstance(answer, Failure):
                return answer
            return Failure(answer.error, answer.evidence, self._output(folder / f"rank{rank}.log"))
        output = self._output(folder / f"rank{rank}.log")
        hung = "Timeout (" in output  # faulthandler's headline
        error = RankError(NO_ANSWER, "its stacks are below") if hung else RankError(WORKER_DIED, "left no answer")
        return Failure(error, "", output)

    def _output(self, *logs: Path) -> str:
        paths = [*(host.log for host in self._hosts), *logs]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())[-SHOWN_OUTPUT:]


def raise_failures(answers: Sequence[Any]) -> None:
    failures = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Failure)}
    if failures:
        raise WorkerError(f"{len(failures)} of {len(answers)} ranks failed", failures)


def within(namespace: str) -> list[str]:
    """What to put before a command, so that it runs on a host as the first process of a new PID namespace."""
    return ["ip", "netns", "exec", namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def what_hosts_lack() -> str | None:
    """Why there can be no hosts here, as far as that shows before one is made."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"network namespaces need the program {program!r} (of the package {package})"
    return None


def lay_cable(namespaces: tuple[str, str]) -> None:
    """The cable's addresses and devices exist in these namespaces only, so they cannot collide with anything."""
    first, second = namespaces
    call("ip", "link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
    for namespace, address in zip(namespaces, ADDRESSES, strict=True):
        ip = ("ip", "-n", namespace)
        call(*ip, "address", "add", f"{address}/30", "dev", CABLE)
        call(*ip, "link", "set", CABLE, "addrgenmode", "none", "up")  # IPv6 would send messages of its own
        call(*ip, "link", "set", "lo", "up")
        call(*within(namespace), "true")


def call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts; skips where they cannot be made."""
    if (reason := what_hosts_lack()) is not None:
        pytest.skip(reason)
    name = f"zeroopt-{token_hex(4)}"
    namespaces = (f"{name}-0", f"{name}-1")
    with ExitStack() as stack:
        try:
            for namespace in namespaces:
                call("ip", "netns", "add", namespace)
                stack.callback(call, "ip", "netns", "delete", namespace)
            lay_cable(namespaces)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        made = Hosts(namespaces, tmp_path_factory.mktemp("hosts"))
        stack.callback(made.close)
        yield made


# Training.


class Step(NamedTuple):
    """What a step has come to on one rank: the loss, and a digest of each parameter."""

    loss: float
    digests: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One training on one rank.

    Attributes:
        transport: its name.
        param_bytes: the bytes of all parameters, and of all gradients.
        sent, received: bytes that this host's network device has counted in each step.
    """

    transport: str
    param_bytes: int
    steps: list[Step]
    sent: list[int]
    received: list[int]


def build() -> nn.Module:
    """10 MB in sizes that nothing divides."""
    torch.manual_seed(1234)
    hidden = [layer for _ in range(6) for layer in (nn.Linear(613, 613), nn.GELU())]
    return nn.Sequential(nn.Linear(257, 613), nn.Tanh(), *hidden, nn.Linear(613, 41))


def batch(step: int) -> Tensor:
    return torch.randn(4, 257, generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))


def wrap(net: nn.Module, **options: Any) -> tuple[zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    """In four buckets, of which none is full."""
    return zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=3.3, fused=True, **options)


def train(options: dict[str, Any]) -> Run:
    net = build()
    model, optimizer = wrap(net, **options)
    run = Run(optimizer._transport.name, sum(p.nbytes for p in net.parameters()), [], [], [])
    for number in range(STEPS):
        sent, received = counted_bytes()
        loss = loss_of(model(batch(number)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        digests = {name: hashlib.sha256(p.detach().numpy()).hexdigest() for name, p in net.named_parameters()}
        sent_after, received_after = counted_bytes()
        run.steps.append(Step(loss.item(), digests))
        run.sent.append(sent_after - sent)
        run.received.append(received_after - received)
    return run


def counted_bytes() -> tuple[int, int]:
    """Bytes sent and received by this host's network device so far, counted while no rank sends any."""
    dist.barrier()
    counters = Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics")
    counts = int((counters / "tx_bytes").read_text()), int((counters / "rx_bytes").read_text())
    dist.barrier()
    return counts


def train_all(variants: list[dict[str, Any]]) -> list[Run]:
    return [train(options) for options in variants]


STAGES: list[dict[str, Any]] = [{"stage": 0}, {"stage": 1}, {"stage": 2}]
VARIANTS = {1: STAGES, 2: [*STAGES, {"stage": 1, "share_parameters": True}, {"stage": 2, "share_parameters": True}]}


class Trained(NamedTuple):
    """`runs` by rank and variant."""

    variants: list[dict[str, Any]]
    transport: str
    runs: list[list[Run]]


@pytest.fixture(scope="module", params=[(1, "pairwise"), (2, "hybrid")], ids=["2x1", "2x2"])
def trained(hosts: Hosts, request: pytest.FixtureRequest) -> Trained:
    """Variants that have been trained on two hosts, by so many ranks each, with what "auto" should take there."""
    ranks_per_host, transport = request.param
    variants = VARIANTS[ranks_per_host]
    return Trained(variants, transport, hosts.run(ranks_per_host, train_all, variants))


def test_every_bit_is_that_of_a_single_host(trained: Trained, run_on_ranks: RunOnRanks) -> None:
    on_one_host = [{**options, "transport": "shm"} for options in trained.variants]
    expected = run_on_ranks(len(trained.runs), train_all, on_one_host)
    for rank, (runs, runs_on_one_host) in enumerate(zip(trained.runs, expected, strict=True)):
        for options, run, reference in zip(trained.variants, runs, runs_on_one_host, strict=True):
            assert (run.transport, reference.transport) == (trained.transport, "shm")
            for number, (step, reference_step) in enumerate(zip(run.steps, reference.steps, strict=True)):
                assert step == reference_step, f"{options}, rank {rank}, step {number}"


def test_no_more_bytes_between_hosts_than_needed(trained: Trained) -> None:
    """TCP's headers and acknowledgements are counted too, but not those of every packet: the kernel hands larger pieces to
    the cable. It also sends pieces again when it thinks they are lost, so the least of all steps is the truest."""
    for rank, runs in enumerate(trained.runs):
        for options, run in zip(trained.variants, runs, strict=True):
            share = (NUM_HOSTS - 1) / NUM_HOSTS
            ideal = share * run.param_bytes + share * run.param_bytes  # reduce-scatter of gradients, all-gather
            sent, received = min(run.sent) / ideal, min(run.received) / ideal
            print(f"{run.transport}, {options}, rank {rank}: {sent:.4f} sent, {received:.4f} received of the ideal")
            assert 1 <= sent <= MAX_TRAFFIC
            assert 1 <= received <= MAX_TRAFFIC


# Faults.


def die() -> None:
    time.sleep(NOTICED_S)  # what it has sent so far arrives, and the others come to wait for it
    os.kill(os.getpid(), signal.SIGKILL)


def unplug() -> None:
    call("ip", "link", "set", CABLE, "down")


def train_until_fault(fault: Callable[[], None], when: str, folder: Path, num_survivors: int) -> str | None:
    """zeroopt's error. One rank's `fault` comes in the middle of its backward, or before a step that the others are late for."""
    rank = dist.get_rank()
    net = build()
    _, optimizer = wrap(net, process_group=dist.new_group())
    assert optimizer._transport.name == "hybrid"
    try:
        for step in range(FAULT_STEP + 2):
            is_faulty = (rank, step) == (FAULTY_RANK, FAULT_STEP)
            if step == FAULT_STEP:
                lose_patience(FAULT_TIMEOUT_S)
            if step == FAULT_STEP and when == "before step":
                if is_faulty:
                    fault()
                time.sleep(3 * NOTICED_S)
            hidden = net[:6](batch(step))
            if is_faulty:
                hidden.register_hook(lambda _: fault())
            loss_of(net[6:](hidden)).backward()
            optimizer.step()
            optimizer.zero_grad()
    except zeroopt.ZeroOptError as error:
        return str(error)
    finally:
        (folder / f"{rank}").touch()
        while len(list(folder.iterdir())) < num_survivors:  # by ending, this process would tell the others
            time.sleep(0.02)
    return None


def assert_all_hear_of_it(heard_by_rank: Sequence[str | Failure | None]) -> None:
    """In time, or their job would have ended them."""
    raise_failures(heard_by_rank)
    for rank, heard in enumerate(heard_by_rank):
        assert isinstance(heard, str), f"rank {rank} has trained on"


@pytest.mark.parametrize("when", ["in backward", "before step"])
def test_killed_rank_is_noticed_on_both_hosts(hosts: Hosts, tmp_path: Path, when: str) -> None:
    *survivors, killed = hosts.answers(2, train_until_fault, die, when, tmp_path, 3)
    assert killed.error == (WORKER_DIED, "left no answer")
    assert_all_hear_of_it(survivors)
    for heard in survivors[1:]:  # the one that exchanges messages with the killed rank, and the one on its host
        assert f"rank {FAULTY_RANK}" in heard


def test_unplugged_cable_is_noticed_on_both_hosts(hosts: Hosts, tmp_path: Path) -> None:
    try:
        assert_all_hear_of_it(hosts.run(2, train_until_fault, unplug, "in backward", tmp_path, 4))
    finally:
        call("ip", "-n", hosts.namespaces[1], "link", "set", CABLE, "up")
