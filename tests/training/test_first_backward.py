"""In stage 2, the first backward puts gradients together in the order that the first forward has foretold, while parameters lie in
another one until the first step. Whatever is done in between comes to the same bits as without that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import OPTIMIZERS, snapshot
from worker_pool import RunOnRanks

import zeroopt

WIDTH, LAYERS = 24, 7
ORDER = [3, 0, 6, 1, 5, 2, 4]  # in which the layers run


class Shuffled(nn.Module):
    """Layers that run in another order than they are defined in. One parameter is used all along, one layer is used by rank 0
    alone, and one by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(LAYERS))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.rare = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.twin = nn.Linear(WIDTH, WIDTH, bias=False)
        self.twin.weight = self.layers[6].weight
        self.blocks = [self.layers[i] for i in ORDER]
        self.run: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = torch.tanh(self.run(layer, x)) * self.scale
        if dist.get_rank() == 0:
            x = x + self.rare(x)
        return self.twin(x)


class Scene:
    """One training.

    Args:
        foresight: whether the first backward may go by what the forward has foretold.
        folder: for checkpoints, the same on all ranks.
    """

    def __init__(self, folder: Path, *, foresight: bool, optimizer: str = "adamw", **options: Any) -> None:
        torch.manual_seed(0)
        self.net = Shuffled()
        inner = OPTIMIZERS[optimizer](self.net.parameters())
        self.model, self.optimizer = zeroopt.wrap(self.net, inner, **{"bucket_mb": 0.006, **options})
        self.folder = folder
        self.uses_foresight = foresight
        if not foresight:
            assert self.model.features.foresight is not None
            self.model.features.foresight.forget()
        self.number = 0

    def loss(self) -> Tensor:
        self.number += 1
        generator = torch.Generator().manual_seed(10 * self.number + dist.get_rank())
        loss: Tensor = self.model(torch.randn(3, WIDTH, generator=generator)).square().mean()
        return loss

    def backward(self) -> None:
        self.loss().backward()

    def check_ahead(self, *, ahead: bool = True) -> None:
        assert self.model.replica.reducer.is_ahead is (self.uses_foresight and ahead)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


Scenario = Callable[[Scene], object]


def one_backward(scene: Scene) -> None:
    scene.backward()


def three_backwards(scene: Scene) -> None:
    for _ in range(3):
        scene.backward()
        scene.check_ahead()


def one_graph_twice(scene: Scene) -> None:
    loss = scene.loss()
    loss.backward(retain_graph=True)
    loss.backward()


def two_graphs(scene: Scene) -> None:
    losses = [scene.loss(), scene.loss()]
    for loss in losses:
        loss.backward()
        scene.check_ahead()


def two_graphs_and_a_norm_between(scene: Scene) -> None:
    """For which gradients go back to where the parameters are, while a graph still refers to those."""
    losses = [scene.loss(), scene.loss()]
    losses[0].backward()
    scene.check_ahead()
    assert scene.optimizer.grad_norm > 0
    scene.check_ahead(ahead=False)
    losses[1].backward()


def one_without_communication(scene: Scene) -> None:
    with scene.model.no_sync():
        scene.backward()
        scene.check_ahead(ahead=False)
    scene.backward()


def clipped(scene: Scene) -> None:
    scene.backward()
    scene.optimizer.clip_grad_norm_(0.01)


def unscaled_by_a_scaler(scene: Scene) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(scene.loss()).backward()
    scaler.unscale_(scene.optimizer)
    scene.check_ahead()
    scaler.step(scene.optimizer)
    scaler.update()
    scene.optimizer.zero_grad()
    scene.backward()


