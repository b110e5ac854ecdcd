"""`simulate`: how long a step of a model takes on a machine, by zeroopt or by others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, NotSupportedError
from ..options.config import Config
from ..planner.activations import LossOf, Sample, tokens_sample
from ..planner.estimator import Estimator, MakeOptimizer, config_of
from ..planner.rehearsal import Cluster
from ..storage.buffer_pool import num_buffers
from .collectives import COSTS, LOCAL, NETWORK, Cost, Ranks
from .machine import Machine
from .peers import DdpTraining, Fsdp2Training
from .training import PARTS, Course, Lap, Rules, ZeroTraining
from .workload import Workload, count_operations, workload_of

METHODS = ("zeroopt", "DDP", "FSDP2")

_UNKNOWN = ("average_every", "gradient_compression", "wire", "state_device")
_STEPS = 3  # after which each is like the last
_DDP_BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Simulated:
    """A step, once the steps are all alike. Seconds.

    Attributes:
        method: "zeroopt", "DDP" or "FSDP2".
        collectives: by which buckets travel, a key of `COSTS`.
        num_buckets: with stripes, each by itself.
        step_s: from one forward to the next.
        parts: of that, what a rank's own thread does; see `PARTS`.
        network_s, local_s: for which a host's link, and its ranks' links among themselves, are in use.
        compute_s: what forward, backward and step would take with nobody to wait for.
    """

    method: str
    world_size: int
    collectives: str
    num_buckets: int
    step_s: float
    parts: dict[str, float]
    network_s: float
    local_s: float
    compute_s: float

    def as_json(self) -> dict[str, Any]:
        """All of it, of what `json.dumps` takes."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        shares = "  ".join(f"{part} {_ms(self.parts[part])} ({self.parts[part] / self.step_s:.0%})" for part in PARTS)
        return [
            f"{self.method}, {self.world_size} ranks, {self.num_buckets} buckets by {self.collectives!r}: {_ms(self.step_s)} a step",
            f"    {shares}",
            f"    links in use: {_ms(self.network_s)} between hosts, {_ms(self.local_s)} within; alone a rank would take {_ms(self.compute_s)}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Simulator:
    """Simulates one choice of options, ranks and machine after the other for a model, which is traced once.

    Args: as `simulate`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | MakeOptimizer,
        *,
        tokens: int | None = None,
        sample: Sample | None = None,
        loss: LossOf | None = None,
        batch: int = 1,
        device: str = "cpu",
    ) -> None:
        if (tokens is None) == (sample is None):
            raise ConfigError("expected either tokens or sample: what a rank computes depends on it")
        if tokens is not None:
            sample = tokens_sample(model, tokens, batch)
        assert sample is not None
        self._device = device
        self._estimator = Estimator(model, optimizer, Cluster(1, 1, device), sample, loss, None)
        self._operations = count_operations(model, sample, loss)
        self._workloads: dict[tuple[Cluster, Config], Workload] = {}

    def workload(self, machine: Machine, world_size: int, config: Config) -> Workload:
        """What a rank has to do, by the plan of these options."""
        cluster = Cluster(world_size, min(machine.host_ranks, world_size), self._device)
        if (cluster, config) not in self._workloads:
            self._workloads[cluster, config] = workload_of(self._estimator, config, cluster, self._operations)
        return self._workloads[cluster, config]

    def run(
        self,
        machine: Machine,
        world_size: int,
        *,
        method: str = "zeroopt",
        collectives: str | None = None,
        **options: Any,
    ) -> Simulated:
        """A step; see `simulate`."""
        if method not in METHODS:
            raise ConfigError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
        if collectives is not None and collectives not in COSTS:
            raise ConfigError(f"expected collectives to be one of {', '.join(COSTS)}, got {collectives!r}")
        config = config_of(options)
        unknown = [name for name in _UNKNOWN if getattr(config, name) is not None]
        if config.precision.parameter_compression is not None:
            unknown.append("parameter_compression")
        if unknown:
            raise NotSupportedError(f"the simulator does not know what {', '.join(unknown)} would change: leave it out")
        workload = self.workload(machine, world_size, config)
        ranks = Ranks(machine, world_size)
        default = workload.transport if method == "zeroopt" or world_size == 1 else "ring"
        name = collectives or default
        workload, course = _course(method, workload, ranks, COSTS[name], config)
        return _result(method, name, workload, ranks, course.run(_STEPS))


def simulate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | MakeOptimizer,
    machine: Machine,
    *,
    world_size: int,
    tokens: int | None = None,
    sample: Sample | None = None,
    loss: LossOf | None = None,
    batch: int = 1,
    device: str = "cpu",
    method: str = "zeroopt",
    collectives: str | None = None,
    **options: Any,
) -> Simulated:
    """How long a step takes, and on what a rank spends it. Not collective: one process, and neither model nor ranks have to be there.

    The plan is zeroopt's own, made on the meta device; operations are those of one forward and backward as torch counts them; the
    order of collectives, and what they wait for, is that of zeroopt's code. All else is the machine's numbers.

    Args:
        model: on the meta device, or any other. It stays as it is.
        optimizer: on the model's parameters; or a class, or a function, that makes one of a list of parameters.
        machine: its hosts.
        world_size: ranks.
        tokens: length of the sequences that a language model is fed, `batch` of them a rank.
        sample: instead, what the model is called with.
        loss: makes the loss of what the model returns, where that is neither a number nor has a `loss`.
        device: "cpu" or "cuda": by which transport buckets travel.
        method: "zeroopt", "DDP" or "FSDP2".
        collectives: instead of the transport that would be taken, a key of `zeroopt.simulator.collectives.COSTS`.
        **options: of `zeroopt.wrap`; of these, the others go by `param_dtype` and `bucket_mb` alone.

    Raises:
        ConfigError: bad options, or a model that cannot be traced.
        NotSupportedError: options, parameters or optimizers that this release cannot train, or that are not simulated.
    """
    simulator = Simulator(model, optimizer, tokens=tokens, sample=sample, loss=loss, batch=batch, device=device)
    return simulator.run(machine, world_size, method=method, collectives=collectives, **options)


def _course(method: str, workload: Workload, ranks: Ranks, cost: Cost, config: Config) -> tuple[Workload, Course]:
    if method == "DDP":
        bucket = _DDP_BUCKET if config.bucket_mb is None else config.bucket_mb * 2**20
        workload = workload.in_buckets_of(bucket)
        return workload, DdpTraining(workload, ranks, cost)
    if method == "FSDP2":
        return workload, Fsdp2Training(workload, ranks, cost)
    return workload, ZeroTraining(workload, ranks, rules_of(config, workload), cost)


def rules_of(config: Config, workload: Workload) -> Rules:
    """What bounds the overlap with these options."""
    placement = config.placement
    bounded = workload.needs_staging or not placement.shard_state
    most = max(1, config.bucket_buffers - 1) if bounded else None
    return Rules(
        shards=placement.shard_state,
        buffers=num_buffers(config) if placement.shard_gradient else None,
        most=most if config.overlap else 0,
    )


def _result(method: str, collectives: str, workload: Workload, ranks: Ranks, lap: Lap) -> Simulated:
    machine = ranks.machine
    operations = workload.forward + workload.backward
    stepped = sum(load.stepped for load in workload.loads) / (1 if method == "DDP" else ranks.world_size)
    alone = operations / machine.flops + stepped / machine.memory_bandwidth
    return Simulated(
        method,
        ranks.world_size,
        collectives,
        len(workload.loads),
        lap.seconds,
        lap.parts,
        lap.busy[NETWORK],
        lap.busy[LOCAL],
        machine.crowding * alone,
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"
