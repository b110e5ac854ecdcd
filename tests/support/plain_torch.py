"""Plain torch beside zeroopt: a model, DDP, FSDP2, and checkpoints of torch.distributed.checkpoint. It cannot import zeroopt.

    python plain_torch.py load|save DIRECTORY RANK

is one of two ranks. "load" loads DIRECTORY/ours-<optimizer> in every way, trains on, and writes what came of it; "save" saves
checkpoints of all kinds as DIRECTORY/<kind>, and writes what further training gives.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

STEPS_BEFORE, STEPS_AFTER = 2, 2


class Net(nn.Module):
    """Tied weights, transposed memory, buffers, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.gate = nn.Parameter(torch.randn(6, 5).t())
        self.body = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 6))
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens) * self.gate)
        return self.out(self.frozen(self.body(x)))


def build() -> Net:
    torch.manual_seed(99)
    return Net()


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    params = [param for param in net.parameters() if param.requires_grad]
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 0.03}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda net: torch.optim.AdamW(groups_of(net), lr=0.01, amsgrad=True),
    "sgd": lambda net: torch.optim.SGD(groups_of(net), lr=0.1, momentum=0.9),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    """On the same batch on all ranks, so that means over two ranks are exact."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        output = model(torch.randint(0, 11, (5,), generator=generator))
        (output.logsumexp(dim=-1) - output[..., 0]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


Prepared = tuple[nn.Module, torch.optim.Optimizer]


def plain(optimizer: str) -> Prepared:
    net = build()
    return net, OPTIMIZERS[optimizer](net)


def ddp(optimizer: str) -> Prepared:
    model = DistributedDataParallel(build())
    return model, OPTIMIZERS[optimizer](model)


def fsdp2(optimizer: str) -> Prepared:
    from torch.distributed.fsdp import fully_shard

    net = build()
    net.gate = nn.Parameter(net.gate.detach().contiguous())  # FSDP2 takes no other memory
    fully_shard(net.body)
    fully_shard(net)
    return net, OPTIMIZERS[optimizer](net)


KINDS = {"plain": plain, "ddp": ddp, "fsdp2": fsdp2}


def full_params(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, in full."""
    full: dict[str, Tensor] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.detach().clone() for name, value in full.items()}


def templates(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options)),
    }


def load_all(directory: Path, rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in OPTIMIZERS:
        path = directory / f"ours-{name}"
        for kind, prepare in KINDS.items():
            model, optimizer = prepare(name)
            loaded = templates(model, optimizer)
            dcp.load(loaded, checkpoint_id=path, no_dist=kind == "plain")
            set_model_state_dict(model, loaded["model"])
            set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
            train(model, optimizer, STEPS_BEFORE, STEPS_AFTER)
            results[f"{kind}, {name}"] = full_params(model)
        if rank == 0:
            dcp_to_torch_save(path, directory / f"{name}.pt")
            whole = torch.load(directory / f"{name}.pt", weights_only=True)
            model, optimizer = plain(name)
            model.load_state_dict(whole["model"])
            set_optimizer_state_dict(model, optimizer, whole["optimizer"])
            train(model, optimizer, STEPS_BEFORE, STEPS_AFTER)
            results[f"file, {name}"] = full_params(model)
    return results


def save_all(directory: Path, rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in OPTIMIZERS:
        for kind, prepare in KINDS.items():
            model, optimizer = prepare(name)
            train(model, optimizer, 0, STEPS_BEFORE)
            saved = templates(model, optimizer)
            contents = {f"{kind}-{name}": saved}
            if kind == "ddp":
                contents[f"flat-{name}"] = templates(model, optimizer, flatten_optimizer_state_dict=True)
                contents[f"optim-{name}"] = {"model": saved["model"], "optim": saved["optimizer"]}
                contents[f"index-{name}"] = {"model": saved["model"], "optimizer": optimizer.state_dict()}
            for what, content in contents.items():
                dcp.save(content, checkpoint_id=directory / what)
            train(model, optimizer, STEPS_BEFORE, STEPS_AFTER)
            results |= dict.fromkeys(contents, full_params(model))
    return results


def main() -> None:
    what, directory, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sys.modules["zeroopt"] = None  # type: ignore[assignment]  importing it raises
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / f"store-{what}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = (load_all if what == "load" else save_all)(directory, rank)
    if rank == 0:
        torch.save(results, directory / f"{what}.results")
    dist.barrier()
    dist.destroy_process_group()
    assert not any(name.startswith("zeroopt.") for name in sys.modules)
    os._exit(0)


if __name__ == "__main__":
    main()
