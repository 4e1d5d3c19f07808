"""What travels: shapes, bytes, and refusals."""

import math

import pytest
import torch

from fedex_hf import ClientUpdate, GlobalUpdate, LowRankDelta, NonFiniteUpdateError
from fedex_hf.updates import payload_bytes


def delta(rank=2, out_features=3, in_features=5, dtype=torch.float32, scaling=0.5):
    return LowRankDelta(
        torch.ones(rank, in_features, dtype=dtype), torch.ones(out_features, rank, dtype=dtype), scaling
    )


@pytest.mark.parametrize(
    ("A", "B"),
    [
        ((2, 5), (3, 4)),
        ((5, 2), (3, 5, 1)),
        ((5,), (3, 5)),
        ((2, 5), (2, 3)),
        ((2, 5), ()),
        ((1, 2, 5), (3, 2)),
        ((4, 2, 5), (3, 3, 2)),
        ((4, 2, 5), (4, 3, 1)),
        ((1, 4, 2, 5), (1, 4, 3, 2)),
    ],
)
def test_factors_must_share_their_rank(A, B):
    with pytest.raises(
        ValueError, match=r"not the factors of one update.*`A` of shape `\(rank, in_features\)`"
    ) as info:
        LowRankDelta(torch.ones(A), torch.ones(B))
    assert str(A) in str(info.value)
    assert str(B) in str(info.value)


def test_shapes():
    update = delta(rank=2, out_features=3, in_features=5)
    assert update.rank == 2
    assert update.to_dense().shape == (3, 5)
    assert LowRankDelta(torch.ones(1, 4), torch.ones(6, 1)).scaling == 1.0


def test_shapes_of_experts():
    A, B = torch.arange(40.0).reshape(4, 2, 5), torch.arange(24.0).reshape(4, 3, 2)
    update = LowRankDelta(A, B, scaling=0.5)
    assert (update.rank, update.in_features, update.out_features, update.nbytes) == (2, 5, 3, 4 * 64)
    for expert, dense in enumerate(update.to_dense()):
        assert torch.equal(dense, LowRankDelta(A[expert], B[expert], scaling=0.5).to_dense())


def test_to_dense_is_scaling_b_a():
    A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0], [7.0]])
    dense = LowRankDelta(A, B, scaling=0.5).to_dense()
    assert dense.dtype == torch.float64
    assert dense.tolist() == [[2.5, 5.0, 7.5], [3.5, 7.0, 10.5]]


def test_to_dense_multiplies_in_the_dtype_it_returns():
    A, B = torch.full((3, 1), 1 / 3), torch.full((1, 3), 1 / 3)
    third = A[0, 0].double().item()
    assert LowRankDelta(A, B).to_dense().item() == pytest.approx(3 * third * third, rel=1e-15)
    assert LowRankDelta(A, B).to_dense(torch.float32).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_nbytes(dtype, size):
    assert delta(rank=2, out_features=3, in_features=5, dtype=dtype).nbytes == (2 * 5 + 3 * 2) * size


def test_payload_bytes():
    adapters = {"one": delta(2, 3, 5), "two": delta(1, 4, 4, dtype=torch.bfloat16)}
    tensors = {"head": torch.ones(7, 2), "bias": torch.ones(3, dtype=torch.float16)}
    in_adapters = (2 * 5 + 3 * 2) * 4 + (4 + 4) * 2
    in_tensors = 14 * 4 + 3 * 2
    client = ClientUpdate("ann", 1, 10, adapters, tensors)
    assert payload_bytes(client) == in_adapters + in_tensors
    assert payload_bytes(ClientUpdate("ann", 1, 10, adapters)) == in_adapters
    # A method that trains B only never sends A; and no residual comes down where there is none.
    assert payload_bytes(client, ("B",)) == (3 * 2) * 4 + 4 * 2 + in_tensors
    assert payload_bytes(GlobalUpdate(adapters, tensors)) == in_adapters + in_tensors
    residuals = {"one": delta(6, 3, 5)}
    assert payload_bytes(GlobalUpdate(adapters, tensors, residuals)) == in_adapters + in_tensors + 6 * (3 + 5) * 4
    assert payload_bytes(GlobalUpdate({}, {})) == 0


def test_a_finite_update_is_accepted():
    ClientUpdate("ann", 1, 10, {"layer": delta()}, {"head": torch.full((2,), 3e38)}).check_finite()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["A", "B", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_are_refused(where, value, dtype):
    tensors = {"A": torch.ones(2, 5, dtype=dtype), "B": torch.ones(3, 2, dtype=dtype), "head": torch.ones(2, 2)}
    tensors[where][1, 1] = value
    update = ClientUpdate(
        "ann",
        4,
        10,
        {"fine": delta(), "x.query": LowRankDelta(tensors["A"], tensors["B"])},
        {"x.bias": torch.ones(2), "x.head": tensors["head"]},
    )
    name = "x.head" if where == "head" else "x.query"
    with pytest.raises(NonFiniteUpdateError, match=f"client `ann` in round 4.* 1 tensors, the first being `{name}`"):
        update.check_finite()


def test_every_bad_tensor_is_counted():
    bad = LowRankDelta(torch.full((1, 2), math.nan), torch.full((2, 1), math.nan))
    update = ClientUpdate("ann", 1, 10, {"one": bad, "two": bad}, {"head": torch.tensor(math.inf)})
    with pytest.raises(NonFiniteUpdateError, match="in 3 tensors"):
        update.check_finite()


def test_a_non_finite_update_is_a_value_error():
    assert issubclass(NonFiniteUpdateError, ValueError)


def test_updates_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        delta().scaling = 1.0
