"""Data parallelism beside tensor parallelism: parameters that are DTensors, on 2 x 2 ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
    pytest.skip("needs torch 2.5", allow_module_level=True)

import parallel
from parallel import PLANS, backward, parts, square_mesh, whole, whole_params, wrap_split
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from worker_pool import RunOnRanks

import zeroopt

STEPS = 3


def largest_error(values: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(values, expected, strict=True) if a.numel())


def equal(values: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def follow_one_process(plan: str) -> dict[int, float]:
    """Largest difference to the whole model on the whole batch in one process, by stage."""
    mesh = square_mesh()
    _, expected = parallel.train_alone(parallel.adamw, torch.float64, STEPS)
    errors = {}
    for stage in (0, 1, 2):
        net, model, optimizer = wrap_split(plan, mesh, dtype=torch.float64, stage=stage)
        errors[stage] = 0.0
        for step in range(STEPS):
            backward(model, mesh, step)
            optimizer.step()
            optimizer.zero_grad()
            errors[stage] = max(errors[stage], largest_error(whole_params(net), expected[step]))
    return errors


@pytest.mark.parametrize("plan", PLANS)
def test_training_follows_one_process(run_on_ranks: RunOnRanks, plan: str) -> None:
    for errors in run_on_ranks(4, follow_one_process, plan):
        assert all(error < 1e-9 for error in errors.values()), errors


VARIANTS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "transport": "pairwise"},
    {"stage": 2, "transport": "torch", "overlap": False},
    {"stage": 2, "share_parameters": True},
    {"stage": 1, "param_dtype": torch.bfloat16},
    {"stage": 2, "param_dtype": torch.bfloat16},
]


def follow_plain_loop(plan: str) -> list[dict[str, Any]]:
    """The variants that do not give the very bits of an optimizer on the split model, gradients averaged one by one."""
    mesh = square_mesh()
    expected = {dtype: parallel.train_split(plan, mesh, STEPS, dtype) for dtype in (None, torch.bfloat16)}
    different = []
    for options in VARIANTS:
        net, model, optimizer = wrap_split(plan, mesh, fused=False, **options)
        for step in range(STEPS):
            backward(model, mesh, step)
            optimizer.step()
            optimizer.zero_grad()
            if not equal(parts(net), expected[options.get("param_dtype")][step]):
                different.append({**options, "at step": step})
                break
        assert all(p.dtype is options.get("param_dtype", torch.float32) for p in net.parameters())
    return different


@pytest.mark.parametrize("plan", PLANS)
def test_training_follows_a_plain_loop_bit_for_bit(run_on_ranks: RunOnRanks, plan: str) -> None:
    assert run_on_ranks(4, follow_plain_loop, plan) == [[]] * 4


def fused_steps(plan: str) -> float:
    """Largest difference of one fused step to the optimizer's own."""
    mesh = square_mesh()
    results = []
    for fused in (False, True):
        net, model, optimizer = wrap_split(plan, mesh, fused=fused)
        backward(model, mesh, 0)
        optimizer.step()
        results.append(parts(net))
    return largest_error(*results)


def test_fused_step(run_on_ranks: RunOnRanks) -> None:
    assert all(error < 1e-7 for error in run_on_ranks(4, fused_steps, "sequence"))


def see_gradients() -> tuple[float, bool]:
    """Stage 0: `param.grad` is the mean, distributed as the parameter is, also when gradients add up."""
    mesh = square_mesh()
    reference = parallel.build(torch.float64)
    net, model, _ = wrap_split("sequence", mesh, dtype=torch.float64, stage=0)
    for step in range(2):
        batch = torch.cat([parallel.tokens(step, index) for index in range(2)])
        parallel.loss_of(reference(batch), batch).backward()
        backward(model, mesh, step)
    alike = all(
        param.grad.placements == param.placements and param.grad.dtype is param.dtype
        if isinstance(param, DTensor)
        else type(param.grad) is Tensor
        for param in net.parameters()
    )
    return largest_error((whole(p.grad) for p in net.parameters()), (p.grad for p in reference.parameters())), alike


