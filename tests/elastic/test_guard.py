"""Copies in memory, and going on from them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import TIERS, all_of, assert_all_same, assert_same, train, wrapped
from lone import Lone
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import CheckpointError
from zeroopt.checkpoint import RandomState
from zeroopt.elastic import Guard
from zeroopt.elastic.finding import choose, find
from zeroopt.elastic.place import MEMORY, FileName, directory_of, files_in
from zeroopt.elastic.slots import NOT_WHOLE, Slots

CASES: list[tuple[str, dict[str, Any]]] = [
    *(("mlp", options) for options in TIERS.values()),
    ("mlp", {"stage": 0}),
    ("conv", {"step_in_backward": True}),
]


def train_under_guard(memory: Path, model_name: str, options: dict[str, Any], steps: int) -> Any:
    """What there is after so many steps, all of them copied, as if the process were then killed."""
    model, optimizer = wrapped(model_name, "adamw", options)
    random = {"random": RandomState()}
    guard = Guard(model, optimizer, {"word": "yes"}, rank_extra=random, job="job", memory=memory)
    first = guard.restore().get("step", 0)
    for step in range(first, steps):
        train(model, optimizer, model_name, range(step, step + 1))
        torch.rand(1)
        guard.step(step + 1)
    guard.wait()
    return first, all_of(model, [optimizer]), torch.rand(1).item()


def restored(memory: Path, model_name: str, options: dict[str, Any]) -> Any:
    model, optimizer = wrapped(model_name, "adamw", options)
    torch.manual_seed(99)
    guard = Guard(model, optimizer, rank_extra={"random": RandomState()}, job="job", memory=memory)
    found = guard.restore()
    return found.get("step", 0), all_of(model, [optimizer]), torch.rand(1).item(), found.get("word")


@pytest.mark.parametrize("case", range(len(CASES)))
def test_all_is_there_again(run_on_ranks: RunOnRanks, tmp_path: Path, case: int) -> None:
    before = run_on_ranks(2, train_under_guard, tmp_path, *CASES[case], 3)
    after = run_on_ranks(2, restored, tmp_path, *CASES[case])
    for (_, expected, random), (step, values, found_random, word) in zip(before, after, strict=True):
        assert (step, word, found_random) == (3, "yes", random)
        assert_same(values, expected)


def go_on(memory: Path, options: dict[str, Any], cuts: list[int]) -> Any:
    """What there is after the last of some steps; after each of the others, a new model goes on from the copy."""
    for cut in cuts:
        _, values, _ = train_under_guard(memory, "lm", options, cut)
    return values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_compression": "int8", "parameter_compression": "int8"},
        {"stage": 1, "param_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_training_goes_on_as_if_nothing_had_happened(
    run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]
) -> None:
    expected = run_on_ranks(2, go_on, tmp_path / "whole", options, [5])
    found = run_on_ranks(2, go_on, tmp_path / "cut", options, [2, 3, 5])
    for mine, its in zip(found, expected, strict=True):
        assert_same(mine, its)


def go_on_in_shard_groups(memory: Path, cuts: list[int]) -> Any:
    shard_group, _ = dist.new_subgroups(2)
    return go_on(memory, {"shard_group": shard_group}, cuts)


def test_shard_groups_go_on_as_if_nothing_had_happened(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_on_ranks(4, go_on_in_shard_groups, tmp_path / "whole", [4])
    found = run_on_ranks(4, go_on_in_shard_groups, tmp_path / "cut", [2, 4])
    for mine, its in zip(found, expected, strict=True):
        assert_same(mine, its)


def test_any_number_of_ranks_goes_on_and_copies_anew(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    (_, expected, _), *_ = run_on_ranks(2, train_under_guard, tmp_path, "mlp", {}, 4)
    assert_all_same([values for _, values, *_ in run_on_ranks(3, restored, tmp_path, "mlp", {})], expected)
    first, *_ = run_on_ranks(3, train_under_guard, tmp_path, "mlp", {"stage": 1}, 6)
    assert first[0] == 4
    (name, *more) = files_in(tmp_path / next(path.name for path in tmp_path.iterdir()))
    assert (name.layout, name.ranks, len(more)) == (2, 3, 2), "those of two ranks are gone"
    assert_all_same([values for _, values, *_ in run_on_ranks(1, restored, tmp_path, "mlp", {})], first[1])


def torn(memory: Path, steps: int, torn_rank: int) -> Any:
    """Copies of which one was cut off in the middle."""
    result = train_under_guard(memory, "mlp", {}, steps)
    directory = next(memory.iterdir())
    if dist.get_rank() == torn_rank:
        slots = Slots.open(directory / str(files_in(directory)[torn_rank]))
        slot = slots.slot_of(steps)
        assert slot is not None
        slots.begin(slot)[:] = 255
    return result


@pytest.mark.parametrize("torn_rank", [0, 1])
def test_a_copy_that_was_cut_off_is_passed_over_on_all_ranks(
    run_on_ranks: RunOnRanks, tmp_path: Path, torn_rank: int
) -> None:
    (_, expected, _), *_ = run_on_ranks(2, train_under_guard, tmp_path / "other", "mlp", {}, 2)
    run_on_ranks(2, torn, tmp_path / "this", 3, torn_rank)
    after = run_on_ranks(2, restored, tmp_path / "this", "mlp", {})
    assert [step for step, *_ in after] == [2, 2]
    assert_all_same([values for _, values, *_ in after], expected)


def every_other(memory: Path) -> list[int]:
    model, optimizer = wrapped("mlp", "adamw", {})
    steps = []
    with Guard(model, optimizer, every=2, job="job", memory=memory) as guard:
        for step in range(1, 6):
            train(model, optimizer, "mlp", range(step, step + 1))
            guard.step(step)
            guard.wait()
            dist.barrier()
            steps.append(choose([find(directory_of("job", memory))] * 2, [[0, 1]]).step or 0)
            dist.barrier()
        train(model, optimizer, "mlp", range(5, 6))
    return steps


def test_a_guard_copies_every_so_many_steps_and_leaves_nothing(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert run_on_ranks(2, every_other, tmp_path) == [[0, 2, 2, 4, 4]] * 2
    assert list(tmp_path.iterdir()) == []


def without_restoring(memory: Path) -> Any:
    model, optimizer = wrapped("mlp", "adamw", {})
    guard = Guard(model, optimizer, rank_extra={"random": RandomState()}, job="job", memory=memory)
    train(model, optimizer, "mlp", range(1))
    guard.step(1)
    guard.wait()
    return 1, all_of(model, [optimizer])


def test_a_run_that_does_not_restore_begins_anew(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, train_under_guard, tmp_path, "mlp", {}, 4)
    (_, expected), *_ = run_on_ranks(2, without_restoring, tmp_path)
    after = run_on_ranks(2, restored, tmp_path, "mlp", {})
    assert [step for step, *_ in after] == [1, 1]
    assert_all_same([values for _, values, *_ in after], expected)


def without_restoring_what_others_may_write(memory: Path) -> tuple[str, Any]:
    model, optimizer = wrapped("mlp", "adamw", {})
    directory = directory_of("job", memory)
    directory.mkdir(mode=0o700)
    (memory / "mine").mkdir()
    slots = Slots.make(memory / "mine" / "copy", b"", 1)
    slots.finish(0, 3)
    (directory / str(FileName(1, 1, 1, 0))).symlink_to(slots.path)
    directory.chmod(0o777)
    guard = Guard(model, optimizer, job="job", memory=memory)
    with pytest.raises(CheckpointError) as raised:
        guard.step(1)
    return str(raised.value), slots.steps


def test_what_others_may_have_put_there_is_left_alone(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """It may be links to what is the user's own, such as copies of another job."""
    [(message, steps)] = run_on_ranks(1, without_restoring_what_others_may_write, tmp_path)
    assert "is to be a directory of user" in message
    assert steps == (3, NOT_WHOLE)


