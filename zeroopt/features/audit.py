"""What every k-th step looks at, with `check_every=k`: whether gradients are finite, and parameters the same on all ranks.

While backward runs, each full bucket is looked at before it travels, since afterwards nobody can tell on which rank a
gradient was not finite. Before the step, ranks tell each other in one number whether sums are finite and what the digest of
their parameters is, and after it the digest of the new ones. Names travel only where something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..collectives import Transport
from ..collectives.failure import name_ranks
from ..errors import NonFiniteError, RankMismatchError
from ..feature import Feature, Step
from ..plan.params import ManagedParam
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore
from ..storage.stripe import Stripe

_WHAT = "exchange of check_every"  # for messages
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_NUMEL = 1 << 20  # elements that are digested together, which takes 16 bytes for each
_CHUNK_FACTOR = -0x61C8864680B583EB  # 2^64 / golden ratio, which is odd, as a signed number


class Audit(Feature):
    """Looks at the gradients and parameters of one wrapped model in every k-th step.

    All ranks raise the same error, or none.

    Args:
        every: k.
        params: by their index; more may come.
        finish_gathers: waits until all parameters are there.
    """

    def __init__(
        self,
        every: int,
        params: Sequence[ManagedParam],
        transport: Transport,
        finish_gathers: Callable[[], None],
    ) -> None:
        self._every = every
        self._num_steps = 0
        self._params = params
        self._finish_gathers = finish_gathers
        self._transport = transport
        # By index of a parameter: in which backward since gradients were cleared this rank's gradient was first not finite.
        self._found: dict[int, int] = {}
        self._num_backwards = 0

    @property
    def _is_due(self) -> bool:
        """Whether the step that comes next is one to look at."""
        return (self._num_steps + 1) % self._every == 0

    def bucket_filled(self, bucket: Bucket, stripe: Stripe, full: Tensor) -> None:
        """Note which of this rank's gradients are not finite."""
        if not self._is_due:
            return
        self._num_backwards += bucket.index == 0 and stripe.is_first
        if not full.isfinite().all():
            for owner, _, offset, numel in stripe.pieces(bucket.params):
                if not full[offset : offset + numel].isfinite().all():
                    self._found.setdefault(owner.index, self._num_backwards)

    def gradients_cleared(self, buckets: Sequence[Bucket] | None) -> None:
        """Nothing that was found in them is there any more."""
        if buckets is None:
            self._found.clear()
            self._num_backwards = 0
        for bucket in buckets or ():
            for managed in bucket.params:
                self._found.pop(managed.index, None)

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Look at the parameters and reduced gradients that a step is about to start from.

        With a GradScaler, gradients need not be finite: a scaled loss makes them overflow, and the step is then skipped.

        Raises:
            RankMismatchError: a parameter differs between ranks.
            NonFiniteError: a gradient is not finite.
        """
        if not self._is_due:
            return
        active = step.sum_gradients()
        with named_range("check"):
            bad = [] if step.found_inf is not None else _not_finite(step.buckets, step.stores, active.tolist())
            everyone = self._exchange(_short_digest(step.buckets) << 1 | bool(bad), "check before a step")
            if len({number >> 1 for number in everyone}) > 1:
                self._blame_parameters(f"before step {step.number}")
            if any(number & 1 for number in everyone):
                self._blame_gradients(step.number, bad)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Look at the parameters to which a step has come.

        Raises:
            RankMismatchError: a parameter differs between ranks.
        """
        is_due = self._is_due
        self._num_steps += 1
        if is_due:
            self._finish_gathers()
            with named_range("check"):
                if len(set(self._exchange(_short_digest(step.buckets), "check after a step"))) > 1:
                    self._blame_parameters(f"after step {step.number}")

    def _blame_parameters(self, when: str) -> None:
        control = self._transport.control
        digests = [int(digest(_elements(managed))) for managed in self._params]
        mine = torch.tensor(digests, dtype=torch.int64, device=control.device)
        # Of signed numbers, bits turned over are in the opposite order.
        is_alike = control.largest(mine.clone(), _WHAT) == ~control.largest(~mine, _WHAT)
        differing = [index for index, alike in enumerate(is_alike.tolist()) if not alike]
        if differing:
            first, *rest = differing
            everyone = control.numbers([digests[first]], _WHAT)
            ranks = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
            raise RankMismatchError(
                f"{when}: parameter {self._params[first].name!r}{_and_more(rest)} is not the same on all ranks: on "
                f"{name_ranks(ranks)} it differs from rank 0. Something has written it on some ranks only (through "
                "param.data, say), or memory or network has failed: make the same changes on all ranks, or load the same "
                "state_dict() on all"
            )

    def _blame_gradients(self, step: int, bad: Sequence[int]) -> None:
        control = self._transport.control
        flags = torch.zeros(2, len(self._params), dtype=torch.uint8, device=control.device)
        flags[0, list(bad)] = 1
        flags[1, list(self._found)] = 1
        sums, found = control.largest(flags, _WHAT).cpu()
        # Clipping by a norm that is not finite leaves no gradient finite; what a backward has left like that comes first.
        to_blame = sums & found if (sums & found).any() else sums
        first, *rest = to_blame.nonzero().flatten().tolist()
        # After a reduce it is in the sum on every rank: who had it in the earliest backward is to blame.
        numbers = [number for (number,) in control.numbers([self._found.get(first, -1)], _WHAT)]
        earliest = min((number for number in numbers if number >= 0), default=None)
        ranks = [rank for rank, number in enumerate(numbers) if number == earliest]
        whose = (
            f"backward left it so on {name_ranks(ranks)}"
            if ranks
            else "this step's backward left it finite on every rank, so their sum has overflowed, it was kept from an earlier "
            "step, or something else has changed it"
        )
        raise NonFiniteError(
            f"before step {step}: the gradient of parameter {self._params[first].name!r}{_and_more(rest)} has elements that "
            f"are not finite; {whose}. Nothing has been changed: zero_grad() on all ranks drops this step's gradients, and "
            "torch.autograd.set_detect_anomaly(True) tells which operation yields them"
        )

    def _exchange(self, number: int, label: str) -> list[int]:
        """Numbers of up to 53 bits of all ranks, in any order. Collective."""
        value = torch.tensor(number, dtype=torch.float64, device=self._params[0].param.device)
        return [int(one) for one in self._transport.gather_scalar(value, label=label).tolist()]