def test_visible_gradients(run_on_ranks: RunOnRanks) -> None:
    for error, alike in run_on_ranks(4, see_gradients):
        assert error < 1e-9 and alike


def accumulate(stage: int) -> float:
    """Two batches under no_sync(), then one with: as one process does with all of them."""
    mesh = square_mesh()
    reference = parallel.build(torch.float64)
    net, model, optimizer = wrap_split("sequence", mesh, parallel.sgd, torch.float64, stage=stage)
    plain = parallel.sgd(reference.parameters())
    for number in range(3):
        batch = torch.cat([parallel.tokens(number, index) for index in range(2)])
        parallel.loss_of(reference(batch), batch).backward()
        if number < 2:
            with model.no_sync():
                backward(model, mesh, number)
        else:
            backward(model, mesh, number)
    plain.step()
    optimizer.step()
    return largest_error(whole_params(net), reference.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_sync(run_on_ranks: RunOnRanks, stage: int) -> None:
    assert all(error < 1e-9 for error in run_on_ranks(4, accumulate, stage))


CLIP = (0.05, 2.0)


def clip_as_torch_does(stage: int, how: str) -> tuple[float, float, float]:
    """Gradients of two backward passes, clipped over all parts of the model by torch's function or by `max_grad_norm`, scaled by
    a GradScaler or not: errors of norms, of whole gradients, and of parameters against one process."""
    mesh = square_mesh()
    reference = parallel.build(torch.float64)
    plain = parallel.sgd(reference.parameters())
    options = {"max_grad_norm": CLIP[0]} if how == "option" else {}
    net, model, optimizer = wrap_split("sequence", mesh, parallel.sgd, torch.float64, stage=stage, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=how == "scaler")
    norm_error = grad_error = 0.0
    for step in range(2):
        for micro in range(2):
            batch = torch.cat([parallel.tokens(10 * step + micro, index) for index in range(2)])
            parallel.loss_of(reference(batch), batch).backward()
            own = parallel.tokens(10 * step + micro, mesh["dp"].get_local_rank())
            scaler.scale(parallel.loss_of(model(own), own)).backward()
        scaler.unscale_(optimizer)
        full = [optimizer.full_grad(param) for param in net.parameters()]
        assert all(grad is not None for grad in full)
        grads = [param.grad for param in reference.parameters()]
        grad_error = max(grad_error, largest_error((whole(grad) for grad in full if grad is not None), grads))
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), *CLIP)
        if how == "option":
            optimizer.step()
            norm = optimizer.grad_norm
        else:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), *CLIP)
            scaler.step(optimizer)
            scaler.update()
        norm_error = max(norm_error, abs(norm.item() / expected.item() - 1))
        plain.step()
        plain.zero_grad()
        optimizer.zero_grad()
    return norm_error, grad_error, largest_error(whole_params(net), reference.parameters())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("how", ["function", "scaler", "option"])
def test_clipping_follows_one_process(run_on_ranks: RunOnRanks, stage: int, how: str) -> None:
    for norm_error, grad_error, error in run_on_ranks(4, clip_as_torch_does, stage, how):
        assert norm_error < 1e-6 and grad_error < 1e-9 and error < 1e-6


def change_by_elements() -> float:
    """Gradients are changed in place, with tensors that are distributed as their parameters are and with whole ones."""
    mesh = square_mesh()
    reference = parallel.build(torch.float64)
    net, model, optimizer = wrap_split("sequence", mesh, parallel.sgd, torch.float64)
    batch = torch.cat([parallel.tokens(0, index) for index in range(2)])
    parallel.loss_of(reference(batch), batch).backward()
    backward(model, mesh, 0)
    for seed, (plain, param) in enumerate(zip(reference.parameters(), net.parameters(), strict=True)):
        noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        plain.grad.add_(noise).mul_(plain.detach()).clamp_(-0.1, 0.1)  # type: ignore[union-attr]
        param.grad.add_(noise).mul_(param.detach()).clamp_(-0.1, 0.1)  # type: ignore[union-attr]
    full = [optimizer.full_grad(param) for param in net.parameters()]
    return largest_error((whole(grad) for grad in full if grad is not None), (p.grad for p in reference.parameters()))


