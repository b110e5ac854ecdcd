"""What `bench.kernels` measures: each kernel on arrays far beyond the cache, what its traffic costs at the least, and its rivals."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.deepspeed_build import cpu_adam_is_compiled
from bench.traffic import Stream
from zeroopt import ops
from zeroopt.optim import FusedAdamW

Run = Callable[[], object]
GIB = 2**30


@dataclass(eq=False)
class Case:
    """One kernel on its arrays.

    Attributes:
        run: calls it once.
        streams: the arrays that it goes through, once for each pass.
        rivals: what does the same, or is compared for another reason, by name.
        targets: by rival, how many times its speed the kernel should have.
    """

    run: Run
    streams: Sequence[Stream]
    rivals: dict[str, Run] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(stream.nbytes for stream in self.streams)


MakeCase = Callable[[float, torch.device], Case]

F32, BF16, FP16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
ADAMW_ROW = [1e-3, 0.9, 0.999, 1e-8, 0.01, 1, 0, 0]


def filled(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ordinary numbers: neither zeros, which cost less, nor subnormal ones, which cost more."""
    if dtype in (torch.int8, torch.uint8, torch.int16):
        return torch.full((numel,), 7, dtype=dtype, device=device)
    return torch.full((numel,), 0.01, dtype=dtype, device=device)


def step_case(
    op: ops.StepKernel,
    row: list[float],
    storage: ops.Storage,
    gib: float,
    device: torch.device,
) -> Case:
    """A step of one large segment in some storage, whose group uses the first of the op's states."""
    signed = [signed for signed, flag in zip(op.signed, op.flags, strict=True) if flag is None or row[flag]]
    states = [storage.dtype_of_state(signed=s) for s in signed]
    dtypes = [
        storage.param_dtype,
        storage.grad_dtype,
        *([storage.master_dtype] if storage.master_dtype else []),
        *states,
    ]
    numel = int(gib * GIB) // sum(dtype.itemsize for dtype in dtypes) // ops.QUANT_BLOCK * ops.QUANT_BLOCK
    arrays = [filled(numel, dtype, device) for dtype in dtypes]
    param, grad, *rest = arrays
    master = rest.pop(0) if storage.master_dtype else None
    scales = [torch.full((ops.num_blocks(numel),), 0.1, device=device) for _ in rest] if storage.has_scales else []
    segment = ops.SegmentArrays(param, grad, master, rest, scales)
    table = ops.SegmentTable(storage, [segment], signed)
    active = torch.ones(1, dtype=torch.uint8, device=device)
    steps = torch.zeros(2, 1, device=device)
    groups = torch.tensor([row], dtype=torch.float64)
    rounded = storage.master_dtype is not None and storage.master_weights == "float32"
    modes = ["w" if rounded else "rw", "r", *(["rw"] if master is not None else []), *["rw"] * len(rest)]
    streams = [Stream(array, mode) for array, mode in zip(arrays, modes, strict=True)]
    return Case(lambda: op(table, active=active, steps=steps, groups=groups), streams)


def adamw(storage: ops.Storage) -> MakeCase:
    return lambda gib, device: step_case(ops.adamw, ADAMW_ROW, storage, gib, device)


def other(op: ops.StepKernel, row: list[float]) -> MakeCase:
    return lambda gib, device: step_case(op, row, ops.Storage(), gib, device)


def lamb(gib: float, device: torch.device) -> Case:
    """Its second pass reads what the first has written, and the parameter once more."""
    row = [1e-3, 0.9, 0.999, 1e-6, 0.01, 0]
    case = step_case(ops.lamb, row, ops.Storage(), gib, device)
    param, grad, exp_avg, exp_avg_sq = (stream.array for stream in case.streams)
    first = [Stream(param, "r"), Stream(grad, "r"), Stream(exp_avg, "rw"), Stream(exp_avg_sq, "rw")]
    second = [Stream(param, "rw"), Stream(exp_avg, "r"), Stream(exp_avg_sq, "r")]
    return Case(case.run, [*first, *second])


