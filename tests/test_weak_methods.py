"""Methods that are called back without keeping their object alive."""

from __future__ import annotations

import weakref

import pytest

from zeroopt.weak_methods import weak_method


class Owner:
    """Adds."""

    def add(self, one: int, other: int = 1) -> int:
        return one + other


def test_it_is_the_method_for_as_long_as_there_is_the_object() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    add = weak_method(owner.add)
    assert add(1) == 2 and add(1, other=4) == 5
    del owner
    assert gone() is None
    with pytest.raises(ReferenceError, match=r"Owner\.add was called, and its object is gone"):
        add(1)
