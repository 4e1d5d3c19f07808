"""Algebra of factored updates against dense NumPy."""

import numpy as np
import pytest
import torch

from fedex_hf import LowRankDelta
from fedex_hf.low_rank import compress, concatenate, decompose, energy, lost_energy, max_useful_rank


def delta_of(rank, out_features=19, in_features=31, scaling=1.5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator)
    B = torch.randn(out_features, rank, generator=generator)
    return LowRankDelta(A.to(dtype), B.to(dtype), scaling)


def dense(delta):
    return delta.scaling * (delta.B.double().numpy() @ delta.A.double().numpy())


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# ---- concatenate ----


@pytest.mark.parametrize("ranks", [[3], [1, 1], [2, 5, 1], [4] * 7])
def test_concatenate_sums(ranks):
    deltas = [delta_of(rank, seed=i) for i, rank in enumerate(ranks)]
    total = concatenate(deltas)
    assert total.rank == sum(ranks)
    assert total.scaling == 1.5
    assert error(dense(total), sum(dense(delta) for delta in deltas)) < 1e-14


@pytest.mark.parametrize("scalings", [[1.5, 0.5], [0.25, 4.0, 1.0], [2.0, -3.0], [8.0, 0.0]])
def test_concatenate_takes_differing_scalings_into_account(scalings):
    deltas = [delta_of(2, seed=i, scaling=scaling) for i, scaling in enumerate(scalings)]
    total = concatenate(deltas)
    assert total.scaling == scalings[0]
    expected = sum(dense(delta) for delta in deltas)
    assert error(dense(total), expected) < 1e-7
    ignored = LowRankDelta(total.A, torch.cat([delta.B for delta in deltas], dim=1), scalings[0])
    assert error(dense(ignored), expected) > 0.1  # the twin


def test_concatenate_leaves_its_inputs_alone():
    first, second = delta_of(2), delta_of(2, seed=1, scaling=3.0)
    copies = [tensor.clone() for tensor in (first.A, first.B, second.A, second.B)]
    total = concatenate([first, second])
    total.A.zero_()
    total.B.zero_()
    assert all(map(torch.equal, (first.A, first.B, second.A, second.B), copies))


def test_concatenate_of_nothing():
    with pytest.raises(ValueError, match="`deltas` is empty"):
        concatenate([])


# ---- compress ----

SHAPES = [(19, 31), (31, 19), (24, 24), (5, 40), (1, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 12, 60])
def test_compress_is_exact(shape, rank):
    delta = delta_of(rank, *shape)
    small = compress(delta)
    assert error(dense(small), dense(delta)) < 1e-7
    assert small.rank == min(rank, *shape)
    assert small.scaling == delta.scaling
    assert small.A.dtype == small.B.dtype == torch.float32
    assert small.A.is_contiguous()
    assert small.B.is_contiguous()


