"""Outer steps are those of DiLoCo, in one piece and in fragments, for ranks alone and for groups; saved, left and come back to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diloco import Diloco
from torch import Tensor, nn
from training import batch, build, loss_of, optimizer_for
from whole_optimizers import Lars, no_padding
from worker_pool import RankError, RunOnRanks

import zeroopt

SMALL = {"bucket_mb": 0.002}
PAIRS, ACROSS = ((0, 1), (2, 3)), ((0, 2), (1, 3))


def nesterov(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


def outer_adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


OUTER = {"nesterov": nesterov, "adam": outer_adam}


def group_of(parts: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The one of these groups that this rank is in. Collective over all ranks."""
    groups = [dist.new_group(ranks) for ranks in parts]
    return next(group for ranks, group in zip(parts, groups, strict=True) if dist.get_rank() in ranks)


def groups() -> dict[str, Any]:
    """Four ranks in two groups; fewer alone."""
    if dist.get_world_size() < 4:
        return {}
    return {"process_group": group_of(PAIRS), "average_group": group_of(ACROSS)}


def members(worker: int) -> Sequence[int]:
    """The ranks that are one worker of DiLoCo."""
    return PAIRS[worker] if dist.get_world_size() == 4 else (worker,)


def backward(model: nn.Module, step: int, ranks: Sequence[int]) -> None:
    """The gradients of some ranks, together."""
    for rank in ranks:
        (loss_of(model(batch("mlp", step, rank))) / len(ranks)).backward()


class Run:
    """One rank's part in a training with outer steps."""

    def __init__(self, outer: str = "nesterov", **options: Any) -> None:
        self.net = build("mlp")
        self.model, self.optimizer = zeroopt.wrap(
            self.net,
            optimizer_for("adamw", self.net),
            outer_optimizer=OUTER[outer],
            **{"average_every": 3, **SMALL, **options},
        )
        self.steps = 0

    def train(self, steps: int) -> list[Tensor]:
        """The parameters, flat, after each step."""
        history = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            backward(self.model, self.steps, [dist.get_rank()])
            self.optimizer.step()
            self.steps += 1
            history.append(self.values())
        return history

    def values(self) -> Tensor:
        return torch.cat([param.detach().flatten().clone() for param in self.net.parameters()])

    def names_of(self, fragment: int) -> list[str]:
        """Of the parameters of a fragment."""
        number = self.optimizer._config.outer_fragments
        buckets = self.optimizer._trained.buckets
        return [m.name for i, bucket in enumerate(buckets) if i % number == fragment for m in bucket.params]


def expect(run: Run, outer: str, steps: int, every: int, **options: Any) -> list[Tensor]:
    """What this rank's worker has after each step, by the reference."""
    workers = 2 if dist.get_world_size() == 4 else dist.get_world_size()
    reference = Diloco(build("mlp"), lambda net: optimizer_for("adamw", net), OUTER[outer], workers, every, **options)
    mine = next(worker for worker in range(workers) if dist.get_rank() in members(worker))
    history = []
    for step in range(steps):
        reference.step(lambda model, worker, step=step: backward(model, step, members(worker)))
        history.append(torch.cat([p.detach().flatten().clone() for p in reference.workers[mine][0].parameters()]))
    return history


def compare(
    outer: str, every: int, variants: Sequence[dict[str, Any]], fragments: int, delay: int, kept: float
) -> None:
    """In float64: every step of every variant, on this rank, against the reference."""
    torch.set_default_dtype(torch.float64)
    try:
        streaming = {"outer_fragments": fragments, "outer_delay": delay, "outer_mixing": kept}
        within = groups()
        for variant in variants:
            run = Run(outer, average_every=every, **streaming, **within, **variant)
            named = [run.names_of(fragment) for fragment in range(fragments)]
            expected = expect(run, outer, 9, every, fragments=named, delay=delay, kept=kept)
            for step, (want, got) in enumerate(zip(expected, run.train(9), strict=True)):
                assert torch.allclose(got, want, rtol=1e-10, atol=1e-12), (variant, step, (got - want).abs().max())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("outer", list(OUTER))
