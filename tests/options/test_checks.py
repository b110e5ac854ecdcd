"""What options are checked for: values of the right type, counted steps, and texts that are the same on every rank."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from zeroopt import ConfigError
from zeroopt.options.checks import as_text, check_every_so_many_steps, check_one_of


class Made:
    """What is called is an object."""

    def __call__(self) -> None:
        pass

    def method(self) -> None:
        pass


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (1, (0, 1, 2)),
        (True, (True, False)),
        ("auto", (True, False, "auto")),
        (None, (None, torch.bfloat16)),
        (torch.bfloat16, (None, torch.bfloat16)),
    ],
)
def test_one_of_several_values(value: object, allowed: tuple[object, ...]) -> None:
    check_one_of("stage", value, allowed)


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (True, (0, 1)),
        (1.0, (0, 1)),
        (0, (True, False)),
        (None, (0, 1)),
        ("", ("auto",)),
        (float("nan"), (0.0, float("nan"))),
        (1, ()),
    ],
)
def test_what_only_looks_like_one_of_them_is_refused(value: object, allowed: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError):
        check_one_of("stage", value, allowed)


def test_the_message_has_all_choices() -> None:
    with pytest.raises(ConfigError) as caught:
        check_one_of("stage", "2", (0, "auto", None))
    assert str(caught.value) == "expected stage to be one of 0, 'auto', None, got '2'"


@pytest.mark.parametrize("value", [None, 1, 10**9])
def test_numbers_of_steps(value: object) -> None:
    check_every_so_many_steps("check_every", value)


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", torch.tensor(1)])
def test_what_is_no_number_of_steps(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        check_every_so_many_steps("check_every", value)
    assert str(caught.value) == f"expected check_every to be a positive number of steps or None, got {value!r}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (25.0, "25.0"),
        (None, "None"),
        ("shm", "'shm'"),
        (torch.float16, "torch.float16"),
        (test_numbers_of_steps, f"{__name__}.test_numbers_of_steps"),
        (Made, f"{__name__}.Made"),
        (Made(), f"{__name__}.Made"),
        (Made().method, f"{__name__}.Made.method"),
        (functools.partial(print, 1), "functools.partial"),
    ],
)
def test_texts_have_no_addresses(value: Any, text: str) -> None:
    assert as_text(value) == text
