"""Known faults in small, with their sources where others have had them. With `is_mended`, the wait is there that was missing.

Each function is one step of data parallelism on one rank: gradients go into a bucket, the bucket is reduced on a stream of its own
while the next one fills, the sums are read.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

NUMEL = 4096


def _gradient(value: float, rank: int) -> Tensor:
    return torch.full((NUMEL,), value + rank, device="cuda")


def packed_on_several_streams(rank: int, is_mended: bool) -> Tensor:
    """The reduce waits for the stream that filled the last part of the bucket, not for all of them (DeepSpeed #8061)."""
    streams, communication = [torch.cuda.Stream() for _ in range(3)], torch.cuda.Stream()
    bucket = torch.zeros(3 * NUMEL, device="cuda")
    for number, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            bucket[number * NUMEL : (number + 1) * NUMEL].copy_(_gradient(number, rank))
    for stream in streams if is_mended else streams[-1:]:
        communication.wait_stream(stream)
    with torch.cuda.stream(communication):
        dist.all_reduce(bucket)
    torch.cuda.current_stream().wait_stream(communication)
    return bucket * 2


def wrong_stream_waited_for(rank: int, is_mended: bool) -> Tensor:
    """The reduce waits for the default stream, while gradients come on the stream of their forward (DeepSpeed #7898)."""
    compute, communication = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(compute):
        bucket = _gradient(1.0, rank)
    communication.wait_stream(compute if is_mended else torch.cuda.default_stream())
    with torch.cuda.stream(communication):
        dist.all_reduce(bucket)
    compute.wait_stream(communication)
    with torch.cuda.stream(compute):
        result = bucket * 2
    torch.cuda.current_stream().wait_stream(compute)
    return result


def buffer_filled_while_it_travels(rank: int, is_mended: bool) -> Tensor:
    """Two buffers in turn: the third bucket is packed into the first one, which may not have been sent yet (DeepSpeed #5545)."""
    communication = torch.cuda.Stream()
    buffers = [torch.zeros(NUMEL, device="cuda") for _ in range(2)]
    sums = torch.zeros(4, NUMEL, device="cuda")
    for number in range(4):
        buffer = buffers[number % 2]
        if is_mended:
            torch.cuda.current_stream().wait_stream(communication)
        buffer.copy_(_gradient(number, rank))
        communication.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(communication):
            dist.all_reduce(buffer)
            sums[number].copy_(buffer)
    torch.cuda.current_stream().wait_stream(communication)
    return sums.sum(0)


def memory_of_a_buffer_that_travels(rank: int, is_mended: bool) -> Tensor:
    """A buffer is dropped while the stream that it was lent to still uses it, and handed out again (DeepSpeed #7965)."""
    communication = torch.cuda.Stream()
    sums = torch.zeros(NUMEL, device="cuda")
    bucket = _gradient(1.0, rank)
    communication.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(communication):
        dist.all_reduce(bucket)
        sums.copy_(bucket)
    if is_mended:
        bucket.record_stream(communication)
    del bucket
    activations = torch.zeros(NUMEL, device="cuda")
    torch.cuda.current_stream().wait_stream(communication)
    return sums + activations


def parameters_read_while_they_are_gathered(rank: int, is_mended: bool) -> Tensor:
    """The forward of a bucket whose gather was started, and not waited for, reads weights of the step before (Megatron #950)."""
    param = torch.zeros(2 * NUMEL, device="cuda")
    param[rank * NUMEL : (rank + 1) * NUMEL].fill_(rank + 1.0)
    work = dist.all_gather_into_tensor(param, param[rank * NUMEL : (rank + 1) * NUMEL], async_op=True)
    if is_mended:
        work.wait()
    result = param * 2
    work.wait()
    return result


def gradients_added_to_what_was_gathered(rank: int, is_mended: bool) -> Tensor:
    """The buffer of gradients is lent to a gather of parameters, and gradients are added to what that has left (Megatron #4609)."""
    buffer, param = torch.zeros(2 * NUMEL, device="cuda"), torch.zeros(2 * NUMEL, device="cuda")
    own = buffer[rank * NUMEL : (rank + 1) * NUMEL].fill_(rank + 1.0)
    dist.all_gather_into_tensor(buffer, own)
    param.copy_(buffer)
    if is_mended:
        buffer.zero_()
    buffer += _gradient(1.0, rank).repeat(2)
    dist.all_reduce(buffer)
    return buffer


def staged_but_not_there(rank: int, is_mended: bool) -> Tensor:
    """A copy from pageable memory is taken for one that has come when the call returns; by then it has been staged, no more."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        numbers = torch.full((NUMEL,), 1.0 + rank).to("cuda", non_blocking=True)
    numbers.record_stream(torch.cuda.current_stream())
    if is_mended:
        torch.cuda.current_stream().wait_stream(side)
    return numbers * 2


def read_before_its_message_has_come(rank: int, is_mended: bool) -> Tensor:
    """Messages have a stream of their own for each two ranks: a collective of the same group, started later, does not come behind them."""
    numbers = torch.full((NUMEL,), -1.0, device="cuda")
    if rank == 0:
        work = dist.isend(_gradient(1.0, rank), 1)
    else:
        work = dist.irecv(numbers, 0)
    assert work is not None
    if is_mended:
        work.wait()
    dist.all_reduce(numbers)
    work.wait()
    return numbers


def flags_rewritten_while_they_are_copied(rank: int, is_mended: bool) -> Tensor:
    """Pinned memory from which a copy has yet to be made is written by the host for the next step."""
    pinned, total = torch.zeros(NUMEL).pin_memory(), torch.zeros(NUMEL, device="cuda")
    copied = torch.cuda.Event()
    for number in range(3):
        if is_mended:
            copied.synchronize()
        pinned.fill_(float(number + rank))
        flags = pinned.to("cuda", non_blocking=True)
        copied.record()
        total += flags
    return total


def read_by_the_host_too_early(rank: int, is_mended: bool) -> Tensor:
    """The host looks at what a copy to pinned memory may not have brought yet."""
    pinned = torch.zeros(1).pin_memory()
    norm = _gradient(1.0, rank).sum()
    pinned.copy_(norm, non_blocking=True)
    if is_mended:
        torch.cuda.current_stream().synchronize()
    return torch.full((NUMEL,), pinned.item(), device="cuda")


def started_in_another_order(rank: int, is_mended: bool) -> Tensor:
    """Rank 1 starts its collectives in the order in which its own buckets have filled."""
    buckets = [_gradient(1.0, rank), _gradient(2.0, rank)[: NUMEL // 2].clone()]
    order = (0, 1) if is_mended or rank == 0 else (1, 0)
    works = [dist.all_reduce(buckets[number], async_op=True) for number in order]
    for work in works:
        work.wait()
    return buckets[0] * 2


def both_send_first(rank: int, is_mended: bool) -> Tensor:
    """Two ranks exchange halos: each sends, then receives, and each message waits for the other rank to come to its receive."""
    other, mine, theirs = 1 - rank, _gradient(1.0, rank), torch.empty(NUMEL, device="cuda")
    ops = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
    works = dist.batch_isend_irecv(ops) if is_mended else [op.op(op.tensor, op.peer) for op in ops]
    for work in works:
        work.wait()
    return theirs * 2


def not_started_on_one_rank(rank: int, is_mended: bool) -> Tensor:
    """Rank 1 has no gradient, and so starts no collective."""
    bucket = _gradient(1.0, rank)
    if is_mended or rank == 0:
        dist.all_reduce(bucket)
    return bucket * 2
