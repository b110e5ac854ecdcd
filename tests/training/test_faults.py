"""A rank dies, stops, fails or diverges: every other rank raises in time, names it, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from scripts import run_scripts
from short_timeouts import lose_patience
from stopped import go_on_from_stop
from torch import Tensor, nn
from worker_pool import WORKER_DIED, RankError, RunOnRanks

import zeroopt

pytestmark = pytest.mark.slow

FAULTY_RANK = 1
FAULTY_STEP = 2
TIMEOUT_S = 3.0
NEVER_S = 600.0  # a timeout that no test lives to see: who raises under it has noticed the fault
SETTLE_S = 0.3  # in which messages arrive, and ranks come to wait for one another
LATE_S = 1.0


# What happens to the faulty rank. Each takes the model that it trains.


def kill(_: nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when_settled(_: nn.Module) -> None:
    time.sleep(SETTLE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def exit_when_settled(_: nn.Module) -> None:
    time.sleep(SETTLE_S)
    os._exit(0)


def end_early(_: nn.Module) -> None:
    """As a script ends that has no more batches."""
    sys.exit()


def stop_when_settled(_: nn.Module) -> None:
    """Until another rank continues this one, or a minute has gone by."""
    time.sleep(SETTLE_S)
    alarm = ["sh", "-c", f"sleep 60; kill -CONT {os.getpid()}"]
    with subprocess.Popen(alarm, start_new_session=True) as process:
        os.kill(os.getpid(), signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGKILL)


class FailedError(Exception):
    """Ends the faulty rank's training."""


class ForgivenError(Exception):
    """Ends its backward; it goes on to the step."""


def fail(_: nn.Module) -> None:
    raise FailedError


def fail_and_step(_: nn.Module) -> None:
    raise ForgivenError


def run_extra_backward(model: nn.Module) -> None:
    model(torch.ones(3, 50)).sum().backward()


def sleep_on(_: nn.Module) -> None:
    """Until the test is over."""
    time.sleep(NEVER_S)


def interrupt_when_settled() -> None:
    """As Ctrl-C does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(SETTLE_S, os.kill, [os.getpid(), signal.SIGINT]).start()


Fault = Callable[[nn.Module], None]


class Midway(torch.autograd.Function):
    """Passes everything through; makes a call when backward comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grad, None


class Net(nn.Module):
    """Four buckets of up to 10 kB, half of which are full when backward makes the call. Of width 50 they are of one size."""

    def __init__(self, width: int, call: Callable[[], None]) -> None:
        super().__init__()
        self.first, self.last = (nn.Sequential(nn.Linear(50, width), nn.Linear(width, 50)) for _ in range(2))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Midway.apply(self.first(x), self.call))


def train(
    fault: Fault,
    moment: str,
    transport: str,
    timeout_s: float,
    *,
    steps: int = FAULTY_STEP + 2,
    late: Sequence[int] = (),
    width: int = 50,
    hosts: int = 1,
    step_again: bool = False,
    interrupted: bool = False,
    **options: Any,
) -> None:
    """Train, and use the parameters in the end. In the third step, the faulty rank meets its fault.

    Args:
        moment: when: "before wrap", "before forward", "in backward", "in agreement" (on used parameters), "before step", or
            "in step", when the first bucket has been updated.
        late: ranks that are busy with something else before they go into that step.
        hosts: on how many hosts the ranks believe to be.
        step_again: call `step` once more when training has failed on another rank.
        interrupted: the other ranks are, in that step, by Ctrl-C.
    """
    rank, step = dist.get_rank(), 0

    def pass_moment(name: str) -> None:
        if rank == FAULTY_RANK and name == moment and step == FAULTY_STEP:
            fault(model)

    net = Net(width, lambda: pass_moment("in backward"))
    plain = torch.optim.AdamW(net.parameters())
    group = dist.new_group()
    dist.barrier()  # all are in it
    if rank == FAULTY_RANK and moment == "before wrap":
        fault(net)
    host = f"host {rank * hosts // dist.get_world_size()}"
    with patch("zeroopt.collectives.hosts.host_identity", lambda: host):
        model, optimizer = zeroopt.wrap(net, plain, process_group=group, transport=transport, bucket_mb=0.01, **options)
    call_before(optimizer._transport, "start_max", lambda: pass_moment("in agreement"))
    call_after_first(optimizer._trained.stepper, "step", lambda: pass_moment("in step"))
    try:
        for step in range(steps):
            if interrupted and step == FAULTY_STEP and rank != FAULTY_RANK:
                interrupt_when_settled()
            if step == FAULTY_STEP:
                lose_patience(timeout_s)
            pass_moment("before forward")
            if step == FAULTY_STEP and rank in late:
                time.sleep(LATE_S)
            loss = model(torch.ones(3, 50)).sum()
            with suppress(ForgivenError):
                loss.backward()
            pass_moment("before step")
            optimizer.step()
            optimizer.zero_grad()
        model(torch.ones(3, 50))
    except zeroopt.CollectiveError:
        if step_again:
            optimizer.step()
        raise


