"""Clipping by the norm of all gradients: in every step with `max_grad_norm`, and where `clip_grad_norm_` is called."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..feature import Feature, Features, Step
from ..gradients.exact_norms import exact_norm
from ..gradients.norms import clip_by, note_norms
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore
from ..streams import has_streams
from ..trained import Trained


class BucketNorms(Feature):
    """While backward runs, each bucket's share of the norm that gradients are clipped by is computed when its sum is there.

    Attributes:
        norm_type: p of the p-norm.
        of_model: the 2-norm of all gradients of the model, and the number of the backward that it belongs to; kept by the first
            optimizer that clips.
    """

    def __init__(self, features: Features) -> None:
        self._features = weakref.ref(features)  # which hold this one
        self.norm_type = 2.0
        self.of_model: tuple[int, Tensor] | None = None

    def prepare(self, norm_type: float) -> None:
        """From the next backward on, have buckets' shares of this norm ready."""
        self.norm_type = norm_type
        features = self._features()
        if features is not None:
            features.switch(self, on=True)

    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        """Where every rank has the whole sum, its norm is taken parameter by parameter, later. On a device those of all buckets are
        taken in one launch, later, too."""
        if not store.sum_is_spread and not has_streams(store.reduced.device):
            note_norms([store], self.norm_type)


class Clipping(Feature):
    """Clips the gradients of one optimizer, and knows their norm. As a feature, which is on with `max_grad_norm`: in every step.

    A clipped gradient has a factor that it has yet to be multiplied by; the step does that as it goes.
    """

    def __init__(self, trained: Trained, norms: BucketNorms) -> None:
        self._trained = trained
        self._replica = trained.replica
        self._norms = norms
        self._is_exact = trained.config.micro_batches is not None
        self._norm: Tensor | None = None
        self._norm_of_backward = 0
        self._clipped_backward = -1  # whose gradients `max_grad_norm` has clipped

    @property
    def known_norm(self) -> Tensor | None:
        """The 2-norm before the gradients that there are were clipped by it; 0-dim float32, the same on all ranks."""
        return self._norm if self._norm_of_backward == self._replica.reducer.num_backwards else None

    def compute_norm(self, active: Tensor, norm_type: float, stores: Sequence[GradientStore]) -> Tensor:
        """The norm of the gradients in some stores, 0-dim float64, the same on all ranks. Collective.

        Args:
            active: uint8 [number of parameters], 1 where there is a gradient.
        """
        replica, view = self._replica, self._replica.reducer.view
        if not self._is_exact:
            return view.norm(stores, active, replica.norm_groups, norm_type)
        transport = None if view.is_plain else replica.transport
        numel = sum(managed.numel for managed in replica.params)
        return exact_norm(view.norm_terms(stores, active), numel, transport, replica.norm_groups, norm_type)

    def clip(self, active: Tensor, max_norm: float, norm_type: float) -> Tensor:
        """Clip the gradients of this optimizer by their own norm. Returns the norm before, 0-dim float64. Collective."""
        self._prepare(norm_type)
        with named_range("clip"):
            norm = self.compute_norm(active, norm_type, self._trained.stores)
            self._clip_by(norm, max_norm, norm_type)
        return norm

    def on_gradients(self, step: Step) -> None:
        """Clip by the 2-norm of the gradients of the whole model, all its optimizers together."""
        max_norm = self._trained.config.max_grad_norm
        assert max_norm is not None
        if step.is_skipped:
            return
        norms, reducer = self._norms, self._replica.reducer
        self._prepare(2.0)
        with named_range("clip"):
            number = reducer.num_backwards
            if norms.of_model is None or norms.of_model[0] != number or self._clipped_backward == number:
                norms.of_model = number, self.compute_norm(step.active, 2.0, reducer.stores)
            # Otherwise as another optimizer has found it before it clipped its own gradients.
            self._clipped_backward = number
            self._clip_by(norms.of_model[1], max_norm, 2.0)

    def _prepare(self, norm_type: float) -> None:
        if not self._is_exact:  # to which shares of buckets, each rounded, are of no use
            self._norms.prepare(norm_type)

    def note_overflow(self) -> None:
        """A GradScaler has skipped a step that was to clip."""
        if self._trained.config.max_grad_norm is not None:
            self._note(torch.tensor(torch.inf, device=self._trained.params[0].param.device))

    def forget_model(self) -> None:
        """Parameters have come or gone: the norm of the model is another one."""
        self._norms.of_model = None

    def _clip_by(self, norm: Tensor, max_norm: float, norm_type: float) -> None:
        clip_by(self._trained.stores, norm, max_norm)
        self._replica.reducer.view.changed()
        self._note(norm if norm_type == 2 else None)

    def _note(self, norm: Tensor | None) -> None:
        self._norm = None if norm is None else norm.float()
        self._norm_of_backward = self._replica.reducer.num_backwards
