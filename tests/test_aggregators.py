"""Aggregation methods as functions of tensors: expected values are dense, in NumPy, in float64 or wider."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedex_hf import (
    AGGREGATORS,
    Aggregator,
    ClientUpdate,
    FedExAggregator,
    FedITAggregator,
    FFALoRAAggregator,
    GlobalUpdate,
    LowRankDelta,
    get_aggregator,
)
from fedex_hf.aggregators.base import mean_factors, normalise
from fedex_hf.aggregators.ranks import start_at_rank


OUT, IN, RANK = 23, 17, 3
WEIGHTS = {
    1: [[1.0], [0.3]],
    2: [[1, 1], [1, 3], [1e-9, 1.0], [1.0, 1e-9]],
    3: [[1, 1, 1], [12, 7, 9], [1e-6, 1e6, 1.0]],
    7: [[1] * 7, [3, 8, 5, 4, 12, 6, 4], [1e-4, 1e4, 1, 1e-4, 1e-4, 1, 50]],
}
WEIGHT_CASES = [weights for cases in WEIGHTS.values() for weights in cases]


def factors_of(k, *, seed=0, rank=RANK, scaling=2.0, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRankDelta(
            A=(torch.randn(rank, IN, generator=generator) + offset).to(dtype),
            B=(torch.randn(OUT, rank, generator=generator) + offset).to(dtype),
            scaling=scaling,
        )
        for _ in range(k)
    ]


def updates_of(factors, tensors=None):
    tensors = [{}] * len(factors) if tensors is None else tensors
    return [
        ClientUpdate(f"client-{i}", 1, 10, {"layer": delta}, other)
        for i, (delta, other) in enumerate(zip(factors, tensors, strict=True))
    ]


def share(weights):
    weights = np.array(weights, dtype=np.longdouble)
    return weights / weights.sum()


def wide(tensor):
    """NumPy's widest float: what comes out is exact compared to anything the package returns."""
    return tensor.detach().double().numpy().astype(np.longdouble)


def product(delta):
    return delta.scaling * (wide(delta.B) @ wide(delta.A))


def ideal(factors, weights):
    return sum(w * product(delta) for w, delta in zip(share(weights), factors, strict=True))


def mean_of(tensors, weights):
    return sum(w * wide(tensor) for w, tensor in zip(share(weights), tensors, strict=True))


def fedit(factors, weights):
    A = mean_of([delta.A for delta in factors], weights)
    B = mean_of([delta.B for delta in factors], weights)
    return factors[0].scaling * (B @ A)


def error(found, expected, scale=None):
    """Frobenius norm of the difference, relative to `scale` or to the expected matrix."""
    return float(
        np.linalg.norm((found - expected).astype(float))
        / np.linalg.norm((expected if scale is None else scale).astype(float))
    )


def aggregate_one(aggregator, factors, weights):
    update = aggregator.aggregate(updates_of(factors), weights)
    return update.adapters["layer"], update.residuals.get("layer")


# ---- FedEx-LoRA ----


@pytest.mark.parametrize("weights", WEIGHT_CASES, ids=str)
def test_residual_is_ideal_minus_fedit(weights):
    k = len(weights)
    factors = factors_of(k)
    mean, residual = aggregate_one(FedExAggregator(), factors, weights)
    assert error(wide(mean.A), mean_of([delta.A for delta in factors], weights)) < 1e-7
    assert error(wide(mean.B), mean_of([delta.B for delta in factors], weights)) < 1e-7
    if k == 1:
        assert residual is None
        assert torch.equal(mean.A, factors[0].A)
        assert torch.equal(mean.B, factors[0].B)
        return
    expected = ideal(factors, weights) - fedit(factors, weights)
    assert error(product(residual), expected) < 3e-7
    assert error(product(mean) + product(residual), ideal(factors, weights)) < 3e-7
    # One contrast fewer than clients, whatever the paper's bound of k r says.
    rank = min((k - 1) * RANK, IN, OUT)  # and never more than the layer's smaller side
    assert residual.A.shape == (rank, IN)
    assert residual.B.shape == (OUT, rank)
    assert residual.A.dtype == residual.B.dtype == torch.float32
    assert residual.scaling == mean.scaling == 2.0


