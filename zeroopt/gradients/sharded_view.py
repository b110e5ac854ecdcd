"""The gradients of one wrapped model in stages 1 and 2: the objects that stand for them, and what is done to them."""

from __future__ import annotations

import math
import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..collectives import ControlGroup, Transport
from ..errors import StateError
from ..feature import Features
from ..plan.params import ManagedParam
from ..storage.assembling import assemble
from ..storage.bucket import Bucket
from ..storage.factors import Factors, settle_unlike
from ..storage.gradient_store import GradientStore
from ..storage.segment import Segment
from ..untraced import untraced
from . import tensor_operators
from .exact_norms import NormTerm, exact_powers
from .norm_groups import NormGroups
from .norms import is_finite, norm_of_shards, note_norms
from .overflow import agree_on_overflow
from .sharded_tensor import ShardedGradient
from .view import GradientView, dense, set_gradients

_WHAT = "norms of gradients over ranks"  # for messages


class ShardedView(GradientView):
    """The gradient objects of one wrapped model, and what is done to gradients through them.

    Attributes:
        local: by index of the parameter, what autograd has added to the objects and no reduce has taken up yet.
        stepped: indices of parameters that were stepped by gradients which nobody has cleared since, where each bucket is
            stepped while backward runs.

    Args:
        features: hear of what a GradScaler does.
        check_outside: raises where what it is told is about to be done cannot be done by all ranks, as within `join()`.
        mesh_groups: of the ranks that hold other parts of parameters that are DTensors.
        check_kept: raises where what it is told needs the sums after backward, and they are gone by then.
        keeps_sums: they are not.
        exact_norms: their bits are not to depend on how gradients are cut.
    """

    is_plain = False

    def __init__(
        self,
        transport: Transport,
        features: Features,
        check_outside: Callable[[str], None],
        mesh_groups: Sequence[ControlGroup],
        check_kept: Callable[[str], None],
        *,
        keeps_sums: bool,
        exact_norms: bool = False,
    ) -> None:
        super().__init__()
        self.waits = not keeps_sums
        self.stepped: set[int] = set()
        self._check_kept = check_kept
        self._exact_norms = exact_norms
        self._transport = transport
        self._unscaling = features.calls["unscaling"]
        self._check_outside = check_outside
        self._mesh_groups = mesh_groups
        self._wait: weakref.WeakMethod[Callable[[], None]] | None = None
        self._norms: dict[float, dict[int, Tensor]] = {}  # by p and parameter, of those that have not changed since
        self._factors = Factors()
        self._found: tuple[Tensor | None, int, bool] = (None, 0, False)
        self._objects: list[ShardedGradient] = []
        self._shown = bytearray()  # by index: 1 where `param.grad` is the object, or was until somebody replaced it
        self.local: dict[int, Tensor] = {}

    def wait_by(self, finish: Callable[[], None]) -> None:
        """Before gradients are used, call a method that waits until every gradient that has been produced is reduced."""
        self._wait = weakref.WeakMethod(finish)

    def attach(
        self, params: Sequence[ManagedParam], buckets: Sequence[Bucket], stores: Sequence[GradientStore]
    ) -> None:
        super().attach(params, buckets, stores)
        self._leaves = [managed.param for managed in params]
        self._params_of = [[managed.index for managed in bucket.params] for bucket in buckets]
        self._bucket_of = {m.index: bucket.index for bucket in buckets for m in bucket.params}
        self._segments = {segment.owner.index: segment for bucket in buckets for segment in bucket.segments}
        for managed in params[len(self._objects) :]:
            self._objects.append(ShardedGradient(managed, self._store(managed.index).reduced.dtype, self))
            self._shown.append(0)
        self._of_bucket = [
            ([self._leaves[i] for i in indices], [self._objects[i] for i in indices], np.array(indices, np.intp))
            for indices in self._params_of
        ]
        self.changed()

    def keep(self, order: Sequence[int]) -> None:
        index_of = {old: new for new, old in enumerate(order)}
        for old, gone in enumerate(self._objects):
            if old not in index_of:
                gone.forget_owner()
        self._objects = [self._objects[old] for old in order]
        for new, kept in enumerate(self._objects):
            kept.param_index = new
        self._shown = bytearray(self._shown[old] for old in order)
        self.local = {index_of[old]: grad for old, grad in self.local.items() if old in index_of}
        self.checked = {index_of[old] for old in self.checked if old in index_of}
        self.stepped = {index_of[old] for old in self.stepped if old in index_of}

    def moved(self) -> None:
        """What shows them is the same."""

    def begin_backward(self) -> Collection[int]:
        self.checked.clear()
        self._factors.clear()
        self.changed()
        if not any(self._shown):  # as behind zero_grad
            return ()
        cleared = {
            index
            for index, (leaf, shown, own) in enumerate(zip(self._leaves, self._shown, self._objects, strict=True))
            if shown and leaf.grad is not own
        }
        for bucket, store in zip(self._buckets, self._stores, strict=True) if cleared else ():
            gone = [managed for managed in bucket.params if managed.index in cleared]
            if gone and len(gone) == len(bucket.params):
                store.discard()
            for managed in gone:
                if store.holds_sum:
                    self.replace(managed, None)
                self._forget(managed.index)
        return cleared

    @property
    def holds_sums(self) -> bool:
        return any(store.holds_sum for store in self._stores)

    @property
    def shows_sums(self) -> bool:
        return any(map(self.is_shown, self._params))

    def has_local(self, managed: ManagedParam) -> bool:
        grad = managed.param.grad
        if grad is self._objects[managed.index]:
            return managed.index in self.local
        return grad.local is not None if type(grad) is ShardedGradient else grad is not None

    def take_local(self, managed: ManagedParam) -> Tensor | None:
        grad = managed.param.grad
        if type(grad) is ShardedGradient:
            local = grad.take_local()
        else:
            local = managed.local_grad()
        return None if local is None else dense(managed, local)

    def packed(self, managed: ManagedParam) -> None:
        managed.param.grad = self._objects[managed.index]
        self._shown[managed.index] = 1

    def packed_bucket(self, bucket: int) -> None:
        leaves, objects, indices = self._of_bucket[bucket]
        set_gradients(leaves, objects)
        np.frombuffer(self._shown, dtype=np.uint8)[indices] = 1

    def take_hidden(self, managed: ManagedParam) -> Tensor:
        return self.local.pop(managed.index)

    def take_edited(self, packed: bytearray) -> ManagedParam | None:
        if not self.local:
            return None
        added = self._params[next(iter(self.local))]
        self.local.clear()
        return added

    def show_used(self, used: Tensor) -> None:
        for managed, flag in zip(self._params, used.tolist(), strict=True):
            if flag and managed.param.grad is None:
                self.packed(managed)

    def drop_local(self) -> None:
        for managed in self._params:
            if type(managed.param.grad) is not ShardedGradient:
                managed.param.grad = None
        self.local.clear()

    def stop_contributing(self) -> None:
        """Sums of earlier backward passes are kept apart, and nobody contributes them again."""

    def take(self) -> Tensor:
        if all(map(operator.is_, [leaf.grad for leaf in self._leaves], self._objects)):  # as in nearly every step
            return torch.ones(len(self._params), dtype=torch.uint8, device="cpu")
        flags = bytearray(len(self._params))
        for managed in self._params:
            grad = managed.param.grad
            if self.is_shown(managed):
                flags[managed.index] = 1
            elif type(grad) is ShardedGradient:
                raise StateError(
                    f"param.grad of {managed.name!r} was set to the sharded gradient of {grad.param_name!r}; set it to a tensor, "
                    "such as optimizer.full_grad gives"
                )
            elif grad is not None:
                local = self.take_local(managed)
                assert local is not None
                self.replace(managed, local)
                self.packed(managed)  # what is done to it from here on is done to the slices
                flags[managed.index] = 1
            elif self.was_cleared(managed):
                self.replace(managed, None)
        return torch.frombuffer(flags, dtype=torch.uint8)

    def follow(self, source: int) -> None:
        """Whatever is done to slices is done on all ranks."""

    def forget(self, buckets: Sequence[Bucket]) -> None:
        if len(buckets) == len(self._buckets):
            self._shown = bytearray(len(self._shown))
            self.local.clear()
            self.stepped.clear()
        else:
            for index in (index for bucket in buckets for index in self._params_of[bucket.index]):
                self._forget(index)
        self.changed()

    def zeroed(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            for managed in bucket.params:
                self.local.pop(managed.index, None)
                self.stepped.discard(managed.index)
        self.changed()

    def settle(self, stores: Sequence[GradientStore]) -> None:
        """The step multiplies slices as it goes."""

    def norm(self, stores: Sequence[GradientStore], active: Tensor, beyond: NormGroups, norm_type: float) -> Tensor:
        return norm_of_shards(stores, self._transport, beyond, norm_type)

    def norm_terms(self, stores: Sequence[GradientStore], active: Tensor) -> list[NormTerm]:
        held = [store for store in stores if store.holds_sum]
        settle_unlike(held)
        terms = [NormTerm(store.reduced, store.norm_weight, store.factor) for store in held]
        return terms or [NormTerm(stores[0].reduced[:0], 1.0, None)]

    def whole(self, managed: ManagedParam) -> Tensor | None:
        dtype = self._store(managed.index).reduced.dtype
        return self._assemble(managed, self.piece(managed.index), dtype)

    def as_under_torch(self, params: Sequence[ManagedParam]) -> dict[ManagedParam, Tensor | None]:
        if self.waits:  # and the sums are gone
            return {managed: None if self.is_shown(managed) else managed.param.grad for managed in params}
        shown = torch.tensor([self.is_shown(m) for m in params], dtype=torch.uint8, device=params[0].param.device)
        self._transport.control.largest(shown, "which parameters have gradients")
        grads: dict[ManagedParam, Tensor | None] = {}
        for managed, is_shown in zip(params, shown.tolist(), strict=True):
            here, local = self.is_shown(managed), self.local.get(managed.index)
            grads[managed] = None if here else managed.param.grad
            if is_shown:
                whole = self._assemble(managed, self.piece(managed.index) if here else None, managed.param.dtype)
                if local is not None:
                    whole += managed.layout_like(local)
                grads[managed] = whole if here else grads[managed]
        return grads

    def _assemble(self, managed: ManagedParam, piece: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self._transport.replica != 0:  # of several ranks that have the same piece, one tells it
            piece = None
        return assemble(managed, self._segments.get(managed.index), piece, dtype, self._transport.control)

    def is_shown(self, managed: ManagedParam) -> bool:
        """Whether the parameter's gradient is the object, and nobody has replaced it."""
        return managed.param.grad is self._objects[managed.index]

    def shape_of(self, index: int) -> torch.Size:
        """That of the whole gradient."""
        return self._objects[index].shape

    def was_cleared(self, managed: ManagedParam) -> bool:
        """Whether somebody has replaced the object by None or by a tensor since it was shown."""
        return bool(self._shown[managed.index]) and not self.is_shown(managed)

    def _forget(self, index: int) -> None:
        """A parameter has no gradient any more."""
        self._shown[index] = 0
        self.local.pop(index, None)
        self.stepped.discard(index)

    def changed(self) -> None:
        self._norms.clear()

    def _note_changed(self, indices: Iterable[int]) -> None:
        """These gradients are other ones from now on."""
        for norms in self._norms.values():
            for index in indices:
                norms.pop(index, None)

    def piece(self, index: int) -> Tensor | None:
        """This rank's piece of a reduced gradient, 1-D, to be read or changed in place; None where it has none."""
        segment = self._segments.get(index)
        return None if segment is None else self._store(index).part(segment)

    def replace(self, managed: ManagedParam, grad: Tensor | None) -> None:
        """Set a gradient to a tensor that this rank has whole, which then counts as one of this step, or to zero."""
        store, segment = self._store(managed.index), self._segments.get(managed.index)
        if grad is not None and not store.holds_sum:
            store.zero()  # what else lies there is of an earlier step
            store.holds_sum = True
        if segment is not None:
            piece = store.part(segment)
            if grad is None:
                piece.zero_()
            else:
                piece.copy_(managed.flatten(grad)[segment.start : segment.start + segment.numel])
        self._note_changed([managed.index])

    # What torch's functions do to the objects, by the parameters' indices.

    @untraced
    def apply(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One of torch's operators, with these and other objects among its arguments."""
        return tensor_operators.apply(op, args, kwargs)

    def edit(self, index: int, what: str, change: Callable[[Tensor, Callable[[Tensor], Tensor]], object]) -> None:
        """Change a gradient element by element, in place.

        Args:
            what: is done, for messages.
            change: is given this rank's piece, 1-D, and a function that cuts like that a tensor which has, or can be expanded
                to, the parameter's shape, and leaves one without dimensions as it is.
        """
        self._check_outside(f"{what} of param.grad")
        self._prepare([index])
        piece = self.piece(index)
        if piece is None:  # nothing to do, but to find the same mistakes as the other ranks
            piece = self._store(index).reduced[:0]
        change(piece, lambda value: self._cut(index, value))
        self._note_changed([index])

    def set(self, index: int, value: object) -> None:
        """Set a gradient, through its object, to a tensor that this rank has whole."""
        managed = self._params[index]
        if not isinstance(value, Tensor):
            raise StateError(f"expected a tensor for the gradient of {managed.name!r}, got {type(value).__name__}")
        if isinstance(value, ShardedGradient) or value.shape != self.shape_of(index):
            what = "another sharded gradient" if isinstance(value, ShardedGradient) else f"shape {list(value.shape)}"
            raise StateError(
                f"expected a tensor of shape {list(self.shape_of(index))} for the gradient of {managed.name!r}, got {what}"
            )
        self._check_outside("setting param.grad.data")
        self._prepare([index])
        self.replace(managed, managed.local_part(value.detach()))

    def _cut(self, index: int, value: Tensor) -> Tensor:
        """This rank's piece of a tensor that belongs to a gradient."""
        if value.dim() == 0:
            return value
        managed, segment, shape = self._params[index], self._segments.get(index), self.shape_of(index)
        flat = managed.flatten(managed.local_part(value if value.shape == shape else value.expand(shape)))
        return flat[:0] if segment is None else flat[segment.start : segment.start + segment.numel]

    def add_local(self, indices: Sequence[int], grad: Tensor) -> None:
        """Keep what autograd adds until the parameter's hook, or a later backward, takes it up."""
        for index in indices:
            before, aligned = self.local.get(index), self._params[index].aligned(grad)
            self.local[index] = aligned if before is None else before + aligned

    def keep_local(self, index: int) -> None:
        """What autograd has added to a gradient stays there when backward is through. Until then it may be anyone's tensor."""
        if index in self.local:
            self.local[index] = self.local[index].clone()

    def norms(self, indices: Sequence[int], norm_type: float, dtype: torch.dtype | None) -> list[Tensor]:
        """The p-norm of each gradient, 0-dim, of `dtype` or that of its sum. Collective: one exchange for all gradients, the
        first time that one is asked for after it has changed."""
        self._check_outside("a norm of param.grad")
        if not norm_type > 0:
            raise StateError(f"a norm of a sharded gradient is a p-norm with p > 0 or inf, got p = {norm_type}")
        self._prepare(indices)
        known = self._norms.setdefault(norm_type, {})
        if not known.keys() >= set(indices):
            known.update(self._norms_over_ranks(known.keys(), norm_type))
        return [known[index].to(dtype or self._objects[index].dtype) for index in indices]

    def zero(self, indices: Sequence[int]) -> None:
        """Set gradients to zero, local ones too."""
        for index in indices:
            self.local.pop(index, None)
            self.stepped.discard(index)
        self._change(indices, Tensor.zero_)

    def scale(self, indices: Sequence[int], factor: Tensor) -> None:
        """Multiply gradients by a 0-dim tensor: whole buckets when they are used, others at once."""
        self._check_outside("multiplying param.grad")
        self._scale(indices, factor)

    def _scale(self, indices: Sequence[int], factor: Tensor) -> None:
        self._prepare(indices)
        whole: list[GradientStore] = []
        for bucket, chosen in self._by_bucket(indices):
            if self._is_all_of(bucket, chosen):
                whole.append(self._stores[bucket])
                self._note_changed(chosen)
            else:
                self._change(chosen, lambda piece: piece.mul_(factor.to(piece.device)))
        self._factors.scale(whole, factor)

    def check_and_unscale(self, indices: Sequence[int], found_inf: Tensor, inv_scale: Tensor) -> None:
        """What a GradScaler asks for: set `found_inf` to 1 when an element on any rank is not finite, and multiply by
        `inv_scale`. Collective."""
        self._prepare(indices)
        for unscaling in self._unscaling:
            unscaling(list(indices), inv_scale.item())
        note_norms([self._stores[b] for b, chosen in self._by_bucket(indices) if self._is_all_of(b, chosen)], 2.0)
        finite = [flag for bucket, chosen in self._by_bucket(indices) for flag in self._are_finite(bucket, chosen)]
        found = found_inf.reshape(()) != 0
        if finite:
            found = found | ~torch.stack(finite).all().to(found.device)
        device = self._stores[0].reduced.device
        overflow = agree_on_overflow(self._transport, device, found=found, scale=inv_scale.double().reciprocal())
        if overflow:
            found_inf.fill_(1.0)
        self._found = found_inf, found_inf._version, overflow
        self.checked.update(indices)
        if not (inv_scale.is_cpu and inv_scale == 1):
            self._scale(indices, inv_scale)

    def has_found(self, found_inf: Tensor) -> bool:
        """What a GradScaler's tensor says, which is known without looking if it is the one in which an overflow was noted last."""
        last, version, overflow = self._found
        return overflow if found_inf is last and found_inf._version == version else bool(found_inf)

    def _prepare(self, indices: Sequence[int]) -> None:
        """Before gradients are used: have them all reduced."""
        self._check_kept("using param.grad")
        if tensor_operators.is_in_backward():
            raise StateError(
                "a sharded gradient was used while backward runs; it is reduced, and may be used, when backward is through"
            )
        for index in indices:
            if not self._shown[index]:
                raise StateError(
                    f"the gradient of {self._params[index].name!r} was cleared; it is not param.grad any more"
                )
        for index in self.local.keys() & set(indices):
            if self.is_shown(self._params[index]):
                raise StateError(
                    f"the last backward ran under no_sync(), so the gradient of {self._params[index].name!r} is not reduced "
                    "yet on any rank; run the last backward before a step outside of no_sync()"
                )
        self._finish()

    def _finish(self) -> None:
        finish = None if self._wait is None else self._wait()
        if finish is not None:
            finish()

    def _change(self, indices: Sequence[int], change: Callable[[Tensor], Any]) -> None:
        """Change gradients element by element, in place."""
        self._finish()
        for index in indices:
            piece = self.piece(index)
            if piece is not None:
                change(piece)
        self._note_changed(indices)

    def _by_bucket(self, indices: Sequence[int]) -> Iterable[tuple[int, list[int]]]:
        chosen: defaultdict[int, list[int]] = defaultdict(list)
        for index in indices:
            chosen[self._bucket_of[index]].append(index)
        return chosen.items()

    def _is_all_of(self, bucket: int, chosen: Sequence[int]) -> bool:
        """Whether nothing else in the bucket has a gradient."""
        members = self._params_of[bucket]
        if len(chosen) == 1 and len(members) > 1:  # loops over the gradients of a large bucket come here often
            return False
        return len(set(chosen)) == sum(self._shown[index] for index in members)

    def _are_finite(self, bucket: int, chosen: Sequence[int]) -> Iterator[Tensor]:
        """0-dim bools, of elements on this rank."""
        if self._is_all_of(bucket, chosen):
            yield is_finite(self._stores[bucket])
            return
        for piece in map(self.piece, chosen):
            if piece is not None:
                yield piece.isfinite().all()

    def _norms_over_ranks(self, known: Collection[int], norm_type: float) -> dict[int, Tensor]:
        """0-dim float64, of all gradients but the known ones."""
        missing = [index for index, shown in enumerate(self._shown) if shown and index not in known]
        if self._exact_norms:
            return self._exact_norms_over_ranks(missing, norm_type)
        # Of all parameters, so that ranks exchange as much whatever each knows.
        powers = torch.zeros(len(self._objects), dtype=torch.float64, device=self._stores[0].reduced.device)
        for index in missing:
            segment = self._segments.get(index)
            if segment is not None and self._transport.replica == 0:
                powers[index] = _power(self._store(index), segment, norm_type)
        is_max = math.isinf(norm_type)
        # Not reduced on the way, where a maximum may lose a NaN.
        by_rank = self._transport.control.gather(powers, _WHAT)
        powers = by_rank.amax(dim=0) if is_max else by_rank.sum(dim=0)
        norms = self._norms_over_mesh(powers, norm_type)
        return {index: norms[index] for index in missing}

    def _exact_norms_over_ranks(self, missing: Sequence[int], norm_type: float) -> dict[int, Tensor]:
        chosen = set(missing) if self._transport.replica == 0 else set()
        terms = [
            [NormTerm(self._summed(i) if i in chosen else self._store(i).reduced[:0], self._store(i).norm_weight, None)]
            for i in range(len(self._objects))
        ]
        numel = sum(managed.numel for managed in self._params)
        powers = exact_powers(terms, numel, lambda told: self._transport.control.gather(told, _WHAT), norm_type)
        norms = self._norms_over_mesh(powers, norm_type)
        factors = [self._store(index).factor for index in missing]
        return {
            index: norms[index] if factor is None else norms[index] * factor.double().abs()
            for index, factor in zip(missing, factors, strict=True)
        }

    def _norms_over_mesh(self, powers: Tensor, norm_type: float) -> Tensor:
        """From what this rank's part of each gradient comes to, with all ranks that hold slices of it."""
        is_max = math.isinf(norm_type)
        for group in self._mesh_groups:
            powers = group.largest(powers, _WHAT) if is_max else group.total(powers, _WHAT)
        return powers if is_max else powers.pow(1.0 / norm_type)

    def _summed(self, index: int) -> Tensor:
        """This rank's piece of a sum, without its factor, 1-D; empty where it has none."""
        store, segment = self._store(index), self._segments.get(index)
        return store.reduced[:0] if segment is None else store.reduced[segment.offset : segment.offset + segment.numel]

    def _store(self, index: int) -> GradientStore:
        return self._stores[self._bucket_of[index]]


def _power(store: GradientStore, segment: Segment, norm_type: float) -> Tensor:
    """sum |g|^p of one segment, or the largest |g| for inf; 0-dim float64."""
    piece = store.reduced[segment.offset : segment.offset + segment.numel]
    wide = torch.float64 if piece.dtype is torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(piece, norm_type, dtype=wide).double()
    if store.factor is not None:
        norm = norm * store.factor.abs()
    power: Tensor = norm if math.isinf(norm_type) else norm.pow(norm_type) * store.norm_weight
    return power
