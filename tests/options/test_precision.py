"""Wrapped models in every tier of precision: masters, remainders, stochastic rounding, 16- and 8-bit state."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import BATCH, MODELS, build, loss_of, optimizer_for, snapshot
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.errors import ConfigError
from zeroopt.options.precision import join_master, round_master, split_master

BF16, FP16 = torch.bfloat16, torch.float16
STEPS = 4
TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, bfloat16 state": {"state_dtype": BF16},
    "float32, int8 state": {"state_dtype": torch.int8},
    "bfloat16, float32 master": {"param_dtype": BF16},
    "float16, float32 master": {"param_dtype": FP16},
    "bfloat16, remainder": {"param_dtype": BF16, "master_weights": "remainder"},
    "bfloat16, remainder, int8 state": {
        "param_dtype": BF16,
        "master_weights": "remainder",
        "state_dtype": torch.int8,
    },
    "bfloat16, stochastic": {"param_dtype": BF16, "master_weights": "none"},
    "bfloat16, stochastic, bfloat16 state": {"param_dtype": BF16, "master_weights": "none", "state_dtype": BF16},
}
SPECIAL = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8]


def tokens(step: int, rank: int) -> Tensor:
    return torch.randint(0, 37, (BATCH, 6), generator=torch.Generator().manual_seed(1000 * step + rank))


def train(options: dict[str, Any], optimizer_name: str = "adamw", steps: int = STEPS) -> list[list[Tensor]]:
    """Parameters after each step of the small language model, whose inputs have no dtype of their own."""
    net = build("lm")
    torch.manual_seed(99)  # rank 0's seed rounds
    model, optimizer = zeroopt.wrap(net, optimizer_for(optimizer_name, net, groups=2), bucket_mb=0.002, **options)
    history = []
    for step in range(steps):
        loss_of(model(tokens(step, dist.get_rank())).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(snapshot(net))
    return history


def train_all(variants: list[dict[str, Any]], optimizer_name: str = "adamw") -> list[list[list[Tensor]]]:
    return [train(options, optimizer_name) for options in variants]


def train_by_hand(param_dtype: torch.dtype, optimizer_name: str, world_size: int) -> list[list[Tensor]]:
    """What the ranks do together, in one process: gradients in 16 bits, their sum, the master and its step in float32."""
    net = build("lm")
    masters = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    net.to(param_dtype)
    groups = [{"params": masters[i::2]} for i in range(2)]
    kind = optimizer_for(optimizer_name, net, groups=2)
    optimizer = type(kind)(groups, **{k: v for k, v in kind.defaults.items() if k != "decoupled_weight_decay"})
    for mine, theirs in zip(optimizer.param_groups, kind.param_groups, strict=True):
        mine["lr"] = theirs["lr"]
    history = []
    for step in range(STEPS):
        for master, param in zip(masters, net.parameters(), strict=True):
            param.data = round_master(master.detach(), param_dtype)
            master.grad = torch.zeros_like(master)
        for rank in range(world_size):
            net.zero_grad()
            loss_of(net(tokens(step, rank)).float()).backward()
            for master, param in zip(masters, net.parameters(), strict=True):
                assert param.grad is not None and master.grad is not None
                master.grad += (param.grad.float() / world_size).to(param_dtype).float()
        optimizer.step()
        history.append([round_master(master.detach(), param_dtype) for master in masters])
    return history


def assert_equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    for step, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype is b.dtype
            assert torch.equal(a, b), f"step {step}"


class TestMasters:
    def test_split_and_join_are_inverse(self) -> None:
        values = torch.cat([torch.randn(100_000) * 10 ** torch.linspace(-40, 38, 100_000), torch.tensor(SPECIAL)])
        rounded, remainders = split_master(values)
        joined = join_master(rounded, remainders)
        finite = ~values.isnan()
        assert torch.equal(joined[finite].view(torch.int32), values[finite].view(torch.int32))
        assert joined.isnan().equal(values.isnan())
        assert rounded.isnan().equal(values.isnan())

    def test_rounding_differs_from_torch_in_ties_only(self) -> None:
        values = torch.cat([torch.randn(100_000), torch.tensor(SPECIAL[:5])])
        values = values[values.view(torch.int32) & 0xFFFF != 0x8000]
        assert torch.equal(round_master(values, BF16), values.bfloat16())
        ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
        assert round_master(ties, BF16).tolist() == [1 + 2**-7, 1 + 2**-6, -1 - 2**-7]


@pytest.mark.parametrize("param_dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])  # with a kernel, and stepped by the optimizer itself
@pytest.mark.parametrize("stage", [1, 2])
def test_float32_masters_train_as_by_hand(
    run_on_ranks: RunOnRanks, param_dtype: torch.dtype, optimizer: str, stage: int
) -> None:
    options = {"stage": stage, "param_dtype": param_dtype, "fused": False}
    by_hand = run_on_ranks(1, train_by_hand, param_dtype, optimizer, 2)[0]  # a worker has as many threads as a rank
    for rank in run_on_ranks(2, train, options, optimizer):
        assert_equal(rank, by_hand)


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_kept_where_does_not_change_a_bit(run_on_ranks: RunOnRanks, tier: str) -> None:
    """Stages that reduce alike, bucket sizes, transports and shared parameters; ranks agree."""
    variants = [
        {"stage": 2, **TIERS[tier]},
        {"stage": 1, **TIERS[tier]},
        {"stage": 2, "transport": "pairwise", **TIERS[tier]},
        {"stage": 2, "share_parameters": True, **TIERS[tier]},
        {"stage": 2, "overlap": False, **TIERS[tier]},
    ]
    results = run_on_ranks(2, train_all, variants)
    for rank in results:
        for variant in rank:
            assert_equal(variant, results[0][0])


@pytest.mark.parametrize("tier", TIERS)
def test_the_backends_own_collectives(run_on_ranks: RunOnRanks, tier: str) -> None:
    """Which sum in the dtype that travels, so that 16-bit gradients round once more."""
    options = {"stage": 2, **TIERS[tier]}
    results = run_on_ranks(2, train_all, [{**options, "transport": "torch"}, options])
    assert_equal(results[0][0], results[1][0])
    for mine, theirs in zip(*(history[0] for history in results[0]), strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.03)  # a step is up to 0.02


@pytest.mark.parametrize("tier", [tier for tier in TIERS if "param_dtype" in TIERS[tier]])
def test_stage_0_trains_in_every_tier(run_on_ranks: RunOnRanks, tier: str) -> None:
    """Gradients stay in 16 bits there, so they round once more than in the other stages."""
    replicated, sharded = run_on_ranks(2, train_all, [{"stage": 0, **TIERS[tier]}, {"stage": 2, **TIERS[tier]}])[0]
    for mine, theirs in zip(replicated[0], sharded[0], strict=True):
        assert mine.dtype is theirs.dtype is TIERS[tier]["param_dtype"]
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.03)  # a step is up to 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd_nesterov", "adagrad"])
def test_remainders_follow_float32_masters_bit_for_bit(run_on_ranks: RunOnRanks, optimizer: str) -> None:
    variants = [TIERS["bfloat16, float32 master"], TIERS["bfloat16, remainder"]]
    masters, remainders = run_on_ranks(2, train_all, variants, optimizer)[0]
    assert_equal(masters, remainders)


def resume(
    options: dict[str, Any], optimizer_name: str, through_file: bool
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The last steps of a run, and the same steps after a run up to there was saved and loaded."""

    def start() -> tuple[nn.Module, zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
        net = build("lm")
        model, optimizer = zeroopt.wrap(net, optimizer_for(optimizer_name, net, groups=2), bucket_mb=0.002, **options)
        return net, model, optimizer

    def run(net: nn.Module, model: nn.Module, optimizer: zeroopt.ZeroOptimizer, steps: range) -> list[list[Tensor]]:
        history = []
        for step in steps:
            loss_of(model(tokens(step, dist.get_rank())).float()).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(snapshot(net))
        return history

    torch.manual_seed(5)
    first = start()
    run(*first, range(3))
    saved = {"model": first[1].state_dict(), "optimizer": first[2].state_dict()}
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    torch.manual_seed(6)
    second = start()
    second[1].load_state_dict(saved["model"])
    second[2].load_state_dict(saved["optimizer"])
    return run(*first, range(3, 6)), run(*second, range(3, 6))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("stage", [0, 2])
def test_saved_state_goes_on_bit_for_bit(run_on_ranks: RunOnRanks, tier: str, stage: int) -> None:
    for went_on, resumed in run_on_ranks(2, resume, {"stage": stage, **TIERS[tier]}, "adamw", True):
        assert_equal(went_on, resumed)


def state_dtypes(options: dict[str, Any]) -> dict[str, tuple[torch.dtype, int]]:
    """dtype and elements of the state of one parameter on this rank, after a step."""
    net = nn.Sequential(nn.Linear(40, 32, bias=False))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), **options)
    model(torch.randn(2, 40, dtype=next(net.parameters()).dtype)).float().sum().backward()
    optimizer.step()
    entry = optimizer.state[net[0].weight]  # in a state dict, moments of 8 bits are float32
    return {name: (value.dtype, value.numel()) for name, value in entry.items()}


