"""`zeroopt.wrap`: check everything, agree with the other ranks, then move the model into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import _C
from .agreement import agree
from .audit import Audit
from .broadcast import Broadcaster
from .bucket import Bucket, ManagedParam, make_buckets, make_plan
from .collectives import Transport, check_transport, connect_transport
from .config import Config, Fused, check_config, check_param_dtype, check_reduce_dtype
from .errors import StateError
from .footprint import log_wrapped
from .grad_hooks import GradientReducer
from .inspect import inspect, mark_wrapped
from .module import ZeroDataParallel
from .optimizer import ZeroOptimizer
from .param_gather import ParamGathers
from .step import check_fused


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int = 2,
    process_group: dist.ProcessGroup | None = None,
    bucket_mb: float = 25.0,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    master_weights: str = "float32",
    state_dtype: torch.dtype = torch.float32,
    max_grad_norm: float | None = None,
    fused: Fused = "auto",
    transport: str = "auto",
    overlap: bool = True,
    broadcast_buffers: bool = True,
    sync_module_states: bool = True,
    share_parameters: bool = False,
    average_every: int | None = None,
    *,
    bucket_buffers: int = 2,
    check_every: int | None = None,
) -> tuple[ZeroDataParallel, ZeroOptimizer]:
    """Make a model and its optimizer train data-parallel, with the training state split over the ranks.

    Collective: every rank of the process group must call it, with the same model, optimizer and options. The training
    loop stays as it is: `loss = model(x); loss.backward(); optimizer.step(); optimizer.zero_grad()`.

    The model's parameters stay the same objects; their data moves into flat buckets, one bucket at a time. Cast and move
    the model first, and build the optimizer on its parameters.

    Args:
        model: any module with dense parameters of float32, float64, bfloat16 or float16 on one device.
        optimizer: an element-wise torch optimizer on the model's parameters. State that it already has is kept.
        stage: 0 averages gradients (as DistributedDataParallel does), 1 also shards the optimizer's state, 2 also shards
            the gradients.
        process_group: the ranks to train with; the default group when None.
        bucket_mb: size of a bucket in MiB. A larger parameter has a bucket of its own.
        param_dtype: torch.bfloat16 or torch.float16: float32 parameters become that, and what rounding takes away is kept as
            `master_weights` says. None leaves parameters as they are.
        master_weights: with `param_dtype`. "float32": each rank keeps a float32 copy of the parameters it steps; "remainder":
            16 bits that complete a bfloat16 to that very copy; "none": nothing, bfloat16 is rounded stochastically.
        state_dtype: of the moments: torch.float32, torch.bfloat16 (rounded stochastically) or torch.int8 (codes with a scale
            for every 256 elements).
        fused: "auto" steps with a fused kernel where there is one for this optimizer and dtype (AdamW, Adam, SGD and Adagrad,
            and all of `zeroopt.optim` but LAMB, in float32 or with `param_dtype`) and with the optimizer's own `step`
            otherwise; True insists on the kernel, as do the last two options, False on the own step.
        transport: "shm" (memory that the ranks of one host share), "pairwise" (Gloo's messages), "torch" (the backend's own
            collectives), or "auto" to choose by backend, device and hosts; on several hosts of CPU ranks it combines the
            first two.
        overlap: let a bucket travel while backward fills the next; False waits for each.
        broadcast_buffers: before a forward with gradients, all ranks take over the buffers of rank 0.
        sync_module_states: all ranks start from the parameters and buffers of rank 0.
        share_parameters: CPU ranks of one host keep one copy of the parameters for all of them, in shared memory (stages 1
            and 2). An in-place change that every rank makes then happens once a rank on the same memory: make it under
            `ZeroDataParallel.write_parameters`. Without `sync_module_states`, each host starts from its first rank's.
        reduce_dtype: dtype in which gradients travel, for example torch.bfloat16; sums are kept in float32. None: that of
            the parameters. Stages 1 and 2; between float32 and 16 bits. Transport "torch" sums in that dtype.
        bucket_buffers: in stage 2, full gradient buckets that exist at once: one fills while the others travel.
        check_every: k: in every k-th step, look whether all gradients are finite, before anything is changed, and whether the
            parameters are the same on all ranks, before and after. Where not, `step` raises on every rank, and names the
            parameter and the ranks. None: never.
        max_grad_norm, average_every: reserved; only their defaults are supported so far.

    Returns:
        The model and the optimizer to train with.

    Raises:
        ConfigError: bad options, or a model and an optimizer that do not fit together. Nothing has been changed.
        NotSupportedError: options, parameters or optimizers that this release cannot train. Nothing has been changed.
        RankMismatchError: the ranks differ, or wrapping failed on another rank; the same text on all ranks. Nothing has
            been changed.
        StateError: there is no process group, or this rank is not in it.
        RuntimeError: torch.distributed's own, when a rank died or stopped meanwhile.
    """
    group = _resolve_group(process_group)
    problem: Exception | None = None
    lines: list[str] = []
    params: list[ManagedParam] = []
    try:
        config = check_config(
            stage=stage,
            bucket_mb=bucket_mb,
            fused=fused,
            transport=transport,
            overlap=overlap,
            broadcast_buffers=broadcast_buffers,
            sync_module_states=sync_module_states,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            master_weights=master_weights,
            state_dtype=state_dtype,
            max_grad_norm=max_grad_norm,
            share_parameters=share_parameters,
            bucket_buffers=bucket_buffers,
            check_every=check_every,
            average_every=average_every,
        )
        params = inspect(model, optimizer)
        check_param_dtype(param_dtype, {managed.name: managed.param.dtype for managed in params})
        check_fused(optimizer, params, config)
        stored = [config.precision.stored_dtype(managed.param.dtype) for managed in params]
        check_reduce_dtype(config.reduce_dtype, stored)
        check_transport(config.transport, group, params[0].param.device)
        lines = _describe(config, model, optimizer, params)
    # Whatever it is, the other ranks have to hear of it, or they would wait for this one.
    except Exception as error:  # noqa: BLE001
        problem = error
    agree(group, _agreement_device(group), lines, problem)
    device = params[0].param.device
    connected = connect_transport(config.transport, group, device, share_parameters=config.share_parameters)
    return _wrap_checked(model, optimizer, config, params, connected, group)


def _wrap_checked(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    params: Sequence[ManagedParam],
    transport: Transport,
    group: dist.ProcessGroup,
) -> tuple[ZeroDataParallel, ZeroOptimizer]:
    placement = config.placement
    precision, shared = config.precision, config.share_parameters
    plan = make_plan(params, transport.world_size, config.bucket_bytes, precision)
    broadcaster = Broadcaster(group) if transport.world_size > 1 else None
    if broadcaster is not None and config.sync_module_states and precision.param_dtype is not None:
        for managed in params:  # before they are rounded, or masters would differ
            broadcaster.broadcast([managed.param.data])
    buckets = make_buckets(plan, params, transport, precision, shard_state=placement.shard_state, shared=shared)
    if broadcaster is not None and config.sync_module_states:
        writers = transport.writers if config.share_parameters else None
        _sync_states(model, params, buckets, broadcaster, writers)
    if config.share_parameters:
        transport.barrier()  # the writers are through
    reducer = GradientReducer(
        params,
        buckets,
        transport,
        placement,
        overlap=config.overlap,
        bucket_buffers=config.bucket_buffers,
        reduce_dtype=config.reduce_dtype,
        precision=precision,
    )
    if config.check_every is not None:
        reducer.audit = Audit(config.check_every, params, transport)
    travels = placement.shard_state and transport.world_size > 1
    gathers = ParamGathers(model, buckets, transport, lazy=config.overlap and travels)
    has_buffers = next(model.buffers(), None) is not None
    wrapped_model = ZeroDataParallel(
        model,
        reducer,
        gathers,
        transport,
        broadcaster if config.broadcast_buffers and has_buffers else None,
        shared=shared,
    )
    seed = _agree_on_seed(group, params[0].param.device)
    wrapped_optimizer = ZeroOptimizer(model, optimizer, config, params, buckets, reducer, gathers, transport, seed)
    wrapped_model.after_writing(wrapped_optimizer.take_up_writes)
    mark_wrapped(model, optimizer, wrapped_model, wrapped_optimizer)
    log_wrapped(buckets, reducer.stores, optimizer, config, transport)
    return wrapped_model, wrapped_optimizer


def _agree_on_seed(group: dist.ProcessGroup, device: torch.device) -> int:
    """Rank 0's seed of torch, for stochastic rounding: what depends on the parameter alone, not on the rank that steps it."""
    seed = torch.tensor([torch.initial_seed() % 2**63], dtype=torch.int64, device=device)
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    return int(seed.item())


