"""The state of a rank's segments as it stands in a state dict: parts are ShardTensors, the rest is as it was."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from lone_slice import LoneSlice, buckets_of, params_of, values
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroopt import ops
from zeroopt.options.precision import Precision
from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.plan.regions import FlatLayout
from zeroopt.state.entries import block_of, is_array, map_leaves, map_tensors, on_cpu, pack_state, pack_value
from zeroopt.state.shard_tensor import ShardTensor
from zeroopt.storage.segment import Segment


class Default(defaultdict[str, Any]):
    """A dict that is made in a way of its own."""

    def __init__(self, x: Any) -> None:
        super().__init__(list, x=x)

    def __copy__(self) -> Default:
        return Default(self["x"])


class Pair(NamedTuple):
    first: Any
    second: Any


def segment_of(shape: Sequence[int], start: int = 0, numel: int | None = None, grain: Grain = Grain.ELEMENT) -> Segment:
    owner = ManagedParam("p", nn.Parameter(torch.zeros(shape)), 0, 0, 0, grain)
    numel = owner.numel - start if numel is None else numel
    shard = nn.Parameter(torch.zeros(shape) if owner.is_whole else torch.zeros(numel))
    return Segment(owner, start, 0, numel, shard, torch.float32)


def test_leaves_are_replaced_wherever_they_lie() -> None:
    seen: dict[Any, Any] = {}
    value = {"a": 1, "b": [2, (3, {"c": None})], "d": {}, "e": ()}
    assert map_leaves(value, lambda path, leaf: (path, leaf), ("top",)) == {
        "a": (("top", "a"), 1),
        "b": [(("top", "b", 0), 2), ((("top", "b", 1, 0), 3), {"c": (("top", "b", 1, 1, "c"), None)})],
        "d": {},
        "e": (),
    }
    map_leaves(7, seen.__setitem__)
    assert seen == {(): 7}, "a value by itself"


def test_only_tensors_are_replaced_and_nothing_is_changed_in_place() -> None:
    tensor, text = torch.ones(2), "text"
    value = {"a": [tensor, text]}
    mapped = map_tensors(value, lambda one: one * 2)
    assert mapped["a"][0].tolist() == [2, 2] and mapped["a"][1] is text
    assert value["a"][0] is tensor


def test_named_tuples_stay_what_they_are() -> None:
    assert map_leaves(Pair(1, [2]), lambda _, leaf: 10 * leaf) == Pair(10, [20])


def test_tensors_go_to_the_cpu_out_of_containers_of_any_class() -> None:
    with FakeTensorMode():
        there = torch.ones(2, device="cuda")
        moved = on_cpu({"pair": Pair(there, 0.99), "ordered": OrderedDict(a=1, b=[there]), "default": Default(there)})
    assert type(moved["pair"]) is Pair and moved["pair"].first.is_cpu and moved["pair"].second == 0.99
    assert type(moved["ordered"]) is OrderedDict and moved["ordered"]["b"][0].is_cpu
    assert type(moved["default"]) is Default and moved["default"]["x"].is_cpu and moved["default"]["y"] == []


def test_tensors_go_to_the_cpu_out_of_plain_containers() -> None:
    pair, here = Pair(0.9, 0.99), torch.ones(2)
    with FakeTensorMode():
        there = torch.ones(2, device="cuda")
        moved = on_cpu({"lr": there, "betas": (there, 0.99), "more": [there], "text": "text"})
    assert [one.device.type for one in (moved["lr"], moved["betas"][0], moved["more"][0])] == ["cpu"] * 3
    assert moved["betas"][1] == 0.99 and moved["text"] == "text"
    kept = on_cpu({"pair": pair, "here": here})
    assert kept["pair"] is pair and kept["here"] is here


def test_scales_have_an_element_for_each_block() -> None:
    assert block_of("exp_avg_scale") == ops.QUANT_BLOCK
    assert block_of("exp_avg") == block_of("some_scale") == block_of("step") == 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("exp_avg", torch.zeros(5), True),
        ("exp_avg", torch.zeros(5, dtype=torch.int8), True),
        ("exp_avg", torch.zeros(()), False),
        ("exp_avg", torch.zeros(1, 5), False),
        ("exp_avg", 1.0, False),
        ("step", torch.zeros(5), False),
        ("exp_avg_scale", torch.zeros(1), True),
        ("exp_avg_scale", None, False),
    ],
)
def test_what_is_an_array(name: str, value: Any, expected: bool) -> None:
    assert is_array(name, value, segment_of([3, 4], 2, 5)) is expected


def test_a_part_becomes_a_shard_of_the_whole() -> None:
    segment, step = segment_of([3, 4], 2, 5), torch.tensor(3.0)
    array = torch.arange(5.0)
    packed = pack_value("exp_avg", array, segment)
    assert isinstance(packed, ShardTensor)
    assert (packed.shape, packed.start, packed.stop) == ((3, 4), 2, 7)
    assert packed.local.data_ptr() == array.data_ptr(), "live"
    nested = pack_value("history", {"a": [array, None], "count": step}, segment)
    assert isinstance(nested["a"][0], ShardTensor) and nested["a"][1] is None
    assert nested["count"] is step is pack_value("step", step, segment)
    assert pack_value("note", "text", segment) == "text"


@pytest.mark.parametrize("grain", [Grain.ELEMENT, Grain.PARAMETER])
def test_state_of_all_elements_has_the_shape_of_the_parameter(grain: Grain) -> None:
    segment = segment_of([3, 4], grain=grain)
    array = torch.arange(12.0).view(segment.shard.shape)
    packed = pack_value("exp_avg", array, segment)
    assert type(packed) is Tensor and packed.tolist() == torch.arange(12.0).view(3, 4).tolist()
    assert packed.data_ptr() == array.data_ptr()


class Part(ManagedParam):
    """The second half of a larger tensor, as of a DTensor."""

    @property
    def flat_layout(self) -> FlatLayout:
        return FlatLayout.of(self.shape, self.stride, [6, 4], [3, 0])


def test_state_of_all_elements_of_a_part_is_a_shard_too() -> None:
    owner = Part("p", nn.Parameter(torch.zeros(3, 4)), 0, 0, 0)
    segment = Segment(owner, 0, 0, 12, nn.Parameter(torch.zeros(12)), torch.float32)
    packed = pack_value("exp_avg", torch.arange(12.0), segment)
    assert isinstance(packed, ShardTensor) and packed.shape == (6, 4)
    assert [box.offsets for box in packed.boxes] == [(3, 0)]


def test_scales_of_a_part_are_a_shard_of_all_scales() -> None:
    block = ops.QUANT_BLOCK
    segment = segment_of([5, block], 2 * block, block + 1)
    packed = pack_value("exp_avg_scale", torch.tensor([1.0, 2.0]), segment)
    assert isinstance(packed, ShardTensor) and (packed.shape, packed.start, packed.stop) == ((5,), 2, 4)
    whole = torch.ones(5)
    assert pack_value("exp_avg_scale", whole, segment_of([5, block])) is whole


@pytest.mark.parametrize("index", range(3))
def test_every_rank_has_an_entry_for_every_position(index: int) -> None:
    shapes = [(70,), (3,), (40, 2)]
    params = params_of(*(values(shape, seed) for seed, shape in enumerate(shapes)))
    for managed, position in zip(params, (5, 2, 9), strict=True):
        managed.position = position
    before = {managed.position: managed.param.detach().clone() for managed in params}
    (bucket,) = buckets_of(params, LoneSlice(3, index), precision=Precision())
    state = {
        segment.shard: {"step": torch.tensor(1.0), "exp_avg": segment.shard.detach().clone()}
        for segment in bucket.segments
    }
    packed = pack_state(state, bucket.segments, params)
    assert list(packed) == [2, 5, 9]
    mine = {segment.owner.position: segment for segment in bucket.segments}
    for position, entry in packed.items():
        if position not in mine:
            assert entry == {}
            continue
        segment, array = mine[position], entry["exp_avg"]
        assert list(entry) == ["step", "exp_avg"]
        flat = array.local if isinstance(array, ShardTensor) else array.flatten()
        expected = before[position].flatten()[segment.start : segment.start + segment.numel]
        assert torch.equal(flat, expected) and array.shape == before[position].shape
    assert pack_state({}, bucket.segments, params) == {2: {}, 5: {}, 9: {}}, "no state yet"
