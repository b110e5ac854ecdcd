"""Methods that are called back without keeping their object alive."""

from __future__ import annotations

import weakref
from functools import partialmethod

import pytest

from zeroopt.weak_methods import weak_call, weak_method


class Owner:
    """Adds."""

    def add(self, one: int, other: int = 1) -> int:
        return one + other

    add_two = partialmethod(add, 2)

    @staticmethod
    def double(one: int) -> int:
        return 2 * one


def test_it_is_the_method_for_as_long_as_there_is_the_object() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    add = weak_method(owner.add)
    assert add(1) == 2 and add(1, other=4) == 5
    del owner
    assert gone() is None
    with pytest.raises(ReferenceError, match=r"Owner\.add was called, and its object is gone"):
        add(1)


def test_what_is_called_by_its_name_need_not_be_an_ordinary_method() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    calls = {name: weak_call(owner, name) for name in ("add", "add_two", "double")}
    assert [calls["add"](1, other=4), calls["add_two"](5), calls["double"](3)] == [5, 7, 6]
    del owner
    assert gone() is None
    with pytest.raises(ReferenceError, match=r"Owner\.double was called, and its object is gone"):
        calls["double"](3)