def test_the_residual_needs_that_rank():
    """(k - 1) r is not only enough: with fewer factors the residual cannot be written."""
    factors = factors_of(3)
    expected = ideal(factors, [12, 7, 9]) - fedit(factors, [12, 7, 9])
    singular_values = np.linalg.svd(expected.astype(float), compute_uv=False)
    assert singular_values[2 * RANK - 1] > 1e-2 * singular_values[0]
    assert singular_values[2 * RANK] < 1e-12 * singular_values[0]


@pytest.mark.parametrize("k", [2, 3, 7])
def test_clients_that_agree_leave_no_residual(k):
    factors = factors_of(1) * k
    mean, residual = aggregate_one(FedExAggregator(), factors, range(1, k + 1))
    assert error(product(mean), product(factors[0])) < 1e-7
    assert np.linalg.norm(product(residual).astype(float)) < 1e-12


@pytest.mark.parametrize("name", ["A", "B"])
def test_clients_that_agree_on_one_factor_leave_no_residual(name):
    first, *others = factors_of(3)
    others = [LowRankDelta(**({"A": d.A, "B": d.B, "scaling": 2.0} | {name: getattr(first, name)})) for d in others]
    _, residual = aggregate_one(FedExAggregator(), [first, *others], [1, 2, 3])
    assert np.linalg.norm(product(residual).astype(float)) < 1e-12


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]])
@pytest.mark.parametrize("name", ["fedex", "fedit"])
def test_the_order_of_the_clients_does_not_matter(name, order):
    factors, weights = factors_of(4), [5, 1, 9, 2]
    mean, residual = aggregate_one(get_aggregator(name), factors, weights)
    mixed, mixed_residual = aggregate_one(
        get_aggregator(name), [factors[i] for i in order], [weights[i] for i in order]
    )
    assert torch.allclose(mean.A, mixed.A, rtol=0, atol=1e-7)
    assert torch.allclose(mean.B, mixed.B, rtol=0, atol=1e-7)
    if name == "fedex":
        assert error(product(mixed_residual), product(residual)) < 5e-7


def test_only_the_ratio_of_the_weights_counts():
    factors = factors_of(3)
    mean, residual = aggregate_one(FedExAggregator(), factors, [1, 2, 5])
    scaled, scaled_residual = aggregate_one(FedExAggregator(), factors, [1024, 2048, 5120])
    assert torch.equal(mean.A, scaled.A)
    assert torch.equal(residual.A, scaled_residual.A)
    assert torch.equal(residual.B, scaled_residual.B)
    other, _ = aggregate_one(FedExAggregator(), factors, [1, 2, 6])
    assert not torch.allclose(mean.A, other.A)


def test_weights_become_shares():
    assert normalise([30, 10], 2).tolist() == [0.75, 0.25]
    assert normalise([0.1] * 7, 7).sum().item() == pytest.approx(1.0, abs=1e-15)
    assert normalise(torch.tensor([1.0, 3.0]), 2).dtype == torch.float64


