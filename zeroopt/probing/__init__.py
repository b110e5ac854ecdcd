"""What an optimizer does, found by trying a copy of it on small tensors.

In reading order; each imports from those above it:

    probe        the copy that steps
    state_size   how much state it keeps
    shapes       of the tensors on which it is tried
    stray_state  state that it keeps where ranks do not look for it
    grains       how small the pieces may be in which ranks share its work
"""
