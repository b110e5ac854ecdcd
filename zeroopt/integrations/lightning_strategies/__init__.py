"""What the strategies for Lightning's two packages have in common; none of them is imported here.

`lightning` and `pytorch_lightning` (with `lightning_fabric`) are copies of each other, so each of them has classes of its own
to inherit from.

In reading order; each imports from those above it:

    options     which options are zeroopt's, and which Lightning's
    saving      what is saved of wrapped optimizers
    trainer     what a strategy of a Trainer does
    evaluated   modules that Fabric was given without an optimizer
    fabric      what a strategy of Fabric does
"""
