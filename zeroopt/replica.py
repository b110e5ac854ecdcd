"""What a wrapped model and its optimizers work on together: buckets of parameters, and what travels between ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from ._C import Plan
from .building.building import Building
from .collectives import ControlGroup, Transport, Wire
from .collectives.compression import CompressedWire, HostSumsWire
from .collectives.residual import Residual
from .collectives.rounding import Noise, RoundingNumbers
from .collectives.turnout import Turnout
from .errors import StateError
from .feature import Features
from .gradients.norm_groups import NormGroups
from .gradients.reducer import GradientReducer
from .gradients.residuals import collect_residuals, hand_out_residuals
from .gradients.sharded_view import ShardedView
from .gradients.untrained import describe_untrained
from .gradients.view import GradientView
from .gradients.whole_view import WholeView
from .options.config import Config
from .options.precision import CODE_BITS, Precision
from .pages import trim_heap
from .parameters.gathers import NoGathers, ParamGathers
from .plan.agreement import agree
from .plan.buckets import choose_bucket_bytes, is_compressible, make_plan
from .plan.claims import claim, claimed_params, release
from .plan.dtensors import count_copies, find_mesh, local_of, mesh_groups
from .plan.ownership import Ownership
from .plan.params import ManagedParam, ParamState
from .state.moving import Extent, hand_out, move_arrays
from .storage.bucket import Bucket, fill_buckets, lay_out_buckets
from .storage.buffer_pool import BufferPool
from .storage.gradient_store import GradientStore
from .storage.masters import Master
from .storage.segment import BySegments, Segment
from .storage.slice_sums import SliceSums
from .weak_methods import weak_method

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What is going on, for messages.
_TAKING_IN = "averaging the gradients of parameters that are taken in"
_SYNCING = "taking over the parameters and buffers of rank 0"


class Replica:
    """The buckets of one wrapped model.

    Attributes:
        module: the model that was wrapped.
        params: those that are trained, by their index.
        buckets: by their index.
        ownership: which elements of the buckets this rank steps.
        group: it was wrapped with, and what its ranks tell each other. Where each of them trains alone, `transport` has one rank.
        bucket_bytes: the size of a bucket.
        mesh: of the model's DTensors, and its groups of more than one rank.
        norm_groups: over which the norm of the gradients is that of the whole model.
        seed: of stochastic rounding, the same on all ranks.
        slice_sums: memory for sums on their way from slices to those who step them.
        rounding: by which numbers what travels as codes is rounded.
        dtypes: of the model's parameters, before they were wrapped.

    Args:
        features: what takes part in every backward.
        turnout: which ranks still train.
        check_outside: raises where what it is told is about to be done cannot be done by all ranks.
        building: what gives the module its values, when its first parameters are in buckets.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        transport: Transport,
        group: dist.ProcessGroup,
        features: Features,
        turnout: Turnout,
        check_outside: Callable[[str], None],
        building: Building | None = None,
    ) -> None:
        self.module = module
        self._building = building
        self.config = config
        self.transport = transport
        self.group = group
        self.control: ControlGroup = ControlGroup(group)
        self.mesh: DeviceMesh | None = find_mesh(module, group)
        self.mesh_groups: list[ControlGroup] = mesh_groups(self.mesh)
        self.norm_groups: NormGroups = NormGroups(
            [*self.mesh_groups, *([ControlGroup(config.norm_group)] if config.norm_group is not None else [])]
        )
        self.params: list[ManagedParam] = []
        self.buckets: list[Bucket] = []
        self.dtypes: dict[Tensor, torch.dtype] = {param: param.dtype for param in module.parameters()}
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []  # which have this
        placement = config.placement
        self.ownership: Ownership = Ownership(
            transport.num_slices, transport.slice_index, by_slices=placement.shard_state, replica=transport.replica
        )
        sharded = self._make_sharded_view(features, check_outside) if placement.shard_state else None
        on_the_way = _most_over(self.mesh_groups, _bytes_on_the_way(module, config))
        self.bucket_bytes: int = choose_bucket_bytes(config.bucket_mb, on_the_way, transport.hops)
        pool = BufferPool(config, self.bucket_bytes, transport) if placement.shard_gradient else None
        self._pool = pool
        self.slice_sums: SliceSums = SliceSums()
        view: GradientView = WholeView(transport) if sharded is None else sharded
        self.reducer: GradientReducer = GradientReducer(
            module,
            transport,
            view,
            features,
            turnout,
            weak_method(self._make_store),
            pool,
            overlap=config.overlap,
            bucket_buffers=config.bucket_buffers,
        )
        if sharded is not None:
            sharded.wait_by(self.reducer.finish)
        self.seed: int = _agree_on_seed([self.control, *self.mesh_groups])
        self.rounding: RoundingNumbers = RoundingNumbers(self.seed, weak_method(self.reducer.count))
        self.gathers: NoGathers | ParamGathers = (
            NoGathers(module, transport, lazy=False)
            if self.ownership.has_all
            else ParamGathers(module, transport, lazy=config.overlap, rounding=self.rounding)
        )
        claim(self)

    def _make_sharded_view(self, features: Features, check_outside: Callable[[str], None]) -> ShardedView:
        config = self.config
        return ShardedView(
            self.transport,
            features,
            check_outside,
            self.mesh_groups,
            config.check_keeps_gradients,
            keeps_sums=not config.step_in_backward,
            exact_norms=config.micro_batches is not None,
        )

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that have been wrapped with the model, in that order."""
        return [optimizer for known in self._optimizers if (optimizer := known()) is not None]

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """One more has been wrapped with the model."""
        self._optimizers.append(weakref.ref(optimizer))

    @property
    def compresses(self) -> bool:
        """Whether gradients travel as codes; within a host they do not."""
        return self.config.gradient_compression is not None and len(self.transport.sent_slices) > 0

    def _make_store(self, bucket: Bucket) -> GradientStore:
        return GradientStore(bucket, self.ownership, self._wire_of(bucket), self.transport, self._pool, self.slice_sums)

    def _wire_of(self, bucket: Bucket) -> Wire:
        config, transport = self.config, self.transport
        if config.wire is not None:
            return config.wire
        # All parameters of a bucket are alike in that.
        if not self.compresses or not is_compressible(bucket.params[0], bucket.dtype):
            return Wire(config.reduce_dtype)
        assert config.gradient_compression is not None
        slice_numel = bucket.padded_numel // transport.num_slices
        lengths = [slice_numel] if self._pool is None else [s.end - s.begin for s in self._pool.stripes(bucket)]
        longest, bits = max(lengths), CODE_BITS[config.gradient_compression]
        if ops.encoded_bytes(longest, bits) >= longest * (config.reduce_dtype or bucket.dtype).itemsize:
            return Wire(config.reduce_dtype)  # of so few elements a rank, codes are longer than these
        sent = transport.sent_slices
        residual = Residual(sent.start * slice_numel, len(sent), lengths, bucket.device)
        noise = Noise(self.rounding, transport.control.rank, bucket.key)
        wire = CompressedWire(config.reduce_dtype, bits, residual, noise)
        return HostSumsWire(wire) if transport.sums_twice else wire

    def take_in(self, params: Sequence[ManagedParam], precision: Precision) -> list[Bucket]:
        """Move further parameters into buckets of their own, and return those. Collective.

        Gradients that they have, which are those of each rank alone, become the mean over ranks.

        Args:
            params: in the model's order; their indices go on from those of `params`.

        Raises:
            Exception: memory is wanting, or the like, on this rank. The parameters are in memory of their own again; where they were
                to be rounded, some are.
            RankMismatchError: so it is on another rank.
        """
        config = self.config
        self.rejoin_gradients()
        self._average_gradients(params)
        plan = self.make_plan(params, precision)
        if any(bucket.owners for bucket in plan.buckets):
            self.transport.open_exchange()
        if config.sync_module_states and precision.param_dtype is not None:
            self._sync_params(params)  # before they are rounded, or masters would differ
        buckets = lay_out_buckets(
            plan, params, self.ownership, precision, home=config.placement.home, first_index=len(self.buckets)
        )
        self._on_all(
            "moving parameters into buckets",
            lambda: fill_buckets(buckets, self.transport, shared=config.share_parameters),
            lambda: self._move_out(buckets),
        )
        if self._building is not None:
            self._building.run(buckets, self.transport, config)
            self._building = None
        if config.sync_module_states:
            self._sync_buckets(buckets)
        self._await_writers(buckets)
        self.params += params
        self.buckets += buckets
        is_first = len(buckets) == len(self.buckets)
        self._on_all(
            "making room for gradients",
            lambda: self.reducer.extend(params, buckets),
            lambda: self._move_out(buckets) if is_first else None,
        )
        self.reducer.untrained.fit({managed.param for managed in self.params})
        self.gathers.extend(buckets)
        if len(buckets) < len(self.buckets):
            self.reducer.start_in_order(self._reverse_order())
        return buckets

    def _on_all(self, what: str, do: Callable[[], None], undo: Callable[[], None]) -> None:
        """Do something for which memory may be wanting, and where it fails on any rank, undo it on all. Collective."""
        problem: Exception | None = None
        try:
            do()
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
            problem = error
        try:
            agree([(self.control, []), *((group, []) for group in self.mesh_groups)], problem, what)
        except Exception:
            undo()
            raise

    def _move_out(self, buckets: Sequence[Bucket]) -> None:
        """Of the first buckets of a model that cannot be wrapped, let parameters have memory of their own again, or none."""
        release(self)
        self.reducer.remove_hooks()
        if self._building is not None:
            self._building.undo()
            return
        for bucket in buckets:
            if not bucket.flat_param.is_meta:
                bucket.release(set(bucket.params))

    def make_plan(self, params: Sequence[ManagedParam], precision: Precision) -> Plan:
        """Plan buckets for these parameters, in this order."""
        config = self.config
        return make_plan(
            params,
            self.ownership,
            self.bucket_bytes,
            precision,
            config.wire_dtype,
            config.placement.home,
            compresses=self.compresses,
        )

    def lay_out(self, plan: Plan, ordered: Sequence[ManagedParam], precision: Precision) -> list[Bucket]:
        """Buckets for all parameters, in the order in which the plan takes them, as layouts alone."""
        return lay_out_buckets(plan, ordered, self.ownership, precision, home=self.config.placement.home)

    def rebuild(self, buckets: Sequence[Bucket], state: BySegments) -> None:
        """Move all parameters into other buckets, layouts so far, and with them whatever lies by their segments. Collective.

        Args:
            buckets: may be those in which gradients are already.
            state: the optimizer's.
        """
        self.gathers.finish_all()
        self.reducer.finish()
        trim_heap()  # of gradients that had to wait for their bucket in the first backward
        wanted = _extents(buckets)
        follows = self.reducer.buckets is buckets
        sums = {} if follows else self._move(self.reducer.stores, self.reducer.buckets, wanted)
        residuals = {} if follows else collect_residuals(self.reducer.stores, self.reducer.buckets)
        for bucket in self.buckets:
            bucket.place_params()  # what else there is lies where they do
        states, masters = (
            self._move(sources, self.buckets, wanted) for sources in ([state] * len(self.buckets), self._masters())
        )
        # Before others are made, which never lie beside all of these.
        self.reducer.free_buffers(keep_sums=follows)
        for bucket in self.buckets:
            bucket.free(self.transport)
        self.buckets[:] = buckets
        for bucket in self.buckets:
            bucket.hold_params(self.transport, shared=self.config.share_parameters, leave=True)
        hand_out(states, self.buckets, [state] * len(self.buckets))
        hand_out(masters, self.buckets, self._masters())
        self._await_writers(self.buckets)
        if follows:
            self.reducer.settle()
        else:
            self.reducer.rebuild(self.buckets)
            hand_out(sums, self.buckets, self.reducer.stores)
            hand_out_residuals(residuals, self.reducer.stores, self.buckets)
        self.reducer.view.moved()
        self.gathers.attach(self.buckets)
        trim_heap()

    def lead_gradients(self, ahead: Sequence[Bucket]) -> None:
        """Put gradients together in other buckets of all parameters, layouts to which the parameters have yet to move, until `rebuild` or
        `rejoin_gradients`. Collective."""
        self._regroup_gradients(ahead, self.reducer.lead)

    def rejoin_gradients(self) -> None:
        """Let gradients lie where their parameters do, if they do not. Collective then."""
        if self.reducer.is_ahead:
            self._regroup_gradients(self.buckets, lambda buckets: self.reducer.rejoin())

    def _regroup_gradients(self, buckets: Sequence[Bucket], go: Callable[[Sequence[Bucket]], None]) -> None:
        self.reducer.finish()
        sums = self._move(self.reducer.stores, self.reducer.buckets, _extents(buckets))
        residuals = collect_residuals(self.reducer.stores, self.reducer.buckets)
        go(buckets)
        hand_out(sums, buckets, self.reducer.stores)
        hand_out_residuals(residuals, self.reducer.stores, buckets)
        self.reducer.view.moved()

    def _move(
        self, sources: Sequence[BySegments], buckets: Sequence[Bucket], wanted: Mapping[int, Extent]
    ) -> dict[int, ParamState]:
        return move_arrays(sources, buckets, wanted, self.ownership, self.transport, self.bucket_bytes)

    def _masters(self) -> list[Master]:
        return [bucket.master for bucket in self.buckets]

    def take_out(self, gone: Collection[ManagedParam]) -> None:
        """Let parameters have memory of their own again. No optimizer trains them any more. Collective.

        The others get new indices. Gradients of those that leave are dropped.
        """
        self.gathers.finish_all()
        self.rejoin_gradients()
        self.reducer.clear(gone)
        for bucket in self.buckets:
            bucket.release(gone)
        order = [managed.index for managed in self.params if managed not in gone]
        self.params[:] = [self.params[old] for old in order]
        for index, managed in enumerate(self.params):
            managed.index = index
        self.reducer.keep(order)
        self.gathers.attach(self.buckets)
        self.reducer.untrained.fit({managed.param for managed in self.params})

    def _await_writers(self, buckets: Sequence[Bucket]) -> None:
        """Parameters are in their buckets when all ranks that write them are through. Collective."""
        if self.config.share_parameters:
            self.transport.barrier()
        for bucket in buckets:
            bucket.master.fetch()  # where parameters are stepped elsewhere

    def _average_gradients(self, params: Sequence[ManagedParam]) -> None:
        control = self.transport.control
        if control.size == 1:
            return
        flags = [managed.param.grad is not None for managed in params]
        used = torch.tensor(flags, dtype=torch.uint8, device=params[0].param.device)
        control.largest(used, _TAKING_IN)
        for managed in (managed for managed, flag in zip(params, used.tolist(), strict=True) if flag):
            mean, grad = torch.zeros_like(managed.local), managed.local_grad()
            if grad is not None:
                mean.copy_(grad).div_(control.size)
            control.total(managed.flatten(mean), _TAKING_IN)
            managed.set_local_grad(mean)

    def check_replaced(self, params: Sequence[ManagedParam]) -> None:
        """Raise StateError when the model no longer has one of these. One without a gradient may be such."""
        present = set(self.module.parameters())
        for managed in params:
            if managed.param not in present:
                raise StateError(
                    f"parameter {managed.name!r} is no longer part of the model: a module was replaced after "
                    "zeroopt.wrap. Change the model first, then wrap it"
                )

    def count_copies(self, params: Sequence[ManagedParam]) -> None:
        """Note on how many ranks of the mesh each parameter lies."""
        for managed in params:
            managed.copies = count_copies(managed, self.mesh)

    def _sync_params(self, params: Sequence[ManagedParam]) -> None:
        for managed in (one for one in params if one.has_memory):  # one by one: no second copy of the model
            self.transport.control.broadcast([managed.local], 0, _SYNCING)

    def _sync_buckets(self, buckets: Sequence[Bucket]) -> None:
        control, writers = self.transport.control, self.transport.writers
        for bucket in buckets:
            if not self.config.share_parameters:
                control.broadcast([bucket.flat_param], 0, _SYNCING)
            elif control.rank in writers:
                control.pass_on(bucket.flat_param, writers, _SYNCING)

    def take_up_unfrozen(self) -> None:
        """Have the gradients of parameters averaged that were frozen, now require them, and are in no optimizer. Collective where
        there are any: every rank has to unfreeze the same.

        Raises:
            RankMismatchError: another rank has unfrozen others.
        """
        untrained = self.reducer.untrained
        if not untrained.some_unfrozen():
            return
        # Told through the transport, which notices when another rank goes on to something else.
        self.transport.gather_scalar(torch.ones((), device=self.params[0].param.device), label="unfrozen parameters")
        trained = {managed.param for managed in self.params}
        agree([(self.control, describe_untrained(self.module, trained))], None, "unfreezing parameters")
        untrained.fit(trained)

    def sync_rest(self) -> None:
        """Take over what rank 0 has besides the parameters in buckets: others, and buffers. Collective."""
        managed = {managed.param for managed in claimed_params()}
        rest = [param.data for param in self.module.parameters() if param not in managed]
        self.transport.control.broadcast(list(map(local_of, [*rest, *self.module.buffers()])), 0, _SYNCING)

    def _reverse_order(self) -> list[int]:
        """Indices of the parameters in the reverse order of the model's, the likely order of their gradients."""
        index_of: dict[Tensor, int] = {managed.param: managed.index for managed in self.params}
        present = [index_of.pop(param) for param in reversed(list(self.module.parameters())) if param in index_of]
        return [*present, *index_of.values()]  # and those of modules that were replaced


