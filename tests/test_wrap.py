"""zeroopt.wrap refuses what it cannot train before it changes anything, on all ranks alike."""

from __future__ import annotations

from itertools import count
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training import MODELS, batch, build, loss_of, optimizer_for
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.storage.bucket import Bucket
from zeroopt.storage.gradient_store import GradientStore


def linear() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters())


def wrap_case(case: str) -> str:
    """Wrap something bad; returns "TypeName: message" of the error, and checks that the model was left alone."""
    model, optimizer = linear()
    options: dict[str, Any] = {}
    if case == "twice":
        first = zeroopt.wrap(model, optimizer)  # noqa: F841  which is wrapped as long as somebody has it
    elif case == "optimizer twice":
        zeroopt.wrap(model, optimizer)
        model = nn.Linear(2, 2)
    elif case == "result again":
        model, optimizer = zeroopt.wrap(model, optimizer)
    elif case == "result optimizer":
        _, optimizer = zeroopt.wrap(model, optimizer)
        model = linear()[0]
    elif case == "foreign parameters":
        optimizer = torch.optim.SGD(linear()[0].parameters())
    elif case == "empty":
        optimizer.param_groups[0]["params"] = []
    elif case == "frozen":
        model.requires_grad_(False)
    elif case == "meta":
        model = nn.Linear(3, 3, device="meta")
        model.register_buffer("table", torch.ones(3, device="meta"))
        optimizer = torch.optim.SGD(model.parameters())
    elif case == "lazy":
        model = nn.Sequential(nn.LazyLinear(3))
        optimizer = torch.optim.SGD(model.parameters())
    elif case == "sparse":
        model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
        optimizer = torch.optim.SGD(model.parameters())
    elif case == "complex":
        model.extra = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        optimizer = torch.optim.SGD(model.parameters())
    elif case == "shared memory":
        model[2].bias = nn.Parameter(model[0].bias.data[:2])
        optimizer = torch.optim.SGD(model.parameters())
    elif case == "expanded buffer":
        model.register_buffer("ones", torch.ones(1).expand(8))
    elif case == "gaps":
        model[0].weight = nn.Parameter(torch.zeros(8, 6)[:, :4])
        optimizer = torch.optim.SGD(model.parameters())
    elif case == "lbfgs":
        optimizer = torch.optim.LBFGS(model.parameters())
    elif case == "global norm":
        optimizer = GloballyNormalisedSgd(model.parameters())
    elif case == "no fused kernel":
        optimizer, options = torch.optim.Adadelta(model.parameters()), {"fused": True}
    elif case == "fused double":
        model.double()
        options = {"fused": True}
    elif case == "not a module":
        model = "model"  # type: ignore[assignment]
    elif case == "not an optimizer":
        optimizer = torch.optim.AdamW  # type: ignore[assignment]
    elif case == "no optimizer":
        optimizer = None  # type: ignore[assignment]
    else:
        if case.startswith("half, "):
            model.half()
            case = case.removeprefix("half, ")
        options = eval(f"dict({case})", {"torch": torch})
    before = addresses(model)
    try:
        zeroopt.wrap(model, optimizer, **options)
    except zeroopt.ZeroOptError as error:
        assert before == addresses(model)
        return f"{type(error).__name__}: {error}"
    return "no error"


def addresses(model: object) -> list[int]:
    """Where the parameters lie, as far as there are any."""
    params = list(model.parameters()) if isinstance(model, nn.Module) else []
    return [p.data_ptr() for p in params if not isinstance(p, nn.UninitializedParameter)]