def test_gradients_are_changed_by_elements(run_on_ranks: RunOnRanks) -> None:
    assert all(error < 1e-9 for error in run_on_ranks(4, change_by_elements))


def keep_copies_equal() -> bool:
    """Ranks have seeds of their own, and yet what is replicated is rounded alike: it stays the same on all ranks."""
    mesh = square_mesh()
    torch.manual_seed(dist.get_rank())
    net, model, optimizer = wrap_split(
        "tensor", mesh, param_dtype=torch.bfloat16, master_weights="none", state_dtype=torch.int8
    )
    for step in range(STEPS):
        backward(model, mesh, step)
        optimizer.step()
        optimizer.zero_grad()
    copies = [param.detach() for param in net.parameters() if not isinstance(param, DTensor)]
    flat = torch.cat([value.flatten() for value in copies])
    everyone = [torch.empty_like(flat) for _ in range(4)]
    dist.all_gather(everyone, flat)
    return len(copies) > 5 and all(torch.equal(flat, other) for other in everyone)


def test_copies_stay_equal_under_stochastic_rounding(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(4, keep_copies_equal) == [True] * 4


class UnevenBeside(nn.Module):
    """A matrix that is copied, and parameters of which one rank has so much more that they take a bucket more."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.copied = nn.Parameter(distribute_tensor(torch.randn(80, 64), mesh, [Replicate()]))
        self.heads = nn.ParameterList(
            nn.Parameter(distribute_tensor(torch.randn(3, 4096), mesh, [Shard(0)])) for _ in range(2)
        )

    def forward(self, pull: Tensor) -> Tensor:
        return (self.copied.to_local() * pull).sum() + sum(head.to_local().square().sum() for head in self.heads)


def keep_copies_equal_in_codes() -> tuple[int, Tensor]:
    """How many buckets there are, and the copied matrix."""
    mesh = square_mesh()
    net = UnevenBeside(mesh["tp"])
    model, optimizer = zeroopt.wrap(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        process_group=mesh["dp"].get_group(),
        transport="pairwise",
        bucket_mb=0.035,
        gradient_compression="int4",
        parameter_compression="int4",
    )
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + mesh["dp"].get_local_rank())
        model(torch.randn(80, 64, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return len(model.replica.buckets), parallel.local(net.copied).detach().clone()


def test_copies_stay_equal_in_codes_though_ranks_have_other_buckets(run_on_ranks: RunOnRanks) -> None:
    results = run_on_ranks(4, keep_copies_equal_in_codes)
    assert len({count for count, _ in results}) == 2
    assert all(torch.equal(copied, results[0][1]) for _, copied in results)


def copy_model(options: dict[str, Any]) -> bool:
    """A copy of a wrapped model is a model like any other, gradients included."""
    mesh = square_mesh()
    net, model, optimizer = wrap_split("sequence", mesh, **options)
    backward(model, mesh, 0)
    optimizer.step()
    twin = copy.deepcopy(net)
    backward(twin, mesh, 1)
    backward(model, mesh, 1)
    same = equal(parts(twin), parts(net)) and equal(
        parts(twin), [parallel.local(p) for p in twin.state_dict().values()]
    )
    return same and all(type(a) is type(b) for a, b in zip(twin.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"stage": 0}, {"param_dtype": torch.bfloat16}])
def test_copies_of_the_model(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    assert run_on_ranks(4, copy_model, options) == [True] * 4


class Pieces(nn.Module):
    """Parameters whose parts are uneven, empty on one rank, or replicated."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.uneven = nn.Parameter(distribute_tensor(torch.randn(5, 3), mesh, [Shard(0)]))
        self.one_row = nn.Parameter(distribute_tensor(torch.randn(1, 3), mesh, [Shard(0)]))
        self.columns = nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(1)]))
        self.copied = nn.Parameter(distribute_tensor(torch.randn(3), mesh, [Replicate()]))
        self.plain = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.uneven, self.one_row, self.columns]
        total = sum((x @ p.full_tensor().sum(0)).square() for p in rows)
        return (total * (x * self.copied.full_tensor() * self.plain).sum()).sum()


