"""Kinds of training, which differ in what they keep from step to step, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import zeroopt
from bench.model import make_model

TOKENS, VOCABULARY = 16, 64
FIRST_SCALE = 2.0**20  # which overflows in float16, so that the first steps are skipped
GROWTH_INTERVAL = 4  # steps, after which it may overflow again


@dataclass(frozen=True)
class Kind:
    """In what a training differs from a plain one.

    Attributes:
        options: of `zeroopt.wrap`.
        shard_ranks: how many ranks a shard group has, of which there are two or more; None: there are no such groups.
        has_muon: the matrices of the blocks are trained by Muon, fused ones part by part; the rest by AdamW.
        scales: by a GradScaler.
        is_adapted: the blocks are frozen, and are neither saved nor copied.
        any_ranks: the bits are the same on any number of ranks, with `micro_batches`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    shard_ranks: int | None = None
    has_muon: bool = False
    scales: bool = False
    is_adapted: bool = False
    any_ranks: bool = False

    def by(self, transport: str) -> Kind:
        """The same, where it does not say by which transport."""
        return replace(self, options={"transport": transport, **self.options})

    def shard_group(self) -> dist.ProcessGroup | None:
        """That of this rank, where there are such groups. Collective."""
        if self.shard_ranks is None:
            return None
        group: dist.ProcessGroup = dist.new_subgroups(self.shard_ranks)[0]  # type: ignore[no-untyped-call]
        return group

    @property
    def least_ranks(self) -> int:
        """How many it takes."""
        return 1 if self.shard_ranks is None else 2 * self.shard_ranks


_BF16 = {"param_dtype": torch.bfloat16}

KINDS = {
    "plain": Kind(any_ranks=True),
    "stage-0": Kind({"stage": 0}, any_ranks=True),
    "stage-1": Kind({"stage": 1}, any_ranks=True),
    "shared-parameters": Kind({"stage": 1, "share_parameters": True}),
    "shard-groups": Kind(shard_ranks=2),
    "masters": Kind(_BF16),
    "masters-stage-0": Kind({**_BF16, "stage": 0}),
    "remainders": Kind({**_BF16, "master_weights": "remainder"}),
    "no-masters": Kind({**_BF16, "master_weights": "none", "state_dtype": torch.bfloat16}),
    "8-bit-state": Kind({**_BF16, "master_weights": "remainder", "state_dtype": torch.int8}),
    "float16": Kind({"param_dtype": torch.float16, "max_grad_norm": 1.0}, scales=True),
    "own-step": Kind({"fused": False}),
    "two-optimizers": Kind({"matrix_splits": {"*.qkv.weight": 3}}, has_muon=True, any_ranks=True),
    "step-in-backward": Kind({"step_in_backward": True}),
    "adapted": Kind(is_adapted=True),
    # Between ranks whose memory is shared, gradients travel as they are.
    "int8-gradients": Kind({"gradient_compression": "int8", "transport": "pairwise"}),
    "int4-gradients": Kind({"gradient_compression": "int4", "transport": "pairwise"}),
    "int8-parameters": Kind({"parameter_compression": "int8"}),
}


class Training:
    """A model as it is trained, the same each time it is made.

    Args:
        steps: of the whole run.
        micro_batches: of a step, on each rank, as `zeroopt.wrap` has it.
        shard_group: of this rank.
    """

    def __init__(
        self, kind: Kind, steps: int, micro_batches: int | None, shard_group: dist.ProcessGroup | None
    ) -> None:
        self.shard_group = shard_group
        torch.manual_seed(0)
        net = make_model(VOCABULARY, TOKENS, layers=2, width=64)
        noisy = nn.Sequential(net.token_embedding, nn.Dropout(0.1))  # so that random states matter
        net.register_module("token_embedding", noisy)
        net.blocks.requires_grad_(not kind.is_adapted)
        options = {**kind.options, "micro_batches": micro_batches, "shard_group": shard_group}
        self.model: Any = net
        self.optimizers: list[zeroopt.ZeroOptimizer] = []
        for plain in _optimizers(net, kind):
            self.model, optimizer = zeroopt.wrap(self.model, plain, **options)
            self.optimizers.append(optimizer)
        self.schedulers = [LinearLR(optimizer, total_iters=steps) for optimizer in self.optimizers]
        self._scaler = torch.amp.GradScaler("cpu", FIRST_SCALE, growth_interval=GROWTH_INTERVAL, enabled=kind.scales)

    @property
    def extra(self) -> dict[str, Any]:
        """What is saved besides."""
        schedulers = {f"scheduler {number}": scheduler for number, scheduler in enumerate(self.schedulers)}
        return {**schedulers, "scaler": self._scaler}

    def backward(self, loss: Any) -> None:
        """Of a loss of this rank."""
        self._scaler.scale(loss).backward()

    def step(self) -> None:
        """By the gradients that there are."""
        for optimizer in self.optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def end_step(self) -> None:
        """What follows a step."""
        for scheduler in self.schedulers:
            scheduler.step()

    def exact_parameters(self) -> dict[str, Tensor]:
        """All that are trained, as exact as they are kept. Collective."""
        trained = {managed.param: one for one in self.optimizers for managed in one.state_dicts.params}
        named = self.model.named_parameters()
        return {name: trained[param].full_parameter(param) for name, param in named if param in trained}


def _optimizers(net: nn.Module, kind: Kind) -> Iterator[torch.optim.Optimizer]:
    params = [param for param in net.parameters() if param.requires_grad]
    if kind.has_muon:
        matrices = [param for name, param in net.named_parameters() if "blocks" in name and param.dim() == 2]
        of_muon = set(matrices)
        yield torch.optim.Muon(matrices, lr=1e-2)
        params = [param for param in params if param not in of_muon]
    yield torch.optim.AdamW(params, lr=1e-2)
