"""The norm of a whole model whose parts lie on several ranks: over whom to sum, and what counts how often.

A data-parallel group holds one part of the model. Other parts lie on the other ranks of the DTensors' mesh (tensor
parallelism) and on those that the user names (pipeline stages). Every rank sums |g|^p over its part and over its data-parallel
group, then over the dimensions of the mesh, then over the named group. An element that lies on several ranks of the mesh,
because its parameter is replicated there, counts on each of them for its share (`Bucket.norm_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import ControlGroup
from ..errors import ConfigError


class NormGroups:
    """The process groups over which numbers of a data-parallel group become numbers of the whole model.

    Args:
        groups: in the order in which all ranks go through them. None of them contains another data-parallel rank.
    """

    def __init__(self, groups: Sequence[ControlGroup]) -> None:
        self._groups = groups

    def sum_over_model(self, value: Tensor) -> Tensor:
        """The sum over all parts of the model. Collective: all ranks that hold parts must call it.

        Args:
            value: 0-dim, the same on all data-parallel ranks.

        Returns:
            0-dim, the same on all ranks to the last bit.

        Raises:
            CollectiveError: another rank did not do its part.
        """
        for group in self._groups:
            value = group.gather(value, "sum over the model").sum()
        return value

    def max_over_model(self, value: Tensor) -> Tensor:
        """The largest over all parts of the model, as `sum_over_model`. NaN counts as the largest."""
        for group in self._groups:
            value = group.gather(value, "maximum over the model").max()
        return value

    def any_over_model(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any part of the model, as `max_over_model`, on a device that the groups serve."""
        if not self._groups:
            return flag
        return bool(self.max_over_model(torch.tensor(float(flag), device=device)))


def check_norm_group(norm_group: dist.ProcessGroup | None, inner: Sequence[dist.ProcessGroup]) -> None:
    """Raise ConfigError when a user's `norm_group` is none, or has ranks in common with the groups within a part of the
    model: the data-parallel one and those of the mesh."""
    if norm_group is None:
        return
    if not isinstance(norm_group, dist.ProcessGroup):
        raise ConfigError(
            f"expected norm_group to be a torch.distributed.ProcessGroup that this rank is in, got {norm_group!r}"
        )
    ranks = set(dist.get_process_group_ranks(norm_group)) - {dist.get_rank()}
    for group in inner:
        common = ranks.intersection(dist.get_process_group_ranks(group))
        if common:
            raise ConfigError(
                f"norm_group has ranks {sorted(common)} in common with a data-parallel or tensor-parallel group of this rank; "
                "it must hold the ranks of other parts of the model alone, such as one rank of each pipeline stage"
            )
