"""What others see of a bucket (parameters, gradients, state) looks as if torch had made it, and savers write it alone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transports import hosts, resident_pages
from whole_optimizers import Lars
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.optim import FusedLAMB
from zeroopt.options.precision import ALIGNMENT_BYTES
from zeroopt.own_storage import with_own_storage
from zeroopt.state.entries import map_leaves
from zeroopt.state.shard_tensor import ShardTensor

BF16 = torch.bfloat16
Factory = Callable[[Any], torch.optim.Optimizer]


@pytest.mark.parametrize(
    "part",
    [
        torch.arange(24.0)[3:10],
        torch.arange(24.0)[5],
        torch.arange(24.0)[4:4],
        torch.arange(24.0, dtype=BF16)[6:18].view(4, 3).t(),
        torch.arange(24, dtype=torch.int8)[6:18].view(3, 1, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.arange(24.0)[6:18].view(3, 1, 2, 2).as_strided((3, 1, 2, 2), (4, 1, 2, 1)),
    ],
    ids=["1-D", "0-dim", "empty", "transposed", "contiguous", "channels last"],
)
def test_same_elements_in_a_storage_of_their_own(part: Tensor) -> None:
    own = with_own_storage(part)
    assert torch.equal(own, part) and own.data_ptr() == part.data_ptr()
    assert (own.shape, own.stride(), own.dtype) == (part.shape, part.stride(), part.dtype)
    assert flaws_of(own) == []
    before = part._version
    own.zero_()
    assert not part.any() and part._version == before


def test_memory_goes_with_its_last_part() -> None:
    pages = mmap(-1, 4096)
    memory = weakref.ref(pages)
    buffer = torch.frombuffer(pages, dtype=torch.float32)
    parts = [with_own_storage(buffer[:8]), with_own_storage(buffer[8:20].view(3, 4))]
    del pages, buffer
    parts.pop(0)
    assert memory() is not None and parts[0].sum() == 0
    parts.clear()
    gc.collect()
    assert memory() is None


def flaws_of(tensor: Tensor, *, aligned: bool = False) -> list[str]:
    """In what a tensor differs from one that torch makes."""
    storage = tensor.untyped_storage()
    flaws = []
    if tensor.storage_offset() != 0 or storage.nbytes() != tensor.numel() * tensor.element_size():
        flaws.append(f"{tensor.numel()} elements of {tensor.dtype} in {storage.nbytes()} bytes")
    if aligned and tensor.data_ptr() % ALIGNMENT_BYTES:
        flaws.append(f"begins {tensor.data_ptr() % ALIGNMENT_BYTES} bytes behind a multiple of {ALIGNMENT_BYTES}")
    return flaws


class Net(nn.Module):
    """Sizes that nothing divides, memory formats, an empty and a 0-dim parameter; runs its layers in reverse."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(13, 13, bias=i % 2 == 0) for i in range(5))
        self.conv = nn.Conv2d(1, 3, (2, 1)).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(13, 5).t())
        self.empty, self.scale = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(1.5))
        self.later = nn.Linear(13, 13)
        self.uses_later = False
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*reversed(self.layers), *([self.later] if self.uses_later else [])):
            x = torch.tanh(layer(x)) * self.scale
        return (x @ self.turned.t()).sum() + self.conv(x.view(1, 1, -1, 1)).sum() + self.empty.sum()


def seen(net: nn.Module, optimizer: zeroopt.ZeroOptimizer) -> Iterator[tuple[str, Tensor, bool]]:
    """All that others get to see, and whether it has to be aligned."""
    for name, param in net.named_parameters():
        yield name, param.data, True
        if isinstance(param.grad, Tensor) and optimizer.stage == 0:
            yield f"{name}.grad", param.grad, True
    for name, value in net.state_dict().items():
        yield f"state_dict[{name}]", value, True
    for bucket in optimizer._trained.buckets:
        for segment in bucket.segments:
            yield f"shard of {segment.owner.name}", segment.shard.data, True
    found: list[tuple[str, Tensor, bool]] = []

    def note(path: Any, value: Any) -> None:
        if isinstance(value, ShardTensor):
            value = value.local
        if isinstance(value, Tensor):
            found.append((f"state {path}", value, str(path[-1]) in ("exp_avg", "exp_avg_sq", "master_param", "buffer")))

    for entry in optimizer.state.values():
        map_leaves(entry, note)
    for entry in optimizer.state_dict()["state"].values():
        map_leaves(entry, note)
    yield from found


