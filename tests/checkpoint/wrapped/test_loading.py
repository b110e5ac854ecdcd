"""What cannot be loaded changes nothing on any rank, and all ranks hear of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import (
    TIERS,
    Model,
    Recipe,
    all_of,
    assert_all_same,
    assert_same,
    train,
    whole_state,
    wrap_all,
    wrapped,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim.lr_scheduler import StepLR
from training import Mlp
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.checkpoint.inspection import inspect
from zeroopt.errors import CheckpointError


class Picky:
    """Refuses what it is given on one rank, after the others have taken it."""

    def __init__(self, rank: int) -> None:
        self.value, self._rank = 1, rank

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank() == self._rank and state["value"] == 5:
            raise ValueError("not this one")
        self.value = state["value"]


def sgd(net: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)]


def make_checkpoints(path: Path) -> None:
    """A good one, and others that do not fit it."""
    model, optimizer = wrapped("mlp", "adamw", {})
    train(model, optimizer, "mlp", range(2))
    picky = Picky(-1)
    picky.value = 5
    extra: dict[str, Any] = {"scheduler": StepLR(optimizer, 3), "picky": picky, "epoch": 4}
    zeroopt.checkpoint.save(path / "good", model, optimizer, extra, rank_extra={"rank": dist.get_rank()})
    zeroopt.checkpoint.save(path / "without extra", model, optimizer)

    other, its_optimizer = wrapped("lm", "adamw", {})
    zeroopt.checkpoint.save(path / "other model", other, its_optimizer)

    def wider() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = Mlp()
        net.layers[0] = nn.Linear(8, 33)
        return net, sgd(net)

    def fewer() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = Mlp()
        return net, [torch.optim.SGD(net.layers.parameters(), lr=0.1)]

    def grouped() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = Mlp()
        params = list(net.parameters())
        return net, [torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])]

    for name, recipe in (("other shapes", wider), ("not all trained", fewer), ("other groups", grouped)):
        model, optimizers = wrap_all(recipe)
        zeroopt.checkpoint.save(path / name, model, optimizers)
    if dist.get_rank() == 0:
        net = Mlp()
        plain = torch.optim.AdamW(net.parameters())
        state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, plain)}
        del state["optimizer"]["state"]["layers.0.weight"]["exp_avg"]
        dcp.save({"model": state["model"]}, checkpoint_id=path / "no optimizer", no_dist=True)
        dcp.save({"net": state["model"], "optim": state["optimizer"]}, checkpoint_id=path / "keys", no_dist=True)
        (path / "nothing").mkdir()
        for name in ("damaged", "cut off", "incomplete"):
            shutil.copytree(path / "good", path / name)
        data = path / "damaged" / "__1_0.distcp"
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
        with (path / "cut off" / "__0_0.distcp").open("r+b") as file:
            file.truncate(1000)
        (path / "incomplete" / "rank-1.pt").unlink()
    dist.barrier()


EXPECTED = {
    "missing": "is not there",
    "nothing": "is not a checkpoint",
    "other model": "the model and the checkpoint have no name in common under 'model': the checkpoint lacks",
    "other shapes": "'model.layers.0.weight' has shape [33, 8] in the checkpoint, and [33, 7] was expected",
    "not all trained": "the checkpoint has no param_group with parameter 'scale', which is in group 0 here",
    "other groups": "parameters of param_group 0 were saved in groups of different options",
    "no optimizer": "only 'model': say with model_key and optimizer_key where it has the model and the optimizer, or leave out the",
    "keys": "has nothing under 'model', only 'net', 'optim'",
    "damaged": "__1_0.distcp is damaged",
    "cut off": "__0_0.distcp has 1000 bytes",
    "incomplete": "rank-1.pt is missing",
    "without extra": "has no 'scheduler' among its extra values, only []",
    "picky": "ValueError: not this one",
    "different": "which are not the same checkpoint",
    "plain model": "got a Linear",
    "plain model on one rank": "on rank 1: expected the model",
    "other optimizer": "the optimizer was not wrapped with this model",
    "no optimizers": "give each of them once",
}


def refuse_all(path: Path, options: dict[str, Any]) -> dict[str, str]:
    """The error of each checkpoint or call, after which all is as before."""
    make_checkpoints(path)
    model, optimizer = wrapped("mlp", "adamw", options)
    train(model, optimizer, "mlp", range(5, 8))
    scheduler, picky = StepLR(optimizer, 7), Picky(1)
    extra = {"scheduler": scheduler, "picky": picky}
    _, foreign = wrapped("mlp", "adamw", {})
    last = dist.get_rank() == dist.get_world_size() - 1
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: zeroopt.checkpoint.load(path / name, model, optimizer)
        for name in EXPECTED
        if name == "missing" or (path / name).exists()
    }
    good, other = path / "good", path / "without extra"
    calls["without extra"] = lambda: zeroopt.checkpoint.load(other, model, optimizer, extra)
    calls["picky"] = lambda: zeroopt.checkpoint.load(good, model, optimizer, extra)
    calls["different"] = lambda: zeroopt.checkpoint.load(other if last else good, model, optimizer)
    calls["plain model"] = lambda: zeroopt.checkpoint.load(good, nn.Linear(1, 1), optimizer)
    calls["plain model on one rank"] = lambda: zeroopt.checkpoint.load(
        good, nn.Linear(1, 1) if last else model, optimizer
    )
    calls["other optimizer"] = lambda: zeroopt.checkpoint.load(good, model, foreign)
    calls["no optimizers"] = lambda: zeroopt.checkpoint.load(good, model, [])

    def now() -> Any:
        return all_of(model, [optimizer]), scheduler.state_dict(), picky.state_dict()

    errors = {}
    for name, call in calls.items():
        before = now()
        with pytest.raises(CheckpointError) as raised:
            call()
        assert_same(now(), before, name)
        errors[name] = str(raised.value)
    zeroopt.checkpoint.load(good, model, optimizer, {"scheduler": scheduler}, rank_extra={"rank": 0})
    train(model, optimizer, "mlp", range(1))
    return errors


@pytest.mark.parametrize("options", [{}, {"param_dtype": torch.bfloat16, "stage": 1}], ids=["float32", "bfloat16"])
def test_refusals_change_nothing(run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]) -> None:
    answers = run_on_ranks(2, refuse_all, tmp_path, options)
    assert_all_same(answers, answers[0])
    assert answers[0].keys() == EXPECTED.keys()
    for name, text in EXPECTED.items():
        assert text in answers[0][name], (name, answers[0][name])


def load_what_both_have(path: Path) -> tuple[dict[str, Any], Any]:
    """strict=False, and returned extra values."""
    if not (path / "good").exists():
        make_checkpoints(path)

    def more() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = Mlp()
        net.head = nn.Linear(2, 2).requires_grad_(False)
        del net.layers[4]
        return net, [torch.optim.AdamW([{"params": params} for params in halves(net)])]

    def halves(net: nn.Module) -> list[list[nn.Parameter]]:
        params = [param for param in net.parameters() if param.requires_grad]
        return [params[::2], params[1::2]]

    model, optimizers = wrap_all(more)
    before = model.module.head.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"lacks 'model.head.bias', 'model.head.weight', the model lacks 'model.layers.4"
    ):
        zeroopt.checkpoint.load(path / "good", model, optimizers)
    extra = zeroopt.checkpoint.load(path / "good", model, optimizers, strict=False)
    assert_same(model.module.head.weight.detach(), before.detach())
    reference, optimizer = wrapped("mlp", "adamw", {})
    zeroopt.checkpoint.load(path / "good", reference, optimizer)
    values = {n: v.clone() for n, v in model.state_dict().items() if "head" not in n}
    expected = {n: v.clone() for n, v in reference.state_dict().items() if "layers.4" not in n}
    assert_same(values, expected)
    return extra, None


def test_loading_what_both_have(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for rank, (extra, _) in enumerate(run_on_ranks(2, load_what_both_have, tmp_path)):
        assert (extra["epoch"], extra["picky"], extra["rank"]) == (4, {"value": 5}, rank)
    for extra, _ in run_on_ranks(3, load_what_both_have, tmp_path):  # as many ranks have not saved
        assert extra["epoch"] == 4
        assert "rank" not in extra


def backbone_and(*heads: str) -> Recipe:
    """A backbone with heads, all in one group."""

    def recipe() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = nn.ModuleDict({name: nn.Linear(6, 3) for name in heads})
        net["backbone"] = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        return net, [torch.optim.AdamW(net.parameters(), lr=0.01)]

    return recipe


def train_heads(model: zeroopt.ZeroDataParallel, optimizer: zeroopt.ZeroOptimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        features = model.module["backbone"](x)
        heads = [head for name, head in model.module.items() if name != "backbone"]
        sum((head(features).square().sum() for head in heads), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()


def named_state(optimizer: zeroopt.ZeroOptimizer) -> dict[str, Any]:
    """The whole state by parameter, on all ranks."""
    whole = whole_state(optimizer)
    return {name: whole["state"][position] for position, name in optimizer.names().items()}


def change_heads(path: Path, options: dict[str, Any]) -> None:
    """A model with one more head, and with one less: the head that the checkpoint lacks stays as it is, state and all."""
    saved, (its_optimizer,) = wrap_all(backbone_and("old"), **options)
    train_heads(saved, its_optimizer, range(3))
    its_optimizer.param_groups[0]["lr"] = 0.5
    zeroopt.checkpoint.save(path / "saved", saved, its_optimizer)
    theirs = all_of(saved, [its_optimizer])[0], named_state(its_optimizer)

    for heads in (("new", "old"), ("new",), ()):
        model, (optimizer,) = wrap_all(backbone_and(*heads), **options)
        train_heads(model, optimizer, range(5, 6 if heads else 5))
        ours = all_of(model, [optimizer])[0], named_state(optimizer) if heads else {}
        with pytest.raises(CheckpointError, match="strict=False loads what both have"):
            zeroopt.checkpoint.load(path / "saved", model, optimizer)
        zeroopt.checkpoint.load(path / "saved", model, optimizer, strict=False)
        loaded = all_of(model, [optimizer])[0], named_state(optimizer)
        for mine, before, other in zip(loaded, ours, theirs, strict=True):
            for name, value in mine.items():
                assert_same(value, before[name] if name.startswith("new") else other[name], name)
        assert optimizer.param_groups[0]["lr"] == 0.5
        train_heads(model, optimizer, range(6, 7 if heads else 6))


@pytest.mark.parametrize("tier", ["float32", "int8"])
def test_heads_that_only_one_of_both_has(run_on_ranks: RunOnRanks, tmp_path: Path, tier: str) -> None:
    run_on_ranks(2, change_heads, tmp_path, {**TIERS[tier], "param_dtype": None, "master_weights": "float32"})


def adapted(seed: int) -> tuple[Model, zeroopt.ZeroOptimizer]:
    """A frozen base with batch norm, whose buffers change, and adapters in 16 bits that are trained."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
    return zeroopt.wrap(net, torch.optim.AdamW(net[2].parameters(), lr=0.1), param_dtype=torch.bfloat16)


