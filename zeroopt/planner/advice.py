"""What fits into a given memory, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError, NotSupportedError
from .estimator import Estimator, Variant
from .rehearsal import Cluster
from .tiers import TIERS, Options, describe, tier_of

_MOST_RANKS = 2**16


@dataclass(frozen=True)
class Advice:
    """How a training may fit.

    Attributes:
        memory: bytes of a rank.
        changes: options to take instead of those that were asked for, from what changes least on; none where it fits as it is.
        variant: what they come to; None where none of them will do.
        ranks: from which it fits with the options that were asked for, where more ranks help; None where they do not.
        share: of the peak that activations take, from 0 to 1.
    """

    memory: int
    changes: Options
    variant: Variant | None
    ranks: int | None
    share: float

    def lines(self) -> list[str]:
        """In words."""
        gigabytes = f"{self.memory / 1e9:.1f} GB"
        if self.variant is not None and not self.changes:
            return [f"It fits into {gigabytes} as it is."]
        said = []
        if self.variant is not None:
            said.append(
                f"It fits into {gigabytes} with {describe(self.changes)}: {self.variant.training_peak / 1e9:.2f} GB, most in: "
                f"{self.variant.peak_of_training.name}."
            )
        else:
            said.append(f"No options of zeroopt make it fit into {gigabytes} on so many ranks.")
        if self.ranks is not None:
            said.append(f"It fits with the options as they are on {self.ranks} ranks or more.")
        if self.share > 0.3:
            said.append(
                f"Activations are {self.share:.0%} of the peak: activation checkpointing (torch.utils.checkpoint) or smaller batches "
                "save most."
            )
        return said


def advise(estimator: Estimator, asked: Variant, memory: int, others: Sequence[Variant]) -> Advice:
    """What to do to train in so many bytes a rank; checkpoints are not counted.

    Args:
        others: variants that have been estimated already.
    """
    share = asked.peak_of_training.parts.get("activations", 0) / asked.training_peak
    if asked.training_peak <= memory:
        return Advice(memory, {}, asked, None, share)
    known = {describe(other.options): other for other in others}
    for changes in _changes(asked.options, estimator.setting.cluster):
        options = {**asked.options, **changes}
        try:
            variant = known.get(describe(options)) or estimator.variant(options)
        except (ConfigError, NotSupportedError):
            continue
        if variant.training_peak <= memory:
            return Advice(memory, changes, variant, _enough_ranks(estimator, asked, memory), share)
    return Advice(memory, {}, None, _enough_ranks(estimator, asked, memory), share)


def _changes(options: Options, cluster: Cluster) -> Iterator[Options]:
    """From what costs nothing to what changes results most: another stage, parameters that are shared, steps in backward, smaller
    buckets, and then tiers of precision."""
    where: list[Options] = [{"stage": stage} for stage in (1, 2) if stage > options.get("stage", 2)]
    where = where or [{}]
    if cluster.device == "cpu" and cluster.host_ranks > 1 and not options.get("share_parameters"):
        where.append({**where[-1], "share_parameters": True})
    if not options.get("step_in_backward"):
        where.append({**where[-1], "step_in_backward": True})
    yield from (change for change in where if change)
    yield {**where[-1], "bucket_mb": 4.0}
    tiers = list(TIERS)
    now = tier_of(options)
    better = tiers[tiers.index(now) + 1 :] if now in tiers else tiers
    for change in where[-2:]:
        for tier in better:
            yield {**change, **TIERS[tier]}
    if better:
        yield {**where[-1], **TIERS[better[-1]], "bucket_mb": 4.0}


def _enough_ranks(estimator: Estimator, asked: Variant, memory: int) -> int | None:
    cluster = estimator.setting.cluster
    ranks = 2 * cluster.world_size
    before = asked.training_peak
    while ranks <= _MOST_RANKS:
        variant = estimator.variant(asked.options, replace(cluster, world_size=ranks))
        if variant.training_peak <= memory:
            return ranks
        if variant.training_peak > 0.99 * before:
            return None  # what is left does not depend on them
        before, ranks = variant.training_peak, 2 * ranks
    return None
