"""Ways to train data-parallel, by name: how each prepares a model and AdamW, and the bytes a parameter that it should hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import zeroopt
from bench.compare import formula
from bench.compare.formula import Formula

Trained = tuple[nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        prepare: wraps a float32 model.
        formula: bytes a parameter that a rank should hold: parameters, gradients, masters and state.
        precision: "float32" or "bfloat16", of the parameters.
        communicates: whether it needs the other ranks.
        options: of `zeroopt.wrap`, where it is that.
        on_meta: the model is built on the meta device, and gets its values in `prepare`.
    """

    prepare: Callable[[nn.Module], Trained]
    formula: Formula
    precision: str = "float32"
    communicates: bool = True
    options: dict[str, Any] | None = None
    on_meta: bool = False

    def why_not(self) -> str | None:
        """What its row says instead of figures; None where it can run."""
        unknown = set(self.options or ()) - set(inspect.signature(zeroopt.wrap).parameters)
        return f"zeroopt.wrap has no {', '.join(sorted(unknown))}" if unknown else None


def prepare_alone(net: nn.Module, *, dtype: torch.dtype) -> Trained:
    net.to(dtype)
    return net, torch.optim.SGD(net.parameters(), lr=1e-3)


def prepare_ddp(net: nn.Module) -> Trained:
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def prepare_zero_redundancy(net: nn.Module) -> Trained:
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    return model, ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-3, fused=True)


def prepare_zero(net: nn.Module, **options: Any) -> Trained:
    return zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=1e-3), **options)


def alone(dtype: torch.dtype) -> Method:
    """What libraries and activations hold beyond parameters and gradients."""
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    return Method(partial(prepare_alone, dtype=dtype), formula.without_state, precision, communicates=False)


def zero(*, on_meta: bool = False, **options: Any) -> Method:
    precision = "bfloat16" if options.get("param_dtype") == torch.bfloat16 else "float32"
    counted = ("stage", "share_parameters", "master_weights", "state_dtype", "step_in_backward")
    held = formula.zero(**{name: options[name] for name in counted if name in options})
    return Method(partial(prepare_zero, **options), held, precision, options=options, on_meta=on_meta)


BF16: dict[str, Any] = {"param_dtype": torch.bfloat16}
LEAST: dict[str, Any] = {**BF16, "master_weights": "remainder", "state_dtype": torch.int8}

METHODS: dict[str, Method] = {
    "SGD alone": alone(torch.float32),
    "SGD alone, bfloat16": alone(torch.bfloat16),
    "DDP": Method(prepare_ddp, formula.replicated),
    "ZeroRedundancyOptimizer": Method(prepare_zero_redundancy, formula.sharded_state),
    "stage 0": zero(stage=0),
    "stage 1": zero(stage=1),
    "stage 2": zero(stage=2),
    "stage 2, own step": zero(stage=2, fused=False),
    "stage 2, overlap off": zero(stage=2, overlap=False),
    "stage 2, pairwise": zero(stage=2, transport="pairwise"),
    "stage 1, shared": zero(stage=1, share_parameters=True),
    "stage 2, shared": zero(stage=2, share_parameters=True),
    "bfloat16 moments": zero(stage=2, state_dtype=torch.bfloat16),
    "8-bit moments": zero(stage=2, state_dtype=torch.int8),
    "bfloat16": zero(stage=2, **BF16),
    "bfloat16, stage 0": zero(stage=0, **BF16),
    "bfloat16, stage 1": zero(stage=1, **BF16),
    "bfloat16, remainder": zero(stage=2, master_weights="remainder", **BF16),
    "bfloat16, remainder, 8-bit moments": zero(stage=2, **LEAST),
    "bfloat16, no masters": zero(stage=2, master_weights="none", **BF16),
    "bfloat16, no masters, bfloat16 moments": zero(stage=2, master_weights="none", state_dtype=torch.bfloat16, **BF16),
    "bfloat16, remainder, 8-bit moments, shared": zero(stage=2, share_parameters=True, **LEAST),
    "step in backward": zero(stage=2, step_in_backward=True),
    "step in backward, shared": zero(stage=2, step_in_backward=True, share_parameters=True),
    "everything": zero(stage=2, step_in_backward=True, share_parameters=True, **LEAST),
    "everything, from the meta device": zero(
        on_meta=True, stage=2, step_in_backward=True, share_parameters=True, **LEAST
    ),
}
