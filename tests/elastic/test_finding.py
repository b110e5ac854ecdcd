"""The newest step that is whole, among what there is on all hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from zeroopt.elastic.finding import Lost, OnHost, choose, find, forget_all_but
from zeroopt.elastic.place import FileName
from zeroopt.elastic.slots import NOT_WHOLE, Slots

RUN = 5
A, B, C = FileName(RUN, 1, 2, 0), FileName(RUN, 1, 2, 1), FileName(RUN, 2, 1, 0)


def on_host(**steps: tuple[int, int]) -> dict[FileName, OnHost]:
    names = {"a": A, "b": B, "c": C}
    return {names[name]: OnHost(of, 10) for name, of in steps.items()}


def test_the_newest_that_all_have() -> None:
    both = on_host(a=(4, 3), b=(2, 3))
    found = choose([both, both], [[0, 1]])
    assert (found.step, found.names, found.last_layout, found.to_fetch) == (3, [A, B], 1, [])


def test_there_may_be_none() -> None:
    assert choose([{}, {}], [[0, 1]]).step is None
    torn = on_host(a=(4, NOT_WHOLE), b=(NOT_WHOLE, 3))
    assert choose([torn, torn], [[0, 1]]).step is None
    alone = on_host(a=(4, 3))
    assert choose([alone, alone], [[0, 1]]).step is None, "the other rank's are gone with its host"


def test_the_later_layout_counts_where_it_is_whole() -> None:
    both = on_host(a=(4, 5), b=(4, 5), c=(NOT_WHOLE, 6))
    found = choose([both], [[0]])
    assert (found.step, found.names) == (6, [C])
    torn = on_host(a=(4, 5), b=(4, 5), c=(NOT_WHOLE, NOT_WHOLE))
    found = choose([torn], [[0]])
    assert (found.step, found.names, found.last_layout) == (5, [A, B], 2)


def test_a_new_host_fetches_what_others_have() -> None:
    kept = on_host(a=(6, 7), b=(6, 5))  # of the rank of the other host, the last copy that was sent
    found = choose([kept, {}], [[0], [1]])
    assert (found.step, found.to_fetch, found.room) == (6, [(A, [0, 1]), (B, [0, 1])], {0: 0, 1: 20})
    elsewhere = choose([on_host(a=(6, 7)), on_host(b=(7, 6))], [[0], [1]])
    assert (elsewhere.step, elsewhere.to_fetch) == (7, [(A, [0, 1]), (B, [1, 0])])


def test_what_is_on_no_host_any_more_is_lost() -> None:
    whole = on_host(a=(4, 3))
    assert choose([whole, whole], [[0, 1]]).lost == Lost(4, [1])
    being_made = on_host(a=(NOT_WHOLE, NOT_WHOLE))
    assert choose([being_made, being_made], [[0, 1]]).lost is None
    torn = on_host(a=(1, NOT_WHOLE), b=(NOT_WHOLE, NOT_WHOLE))
    assert choose([torn, torn], [[0, 1]]).lost is None, "nothing had been whole before"


def test_of_several_runs_that_which_began_last_counts() -> None:
    both = on_host(a=(4, 3), b=(4, 3))
    earlier = {replace(name, run=RUN - 1): OnHost((9, 8), 10) for name in both}
    found = choose([both, earlier], [[0], [1]])
    assert (found.step, found.names, found.run, found.has_earlier) == (4, [A, B], RUN, True)
    assert found.to_fetch == [(A, [0, 1]), (B, [0, 1])]
    only = choose([earlier, earlier], [[0], [1]])
    assert (only.step, only.run, only.has_earlier) == (9, RUN - 1, False)
    being_made = on_host(a=(NOT_WHOLE, NOT_WHOLE), b=(NOT_WHOLE, NOT_WHOLE))
    assert choose([being_made, earlier], [[0], [1]]).step is None, "that run had been given up"


def test_what_others_may_have_put_there_is_not_looked_at(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with pytest.raises(PermissionError):
        find(tmp_path)


def test_what_is_forgotten_is_there_and_of_no_step(tmp_path: Path) -> None:
    for name in (A, B):
        Slots.make(tmp_path / str(name), b"", 1).finish(0, 3)
    forget_all_but(tmp_path, [A])
    assert {name: file.steps for name, file in find(tmp_path).items()} == {A: (3, NOT_WHOLE), B: (NOT_WHOLE, NOT_WHOLE)}
