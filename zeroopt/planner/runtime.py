"""What no plan tells: what libraries take when they are first used, and what allocators keep beyond what is asked of them."""

from __future__ import annotations

# Measured with `python -m bench.planner` on Linux with glibc, one thread a rank, from a process on that has imported torch, zeroopt and
# its model's libraries and has joined its group: what is left of the peaks when everything that is planned is taken off.
_CPU_BYTES = 45_000_000
_CPU_KEPT = 0.10  # of the activations: pieces in the C heap between which it has holes


def runtime_bytes(device: str, activations: int) -> int:
    """Bytes of a rank on a device, beside activations of so many.

    On "cuda" none: CUDA's context, NCCL's buffers and what torch's allocator reserves beyond what tensors take have not been
    measured, and are not in `torch.cuda.max_memory_allocated` either.
    """
    return 0 if device == "cuda" else _CPU_BYTES + round(_CPU_KEPT * activations)
