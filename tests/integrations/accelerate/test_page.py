"""What docs/frameworks/accelerate.md shows runs as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from follow import WIDTH, inputs, layers
from pages import snippets
from paths import ROOT
from torch import nn
from worker_pool import RunOnRanks

pytest.importorskip("accelerate")

from accelerators import as_started


def run_page(folder: Path) -> None:
    net = layers()
    plain = torch.optim.AdamW(net.parameters())
    samples = [(inputs(number, WIDTH), inputs(number + 1, WIDTH)) for number in range(8)]
    names: dict[str, Any] = {
        "torch": torch,
        "model": net,
        "optimizer": plain,
        "scheduler": torch.optim.lr_scheduler.StepLR(plain, 10),
        "loader": torch.utils.data.DataLoader(samples, batch_size=2),  # type: ignore[arg-type]
    }
    page = snippets(ROOT / "docs" / "frameworks" / "accelerate.md")
    with as_started():
        for snippet in page:
            exec(snippet.replace("runs/", f"{folder}/"), names)  # noqa: S102
    assert (folder / "state" / "zeroopt_0").is_dir()
    assert names["model"] is net and isinstance(net, nn.Sequential) and names["plain"] is plain


def test_the_page_runs(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, run_page, tmp_path)
