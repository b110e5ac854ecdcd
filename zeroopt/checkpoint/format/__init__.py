"""How values are laid out in a checkpoint that torch.distributed.checkpoint reads.

In reading order; each imports from those above it:

    plain       values that may be in one
    extra       what a user saves besides
    together    all ranks do their part, or all fail
    metadata    whether DCP's metadata are as reading relies on
    planning    what a rank writes and reads
    transformed  parts that extensions of DCP have compressed
    reading     what is in a checkpoint on the disk
    remembered  what ranks need not tell again of the last one
    writing     all ranks write one
"""
