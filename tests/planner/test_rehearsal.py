"""A model that is wrapped on the meta device has, in bytes, what each rank of a real group has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.diagnosis.footprint import Footprint, footprint
from zeroopt.errors import ConfigError, NotSupportedError
from zeroopt.planner.estimator import config_in, config_of
from zeroopt.planner.rehearsal import Cluster, Rehearsal, find_trainees
from zeroopt.probing.state_size import StateSize

WIDTH = 96


def make_model(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return nn.Sequential(nn.Embedding(500, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(5)))


BF16 = {"param_dtype": torch.bfloat16}
CASES: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2, "bucket_mb": 0.05},
    {"stage": 2, "bucket_mb": 0.05, "bucket_buffers": 3, "overlap": False},
    {"stage": 2, "share_parameters": True},
    {"stage": 2, "transport": "pairwise"},
    {"stage": 2, "step_in_backward": True, "bucket_mb": 0.05},
    {"stage": 0, **BF16},
    {"stage": 1, **BF16, "bucket_mb": 0.05},
    {"stage": 2, **BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    {"stage": 2, **BF16, "master_weights": "none", "state_dtype": torch.bfloat16},
    {"stage": 1, "reduce_dtype": torch.bfloat16},
]


def storages(tensors: list[Tensor]) -> int:
    """Bytes of the memory of tensors, which may share it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def really_held(cases: list[dict[str, Any]]) -> list[tuple[Footprint, str, int, int]]:
    """Of a rank of a group: what is counted, and the bytes of all memory of parameters and of the optimizer's state."""
    held = []
    for options in cases:
        net = make_model()
        model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), **options)
        trained = optimizer._trained
        transport = model.replica.transport
        counted = footprint(
            trained.buckets, trained.stores, trained.inner, trained.config, transport, model.replica.bucket_bytes
        )
        model(torch.arange(7)).float().square().mean().backward()
        optimizer.step()
        arrays = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
        states = [value for entry in trained.inner.state.values() for name, value in entry.items() if name in arrays]
        params = sum(bucket.flat_param.nbytes for bucket in trained.buckets)
        held.append((counted, transport.name, params, storages(states)))
        del model, optimizer, trained
    return held


