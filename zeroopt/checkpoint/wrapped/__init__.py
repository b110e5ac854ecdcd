"""Saving and loading a wrapped model with its optimizers.

In reading order; each imports from those above it:

    contents   what a rank writes of them
    residuals  what compression makes each rank keep for itself
    parts      the parts of a model that groups of ranks hold
    targets    memory for what a rank reads
    groups     the options of param_groups
    lineage    from which runs a checkpoint descends
    saving     `save`, `async_save`
    loading    `load`
    resuming   `resume`
"""