class GloballyNormalisedSgd(torch.optim.Optimizer):
    """Scales the step by the norm of all gradients; a warm-up has set its rate to 0."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad / norm, alpha=group["lr"])


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("twice", "ConfigError: this model is already wrapped"),
        ("optimizer twice", "ConfigError: this optimizer is already wrapped"),
        ("result again", "ConfigError: this optimizer is already wrapped"),
        ("result optimizer", "ConfigError: this optimizer is already wrapped"),
        ("foreign parameters", "ConfigError: parameter 0 of the optimizer (group 0, shape [8, 4]) is not a parameter"),
        ("empty", "ConfigError: the optimizer has no parameters"),
        ("frozen", "ConfigError: no parameter of the optimizer requires gradients"),
        ("meta", "ConfigError: buffer 'table' of the Linear is on the meta device, and nothing gives it values"),
        ("lazy", "ConfigError: parameter '0.weight' is not initialised yet"),
        ("sparse", "NotSupportedError: module '0' yields sparse gradients"),
        ("complex", "NotSupportedError: parameter 'extra' is torch.strided torch.complex64"),
        ("shared memory", "ConfigError: parameter '0.bias' and parameter '2.bias' share memory"),
        ("expanded buffer", "ConfigError: buffer 'ones' of shape [8] is expanded"),
        ("gaps", "ConfigError: parameter '0.weight' has gaps or overlaps"),
        ("lbfgs", "NotSupportedError: LBFGS calls the model several times a step"),
        ("global norm", "NotSupportedError: GloballyNormalisedSgd steps a parameter differently when others"),
        ("no fused kernel", "ConfigError: fused=True: there is no fused kernel for Adadelta"),
        ("fused double", "ConfigError: fused=True: parameter '0.weight' is torch.float64"),
        ("not a module", "ConfigError: expected model to be a torch.nn.Module, got str"),
        ("not an optimizer", "ConfigError: expected optimizer to be a torch.optim.Optimizer instance, got type"),
        (
            "no optimizer",
            "ConfigError: expected optimizer to be a torch.optim.Optimizer instance, got None: pass the one",
        ),
        ("stage=3", "ConfigError: expected stage to be one of 0, 1, 2, got 3"),
        ("stage=True", "ConfigError: expected stage"),
        ("bucket_mb=0", "ConfigError: expected bucket_mb to be a positive number of MiB, or None, got 0"),
        ("transport='tcp'", "ConfigError: expected transport"),
        ("fused='yes'", "ConfigError: expected fused"),
        ("overlap=1", "ConfigError: expected overlap"),
        ("master_weights='half'", "ConfigError: expected master_weights"),
        ("param_dtype=torch.float64", "ConfigError: expected param_dtype to be one of None"),
        ("reduce_dtype=torch.int8", "ConfigError: expected reduce_dtype"),
        (
            "half, reduce_dtype=torch.bfloat16",
            "ConfigError: reduce_dtype=torch.bfloat16 does not fit parameters of torch.fl",
        ),
        ("reduce_dtype=torch.bfloat16, stage=0", "NotSupportedError: reduce_dtype is supported in stages 1 and 2"),
        (
            "master_weights='remainder'",
            "ConfigError: master_weights='remainder' completes or rounds bfloat16 parameters",
        ),
        ("state_dtype=torch.float16", "ConfigError: expected state_dtype"),
        ("max_grad_norm=-1.0", "ConfigError: expected max_grad_norm to be a positive number or None"),
        ("share_parameters=1", "ConfigError: expected share_parameters"),
        ("share_parameters=True, stage=0", "ConfigError: share_parameters=True needs stage 1 or 2"),
        (
            "share_parameters=True, transport='pairwise'",
            "ConfigError: share_parameters=True needs ranks that share memory",
        ),
        ("bucket_buffers=0", "ConfigError: expected bucket_buffers to be a positive number"),
        ("average_every=0", "ConfigError: expected average_every to be a positive number of steps"),
        ("check_every=0", "ConfigError: expected check_every to be a positive number of steps or None, got 0"),
        ("check_every=2.0", "ConfigError: expected check_every"),
        ("check_every=True", "ConfigError: expected check_every"),
    ],
)
def test_refusals(run_on_ranks: RunOnRanks, case: str, expected: str) -> None:
    for message in run_on_ranks(2, wrap_case, case):
        assert message.startswith(expected), message


def wrap_differently(difference: str) -> str:
    """Wrap with something else on rank 1; the text of the error."""
    odd = dist.get_rank() == 1
    model, optimizer = linear()
    options: dict[str, Any] = {"stage": 2}
    if difference == "shape" and odd:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    elif difference == "name" and odd:
        model = nn.ModuleDict({"a": model[0], "b": model[2]})
    elif difference == "dtype" and odd:
        model = model.double()
    elif difference == "fewer" and odd:
        model = nn.Sequential(model[0])
    elif difference == "frozen" and odd:
        model.extra = nn.Linear(3, 3).requires_grad_(False)
    elif difference == "buffer" and odd:
        model.register_buffer("count", torch.zeros(3))
    if difference == "class" and odd:
        optimizer = torch.optim.SGD(model.parameters())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 if difference == "lr" and odd else 0.2)
    if difference == "groups" and odd:
        params = list(model.parameters())
        optimizer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.2)
    if difference == "option" and odd:
        options["stage"] = 1
    if difference == "problem" and odd:
        optimizer.param_groups[0]["params"] = []
    try:
        zeroopt.wrap(model, optimizer, **options)
    except zeroopt.ZeroOptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        ("shape", ["parameter '2.weight' of shape [2, 8]", "rank 1 has [parameter '2.weight' of shape [3, 8]"]),
        ("name", ["rank 0 has [parameter '0.weight'", "rank 1 has [parameter 'a.weight'"]),
        ("dtype", ["torch.float32", "torch.float64"]),
        ("fewer", ["rank 0 has [parameter '2.weight'", "rank 1 has [optimizer AdamW]"]),
        (
            "frozen",
            [
                "rank 1 has [frozen parameter 'extra.weight' of shape [3, 3], torch.float32, which this optimizer does not"
            ],
        ),
        ("buffer", ["rank 1 has [buffer 'count' of shape [3], torch.float32]"]),
        ("class", ["rank 0 has [optimizer AdamW], rank 1 has [optimizer SGD]"]),
        ("lr", ["lr=0.2", "lr=0.1"]),
        ("groups", ["in param_group 0], rank 1 has", "in param_group 1]"]),
        ("option", ["rank 0 has [option stage=2], rank 1 has [option stage=1]"]),
    ],
)
def test_ranks_that_differ_raise_the_same_error(run_on_ranks: RunOnRanks, difference: str, expected: list[str]) -> None:
    messages = run_on_ranks(3, wrap_differently, difference)
    assert messages[0].startswith("RankMismatchError: ")
    assert messages == [messages[0]] * 3
    assert all(part in messages[0] for part in expected), messages[0]


def test_a_problem_on_one_rank_reaches_all(run_on_ranks: RunOnRanks) -> None:
    messages = run_on_ranks(3, wrap_differently, "problem")
    assert messages[1].startswith("ConfigError: the optimizer has no parameters")
    for other in (messages[0], messages[2]):
        assert other.startswith("RankMismatchError: zeroopt.wrap failed on rank 1: the optimizer has no parameters")


def wrap_after_a_refusal() -> list[torch.Tensor]:
    """A wrap that failed on one rank alone leaves the group fit for the next."""
    model, optimizer = linear()
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["params"] = []
    with pytest.raises(zeroopt.ZeroOptError):
        zeroopt.wrap(model, optimizer)
    net = build("mlp")
    wrapped, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    loss_of(wrapped(torch.ones(2, 7))).backward()
    optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def test_a_refused_wrap_can_be_tried_again(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, wrap_after_a_refusal)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def ranks_start_apart(sync: bool) -> list[torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    model = MODELS["conv"]()
    nn.init.normal_(model.body[1].running_mean)
    nn.init.normal_(model.body[0].bias)  # frozen: in no bucket
    before = [v.clone() for v in (*model.parameters(), *model.buffers())]
    zeroopt.wrap(model, torch.optim.AdamW(model.parameters()), sync_module_states=sync)
    after = [v.detach().clone() for v in (*model.parameters(), *model.buffers())]
    if dist.get_rank() == 0 or not sync:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return after


def test_sync_module_states(run_on_ranks: RunOnRanks) -> None:
    together = run_on_ranks(3, ranks_start_apart, True)
    for rank in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(together[0], together[rank], strict=True))
    apart = run_on_ranks(2, ranks_start_apart, False)
    assert not torch.equal(apart[0][0], apart[1][0])


def wrap_in_subgroups() -> list[torch.Tensor]:
    """Two groups of two ranks train on their own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[dist.get_rank() // 2]
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), process_group=mine)
    for step in range(3):
        x = MODELS["mlp"].inputs(torch.Generator().manual_seed(10 * step + dist.get_rank()))
        loss_of(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    other = groups[1 - dist.get_rank() // 2]
    with pytest.raises(zeroopt.StateError, match="that this rank is in"):
        zeroopt.wrap(*linear(), process_group=other)
    return [p.detach().clone() for p in net.parameters()]


def test_process_group(run_on_ranks: RunOnRanks) -> None:
    results = run_on_ranks(4, wrap_in_subgroups)
    for a, b in ((0, 1), (2, 3)):
        assert all(torch.equal(x, y) for x, y in zip(results[a], results[b], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


def wrap_as_one_of_many(world_size: int) -> tuple[int, list[float]]:
    """One rank of a huge group under torch's fake process group; the numel of its state and its losses."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=world_size - 7, world_size=world_size, store=FakeStore())
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=2)
    losses = []
    for _ in range(2):
        loss = loss_of(model(torch.ones(4, 7)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(s["exp_avg"].numel() for s in optimizer.state.values() if s), losses


@pytest.mark.slow
def test_one_rank_of_ten_thousand(run_on_ranks: RunOnRanks) -> None:
    from measure import run_fresh

    ((state_numel, losses),) = run_fresh(1, wrap_as_one_of_many, 10_000)
    assert state_numel <= 32
    assert all(0 < loss < 100 for loss in losses)


def wrap_without_memory(cls: type, name: str) -> tuple[str, str, bool]:
    """On rank 1 memory gives out in the second call of a method. What is raised there and on the others; whether all is as it was."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    net = build("mlp")
    before = [param.detach().clone() for param in net.parameters()]
    inner = optimizer_for("adamw", net)
    method, calls = getattr(cls, name), count()

    def give_out(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1 and rank == 1:
            raise torch.OutOfMemoryError("16 GiB")
        return method(*args, **kwargs)

    options: dict[str, Any] = {"bucket_mb": 0.001, "sync_module_states": False}
    with patch.object(cls, name, give_out), pytest.raises(Exception) as raised:
        zeroopt.wrap(net, inner, **options)
    same = all(map(torch.equal, before, net.parameters()))
    alone = all(param.untyped_storage().nbytes() == param.nbytes for param in net.parameters())
    model, optimizer = zeroopt.wrap(net, inner, **options)
    loss_of(model(batch("mlp", 0))).backward()
    optimizer.step()
    return type(raised.value).__name__, str(raised.value), same and alone


@pytest.mark.parametrize(
    ("cls", "name", "what"),
    [
        (Bucket, "hold_params", "moving parameters into buckets"),
        (GradientStore, "__init__", "making room for gradients"),
    ],
)
def test_memory_that_gives_out_is_told_to_all(run_on_ranks: RunOnRanks, cls: type, name: str, what: str) -> None:
    """And wrapping can be tried again."""
    (here, told, is_whole), (there, error, is_whole_there) = run_on_ranks(2, wrap_without_memory, cls, name)
    assert (there, error) == ("OutOfMemoryError", "16 GiB")
    assert (here, told) == ("RankMismatchError", f"{what} failed on rank 1: 16 GiB")
    assert is_whole and is_whole_there
