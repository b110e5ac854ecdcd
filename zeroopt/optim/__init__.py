"""The fused kernels as ordinary optimizers: no process group needed.

`FusedAdamW`, `FusedAdam`, `FusedSGD`, `FusedAdagrad` and `FusedRMSprop` take the place of torch's classes (same arguments,
defaults and `state_dict` keys); `FusedLion` and `FusedLAMB` have none in torch. `FusedOptimizer` says what all of them offer besides.

In reading order; each imports from those above it:

    fused_params  whole parameters and their state, stepped in one call
    fused         `FusedOptimizer`: what all of them share
    sgd           SGD
    adamw         AdamW and Adam
    adagrad       Adagrad
    rmsprop       RMSprop
    lion          Lion
    lamb          LAMB
"""

from .adagrad import FusedAdagrad
from .adamw import FusedAdam, FusedAdamW
from .fused import FusedOptimizer
from .lamb import FusedLAMB
from .lion import FusedLion
from .rmsprop import FusedRMSprop
from .sgd import FusedSGD

__all__ = [
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedLAMB",
    "FusedLion",
    "FusedOptimizer",
    "FusedRMSprop",
    "FusedSGD",
]
