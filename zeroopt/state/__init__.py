"""What a rank's state is to others: state dicts, and moving it.

In reading order; each imports from those above it:

    shard_tensor    `ShardTensor`: a part of a tensor in a state dict
    entries         walking the entries of a parameter
    layout          `ShardLayout`: which elements a state dict has
    tiers           8-bit moments, decoded
    torch_releases  state dicts of older torch releases, brought up to date
    own_format      state dicts of optimizers that have a format of their own
    saved           what a saved state has for a piece of a parameter
    consolidate     all state on one rank
    sent            a step count and the like on its way to other ranks
    whole_tensors   the state of single parameters, put together on every rank
    moving          arrays from the segments of one plan to those of another
    inner_state     the state of the wrapped optimizer as something that moves
    given           state that the wrapped optimizer had before it was wrapped
    live            `optimizer.state` as users see it
    dcp_options     what torch.distributed.checkpoint wants when it asks
    dicts           `StateDicts`: saving and loading
"""
