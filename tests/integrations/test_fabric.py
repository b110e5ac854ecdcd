"""Lightning's Fabric: as under its own DDP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_runs import as_by_torchrun, batches
from torch import Tensor, nn
from worker_pool import RunOnRanks

from zeroopt import ConfigError, StateError

pytest.importorskip("lightning")

from zeroopt.integrations.lightning import ZeroFabricStrategy, unwrap

DDP = "ddp_find_unused_parameters_true"
ZERO = "zeroopt"


def fabric_of(strategy: Any, **options: Any) -> Any:
    import lightning.fabric

    if strategy == ZERO:
        strategy = ZeroFabricStrategy(stage=2, fused=False)
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **options)
    fabric.launch()
    return fabric


def build() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A network, and two optimizers of its parts."""
    torch.manual_seed(7)
    body, head = nn.Sequential(nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.GELU()), nn.Linear(10, 4)
    optimizers = [torch.optim.RMSprop(body.parameters(), lr=0.01), torch.optim.ASGD(head.parameters(), lr=0.1)]
    return nn.Sequential(body, head), optimizers


def train(fabric: Any, model: Any, optimizers: Sequence[Any], steps: slice, clipping: dict[str, float]) -> list[float]:
    """Two micro-batches a step, of which the first communicates nothing."""
    losses = []
    loader = fabric.setup_dataloaders(batches())
    for index, (x, y) in enumerate(loader):
        if not steps.start <= index < steps.stop:
            continue
        with fabric.no_backward_sync(model, enabled=index % 2 == 0):
            loss = nn.functional.cross_entropy(model(x).float(), y)
            fabric.backward(loss)
        losses.append(loss.item())
        if index % 2:
            for optimizer in optimizers:
                if clipping:
                    fabric.clip_gradients(model, optimizer, **clipping)
                optimizer.step()
                optimizer.zero_grad()
    return losses


def values_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train_and_save(strategy: str, path: Path, clipping: dict[str, float], precision: str) -> Any:
    """Losses, weights, and those of going on from the file that was written half-way."""
    with as_by_torchrun():
        fabric = fabric_of(strategy, precision=precision)
        model, *optimizers = fabric.setup(*_flat(build()))
        losses = train(fabric, model, optimizers, slice(0, 4), clipping)
        fabric.save(path, {"model": model, "first": optimizers[0], "second": optimizers[1], "step": 4})
        return losses + train(fabric, model, optimizers, slice(4, 6), clipping), values_of(model)


def go_on(strategy: str, path: Path, clipping: dict[str, float], precision: str) -> Any:
    with as_by_torchrun():
        fabric = fabric_of(strategy, precision=precision)
        model, *optimizers = fabric.setup(*_flat(build()))
        state = {"model": model, "first": optimizers[0], "second": optimizers[1], "step": 0}
        assert fabric.load(path, state, weights_only=True) == {} and state["step"] == 4
        return train(fabric, model, optimizers, slice(4, 6), clipping), values_of(model)


def _flat(built: tuple[nn.Module, list[torch.optim.Optimizer]]) -> list[Any]:
    return [built[0], *built[1]]


@pytest.mark.parametrize(
    ("precision", "clipping", "tolerance"),
    [
        ("32-true", {"clip_val": 0.01}, 0.0),
        ("32-true", {"max_norm": 0.1}, 1e-6),
        ("bf16-mixed", {}, 0.0),
        ("16-mixed", {}, 0.0),
    ],
)
def test_training_saving_and_going_on(
    run_on_ranks: RunOnRanks, tmp_path: Path, precision: str, clipping: dict[str, float], tolerance: float
) -> None:
    """Files written by either are read by the other."""
    runs = {how: run_on_ranks(2, train_and_save, how, tmp_path / how, clipping, precision) for how in (DDP, ZERO)}
    for ddp, ours in zip(*runs.values(), strict=True):
        torch.testing.assert_close(ours, ddp, rtol=tolerance, atol=tolerance)
        assert len({*ddp[0]}) == 6
    files = [torch.load(tmp_path / how, weights_only=True) for how in (DDP, ZERO)]
    torch.testing.assert_close(files[1], files[0], rtol=tolerance, atol=tolerance)
    for source in (DDP, ZERO):
        for (losses, values), whole in zip(
            run_on_ranks(2, go_on, ZERO, tmp_path / source, clipping, precision), runs[ZERO], strict=True
        ):
            torch.testing.assert_close((losses, values), (whole[0][4:], whole[1]), rtol=tolerance, atol=tolerance)