def with_object(memory: Path) -> None:
    model, optimizer = wrapped("mlp", "adamw", {})
    train(model, optimizer, "mlp", range(1))
    mine = {"object": object()} if dist.get_rank() == 1 else {"object": 1}
    guard = Guard(model, optimizer, rank_extra=mine, job="job", memory=memory)
    guard.step(1)


def test_what_cannot_be_copied_is_an_error_on_all_ranks(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    errors: list[Any] = run_on_ranks.outcomes(2, with_object, tmp_path)
    assert [error.type_name for error in errors] == ["CheckpointError"] * 2
    assert errors[0].message == "step 1 could not be copied: on another rank, which says why"
    assert "rank-1.pt['object'] is a builtins.object" in errors[1].message


def becoming_unloadable(memory: Path, what: str) -> Any:
    """What a later copy raises, of values that could be copied at first."""
    model, optimizer = wrapped("mlp", "adamw", {})
    extra: dict[str, Any] = {"best": None}
    guard = Guard(model, optimizer, extra, job="job", memory=memory)
    train(model, optimizer, "mlp", range(1))
    guard.step(1)
    if what == "best":
        extra["best"] = np.float64(3)
    else:
        optimizer.param_groups[0]["lr"] = np.float64(0.1)
    with pytest.raises(CheckpointError) as raised:
        guard.step(2)
    return str(raised.value)


@pytest.mark.parametrize("what", ["best", "lr"])
def test_what_could_not_be_read_is_refused_in_later_copies(run_on_ranks: RunOnRanks, tmp_path: Path, what: str) -> None:
    (message,) = run_on_ranks(1, becoming_unloadable, tmp_path, what)
    assert what in message and "float64" in message


def broken_off(memory: Path) -> Any:
    """What there is to go on from after a step that was broken off in the middle."""
    lone = Lone(0, torch.optim.Adam)
    guard = Guard(lone.model, lone.optimizer, job="job", memory=memory)
    lone.step(1)
    guard.step(1)
    step = lone.optimizer._trained.stepper.step

    def broken(active: Any) -> Iterator[Any]:
        yield next(iter(step(active)))
        raise KeyboardInterrupt

    lone.backward(2)
    with patch.object(lone.optimizer._trained.stepper, "step", broken), pytest.raises(KeyboardInterrupt):
        lone.optimizer.step()
    with pytest.raises(CheckpointError, match="a step did not come to its end"):
        guard.step(2)
    other = Lone(0, torch.optim.Adam)
    return Guard(other.model, other.optimizer, job="job", memory=memory).restore()["step"]


def test_a_step_that_was_broken_off_is_not_copied(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert run_on_ranks(1, broken_off, tmp_path) == [1]


def bytes_of_slots(memory: Path, options: dict[str, Any]) -> tuple[int, int]:
    """Of a slot of a model of one matrix, and how many parameters that has."""
    torch.manual_seed(0)
    net = torch.nn.Linear(512, 512, bias=False)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), transport="pairwise", **options)
    guard = Guard(model, optimizer, job="job", memory=memory)
    for step in range(1, 3):
        model(torch.ones(2, 512)).sum().backward()
        optimizer.step()
        guard.step(step)
    guard.wait()
    directory = next(memory.iterdir())
    return Slots.open(directory / str(files_in(directory)[-1])).slot_bytes, net.weight.numel()