def save_and_load_adapters(path: Path) -> None:
    """What is trained is exact again, and everything else stays as it is."""
    if not path.exists():
        saved, its_optimizer = adapted(1)
        for step in range(3):
            saved(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).bfloat16()).sum().backward()
            its_optimizer.step()
            its_optimizer.zero_grad()
        zeroopt.checkpoint.save(path / "adapters", saved, its_optimizer, trained_only=True)
        zeroopt.checkpoint.save(path / "all", saved, its_optimizer)
        if dist.get_rank() == 0:
            torch.save(all_of(saved, [its_optimizer]), path / "expected.pt")
        else:
            all_of(saved, [its_optimizer])
        dist.barrier()
    expected, expected_state = torch.load(path / "expected.pt")
    for name in ("adapters", "all"):
        model, optimizer = adapted(2)
        before, _ = all_of(model, [optimizer])
        zeroopt.checkpoint.load(path / name, model, optimizer, trained_only=True)
        values, state = all_of(model, [optimizer])
        for key, value in values.items():
            assert_same(value, expected[key] if key.startswith("2.") else before[key], key)
        assert_same(state, expected_state)
    with pytest.raises(CheckpointError, match="the checkpoint lacks 'model.0.bias', 'model.0.weight'"):
        zeroopt.checkpoint.load(path / "adapters", model, optimizer)


