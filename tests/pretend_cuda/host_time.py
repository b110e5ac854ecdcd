"""What a step costs the host besides the model's own forward and backward, beside DDP and torch's fused AdamW.

    python -m tests.pretend_cuda.host_time --parameters 16 300 2000      # with tests/support on PYTHONPATH

Nothing is computed but forward and backward of a model of vectors of 16 elements, which costs all methods the same and is subtracted:
operators of the pretend device that give back what they have written do nothing, nor do zeroopt's kernels, and collectives are those
of torch's fake process group. So launches cost nothing, which favours whoever has more of them: DDP, with one or two a parameter.
What is left is what Python, torch's dispatcher and autograd take, in processor time of all threads; the methods take turns.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

from .build import load_device

device = load_device()

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import zeroopt
import zeroopt._C as kernels

from . import surface

WIDTH = 16
BYTES = 4 * WIDTH  # of a parameter
WARM_UP, TURN, STEPS = 3, 3, 12_000  # steps before, of a turn; parameters times steps of all turns
CUDA = torch.device("cuda", 0)
Wrapped = tuple[nn.Module, torch.optim.Optimizer | None]


class Unit(nn.Module):
    """Two parameters, and one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


def make_model(count: int) -> nn.Module:
    return nn.Sequential(*(Unit() for _ in range(count // 2))).to(CUDA)


def bare(count: int, _: float) -> Wrapped:
    return make_model(count), None


def ddp(**options: Any) -> Callable[[int, float], Wrapped]:
    def wrap(count: int, bucket_mb: float) -> Wrapped:
        model = DistributedDataParallel(make_model(count), bucket_cap_mb=bucket_mb, **options)
        model.register_comm_hook(None, _take_as_summed)  # type: ignore[arg-type]
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    return wrap


def _take_as_summed(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The fake process group gives no futures."""
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[CUDA])
    future.set_result(bucket.buffer())
    return future


def zero(stage: int) -> Callable[[int, float], Wrapped]:
    def wrap(count: int, bucket_mb: float) -> Wrapped:
        model = make_model(count)
        optimizer = torch.optim.AdamW(model.parameters())
        return zeroopt.wrap(model, optimizer, stage=stage, bucket_mb=bucket_mb, transport="torch")

    return wrap


BARE = "forward and backward"
METHODS: dict[str, Callable[[int, float], Wrapped]] = {
    BARE: bare,
    "DDP, fused AdamW": ddp(),
    "DDP, bucket views, fused AdamW": ddp(gradient_as_bucket_view=True),
    **{f"zeroopt, stage {stage}": zero(stage) for stage in range(3)},
}


def install() -> None:
    """Let kernels and collectives do nothing."""
    surface.install()
    for name in (
        *("pack", "pack_segments", "reduce", "squared_norms", "step", "quantize", "dequantize", "try_launch"),
        *("encode_slices", "sum_encoded"),
    ):
        setattr(kernels, f"cuda_{name}", lambda *_: None)
    for name in ("norm", "step"):
        setattr(kernels, f"cuda_{name}_workspace_bytes", lambda *_: 1024)
    facts = {**kernels.build_info(), "cuda": True, "cuda_version": "pretend", "cuda_archs": ["sm_90"]}
    kernels.build_info = lambda: facts
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


def step_seconds(model: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor) -> float:
    """Processor time of one step."""
    params = list(model.parameters()) if optimizer is None else []  # which an optimizer has at hand
    begin = time.process_time()
    model(x).sum().backward()
    if optimizer is None:
        for param in params:
            param.grad = None
    else:
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - begin


def measure(count: int, bucket_mb: float) -> dict[str, float]:
    """Median seconds of a step, by method."""
    device.set_idle(False)
    x = torch.ones(WIDTH, device=CUDA)
    contestants = {name: wrap(count, bucket_mb) for name, wrap in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for idle in (False, True):  # buckets are planned anew in the first steps, and the numbers of parameters move then
        device.set_idle(idle)
        for model, optimizer in contestants.values():
            for _ in range(WARM_UP):
                step_seconds(model, optimizer, x)
    gc.collect()
    gc.disable()
    for _ in range(min(60, max(5, STEPS // count))):
        for name, (model, optimizer) in contestants.items():
            seconds[name] += [step_seconds(model, optimizer, x) for _ in range(TURN)]
    gc.enable()
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    arguments = parse_arguments()
    install()
    for count in arguments.parameters:
        for per_bucket in arguments.per_bucket:
            medians = measure(count, per_bucket * BYTES / 2**20)
            print(f"{count} parameters, buckets of at most {per_bucket}: ms a step besides forward and backward")
            baseline = medians["DDP, fused AdamW"] - medians[BARE]
            for name, seconds in medians.items():
                added = seconds - medians[BARE]
                if name != BARE:
                    print(f"  {name:32} {1e3 * added:8.2f}   {added / baseline:5.2f} of DDP's", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[16, 300, 2000])
    parser.add_argument("--per-bucket", type=int, nargs="+", default=[700], help="parameters a bucket, at most")
    return parser.parse_args()


if __name__ == "__main__":
    main()