def cast_frozen(params: Iterable[Tensor], dtype: torch.dtype | None) -> None:
    """Parameters that are not trained become of `param_dtype` too, or layers could not be mixed."""
    trained = {managed.param for managed in claimed_params()}  # by whichever model
    for param in params:
        is_free = not param.requires_grad and param not in trained
        if dtype is not None and is_free and param.dtype is torch.float32:
            param.data = param.data.to(dtype)


def _extents(buckets: Iterable[Bucket]) -> dict[int, Segment]:
    """What this rank has of each parameter in these buckets, by the parameter's index."""
    return {segment.owner.index: segment for bucket in buckets for segment in bucket.segments}


def _bytes_on_the_way(module: nn.Module, config: Config) -> int:
    """Of gradients of all parameters as they travel."""
    return sum(
        local_of(param).numel() * (config.wire_dtype or config.precision.stored_dtype(param.dtype)).itemsize
        for param in module.parameters()
        if param.requires_grad
    )


def _most_over(groups: Sequence[ControlGroup], number: int) -> int:
    """The most of a number over a mesh, by which copies of parameters lie in buckets alike. Collective in each of its groups."""
    for group in groups:
        number = max(own for (own,) in group.numbers([number], "agreeing on the size of buckets"))
    return number


def _agree_on_seed(groups: Sequence[ControlGroup]) -> int:
    """Rank 0's seed of torch, for stochastic rounding: what depends on the parameter alone, not on the rank that steps it.

    Collective in each of the groups; together they hold all ranks that have copies of a parameter, which must stay equal.
    """
    seed = torch.tensor([torch.initial_seed() % 2**63], dtype=torch.int64, device=groups[0].device)
    for group in groups:
        group.broadcast([seed], 0, "agreeing on a seed")
    return int(seed.item())