def test_a_large_common_part_costs_no_accuracy():
    """Late in a run clients differ little from one another; the twin shows what the naive formula makes of it."""
    factors, weights = factors_of(3, offset=1e4), [12, 7, 9]
    expected = ideal(factors, weights) - fedit(factors, weights)
    _, residual = aggregate_one(FedExAggregator(), factors, weights)
    assert error(product(residual), expected) < 1e-6

    shares = [float(w) for w in share(weights)]
    A = sum(w * delta.A for w, delta in zip(shares, factors))
    B = sum(w * delta.B for w, delta in zip(shares, factors))
    naive = 2.0 * (sum(w * (delta.B @ delta.A) for w, delta in zip(shares, factors)) - B @ A)
    assert naive.dtype == torch.float32
    assert error(wide(naive), expected) > 1.0


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_residual_rank_is_the_best_approximation(rank):
    factors, weights = factors_of(3), [12, 7, 9]
    expected = ideal(factors, weights) - fedit(factors, weights)
    aggregator = FedExAggregator(residual_rank=rank)
    mean, residual = aggregate_one(aggregator, factors, weights)
    assert not aggregator.is_exact
    assert residual.rank == rank
    U, S, Vh = np.linalg.svd(expected.astype(float), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert error(product(residual), best) < 1e-6
    assert np.linalg.norm((product(residual) - expected).astype(float)) == pytest.approx(
        np.linalg.norm(S[rank:]), rel=1e-6
    )
    assert np.linalg.norm(S[rank:]) > 0.1 * np.linalg.norm(S)
    assert torch.equal(mean.A, aggregate_one(FedITAggregator(), factors, weights)[0].A)


@pytest.mark.parametrize("rank", [6, 7, 100])
def test_a_residual_rank_that_is_enough_loses_nothing(rank):
    factors, weights = factors_of(3), [12, 7, 9]
    _, residual = aggregate_one(FedExAggregator(residual_rank=rank), factors, weights)
    assert residual.rank == 2 * RANK
    assert error(product(residual), ideal(factors, weights) - fedit(factors, weights)) < 3e-7


def test_a_truncated_residual_of_clients_that_agree_is_zero():
    _, residual = aggregate_one(FedExAggregator(residual_rank=4), factors_of(1) * 3, [1, 1, 1])
    assert np.linalg.norm(product(residual).astype(float)) < 1e-12


@pytest.mark.parametrize("rank", [0, -1])
def test_residual_rank_must_be_positive(rank):
    with pytest.raises(ValueError, match=rf"`residual_rank={rank}`.*`fedit`"):
        FedExAggregator(residual_rank=rank)


def test_full_residual_is_exact():
    assert FedExAggregator().is_exact
    assert FedExAggregator().changes_base
    assert not FedITAggregator().is_exact
    assert FFALoRAAggregator().is_exact


# ---- FedIT ----


def test_fedit_averages_factors_and_leaves_the_base_alone():
    factors, weights = factors_of(3), [12, 7, 9]
    update = FedITAggregator().aggregate(updates_of(factors), weights)
    assert update.residuals == {}
    assert error(product(update.adapters["layer"]), fedit(factors, weights)) < 2e-7
    # The reason for the rest of this package:
    assert error(product(update.adapters["layer"]), ideal(factors, weights)) > 0.1


# ---- FFA-LoRA ----


class TwoFactors(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        self.head = nn.Linear(4, 2)


def test_ffa_freezes_every_lora_a_and_nothing_else():
    model = nn.Sequential(TwoFactors(), TwoFactors())
    FFALoRAAggregator().configure_model(model)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name for name, value in trained.items() if not value} == {
        "0.lora_A.default.weight",
        "1.lora_A.default.weight",
    }
    assert sum(trained.values()) == 6


def test_ffa_refuses_a_model_without_lora():
    with pytest.raises(ValueError, match="`Linear` has no `lora_A` parameter to freeze"):
        FFALoRAAggregator().configure_model(nn.Linear(3, 3))


def test_ffa_is_exact_for_one_a():
    first, *others = factors_of(3)
    factors = [first, *(LowRankDelta(first.A, delta.B, delta.scaling) for delta in others)]
    mean, residual = aggregate_one(FFALoRAAggregator(), factors, [12, 7, 9])
    assert residual is None
    assert torch.equal(mean.A, first.A)
    assert error(product(mean), ideal(factors, [12, 7, 9])) < 1e-7


def test_ffa_refuses_a_that_differ():
    first, second = factors_of(2)
    changed = first.A.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(torch.inf))
    with pytest.raises(ValueError, match=r"`A` factors differ.*`configure_model`"):
        aggregate_one(FFALoRAAggregator(), [first, LowRankDelta(changed, second.B, 2.0)], [1, 1])