@pytest.mark.parametrize("world_size", [2, 4])
def test_is_diloco(run_on_ranks: RunOnRanks, world_size: int, outer: str) -> None:
    variants: list[dict[str, Any]] = [{"stage": stage} for stage in (0, 1, 2)]
    variants += [
        {"transport": "pairwise", "overlap": False},
        *([{"share_parameters": True}] if world_size == 4 else []),
    ]
    run_on_ranks(world_size, compare, outer, 3, variants, 1, 0, 0.0)


@pytest.mark.parametrize(
    ("world_size", "every", "fragments", "delay", "kept"),
    [(2, 3, 2, 2, 0.5), (2, 4, 3, 1, 0.25), (3, 2, 3, 0, 0.0), (4, 4, 2, 3, 0.0)],
)
def test_streams_fragments(
    run_on_ranks: RunOnRanks, world_size: int, every: int, fragments: int, delay: int, kept: float
) -> None:
    run_on_ranks(world_size, compare, "nesterov", every, [{}], fragments, delay, kept)


STREAMING = {"outer_fragments": 2, "outer_delay": 1, "outer_mixing": 0.0, "average_every": 2}
TIERS: list[dict[str, Any]] = [
    {},
    {"outer_dtype": torch.bfloat16},
    {"param_dtype": torch.bfloat16, "outer_dtype": torch.bfloat16},
    {"param_dtype": torch.bfloat16, "master_weights": "remainder"},
    {"param_dtype": torch.bfloat16, "master_weights": "none", "outer_dtype": torch.float16},
]


def train_tiers() -> list[tuple[list[Tensor], list[Tensor]]]:
    within = groups()
    results = []
    for tier in TIERS:
        run = Run(average_every=2, cast_inputs="param_dtype" in tier, **within, **tier)
        history = run.train(4)
        results.append((history, [anchor.values.clone() for anchor in run.optimizer._outer._anchors.values()]))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_have_the_same_bits(run_on_ranks: RunOnRanks, world_size: int) -> None:
    """After an outer step and not before, in whatever parameters are kept and outer gradients travel."""
    ranks = run_on_ranks(world_size, train_tiers)
    across = 1 if world_size == 2 else 2
    exact = ranks[0][0][0]
    for tier in range(len(TIERS)):
        (history, anchors), (others, others_anchors) = ranks[0][tier], ranks[across][tier]
        assert [torch.equal(a, b) for a, b in zip(history, others, strict=True)] == [False, True, False, True]
        assert all(map(torch.equal, anchors, others_anchors))
        moved = exact[-1] - exact[0]
        assert (history[-1].float() - exact[-1]).norm() < 0.3 * moved.norm(), tier


def lose_little(outer_dtype: torch.dtype | str | None) -> list[Tensor]:
    return Run(average_every=1, outer_dtype=outer_dtype).train(20)


def test_what_rounding_takes_comes_with_the_next_step(run_on_ranks: RunOnRanks) -> None:
    """A slice is exact where it is stepped, so steps that are rounded do not add up to another training."""
    (exact, _), (rounded, _) = (run_on_ranks(2, lose_little, dtype) for dtype in (None, torch.bfloat16))
    assert (exact[-1] - rounded[-1]).abs().max() < 0.01 * (exact[-1] - exact[0]).abs().max()


def alone() -> list[Tensor]:
    run = Run(average_every=2)
    history = run.train(6)
    assert run.model.sit_out() is False
    for want, got in zip(expect(run, "nesterov", 6, 2), history, strict=True):
        torch.testing.assert_close(got, want)
    return history


