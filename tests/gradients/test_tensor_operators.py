"""Operators on param.grad of stages 1 and 2 give what they give on the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import loss_of, snapshot
from worker_pool import RunOnRanks

import zeroopt

VARIANTS: list[dict[str, Any]] = [
    {"stage": 1, "bucket_mb": 0.0005},
    {"stage": 2, "transport": "pairwise"},
    {"stage": 2, "param_dtype": torch.bfloat16},  # sums are float32
]


class Shapes(nn.Module):
    """Parameters of several shapes and memory formats; some ranks have nothing of some of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.number, self.pair = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(2))
        self.matrix = nn.Parameter(torch.randn(9, 7).t())
        self.image = nn.Parameter(torch.randn(3, 5, 2, 2).to(memory_format=torch.channels_last))
        self.nothing = nn.Parameter(torch.ones(0, 3))

    def forward(self) -> Tensor:
        return loss_of(torch.cat([param.flatten().float() for param in self.parameters()]) + dist.get_rank())


def sample(like: Tensor, seed: int) -> Tensor:
    """Of the same shape, with positive and negative elements."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def set_masked(grad: Tensor) -> None:
    if grad.dim():
        grad[sample(grad, 1) > 0] = 0.25


def multiply_rows(grad: Tensor) -> None:
    if grad.dim():
        grad.mul_(torch.randn((*grad.shape[:-1], 1), generator=seeded()))


OPERATORS: dict[str, Callable[[Tensor], object]] = {
    "+= number": lambda grad: grad.__iadd__(1.5),
    "+= tensor": lambda grad: grad.__iadd__(sample(grad, 1)),
    "add_ alpha": lambda grad: grad.add_(sample(grad, 1), alpha=0.1),
    "add_ itself": lambda grad: grad.add_(grad),
    "sub_ of float64": lambda grad: grad.sub_(sample(grad, 1).double()),
    "mul_ tensor": lambda grad: grad.mul_(sample(grad, 1)),
    "mul_ mask": lambda grad: grad.mul_(sample(grad, 1) > 0),
    "mul_ rows": multiply_rows,
    "div_ tensor": lambda grad: grad.div_(sample(grad, 1)),
    "div_ mode": lambda grad: grad.div_(0.3, rounding_mode="floor"),
    "pow_": lambda grad: grad.pow_(2),
    "abs_, sqrt_": lambda grad: grad.abs_().sqrt_(),
    "neg_": lambda grad: grad.neg_(),
    "sign_": lambda grad: grad.sign_(),
    "tanh_": lambda grad: grad.tanh_(),
    "lerp_": lambda grad: grad.lerp_(sample(grad, 1), 0.3),
    "lerp_ tensor": lambda grad: grad.lerp_(sample(grad, 1), sample(grad, 2)),
    "addcmul_": lambda grad: grad.addcmul_(sample(grad, 1), sample(grad, 2), value=0.5),
    "addcdiv_": lambda grad: grad.addcdiv_(sample(grad, 1), sample(grad, 2), value=-1),
    "clamp_ numbers": lambda grad: grad.clamp_(-0.5, 0.7),
    "clamp_ tensors": lambda grad: grad.clamp_(min=sample(grad, 1), max=sample(grad, 2)),
    "clamp_min_": lambda grad: grad.clamp_min_(0.0),
    "copy_": lambda grad: grad.copy_(sample(grad, 1)),
    "copy_ 0-dim": lambda grad: grad.copy_(torch.tensor(0.3)),
    "fill_": lambda grad: grad.fill_(0.1),
    "fill_ tensor": lambda grad: grad.fill_(torch.tensor(0.1)),
    "masked_fill_": lambda grad: grad.masked_fill_(sample(grad, 1) > 0, 0.2),
    "[mask] =": set_masked,
    "nan_to_num_": lambda grad: grad.div_(sample(grad, 1) > 0).nan_to_num_(0.1, 1.0, -1.0),
    "gt_": lambda grad: grad.gt_(0.2),
    "out": lambda grad: torch.mul(grad, sample(grad, 1), out=grad),
    "out of others": lambda grad: torch.maximum(sample(grad, 1), sample(grad, 2), out=grad),
    "normal_": lambda grad: grad.normal_(0.5, 2.0, generator=seeded()),
    "uniform_": lambda grad: grad.uniform_(-1, 1, generator=seeded()),
    "bernoulli_": lambda grad: grad.bernoulli_(0.3, generator=seeded()),
    "detach_": lambda grad: grad.detach_(),
    "foreach add number": lambda grad: torch._foreach_add_([grad], 0.5),
    "foreach add": lambda grad: torch._foreach_add_([torch.ones(2), grad], [torch.ones(2), sample(grad, 1)], alpha=2),
    "foreach mul": lambda grad: torch._foreach_mul_([grad, torch.ones(2)], [sample(grad, 1), torch.ones(2)]),
    "foreach scalars": lambda grad: torch._foreach_mul_([torch.ones(3), grad], [1.0, 2.0]),
    "foreach div": lambda grad: torch._foreach_div_([grad], [sample(grad, 1)]),
    "foreach lerp": lambda grad: torch._foreach_lerp_([grad], [sample(grad, 1)], 0.3),
    "foreach clamp": lambda grad: torch._foreach_clamp_max_([grad], 0.2),
    "foreach copy": lambda grad: torch._foreach_copy_([grad], [sample(grad, 1)]),
    "foreach sign": lambda grad: torch._foreach_sign_([grad]),
    "foreach addcmul": lambda grad: torch._foreach_addcmul_(
        [torch.ones(2), grad], [torch.ones(2), sample(grad, 1)], [torch.ones(2), sample(grad, 2)], [1.0, 0.3]
    ),
    "foreach addcmul tensor": lambda grad: torch._foreach_addcmul_(
        [torch.ones(2), grad],
        [torch.ones(2), sample(grad, 1)],
        [torch.ones(2), sample(grad, 2)],
        torch.tensor([1, 0.3]),
    ),
}


def apply_all() -> list[str]:
    """What differs from the same operator on a whole tensor."""
    wrong = []
    for options in VARIANTS:
        net = Shapes()
        model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), **options)
        model().backward()
        for name, operator in OPERATORS.items():
            for param in net.parameters():
                start = sample(param, 0)
                expected = torch.empty_like(param, dtype=torch.float32).copy_(start)
                with torch.no_grad():
                    param.grad.copy_(start).mul_(0.5).mul_(2.0)  # type: ignore[union-attr]  a factor is still to come
                    operator(expected)
                    result = operator(param.grad)  # type: ignore[arg-type]
                assert not isinstance(result, Tensor) or result is param.grad
                got = optimizer.full_grad(param)
                assert got is not None
                if not torch.allclose(got, expected, rtol=1e-6, atol=1e-7, equal_nan=True):
                    wrong.append(f"{name} of shape {list(param.shape)}, {options}: {got} is not {expected}")
    return wrong


@pytest.mark.parametrize("world_size", [1, 3])
def test_operators_do_what_they_do_to_whole_tensors(run_on_ranks: RunOnRanks, world_size: int) -> None:
    for wrong in run_on_ranks(world_size, apply_all):
        assert wrong == []


def add_noise_of_each_rank() -> list[Tensor]:
    """Every rank draws its own. Under DDP, its parameters would no longer be those of the others."""
    net = Shapes()
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1))
    torch.manual_seed(dist.get_rank())
    model().backward()
    for param in net.parameters():
        param.grad.add_(torch.randn_like(param)).normal_()  # type: ignore[union-attr]
    optimizer.step()
    return snapshot(net)


def test_ranks_stay_alike_whatever_they_add(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, add_noise_of_each_rank)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def use_in_backward(use: str) -> str:
    """In a hook, while autograd is at work: its own way to add is not the user's."""
    net = Shapes()
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1))
    model().backward()
    grad = net.pair.grad
    assert grad is not None
    edits: dict[str, Callable[[], Tensor]] = {
        "number": lambda: grad.add_(1.0),
        "alpha": lambda: grad.add_(torch.ones(2), alpha=0.5),
        "clamp_": lambda: grad.clamp_(0, 1),
    }
    net.matrix.register_hook(lambda _: edits[use]() and None)
    with pytest.raises(zeroopt.StateError) as error:
        model().backward()
    return str(error.value)


