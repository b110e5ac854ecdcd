"""`estimate_memory`: what a rank will hold, when most, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, NotSupportedError
from .activations import LossOf, Sample, tokens_sample
from .advice import Advice, advise
from .estimator import Estimator, MakeOptimizer, Variant, default_host_ranks
from .rehearsal import Cluster
from .report import as_json, lines
from .tiers import TIERS, Options, describe


@dataclass(frozen=True)
class MemoryEstimate:
    """What one rank will hold, in bytes.

    Attributes:
        parameters: elements that are trained.
        asked: with the options that were given.
        variants: every stage and tier of precision that such a model can be trained with, the other options as given; on CPU ranks
            that can share parameters, stage 2 so too.
        refused: options that cannot be had, and why.
        knows_activations: whether activations are among the bytes.
        advice: how it fits into the memory that was given; None where none was.
    """

    parameters: int
    cluster: Cluster
    asked: Variant
    variants: list[Variant]
    refused: dict[str, str]
    knows_activations: bool
    advice: Advice | None

    @property
    def peak(self) -> int:
        """The most that a rank holds with the options that were given, from wrapping to a step."""
        return self.asked.training_peak

    def as_json(self) -> dict[str, Any]:
        """All of it, of what `json.dumps` takes."""
        return as_json(self)

    def lines(self) -> list[str]:
        """Two tables and the advice, for people."""
        return lines(self)

    def __str__(self) -> str:
        return "\n".join(self.lines())


def estimate_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | MakeOptimizer,
    *,
    world_size: int,
    host_ranks: int | None = None,
    device: str | None = None,
    tokens: int | None = None,
    sample: Sample | None = None,
    loss: LossOf | None = None,
    activations: int | None = None,
    memory: float | None = None,
    built_by_wrap: bool = False,
    copies: bool = False,
    compare: bool = True,
    groups: int = 1,
    shard_ranks: int | None = None,
    **options: Any,
) -> MemoryEstimate:
    """What one rank will hold of a model that is wrapped and trained, and when most. Not collective: one process, and neither the
    model nor the ranks have to be there.

    `zeroopt.wrap`'s own code plans and lays out everything, on the meta device, so sizes are those that it will ask for.
    Activations are those of one forward and backward with tensors that have no memory.

    Args:
        model: on the meta device, or any other. It stays as it is.
        optimizer: on the model's parameters; or a class, or a function, that makes one of a list of parameters.
        world_size: ranks that will train it.
        host_ranks: of them on each host. None: up to 8.
        device: "cpu" or "cuda", where parameters will be. None: where they are, or "cpu" if that is the meta device.
        tokens: length of the sequence that a language model is fed, a rank and micro-batch.
        sample: instead, what the model is called with: a tensor, positional arguments, or a dict of named ones. Values do not matter.
        loss: makes the loss of what the model returns, where that is neither a number nor has a `loss`.
        activations: instead, their bytes, where they were measured.
        memory: bytes that a rank may hold: find out which options make it fit.
        built_by_wrap: the model will be on the meta device when it is wrapped. Otherwise each rank builds it before.
        copies: a `zeroopt.elastic.Guard` will copy what each rank steps. On the CPU they count; those of devices lie in the host's memory.
        compare: estimate every stage and tier besides.
        groups: of `world_size` ranks each that train alone and average (`average_every`); this is one of them. With one of them,
            which has no `average_group`, each rank trains alone.
        shard_ranks: how many of the ranks are in a `shard_group`, which is given so. None: there is none.
        **options: of `zeroopt.wrap`.

    Raises:
        ConfigError: bad options, or a model that cannot be traced.
        NotSupportedError: options, parameters or optimizers that this release cannot train.
    """
    if sum(given is not None for given in (tokens, sample, activations)) > 1:
        raise ConfigError("expected one of tokens, sample and activations, got several")
    if memory is not None and not 0 < memory < float("inf"):
        raise ConfigError(f"expected memory to be a positive number of bytes, got {memory}")
    if tokens is not None:
        sample = tokens_sample(model, tokens)
    ranks = default_host_ranks(world_size) if host_ranks is None else host_ranks
    cluster = Cluster(world_size, ranks, device or _device_of(model), groups, shard_ranks)
    estimator = Estimator(
        model, optimizer, cluster, sample, loss, activations, built_by_wrap=built_by_wrap, copies=copies
    )
    asked = estimator.variant(options)
    variants, refused = _side_by_side(estimator, options) if compare else ([], {})
    return MemoryEstimate(
        estimator.parameters,
        cluster,
        asked,
        variants,
        refused,
        sample is not None or activations is not None,
        None if memory is None else advise(estimator, asked, int(memory), [asked, *variants]),
    )


def _side_by_side(estimator: Estimator, options: Options) -> tuple[list[Variant], dict[str, str]]:
    variants: list[Variant] = []
    refused: dict[str, str] = {}
    own = {name: value for name, value in options.items() if name not in _COMPARED}
    for tier in TIERS.values():
        for where in _PLACES:
            chosen = {**own, **where, **tier}
            try:
                variants.append(estimator.variant(chosen))
            except (ConfigError, NotSupportedError) as error:
                refused[describe(chosen)] = str(error)
    return variants, refused


_COMPARED = ("stage", "share_parameters", "param_dtype", "master_weights", "state_dtype")
_PLACES: tuple[Options, ...] = ({"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 2, "share_parameters": True})


def _device_of(model: nn.Module) -> str:
    device = next(model.parameters()).device.type
    return "cpu" if device == "meta" else device
