"""What a launch file starts in tests: a step of a tiny model, after which each rank notes who it is and what the step came to.

python -m launched FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import zeroopt

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def main(folder: Path) -> None:
    made_here = not dist.is_initialized()  # Ray makes the process group
    if made_here:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    model(torch.full((2, 4), float(dist.get_rank()))).square().mean().backward()
    optimizer.step()
    note = {name: int(os.environ[name]) for name in NAMES} | {"weight": net.weight.tolist()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(note))
    dist.barrier()
    if made_here:
        dist.destroy_process_group()


def notes(folder: Path) -> list[dict[str, object]]:
    """Of all ranks, in their order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
