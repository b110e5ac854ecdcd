"""Captions are found and written, the same by DDP and by zeroopt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from recipe_runs import run_recipe
from torch import Tensor
from torch.nn import functional as F
from worker_pool import RunOnRanks

from recipes.digits import Digits
from recipes.outcome import differences
from recipes.see_and_read.gathering import contrastive_loss
from recipes.see_and_read.model import caption_loss
from recipes.see_and_read.presets import PRESETS
from recipes.see_and_read.scenes import END, LENGTH, SCENES, Painter, Scene, decode, encode, split_scenes
from recipes.see_and_read.writing import write
from recipes.side_by_side import FIRST_TOLERANCE, LAST_TOLERANCE

STEPS = 60


@pytest.mark.slow
def test_it_learns_the_same_by_both_methods(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    ddp, zeroopt = (
        run_on_ranks(2, run_recipe, "see_and_read", method, tmp_path, f"--steps={STEPS}", "--batch=32")[0]
        for method in ("ddp", "zeroopt")
    )
    first, last = differences(ddp, zeroopt)
    assert first <= FIRST_TOLERANCE and last <= LAST_TOLERANCE
    for outcome in (ddp, zeroopt):  # sizes and relations come first; whole captions take hundreds of steps
        assert outcome.final_loss("training") < 0.7 * outcome.losses["training"][0]
        assert len(outcome.figures) == 2


def loss_of_all(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(len(images))
    similar = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2


def loss_of_own(images: Tensor, texts: Tensor, scale: Tensor) -> list[Tensor]:
    ranks = dist.get_world_size()
    own_images, own_texts = (part.chunk(ranks)[dist.get_rank()].clone().requires_grad_() for part in (images, texts))
    loss = contrastive_loss(F.normalize(own_images, dim=1), F.normalize(own_texts, dim=1), scale) / ranks
    loss.backward()
    dist.all_reduce(loss.detach())
    assert own_images.grad is not None and own_texts.grad is not None
    return [loss.detach(), own_images.grad, own_texts.grad]


def test_features_of_all_ranks_count_with_their_gradients(run_on_ranks: RunOnRanks) -> None:
    given, scale = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor(3.0)
    images, texts = (part.requires_grad_() for part in given)
    loss = loss_of_all(images, texts, scale)
    loss.backward()
    assert images.grad is not None and texts.grad is not None
    for world_size in (2, 3):
        ranks = run_on_ranks(world_size, loss_of_own, images.detach(), texts.detach(), scale)
        losses, of_images, of_texts = zip(*ranks, strict=True)
        assert torch.allclose(losses[0], loss.detach())
        assert torch.allclose(torch.cat(of_images), images.grad, atol=1e-6)
        assert torch.allclose(torch.cat(of_texts), texts.grad, atol=1e-6)


def test_captions_are_tokens_and_back() -> None:
    for scene in SCENES:
        captions = scene.captions()
        tokens = encode(captions)
        assert tokens.shape == (2, LENGTH) and tokens[:, -1].eq(END).all()
        assert tuple(map(decode, tokens)) == captions
    assert Scene(3, "large", "left of", 7, "small").captions() == (
        "a large three left of a small seven",
        "a small seven right of a large three",
    )


def test_digits_that_are_held_out_never_stand_so_in_training() -> None:
    training, unseen = split_scenes()
    assert len(training) + len(unseen) == len(SCENES) and len(unseen) == len(SCENES) // 10
    known = {(scene.first, scene.relation, scene.second) for scene in training}
    assert not known & {(scene.first, scene.relation, scene.second) for scene in unseen}
    assert {scene.first for scene in unseen} == {scene.second for scene in unseen} == set(range(10))


def test_digits_stand_as_the_caption_says() -> None:
    white = Digits(torch.ones(10, 1, 8, 8) * (1 + torch.arange(10.0))[:, None, None, None] / 10, torch.arange(10))
    scenes = [Scene(9, "large", "left of", 4, "small"), Scene(4, "small", "above", 9, "large")]
    beside, above = Painter(white, 20).paint(scenes, torch.Generator().manual_seed(0))[:, 0]
    for first, second in ((beside[:, :10], beside[:, 11:]), (above[11:], above[:9])):
        assert first.max() > 0.9
        assert 0.4 < second.max() < 0.6
    assert beside[:, :10].sum() > 3 * beside[:, 11:].sum()


def test_a_caption_counts_up_to_its_end() -> None:
    tokens = encode(["a small one above a small two", "a small one left of a small two"])
    logits = torch.zeros(2, LENGTH, 30)
    changed = logits.clone()
    changed[0, -2:] = torch.randn(2, 30)
    assert torch.equal(caption_loss(logits, tokens), caption_loss(changed, tokens))
    changed[1, -2] = torch.randn(30)
    assert not torch.equal(caption_loss(logits, tokens), caption_loss(changed, tokens))


def test_features_are_those_of_the_caption_alone() -> None:
    model = PRESETS["tiny"].make().eval()
    tokens = encode(["a small one above a small two"])
    longer = torch.cat([tokens[:, :-1], torch.tensor([[5]])], dim=1)  # behind its END
    with torch.no_grad():
        assert torch.allclose(model.feature(model.read(tokens), tokens), model.feature(model.read(longer), longer))
        written = write(model, torch.rand(3, 1, 20, 20), LENGTH)
    assert written.shape == (3, LENGTH)


@pytest.mark.parametrize(("preset", "millions"), {"coca-base": 334, "coca-large": 723, "coca-2b": 2_047}.items())
def test_presets_are_of_their_size(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model, _ = PRESETS[preset]()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
