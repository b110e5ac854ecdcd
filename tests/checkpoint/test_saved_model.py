"""A model on the meta device gets its values from a checkpoint, each tensor read into where it will lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import BF16, TIERS, assert_same
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.building.saved import Reading
from zeroopt.checkpoint.exporting import export
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.saved_model import open_saved

Values = dict[str, Tensor]


class Net(nn.Module):
    """Tied and frozen parameters, some without elements, one in another memory format, and buffers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.empty = nn.Linear(width, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).float()).mean((2, 3)).to(self.first.weight.dtype)
        return self.second(self.first(self.frozen(x))).float().square().mean()


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def exact(model: zeroopt.ZeroDataParallel, optimizer: zeroopt.ZeroOptimizer) -> Values:
    """Parameters as exact as they are kept, and buffers, by name."""
    trained = {managed.param for managed in optimizer.state_dicts.params}
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, param in model.named_parameters():
        values[name] = optimizer.full_parameter(param) if param in trained else param.detach().clone()
    return values


def saved(path: Path, options: dict[str, Any]) -> Values:
    """Train, save, and return what was saved."""
    torch.manual_seed(5)
    net = Net()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.1), bucket_mb=0.001, **options)
    for step in range(2):
        x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(step))
        model(x.to(net.conv.weight.dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    zeroopt.checkpoint.save(path, model, optimizer)
    return exact(model, optimizer)


def built(path: Path, options: dict[str, Any]) -> tuple[Values, Values]:
    """Exact values, and those that the model has."""
    net = on_meta(Net)
    optimizer = torch.optim.AdamW(net.parameters())
    model, wrapped = zeroopt.wrap(net, optimizer, bucket_mb=0.001, init=path, **options)
    assert not optimizer.state
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    return exact(model, wrapped), state_dict


def loaded(path: Path, options: dict[str, Any]) -> tuple[Values, Values]:
    """The same of one that is built as usual, and loads the checkpoint."""
    net = Net()
    model, wrapped = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.001, **options)
    zeroopt.checkpoint.load(path, model)
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    return exact(model, wrapped), state_dict


def of_all_options(path: Path, many: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(built(path, options), loaded(path, options)) for options in many]


OPTIONS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1},
    {"share_parameters": True},
    {"sync_module_states": False},
    {"share_parameters": True, "sync_module_states": False},
    *TIERS.values(),
    {"stage": 0, **TIERS["master"]},
    *({"share_parameters": True, **TIERS[tier]} for tier in ("master", "int8", "none")),
    {"share_parameters": True, "sync_module_states": False, **TIERS["remainder"]},
    {"sync_module_states": False, **TIERS["remainder"]},
]


@pytest.mark.parametrize("tier", ["float32", "remainder"])
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 3)])
def test_values_are_those_that_were_saved(
    run_on_ranks: RunOnRanks, tmp_path: Path, writers: int, readers: int, tier: str
) -> None:
    path = tmp_path / "saved"
    written, *_ = run_on_ranks(writers, saved, path, TIERS[tier])
    for of_rank in run_on_ranks(readers, of_all_options, path, OPTIONS):
        for options, (here, there) in zip(OPTIONS, of_rank, strict=True):
            assert_same(here, there, str(options))
            is_rounded = "param_dtype" in options
            if is_rounded == (tier == "remainder") and options.get("master_weights") != "none":
                assert_same(here[0], written, str(options))


def count_read(path: Path, options: dict[str, Any]) -> dict[str, int]:
    """Elements of each parameter that this rank reads."""
    net, counts = on_meta(lambda: nn.Linear(64, 64)), {}
    original = Reading.__call__

    def counted(self: Reading, needed: Any) -> None:
        begin, end = needed(self.tensor)
        counts[self.name] = max(0, end - begin)
        original(self, needed)

    Reading.__call__ = counted  # type: ignore[method-assign]
    try:
        model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), init=path, **options)
        assert torch.equal(optimizer.full_parameter(net.weight), torch.arange(4096.0).view(64, 64))
    finally:
        Reading.__call__ = original  # type: ignore[method-assign]
    assert isinstance(model, zeroopt.ZeroDataParallel)
    return counts


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [4096, 0]),
        ({"sync_module_states": False}, [4096, 4096]),
        ({"share_parameters": True}, [4096, 0]),
        ({"share_parameters": True, "sync_module_states": False}, [4096, 0]),
        ({"share_parameters": True, **TIERS["remainder"]}, [4096, 2016]),
    ],
)
def test_a_host_reads_shared_parameters_once(
    run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any], weights: list[int]
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.arange(4096.0).view(64, 64), "bias": torch.zeros(64)}, path)
    read = [counts["weight"] for counts in run_on_ranks(2, count_read, path, options)]
    assert read[0] == weights[0] and abs(read[1] - weights[1]) <= 64  # padding