def skipped_by_a_scaler(scene: Scene) -> None:
    """The step does not come, so gradients are ahead for one more backward."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (scaler.scale(scene.loss()) * torch.inf).backward()
    scaler.step(scene.optimizer)
    scaler.update()
    scene.check_ahead()
    scene.optimizer.zero_grad()
    scene.backward()


def edited(scene: Scene) -> None:
    scene.backward()
    for param in scene.net.parameters():
        if param.grad is not None:
            param.grad.mul_(0.5).add_(0.01)


def replaced(scene: Scene) -> None:
    scene.backward()
    scene.net.layers[3].weight.grad = torch.full((WIDTH, WIDTH), 0.25)
    scene.net.layers[1].weight.grad = None


def read(scene: Scene) -> list[Tensor]:
    scene.backward()
    grads = [scene.optimizer.full_grad(param) for param in scene.net.parameters()]
    return [grad for grad in grads if grad is not None]


def cleared(scene: Scene) -> None:
    scene.backward()
    scene.optimizer.zero_grad()
    scene.check_ahead()
    scene.backward()


def cleared_by_the_model(scene: Scene) -> None:
    scene.backward()
    scene.model.zero_grad()
    scene.backward()


def zeroed(scene: Scene) -> None:
    scene.backward()
    scene.optimizer.zero_grad(set_to_none=False)
    scene.backward()


def cleared_but_for_one_that_is_set(scene: Scene) -> None:
    """Its bucket holds one gradient; what was there before must not count."""
    scene.backward()
    scene.optimizer.zero_grad()
    scene.net.layers[0].weight.grad = torch.full((WIDTH, WIDTH), 0.25)
    scene.optimizer.clip_grad_norm_(0.5)


def saved(scene: Scene) -> list[Tensor]:
    """Between backward and step, parameters are where they were."""
    scene.backward()
    path = scene.folder / f"checkpoint-{scene.uses_foresight}"
    zeroopt.checkpoint.save(path, scene.model, scene.optimizer)
    values = [param.detach().clone() for param in scene.net.parameters()]
    with torch.no_grad(), scene.model.write_parameters():
        for param in scene.net.parameters():
            param.zero_()
    zeroopt.checkpoint.load(path, scene.model, scene.optimizer)
    assert all(map(torch.equal, scene.net.parameters(), values))
    return values


def loaded(scene: Scene) -> None:
    """As it was saved with the guessed order, or with the right one: buckets are made as they were."""
    state, values = scene.optimizer.state_dict(), {k: v.clone() for k, v in scene.model.state_dict().items()}
    scene.backward()
    scene.model.load_state_dict(values)
    scene.optimizer.load_state_dict(state)


def loaded_from_later(scene: Scene) -> None:
    later = Scene(scene.folder, foresight=scene.uses_foresight)
    later.backward()
    later.step()
    state = later.optimizer.state_dict()
    scene.backward()
    scene.optimizer.load_state_dict(state)


def grown(scene: Scene) -> None:
    """A layer is unfrozen between backward and step."""
    scene.backward()
    extra = nn.Linear(WIDTH, WIDTH, bias=False)
    scene.net.extra = extra
    with torch.no_grad():
        extra.weight.fill_(0.5)
    scene.optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.01})
    scene.check_ahead(ahead=False)


def shrunk(scene: Scene) -> None:
    """Two parameters leave; later, the order is followed once more."""
    scene.backward()
    group = scene.optimizer.param_groups[0]
    gone = {scene.net.layers[2].weight, scene.net.layers[5].weight}
    group["params"] = [param for param in group["params"] if param not in gone]
    scene.step()
    scene.check_ahead(ahead=False)
    for param in gone:
        param.grad = None
    scene.backward()


def evaluated_before(scene: Scene) -> None:
    with torch.no_grad():
        scene.loss()
    scene.backward()


def run_again(layer: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
    result = checkpoint(layer, x.requires_grad_() if x.is_leaf else x, use_reentrant=use_reentrant)
    assert isinstance(result, Tensor)
    return result


def checkpointed(scene: Scene) -> None:
    """Backward comes to the modules once more."""
    scene.net.run = partial(run_again, use_reentrant=False)
    scene.backward()


def checkpointed_with_backward_within(scene: Scene) -> None:
    """But for the layer whose weight is used elsewhere, too, whose gradient would come twice. The first gradient comes within another backward on
    rank 1 alone: on rank 0 it is that of a layer which only this one uses."""
    plain = scene.net.layers[6]
    scene.net.run = lambda layer, x: layer(x) if layer is plain else run_again(layer, x, use_reentrant=True)
    scene.backward()


def unforeseen(scene: Scene) -> None:
    """Modules are used past their calls, so that nothing is foretold."""
    scene.net.run = lambda layer, x: F.linear(x, layer.weight, layer.bias)
    scene.net.twin.forward = partial(F.linear, weight=scene.net.twin.weight)
    scene.backward()


def foreseen_wrongly(scene: Scene) -> None:
    """The first forward uses modules in another order than the one that backward goes through."""
    blocks = scene.net.blocks
    scene.net.blocks = blocks[::-1]
    with torch.no_grad():
        scene.loss()
    scene.net.blocks = blocks
    scene.backward()


SCENARIOS: list[Scenario] = [
    one_backward,
    three_backwards,
    one_graph_twice,
    two_graphs,
    two_graphs_and_a_norm_between,
    one_without_communication,
    clipped,
    unscaled_by_a_scaler,
    skipped_by_a_scaler,
    edited,
    replaced,
    read,
    cleared,
    cleared_by_the_model,
    zeroed,
    cleared_but_for_one_that_is_set,
    saved,
    loaded,
    loaded_from_later,
    grown,
    shrunk,
    evaluated_before,
    checkpointed,
    checkpointed_with_backward_within,
    unforeseen,
    foreseen_wrongly,
]


def train(folder: Path, scenario: Scenario, options: dict[str, Any], foresight: bool) -> list[Tensor]:
    """What a scenario comes to, and what later steps do."""
    scene = Scene(folder, foresight=foresight, **options)
    found = scenario(scene)
    scene.step()
    scene.check_ahead(ahead=False)
    history = [*(found if isinstance(found, list) else ()), *snapshot(scene.net)]
    for _ in range(2):
        scene.backward()
        scene.step()
        history += snapshot(scene.net)
    scene.optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        state = scene.optimizer.full_state_dict()["state"]
        history += [torch.as_tensor(value) for entry in state.values() for value in entry.values()]
    return history


def compare(folder: Path, scenario: Scenario, options: dict[str, Any]) -> None:
    expected, found = (train(folder, scenario, options, foresight) for foresight in (False, True))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_what_comes_before_the_first_step_comes_to_the_same_bits(
    run_on_ranks: RunOnRanks, tmp_path: Path, scenario: Scenario
) -> None:
    run_on_ranks(2, compare, tmp_path, scenario, {})


OPTIONS: list[dict[str, Any]] = [
    {"max_grad_norm": 0.01},
    {"check_every": 1},
    {"share_parameters": True},
    {"transport": "pairwise"},
    {"fused": False},
    {"optimizer": "own"},
    {"reduce_dtype": torch.bfloat16},
    {"state_dtype": torch.int8},
    {"bucket_mb": 0.001},
    *({"param_dtype": torch.bfloat16, "master_weights": kept} for kept in ("float32", "remainder", "none")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_so_it_does_whatever_is_kept_and_looked_at(
    run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "param_dtype" in options or "reduce_dtype" in options:
        options = {**options, "cast_inputs": "param_dtype" in options}
    for scenario in (three_backwards, clipped, loaded):
        run_on_ranks(3, compare, tmp_path, scenario, options)


def unwrap_in_between(_: Path) -> None:
    scene = Scene(_, foresight=True)
    before = snapshot(scene.net)
    scene.backward()
    scene.check_ahead()
    net, inner = zeroopt.unwrap(scene.model, scene.optimizer)
    assert all(map(torch.equal, snapshot(net), before)) and not inner.state
    assert not any(param.grad is not None for param in net.parameters())
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_unwrapping_gives_parameters_back(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, unwrap_in_between, tmp_path)


def unwrap_before(_: Path) -> None:
    scene = Scene(_, foresight=True)
    assert any(part._forward_pre_hooks for part in scene.net.modules())
    net, _inner = zeroopt.unwrap(scene.model, scene.optimizer)
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_nothing_is_left_that_watches_forwards(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, unwrap_before, tmp_path)


def join_with(folder: Path, batches: list[int], foresight: bool) -> list[Tensor]:
    """Ranks run out of data at different times, of which one may have none at all."""
    scene = Scene(folder, foresight=foresight)
    with scene.model.join():
        for _ in range(batches[dist.get_rank()]):
            scene.backward()
            scene.optimizer.clip_grad_norm_(10.0)
            scene.step()
    return snapshot(scene.net)


def compare_joining(folder: Path, batches: list[int]) -> None:
    expected, found = (join_with(folder, batches, foresight) for foresight in (False, True))
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("batches", [[3, 1, 3], [3, 0, 2], [0, 3, 3], [1, 2, 2]], ids=str)
def test_ranks_that_have_left_take_part(run_on_ranks: RunOnRanks, tmp_path: Path, batches: list[int]) -> None:
    run_on_ranks(3, compare_joining, tmp_path, batches)


class Kinds(nn.Module):
    """Two dtypes, and a parameter that is larger than a buffer, in another order than they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, 3)
        self.first = nn.Linear(WIDTH, 40 * WIDTH)
        self.wide = nn.ModuleList(nn.Linear(WIDTH, WIDTH).double() for _ in range(3))
        self.inner = nn.Linear(40 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(torch.tanh(self.first(x))).double()
        for layer in self.wide:
            x = torch.tanh(layer(x))
        return self.last(x.float())


def train_kinds(foresight: bool) -> list[Tensor]:
    torch.manual_seed(0)
    net = Kinds()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.02)
    assert any(store.is_striped for store in model.replica.reducer.stores)
    assert model.features.foresight is not None
    if not foresight:
        model.features.foresight.forget()
    history = []
    for number in range(3):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
        model(x).square().mean().backward()
        assert model.replica.reducer.is_ahead is (foresight and number == 0)
        optimizer.step()
        optimizer.zero_grad()
        history += snapshot(net)
    return history


