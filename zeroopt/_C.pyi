"""Compiled kernels and planner. Addresses, sizes, dtype codes and streams are plain integers, and nothing is checked.

`csrc/kernels.h` states the contract of every kernel. Call them through `zeroopt.ops`, which checks its arguments.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    flags: str
    cuda: bool
    cuda_version: str
    cuda_problem: str
    cuda_archs: list[str]
    openmp: str
    isas: list[str]
    isa: str

class OptimizerFacts(TypedDict):
    kernels: list[str]
    columns: list[str]
    states: list[str]
    signed: list[bool]
    flags: list[int | None]

class BucketPlan:
    @property
    def kind(self) -> int: ...
    @property
    def whole(self) -> bool: ...
    @property
    def padded_numel(self) -> int: ...
    @property
    def params(self) -> list[int]: ...
    @property
    def offsets(self) -> list[int]: ...
    @property
    def numels(self) -> list[int]: ...
    @property
    def owners(self) -> list[int]: ...

class Segment:
    @property
    def param(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def numel(self) -> int: ...

class Plan:
    def __init__(
        self,
        numels: Sequence[int],
        kinds: Sequence[int],
        item_bytes: Sequence[int],
        world_size: int,
        alignment: int,
        bucket_bytes: int,
        whole_costs: Sequence[int | None] = (),
        slice_alignment: int | None = None,
        padding_share: float = ...,
        padding_bytes: int = 0,
    ) -> None: ...
    @property
    def buckets(self) -> list[BucketPlan]: ...
    @property
    def world_size(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    def shard_numel(self, bucket: int) -> int: ...
    def own_range(self, bucket: int, rank: int) -> tuple[int, int]: ...
    def segments(self, bucket: int, begin: int, end: int) -> list[Segment]: ...

class Ticket:
    def __init__(self, kind: int, bytes: int, buffer: int) -> None: ...
    @property
    def kind(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def buffer(self) -> int: ...

class ShmBoard:
    CAPACITY: ClassVar[int]
    NEVER: ClassVar[int]
    def __init__(self, memory: int, rank: int, world_size: int) -> None: ...
    @staticmethod
    def bytes(world_size: int) -> int: ...
    def post(self, ticket: Ticket) -> int: ...
    def mark_read(self, count: int) -> None: ...
    def leave(self) -> None: ...
    def wait(self, posted_count: int, read_count: int, seconds: float) -> bool: ...
    def posted(self) -> list[int]: ...
    def read(self) -> list[int]: ...
    def left(self) -> list[bool]: ...
    def ticket(self, rank: int, number: int) -> Ticket: ...

class SharedMapping:
    def __init__(self, fd: int, num_bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Layouts:
    def __init__(self, exchange: object, shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> None: ...
    def look(self, tensors: Sequence[object], addresses: int) -> tuple[int, int, int, int] | None: ...

class Arrivals:
    arrived: bytearray
    order: list[int]
    bucket_of: list[int]
    missing: list[int]
    last: list[object | None]
    tell: Callable[[], object]
    is_on: bool
    def count(self, index: int) -> int | None: ...
    def note(self, index: int) -> int: ...

class CountingHook:
    arrivals: Arrivals
    index: int
    def __call__(self, param: object) -> None: ...

def hold_rank_lock(fd: int, rank: int) -> None: ...
def rank_lock_is_held(fd: int, rank: int) -> bool: ...
def optimizers() -> dict[str, OptimizerFacts]: ...
def build_info() -> BuildInfo: ...
def cpu_isa() -> str: ...
def pack(src: int, src_dtype: int, dst: int, dst_dtype: int, numel: int, scale: float, num_threads: int) -> None: ...
def pack_segments(
    rows: int, active: int, count: int, src_dtype: int, dst_dtype: int, scale: float, num_threads: int
) -> None: ...
def copy(src: int, dst: int, bytes: int, num_threads: int) -> None: ...
def encoded_bytes(numel: int, bits: int) -> int: ...
def encode_slices(
    values: int,
    dtype: int,
    residual: int,
    encoded: int,
    slice_numel: int,
    num_slices: int,
    bits: int,
    seed: int,
    step: int,
    key: int,
    num_threads: int,
) -> None: ...
def sum_encoded(
    slices: Sequence[int], bits: int, base: int, out: int, out_dtype: int, numel: int, num_threads: int
) -> None: ...
def reduce(
    slices: Sequence[int], slice_dtype: int, base: int, out: int, out_dtype: int, numel: int, num_threads: int
) -> None: ...
def quantize(values: int, codes: int, scales: int, numel: int, is_signed: bool, num_threads: int) -> None: ...
def dequantize(codes: int, scales: int, values: int, numel: int, is_signed: bool, num_threads: int) -> None: ...
def squared_norms(
    rows: int, active: int, squares: int, count: int, grad_dtype: int, found_inf: int, num_threads: int
) -> None: ...
def sum_in_parts(
    values: int, numel: int, scale: float, squared: bool, rounders: Sequence[float], sums: int, num_threads: int
) -> None: ...
def step(
    kernel: str,
    rows: int,
    active: int,
    steps: int,
    squares: int,
    count: int,
    param_format: int,
    grad_dtype: int,
    state_format: int,
    groups: int,
    grad_scale: int,
    clip_coef: int,
    found_inf: int,
    seed: int,
    num_threads: int,
) -> None: ...
def cuda_try_launch(stream: int) -> None: ...
def cuda_driver_version() -> int: ...
def cuda_pack(src: int, src_dtype: int, dst: int, dst_dtype: int, numel: int, scale: float, stream: int) -> None: ...
def cuda_pack_segments(
    rows: int, active: int, count: int, src_dtype: int, dst_dtype: int, scale: float, stream: int
) -> None: ...
def cuda_reduce(
    slices: Sequence[int], slice_dtype: int, base: int, out: int, out_dtype: int, numel: int, stream: int
) -> None: ...
def cuda_quantize(values: int, codes: int, scales: int, numel: int, is_signed: bool, stream: int) -> None: ...
def cuda_dequantize(codes: int, scales: int, values: int, numel: int, is_signed: bool, stream: int) -> None: ...
def cuda_encode_slices(
    values: int,
    dtype: int,
    residual: int,
    encoded: int,
    slice_numel: int,
    num_slices: int,
    bits: int,
    seed: int,
    step: int,
    key: int,
    stream: int,
) -> None: ...
def cuda_sum_encoded(
    slices: Sequence[int], bits: int, base: int, out: int, out_dtype: int, numel: int, stream: int
) -> None: ...
def cuda_norm_workspace_bytes(num_segments: int, total_numel: int) -> int: ...
def cuda_step_workspace_bytes(kernel: str, num_segments: int, total_numel: int) -> int: ...
def cuda_squared_norms(
    rows: int,
    active: int,
    squares: int,
    count: int,
    grad_dtype: int,
    found_inf: int,
    total_numel: int,
    workspace: int,
    stream: int,
) -> None: ...
def cuda_step(
    kernel: str,
    rows: int,
    active: int,
    steps: int,
    squares: int,
    count: int,
    param_format: int,
    grad_dtype: int,
    state_format: int,
    groups: int,
    grad_scale: int,
    clip_coef: int,
    found_inf: int,
    seed: int,
    total_numel: int,
    workspace: int,
    stream: int,
) -> None: ...