def train_plain(again: bool) -> Any:
    """What was set up for one step is plain again, and goes on with DDP."""
    with as_by_torchrun():
        model, optimizers = build()
        if again:
            fabric = fabric_of(ZERO)
            model, *optimizers = fabric.setup(model, *optimizers)
            train(fabric, model, optimizers, slice(0, 2), {})
            model, *optimizers = unwrap(model, *optimizers)
            assert [type(one) for one in optimizers] == [torch.optim.RMSprop, torch.optim.ASGD]
        fabric = fabric_of(DDP)
        model, *optimizers = fabric.setup(model, *optimizers)
        losses = train(fabric, model, optimizers, slice(2 if again else 0, 6), {})
        return losses[-4:], values_of(model)


def test_unwrap(run_on_ranks: RunOnRanks) -> None:
    for ours, ddp in zip(*(run_on_ranks(2, train_plain, again) for again in (True, False)), strict=True):
        torch.testing.assert_close(ours, ddp, rtol=0, atol=0)


def use_in_other_ways() -> dict[str, str]:
    """By the name of what was tried: the error."""
    errors = {}
    with as_by_torchrun():
        fabric = fabric_of("zeroopt_stage_1")
        model, optimizers = build()
        errors["setup_optimizers"] = _error(lambda: fabric.setup_optimizers(*optimizers))
        alone = fabric.setup(model)
        with torch.no_grad():
            assert torch.equal(alone.eval()(torch.ones(2, 6)), model(torch.ones(2, 6)))
        errors["no_backward_sync"] = _error(lambda: fabric.no_backward_sync(alone).__enter__())
        model, *optimizers = fabric.setup(model.train(), *optimizers)
        fabric.backward(model(torch.full((4, 6), float("inf"))).sum())
        errors["clip"] = _error(lambda: fabric.clip_gradients(model, optimizers[1], max_norm=1.0))
        norm = fabric.clip_gradients(model, optimizers[1], max_norm=1.0, error_if_nonfinite=False)
        assert not norm.isfinite()
        rounded = fabric_of(ZeroFabricStrategy(param_dtype=torch.bfloat16), precision="bf16-true")
        errors["precision"] = _error(lambda: rounded.setup(*_flat(build())))
    return errors


def _error(attempt: Callable[[], Any]) -> str:
    with pytest.raises((RuntimeError, TypeError, ConfigError)) as raised:
        attempt()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_what_else_is_asked_of_it(run_on_ranks: RunOnRanks) -> None:
    for errors in run_on_ranks(2, use_in_other_ways):
        assert errors["setup_optimizers"].startswith("RuntimeError") and "jointly" in errors["setup_optimizers"]
        assert errors["no_backward_sync"].startswith("TypeError") and "together with" in errors["no_backward_sync"]
        assert errors["clip"].startswith("RuntimeError") and "error_if_nonfinite" in errors["clip"]
        assert errors["precision"].startswith("ConfigError") and "bf16-mixed" in errors["precision"]


def train_without_optimizer() -> tuple[list[bool], list[float]]:
    """A model set up alone, of which a backward is tried, then with its optimizers.

    Returns:
        Whether it was refused: of the whole model, of its last layer while the rest is frozen, autograd.grad of an input, and while
        all is frozen. And the losses with the optimizers.
    """
    with as_by_torchrun():
        fabric = fabric_of(ZERO)
        model, optimizers = build()
        alone = fabric.setup(model)
        x = torch.ones(4, 6, requires_grad=True)
        refused = [_is_refused(lambda: fabric.backward(alone(x).sum()))]
        model[0].requires_grad_(False)
        refused.append(_is_refused(lambda: fabric.backward(alone(x).sum())))
        refused.append(_is_refused(lambda: torch.autograd.grad(alone(x).sum(), x)))
        model.requires_grad_(False)
        refused.append(_is_refused(lambda: fabric.backward(alone(x).sum())))
        assert all(param.grad is None for param in model.parameters())
        model.requires_grad_(True)
        model, *optimizers = fabric.setup(model, *optimizers)
        return refused, train(fabric, model, optimizers, slice(0, 2), {})


def _is_refused(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except StateError as error:
        assert "call model, optimizer = fabric.setup(model, optimizer)" in str(error)
        return True
    return False


def test_a_backward_of_a_model_without_optimizer_is_refused(run_on_ranks: RunOnRanks) -> None:
    for refused, losses in run_on_ranks(2, train_without_optimizer):
        assert refused == [True, True, False, False] and len(losses) == 2


def train_alone() -> list[bool]:
    """With one rank there is nothing to average."""
    with as_by_torchrun():
        fabric = fabric_of(ZERO)
        model, _ = build()
        fabric.backward(fabric.setup(model)(torch.ones(4, 6)).sum())
        return [param.grad is not None for param in model.parameters()]


def test_a_backward_of_one_rank_is_allowed(run_on_ranks: RunOnRanks) -> None:
    assert all(run_on_ranks(1, train_alone)[0])