def compare_kinds() -> None:
    assert all(map(torch.equal, train_kinds(foresight=True), train_kinds(foresight=False)))


def test_parameters_of_several_dtypes_and_large_ones(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, compare_kinds)


class Watching(zeroopt.Feature):
    """May look at the parameters of a bucket whenever it sees one."""


def is_ahead_with(what: str) -> bool:
    torch.manual_seed(0)
    net = Shuffled()
    params = list(net.parameters())
    options: dict[str, Any] = {"bucket_mb": 0.006}
    if what == "two optimizers":
        model, _ = zeroopt.wrap(net, torch.optim.SGD(params[:5], lr=0.1), **options)
        model, _ = zeroopt.wrap(model, torch.optim.SGD(params[5:], lr=0.1), **options)
    else:
        options |= {
            "alone": {},
            "stage 1": {"stage": 1},
            "stage 0": {"stage": 0},
            "no overlap": {"overlap": False},
            "features": {"features": [Watching()]},
            "steps in backward": {"step_in_backward": True},
        }.get(what, {})
        make = zeroopt.optim.FusedLAMB if what == "whole parameters" else partial(torch.optim.SGD, lr=0.1)
        model, _ = zeroopt.wrap(net, make(params), **options)
    model(torch.ones(2, WIDTH)).sum().backward()
    assert not any(
        type(hook).__module__ == "zeroopt.parameters.first_uses"
        for part in net.modules()
        for hook in part._forward_pre_hooks.values()
    )
    return model.replica.reducer.is_ahead


