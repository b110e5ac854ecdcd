"""ZeroOptimizer behaves as the torch optimizer it wraps: groups, schedulers, closures, hooks, state."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import WIDTH, Prepare, follow, inputs, layers, values, with_ddp, with_zeroopt
from torch import Tensor, nn
from training import batch, build, loss_of, optimizer_for, prepare, snapshot, train
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.options.precision import round_master

STAGES = (0, 1, 2)


def train_with_scheduler(options: dict[str, Any] | None, before: bool) -> tuple[list[Tensor], list[str]]:
    net = build("mlp")
    inner = optimizer_for("adamw", net, groups=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5**step) if before else None
        model, optimizer = prepare(net, inner, options)
        if scheduler is None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(4):
            loss_of(model(batch("mlp", step))).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 * 0.5**4, 0.02 * 0.5**4]
    messages = [str(w.message) for w in caught if "lr_scheduler" in str(w.message)]
    return snapshot(net), messages


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_schedulers_made_before_and_after_wrapping(run_on_ranks: RunOnRanks, before: bool, fused: bool) -> None:
    expected, _ = run_on_ranks(2, train_with_scheduler, None, True)[0]
    for stage in STAGES:
        for ends, messages in run_on_ranks(2, train_with_scheduler, {"stage": stage, "fused": fused}, before):
            assert messages == []
            for want, got in zip(expected, ends, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5 if fused else 0, atol=1e-6 if fused else 0)


def same_group_objects() -> bool:
    net = build("mlp")
    inner = optimizer_for("sgd", net, groups=3)
    groups = list(inner.param_groups)
    _, optimizer = zeroopt.wrap(net, inner)
    loss_of(net(batch("mlp", 0))).backward()
    optimizer.step()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return (
        all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
        and optimizer.param_groups is inner.param_groups
        and {id(p) for p in params} == {id(p) for p in net.parameters()}
        and isinstance(optimizer, torch.optim.Optimizer)
    )


def test_param_groups_are_the_wrapped_optimizers_own(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, same_group_objects) == [True, True]


def count_calls() -> dict[str, int]:
    net = build("mlp")
    inner = optimizer_for("own", net)
    counts = {"pre": 0, "post": 0, "late": 0, "closure": 0}

    def counter(name: str) -> Any:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    inner.register_step_pre_hook(counter("pre"))
    inner.register_step_post_hook(counter("post"))
    model, optimizer = zeroopt.wrap(net, inner)
    optimizer.register_step_post_hook(counter("late"))
    assert counts == {"pre": 0, "post": 0, "late": 0, "closure": 0}, "wrapping ran the hooks"

    def closure() -> float:
        counts["closure"] += 1
        optimizer.zero_grad()
        loss = loss_of(model(batch("mlp", 0)))
        loss.backward()
        return loss.item()

    loss = optimizer.step(closure)
    assert isinstance(loss, float) and loss > 0
    assert inner.calls == 1  # type: ignore[attr-defined]  # the probe at wrap time did not step the real one
    return counts


def test_hooks_and_closures_run_once_a_step(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, count_calls) == [{"pre": 1, "post": 1, "late": 1, "closure": 1}] * 2


def state_layout(optimizer_name: str, options: dict[str, Any]) -> dict[str, list[tuple[str, list[int], int]]]:
    """For each parameter: names, shapes and count of elements of the state on this rank."""
    net = build("lm")
    model, optimizer = zeroopt.wrap(net, optimizer_for(optimizer_name, net), **options)
    assert optimizer.state == {}
    loss_of(model(batch("lm", 0))).backward()
    optimizer.step()
    names = {p: n for n, p in net.named_parameters()}
    return {
        names[param]: [(key, list(value.shape), value.numel()) for key, value in entry.items()]
        for param, entry in optimizer.state.items()
        if entry
    }


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_state_is_split_over_ranks(run_on_ranks: RunOnRanks, stage: int, fused: bool) -> None:
    numel = {name: p.numel() for name, p in build("lm").named_parameters()}
    ranks = run_on_ranks(3, state_layout, "adamw", {"stage": stage, "fused": fused})
    owned = dict.fromkeys(numel, 0)
    for layout in ranks:
        for name, entries in layout.items():
            assert [key for key, _, _ in entries] == ["step", "exp_avg", "exp_avg_sq"]
            assert entries[0][1] == []
            assert entries[1][2] == entries[2][2]
            owned[name] += entries[1][2]
    assert owned == {name: n * (3 if stage == 0 else 1) for name, n in numel.items()}


def resume(
    optimizer_name: str, options: dict[str, Any], load_options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Four steps at once, and two steps, a save through a file, a new model and optimizer, and two more."""
    straight = train("lm", optimizer_name, options, steps=4, groups=2)[-1]

    net = build("lm")
    model, optimizer = zeroopt.wrap(net, optimizer_for(optimizer_name, net, groups=2), **options)
    optimizer.load_state_dict(optimizer.state_dict())  # empty: before the first step
    run_steps(model, optimizer, 0, 2)
    file = io.BytesIO()
    optimizer.param_groups[0]["lr"] *= 1.0
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run_steps(model, optimizer, 7, 8)  # what comes after a save must not change what was saved

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net = build("lm")
    fresh = optimizer_for(optimizer_name, net, groups=2)
    for group in fresh.param_groups:
        group["lr"] = 123.0
    model, optimizer = zeroopt.wrap(net, fresh, **load_options)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run_steps(model, optimizer, 2, 4)
    return straight, snapshot(net)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        loss_of(model(batch("lm", step))).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_amsgrad", "sgd_momentum", "sgd", "rmsprop"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_save_and_resume_exactly(run_on_ranks: RunOnRanks, optimizer: str, world_size: int) -> None:
    for stage in STAGES:
        options = {"stage": stage}
        for straight, resumed in run_on_ranks(world_size, resume, optimizer, options, options):
            assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def load_wrongly(case: str) -> str:
    net = build("lm")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=2)
    run_steps(model, optimizer, 0, 1)
    state = optimizer.state_dict()
    options: dict[str, Any] = {"stage": 2}
    groups = 1
    if case == "rank":
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, state)
        state = everyone[1 - dist.get_rank()]
    elif case == "stage":
        options["stage"] = 0
    elif case == "bucket size":
        options["bucket_mb"] = 0.001
    elif case == "groups":
        groups = 2
    elif case == "format":
        state["zeroopt"]["format"] = 99
    elif case == "shape":
        state["zeroopt"]["shapes"][0] = [3, 4]
    net = build("lm")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net, groups), **options)
    run_steps(model, optimizer, 0, 1)
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    try:
        optimizer.load_state_dict(state)
    except zeroopt.ZeroOptError as error:
        for param, entry in optimizer.state.items():
            assert all(torch.equal(v, before[param][k]) for k, v in entry.items()), "a refused load changed the state"
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("rank", "the state dict"),
        ("stage", "the state dict"),
        ("bucket size", "the state dict"),
        ("groups", "expected param_groups of"),
        ("format", "expected a state dict of format 5 or 6, got 99"),
        ("shape", "the state dict has shape [3, 4] for parameter"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(run_on_ranks: RunOnRanks, case: str, expected: str) -> None:
    for message in run_on_ranks(2, load_wrongly, case):
        alone = message.partition("RankMismatchError: load_state_dict failed on rank ")[2].partition(": ")[2]
        assert message.startswith(f"StateError: {expected}") or alone.startswith(expected), message
        assert expected != "the state dict" or message.endswith("before that rank calls state_dict()"), message


def carry_on_from_torch(options: dict[str, Any], wrap_late: bool) -> tuple[list[Tensor], list[Tensor]]:
    """State of a plain optimizer: loaded from its state dict, or already there when it is wrapped."""
    plain = build("conv")
    plain_optimizer = optimizer_for("adamw_amsgrad", plain)
    x = build_input()
    for _ in range(2):
        loss_of(plain(x)).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    net = build("conv")
    net.load_state_dict(plain.state_dict())
    inner = optimizer_for("adamw_amsgrad", net)
    if wrap_late:
        inner.load_state_dict(plain_optimizer.state_dict())
        model, optimizer = zeroopt.wrap(net, inner, **options)
    else:
        model, optimizer = zeroopt.wrap(net, inner, **options)
        optimizer.load_state_dict(plain_optimizer.state_dict())
    for one_model, one_optimizer in ((plain, plain_optimizer), (model, optimizer)):
        loss_of(one_model(x)).backward()
        one_optimizer.step()
    return snapshot(plain), snapshot(net)


def build_input() -> Tensor:
    """The same batch on all ranks, so that a plain optimizer is the reference."""
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wrap_late", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_state_of_a_plain_optimizer_is_taken_over(
    run_on_ranks: RunOnRanks, wrap_late: bool, stage: int, fused: bool
) -> None:
    for want, got in run_on_ranks(2, carry_on_from_torch, {"stage": stage, "fused": fused}, wrap_late):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5 if fused else 0, atol=1e-6 if fused else 0)


