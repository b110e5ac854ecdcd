"""Networks see digits, the same by DDP and by zeroopt; and what they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from recipe_runs import check, run_recipe
from torch import Tensor, nn
from worker_pool import RunOnRanks

from recipes.outcome import differences
from recipes.see.images import Folder, load_images, squares, vary
from recipes.see.norms import BatchNormOverRanks
from recipes.see.presets import PRESETS
from recipes.side_by_side import FIRST_TOLERANCE

LEARNS = "--preset=resnet-tiny", "--norm=group", "--steps=80"


@pytest.mark.slow
def test_it_learns_the_same_by_both_methods(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    ddp, zeroopt = (run_on_ranks(2, run_recipe, "see", method, tmp_path, *LEARNS)[0] for method in ("ddp", "zeroopt"))
    check(ddp, zeroopt)


@pytest.mark.parametrize("options", [("vit-tiny", "batch"), ("resnet-tiny", "batch"), ("resnet-tiny", "sync")])
def test_each_kind_of_network_has_the_same_losses_by_both_methods(
    options: tuple[str, str], run_on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    preset, norm = options
    ddp, zeroopt = (
        run_on_ranks(2, run_recipe, "see", method, tmp_path, f"--preset={preset}", f"--norm={norm}", "--steps=6")[0]
        for method in ("ddp", "zeroopt")
    )
    first, _ = differences(ddp, zeroopt)
    assert first <= FIRST_TOLERANCE


@pytest.mark.parametrize(
    ("preset", "millions"),
    {
        "resnet18": 11.69,
        "resnet34": 21.80,
        "resnet50": 25.56,
        "resnet101": 44.55,
        "resnet152": 60.19,
        "vit-s16": 22.05,
        "vit-b16": 86.57,
        "vit-l16": 304.3,
        "vit-h14": 632.0,
    }.items(),
)
def test_networks_are_as_large_as_those_of_the_papers(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model, _ = PRESETS[preset]()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_each_parameter_is_in_one_group() -> None:
    for preset in ("resnet-tiny", "vit-tiny"):
        model, _ = PRESETS[preset]()
        decayed, others = PRESETS[preset].make_optimizer(model).param_groups
        assert decayed["weight_decay"] > 0 == others["weight_decay"]
        assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
        assert min(parameter.dim() for parameter in decayed["params"]) == 2


def normalise(norm: nn.Module, images: Tensor) -> list[Tensor]:
    """Two training passes: outputs, gradients of a loss that is a sum over images, and statistics."""
    for _ in range(2):
        inputs = images.clone().requires_grad_()
        outputs = norm(inputs)
        norm.zero_grad()
        (outputs * inputs.detach().roll(1, 1)).sum().backward()
    assert inputs.grad is not None
    grads = [parameter.grad for parameter in norm.parameters() if parameter.grad is not None]
    return [outputs.detach(), inputs.grad, *grads, *(buffer.clone() for buffer in norm.buffers())]


def normalise_own(images: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    own = images.chunk(dist.get_world_size())[dist.get_rank()]
    norm = BatchNormOverRanks(images.shape[1])
    outputs, inputs, weight, bias, *statistics = normalise(norm, own)
    for grad in (weight, bias):
        dist.all_reduce(grad)
    norm.eval()
    assert torch.allclose(norm(own), nn.functional.batch_norm(own, *statistics[:2], norm.weight, norm.bias))
    return [outputs, inputs, weight, bias, *statistics]


def test_batch_norm_over_ranks_is_that_of_one_process_with_all_images(run_on_ranks: RunOnRanks) -> None:
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 + 1
    expected = normalise(nn.BatchNorm2d(3), images)
    ranks = run_on_ranks(2, normalise_own, images)
    for values, want in zip(zip(*ranks, strict=True), expected, strict=True):
        got = torch.cat(values) if want.dim() == images.dim() else values[0]
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_part_of_each_image_is_covered() -> None:
    covered = squares(200, 16, torch.Generator().manual_seed(0))
    assert set(covered.unique().tolist()) == {0.0, 1.0}
    assert covered.sum((1, 2, 3)).max() == 16 and covered.sum((1, 2, 3)).min() >= 4


def test_varied_images_are_of_the_same_shape_and_range() -> None:
    images = torch.rand(5, 3, 16, 16)
    varied = vary(images, torch.Generator().manual_seed(0), mirrored=True)
    assert varied.shape == images.shape and varied.min() >= 0 and varied.max() <= 1


def test_images_of_a_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / part / name).mkdir(parents=True)
            image.new("RGB", (9, 6), color).save(tmp_path / part / name / "1.png")
    images = load_images(tmp_path, 4)
    assert (images.classes, images.channels, images.guess) == (2, 3, 0.5)
    pixels, label = images.training[1]
    assert label == 1 and torch.equal(pixels, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 4))
    (tmp_path / "val" / "green").mkdir()
    with pytest.raises(ValueError, match="the same classes in train and val"):
        load_images(tmp_path, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder of images for each class"):
        Folder(tmp_path / "empty", 4)
