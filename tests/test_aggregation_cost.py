"""What a round's aggregation costs, counted and not timed: products, decompositions and bytes, in known cases."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from aggregation import measure, measure_ledger
from aggregation_results import Machine
from aggregation_sides import Case, Layer, Ours, aggregate, dense, dense_all, errors_of, fold, name_of
from aggregation_sides import updates_of as updates_of_benchmark
from memory import _peak_allocated
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedex_hf import ClientUpdate, FedExAggregator, Ledger, LowRankDelta
from fedex_hf.aggregators import fedex
from fedex_hf.aggregators.fedex import means_and_residual
from fedex_hf.lora_site import sites_of
from fedex_hf.low_rank import compress, concatenate, narrowed, needs_every_factor


OUT, IN, SCALING = 384, 256, 0.75
DECOMPOSITIONS = ("linalg_qr", "_linalg_svd", "_linalg_eigh", "geqrf")


class Costs(TorchDispatchMode):
    """Counts what torch does while the mode is on.

    Attributes:
        calls: Of torch's operators but views.
        operations: Of all matrix products, multiplications and additions.
        decompositions: Names of the decompositions.
        allocations: Bytes of every tensor with memory of its own that an operator returned.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.operations, self.decompositions, self.allocations = 0, 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls += not func.is_view
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            left, right = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            self.operations += 2 * left.numel() * right.shape[-1]
        self.decompositions += [name] if name in DECOMPOSITIONS else []
        given = {each.untyped_storage().data_ptr() for each in _tensors([*args, *(kwargs or {}).values()])}
        new = [each for each in _tensors([found]) if each.untyped_storage().data_ptr() not in given]
        self.allocations += [each.untyped_storage().nbytes() for each in new]
        return found


class Held(TorchDispatchMode):
    """Counts what is allocated and not freed while the mode is on, on any device.

    Args:
        given: Tensors that were there before.

    Attributes:
        peak: The most there was at a time, bytes.
    """

    def __init__(self, given):
        super().__init__()
        self.now, self.peak = 0, 0
        self.known = {each.untyped_storage()._cdata for each in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for storage in [each.untyped_storage() for each in _tensors([found])]:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return found

    def _freed(self, storage, nbytes):
        self.known.discard(storage)
        self.now -= nbytes


def _tensors(values):
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from _tensors(each)


def factors_of(clients, rank, *, experts=(), seed=0, dtype=torch.float32, size=(OUT, IN)):
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRankDelta(
            torch.randn(*experts, rank, size[1], generator=generator).to(dtype),
            torch.randn(*experts, size[0], rank, generator=generator).to(dtype),
            SCALING,
        )
        for _ in range(clients)
    ]


def shares(clients):
    weights = torch.arange(1, clients + 1, dtype=torch.float64)
    return weights / weights.sum()


def server(factors):
    aggregator = FedExAggregator()
    mean, residual = aggregator.aggregate_layer(factors, shares(len(factors)))
    return mean, aggregator.shorten(residual)


def nbytes(deltas):
    return sum(delta.nbytes for delta in deltas)


def ideal(factors):
    return sum(
        weight * SCALING * (delta.B.double().numpy() @ delta.A.double().numpy())
        for weight, delta in zip(shares(len(factors)).numpy(), factors, strict=True)
    )


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def effective(mean, residual):
    return sum(delta.scaling * (delta.B.double().numpy() @ delta.A.double().numpy()) for delta in (mean, residual))


# ---- The server ----