# ---- What every method shares ----


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_means_are_taken_in_float64_and_rounded_once(name, dtype):
    first, *others = factors_of(5, dtype=dtype)
    factors = [first, *(LowRankDelta(first.A, delta.B, delta.scaling) for delta in others)]
    heads = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)]
    # Shares are sixteenths: every sum below is exact in float64, so there is one right answer, to the bit.
    weights = [3, 1, 4, 1, 7]
    update = get_aggregator(name).aggregate(updates_of(factors, [{"head": head} for head in heads]), weights)

    def expected(tensors):
        return torch.from_numpy(mean_of(tensors, weights).astype(float)).to(dtype)

    B = update.adapters["layer"].B
    assert B.dtype == update.adapters["layer"].A.dtype == dtype
    assert torch.equal(B, expected([delta.B for delta in factors]))
    assert torch.equal(update.adapters["layer"].A, first.A)
    assert update.tensors["head"].dtype == dtype
    assert torch.equal(update.tensors["head"], expected(heads))
    if dtype != torch.float64:  # the twin: summed in the factors' own dtype
        assert not torch.equal(B, sum(delta.B * (w / 16) for w, delta in zip(weights, factors)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_makes_up_for_rounding_the_means(dtype):
    """The means go back to the clients in their dtype; what that rounding takes away is in the float32 residual."""
    factors, weights = factors_of(3, dtype=dtype), [12, 7, 9]
    mean, residual = aggregate_one(FedExAggregator(), factors, weights)
    assert mean.A.dtype == mean.B.dtype == dtype
    assert residual.A.dtype == residual.B.dtype == torch.float32
    assert residual.rank == 2 * 3 + 2 * 3  # (k - 1) r and 2 r
    assert error(product(mean) + product(residual), ideal(factors, weights)) < 3e-7
    # The twin: the residual around the means that were not rounded.
    around_exact = ideal(factors, weights) - fedit(factors, weights)
    assert error(product(mean) + around_exact, ideal(factors, weights)) > 1e-4


def test_a_method_that_hides_its_residual_is_refused():
    class Hidden(FedExAggregator):
        changes_base = False

    with pytest.raises(ValueError, match=r"`Hidden\.aggregate_layer` returned a residual for `layer`"):
        aggregate_one(Hidden(), factors_of(3), [1, 1, 1])


@pytest.mark.parametrize("rank", [0, -2, 2.5, "4"])
def test_a_residual_rank_that_is_no_rank_is_refused(rank):
    with pytest.raises(ValueError, match="`residual_rank="):
        FedExAggregator(residual_rank=rank)


def test_clients_in_different_dtypes_are_refused():
    first, second = factors_of(1)[0], factors_of(1, dtype=torch.bfloat16)[0]
    with pytest.raises(ValueError, match="same dtype"):
        aggregate_one(FedExAggregator(), [first, second], [1, 1])


def test_layers_do_not_mix():
    first, second = factors_of(3, seed=1), factors_of(3, seed=2, rank=2, scaling=0.5)
    updates = [ClientUpdate(f"client-{i}", 1, 10, {"one": a, "two": b}) for i, (a, b) in enumerate(zip(first, second))]
    update = FedExAggregator().aggregate(updates, [1, 2, 3])
    assert list(update.adapters) == list(update.residuals) == ["one", "two"]
    for layer, factors in {"one": first, "two": second}.items():
        found = product(update.adapters[layer]) + product(update.residuals[layer])
        assert error(found, ideal(factors, [1, 2, 3])) < 3e-7


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_the_clients_tensors_are_left_alone(name):
    first, second = factors_of(2)
    factors = [first, LowRankDelta(first.A, second.B, 2.0)]
    tensors = [{"head": torch.ones(3)}, {"head": torch.zeros(3)}]
    copies = [(delta.A.clone(), delta.B.clone()) for delta in factors]
    update = get_aggregator(name).aggregate(updates_of(factors, tensors), [1, 3])
    update.adapters["layer"].B.zero_()
    assert update.tensors["head"].tolist() == [0.25] * 3
    assert tensors[0]["head"].tolist() == [1.0] * 3
    for delta, (A, B) in zip(factors, copies, strict=True):
        assert torch.equal(delta.A, A)
        assert torch.equal(delta.B, B)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0], "positive finite"),
        ([1.0, -1.0], "positive finite"),
        ([1.0, float("nan")], "positive finite"),
        ([1.0, float("inf")], "positive finite"),
        ([1.0], r"shape \(1,\) for 2 updates"),
        ([1.0, 1.0, 1.0], r"shape \(3,\) for 2 updates"),
        ([[1.0, 1.0]], r"shape \(1, 2\) for 2 updates"),
        ([], r"shape \(0,\) for 2 updates"),
    ],
)
def test_bad_weights(name, weights, message):
    with pytest.raises(ValueError, match=f"`client_weights`.*{message}|{message}"):
        get_aggregator(name).aggregate(updates_of(factors_of(1) * 2), weights)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_no_updates(name):
    with pytest.raises(ValueError, match="at least one update"):
        get_aggregator(name).aggregate([], [])


def _other(delta, **changes):
    return LowRankDelta(**({"A": delta.A, "B": delta.B, "scaling": delta.scaling} | changes))


