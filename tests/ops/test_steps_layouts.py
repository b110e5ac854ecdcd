"""Steps over segments of every length, beginning anywhere, in any order, on any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import OPS, Op
from step_cases import FEW_STORAGES, FLOAT32, STORAGES, Stored, check_step, run, storage_name, threads

from zeroopt import ops

LENGTHS = [*range(1, 71), *(m + d for m in (128, 256, 320, 512, 768, 1000, 1024, 4096, 8192) for d in (-1, 0, 1))]

each_op = pytest.mark.parametrize("name", OPS)
each_storage = pytest.mark.parametrize("storage", FEW_STORAGES, ids=storage_name)


def names_of(op: Op, storage: ops.Storage) -> list[str]:
    """Of all arrays of a segment."""
    return list(Stored(op, storage, 1).raw)


@each_op
@each_storage
class TestOneSegment:
    def test_every_length_and_start(self, name: str, storage: ops.Storage) -> None:
        """Every array of a segment begins elsewhere."""
        op = OPS[name]
        names = names_of(op, storage)
        segments = [
            Stored(
                op,
                storage,
                numel,
                seed=numel,
                key=numel,
                first=numel % 11,
                shifts={array: (numel * (1 + i)) % 17 for i, array in enumerate(names)},
            )
            for numel in LENGTHS
        ]
        before = [segment.values() for segment in segments]
        run(segments)
        for segment, values in zip(segments, before, strict=True):
            check_step(segment, values, 3)
            assert segment.guards_are_intact(), segment.numel

    def test_every_start_gives_the_same_bits(self, name: str, storage: ops.Storage) -> None:
        op = OPS[name]
        for numel in (63, 1000):
            aligned = Stored(op, storage, numel)
            run([aligned])
            for array in names_of(op, storage):
                shifted = [Stored(op, storage, numel, shifts={array: shift}) for shift in range(1, 17)]
                run(shifted)
                for segment in shifted:
                    assert segment.copies() == aligned.copies(), array
                    assert segment.guards_are_intact()


SIZES = [1, 5, 16, 64, 1000, 70_003, 7, 20_000, 63, 30_000, 256, 4096]


def many_segments(op: Op, storage: ops.Storage) -> list[Stored]:
    """Of all sizes, over more elements than one thread takes, each option of the op being a group."""
    return [
        Stored(
            op,
            storage,
            numel,
            hyper=op.hyper(**op.options[number % len(op.options)]),
            group=number % len(op.options),
            seed=number,
            key=number,
            first=100 * number,
            shifts={"param": number % 3, "grad": number % 5},
        )
        for number, numel in enumerate(SIZES)
    ]


@each_op
@each_storage
class TestManySegments:
    def test_groups_steps_and_activity_are_each_segments_own(self, name: str, storage: ops.Storage) -> None:
        """A segment does in a crowd what it does alone; inactive ones are not touched."""
        op = OPS[name]
        together, alone = many_segments(op, storage), many_segments(op, storage)
        untouched = [segment.everything() for segment in together]
        steps = torch.arange(float(len(SIZES)))
        active = torch.tensor([number not in (3, 7) for number in range(len(SIZES))], dtype=torch.uint8)
        run(together, steps=steps, active=active)
        assert steps.tolist() == [number + active[number].item() for number in range(len(SIZES))]
        for number, segment in enumerate(together):
            assert segment.guards_are_intact()
            if not active[number]:
                assert segment.everything() == untouched[number]
                continue
            alone[number].group = 0
            run([alone[number]], steps=torch.tensor([float(number)]))
            assert segment.copies() == alone[number].copies(), number
            assert segment.everything() != untouched[number]

    def test_threads_and_the_order_of_rows_do_not_matter(self, name: str, storage: ops.Storage) -> None:
        op = OPS[name]
        results = []
        for count, order in ((1, 1), (2, 1), (2, -1), (3, 1)):
            segments = many_segments(op, storage)
            with threads(count):
                run(segments[::order])
            results.append([segment.copies() for segment in segments])
        assert all(result == results[0] for result in results)


@each_op
class TestNothingToDo:
    def test_no_segments(self, name: str) -> None:
        op = OPS[name]
        ops.OPTIMIZERS[name](
            ops.SegmentTable(FLOAT32, [], op.signed),
            active=torch.empty(0, dtype=torch.uint8),
            steps=torch.empty(2, 0),
            groups=torch.empty(0, len(op.defaults), dtype=torch.float64),
        )

    def test_no_active_segment(self, name: str) -> None:
        segments = [Stored(OPS[name], numel=numel) for numel in (5, 500)]
        before = [segment.everything() for segment in segments]
        steps = run(segments, active=torch.zeros(2, dtype=torch.uint8))
        assert steps.tolist() == [2, 2]
        assert [segment.everything() for segment in segments] == before


@st.composite
def layouts(draw: st.DrawFn) -> list[Stored]:
    """Segments of one op and one storage, of any lengths, starts and groups."""
    op = OPS[draw(st.sampled_from(sorted(OPS)))]
    storage = draw(st.sampled_from(STORAGES))
    numel = st.one_of(st.integers(1, 300), st.sampled_from([511, 512, 513, 1024, 4095, 4096, 4097]))
    shifts = st.fixed_dictionaries({array: st.integers(0, 16) for array in names_of(op, storage)})
    options = draw(st.lists(st.sampled_from(op.options), min_size=1, max_size=3))
    segments = []
    for number, length in enumerate(draw(st.lists(numel, min_size=1, max_size=8))):
        group = number if number < len(options) else draw(st.integers(0, len(options) - 1))
        segments.append(
            Stored(
                op,
                storage,
                length,
                hyper=op.hyper(**options[group]),
                group=group,
                seed=number,
                shifts=draw(shifts),
                key=draw(st.integers(0, 2**32 - 1)),
                first=draw(st.integers(0, 2**40)),
            )
        )
    return draw(st.permutations(segments))


@given(
    segments=layouts(),
    step=st.integers(1, 1000),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    data=st.data(),
)
@settings(max_examples=150)
def test_any_layout_follows_the_reference(
    segments: list[Stored], step: int, seed: int, scale: float, data: st.DataObject
) -> None:
    active = data.draw(st.lists(st.booleans(), min_size=len(segments), max_size=len(segments)))
    before = [(segment.values(), segment.everything()) for segment in segments]
    steps = run(
        segments,
        steps=torch.full((len(segments),), step - 1.0),
        active=torch.tensor(active, dtype=torch.uint8),
        control=ops.StepControl(grad_scale=torch.tensor([scale]), seed=seed),
    )
    assert steps.tolist() == [step - 1 + is_active for is_active in active]
    for segment, is_active, (values, everything) in zip(segments, active, before, strict=True):
        assert segment.guards_are_intact()
        if is_active:
            check_step(segment, values, step, factor=1 / scale, seed=seed)
        else:
            assert segment.everything() == everything
