"""What is on the meta device, and how it becomes tensors without memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import zeroopt
from zeroopt.building.unmade import Hollowing, device_for, find_unmade


def make() -> nn.Linear:
    return nn.Linear(4, 3, device="meta")


def test_each_tensor_is_found_once() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(2, 2, device="cpu"))
    model[1].weight = model[0].weight
    names = [one.name for one in find_unmade(model).values()]
    assert names == ["0.weight", "1.bias", "2.weight", "2.bias", *(f"2.{name}" for name, _ in model[2].named_buffers())]


def test_hollow_tensors_are_the_same_objects_and_have_no_memory() -> None:
    model = make()
    model.weight.mine = "kept"  # type: ignore[attr-defined]
    weight, reference = model.weight, weakref.ref(model.weight)
    found = find_unmade(model)
    hollowing = Hollowing(list(found.values()), torch.device("cpu"))
    assert model.weight is weight and reference() is weight and weight.mine == "kept" and weight in found
    assert weight.device.type == "cpu" and weight.shape == (3, 4) and weight.stride() == (4, 1) and weight.requires_grad
    assert weight.untyped_storage().nbytes() == 0
    hollowing.undo()
    assert weight.is_meta and weight.shape == (3, 4) and weight.requires_grad and weight.is_leaf


def test_strides_stay() -> None:
    model = nn.Conv2d(3, 4, 3, device="meta").to(memory_format=torch.channels_last)
    strides = model.weight.stride()
    Hollowing(list(find_unmade(model).values()), torch.device("cpu"))
    assert model.weight.stride() == strides


def test_a_graph_of_the_meta_device_is_no_hindrance() -> None:
    model = make()
    graph = model.bias.sum()
    Hollowing(list(find_unmade(model).values()), torch.device("cpu"))
    graph.backward()
    assert model.bias.grad is None and not model.bias.is_meta


def test_hooks_and_gradients_would_be_lost() -> None:
    model = make()
    handle = model.weight.register_hook(print)
    with pytest.raises(zeroopt.ConfigError, match="has hooks"):
        find_unmade(model)
    handle.remove()
    model.weight.register_post_accumulate_grad_hook(print)
    with pytest.raises(zeroopt.ConfigError, match="has hooks"):
        find_unmade(model)
    model = make()
    model.weight.grad = torch.empty_like(model.weight)
    with pytest.raises(zeroopt.ConfigError, match="has a gradient"):
        find_unmade(model)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(zeroopt.ConfigError, match="not initialised yet"):
        find_unmade(nn.LazyLinear(4, device="meta"))


def test_the_device() -> None:
    assert device_for(make(), "cpu") == torch.device("cpu")
    assert device_for(make(), None) == torch.device("cpu")
    with torch.device("meta"), pytest.raises(zeroopt.ConfigError, match="got the meta device"):
        device_for(make(), None)
    with torch.device("meta"):
        assert device_for(nn.Sequential(make(), nn.Linear(2, 2, device="cpu")), None) == torch.device("cpu")
