"""What an Accelerator's methods do with wrapped models is what they do with DistributedDataParallel."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from follow import WIDTH, inputs, layers, values
from torch import Tensor, nn
from ulps import assert_close
from worker_pool import RunOnRanks, forget_compiled_code

import zeroopt

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, TorchDynamoPlugin
from accelerators import accelerator, as_started
from safetensors.torch import load_file

from zeroopt.integrations.accelerate import ZeroAccelerator, enable

Options = dict[str, Any]
Scenario = Callable[[Accelerator], Iterable[Tensor]]


def follow_ddp(scenario: Scenario, setup: Options, ulps: int = 0, **options: Any) -> None:
    """What a scenario gives with an Accelerator, it gives with one that goes on with zeroopt."""
    with accelerator(**setup) as acc:
        expected = list(scenario(acc))
    for stage in (0, 2):
        with accelerator(**setup) as acc:
            got = list(scenario(enable(acc, stage=stage, fused=False, bucket_mb=0.001, **options)))
        for number, (want, have) in enumerate(zip(expected, got, strict=True)):
            assert_close(want, have, ulps, f"stage {stage}, value {number}")


def prepared(acc: Accelerator, net: nn.Module) -> tuple[nn.Module, Any]:
    return acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))  # type: ignore[no-any-return]


def clipped(acc: Accelerator) -> list[Tensor]:
    net = layers()
    model, optimizer = prepared(acc, net)
    seen = []
    for number in range(4):
        acc.backward(model(inputs(number, 4, WIDTH)).square().mean())
        if number % 2:
            acc.clip_grad_value_(model.parameters(), 0.01)
        seen.append(acc.clip_grad_norm_(model.parameters(), 0.05))
        if number > 1:  # in part
            seen.append(acc.clip_grad_norm_([*model.parameters()][:3], 0.01, norm_type=3))
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *values(net)]


def test_clipping(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_ddp, clipped, {}, ulps=4)


def accumulated(acc: Accelerator) -> list[Tensor]:
    net = layers()
    loader = torch.utils.data.DataLoader([inputs(number, WIDTH) for number in range(20)], batch_size=2)
    model, optimizer = prepared(acc, net)
    loader = acc.prepare(loader)
    for _ in range(2):
        for batch in loader:  # 5 a rank: the last one synchronizes, whatever its number
            with acc.accumulate(model):
                acc.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    with acc.no_sync(model):
        losses = [model(inputs(number, 4, WIDTH)).square().mean() for number in range(2)]
        acc.backward(losses[0])
    with acc.trigger_sync_in_backward(model):
        acc.backward(losses[1])
    optimizer.step()
    return values(net)


@pytest.mark.parametrize("sync_each_batch", [False, True])
def test_accumulation(run_on_ranks: RunOnRanks, sync_each_batch: bool) -> None:
    plugin = GradientAccumulationPlugin(num_steps=3, sync_each_batch=sync_each_batch)
    # Where each batch is summed over ranks by itself, DDP adds means, and a shard adds sums.
    run_on_ranks(2, follow_ddp, accumulated, {"gradient_accumulation_plugin": plugin}, ulps=4 * sync_each_batch)


def synchronized_within_no_sync(acc: Accelerator) -> list[Tensor]:
    net = layers()
    model, optimizer = prepared(acc, net)
    for number in range(2):
        with acc.no_sync(model):
            acc.backward(model(inputs(number, 4, WIDTH)).square().mean())
            loss = model(inputs(number + 2, 4, WIDTH)).square().mean()
            with acc.trigger_sync_in_backward(model):
                acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return values(net)


def test_a_backward_within_no_sync_is_made_to_synchronize(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_ddp, synchronized_within_no_sync, {})


def in_half(acc: Accelerator) -> list[Tensor]:
    net = layers()
    model, optimizer = prepared(acc, net)
    seen = []
    for number in range(4):
        output = model(inputs(number, 4, WIDTH))
        assert output.dtype is torch.float32
        acc.backward(output.square().mean())
        seen.append(output.detach())
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(seen[0], net(inputs(0, 4, WIDTH)))
    plain = acc.unwrap_model(model, keep_fp32_wrapper=False)
    assert plain(inputs(0, 4, WIDTH).bfloat16().to(plain[0].weight.dtype)).dtype is plain[0].weight.dtype
    return [*seen, *values(net)]


def test_autocast_is_where_accelerate_puts_it(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_ddp, in_half, {"mixed_precision": "bf16"})


def with_bfloat16_parameters() -> None:
    with accelerator(mixed_precision="bf16") as acc:
        enable(acc, param_dtype=torch.bfloat16, master_weights="remainder")
        (*_, weight, _) = in_half(acc)
        assert weight.dtype is torch.bfloat16


def test_parameters_in_bfloat16_under_autocast(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, with_bfloat16_parameters)


def scaled(acc: Accelerator) -> list[Tensor]:
    """Accelerate has no scaler on the CPU by itself."""
    acc.scaler, acc.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2), True
    acc.state._mixed_precision = "fp16"
    net = layers()
    model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    scheduler = acc.prepare(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, 0.5))
    seen, skipped = [], []
    for number in range(6):
        loss = model(inputs(number, 4, WIDTH)).float().square().mean()
        acc.backward(loss * (torch.inf if number == 2 and acc.process_index == 1 else 1))
        if number % 2:
            seen.append(acc.clip_grad_norm_(model.parameters(), 0.05))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped.append(acc.optimizer_step_was_skipped)
        seen += [torch.tensor([acc.scaler.get_scale(), *scheduler.get_last_lr()])]
    assert skipped == [False, False, True, False, False, False]
    return [*seen, *values(net)]


def test_grad_scaler(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_ddp, scaled, {}, ulps=4)


class Noted(nn.Module):
    """Normalizes over batches, and has a buffer that differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))  # type: ignore[no-any-return]