def test_state_is_stored_as_asked(run_on_ranks: RunOnRanks) -> None:
    tier = {"param_dtype": BF16, "master_weights": "remainder", "state_dtype": torch.int8}
    results = run_on_ranks(2, state_dtypes, {"stage": 2, **tier})
    assert sorted(numels["exp_avg"][1] for numels in results) == [512, 768]  # 1280 elements, cut between blocks
    for entry in results:
        numel = entry["exp_avg"][1]
        assert entry == {
            "step": (torch.float32, 1),
            "remainder": (torch.int16, numel),
            "exp_avg": (torch.int8, numel),
            "exp_avg_sq": (torch.uint8, numel),
            "exp_avg_scale": (torch.float32, numel // 256),
            "exp_avg_sq_scale": (torch.float32, numel // 256),
        }


def load_plain_state(options: dict[str, Any]) -> list[float]:
    """Largest error of each moment that comes from a plain torch optimizer, relative to the moment's largest value."""
    net = build("lm")
    plain = optimizer_for("adamw", net)
    for step in range(3):
        loss_of(net(tokens(step, 0))).backward()
        plain.step()
        plain.zero_grad()
    saved = plain.state_dict()
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=0, **options)
    optimizer.load_state_dict(saved)
    loss_of(model(tokens(3, 0)).float()).mul(0).backward()  # a step without a gradient shows what was loaded
    for group in optimizer.param_groups:
        group["betas"], group["lr"] = (1.0 - 1e-12, 1.0 - 1e-12), 0.0
    optimizer.step()
    errors = []
    for managed in optimizer._trained.params:
        entry = optimizer.state[managed.param]
        for name in ("exp_avg", "exp_avg_sq"):
            value = entry[name].float()
            if f"{name}_scale" in entry:
                value = torch.empty(entry[name].numel())
                zeroopt.ops.dequantize(entry[name], entry[f"{name}_scale"], value)
            want = managed.flatten(saved["state"][managed.position][name])
            errors.append(float((value - want).abs().max() / want.abs().max()))
    return errors


@pytest.mark.parametrize(
    ("tier", "bound"),
    [("float32", 1e-6), ("bfloat16, float32 master", 1e-6), ("bfloat16, remainder, int8 state", 0.02)],
)
def test_state_of_a_plain_optimizer_is_taken_in(run_on_ranks: RunOnRanks, tier: str, bound: float) -> None:
    for errors in run_on_ranks(2, load_plain_state, TIERS[tier]):
        assert max(errors) <= bound


def written_parameters_stay(options: dict[str, Any], in_place: bool) -> bool:
    """Whether a step of learning rate 0 leaves what was loaded into the model, or written into its parameters by every rank,
    not what the master held before."""
    net = build("lm")
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.0), **options)
    values = {name: torch.randn_like(value) for name, value in net.state_dict().items()}
    values["out.weight"] = values["embed.weight"]
    for value in values.values():
        dist.broadcast(value, 0)
    if in_place:
        with torch.no_grad():
            for name, param in net.named_parameters():
                values[name] = param.copy_(values[name]).detach().clone()
        values["out.weight"] = values["embed.weight"]
    else:
        model.load_state_dict(values)
    loss_of(model(tokens(0, 0)).float()).backward()
    optimizer.step()
    if options.get("master_weights") == "remainder":  # which keeps what it completed before, less than half a unit
        return all(torch.allclose(net.state_dict()[n].float(), v.float(), rtol=2**-7) for n, v in values.items())
    return all(torch.equal(net.state_dict()[name], value) for name, value in values.items())