def held_in_part(options: dict[str, Any]) -> list[tuple[Footprint, str, int, int]]:
    """Likewise, with state that is cut among pairs of ranks where options say so."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return really_held([{**options, "shard_group": pairs[dist.get_rank() // 2]} if not options else options])


@pytest.mark.parametrize("options", [{}, {"average_every": 3}], ids=["shard_group", "alone"])
def test_state_that_all_ranks_together_hold_several_times(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    net = make_model("meta")
    optimizer = torch.optim.AdamW(net.parameters())
    cluster = Cluster(4, 4, shard_ranks=None if options else 2)
    config = config_in(cluster, options)
    rehearsal = Rehearsal(find_trainees(net, optimizer), config, cluster.training(config))
    planned = footprint(
        rehearsal.buckets, rehearsal.stores, optimizer, config, rehearsal.transport, rehearsal.bucket_bytes
    )
    numel = sum(param.numel() for param in net.parameters())
    assert planned.moments >= 2 * 4 * numel // (1 if options else 2)
    for [(counted, transport, _, _)] in run_on_ranks(4, held_in_part, options):
        assert planned == counted and rehearsal.transport.name == transport


def test_what_goes_across_shard_groups_takes_memory() -> None:
    net = nn.Linear(512, 512, bias=False, device="meta")
    given: dict[str, Any] = {"world_size": 8, "host_ranks": 1, "compare": False}
    flat, cut = (zeroopt.estimate_memory(net, torch.optim.AdamW, shard_ranks=ranks, **given) for ranks in (None, 2))
    assert cut.asked.transport == "replicated" and "state cut among 2" in str(cut)
    flat_parts, parts = (one.asked.phase("forward and backward").parts for one in (flat, cut))
    assert parts["state"] == 2 * 4 * 512 * 512 // 2 == 4 * flat_parts["state"]
    assert parts["staging"] > flat_parts["staging"]
    with pytest.raises(NotSupportedError, match="average_every is not supported with shard_group"):
        zeroopt.estimate_memory(net, torch.optim.AdamW, shard_ranks=2, average_every=3, **given)
    with pytest.raises(ConfigError, match="expected shard_ranks to be 2 or more, to divide world_size=8"):
        zeroopt.estimate_memory(net, torch.optim.AdamW, shard_ranks=3, **given)


def test_bytes_are_those_of_a_really_wrapped_model(run_on_ranks: RunOnRanks) -> None:
    for rank in run_on_ranks(2, really_held, CASES):
        for options, (counted, transport, params, states) in zip(CASES, rank, strict=True):
            net = make_model("meta")
            optimizer = torch.optim.AdamW(net.parameters())
            config = config_of(options)
            rehearsal = Rehearsal(find_trainees(net, optimizer), config, Cluster(2, 2))
            planned = footprint(
                rehearsal.buckets, rehearsal.stores, optimizer, config, rehearsal.transport, rehearsal.bucket_bytes
            )
            assert planned == counted, options
            assert rehearsal.transport.name == transport
            assert sum(bucket.flat_param.nbytes for bucket in rehearsal.buckets) == params
            # Arrays cover the own range; what is shown of them are segments, without the gap at the end of a bucket.
            gap = 2 * config.precision.alignment * len(rehearsal.buckets)
            assert states <= planned.moments <= states + 9 * gap, options


@pytest.mark.parametrize(
    ("ranks", "host_ranks", "device", "options", "expected"),
    [
        (1, 1, "cpu", {}, "single"),
        (8, 8, "cpu", {}, "shm"),
        (400, 8, "cpu", {}, "hybrid"),
        (4, 1, "cpu", {}, "pairwise"),
        (400, 1, "cpu", {}, "tree"),
        (400, 8, "cpu", {"transport": "torch"}, "torch"),
        (400, 8, "cuda", {"transport": "torch"}, "torch"),
        (400, 8, "cuda", {}, "hierarchy"),
        (400, 1, "cuda", {}, "torch"),
        (8, 8, "cuda", {}, "all_to_all"),
        (8, 8, "cuda", {"transport": "torch"}, "torch"),
    ],
)
def test_the_transport_is_the_one_that_would_be_taken(
    ranks: int, host_ranks: int, device: str, options: dict[str, Any], expected: str
) -> None:
    net = make_model("meta")
    trainees = find_trainees(net, torch.optim.AdamW(net.parameters()))
    assert Rehearsal(trainees, config_of(options), Cluster(ranks, host_ranks, device)).transport.name == expected


def test_slices_of_ten_thousand_ranks_are_planned() -> None:
    net = nn.Linear(5_000, 4_000, bias=False, device="meta")
    optimizer = torch.optim.AdamW(net.parameters())
    config = config_of({"stage": 2})
    rehearsal = Rehearsal(find_trainees(net, optimizer), config, Cluster(10_000, 8))
    (bucket,) = rehearsal.buckets
    assert bucket.padded_numel >= 20_000_000 and bucket.padded_numel % (10_000 * 32) == 0
    held = footprint(
        rehearsal.buckets, rehearsal.stores, optimizer, config, rehearsal.transport, rehearsal.bucket_bytes
    )
    assert held.gradients == 4 * bucket.padded_numel // 10_000


def test_the_model_is_left_alone() -> None:
    net = make_model()
    before = {name: (param.data_ptr(), param.clone()) for name, param in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters())
    Rehearsal(find_trainees(net, optimizer), config_of({}), Cluster(4, 4))
    for name, param in net.named_parameters():
        assert param.data_ptr() == before[name][0] and torch.equal(param, before[name][1])
    zeroopt.wrap(net, optimizer)  # nobody else trains it


def test_what_an_optimizer_trains_is_found_in_the_models_order() -> None:
    net = make_model("meta")
    frozen = net[1].weight.requires_grad_(False)
    groups = [{"params": [net[2].bias, frozen]}, {"params": [net[0].weight], "lr": 0.1}]
    trainees = find_trainees(net, torch.optim.AdamW(groups))
    assert [(t.name, t.group, t.position) for t in trainees] == [("0.weight", 1, 2), ("2.bias", 0, 0)]
    assert trainees[0].nbytes == 4 * 500 * WIDTH
    with pytest.raises(ConfigError, match="is not a parameter of the model"):
        find_trainees(net, torch.optim.AdamW([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ConfigError, match="nothing to train"):
        find_trainees(net, torch.optim.AdamW([frozen]))


@pytest.mark.parametrize(("arguments", "expected"), [((10, 4), "multiple of host_ranks"), ((8, 8, "tpu"), "device")])
def test_clusters_that_cannot_be_are_refused(arguments: tuple[Any, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Cluster(*arguments)


def test_ranks_that_cannot_share_parameters_are_told() -> None:
    net = make_model("meta")
    trainees = find_trainees(net, torch.optim.AdamW(net.parameters()))
    with pytest.raises(ConfigError, match="share_parameters=True needs ranks that share memory"):
        Rehearsal(trainees, config_of({"share_parameters": True}), Cluster(8, 8, "cuda"))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_whole_parameters_are_planned_as_such() -> None:
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    optimizer = torch.optim.Muon(net.parameters(), lr=0.1)
    config = config_of({"stage": 2})
    rehearsal = Rehearsal(find_trainees(net, optimizer), config, Cluster(2, 2))
    held = footprint(
        rehearsal.buckets, rehearsal.stores, optimizer, config, rehearsal.transport, rehearsal.bucket_bytes
    )
    own = sum(segment.numel for bucket in rehearsal.buckets for segment in bucket.segments)
    assert own == 2 * 64 * 64
    assert held.moments == 4 * own == 2 * StateSize(optimizer, 0).of_tensor((64, 64), torch.float32)
