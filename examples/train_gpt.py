"""Train a small GPT on Python's own documentation, data-parallel, by the method you name.

    torchrun --nproc-per-node 2 examples/train_gpt.py --method zero2

The methods differ in `prepare` and nowhere else. The rest is a training loop, and what it takes to measure one.
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import zeroopt

VOCABULARY = 256  # tokens are bytes
WARMUP_STEPS = 5  # not timed: the first steps allocate
VALIDATION_BATCHES = 16


def prepare(method: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    match method:
        case "ddp":
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        case "zero0" | "zero1" | "zero2":
            model, optimizer = zeroopt.wrap(model, optimizer, stage=int(method[-1]))
        case "zero2-shared":
            model, optimizer = zeroopt.wrap(model, optimizer, stage=2, share_parameters=True)
    return model, optimizer


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A tenth of the steps to warm up, then a cosine down to a tenth of the learning rate."""
    warmup = max(1, steps // 10)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, scale)


def load_text() -> tuple[Tensor, Tensor]:
    """The bytes of `help()`'s topics, which every CPython ships: nine tenths to train on, one to validate."""
    text = bytearray("\n".join(topics.values()).encode())
    tokens = torch.frombuffer(text, dtype=torch.uint8)
    split = len(tokens) * 9 // 10
    return tokens[:split], tokens[split:]


def draw_batch(tokens: Tensor, args: argparse.Namespace, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - args.context, (args.batch,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(args.context + 1)].long().to(device)
    return windows[:, :-1], windows[:, 1:]


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    mean = torch.tensor(values, dtype=torch.float64, device=device) / dist.get_world_size()
    dist.all_reduce(mean)
    return [float(value) for value in mean.cpu()]


@torch.no_grad()
def validate(model: nn.Module, tokens: Tensor, args: argparse.Namespace, device: torch.device) -> float:
    first = dist.get_rank() * VALIDATION_BATCHES
    model.eval()
    losses = [model(*draw_batch(tokens, args, first + i, device)).item() for i in range(VALIDATION_BATCHES)]
    return mean_over_ranks([statistics.fmean(losses)], device)[0]


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rehearse(device)
    memory = PeakMemory(device)
    training_text, validation_text = load_text()

    torch.manual_seed(args.seed)
    model: nn.Module = GPT(VOCABULARY, args.context, args.layers, args.width, args.heads).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = make_optimizer(model, args.lr)
    scheduler = make_scheduler(optimizer, args.steps)
    model, optimizer = prepare(args.method, model, optimizer)

    losses: list[float] = []
    seconds: list[float] = []
    warmup = min(WARMUP_STEPS, args.steps - 1)
    for step in range(args.steps):
        if step == warmup:
            memory.stop()
            sent_before = loopback_bytes()
        started = time.perf_counter()
        loss = model(*draw_batch(training_text, args, (args.seed * args.steps + step) * world_size + rank, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        if rank == 0 and (step % 5 == 4 or step == args.steps - 1):
            report_progress(args, step + 1, losses[-1], seconds[-1])
    dist.barrier()  # so that every rank's bytes are counted
    sent = loopback_bytes() - sent_before
    alone = int(os.environ["LOCAL_WORLD_SIZE"]) == world_size and device.type == "cpu"

    peak = memory.mean_over_ranks()
    return {
        "method": args.method,
        "world_size": world_size,
        "device": str(device),
        "parameters": parameters,
        "step_ms": [1e3 * second for second in seconds[warmup:]],
        "training_loss": mean_over_ranks(losses, device),
        "validation_loss": validate(model, validation_text, args, device),
        "peak_bytes": peak,
        "bytes_per_parameter": peak / parameters,
        "sent_bytes": sent / world_size / (args.steps - warmup) if alone else None,
    }


def rehearse(device: torch.device) -> None:
    """A step of a tiny model: torch loads some 80 MB of its own at the first one, which no method should answer for."""
    layer = nn.Linear(8, 8, device=device)
    layer(torch.ones(8, 8, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


class PeakMemory:
    """The most memory this process has held at once, above what it holds when it is watched first.

    On Linux, pages that ranks share count in parts: what counts is the proportional set size, which only a sampling thread
    can watch. It stops before anything is timed: by then, all buffers have been made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.done = threading.Event()
        self.sampler = threading.Thread(target=self.sample)
        self.before = self.peak = self.held_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.sampler.start()

    def sample(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.held_bytes())

    def held_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if Path("/proc/self/smaps_rollup").exists():
            return int(Path("/proc/self/smaps_rollup").read_text().split("Pss:")[1].split()[0]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def stop(self) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self.sampler.is_alive():
            self.done.set()
            self.sampler.join()

    def mean_over_ranks(self) -> int:
        self.stop()
        return int(mean_over_ranks([self.peak - self.before], self.device)[0])


def loopback_bytes() -> int:
    """Bytes that all processes of this machine have sent to one another through the network stack."""
    if not Path("/proc/net/dev").exists():
        return 0
    counters = Path("/proc/net/dev").read_text().split("lo:")[1].split()
    return int(counters[8])


def report_progress(args: argparse.Namespace, step: int, loss: float, seconds: float) -> None:
    if args.progress:
        print(json.dumps({"step": step, "loss": loss}), flush=True)
    else:
        print(f"step {step:4}/{args.steps}  loss {loss:.3f}  {1e3 * seconds:.0f} ms", flush=True)


def report_results(args: argparse.Namespace, results: dict[str, Any]) -> None:
    if args.json:
        args.json.write_text(json.dumps(results))
    if not args.progress:
        print(
            f"{args.method}: validation loss {results['validation_loss']:.4f}, "
            f"{statistics.median(results['step_ms']):.0f} ms a step, "
            f"{results['bytes_per_parameter']:.1f} bytes a parameter at the peak"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["ddp", "zero0", "zero1", "zero2", "zero2-shared"], default="zero2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--json", type=Path, help="rank 0 writes its measurements here")
    parser.add_argument("--progress", action="store_true", help="print progress as JSON lines, for a program to read")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() >= local_world_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        results = train(args, device)
        if dist.get_rank() == 0:
            report_results(args, results)
        time.sleep(0.1)  # Gloo's threads let go of the last tensors: during exit, that would abort the process
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