def test_compress_is_exact_in_float64():
    delta = delta_of(40, dtype=torch.float64)
    small = compress(delta)
    assert small.A.dtype == torch.float64
    assert small.rank == 19
    assert error(dense(small), dense(delta)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compress_finds_the_rank_of_a_sum_that_repeats_itself(dtype):
    first, second = delta_of(2, dtype=dtype), delta_of(3, seed=1, dtype=dtype)
    repeated = concatenate([first, second, first, second, first])
    assert repeated.rank == 12
    small = compress(repeated)
    assert small.rank == 5
    assert error(dense(small), 3 * dense(first) + 2 * dense(second)) < 1e-7


def test_compress_finds_what_cancels():
    first, second = delta_of(2), delta_of(3, seed=1)
    minus = LowRankDelta(first.A, -first.B, first.scaling)
    small = compress(concatenate([first, second, minus]))
    assert small.rank == 3
    assert error(dense(small), dense(second)) < 1e-7


def test_compress_keeps_what_is_small():
    """Parts far below the largest are not taken for rounding."""
    rank = 4
    delta = delta_of(rank)
    sizes = torch.tensor([1.0, 1e-2, 1e-4, 1e-6])
    spread = LowRankDelta(delta.A, delta.B * sizes, delta.scaling)
    small = compress(spread)
    assert small.rank == rank
    assert error(dense(small), dense(spread)) < 1e-7
    singular_values = np.linalg.svd(dense(spread), compute_uv=False)[:rank]
    assert singular_values[-1] < 1e-5 * singular_values[0]
    assert np.allclose(np.linalg.norm(small.B.numpy(), axis=0) ** 2 * 1.5, singular_values, rtol=1e-5)


def test_compress_of_zero_is_zero():
    zero = LowRankDelta(torch.randn(4, 9), torch.zeros(7, 4), 2.0)
    small = compress(zero)
    assert small.rank == 1
    assert small.A.shape == (1, 9)
    assert not dense(small).any()


def test_compress_splits_singular_values_evenly():
    small = compress(delta_of(4))
    singular_values = np.linalg.svd(dense(delta_of(4)), compute_uv=False)[:4] / 1.5
    assert np.allclose(np.linalg.norm(small.A.numpy(), axis=1) ** 2, singular_values, rtol=1e-5)
    assert np.allclose(np.linalg.norm(small.B.numpy(), axis=0) ** 2, singular_values, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_compress_to_a_rank_is_the_truncated_svd(shape, rank):
    delta = delta_of(12, *shape)
    small = compress(delta, rank)
    assert small.rank == rank
    U, S, Vh = np.linalg.svd(dense(delta), full_matrices=False)
    assert error(dense(small), (U[:, :rank] * S[:rank]) @ Vh[:rank]) < 1e-6
    assert np.linalg.norm(dense(small) - dense(delta)) == pytest.approx(np.linalg.norm(S[rank:]), rel=1e-6)
    # Cutting the factors themselves, which needs no decomposition, is not as good.
    cut = LowRankDelta(delta.A[:rank], delta.B[:, :rank], delta.scaling)
    assert np.linalg.norm(dense(cut) - dense(delta)) > 1.05 * np.linalg.norm(S[rank:])


def test_compress_to_a_rank_that_is_enough():
    delta = delta_of(4)
    for rank in (4, 5, 1000):
        small = compress(delta, rank)
        assert small.rank == 4
        assert error(dense(small), dense(delta)) < 1e-7


# ---- What a truncation leaves out ----


def with_spectrum(values, seed=0):
    """A delta whose product has these singular values times its scaling, 1.5."""
    generator = np.random.default_rng(seed)
    U = np.linalg.qr(generator.normal(size=(19, len(values))))[0]
    V = np.linalg.qr(generator.normal(size=(31, len(values))))[0]
    return LowRankDelta(torch.tensor(V.T).float(), torch.tensor(U * values).float(), 1.5)


@pytest.mark.parametrize(
    ("tolerance", "rank"), [(1e-9, 5), (0.005, 4), (0.05, 3), (0.14, 2), (0.4, 1), (0.99, 1)], ids=str
)
def test_compress_to_a_tolerance_keeps_the_fewest_factors_that_hold_the_rest(tolerance, rank):
    delta = with_spectrum([5.0, 3.0, 2.0, 1.0, 0.4])
    small = compress(delta, tolerance=tolerance)
    S = np.linalg.svd(dense(delta), compute_uv=False)
    shares = [np.square(S[kept:]).sum() / np.square(S).sum() for kept in range(6)]
    assert small.rank == rank
    assert shares[rank] <= tolerance
    assert rank == 1 or shares[rank - 1] > tolerance
    assert small.cut == pytest.approx(np.square(S[rank:5]).sum(), rel=1e-5, abs=1e-9)
    assert np.linalg.norm(dense(small) - dense(delta)) ** 2 == pytest.approx(small.cut, rel=1e-4, abs=1e-9)


def test_compress_takes_the_smaller_of_rank_and_tolerance():
    delta = with_spectrum([5.0, 3.0, 2.0, 1.0, 0.4])
    assert compress(delta, 2, tolerance=0.05).rank == 2
    assert compress(delta, 4, tolerance=0.05).rank == 3


def test_nothing_is_cut_where_nothing_is_left_out():
    delta = delta_of(4)
    assert compress(delta).cut == compress(delta, 4).cut == concatenate([delta, delta]).cut == 0.0
    assert compress(concatenate([delta, delta])).cut == 0.0
    assert lost_energy([delta, compress(delta)]) == 0.0


def test_energy_is_the_squared_norm():
    for delta in (delta_of(3), delta_of(25, scaling=-0.5), concatenate([delta_of(3), delta_of(4, seed=1)])):
        assert energy(delta) == pytest.approx(np.square(dense(delta)).sum(), rel=1e-10)


def test_lost_energy_of_several_updates_together():
    deltas = [with_spectrum([5.0, 3.0, 2.0], seed=0), with_spectrum([40.0, 1.0], seed=1), delta_of(2)]
    small = [compress(deltas[0], 1), compress(deltas[1], 1), deltas[2]]
    lost = sum(np.square(dense(a) - dense(b)).sum() for a, b in zip(deltas, small, strict=True))
    assert lost_energy(small) == pytest.approx(lost / sum(np.square(dense(each)).sum() for each in deltas), rel=1e-5)


def test_cuts_add_up():
    first = compress(with_spectrum([5.0, 3.0]), 1)
    both = concatenate([first, compress(with_spectrum([4.0, 2.0], seed=1), 1)])
    assert both.cut == pytest.approx(1.5**2 * (9 + 4), rel=1e-5)
    assert compress(both).cut == pytest.approx(both.cut, rel=1e-12)
    assert compress(both, 1).cut > both.cut


# ---- Several experts ----


def experts(rank=4, count=3):
    deltas = [delta_of(rank, seed=10 + each) for each in range(count)]
    stacked = LowRankDelta(torch.stack([d.A for d in deltas]), torch.stack([d.B for d in deltas]), 1.5)
    return deltas, stacked


def test_experts_are_compressed_each_for_itself():
    deltas, stacked = experts()
    twice = concatenate([stacked, stacked])
    assert twice.rank == 8
    small = compress(twice)
    assert small.rank == 4
    cut = compress(stacked, 2)
    assert cut.rank == 2
    for index, delta in enumerate(deltas):
        assert error(dense(LowRankDelta(small.A[index], small.B[index], 1.5)), 2 * dense(delta)) < 1e-6
        alone = dense(compress(delta, 2))
        assert error(dense(LowRankDelta(cut.A[index], cut.B[index], 1.5)), alone) < 1e-6
    assert cut.cut == pytest.approx(sum(compress(delta, 2).cut for delta in deltas), rel=1e-5)
    assert energy(stacked) == pytest.approx(sum(energy(delta) for delta in deltas), rel=1e-10)


def test_the_rank_is_that_of_the_expert_that_needs_most():
    deltas, stacked = experts()
    stacked.A[0, 1:] = 0.0  # one expert of rank 1
    assert compress(stacked).rank == 4
    assert compress(LowRankDelta(stacked.A[:1], stacked.B[:1])).rank == 1
    S = [np.linalg.svd(dense(delta), compute_uv=False)[:4] for delta in deltas[1:]]
    needed = max(next(k for k in range(5) if np.square(s[k:]).sum() <= 0.2 * np.square(s).sum()) for s in S)
    assert compress(stacked, tolerance=0.2).rank == needed
    dense_experts = torch.stack([delta.to_dense() for delta in deltas])
    found = decompose(dense_experts)
    assert found.rank == 4
    assert error(found.to_dense().numpy(), dense_experts.numpy()) < 1e-12


# ---- max_useful_rank ----


@pytest.mark.parametrize("shape", [*SHAPES, (32, 96), (768, 768), (4096, 11008)], ids=str)
def test_max_useful_rank_is_where_factors_stop_paying(shape):
    out_features, in_features = shape
    rank = max_useful_rank(LowRankDelta(torch.zeros(1, in_features), torch.zeros(out_features, 1)))
    assert (rank - 1) * (in_features + out_features) < in_features * out_features
    assert rank * (in_features + out_features) >= in_features * out_features
