"""Saving in the background, and what cannot be saved."""

from __future__ import annotations

import logging
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from checkpoints import all_of, assert_all_same, assert_same, train, wrapped
from scripts import run_scripts
from short_timeouts import lose_patience
from stopped import go_on_from_stop
from torch import nn
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.wrapped import saving
from zeroopt.errors import CheckpointError, StateError

pytestmark = pytest.mark.slow

STOPPED_S = 3.0  # the timeout while a rank is stopped

CASES: list[tuple[str, dict[str, Any]]] = [
    ("conv", {}),
    ("lm", {"param_dtype": torch.bfloat16, "state_dtype": torch.int8}),
    ("mlp", {"stage": 0}),
]


@contextmanager
def slow_writing() -> Iterator[threading.Event]:
    """Writing, in the background too, waits for the event."""
    may_write = threading.Event()
    write = saving.write_checkpoint

    def wait_and_write(*args: Any) -> None:
        assert may_write.wait(300)
        write(*args)

    with patch.object(saving, "write_checkpoint", wait_and_write):
        yield may_write


def save_while_training(path: Path) -> list[Any]:
    """What there was at each save, and training on in between. Two saves are under way at a time."""
    saved = []
    for number, (name, options) in enumerate(CASES):
        model, optimizer = wrapped(name, "adamw", options)
        train(model, optimizer, name, range(2))
        shared = torch.zeros(3)
        with slow_writing() as may_write:
            first = zeroopt.checkpoint.async_save(path / f"{number}-a", model, optimizer, {"shared": shared})
            saved.append(all_of(model, [optimizer]))
            train(model, optimizer, name, range(2, 4))
            optimizer.param_groups[0]["lr"] = 77.0
            shared += 1
            assert not first.done()
            assert not (path / f"{number}-a").exists()
            may_write.set()
            second = zeroopt.checkpoint.async_save(path / f"{number}-b", model, optimizer)
            assert first.done()
            saved.append(all_of(model, [optimizer]))
            train(model, optimizer, name, range(4, 5))
            assert second.result() is None
    return saved


def load_each(path: Path) -> list[Any]:
    loaded = []
    for number, (name, options) in enumerate(CASES):
        for which in ("a", "b"):
            model, optimizer = wrapped(name, "adamw", options)
            extra = zeroopt.checkpoint.load(path / f"{number}-{which}", model, optimizer)
            assert_same(extra, {"shared": torch.zeros(3)} if which == "a" else {})
            loaded.append(all_of(model, [optimizer]))
    return loaded