@pytest.mark.parametrize("experts", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize(("clients", "rank"), [(2, 4), (3, 4), (3, 32), (10, 8)])
def test_no_product_no_decomposition_and_few_bytes(clients, rank, experts):
    factors = factors_of(clients, rank, experts=experts)
    with Costs() as costs:
        results = server(factors)
    assert costs.operations == 0
    assert costs.decompositions == []
    # Float64 once, the mean, the results: however often they are, these are all the bytes there were.
    assert sum(costs.allocations) < 5 * nbytes(factors)
    assert len(costs.allocations) < 40
    assert results[1].rank == (clients - 1) * rank


def test_the_dense_formula_costs_more():
    """The twin: what the bounds above are good for."""
    factors, W = factors_of(3, 4), torch.zeros(OUT, IN)
    with Costs() as costs:
        dense(W, factors)
    assert costs.operations == 2 * OUT * IN * 4 * (3 + 1)
    assert sum(costs.allocations) > 5 * nbytes(factors)
    with Costs() as costs:
        server(factors)
    assert costs.operations == 0


@pytest.mark.parametrize("clients", [80, 200])
def test_many_clients_cost_one_product(clients):
    rank, smaller = 4, min(OUT, IN)
    stacked = (clients - 1) * rank
    assert stacked > smaller
    factors = factors_of(clients, rank)
    with Costs() as costs:
        mean, residual = server(factors)
    assert costs.operations == 2 * OUT * IN * stacked
    assert costs.decompositions == []
    assert residual.rank == smaller
    assert error(effective(mean, residual), ideal(factors)) < 4e-7
    # The twin: a decomposition finds the same.
    with Costs() as costs:
        compress(means_and_residual(factors, shares(clients))[1])
    assert costs.decompositions


def test_many_clients_where_float32_was_given_fewer_digits():
    factors = factors_of(80, 4)
    with tiny.fewer_digits():
        mean, residual = server(factors)
    assert residual.rank == IN
    assert error(effective(mean, residual), ideal(factors)) < 6e-8 < error(effective(*server(factors)), ideal(factors))


@pytest.mark.parametrize("clients", [65, 66, 300])
def test_where_a_residual_turns_into_a_product(clients):
    """65 clients leave as many factors as the smaller side has numbers, 66 more; 300 are several products."""
    factors = factors_of(clients, 4)
    mean, residual = server(factors)
    assert (residual.product is not None) == (clients > 65)
    assert residual.rank == IN
    assert error(effective(mean, residual), ideal(factors)) < 4e-7
    exact = means_and_residual(factors, shares(clients))[0]
    assert torch.equal(mean.A, exact.A.float())
    assert torch.equal(mean.B, exact.B.float())


def test_many_clients_that_agree_lose_no_digits():
    """What is multiplied out are distances between clients: the dense formula subtracts nearly equal products."""
    shared, clients = factors_of(1, 4)[0], 100
    factors = [
        LowRankDelta(shared.A + 1e-2 * own.A, shared.B + 1e-2 * own.B, SCALING) for own in factors_of(clients, 4)
    ]
    weights = shares(clients).numpy()
    A, B = (np.stack([getattr(delta, name).double().numpy() for delta in factors]) for name in "AB")
    A, B = (each - np.tensordot(weights, each, 1) for each in (A, B))
    expected = SCALING * np.einsum("k,kmr,krn->mn", weights, B, A, optimize=True)
    residual = server(factors)[1]
    assert residual.rank == IN
    assert error(residual.to_dense().numpy(), expected) < 4e-7
    W = torch.zeros(OUT, IN)  # the twin, with equal weights
    dense(W, factors)
    A, B = (np.stack([getattr(delta, name).double().numpy() for delta in factors]) for name in "AB")
    expected = 2.0 * np.einsum("kmr,krn->mn", B - B.mean(0), A - A.mean(0), optimize=True) / clients
    assert error(W.double().numpy(), expected) > 1e-4


@pytest.mark.parametrize(
    ("clients", "rank", "size"),
    [
        (2, 16, (768, 768)),
        (3, 4, (768, 3072)),
        (10, 32, (768, 768)),
        (3, 4, (8192, 3072)),
        (26, 32, (768, 768)),
        (50, 32, (2304, 768)),
    ],
    ids=str,
)
def test_temporary_memory_is_at_most_twice_the_factors(clients, rank, size):
    factors = factors_of(clients, rank, size=size)
    with _peak_allocated() as peaks:
        results = server(factors)
    assert peaks["whole run"] > nbytes(results)  # the profiler has seen something
    assert peaks["whole run"] - nbytes(results) < 2 * nbytes(factors)


def test_only_one_residual_is_held_whole_at_a_time():
    """What `residual_rank` cuts away is not kept until the last layer."""
    updates = updates_of({f"layer {place}": ((1024, 1024), ()) for place in range(8)}, clients=20)
    aggregator = FedExAggregator(residual_rank=1)
    with _peak_allocated() as peaks:
        results = aggregator.aggregate(updates, [1] * 20)
    made = nbytes([*results.adapters.values(), *results.residuals.values()])
    assert peaks["whole run"] - made < sum(nbytes(each.adapters.values()) for each in updates)
    with _peak_allocated() as peaks:  # the twin
        held = list(
            aggregator.aggregate_layers({n: [u.adapters[n] for u in updates] for n in results.adapters}, shares(20))
        )
    assert peaks["whole run"] > 0.9 * sum(nbytes(each.adapters.values()) for each in updates)
    assert len(held) == 8


def test_temporary_memory_of_the_dense_formula():
    """The twin."""
    factors = factors_of(3, 4, size=(768, 3072))
    W = torch.zeros(768, 3072)
    with _peak_allocated() as peaks:
        dense(W, factors)
    assert peaks["whole run"] > 20 * nbytes(factors)


@pytest.mark.parametrize("block", [(1, 1), (1, 7), (1, 100), (1, 2**18), (2**18, 2**18)], ids=str)
@pytest.mark.parametrize("experts", [(), (3,)], ids=["matrix", "experts"])
def test_blocks_change_no_bit(block, experts, monkeypatch):
    factors = factors_of(3, 2, experts=experts, size=(23, 17))
    expected = means_and_residual(factors, shares(3))
    monkeypatch.setitem(fedex._BLOCKS, "cpu", block)
    found = means_and_residual(factors, shares(3))
    for left, right in zip(expected, found, strict=True):
        assert torch.equal(left.A, right.A)
        assert torch.equal(left.B, right.B)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_each_number_of_the_residual_is_rounded_once(offset):
    """However the work is cut up, what travels is the float64 formula, rounded to float32."""
    factors = [LowRankDelta(delta.A + offset, delta.B + offset, SCALING) for delta in factors_of(3, 4)]
    weights = shares(3).numpy()
    residual = means_and_residual(factors, shares(3))[1]

    def contrasts(tensors, dtype):
        stacked = [tensor.numpy().astype(dtype) for tensor in tensors]
        u = dtype(np.sqrt(weights[0]))
        point = (u * stacked[0] + sum(dtype(w) * x for w, x in zip(weights, stacked, strict=True))) / (1 + u)
        return [dtype(np.sqrt(w)) * (x - point) for w, x in zip(weights[1:], stacked[1:], strict=True)]

    def exact(dtype):
        A = np.concatenate(contrasts([delta.A for delta in factors], dtype), axis=0).astype(np.float32)
        B = np.concatenate(contrasts([delta.B for delta in factors], dtype), axis=1).astype(np.float32)
        return A, B

    def differing(dtype):
        pairs = zip(exact(dtype), (residual.A.numpy(), residual.B.numpy()), strict=True)
        return max(np.mean(expected != found) for expected, found in pairs)

    assert differing(np.longdouble) < 1e-3
    assert differing(np.float32) > 0.3  # the twin


class OneByOne(FedExAggregator):
    """Defines `aggregate_layer` itself, which then gets what it is promised: one layer at a time."""

    def aggregate_layer(self, factors, client_weights):
        assert all(delta.A.ndim == 2 for delta in factors)
        return super().aggregate_layer(factors, client_weights)


def updates_of(layers, clients=3, dtype=torch.float32, device="cpu"):
    """Layers as name -> (size, experts)."""
    factors = {
        name: [
            LowRankDelta(delta.A.to(device), delta.B.to(device), delta.scaling)
            for delta in factors_of(clients, 4, experts=experts, seed=seed, dtype=dtype, size=size)
        ]
        for seed, (name, (size, experts)) in enumerate(layers.items())
    }
    return [
        ClientUpdate(f"client-{place}", 1, 1, {name: each[place] for name, each in factors.items()})
        for place in range(clients)
    ]


@pytest.mark.parametrize("settings", [{}, {"residual_rank": 3}, {"assignment": "reinitialise"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("clients", [1, 2, 5])
def test_layers_together_equal_one_by_one_bit_for_bit(settings, dtype, clients):
    layers = {f"layer {place}": ((OUT, IN) if place % 3 else (96, 64), ()) for place in range(9)}
    updates, weights = updates_of(layers, clients, dtype), [3.0, 2.0, 1.0, 5.0, 4.0][:clients]
    together = FedExAggregator(**settings).aggregate(updates, weights)
    expected = OneByOne(**settings).aggregate(updates, weights)
    assert list(together.adapters) == list(layers)
    for found, wanted in ((together.adapters, expected.adapters), (together.residuals, expected.residuals)):
        assert found.keys() == wanted.keys()
        for name, delta in wanted.items():
            assert found[name].scaling == delta.scaling
            for factor in "AB":
                assert torch.equal(getattr(found[name], factor), getattr(delta, factor))
                assert getattr(found[name], factor).is_contiguous()


def test_small_layers_of_one_shape_take_few_calls():
    updates = updates_of({f"layer {place}": ((64, 96), ()) for place in range(24)})
    with Costs() as together:
        FedExAggregator().aggregate(updates, [1, 1, 1])
    with Costs() as one:
        FedExAggregator().aggregate(
            [ClientUpdate(each.client_id, 1, 1, {"layer 0": each.adapters["layer 0"]}) for each in updates], [1, 1, 1]
        )
    assert len(together.allocations) < 2 * len(one.allocations)
    with Costs() as one_by_one:  # the twin
        OneByOne().aggregate(updates, [1, 1, 1])
    assert len(one_by_one.allocations) > 8 * len(together.allocations)


@pytest.mark.parametrize(("size", "number"), [((768, 768), 24), ((3072, 3072), 56), ((8192, 3072), 56)], ids=str)
def test_elsewhere_than_on_a_cpu_a_model_takes_few_calls(size, number):
    """There each call costs more than most layers' arithmetic. The device "meta" takes the same branches as a GPU."""
    updates = updates_of({f"layer {place}": (size, ()) for place in range(number)}, device="meta")
    with Costs() as model:
        FedExAggregator().aggregate(updates, [1, 1, 1])
    assert model.calls < 100
    with Costs() as one_by_one:  # the twin
        OneByOne().aggregate(updates, [1, 1, 1])
    assert one_by_one.calls > 20 * number


def test_elsewhere_than_on_a_cpu_many_clients_take_as_many_calls_as_few():
    calls = []
    for clients in (3, 40):
        updates = updates_of({"layer": ((768, 768), ())}, clients, device="meta")
        with Costs() as costs:
            FedExAggregator().aggregate(updates, [1.0] * clients)
        calls.append(costs.calls)
    assert calls[1] < 2 * calls[0]


@pytest.mark.parametrize("sums", [fedex._sum_in_cache, fedex._sum_in_few_calls])
def test_clients_are_summed_in_float64_on_every_device(sums):
    """What a GPU runs, run on the CPU, which takes the other one."""
    tensors = [delta.A for delta in factors_of(7, 4)]
    weights = shares(7)
    doubled = torch.empty(7, 6, IN, dtype=torch.float64).narrow(1, 1, 4)
    total = sums(tensors, weights, doubled)
    expected = np.tensordot(weights.numpy(), np.stack([each.double().numpy() for each in tensors]), 1)
    assert total.dtype == torch.float64
    assert error(total.numpy(), expected) < 1e-15
    assert error(sum(weights.float()[:, None, None] * torch.stack(tensors)).numpy(), expected) > 1e-9  # the twin
    assert torch.equal(doubled, torch.stack(tensors).double())


@pytest.mark.parametrize("clients", [3, 10])
@pytest.mark.parametrize(("size", "number"), [((768, 768), 24), ((3072, 3072), 56), ((8192, 3072), 4)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_temporary_memory_of_layers_together_is_at_most_twice_the_factors(device, size, number, clients):
    updates = updates_of({f"layer {place}": (size, ()) for place in range(number)}, clients, device=device)
    given = [factor for each in updates for delta in each.adapters.values() for factor in (delta.A, delta.B)]
    with Held(given) as held:
        results = FedExAggregator().aggregate(updates, [1.0] * clients)
    made = nbytes([*results.adapters.values(), *results.residuals.values()])
    assert held.peak >= made
    assert held.peak - made < 2 * sum(factor.nbytes for factor in given)
    if device == "cpu":  # counted as torch's profiler counts
        with _peak_allocated() as peaks:
            again = FedExAggregator().aggregate(updates, [1.0] * clients)
        assert again.adapters.keys() == results.adapters.keys()
        assert held.peak == pytest.approx(peaks["whole run"], rel=0.02)


def test_large_layers_and_experts_are_not_stacked():
    """Of those a copy would cost more than the calls."""
    sizes = {"large": ((8192, 3072), ()), "experts": ((64, 96), (3,)), "small": ((64, 96), ())}
    updates = updates_of({f"{kind} {place}": size for kind, size in sizes.items() for place in range(2)})
    results = FedExAggregator().aggregate(updates, [1, 1, 1])
    assert results.residuals["experts 1"].A.shape == (3, 8, 96)
    for kind in sizes:
        A = results.adapters[f"{kind} 0"].A
        assert (A.untyped_storage().nbytes() > A.nbytes) == (kind == "small")  # a view of what was made together


@pytest.mark.parametrize("clients", [2, 3, 40])
def test_both_sides_of_the_benchmark_do_the_same_work(clients):
    layer = Layer("any", 64, 48, 3)
    updates = updates_of_benchmark(layer, 4, clients, copies=3)
    update, ours = aggregate(updates), Ours(layer, 4, copies=3)
    dense_weights, folded = [[torch.zeros(64, 48) for _ in range(3)] for _ in range(2)]
    dense_all(dense_weights, updates)
    fold(folded, update)
    ours.install(ours.ledger(update))
    for place in range(3):
        expected = ours.weight(place).double().numpy()
        assert error(folded[place].double().numpy(), expected) < 1e-6
        assert 1e-6 < error(dense_weights[place].double().numpy(), expected) < 1e-3
    found = errors_of(layer, updates, update.residuals[name_of(0)], ours.weight(0))
    assert max(found["server"], found["install"]) < 5e-7 < found["dense"]


@pytest.mark.parametrize(
    ("size", "rank", "clients", "by"),
    [((64, 48), 4, 3, "install"), ((64, 48), 4, 40, "server"), ((96, 96), 1, 50, "ledger")],
    ids=str,
)
def test_the_benchmark_counts_every_product(size, rank, clients, by):
    """Whoever multiplies the residual out: its time is in what is compared."""
    m, n = size
    case = Case(Layer("any", m, n, 3), rank, clients)
    found = measure(case, Machine(1e9, {torch.float32: 1e9}), seconds=0.0)
    parts = dict.fromkeys(("dense", "server", "install", "ledger"), 1.0)
    assert found.times.keys() - {"copy", "product"} == parts.keys()
    assert min(found.times.values()) > 0
    assert max(found.findings.errors["server"], found.findings.errors["install"]) < 5e-7
    assert replace(found, times=parts).seconds == (3.0 if by == "ledger" else 2.0)
    assert (found.calls is None) == ("copy" not in found.times) == (by == "server")
    stacked = rank * (clients - 1)
    sent = min(m, n) if by == "server" else stacked
    assert found.findings.residual_rank == sent
    moved = 4 * (m + n) * (rank * (clients + 1) + sent)  # factors in, means and residual out
    multiplied = 2 * m * n * stacked
    if by == "server":
        assert found.needs == {"server": (moved / 1e9, multiplied / 1e9), "install": (12 * m * n / 1e9, 0)}
    else:
        read = 4 * (m + n) * sent + 8 * m * n
        assert found.needs == {"server": (moved / 1e9, 0), "install": (read / 1e9, multiplied / 1e9)}


def test_the_benchmark_counts_every_part_of_a_round():
    found = measure_ledger(Case(Layer("any", 96, 96, 1), 1, 50), rounds=2)
    assert found.turned == 1
    assert [len(each) for each in (found.server, found.plus, found.install)] == [2, 2, 2]
    assert min(found.dense, *found.server, *found.plus, *found.install) > 0


# ---- Residuals of large rank ----


@pytest.mark.parametrize("size", [(23, 17), (17, 23), (20, 20), (1100, 30), (30, 1100)], ids=str)
@pytest.mark.parametrize("experts", [(), (2,)], ids=["matrix", "experts"])
def test_narrowed_multiplies_out(size, experts):
    (delta,) = factors_of(1, 300, experts=experts, size=size)
    narrow = narrowed(delta)
    assert narrow.rank == min(size)
    assert narrow.scaling == SCALING
    assert narrow.A.dtype == narrow.B.dtype == torch.float32
    assert narrow.A.is_contiguous()
    assert narrow.B.is_contiguous()
    exact = SCALING * (delta.B.double().numpy() @ delta.A.double().numpy())
    in_float32 = error(narrow.to_dense().numpy(), exact)
    assert in_float32 < 4e-7
    with tiny.fewer_digits():  # on some processors: not for us
        narrow = narrowed(delta)
    assert error(narrow.to_dense().numpy(), exact) < 4e-8 < in_float32  # half a unit in the last place


def test_narrowed_leaves_alone_what_is_narrow():
    (delta,) = factors_of(1, 17, size=(23, 17))
    assert narrowed(delta) is delta


# ---- The rank of a sum ----


def with_spectrum(values, size=(40, 30), seed=0, dtype=torch.float32):
    generator = np.random.default_rng(seed)
    U = np.linalg.qr(generator.normal(size=(size[0], len(values))))[0]
    V = np.linalg.qr(generator.normal(size=(size[1], len(values))))[0]
    root = np.sqrt(values)
    return LowRankDelta(torch.tensor((V * root).T).to(dtype), torch.tensor(U * root).to(dtype), SCALING)


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 1e-8])
def test_a_full_rank_is_seen_without_a_decomposition(smallest):
    delta = with_spectrum(np.geomspace(1.0, smallest, 8))
    with Costs() as costs:
        assert needs_every_factor(delta)
    assert costs.decompositions == []
    assert compress(delta).rank == 8


@pytest.mark.parametrize("seed", range(20))
def test_no_rank_is_called_full_that_compress_would_lower(seed):
    generator = np.random.default_rng(seed)
    rank = int(generator.integers(2, 12))
    plain = with_spectrum(10.0 ** -generator.uniform(0, 14, rank), seed=seed)
    repeated = concatenate([plain, LowRankDelta(plain.A, plain.B * float(generator.normal()), SCALING)])
    mixed = torch.tensor(generator.normal(size=(rank, rank))).float()
    turned = LowRankDelta(mixed @ plain.A, plain.B, SCALING)
    small = LowRankDelta(plain.A, plain.B * 1e-30, SCALING)
    for delta in (plain, repeated, turned, small, LowRankDelta(plain.A, torch.zeros_like(plain.B))):
        assert not needs_every_factor(delta) or compress(delta).rank == delta.rank
    assert not needs_every_factor(repeated)


def test_more_factors_than_the_smaller_side_are_never_needed():
    (delta,) = factors_of(1, 18, size=(23, 17))
    assert not needs_every_factor(delta)
    assert needs_every_factor(narrowed(delta))


def test_one_expert_of_full_rank_is_enough():
    full, less = with_spectrum([3.0, 2.0, 1.0]), with_spectrum([3.0, 2.0, 0.0], seed=1)
    both = LowRankDelta(torch.stack([full.A, less.A]), torch.stack([full.B, less.B]), SCALING)
    none = LowRankDelta(torch.stack([less.A, less.A]), torch.stack([less.B, less.B]), SCALING)
    assert needs_every_factor(both)
    assert not needs_every_factor(none)
    assert (compress(both).rank, compress(none).rank) == (3, 2)


# ---- The ledger ----


def site_of(size=(96, 64), rank=4):
    model = nn.ModuleDict({"layer": nn.Linear(size[1], size[0], bias=False)})
    lora = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["layer"])
    return sites_of(inject_adapter_in_model(lora, model), "default")


def test_the_ledger_decomposes_nothing_where_all_of_it_is_needed():
    sites, ledger, total = site_of(), Ledger(), 0.0
    kinds = []
    for number in range(8):
        residual = server(factors_of(3, 4, seed=number, size=(96, 64)))[1]
        with Costs() as costs:
            ledger = ledger.plus({"layer": residual}, sites)
        assert costs.decompositions == []
        kinds.append("matrix" if ledger.matrices else "factors")
        total = total + residual.to_dense().numpy()
        assert error(ledger.dense("layer", sites["layer"]).numpy(), total) < 3e-7
    assert kinds == ["factors"] * 4 + ["matrix"] * 4  # factors of rank 39 and more are no smaller


def test_the_ledger_still_looks_for_a_smaller_rank():
    """The twin: rounds that repeat themselves are brought down."""
    sites, ledger, decompositions = site_of(), Ledger(), []
    residual = server(factors_of(3, 4, size=(96, 64)))[1]
    for _ in range(8):
        with Costs() as costs:
            ledger = ledger.plus({"layer": residual}, sites)
        decompositions += costs.decompositions
    assert decompositions
    assert ledger.factors["layer"].rank < 32
    assert error(ledger.dense("layer", sites["layer"]).numpy(), 8 * residual.to_dense().numpy()) < 1e-6


def test_a_residual_that_is_multiplied_out_makes_a_dense_ledger():
    sites = site_of()
    residuals = [server(factors_of(30, 4, seed=seed, size=(96, 64)))[1] for seed in range(2)]
    with Costs() as costs:
        ledger = Ledger().plus({"layer": residuals[0]}, sites).plus({"layer": residuals[1]}, sites)
    assert costs.decompositions == []
    assert residuals[0].rank == 64
    expected = sum(residual.to_dense().numpy() for residual in residuals)
    assert error(ledger.matrices["layer"].double().numpy(), expected) < 1e-7
