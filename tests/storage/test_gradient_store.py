"""The gradients of a bucket from one backward to the step: what is summed, kept aside, multiplied, and given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone_slice import LoneSlice, buckets_of, config_with, params_of, values
from torch import Tensor

from zeroopt.collectives import Wire
from zeroopt.gradients.norms import note_norms
from zeroopt.options.precision import Precision
from zeroopt.plan.ownership import Ownership
from zeroopt.storage.buffer_pool import BufferPool
from zeroopt.storage.factors import scale_sums
from zeroopt.storage.gradient_store import GradientStore

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
STAGES = (0, 1, 2)
SHAPES = [(5, 7), (), (141,)]  # the last one lies on both ranks


class Store:
    """A store of one bucket, on one of two ranks, and what it works with."""

    def __init__(
        self,
        stage: int,
        dtype: torch.dtype = F32,
        precision: Precision | None = None,
        wire: Wire | None = None,
        bucket_bytes: int = 1 << 20,
    ) -> None:
        self.transport = LoneSlice(2, 1)
        self.params = params_of(*(values(shape, seed, dtype) for seed, shape in enumerate(SHAPES)))
        options: dict[str, Any] = {"precision": precision} if precision else {}
        (self.bucket,) = buckets_of(self.params, self.transport, by_slices=stage > 0, **options)
        self.pool = (
            BufferPool(config_with(wire=wire, bucket_buffers=1), bucket_bytes, self.transport) if stage == 2 else None
        )
        if self.pool is not None:
            self.pool.fit([self.bucket])
        ownership = Ownership(2, 1, by_slices=stage > 0)
        self.store = GradientStore(self.bucket, ownership, wire or Wire(), self.transport, self.pool)

    def backward(self, seed: int, *, wait: bool = True) -> Tensor:
        """Fill the buffer, let it travel, and return what was in the own range."""
        full = self.store.open()
        for managed in self.bucket.params:
            managed.view_in(full).copy_(values(managed.shape, 100 * seed + managed.index))
        filled = self.bucket.within_own_range(full).clone()
        self.store.start_reduce(self.transport)
        if wait:
            self.store.finish()
            self.store.reclaim()
        return filled


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_summed_is_there_when_it_is_finished(stage: int) -> None:
    made = Store(stage)
    store = made.store
    assert (store.is_open, store.is_reducing, store.holds_sum) == (False, False, False)
    assert store.open() is store.open(), "once a backward"
    assert store.is_open
    filled = made.backward(1, wait=False)
    assert (store.is_open, store.is_reducing, store.holds_sum) == (False, True, False)
    store.finish()
    store.finish()
    assert (store.is_reducing, store.holds_sum) == (False, True)
    assert store.reduced.shape == made.bucket.own_param.shape
    assert torch.equal(store.reduced, filled)
    assert filled.any() and store.label == made.bucket.name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("wait", [True, False])
def test_backward_passes_of_one_step_add_up(stage: int, wait: bool) -> None:
    made = Store(stage)
    filled = [made.backward(seed, wait=wait) for seed in (1, 2, 3)]
    made.store.finish()
    torch.testing.assert_close(made.store.reduced, filled[0] + filled[1] + filled[2])
    assert made.store.base is None
    made.store.discard()
    assert torch.equal(made.backward(4), made.store.reduced), "a new sum"


def test_stage_0_leaves_adding_to_autograd_which_sees_the_buffer() -> None:
    made = Store(0)
    assert made.store.sum_is_spread and not made.store.borrows
    full = made.store.open()
    for managed in made.params:
        shown = made.store.gradient_of(managed)
        assert shown.shape == managed.shape and shown is not made.store.gradient_of(managed)
        shown.fill_(managed.index + 1)
        assert managed.view_in(full).unique().tolist() == [managed.index + 1]
    made.backward(1)
    made.store.open()
    assert made.store.base is None


def test_stage_1_keeps_its_sum_in_the_buffer_and_sets_it_aside_for_the_next() -> None:
    made = Store(1)
    made.backward(1)
    full, kept = made.store.open(), made.store.reduced.clone()
    assert made.store.reduced.data_ptr() == made.transport.own_slice(full).data_ptr()
    full.zero_()
    assert made.store.base is not None and torch.equal(made.store.base, kept)


def test_zeros_in_stage_1_are_added_without_being_set_aside() -> None:
    made = Store(1)
    made.backward(1)
    made.store.zero()
    full = made.store.open()
    assert made.store.base is None
    full.fill_(-0.0)
    made.store.start_reduce(made.transport)
    made.store.finish()
    assert not made.store.reduced.signbit().any(), "0 + -0 is 0"


@pytest.mark.parametrize("how", ["an edit", "a factor"])
def test_zeros_that_somebody_has_changed_are_set_aside(how: str) -> None:
    made = Store(1)
    made.backward(1)
    made.store.zero()
    segment = made.bucket.segments[0]
    if how == "an edit":
        made.store.part(segment).fill_(3.0)
    else:
        scale_sums([made.store], torch.tensor(torch.inf))  # of which nothing is left but NaN
    filled = made.backward(2)
    changed = made.store.reduced - filled
    piece = changed[segment.offset : segment.offset + segment.numel]
    assert torch.allclose(piece, torch.full_like(piece, 3.0)) if how == "an edit" else piece.isnan().all()


def test_stage_2_borrows_its_buffer_until_it_has_been_read() -> None:
    made = Store(2)
    assert made.pool is not None and made.store.borrows and made.store.full is None
    made.store.open()
    assert made.store.full is not None and not made.pool.idle
    made.backward(1, wait=False)
    made.store.finish()
    assert not made.pool.idle
    made.store.reclaim()
    made.store.reclaim()
    assert made.store.full is None and len(made.pool.idle) == 1


@pytest.mark.parametrize(
    ("dtype", "precision", "wire", "travels", "summed"),
    [
        (F32, None, None, F32, F32),
        (F64, None, None, F64, F64),
        (F32, None, Wire(BF16), BF16, F32),
        (BF16, None, None, BF16, BF16),
        (F32, Precision(BF16), None, BF16, F32),
        (F32, Precision(BF16), Wire(F32), F32, F32),
        (F32, Precision(F16, state_dtype=BF16), None, F16, F32),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_dtypes_of_what_travels_and_of_sums(
    stage: int,
    dtype: torch.dtype,
    precision: Precision | None,
    wire: Wire | None,
    travels: torch.dtype,
    summed: torch.dtype,
) -> None:
    made = Store(stage, dtype, precision, wire)
    assert made.store.open().dtype is travels
    filled = made.backward(1)
    assert made.store.reduced.dtype is summed
    assert torch.equal(made.store.reduced, filled.to(summed))


class Doubling(Wire):
    """Sends each slice twice, halved, in 16 bits: a wire whose sums no backend can take."""

    backend_sums = False

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        slices = full.view(num_slices, -1)
        halves = torch.cat([slices, slices], 1).mul(0.5).to(BF16).flatten()
        full.view(BF16).copy_(halves)
        return full.view(BF16)

    def combine(self, slices: Any, out: Tensor, base: Tensor | None) -> None:
        total = torch.stack([half.float() for one in slices for half in one.view(2, -1)]).sum(0)
        out.copy_(total if base is None else total + base)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_wire_encodes_what_travels(stage: int) -> None:
    made = Store(stage, wire=Doubling())
    first = made.store.open().data_ptr()
    filled = made.backward(1)
    torch.testing.assert_close(made.store.reduced, filled, rtol=2**-8, atol=0)
    begins = made.store.reduced.data_ptr() - first
    assert not 0 <= begins < made.bucket.padded_numel * 4, "what travels must not be written while it is read"
    torch.testing.assert_close(made.store.reduced, filled + made.backward(2), rtol=2**-6, atol=2**-6)


def factor(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


@pytest.mark.parametrize("stage", STAGES)
def test_factors_multiply_when_the_sum_is_used(stage: int) -> None:
    made = Store(stage)
    filled = made.backward(1)
    given = torch.tensor(0.5)
    scale_sums([made.store], given)
    given.zero_()
    scale_sums([made.store], factor(3.0))
    assert torch.equal(made.store.reduced, filled), "not yet"
    assert made.store.factor is not None and made.store.factor.item() == 1.5 and not made.store.factor.requires_grad
    for segment in made.bucket.segments:
        wide = made.store.part_as(segment, F64)
        assert torch.equal(wide, segment.view_in(filled).double() * 1.5)
        assert wide.data_ptr() != segment.view_in(made.store.reduced).data_ptr()
    assert made.store.factor is not None
    first = made.bucket.segments[0]
    part = made.store.part_as(first, F32)
    assert made.store.factor is None and torch.equal(made.store.reduced, filled * 1.5)
    assert part.data_ptr() == first.view_in(made.store.reduced).data_ptr(), "no copy"


def test_a_factor_is_of_the_sum_before_and_not_of_what_is_added() -> None:
    made = Store(2)
    before = made.backward(1)
    scale_sums([made.store], factor(0.5))
    after = made.backward(2)
    assert made.store.factor is None
    torch.testing.assert_close(made.store.reduced, before * 0.5 + after)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["start_reduce", "discard", "zero"])
def test_norm_and_factor_go_with_their_sum(how: str, stage: int) -> None:
    made = Store(stage)
    made.backward(1)
    scale_sums([made.store], factor(0.5))
    made.store.norm = (2.0, torch.tensor(1.0))
    if how == "start_reduce":
        made.backward(2)
    else:
        getattr(made.store, how)()
    assert made.store.norm is None and made.store.factor is None
    assert made.store.holds_sum == (how != "discard")
    assert made.store.reduced.any() == (how != "zero")


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_leaves_has_no_gradient(stage: int) -> None:
    made = Store(stage)
    made.backward(1)
    gone = made.params[2]
    made.store.norm = (2.0, torch.tensor(1.0))
    made.store.clear(gone)
    assert made.store.norm is None
    assert gone in [segment.owner for segment in made.bucket.segments]
    for segment in made.bucket.segments:
        assert segment.view_in(made.store.reduced).any() == (segment.owner is not gone)
    assert made.store.full is None or not gone.view_in(made.store.full).any()
    if stage == 0:
        with pytest.raises(KeyError):
            made.store.gradient_of(gone)


def norm_of(store: GradientStore) -> Tensor:
    note_norms([store], 2.0)
    assert store.norm is not None
    return store.norm[1]


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(F32, None), (F64, None), (BF16, None), (F32, Precision(BF16)), (F32, Precision(BF16, "remainder"))],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_sum_of_squares(stage: int, dtype: torch.dtype, precision: Precision | None) -> None:
    made = Store(stage, dtype, precision)
    for seed in (1, 2):  # with the same table again
        made.store.discard()
        filled = made.backward(seed)
        norm = norm_of(made.store)
        assert norm.shape == () and norm.dtype is F64
        torch.testing.assert_close(norm.square(), filled.double().square().sum(), rtol=1e-6, atol=0)
    made.store.reduced[-1] = float("nan")
    made.store.norm = None
    assert not norm_of(made.store).isfinite()


def test_sums_move_to_another_store() -> None:
    one, other = Store(2), Store(2)
    filled = one.backward(1)
    scale_sums([one.store], factor(2.0))
    other.store.norm = (2.0, torch.tensor(1.0))
    for segment, twin in zip(one.bucket.segments, other.bucket.segments, strict=True):
        assert other.store.arrays(twin) == {} or other.store.holds_sum
        other.store.take(twin, one.store.arrays(segment))
    assert other.store.holds_sum and other.store.norm is None
    for segment in one.bucket.segments:
        assert torch.equal(segment.part_of(other.store.reduced), segment.part_of(filled) * 2), "multiplied by factors"
    assert other.store.factor is None


def test_what_lay_there_before_does_not_count() -> None:
    one, other = Store(2), Store(2)
    one.backward(1)
    other.backward(2)
    other.store.discard()
    first, *_ = one.bucket.segments
    other.store.take(other.bucket.segments[0], one.store.arrays(first))
    assert torch.equal(first.part_of(other.store.reduced), one.store.part(first))
    assert other.store.reduced.count_nonzero() == one.store.part(first).count_nonzero()


def test_a_sum_that_has_moved_takes_no_memory() -> None:
    made = Store(2)
    made.backward(1)
    made.store.let_go()
    assert not made.store.holds_sum
    made.store.take(made.bucket.segments[0], {"sum": torch.ones(made.bucket.segments[0].numel)})
    assert made.store.reduced.sum() == made.bucket.segments[0].numel, "nothing of the old sum is left"


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_are_given_up(stage: int) -> None:
    made = Store(stage)
    made.backward(1, wait=False)
    made.store.finish()
    addresses = [] if made.store.full is None else [made.store.full.data_ptr()]
    made.store.free(made.transport)
    assert made.store.full is None and len(addresses) == (stage < 2)
    assert made.transport.freed == addresses, "a pool frees its own"


def test_stripes_make_up_the_sum() -> None:
    made = Store(2, bucket_bytes=100)
    store = made.store
    assert store.is_striped and len(store.stripes) > 2
    expected = torch.zeros_like(store.reduced)
    for seed in (1, 2):
        whole = torch.zeros(made.bucket.padded_numel)
        for managed in made.bucket.params:
            managed.view_in(whole).copy_(values(managed.shape, 100 * seed + managed.index))
        expected += made.bucket.within_own_range(whole)
        for stripe in store.stripes:
            assert not store.is_reducing and store.stripe is stripe
            full = store.open()
            assert full.numel() == stripe.numel and full.nbytes <= 100 + 2 * made.bucket.precision.alignment * 4
            for begin, end, offset in stripe.ranges():
                full[offset : offset + end - begin] = whole[begin:end]
            store.start_reduce(made.transport)
            assert store.full is None and not store.holds_sum
            store.finish_next()
            assert store.holds_sum is (stripe is store.stripes[-1])
            store.reclaim_next()
        torch.testing.assert_close(store.reduced, expected, rtol=0, atol=0)
    assert store.base is None
