"""ZeroDataParallel looks like the model inside it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from training import MODELS, batch, build, loss_of, optimizer_for, snapshot
from worker_pool import RunOnRanks

import zeroopt


def names_and_state() -> bool:
    net = build("conv")
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    model, _ = zeroopt.wrap(net, optimizer_for("adamw", net))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in net.named_buffers()]
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert model.module is net and model.head is net.head
    with pytest.raises(AttributeError):
        _ = model.no_such_thing

    addresses = [p.data_ptr() for p in model.parameters()]
    other = {k: v + 1 for k, v in expected.items()}
    assert model.load_state_dict(other).missing_keys == []
    assert [p.data_ptr() for p in net.parameters()] == addresses
    assert all(torch.equal(v, other[k]) for k, v in net.state_dict().items())
    with pytest.raises(zeroopt.ConfigError, match="assign=True"):
        model.load_state_dict(other, assign=True)
    for copied in (copy.copy, pickle.dumps):
        with pytest.raises(zeroopt.NotSupportedError, match=r"\.module"):
            copied(model)
    assert torch.equal(copy.deepcopy(net).head.weight, net.head.weight)
    assert not model.eval().module.training
    return True


def test_names_and_state_are_the_models_own(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, names_and_state) == [True, True]


def load_float32(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Float32 values, those of the optimizer after they were loaded, the model's own, and those of a step of learning rate 0."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0), **options)
    torch.manual_seed(3)
    values = {n: torch.randn_like(p, dtype=torch.float32) for n, p in build("mlp").named_parameters()}
    model.load_state_dict({**net.state_dict(), **values})
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    exact = [optimizer.full_parameter(net.get_parameter(name)) for name in trained]
    loaded = [net.get_parameter(name).detach().clone() for name in trained]
    loss_of(model(batch("mlp", 0).bfloat16()).float()).backward()
    optimizer.step()
    return [values[name] for name in trained], exact, loaded, [net.get_parameter(name).detach() for name in trained]


@pytest.mark.parametrize("weights", ["float32", "remainder"])
def test_masters_take_what_parameters_cannot_hold(run_on_ranks: RunOnRanks, weights: str) -> None:
    for share in (False, True):
        options = {"param_dtype": torch.bfloat16, "master_weights": weights, "share_parameters": share}
        for values, exact, loaded, stepped in run_on_ranks(2, load_float32, options):
            for value, kept, before, after in zip(values, exact, loaded, stepped, strict=True):
                assert torch.equal(kept, value)
                assert torch.equal(before, after), "ranks have rounded alike"


class Tied(nn.Module):
    """One weight by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def copying(net: nn.Module) -> nn.Module:
    """Its state dict has copies, as where a hook brings all of it to the CPU."""
    net._register_state_dict_hook(lambda _, state, *__: state.update({n: v.clone() for n, v in state.items()}))
    return net


def load_by_other_names(weights: str) -> None:
    """State dicts have other names than `named_parameters`, or other values."""
    linears = (checkpoint_wrapper(nn.Linear(5, 5)), "weight"), (copying(nn.Linear(5, 5)), "weight")
    for net, name in (*linears, (Tied(), "second.weight")):
        optimizer: Any = torch.optim.AdamW(net.parameters())
        model, optimizer = zeroopt.wrap(net, optimizer, param_dtype=torch.bfloat16, master_weights=weights)
        value = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
        model.load_state_dict({name: value}, strict=False)
        assert torch.equal(optimizer.full_parameter(next(net.parameters())), value), name


@pytest.mark.parametrize("weights", ["float32", "remainder"])
def test_masters_take_values_by_whatever_name(run_on_ranks: RunOnRanks, weights: str) -> None:
    run_on_ranks(2, load_by_other_names, weights)


def train_a_copy(options: dict[str, Any]) -> list[Tensor]:
    """One rank alone copies the wrapped model and does with the copy as it likes; then the original goes on."""
    net = build("conv")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), **options)
    loss_of(model(batch("conv", 0))).backward()
    optimizer.step()
    if dist.get_rank() == 0:
        twin = copy.deepcopy(model)
        assert type(twin) is type(net)
        assert not any(module._forward_pre_hooks for module in twin.modules())
        before = snapshot(net)
        assert all(torch.equal(a, b) for a, b in zip(snapshot(twin), before, strict=True))
        loss_of(twin(batch("conv", 1))).backward()
        assert all((p.grad is not None) is p.requires_grad for p in twin.parameters())
        optimizer_for("adamw", twin).step()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=False))
        assert len(pickle.dumps(twin)) > 0
    loss_of(model(batch("conv", 1))).backward()
    optimizer.step()
    return [param.detach().clone() for param in net.parameters()]


