"""What of an optimizer will be trained is found without changing anything, and what cannot be is refused by name."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zeroopt
from zeroopt.admission import candidates
from zeroopt.admission.candidates import forget_wrapped, inspect, inspect_further, mark_wrapped
from zeroopt.errors import ConfigError, NotSupportedError
from zeroopt.plan.params import Grain, ManagedParam


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def refused(model: Any, message: str, optimizer: Any = None, error: type[Exception] = ConfigError) -> None:
    with pytest.raises(error, match=message):
        inspect(model, sgd(model) if optimizer is None else optimizer)


# What is found.


def test_parameters_come_in_the_models_order_with_their_places() -> None:
    model = two_layers()
    groups = [{"params": [model[1].bias, model[0].weight]}, {"params": [model[1].weight]}]
    params = inspect(model, torch.optim.SGD(groups, lr=0.1))
    assert [(m.name, m.index, m.group, m.position) for m in params] == [
        ("0.weight", 0, 0, 1),
        ("1.weight", 1, 1, 2),
        ("1.bias", 2, 0, 0),
    ]
    assert all(m.param is model.get_parameter(m.name) for m in params)


def test_frozen_ones_are_left_out_and_keep_their_positions() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    assert [(m.name, m.index, m.position) for m in inspect(model, sgd(model))] == [("1.weight", 0, 2), ("1.bias", 1, 3)]


def test_a_tied_parameter_is_found_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert [m.name for m in inspect(model, sgd(model))] == ["0.weight", "0.bias", "1.bias"]


def test_nothing_is_changed() -> None:
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: (param, param.data_ptr(), param._version) for name, param in model.named_parameters()}
    options = [dict(group) for group in optimizer.param_groups]
    inspect(model, optimizer)
    inspect(model, optimizer)
    assert {name: (param, param.data_ptr(), param._version) for name, param in model.named_parameters()} == before
    assert optimizer.param_groups == options and not optimizer.state


def test_each_parameter_has_the_grain_of_its_group() -> None:
    model = two_layers()
    assert {m.grain for m in inspect(model, sgd(model))} == {Grain.ELEMENT}
    assert {m.grain for m in inspect(model, zeroopt.optim.FusedLAMB(model.parameters()))} == {Grain.PARAMETER}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_all_these_dtypes_are_trained(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 3).to(dtype)
    assert len(inspect(model, sgd(model))) == 2


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 3).t(), torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(0, 3)],
    ids=["transposed", "channels_last", "empty"],
)
def test_any_order_of_dimensions_is_dense(weight: torch.Tensor) -> None:
    model = nn.ParameterDict({"weight": nn.Parameter(weight)})
    (managed,) = inspect(model, sgd(model))
    assert managed.stride == weight.stride()


# What another optimizer of the model trains.


def test_indices_go_on_behind_those_that_are_known() -> None:
    model = two_layers()
    known = inspect(model, sgd(model[0]))
    mark_wrapped(model)
    further = inspect(model, sgd(model[1]), known)
    assert [(m.name, m.index, m.position) for m in further] == [("1.weight", 2, 0), ("1.bias", 3, 1)]


def test_one_parameter_has_one_optimizer() -> None:
    model = two_layers()
    known = inspect(model, sgd(model[0]))
    with pytest.raises(
        ConfigError, match=r"parameter '0\.weight' is already trained by another optimizer of this model"
    ):
        inspect(model, sgd(model), known)


def test_an_optimizer_may_look_for_what_is_new_in_its_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD([{"params": [*layer.parameters()]} for layer in model], lr=0.1)
    model[1].bias.requires_grad_(False)
    own = inspect(model, optimizer)
    assert inspect_further(model, optimizer, own, own) == []
    model[1].bias.requires_grad_(True)
    tried: list[list[int]] = []

    def find_grains(of: torch.optim.Optimizer, groups: list[int], home: torch.device | None) -> list[Grain]:
        tried.append(groups)
        return [Grain.ELEMENT] * len(groups)

    monkeypatch.setattr(candidates, "find_grains", find_grains)
    (new,) = inspect_further(model, optimizer, own, own, fresh=[])
    assert (new.name, new.index, new.group, new.position) == ("1.bias", 3, 1, 3)
    inspect_further(model, optimizer, own, own, fresh=[0])
    assert tried == [[1], [0, 1]], "those of new parameters, and those that are new"


# What is refused.


def test_only_models_and_optimizers_are_taken() -> None:
    model = two_layers()
    refused("model", "expected model to be a torch.nn.Module, got str", sgd(model))
    refused(model, "expected optimizer to be a torch.optim.Optimizer instance, got type: pass the one", torch.optim.SGD)
    around = DistributedDataParallel.__new__(DistributedDataParallel)
    refused(around, "expected a plain module, got a DistributedDataParallel; wrap the module inside", sgd(model))


def test_what_has_been_wrapped_is_refused_until_it_is_forgotten() -> None:
    model = two_layers()
    optimizer = sgd(model)
    mark_wrapped(model, optimizer)
    refused(model, "this model is already wrapped; to train it with one more optimizer", optimizer)
    forget_wrapped(model)
    refused(model, "this optimizer is already wrapped", optimizer)
    forget_wrapped(model, optimizer)
    assert len(inspect(model, optimizer)) == 4


@pytest.mark.parametrize("options", [{"master_weights": "none"}, {"state_dtype": torch.int8}], ids=str)
def test_precision_is_an_option_of_wrap(options: dict[str, Any]) -> None:
    model = two_layers().bfloat16()
    fused = zeroopt.optim.FusedAdamW(model.parameters(), **options)
    refused(model, "this FusedAdamW was built with master_weights or state_dtype of its own", fused)


def test_parameters_of_another_model_are_told_by_their_place() -> None:
    model, other = two_layers(), nn.Linear(7, 5)
    optimizer = sgd(model)
    optimizer.add_param_group({"params": [other.bias]})
    refused(model, r"parameter 4 of the optimizer \(group 1, shape \[5\]\) is not a parameter of the model", optimizer)


def test_a_parameter_in_two_places_is_refused() -> None:
    model = two_layers()
    optimizer = sgd(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[1].weight]})
    refused(model, r"parameter '1\.weight' is in the optimizer twice", optimizer)


def test_there_has_to_be_something_to_train() -> None:
    model = two_layers()
    optimizer = sgd(model)
    model.requires_grad_(False)
    refused(model, "no parameter of the optimizer requires gradients", optimizer)
    optimizer.param_groups[0]["params"].clear()
    refused(model, "the optimizer has no parameters; build it on model.parameters", optimizer)


class Named(torch.Tensor):
    """A tensor of a class of its own."""


@pytest.mark.parametrize(
    ("param", "message", "error"),
    [
        (
            torch.zeros(3, dtype=torch.complex64),
            "'p' is torch.strided torch.complex64; supported are",
            NotSupportedError,
        ),
        (torch.eye(3).to_sparse(), "'p' is torch.sparse_coo torch.float32; supported are dense", NotSupportedError),
        (torch.zeros(3).as_subclass(Named), "'p' is a Named; only plain tensors", NotSupportedError),
        (torch.zeros(3, device="meta"), "'p' is on the meta device; materialise the model", ConfigError),
        (torch.zeros(8, 6)[:, :4], "'p' has gaps or overlaps in memory", ConfigError),
        (torch.zeros(2, 1).expand(2, 3), "'p' has gaps or overlaps in memory", ConfigError),
    ],
    ids=["complex", "sparse", "subclass", "meta", "gaps", "expanded"],
)
def test_tensors_that_no_bucket_can_hold_are_refused(param: torch.Tensor, message: str, error: type[Exception]) -> None:
    model = nn.ParameterDict({"p": nn.Parameter(param)})
    refused(model, message, error=error)


def test_frozen_ones_may_be_of_any_kind() -> None:
    model = nn.ParameterDict({"trained": nn.Parameter(torch.zeros(2))})
    frozen = [torch.zeros(3, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros(3, device="meta")]
    for number, tensor in enumerate([*frozen, torch.zeros(8, 6)[:, :4]]):
        model[f"frozen{number}"] = nn.Parameter(tensor, requires_grad=False)
    assert [managed.name for managed in inspect(model, sgd(model))] == ["trained"]


def test_memory_that_is_not_a_parameters_own_is_refused() -> None:
    memory = torch.zeros(4)
    refused(
        nn.ParameterDict({"p": nn.Parameter(memory), "q": nn.Parameter(memory[:2])}),
        "'p' and parameter 'q' share memory",
    )
    model = nn.Linear(2, 2)
    model.register_buffer("ones", torch.ones(1).expand(8))
    refused(model, "buffer 'ones' of shape .* is expanded")


def test_a_lazy_parameter_is_refused() -> None:
    refused(nn.Sequential(nn.LazyLinear(3)), r"parameter '0\.weight' is not initialised yet; run the model once")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_before_there_are_any(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(5, 3, sparse=True), nn.Linear(3, 3))
    refused(model, "module '0' yields sparse gradients", error=NotSupportedError)
    model[0].requires_grad_(False)
    assert len(inspect(model, sgd(model))) == 2


def placed(*devices: str) -> list[ManagedParam]:
    """Parameters as far as they are on devices."""
    found: list[Any] = [
        SimpleNamespace(name=f"p{i}", param=SimpleNamespace(device=torch.device(d))) for i, d in enumerate(devices)
    ]
    return found


def test_all_parameters_have_to_be_on_one_device_that_will_do() -> None:
    candidates._check_devices(placed("cpu", "cpu"))
    with pytest.raises(NotSupportedError, match="must be on one device, got 'p1' on cpu, 'p2' on cuda:1"):
        candidates._check_devices(placed("cpu", "cpu", "cuda:1"))
    with pytest.raises(NotSupportedError, match="parameters are on mps:0, for which this torch lacks"):
        candidates._check_devices(placed("mps:0"))


# What is warned of.


def test_what_nobody_steps_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    model[4].requires_grad_(False)
    with caplog.at_level(logging.WARNING, "zeroopt"):
        inspect(model, sgd(model))
        assert caplog.messages == []
        known = inspect(model, sgd(model[0]))
        inspect(model, sgd(nn.Sequential(*model[1:3])), known)
    first, second = caplog.messages
    assert first.startswith("6 parameters require gradients but are not in the optimizer.")
    assert first.endswith("requires_grad_(False) saves: 1.weight, 1.bias, 2.weight, 2.bias, 3.weight, …")
    assert second.startswith("2 parameters ") and second.endswith("saves: 3.weight, 3.bias")
