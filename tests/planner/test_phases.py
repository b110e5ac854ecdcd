"""The phases of a training, against formulas computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zeroopt import estimate_memory
from zeroopt.planner.estimator import Variant
from zeroopt.planner.phases import PARTS
from zeroopt.planner.runtime import runtime_bytes

WIDTH, LAYERS = 256, 8
LAYER = WIDTH * WIDTH
NUMEL = LAYERS * LAYER  # each layer fills a bucket, and nothing is padded
OPTIONS: dict[str, Any] = {"bucket_mb": LAYER * 4 / 2**20}


def make_model() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def asked(world_size: int, *, device: str = "cpu", sample: bool = False, **options: Any) -> Variant:
    return estimate_memory(
        make_model(),
        torch.optim.AdamW,
        world_size=world_size,
        device=device,
        sample=torch.empty(32, WIDTH, device="meta") if sample else None,
        compare=False,
        **{**OPTIONS, **options},
    ).asked


def parts(variant: Variant, phase: str) -> dict[str, int]:
    return {name: size for name, size in variant.phase(phase).parts.items() if name != "runtime"}


@pytest.mark.parametrize("world_size", [2, 8])
def test_each_stage_holds_what_its_formula_says(world_size: int) -> None:
    own = NUMEL // world_size
    for stage, gradients, state, buffers in ((0, NUMEL, NUMEL, 0), (1, NUMEL, own, 0), (2, own, own, 2 * LAYER)):
        expected = {"parameters": 4 * NUMEL, "gradients": 4 * gradients, "state": 8 * state, "buffers": 4 * buffers}
        held = parts(asked(world_size, stage=stage), "first step")
        assert held == {name: size for name, size in expected.items() if size}, stage


@pytest.mark.parametrize(("count", "levels"), [(1, 0), (2, 1), (8, 3)])
@pytest.mark.parametrize("tier", [{}, {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}])
def test_micro_batches_wait_in_a_gradient_for_each_level_of_their_tree(
    count: int, levels: int, tier: dict[str, Any]
) -> None:
    variant = asked(2, micro_batches=count, **tier)
    for phase in ("first backward", "forward and backward"):
        assert parts(variant, phase).get("unsent", 0) == levels * 4 * NUMEL
    assert "unsent" not in parts(variant, "step")


def test_tiers_and_sharing_hold_what_their_formulas_say() -> None:
    own = NUMEL // 8
    tier = {"param_dtype": torch.bfloat16, "master_weights": "remainder", "state_dtype": torch.int8}
    held = parts(asked(8, share_parameters=True, **tier), "first step")
    assert held == {
        "parameters": 2 * own,
        "masters": 2 * own,
        "gradients": 4 * own,
        "state": 2 * own + 2 * own // 256 * 4,
        "buffers": 2 * 4 * LAYER,  # a bucket has as many bytes in any dtype
    }
    assert "gradients" in parts(asked(8), "first step")
    stepping = parts(asked(8, step_in_backward=True), "first step")
    assert stepping["gradients"] == 4 * LAYER // 8  # the sum of one bucket at a time


def test_what_codes_leave_out_is_held_by_whoever_sends() -> None:
    coded = {"gradient_compression": "int8"}
    for host_ranks, share in ((1, 1), (2, 2), (8, None)):
        held = parts(asked(8, host_ranks=host_ranks, **coded), "forward and backward")
        plain = parts(asked(8, host_ranks=host_ranks), "forward and backward")
        residuals, staging = held.pop("residuals", None), held.pop("staging", 0)
        assert residuals == (None if share is None else 2 * NUMEL // share)
        assert (staging < plain.pop("staging")) if share else (staging == plain.pop("staging", 0))
        assert held == plain
    own_codes = LAYER // 8 // 256 * 260  # of a slice, which is whole blocks
    assert parts(asked(8, host_ranks=1, **coded), "first step")["staging"] == 2 * 8 * own_codes
    moving = parts(asked(8, host_ranks=1, stage=1, **coded), "moving")
    assert moving["residuals"] == 2 * 2 * NUMEL


@pytest.mark.parametrize(("codes", "bits"), [("int8", 8), ("int4", 4)])
def test_parameters_whose_differences_travel_have_exact_values_and_codes_beside_them(codes: str, bits: int) -> None:
    held, plain = (
        parts(asked(8, stage=2, parameter_compression=given), "forward and backward") for given in (codes, None)
    )
    steps = NUMEL // 256 * 4  # one for a block
    assert held == {**plain, "masters": 4 * NUMEL // 8, "codes": NUMEL * bits // 8 + steps}


@pytest.mark.parametrize(
    ("options", "bytes_a_parameter"),
    [
        ({}, 12),
        ({"param_dtype": torch.bfloat16}, 12),
        ({"stage": 0}, 12),
        ({"state_dtype": torch.int8}, 12 + 2 * 4 / 256),
    ],
    ids=str,
)
def test_copies_are_two_of_what_a_rank_steps(options: dict[str, Any], bytes_a_parameter: float) -> None:
    held = parts(asked(8, copies=True, **options), "step")
    assert held["copies"] == 2 * bytes_a_parameter * NUMEL // 8
    assert parts(asked(8, copies=True, host_ranks=4, **options), "step")["copies"] == 2 * held["copies"]
    assert {**parts(asked(8, **options), "step"), "copies": held["copies"]} == held
    assert "copies" not in parts(asked(8, copies=True, device="cuda", **options), "step")


@pytest.mark.parametrize(
    ("options", "bytes_a_parameter"),
    [
        ({"gradient_compression": "int8"}, 2),
        ({"parameter_compression": "int8"}, 4 / 8),
    ],
    ids=str,
)
def test_copies_have_what_codes_make_a_rank_keep(options: dict[str, Any], bytes_a_parameter: float) -> None:
    held, plain = (parts(asked(8, host_ranks=1, copies=True, **given), "step")["copies"] for given in (options, {}))
    assert held == plain + 4 * bytes_a_parameter * NUMEL


def test_wrapping_holds_one_bucket_twice() -> None:
    assert parts(asked(2), "wrapping") == {"parameters": 4 * (NUMEL + LAYER)}
    # With half as many bytes, it is the beginning: the model as it was built, and the first bucket.
    half = parts(asked(8, param_dtype=torch.bfloat16, bucket_mb=LAYER * 2 / 2**20), "wrapping")
    assert half == {"parameters": 4 * NUMEL + 2 * LAYER, "masters": 4 * LAYER // 8}


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}], ids=str)
def test_a_model_that_wrap_builds_is_nowhere_else(options: dict[str, Any]) -> None:
    built = built_by_wrap(**options)
    assert "building" not in [phase.name for phase in built.phases]
    assert parts(built, "wrapping") == {"parameters": 4 * NUMEL // (8 if options else 1)}


def test_a_module_that_wrap_builds_and_rounds_or_that_another_rank_writes_is_made_apart() -> None:
    rounded = parts(built_by_wrap(param_dtype=torch.bfloat16), "wrapping")
    assert rounded == {"parameters": 2 * NUMEL, "masters": 4 * NUMEL // 8, "scratch": 4 * LAYER}
    not_taken_over = parts(built_by_wrap(share_parameters=True, sync_module_states=False), "wrapping")
    assert not_taken_over == {"parameters": 4 * NUMEL // 8, "scratch": 4 * LAYER}


def built_by_wrap(**options: Any) -> Variant:
    """By 8 ranks."""
    return estimate_memory(
        make_model(),
        torch.optim.AdamW,
        world_size=8,
        built_by_wrap=True,
        compare=False,
        **OPTIONS,
        **options,
    ).asked


def test_buffers_are_touched_as_they_are_used_on_a_cpu_and_there_from_the_first_on_a_gpu() -> None:
    assert "buffers" not in parts(asked(8), "wrapping")
    assert parts(asked(8, device="cuda"), "wrapping") == {
        "parameters": 4 * NUMEL,
        "gradients": 4 * NUMEL // 8,
        "buffers": 2 * 4 * LAYER,
    }


def test_what_ranks_of_a_gpu_receive_is_there_while_it_is_summed_and_once() -> None:
    variant = asked(8, device="cuda", bucket_buffers=4)
    with_it = {phase.name: phase.parts.get("staging", 0) for phase in variant.phases}
    assert with_it["first backward"] == with_it["forward and backward"] == 4 * LAYER
    assert with_it["step"] == with_it["saving"] == 0
    ring = asked(8, device="cuda", transport="torch")  # a slice, where a sum is added to an earlier one
    assert ring.phase("forward and backward").parts["staging"] == 4 * LAYER // 8


def test_activations_are_counted_in_forward_and_backward_alone() -> None:
    variant = asked(8, sample=True)
    row = 32 * WIDTH * 4
    for phase in variant.phases:
        has = "activations" in phase.parts
        assert has == (phase.name in ("first backward", "forward and backward"))
        assert list(phase.parts) == [part for part in PARTS if part in phase.parts]
        assert phase.total == sum(phase.parts.values())
    activations = variant.phase("forward and backward").parts["activations"]
    assert LAYERS * row <= activations <= (LAYERS + 2) * row + 4 * LAYER + 4096


def test_slices_are_moved_bucket_by_bucket_beside_the_buffers_of_gradients() -> None:
    own, bucket = NUMEL // 8, 4 * LAYER  # of as many bytes in any dtype
    own_of_bucket = 4 * 2 * LAYER // 8  # in float32, which is what sums and masters are in
    held = parts(asked(8, param_dtype=torch.bfloat16), "moving")
    kept = {"parameters": 2 * NUMEL, "masters": 4 * own, "gradients": 4 * own}
    assert held == {**kept, "buffers": 2 * bucket, "scratch": bucket + own_of_bucket}
    apart = parts(asked(8, param_dtype=torch.bfloat16, stage=1), "moving")  # from the full gradients
    assert apart == {**kept, "gradients": 4 * own + 2 * NUMEL, "scratch": bucket + own_of_bucket}
    stepping = parts(asked(8, step_in_backward=True), "moving")
    assert stepping["state"] == 8 * own and stepping["scratch"] == bucket + 8 * LAYER // 8


def test_sums_that_lie_in_full_gradients_are_copied_before_these_go() -> None:
    own, bucket = NUMEL // 8, 4 * LAYER
    held = parts(asked(8, stage=1), "moving")
    assert held == {"parameters": 4 * NUMEL, "gradients": 4 * NUMEL, "scratch": bucket + 4 * own}


def test_parameters_move_one_after_the_other_when_the_buffers_of_gradients_are_gone() -> None:
    kept = {"parameters": 4 * NUMEL, "gradients": 4 * NUMEL // 8}
    assert parts(asked(8), "moving") == {**kept, "buffers": 2 * 4 * LAYER}  # no slice moves: this is before
    small = parts(asked(8, bucket_mb=OPTIONS["bucket_mb"] / 2, bucket_buffers=1), "moving")  # less than a parameter
    assert small == {**kept, "scratch": 4 * LAYER}


def test_buckets_on_a_gpu_are_there_until_their_last_parameter_has_left() -> None:
    sizes = [
        WIDTH
    ] * 4  # two layers fill a bucket; planned from the last one on, they are used the other way and in turns

    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for size in sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in (1, 3, 0, 2):
                x = self.layers[number](x)
            return x

    with torch.device("meta"):
        net = Interleaved()

    def moving(device: str) -> dict[str, int]:
        sample = torch.empty(1, WIDTH, device="meta")
        options: dict[str, Any] = {"device": device, "bucket_mb": 2 * LAYER * 4 / 2**20, "bucket_buffers": 1}
        variant = estimate_memory(net, torch.optim.AdamW, world_size=8, sample=sample, compare=False, **options).asked
        return parts(variant, "moving")

    # Gradients come in the order 2, 0, 3, 1: the first new bucket takes half of each old one, so that both stay.
    assert moving("cuda") == {
        "parameters": 4 * 4 * LAYER,
        "gradients": 4 * 4 * LAYER // 8,
        "scratch": 2 * 2 * 4 * LAYER,
    }
    assert moving("cpu")["parameters"] == 4 * 4 * LAYER and moving("cpu").get("scratch", 0) <= 4 * LAYER


def test_nothing_is_moved_where_gradients_come_as_was_guessed() -> None:
    assert "moving" not in [phase.name for phase in asked(8, sample=True).phases]
    shuffled = nn.Sequential(*reversed(list(make_model())))
    net = nn.ModuleList(list(shuffled))

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    sample = torch.empty(4, WIDTH, device="meta")

    def planned(**options: Any) -> Variant:
        return estimate_memory(
            Backwards(),
            torch.optim.AdamW,
            world_size=8,
            device="cpu",
            sample=sample,
            compare=False,
            **{**OPTIONS, **options},
        ).asked

    assert "moving" in [phase.name for phase in planned().phases]
    waiting = [
        parts(planned(overlap=overlap), "first backward")["activations"]
        - parts(planned(overlap=overlap), "forward and backward")["activations"]
        for overlap in (True, False)
    ]
    assert waiting[0] == 0 < LAYER < waiting[1], "the first backward is foreseen where buckets are planned anew"


def test_saving_and_loading_take_what_is_written_and_read() -> None:
    own = NUMEL // 2
    variant = asked(2)
    assert parts(variant, "saving")["scratch"] == 4 * LAYER // 2
    assert parts(variant, "saving in the background")["scratch"] == 12 * own
    assert parts(variant, "loading")["scratch"] == 12 * own
    # 8-bit moments are written, and read, as float32, with a scale for each 256.
    coded = asked(2, state_dtype=torch.int8)
    for name in ("saving in the background", "loading"):
        assert parts(coded, name)["scratch"] == 12 * own + 2 * 4 * own // 256
    # In stage 0 all ranks have the same, of which each writes a share and reads all.
    replicated = asked(2, stage=0)
    assert parts(replicated, "saving in the background")["scratch"] == 12 * own
    assert parts(replicated, "loading")["scratch"] == 12 * NUMEL


def test_messages_take_staging_as_their_transport_says() -> None:
    assert "staging" not in parts(asked(8), "first step")
    own = 4 * LAYER // 8
    assert parts(asked(8, transport="pairwise"), "first step")["staging"] == 7 * own
    hosts = estimate_memory(
        make_model(), torch.optim.AdamW, world_size=16, host_ranks=4, compare=False, **OPTIONS
    ).asked
    assert hosts.transport == "hybrid"
    # The block of a local rank, and the slices of it from three other hosts.
    assert parts(hosts, "first step")["staging"] == 4 * LAYER // 4 + 3 * 4 * LAYER // 16


def test_what_is_not_trained_counts_too() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(10, 10, bias=False))
    net[2].requires_grad_(False)
    estimate = estimate_memory(net, torch.optim.SGD, world_size=1, compare=False)
    assert estimate.parameters == 16 + 8
    buffers = 4 + 4 + 4 + 4 + 8  # mean, variance, and a count of 64 bits
    assert parts(estimate.asked, "step")["rest"] == 400 + sum(b.nbytes for b in net.buffers())
    assert buffers - 8 < sum(b.nbytes for b in net.buffers())


def test_libraries_and_allocators_take_more_beside_more_parameters_and_nothing_before_training() -> None:
    small, middle, large = (runtime_bytes("cpu", parameters) for parameters in (10**6, 10**8, 10**9))
    assert 0 < small < middle < large
    assert middle / 10**8 > large / 10**9, "libraries take the same beside any large model"
    assert runtime_bytes("cuda", 10**9) == 0
    for phase in asked(8, sample=True).phases:
        assert phase.parts.get("runtime", 0) == (
            0 if phase.name in ("building", "wrapping") else runtime_bytes("cpu", 4 * NUMEL)
        )