@pytest.mark.parametrize(
    ("what", "ahead"),
    [
        ("alone", True),
        ("stage 0", False),  # whose gradients have a place from the start
        ("stage 1", False),
        ("no overlap", False),  # where buckets stay as they are
        ("two optimizers", False),
        ("whole parameters", False),
        ("features", False),
        ("steps in backward", False),
    ],
)
def test_who_is_ahead(run_on_ranks: RunOnRanks, what: str, ahead: bool) -> None:
    assert run_on_ranks(2, is_ahead_with, what) == [ahead] * 2


def most_waiting(foresight: bool) -> tuple[int, int]:
    """Gradients that have come, in the first backward, and lie in no bucket; and the parameters that are used."""
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(16))
    model, _ = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=2 * WIDTH * WIDTH * 4 / 2**20)
    assert model.features.foresight is not None
    if not foresight:
        model.features.foresight.forget()
    reducer, waiting = model.replica.reducer, []
    take_up = reducer.take_up

    def count(index: int) -> None:
        take_up(index)
        waiting.append(sum(type(param.grad) is Tensor for param in net.parameters()))

    reducer.take_up = count  # type: ignore[method-assign]
    x = torch.ones(2, WIDTH)
    for number in torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist():
        x = net[number](x)
    x.sum().backward()
    return max(waiting), len(waiting)


def test_no_gradients_pile_up(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, most_waiting, True) == [(0, 16)] * 2
    for most, number in run_on_ranks(2, most_waiting, False):
        assert most > number // 2