MISMATCHES = {
    "rank": (lambda d: {"x.query": _other(d, A=d.A[:2], B=d.B[:, :2])}, {"head": torch.ones(3)}, "x.query"),
    "in": (lambda d: {"x.query": _other(d, A=d.A[:, :5])}, {"head": torch.ones(3)}, "x.query"),
    "out": (lambda d: {"x.query": _other(d, B=d.B[:5])}, {"head": torch.ones(3)}, "x.query"),
    "scaling": (lambda d: {"x.query": _other(d, scaling=1.0)}, {"head": torch.ones(3)}, "x.query"),
    "missing-layer": (lambda d: {}, {"head": torch.ones(3)}, "x.query"),
    "other-layer": (lambda d: {"x.query": d, "x.key": d}, {"head": torch.ones(3)}, "x.key"),
    "tensor-shape": (lambda d: {"x.query": d}, {"head": torch.ones(1, 3)}, "head"),
    "missing-tensor": (lambda d: {"x.query": d}, {}, "head"),
    "other-tensor": (lambda d: {"x.query": d}, {"head": torch.ones(3), "bias": torch.ones(1)}, "bias"),
}


@pytest.mark.parametrize("position", [1, 2])
@pytest.mark.parametrize(("adapters", "tensors", "key"), MISMATCHES.values(), ids=MISMATCHES)
def test_updates_that_do_not_fit_together(adapters, tensors, key, position):
    delta = factors_of(1)[0]
    updates = [ClientUpdate(f"client-{i}", 1, 10, {"x.query": delta}, {"head": torch.ones(3)}) for i in range(3)]
    FedExAggregator().aggregate(updates, [1, 1, 1])
    updates[position] = ClientUpdate(f"client-{position}", 1, 10, adapters(delta), tensors)
    with pytest.raises(ValueError, match=rf"`client-0` and `client-{position}` do not fit together: `{key}`"):
        FedExAggregator().aggregate(updates, [1, 1, 1])


# ---- Ranks that differ ----


def mixed_updates(ranks, start, dtype=torch.float32, noise=0.5):
    """Clients of some ranks that have trained from `start`: every number moved, scaling `8 / r`."""
    generator = torch.Generator().manual_seed(7)
    updates = []
    for i, rank in enumerate(ranks):
        own, offset = start_at_rank(start, rank, 8 / rank, f"key {i}")
        A = own.A + noise * torch.randn(own.A.shape, generator=generator).to(dtype)
        B = own.B + noise * torch.randn(own.B.shape, generator=generator).to(dtype)
        offsets = {} if offset is None else {"layer": offset}
        updates.append(ClientUpdate(f"client-{i}", 1, 10, {"layer": LowRankDelta(A, B, own.scaling)}, offsets=offsets))
    return updates


def ideal_with_offsets(updates, weights):
    def whole(update):
        offset = update.offsets.get("layer")
        return product(update.adapters["layer"]) + (0 if offset is None else product(offset))

    return sum(w * whole(update) for w, update in zip(share(weights), updates, strict=True))


def replace_factors(update, delta):
    return replace(update, adapters={"layer": delta})


def experts_of(deltas):
    return LowRankDelta(
        torch.stack([delta.A for delta in deltas]), torch.stack([delta.B for delta in deltas]), deltas[0].scaling
    )


GLOBAL = 4
RANKS = {
    "smaller": ([2], 0),
    "larger": ([7], 3),
    "around": ([2, 4, 8], 4),
    "all smaller": ([3, 1, 3], 0),
    "all larger": ([5, 6], 1 + 2),
    "none": ([4, 4, 4], 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "surplus"), RANKS.values(), ids=RANKS)
