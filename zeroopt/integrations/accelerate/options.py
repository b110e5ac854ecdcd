"""Options for `zeroopt.wrap`: those that `enable` was given, and those that an Accelerator was set up with for DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DDPCommunicationHookType

from ...errors import ConfigError, NotSupportedError
from ..wrap_options import WRAP_OPTIONS

_HOOKS = {DDPCommunicationHookType.FP16: torch.float16, DDPCommunicationHookType.BF16: torch.bfloat16}


def choose(options: Mapping[str, Any], ddp_options: Any) -> dict[str, Any]:
    """What to call `zeroopt.wrap` with.

    Args:
        options: they go before the others.
        ddp_options: a `DistributedDataParallelKwargs` or None. What it says of buffers holds, and so do hooks that send gradients
            in 16 bits. The rest (buckets, unused parameters, static graphs) zeroopt finds out by itself.

    Raises:
        ConfigError: there is no such option.
        NotSupportedError: gradients were to be compressed otherwise.
    """
    for name in options:
        if name not in WRAP_OPTIONS:
            raise ConfigError(
                f"expected options of zeroopt.wrap, got {name!r}; it has {', '.join(sorted(WRAP_OPTIONS - {'stage'}))}"
            )
    return {**_translate(ddp_options), **options}


def _translate(ddp_options: Any) -> dict[str, Any]:
    if ddp_options is None:
        return {}
    hook = ddp_options.comm_hook
    if hook not in (DDPCommunicationHookType.NO, *_HOOKS):
        raise NotSupportedError(
            f"this Accelerator was set up with the communication hook {hook.value}, which zeroopt does not have: leave comm_hook out, "
            "or pass wire=, an object of a zeroopt.collectives.Wire of your own"
        )
    translated: dict[str, Any] = {"broadcast_buffers": ddp_options.broadcast_buffers}
    if hook in _HOOKS:
        translated["reduce_dtype"] = _HOOKS[hook]
    return translated