def call_before(owner: Any, name: str, call: Callable[[], None]) -> None:
    """Let a method make a call first."""
    method = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        call()
        return method(*args, **kwargs)

    setattr(owner, name, changed)


def call_after_first(owner: Any, name: str, call: Callable[[], None]) -> None:
    """Let a generator make a call when its first value has been taken."""
    method = getattr(owner, name)

    def changed(*args: Any) -> Iterator[Any]:
        for number, value in enumerate(method(*args)):
            if number == 1:
                call()
            yield value

    setattr(owner, name, changed)


Outcomes = Sequence[RankError | None]


def raised_by_survivors(outcomes: Outcomes) -> dict[int, RankError]:
    """What the other ranks raised. All of them did, and live."""
    raised = {rank: error for rank, error in enumerate(outcomes) if error and error.type_name != WORKER_DIED}
    raised.pop(FAULTY_RANK, None)
    assert raised.keys() == set(range(len(outcomes))) - {FAULTY_RANK}, outcomes
    return raised  # type: ignore[return-value]


def ranks_in(message: str) -> set[int]:
    return {int(rank) for rank in re.findall(r"\brank (\d)", message)}


def check_survivors(outcomes: Outcomes, transport: str) -> None:
    """They name the transport, what they were waiting for, and of all other ranks the one that is missing."""
    for rank, error in raised_by_survivors(outcomes).items():
        assert error.type_name == "CollectiveError", error
        assert f"transport {transport}" in error.message
        assert re.search(r"(bucket \d|rendezvous of step|used parameters)", error.message), error
        assert ranks_in(error.message) - {rank} == {FAULTY_RANK}, error


GROUPS = [("shm", 2), ("shm", 3), ("pairwise", 2), ("pairwise", 3)]


@pytest.mark.parametrize("moment", ["before forward", "in backward", "in step"])
@pytest.mark.parametrize(("transport", "world_size"), [*GROUPS, ("torch", 3), ("all_to_all", 3)])
def test_killed_rank_is_noticed(run_on_ranks: RunOnRanks, transport: str, world_size: int, moment: str) -> None:
    outcomes = run_on_ranks.outcomes(world_size, train, kill_when_settled, moment, transport, NEVER_S)
    assert outcomes[FAULTY_RANK] == (WORKER_DIED, "killed by SIGKILL")
    check_survivors(outcomes, transport)


@pytest.mark.parametrize(
    ("stage", "moment"), [(0, "before forward"), (0, "in backward"), (0, "in step"), (1, "in backward"), (1, "in step")]
)
@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_killed_rank_is_noticed_in_other_stages(
    run_on_ranks: RunOnRanks, transport: str, stage: int, moment: str
) -> None:
    check_survivors(
        run_on_ranks.outcomes(2, train, kill_when_settled, moment, transport, NEVER_S, stage=stage), transport
    )


