"""Script: an installed zeroopt trains by its own kernels as plain torch does, and says how it was built. It needs torch.

python smoke.py
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist

import zeroopt
from zeroopt.diagnosis.env import print_environment


def train(wrapped: bool) -> list[torch.Tensor]:
    """The parameters after five steps of AdamW."""
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.GELU(), torch.nn.Linear(65, 7))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if wrapped:
        model, optimizer = zeroopt.wrap(model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(16, 33)).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        ours, theirs = train(wrapped=True), train(wrapped=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # fused kernels round otherwise
        dist.destroy_process_group()
    print_environment()


if __name__ == "__main__":
    main()
