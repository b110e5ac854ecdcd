"""zeroopt within the frameworks that people train in: a module each, which imports its framework and no other.

In reading order; each imports from those above it:

    wrap_options          what all of them have to know of the options of `zeroopt.wrap`
    accelerate            Hugging Face Accelerate
    transformers          Trainer of transformers, and what builds on it
    axolotl               a plugin of axolotl, which builds on that Trainer
    lightning_strategies  what the next two have in common
    lightning             Lightning 2, as the package `lightning`
    pytorch_lightning     the same as the packages `pytorch_lightning` and `lightning_fabric`
"""
