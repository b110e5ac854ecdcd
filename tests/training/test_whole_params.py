"""Optimizers that need whole matrices or norms: each parameter is stepped by one rank, whole, and results stay the same."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from remembered import remembered_grains
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import restore, snapshot
from ulps import SUM_ORDER_ULPS, History, assert_same
from whole_optimizers import OPTIMIZERS, Lars, Shampoo, build, loss_for, no_padding
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.optim import FusedLAMB
from zeroopt.options.precision import round_master

BF16 = torch.bfloat16
STEPS = 5
STAGES = (0, 1, 2)


def prepare(net: nn.Module, name: str, options: dict[str, Any] | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Of the options, "across_slices" is the tests' own: parameters lie across slices, and are brought to the ranks that own them."""
    optimizer = OPTIMIZERS[name](net)
    if options is None:
        return DistributedDataParallel(net, find_unused_parameters=True), optimizer
    options = dict(options)
    layout = no_padding() if options.pop("across_slices", False) else nullcontext()
    if "param_dtype" in options:  # which is for those that are trained
        trained = {param for group in optimizer.param_groups for param in group["params"]}
        for param in net.parameters():
            param.data = param.data if param in trained else round_master(param.data, options["param_dtype"])
    with remembered_grains("whole", name, options.get("param_dtype")), layout:
        return zeroopt.wrap(net, optimizer, **options)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        loss_for(model, step, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(name: str, options: dict[str, Any] | None, follow: History | None = None) -> History:
    """Parameters after each step, under DDP without options; each step starts from those that it follows, if any."""
    net = build()
    model, optimizer = prepare(net, name, options)
    history = []
    for step in range(STEPS):
        run_steps(model, optimizer, step, step + 1)
        history.append(snapshot(net))
        if follow is not None:
            restore(net, follow[step])
    return history


def train_all(name: str, variants: list[dict[str, Any] | None]) -> list[History]:
    return [train(name, options) for options in variants]


def train_by_hand(name: str, world_size: int, param_dtype: torch.dtype | None = None) -> History:
    """What the ranks do together, in one process and by the optimizer as it is: sums go in the order of ranks."""
    masters, net = build(), build().to(param_dtype)
    optimizer = OPTIMIZERS[name](masters)
    pairs = list(zip(masters.parameters(), net.parameters(), strict=True))
    history = []
    for step in range(STEPS):
        for master, param in pairs:
            param.data = master.detach().clone() if param_dtype is None else round_master(master.detach(), param_dtype)
            master.grad = None
        for rank in range(world_size):
            net.zero_grad()
            loss_for(net, step, rank).backward()
            for master, param in pairs:
                if param.grad is not None:
                    share = (param.grad.float() * (1 / world_size)).to(param.dtype).float()
                    master.grad = share if master.grad is None else master.grad + share
        optimizer.step()
        history.append(
            [
                round_master(master.detach(), param_dtype) if param_dtype is not None else master.detach().clone()
                for master, _ in pairs
            ]
        )
    return history


def assert_equal(want: History, got: History, where: str) -> None:
    for step, (one, other) in enumerate(zip(want, got, strict=True)):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert a.dtype is b.dtype
            assert torch.equal(a, b), f"{where}, step {step}, parameter {number}: {(a - b).abs().max()}"


def sharded_variants(**options: Any) -> list[dict[str, Any]]:
    """Stages that shard, sizes of buckets down to one for each parameter, transports, shared parameters."""
    return [
        {"stage": 1, **options},
        {"stage": 1, "bucket_mb": 0.003, "overlap": False, **options},
        {"stage": 2, **options},
        {"stage": 2, "bucket_mb": 0.003, **options},
        {"stage": 2, "bucket_mb": 0.0001, **options},
        {"stage": 2, "bucket_mb": 0.003, "transport": "pairwise", **options},
        {"stage": 2, "bucket_mb": 0.003, "share_parameters": True, **options},
        {"stage": 1, "across_slices": True, **options},
        {"stage": 2, "bucket_mb": 0.003, "across_slices": True, **options},
        {"stage": 2, "bucket_mb": 0.0001, "across_slices": True, "transport": "pairwise", **options},
        {"stage": 1, "bucket_mb": 0.003, "across_slices": True, "share_parameters": True, "overlap": False, **options},
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows_the_unsharded_optimizer_bit_for_bit(run_on_ranks: RunOnRanks, name: str, world_size: int) -> None:
    variants: list[Any] = [{"stage": 0, "bucket_mb": 0.003}]
    # Two ranks go through all variants in 16 bits, see test_float32_masters_train_as_by_hand.
    variants += sharded_variants() if world_size > 2 else [{"stage": 1}, {"stage": 2, "bucket_mb": 0.003}]
    if name == "lamb":
        variants += [{"stage": stage, "fused": False} for stage in (0, 2)]
    by_hand = run_on_ranks(1, train_by_hand, name, world_size)[0]  # a worker has as many threads as a rank
    for rank, histories in enumerate(run_on_ranks(world_size, train_all, name, variants)):
        for options, history in zip(variants, histories, strict=True):
            assert_equal(by_hand, history, f"rank {rank}, {options}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows_ddp_bit_for_bit(run_on_ranks: RunOnRanks, name: str) -> None:
    for histories in run_on_ranks(2, train_all, name, [None, {"stage": 1}, {"stage": 2}]):
        for history in histories[1:]:
            assert_equal(histories[0], history, name)


def train_after(name: str, first: dict[str, Any] | None, second: dict[str, Any]) -> list[History]:
    """Each step of the second run starts from the parameters of the first."""
    history = train(name, first)
    return [history, train(name, second, follow=history)]


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name != "muon"]
)  # bfloat16 inside: a last bit can show
def test_more_ranks_follow_ddp(run_on_ranks: RunOnRanks, name: str) -> None:
    """Up to the order of sums, which differs beyond two ranks."""
    assert_same(run_on_ranks(3, train_after, name, None, {"stage": 2}), SUM_ORDER_ULPS)


def ownership(name: str, options: dict[str, Any]) -> tuple[dict[str, dict[str, list[int]]], list[list[int]]]:
    """Shapes of this rank's state by parameter, and the shapes that it stepped in the first step."""
    net = build()
    model, optimizer = prepare(net, name, options)
    inner = optimizer._inner
    loss_for(model, 0, 0).backward()
    optimizer.step()
    names = {param: name for name, param in net.named_parameters()}
    shapes = {
        names[param]: {key: list(value.shape) for key, value in entry.items() if isinstance(value, Tensor)}
        for param, entry in optimizer.state.items()
        if entry
    }
    return shapes, getattr(inner, "stepped", [])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_whole_parameter_has_one_owner(run_on_ranks: RunOnRanks, name: str) -> None:
    """Its state is there whole, in its shape, and nowhere else; each is stepped once in the group."""
    net = build()
    shapes = {key: list(param.shape) for key, param in net.named_parameters()}
    in_optimizer = {id(param) for group in OPTIMIZERS[name](net).param_groups for param in group["params"]}
    trained = [key for key, param in net.named_parameters() if id(param) in in_optimizer]
    for options in ({"stage": 1}, {"stage": 2, "bucket_mb": 0.001}, {"stage": 2, "across_slices": True}):
        ranks = run_on_ranks(3, ownership, name, options)
        whole = [key for key in trained if name != "mixed" or len(shapes[key]) == 2]
        for key in whole:
            held = [state[key] for state, _ in ranks if state.get(key)]
            assert len(held) == 1, f"{key} has {len(held)} owners"
            per_element = [shape for entry, shape in held[0].items() if entry not in ("step", "row_var", "col_var")]
            assert all(shape == shapes[key] for shape in per_element)
            if name == "adafactor" and len(shapes[key]) == 2:
                rows, columns = shapes[key]
                assert (held[0]["row_var"], held[0]["col_var"]) == ([rows, 1], [1, columns])
        if name in ("lars", "mixed"):
            stepped = [shape for _, by_rank in ranks for shape in by_rank if name == "lars" or len(shape) == 2]
            assert sorted(stepped) == sorted(shapes[key] for key in whole)
        if name == "mixed":  # the rest is cut
            assert sum(sum(state.get("norm.weight", {}).get("mean", [])) for state, _ in ranks) == 12


def resume(name: str, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """All steps at once, and some of them, a save through a file, a new model and optimizer, and the rest."""
    straight = train(name, options)[-1]
    net = build()
    model, optimizer = prepare(net, name, options)
    optimizer.load_state_dict(optimizer.state_dict())  # empty: before the first step
    run_steps(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run_steps(model, optimizer, 7, 8)  # what comes after a save must not change what was saved

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net = build()
    model, optimizer = prepare(net, name, options)
    for group in optimizer.param_groups:
        group["lr"] = 123.0
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run_steps(model, optimizer, 3, STEPS)
    return straight, snapshot(net)


def resume_all(name: str, variants: list[dict[str, Any]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [resume(name, options) for options in variants]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_save_and_resume_exactly(run_on_ranks: RunOnRanks, name: str) -> None:
    # State is kept alike in stages 1 and 2, so that one of them may show how masters are resumed.
    variants: list[dict[str, Any]] = [{"stage": stage, "bucket_mb": 0.003} for stage in (0, 2)]
    variants.append({"stage": 2, "bucket_mb": 0.003, "across_slices": True})
    variants.append({"stage": 1, "param_dtype": BF16})
    if name == "lamb":
        variants.append({"param_dtype": BF16, "master_weights": "remainder", "state_dtype": torch.int8})
    for rank in run_on_ranks(3, resume_all, name, variants):
        for straight, resumed in rank:
            assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def carry_on(name: str, options: dict[str, Any], wrap_late: bool) -> tuple[list[Tensor], list[Tensor]]:
    """State of the plain optimizer: loaded from its state dict, or already there when it is wrapped."""
    plain = build()
    plain_optimizer = OPTIMIZERS[name](plain)

    def plain_step(step: int) -> None:
        loss_for(plain, step, 1).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    plain_step(0)
    plain_step(3)
    net = build()
    net.load_state_dict(plain.state_dict())
    inner = OPTIMIZERS[name](net)
    if wrap_late:
        inner.load_state_dict(plain_optimizer.state_dict())
    model, optimizer = zeroopt.wrap(net, inner, **options)
    if not wrap_late:
        optimizer.load_state_dict(plain_optimizer.state_dict())
    plain_step(6)
    loss_for(model, 6, 1).backward()
    optimizer.step()
    return snapshot(plain), snapshot(net)


def carry_on_all(name: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [
        carry_on(name, {"stage": stage, "bucket_mb": 0.003}, wrap_late)
        for stage in STAGES
        for wrap_late in (True, False)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_plain_optimizer_is_taken_over(run_on_ranks: RunOnRanks, name: str) -> None:
    for rank in run_on_ranks(2, carry_on_all, name):  # the mean of two equal gradients is that gradient
        for want, got in rank:
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def load_wrongly() -> str:
    """State of other owners; the error."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    model, optimizer = zeroopt.wrap(net, Lars(net.parameters()), stage=2)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    shards: list[Any] = [None] * 2
    dist.all_gather_object(shards, optimizer.state_dict())
    before = {param: dict(entry) for param, entry in optimizer.state.items()}
    with pytest.raises(zeroopt.StateError) as caught:
        optimizer.load_state_dict(shards[1 - dist.get_rank()])
    for param, entry in optimizer.state.items():
        assert all(torch.equal(value, before[param][name]) for name, value in entry.items())
    return str(caught.value)


def test_state_of_other_owners_is_refused(run_on_ranks: RunOnRanks) -> None:
    for message in run_on_ranks(2, load_wrongly):
        assert message.startswith("the state dict holds nothing of parameter '")
        assert "of which another rank had a part; give load_state_dict what state_dict() gave on every rank" in message


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_masters_train_as_by_hand(run_on_ranks: RunOnRanks, name: str) -> None:
    variants = sharded_variants(param_dtype=BF16)
    by_hand = run_on_ranks(1, train_by_hand, name, 2, BF16)[0]
    for histories in run_on_ranks(2, train_all, name, variants):
        for options, history in zip(variants, histories, strict=True):
            assert_equal(by_hand, history, str(options))


LAMB_TIERS = [
    (torch.float32, "float32", torch.int8),
    (BF16, "float32", BF16),
    (BF16, "remainder", torch.float32),
    (BF16, "remainder", torch.int8),
    (BF16, "none", torch.float32),
]


def lamb_in_every_tier() -> list[tuple[History, History]]:
    """FusedLAMB by itself, and wrapped; on the same batch, so that the mean of the gradients is the gradient."""
    results = []
    for param_dtype, master_weights, state_dtype in LAMB_TIERS:
        start = build().to(BF16).float()  # of which the optimizer by itself can make its masters
        plain, net = build().to(BF16).to(param_dtype), build()
        net.load_state_dict(start.state_dict())
        torch.manual_seed(7)
        tier = {"master_weights": master_weights, "state_dtype": state_dtype}
        plain_optimizer = FusedLAMB(plain.parameters(), lr=0.01, seed=torch.initial_seed(), **tier)
        wrapped = None if param_dtype is torch.float32 else param_dtype
        model, optimizer = zeroopt.wrap(net, FusedLAMB(net.parameters(), lr=0.01), param_dtype=wrapped, **tier)
        histories: tuple[History, History] = ([], [])
        for step in range(4):
            for one, one_optimizer, history in zip(
                (plain, model), (plain_optimizer, optimizer), histories, strict=True
            ):
                loss_for(one, step, 1).backward()
                one_optimizer.step()
                one_optimizer.zero_grad()
                history.append(snapshot(one))
        results.append(histories)
    return results


def test_fused_lamb_in_every_tier(run_on_ranks: RunOnRanks) -> None:
    for rank in run_on_ranks(2, lamb_in_every_tier):
        for tier, (alone, wrapped) in zip(LAMB_TIERS, rank, strict=True):
            assert_equal(alone, wrapped, str(tier))


def refusals() -> list[str]:
    messages = []
    for options in ({"state_dtype": BF16}, {"param_dtype": BF16, "master_weights": "remainder"}, {"fused": True}):
        net = build()
        with pytest.raises(zeroopt.ConfigError) as caught:
            zeroopt.wrap(net, OPTIMIZERS["lars"](net), **options)
        messages.append(str(caught.value))
    return messages


def test_what_needs_a_kernel_is_refused(run_on_ranks: RunOnRanks) -> None:
    for messages in run_on_ranks(2, refusals):
        assert all("there is no fused kernel for Lars" in message for message in messages)


def norms(norm_type: float) -> list[float]:
    """Of the gradients, by stage; slices of whole parameters have gaps."""
    found = []
    for options in ({"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 2, "across_slices": True}):
        net = build()
        model, optimizer = prepare(net, "lars", options)
        for step in range(3):  # a pooled buffer has been used before
            loss_for(model, step, dist.get_rank()).backward()
            norm = optimizer.clip_grad_norm_(0.01, norm_type)
            optimizer.step()
            optimizer.zero_grad()
        found.append(float(norm))
    return found


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping(run_on_ranks: RunOnRanks, norm_type: float) -> None:
    for found in run_on_ranks(3, norms, norm_type):
        assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def few_parameters(options: dict[str, Any] | None) -> list[Tensor]:
    """Fewer than ranks: some own nothing."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    inner = Lars(net.parameters())
    options = dict(options or {})
    with no_padding() if options.pop("across_slices", False) else nullcontext():
        model, optimizer = zeroopt.wrap(net, inner, **options) if options else (DistributedDataParallel(net), inner)
    for step in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


def test_more_ranks_than_parameters(run_on_ranks: RunOnRanks) -> None:
    plain = run_on_ranks(4, few_parameters, None)[0]
    for options in (
        {"stage": 1},
        {"stage": 2},
        {"stage": 2, "share_parameters": True},
        {"stage": 2, "across_slices": True},
    ):
        for values in run_on_ranks(4, few_parameters, options):
            assert all(torch.equal(a, b) for a, b in zip(plain, values, strict=True))


def accumulate(name: str, options: dict[str, Any], backwards: int) -> tuple[list[Tensor], bool]:
    """Several backward passes a step, and whether parameters have owners."""
    net = build()
    model, optimizer = prepare(net, name, options)
    for step in range(3):
        for number in range(backwards):
            loss_for(model, backwards * step + number, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net), any(bucket.moves is not None for bucket in optimizer.state_dicts.buckets)


@pytest.mark.parametrize(
    ("name", "more", "backwards"),
    [
        ("lars", {}, 2),
        ("lamb", {"param_dtype": BF16, "master_weights": "none"}, 2),
        ("lamb", {"step_in_backward": True}, 1),
    ],
)
def test_what_lies_across_slices_gives_the_same_bits(
    run_on_ranks: RunOnRanks, name: str, more: dict[str, Any], backwards: int
) -> None:
    """Sums of several backward passes, sums that are rounded, and steps while backward runs."""
    options = {"stage": 2, "bucket_mb": 0.003, **more}
    wanted = run_on_ranks(3, accumulate, name, options, backwards)
    found = run_on_ranks(3, accumulate, name, {**options, "across_slices": True}, backwards)
    for (want, in_slices), (got, across) in zip(wanted, found, strict=True):
        assert across and not in_slices
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def split_in_three(options: dict[str, Any] | None) -> list[Tensor]:
    """Of a matrix of three, the rows; stepped as three parameters, or as parts of one."""
    torch.manual_seed(0)
    whole = nn.Linear(6, 12, bias=False)
    net: nn.Module = nn.ModuleList([whole])
    if options is None:
        net = nn.ModuleList([nn.Linear(6, 4, bias=False) for _ in range(3)])
        for part, values in zip(net, whole.weight.detach().chunk(3), strict=True):
            part.weight.data.copy_(values)
    inner = Lars(net.parameters())
    options = dict(options or {})
    with no_padding() if options.pop("across_slices", False) else nullcontext():
        model, optimizer = zeroopt.wrap(_Joined(net), inner, **options) if options else (_Joined(net), inner)
    for step in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [torch.cat([part.weight.detach().clone() for part in net])]


class _Joined(nn.Module):
    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([part.weight for part in self.parts])
        return torch.tanh(nn.functional.linear(x.to(weight.dtype), weight))


def test_parts_are_stepped_as_parameters(run_on_ranks: RunOnRanks) -> None:
    wanted = run_on_ranks(1, split_in_three, None)[0]
    for options in ({"stage": 0}, {"stage": 2}, {"stage": 1, "across_slices": True}, {"stage": 2, "param_dtype": BF16}):
        for found in run_on_ranks(2, split_in_three, {**options, "matrix_splits": {"parts.*.weight": 3}}):
            near = {"rtol": 0.0, "atol": 0.02} if "param_dtype" in options else {"rtol": 1e-6, "atol": 1e-7}
            torch.testing.assert_close(found[0].float(), wanted[0], **near)
        if options == {"stage": 2}:  # and not as one: their norms differ
            whole = run_on_ranks(2, split_in_three, options)[0][0]
            assert not torch.allclose(whole, wanted[0], rtol=1e-3)


def sums_on_their_way(world_size: int, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes of them: what there was, and what is planned."""
    net, made = build(), []
    options = {"stage": 1, "bucket_mb": 0.003, "transport": "shm", **options}
    with no_padding(), remembered_grains("whole", "lars", None):
        model, optimizer = zeroopt.wrap(net, OPTIMIZERS["lars"](net), **options)
        run_steps(model, optimizer, 0, 2)
        given = {"world_size": world_size, "host_ranks": world_size, "compare": False, "device": "cpu"}
        made.append(zeroopt.estimate_memory(build(), Lars, **given, **options))
    return model.replica.slice_sums.nbytes, made[0].asked.phase("step").parts["staging"]


def test_sums_on_their_way_to_owners_take_what_is_planned(run_on_ranks: RunOnRanks) -> None:
    for options in ({}, {"bucket_buffers": 3, "stage": 2}):
        for held, planned in run_on_ranks(3, sums_on_their_way, 3, options):
            assert 0 < held <= planned <= 2 * held, options


# Sizes of parts whose statistics add up to a length of the parameter, or not.
PARTS: dict[str, list[int]] = {"shampoo": [7, 4, 1], "adafactor": [6, 4, 2]}


def prepare_parts(name: str, options: dict[str, Any]) -> tuple[nn.Linear, nn.Module, zeroopt.ZeroOptimizer]:
    torch.manual_seed(0)
    net = nn.Linear(6, 12, bias=False)
    inner = Shampoo(net.parameters()) if name == "shampoo" else torch.optim.Adafactor(net.parameters(), lr=0.05)
    model, optimizer = zeroopt.wrap(net, inner, stage=2, **options)
    return net, model, optimizer


def step_linear(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    torch.tanh(model(x)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def resume_in_parts(path: Path, name: str) -> Any:
    """Weights after four steps: at once, from a whole state dict, from a checkpoint; and how those refuse other parts."""
    options = {"matrix_splits": {"weight": PARTS[name]}}
    net, model, optimizer = prepare_parts(name, options)
    for step in range(2):
        step_linear(model, optimizer, step)
    weight = net.weight.detach().clone()
    zeroopt.checkpoint.save(path, model, optimizer)
    optimizer.consolidate_state_dict()
    whole: list[Any] = [optimizer.full_state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(whole)
    for step in range(2, 4):
        step_linear(model, optimizer, step)
    results = [net.weight.detach().clone()]
    refused = []
    for how in (whole[0], path):
        for parts in (PARTS[name], [4, 4, 4], None):
            net, model, optimizer = prepare_parts(name, {} if parts is None else {"matrix_splits": {"weight": parts}})
            try:
                if how is path:
                    zeroopt.checkpoint.load(path, model, optimizer)
                else:
                    optimizer.load_state_dict(how)
                    net.weight.data.copy_(weight)
            except zeroopt.ZeroOptError as error:
                refused.append(str(error))
                continue
            for step in range(2, 4):
                step_linear(model, optimizer, step)
            results.append(net.weight.detach().clone())
    return results, refused


def load_in_parts(path: Path, name: str) -> Tensor:
    net, model, optimizer = prepare_parts(name, {"matrix_splits": {"weight": PARTS[name]}})
    zeroopt.checkpoint.load(path, model, optimizer)
    for step in range(2, 4):
        step_linear(model, optimizer, step)
    return net.weight.detach().clone()


@pytest.mark.parametrize("name", [name for name in PARTS if name == "shampoo" or name in OPTIMIZERS])
def test_state_of_unequal_parts_is_kept(run_on_ranks: RunOnRanks, tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoint"
    for results, refused in run_on_ranks(2, resume_in_parts, path, name):
        assert len(results) == 3 and all(torch.equal(one, results[0]) for one in results)
        assert len(refused) == 4 and all(
            "load it with the matrix_splits with which it was saved" in one for one in refused
        )
    for found in run_on_ranks(3, load_in_parts, path, name):
        assert torch.allclose(found, results[0], rtol=1e-6, atol=1e-7)


def unwrap_parts() -> str:
    _, model, optimizer = prepare_parts("shampoo", {"matrix_splits": {"weight": [7, 4, 1]}})
    step_linear(model, optimizer, 0)
    with pytest.raises(zeroopt.NotSupportedError if dist.get_rank() == 0 else zeroopt.RankMismatchError) as caught:
        zeroopt.unwrap(model, optimizer)  # rank 0 has the only parameter
    step_linear(model, optimizer, 1)
    optimizer.state.clear()
    zeroopt.unwrap(model, optimizer)
    return str(caught.value)


def test_state_of_parts_is_not_given_to_a_plain_optimizer(run_on_ranks: RunOnRanks) -> None:
    for found in run_on_ranks(2, unwrap_parts):
        assert "parameter 'weight' was stepped in parts" in found


def save_across_slices(path: Path, name: str, options: dict[str, Any]) -> list[Tensor]:
    """Exact parameters after some steps, which the checkpoint has."""
    net = build()
    model, optimizer = prepare(net, name, options)
    run_steps(model, optimizer, 0, 2)
    zeroopt.checkpoint.save(path, model, optimizer)
    return [optimizer.full_parameter(param) for param in net.parameters()]


def load_across_slices(path: Path, name: str, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], bool]:
    """Exact parameters and what the model has, after a load into another model, and whether parameters have owners."""
    net = build()
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(7.0)
    model, optimizer = prepare(net, name, options)
    zeroopt.checkpoint.load(path, model, optimizer)
    exact = [optimizer.full_parameter(param) for param in net.parameters()]
    return exact, snapshot(net), any(bucket.moves is not None for bucket in optimizer.state_dicts.buckets)


@pytest.mark.parametrize(
    "more", [{}, {"transport": "pairwise"}, {"share_parameters": True}, {"param_dtype": BF16}], ids=str
)
def test_checkpoints_of_parameters_across_slices(
    run_on_ranks: RunOnRanks, tmp_path: Path, more: dict[str, Any]
) -> None:
    path, options = tmp_path / "checkpoint", {"stage": 2, "across_slices": True, **more}
    saved = run_on_ranks(2, save_across_slices, path, "lars", options)[0]
    for world_size in (2, 3):
        for exact, has, have_owners in run_on_ranks(world_size, load_across_slices, path, "lars", options):
            assert have_owners
            assert all(torch.equal(a, b) for a, b in zip(saved, exact, strict=True))
            rounded = [value.to(part.dtype) for value, part in zip(saved, has, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(rounded, has, strict=True))
