"""Small checkpoints as DeepSpeed lays them out, written without DeepSpeed: of ZeRO stages 1 and 2, and universal ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Mapping[str, Tensor]]
"""Parameters, by param_group and name."""

VERSION = "0.19.0"
LR = 0.25


def rank_path(folder: Path, rank: int) -> Path:
    """The file of one rank."""
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_path(folder: Path) -> Path:
    """The file of the model."""
    return folder / "mp_rank_00_model_states.pt"


def write_model(folder: Path, groups: Groups, **others: Any) -> None:
    """Write the file of the model, in which `others` stand besides."""
    shapes = [{name: param.shape for name, param in group.items()} for group in groups]
    module = {name: param.bfloat16() for group in groups for name, param in group.items()}
    torch.save(
        {"ds_version": VERSION, "mp_world_size": 1, "module": module, "param_shapes": shapes, **others},
        model_path(folder),
    )


def write_ranks(
    folder: Path,
    groups: Groups,
    num_ranks: int,
    *,
    step: float = 3.0,
    align: int = 1,
    gaps: bool = False,
    lean: bool = False,
    elastic: bool = False,
) -> None:
    """Write the files of all ranks: masters are the parameters, and "exp_avg" is twice as much.

    Args:
        align: partitions have a multiple of so many elements, and with `gaps` each parameter.
        lean: nobody has saved the padding at the end of a group.
        elastic: as with `elastic_checkpoint`: the state in a list, and no options.
    """
    vectors, all_gaps = [], []
    for group in groups:
        gaps_of_group = [-param.numel() % align if gaps else 0 for param in group.values()]
        pieces = [torch.zeros(0)]
        for param, gap in zip(group.values(), gaps_of_group, strict=True):
            pieces += [param.reshape(-1), torch.full((gap,), torch.nan)]
        vectors.append(torch.cat(pieces))
        all_gaps.append(gaps_of_group)
    for rank in range(num_ranks):
        parts = [_partition(vector, rank, num_ranks, align) for vector in vectors]
        masters = [part[: len(part) - padding] if lean else part for part, padding in parts]
        states = [{"exp_avg": 2 * master} for master in masters]
        counted = [{"step": torch.tensor(step), **state} for state in states]
        saved = {
            "zero_stage": 1,
            "partition_count": [num_ranks] * len(groups),
            "single_partition_of_fp32_groups": masters,
            "group_paddings": [padding for _, padding in parts],
            "param_alignment_paddings": all_gaps if gaps else None,
            "base_optimizer_state_step": step if elastic else None,
            "base_optimizer_state": states
            if elastic
            else {"state": dict(enumerate(counted)), "param_groups": [{"lr": LR} for _ in groups]},
        }
        torch.save({"ds_version": VERSION, "optimizer_state_dict": saved}, rank_path(folder, rank))


def _partition(vector: Tensor, rank: int, num_ranks: int, align: int) -> tuple[Tensor, int]:
    """A rank's part of a group's vector, filled up with NaN, and how many of those are at its end."""
    numel = -(-len(vector) // (num_ranks * align)) * align
    own = vector[rank * numel : (rank + 1) * numel]
    padding = numel - len(own)
    return torch.cat([own, torch.full((padding,), torch.nan)]), padding


def write_universal(folder: Path, groups: Groups, *, step: float = 3.0) -> None:
    """Write a universal checkpoint of the same values."""
    for group in groups:
        for name, param in group.items():
            files = folder / "zero" / name
            files.mkdir(parents=True)
            torch.save({"param": param.clone()}, files / "fp32.pt")
            torch.save({"param": 2 * param}, files / "exp_avg.pt")
            torch.save(step, files / "step.pt")
    torch.save({"param_groups": [{"lr": LR} for _ in groups], "zero_stage": 1}, folder / "zero" / "optimizer_state.pt")
    write_model(folder, groups)


def change(path: Path, *keys: Any, value: Any = None) -> None:
    """Set what stands under these keys, one within the other, in a file."""
    saved = torch.load(path, weights_only=True)
    inner = saved
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    torch.save(saved, path)