def train_pieces(stage: int) -> tuple[float, float]:
    """Differences to the same training in one process: of the parameters, and of the norms."""
    mesh = square_mesh()
    net = Pieces(mesh["tp"])
    values = {name: nn.Parameter(whole(param)) for name, param in net.named_parameters()}
    plain = torch.optim.SGD(values.values(), lr=0.01)
    model, optimizer = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=0.01), stage=stage, process_group=mesh["dp"].get_group(), fused=False
    )
    error = 0.0
    for step in range(2):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        model(x[mesh["dp"].get_local_rank()]).backward()
        for row in x:
            (reference_loss(values, row) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(values.values(), 0.5)
        error = max(error, abs(optimizer.clip_grad_norm_(0.5).item() / norm.item() - 1))
        for each in (plain, optimizer):
            each.step()
            each.zero_grad()
    return largest_error(whole_params(net), values.values()), error


def reference_loss(values: dict[str, nn.Parameter], x: Tensor) -> Tensor:
    """What `Pieces` computes."""
    total = sum((x @ values[name].sum(0)).square() for name in ("uneven", "one_row", "columns"))
    return (total * (x * values["copied"] * values["plain"]).sum()).sum()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_uneven_and_empty_parts(run_on_ranks: RunOnRanks, stage: int) -> None:
    for error, norm_error in run_on_ranks(4, train_pieces, stage):
        assert error < 1e-6 and norm_error < 1e-6


def start_apart() -> tuple[list[Tensor], Tensor]:
    """Data-parallel ranks start from other weights; the first of them gives its parts to the others, also of buffers."""
    mesh = square_mesh()
    torch.manual_seed(mesh["dp"].get_local_rank())
    net = nn.Linear(6, 4)
    net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh["tp"], [Shard(0)]))
    net.frozen = nn.Parameter(distribute_tensor(torch.randn(6, 4), mesh["tp"], [Shard(1)]), requires_grad=False)
    net.register_buffer("table", distribute_tensor(torch.randn(4), mesh["tp"], [Shard(0)]))
    before = whole(net.weight)
    zeroopt.wrap(net, parallel.adamw(net.parameters()), process_group=mesh["dp"].get_group())
    return [whole(value) for value in (*net.parameters(), *net.buffers())], before


def test_sync_module_states(run_on_ranks: RunOnRanks) -> None:
    results = run_on_ranks(4, start_apart)
    assert not torch.equal(results[0][1], results[2][1])
    for values, _ in results:
        assert equal(values, results[0][0])
    assert torch.equal(results[0][0][0], results[0][1])


