"""Time, memory and bytes that it takes to save and to load a checkpoint: zeroopt's ways against torch's.

    python -m bench.checkpoint --world-size 2 --dir /dev/shm

Every method trains the same GPT with AdamW in float32 for two steps, saves it, forgets it, makes another one, loads, and
compares what it then has with what it had: parameters, state and options, bit for bit. Each turn of a method runs in processes
of its own, which have saved and loaded a tiny model before; the methods take turns, and figures are medians over the rounds.

    save    from the call to when all ranks have returned and all files are synced; torch.save's are synced by this benchmark
    stall   until the call has returned on all ranks; of saves in the background, which then end while nothing else goes on
    load    likewise, from files that this machine has just written and so has in memory: no disk is read
    peak    the most memory of its own that any rank had meanwhile, above what it had when it began. What a load puts into
            optimizers, which have no state before, counts; memory that ranks share, which was there before, does not
    disk    sizes of all files

Memory of its own is what is resident but neither file nor shared, as /proc says every few milliseconds.

The first row is what the file system would allow: ranks write and read as many bytes as parameters and state have, each its part,
from and to memory that they already have. Files go to --dir, by default where temporary files do: on a disk the figures are
the disk's, in a file system in memory they are the methods'.
"""

import argparse
import ctypes
import gc
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zeroopt
from bench.checkpoint_methods import METHODS, Method
from bench.launch import Plan, running_ranks, write_report
from bench.model import make_model
from bench.steps import VOCABULARY
from bench.watch import Moments, Watch

FILES_ALONE = "(the files alone)"
BYTES_A_PARAMETER = 12  # itself and two moments
BLOCK_BYTES = 1 << 20
TINY = {"vocabulary": 64, "tokens": 16, "layers": 1, "width": 64}


@dataclass
class Effort:
    """What one call took on each rank.

    Attributes:
        begin, returned, end: moments, comparable between processes; `end` is later than `returned` where the call goes on in
            the background.
        before: bytes of its own that the rank had when it began.
        peak: the most that it had meanwhile, above that.
    """

    begin: list[float]
    returned: list[float]
    end: list[float]
    before: list[int]
    peak: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Until the last rank was done."""
        return max(self.end) - min(self.begin)

    @property
    def stall(self) -> float:
        """Until the call had returned on the last rank."""
        return max(self.returned) - min(self.begin)

    def take_peaks(self, moments: Moments) -> None:
        for rank, (begin, end, before) in enumerate(zip(self.begin, self.end, self.before, strict=True)):
            held = [held[rank] for moment, held in moments if begin <= moment <= end]
            self.peak.append(max([before, *held]) - before)


@dataclass
class Turn:
    """What one turn of a method took.

    Attributes:
        parameters: of the model.
        disk: bytes.
        right: whether what was loaded is what was saved.
    """

    parameters: int
    save: Effort
    load: Effort
    disk: int
    right: bool


def work(method: str, folder: Path, args: argparse.Namespace, watch: Watch) -> Turn:
    """What every rank does in one turn."""
    model = {"tokens": args.tokens, "layers": args.layers, "width": args.width}
    if method == FILES_ALONE:
        watch.begin()
        return take_turn_of_files(folder / "turn", make_model(VOCABULARY, **model))
    take_turn(METHODS[method], folder / "rehearsal", **TINY)
    watch.begin()
    return take_turn(METHODS[method], folder / "turn", VOCABULARY, **model)


def take_turn(method: Method, folder: Path, vocabulary: int, tokens: int, layers: int, width: int) -> Turn:
    """Collective. Leaves nothing in the folder."""
    path = folder / "checkpoint"
    make_folder(folder)
    model, optimizer = method.wrap(make_model(vocabulary, tokens, layers, width), 1e-3)
    batch = torch.randint(vocabulary, (1, tokens + 1))
    for _ in range(2):
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    save = measure(lambda: method.save(path, model, optimizer))
    saved = fingerprint(model, optimizer)
    parameters = sum(p.numel() for p in model.parameters())
    del model, optimizer
    model, optimizer = method.wrap(make_model(vocabulary, tokens, layers, width), 1.0)
    load = measure(lambda: method.load(path, model, optimizer))
    return Turn(parameters, save, load, remove_folder(folder), agree(fingerprint(model, optimizer) == saved))


def take_turn_of_files(folder: Path, net: nn.Module) -> Turn:
    """The same bytes without any method. Collective."""
    parameters = sum(p.numel() for p in net.parameters())
    content = os.urandom(BYTES_A_PARAMETER * parameters // dist.get_world_size())
    found = bytearray(b"?") * len(content)
    path = folder / str(dist.get_rank())
    make_folder(folder)
    save = measure(lambda: write_blocks(path, memoryview(content)))
    load = measure(lambda: read_blocks(path, memoryview(found)))
    return Turn(parameters, save, load, remove_folder(folder), agree(found == content))


def write_blocks(path: Path, content: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), BLOCK_BYTES):
            file.write(content[start : start + BLOCK_BYTES])
        os.fsync(file.fileno())


def read_blocks(path: Path, content: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        for start in range(0, len(content), BLOCK_BYTES):
            file.readinto(content[start : start + BLOCK_BYTES])


def measure(call: Callable[[], Any]) -> Effort:
    """Collective. Waits for the result when the call returns a future."""
    settle()
    dist.barrier()
    before, begin = own_bytes(os.getpid()), time.monotonic()
    pending = call()
    returned = time.monotonic()
    if pending is not None:
        pending.result()
    mine = (begin, returned, time.monotonic(), before)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return Effort(*map(list, zip(*everyone, strict=True)))


def settle() -> None:
    """Free what nobody needs, and let the C library give it back, or what comes now would use it unseen."""
    gc.collect()
    with suppress(AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def own_bytes(pid: int) -> int:
    """What a process has resident that is neither file nor shared."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * mmap.PAGESIZE


