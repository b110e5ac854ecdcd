"""What a state dict says, under "zeroopt", of whose elements it holds and how they were kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import StateError
from ..plan.params import ManagedParam, ParamState
from ..storage.segment import Segment
from .shard_tensor import OwnTensor

FORMAT = 6
_KNOWN_FORMATS = (5, 6)  # 5 had 8-bit codes in place of the moments that they stand for


@dataclass(frozen=True)
class ShardLayout:
    """The layout of one rank's shard, or of a whole state dict that holds more than torch's would.

    Everything but `ranges` is the same on all ranks, and has a key of its own on all of them, in runs of whatever size: as
    torch.distributed.checkpoint wants it, which flattens dicts.

    Attributes:
        facts: how the state was saved: stage, rank, world size, precision.
        seed: of stochastic rounding.
        steps_since_average: see `features.averaging`.
        part: which part of the parameters the rank held; see `plan.dtensors.place_in_mesh`.
        order: positions of the parameters as they were planned, for each time that some were taken in.
        shapes, names, dtypes: by position; of the local tensors of DTensors.
        ranges: for each parameter of which the rank has a part, by position, the first of its elements and the one behind its
            last one.
        outer_options: of the param_groups of the outer optimizer.
        beyond_torch: what torch's optimizer would not keep, by position: of a whole state dict, or, in a shard, of parameters
            before their first step.
    """

    facts: Mapping[str, Any]
    seed: int
    steps_since_average: int = 0
    part: str = "all"
    order: Sequence[Sequence[int]] = ()
    shapes: Mapping[int, list[int]] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    dtypes: Mapping[int, str] = field(default_factory=dict)
    ranges: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    beyond_torch: Mapping[int, ParamState] = field(default_factory=dict)
    outer_options: Sequence[Mapping[str, Any]] = ()

    @property
    def is_shard(self) -> bool:
        """Whether it is of one rank's shard."""
        return "rank" in self.facts

    def to_dict(self) -> dict[str, Any]:
        """Of a shard, as it is saved: plain values and one tensor."""
        ranges = torch.tensor([[p, *r] for p, r in self.ranges.items()], dtype=torch.int64, device="cpu").reshape(-1, 3)
        return {
            "format": FORMAT,
            **self.facts,
            "seed": self.seed,
            "steps_since_average": self.steps_since_average,
            "part": self.part,
            "order": [list(generation) for generation in self.order],
            "positions": list(self.names),
            "names": list(self.names.values()),
            "shapes": list(self.shapes.values()),
            "dtypes": list(self.dtypes.values()),
            "ranges": OwnTensor(ranges),
            **({"state": dict(self.beyond_torch)} if self.beyond_torch else {}),
            **self._of_outer_steps(),
        }

    def to_whole_dict(self) -> dict[str, Any]:
        """Of a whole state dict."""
        return {
            "format": FORMAT,
            **self.facts,
            "seed": self.seed,
            "steps_since_average": self.steps_since_average,
            "state": dict(self.beyond_torch),
            **self._of_outer_steps(),
        }

    def _of_outer_steps(self) -> dict[str, Any]:
        return {"outer_options": list(map(dict, self.outer_options))} if self.outer_options else {}

    @staticmethod
    def of(state_dict: Mapping[str, Any]) -> ShardLayout | None:
        """What a state dict says; None for one of plain torch.

        Raises:
            StateError: it was saved by another version, in another format.
        """
        saved = state_dict.get("zeroopt")
        if saved is None:
            return None
        if saved.get("format") not in _KNOWN_FORMATS:
            raise StateError(
                f"expected a state dict of format {' or '.join(map(str, _KNOWN_FORMATS))}, got {saved.get('format')}: it was saved by another version of "
                "zeroopt; load it with that one, and save it with zeroopt.checkpoint or as full_state_dict()"
            )
        own = saved.get("ranges")
        rows: list[list[int]] = []
        if own is not None:
            rows = (own.local if isinstance(own, OwnTensor) else own).tolist()
        positions = saved.get("positions", [])
        return ShardLayout(
            facts={name: saved[name] for name in _FACTS if name in saved},
            seed=saved["seed"],
            steps_since_average=saved["steps_since_average"],
            part=saved.get("part", "all"),
            order=saved.get("order", []),
            shapes=dict(zip(positions, saved.get("shapes", []), strict=True)),
            names=dict(zip(positions, saved.get("names", []), strict=True)),
            dtypes=dict(zip(positions, saved.get("dtypes", []), strict=True)),
            ranges={position: (start, stop) for position, start, stop in rows},
            beyond_torch=saved.get("state", {}),
            outer_options=saved.get("outer_options", ()),
        )


_FACTS = ("stage", "rank", "world_size", "param_dtype", "master_weights", "state_dtype")


def describe_layout(params: Iterable[ManagedParam], segments: Iterable[Segment], **rest: Any) -> ShardLayout:
    """The layout of this rank's shard.

    Args:
        rest: the fields that say nothing of single parameters.
    """
    by_position = sorted(params, key=lambda p: p.position)
    ranges = {s.owner.position: (s.start, s.start + s.numel) for s in segments}
    return ShardLayout(
        shapes={p.position: list(p.shape) for p in by_position},
        names={p.position: p.name for p in by_position},
        dtypes={p.position: str(p.local.dtype) for p in by_position},
        ranges=dict(sorted(ranges.items())),
        **rest,
    )
