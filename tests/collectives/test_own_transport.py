"""Transports from outside of the package: one that does no more than it has to, and one that counts what another moves."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from training import batch, build, loss_of, optimizer_for
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.collectives import PendingCollective, Transport, Wire
from zeroopt.collectives.select import connect_transport
from zeroopt.collectives.wire import PLAIN

STEPS = 3


class Landed(PendingCollective):
    """A collective that was over when it was started."""

    def finish(self) -> None:
        pass


class PlainTransport(Transport):
    """Sends whole buckets to everyone, and waits for each at once: the two collectives that a transport has to have, as plainly
    as can be."""

    name = "plain"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.num_reduced = 0

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        everyone = self.control.gather(full, f"transport plain, reduce-scatter of {label}")
        wire.combine([self.own_slice(bucket) for bucket in everyone], out, base)
        self.num_reduced += 1
        return Landed()

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        slices = self.control.gather(self.own_slice(full), f"transport plain, all-gather of {label}")
        full.copy_(slices.view(-1))
        return Landed()


def plain(group: dist.ProcessGroup, device: torch.device) -> Transport:
    return PlainTransport(group)


def train(**options: Any) -> tuple[str, list[Tensor]]:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), bucket_mb=0.001, **options)
    for step in range(STEPS):
        loss_of(model(batch("mlp", step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    transport = model.replica.transport
    assert not isinstance(transport, PlainTransport) or transport.num_reduced >= STEPS
    return repr(optimizer), [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_transport_of_ones_own_trains_to_the_same_bits(run_on_ranks: RunOnRanks, stage: int, world_size: int) -> None:
    own = run_on_ranks(world_size, train, stage=stage, transport=plain)
    expected = run_on_ranks(world_size, train, stage=stage, transport="auto")
    for (text, params), (_, others) in zip(own, expected, strict=True):
        assert "transport=plain" in text
        assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


def give_something_else(
    at_rank: int | None, what: Any, group: dist.ProcessGroup, device: torch.device
) -> Transport | Any:
    if at_rank is None or group.rank() == at_rank:
        if isinstance(what, Exception):
            raise what
        return what
    return PlainTransport(group)


def give_one_of_another_group(group: dist.ProcessGroup, device: torch.device) -> Transport:
    return PlainTransport(dist.new_group([group.rank()], use_local_synchronization=True))


def refuse(factory: Any, **options: Any) -> None:
    net = build("mlp")
    before = [param.data_ptr() for param in net.parameters()]
    try:
        zeroopt.wrap(net, optimizer_for("adamw", net), transport=factory, **options)
    finally:
        assert [param.data_ptr() for param in net.parameters()] == before


def test_what_is_no_transport_is_refused(run_on_ranks: RunOnRanks) -> None:
    text = "expected transport=functools.partial to make a zeroopt.collectives.Transport, got int"
    nothing = run_on_ranks.outcomes(2, refuse, partial(give_something_else, None, 5))
    assert nothing == [RankError("ConfigError", text)] * 2
    assert run_on_ranks.outcomes(2, refuse, partial(give_something_else, 1, 5)) == [
        RankError("RankMismatchError", f"zeroopt.wrap failed on rank 1: {text}"),
        RankError("ConfigError", text),
    ]
    assert run_on_ranks.outcomes(2, refuse, partial(give_something_else, 0, OSError("no such card"))) == [
        RankError("OSError", "no such card"),
        RankError("RankMismatchError", "zeroopt.wrap failed on rank 0: no such card"),
    ]


def test_a_transport_of_another_group_is_refused(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks.outcomes(2, refuse, give_one_of_another_group)
    assert first == second
    assert "give_one_of_another_group to make a transport of the process group that it is given, of 2 ranks" in str(
        first
    )


def test_a_transport_that_shares_nothing_shares_no_parameters(run_on_ranks: RunOnRanks) -> None:
    text = "share_parameters=True needs ranks that share memory; transport 'plain' does not"
    outcomes = run_on_ranks.outcomes(2, refuse, plain, share_parameters=True)
    assert outcomes == [RankError("ConfigError", text)] * 2


def other(group: dist.ProcessGroup, device: torch.device) -> Transport:
    return PlainTransport(group)


def refuse_different() -> None:
    refuse([plain, other][dist.get_rank()])


def test_ranks_have_to_take_the_same_one(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks.outcomes(2, refuse_different)
    assert first == second
    assert "rank 0 has [option transport=" in str(first)
    assert "test_own_transport.other" in str(first)


def as_auto(group: dist.ProcessGroup, device: torch.device) -> Transport:
    return connect_transport("auto", group, device)


def test_a_factory_may_give_one_of_the_packages_own(run_on_ranks: RunOnRanks) -> None:
    for text, _ in run_on_ranks(2, train, transport=as_auto):
        assert "transport=shm" in text
