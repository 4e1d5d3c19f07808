"""FedEx-LoRA: exact aggregation by a residual in the frozen base weight (Singhal et al. 2024, arXiv 2410.09432).

Relations: FedIT's factor means plus the one matrix that makes their product exact. With `w` the client weights, `s`
the scaling, bars for weighted means:

    ideal     s sum w_i B_i A_i               (eq. 4, left: what averaging the clients' models gives)
    FedIT     s B̄ Ā                           (eq. 3)
    residual  s sum w_i (B_i - B̄)(A_i - Ā)    (eq. 14 in centred form: equal, without cancellation)

The paper bounds the residual's rank by k r. The k centred factors obey one linear relation, `sum w_i (B_i - B̄) = 0`,
so the rank is at most (k - 1) r. `_contrasts` uses this: an orthonormal change of basis over the clients leaves k - 1
pairs of factors with the same sum of products, so no m x n matrix and no decomposition is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedex_hf.aggregators.base import Aggregator, mean_factors, weighted_mean
from fedex_hf.low_rank import compress, concatenate
from fedex_hf.updates import LowRankDelta


class FedExAggregator(Aggregator):
    """Averaged factors, and the residual for the base weight.

    Args:
        residual_rank: Send only the best approximation of this rank of each layer's residual (paper, eqs. 17, 18);
            `None` sends all of it, which is exact.

    Raises:
        ValueError: If `residual_rank` is not positive.

    Example:
        >>> factors = [LowRankDelta(torch.randn(2, 6), torch.randn(5, 2), 2.0) for _ in range(3)]
        >>> weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
        >>> mean, residual = FedExAggregator().aggregate_layer(factors, weights)
        >>> ideal = sum(w * delta.to_dense() for w, delta in zip(weights, factors))
        >>> torch.allclose(mean.to_dense() + residual.to_dense(), ideal, atol=1e-5), residual.rank
        (True, 4)
    """

    name = "fedex"
    paper = "https://arxiv.org/abs/2410.09432"
    changes_base = True

    def __init__(self, residual_rank: int | None = None) -> None:
        if residual_rank is not None and (not isinstance(residual_rank, int) or residual_rank < 1):
            raise ValueError(
                f"`residual_rank={residual_rank!r}`. Allowed: a positive integer, or `None` for the exact residual. "
                "For no residual at all use the aggregator `fedit`."
            )
        self.residual_rank = residual_rank
        self.is_exact = residual_rank is None

    def aggregate_layer(
        self, factors: Sequence[LowRankDelta], client_weights: torch.Tensor
    ) -> tuple[LowRankDelta, LowRankDelta | None]:
        mean = mean_factors(factors, client_weights)
        if len(factors) == 1:
            return mean, None
        residual = exact_residual(factors, client_weights)
        if mean.A.dtype not in (torch.float32, torch.float64):
            residual = concatenate([residual, _lost_by_rounding(factors, client_weights, mean)])
        if self.residual_rank is not None:
            residual = compress(residual, self.residual_rank)
        elif residual.rank > min(residual.B.shape[0], residual.A.shape[1]):
            residual = compress(residual)  # many clients: no update needs more factors than its smaller side
        return mean, residual


def exact_residual(factors: Sequence[LowRankDelta], client_weights: torch.Tensor) -> LowRankDelta:
    """The residual `s sum w_i (B_i - B̄)(A_i - Ā)` of one layer as two thin factors.

    Args:
        factors: k >= 2 clients' factors, `A` of shape `(r, in_features)`, `B` of shape `(out_features, r)`.
        client_weights: Tensor of shape `(k,)`, float64, sum 1.

    Returns:
        Factors of rank `(k - 1) r` around the unrounded means, computed in float64 and rounded once to float32.
    """
    contrasts = _contrasts(client_weights)
    A = _centred([delta.A for delta in factors], client_weights)
    B = _centred([delta.B for delta in factors], client_weights)
    A = torch.einsum("ij,irn->jrn", contrasts, A).flatten(0, 1)
    B = torch.einsum("ij,imr->mjr", contrasts, B).flatten(1, 2)
    return LowRankDelta(A.float(), B.float(), factors[0].scaling)


def _lost_by_rounding(
    factors: Sequence[LowRankDelta], client_weights: torch.Tensor, mean: LowRankDelta
) -> LowRankDelta:
    """`s (B̄ Ā - B̄' Ā')` for means rounded to bfloat16 or float16 (primes), as factors of rank 2 r, float32.

    With float32 factors this is below the rounding of a float32 base weight and not worth its rank.
    """
    A = weighted_mean([delta.A for delta in factors], client_weights)
    B = weighted_mean([delta.B for delta in factors], client_weights)
    left = torch.cat([B - mean.B.double(), B], dim=1)
    right = torch.cat([mean.A.double(), A - mean.A.double()])
    return LowRankDelta(right.float(), left.float(), mean.scaling)


def _centred(tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """`sqrt(w_i) (X_i - X̄)` stacked to shape `(k, rows, columns)`, float64."""
    stacked = torch.stack([tensor.double() for tensor in tensors]) - weighted_mean(tensors, weights)
    return stacked * weights.sqrt()[:, None, None]


def _contrasts(weights: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns orthogonal to `sqrt(w)`: shape `(k, k - 1)`, float64.

    They are all but the first column of the Householder reflection that takes `sqrt(w)` to the first axis. The
    weighted centred factors are orthogonal to `sqrt(w)` over the clients, so projecting on these loses nothing.
    """
    unit = weights.sqrt()
    normal = unit.clone()
    normal[0] += 1.0  # unit[0] > 0: adding keeps away from zero
    reflection = torch.eye(len(unit), dtype=torch.float64) - torch.outer(normal, normal) / (1.0 + unit[0])
    return reflection[:, 1:]
