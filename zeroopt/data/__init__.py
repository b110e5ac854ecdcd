"""In which order samples are trained on, so that a run that was stopped goes on with those that it has not seen.

In reading order; each imports from those above it:

    permutation  a shuffled order, element by element
    batches      `GlobalBatchSampler`: each rank's part of the batches of all
"""

from .batches import GlobalBatchSampler

__all__ = ["GlobalBatchSampler"]
