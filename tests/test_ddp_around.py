"""DistributedDataParallel around a wrapped model is refused where it would average gradients a second time, and only there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import batch, build, loss_of, optimizer_for
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.ddp_around import check_ddp_around, refuse_ddp_around


class Outer:
    """A DistributedDataParallel in whose forward one is."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._module_parameters = params


def params(count: int) -> list[nn.Parameter]:
    """All of the same value, which must not be taken for one another."""
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


@pytest.fixture(autouse=True)
def no_active_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", None)
    yield


def test_outside_of_its_forward_nothing_is_wrong() -> None:
    check_ddp_around(params(2))


def test_one_that_averages_other_parameters_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", Outer(params(2)))
    check_ddp_around(params(2))
    check_ddp_around([])


def test_one_common_parameter_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    own = params(3)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", Outer([*params(1), own[2]]))
    with pytest.raises(zeroopt.ConfigError, match="put into DistributedDataParallel"):
        check_ddp_around(iter(own))
    check_ddp_around(own[:2])


def test_the_way_out_is_named() -> None:
    with pytest.raises(zeroopt.ConfigError, match="zeroopt averages gradients itself.*zeroopt.unwrap"):
        refuse_ddp_around()


def test_a_torch_that_does_not_tell_of_its_forward_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DistributedDataParallel, "_active_ddp_module")
    check_ddp_around(params(1))


def ddp_around() -> None:
    """Around the wrapped model, around a larger one, and around one that leaves the wrapped part out."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net))
    with pytest.raises(zeroopt.ConfigError, match="DistributedDataParallel"):
        DistributedDataParallel(model)
    larger = nn.Sequential(model, nn.Linear(5, 2))
    with pytest.raises(zeroopt.ConfigError, match="DistributedDataParallel"):
        DistributedDataParallel(larger)(batch("mlp", 0))
    larger._ddp_params_and_buffers_to_ignore = [f"0.{name}" for name, _ in net.named_parameters()]
    around = DistributedDataParallel(larger)
    loss_of(around(batch("mlp", 0))).backward()
    optimizer.step()


def test_ddp_around_a_wrapped_model_is_refused(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, ddp_around)


def test_who_goes_through_all_attributes_is_no_ddp() -> None:
    net = build("mlp")
    model, _ = zeroopt.wrap(net, optimizer_for("sgd", net))
    members = dict(inspect.getmembers(model))
    assert "_ddp_params_and_buffers_to_ignore" not in members and members["module"] is net
