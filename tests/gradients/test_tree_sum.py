"""Terms that come one after the other are summed as `ops.reduce` sums those that lie side by side."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroopt import ops
from zeroopt.gradients.tree_sum import TreeSum


def draw(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(33, generator=generator) * 10.0 ** (i % 7) for i in range(count)]


def total(tree: TreeSum, number: int = 0) -> Tensor:
    result: Tensor | None = None
    for sums in tree.sums():
        if number in sums:
            result = sums[number] if result is None else sums[number] + result
    assert result is not None
    return result


@given(count=st.integers(1, 40))
def test_the_tree_is_that_of_ranks(count: int) -> None:
    terms, tree, expected = draw(count), TreeSum(), torch.empty(33)
    ops.reduce(terms, expected)
    for term in terms:
        tree.add({0: term.clone()})
    assert torch.equal(total(tree), expected)
    assert len(list(tree.sums())) == count.bit_count()


@given(each=st.sampled_from([1, 2, 4, 8]), ranks=st.integers(1, 9))
def test_sums_of_ranks_are_a_branch_of_it(each: int, ranks: int) -> None:
    terms, expected = draw(each * ranks), torch.empty(33)
    ops.reduce(terms, expected)
    by_rank = []
    for rank in range(ranks):
        tree = TreeSum()
        for term in terms[rank * each : (rank + 1) * each]:
            tree.add({0: term.clone()})
        by_rank.append(total(tree))
    summed = torch.empty(33)
    ops.reduce(by_rank, summed)
    assert torch.equal(summed, expected)


@given(there=st.lists(st.booleans(), min_size=8, max_size=8))
def test_what_has_no_term_has_zero(there: list[bool]) -> None:
    values = [-torch.zeros(3) if i % 3 == 0 else draw(8)[i][:3] for i in range(8)]
    tree, full = TreeSum(), TreeSum()
    for is_there, value in zip(there, values, strict=True):
        tree.add({0: value.clone()} if is_there else {})  # of nothing at all there may be none
        full.add({0: value.clone() if is_there else torch.zeros(3)})
    assert tree.numbers() == ({0} if any(there) else set())
    if any(there):
        assert torch.equal(total(tree).view(torch.int32), total(full).view(torch.int32))  # the sign of 0, too


def test_what_is_dropped_is_not_summed() -> None:
    tree = TreeSum()
    for term in draw(3):
        tree.add({0: term, 1: term.clone()})
    tree.drop([0])
    assert tree.numbers() == {1}
    assert len(list(tree.sums())) == 2
    tree.clear()
    assert tree.numbers() == set()
    assert list(tree.sums()) == []
