"""Blocks of recipes."""

from __future__ import annotations

import torch

from recipes.transformer import Blocks


def make_blocks(**options: bool) -> Blocks:
    torch.manual_seed(0)
    return Blocks(2, 16, 2, **{"causal": False, **options})


def test_a_causal_block_sees_nothing_that_comes_later() -> None:
    x = torch.randn(1, 6, 16)
    changed = torch.cat([x[:, :4], torch.randn(1, 2, 16)], dim=1)
    causal, full = make_blocks(causal=True), make_blocks()
    torch.testing.assert_close(causal(x)[:, :4], causal(changed)[:, :4])
    assert not torch.allclose(full(x)[:, :4], full(changed)[:, :4])


def test_what_is_not_seen_does_not_count() -> None:
    x = torch.randn(1, 6, 16)
    seen = torch.tensor([[True, True, True, True, False, False]])[:, None, None]
    torch.testing.assert_close(make_blocks()(x, seen)[:, :4], make_blocks()(x[:, :4]))


def test_recomputed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for recomputed in (False, True):
        x = torch.ones(1, 6, 16, requires_grad=True)
        make_blocks(recomputed=recomputed)(x * torch.arange(6.0)[:, None]).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
