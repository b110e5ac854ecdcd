"""A model wrapped on the meta device, as one rank of many would have it: the real code, and no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives import PendingCollective, Transport, Wire
from ..collectives.all_to_all import AllToAllTransport
from ..collectives.lone import lone_group
from ..collectives.pending import Done
from ..collectives.replicated import ReplicatedTransport
from ..collectives.select import check_transport_at, kind_for
from ..collectives.site import Site
from ..collectives.tree import messages_among
from ..collectives.turnout import Turnout
from ..collectives.wire import PLAIN
from ..errors import ConfigError
from ..feature import Features
from ..options.config import Config
from ..plan.claims import release
from ..plan.dtensors import local_of
from ..plan.params import Grain, ManagedParam
from ..probing.grains import find_grains
from ..replica import Replica
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore


@dataclass(frozen=True)
class Cluster:
    """Where a model is to be trained.

    Attributes:
        world_size: ranks that train it.
        host_ranks: of them on each host.
        device: "cpu" or "cuda", where the parameters are.
        num_groups: of as many ranks each, which train alone and average; this is one of them.
        shard_ranks: of a `shard_group`, among which state is cut, and every such group holds all of it; None: one of all ranks.
    """

    world_size: int
    host_ranks: int
    device: str = "cpu"
    num_groups: int = 1
    shard_ranks: int | None = None

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.host_ranks < 1 or self.world_size % self.host_ranks:
            raise ConfigError(
                f"expected world_size to be positive and a multiple of host_ranks, got {self.world_size} and {self.host_ranks}"
            )
        if self.num_groups < 1:
            raise ConfigError(f"expected groups to be positive, got {self.num_groups}")
        shards = self.world_size if self.shard_ranks is None else self.shard_ranks
        unit = min(self.host_ranks, max(shards, 1))
        if (
            (self.shard_ranks is not None and shards < 2)
            or self.world_size % shards
            or self.host_ranks % unit
            or shards % unit
        ):
            raise ConfigError(
                f"expected shard_ranks to be 2 or more, to divide world_size={self.world_size}, and to be a part of a host of "
                f"host_ranks={self.host_ranks}, or some whole hosts, got {self.shard_ranks}"
            )
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"expected device to be 'cpu' or 'cuda', got {self.device!r}")

    @property
    def num_hosts(self) -> int:
        return self.world_size // self.host_ranks

    @property
    def within(self) -> Cluster:
        """The ranks among which state is cut."""
        shards = self.world_size if self.shard_ranks is None else self.shard_ranks
        return Cluster(shards, min(self.host_ranks, shards), self.device, self.num_groups)

    def training(self, config: Config) -> Cluster:
        """The ranks that have sums of their gradients: without a group of its own, each rank that averages trains alone."""
        if config.average_every is None or self.num_groups > 1:
            return self
        return Cluster(1, 1, self.device, self.world_size)


@dataclass(frozen=True)
class Trainee:
    """What is known of a parameter that an optimizer trains, before anything is wrapped.

    Attributes:
        group, position: as those of a `ManagedParam`.
    """

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    group: int
    position: int
    grain: Grain

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def find_trainees(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Trainee]:
    """The parameters of an optimizer that require gradients, in the model's order. Not collective.

    Raises:
        ConfigError: the optimizer is of another model, or trains nothing.
        NotSupportedError: ranks cannot share its work.
    """
    names = {param: name for name, param in model.named_parameters()}
    places: dict[Tensor, tuple[int, int]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param not in names:
                raise ConfigError(
                    f"parameter {len(places)} of the optimizer (group {number}, shape {list(param.shape)}) is not a parameter of "
                    "the model; build the optimizer on model.parameters() of the model that is estimated"
                )
            places[param] = number, len(places)
    trained = [param for param in names if param in places and param.requires_grad]
    if not trained:
        raise ConfigError("no parameter of the optimizer requires gradients: there is nothing to train")
    grains = find_grains(optimizer)
    found = []
    for param in trained:
        local, (number, position) = local_of(param.data), places[param]
        found.append(Trainee(names[param], local.shape, local.stride(), param.dtype, number, position, grains[number]))
    return found


class Rehearsal:
    """One rank's buckets, gradients and masters, on the meta device.

    Attributes:
        bucket_bytes, params, buckets, stores: as those of a `Replica`.
        transport: of the kind that would be taken.

    Args:
        trainees: in the order in which the planner takes them; it goes through them from the last one on.

    Raises:
        ConfigError: such ranks cannot share parameters.
    """

    def __init__(self, trainees: Sequence[Trainee], config: Config, cluster: Cluster) -> None:
        kind = _kind_in(cluster.within, config)
        self.transport = (
            RehearsedTransport(kind, cluster) if cluster.shard_ranks is None else RehearsedReplicas(kind, cluster)
        )
        params = [_on_meta(trainee, index) for index, trainee in enumerate(trainees)]
        holder = nn.ParameterList([managed.param for managed in params])
        silent = replace(config, sync_module_states=False)
        self._replica = Replica(
            holder, silent, self.transport, lone_group(), Features(), Turnout(cluster.world_size), lambda what: None
        )
        release(self._replica)
        self._replica.take_in(params, config.precision)

    @property
    def bucket_bytes(self) -> int:
        return self._replica.bucket_bytes

    @property
    def params(self) -> list[ManagedParam]:
        return self._replica.params

    @property
    def buckets(self) -> list[Bucket]:
        return self._replica.buckets

    @property
    def stores(self) -> list[GradientStore]:
        return self._replica.reducer.stores


def _on_meta(trainee: Trainee, index: int) -> ManagedParam:
    data = torch.empty_strided(trainee.shape, trainee.stride, dtype=trainee.dtype, device="meta")
    param = nn.Parameter(data)
    return ManagedParam(trainee.name, param, index, trainee.group, trainee.position, trainee.grain)


class RehearsedTransport(Transport):
    """As if there were other ranks: asked for memory, and never to move anything.

    Attributes:
        kind: the class that it stands for.
        num_hosts: on which the ranks would be.
    """

    def __init__(self, kind: type[Transport], cluster: Cluster) -> None:
        super().__init__(lone_group())  # in which nobody else is asked for anything
        self.num_slices = cluster.world_size
        self.writers = range(cluster.world_size)
        self.kind = kind
        self.name = kind.name
        self.needs_staging = kind.needs_staging and cluster.device == "cpu"
        self.shares_parameters = kind.shares_parameters
        self.sums_twice = kind.sums_twice
        self.is_local = kind.is_local
        self.num_hosts = cluster.num_hosts
        if kind.shares_parameters:
            self.writers = range(0, cluster.world_size, cluster.host_ranks)

    @property
    def sent_slices(self) -> range:
        return range(self.num_hosts) if self.sums_twice else super().sent_slices

    @property
    def hops(self) -> int:
        return self.kind.hops_among(self.num_slices, self.num_hosts)

    def staging_of(self, num_bytes: int, item_bytes: int) -> int:
        """Bytes that the reduce-scatter of a full buffer of so many takes beside it."""
        return self.kind.staging_bytes(num_bytes, item_bytes, self.num_slices, self.num_hosts)

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        return Done()

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        return Done()

    def open_exchange(self) -> None:
        pass

    def barrier(self) -> None:
        pass


class RehearsedReplicas(RehearsedTransport):
    """Within a shard group as that kind goes, and then across shard groups, as a `ReplicatedTransport` does."""

    def __init__(self, kind: type[Transport], cluster: Cluster) -> None:
        super().__init__(kind, cluster.within)
        self.name = ReplicatedTransport.name
        self.needs_staging = cluster.device == "cpu"
        self.shares_parameters, self.is_local, self.sums_twice = False, False, True
        self._replicas = cluster.world_size // cluster.within.world_size
        self._across = messages_among(self._replicas) if cluster.device == "cpu" else AllToAllTransport

    @property
    def hops(self) -> int:
        return super().hops + 2 * self._across.hops_among(self._replicas, self._replicas)

    def staging_of(self, num_bytes: int, item_bytes: int) -> int:
        own = -(-num_bytes // item_bytes // self.num_slices // self._replicas) * self._replicas * item_bytes
        across = self._across.staging_bytes(own, item_bytes, self._replicas, self._replicas)
        return super().staging_of(num_bytes, item_bytes) + own + across


class _PlannedSite(Site):
    """Ranks that are not there yet."""

    def __init__(self, cluster: Cluster) -> None:
        group = dist.ProcessGroup(0, cluster.world_size)  # type: ignore[call-arg]  # has a rank and a size, and no backend
        super().__init__(group, torch.device(cluster.device))
        object.__setattr__(self, "_cluster", cluster)

    @property
    def has_gloo_on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def backend(self) -> str:
        return "gloo" if self.has_gloo_on_cpu else "nccl"

    @cached_property
    def hosts(self) -> list[list[int]]:
        cluster: Cluster = object.__getattribute__(self, "_cluster")
        ranks = range(cluster.world_size)
        return [list(ranks[i : i + cluster.host_ranks]) for i in range(0, cluster.world_size, cluster.host_ranks)]


def _kind_in(cluster: Cluster, config: Config) -> type[Transport]:
    if callable(config.transport):
        return Transport  # of which nothing is known
    site, nests = _PlannedSite(cluster), config.wire is None or config.wire.nests
    check_transport_at(config.transport, site)
    kind = kind_for(config.transport, site, nests=nests)
    if config.share_parameters and not kind.shares_parameters:
        raise ConfigError(
            f"share_parameters=True needs ranks that share memory: transport {kind.name!r} of {cluster.host_ranks} ranks a host "
            f"on {cluster.device} does not"
        )
    return kind