def test_training_on_does_not_change_what_is_saved(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    saved = run_on_ranks(2, save_while_training, tmp_path)
    for world_size in (2, 3):
        assert_all_same(run_on_ranks(world_size, load_each, tmp_path), saved[0])


def fail_in_the_background(path: Path) -> list[str]:
    """The errors of a save whose extra cannot be saved on one rank: at the result, and at the next call, once."""
    model, optimizer = wrapped("mlp", "sgd", {})
    records: list[logging.LogRecord] = []
    log = logging.getLogger("zeroopt")
    keep = logging.Handler()
    keep.emit = records.append  # type: ignore[method-assign]
    log.addHandler(keep)
    errors = []
    rank_extra = {"bad": print} if dist.get_rank() == 1 else {}
    calls: list[Callable[[], Any]] = [
        lambda: zeroopt.checkpoint.async_save(path / "next", model, optimizer),
        lambda: zeroopt.checkpoint.save(path / "next", model, optimizer),
        lambda: zeroopt.checkpoint.load(path / "next", model, optimizer),
    ]
    for number, call in enumerate(calls):
        pending = zeroopt.checkpoint.async_save(path / "bad", model, optimizer, rank_extra=rank_extra)
        if dist.get_rank() == number % 2:  # the other rank has forgotten
            with pytest.raises(CheckpointError):
                pending.result()
        with pytest.raises(CheckpointError) as raised:
            call()
        errors.append(str(raised.value))
        assert pending.done()
    log.removeHandler(keep)
    assert "in the background is not there" in records[0].getMessage()
    zeroopt.checkpoint.save(path / "next", model, optimizer)
    assert not (path / "bad").exists()
    return errors


def test_errors_of_the_background_come_up(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for errors in run_on_ranks(2, fail_in_the_background, tmp_path):
        assert all("on rank 1: rank-1.pt['bad'] is a builtins.builtin_function_or_method" in error for error in errors)


def save_in_sub_groups(path: Path) -> str:
    """Two models on two pairs of ranks, at the same time, in the background."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    torch.manual_seed(pair)
    net = nn.Linear(5, 7)
    model, optimizer = zeroopt.wrap(net, torch.optim.Adam(net.parameters()), process_group=groups[pair])
    saved = [value.clone() for value in net.parameters()]
    pending = zeroopt.checkpoint.async_save(path / str(pair), model, optimizer, process_group=groups[pair])
    for _ in range(3):
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    pending.result()
    zeroopt.checkpoint.load(path / str(pair), model, optimizer, process_group=groups[pair])
    assert_same([value.clone() for value in net.parameters()], saved)
    return str(zeroopt.checkpoint.latest(path / str(pair) / ".."))


def test_groups_of_ranks_save_for_themselves(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(4, save_in_sub_groups, tmp_path)


ENDS = {
    "asks": "pending.result(); dist.destroy_process_group()",
    "forgets": "",
    "destroys first": "dist.destroy_process_group()",
}

SCRIPT = """
    import os, sys, torch, torch.distributed as dist, zeroopt, zeroopt.checkpoint
    rank, directory = int(os.environ["RANK"]), sys.argv[1]
    store = dist.FileStore(directory + "/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    net = torch.nn.Linear(500, 500)
    model, optimizer = zeroopt.wrap(net, torch.optim.Adam(net.parameters()))
    model(torch.ones(1, 500)).sum().backward()
    optimizer.step()
    pending = zeroopt.checkpoint.async_save(directory + "/saved", model, optimizer)
"""


@pytest.mark.parametrize("end", ENDS)
def test_process_ends(tmp_path: Path, end: str) -> None:
    """Who forgets to ask for the result has the checkpoint all the same, and so has who destroys the process group before."""
    script, checkpoints = tmp_path / "script.py", tmp_path / "checkpoints"
    checkpoints.mkdir()
    script.write_text(textwrap.dedent(SCRIPT) + ENDS[end])
    ended = run_scripts(2, tmp_path, script, str(checkpoints))
    # Without destroy_process_group torch sometimes aborts in the very end.
    assert zeroopt.checkpoint.latest(checkpoints) == checkpoints / "saved", ended


def die_while_saving(path: Path, *, background: bool) -> str:
    """What the others hear when rank 1 is killed before it has written anything."""
    model, optimizer = wrapped("mlp", "sgd", {})
    write = saving.write_checkpoint

    def write_or_die(*args: Any) -> None:
        dist.barrier()  # nobody dies while others connect
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    with patch.object(saving, "write_checkpoint", write_or_die), pytest.raises(zeroopt.CollectiveError) as raised:
        if background:
            zeroopt.checkpoint.async_save(path / "x", model, optimizer).result()
        else:
            zeroopt.checkpoint.save(path / "x", model, optimizer)
    return str(raised.value)


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_dies_while_saving_is_named(run_on_ranks: RunOnRanks, tmp_path: Path, background: bool) -> None:
    """By all others, at once, and nothing is left on the disk."""
    outcomes = run_on_ranks.outcomes(4, die_while_saving, tmp_path, background=background)
    for message in (outcomes[0], *outcomes[2:]):
        assert isinstance(message, str), message
        assert "preparing the checkpoint" in message and "failed for want of rank 1:" in message
    assert list(tmp_path.iterdir()) == []


def stop_while_saving(path: Path, stopped: int) -> str:
    """What ranks hear when rank 1 is stopped while it saves in the background, until the last of the others has heard it."""
    model, optimizer = wrapped("mlp", "sgd", {})
    zeroopt.checkpoint.async_save(path / "before", model, optimizer).result()
    lose_patience(STOPPED_S)
    write, rank = saving.write_checkpoint, dist.get_rank()

    def stop_and_write(*args: Any) -> None:
        if rank == 1:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # the process, but this thread at once
        write(*args)

    with patch.object(saving, "write_checkpoint", stop_and_write), pytest.raises(zeroopt.CollectiveError) as raised:
        zeroopt.checkpoint.async_save(path / "after", model, optimizer).result()
    if rank != 1:
        (path.parent / f"heard-{rank}").touch()
    if rank == 0:
        while not (path.parent / "heard-2").exists():
            time.sleep(0.01)
        go_on_from_stop(stopped)
    return str(raised.value)


def test_a_rank_that_stops_while_saving_is_named(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """By the others, after the group's timeout, and what was saved before stays as it was."""
    path = tmp_path / "checkpoints"
    pid = run_on_ranks(3, os.getpid)[1]
    outcomes = run_on_ranks.outcomes(3, stop_while_saving, path, pid)
    for message in (outcomes[0], outcomes[2]):
        assert isinstance(message, str), message
        assert "preparing the checkpoint" in message and "failed for want of rank 1:" in message
    assert isinstance(outcomes[1], str), outcomes[1]  # it went on, and found that the others had given up
    assert [one.name for one in path.iterdir()] == ["before"]
    assert open_checkpoint(path / "before").problems() == []


# What cannot be saved.


def refuse(path: Path) -> dict[str, str]:
    """The errors of all ranks, and that nothing is left on the disk."""
    model, optimizer = wrapped("mlp", "adamw", {})
    train(model, optimizer, "mlp", range(1))
    other, its_optimizer = wrapped("mlp", "sgd", {})
    net = nn.Linear(2, 2)
    first = dist.get_rank() == 0

    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise ValueError("broken on purpose")

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    calls: dict[str, tuple[Any, ...]] = {
        "plain model": (path / "x", net, optimizer),
        "plain model on one rank": (path / "x", net if first else model, optimizer),
        "plain optimizer": (path / "x", model, torch.optim.SGD(net.parameters())),
        "other optimizer on one rank": (path / "x", model, its_optimizer if first else optimizer),
        "no optimizer": (path / "x", model, []),
        "no optimizer on one rank": (path / "x", model, optimizer if first else None),
        "twice": (path / "x", model, [optimizer, optimizer]),
        "extra": (path / "x", model, optimizer, {"net": {"inner": [1, net]}}),
        "broken extra": (path / "x", model, optimizer, {"thing": Broken()}),
        "paths": (path / f"x{dist.get_rank()}", model, optimizer),
        "a file": (path / "file" / "x", model, optimizer),
    }
    if first:
        (path / "file").write_text("in the way")
    dist.barrier()
    errors = {}
    for what, arguments in calls.items():
        with pytest.raises(CheckpointError) as raised:
            zeroopt.checkpoint.save(*arguments)
        errors[what] = str(raised.value)
        dist.barrier()
        assert [entry.name for entry in path.iterdir()] == ["file"], what
        dist.barrier()
    del other
    zeroopt.checkpoint.save(path / "x", model, optimizer)
    return errors


EXPECTED = {
    "plain model": "expected the model that zeroopt.wrap returned, got a Linear",
    "plain model on one rank": "on rank 0: expected the model",
    "plain optimizer": "expected optimizers that zeroopt.wrap returned, got a SGD",
    "other optimizer on one rank": "on rank 0: the optimizer was not wrapped with this model",
    "no optimizer": "the model has 1 optimizers, 0 were given",
    "no optimizer on one rank": "only one of rank 0 and rank 1 was given an optimizer",
    "twice": "give each of them once",
    "extra": "extra.pt['net']['inner'][1] is a torch.nn.modules.linear.Linear",
    "broken extra": "ValueError: broken on purpose",
    "paths": "/x1: give all the same path",
    "a file": "on rank 0",
}


def test_refusals(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    answers = run_on_ranks(2, refuse, tmp_path)
    assert answers[0] == answers[1]
    for what, text in EXPECTED.items():
        assert text in answers[0][what]


def save_between(path: Path) -> bool:
    """Between backward and step, and while gradients accumulate; it changes nothing."""
    results = []
    for saves in (False, True):
        model, optimizer = wrapped("mlp", "adamw", {"stage": 2})
        for step in range(4):
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            with model.no_sync():
                model(x).square().sum().backward()
            if saves:
                zeroopt.checkpoint.save(path, model, optimizer)
            model(x + 1).square().sum().backward()
            if saves:
                zeroopt.checkpoint.async_save(path, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        results.append(all_of(model, [optimizer]))
    assert_same(*results)
    zeroopt.checkpoint.save(path, model, optimizer)
    with model.join(), pytest.raises(StateError):
        zeroopt.checkpoint.save(path, model, optimizer)
    return True


def test_saving_between_backward_and_step(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert all(run_on_ranks(2, save_between, tmp_path / "x"))
