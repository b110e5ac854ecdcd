"""The functions run for good: a model on the meta device gets values, module by module.

                        a parameter in a bucket, kept as it is      one that is rounded, or shared and written by another rank
    first call with it  writes into the bucket                      gets memory of its own, in its own dtype
    last call with it                                               that goes into the bucket, and is let go

What was saved is read likewise, tensor by tensor: all of it by the ranks whose values the others take over or share, and by the
others what they alone keep, that which completes their own range.

Where the values of rank 0 replace those of this one, the memory is folded: it takes little, and keeps nothing; functions cannot tell,
for they cannot look at values on the meta device either, where they were tried.

Memory beside the buckets is thus that of one module, on one rank, or on each where they keep their own; of several where one
function writes the parts of a module again, as `nn.Transformer` does, and needs what was there before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives import Transport
from ..errors import ConfigError
from ..options.config import Config
from ..pages import folded, paged_zeros
from ..plan.agreement import agree
from ..plan.params import ManagedParam
from ..storage.bucket import SET_AT_ONCE, Bucket, pieces_of
from .call import Call
from .functions import Init, as_functions
from .saved import Saved
from .trial import try_out
from .unmade import Hollowing, Unmade, device_for, find_unmade

_BUILDING = "building the model"


def prepare(
    model: nn.Module, init: Init | Saved | Sequence[Init | Saved] | None, device: torch.device | str | None
) -> Building | None:
    """Find out how a model on the meta device is made, and let what is there be without memory on its device. Not collective.

    Returns:
        What makes it; None where nothing of the model is on the meta device.

    Raises:
        ConfigError, NotSupportedError: it cannot be made. Nothing has been changed.
        CheckpointError: what was saved is not of this model. Nothing has been changed.
    """
    functions = as_functions(init)
    saved = [one for one in functions if isinstance(one, Saved)]
    unmade = find_unmade(model)
    if not unmade:
        if saved:
            raise ConfigError(
                f"init gives {saved[0].place}, from which a model on the meta device gets its values, and nothing of this one is "
                "there; wrap it without, and load the checkpoint (zeroopt.checkpoint.load)"
            )
        return None
    chosen = device_for(model, device)
    return Building(unmade, try_out(model, functions, unmade, chosen), saved, chosen)


class Building:
    """Makes what of a model is on the meta device.

    Args:
        calls: what gives it values, in this order.
        saved: what they read.
        device: where it will lie. From now on it seems to lie there, but has no memory.
    """

    def __init__(
        self, unmade: Mapping[Tensor, Unmade], calls: Sequence[Call], saved: Sequence[Saved], device: torch.device
    ) -> None:
        self._unmade, self._calls, self._saved, self._device = unmade, calls, saved, device
        self._dtypes = {tensor: tensor.dtype for tensor in unmade}
        self._next = _next_overwrites(calls)
        self._hollowing = Hollowing(list(unmade.values()), device)

    def undo(self) -> None:
        """Let everything be on the meta device again, before `run`."""
        self._hollowing.undo()

    def describe(self) -> list[str]:
        """What all ranks have to have in common."""
        on_meta = [f"{one.kind} {one.name!r} on the meta device" for one in self._unmade.values()]
        return on_meta + [f"values from {saved.describe()}" for saved in self._saved]

    def verify(self, group: dist.ProcessGroup) -> None:
        """Look whether what is to be read is whole. Collective.

        Raises:
            CheckpointError: on all ranks, with what is damaged. Nothing has been changed.
        """
        for saved in self._saved:
            saved.verify(group)

    def run(self, buckets: Iterable[Bucket], transport: Transport, config: Config) -> None:
        """Give everything its values. Collective. Parameters that were in no optimizer get memory of their own.

        All ranks call all functions, as they would all construct the model, and so draw the same random numbers. Of what is rounded,
        they take the values of rank 0 here, with `sync_module_states`; everything else is yet to be taken over.

        Raises:
            RankMismatchError: a function fails on some rank that did not when it was tried. On all ranks; the model is
                of no use then.
        """
        places = _Places(buckets, transport, config, self._dtypes, self._device)
        problem: Exception | None = None
        for number, call in enumerate(self._calls):
            places.open(call.overwrites, is_alike=call.is_alike)
            with places.discarding(call.discarded):
                try:
                    if problem is None:
                        call(partial(self._needed, number, places))
                except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
                    problem = error
            for tensor in call.overwrites:
                overwritten = self._next[number, tensor]
                if overwritten is None:
                    places.close(tensor, is_alike=call.is_alike)
                elif overwritten:
                    places.drop(tensor)
        agree([(transport.control, [])], problem, _BUILDING)

    def _needed(self, number: int, places: _Places, tensor: Tensor) -> tuple[int, int]:
        """What of a tensor has to be written by a call: all of it where a later one reads it."""
        return places.needed(tensor) if self._next[number, tensor] is None else (0, tensor.numel())


def _next_overwrites(calls: Sequence[Call]) -> dict[tuple[int, Tensor], bool | None]:
    """By the number of a call and a tensor that it reads or writes: whether the next call with that tensor begins with writing all
    of it, so that what is there need not be kept. None where there is no such call."""
    found: dict[tuple[int, Tensor], bool | None] = {}
    following: dict[Tensor, bool] = {}
    for number, call in reversed(list(enumerate(calls))):
        for tensor, overwrites in call.overwrites.items():
            found[number, tensor] = following.get(tensor)
            following[tensor] = overwrites
    return found


class _Places:
    """Where tensors lie while functions write them, and where they go afterwards."""

    def __init__(
        self,
        buckets: Iterable[Bucket],
        transport: Transport,
        config: Config,
        dtypes: Mapping[Tensor, torch.dtype],
        device: torch.device,
    ) -> None:
        self._transport, self._config, self._dtypes, self._device = transport, config, dtypes, device
        self._writes = transport.writes_parameters or not config.share_parameters
        # Whose parameters are the model's: others get them from there.
        self._gives = transport.control.rank == 0 if config.sync_module_states else self._writes
        self._in_buckets: dict[Tensor, tuple[Bucket, ManagedParam]] = {
            managed.param: (bucket, managed) for bucket in buckets for managed in bucket.params
        }
        self._open: set[Tensor] = set()

    def open(self, tensors: Iterable[Tensor], *, is_alike: bool) -> None:
        """Let the tensors have memory, to be written.

        Args:
            is_alike: all ranks write the same.
        """
        takes_over = self._config.sync_module_states and not self._gives and not is_alike
        for tensor in tensors:
            if tensor not in self._open and not self._is_written_in_place(tensor):
                self._open.add(tensor)
                # Of values that those of rank 0 replace, all that counts is which random numbers they take.
                tensor.data = self._memory_for(tensor, is_needed=tensor not in self._in_buckets or not takes_over)

    @contextmanager
    def discarding(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Within it, what is written to the tensors goes elsewhere, and is forgotten."""
        kept = {tensor: tensor.data for tensor in tensors}
        for tensor in kept:
            tensor.data = self._memory_for(tensor)
        yield
        for tensor, values in kept.items():
            tensor.data = values

    def drop(self, tensor: Tensor) -> None:
        """What was written is overwritten before anybody reads it."""
        if tensor in self._in_buckets and tensor in self._open:
            self._open.remove(tensor)
            bucket, managed = self._in_buckets[tensor]
            managed.set_local(managed.view_in(bucket.flat_param))

    def needed(self, tensor: Tensor) -> tuple[int, int]:
        """Of which elements this rank has to know final values, that all ranks know alike."""
        if tensor not in self._in_buckets or self._gives:
            return 0, tensor.numel()
        bucket, managed = self._in_buckets[tensor]
        if not bucket.master.completes:
            return 0, 0
        begin, end = (place - managed.offset for place in bucket.own_range)
        return max(0, begin), min(managed.numel, end)

    def close(self, tensor: Tensor, *, is_alike: bool) -> None:
        """The values are final: let them go where they belong. Collective where they are rounded.

        Args:
            is_alike: all ranks know the same.
        """
        if tensor not in self._open:
            return
        if tensor in self._in_buckets:
            bucket, managed = self._in_buckets[tensor]
            takes_over = self._config.sync_module_states and self._is_rounded(tensor) and not is_alike
            for first, piece in pieces_of(managed, managed.local):
                if takes_over:
                    self._transport.control.broadcast([piece], 0, _BUILDING)  # or masters would differ
                bucket.set_piece(first, piece, writes=self._writes)
        elif isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            self._round_frozen(tensor)
        self.drop(tensor)

    def _round_frozen(self, param: nn.Parameter) -> None:
        dtype = self._config.precision.param_dtype
        if dtype is not None and param.dtype is torch.float32:
            param.data = param.data.to(dtype)

    def _memory_for(self, tensor: Tensor, *, is_needed: bool = True) -> Tensor:
        dtype, numel = self._dtypes[tensor], tensor.numel()
        if tensor not in self._in_buckets:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=self._device)
        # They go back as soon as the values are in a bucket; the C heap would keep them.
        flat = paged_zeros(numel, dtype, self._device) if is_needed else folded(numel, SET_AT_ONCE, dtype, self._device)
        return flat.as_strided(tensor.shape, tensor.stride())

    def _is_written_in_place(self, tensor: Tensor) -> bool:
        return tensor in self._in_buckets and self._writes and not self._is_rounded(tensor)

    def _is_rounded(self, tensor: Tensor) -> bool:
        """Whether the bucket has less than a parameter's exact values. Alike on all ranks."""
        bucket, _ = self._in_buckets[tensor]
        return bucket.dtype is not self._dtypes[tensor] or bucket.master.completes