def _resolve_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise StateError(
            "zeroopt.wrap needs a process group: call torch.distributed.init_process_group first (and start the script "
            "with torchrun, also for a single process)"
        )
    group = dist.group.WORLD if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup):
        raise StateError(
            f"expected process_group to be a torch.distributed.ProcessGroup that this rank is in, got {group!r}"
        )
    return group


def _agreement_device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")


def _describe(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, params: Sequence[ManagedParam]
) -> list[str]:
    """What all ranks have to have in common, one fact a line."""
    lines = [f"zeroopt {_C.build_info()['version']}", *config.describe()]
    for managed in params:
        what = f"shape {list(managed.shape)}, {managed.param.dtype}, strides {list(managed.stride)}"
        lines.append(f"parameter {managed.name!r} of {what}, in param_group {managed.group}")
    managed_params = {managed.param for managed in params}
    for name, param in model.named_parameters():
        if param not in managed_params:
            lines.append(
                f"parameter {name!r} of shape {list(param.shape)}, {param.dtype}, which zeroopt does not train"
            )
    lines += [f"buffer {name!r} of shape {list(b.shape)}, {b.dtype}" for name, b in model.named_buffers()]
    lines.append(f"optimizer {type(optimizer).__name__}")
    for number, group in enumerate(optimizer.param_groups):
        options = ", ".join(
            f"{key}={_plain(group[key])}" for key in sorted(group) if key not in ("params", "param_names")
        )
        lines.append(f"param_group {number} with {options}")
    return lines


def _plain(value: Any) -> str:
    """An option as text that is the same on every rank: no addresses of objects."""
    if isinstance(value, torch.Tensor):
        return repr(value.tolist())
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_plain, value))})"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def _sync_states(
    model: nn.Module,
    params: Sequence[ManagedParam],
    buckets: Sequence[Bucket],
    broadcaster: Broadcaster,
    writers: Sequence[int] | None,
) -> None:
    for bucket in buckets:
        if writers is None:
            broadcaster.broadcast_flat(bucket.flat_param)
        else:
            broadcaster.broadcast_among(bucket.flat_param, writers)
    managed = {m.param for m in params}
    rest = [p.data for p in model.parameters() if p not in managed]
    broadcaster.broadcast([*rest, *model.buffers()])
