"""A model on the meta device is built in its buckets: as one that was built as usual, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import run_fresh, sampled_pss
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt

TOKENS, WIDTH = 17, 8


class Net(nn.Module):
    """Tied parameters, a module that writes into its part (MultiheadAttention), weak references (LSTM), and what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=2)
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.counts = nn.BatchNorm1d(TOKENS, affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.attention(x, x, x)
        return self.counts(self.head(self.frozen(self.norm(x))).flatten(0, 1).float()).square().mean()


def encoder() -> nn.Module:
    """Its `_reset_parameters` writes parameters of all its parts once more."""
    return nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.1)


def make(build: Callable[[], nn.Module], device: str) -> nn.Module:
    torch.manual_seed(3)
    with torch.device(device):
        return build()


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What can be seen of three steps, and the random number that comes next."""
    seen = [torch.rand(1)]
    inner = model.module  # type: ignore[union-attr]
    for step in range(3):
        torch.manual_seed(step)
        if isinstance(inner, nn.Transformer):
            x = torch.rand(3, 2, WIDTH).to(next(inner.parameters()).dtype)
            loss = model(x, x).float().square().sin().mean()
        else:
            loss = model(torch.randint(TOKENS, (4, 3)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    return [*seen, *(tensor.detach().clone() for tensor in (*inner.parameters(), *inner.buffers()))]


def both(build: Callable[[], nn.Module], options: dict[str, Any]) -> list[list[Tensor]]:
    """The same training of a model built as usual, and of one on the meta device."""
    seen = []
    for device in ("cpu", "meta"):
        net = make(build, device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        objects = [*net.parameters()]
        model, wrapped = zeroopt.wrap(net, optimizer, bucket_mb=0.001, **options)
        assert all(a is b for a, b in zip(objects, net.parameters(), strict=True))
        assert all(a is b for a, b in zip(objects, wrapped.param_groups[0]["params"], strict=True))
        seen.append(train(model, wrapped))
    return seen


ROUNDED = {"param_dtype": torch.bfloat16}
Options = dict[str, Any]
OPTIONS: list[Options] = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "fused": False},
    {"stage": 2, "sync_module_states": False},
    {"stage": 2, "share_parameters": True},
    {"stage": 0, **ROUNDED},
    {"stage": 2, **ROUNDED},
    {"stage": 2, **ROUNDED, "master_weights": "none"},
    {"stage": 2, **ROUNDED, "master_weights": "remainder", "state_dtype": torch.int8},
    {"stage": 2, **ROUNDED, "master_weights": "remainder", "share_parameters": True},
    {"stage": 1, **ROUNDED, "share_parameters": True, "sync_module_states": False},
]


def all_options(build: Callable[[], nn.Module], variants: list[Options]) -> list[list[list[Tensor]]]:
    return [both(build, options) for options in variants]


@pytest.mark.parametrize("build", [Net, encoder])
@pytest.mark.parametrize(
    ("world_size", "variants"),
    [
        (1, OPTIONS),
        (2, OPTIONS),
        (4, [options for options in OPTIONS if "share_parameters" in options or "sync_module_states" in options]),
    ],
    ids=["1", "2", "4"],
)
def test_trains_as_one_that_was_built_as_usual(
    run_on_ranks: RunOnRanks, world_size: int, variants: list[Options], build: Callable[[], nn.Module]
) -> None:
    """On four ranks where they read what one of them has made, or make their own."""
    for of_rank in run_on_ranks(world_size, all_options, build, variants):
        for options, (usual, meta) in zip(variants, of_rank, strict=True):
            assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(usual, meta, strict=True)), options


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(4, 3),
    "Bilinear": lambda: nn.Bilinear(4, 3, 2),
    "Conv1d": lambda: nn.Conv1d(4, 3, 2),
    "Conv2d": lambda: nn.Conv2d(4, 3, 2),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 3, 2),
    "Embedding": lambda: nn.Embedding(4, 3, padding_idx=1),
    "EmbeddingBag": lambda: nn.EmbeddingBag(4, 3),
    "LSTM": lambda: nn.LSTM(4, 3, 2, bidirectional=True, proj_size=2),
    "GRUCell": lambda: nn.GRUCell(4, 3),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "no elements": lambda: nn.Linear(4, 0),
    "PReLU": lambda: nn.PReLU(3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(4, 2, 8),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_torch_get_the_values_of_their_constructors(layer: str) -> None:
    model = make(LAYERS[layer], "meta")
    zeroopt.wrap(model, torch.optim.SGD(model.parameters()))
    state = torch.get_rng_state()
    usual = make(LAYERS[layer], "cpu")
    assert torch.equal(state, torch.get_rng_state())
    for built, expected in zip(model.state_dict().values(), usual.state_dict().values(), strict=True):
        assert torch.equal(built, expected)


def test_layers_that_torch_copies_draw_values_of_their_own() -> None:
    model = make(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2), "meta")
    zeroopt.wrap(model, torch.optim.SGD(model.parameters()))
    first, second = (layer.linear1.weight for layer in model.layers)  # type: ignore[union-attr]
    assert not torch.equal(first, second)


def start_from_own_seeds(options: dict[str, Any]) -> list[list[Tensor]]:
    seen = []
    for device in ("cpu", "meta"):
        torch.manual_seed(dist.get_rank())
        with torch.device(device):
            net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), **options)
        seen.append([param.detach().clone() for param in net.parameters()])
    return seen


@pytest.mark.parametrize("options", [{}, ROUNDED, {**ROUNDED, "share_parameters": True}, {"share_parameters": True}])
def test_all_ranks_start_from_rank_0(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    (usual, meta), *others = run_on_ranks(2, start_from_own_seeds, options)
    for values in (meta, *(values for of_rank in others for values in of_rank)):
        assert all(torch.equal(a, b) for a, b in zip(usual, values, strict=True))


class Rotary(nn.Module):
    """A buffer that is in no state dict, made by no `reset_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.empty(4))
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


def fill(module: nn.Module) -> None:
    if isinstance(module, Rotary):
        module.scale.uniform_()
        module.angles.copy_(torch.arange(4.0))


def replace(module: nn.Module) -> None:
    if isinstance(module, Rotary):
        module.scale.data.uniform_()
        module.angles = torch.arange(4.0)


@pytest.mark.parametrize("function", [fill, replace])
def test_functions_go_over_all_modules_one_after_the_other(function: Callable[[nn.Module], None]) -> None:
    model = make(Rotary, "meta")
    zeroopt.wrap(model, torch.optim.SGD(model.parameters()), init=[zeroopt.reset_parameters, function], **ROUNDED)
    torch.manual_seed(3)
    linear = nn.Linear(4, 4)
    scale = torch.empty(4).uniform_()
    assert torch.equal(model.scale, scale.bfloat16()) and torch.equal(model.linear.weight, linear.weight.bfloat16())
    assert torch.equal(model.angles, torch.arange(4.0))  # type: ignore[arg-type]


def halve(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.div_(2)


def test_a_function_that_reads_finds_the_exact_values_of_the_one_before() -> None:
    """Not the rounded ones: a third of a third, and 1/8 of those."""
    model = make(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "meta")
    functions = [zeroopt.reset_parameters, halve, halve]
    zeroopt.wrap(model, torch.optim.SGD(model.parameters()), init=functions, master_weights="remainder", **ROUNDED)
    torch.manual_seed(3)
    usual = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert all(torch.equal(a.weight, (b.weight / 4).bfloat16()) for a, b in zip(model, usual, strict=True))


def test_a_part_of_a_model() -> None:
    made = nn.Linear(4, 4)
    before = made.weight.detach().clone()
    model = nn.Sequential(made, make(lambda: nn.Linear(4, 4), "meta"))
    zeroopt.wrap(model, torch.optim.SGD(model.parameters()))
    torch.manual_seed(3)
    assert torch.equal(made.weight, before) and torch.equal(model[1].weight, nn.Linear(4, 4).weight)


def test_a_second_optimizer_finds_its_parameters_made() -> None:
    net = make(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "meta")
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net[0].parameters()))
    zeroopt.wrap(model, torch.optim.AdamW(net[1].parameters()))
    torch.manual_seed(3)
    usual = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), usual.parameters(), strict=True))


def test_nothing_is_changed_where_something_else_is_wrong() -> None:
    model = make(lambda: nn.Linear(4, 4), "meta")
    before, state = list(model.parameters()), torch.get_rng_state()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["params"].append(model.weight)
    with pytest.raises(zeroopt.ConfigError, match="in the optimizer twice"):
        zeroopt.wrap(model, optimizer)
    assert all(a is b and a.is_meta for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def fail_on_rank_1() -> str:
    def init(module: nn.Module) -> None:
        module.weight.zero_()
        module.bias.zero_()
        if dist.get_rank() == 1 and not module.weight.is_meta:
            raise OSError("no such file")

    model = make(lambda: nn.Linear(4, 4), "meta")
    try:
        zeroopt.wrap(model, torch.optim.AdamW(model.parameters()), init=init)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_all_ranks_hear_of_a_function_that_fails(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, fail_on_rank_1)
    assert "building the model" in first and "no such file" in first
    assert "no such file" in second


def meta_on_one_rank() -> str:
    model = make(lambda: nn.Linear(4, 4), "meta" if dist.get_rank() else "cpu")
    try:
        zeroopt.wrap(model, torch.optim.AdamW(model.parameters()))
    except zeroopt.RankMismatchError as error:
        return f"{error} {model.weight.is_meta}"
    return "nothing"


def test_ranks_that_differ_hear_of_it(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, meta_on_one_rank)
    assert "meta device" in first and first.endswith("False") and second.endswith("True")


def in_16_bits(device: str, options: dict[str, Any]) -> list[Tensor]:
    net = make(lambda: nn.Linear(8, 8).bfloat16(), device)
    zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), **options)
    return [param.detach().clone() for param in net.parameters()]


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_not_rounded_is_taken_over_with_its_bucket(run_on_ranks: RunOnRanks, shared: bool) -> None:
    options = {**ROUNDED, "master_weights": "none", "share_parameters": shared}
    usual, *_ = run_on_ranks(2, in_16_bits, "cpu", options)
    for values in run_on_ranks(2, in_16_bits, "meta", options):
        assert all(torch.equal(a, b) for a, b in zip(usual, values, strict=True))


def large(device: str, options: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """Parameters that travel in several pieces, as exact as they are kept; each rank has a seed of its own."""
    torch.manual_seed(dist.get_rank())
    with torch.device(device):
        net = nn.Sequential(nn.Linear(1030, 1100), nn.Linear(1100, 700, bias=False))
    _, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), **options)
    return [optimizer.full_parameter(param) for param in net.parameters()], torch.rand(1)


@pytest.mark.parametrize(
    "options",
    [ROUNDED, {**ROUNDED, "share_parameters": True, "master_weights": "remainder"}, {"share_parameters": True}],
)
def test_large_parameters_that_are_taken_over(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    usual = run_on_ranks(3, large, "cpu", options)
    for (values, number), (expected, usual_number) in zip(run_on_ranks(3, large, "meta", options), usual, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
        assert torch.equal(number, usual_number), "of its own generator"


def held_while_built(numel: int) -> float:
    """Bytes a parameter, at the most, of a model that is made of one large parameter."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(numel // 4096, 4096, bias=False), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters())
    with sampled_pss() as samples:
        zeroopt.wrap(net, optimizer, share_parameters=True, param_dtype=torch.bfloat16, master_weights="none")
    return max(held for _, held in samples) / numel


def test_ranks_that_take_parameters_over_hold_no_copy_of_them() -> None:
    first, *others = run_fresh(3, held_while_built, 1 << 25)
    assert first > 4, "float32 beside the bucket"
    assert all(held < 1.5 for held in others), others