def fingerprint(model: nn.Module, optimizer: Any) -> list[Any]:
    """Checksums of this rank's parameters and state, and the options. Collective.

    Of a ZeroOptimizer rank 0 has those of the whole state, for what is a rank's part depends on the plan of buckets.
    """
    state = optimizer.state_dict()
    if isinstance(optimizer, zeroopt.ZeroOptimizer):
        optimizer.consolidate_state_dict()
        state = optimizer.full_state_dict() if dist.get_rank() == 0 else {**state, "state": {}}
    options = [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]
    return [checksums(dict(model.state_dict())), checksums(state["state"]), options]


def checksums(value: Any) -> Any:
    """The same with a checksum in place of each tensor."""
    if isinstance(value, dict):
        return {key: checksums(part) for key, part in value.items()}
    if isinstance(value, Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        return zlib.crc32(local.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return value


def agree(mine: bool) -> bool:
    """Whether it is so on all ranks. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return all(everyone)


def make_folder(folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()


def remove_folder(folder: Path) -> int:
    """Returns the bytes of its files, on rank 0. Collective."""
    dist.barrier()
    if dist.get_rank() != 0:
        return 0
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return total


@dataclass
class Figures:
    """One method's medians over rounds.

    Attributes:
        save_peak, load_peak: bytes, of the rank that had most.
        right: whether all that was loaded is what was saved.
    """

    save_s: float
    stall_s: float
    load_s: float
    save_peak: float
    load_peak: float
    disk: float
    right: bool


def summarize(turns: list[Turn]) -> Figures:
    def median(figure: Callable[[Turn], float]) -> float:
        return statistics.median(map(figure, turns))

    return Figures(
        save_s=median(lambda turn: turn.save.seconds),
        stall_s=median(lambda turn: turn.save.stall),
        load_s=median(lambda turn: turn.load.seconds),
        save_peak=median(lambda turn: max(turn.save.peak)),
        load_peak=median(lambda turn: max(turn.load.peak)),
        disk=median(lambda turn: turn.disk),
        right=all(turn.right for turn in turns),
    )


def run_turn(method: str, args: argparse.Namespace) -> Turn:
    """One turn in processes of its own."""
    watch, plan = Watch(), Plan(args.world_size, args.threads)
    with (
        tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.dir) as folder,
        running_ranks(plan, work, method, Path(folder), args, watch) as ranks,
    ):
        moments = watch.moments(ranks, args.interval, own_bytes)
        turn: Turn = ranks.values()[0]
    for effort in (turn.save, turn.load):
        effort.take_peaks(moments)
    return turn


def make_table(results: dict[str, Figures], parameters: int, where: str, args: argparse.Namespace) -> Table:
    table = Table(
        title=f"{parameters / 1e6:.1f} M parameters, {args.world_size} ranks, on {where}",
        caption="seconds; MB",
        box=box.SIMPLE,
    )
    table.add_column("method", no_wrap=True)
    for heading in ("save\ns", "stall\ns", "load\ns", "save\npeak", "load\npeak", "disk\nMB", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, figures in results.items():
        table.add_row(
            method,
            f"{figures.save_s:.2f}",
            f"{figures.stall_s:.2f}",
            f"{figures.load_s:.2f}",
            f"{figures.save_peak / 1e6:.0f}",
            f"{figures.load_peak / 1e6:.0f}",
            f"{figures.disk / 1e6:.0f}",
            "" if figures.right else "WRONG",
        )
    return table


def file_system(path: Path) -> str:
    """The type of the file system that a directory is on, as Linux calls it."""
    found, real = ("", "unknown"), str(path.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if len(place) >= len(found[0]) and Path(real).is_relative_to(place):
            found = place, kind
    return found[1]


def main() -> int:
    args = parse_arguments()
    args.dir.mkdir(parents=True, exist_ok=True)
    order = [method for _ in range(args.rounds) for method in args.methods]
    turns: dict[str, list[Turn]] = {method: [] for method in args.methods}
    for method in order:
        turns[method].append(run_turn(method, args))
    results = {method: summarize(taken) for method, taken in turns.items()}
    parameters, where = turns[args.methods[0]][0].parameters, file_system(args.dir)
    Console().print(make_table(results, parameters, where, args))
    if args.out:
        figures = {name: {**asdict(f), "turns": [asdict(turn) for turn in turns[name]]} for name, f in results.items()}
        facts = {"world_size": args.world_size, "parameters": parameters, "file_system": where}
        write_report(args.out, "bench.checkpoint", {**facts, "results": figures})
    return 0 if all(figures.right for figures in results.values()) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [FILES_ALONE, *METHODS]
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every method")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128, help="tokens a rank and step")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints go")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    parser.add_argument("--interval", type=float, default=0.004, help="seconds between two looks at the ranks' memory")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
