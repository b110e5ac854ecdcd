"""Hugging Face Accelerate: `prepare` wraps with zeroopt.

    accelerator = zeroopt.integrations.accelerate.enable(Accelerator(), stage=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

docs/frameworks/accelerate.md says what that changes. In reading order; each imports from those above it:

    installed    the framework is there
    kinds        which Accelerators go with zeroopt
    options      what `enable` was given, and what the Accelerator was set up with
    models       what `prepare` makes of a model
    optimizers   what it makes of an optimizer
    pairing      the two find each other
    saving       checkpoints
    uneven       ranks with different numbers of batches
    accelerator  an Accelerator whose methods know of all that
    enabling     `enable`
"""

from . import installed  # noqa: F401  first, to say what is missing
from .accelerator import ZeroAccelerator
from .enabling import enable

__all__ = ["ZeroAccelerator", "enable"]
