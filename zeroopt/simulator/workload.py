"""A model, bucket by bucket: what a rank computes for it, and what travels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..building.unchanged import unchanged
from ..diagnosis.footprint import footprint
from ..errors import ConfigError, NotSupportedError
from ..options.config import Config
from ..planner.activations import LossOf, Sample, arguments_of, loss_of
from ..planner.estimator import Estimator
from ..planner.rehearsal import Cluster, Rehearsal


@dataclass(frozen=True)
class Load:
    """What one bucket, or one stripe of a large one, is to a rank.

    Attributes:
        forward, backward: floating-point operations of the modules whose parameters it holds.
        gradients: bytes that travel, padding included.
        parameters: bytes that are gathered.
        packed: bytes that backward reads and writes to put the gradients together.
        stepped: bytes that the step of the whole bucket reads and writes.
    """

    forward: float
    backward: float
    gradients: float
    parameters: float
    packed: float
    stepped: float


@dataclass(frozen=True)
class Workload:
    """A model's buckets, as one rank has them.

    Attributes:
        loads: in the order in which backward completes them.
        transport: that the options would get there.
        needs_staging: of that transport.
    """

    loads: tuple[Load, ...]
    transport: str
    needs_staging: bool = False

    @property
    def forward(self) -> float:
        """Floating-point operations of a forward."""
        return sum(load.forward for load in self.loads)

    @property
    def backward(self) -> float:
        """Floating-point operations of a backward, with what is computed again."""
        return sum(load.backward for load in self.loads)

    def in_buckets_of(self, num_bytes: float) -> Workload:
        """The same, cut anew: whole loads together up to so many bytes of gradients, larger ones in pieces."""
        pieces = [piece for load in self.loads for piece in _cut(load, max(1, ceil(load.gradients / num_bytes)))]
        together: list[Load] = []
        for piece in pieces:
            if together and together[-1].gradients + piece.gradients <= num_bytes:
                together[-1] = _sum(together[-1], piece)
            else:
                together.append(piece)
        return replace(self, loads=tuple(together))


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of products (as torch counts them) in one forward and backward.

    Attributes:
        by_param: of the forward, by the name of a parameter of the module that does them.
        backward_factor: how many times as many a backward does.
    """

    by_param: dict[str, float]
    backward_factor: float


def count_operations(model: nn.Module, sample: Sample, loss: LossOf | None = None) -> Operations:
    """Go through a forward and a backward on the meta device. The model stays as it is. Not collective.

    Raises:
        ConfigError: it cannot be run there, or returns no loss.
    """
    try:
        with unchanged(model):
            return _count(model, sample, loss)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the model cannot be run on the meta device, where operations are counted ({type(error).__name__}: {error}): register tensors "
            "that modules keep as plain attributes as buffers, and let nothing depend on values"
        ) from error


def _count(model: nn.Module, sample: Sample, loss: LossOf | None) -> Operations:
    names = [*model.named_parameters(), *model.named_buffers()]
    stand_ins = {name: _on_meta(value).requires_grad_(value.requires_grad) for name, value in names}
    args, kwargs = arguments_of(tree_map(lambda x: _on_meta(x) if isinstance(x, Tensor) else x, sample))
    with FlopCounterMode(display=False) as counter:
        made = (loss or loss_of)(functional_call(model, stand_ins, tuple(args), dict(kwargs)))
        forward = counter.get_total_flops()
        by_module = {name: float(sum(counts.values())) for name, counts in counter.get_flop_counts().items()}
        made.backward()  # type: ignore[no-untyped-call]
        total = counter.get_total_flops()
    root = type(model).__name__
    return Operations(_by_param(model, by_module, root), (total - forward) / max(1, forward))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _by_param(model: nn.Module, by_module: dict[str, float], root: str) -> dict[str, float]:
    """Each module's own operations, shared by its own parameters by their size; where it has none, by all below it."""
    result = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for path, module in model.named_modules():
        below = [
            _total(child, f"{root}.{path}.{name}" if path else f"{root}.{name}", by_module)
            for name, child in module.named_children()
        ]
        own = _total(module, f"{root}.{path}" if path else root, by_module) - sum(below)
        params = dict(module.named_parameters(recurse=False)) or dict(module.named_parameters())
        numel = sum(param.numel() for param in params.values())
        for name, param in params.items():
            key = f"{path}.{name}" if path else name
            if key in result and own > 0:
                result[key] += own * param.numel() / numel
    return result


def _total(module: nn.Module, name: str, by_module: dict[str, float]) -> float:
    """Of a module and all below it; what merely holds others, as a list does, is not called itself."""
    if name in by_module:
        return by_module[name]
    return sum(_total(child, f"{name}.{child_name}", by_module) for child_name, child in module.named_children())


def workload_of(estimator: Estimator, config: Config, cluster: Cluster, operations: Operations) -> Workload:
    """Of the plan that zeroopt itself makes on the meta device.

    Raises:
        NotSupportedError: ranks bring whole parameters to their owners for the step, which no collective here stands for.
    """
    rehearsal = estimator.rehearse(config, cluster)
    if any(bucket.moves is not None for bucket in rehearsal.buckets):
        raise NotSupportedError(
            f"with {cluster.world_size} ranks, parameters that this optimizer steps whole lie across slices and are brought to owners, "
            "which the simulator does not know: simulate fewer ranks, or an optimizer that steps each element by itself"
        )
    held = footprint(
        rehearsal.buckets,
        rehearsal.stores,
        estimator.setting.optimizer,
        config,
        rehearsal.transport,
        rehearsal.bucket_bytes,
    )
    numel = sum(bucket.own_param.numel() for bucket in rehearsal.buckets)
    kept = (held.moments + held.masters) / max(1, numel)  # bytes of an element that this rank steps
    loads = _loads(rehearsal, config, operations, kept)
    return Workload(loads, rehearsal.transport.name, rehearsal.transport.needs_staging)


def _loads(rehearsal: Rehearsal, config: Config, operations: Operations, kept: float) -> tuple[Load, ...]:
    loads = []
    for bucket, store in zip(rehearsal.buckets, rehearsal.stores, strict=True):
        forward = sum(operations.by_param.get(managed.name, 0.0) for managed in bucket.params)
        item = (config.wire_dtype or bucket.dtype).itemsize
        whole = Load(
            forward,
            forward * operations.backward_factor,
            bucket.padded_numel * item,
            bucket.padded_numel * bucket.dtype.itemsize,
            sum(managed.numel for managed in bucket.params) * (item + bucket.dtype.itemsize),
            bucket.padded_numel * (2 * kept + 2 * bucket.dtype.itemsize + store.reduced.dtype.itemsize),
        )
        loads += _cut(whole, len(store.stripes) if store.is_striped else 1)
    return tuple(loads)


def _cut(load: Load, pieces: int) -> list[Load]:
    """Stripes of a bucket: its operations come before the first, for its gradient comes as a whole."""
    sizes = replace(
        load,
        forward=0.0,
        backward=0.0,
        gradients=load.gradients / pieces,
        parameters=load.parameters / pieces,
        packed=load.packed / pieces,
        stepped=load.stepped / pieces,
    )
    return [replace(sizes, forward=load.forward, backward=load.backward), *[sizes] * (pieces - 1)]


def _sum(first: Load, second: Load) -> Load:
    return Load(*(getattr(first, name) + getattr(second, name) for name in _FIELDS))


_FIELDS = ("forward", "backward", "gradients", "parameters", "packed", "stepped")