@pytest.mark.parametrize("moment", ["before forward", "in backward", "before step", "in step"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_killed_rank_is_noticed_with_shared_parameters(run_on_ranks: RunOnRanks, world_size: int, moment: str) -> None:
    """Also in the middle of an update, which leaves the one copy of the parameters half done."""
    check_survivors(
        run_on_ranks.outcomes(world_size, train, kill, moment, "shm", NEVER_S, share_parameters=True), "shm"
    )


@pytest.mark.parametrize(("transport", "world_size"), GROUPS)
def test_early_exit_is_noticed(run_on_ranks: RunOnRanks, transport: str, world_size: int) -> None:
    outcomes = run_on_ranks.outcomes(world_size, train, exit_when_settled, "before forward", transport, NEVER_S)
    assert outcomes[FAULTY_RANK] == (WORKER_DIED, "exited with code 0")
    check_survivors(outcomes, transport)


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_rank_killed_before_wrap_is_named(run_on_ranks: RunOnRanks, transport: str) -> None:
    for rank, error in raised_by_survivors(
        run_on_ranks.outcomes(4, train, kill, "before wrap", transport, NEVER_S)
    ).items():
        assert error.type_name == "CollectiveError", error
        assert ranks_in(error.message) - {rank} == {FAULTY_RANK}, error


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_rank_killed_before_the_agreement_is_named(run_on_ranks: RunOnRanks, transport: str) -> None:
    """The agreement on used parameters moves no bucket."""
    check_survivors(run_on_ranks.outcomes(3, train, kill_when_settled, "in agreement", transport, NEVER_S), transport)


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_killed_rank_is_named_by_a_rank_that_comes_late(run_on_ranks: RunOnRanks, transport: str) -> None:
    """And by the one that waits for both."""
    outcomes = run_on_ranks.outcomes(3, train, kill_when_settled, "before forward", transport, NEVER_S, late=[0])
    check_survivors(outcomes, transport)


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_next_step_raises_at_once(run_on_ranks: RunOnRanks, transport: str) -> None:
    """Parameters may have been stepped until then."""
    outcomes = run_on_ranks.outcomes(
        3, train, kill_when_settled, "before step", transport, NEVER_S, step_again=True, grace=1.0
    )
    for rank, error in raised_by_survivors(outcomes).items():
        assert error.type_name in ("StateError", "CollectiveError"), error
        assert f"transport {transport}" in error.message
        assert ranks_in(error.message) - {rank} == {FAULTY_RANK}, error


def train_and_signal(faulty: int, send: Callable[[int], None], *args: Any, **options: Any) -> None:
    """`train`. When all others are through, one of them sends the faulty process a signal."""
    survivors = [rank for rank in range(dist.get_world_size()) if rank != FAULTY_RANK]
    group = dist.new_group(survivors)
    try:
        train(*args, **options)
    finally:
        if dist.get_rank() in survivors:
            dist.barrier(group)
        if dist.get_rank() == survivors[0]:
            send(faulty)


def kill_other(process: int) -> None:
    os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("transport", "world_size", "moment", "options"),
    [
        ("shm", 3, "before forward", {}),
        ("shm", 2, "in step", {"share_parameters": True}),
        ("pairwise", 3, "before forward", {}),
    ],
)
def test_stopped_rank_is_named_after_the_timeout(
    run_on_ranks: RunOnRanks, transport: str, world_size: int, moment: str, options: dict[str, Any]
) -> None:
    stopped = run_on_ranks(world_size, os.getpid)[FAULTY_RANK]
    outcomes = run_on_ranks.outcomes(
        world_size,
        train_and_signal,
        stopped,
        go_on_from_stop,
        stop_when_settled,
        moment,
        transport,
        TIMEOUT_S,
        **options,
    )
    check_survivors(outcomes, transport)
    assert outcomes[FAULTY_RANK] is not None, "the stopped rank went on alone"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_rank_whose_backward_raises_is_noticed(run_on_ranks: RunOnRanks, stage: int) -> None:
    """It lets the exception end its training, drops its model, and lives."""
    outcomes = run_on_ranks.outcomes(3, train, fail, "in backward", "shm", NEVER_S, stage=stage)
    assert outcomes[FAULTY_RANK] == ("FailedError", "")
    check_survivors(outcomes, "shm")


@pytest.mark.parametrize(
    ("transport", "timeout_s", "stage"),
    [("shm", NEVER_S, 0), ("shm", NEVER_S, 1), ("shm", NEVER_S, 2), ("pairwise", TIMEOUT_S, 2)],
)
def test_rank_that_steps_after_its_backward_raised_is_refused(
    run_on_ranks: RunOnRanks, transport: str, timeout_s: float, stage: int
) -> None:
    outcomes = run_on_ranks.outcomes(3, train, fail_and_step, "in backward", transport, timeout_s, stage=stage)
    assert outcomes[FAULTY_RANK].type_name == "StateError"
    assert "the last backward did not come to its end" in outcomes[FAULTY_RANK].message
    check_survivors(outcomes, transport)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_extra_backward_is_told_to_all(run_on_ranks: RunOnRanks, world_size: int, stage: int) -> None:
    outcomes = run_on_ranks.outcomes(world_size, train, run_extra_backward, "before step", "shm", NEVER_S, stage=stage)
    check_survivors(outcomes, "shm")
    for error in outcomes:
        assert error.type_name == "CollectiveError"
        assert "the ranks have diverged" in error.message


@pytest.mark.parametrize(
    ("stage", "width"),
    [
        (2, 50),
        (2, 37),
        (0, 50),
    ],
)
def test_extra_backward_is_noticed_in_messages(run_on_ranks: RunOnRanks, stage: int, width: int) -> None:
    """Also in the last step, whose parameters may be used for something else than a next step."""
    steps = FAULTY_STEP + (2 if stage == 0 else 1)
    outcomes = run_on_ranks.outcomes(
        2, train, run_extra_backward, "before step", "pairwise", TIMEOUT_S, stage=stage, width=width, steps=steps
    )
    for error in outcomes:
        assert isinstance(error, RankError) and error.type_name == "CollectiveError", error
        assert "transport pairwise" in error.message
        assert "have diverged" in error.message or "for want of rank" in error.message


@pytest.mark.parametrize(
    ("fault", "moment"),
    [(kill_when_settled, "before forward"), (run_extra_backward, "before step")],
)
def test_all_hosts_hear_of_it(run_on_ranks: RunOnRanks, fault: Fault, moment: str) -> None:
    outcomes = run_on_ranks.outcomes(4, train, fault, moment, "auto", TIMEOUT_S, hosts=2)
    errors = raised_by_survivors(outcomes)
    assert {error.type_name for error in errors.values()} == {"CollectiveError"}
    for rank in (0, 3):  # those that exchange slices with the faulty one
        assert FAULTY_RANK in ranks_in(errors[rank].message)


@pytest.mark.parametrize(
    ("transport", "moment"),
    [("auto", "before forward"), ("auto", "in backward"), ("auto", "in step"), ("hierarchy", "in backward")],
)
def test_all_hosts_name_the_missing_rank(run_on_ranks: RunOnRanks, transport: str, moment: str) -> None:
    outcomes = run_on_ranks.outcomes(4, train, kill_when_settled, moment, transport, NEVER_S, hosts=2)
    for rank, error in raised_by_survivors(outcomes).items():
        assert error.type_name == "CollectiveError", error
        assert ranks_in(error.message) - {rank} == {FAULTY_RANK}, error


@pytest.mark.parametrize(
    ("transport", "hosts", "world_size"), [("shm", 1, 2), ("pairwise", 1, 3), ("torch", 1, 2), ("auto", 2, 4)]
)
def test_ctrl_c_ends_waiting_for_another_rank(
    run_on_ranks: RunOnRanks, transport: str, hosts: int, world_size: int
) -> None:
    faulty = run_on_ranks(world_size, os.getpid)[FAULTY_RANK]
    fault = (sleep_on, "before forward", transport, NEVER_S)
    outcomes = run_on_ranks.outcomes(
        world_size, train_and_signal, faulty, kill_other, *fault, hosts=hosts, interrupted=True
    )
    for error in raised_by_survivors(outcomes).values():
        assert error.type_name == "KeyboardInterrupt", error


def shared_memory_after_a_fault(*args: Any) -> tuple[int, int]:
    """How much shared memory of the transport's this process has mapped and open."""
    with suppress(RuntimeError):
        train(*args)
    gc.collect()
    mapped = Path("/proc/self/maps").read_text().count("memfd:zeroopt")
    return mapped, sum("memfd:zeroopt" in os.readlink(entry) for entry in open_files())


def open_files() -> Iterator[Path]:
    return (entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


def test_dropped_model_gives_shared_memory_back(run_on_ranks: RunOnRanks) -> None:
    outcomes = run_on_ranks.outcomes(3, shared_memory_after_a_fault, kill, "before step", "shm", NEVER_S)
    assert outcomes[0] == outcomes[2] == (0, 0)


@pytest.mark.parametrize(
    ("transport", "hosts", "world_size", "fault", "moment", "status"),
    [
        ("shm", 1, 2, "end_early", "before forward", 0),
        ("pairwise", 1, 2, "fail", "in backward", 1),
        ("auto", 2, 4, "kill_when_settled", "in backward", -signal.SIGKILL),
    ],
)
def test_processes_end(
    tmp_path: Path, transport: str, hosts: int, world_size: int, fault: str, moment: str, status: int
) -> None:
    """Real scripts: they end by their own exception, and have no file in /dev/shm that could stay there."""
    ranks = run_scripts(
        world_size, tmp_path, __file__, fault, moment, transport, str(hosts), f"file://{tmp_path}/group"
    )
    for rank, ended in enumerate(ranks):
        assert ended.returncode == (status if rank == FAULTY_RANK else 1), ended.errors
        if rank != FAULTY_RANK:
            assert "zeroopt.errors.CollectiveError: transport" in ended.errors
            assert ended.output == "[]\n"


@pytest.mark.parametrize("transport", ["pairwise", "torch"])
def test_a_process_ends_by_ctrl_c(tmp_path: Path, transport: str) -> None:
    """At once, though what it has waited for has not come."""
    arguments = ("sleep_on", "before forward", transport, "1", f"file://{tmp_path}/group", "ctrl-c")
    (waiting,) = run_scripts(2, tmp_path, __file__, *arguments, awaited=[0])
    assert waiting.returncode == -signal.SIGINT, waiting.errors
    assert waiting.errors.endswith("KeyboardInterrupt\n")


def main(fault: str, moment: str, transport: str, hosts: str, init_method: str, ctrl_c: str = "") -> None:
    """One rank of `test_processes_end`."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    try:
        train(globals()[fault], moment, transport, NEVER_S, hosts=int(hosts), interrupted=bool(ctrl_c))
    finally:
        print([line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line])


if __name__ == "__main__":
    main(*sys.argv[1:])