def test_ranks_that_differ_are_brought_together_exactly(ranks, surplus, dtype):
    (start,) = factors_of(1, rank=GLOBAL, dtype=dtype)
    weights = [3, 1, 2][: len(ranks)]
    updates = mixed_updates(ranks, start, dtype)
    update = FedExAggregator().aggregate(updates, weights, start=GlobalUpdate({"layer": start}))
    mean, residual = update.adapters["layer"], update.residuals.get("layer")
    assert mean.A.shape == start.A.shape
    assert mean.B.shape == start.B.shape
    assert mean.A.dtype == mean.B.dtype == dtype
    assert mean.scaling == start.scaling
    found = product(mean) + (0 if residual is None else product(residual))
    assert error(found, ideal_with_offsets(updates, weights)) < 5e-7
    if dtype == torch.float32:
        rank = 0 if residual is None else residual.rank
        assert rank == min((len(ranks) - 1) * GLOBAL + surplus, IN, OUT)
    # The twins: without what smaller clients did not train, and without what did not fit.
    factors = [update.adapters["layer"] for update in updates]
    cut = [_other(delta, A=delta.A[:GLOBAL], B=delta.B[:, :GLOBAL]) for delta in factors]
    assert (error(found, ideal(factors, weights)) > 1e-2) == (min(ranks) < GLOBAL)
    without = ideal_with_offsets([replace_factors(u, d) for u, d in zip(updates, cut, strict=True)], weights)
    assert (error(found, without) > 1e-2) == (max(ranks) > GLOBAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 9])
def test_a_client_of_any_rank_starts_from_the_global_update(rank, dtype):
    (start,) = factors_of(1, rank=GLOBAL, dtype=dtype)
    own, offset = start_at_rank(start, rank, 8 / rank, "key")
    assert own.A.shape == (rank, IN)
    assert own.B.shape == (OUT, rank)
    assert own.A.dtype == own.B.dtype == dtype
    found = product(own) + (0 if offset is None else product(offset))
    assert error(found, product(start)) < {torch.float64: 1e-15}.get(dtype, 1e-7)
    assert torch.equal(own.A[:GLOBAL], start.A[:rank])
    assert (offset is not None) == (rank < GLOBAL or (dtype == torch.bfloat16 and rank != GLOBAL))
    if rank > GLOBAL:
        assert not own.B[:, GLOBAL:].any()
        assert 0 < own.A[GLOBAL:].abs().max() <= IN**-0.5


def test_the_global_rank_is_not_touched():
    (start,) = factors_of(1, rank=GLOBAL)
    assert start_at_rank(start, GLOBAL, start.scaling, "key") == (start, None)
    factors, weights = factors_of(3, rank=GLOBAL), [1, 2, 3]
    plain = FedExAggregator().aggregate(updates_of(factors), weights)
    told = FedExAggregator().aggregate(updates_of(factors), weights, start=GlobalUpdate({"layer": start}))
    for one, other in ((plain.adapters, told.adapters), (plain.residuals, told.residuals)):
        assert torch.equal(one["layer"].A, other["layer"].A)
        assert torch.equal(one["layer"].B, other["layer"].B)


def test_experts_of_different_ranks():
    """Every expert is aggregated as if it were a layer of its own."""
    starts = factors_of(2, rank=GLOBAL)
    each = [mixed_updates([2, 6], start) for start in starts]
    updates = []
    for client in range(2):
        offsets = [updates[client].offsets.get("layer") for updates in each]
        updates.append(
            ClientUpdate(
                f"client-{client}",
                1,
                10,
                {"layer": experts_of([updates[client].adapters["layer"] for updates in each])},
                offsets={} if None in offsets else {"layer": experts_of(offsets)},
            )
        )
    start = GlobalUpdate({"layer": experts_of(starts)})
    update = FedExAggregator().aggregate(updates, [1, 3], start=start)
    found = product(update.adapters["layer"]) + product(update.residuals["layer"])
    for expert, alone in enumerate(each):
        assert error(found[expert], ideal_with_offsets(alone, [1, 3])) < 3e-7


def test_a_truncated_residual_is_the_best_of_all_of_it():
    """What does not fit into the global rank is truncated together with the rest."""
    (start,) = factors_of(1, rank=GLOBAL)
    updates, weights = mixed_updates([2, 4, 8], start), [3, 1, 2]
    told = GlobalUpdate({"layer": start})
    whole = product(FedExAggregator().aggregate(updates, weights, start=told).residuals["layer"]).astype(float)
    residual = FedExAggregator(residual_rank=3).aggregate(updates, weights, start=told).residuals["layer"]
    U, S, Vh = np.linalg.svd(whole, full_matrices=False)
    assert residual.rank == 3
    assert error(product(residual), (U[:, :3] * S[:3]) @ Vh[:3]) < 1e-6