def test_trained_parameters_alone(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, save_and_load_adapters, tmp_path / "runs")
    run_on_ranks(3, save_and_load_adapters, tmp_path / "runs")
    keys = [tensor.key for tensor in inspect(tmp_path / "runs" / "adapters").tensors]
    assert sorted(key for key in keys if key.startswith("model.")) == ["model.2.bias", "model.2.weight"]


def load_beside_numbered_modules(path: Path) -> None:
    """Modules may be called 0 and 1: these are no positions."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net[0].parameters()))
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    zeroopt.checkpoint.save(path, model, optimizer)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model, optimizer = zeroopt.wrap(other, torch.optim.AdamW(other[1].parameters()))
    zeroopt.checkpoint.load(path, model, optimizer, strict=False)
    assert_same(dict(other.state_dict()), dict(net.state_dict()))
    assert not any(optimizer.state_dict()["state"].values())


def test_names_that_are_numbers(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, load_beside_numbered_modules, tmp_path / "x")


def load_the_model_alone(path: Path, options: dict[str, Any]) -> None:
    model, optimizer = wrapped("mlp", "adamw", options)
    train(model, optimizer, "mlp", range(3))
    values, _ = all_of(model, [optimizer])
    zeroopt.checkpoint.save(path / "whole", model, optimizer, {"step": 3})
    zeroopt.checkpoint.save(path / "model", model, extra={"step": 3})
    zeroopt.checkpoint.async_save(path / "in the background", model).result()
    for name in ("whole", "model", "in the background"):
        other, its_optimizer = wrapped("mlp", "adamw", options)
        train(other, its_optimizer, "mlp", range(7, 8))
        _, state = all_of(other, [its_optimizer])
        beyond = [one.pop("beyond torch") for one in state]
        extra = zeroopt.checkpoint.load(path / name, other)
        assert extra == ({} if name == "in the background" else {"step": 3})
        now, its_state = all_of(other, [its_optimizer])
        assert_same(now, values, name)
        assert beyond and all(one.pop("beyond torch", None) is not None for one in its_state)
        assert_same(its_state, state, name)  # but for masters, which are the loaded parameters
        train(other, its_optimizer, "mlp", range(3, 4))
        if name != "whole":
            assert inspect(path / name).totals().keys() == {"model"}
            with pytest.raises(CheckpointError, match="leave out the optimizer to load the model alone"):
                zeroopt.checkpoint.load(path / name, other, its_optimizer)


@pytest.mark.parametrize("tier", ["float32", "remainder"])
def test_the_model_alone(run_on_ranks: RunOnRanks, tmp_path: Path, tier: str) -> None:
    run_on_ranks(2, load_the_model_alone, tmp_path, TIERS[tier])


def load_in_inference_mode(path: Path) -> None:
    """As whoever saves and loads beside an evaluation: what is loaded has to be stepped afterwards."""

    def plain() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = Mlp()
        return net, [torch.optim.Adam(net.parameters(), lr=0.01)]

    model, (optimizer,) = wrap_all(plain, fused=False)
    train(model, optimizer, "mlp", range(2))
    with torch.inference_mode():
        zeroopt.checkpoint.save(path / "at once", model, optimizer)
        zeroopt.checkpoint.async_save(path / "in the background", model, optimizer).result()
        state = optimizer.state_dict()
    train(model, optimizer, "mlp", range(2, 3))
    expected = all_of(model, [optimizer])
    for name in ("at once", "in the background"):
        with torch.inference_mode():
            zeroopt.checkpoint.load(path / name, model, optimizer)
        train(model, optimizer, "mlp", range(2, 3))
        assert_same(all_of(model, [optimizer]), expected)
    with torch.inference_mode():
        optimizer.load_state_dict(state)
    train(model, optimizer, "mlp", range(1))


def test_inference_mode(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, load_in_inference_mode, tmp_path)


def load_without_activation_checkpointing(path: Path) -> None:
    """It puts something around modules, whose names are not to be in checkpoints."""

    def checkpointed() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = nn.Sequential(checkpoint_wrapper(nn.Linear(5, 5)), nn.Linear(5, 1))
        return net, sgd(net)

    def plain() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1))
        return net, sgd(net)

    for there, here in ((checkpointed, plain), (plain, checkpointed)):
        model, (optimizer,) = wrap_all(there)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        zeroopt.checkpoint.save(path, model, optimizer)
        other, (its_optimizer,) = wrap_all(here)
        zeroopt.checkpoint.load(path, other, its_optimizer)
        assert_same([p.detach() for p in other.parameters()], [p.detach() for p in model.parameters()])
        assert_same(whole_state(its_optimizer), whole_state(optimizer))


def test_activation_checkpointing_may_change(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, load_without_activation_checkpointing, tmp_path / "saved")
