"""What a machine's parts do in a second."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib


@dataclass(frozen=True)
class Machine:
    """Hosts that are all alike, with as many ranks on each.

    Attributes:
        host_ranks: ranks of a host.
        flops: floating-point operations a second of a rank that computes a forward and backward, while others do on the other cores.
        memory_bandwidth: bytes a second that such a rank reads and writes when it steps, sums and copies.
        cores: ranks of a host that can compute at once; more share them. 0: each rank has a device of its own.
        local_bandwidth: bytes a second that a rank sends to others of its host.
        local_latency: seconds from a rank to another of its host.
        network_bandwidth: bytes a second that leave a host, and as many that reach it.
        network_latency: seconds from a host to another.
        message_s: processor seconds for each message that a rank sends or receives; where devices communicate, 0.
        byte_s: processor seconds for each byte of these.
        bucket_s: processor seconds that a bucket costs whatever its size.
        noise: standard deviation of the logarithm of a rank's time to compute.
    """

    host_ranks: int
    flops: float
    memory_bandwidth: float
    cores: int = 0
    local_bandwidth: float = 1e10
    local_latency: float = 1e-5
    network_bandwidth: float = 1.25e8
    network_latency: float = 1e-4
    message_s: float = 0.0
    byte_s: float = 0.0
    bucket_s: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("host_ranks", "flops", "memory_bandwidth", "local_bandwidth", "network_bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"expected a machine's {name} to be positive, got {getattr(self, name)!r}")
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(
                    f"expected a machine's {field.name} not to be negative, got {getattr(self, field.name)!r}"
                )

    @property
    def crowding(self) -> float:
        """How much longer a rank computes for the others of its host."""
        return max(1.0, self.host_ranks / self.cores) if self.cores else 1.0

    def with_host_ranks(self, host_ranks: int) -> Machine:
        """The same with other ranks on each host."""
        return replace(self, host_ranks=host_ranks)

    def as_toml(self) -> str:
        """What `read_machine` reads."""
        return "".join(f"{name} = {value!r}\n" for name, value in asdict(self).items())


H100 = Machine(
    host_ranks=8,
    flops=4e14,
    memory_bandwidth=2.5e12,
    local_bandwidth=3.6e11,
    local_latency=1.9e-6,
    network_bandwidth=5e10,
    network_latency=4e-6,
    noise=0.03,
)
"""Servers of 8 H100s and a network of 400 Gb/s: what such a GPU reaches in a well-tuned transformer in bfloat16, four fifths of its memory's
bandwidth and of NVLink's, and the latencies of a hop by which NCCL chooses (LL128). None of it was measured here."""

MACHINES = {"h100": H100}


def read_machine(path: str | Path) -> Machine:
    """One by name, or from a file: TOML (Python 3.11 or newer) or JSON, whose keys are `Machine`'s attributes.

    Raises:
        ConfigError: there is no such file, or it describes no machine.
    """
    if str(path) in MACHINES:
        return MACHINES[str(path)]
    try:
        given = _parse(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected a machine ({', '.join(MACHINES)}) or a file that describes one, got {path}: {error}"
        ) from error
    return machine_of(given, str(path))


def _parse(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        if sys.version_info < (3, 11):
            raise ConfigError(f"reading {path} needs Python 3.11; write the same as JSON")
        return tomllib.loads(path.read_text())
    parsed = json.loads(path.read_text())
    if not isinstance(parsed, dict):
        raise ConfigError(f"expected {path} to hold a machine's attributes by name, got a {type(parsed).__name__}")
    return parsed


def machine_of(given: dict[str, Any], where: str) -> Machine:
    """A machine from its attributes by name.

    Raises:
        ConfigError: it has others, or lacks some.
    """
    known = {field.name for field in fields(Machine)}
    needed = {"host_ranks", "flops", "memory_bandwidth"}
    unknown, missing = sorted(given.keys() - known), sorted(needed - given.keys())
    if unknown or missing:
        raise ConfigError(
            f"{where} describes no machine: unknown {', '.join(unknown) or 'none'}, missing {', '.join(missing) or 'none'}; "
            f"it may have {', '.join(field.name for field in fields(Machine))}"
        )
    wrong = [name for name, value in given.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise ConfigError(f"{where}: expected numbers, got {', '.join(f'{name}={given[name]!r}' for name in wrong)}")
    return Machine(**given)