def train(kind: Factory, options: dict[str, Any]) -> tuple[list[str], bool]:
    """Train from wrapping until parameters have come later; returns all flaws, and whether buckets were planned anew."""
    torch.manual_seed(0)
    net = Net(torch.float64 if options.pop("double", False) else torch.float32)
    first = [param for name, param in net.named_parameters() if not name.startswith("later")]
    model, optimizer = zeroopt.wrap(net, kind(first), bucket_mb=0.002, **options)
    flaws: list[str] = []

    def look(when: str) -> None:
        for name, tensor, aligned in seen(net, optimizer):
            flaws.extend(f"{when}, {name}: {flaw}" for flaw in flaws_of(tensor, aligned=aligned))
        for bucket in optimizer._trained.buckets:
            full = optimizer._reducer.stores[bucket.index].full
            for managed in bucket.params if full is not None else ():
                if managed.view_in(full).data_ptr() % ALIGNMENT_BYTES:
                    flaws.append(f"{when}: gradient of {managed.name} on its way")

    look("wrapped")
    before = list(optimizer._trained.buckets)
    for step in range(3):
        model(torch.randn(2, 13, dtype=net.scale.dtype)).backward()
        look(f"backward {step}")
        optimizer.step()
        look(f"step {step}")
        if step == 0:
            replanned = optimizer._trained.buckets != before
            optimizer.zero_grad()
            net.uses_later = True
            optimizer.add_param_group({"params": list(net.later.parameters())})
            look("grown")
    return flaws, replanned


REMAINDER = {"param_dtype": BF16, "master_weights": "remainder"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"stage": 0}),
        (torch.optim.AdamW, {"stage": 0, "transport": "pairwise", "fused": False}),
        (torch.optim.AdamW, {"stage": 1, "double": True}),
        (torch.optim.AdamW, {"stage": 1, "param_dtype": torch.float16, "state_dtype": BF16}),
        (torch.optim.AdamW, {"stage": 2}),
        (torch.optim.AdamW, {"stage": 2, "share_parameters": True}),
        (torch.optim.AdamW, {"stage": 2, "transport": "torch"}),
        (torch.optim.AdamW, {"stage": 2, "transport": "pairwise", "reduce_dtype": BF16}),
        (torch.optim.AdamW, {"stage": 2, **REMAINDER, "state_dtype": torch.int8}),
        (FusedLAMB, {"stage": 0, "param_dtype": BF16}),
        (FusedLAMB, {"stage": 2, "param_dtype": BF16, "share_parameters": True}),
        (FusedLAMB, {"stage": 2, **REMAINDER, "state_dtype": torch.int8}),
        (Lars, {"stage": 1, "double": True}),
        (Lars, {"stage": 2, "transport": "pairwise"}),
    ],
    ids=str,
)
def test_all_that_is_seen_is_as_torch_makes_it(
    run_on_ranks: RunOnRanks, kind: Factory, options: dict[str, Any]
) -> None:
    assert run_on_ranks(2, train, kind, options) == [([], kind is torch.optim.AdamW)] * 2


