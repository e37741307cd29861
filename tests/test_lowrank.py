"""Every function of the factor algebra against the dense formula it stands for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import lowrank
from anyrank.adapter import Adapter, LowRank
from anyrank.errors import ShapeError
from anyrank.seeding import generator
from federations import assert_close, low_rank

SIDES = st.integers(1, 7)
RANKS = st.integers(1, 9)
SEEDS = st.integers(0, 2**20)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@st.composite
def parts(draw, dtype=torch.float64):
    return low_rank(rank=draw(RANKS), d_in=draw(SIDES), d_out=draw(SIDES), key=(draw(SEEDS),), dtype=dtype)


@st.composite
def rounds(draw):
    """Parts of mixed ranks, their weights, and what the server had."""
    d_in, d_out, seed = draw(SIDES), draw(SIDES), draw(SEEDS)
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    weights = [draw(st.floats(1e-3, 1e3)) for _ in ranks]
    held = [low_rank(rank=r, d_in=d_in, d_out=d_out, key=(seed, i), dtype=torch.float64) for i, r in enumerate(ranks)]
    rank = max(ranks) + draw(st.integers(0, 2))
    return held, weights, low_rank(rank=rank, d_in=d_in, d_out=d_out, key=(seed, "server"), dtype=torch.float64)


def rng(seed=0):
    return generator(seed, "test")


def dense_best(product, rank):
    U, S, Vt = torch.linalg.svd(product, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank], S


def assert_orthonormal_while_there_is_room(A, tolerance=1e-5):
    room = min(A.shape)
    assert_close(A[:room].double() @ A[:room].double().T, torch.eye(room), tolerance)
    assert_close(A.double().norm(dim=1), torch.ones(A.shape[0]), tolerance)


def assert_learnable(part):
    assert not ((part.A == 0).all(dim=1) & (part.B == 0).all(dim=0)).any()


# --- svd ----------------------------------------------------------------------------------------------------------


@given(parts(), RANKS)
def test_svd_is_the_best_approximation_of_its_rank(part, rank):
    found = lowrank.svd(part, rank, rng())
    best, S = dense_best(part.product, rank)
    assert found.rank == rank
    assert_close(found.product, best, 1e-9)
    error = (found.product - part.product).norm()
    assert_close(error, S[rank:].norm(), 1e-9)  # Eckart-Young


@given(parts(), st.integers(0, 2))
def test_svd_at_full_rank_reproduces_the_product(part, more):
    found = lowrank.svd(part, min(part.product.shape) + more, rng())
    assert_close(found.product, part.product, 1e-10)


@st.composite
def sums(draw):
    """What a server decomposes, in float32 or bfloat16: few slots or many, of clients that agree, nearly, or not at all."""
    d_in, d_out, rank = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 8) | st.integers(9, 60))
    part = low_rank(rank=rank, d_in=d_in, d_out=d_out, key=(draw(SEEDS),))
    A, B = part.A, part.B
    sizes, noise = torch.logspace(0, -10, rank), torch.randn(3 * rank, d_in, generator=rng())
    A, B = draw(
        st.sampled_from(
            [
                (A, B),
                (A.repeat(3, 1), B.repeat(1, 3) / 3),
                (A.repeat(3, 1) * (1 + 1e-5 * noise), B.repeat(1, 3) / 3),
                (A[:1].repeat(rank, 1), B[:, :1].repeat(1, rank)),
                (A, B * sizes),  # graded
                (A * 1e5 * sizes[:, None], B * 1e-5 / sizes),  # badly split
                (A * (sizes < 1)[:, None], B * (sizes > 1e-8)),  # with empty slots
                (torch.cat([A, A]), torch.cat([B, -0.9 * B], dim=1)),
            ]
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return LowRank(A.to(dtype), B.to(dtype))


def size_of(part):
    """Sum of the sizes of all slots: what rounding is relative to."""
    return float((part.A.double().norm(dim=1) * part.B.double().norm(dim=0)).sum())


@given(sums(), RANKS)
def test_svd_of_a_sum_is_the_dense_svd_to_five_digits(part, rank):
    dense = part.map(torch.Tensor.double).product
    found = lowrank.svd(part.map(torch.Tensor.float), rank, rng())
    best, S = dense_best(dense, rank)
    summed = size_of(part)
    off = float((found.product.double() - dense).norm()) - float(S[rank:].norm())
    assert abs(off) <= 1e-6 * summed  # Eckart-Young
    if len(S) > rank and S[rank - 1] > 1.01 * S[rank]:
        assert float((found.product.double() - best).norm()) <= 1e-5 * max(float(dense.norm()), 0.1 * summed)
    assert_orthonormal_while_there_is_room(found.A)
    assert (found.B.norm(dim=0).diff() <= 1e-6 * summed).all()
    again = lowrank.svd(part.map(torch.Tensor.float), rank, rng())
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)


@given(sums())
def test_compact_keeps_the_product_at_the_smallest_rank(part):
    found, dense = lowrank.compact(part), part.map(torch.Tensor.double).product
    S = torch.linalg.svdvals(dense)
    summed = size_of(part)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5}[part.A.dtype]
    assert float((found.map(torch.Tensor.double).product - dense).norm()) <= tolerance * summed
    assert found.rank <= max(1, int((1e-7 * S[0] < S).sum()))
    assert found.A.dtype == found.B.dtype == part.A.dtype
    assert found.B.is_contiguous()


@given(sums())
def test_singular_values_of_a_sum_are_those_of_the_dense_product(part):
    S, dense = lowrank.singular_values(part), torch.linalg.svdvals(part.map(torch.Tensor.double).product)
    summed = size_of(part)
    assert S.shape == (min(part.rank, *part.product.shape),)
    assert float((S - dense[: len(S)]).norm()) <= 2e-6 * summed


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(2500, 3, 4), (3, 2500, 4), (2500, 70, 60), (30, 20, 1500)])
def test_svd_of_a_layer_of_several_blocks(d_in, d_out, rank):
    part = low_rank(rank=rank, d_in=d_in, d_out=d_out, key=("blocks",))
    precise = part.map(torch.Tensor.double)  # another route, which is tested above
    assert_close(lowrank.svd(part, 4, rng()).product, lowrank.svd(precise, 4, rng()).product, 1e-6)
    assert_close(lowrank.singular_values(part), lowrank.singular_values(precise), 1e-6)
    assert_close(lowrank.norm(part), precise.product.norm(), 1e-6)


@pytest.mark.parametrize("rank", [300, 700])
@pytest.mark.parametrize(("d_in", "d_out"), [(320, 350), (350, 320)])
def test_svd_of_many_slots(d_in, d_out, rank):
    part = low_rank(rank=rank, d_in=d_in, d_out=d_out, key=("many",))
    part = LowRank(part.A, part.B * torch.logspace(0, -2, rank))
    best, S = dense_best(part.product.double(), 8)
    assert_close(lowrank.svd(part, 8, rng()).product, best, 1e-6 * float(best.norm()))
    energy = float(S[:5].square().sum() / S.square().sum())
    assert (lowrank.svd(part, 8, rng(), energy=energy - 1e-6).B[:, 5:] == 0).all()
    assert (lowrank.svd(part, 8, rng(), energy=energy + 1e-6).B[:, 5:].norm(dim=0) > 0).tolist() == [True, False, False]


def test_compact_of_a_zero_product_is_one_slot():
    for part in (low_rank(rank=3, d_in=4, d_out=5, key=("zero",)), low_rank(rank=9, d_in=4, d_out=5, key=("zero",))):
        found = lowrank.compact(LowRank(part.A, torch.zeros_like(part.B)))
        assert found.rank == 1
        assert (found.product == 0).all()


@given(parts())
def test_a_prefix_of_the_svd_is_the_best_approximation_of_the_prefix_rank(part):
    whole = lowrank.svd(part, part.rank, rng())
    for rank in range(1, part.rank + 1):
        assert_close(lowrank.truncate(whole, rank).product, dense_best(part.product, rank)[0], 1e-9)


@given(parts())
def test_singular_values_are_those_of_the_dense_product_without_more(part):
    S = lowrank.singular_values(part)
    assert S.shape == (min(part.rank, *part.product.shape),)
    assert_close(S, torch.linalg.svdvals(part.product)[: len(S)], 1e-10)


@given(parts(torch.float32), RANKS)
def test_svd_puts_the_singular_values_in_b_and_fixes_signs(part, rank):
    found = lowrank.svd(part, rank, rng())
    S = found.B.norm(dim=0)
    gram = found.B.T @ found.B
    assert_close(gram, torch.diag(S.square()), 1e-5 * max(1.0, float(S[0])))
    assert (S[:-1] - S[1:] >= -1e-5 * S[0]).all()
    largest = found.A.gather(1, found.A.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    assert_orthonormal_while_there_is_room(found.A)
    assert_learnable(found)


@given(parts(), st.integers(1, 9), st.booleans())
def test_slots_for_missing_directions_are_seeded_and_can_learn(part, rank, repeated):
    if repeated:
        part = LowRank(part.A[:1].repeat(3, 1), part.B[:, :1].repeat(1, 3))
    directions = 1 if repeated else min(part.rank, *part.product.shape)
    found, again, other = (
        lowrank.svd(part, rank, rng()),
        lowrank.svd(part, rank, rng()),
        lowrank.svd(part, rank, rng(1)),
    )
    assert_orthonormal_while_there_is_room(found.A)
    assert (found.B[:, directions:] == 0).all()
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)
    assert_close(found.product, other.product, 1e-10)
    if rank > directions and found.A.shape[1] > directions + 1:  # where one direction is left there is no choice
        assert not torch.equal(found.A[directions:], other.A[directions:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(5, 3, 2), (3, 5, 4), (2, 4, 6), (1, 1, 3)])
def test_svd_of_a_zero_product_can_learn(dtype, d_in, d_out, rank):
    part = low_rank(rank=3, d_in=d_in, d_out=d_out, key=("zero",), dtype=dtype)
    for zero in (LowRank(part.A, torch.zeros_like(part.B)), part.map(torch.zeros_like)):
        found = lowrank.svd(zero, rank, rng())
        assert (found.B == 0).all()
        assert_orthonormal_while_there_is_room(found.A, 2e-2 if dtype == torch.bfloat16 else 1e-5)
        assert found.A.dtype == found.B.dtype == dtype


@given(parts(), RANKS, st.floats(0.01, 1))
def test_svd_keeps_the_fewest_directions_that_hold_the_energy(part, rank, energy):
    squares = torch.linalg.svdvals(part.product).square()
    held = squares.cumsum(0) / squares.sum()
    fewest = int((held < energy - 1e-9).sum()) + 1
    found = lowrank.svd(part, rank, rng(), energy=energy)
    assert found.rank == rank
    assert_close(found.product, dense_best(part.product, min(rank, fewest))[0], 1e-6)
    assert_orthonormal_while_there_is_room(found.A)


def test_svd_with_all_of_the_energy_keeps_the_smallest_direction():
    # Its share of the energy, 1e-10, is lost when summed from the large end in single precision.
    part = LowRank(torch.eye(2, 5), torch.tensor([[1.0, 0], [0, 1e-5], [0, 0]]))
    assert_close(lowrank.svd(part, 2, rng()).B[1, 1], part.B[1, 1], 1e-9)


def test_svd_keeps_small_singular_values_of_a_large_layer():
    # A threshold that grows with the sides of the layer, as for dense matrices, would cut off the last two.
    d, S = 1500, torch.tensor([1.0, 1e-2, 1e-4, 1e-5])
    Q = torch.linalg.qr(torch.randn(d, 8, generator=rng()))[0]
    part = LowRank(Q[:, :4].T.contiguous(), Q[:, 4:] * S)
    found = lowrank.svd(part, 4, rng())
    assert_close(found.B.norm(dim=0) / S, torch.ones(4), 0.02)
    assert float(lowrank.norm(lowrank.stack([found, part], [1.0, -1.0]))) < 1e-6


@pytest.mark.parametrize("rank", [2, 20])
def test_rows_of_directions_just_above_rounding_are_orthonormal(rank):
    # Slots that nearly agree in A and not in B: all but the first direction are small.
    part = low_rank(rank=rank, d_in=300, d_out=200, key=("nearly parallel",))
    A = part.A[:1] + 1e-4 * part.A
    found = lowrank.svd(LowRank(A, part.B), rank, rng())
    assert_close(found.A.double() @ found.A.double().T, torch.eye(rank), 1e-6)
    dense = part.B.double() @ A.double()
    assert_close(found.map(torch.Tensor.double).product, dense, 1e-6)
    assert_close(found.B.norm(dim=0)[1:] / torch.linalg.svdvals(dense)[1:rank], torch.ones(rank - 1), 0.01)


def test_svd_survives_huge_and_tiny_products():
    part = low_rank(rank=2, d_in=4, d_out=3, key=("extreme",))
    for factor in (1e-15, 1e15):
        scaled = part.map(lambda tensor, factor=factor: tensor * factor)
        found = lowrank.svd(scaled, 3, rng())
        assert_close(found.B.double() / factor**2, lowrank.svd(part, 3, rng()).B)


# --- randomized svd -----------------------------------------------------------------------------------------------


@given(sums(), RANKS, st.integers(1, 5))
def test_a_randomized_svd_says_how_far_off_it_is(part, rank, oversample):
    found, error = lowrank.randomized_svd(part.map(torch.Tensor.float), rank, rng(), oversample=oversample)
    dense = part.map(torch.Tensor.double).product
    summed = size_of(part)
    off, best = float((found.product.double() - dense).norm()), float(torch.linalg.svdvals(dense)[rank:].norm())
    assert error * float(dense.norm()) == pytest.approx(off, abs=2e-6 * summed)
    assert off >= best - 1e-6 * summed
    assert found.rank == rank
    assert_orthonormal_while_there_is_room(found.A)
    again, as_before = lowrank.randomized_svd(part.map(torch.Tensor.float), rank, rng(), oversample=oversample)
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)
    assert error == as_before


@given(parts(), RANKS)
def test_a_randomized_svd_with_a_row_for_every_direction_is_the_svd(part, rank):
    found, error = lowrank.randomized_svd(part, rank, rng(), oversample=7)
    best, S = dense_best(part.product, rank)
    assert_close(found.product, best, 1e-7)
    assert error == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-6)


def test_a_randomized_svd_of_a_decaying_spectrum_is_nearly_the_best():
    d, S = 300, torch.logspace(0, -3, 200)
    Q = torch.linalg.qr(torch.randn(d, 400, generator=rng()).reshape(2, d, 200)).Q
    part = LowRank(Q[0].T.contiguous(), Q[1] * S)
    found, error = lowrank.randomized_svd(part, 16, rng(), oversample=8)
    best = float(S[16:].norm() / S.norm())
    assert best <= error <= 1.01 * best
    assert_close(found.B.norm(dim=0), S[:16], 0.01)


def test_a_randomized_svd_of_a_zero_product_misses_nothing_and_can_learn():
    part = low_rank(rank=3, d_in=4, d_out=5, key=("zero",))
    found, error = lowrank.randomized_svd(LowRank(part.A, torch.zeros_like(part.B)), 2, rng(), oversample=1)
    assert error == 0
    assert (found.B == 0).all()
    assert_orthonormal_while_there_is_room(found.A)


# --- norm, stack, truncate, resize, fresh -------------------------------------------------------------------------


@given(parts())
def test_norm_is_the_dense_frobenius_norm(part):
    assert_close(lowrank.norm(part), part.product.norm(), 1e-7)


def test_norm_of_zero_is_zero_and_of_a_cancelling_product_finite():
    part = low_rank(rank=2, d_in=4, d_out=3, key=("cancel",))
    assert lowrank.norm(part.map(torch.zeros_like)) == 0
    assert float(lowrank.norm(lowrank.stack([part, part], [1.0, -1.0]))) < 1e-6


@given(rounds())
def test_stack_is_exactly_the_weighted_sum_of_products(round):
    held, weights, _ = round
    stacked = lowrank.stack(held, weights)
    dense = sum(weight * part.product for part, weight in zip(held, weights, strict=True))
    assert stacked.rank == sum(part.rank for part in held)
    assert_close(stacked.product, dense, 1e-12)
    assert torch.equal(stacked.A, torch.cat([part.A for part in held]))


@given(rounds(), st.booleans())
def test_a_weighted_sum_is_the_stack_at_no_more_slots_than_the_narrower_side(round, by_slot):
    held, weights, _ = round
    if by_slot:
        weights = [torch.linspace(-1, weight, part.rank) for part, weight in zip(held, weights, strict=True)]
    stacked, found = lowrank.stack(held, weights), lowrank.weighted_sum(held, weights)
    assert found.rank == min(stacked.rank, *stacked.product.shape)
    assert_close(found.product, stacked.product, 1e-12)
    if by_slot:
        slots = torch.cat([part.B for part in held], dim=1), torch.cat([part.A for part in held])
        assert_close(stacked.product, slots[0] * torch.cat(weights) @ slots[1], 1e-6)


def test_a_weighted_sum_of_many_parts_reads_them_one_after_another():
    held = [low_rank(rank=r, d_in=40, d_out=30, key=(r, i)) for i in range(100) for r in (3, 16, 20)]
    found = lowrank.weighted_sum(held, [1 / 300] * 300)
    assert found.rank == 30
    assert_close(found.product, sum(part.map(torch.Tensor.double).product / 300 for part in held), 1e-6)


def test_a_stack_without_weights_is_the_plain_sum():
    held = [low_rank(rank=r, d_in=4, d_out=3, key=(r,)) for r in (1, 2)]
    assert torch.equal(lowrank.stack(held).product, lowrank.stack(held, [1.0, 1.0]).product)


@given(parts(), RANKS)
def test_truncate_takes_the_first_slots(part, rank):
    found = lowrank.truncate(part, rank)
    assert found.rank == min(rank, part.rank)
    assert_close(found.product, part.B[:, :rank] @ part.A[:rank], 1e-12)


@given(parts(), RANKS)
def test_resize_keeps_the_product_as_far_as_the_rank_allows(part, rank):
    found = lowrank.resize(part, rank, rng())
    assert found.rank == rank
    if rank >= part.rank:
        assert torch.equal(found.A[: part.rank], part.A)
        assert torch.equal(found.B[:, : part.rank], part.B)
        assert (found.B[:, part.rank :] == 0).all()
        assert_close(found.product, part.product, 1e-12)
    else:
        assert_close(found.product, dense_best(part.product, rank)[0], 1e-9)
    assert_learnable(found)


def test_fresh_changes_nothing_and_starts_as_lora_does():
    part = lowrank.fresh(200, d_in=16, d_out=5, rng=rng())
    assert (part.B == 0).all()
    bound = 16**-0.5  # torch.nn.init.kaiming_uniform_(A, a=5**0.5)
    assert float(part.A.abs().max()) <= bound
    assert float(part.A.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert torch.equal(part.A, lowrank.fresh(200, d_in=16, d_out=5, rng=rng()).A)
    assert not torch.equal(part.A, lowrank.fresh(200, d_in=16, d_out=5, rng=rng(1)).A)


# --- means of slots -----------------------------------------------------------------------------------------------


def naive(round, *, over_owners):
    """The two slot means, one number after another."""
    held, weights, previous = round
    A, B = previous.A.clone(), previous.B.clone()
    for j in range(previous.rank):
        owners = [(part, weight) for part, weight in zip(held, weights, strict=True) if part.rank > j]
        if owners:
            total = sum(weight for _, weight in owners) if over_owners else sum(weights)
            A[j] = sum(weight / total * part.A[j] for part, weight in owners)
            B[:, j] = sum(weight / total * part.B[:, j] for part, weight in owners)
    return A, B


@given(rounds())
def test_padded_mean_is_the_naive_loop(round):
    held, weights, previous = round
    found, (A, B) = lowrank.padded_mean(held, weights, previous), naive(round, over_owners=False)
    assert_close(found.A, A, 1e-12)
    assert_close(found.B, B, 1e-12)


@given(rounds())
def test_by_slot_is_the_naive_loop(round):
    held, weights, previous = round
    found, (A, B) = lowrank.by_slot(held, weights, previous), naive(round, over_owners=True)
    assert_close(found.A, A, 1e-12)
    assert_close(found.B, B, 1e-12)


@pytest.mark.parametrize("mean", [lowrank.padded_mean, lowrank.by_slot])
def test_slots_without_an_owner_keep_their_bits(mean):
    previous = low_rank(rank=4, d_in=3, d_out=2, key=("server",))
    found = mean([low_rank(rank=2, d_in=3, d_out=2, key=("client",))], [0.5], previous)
    assert torch.equal(found.A[2:], previous.A[2:])
    assert torch.equal(found.B[:, 2:], previous.B[:, 2:])


@pytest.mark.parametrize("mean", [lowrank.padded_mean, lowrank.by_slot])
def test_a_slot_whose_owners_weigh_nothing_keeps_its_value(mean):
    # HetLoRA: the only owner of the second slot has an update of norm zero.
    previous, small, large = (low_rank(rank=r, d_in=3, d_out=2, key=(r,)) for r in (3, 1, 2))
    found = mean([small, large], [1.0, 0.0], previous)
    assert_close(found.A[0], small.A[0])
    assert torch.equal(found.A[1:], previous.A[1:])


@pytest.mark.parametrize("mean", [lowrank.padded_mean, lowrank.by_slot])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [1e-30, 1e-3, 1e30])
def test_the_mean_of_a_thousand_equal_parts_is_the_part(mean, dtype, weight):
    part = low_rank(rank=2, d_in=3, d_out=4, key=("equal",), dtype=dtype)
    found = mean([part] * 1000, [weight] * 1000, part)
    assert found.A.dtype == found.B.dtype == dtype
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    assert_close(found.A, part.A, tolerance)
    assert_close(found.B, part.B, tolerance)


# --- what holds for all -------------------------------------------------------------------------------------------

FUNCTIONS = {
    "truncate": lambda part, other: lowrank.truncate(part, 2),
    "grow": lambda part, other: lowrank.resize(part, 5, rng()),
    "shrink": lambda part, other: lowrank.resize(part, 2, rng()),
    "stack": lambda part, other: lowrank.stack([part, other], [0.3, 0.7]),
    "padded_mean": lambda part, other: lowrank.padded_mean([part, other], [0.3, 0.7], part),
    "by_slot": lambda part, other: lowrank.by_slot([part, other], [0.3, 0.7], part),
    "svd": lambda part, other: lowrank.svd(part, 2, rng()),
    "svd above the sides": lambda part, other: lowrank.svd(part, 8, rng()),
    "randomized_svd": lambda part, other: lowrank.randomized_svd(part, 2, rng(), oversample=1)[0],
    "compact": lambda part, other: lowrank.compact(part),
    "weighted_sum": lambda part, other: lowrank.weighted_sum([part, other], [0.3, 0.7]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtype_is_kept_inputs_are_untouched_and_results_finite(name, dtype):
    part = low_rank(rank=3, d_in=4, d_out=5, key=("part",), dtype=dtype)
    other = low_rank(rank=2, d_in=4, d_out=5, key=("other",), dtype=dtype)
    before = [tensor.clone() for tensor in (part.A, part.B, other.A, other.B)]
    found = FUNCTIONS[name](part, other)
    assert found.A.dtype == found.B.dtype == dtype
    assert torch.isfinite(found.A).all()
    assert torch.isfinite(found.B).all()
    for tensor, copy in zip((part.A, part.B, other.A, other.B), before, strict=True):
        assert torch.equal(tensor, copy)


def test_bfloat16_svd_is_as_good_as_its_input():
    part = low_rank(rank=3, d_in=20, d_out=30, key=("half",), dtype=torch.bfloat16)
    found = lowrank.svd(part, 3, rng()).map(torch.Tensor.double)
    assert_close(found.product, part.map(torch.Tensor.double).product, 1e-2)


# --- the adapter itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("A", "B"), [((2, 3), (4, 3)), ((3,), (4, 3)), ((2, 3), (2,))])
def test_factors_that_cannot_be_multiplied_are_refused(A, B):
    part = object.__new__(LowRank)  # past the checks of types that only tests make
    object.__setattr__(part, "A", torch.zeros(A))
    object.__setattr__(part, "B", torch.zeros(B))
    with pytest.raises(ShapeError, match="expected"):
        part.__post_init__()


def test_flat_names_lead_back_to_the_same_adapter():
    layers = {name: low_rank(rank=r, d_in=3, d_out=2, key=(name,)) for name, r in (("z/q", 1), ("a", 2))}
    adapter = Adapter(layers, {"head/weight": torch.ones(2, 2)})
    back = Adapter.from_tensors(adapter.tensors())
    assert list(back.layers) == ["z/q", "a"]
    assert back.ranks == {"z/q": 1, "a": 2}
    assert back.num_parameters == 5 + 10 + 4
    assert all(torch.equal(tensor, adapter.tensors()[name]) for name, tensor in back.tensors().items())


@pytest.mark.parametrize("name", ["A/q", "B/q", "C/q", "q", ""])
def test_names_that_are_not_ours_are_refused(name):
    with pytest.raises(ShapeError, match="expected 'A/<layer>'"):
        Adapter.from_tensors({name: torch.zeros(1, 1)})
