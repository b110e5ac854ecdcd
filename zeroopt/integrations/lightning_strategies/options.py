"""Which of a strategy's options go to `zeroopt.wrap`, and which to Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...errors import ConfigError, KernelUnavailableError, NotSupportedError, RankMismatchError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...options.checks import check_one_of
from ...options.placement import PLACEMENTS
from ...unwrap import unwrap
from ...wrap import wrap
from ..wrap_options import WRAP_OPTIONS, for_further_optimizer, has_meta

_REFUSALS = (ConfigError, KernelUnavailableError, NotSupportedError, RankMismatchError)
_OF_DDP = {
    "find_unused_parameters": "parameters without gradients need none",
    "static_graph": "whatever the graph is needs none",
    "gradient_as_bucket_view": "gradients lie in buckets as it is",
    "bucket_cap_mb": "zeroopt.wrap calls it bucket_mb",
    "ddp_comm_state": "zeroopt has no communication hooks",
    "ddp_comm_hook": "zeroopt has none; pass reduce_dtype=torch.bfloat16 to send gradients in 16 bits, or gradient_compression='int8' in 8",
    "ddp_comm_wrapper": "zeroopt has no communication hooks",
    "model_averaging_period": "pass average_every=k to average parameters every k steps",
}


@dataclass(frozen=True)
class WrapOptions:
    """Options of `zeroopt.wrap` for a model and all of its optimizers."""

    values: Mapping[str, Any]

    def wrap_all(
        self, model: nn.Module, optimizers: Iterable[Optimizer], device: torch.device
    ) -> tuple[nn.Module, list[Optimizer]]:
        """Wrap a model with each of its optimizers in turn. Collective; raises what `zeroopt.wrap` raises, and leaves nothing wrapped.

        Args:
            device: where what is on the meta device is made.
        """
        wrapped: list[ZeroOptimizer] = []
        values = dict(self.values)
        if has_meta(model):
            values.setdefault("device", device)
        try:
            for optimizer in optimizers:
                model, one = wrap(model, optimizer, **(for_further_optimizer(values) if wrapped else values))
                # LearningRateMonitor looks here for the optimizer that schedulers know, by whose class it names learning rates.
                vars(one)["optimizer"] = optimizer
                wrapped.append(one)
        except _REFUSALS:  # on all ranks
            if isinstance(model, ZeroDataParallel):
                unwrap(model, wrapped)
            raise
        return model, [*wrapped]


def split_options(options: Mapping[str, Any], init: Callable[..., None]) -> tuple[WrapOptions, dict[str, Any]]:
    """Options of `zeroopt.wrap`, and those of Lightning's own strategy, which `init` takes.

    Raises:
        ConfigError: neither has such an option, or there is no such stage.
    """
    parameters = inspect.signature(init).parameters.values()
    of_lightning = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    for name in options.keys() - WRAP_OPTIONS - (of_lightning - _OF_DDP.keys()):
        hint = _OF_DDP.get(name, f"zeroopt.wrap has {', '.join(sorted(WRAP_OPTIONS))}")
        raise ConfigError(f"{name!r} is no option of zeroopt.wrap, nor one that Lightning has for it: {hint}")
    check_one_of("stage", options.get("stage", 2), tuple(PLACEMENTS))
    of_wrap = {name: value for name, value in options.items() if name in WRAP_OPTIONS}
    return WrapOptions(of_wrap), {name: value for name, value in options.items() if name not in WRAP_OPTIONS}


def register(registry: Any, strategy: type) -> None:
    """Let `strategy="zeroopt_stage_2"`, and so on, mean a strategy."""
    for stage in PLACEMENTS:
        registry.register(f"zeroopt_stage_{stage}", strategy, f"ZeRO stage {stage} by zeroopt", stage=stage)


def check_precision(options: WrapOptions, plugin: Any) -> None:
    """Raise ConfigError where Lightning rounds parameters of which zeroopt is to keep what rounding takes away."""
    precision = getattr(plugin, "precision", None)
    if options.values.get("param_dtype") is not None and precision in ("bf16-true", "16-true"):
        raise ConfigError(
            f"with precision={precision!r} Lightning rounds the parameters before zeroopt can keep what that takes away: with "
            f"param_dtype pass precision={precision.replace('true', 'mixed')!r}, under which parameters are as small and autocast casts the rest"
        )
