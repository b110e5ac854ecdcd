"""Norms of gradients, and clipping by them."""

from __future__ import annotations

from torch import Tensor

from ..feature import Feature
from ..gradients.norms import note_norm
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore


class BucketNorms(Feature):
    """While backward runs, each bucket's share of the norm that gradients are clipped by is computed when its sum is there.

    Attributes:
        norm_type: p of the p-norm.
        of_model: the 2-norm of all gradients of the model, and the number of the backward that it belongs to; kept by the first
            optimizer that clips.
    """

    def __init__(self) -> None:
        self.norm_type = 2.0
        self.of_model: tuple[int, Tensor] | None = None

    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        """Where every rank has the whole sum, its norm is taken parameter by parameter, later."""
        if not store.sum_is_spread:
            note_norm(store, self.norm_type)
