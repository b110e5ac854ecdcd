"""The parts of a model that groups of ranks hold: one, unless there are pipeline stages or tensor parallelism besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ...errors import CheckpointError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...state.entries import on_cpu
from .contents import clean_name
from .residuals import planned_order, sends_codes


@dataclass(frozen=True)
class Part:
    """What is to be known of one part besides its tensors.

    Attributes:
        first_rank: in the job, of its process group.
        names: of all that its state dict has.
        is_shared: whether other groups hold other elements of the same parameters (DTensors).
        param_groups: of its optimizers, one after the other, with names of parameters; tensors on the CPU.
        facts: for each of its optimizers.
    """

    first_rank: int
    names: list[str]
    is_shared: bool
    param_groups: list[dict[str, Any]]
    facts: list[dict[str, Any]]


def describe_part(model: ZeroDataParallel, optimizers: Sequence[ZeroOptimizer]) -> Part:
    """The part of this rank's process group, of which it is the first."""
    names = [clean_name(name) for name in model.module.state_dict()]
    facts = [
        {
            "first_param": first_param(one),
            **one.state_dicts.facts(),
            "seed": one.state_dicts.seed,
            "steps_since_average": one.state_dicts.steps_since_average,
            **({"outer_options": options} if (options := one.state_dicts.outer_options) else {}),
            **({"order": planned_order(one)} if sends_codes(one.replica) else {}),
        }
        for one in optimizers
    ]
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Part(rank, names, bool(model.replica.mesh_groups), on_cpu(named_groups(optimizers)), facts)


def named_groups(optimizers: Sequence[ZeroOptimizer]) -> list[dict[str, Any]]:
    """The param_groups of optimizers, with names of parameters."""
    groups = []
    for optimizer in optimizers:
        names = {position: clean_name(name) for position, name in optimizer.names().items()}
        groups += [{**g, "params": [names[p] for p in g["params"]]} for g in optimizer.state_dicts.pack_groups()]
    return groups


def first_param(optimizer: ZeroOptimizer) -> str:
    """The name by which an optimizer is known among several."""
    return clean_name(optimizer.names()[0])


def join_parts(parts: Sequence[Part]) -> list[Part]:
    """The parts of different parameters.

    Raises:
        CheckpointError: several have something of the same name.
    """
    joined: list[Part] = []
    owner: dict[str, Part] = {}
    for part in parts:
        known = owner.get(part.names[0])
        if known is not None and part.is_shared and part.names == known.names:
            continue
        for name in part.names:
            if name in owner:
                raise CheckpointError(
                    f"the groups of ranks that begin with rank {owner[name].first_rank} and with rank {part.first_rank} both have "
                    f"{name!r}: give the stages of a pipeline modules of different names, and save replicas that "
                    "train alone, or other models, with their own process_group and to paths of their own"
                )
            owner[name] = part
        joined.append(part)
    return joined
