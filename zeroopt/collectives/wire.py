"""In what form gradients travel, and how those of all ranks become one sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .residual import Residual


class Wire:
    """Moves gradients as they are, in a dtype of its own if it has one. Subclasses round or compress them.

    A full bucket is encoded where it lies; transports move its slices to the ranks that own them and have them combined there.
    All ranks have wires of one class with the same attributes. `repr` tells both, by which ranks compare them.

    Args:
        dtype: of buckets while they are filled, and of what travels unless `encode` says otherwise: float32, bfloat16 or
            float16. None: that of the parameters.

    Attributes:
        backend_sums: `combine` is a plain sum, so that a backend's own reduce-scatter, or no transport at all for a rank alone,
            may take its place.
        nests: sums of some ranks' slices may travel on as slices do, and be combined with others: from host to host.
        between_hosts: by which they travel on, encoded anew; None: as they are.
        residual: what encoding has left out of the gradients of one bucket; None: there is nothing of the kind.
    """

    backend_sums = True
    nests = True
    between_hosts: Wire | None = None
    residual: Residual | None = None

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        """Bring a full bucket into the form in which it travels, in place. Not collective.

        Args:
            full: 1-D, `num_slices` equally long slices. Gradients have been divided by the number of ranks.

        Returns:
            What travels: 1-D, in the memory of `full` from its first element on, of any dtype, `num_slices` equally long parts,
            of which the i-th is what rank i of the slices has to know. Where nothing goes through shared memory it may be
            elsewhere.
        """
        return full

    def combine(self, slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
        """Set `out` to the sum of what ranks have sent of one slice, plus `base` where there is one. Not collective.

        The same for all transports: `slices` come in the order of ranks. Where encoded slices have as many elements as `out`,
        this may be called for some elements of each at a time.

        Args:
            slices: 1-D, encoded, not to be changed.
            out: 1-D, of the dtype of the sum: that of the parameters, or float32.
            base: like `out`, and may be `out`.
        """
        ops.reduce(slices, out, base=base)

    def __repr__(self) -> str:
        attributes = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__module__}.{type(self).__qualname__}({attributes})"


PLAIN = Wire()
"""Moves gradients as they are."""