def load_into_bfloat16() -> dict[str, torch.dtype]:
    """A float32 state dict in a bfloat16 model: moments take the parameter's dtype, as in torch, and the step works."""
    plain = build("mlp")
    plain_optimizer = optimizer_for("adamw", plain)
    loss_of(plain(torch.ones(2, 7))).backward()
    plain_optimizer.step()
    net = build("mlp").bfloat16()
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    optimizer.load_state_dict(plain_optimizer.state_dict())
    model(torch.ones(2, 7, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return {name: value.dtype for name, value in next(filter(None, optimizer.state.values())).items()}


def test_loaded_moments_take_the_parameters_dtype(run_on_ranks: RunOnRanks) -> None:
    expected = {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    assert run_on_ranks(2, load_into_bfloat16) == [expected] * 2


def train_unlike_groups(name: str, wrapped: bool) -> list[Tensor]:
    """Groups of which only one has momentum or amsgrad, so large that a rank owns segments of one group alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    option = {"sgd": {"momentum": 0.9}, "adamw": {"amsgrad": True}}[name]
    groups: list[dict[str, Any]] = [{"params": net[0].parameters()}, {"params": net[1].parameters(), **option}]
    inner: torch.optim.Optimizer
    inner = torch.optim.SGD(groups, lr=0.1) if name == "sgd" else torch.optim.AdamW(groups)
    model, optimizer = prepare(net, inner, {"fused": True} if wrapped else None)
    for step in range(3):
        loss_of(model(torch.randn(4, 64, generator=torch.Generator().manual_seed(step)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups_with_unlike_options(run_on_ranks: RunOnRanks, name: str) -> None:
    plain = run_on_ranks(2, train_unlike_groups, name, False)[0]
    for rank in run_on_ranks(2, train_unlike_groups, name, True):
        for want, got in zip(plain, rank, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def wrong_shapes_from_torch() -> str:
    net = build("mlp")
    _, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    other = nn.ParameterList([nn.Parameter(torch.zeros(2, 3)) for _ in net.parameters()])
    plain = torch.optim.AdamW(other.parameters())
    sum(p.sum() for p in other).backward()
    plain.step()
    try:
        optimizer.load_state_dict(plain.state_dict())
    except zeroopt.StateError as error:
        return str(error)
    return "no error"


def test_state_of_another_model_is_refused(run_on_ranks: RunOnRanks) -> None:
    for message in run_on_ranks(2, wrong_shapes_from_torch):
        assert message.startswith("the state dict has 'exp_avg' of shape [2, 3] for parameter")


def switch_options(wrapped: bool) -> list[Tensor]:
    """Momentum and amsgrad that are turned on after some steps, and weight decay that changes."""
    history = []
    plan: dict[str, dict[int, dict[str, float]]] = {
        "sgd": {2: {"momentum": 0.9, "dampening": 0.5}, 4: {"momentum": 0.0}, 5: {"momentum": 0.8}},
        "adamw": {2: {"amsgrad": True, "weight_decay": 0.0}},
    }
    for name, changes in plan.items():
        net = build("mlp")
        options = {"stage": 2, "fused": True} if wrapped else None
        model, optimizer = prepare(net, optimizer_for(name, net), options)
        for step in range(6):
            if step in changes:
                optimizer.param_groups[0].update(changes[step])
                for entry in optimizer.state.values():  # torch's AdamW expects this when amsgrad comes late
                    if "exp_avg_sq" in entry and step == 2 and not wrapped:
                        entry["max_exp_avg_sq"] = torch.zeros_like(entry["exp_avg_sq"])
            loss_of(model(batch("mlp", step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        history += snapshot(net)
    return history


def test_options_that_change_between_steps(run_on_ranks: RunOnRanks) -> None:
    plain, wrapped = run_on_ranks(2, switch_options, False)[0], run_on_ranks(2, switch_options, True)[0]
    for want, got in zip(plain, wrapped, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def refuse_copying() -> str:
    net = build("mlp")
    _, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    with pytest.raises(zeroopt.NotSupportedError, match="save and load its state_dict"):
        copy.deepcopy(optimizer)
    return repr(optimizer)


def test_copying_is_refused_and_repr(run_on_ranks: RunOnRanks) -> None:
    for rank, text in enumerate(run_on_ranks(2, refuse_copying)):
        assert text.startswith(f"ZeroOptimizer(stage=2, rank={rank}, world_size=2, transport=shm, AdamW")


class ScheduleFreeSgd(torch.optim.Optimizer):
    """Keeps a second sequence of parameters, and shows their average in `eval()` (Defazio et al. 2024, arXiv:2405.15682)."""

    def __init__(self, params: Iterable[Any], beta: float = 0.9) -> None:
        super().__init__(params, {"lr": 0.1, "beta": beta, "k": 0, "trains": False})

    @torch.no_grad()
    def eval(self) -> None:
        self.mix(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def train(self) -> None:
        self.mix(True, lambda beta: 1 - beta)

    def mix(self, trains: bool, weight: Callable[[float], float]) -> None:
        for group in self.param_groups:
            if group["trains"] is not trains:
                for param in group["params"]:
                    if "z" in self.state[param]:
                        param.lerp_(self.state[param]["z"], weight(group["beta"]))
                group["trains"] = trains

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["trains"]:
                raise ValueError("call train() before step()")
            group["k"] += 1
            for param in group["params"]:
                z = self.state[param].setdefault("z", param.detach().clone())
                param.lerp_(z, 1 / group["k"]).sub_(param.grad, alpha=group["lr"] * (1 - group["beta"]))
                z.sub_(param.grad, alpha=group["lr"])


def schedule_free(through: str) -> Callable[[Prepare], list[Tensor]]:
    def train_and_evaluate(prepare: Prepare) -> list[Tensor]:
        """Parameters in evaluation and at the end; both have to be seen by whoever reads them, without a forward."""
        net = layers()
        inner = ScheduleFreeSgd(net.parameters())
        inner.train()
        model, optimizer = prepare(net, inner)
        switch: Any = inner if through == "inner" else optimizer
        seen = []
        for step in range(6):
            switch.train()
            loss_of(model(inputs(step, 4, WIDTH))).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 2:
                switch.eval()
                seen += values(net)
        switch.train()
        return seen + values(net)

    return train_and_evaluate


def follow_schedule_free() -> None:
    for through in ("inner", "wrapped"):
        follow(schedule_free(through), with_ddp())
    expected = schedule_free("wrapped")(with_ddp())
    got = schedule_free("wrapped")(with_zeroopt(stage=2, share_parameters=True))
    assert all(map(torch.equal, got, expected))


def test_train_and_eval_of_a_schedule_free_optimizer(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_schedule_free)


def switch_masters() -> None:
    """With float32 masters, `eval()` changes those, and parameters are what they round to."""
    net = layers()
    model, optimizer = zeroopt.wrap(net, ScheduleFreeSgd(net.parameters()), param_dtype=torch.bfloat16, bucket_mb=0.001)
    optimizer.train()
    for step in range(3):
        loss_of(model(inputs(step, 4, WIDTH).bfloat16()).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [optimizer.full_parameter(param) for param in net.parameters()]
    optimizer.eval()
    shown = [optimizer.full_parameter(param) for param in net.parameters()]
    assert all(
        torch.equal(round_master(a, torch.bfloat16), p.detach()) for a, p in zip(shown, net.parameters(), strict=True)
    )
    assert not any(map(torch.equal, before, shown))
    optimizer.train()
    for param, expected in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(optimizer.full_parameter(param), expected, rtol=1e-5, atol=1e-6)


def test_train_and_eval_with_masters(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, switch_masters)
