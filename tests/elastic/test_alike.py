"""What all ranks have of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import zeroopt
from zeroopt.elastic.alike import Alike


def alike(**options: Any) -> Alike:
    """Of a model with a layer that is trained and one that is not."""
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).requires_grad_(False))
    model, _ = zeroopt.wrap(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1), **options)
    return Alike.of(model)


TRAINED = ("model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, TRAINED),
        ({"param_dtype": torch.bfloat16, "master_weights": "none"}, TRAINED),
        ({"param_dtype": torch.bfloat16}, ()),
        ({"param_dtype": torch.bfloat16, "master_weights": "remainder"}, ()),
    ],
    ids=str,
)
def test_exact_parameters_are_alike_on_all_ranks(options: dict[str, Any], trained: tuple[str, ...]) -> None:
    found = alike(**options)
    assert found.trained.keys() == set(trained)
    assert found.frozen.keys() == {"model.2.weight", "model.2.bias"}


def test_only_what_steps_change_is_copied_later() -> None:
    found = alike()
    targets = [
        (item("model.0.weight", (1, 2), (3, 4)), torch.zeros(3, 4)),
        (item("model.2.bias", (0,), (2,)), torch.zeros(2)),
    ]
    finish = found.copy_begun(targets)
    assert torch.equal(targets[1][1], found.frozen["model.2.bias"])
    assert not targets[0][1].any()
    finish()
    assert torch.equal(targets[0][1], found.trained["model.0.weight"][1:4, 2:6])


def item(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> WriteItem:
    """A part of a tensor of a copy."""
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), chunk.sizes)
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
