"""What one optimizer trains of a wrapped model: its parameters and buckets, and the state of what this rank steps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import ConfigError
from .options.config import Config
from .pages import trim_heap
from .plan.params import ManagedParam
from .replica import Replica
from .state.dicts import StateDicts, StepCounter
from .stepping.stepper import ShardStepper
from .storage.bucket import Bucket
from .storage.gradient_store import GradientStore
from .storage.segment import Segment


class Trained:
    """Those parameters and buckets of a replica that one optimizer steps.

    Attributes:
        number: of the optimizer among those of the model.
        inner: the torch optimizer that was wrapped.
        params, buckets: in the order in which they were taken in. The lists stay the same objects.
        generations: for each time that some were taken in, their positions in `params` in the order in which the plan takes them.
        stepper: steps what this rank owns of the buckets.
        state_dicts: saves and loads its state.

    Args:
        seed: of stochastic rounding, the same on all ranks that step the same parameters.
        since_average: counts steps since parameters were averaged; None where they are not.
    """

    def __init__(
        self,
        replica: Replica,
        inner: torch.optim.Optimizer,
        config: Config,
        seed: int,
        since_average: StepCounter | None,
    ) -> None:
        self.number = len(replica.optimizers)
        self.replica = replica
        self.inner = inner
        self.config = config
        self.params: list[ManagedParam] = []
        self.buckets: list[Bucket] = []
        self.generations: list[list[int]] = []
        self._versions: list[int] = []
        self.stepper = ShardStepper(inner, seed, config)
        self.state_dicts = StateDicts(
            replica.transport, replica.ownership, inner, self.params, self.buckets, self.stepper, config, since_average
        )

    def extend(self, params: Sequence[ManagedParam]) -> None:
        """Take in further parameters, in buckets of their own, with the state that the inner optimizer has for them. Collective.

        Before the next step, `attach_buckets`.
        """
        taken = self.replica.take_in(params, self.config.precision)
        self.buckets += taken
        self.params += params
        first = len(self.params) - len(params)
        self.generations.append(list(reversed(range(first, len(self.params)))))
        self._versions += [managed.param._version for managed in params]
        self.state_dicts.begun.update(m.position for m in params if m.param in self.inner.state)
        self.state_dicts.take_in_state(taken)
        trim_heap()  # of values on their way into buckets and masters

    def keep(self, kept: Sequence[ManagedParam]) -> None:
        """Some parameters have left their buckets, and only these of `params` are left. Not collective."""
        new_of = {managed: new for new, managed in enumerate(kept)}
        new_position = {old: new_of[managed] for old, managed in enumerate(self.params) if managed in new_of}
        self._versions = [self._versions[old] for old in new_position]
        self.params[:] = kept
        orders = [[new_position[old] for old in order if old in new_position] for order in self.generations]
        self.generations = [order for order in orders if order]

    def attach_buckets(self) -> None:
        """Step by the buckets, groups and state as they are now."""
        self.stepper.attach(self.buckets, self.stores)
        self.state_dicts.consolidated = None

    @property
    def stores(self) -> list[GradientStore]:
        """The gradients of its buckets, where `finish_reduces` has been called since the last backward."""
        return [self.replica.reducer.stores_of_params[bucket.index] for bucket in self.buckets]

    def segments(self) -> Iterator[Segment]:
        """What this rank steps."""
        for bucket in self.buckets:
            yield from bucket.segments

    def managed(self, param: Tensor) -> ManagedParam:
        """What is known of a parameter.

        Raises:
            ConfigError: the optimizer does not train it.
        """
        for managed in self.params:
            if managed.param is param:
                return managed
        raise ConfigError(
            f"expected a parameter that this optimizer trains, got another tensor of shape {list(param.shape)}"
        )

    def gather_number(self, number: float, label: str) -> Tensor:
        """A number of each rank, float64 [world_size]. Collective; the transport notices when another rank does something else."""
        value = torch.tensor(number, dtype=torch.float64, device=self.params[0].param.device)
        return self.replica.transport.gather_scalar(value, label=label)

    def finish_reduces(self) -> Tensor:
        """Have all gradients summed, where their parameters lie. Returns uint8 [number of parameters], 1 where there is a gradient to
        step with. Collective."""
        active = self.sum_gradients()
        self.replica.rejoin_gradients()
        return active

    def sum_gradients(self) -> Tensor:
        """Likewise, wherever they lie."""
        self.replica.reducer.finish()
        active = self.replica.reducer.view.take()
        if not active.all():
            self.replica.check_replaced(self.params)
            self.replica.reducer.clear_unused(active.tolist())
        return active

    # Parameters are written by kernels and transports, behind autograd's back.

    def note_changes(self, active: Tensor) -> None:
        """Tell autograd of parameters that change, so that it can refuse a backward through a graph that was recorded before.

        Args:
            active: uint8 [number of parameters of the model], 1 for those that do.
        """
        flags = active.tolist()
        _raise_versions([managed.param for managed in self.params if flags[managed.index]])
        self.note_versions()

    def note_versions(self) -> None:
        """From here on, other versions of parameters mean that something other than a step has written them."""
        self._versions = [managed.param._version for managed in self.params]

    def follow_writes(self) -> None:
        """Let exact values follow parameters that something other than a step has written since, if anything has."""
        written = [m for m, version in zip(self.params, self._versions, strict=True) if m.param._version != version]
        if written:
            self.take_up_writes(written)

    def take_up_writes(self, written: Collection[ManagedParam] | None = None) -> None:
        """Let exact values follow the parameters. Not collective.

        Args:
            written: those that may have been; None: any.
        """
        chosen = set(self.params if written is None else written)
        for bucket in self.buckets:
            if not chosen.isdisjoint(bucket.params):
                bucket.master.follow_writes([segment for segment in bucket.segments if segment.owner in chosen])
        self.note_versions()

    @contextmanager
    def rewriting_parameters(self, *, exact: bool = True) -> Iterator[None]:
        """Within it, every rank writes its own range of the buckets; then all get them. Collective.

        Args:
            exact: exact values are written, and models get these; else what models have is, and exact values stay.
        """
        replica = self.replica
        replica.gathers.finish_all()
        everyone_came = replica.transport.start_rendezvous("writing parameters")
        everyone_came.finish()  # nobody reads them any more
        yield
        for bucket in self.buckets:
            if exact:
                bucket.master.catch_up()
            replica.gathers.start_written(bucket)
        replica.gathers.leave_to_readers()
        self.note_changes(torch.ones(len(replica.params), dtype=torch.uint8, device="cpu"))


_TAKES_MANY = "Iterable" in str(torch.autograd.graph.increment_version.__annotations__)  # torch 2.6 and later


def _raise_versions(params: Sequence[Tensor]) -> None:
    """Tell autograd that these are written."""
    if _TAKES_MANY:
        torch.autograd.graph.increment_version(params)
    else:
        for param in params:
            torch.autograd.graph.increment_version(param)
