"""A small transformer, the plans that split it over ranks, and training loops to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import zeroopt
from zeroopt.options.precision import round_master

BATCH, LENGTH, VOCABULARY, WIDTH, HEAD = 4, 6, 37, 16, 4


class Attention(nn.Module):
    """As many heads as the projections on this rank give."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for project in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / HEAD**0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 26), nn.GELU(), nn.Linear(26, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Embedding, a block, a head, and a 0-dim parameter that no plan splits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.block = Block()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(tokens)))) * self.scale


def build(dtype: torch.dtype = torch.float32) -> Transformer:
    """The model, with the same weights wherever it is built."""
    torch.manual_seed(1234)
    return Transformer().to(dtype)


def _split_heads_and_hidden(out: RowwiseParallel) -> dict[str, Any]:
    columns = ("block.attention.q", "block.attention.k", "block.attention.v", "block.mlp.0")
    rows = ("block.attention.out", "block.mlp.2")
    return {**{name: ColwiseParallel() for name in columns}, **{name: out for name in rows}}


PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    # Matrices of the block are split; embedding, norms and head stay plain tensors on every rank.
    "tensor": lambda: _split_heads_and_hidden(RowwiseParallel()),
    # The sequence is split between the matrices too, so that norms have a part of their gradient on each rank.
    "sequence": lambda: {
        **_split_heads_and_hidden(RowwiseParallel(output_layouts=Shard(1))),
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "block.attention_norm": SequenceParallel(),
        "block.attention": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "block.mlp_norm": SequenceParallel(),
        "block.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def build_split(plan: str, mesh: Mesh, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model, its parameters split over the mesh's "tp" dimension."""
    return parallelize_module(build(dtype), mesh["tp"], PLANS[plan]())


Mesh = dict[str, DeviceMesh]
"""This rank's one-dimensional meshes, by the name of the dimension."""

_mesh_numbers = count()


def make_mesh(**sizes: int) -> Mesh:
    """All ranks as a mesh of dimensions of these names and sizes.

    torch calls them otherwise each time: it remembers how it distributed what over a mesh, process groups included, and takes
    a mesh of a test before, whose groups are gone, for this one.
    """
    number = next(_mesh_numbers)
    names = {name: f"{name}{number}" for name in sizes}
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(names.values()))
    return {name: mesh[names[name]] for name in sizes}


def square_mesh() -> Mesh:
    """Four ranks as data-parallel x tensor-parallel."""
    return make_mesh(dp=2, tp=2)


def tokens(step: int, index: int) -> Tensor:
    """The batch of a data-parallel rank."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)


def loss_of(logits: Tensor, batch: Tensor) -> Tensor:
    """Cross entropy of a token given itself and the others."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())


def whole(value: Tensor) -> Tensor:
    """A copy of a parameter in full, wherever its parts are. Collective in its mesh."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def local(value: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_params(model: nn.Module) -> list[Tensor]:
    return [whole(param) for param in model.parameters()]


OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """Without foreach, which takes no plain tensors beside DTensors."""
    return torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)


def sgd(params: Iterable[Any]) -> torch.optim.Optimizer:
    """What clipping does to a gradient shows in the parameters as it is."""
    return torch.optim.SGD(params, lr=0.1, foreach=False)


def train_alone(
    factory: OptimizerFactory, dtype: torch.dtype, steps: int, clip: tuple[float, float] | None = None
) -> tuple[list[float], list[list[Tensor]]]:
    """The whole model in one process, on the batches of both data-parallel ranks: norms, and parameters after each step."""
    model = build(dtype)
    optimizer = factory(model.parameters())
    norms, history = [], []
    for step in range(steps):
        batch = torch.cat([tokens(step, index) for index in range(2)])
        loss_of(model(batch), batch).backward()
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), *clip).item())
        optimizer.step()
        optimizer.zero_grad()
        history.append(whole_params(model))
    return norms, history


def average_gradients(model: nn.Module, group: dist.ProcessGroup) -> list[Tensor]:
    """What data parallelism has to do to the gradients of a split model, one after the other; returns local float32 sums."""
    sums = []
    for param in model.parameters():
        grad = param.grad
        assert grad is not None
        if isinstance(grad, DTensor):
            grad = grad.redistribute(placements=param.placements)
        mean = local(grad).float() / group.size()
        dist.all_reduce(mean, group=group)
        local(grad).copy_(mean)
        param.grad = grad
        sums.append(mean)
    return sums


def train_split(plan: str, mesh: Mesh, steps: int, param_dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    """The split model under a plain data-parallel loop: this rank's parts of the parameters after each step.

    With `param_dtype`, float32 masters are stepped, and rounded.
    """
    model = build_split(plan, mesh)
    masters = [nn.Parameter(local(param).detach().clone()) for param in model.parameters()]
    if param_dtype is not None:
        model.to(param_dtype)
        write_rounded(model, masters)
    optimizer = adamw(model.parameters() if param_dtype is None else masters)
    history = []
    for step in range(steps):
        backward(model, mesh, step)
        sums = average_gradients(model, mesh["dp"].get_group())
        if param_dtype is not None:
            for master, total in zip(masters, sums, strict=True):
                master.grad = total
        optimizer.step()
        if param_dtype is not None:
            write_rounded(model, masters)
        model.zero_grad()
        history.append(parts(model))
    return history


@torch.no_grad()
def write_rounded(model: nn.Module, masters: Iterable[Tensor]) -> None:
    """Set this rank's parts of the parameters to their masters, as zeroopt rounds them: with ties away from zero."""
    for param, master in zip(model.parameters(), masters, strict=True):
        local(param).copy_(round_master(master.detach(), param.dtype))


def wrap_split(
    plan: str, mesh: Mesh, factory: OptimizerFactory = adamw, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    """The split model, bare and wrapped, and its optimizer; in several buckets."""
    net = build_split(plan, mesh, dtype)
    group = mesh["dp"].get_group()
    return net, *zeroopt.wrap(net, factory(net.parameters()), process_group=group, bucket_mb=0.004, **options)


def backward(model: nn.Module, mesh: Mesh, step: int) -> None:
    """Gradients of this data-parallel rank's batch."""
    batch = tokens(step, mesh["dp"].get_local_rank())
    loss_of(model(batch), batch).backward()


def parts(model: nn.Module) -> list[Tensor]:
    """Copies of this rank's parts of the parameters."""
    return [local(param).detach().clone() for param in model.parameters()]