def save_and_load(stage: int) -> list[str]:
    """What fails of: saving and loading a shard, and loading what plain torch optimizers save."""
    mesh = square_mesh()
    failures = []
    plain = parallel.build_split("tensor", mesh)
    plain_optimizer = parallel.adamw(plain.parameters())
    net, model, optimizer = wrap_split("tensor", mesh, stage=stage, fused=False)
    for step in range(2):
        backward(plain, mesh, step)
        parallel.average_gradients(plain, mesh["dp"].get_group())
        plain_optimizer.step()
        plain.zero_grad()
        backward(model, mesh, step)
        optimizer.step()
        optimizer.zero_grad()
    saved_model, saved = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    distributed = copy.deepcopy(plain_optimizer.state_dict())
    sources = {
        "shard": saved,
        "DTensors": distributed,
        "local tensors": map_state(distributed, parallel.local),
        "full tensors": map_state(distributed, whole),
    }
    backward(plain, mesh, 2)
    parallel.average_gradients(plain, mesh["dp"].get_group())
    plain_optimizer.step()
    for name, source in sources.items():
        net, model, optimizer = wrap_split("tensor", mesh, stage=stage, fused=False)
        model.load_state_dict(saved_model)
        optimizer.load_state_dict(source)
        backward(model, mesh, 2)
        optimizer.step()
        if not equal(parts(net), parts(plain)):
            failures.append(name)
    # An optimizer that has made steps before it is wrapped.
    net = parallel.build_split("tensor", mesh)
    net.load_state_dict(saved_model)
    stepped = parallel.adamw(net.parameters())
    stepped.load_state_dict(distributed)
    model, optimizer = zeroopt.wrap(net, stepped, stage, mesh["dp"].get_group(), fused=False)
    backward(model, mesh, 2)
    optimizer.step()
    if not equal(parts(net), parts(plain)):
        failures.append("wrapped with state")
    return failures


def map_state(state_dict: dict[str, Any], function: Any) -> dict[str, Any]:
    state = {
        position: {name: function(value) if name != "step" else value for name, value in entry.items()}
        for position, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_state_dicts(run_on_ranks: RunOnRanks, stage: int) -> None:
    assert run_on_ranks(4, save_and_load, stage) == [[]] * 4


def load_foreign_state(what: str) -> str:
    mesh = square_mesh()
    net, model, optimizer = wrap_split("tensor", mesh)
    backward(model, mesh, 0)
    optimizer.step()
    net_before = parts(net)
    if what == "part":
        states: list[Any] = [None] * 4
        dist.all_gather_object(states, optimizer.state_dict())
        other = states[dist.get_rank() ^ 1]  # of the other tensor-parallel rank
    else:
        plain = parallel.build_split("tensor", mesh)
        plain_optimizer = parallel.adamw(plain.parameters())
        backward(plain, mesh, 0)
        plain_optimizer.step()
        replicated = [Replicate()]
        other = map_state(
            plain_optimizer.state_dict(),
            lambda value: value.redistribute(placements=replicated) if isinstance(value, DTensor) else value,
        )
    with pytest.raises(zeroopt.StateError) as error:
        optimizer.load_state_dict(other)
    assert equal(parts(net), net_before)
    return str(error.value)


def test_foreign_state_is_refused(run_on_ranks: RunOnRanks) -> None:
    for rank, message in enumerate(run_on_ranks(4, load_foreign_state, "part")):
        assert message.startswith(
            f"the state dict was saved with part=[{1 - rank % 2}] in a mesh of [2], this optimizer has part=[{rank % 2}]"
        )
    for message in run_on_ranks(4, load_foreign_state, "placements"):
        assert "is placed [Shard(dim=" in message and "its state [Replicate()]" in message


def load_shared() -> bool:
    """Where ranks share parameters, one rank writes its host's DTensors, and they stay DTensors."""
    mesh = square_mesh()
    net, model, _ = wrap_split("sequence", mesh, share_parameters=True)
    other = parallel.build_split("sequence", mesh)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(2)
    model.load_state_dict(other.state_dict())
    same_classes = [type(p) for p in net.parameters()] == [type(p) for p in other.parameters()]
    return same_classes and equal(parts(net), parts(other))


def test_loading_shared_parameters(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(4, load_shared) == [True] * 4


def write_in_place() -> float:
    """What is written into a DTensor in place reaches its float32 master."""
    mesh = square_mesh()
    net, model, optimizer = wrap_split("tensor", mesh, parallel.sgd, param_dtype=torch.bfloat16)
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model, mesh, 0)
    optimizer.step()
    return largest_error(parts(net), (torch.ones_like(p) for p in parts(net)))


def test_masters_follow_writes(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(4, write_in_place) == [0.0] * 4


def wrap_bad(case: str) -> str:
    """The error of wrapping what cannot be right."""
    mesh = square_mesh()
    options: dict[str, Any] = {"process_group": mesh["dp"].get_group()}
    net = parallel.build_split("tensor", mesh)
    if case == "world":
        options["process_group"] = None
    elif case == "tp":
        options["process_group"] = mesh["tp"].get_group()
    elif case == "diagonal":
        groups = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
        options["process_group"] = groups[dist.get_rank() in (1, 2)]
    elif case == "fsdp":
        net = fully_shard(nn.Linear(4, 4), mesh=mesh["dp"])
    elif case == "replicated over dp":
        net = nn.Linear(4, 4)
        net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh["dp"], [Replicate()]))
    elif case == "two meshes":
        other = parallel.make_mesh(a=2, b=2)["b"]
        net.scale = nn.Parameter(distribute_tensor(net.scale.detach(), other, [Replicate()]))
    elif case == "partial":
        net.scale = nn.Parameter(DTensor.from_local(net.scale.detach(), mesh["tp"], [Partial()]))
    elif case == "norm_group":
        options["norm_group"] = mesh["tp"].get_group()
    elif case == "norm_group of no group":
        options["norm_group"] = 3
    elif case == "rank 1 alone" and dist.get_rank() == 1:
        net.scale = nn.Parameter(torch.zeros((), dtype=torch.complex64))
    elif case == "stage" and mesh["tp"].get_local_rank() == 1:
        options["stage"] = 1
    elif case == "placements" and mesh["dp"].get_local_rank() == 1:
        net.block.mlp[2].bias = nn.Parameter(distribute_tensor(torch.zeros(32), mesh["tp"], [Shard(0)]))
    before = [p.data_ptr() for p in parts_in_place(net)]
    with pytest.raises(zeroopt.ZeroOptError) as error:
        zeroopt.wrap(net, parallel.adamw(net.parameters()), **options)
    assert before == [p.data_ptr() for p in parts_in_place(net)]
    return f"{type(error.value).__name__}: {error.value}"


