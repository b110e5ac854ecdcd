"""`save_state` and `load_state` of what zeroopt has wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from follow import WIDTH, inputs, layers, values
from torch import Tensor, nn
from ulps import SUM_ORDER_ULPS, assert_close
from worker_pool import RunOnRanks

import zeroopt

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from accelerators import accelerator

from zeroopt.integrations.accelerate import enable

Setup = dict[str, Any]


class Run:
    """A training that can be saved and gone on with; each step is two backward passes."""

    def __init__(self, acc: Accelerator) -> None:
        self.acc = acc
        self.net, self.other = layers(), layers(2)
        optimizer: Any = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.model, self.optimizer, self.scheduler = acc.prepare(self.net, optimizer, scheduler)
        self.second, self.its_optimizer = acc.prepare(
            self.other, torch.optim.SGD(self.other.parameters(), lr=0.1, momentum=0.9)
        )
        self.average = torch.optim.swa_utils.AveragedModel(self.net)  # something else that has a state
        acc.register_for_checkpointing(self.average)

    def steps(self, numbers: range) -> list[Tensor]:
        """Losses, and in the end learning rate and parameters."""
        seen = []
        for number in numbers:
            with self.acc.accumulate(self.model, self.second):
                loss = self.second(self.model(inputs(number, 4, WIDTH))).square().mean()
                self.acc.backward(loss)
                self.optimizer.step()
                self.its_optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.its_optimizer.zero_grad()
            seen.append(loss.detach())
        self.average.update_parameters(self.net)
        return [
            *seen,
            torch.tensor(self.scheduler.get_last_lr()),
            *values(self.net),
            *values(self.other),
            *values(self.average),
            torch.rand(3),
        ]


SETUP: Setup = {"gradient_accumulation_steps": 2}


def save_and_go_on(folder: Path) -> list[Tensor]:
    """Save between two steps, and return what comes then."""
    with accelerator(**SETUP) as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        run.steps(range(4))
        assert acc.save_state(str(folder)) == folder
        names = {path.name for path in folder.iterdir()}
        assert {"zeroopt_0", "zeroopt_1", "scheduler.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"} <= names
        assert not names & {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin"}
        assert len(acc._optimizers) == 2 and not acc._save_model_state_pre_hook
        return run.steps(range(4, 8))


def load_and_go_on(folder: Path, options: Setup) -> list[Tensor]:
    with accelerator(**SETUP) as acc:
        run = Run(enable(acc, bucket_mb=0.002, **options))
        run.steps(range(10, 12))
        acc.step = 17  # as on a rank that was not there
        acc.load_state(folder)
        assert acc.step == 4 and len(acc._optimizers) == 2
        return run.steps(range(4, 8))


def test_a_run_goes_on(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_on_ranks(2, save_and_go_on, tmp_path / "state")
    for options in ({"stage": 0}, {"stage": 2, "share_parameters": True}):
        for want, got in zip(expected, run_on_ranks(2, load_and_go_on, tmp_path / "state", options), strict=True):
            assert all(map(torch.equal, want, got))


def on_other_ranks(folder: Path) -> list[Tensor]:
    """What was loaded, and that it trains."""
    with accelerator(**SETUP) as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        acc.load_state(folder)
        loaded = [*values(run.net), *values(run.other)]
        before = acc.step
        run.steps(range(4, 8))
        assert (before, acc.step) == (4, 8)
        return loaded


def test_a_run_goes_on_with_other_ranks(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, save_and_go_on, tmp_path / "state")
    (expected,) = run_on_ranks(1, on_other_ranks, tmp_path / "state")
    for got in run_on_ranks(3, on_other_ranks, tmp_path / "state"):
        assert all(map(torch.equal, expected, got))


def numbered(folder: Path) -> None:
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=2)
    with accelerator(project_config=project) as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        for number in range(3):
            run.steps(range(number, number + 1))
            acc.save_state()
        kept = values(run.net)
        run.steps(range(3, 4))
        acc.wait_for_everyone()
        if acc.is_main_process:
            assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint_1", "checkpoint_2"]
            (folder / "checkpoints" / "checkpoint_3").mkdir()  # one that was broken off
        acc.wait_for_everyone()
        acc.load_state()
        assert all(map(torch.equal, kept, values(run.net)))


def test_checkpoints_are_numbered_and_the_oldest_go(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, numbered, tmp_path)


def with_ddp(folder: Path) -> list[Tensor]:
    with accelerator(**SETUP) as acc:
        run = Run(acc)
        run.steps(range(4))
        acc.save_state(str(folder))
        return run.steps(range(4, 8))


def from_ddp(folder: Path) -> list[Tensor]:
    with accelerator(**SETUP) as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        acc.load_state(folder)
        return run.steps(range(4, 8))


def test_a_run_under_ddp_goes_on_with_zeroopt(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_on_ranks(2, with_ddp, tmp_path)
    for want, got in zip(expected, run_on_ranks(2, from_ddp, tmp_path), strict=True):
        for number, (a, b) in enumerate(zip(want, got, strict=True)):
            assert_close(a, b, SUM_ORDER_ULPS, f"value {number}")  # the fused kernel rounds otherwise


def with_hooks(folder: Path) -> None:
    """As diffusers does: the main process takes the weights that it saves itself off the list."""
    with accelerator() as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        frozen: Any = acc.prepare(layers(1).requires_grad_(False))
        seen: list[Any] = []

        def saving(models: list[nn.Module], weights: list[Any], _: str) -> None:
            seen.append((list(models), [list(one) for one in weights]))
            if acc.is_main_process:
                del weights[1]

        def loading(models: list[nn.Module], _: str) -> None:
            seen.append(list(models))

        acc.register_save_state_pre_hook(saving)
        acc.register_load_state_pre_hook(loading)
        run.steps(range(2))
        acc.save_state(str(folder))
        acc.wait_for_everyone()
        assert seen[0] == (
            [run.model, run.second, frozen],
            [[*net.state_dict()] for net in (run.net, run.other, frozen)],
        )
        assert (folder / "model.safetensors").exists()  # of the frozen one
        expected = values(run.net)
        with torch.no_grad():
            frozen[0].weight.zero_()
        run.steps(range(2, 3))
        acc.load_state(folder)
        assert seen[1] == [run.model, run.second, frozen]
        assert all(map(torch.equal, expected, values(run.net)))
        assert frozen[0].weight.any()


def test_hooks_see_all_models(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, with_hooks, tmp_path)


def what_is_trained(folder: Path) -> None:
    with accelerator() as acc:
        enable(acc)
        net = layers()
        net[0].requires_grad_(False)
        model, optimizer = acc.prepare(net, torch.optim.SGD(net[1:].parameters(), lr=0.1))
        acc.backward(model(inputs(0, 4, WIDTH)).square().mean())
        optimizer.step()
        acc.save_state(str(folder), trained_only=True)
        expected = values(net)
        with torch.no_grad():
            net[0].weight.zero_()
            net[1].weight.zero_()
        with pytest.raises(zeroopt.CheckpointError, match=r"0\.weight"):
            acc.load_state(folder)
        acc.load_state(folder, trained_only=True)
        got = values(net)
        assert not got[0].any() and all(map(torch.equal, got[1:], expected[1:]))


def test_what_is_trained_alone(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, what_is_trained, tmp_path)


def incomplete(folder: Path) -> None:
    with accelerator() as acc:
        enable(acc)
        net = layers()
        acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        acc.save_state(str(folder))
        Run(acc)
        with pytest.raises(zeroopt.CheckpointError, match="holds 1 of 3 wrapped models, and not zeroopt_1"):
            acc.load_state(folder)


def test_a_checkpoint_of_fewer_models_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, incomplete, tmp_path)


def over_each_other(folder: Path) -> None:
    with accelerator() as acc:
        plain = Run(acc)
        plain.steps(range(2))
        acc.save_state(str(folder))
    with accelerator() as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        run.steps(range(3))
        acc.save_state(str(folder))
        acc.wait_for_everyone()
        left = {path.name for path in folder.iterdir()}
        assert {"zeroopt_0", "zeroopt_1"} <= left
        assert not [name for name in left if name.startswith(("model", "optimizer"))]
        expected = [*values(run.net), *values(run.other)]
        run.steps(range(3, 4))
        acc.load_state(folder)
        assert all(map(torch.equal, expected, [*values(run.net), *values(run.other)]))
        acc.save_model(run.model, folder)  # only weights: nobody asked for another checkpoint
        acc.wait_for_everyone()
        acc.load_state(folder)
        acc.save_state(str(folder))
        acc.wait_for_everyone()
        assert (folder / "model.safetensors").exists()
    with accelerator() as acc:
        Run(acc)
        acc.save_state(str(folder))
    with accelerator() as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        before = [one.clone() for one in values(run.net)]
        with pytest.raises(zeroopt.CheckpointError, match=r"two checkpoints.*zeroopt_0.*optimizer_1\.bin"):
            acc.load_state(folder)
        assert all(map(torch.equal, before, values(run.net)))


def test_one_checkpoint_over_another(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, over_each_other, tmp_path / "state")


def numbered_without_zeroopt(folder: Path) -> None:
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
    with accelerator(project_config=project) as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        run.steps(range(1))
        acc.save_state()
    with accelerator(project_config=project) as acc:
        run = Run(acc)
        run.steps(range(3))
        acc.save_state()
        expected = values(run.net)
    with accelerator(project_config=project) as acc:
        run = Run(enable(acc, bucket_mb=0.001))
        acc.load_state()
        assert all(map(torch.equal, expected, values(run.net)))
        acc.wait_for_everyone()
        if acc.is_main_process:
            (folder / "checkpoints" / "checkpoint_1" / "random_states_0.pkl").unlink()  # broken off before
        acc.wait_for_everyone()
        acc.load_state()
        assert not torch.equal(expected[0], values(run.net)[0])


def test_the_newest_checkpoint_may_be_one_without_zeroopt(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, numbered_without_zeroopt, tmp_path)


def more_than_prepared(folder: Path) -> None:
    with accelerator() as acc:
        Run(enable(acc))
        acc.save_state(str(folder))
    with accelerator() as acc:
        enable(acc)
        net = layers()
        acc.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        with pytest.raises(zeroopt.CheckpointError, match="holds 2 wrapped models, and 1 are prepared"):
            acc.load_state(folder)
        acc.save_state(str(folder))
        acc.wait_for_everyone()
        assert [path.name for path in folder.glob("zeroopt_*")] == ["zeroopt_0"]


def test_a_checkpoint_of_more_models_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, more_than_prepared, tmp_path)


def on_each_node(folder: Path) -> None:
    with accelerator(project_config=ProjectConfiguration(str(folder), save_on_each_node=True)) as acc:
        Run(enable(acc))
        with pytest.raises(zeroopt.ConfigError, match="with save_on_each_node"):
            acc.save_state(str(folder / "state"))
        assert not (folder / "state").exists()


def test_saving_on_each_node_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, on_each_node, tmp_path)
