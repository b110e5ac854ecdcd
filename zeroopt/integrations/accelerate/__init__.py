"""Hugging Face Accelerate: `prepare` wraps with zeroopt.

    accelerator = zeroopt.integrations.accelerate.enable(Accelerator(), stage=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

In reading order; each imports from those above it:

    installed    the framework is there
    models       what `prepare` makes of a model
    optimizers   what it makes of an optimizer
    accelerator  an Accelerator whose methods know of both
    enabling     `enable`
"""

from .accelerator import ZeroAccelerator
from .enabling import enable
from .models import PreparedModel
from .optimizers import plain_optimizer

__all__ = ["PreparedModel", "ZeroAccelerator", "enable", "plain_optimizer"]