def test_one_rank_has_outer_steps_too(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(1, alone)


def resume_states() -> bool:
    """From a state dict of each rank, with a fragment on its way, and from a list of those of the group."""
    within = groups()
    options = {**within, **STREAMING, "outer_mixing": 0.5, "outer_dtype": torch.bfloat16}
    run = Run("adam", **options)
    run.train(5)
    saved = copy.deepcopy((run.net.state_dict(), run.optimizer.state_dict()))
    assert any(anchor.stage for anchor in run.optimizer._outer._anchors.values())
    expected = run.train(6)
    other = Run("adam", **options)
    other.train(1)
    other.steps = 5
    other.net.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    return all(map(torch.equal, expected, other.train(6)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_goes_on_from_state_dicts(run_on_ranks: RunOnRanks, world_size: int) -> None:
    assert run_on_ranks(world_size, resume_states) == [True] * world_size


def whole_outer_state(run: Run) -> dict[int, Any]:
    """By position, on the first rank of each group."""
    run.optimizer.consolidate_state_dict()
    if run.model.replica.control.rank:
        return {}
    return {p: entry["outer"] for p, entry in run.optimizer.full_state_dict()["zeroopt"]["state"].items()}


def save_run(path: str, options: dict[str, Any]) -> tuple[dict[int, Any], list[Tensor]]:
    """Two groups of two save between outer steps, each for itself, and go on."""
    within = groups()
    run = Run("adam", **within, **options)
    run.train(5)
    group = dist.get_rank() // 2
    zeroopt.checkpoint.save(f"{path}/{group}", run.model, run.optimizer, process_group=within["process_group"])
    return whole_outer_state(run), run.train(6)


def load_run(
    path: str, options: dict[str, Any], parts: Sequence[Sequence[int]], across: Sequence[Sequence[int]]
) -> tuple[dict[int, Any], list[Tensor], dict[int, Any]]:
    """In groups of these ranks. A third one, which is new, loads what the first one has saved."""
    within: dict[str, Any] = {"process_group": group_of(parts), "average_group": group_of(across)}
    group = next(number for number, ranks in enumerate(parts) if dist.get_rank() in ranks)
    run = Run("adam", **within, **options)
    zeroopt.checkpoint.load(f"{path}/{group % 2}", run.model, run.optimizer, process_group=within["process_group"])
    run.steps = 5
    return whole_outer_state(run), run.train(6), whole_outer_state(run)


def test_goes_on_from_checkpoints(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """Bit for bit with the same ranks; from the same state in three groups of one rank each."""
    options: dict[str, Any] = {**STREAMING, "outer_mixing": 0.0, "stage": 1, "outer_dtype": torch.bfloat16}
    saved = run_on_ranks(4, save_run, str(tmp_path), options)
    again = run_on_ranks(4, load_run, str(tmp_path), options, PAIRS, ACROSS)
    for (_, want), (_, got, _) in zip(saved, again, strict=True):
        assert all(map(torch.equal, want, got))
    three = run_on_ranks(3, load_run, str(tmp_path), options, [(0,), (1,), (2,)], [(0, 1, 2)])
    expected = saved[0][0]
    assert expected[0].keys() == {"anchor", "exact", "step", "exp_avg", "exp_avg_sq"}
    for outer, *_ in (again[0], again[2], *three):
        assert outer.keys() == expected.keys()
        for position, entry in expected.items():
            for name, value in entry.items():
                assert torch.equal(outer[position][name], value) if name != "step" else outer[position][name] == value
    for outer, _, in_the_end in three:
        for position, entry in three[0][2].items():
            assert torch.equal(in_the_end[position]["anchor"], entry["anchor"])
            assert not torch.equal(entry["anchor"], outer[position]["anchor"])


def load_one_only(path: str) -> None:
    """One group goes on from a checkpoint, the other one begins."""
    within = groups()
    run = Run("adam", **within, **STREAMING)
    if dist.get_rank() < 2:
        zeroopt.checkpoint.load(f"{path}/0", run.model, run.optimizer, process_group=within["process_group"])
    run.train(3)


def test_all_groups_have_to_load(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(4, save_run, str(tmp_path), STREAMING)
    for error in run_on_ranks.outcomes(4, load_one_only, str(tmp_path)):
        assert isinstance(error, RankError) and error.type_name == "CollectiveError", error
        assert "ranks 0 and 1 of the average group have" in error.message


def sit_out_some(steps: tuple[int, int], comes_back: bool, options: dict[str, Any]) -> tuple[list[Tensor], list[bool]]:
    """Ranks train for different numbers of steps; those that have trained less come back, or leave for good."""
    run = Run(**groups(), **options)
    mine = steps[0 if dist.get_rank() == 0 or dist.get_world_size() == 4 and dist.get_rank() == 1 else 1]
    history = run.train(mine)
    told = []
    if comes_back and mine < max(steps):
        told.append(run.model.sit_out())
        history.append(run.values())
        run.steps = max(steps)
        history += run.train(2)
    elif comes_back:
        history += run.train(2)
    run.model.leave()
    history.append(run.values())
    run.train(2)  # all together, and one of two steps is an outer one
    return history, told


def by_hand(first: int, second: int) -> list[Tensor]:
    """What is in common after two workers have trained so many steps, of which the second one has 1 too few for an outer step."""
    reference = Diloco(build("mlp"), lambda net: optimizer_for("adamw", net), nesterov, 2, every=2)
    common = []
    for step in range(first):
        who = [0, 1] if step < second else [0]
        for worker in who:
            model, optimizer = reference.workers[worker]
            optimizer.zero_grad()
            backward(model, step, members(worker))
            optimizer.step()
        if step % 2 == 1 or step == first - 1:
            contributors = [worker for worker, trained in ((0, first), (1, second)) if trained > step - step % 2]
            (fragment,) = reference.fragments
            reference.arrive(fragment, reference.outer_step(fragment, contributors))
            common.append(torch.cat([anchor.detach().flatten().clone() for anchor in fragment.anchor]))
    return common


@pytest.mark.parametrize("world_size", [2, 4])
def test_groups_leave(run_on_ranks: RunOnRanks, world_size: int) -> None:
    """One has 7 batches and the other one 3: what that one has trained counts once, and what is left over in the end does, too."""
    ranks = run_on_ranks(world_size, sit_out_some, (7, 3), False, {"average_every": 2})
    (expected, *_) = run_on_ranks(world_size, by_hand, 7, 3)
    for step, common in zip((1, 3, 5, 7), expected, strict=True):
        torch.testing.assert_close(ranks[0][0][step], common)
    for history, _ in ranks:
        assert torch.equal(history[-1], ranks[0][0][-1])


def test_a_group_comes_back(run_on_ranks: RunOnRanks) -> None:
    """It goes on from what all have in common, in step with them, fragments on their way or not."""
    for options in ({"average_every": 2}, {**STREAMING, "average_every": 4, "outer_dtype": "int8"}):
        (trained, _), (back, told) = run_on_ranks(2, sit_out_some, (4, 3), True, options)
        assert told == [True]
        assert torch.equal(trained[-1], back[-1])
        if options == {"average_every": 2}:
            assert torch.equal(trained[3], back[3]) and not torch.equal(trained[4], back[4])
            assert torch.equal(trained[5], back[5])


def save_while_one_sits() -> list[bool]:
    """The one that has data saves in between; the other one takes part."""
    run = Run(average_every=2)
    run.train(2)
    if dist.get_rank() == 0:
        run.train(1)
        saved = run.optimizer.state_dict()
        run.train(1)
        assert any("outer" in entry for entry in saved["state"].values())
    run.model.leave()
    return [bool(torch.isfinite(run.values()).all())]


def test_a_rank_without_data_takes_part_in_saving(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, save_while_one_sits) == [[True]] * 2


@pytest.mark.parametrize(("outer_dtype", "most"), [("int8", 0.05), ("int4", 0.4)])
def test_codes_go_about_the_same_way(run_on_ranks: RunOnRanks, outer_dtype: str, most: float) -> None:
    exact, _ = run_on_ranks(2, lose_little, None)
    coded, other = run_on_ranks(2, lose_little, outer_dtype)
    assert all(map(torch.equal, coded, other)) and not torch.equal(coded[19], exact[19])
    assert (coded[19] - exact[19]).norm() < most * (exact[19] - exact[0]).norm()


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 300), nn.Linear(300, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def train_by_two() -> list[Tensor]:
    """Two optimizers, whose groups leave together; one layer is unfrozen on the way, and the outer rate changes."""
    torch.manual_seed(0)
    net = TwoParts()
    net.first.bias.requires_grad_(False)
    options: dict[str, Any] = {"average_every": 2, "outer_optimizer": nesterov, **SMALL}
    model, first = zeroopt.wrap(net, torch.optim.SGD(net.first.parameters(), lr=0.1), **options)
    model, second = zeroopt.wrap(model, torch.optim.AdamW(net.second.parameters(), lr=0.01), **options)
    schedule = torch.optim.lr_scheduler.StepLR(first.outer_optimizer, step_size=1, gamma=0.5)
    for step in range(4 if dist.get_rank() == 0 else 3):
        loss_of(model(batch("mlp", step))).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        if step == 1:
            net.first.bias.requires_grad_()
    model.leave()
    assert first.outer_optimizer.param_groups[0]["lr"] == 0.7 * 0.5 ** (4 if dist.get_rank() == 0 else 3)
    return [param.detach().clone() for param in net.parameters()]


def test_optimizers_of_one_model_step_and_leave_together(run_on_ranks: RunOnRanks) -> None:
    one, other = run_on_ranks(2, train_by_two)
    assert all(map(torch.equal, one, other))


def skip_by_a_scaler() -> tuple[list[bool], list[Tensor]]:
    """Rank 1 has infinite gradients in the step of an outer step, and its anchor comes nevertheless."""
    run = Run(average_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped, history = [], []
    for step in range(4):
        run.optimizer.zero_grad()
        loss = loss_of(run.model(batch("mlp", step)))
        scaler.scale(loss * (float("inf") if step == 1 and dist.get_rank() == 1 else 1.0)).backward()
        before = scaler.get_scale()
        scaler.step(run.optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < before)
        history.append(run.values())
    return skipped, history


def test_a_rank_that_skips_has_its_outer_step(run_on_ranks: RunOnRanks) -> None:
    (_, one), (skipped, other) = run_on_ranks(2, skip_by_a_scaler)
    assert skipped == [False, True, False, False]
    assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [False, True, False, True]
    assert torch.isfinite(other[-1]).all()


def diverge(what: str) -> None:
    run = Run(average_every=2, sync_module_states=what != "anchors")
    if what == "anchors":
        with torch.no_grad():
            run.net.scale.add_(dist.get_rank())
    if what == "options":
        run.optimizer.outer_optimizer.param_groups[0]["lr"] = 0.1 * (1 + dist.get_rank())
    run.train(1)
    if what == "saving" and dist.get_rank() == 1:
        run.optimizer.state_dict()
    run.train(1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "anchors",
            "have different anchors; load states of one step of one run on all of them, and wrap with sync_module",
        ),
        ("options", "have outer optimizers with different options; set the same on all of them"),
        ("saving", "have different things to do; let all save states after the same step"),
    ],
)
def test_all_hear_that_ranks_do_not_go_together(run_on_ranks: RunOnRanks, what: str, message: str) -> None:
    for error in run_on_ranks.outcomes(2, diverge, what):
        assert isinstance(error, RankError) and error.type_name == "CollectiveError"
        assert f"an outer step: ranks 0 and 1 of the average group {message}" in error.message


def refused() -> None:
    net = build("mlp")
    model, _ = zeroopt.wrap(net, optimizer_for("sgd", net), average_every=2)
    with pytest.raises(zeroopt.NotSupportedError, match=r"leave\(\)|sit_out\(\) needs an outer_optimizer"):
        model.leave()
    run = Run()
    with (
        pytest.raises(zeroopt.NotSupportedError, match=r"join\(\) is not supported with average_every"),
        run.model.join(),
    ):
        pass
    rate = 0.1 * (1 + dist.get_rank())
    other = build("mlp")
    with pytest.raises(zeroopt.RankMismatchError, match="outer param_group 0 with .*lr=0.1"):
        zeroopt.wrap(
            other,
            optimizer_for("sgd", other),
            average_every=2,
            outer_optimizer=lambda params: torch.optim.SGD(params, lr=rate),
        )
    double = build("mlp").double()
    with pytest.raises(zeroopt.ConfigError, match="does not fit parameters of torch.float64"):
        zeroopt.wrap(
            double, optimizer_for("sgd", double), average_every=2, outer_optimizer=nesterov, outer_dtype=torch.bfloat16
        )


def test_what_is_refused(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, refused)


def train_one_matrix() -> list[Tensor]:
    """One of the two ranks of each group owns nothing of the only bucket."""
    torch.manual_seed(0)
    net = nn.Linear(6, 4, bias=False)
    with no_padding():
        model, optimizer = zeroopt.wrap(
            net, Lars(net.parameters()), stage=2, average_every=2, outer_optimizer=nesterov, **groups()
        )
    assert optimizer.state_dicts.buckets[0].moves is not None
    for step in range(4):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(4 * step + dist.get_rank()))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [net.weight.detach().clone()]


def test_ranks_that_own_nothing_of_a_bucket(run_on_ranks: RunOnRanks) -> None:
    first, *others = run_on_ranks(4, train_one_matrix)
    assert torch.isfinite(first[0]).all()
    assert all(torch.equal(first[0], other[0]) for other in others)
