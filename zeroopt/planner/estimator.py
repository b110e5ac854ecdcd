"""What a rank holds with one choice of options after the other, from a model and an optimizer alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError
from ..options.config import Config, check_param_dtypes
from ..options.precision import Precision
from ..stepping.stepper import check_fused
from ..wrap import wrap
from .activations import Activations, LossOf, Sample, trace_activations
from .phases import Phase, Setting, phases_of
from .rehearsal import Cluster, Rehearsal, Trainee, find_trainees
from .tiers import TIER_OPTIONS, Options, describe, tier_of

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_MOST_ON_A_HOST = 8


@dataclass(frozen=True)
class Variant:
    """One choice of options.

    Attributes:
        options: of `zeroopt.wrap` that are given.
        tier: of precision, by name.
        transport: that "auto" would take, or that was asked for.
        num_buckets: of the plan.
        phases: of a training, in their order.
    """

    options: Options
    tier: str
    transport: str
    num_buckets: int
    phases: list[Phase]

    @property
    def peak_of_training(self) -> Phase:
        """The phase in which most is held, but for those of checkpoints."""
        return max((phase for phase in self.phases if phase.name not in _OF_CHECKPOINTS), key=lambda phase: phase.total)

    @property
    def training_peak(self) -> int:
        """The most that a rank holds from the building of the model to a step, in bytes."""
        return self.peak_of_training.total

    @property
    def stage(self) -> int:
        """As the options have it, or by default."""
        return config_of(self.options).stage

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)

    def __str__(self) -> str:
        return describe({"stage": self.stage, **self.options})


_OF_CHECKPOINTS = ("saving", "saving in the background", "loading")
_DEFAULTS: Options = {
    name: parameter.default
    for name, parameter in inspect.signature(wrap).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}


class Estimator:
    """Estimates one choice of options after the other for a model.

    Args: as `estimate_memory`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | MakeOptimizer,
        cluster: Cluster,
        sample: Sample | None,
        loss: LossOf | None,
        activations: int | None,
        *,
        built_by_wrap: bool = False,
        copies: bool = False,
    ) -> None:
        self._model, self._sample, self._loss, self._given = model, sample, loss, activations
        made = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(list(model.parameters()))
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(
                f"expected optimizer to make an optimizer of a list of parameters, got a {type(made).__name__}"
            )
        trainees = find_trainees(model, made)
        built = sum(param.nbytes for param in model.parameters())
        self.setting = Setting(
            made,
            trainees,
            cluster,
            built,
            built - sum(trainee.nbytes for trainee in trainees),
            sum(buffer.nbytes for buffer in model.buffers()),
            _largest_module(model) if built_by_wrap else None,
            copies,
        )
        self._traced: dict[tuple[torch.dtype | None, bool], Activations] = {}

    @property
    def parameters(self) -> int:
        """Elements that are trained."""
        return sum(trainee.shape.numel() for trainee in self.setting.trainees)

    def variant(self, options: Options, cluster: Cluster | None = None) -> Variant:
        """What these options come to.

        Raises:
            ConfigError, NotSupportedError: as `zeroopt.wrap`.
        """
        cluster = self.setting.cluster if cluster is None else cluster
        config = config_in(cluster, options)
        setting = replace(self.setting, cluster=cluster.training(config))
        activations = self.activations(config)
        rehearsal = self.rehearse(config, setting.cluster)
        check_param_dtypes(config, {trainee.name: trainee.dtype for trainee in setting.trainees})
        check_fused(setting.optimizer, rehearsal.params, config)
        guessed = Rehearsal(setting.trainees, config, setting.cluster) if activations is not None else rehearsal
        phases = phases_of(setting, rehearsal, guessed, config, activations)
        return Variant(options, tier_of(options), rehearsal.transport.name, len(rehearsal.buckets), phases)

    def rehearse(self, config: Config, cluster: Cluster) -> Rehearsal:
        """One rank's buckets, once the order of gradients is known."""
        return Rehearsal(self._ordered(self.activations(config)), config, cluster)

    def activations(self, config: Config) -> Activations | None:
        """Of one pass; None where nothing is known of them."""
        if self._given is not None:
            return Activations((), (), (self._given,))
        if self._sample is None:
            return None
        dtype = config.precision.param_dtype
        key = dtype, config.cast_inputs
        if key not in self._traced:
            self._traced[key] = trace_activations(
                self._model,
                self._sample,
                self._loss,
                param_dtype=dtype,
                cast_inputs=config.cast_inputs,
                device=self.setting.cluster.device,
            )
        return self._traced[key]

    def _ordered(self, activations: Activations | None) -> list[Trainee]:
        """Parameters as they are planned once the order of their gradients is known: from the last one on."""
        if activations is None:
            return list(self.setting.trainees)
        place = {name: number for number, name in enumerate(activations.order)}
        late = len(place)
        return sorted(self.setting.trainees, key=lambda trainee: -place.get(trainee.name, late))


def config_of(options: Options) -> Config:
    """The options of a call of `zeroopt.wrap`, with its defaults.

    Raises:
        ConfigError: it has no such option, or that value is none.
    """
    unknown = sorted(set(options) - set(_DEFAULTS) - {"model", "optimizer"})
    if unknown:
        raise ConfigError(f"zeroopt.wrap has no option {', '.join(unknown)}; it has {', '.join(_DEFAULTS)}")
    given = {**_DEFAULTS, **options}
    precision = Precision(**{name: given[name] for name in (*TIER_OPTIONS, "parameter_compression")})
    names = [field.name for field in fields(Config) if field.name != "precision"]
    return Config(precision=precision, **{name: given[name] for name in names})


def config_in(cluster: Cluster, options: Options) -> Config:
    """Likewise, with the `shard_group` of a cluster.

    Raises:
        ConfigError, NotSupportedError: these do not go together.
    """
    if options.get("shard_group") is not None:
        raise ConfigError(
            "expected shard_ranks, how many ranks a shard_group has, and no shard_group: nothing is there yet"
        )
    if cluster.shard_ranks is None:
        return config_of(options)
    group = dist.ProcessGroup(0, cluster.shard_ranks)  # type: ignore[call-arg]  # has a rank and a size, and no backend
    return config_of({**options, "shard_group": group})


def _largest_module(model: nn.Module) -> int:
    return max(sum(param.nbytes for param in part.parameters(recurse=False)) for part in model.modules())


def default_host_ranks(world_size: int) -> int:
    """The most ranks up to 8 of which hosts can have as many each."""
    return next(ranks for ranks in range(_MOST_ON_A_HOST, 0, -1) if world_size % ranks == 0)