@pytest.mark.parametrize("tier", [tier for tier in TIERS if "state_dtype" not in TIERS[tier]])
@pytest.mark.parametrize("share", [False, True])
def test_masters_follow_what_is_loaded(run_on_ranks: RunOnRanks, tier: str, share: bool) -> None:
    assert all(run_on_ranks(2, written_parameters_stay, {"share_parameters": share, **TIERS[tier]}, False))


@pytest.mark.parametrize("tier", [tier for tier in TIERS if "state_dtype" not in TIERS[tier]])
def test_masters_follow_what_is_written_in_place(run_on_ranks: RunOnRanks, tier: str) -> None:
    assert all(run_on_ranks(2, written_parameters_stay, TIERS[tier], True))


def masters_after_wrapping() -> tuple[list[Tensor], list[Tensor]]:
    """This rank's parts of the master, and the same parts of rank 0's own parameters; every rank starts from other ones."""
    torch.manual_seed(dist.get_rank())
    net = MODELS["lm"]()
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    for value in before.values():
        dist.broadcast(value, 0)
    _, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), param_dtype=BF16)
    parts = [
        (s.shard.detach(), before[s.owner.name].flatten()[s.start : s.start + s.numel])
        for s in optimizer._trained.segments()
    ]
    return [mine for mine, _ in parts], [theirs for _, theirs in parts]