class Rotary(nn.Module):
    """A buffer that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


def make_angles(module: nn.Module) -> None:
    if isinstance(module, Rotary):
        module.angles = torch.arange(4.0)


def wrap_meta(build: Callable[[], nn.Module], init: Any, **options: Any) -> nn.Module:
    net = on_meta(build)
    zeroopt.wrap(net, torch.optim.SGD(net.parameters()), init=init, **options)
    return net


def test_functions_make_what_is_in_no_state_dict(tmp_path: Path) -> None:
    usual = Rotary()
    torch.save(usual.state_dict(), tmp_path / "rotary.pt")
    net = wrap_meta(Rotary, [str(tmp_path / "rotary.pt"), make_angles])
    assert_same(dict(net.state_dict()), dict(usual.state_dict()))
    assert torch.equal(net.angles, usual.angles)  # type: ignore[arg-type]


def halve(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.div_(module.weight.sum())


def read_then_divided(path: Path, options: dict[str, Any]) -> Tensor:
    net = on_meta(lambda: nn.Linear(64, 64))
    _, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters()), init=[path, halve], **options)
    return optimizer.full_parameter(net.weight)


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}, TIERS["remainder"]])
def test_functions_find_all_that_was_read(run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]) -> None:
    usual = nn.Linear(64, 64)
    torch.save(usual.state_dict(), tmp_path / "model.pt")
    halve(usual.requires_grad_(False))
    for weight in run_on_ranks(2, read_then_divided, tmp_path / "model.pt", options):
        assert torch.equal(weight, usual.weight)


@pytest.mark.parametrize("form", ["dcp", "dcp alone", "torch.save", "export"])
def test_whatever_plain_torch_has_saved(tmp_path: Path, form: str) -> None:
    usual, path = Rotary(), tmp_path / "saved"
    if form == "dcp":
        dcp.save({"model": usual.state_dict()}, checkpoint_id=path)
    elif form == "dcp alone":  # its names begin with "model."
        dcp.save(usual.state_dict(), checkpoint_id=path)
    elif form == "torch.save":
        torch.save(usual.state_dict(), path)
    else:
        dcp.save({"model": usual.state_dict()}, checkpoint_id=tmp_path / "dcp")
        export(open_checkpoint(tmp_path / "dcp"), path)
    net = wrap_meta(Rotary, [path, make_angles], param_dtype=BF16)
    for name, value in usual.state_dict().items():
        assert torch.equal(net.state_dict()[name], value.bfloat16())


def refused(path: Path, width: int) -> tuple[str, str, bool]:
    net = on_meta(lambda: Net(width))
    try:
        zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), init=path)
    except zeroopt.ZeroOptError as error:
        return type(error).__name__, str(error), all(value.is_meta for value in net.state_dict().values())
    return "nothing", "", False


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in Net().state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("state_dict", "width", "parts"),
    [
        (without("conv.bias"), 8, ["different names", "lacks 'conv.bias'", "the model lacks nothing"]),
        (without("norm.running_mean"), 8, ["lacks 'norm.running_mean'"]),
        ({**without(""), "extra.weight": torch.ones(2)}, 8, ["that lacks nothing", "the model lacks 'extra.weight'"]),
        (without(""), 9, ["parameter 'conv.weight'", "[9, 2, 3, 3]", "[8, 2, 3, 3]", "another model"]),
    ],
    ids=["parameter", "buffer", "unexpected", "shape"],
)
def test_what_is_of_another_model_is_refused_on_all_ranks_alike(
    run_on_ranks: RunOnRanks, tmp_path: Path, state_dict: dict[str, Any], width: int, parts: list[str]
) -> None:
    torch.save(state_dict, tmp_path / "file.pt")
    dcp.save({"model": state_dict}, checkpoint_id=tmp_path / "directory")
    for path in (tmp_path / "file.pt", tmp_path / "directory"):
        first, second = run_on_ranks(2, refused, path, width)
        assert first == second
        kind, text, is_unchanged = first
        assert kind == "CheckpointError" and is_unchanged and all(part in text for part in (*parts, str(path)))


def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    run_on_ranks(2, saved, path, {})
    damaged = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    for kind, text, is_unchanged in run_on_ranks(2, refused, path, 8):
        assert kind == "CheckpointError" and "is damaged" in text and is_unchanged


def refused_by_rank(folder: Path) -> tuple[str, str, bool]:
    return refused(folder / f"{dist.get_rank()}.pt", 8)


def test_ranks_with_different_paths_hear_of_it(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(Net().state_dict(), tmp_path / f"{rank}.pt")
    for kind, text, is_unchanged in run_on_ranks(2, refused_by_rank, tmp_path):
        assert kind == "RankMismatchError" and "0.pt" in text and "1.pt" in text and is_unchanged


def test_a_model_that_has_values_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(zeroopt.ConfigError, match="nothing of this one is there"):
        zeroopt.wrap(net, torch.optim.SGD(net.parameters()), init=tmp_path / "model.pt")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "list.pt")
    for path, match in (
        (tmp_path / "none", "not there"),
        (tmp_path, "not a checkpoint"),
        (tmp_path / "list.pt", "list"),
    ):
        with pytest.raises(zeroopt.CheckpointError, match=match):
            wrap_meta(lambda: nn.Linear(2, 2), path)


def test_parts_are_read_in_the_order_in_which_they_lie(tmp_path: Path) -> None:
    """A part of a tensor of another memory format than that it was saved in."""
    values = torch.randn(4, 3, 2, 2)
    torch.save({"weight": values}, tmp_path / "file.pt")
    dcp.save({"model": {"weight": values}}, checkpoint_id=tmp_path / "directory")
    model = nn.Conv2d(3, 4, 2, bias=False)
    for path in (tmp_path / "file.pt", tmp_path / "directory"):
        into = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
        open_saved(path, model).read("weight", into, 7, 30)
        expected = values.permute(0, 2, 3, 1).flatten()
        assert torch.equal(into.permute(0, 2, 3, 1).flatten()[7:30], expected[7:30])