def parts_in_place(model: nn.Module) -> list[Tensor]:
    return [parallel.local(param.detach()) for param in model.parameters()]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("world", "ConfigError: 'block.attention.q.weight' is a DTensor on DeviceMesh((tp"),
        ("tp", "ConfigError: 'block.attention.q.weight' is a DTensor on DeviceMesh((tp"),
        (
            "diagonal",
            "RankMismatchError: zeroopt.wrap got different things on different ranks; the first difference: rank 0",
        ),
        ("fsdp", "ConfigError: 'weight' is a DTensor on DeviceMesh((dp"),
        ("replicated over dp", "ConfigError: 'weight' is a DTensor on DeviceMesh((dp"),
        ("two meshes", "NotSupportedError: expected all DTensors of a model on one device mesh, got 'scale' on"),
        ("partial", "NotSupportedError: 'scale' is a DTensor with placements [Partial(sum)]"),
        ("norm_group", "ConfigError: norm_group has ranks ["),
        ("norm_group of no group", "ConfigError: expected norm_group to be a torch.distributed.ProcessGroup"),
        (
            "stage",
            "RankMismatchError: zeroopt.wrap got different things on different ranks; the first difference: rank 0",
        ),
        ("placements", "RankMismatchError: zeroopt.wrap got different things on different ranks; the first difference"),
    ],
)
def test_refusals(run_on_ranks: RunOnRanks, case: str, expected: str) -> None:
    for message in run_on_ranks(4, wrap_bad, case):
        assert message.startswith(expected), message


def test_a_problem_of_one_rank_reaches_the_whole_mesh(run_on_ranks: RunOnRanks) -> None:
    messages = run_on_ranks(4, wrap_bad, "rank 1 alone")
    assert messages[1].startswith("NotSupportedError: parameter 'scale' is torch.strided torch.complex64")
    for rank in (0, 2, 3):
        assert messages[rank].startswith("RankMismatchError: zeroopt.wrap failed on rank"), messages[rank]
        assert "parameter 'scale' is torch.strided torch.complex64" in messages[rank]
