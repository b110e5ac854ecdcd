"""The Python of docs/ runs as it stands there.

The blocks of a page run one after the other on two ranks, each with the names that those before it have left. One that wraps finds a plain
model and its optimizer, any other one wrapped ones. What no test can run says why, in a comment in front of it.
"""

from __future__ import annotations

import ast
import copy
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pages import blocks, snippets
from paths import ROOT
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import DataLoader
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint

DOCS = ROOT / "docs"
PAGES = (
    "averaging.md",
    "building.md",
    "checkpoints.md",
    "compile.md",
    "compression.md",
    "extending.md",
    "memory.md",
    "onnx.md",
    "moving/zero_redundancy.md",
    "optimizers.md",
    "parameter_compression.md",
    "planner.md",
    "recipes/many_tasks.md",
    "reproducibility.md",
    "start.md",
)
RUN_BY_OTHERS = {
    "frameworks/accelerate.md",
    "frameworks/lightning.md",
    "frameworks/transformers.md",
}  # in tests/integrations
VOCABULARY = 16


class GPT(nn.Module):
    """With the attributes that pages speak of. It is of one size, whatever it is called with."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(tokens)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        logits: Tensor = self.head(hidden)
        return logits

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def samples(*_: object) -> Tensor:
    return torch.arange(2 * VOCABULARY).reshape(2, VOCABULARY) % VOCABULARY


def groups_of_mine() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank alone, and both: as on two hosts with one rank each."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return alone[dist.get_rank()], dist.new_group()


def plain() -> dict[str, Any]:
    """A model and its optimizer, under the names that pages give them."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trunk = torch.optim.AdamW([*model.embedding.parameters(), *model.blocks.parameters()])
    heads = torch.optim.AdamW(model.head.parameters())
    return {"model": model, "net": model, "optimizer": optimizer, "trunk": trunk, "heads": heads}


def names_of_pages() -> dict[str, Any]:
    inside, across = groups_of_mine()
    stepped = plain()
    stepped["model"](samples()).sum().backward()
    stepped["optimizer"].step()
    return {
        "copy": copy,
        "torch": torch,
        "nn": nn,
        "dist": dist,
        "dcp": dcp,
        "get_state_dict": get_state_dict,
        "set_state_dict": set_state_dict,
        "nullcontext": nullcontext,
        "zeroopt": zeroopt,
        "GPT": GPT,
        "rank": dist.get_rank(),
        "steps": 2,
        "step": 0,
        "load": samples,
        "loss_of": Tensor.mean,
        "data": [samples()],
        "dataset": [samples()] * 512,
        "DataLoader": lambda *given, **options: DataLoader(*given, **{**options, "num_workers": 0}),
        "train": lambda _: None,
        "data_has_come": lambda: True,
        "groups_of_mine": groups_of_mine,
        "inside": inside,
        "across": across,
        "saved": stepped["optimizer"].state_dict(),  # as ZeroRedundancyOptimizer collects it
    }


def wrapped(names: dict[str, Any]) -> dict[str, Any]:
    model, optimizer = zeroopt.wrap(names["model"], names["optimizer"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def run_page(page: str, folder: Path) -> None:
    names = names_of_pages()
    names.update(plain())
    os.chdir(folder)
    # A script's own process group: here there is one already, which other pages need, too.
    with patch.object(dist, "init_process_group"), patch.object(dist, "destroy_process_group"):
        for snippet in snippets(DOCS / page):
            if "zeroopt.wrap(" in snippet:
                names.update(plain())
            elif not isinstance(names["model"], zeroopt.ZeroDataParallel):
                names.update(wrapped(names))
            exec(compile(snippet, page, "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(run_on_ranks: RunOnRanks, tmp_path: Path, page: str) -> None:
    run_on_ranks(2, run_page, page, tmp_path)


def test_no_page_is_forgotten() -> None:
    with_python = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if snippets(path)}
    assert with_python == {*PAGES, *RUN_BY_OTHERS}


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *DOCS.rglob("*.md")]), ids=lambda page: page.stem)
def test_what_is_called_python_is(page: Path) -> None:
    for block in blocks(page):
        ast.parse(block.code)
