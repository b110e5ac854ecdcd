"""Parameters on their way: whoever uses one first, in whatever manner, sees the updated values."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scripts import run_scripts
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.dlpack import from_dlpack, to_dlpack
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.collectives.messages import Messages
from zeroopt.parameters.arriving import ArrivingParameter


class Net(nn.Module):
    """Layers in several buckets, and a parameter that forward uses without its module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        self.unused_forward = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.layers(x), self.unused_forward.weight)


def wrapped(**options: Any) -> tuple[Net, zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    torch.manual_seed(0)
    net = Net()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.1), bucket_mb=0.004, **options)
    return net, model, optimizer


def inputs() -> Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(7))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(inputs()).square().mean().backward()
    optimizer.step()


def through_module(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def through_references(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    return [p + 0 for p in held]


def through_state_dict(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


def through_average(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    average = AveragedModel(net)
    average.update_parameters(net)
    return list(average.module.parameters())


def through_foreach(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    return list(torch._foreach_add(held, 0))


def through_numpy(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    return [torch.from_numpy(p.detach().numpy().copy()) for p in held]


def through_text(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    texts = [repr(p) for p in held]
    assert all(text.startswith("Parameter containing") for text in texts)
    return [p.detach().clone() for p in held]


def through_deepcopy(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    twin = copy.deepcopy(net)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    return list(twin.parameters())


def through_pickle(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    copies = [pickle.loads(pickle.dumps(p)) for p in held]
    assert all(type(p) is nn.Parameter for p in copies)
    return copies


def through_norm(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    torch.nn.utils.parameters_to_vector(held)
    return [p.detach().clone() for p in held]


class HandedOver(torch.autograd.Function):
    """How ORTModule reads parameters: all of them in its own forward, past those of the layers, by compiled code that waits for nothing.
    It first asks each whether it is contiguous."""

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> tuple[Tensor, ...]:
        return tuple(from_dlpack(to_dlpack(p)).clone() for p in params if p.is_contiguous())


def through_dlpack(net: Net, held: list[nn.Parameter]) -> list[Tensor]:
    return list(HandedOver.apply(*held))


READERS: dict[str, Callable[[Net, list[nn.Parameter]], list[Tensor]]] = {
    name.removeprefix("through_"): function for name, function in list(globals().items()) if name.startswith("through_")
}


def read_after_step(reader: str, options: dict[str, Any]) -> bool:
    """Rank 1 is late with its part of the step, and rank 0 reads at once."""
    net, model, optimizer = wrapped(**options)
    reference, plain_model, plain_optimizer = wrapped(overlap=False)
    held, waited_for = list(net.parameters()), True
    store = dist.distributed_c10d._get_default_store()
    for number in range(3):
        step(plain_model, plain_optimizer)
        if dist.get_rank() == 1:
            delay_the_last_gather(optimizer, partial(store.wait, [f"rank 0 reads {number}"]))
        step(model, optimizer)
        if dist.get_rank() == 0:
            waited_for &= number == 0 or any(isinstance(p, ArrivingParameter) for p in held)
            store.set(f"rank 0 reads {number}", "")
        seen = READERS[reader](net, held)
        assert all(torch.equal(a, b) for a, b in zip(seen, reference.parameters(), strict=True)), reader
        assert all(type(p) is nn.Parameter for p in held)
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
    return waited_for


def delay_the_last_gather(optimizer: zeroopt.ZeroOptimizer, wait: Callable[[], object]) -> None:
    """Wait between this rank's first gather of the next step and the others."""
    gathers = optimizer._gathers
    start, started = type(gathers).start, []

    def start_late(bucket: Any, readers: Any) -> None:
        if started:
            wait()
        started.append(bucket)
        start(gathers, bucket, readers)

    gathers.start = start_late  # type: ignore[method-assign]


@pytest.mark.parametrize("reader", READERS)
def test_any_use_sees_updated_values(run_on_ranks: RunOnRanks, reader: str) -> None:
    assert run_on_ranks(2, read_after_step, reader, {"transport": "shm"})[0], (
        "nothing was on its way: this tested nothing"
    )


@pytest.mark.parametrize("options", [{"transport": "pairwise"}, {"share_parameters": True}, {"stage": 1}])
def test_under_every_transport(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    assert run_on_ranks(2, read_after_step, "references", options)[0]


def metadata_keeps_waiting() -> list[str]:
    """Shapes, gradients and hashes can be asked for without waiting for values."""
    _, model, optimizer = wrapped()
    step(model, optimizer)
    step(model, optimizer)  # the first one may plan the buckets anew, for which it waits
    params = list(model.parameters())
    optimizer.zero_grad()
    facts = [(p.shape, p.dtype, p.device, p.grad, p.requires_grad, p.numel(), hash(p), p in {p}) for p in params]
    assert all(fact[3] is None for fact in facts)
    return [type(p).__name__ for p in params]


def test_metadata_does_not_wait(run_on_ranks: RunOnRanks) -> None:
    for names in run_on_ranks(2, metadata_keeps_waiting):
        assert set(names) == {"ArrivingParameter"}


def write_after_step(transport: str) -> list[Tensor]:
    """Every rank changes its parameters in place right after the step: no rank may see another's change twice."""
    net, model, optimizer = wrapped(transport=transport)
    for _ in range(3):
        step(model, optimizer)
        with torch.no_grad():
            for param in net.parameters():
                param.mul_(0.5)
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_parameters_may_be_changed_right_after_the_step(run_on_ranks: RunOnRanks, transport: str) -> None:
    first, second = run_on_ranks(2, write_after_step, transport)
    expected, _ = run_on_ranks(2, write_after_step, "torch")
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-6)


def one_rank_reads(transport: str) -> bool:
    """One rank alone may use the parameters while the others wait for it: no help of theirs is needed."""
    net, model, optimizer = wrapped(transport=transport)
    for _ in range(2):
        step(model, optimizer)
        if dist.get_rank() == 0:
            net(inputs())
            net.state_dict()
        dist.barrier()
    return True


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_one_rank_may_read_alone(run_on_ranks: RunOnRanks, transport: str) -> None:
    assert run_on_ranks(2, one_rank_reads, transport) == [True, True]


def use_without_wrapper() -> bool:
    """The bare model is there after the wrapped one and its optimizer are gone."""
    net, model, optimizer = wrapped()
    reference, plain_model, plain_optimizer = wrapped(overlap=False)
    step(plain_model, plain_optimizer)
    step(model, optimizer)
    del model, optimizer
    return torch.equal(net(inputs()), reference(inputs()))


def test_the_bare_model_outlives_its_wrapper(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, use_without_wrapper) == [True, True]


class ShapedParameter(nn.Parameter):
    """A user's own class of parameters."""


def own_parameter_class() -> bool:
    net = nn.Linear(8, 8)
    net.weight = ShapedParameter(net.weight.data)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()))
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    return type(net.weight) is ShapedParameter and type(net.bias) is nn.Parameter


def test_a_class_of_parameters_is_left_alone(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, own_parameter_class) == [True, True]


def train_scripted() -> bool:
    """Compiled code reads parameters past Python: there the step waits for all."""
    torch.manual_seed(0)
    net = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()))
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    return all(type(p) is nn.Parameter for p in net.parameters())


def test_scripted_modules_are_not_kept_waiting_for(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, train_scripted) == [True, True]


def pickle_copies() -> bool:
    """Copies of a wrapped model are models like any other."""
    net, model, optimizer = wrapped()
    step(model, optimizer)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    again = copy.deepcopy(pickle.loads(pickle.dumps(twin)))
    return torch.equal(again(inputs()), net(inputs()))


def test_copies_can_be_pickled(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, pickle_copies) == [True, True]


def nothing_travels(stage: int) -> bool:
    net, model, optimizer = wrapped(stage=stage)
    step(model, optimizer)
    hooks = sum(len(module._forward_pre_hooks) for module in net.modules())
    return hooks == 0 and all(type(p) is nn.Parameter for p in net.parameters())


def test_where_nothing_travels_nothing_waits(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(1, nothing_travels, 2) == [True]
    assert run_on_ranks(2, nothing_travels, 0) == [True, True]


def unfinished_after(models: int, *, reads: bool) -> int:
    """Messages that are kept because nobody has waited for them. A thread may have yet to come to those that were dropped."""
    for _ in range(models):
        net, model, optimizer = wrapped(transport="pairwise")
        for _ in range(2):
            step(model, optimizer)
            optimizer.zero_grad()
        if reads:
            net.state_dict()
        del net, model, optimizer
        gc.collect()
    deadline = time.monotonic() + 300
    while Messages.unfinished and time.monotonic() < deadline:
        time.sleep(0.001)
    return len(Messages.unfinished)


@pytest.mark.parametrize("reads", [False, True])
def test_no_message_outlives_its_model(run_on_ranks: RunOnRanks, reads: bool) -> None:
    """Also of parameters that nobody has read since the last step."""
    assert run_on_ranks(2, unfinished_after, 3, reads=reads) == [0, 0]


def main(init_method: str) -> None:
    """One rank of `test_a_rank_may_end_while_another_is_late`."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=2)
    net, model, optimizer = wrapped(transport="pairwise")
    for number in range(3):
        model(inputs()).square().mean().backward()
        if rank == 0 and number == 2:
            time.sleep(1.0)  # rank 1 is through with the last step by then
        optimizer.step()
    if rank == 0:
        net.state_dict()
        print("saved", flush=True)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_rank_may_end_while_another_is_late(tmp_path: Path) -> None:
    """Rank 0 saves after the last step, the others have nothing more to do."""
    first, second = run_scripts(2, tmp_path, __file__, f"file://{tmp_path}/group")
    assert first.output == "saved\n"
    assert (first.returncode, second.returncode) == (0, 0), (first, second)


if __name__ == "__main__":
    main(sys.argv[1])
