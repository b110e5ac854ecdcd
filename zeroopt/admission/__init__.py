"""What may be wrapped: looked at before anything is changed.

In reading order; each imports from those above it:

    memory_overlap  tensors that lie in the same memory
    devices         whether parameters may be there
    candidates      the model, the optimizer, and whether they fit together
    matrix_splits   which parameters are stepped part by part
    group_edits     what a user makes of param_groups by hand
"""
