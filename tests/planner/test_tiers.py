"""Tiers go by names, and options read as they are written in a call."""

from __future__ import annotations

import pytest
import torch

from zeroopt.planner.estimator import config_of
from zeroopt.planner.tiers import TIERS, describe, tier_of


@pytest.mark.parametrize("name", TIERS)
def test_each_tier_is_one_that_can_be_wrapped_with_and_is_known_by_its_options(name: str) -> None:
    config_of(TIERS[name])
    assert tier_of({"stage": 1, **TIERS[name]}) == name


def test_defaults_that_are_given_are_the_plain_tier() -> None:
    assert tier_of({"param_dtype": None, "master_weights": "float32", "state_dtype": torch.float32}) == "float32"


def test_a_tier_without_a_name_is_described() -> None:
    assert tier_of({"param_dtype": torch.float16}) == "param_dtype=torch.float16"


def test_options_read_as_in_a_call() -> None:
    options = {"stage": 2, "transport": "shm", "state_dtype": torch.int8}
    assert describe(options) == "stage=2, transport='shm', state_dtype=torch.int8"
