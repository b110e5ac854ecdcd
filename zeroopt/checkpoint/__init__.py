"""Training state on disk: checkpoints of zeroopt, and those of other libraries."""