@pytest.mark.parametrize(
    ("options", "bytes_a_parameter"),
    [({}, 12 / 2), ({"gradient_compression": "int8", "parameter_compression": "int8"}, 12 / 2 + 2 + 4 / 2)],
    ids=["exact", "codes"],
)
def test_slots_are_as_large_as_is_told(
    run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any], bytes_a_parameter: float
) -> None:
    (slot_bytes, numel), _ = run_on_ranks(2, bytes_of_slots, tmp_path, options)
    room_for_values = 1 << 17
    assert 0 <= slot_bytes - bytes_a_parameter * numel < room_for_values


def alone(memory: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), average_every=2)
    Guard(model, optimizer, job="job", memory=memory)


def test_models_that_not_all_ranks_hold_together_are_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    errors: list[Any] = run_on_ranks.outcomes(2, alone, tmp_path)
    assert {error.type_name for error in errors} == {"NotSupportedError"}
    assert list(tmp_path.iterdir()) == []


def several(memory: Path) -> Any:
    """Two optimizers of a model, a scheduler, and what comes back of them."""
    found = []
    for start in range(2):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        model, first = zeroopt.wrap(net, torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.9))
        model, second = zeroopt.wrap(model, torch.optim.AdamW(net[1].parameters(), lr=0.1))
        scheduler = torch.optim.lr_scheduler.StepLR(first, 1)
        guard = Guard(model, [first, second], {"scheduler": scheduler}, job="job", memory=memory)
        step = guard.restore().get("step", 0)
        if start == 0:
            model(torch.ones(2, 4)).sum().backward()
            first.step()
            second.step()
            scheduler.step()
            guard.step(step + 1)
            guard.wait()
        rates = [one.param_groups[0]["lr"] for one in (first, second)]
        found.append((all_of(model, [first, second]), rates, scheduler.last_epoch))
    guard.close()
    return found