def train_on_two_hosts() -> list[str]:
    with hosts([2 * rank // 4 for rank in range(4)]):
        return train(torch.optim.AdamW, {"stage": 2})[0]


def test_between_hosts(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(4, train_on_two_hosts) == [[]] * 4


def saved_bytes(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def files_of(module: nn.Module, folder: Path) -> dict[str, Any]:
    """What savers that look at storages write of a module: for each file its length and the values in it. (Which of two names
    a tied parameter gets changes from call to call.)"""
    from huggingface_hub import save_torch_model
    from safetensors.torch import load_file, save_model

    folder.mkdir(parents=True)
    save_torch_model(module, folder)
    save_model(module, folder / "saved.safetensors")
    torch.save(module.state_dict(), folder / "saved.pt")
    files: dict[str, Any] = {}
    for path in folder.iterdir():
        read = torch.load if path.suffix == ".pt" else load_file
        values = sorted(value.flatten().tolist() for value in read(path).values())
        files[path.name] = path.stat().st_size, values
    return files


def save_with_everything(options: dict[str, Any], folder: Path) -> list[str]:
    """Save a model, parts of it and of its state, from wrapping until after planning anew; returns what is written otherwise
    than of a plain model."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    net[5].weight = net[1].weight
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.02, **options)
    dtype, weight = net[2].weight.dtype, net[2].weight
    plain = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6))).to(dtype)
    plain[5].weight = plain[1].weight
    problems = []
    for step in range(2):
        folder = folder / f"rank {dist.get_rank()}, step {step}"
        plain.load_state_dict(net.state_dict())
        expected = files_of(plain, folder / "plain")
        assert len(expected) >= 3
        for what, module in (("wrapped", model), ("inner", net)):
            if files_of(module, folder / what) != expected:
                problems.append(f"step {step}: files of the {what} model")
        model(torch.randn(3, 40, dtype=dtype)).square().mean().backward()
        pairs: dict[str, tuple[Any, Any]] = {
            "layer": (net[2].state_dict(), plain[2].state_dict()),
            "parameter": (weight, plain[2].weight),
        }
        if options["stage"] == 0:
            pairs["gradient"] = weight.grad, plain[2].weight.data
        optimizer.step()
        entry = optimizer.state[weight]
        pairs |= {name: (value, value.clone()) for name, value in entry.items() if value.numel()}
        for what, (mine, theirs) in pairs.items():
            if saved_bytes(mine) != saved_bytes(theirs):
                problems.append(f"step {step}: {what} takes {saved_bytes(mine)} bytes, not {saved_bytes(theirs)}")
        optimizer.zero_grad()
    return problems


@pytest.mark.parametrize(
    "options",
    [{"stage": 0}, {"stage": 1}, {"stage": 2, "share_parameters": True}, {"stage": 2, "param_dtype": BF16}],
    ids=str,
)
def test_savers_write_what_they_write_of_a_plain_model(
    run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("huggingface_hub")
    assert run_on_ranks(2, save_with_everything, options, tmp_path) == [[], []]


def plan_anew(options: dict[str, Any]) -> tuple[int, int, int]:
    """How many buckets there were, how many pages they had, and how many are left when they have been planned anew."""
    net = Net(torch.float32)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.002, **options)
    places = [(bucket.flat_param.data_ptr(), bucket.flat_param.nbytes) for bucket in optimizer._trained.buckets]
    before = sum(resident_pages(*place) for place in places)
    for _ in range(2):
        model(torch.randn(2, 13)).backward()
        optimizer.step()
        gc.collect()
    after = {bucket.flat_param.data_ptr() for bucket in optimizer._trained.buckets}
    assert after.isdisjoint({address for address, _ in places})
    return len(places), before, sum(resident_pages(*place) for place in places)


@pytest.mark.parametrize("options", [{"stage": 0}, {"stage": 2}, {"stage": 2, "share_parameters": True}], ids=str)
def test_planning_anew_frees_the_old_buckets(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    answers = run_on_ranks(2, plan_anew, {**options, "transport": "shm"})
    assert answers[0][1] > 0, "of the second rank only where it has a copy of its own"
    for count, _, left in answers:
        assert count > 1 and left == 0


def copy_and_share() -> list[bool]:
    """A copy of the inner model has memory of its own, may be put into shared memory, and goes through a pickle."""
    net = Net(torch.float32)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.002)
    model(torch.randn(2, 13)).backward()
    optimizer.step()
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(copied, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copied.share_memory()
    same = [all(map(torch.equal, twin.parameters(), net.parameters())) for twin in (copied, loaded)]
    next(copied.parameters()).data.zero_()
    return [*same, bool(next(net.parameters()).any()), all(not flaws_of(p.data) for p in copied.parameters())]


def test_copies(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, copy_and_share) == [[True] * 4] * 2