@pytest.mark.parametrize("options", [{"stage": 0}, {"stage": 2}, {"stage": 2, "share_parameters": True}], ids=str)
def test_a_deep_copy_is_a_plain_model_of_its_own(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    first, second = run_on_ranks(2, train_a_copy, options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def forget_everything() -> list[bool]:
    """Whether the model, its parameters' storage and the reducer are freed with the last reference to them."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    loss_of(model(batch("mlp", 0))).backward()
    optimizer.step()
    bucket = model._reducer._buckets[0]
    watched = [weakref.ref(o) for o in (net, net.scale, model, optimizer, model._reducer, bucket.flat_param)]
    del net, model, optimizer, bucket
    gc.collect()
    return [ref() is None for ref in watched]


def test_nothing_is_kept_alive(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, forget_everything) == [[True] * 6] * 2


def memory_formats() -> tuple[bool, bool]:
    net = build("conv")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    loss_of(model(batch("conv", 0))).backward()
    optimizer.step()
    weight = net.body[0].weight
    return weight.is_contiguous(memory_format=torch.channels_last), weight.is_contiguous()


def test_memory_format_survives(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, memory_formats) == [(True, False)] * 2


def buffers_after(broadcast: bool, mode: str) -> Tensor:
    """Batch-norm statistics after a forward of ranks that saw different data before."""
    net = build("conv")
    model, _ = zeroopt.wrap(net, optimizer_for("adamw", net), broadcast_buffers=broadcast)
    model(batch("conv", 0))  # statistics part
    if mode == "no_grad":
        model.eval()
        if dist.get_rank() == 0:  # not collective without gradients
            with torch.no_grad():
                model(batch("conv", 1))
    elif mode == "no_sync":
        model.eval()
        with model.no_sync():
            model(batch("conv", 1))
    else:
        model.eval()
        model(batch("conv", 1))
    return net.body[1].running_mean.clone()


@pytest.mark.parametrize(
    ("broadcast", "mode", "equal"),
    [(True, "grad", True), (False, "grad", False), (True, "no_grad", False), (True, "no_sync", True)],
)
def test_broadcast_buffers(run_on_ranks: RunOnRanks, broadcast: bool, mode: str, equal: bool) -> None:
    first, second = run_on_ranks(2, buffers_after, broadcast, mode)
    assert torch.equal(first, second) is equal


def ask_for_comm_hook() -> None:
    net = build("mlp")
    model, _ = zeroopt.wrap(net, optimizer_for("sgd", net))
    with pytest.raises(zeroopt.NotSupportedError, match="reduce_dtype"):
        model.register_comm_hook(None, fp16_compress_hook)


def test_communication_hooks_have_an_option(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(1, ask_for_comm_hook)


def integer_buffers() -> int:
    net = MODELS["conv"]()
    net.body[1].num_batches_tracked += 5 * dist.get_rank()
    model, _ = zeroopt.wrap(net, optimizer_for("adamw", net), sync_module_states=False)
    model.eval()
    model(batch("conv", 0))
    return int(net.body[1].num_batches_tracked)


def test_buffers_of_all_dtypes_are_broadcast(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(3, integer_buffers) == [0, 0, 0]


class Listener(torch.nn.Module):
    """Notes what its forward gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        self.heard = args, kwargs
        return self.weight.sum()


def listen(cast_inputs: bool) -> tuple[list[str], list[bool], torch.dtype]:
    """The dtypes that arrive, whether containers and what is not a tensor arrive as they are, and the buffer's dtype."""
    net = Listener()
    model, _ = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=0.1), param_dtype=torch.bfloat16, cast_inputs=cast_inputs
    )
    point = namedtuple("point", "x y")
    marker = object()
    double, single, half = torch.ones(2, dtype=torch.float64), torch.ones(2, requires_grad=True), torch.ones(2).half()
    ints, flags, complexes = torch.ones(2, dtype=torch.int64), torch.ones(2) > 0, torch.ones(2, dtype=torch.complex64)
    model(
        single,
        [double, (half, {"ints": ints})],
        marker,
        at=point(single, "y"),
        rest={"a": [flags, complexes, None, 2.5]},
    )
    (first, (second, (third, inner)), last), kwargs = net.heard
    arrived = [first, second, third, inner["ints"], kwargs["at"].x, *kwargs["rest"]["a"][:2]]
    kept = [
        inner["ints"] is ints,
        kwargs["rest"]["a"][0] is flags,
        kwargs["rest"]["a"][1] is complexes,
        last is marker,
        type(kwargs["at"]) is point and kwargs["at"].y == "y",
        kwargs["rest"]["a"][2:] == [None, 2.5],
        (first is single) == (not cast_inputs),
        first.requires_grad,
    ]
    return [str(tensor.dtype).removeprefix("torch.") for tensor in arrived], kept, net.scale.dtype


@pytest.mark.parametrize("cast_inputs", [True, False])
def test_inputs_are_cast_when_asked_for(run_on_ranks: RunOnRanks, cast_inputs: bool) -> None:
    given = ["float32", "float64", "float16", "int64", "float32", "bool", "complex64"]
    expected = ["bfloat16" if cast_inputs and "float" in name else name for name in given]
    for dtypes, kept, buffer in run_on_ranks(2, listen, cast_inputs):
        assert dtypes == expected and all(kept), (dtypes, kept)
        assert buffer == torch.float32
