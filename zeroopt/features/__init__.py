"""What a user may switch on.

In reading order; each imports from those above it:

    join          ranks with different numbers of batches
    clipping      norms of gradients, and clipping by them
    audit         `check_every`: finite gradients, equal parameters
    averaging     `average_every`: ranks that train alone, and average
    loss_scaling  what a GradScaler asks, agreed by all ranks
    scaled_steps  the steps of one optimizer through a GradScaler
    of_model      what takes part in the steps of all optimizers of a model
"""