@pytest.mark.parametrize("use", ["number", "alpha", "clamp_"])
def test_gradients_are_not_changed_during_backward(run_on_ranks: RunOnRanks, use: str) -> None:
    for message in run_on_ranks(2, use_in_backward, use):
        assert message.startswith("a sharded gradient was used while backward runs")


MISTAKES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "The expanded size of the tensor": lambda grad, _: grad.add_(torch.ones(2, 3)),
    "not implemented for": lambda grad, _: grad.bitwise_and_(torch.ones(7, 9, dtype=torch.int64)),
    "add_ with elements of a sharded gradient": lambda grad, other: grad.add_(other),
    "_foreach_mul_ with elements of a sharded gradient": lambda grad, other: torch._foreach_mul_([grad], [other]),
    "add_ of param.grad cannot be called within join()": lambda grad, _: grad.add_(1),
}


def make_mistakes() -> list[str]:
    net = Shapes()
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1))
    model().backward()
    before = optimizer.full_grad(net.matrix)
    messages = []
    for text, mistake in MISTAKES.items():
        with pytest.raises(RuntimeError) as error, model.join(enable="join" in text):
            mistake(net.matrix.grad, net.pair.grad)  # type: ignore[arg-type]
        messages.append(str(error.value))
    after = optimizer.full_grad(net.matrix)
    assert before is not None and after is not None and torch.equal(before, after)
    return messages


def test_mistakes_are_found_on_all_ranks(run_on_ranks: RunOnRanks) -> None:
    """Also on those that have nothing of the parameter."""
    for messages in run_on_ranks(3, make_mistakes):
        for text, message in zip(MISTAKES, messages, strict=True):
            assert text in message