def norm(gib: float, device: torch.device) -> Case:
    numel = int(gib * GIB) // 4
    grad = filled(numel, F32, device)
    table = ops.SegmentTable(ops.Storage(), [ops.SegmentArrays(torch.empty(numel, device=device), grad)])
    active, found = torch.ones(1, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    case = Case(lambda: ops.squared_norms(table, active=active, found_inf=found), [Stream(grad, "r")])
    case.rivals["torch norm"] = lambda: torch.linalg.vector_norm(grad)
    return case


def pack(src: torch.dtype, dst: torch.dtype) -> MakeCase:
    def make(gib: float, device: torch.device) -> Case:
        numel = int(gib * GIB) // (src.itemsize + dst.itemsize)
        one, two = filled(numel, src, device), filled(numel, dst, device)
        case = Case(lambda: ops.pack(one, two, scale=0.5), [Stream(one, "r"), Stream(two, "w")])
        case.rivals["torch copy_, mul_"] = lambda: two.copy_(one).mul_(0.5)
        return case

    return make


def reduce(gib: float, device: torch.device) -> Case:
    numel = int(gib * GIB) // 12
    one, two, out = (filled(numel, F32, device) for _ in range(3))
    case = Case(lambda: ops.reduce([one, two], out), [Stream(one, "r"), Stream(two, "r"), Stream(out, "w")])
    case.rivals["torch add"] = lambda: torch.add(one, two, out=out)
    return case


def quantize(dtype: torch.dtype, *, inverse: bool) -> MakeCase:
    def make(gib: float, device: torch.device) -> Case:
        numel = int(gib * GIB) // 5
        values, codes = filled(numel, F32, device), filled(numel, dtype, device)
        scales = torch.full((ops.num_blocks(numel),), 0.1, device=device)
        if inverse:
            return Case(lambda: ops.dequantize(codes, scales, values), [Stream(codes, "r"), Stream(values, "w")])
        return Case(lambda: ops.quantize(values, codes, scales), [Stream(values, "r"), Stream(codes, "w")])

    return make


def by_byte_of_codes(array: Tensor, bits: int) -> Tensor:
    """An array as what as many bytes of codes stand for: one element each, or two as one that is as wide. Steps are left aside."""
    wide = {2: torch.int32, 4: torch.float64}
    return array if bits == 8 or array.dtype is torch.uint8 else array.view(wide[array.itemsize])


def encode(bits: int) -> MakeCase:
    """Half of an array that is sent to two ranks each, with error feedback."""

    def make(gib: float, device: torch.device) -> Case:
        numel = int(gib * GIB) // 9 // 512 * 512
        values, residual = filled(numel, F32, device), torch.zeros(numel, dtype=BF16, device=device)
        encoded = torch.zeros(2 * ops.encoded_bytes(numel // 2, bits), dtype=torch.uint8, device=device)

        def run() -> None:
            noise = {"seed": 1, "step": 1}
            ops.encode_slices(values, encoded, num_slices=2, bits=bits, residual=residual, **noise)

        streams = [(values, "r"), (residual, "rw"), (filled(numel * bits // 8, torch.uint8, device), "w")]
        case = Case(run, [Stream(by_byte_of_codes(array, bits), mode) for array, mode in streams])
        copied = torch.empty_like(values)
        case.rivals["memcpy of the values"] = lambda: copied.copy_(values)
        return case

    return make


def sum_encoded(bits: int) -> MakeCase:
    def make(gib: float, device: torch.device) -> Case:
        numel = int(gib * GIB) // 6 // 256 * 256
        slices = [filled(ops.encoded_bytes(numel, bits), torch.uint8, device) for _ in range(2)]
        for encoded in slices:
            ops.encode_slices(filled(numel, F32, device), encoded, num_slices=1, bits=bits, seed=1, step=1)
        out = filled(numel, F32, device)
        codes = [filled(numel * bits // 8, torch.uint8, device) for _ in slices]
        streams = [*(Stream(each, "r") for each in codes), Stream(by_byte_of_codes(out, bits), "w")]
        case = Case(lambda: ops.sum_encoded(slices, out, bits=bits), streams)
        wide = [filled(numel, F32, device) for _ in range(2)]
        case.rivals["reduce of float32"] = lambda: ops.reduce(wide, out)
        return case

    return make


def one_tensor(gib: float, device: torch.device) -> Case:
    """AdamW in float32 on one large tensor, against other implementations of it."""
    return against_others([int(gib * GIB) // 16], device, fused=1.0)


def many_tensors(gib: float, device: torch.device) -> Case:
    """AdamW in float32 on some 300 tensors of a transformer, against other implementations of it."""
    width = max(16, int((gib * GIB / 16 / (24 * 12)) ** 0.5) // 16 * 16)
    square, tall, vectors = [width * width] * 4, [4 * width * width] * 2, [width] * 5 + [4 * width]
    return against_others((square + tall + vectors) * 24, device, fused=1.1)


def against_others(numels: Sequence[int], device: torch.device, *, fused: float) -> Case:
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
    ours = parameters(numels, F32, device)
    theirs = parameters(numels, F32, device)  # one set for all rivals; each keeps moments of its own
    optimizer = FusedAdamW(ours, **options)
    optimizer.step()
    streams = [
        Stream(array, mode)
        for param in ours
        for array, mode in [
            (param.detach().view(-1), "rw"),
            (param.grad.view(-1), "r"),  # type: ignore[union-attr]
            (optimizer.state[param]["exp_avg"].view(-1), "rw"),
            (optimizer.state[param]["exp_avg_sq"].view(-1), "rw"),
        ]
    ]
    case = Case(optimizer.step, streams)
    case.rivals = {
        "torch fused": torch.optim.AdamW(theirs, fused=True, **options).step,
        "torch default": torch.optim.AdamW(theirs, **options).step,
        "torch foreach": torch.optim.AdamW(theirs, foreach=True, **options).step,
    }
    case.targets = {"torch fused": fused, "torch default": 4.5}
    if cpu_adam_is_compiled():
        adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        case.rivals["DeepSpeedCPUAdam"] = adam(theirs, adamw_mode=True, **options).step
        case.targets["DeepSpeedCPUAdam"] = 1.0
    return case


def parameters(numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(filled(numel, dtype, device)) for numel in numels]
    for param in params:
        param.grad = filled(param.numel(), dtype, device)
    return params


def mixed_precision(gib: float, device: torch.device) -> Case:
    """bfloat16 parameters and gradients with float32 masters: norm and finite check, then one step that unscales, clips and
    rounds; against the usual way, a pass for each."""
    case = step_case(ops.adamw, ADAMW_ROW, ops.Storage(BF16, "float32", BF16), gib, device)
    param, grad, master, exp_avg, exp_avg_sq = (stream.array for stream in case.streams)
    segment = ops.SegmentArrays(param, grad, master, [exp_avg, exp_avg_sq])
    table = ops.SegmentTable(ops.Storage(BF16, "float32", BF16), [segment])
    active = torch.ones(1, dtype=torch.uint8, device=device)
    steps = torch.zeros(2, 1, device=device)
    groups = torch.tensor([ADAMW_ROW], dtype=torch.float64)
    scale, found_inf = torch.tensor([1024.0], device=device), torch.zeros(1, device=device)

    def run() -> None:
        squares = ops.squared_norms(table, active=active, found_inf=found_inf)
        norm = squares.sum().sqrt() / scale
        clip = (1.0 / (norm + 1e-6)).clamp(max=1.0).float()
        ops.adamw(table, active=active, steps=steps, groups=groups, control=ops.StepControl(scale, clip, found_inf))

    theirs = nn.Parameter(filled(param.numel(), F32, device))
    theirs.grad = torch.empty_like(theirs)
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.01, fused=True)
    rounded, gradient = filled(param.numel(), BF16, device), filled(param.numel(), BF16, device)

    def usual() -> None:
        assert theirs.grad is not None
        theirs.grad.copy_(gradient)
        torch._amp_foreach_non_finite_check_and_unscale_([theirs.grad], found_inf, 1 / scale)
        nn.utils.clip_grad_norm_([theirs], 1.0)
        if not found_inf.item():
            optimizer.step()
        rounded.copy_(theirs.detach())

    return Case(run, [Stream(grad, "r"), *case.streams], {"the usual way": usual}, {"the usual way": 2.0})


def int8_moments(gib: float, device: torch.device) -> Case:
    """8-bit moments of float32 parameters, against float32 moments of as many."""
    case = adamw(ops.Storage(state_dtype=I8))(gib, device)
    numel = case.streams[0].array.numel()
    full = adamw(ops.Storage())(numel * 16 / GIB, device)
    case.rivals["float32 moments"] = full.run
    case.targets["float32 moments"] = 1.2
    return case


CASES: dict[str, MakeCase] = {
    "AdamW, one tensor": one_tensor,
    "AdamW, 288 tensors": many_tensors,
    "AdamW bf16 + float32 master, clipped and unscaled": mixed_precision,
    "AdamW, int8 moments": int8_moments,
    "AdamW float32": adamw(ops.Storage()),
    "AdamW bf16 + float32 master": adamw(ops.Storage(BF16, "float32", BF16)),
    "AdamW bf16 + float32 master, float32 grad": adamw(ops.Storage(BF16, "float32", F32)),
    "AdamW fp16 + float32 master": adamw(ops.Storage(FP16, "float32", FP16)),
    "AdamW bf16 + remainder": adamw(ops.Storage(BF16, "remainder", BF16)),
    "AdamW bf16 stochastic": adamw(ops.Storage(BF16, "none", BF16)),
    "AdamW bf16 stochastic, bf16 moments": adamw(ops.Storage(BF16, "none", BF16, BF16)),
    "AdamW bf16 + remainder, int8 moments": adamw(ops.Storage(BF16, "remainder", BF16, I8)),
    "SGD with momentum": other(ops.sgd, [1e-3, 0.9, 0, 0.01, 0, 0]),
    "Adagrad": other(ops.adagrad, [1e-3, 0, 0.01, 1e-10, 0]),
    "RMSprop": other(ops.OPTIMIZERS["rmsprop"], [1e-3, 0.99, 1e-8, 0.01, 0, 0, 0]),
    "Lion": other(ops.lion, [1e-4, 0.9, 0.99, 0.01, 0]),
    "LAMB": lamb,
    "norm and finite check": norm,
    "pack float32 to bf16": pack(F32, BF16),
    "pack bf16 to float32": pack(BF16, F32),
    "pack float32": pack(F32, F32),
    "reduce two slices": reduce,
    "quantize int8": quantize(torch.int8, inverse=False),
    "quantize uint8": quantize(torch.uint8, inverse=False),
    "dequantize int8": quantize(torch.int8, inverse=True),
    "encode for the wire, int8": encode(8),
    "encode for the wire, int4": encode(4),
    "sum two encoded slices, int8": sum_encoded(8),
    "sum two encoded slices, int4": sum_encoded(4),
}