def test_a_mean_of_different_ranks_counts_zeros():
    """FedIT's side of the certificate where ranks differ."""
    (start,) = factors_of(1, rank=GLOBAL)
    factors = [update.adapters["layer"] for update in mixed_updates([2, 4, 6], start)]
    padded = [
        (np.pad(wide(d.A), ((0, 6 - d.rank), (0, 0))), d.scaling * np.pad(wide(d.B), ((0, 0), (0, 6 - d.rank))))
        for d in factors
    ]
    weights = normalise([1, 2, 3], 3)
    A, B = (sum(w * each[i] for w, each in zip(share([1, 2, 3]), padded)) for i in (0, 1))
    assert error(product(mean_factors(factors, weights)), B @ A) < 3e-7


@pytest.mark.parametrize(
    ("aggregator", "change", "message"),
    [
        (FedITAggregator(), {}, "`client-0` trained on a base with an offset"),
        (FedITAggregator(), {"offsets": {}}, r"`client-0` has rank 2 in `layer`, and the global rank is 4"),
        (FedExAggregator(assignment="keep"), {"offsets": {}}, "`client-0` has rank 2.*does not say `mixes_ranks`"),
        (FedExAggregator(), {"offsets": {}}, r"`client-0`: its 2 rows in `layer`.* do not complete the 4 global ones"),
        (FedExAggregator(), {"adapters": {}}, "`client-0`: `layer` is only among the layers that all started from"),
        (FedExAggregator(), {"adapters": {"other": factors_of(1)[0]}}, "`client-0`: `(layer|other)` is only"),
        (
            FedExAggregator(),
            {"adapters": {"layer": LowRankDelta(torch.ones(4, 3), torch.ones(OUT, 4))}, "offsets": {}},
            r"of size \(23, 3\), do not complete",
        ),
    ],
)
def test_ranks_that_cannot_be_brought_together(aggregator, change, message):
    (start,) = factors_of(1, rank=GLOBAL)
    first, second = mixed_updates([2, 4], start)
    with pytest.raises(ValueError, match=message):
        aggregator.aggregate([replace(first, **change), second], [1, 1], start=GlobalUpdate({"layer": start}))


def test_ranks_that_differ_need_to_be_told_what_all_started_from():
    (start,) = factors_of(1, rank=GLOBAL)
    for ranks, message in (([2, 2], r"an offset.*start=state"), ([4, 6], r"do not fit together.*`start`")):
        with pytest.raises(ValueError, match=message):
            FedExAggregator().aggregate(mixed_updates(ranks, start), [1, 1])


# ---- The registry ----


def test_names_are_keys():
    assert set(AGGREGATORS) == {"fedex", "fedit", "ffa"}
    for name, cls in AGGREGATORS.items():
        assert cls.name == name
        assert type(get_aggregator(name)) is cls
        assert cls.paper.startswith("https://arxiv.org/abs/")


def test_arguments_reach_the_method():
    aggregator = get_aggregator("fedex", residual_rank=4)
    assert aggregator.residual_rank == 4
    assert not aggregator.is_exact


def test_an_instance_is_taken_as_it_is():
    class Own(FedITAggregator):
        name = "own"

    own = Own()
    assert get_aggregator(own) is own
    assert isinstance(own, Aggregator)


@pytest.mark.parametrize(
    ("name", "kwargs", "kind", "message"),
    [
        ("fedavg", {}, ValueError, "`aggregator='fedavg'` is unknown. Allowed: 'fedex', 'fedit', 'ffa'"),
        ("FedEx", {}, ValueError, "is unknown"),
        ("", {}, ValueError, "is unknown"),
        (FedExAggregator(), {"residual_rank": 2}, ValueError, "already a `FedExAggregator`"),
        (FedExAggregator, {}, TypeError, "`aggregator` is a `ABCMeta`"),
        (None, {}, TypeError, "`aggregator` is a `NoneType`"),
        ("fedit", {"residual_rank": 2}, TypeError, "do not fit the aggregator `fedit`"),
        ("fedex", {"rank": 2}, TypeError, "do not fit the aggregator `fedex`"),
        ("fedex", {"residual_rank": 0}, ValueError, "`residual_rank=0`"),
    ],
)
def test_registry_errors(name, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        get_aggregator(name, **kwargs)


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="aggregate_layer"):
        Aggregator()