def with_buffers(acc: Accelerator) -> list[Tensor]:
    torch.manual_seed(0)
    net = Noted()
    model, optimizer = prepared(acc, net)
    for number in range(3):
        acc.backward(model(inputs(number, 4, WIDTH)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return [*values(net), net.norm.running_mean]  # type: ignore[list-item]


@pytest.mark.parametrize("broadcast", [True, False])
def test_options_for_ddp_hold_for_zeroopt(run_on_ranks: RunOnRanks, broadcast: bool) -> None:
    options = DistributedDataParallelKwargs(broadcast_buffers=broadcast, find_unused_parameters=True)
    run_on_ranks(2, follow_ddp, with_buffers, {"kwargs_handlers": [options]})


def compiled(acc: Accelerator) -> list[Tensor]:
    net = layers()
    model, optimizer = prepared(acc, net)
    for number in range(3):
        acc.backward(model(inputs(number, 4, WIDTH)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(acc, ZeroAccelerator):
        assert net._compiled_call_impl is not None or net[0]._compiled_call_impl is not None
        assert model.state_dict().keys() == net.state_dict().keys() == layers().state_dict().keys()
        assert acc.unwrap_model(model) is net
    forget_compiled_code()
    return values(net)


@pytest.mark.parametrize("by_region", [False, True])
def test_what_is_compiled(run_on_ranks: RunOnRanks, by_region: bool) -> None:
    plugin = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=by_region)
    run_on_ranks(2, follow_ddp, compiled, {"dynamo_plugin": plugin}, timeout=180.0)


def evaluated_first(by_region: bool) -> None:
    plugin = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=by_region)
    with accelerator(dynamo_plugin=plugin) as acc:
        enable(acc, fused=False)
        net = layers()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        assert acc.prepare_model(net, evaluation_mode=True) is net
        with torch.no_grad():
            net(inputs(0, 4, WIDTH))
        model, stepping = acc.prepare(net, optimizer)
        assert acc._models == [model] and model.module is net
        acc.backward(model(inputs(0, 4, WIDTH)).square().mean())
        stepping.step()
    forget_compiled_code()


@pytest.mark.parametrize("by_region", [False, True])
def test_what_is_compiled_may_be_evaluated_first(run_on_ranks: RunOnRanks, by_region: bool) -> None:
    run_on_ranks(2, evaluated_first, by_region, timeout=180.0)


def uneven(acc: Accelerator) -> list[Tensor]:
    net = layers()
    samples = [inputs(number, WIDTH) for number in range(7)]  # 4 for rank 0, 3 for rank 1
    model, optimizer = prepared(acc, net)
    loader = acc.prepare(torch.utils.data.DataLoader(samples, batch_size=1))
    count = 0
    if isinstance(acc, ZeroAccelerator):
        context = acc.join_uneven_inputs([model, optimizer], even_batches=False)
    else:  # which leaves the CPU out
        loader.batch_sampler.even_batches = False
        context = model.join()
    with context:
        for batch in loader:
            acc.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            count += 1
    assert count == 4 - acc.process_index
    if isinstance(acc, ZeroAccelerator):
        assert loader.batch_sampler.even_batches
        assert len(list(loader)) == 4
    return values(net)


def test_uneven_inputs(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_ddp, uneven, {})


def uneven_in_vain() -> None:
    with accelerator() as acc:
        enable(acc)
        model, optimizer = prepared(acc, layers())
        other, _ = prepared(acc, layers())
        with (
            pytest.raises(zeroopt.ConfigError, match="expected one prepared model"),
            acc.join_uneven_inputs([model, other], even_batches=False),
        ):
            pass
        with acc.join_uneven_inputs([model, optimizer]):  # even
            acc.backward(model(inputs(0, 4, WIDTH)).square().mean())
            optimizer.step()


def test_only_one_model_joins(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, uneven_in_vain)


def written_weights(folder: Path) -> None:
    with accelerator() as acc:
        enable(acc, bucket_mb=0.001)
        net = layers()
        net[2].weight = net[0].weight  # tied
        model, optimizer = prepared(acc, net)
        acc.backward(model(inputs(0, 4, WIDTH)).square().mean())
        optimizer.step()
        state = acc.get_state_dict(model)
        assert state.keys() == net.state_dict().keys() == acc.get_state_dict(model, unwrap=False).keys()
        storages = {value.untyped_storage().data_ptr(): value for value in state.values()}
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
        assert len(storages) == len(state) - 1
        acc.save_model(model, folder)
        acc.wait_for_everyone()
        written = load_file(folder / "model.safetensors")
        assert written.keys() == state.keys() - {"2.weight"}
        assert all(torch.equal(value, state[name]) for name, value in written.items())


def test_weights_are_written_as_of_any_model(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, written_weights, tmp_path)


class Own(Accelerator):  # type: ignore[misc]
    """Somebody's own."""


class Zero(ZeroAccelerator):
    """Somebody's own, on top of zeroopt's."""


def made_directly() -> None:
    for kind in (ZeroAccelerator, Zero):
        with as_started():
            acc = kind(cpu=True)
            copied, pickled = copy.copy(acc), pickle.loads(pickle.dumps(acc))
            assert type(copied) is type(pickled) is kind
            assert enable(acc) is acc and type(acc) is kind
            assert acc.zeroopt_options == copied.zeroopt_options == pickled.zeroopt_options == {"stage": 2}
            model, optimizer = prepared(acc, layers())
            acc.backward(model(inputs(0, 4, WIDTH)).square().mean())
            optimizer.step()


def test_one_that_is_made_directly(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, made_directly)


def made_and_copied() -> None:
    with accelerator() as acc:
        enable(acc, state_dtype=torch.bfloat16)
        assert type(acc) is ZeroAccelerator
        again = pickle.loads(pickle.dumps(acc))
        assert type(again) is ZeroAccelerator and again.zeroopt_options == acc.zeroopt_options
    with accelerator() as acc:
        acc.__class__ = Own
        enable(acc)
        again = pickle.loads(pickle.dumps(acc))
        assert isinstance(acc, Own) and type(acc) is not Own and type(again) is type(acc) is type(copy.copy(acc))


def test_an_accelerator_stays_what_it_was(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(1, made_and_copied)
