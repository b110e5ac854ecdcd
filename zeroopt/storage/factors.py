"""What sums of gradients have yet to be multiplied by: buckets that are scaled alike have one tensor in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from .gradient_store import GradientStore


class Factors:
    """Multiplies sums, for as long as nobody has them summed anew.

    A clone or a product is made once for all that are multiplied by the same tensor, in one call or in several: functions of torch
    may go from gradient to gradient.
    """

    def __init__(self) -> None:
        self._products: dict[tuple[int, int, int], tuple[Tensor | None, Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget what has been multiplied by what."""
        self._products.clear()

    def scale(self, stores: Iterable[GradientStore], factor: Tensor) -> None:
        """Have sums multiplied by a 0-dim tensor when they are used."""
        for store in stores:
            store.factor = self._product(store.factor, factor, store)

    def _product(self, before: Tensor | None, factor: Tensor, store: GradientStore) -> Tensor:
        # The version, for it may have been changed in place meanwhile. The three are kept: of others, identities may be the same.
        key = id(before), id(factor), 0 if factor.is_inference() else factor._version
        if key not in self._products:
            here = factor.detach().to(store.reduced.device)
            self._products[key] = before, factor, here.clone() if before is None else before * here
        return self._products[key][2]


def settle_unlike(stores: Sequence[GradientStore]) -> None:
    """Have sums multiplied now, unless all are to be multiplied by one tensor."""
    if len({id(store.factor) for store in stores}) > 1:
        for store in stores:
            store.settle()


def scale_sums(stores: Iterable[GradientStore], factor: Tensor) -> None:
    """Have sums multiplied by a 0-dim tensor when they are used; those that had a factor in common have one then, too."""
    Factors().scale(stores, factor)