def test_all_optimizers_and_their_options_come_back(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for before, after in run_on_ranks(2, several, tmp_path):
        assert_same(after[0], before[0])
        assert after[1:] == before[1:]
        assert after[1] == [pytest.approx(0.01), 0.1]


def going_back(memory: Path) -> Any:
    """A run that has got worse begins again from what it had saved."""
    model, optimizer = wrapped("mlp", "adamw", {})
    guard = Guard(model, optimizer, rank_extra={"random": RandomState()}, job="job", memory=memory)
    for step in (8, 9, 10, 5):
        train(model, optimizer, "mlp", range(step, step + 1))
        guard.step(step)
    guard.wait()
    return 5, all_of(model, [optimizer])


def test_whoever_goes_back_leaves_what_came_later(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    (_, expected), *_ = run_on_ranks(2, going_back, tmp_path)
    after = run_on_ranks(2, restored, tmp_path, "mlp", {})
    assert [step for step, *_ in after] == [5, 5]
    assert_all_same([values for _, values, *_ in after], expected)


def newer_ones(memory: Path, steps: list[int]) -> list[int]:
    model, optimizer = wrapped("mlp", "adamw", {})
    guard = Guard(model, optimizer, rank_extra={"random": RandomState()}, job="job", memory=memory)
    return [guard.restore(newer_than=step).get("step", step) for step in steps]


def test_copies_give_way_to_what_is_as_new(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, train_under_guard, tmp_path, "mlp", {}, 3)
    assert run_on_ranks(2, newer_ones, tmp_path, [2, 3]) == [[3, 3]] * 2
    assert run_on_ranks(2, newer_ones, tmp_path, [0]) == [[0]] * 2, "they are gone"


def test_runs_that_are_killed_again_and_again_leave_one_file_each(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for steps in (1, 2, 3, 4):
        run_on_ranks(2, train_under_guard, tmp_path, "mlp", {}, steps)
        (directory,) = tmp_path.iterdir()
        (directory / ".half made").touch()
        assert len(list(directory.iterdir())) <= 5


def two_models(memory: Path) -> str:
    guards = [Guard(*wrapped("mlp", "adamw", {}), job="job", memory=memory) for _ in range(2)]
    guards[1].restore()
    with pytest.raises(zeroopt.StateError, match="a job= of its own"):
        guards[0].step(1)
    with pytest.raises(zeroopt.StateError, match="a job= of its own"):
        guards[0].restore()
    with pytest.raises(zeroopt.ConfigError) as caught:
        Guard(*wrapped("mlp", "adamw", {}), job=f"job-{dist.get_rank()}", memory=memory)
    return str(caught.value)


def test_models_and_ranks_are_of_jobs_that_fit(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for message in run_on_ranks(2, two_models, tmp_path):
        assert (
            message.startswith("expected the ranks of a host to be of one job, got rank 0 zeroopt-")
            and "job-1" in message
        )


def bytes_taken(memory: Path, steps: int) -> list[int]:
    """What all files take after going on, and after each step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(512, 512, bias=False)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()))
    guard = Guard(model, optimizer, job="job", memory=memory)
    first, taken = guard.restore().get("step", 0), []

    def look() -> None:
        guard.wait()
        dist.barrier()
        taken.append(sum(path.stat().st_blocks for path in memory.rglob("*-rank-*")) * 512)
        dist.barrier()

    look()
    for step in range(first, first + steps):
        model(torch.ones(2, 512)).sum().backward()
        optimizer.step()
        guard.step(step + 1)
        look()
    return taken


def test_going_on_takes_no_more_memory_than_training(run_on_ranks: RunOnRanks) -> None:
    two, values = 24 * 512 * 512, 1 << 19  # of both ranks: parameters and moments, and all else
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        (before, *_), (after, *_) = (run_on_ranks(2, bytes_taken, Path(folder), 3) for _ in range(2))
    for taken, expected in ((before, [0, two // 2, two, two]), (after, [two // 2, two, two, two])):
        for found, slots in zip(taken, expected, strict=True):
            assert 0 <= found - slots < values


class Base(torch.nn.Module):
    """Mostly frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = torch.nn.Linear(256, 256).requires_grad_(False)
        self.adapter, self.norm = torch.nn.Linear(256, 4), torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.adapter(self.base(x)))


def adapted(memory: Path, *, frozen: bool, base: float = 0.0, steps: int = 0) -> Any:
    """What a model has that goes on with its base so much changed, and how many bytes a copy takes."""
    net = Base()
    net.base.bias.data += base
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(p for p in net.parameters() if p.requires_grad))
    guard = Guard(model, optimizer, job="job", memory=memory, frozen=frozen)
    first = guard.restore().get("step", 0)
    for step in range(first, first + steps):
        model(torch.randn(8, 256)).square().mean().backward()
        optimizer.step()
        guard.step(step + 1)
    guard.wait()
    sizes = [path.stat().st_size for path in memory.rglob("*-rank-*")]
    return first, all_of(model, [optimizer]), max(sizes, default=0)


def test_what_is_frozen_may_be_left_out(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for frozen in (True, False):
        memory = tmp_path / str(frozen)
        (_, expected, size), *_ = run_on_ranks(2, adapted, memory, frozen=frozen, steps=2)
        assert (size > 4 * 256 * 256) is frozen
        # Whoever goes on need not say it.
        for first, found, _ in run_on_ranks(2, adapted, memory, frozen=True, base=1.0 if frozen else 0.0):
            assert first == 2
            assert_same(found, expected)


def test_another_base_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    (_, expected, _), *_ = run_on_ranks(2, adapted, tmp_path, frozen=False, steps=1)
    errors: list[Any] = run_on_ranks.outcomes(2, adapted, tmp_path, frozen=False, base=1.0)
    assert {error.type_name for error in errors} == {"CheckpointError"}
    assert all("'model.base.bias', which is frozen" in error.message for error in errors)
    (first, found, _), *_ = run_on_ranks(2, adapted, tmp_path, frozen=False)
    assert first == 1, "nothing was removed"
    assert_same(found, expected)