def test_masters_start_from_rank_0_in_full_precision(run_on_ranks: RunOnRanks) -> None:
    for mine, theirs in run_on_ranks(2, masters_after_wrapping):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def refused(options: dict[str, Any], optimizer_name: str, dtype: torch.dtype) -> str:
    net = build("lm").to(dtype)
    with pytest.raises(ConfigError) as caught:
        zeroopt.wrap(net, optimizer_for(optimizer_name, net), **options)
    assert all(p.dtype is dtype for p in net.parameters())
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "optimizer", "dtype", "message"),
    [
        ({"param_dtype": torch.float64}, "adamw", torch.float32, "expected param_dtype to be one of None"),
        ({"param_dtype": BF16, "master_weights": "half"}, "adamw", torch.float32, "expected master_weights"),
        ({"state_dtype": FP16}, "adamw", torch.float32, "expected state_dtype to be one of"),
        ({"master_weights": "remainder"}, "adamw", torch.float32, "needs param_dtype=torch.bfloat16, got None"),
        ({"param_dtype": FP16, "master_weights": "none"}, "adamw", torch.float32, "needs param_dtype=torch.bfloat16"),
        ({"param_dtype": BF16}, "adamw", torch.float64, "expected parameters of torch.float32 or torch.bfloat16"),
        ({"param_dtype": BF16}, "adamw", FP16, "expected parameters of torch.float32 or torch.bfloat16"),
        ({"state_dtype": torch.int8}, "adadelta", torch.float32, "no fused kernel for Adadelta"),
        ({"state_dtype": BF16, "fused": False}, "adamw", torch.float32, "fused=False"),
        ({"param_dtype": BF16, "master_weights": "none"}, "adadelta", torch.float32, "no fused kernel for Adadelta"),
        ({"state_dtype": torch.int8}, "adamw", BF16, "for which there is no fused kernel"),
    ],
)
def test_refusals(
    run_on_ranks: RunOnRanks, options: dict[str, Any], optimizer: str, dtype: torch.dtype, message: str
) -> None:
    for error in run_on_ranks(2, refused, options, optimizer, dtype):
        assert message in error
