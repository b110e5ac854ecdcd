"""State of a parameter in parts: cut and joined without a loss, whatever shapes parts have of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone_slice import params_of, values
from torch import Tensor

from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.stepping.part_state import PartState, kept_by_part, part_names, problem_with_parts


def in_parts(shape: tuple[int, ...], sizes: list[int], dim: int = 0) -> ManagedParam:
    owner = params_of(torch.zeros(shape), grain=Grain.MATRIX)[0]
    owner.part_sizes, owner.part_dim = sizes, dim
    return owner


# Sums of lengths that are those of the parameter by chance, and lengths that the number of parts divides.
CASES = [
    in_parts((12, 4), [6, 4, 2]),
    in_parts((4, 12), [2, 4, 6], 1),
    in_parts((9, 3), [6, 2, 1]),
    in_parts((6, 6), [3, 3]),
]


def entry_of(part: Tensor, number: int) -> dict[str, Any]:
    rows, columns = part.shape
    return {
        "step": torch.tensor(3.0),
        "beta": 0.9,
        "moment": part.clone(),
        "row": values((rows, 1), number),
        "sides": [values((rows, rows), number) if rows < 6 else None, values((columns, columns), number)],
        "norms": {"last": torch.tensor(float(number)), "largest": float(number)},
        **({"rare": torch.tensor(1.0)} if number == 1 else {}),
    }


@pytest.mark.parametrize("owner", CASES, ids=lambda owner: f"{list(owner.shape)} {owner.part_sizes}")
def test_parts_get_back_what_they_had(owner: ManagedParam) -> None:
    full = values(owner.shape, 9)
    entries = [entry_of(part, number) for number, part in enumerate(full.split(owner.part_sizes, owner.part_dim))]
    joined = PartState(owner).join(entries)
    assert problem_with_parts(owner, joined) is None
    assert torch.equal(joined["moment"], full) and joined["step"] == 3.0 and joined["beta"] == 0.9
    assert joined["norms"]["largest"] == dict(zip(part_names(owner), (0.0, 1.0, 2.0)[: len(entries)], strict=True))
    again = PartState(owner)
    cut = again.cut(joined)
    for got, wanted in zip(cut, entries, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(again.join(cut), joined, rtol=0, atol=0)
    assert again.join(cut)["moment"] is joined["moment"]


def test_names_are_how_torch_indexes() -> None:
    assert part_names(CASES[0]) == ["0:6", "6:10", "10:12"] and part_names(CASES[1]) == [":,0:2", ":,2:6", ":,6:12"]
    assert part_names(params_of(torch.zeros(3), grain=Grain.MATRIX)[0]) == []


def test_state_of_other_parts_is_told_from_ones_own() -> None:
    owner = CASES[0]
    as_it_is = params_of(torch.zeros(12, 4), grain=Grain.MATRIX)[0]
    momentum, of_parts = {"moment": torch.zeros(12, 4), "step": 1}, {"row": [{"0:6": 1.0, "6:10": 2.0, "10:12": 3.0}]}
    assert kept_by_part(of_parts) == ["row"] and kept_by_part(momentum) == []
    assert problem_with_parts(owner, momentum) is problem_with_parts(as_it_is, momentum) is None
    assert problem_with_parts(owner, of_parts) is None
    assert "'row' of the parts 0:6, 6:10, 10:12, and it is stepped as it is" in str(
        problem_with_parts(as_it_is, of_parts)
    )
    assert "stepped in the parts 0:4, 4:8, 8:12" in str(problem_with_parts(in_parts((12, 4), [4, 4, 4]), of_parts))
    assert "'row' of shape [12, 1], which belongs to all" in str(problem_with_parts(owner, {"row": torch.zeros(12, 1)}))
    assert problem_with_parts(as_it_is, {"row": torch.zeros(12, 1)}) is None
