"""Options are those of `wrap`, refused as it refuses them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import zeroopt
from zeroopt.errors import ConfigError, NotSupportedError
from zeroopt.options.precision import Precision
from zeroopt.planner.estimator import Estimator, config_of, default_host_ranks
from zeroopt.planner.rehearsal import Cluster


def estimator(optimizer: Any = torch.optim.AdamW) -> Estimator:
    net = nn.Linear(64, 64, device="meta")
    return Estimator(net, optimizer, Cluster(4, 4), None, None, None)


def test_what_is_not_given_is_as_in_wrap() -> None:
    config = config_of({"state_dtype": torch.int8, "stage": 1})
    assert config.precision == Precision(state_dtype=torch.int8)
    assert config.stage == 1
    defaults = inspect.signature(zeroopt.wrap).parameters
    for name in ("bucket_mb", "bucket_buffers", "overlap", "transport", "fused"):
        assert getattr(config, name) == defaults[name].default


def test_unknown_options_are_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="zeroopt.wrap has no option buckets; it has .*bucket_mb"):
        config_of({"buckets": 3})


@pytest.mark.parametrize(
    ("optimizer", "options", "error"),
    [
        (torch.optim.AdamW, {"stage": 3}, ConfigError),
        (torch.optim.AdamW, {"master_weights": "none"}, ConfigError),
        (torch.optim.AdamW, {"stage": 0, "reduce_dtype": torch.bfloat16}, NotSupportedError),
        (torch.optim.Adadelta, {"state_dtype": torch.int8}, ConfigError),
    ],
)
def test_what_wrap_refuses_is_refused(optimizer: Any, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        estimator(optimizer).variant(options)


def test_optimizers_are_given_made_or_to_be_made() -> None:
    net = nn.Linear(64, 64, device="meta")
    makers: list[Any] = [
        torch.optim.AdamW(net.parameters()),
        torch.optim.AdamW,
        lambda params: torch.optim.AdamW(params, lr=1e-3),
    ]
    states = {
        Estimator(net, make, Cluster(2, 2), None, None, None).variant({}).phase("step").parts["state"]
        for make in makers
    }
    assert len(states) == 1


def test_activations_that_were_measured_are_taken_as_they_are() -> None:
    net = nn.Linear(64, 64, device="meta")
    variant = Estimator(net, torch.optim.AdamW, Cluster(2, 2), None, None, 12_345_678).variant({})
    assert variant.phase("forward and backward").parts["activations"] == 12_345_678
    assert variant.peak_of_training.name == "forward and backward"
    assert variant.training_peak == variant.phase("forward and backward").total


def test_checkpoints_are_no_part_of_the_peak_of_training() -> None:
    variant = estimator().variant({})
    assert variant.phase("loading").total > variant.training_peak


@pytest.mark.parametrize(("ranks", "expected"), [(1, 1), (2, 2), (8, 8), (12, 6), (400, 8), (7, 7), (11, 1)])
def test_hosts_have_as_many_ranks_each(ranks: int, expected: int) -> None:
    assert default_host_ranks(ranks) == expected
