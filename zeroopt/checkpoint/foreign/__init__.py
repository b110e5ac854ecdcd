"""Checkpoints that other libraries have written.

In reading order; each imports from those above it:

    inert_pickle             what torch.save has written, read without running anything of it
    plain_state              the state dict of a plain torch optimizer, made of what another has saved
    convert_zero_redundancy  torch's ZeroRedundancyOptimizer
    deepspeed_ranks          DeepSpeed's files of each rank
    deepspeed_universal      DeepSpeed's universal checkpoints
    convert_deepspeed        both, as state dicts of plain torch
"""
