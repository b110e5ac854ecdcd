"""One rank of a training run under DeepSpeed that leaves checkpoints, and what DeepSpeed itself says is in them.

    python deepspeed_rank.py RANK WORLD_SIZE FOLDER

trains each of `CASES`, saves a checkpoint under FOLDER/<case>, and goes on for some steps. Rank 0 writes
FOLDER/<case>.said, the `Said` of that case, and makes universal checkpoints of those in `UNIVERSAL`, in
FOLDER/<case>/universal. Only `main` needs DeepSpeed; tests take the model, the optimizers and the batches from here.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WORLD_SIZE = 2
BATCH = 12  # of all ranks
SAVED_AFTER = 3
CONTINUED = 3


class Net(nn.Module):
    """Odd sizes, tied weights, a frozen layer, buffers, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 18)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.up = nn.Linear(18, 23)
        self.frozen = nn.Linear(23, 23)
        self.norm = nn.LayerNorm(23)
        self.down = nn.Linear(23, 18, bias=False)
        self.out = nn.Linear(18, 37, bias=False)
        self.out.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.linspace(0, 1, 23))
        self.register_buffer("version", torch.tensor(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embed(tokens)) * self.scale)
        hidden = hidden + self.shift.to(hidden.dtype)
        return self.out(self.down(self.norm(self.frozen(hidden))))


def make_net() -> nn.Module:
    torch.manual_seed(1234)
    return Net()


def inputs(step: int, rank: int, world_size: int) -> Tensor:
    """A rank's part of a batch that is the same at every world size."""
    tokens = torch.randint(0, 37, (BATCH, 6), generator=torch.Generator().manual_seed(step))
    return tokens.chunk(world_size)[rank]


def loss_of(output: Tensor) -> Tensor:
    output = output.float()
    return (output.logsumexp(dim=-1) - output[..., 0]).mean()


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    """Three groups, neither in the order of the model nor with the frozen layer in a group of its own."""
    params = dict(net.named_parameters())
    vectors = [name for name, param in params.items() if param.dim() < 2]
    return [
        {"params": [params[name] for name in vectors], "weight_decay": 0.0, "lr": 0.02},
        {"params": [params["down.weight"], params["frozen.weight"]], "weight_decay": 0.2},
        {"params": [params["up.weight"], params["embed.weight"]]},
    ]


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(net), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)


def amsgrad(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups_of(net), lr=0.01, amsgrad=True)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups_of(net), lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """How DeepSpeed is configured.

    Attributes:
        zero: of its "zero_optimization".
        config: further entries.
        keep_frozen: whether the checkpoint holds frozen parameters.
    """

    zero: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    keep_frozen: bool = True

    @property
    def is_bf16(self) -> bool:
        return "bf16" in self.config


BF16 = {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}

ROUND_ROBIN = "stage2_round_robin"

CASES = {
    "stage1": Case({"stage": 1}),
    ROUND_ROBIN: Case({"stage": 2, "round_robin_gradients": True}),
    "stage2_aligned": Case({"stage": 2, "parameter_alignment": True}, keep_frozen=False),
    "stage1_elastic": Case({"stage": 1, "elastic_checkpoint": True}),
    "stage1_amsgrad": Case({"stage": 1}, optimizer=amsgrad),
    "stage2_sgd_not_zipped": Case({"stage": 2}, {"checkpoint": {"checkpoint_serialization": False}}, sgd),
    "stage1_bf16": Case({"stage": 1}, BF16),
    "stage2_bf16": Case({"stage": 2}, BF16 | FLOAT32_SUMS),
    "bf16_optimizer": Case({"stage": 1}, BF16 | FLOAT32_SUMS),
    "stage3": Case({"stage": 3}),
}
UNIVERSAL = ("stage1", "stage2_bf16", ROUND_ROBIN)


@dataclass
class Said:
    """What DeepSpeed says of the state that it saved, and how it went on.

    Attributes:
        masters: float32 parameters by name.
        state: optimizer state by the name of the parameter.
        step: of the optimizer; 0 where it counts none.
        losses: of all ranks together, after the checkpoint.
        after: masters after those steps.
    """

    masters: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    step: float
    losses: list[float]
    after: dict[str, Tensor]


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(engine(inputs(step, dist.get_rank(), dist.get_world_size())))
        engine.backward(loss)
        engine.step()
        total = loss.detach().float()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def masters_of(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    if in_turns(optimizer):
        return in_order(optimizer, {i: p for i, p in enumerate(optimizer.single_partition_of_fp32_groups)})
    return {
        name: safe_get_full_fp32_param(param).clone() for name, param in net.named_parameters() if param.requires_grad
    }


def state_of(net: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = [optimizer.optimizer.state[group["params"][0]] for group in optimizer.optimizer.param_groups]
    keys = sorted({key for state in flat for key, value in state.items() if value.dim() > 0})
    params = {name: param for name, param in net.named_parameters() if param.requires_grad}
    if in_turns(optimizer):
        whole = {key: in_order(optimizer, {i: state[key] for i, state in enumerate(flat)}) for key in keys}
        return {name: {key: whole[key][name] for key in keys} for name in params}
    optimizer._hp_optimizer_states_linked = False  # it looked when only the first group had been stepped
    optimizer._lazy_init_hp_params_optimizer_state()
    return {
        name: {key: safe_get_full_optimizer_state(param, key).clone() for key in keys} for name, param in params.items()
    }


def in_turns(optimizer: Any) -> bool:
    """Whether parameters are in the order of `round_robin_gradients`, which DeepSpeed's `safe_get_full_…` do not know."""
    return getattr(optimizer, "round_robin_gradients", False)


def in_order(optimizer: Any, partitions: dict[int, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, from this rank's partition of each group, where DeepSpeed's own buffers have them."""
    whole = {}
    for group, partition in partitions.items():
        parts = [torch.empty_like(partition.detach()) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, partition.detach())
        params, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
        for param, offset in zip(params, offsets, strict=True):
            values = torch.cat(parts)[offset : offset + param.numel()]
            whole[optimizer.param_names[param]] = values.view(param.shape).clone()
    return whole


def run(case: Case, folder: Path) -> Said | None:
    import deepspeed

    net = make_net()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": case.zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        **case.config,
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=case.optimizer(net), config=config)
    train(engine, range(SAVED_AFTER))
    client_state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}, "notes": Path("of the user")}
    engine.save_checkpoint(str(folder), client_state=client_state, exclude_frozen_parameters=not case.keep_frozen)
    if case.zero["stage"] == 3:
        return None
    masters, state = masters_of(net, optimizer), state_of(net, optimizer)
    step = max(float(state.get("step", 0)) for state in optimizer.optimizer.state.values())
    losses = train(engine, range(SAVED_AFTER, SAVED_AFTER + CONTINUED))
    return Said(masters, state, step, losses, masters_of(net, optimizer))


def make_universal(folder: Path) -> None:
    """With the workers in this process."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(folder / f"global_step{SAVED_AFTER}"), "output_folder": str(folder / "universal")}
    ds_to_universal.main(Namespace(**options, **folders, inject_missing_state=False))


def main(rank: int, world_size: int, folder: Path) -> None:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled here and now
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    deepspeed.init_distributed("gloo", verbose=False)
    for name, case in CASES.items():
        said = run(case, folder / name)
        if rank == 0 and said is not None:
            torch.save(vars(said), folder / f"{name}.said")
    dist.destroy_process_group()
    if rank == 0:
        for name in UNIVERSAL:
            make_universal(folder / name)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
