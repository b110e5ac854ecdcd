"""`zeroopt.wrap`: check everything, agree with the other ranks, then move the model into buckets."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from ._C import build_info
from .admission.candidates import inspect, mark_wrapped
from .admission.devices import check_has_codes, describe_device, warn_of_missing_kernels
from .admission.matrix_splits import apply_splits, check_names
from .building.building import Building, prepare
from .building.functions import Init
from .building.saved import Saved
from .collectives import ControlGroup, Transport, TransportFactory, Wire
from .collectives.lone import default_group, lone_group
from .collectives.replicated import connect_replicated
from .collectives.select import check_transport, connect_transport
from .collectives.single import SingleTransport
from .errors import ConfigError, NotSupportedError, StateError
from .feature import Feature
from .features.averaging import ParameterAverage, agreed_across, average_over, describe_place
from .features.micro_batches import check_number_of_ranks, check_sums_in_tree
from .features.of_model import ModelFeatures
from .features.outer.optimizer import inspect_outer
from .features.outer.steps import check_outer_dtype, transport_across
from .features.step_in_backward import check_goes_along, check_steps_by_bucket
from .gradients.norm_groups import check_norm_group
from .module import ZeroDataParallel
from .optimizer import ZeroOptimizer
from .options.config import Config, Fused, check_param_dtypes
from .options.outer import OuterFactory
from .options.precision import Precision
from .options.splits import MatrixSplits, read_splits
from .plan.agreement import agree, describe_groups, describe_params
from .plan.dtensors import count_copies, describe_part, find_mesh, mesh_groups
from .plan.params import ManagedParam
from .replica import Replica, cast_frozen
from .stepping.stepper import check_fused

_log = logging.getLogger("zeroopt")

InitOrPath: TypeAlias = Init | str | os.PathLike[str]
"""What gives values to a model on the meta device: a function of a module, or the path of a checkpoint."""


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int = 2,
    process_group: dist.ProcessGroup | None = None,
    bucket_mb: float | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    master_weights: str = "float32",
    state_dtype: torch.dtype = torch.float32,
    max_grad_norm: float | None = None,
    fused: Fused = "auto",
    transport: str | TransportFactory = "auto",
    overlap: bool = True,
    broadcast_buffers: bool = True,
    sync_module_states: bool = True,
    share_parameters: bool = False,
    average_every: int | None = None,
    *,
    bucket_buffers: int = 2,
    cast_inputs: bool = False,
    norm_group: dist.ProcessGroup | None = None,
    check_every: int | None = None,
    average_group: dist.ProcessGroup | None = None,
    outer_optimizer: OuterFactory | None = None,
    outer_fragments: int = 1,
    outer_delay: int = 0,
    outer_mixing: float | None = None,
    outer_dtype: torch.dtype | str | None = None,
    parameter_compression: str | None = None,
    shard_group: dist.ProcessGroup | None = None,
    features: Sequence[Feature] = (),
    wire: Wire | None = None,
    gradient_compression: str | None = None,
    state_device: torch.device | str | None = None,
    step_in_backward: bool = False,
    micro_batches: int | None = None,
    matrix_splits: MatrixSplits | None = None,
    init: InitOrPath | Sequence[InitOrPath] | None = None,
    device: torch.device | str | None = None,
) -> tuple[ZeroDataParallel, ZeroOptimizer]:
    """Make a model and its optimizer train data-parallel, with the training state split over the ranks.

    Collective: every rank of the process group must call it, with the same model, optimizer and options. The training
    loop stays as it is: `loss = model(x); loss.backward(); optimizer.step(); optimizer.zero_grad()`.

    The model's parameters stay the same objects; their data moves into flat buckets, one bucket at a time. Cast and move
    the model first, and build the optimizer on its parameters.

    CUDA graphs of the model are to be captured after wrapping, best after two steps: they replay the addresses of parameters, which
    move when the model is wrapped, and, unless a graph has been seen by then, in the first step.

    A model, or a part of it, may be on the meta device. It is made straight in the buckets then, module by module; the model, and the
    optimizer, keep their objects.

    A model may be one part of a larger one: a pipeline stage, or one whose parameters are DTensors (tensor parallelism).
    Then `process_group` holds the ranks that have the same part; with DTensors, the ranks of their mesh must call it too.

    A model that is trained by several optimizers (Muon for its matrices, AdamW for the rest) is wrapped with each of them in turn:
    `model, muon = zeroopt.wrap(model, muon)`, then `model, adamw = zeroopt.wrap(model, adamw)`, with the same options except
    `fused`, `param_dtype`, `master_weights`, `state_dtype` and `matrix_splits`.

    Args:
        model: any module with dense parameters of float32, float64, bfloat16 or float16 on one device, or with DTensors of
            such (torch 2.5 or newer) on one device mesh that has none but this rank in common with `process_group`.
        optimizer: a torch optimizer on the model's parameters that steps each of them by itself. Where it treats each element
            by itself (as SGD and Adam do), ranks share a parameter; where it needs whole matrices or norms (Muon, Adafactor,
            LAMB), each parameter of that param_group belongs to one rank in stages 1 and 2. State that it already has is kept.
        stage: 0 averages gradients (as DistributedDataParallel does), 1 also shards the optimizer's state, 2 also shards
            the gradients.
        process_group: the ranks to train with; the default group when None, or this process alone where there is none.
        bucket_mb: size in MiB of a bucket and of every buffer. A larger parameter has a bucket of its own, whose gradient travels
            in stripes of this size. None: a twentieth of the model, at least 1 and at most 25, or 1 for each message that a bucket
            has to wait for where those are more. With so many ranks that more than 1 % of it would be padding, a bucket is larger.
        param_dtype: torch.bfloat16 or torch.float16: float32 parameters become that, frozen ones too, and what rounding takes away is kept as
            `master_weights` says. None leaves parameters as they are.
        master_weights: with `param_dtype`. "float32": each rank keeps a float32 copy of the parameters it steps; "remainder":
            16 bits that complete a bfloat16 to that very copy; "none": nothing, bfloat16 is rounded stochastically.
        state_dtype: of the moments: torch.float32, torch.bfloat16 (rounded stochastically) or torch.int8 (codes with a scale
            for every 256 elements: a gradient far larger than its neighbours' coarsens their moments, one that is not
            finite harms its own parameter only).
        fused: "auto" steps with a fused kernel where there is one for this optimizer, dtype and device (AdamW, Adam, SGD, Adagrad and
            RMSprop, and all of `zeroopt.optim`, in float32 or with `param_dtype`) and with the optimizer's own `step`
            otherwise; True insists on the kernel, as do the last two options, False on the own step.
        transport: "shm" (memory that the ranks of one host share), "pairwise" (Gloo's messages), "tree" (the same in rounds, for many
            ranks), "all_to_all" (the backend moves slices, which are summed here, in an order and a precision that do not depend on
            it), "hierarchy" (that within each host, then among hosts), "torch" (the backend's own collectives), or
            "auto" to choose by backend, device and hosts; on several hosts of CPU ranks it combines the first two. Or a function that
            takes a process group and a device and returns a `zeroopt.collectives.Transport` of one's own; all ranks call it, with the
            model's first optimizer. docs/transports.md says more of each.
        overlap: let a bucket travel while backward fills the next; False waits for each.
        broadcast_buffers: all ranks use the buffers of rank 0; see `ZeroDataParallel.forward`.
        sync_module_states: all ranks start from the parameters and buffers of rank 0.
        share_parameters: CPU ranks of one host keep one copy of the parameters for all of them, in shared memory (stages 1
            and 2). An in-place change that every rank makes then happens once a rank on the same memory: make it under
            `ZeroDataParallel.write_parameters`. Without `sync_module_states`, each host starts from its first rank's.
        reduce_dtype: dtype in which gradients travel, for example torch.bfloat16; sums are kept in float32. None: that of
            the parameters. Stages 1 and 2; between float32 and 16 bits. Transport "torch" sums in that dtype.
        bucket_buffers: in stage 2, full gradient buckets that exist at once: one fills while the others travel.
        cast_inputs: cast floating-point tensors among the model's arguments to `param_dtype`. Without it inputs are left alone,
            and so are buffers.
        max_grad_norm: clip gradients in every step so that the 2-norm of all of them is at most that, as `clip_grad_norm_` does, in
            the same pass. `optimizer.grad_norm` is then the norm before clipping.
        norm_group: ranks that hold the other parts of the model, such as one rank of each pipeline stage; the norm by which
            gradients are clipped then covers all of them. The mesh of DTensors is taken into account without it.
        check_every: k: in every k-th step, look whether all gradients are finite, before anything is changed, and whether the
            parameters are the same on all ranks, before and after. Where not, `step` raises on every rank, and names the
            parameter and the ranks. None: never.
        average_every: k: train alone, and every k-th step average parameters over the ranks. Every rank then takes as many
            steps. Without `average_group` each rank of `process_group` trains alone, with gradients of its own, and keeps all of
            the state: a stage shards nothing. Moments and other state, and buffers, are not averaged.
        average_group: with `average_every`, the ranks, one of each `process_group` and at the same position in it, over which
            parameters are averaged; within each `process_group` training stays synchronous and sharded.
        outer_optimizer: with `average_every`, what becomes of the average (DiLoCo): a class or a function that makes a torch
            optimizer of a list of flat parameters, such as
            `lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)`. Its gradient is how far the ranks have
            come, on average, from where they last had the same parameters. One that treats each element by itself. See
            `ZeroOptimizer.outer_optimizer` and docs/averaging.md.
        outer_fragments: n: the buckets are dealt out to n fragments, each of which has its outer step every `average_every` steps,
            one after the other (streaming DiLoCo).
        outer_delay: steps, fewer than `average_every`, that a rank trains on while a fragment travels.
        outer_mixing: in [0, 1): how much of this rank's own parameters is kept when those of an outer step arrive. None: half with
            an `outer_delay`, nothing without.
        outer_dtype: in which outer gradients and steps travel: torch.bfloat16, torch.float16, or "int8" or "int4", codes with a
            step for every 256 elements, rounded stochastically. Sums are kept in float32, and what rounding takes from an outer
            step goes along with the next one. None: as exact as parameters are kept.
        parameter_compression: "int8" or "int4": updated parameters travel as differences in codes of so many bits, which every rank
            decodes alike, so that the model has the same bits on all ranks. Their owner keeps exact values besides (4 / N bytes a
            parameter), and what codes leave out goes with the next difference. Of float32 parameters, in stages 1 and 2.
        shard_group: of `process_group`, the ranks among which the state is cut, those of a node for one. Every such group holds all of
            it: parameters are gathered within the group alone, and of gradients only the own slice is summed across groups. Stages
            1 and 2; every rank of `process_group` is in one shard group, all of one size. None: all of `process_group`.
        features: objects of your own that take part in backward passes and in the steps of all optimizers of the model; see
            `zeroopt.Feature`. With the model's first optimizer, and of the same classes on all ranks.
        wire: instead of `reduce_dtype`, another form in which gradients travel, and another way to sum them: an object of a
            subclass of `zeroopt.collectives.Wire`, alike on all ranks.
        gradient_compression: "int8" or "int4": gradients travel between hosts, or to other GPUs, as codes with a step for every 256
            elements, rounded stochastically, a quarter or an eighth of float32's bytes, and are summed in float32. What codes leave
            out, each rank keeps for the next backward, in bfloat16: 2 bytes for each element that it sends, which is all of the
            model, or with several ranks on each host of CPU ranks its share of the host's sum. Gradients of parameters of one
            dimension or of fewer than 4,096 elements travel as they are, and so does all within a host whose ranks share memory.
            Stages 1 and 2. See docs/compression.md.
        state_device: "cpu" keeps optimizer state and masters of a model on a GPU in the memory of its host, and steps there what
            this rank steps: sums of its slices travel there, new parameters back. It takes a copy of both there. None: the
            device of the parameters.
        init: how parameters and buffers on the meta device get their values; others stay as they are. A function that writes
            what a module itself holds, in place (or replaces its buffers), or several in a list: each goes over all modules,
            before the next, parts of a module before the module, as in `model.apply`. None: `zeroopt.reset_parameters`, which
            calls the modules' own. Every function is first tried on the meta device, where it must not read elements.
            Or the path of a checkpoint (of `zeroopt.checkpoint` or torch.distributed.checkpoint, of any number of ranks, that all
            ranks see) or of a file of torch.save with a state dict: what the model's state dict has is read, each tensor into
            where it will lie. It has to have the same names and shapes; in a list, functions make what was not saved. The
            optimizer starts anew; `zeroopt.checkpoint.load` reads its state, too.
        device: where they are made; None: where the model's other parameters are, or on torch's default device.
        step_in_backward: step each bucket as soon as its sum is there, while backward still runs, so that no gradients are kept
            (stage 2). Needs one backward a step, and nothing that looks at all gradients first. The options of `param_groups`
            that count are those when backward runs. `step()` remains to be called, and moves on what follows steps.
        micro_batches: M, a power of two: a step is M backward passes on every rank, all but the last under `no_sync()`, the i-th of
            rank r on micro-batch r M + i of the step. Their gradients are summed in one binary tree over all of them, so that the same
            N M micro-batches give the same weights, bit for bit, on any number N of ranks that is a power of two. Divide losses by M,
            as without it. Sums are float32, so 16-bit parameters need `reduce_dtype=torch.float32`; with M above 2 a rank keeps
            more local gradients. docs/reproducibility.md says what it takes of the model.
        matrix_splits: parameters that hold several matrices (fused q, k and v, or heads), which an optimizer that steps whole
            parameters is to step each by itself, as if they were parameters: by the name of the parameter, or a pattern of names
            (`fnmatch`), the number of parts, their sizes, or a `zeroopt.Split`. {"*.attn.qkv.weight": 3} cuts the rows of an
            `nn.Linear` in three. State dicts have the state of the whole parameters, and by part what has another shape, which then
            loads with the same parts only.

    Returns:
        The model and the optimizer to train with.

    Raises:
        ConfigError: bad options, or a model and an optimizer that do not fit together. Nothing has been changed.
        NotSupportedError: options, parameters or optimizers that this release cannot train. Nothing has been changed.
        KernelUnavailableError: what only a kernel can do, and there is none for the device. Nothing has been changed.
        CheckpointError: `init` is a path where no checkpoint is, or a damaged one, or that of another model. Nothing has been
            changed.
        RankMismatchError: the ranks differ, or wrapping failed on another rank; the same text on all ranks. Nothing has
            been changed, but where memory gives out on a rank: see docs/failures.md.
        StateError: there is no process group, though several processes were started, or this rank is not in it; or the optimizer's
            state has a step count that is none. Nothing has been changed.
        CollectiveError: a rank died or stopped meanwhile.
    """
    given_group = _resolve_group(process_group)
    first = model.replica if isinstance(model, ZeroDataParallel) else None
    group = given_group if first is None else first.group  # whose ranks hear of what is wrong

    def make_config() -> Config:
        _check_wire(wire)
        return Config(
            stage=stage,
            bucket_mb=bucket_mb,
            fused=fused,
            transport=transport,
            overlap=overlap,
            broadcast_buffers=broadcast_buffers,
            sync_module_states=sync_module_states,
            share_parameters=share_parameters,
            reduce_dtype=reduce_dtype,
            wire=wire,
            gradient_compression=gradient_compression,
            bucket_buffers=bucket_buffers,
            check_every=check_every,
            precision=Precision(param_dtype, master_weights, state_dtype, parameter_compression),
            max_grad_norm=max_grad_norm,
            cast_inputs=cast_inputs,
            average_every=average_every,
            outer_optimizer=outer_optimizer,
            outer_fragments=outer_fragments,
            outer_delay=outer_delay,
            outer_mixing=outer_mixing,
            outer_dtype=outer_dtype,
            state_device=state_device,
            step_in_backward=step_in_backward,
            micro_batches=micro_batches,
            matrix_splits=read_splits(matrix_splits),
            norm_group=norm_group,
            average_group=average_group,
            shard_group=shard_group,
        )

    found = _Findings()
    try:
        config = make_config()
        if first is None and isinstance(model, nn.Module):
            found.look_at_meta(model, config, init, device)
        found.look_into(model, optimizer, given_group, config, features)
    # Whatever it is, the other ranks have to hear of it, or they would wait for this one.
    except Exception as error:  # noqa: BLE001
        found.problem = error
    try:
        with agreed_across(average_group, group, found.lines):
            found.agree(group)
            if found.building is not None:
                found.building.verify(group)
            connected = _connect(found, group) if first is None else None
    except BaseException:
        if found.building is not None:
            found.building.undo()
        raise
    if found.average is not None and found.config.sync_module_states:
        found.average.sync_states(model if first is None else first.module, group)
    if isinstance(model, ZeroDataParallel):
        return model, _add_optimizer(model, optimizer, found)
    assert connected is not None
    return _wrap_model(model, optimizer, group, connected, found, features)


class _Findings:
    """What a rank finds out before it hears of the others. Where there is a problem, only what came before it.

    Attributes:
        config: the options.
        params: that the optimizer is to step.
        lines: what all ranks of the group have to have in common, one fact a line.
        options: of it, what those with other parts of the parameters have to have in common too.
        beyond: the latter.
        average: where groups of ranks average their parameters.
        building: what gives values to what of the model is on the meta device.
        problem: what is wrong.
    """

    config: Config

    def __init__(self) -> None:
        self.params: list[ManagedParam] = []
        self.lines: list[str] = []
        self.options: list[str] = []
        self.beyond: list[ControlGroup] = []
        self.average: ParameterAverage | None = None
        self.building: Building | None = None
        self.problem: Exception | None = None

    def look_at_meta(
        self,
        model: nn.Module,
        config: Config,
        init: InitOrPath | Sequence[InitOrPath] | None,
        device: torch.device | str | None,
    ) -> None:
        """Prepare building what of the model is on the meta device. From then on it seems to be on its device."""
        self.building = prepare(model, _open_paths(init, model), device)
        if self.building is not None and config.average_every is not None and config.sync_module_states:
            raise NotSupportedError(
                "a model on the meta device cannot be taken over from another rank's before its parameters are averaged: pass "
                "sync_module_states=False where all ranks use the same seed, or give the model values first (to_empty)"
            )

    def look_into(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        given_group: dist.ProcessGroup,
        config: Config,
        features: Sequence[Feature],
    ) -> None:
        """Check whether options, model and optimizer fit together, by what this rank knows. Not collective."""
        self.config = config
        first = model.replica if isinstance(model, ZeroDataParallel) else None
        group = given_group if first is None else first.group
        module = model if first is None else first.module
        self.average = average_over(group, config)
        mesh = find_mesh(module, group) if isinstance(module, nn.Module) else None
        self.beyond = mesh_groups(mesh)
        check_norm_group(config.norm_group, [group, *(other.group for other in self.beyond)])
        if first is not None:
            config.check_shares(first.config)
            _check_shard_group(config, first.config)
            _check_group(given_group, first.group)
        _check_features(features, first)
        self.options = [*config.describe(), *map(_describe_feature, features)]
        self.params = inspect(module, optimizer, () if first is None else first.params, config.placement.home)
        for managed in self.params:
            managed.copies = count_copies(managed, mesh)
        check_param_dtypes(config, {managed.name: managed.param.dtype for managed in self.params})
        check_fused(optimizer, self.params, config)
        if config.micro_batches is not None:
            check_number_of_ranks(group.size())
        check_names(module, config)
        apply_splits(optimizer, self.params, config)
        if config.step_in_backward:
            check_steps_by_bucket(optimizer)
            check_goes_along(features)
        check_transport(config.transport, group, self.params[0].param.device)
        if config.outer_optimizer is not None and self.average is not None:
            check_transport(transport_across(config), self.average.control.group, self.params[0].param.device)
            check_outer_dtype(config, {m.param.dtype for m in self.params}, self.params[0].param.device)
        if config.gradient_compression is not None:
            check_has_codes(self.params[0].param.device)
        self.lines = _describe(self.options, module, optimizer, self.params)
        if config.outer_optimizer is not None:
            self.lines += inspect_outer(config.outer_optimizer)
        if self.building is not None:
            self.lines += self.building.describe()

    def agree(self, group: dist.ProcessGroup) -> None:
        """Raise on all ranks what is wrong on one of them, or between them. Collective."""
        here = [*self.lines, *describe_place(self.average)]
        agree([(ControlGroup(group), here), *((other, self.options) for other in self.beyond)], self.problem)


def _open_paths(init: InitOrPath | Sequence[InitOrPath] | None, model: nn.Module) -> list[Init | Saved] | None:
    """What `init` says, with what is there in the place of paths."""
    if init is None:
        return None
    given = init if isinstance(init, list | tuple) else (init,)
    return [_open_saved(one, model) if isinstance(one, str | os.PathLike) else one for one in given]


def _open_saved(path: str | os.PathLike[str], model: nn.Module) -> Saved:
    from .checkpoint.saved_model import open_saved  # imports torch.distributed.checkpoint, which takes seconds

    return open_saved(path, model)


def _wrap_model(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup,
    transport: Transport,
    found: _Findings,
    features: Sequence[Feature],
) -> tuple[ZeroDataParallel, ZeroOptimizer]:
    of_model = ModelFeatures(transport)
    replica = Replica(
        module,
        found.config,
        transport,
        group,
        of_model.features,
        of_model.turnout,
        of_model.join.check_outside,
        found.building,
    )
    of_model.add_all(replica, found.config, found.params[0].param.device, features)
    wrapped = ZeroDataParallel(replica, of_model)
    if group.rank() == 0:
        warn_of_missing_kernels(found.params[0].param.device)
        if found.config.gradient_compression is not None and not replica.compresses:
            _log.info(
                "gradient_compression=%r: nothing goes over a network (transport %s), so gradients are not compressed",
                found.config.gradient_compression,
                transport.name,
            )
    wrapped_optimizer = _add_optimizer(wrapped, optimizer, found)
    cast_frozen(module.parameters(), found.config.precision.param_dtype)
    if found.config.sync_module_states:
        wrapped.replica.sync_rest()
    mark_wrapped(wrapped)
    return wrapped, wrapped_optimizer


def _connect(found: _Findings, group: dist.ProcessGroup) -> Transport:
    config = found.config
    if found.average is not None and found.average.alone:
        return SingleTransport(lone_group())
    made: Transport | None = None
    problem: Exception | None = None
    try:
        made = _transport_for(config, group, found.params[0].param.device)
    except Exception as error:
        if not callable(config.transport):  # then all ranks have it
            raise
        problem = error
    if callable(config.transport):  # what a user's function comes to on one rank, the others have to hear of
        agree([(ControlGroup(group), [] if made is None else [f"transport {made.name}"])], problem)
    assert made is not None
    if config.micro_batches is not None:
        check_sums_in_tree(made)
    return made


def _transport_for(config: Config, group: dist.ProcessGroup, device: torch.device) -> Transport:
    if config.shard_group is not None:
        return connect_replicated(config.transport, group, config.shard_group, device)
    return connect_transport(
        config.transport,
        group,
        device,
        share_parameters=config.share_parameters,
        nests=config.wire is None or config.wire.nests,
    )


def _add_optimizer(model: ZeroDataParallel, optimizer: torch.optim.Optimizer, found: _Findings) -> ZeroOptimizer:
    config = found.config
    wrapped = ZeroOptimizer(model.replica, model.features, optimizer, found.params, config, found.average)
    cast_frozen((param for group in optimizer.param_groups for param in group["params"]), config.precision.param_dtype)
    model.train_with(wrapped)
    mark_wrapped(optimizer, wrapped)
    return wrapped


def _resolve_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = default_group() if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup):
        raise StateError(
            f"expected process_group to be a torch.distributed.ProcessGroup that this rank is in, got {group!r}"
        )
    return group


def _check_wire(wire: object) -> None:
    if wire is not None and not isinstance(wire, Wire):
        raise ConfigError(f"expected wire to be a zeroopt.collectives.Wire or None, got {type(wire).__name__}")


def _check_group(group: dist.ProcessGroup, first: dist.ProcessGroup) -> None:
    if group is not first:
        raise ConfigError(
            "the model was wrapped with another process_group for its first optimizer; wrap the further ones with the same"
        )


def _check_shard_group(config: Config, first: Config) -> None:
    if config.shard_group is not first.shard_group:
        raise ConfigError(
            "the model was wrapped with another shard_group for its first optimizer; wrap the further ones with the same"
        )


def _check_features(features: Sequence[Feature], first: Replica | None) -> None:
    for feature in features:
        if not isinstance(feature, Feature):
            raise ConfigError(f"expected features to be zeroopt.Feature objects, got {type(feature).__name__}")
    if features and first is not None:
        raise ConfigError(
            "features take part in the steps of all optimizers of a model: pass them with its first optimizer"
        )


def _describe_feature(feature: Feature) -> str:
    return f"feature {type(feature).__qualname__}"


def _describe(
    options: Sequence[str], model: nn.Module, optimizer: torch.optim.Optimizer, params: Sequence[ManagedParam]
) -> list[str]:
    """What all ranks have to have in common, one fact a line."""
    lines = [f"zeroopt {build_info()['version']}", *options, *describe_params(params)]
    managed_params = {managed.param for managed in params}
    for name, param in model.named_parameters():
        if param not in managed_params:
            lines.append(
                f"{'' if param.requires_grad else 'frozen '}parameter {name!r} of shape {list(param.shape)}, {param.dtype}"
                f"{describe_part(param)}, which this optimizer does not train"
            )
    for name, buffer in model.named_buffers():
        lines.append(f"buffer {name!r} of shape {list(buffer.shape)}, {buffer.dtype}{describe_part(buffer)}")
    return [*lines, *describe_groups(optimizer), describe_device(params[0].param.device)]
