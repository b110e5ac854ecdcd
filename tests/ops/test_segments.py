"""What is checked of segments and of the arguments of a step before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import OPS
from step_cases import FLOAT32, Stored, groups_of, table_of
from torch import Tensor

from zeroopt import ops
from zeroopt.errors import ConfigError, NotSupportedError
from zeroopt.ops import SegmentArrays

INT8 = ops.Storage(state_dtype=torch.int8)
MASTER = ops.Storage(torch.bfloat16, "float32")
REMAINDER = ops.Storage(torch.bfloat16, "remainder")


def zeros(numel: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(numel, dtype=dtype, device=device)


def bfloat16(numel: int = 8) -> Tensor:
    return zeros(numel, torch.bfloat16)


def eight_bits(**changes: Any) -> SegmentArrays:
    arrays: dict[str, Any] = {
        "param": zeros(300),
        "states": [zeros(300, torch.int8), zeros(300, torch.uint8)],
        "scales": [zeros(2), zeros(2)],
    }
    return SegmentArrays(**{**arrays, **changes})


WHOLE = torch.zeros(16)
REFUSED: list[tuple[ops.Storage, list[SegmentArrays], str]] = [
    (FLOAT32, [SegmentArrays(zeros(0))], r"expected segments\[0\] to have at least one element"),
    (
        FLOAT32,
        [SegmentArrays(zeros(dtype=torch.int32))],
        r"expected segments\[0\].param to be float32, float64, .*int32",
    ),
    (
        FLOAT32,
        [SegmentArrays(zeros().double())],
        r"expected segments\[0\].param to be torch.float32, got torch.float64",
    ),
    (FLOAT32, [SegmentArrays(zeros()), SegmentArrays(bfloat16())], r"expected segments\[1\].param to be torch.float32"),
    (
        FLOAT32,
        [SegmentArrays(zeros(16)[::2])],
        r"expected segments\[0\].param to be 1-D and contiguous with 8 elements",
    ),
    (FLOAT32, [SegmentArrays(torch.zeros(2, 4))], r"segments\[0\].param to be 1-D .* got shape \[2, 4\]"),
    (FLOAT32, [SegmentArrays(zeros(), bfloat16())], r"expected segments\[0\].grad to be torch.float32, got .*bfloat16"),
    (
        FLOAT32,
        [SegmentArrays(zeros(), zeros(9))],
        r"expected segments\[0\].grad to be 1-D and contiguous with 8 elements",
    ),
    (FLOAT32, [SegmentArrays(zeros(), zeros(1).expand(8))], r"segments\[0\].grad to be 1-D .* strides \(0,\)"),
    (FLOAT32, [SegmentArrays(zeros(), zeros(device="meta"))], r"expected segments\[0\].grad to be on cpu, got meta"),
    (FLOAT32, [SegmentArrays(zeros(), master=zeros())], r"expected segments\[0\].master to be None, got torch.float32"),
    (
        MASTER,
        [SegmentArrays(bfloat16())],
        r"segments\[0\].master to be a tensor of torch.float32 .* master_weights='float32'",
    ),
    (
        MASTER,
        [SegmentArrays(bfloat16(), master=bfloat16())],
        r"segments\[0\].master to be torch.float32, got torch.bfloat16",
    ),
    (MASTER, [SegmentArrays(bfloat16(), master=zeros(7))], r"segments\[0\].master to be 1-D and contiguous with 8"),
    (REMAINDER, [SegmentArrays(bfloat16())], r"segments\[0\].master to be a tensor of torch.int16 .*'remainder'"),
    (
        REMAINDER,
        [SegmentArrays(bfloat16(), master=zeros())],
        r"segments\[0\].master to be torch.int16, got torch.float32",
    ),
    (FLOAT32, [SegmentArrays(zeros(), states=[bfloat16()])], r"expected segments\[0\].states\[0\] to be torch.float32"),
    (FLOAT32, [SegmentArrays(zeros(), states=[None, zeros(4)])], r"segments\[0\].states\[1\] to be 1-D .* 8 elements"),
    (
        FLOAT32,
        [SegmentArrays(zeros(), states=[zeros() for _ in range(4)])],
        r"segments\[0\] to have at most 3 states, got 4",
    ),
    (FLOAT32, [SegmentArrays(zeros(), states=[zeros()], scales=[zeros(1)])], "none otherwise"),
    (INT8, [eight_bits(scales=[])], r"expected segments\[0\] to have scales for every state if states are int8"),
    (INT8, [eight_bits(scales=[zeros(2), None])], "to have scales for every state"),
    (
        INT8,
        [eight_bits(scales=[zeros(2), zeros(1)])],
        r"expected segments\[0\].scales\[1\] to be 1-D and contiguous with 2",
    ),
    (
        INT8,
        [eight_bits(scales=[zeros(2), zeros(2).double()])],
        r"expected segments\[0\].scales\[1\] to be torch.float32",
    ),
    (
        INT8,
        [eight_bits(states=[zeros(300, torch.int8)] * 2)],
        r"segments\[0\].states\[1\] to be torch.uint8, got torch.int8",
    ),
    (INT8, [eight_bits(states=[zeros(300), None])], r"expected segments\[0\].states\[0\] to be torch.int8"),
    (FLOAT32, [SegmentArrays(zeros(), group=-1)], r"segments\[0\] to have a group of at least 0, got -1"),
    (
        FLOAT32,
        [SegmentArrays(zeros(), first=-1)],
        r"segments\[0\] to have a first element of at least 0 and below .*, got -1",
    ),
    (FLOAT32, [SegmentArrays(WHOLE[:8], WHOLE[4:12])], r"segments\[0\].param and segments\[0\].grad not to overlap"),
    (
        FLOAT32,
        [SegmentArrays(WHOLE[:8]), SegmentArrays(WHOLE[7:15])],
        r"segments\[0\].param and segments\[1\].param not to",
    ),
    (FLOAT32, [SegmentArrays(WHOLE[:8], states=[WHOLE[:8]])], r"not to overlap in memory"),
    (
        MASTER,
        [SegmentArrays(WHOLE.bfloat16().view(torch.bfloat16), master=WHOLE, grad=WHOLE)],
        "not to overlap in memory",
    ),
]


class TestTable:
    @pytest.mark.parametrize(("storage", "segments", "message"), REFUSED, ids=[message for *_, message in REFUSED])
    def test_refuses(self, storage: ops.Storage, segments: list[SegmentArrays], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ops.SegmentTable(storage, segments)

    def test_refuses_states_of_which_nothing_is_said(self) -> None:
        with pytest.raises(ConfigError):
            ops.SegmentTable(FLOAT32, [SegmentArrays(zeros(), states=[zeros(), zeros()])], signed=(True,))

    def test_refuses_devices_without_kernels(self) -> None:
        with pytest.raises(
            NotSupportedError, match=r"kernels for CPU and CUDA tensors, segments\[0\].param is on meta"
        ):
            ops.SegmentTable(FLOAT32, [SegmentArrays(zeros(device="meta"))])

    def test_neighbours_do_not_overlap(self) -> None:
        pieces = torch.split(WHOLE, 4)
        table = ops.SegmentTable(FLOAT32, [SegmentArrays(pieces[3], pieces[0]), SegmentArrays(pieces[1], pieces[2])])
        assert table.total_numel == 8

    def test_rows_are_those_of_the_kernels_header(self) -> None:
        segment = eight_bits(grad=zeros(300), group=2, key=7, first=11)
        table = ops.SegmentTable(INT8, [segment])
        states, scales = segment.states, segment.scales
        arrays = [segment.param, None, segment.grad, *states, None, *scales, None]
        addresses = [0 if array is None else array.data_ptr() for array in arrays]
        assert table.rows.tolist() == [[300, 2, 7, 11, *addresses]]
        assert (table.num_groups, table.total_numel, table.device.type) == (3, 300, "cpu")
        assert table.lacks_state(2).tolist() == [True] and table.lacks_grad.tolist() == [False]


class TestSetGrads:
    def table(self) -> ops.SegmentTable:
        self.params = [zeros(8), zeros(3)]
        self.grads = [zeros(8), zeros(3)]
        pairs = zip(self.params, self.grads, strict=True)
        return ops.SegmentTable(FLOAT32, [SegmentArrays(param, grad) for param, grad in pairs])

    def test_steps_by_the_new_ones(self) -> None:
        table = self.table()
        grads = [torch.ones(2, 4), None]
        table.set_grads(grads)
        assert table.lacks_grad.tolist() == [False, True]
        ops.sgd(
            table,
            active=torch.tensor([1, 0], dtype=torch.uint8),
            steps=torch.zeros(2, 2),
            groups=torch.tensor([[0.5, 0, 0, 0, 0, 0]], dtype=torch.float64),
        )
        assert self.params[0].tolist() == [-0.5] * 8
        assert self.params[1].tolist() == [0] * 3

    @pytest.mark.parametrize(
        ("grads", "message"),
        [
            ([bfloat16(), zeros(3)], r"expected grads\[0\] to .* torch.float32 .* got .* torch.bfloat16"),
            ([zeros(8), zeros(4)], r"expected grads\[1\] to have 3 elements .* got 4"),
            ([zeros(8), zeros(3, device="meta")], r"expected grads\[1\] to .* on cpu, got .* on meta"),
            ([zeros(8)], None),
            ([zeros(8), zeros(3), zeros(3)], None),
        ],
        ids=["dtype", "numel", "device", "too few", "too many"],
    )
    def test_errors_leave_the_table_unchanged(self, grads: list[Tensor], message: str | None) -> None:
        table = self.table()
        before = table.rows.clone()
        with pytest.raises(ConfigError, match=message):
            table.set_grads(grads)
        assert torch.equal(table.rows, before)

    def test_refuses_what_a_step_writes(self) -> None:
        memory = [torch.zeros(24), torch.zeros(24)]
        segments = [
            SegmentArrays(memory[0][:8], states=[memory[1][:8]]),
            SegmentArrays(memory[0][16:24], states=[memory[1][12:20]]),
        ]
        table = ops.SegmentTable(FLOAT32, segments)
        apart = [memory[0][8:16], memory[1][:12][8:12].repeat(2)]
        table.set_grads(apart)
        for number, grad in [(0, memory[0][1:9]), (1, memory[0][9:17]), (0, memory[0][:8]), (1, memory[1][11:19])]:
            with pytest.raises(ConfigError, match=rf"grads\[{number}\] not to overlap .* what a step writes"):
                table.set_grads([grad if number == place else apart[place] for place in range(2)])
        table.set_grads([apart[0], apart[0]])  # both only read

    def test_refuses_negated_views(self) -> None:
        with pytest.raises(ConfigError, match=r"grads\[0\] .* negated view .* call .resolve_neg"):
            self.table().set_grads([torch._neg_view(zeros()), zeros(3)])


def call_of(name: str) -> dict[str, Any]:
    segments = [Stored(OPS[name], numel=8), Stored(OPS[name], numel=9)]
    return {
        "table": table_of(segments),
        "active": torch.ones(2, dtype=torch.uint8),
        "steps": torch.zeros(2, 2),
        "groups": groups_of(segments),
    }


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"active": torch.ones(2)}, "expected active to be torch.uint8, got torch.float32"),
    ({"active": zeros(3, torch.uint8)}, r"expected active to be contiguous of shape \[2\], got \[3\]"),
    ({"active": zeros(4, torch.uint8)[::2]}, r"expected active to be contiguous of shape \[2\]"),
    ({"active": zeros(2, torch.uint8, "meta")}, "expected active to be on cpu, got meta"),
    ({"steps": torch.zeros(2, 2).double()}, "expected steps to be torch.float32, got torch.float64"),
    ({"steps": zeros(2)}, r"expected steps to be contiguous of shape \[2, 2\], got \[2\]"),
    ({"steps": torch.zeros(2, 2, device="meta")}, "expected steps to be on cpu, got meta"),
    (
        {"groups": torch.zeros(1, 9, dtype=torch.float64)},
        r"expected groups to be contiguous of shape \[1, \d\], got \[1, 9\]",
    ),
    (
        {"groups": torch.zeros(6, dtype=torch.float64)},
        r"expected groups to be contiguous of shape \[6, \d\], got \[6\]",
    ),
    (
        {"groups": torch.zeros((), dtype=torch.float64)},
        r"expected groups to be contiguous of shape \[0, \d\], got \[\]",
    ),
    ({"groups": torch.zeros(1, 6)}, "expected groups to be torch.float64, got torch.float32"),
    (
        {"control": ops.StepControl(grad_scale=torch.ones(1).double())},
        "expected grad_scale to be one element of float32",
    ),
    (
        {"control": ops.StepControl(clip_coef=torch.ones(2))},
        "expected clip_coef to be one element of float32, got 2 of",
    ),
    (
        {"control": ops.StepControl(found_inf=zeros(1, torch.int32))},
        "found_inf to be one element of float32, got 1 of .*int32",
    ),
    ({"control": ops.StepControl(found_inf=zeros(1, device="meta"))}, "expected found_inf to be on cpu, got meta"),
    ({"control": ops.StepControl(seed=-1)}, r"expected seed to be at least 0 and below 2\*\*64, got -1"),
    ({"control": ops.StepControl(seed=2**64)}, "expected seed to be at least 0 and below"),
]


@pytest.mark.parametrize("name", OPS)
class TestArguments:
    @pytest.mark.parametrize(("changes", "message"), ARGUMENTS, ids=[message for _, message in ARGUMENTS])
    def test_refuses(self, name: str, changes: dict[str, Any], message: str) -> None:
        call = call_of(name)
        before = [segment.param.clone() for segment in call["table"].segments]
        with pytest.raises(ConfigError, match=message):
            ops.OPTIMIZERS[name](**{**call, **changes})
        assert all(map(torch.equal, before, (segment.param for segment in call["table"].segments)))
        assert call["steps"].tolist() == [[0, 0], [0, 0]]

    def test_refuses_too_few_groups(self, name: str) -> None:
        segments = [Stored(OPS[name]), Stored(OPS[name], group=2)]
        groups = torch.tensor([list(OPS[name].hyper().values())] * 2, dtype=torch.float64)
        with pytest.raises(ConfigError, match="a row for every group of segments, at least 3, got 2"):
            ops.OPTIMIZERS[name](**call_of(name) | {"table": table_of(segments), "groups": groups})

    def test_gradients_and_states_may_lack_where_inactive_only(self, name: str) -> None:
        op = OPS[name]
        used = [k for k, state in enumerate(op.states) if state in op.states_of(op.defaults)]
        for lacking in (None, *used):  # the gradient, or a state
            whole, part = (Stored(op, numel=8).arrays for _ in range(2))
            states = [None if k == lacking else array for k, array in enumerate(part.states)]
            part = SegmentArrays(part.param, None if lacking is None else part.grad, states=states)
            table = ops.SegmentTable(FLOAT32, [whole, part])
            call = call_of(name) | {"table": table}
            with pytest.raises(ConfigError, match="to have a gradient" if lacking is None else rf"states\[{lacking}\]"):
                ops.OPTIMIZERS[name](**call)
            assert call["steps"].tolist() == [[0, 0], [0, 0]]
            ops.OPTIMIZERS[name](**call | {"active": torch.tensor([1, 0], dtype=torch.uint8)})
            assert call["steps"].tolist() == [[1, 0], [0, 0]]


def test_amsgrad_needs_its_state() -> None:
    segments = [Stored(OPS["adamw"], numel=8), Stored(OPS["adamw"], numel=9)]
    groups = torch.tensor([list(OPS["adamw"].hyper(amsgrad=1).values())], dtype=torch.float64)
    call = call_of("adamw") | {"table": table_of(segments), "groups": groups}
    with pytest.raises(ConfigError, match=r"expected states\[2\] of the active segments whose group has column 6 set"):
        ops.adamw(**call)
