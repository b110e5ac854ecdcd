"""Models and optimizers that are prepared find each other, whichever came first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...wrap import wrap
from ..wrap_options import for_further_optimizer, has_meta
from .models import AwaitingModel, PreparedModel, prepare_again, prepared_with
from .optimizers import PreparedOptimizer, plain_optimizer


def pair(optimizer: PreparedOptimizer, options: Mapping[str, Any], device: torch.device) -> PreparedModel | None:
    """Wrap an optimizer together with the prepared model that has its parameters. Collective, if there is one.

    A model that is trained by other optimizers already gets one more. Where one of them trains the same parameters, this one takes
    its place: the model is unwrapped and wrapped anew, for a second training, and its former optimizers are given up.

    Args:
        options: for `zeroopt.wrap`.
        device: where a model on the meta device is made, unless options say otherwise.

    Returns:
        The model.

    Raises:
        What `zeroopt.wrap` does. Nothing has been changed, except that the optimizers that were to be replaced have been given up.
    """
    plain = plain_optimizer(optimizer)
    params = params_of(plain)
    model = prepared_with(params)
    if model is None:
        return None
    if any(not params.isdisjoint(params_of(former)) for former in model.optimizers):
        model = prepare_again(model)
    if isinstance(model, AwaitingModel):
        if has_meta(model.module):
            options = {"device": device, **options}
        model.take_gradients()
        wrapped, wrapped_optimizer = wrap(model.module, plain, **options)
        model.become(wrapped)
    else:
        _, wrapped_optimizer = wrap(model, plain, **for_further_optimizer(options))
    optimizer.become(wrapped_optimizer)
    return model


def params_of(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """Those in its groups that require gradients."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return {param for param in params if param.requires_grad}
