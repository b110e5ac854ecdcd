"""What no plan tells: what libraries take when they are first used, and what allocators keep beyond what is asked of them."""

from __future__ import annotations

# Measured with `python -m bench.planner` on Linux with glibc, one thread a rank, from a process on that has imported torch, zeroopt and
# its model's libraries and has joined its group: what is left of the peaks when everything that is planned is taken off.
_CPU_MOST = 45_000_000  # of models of 30 M parameters and more
_CPU_LEAST = 1_000_000
_CPU_OF_PARAMETERS = 1 / 3  # of their bytes, below that
_CPU_KEPT = 0.10  # of the activations: pieces in the C heap between which it has holes


def runtime_bytes(device: str, parameters: int, activations: int) -> int:
    """Bytes of a rank on a device, beside parameters and activations of so many bytes.

    On "cuda" none: CUDA's context, NCCL's buffers and what torch's allocator reserves beyond what tensors take have not been
    measured, and are not in `torch.cuda.max_memory_allocated` either.
    """
    if device == "cuda":
        return 0
    kept = min(_CPU_MOST, _CPU_LEAST + round(_CPU_OF_PARAMETERS * parameters))
    return kept + round(_CPU_KEPT * activations)
