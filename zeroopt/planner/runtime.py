"""What no plan tells: what libraries take when they are first used, and what allocators keep beyond what is asked of them."""

from __future__ import annotations

# Measured with `python -m bench.planner` on Linux with glibc, one thread a rank, from a process on that has imported torch, zeroopt and
# its model's libraries and has joined its group: what is left of the peaks when everything that is planned is taken off.
_CPU_MOST = 28_000_000
_CPU_LEAST = 1_000_000
_CPU_OF_PARAMETERS = 1 / 4  # of their bytes, until that is the most: a small model uses less of the libraries
_CPU_HOLES = 0.07  # of the parameters' bytes: the C heap has more holes where larger gradients come and go


def runtime_bytes(device: str, parameters: int) -> int:
    """Bytes of a rank on a device from its first forward on, beside parameters of so many bytes as they are built.

    On "cuda" none: CUDA's context, NCCL's buffers and what torch's allocator reserves beyond what tensors take have not been
    measured, and are not in `torch.cuda.max_memory_allocated` either.
    """
    if device == "cuda":
        return 0
    kept = min(_CPU_MOST, _CPU_LEAST + round(_CPU_OF_PARAMETERS * parameters))
    return kept + round(_CPU_HOLES * parameters)