def digest(values: Tensor) -> Tensor:
    """A checksum over the bits of a 1-D tensor, 0-dim int64, the same for the same bits on any device. Two tensors that differ
    in one element have different ones.

    Sum of element i times (2 i + 1), chunk by chunk, modulo 2^64: odd factors lose nothing.
    """
    bits = values.view(_BITS[values.element_size()])
    factors = torch.arange(1, 2 * min(_CHUNK_NUMEL, max(1, bits.numel())), 2, dtype=torch.int64, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in torch.split(bits, _CHUNK_NUMEL):
        total = total * _CHUNK_FACTOR + (chunk * factors[: chunk.numel()]).sum()
    return total


def _short_digest(buckets: Sequence[Bucket]) -> int:
    """Of all parameters, in 52 bits."""
    whole = int(digest(torch.stack([digest(bucket.flat_param) for bucket in buckets]))) % 2**64
    return (whole ^ whole >> 52) % 2**52


def _elements(managed: ManagedParam) -> Tensor:
    """Of a parameter, 1-D, as they lie in its bucket."""
    return managed.flatten(managed.local)


def _not_finite(buckets: Sequence[Bucket], stores: Sequence[GradientStore], active: Sequence[int]) -> list[int]:
    """Parameters of which this rank's piece of the reduced gradient is not finite, by index."""
    return [
        segment.owner.index
        for bucket, store in zip(buckets, stores, strict=True)
        if not store.reduced.isfinite().all()
        for segment in bucket.segments
        if active[segment.owner.index]
        and not store.reduced[segment.offset : segment.offset + segment.numel].isfinite().all()
    ]


def _and_more(rest: Sequence[int]) -> str:
    return f" (and {len(rest)} more)" if rest else ""
