"""FedEx-LoRA: exact aggregation by a residual in the frozen base weight (Singhal et al. 2024, arXiv 2410.09432).

Relations: FedIT's factor means plus the one matrix that makes their product exact. With `w` the client weights, `s`
the scaling, bars for weighted means:

    ideal     s sum w_i B_i A_i               (eq. 4, left: what averaging the clients' models gives)
    FedIT     s B̄ Ā                           (eq. 3)
    residual  s sum w_i (B_i - B̄)(A_i - Ā)    (eq. 14 in centred form: equal, without cancellation)

The paper bounds the residual's rank by k r. The k centred factors obey one linear relation, `sum w_i (B_i - B̄) = 0`,
so the rank is at most (k - 1) r. `_contrasts` uses this: an orthonormal change of basis over the clients leaves k - 1
pairs of factors with the same sum of products, so no m x n matrix and no decomposition is needed.

The paper's other two assignments (section 5, Table 4) rearrange this result: see `assignments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedex_hf.aggregators.assignments import ASSIGNMENTS, keep, reinitialise
from fedex_hf.aggregators.base import Aggregator, lost_by_rounding, mean_factors, weighted_mean
from fedex_hf.aggregators.ranks import WIDE
from fedex_hf.low_rank import compress, concatenate
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta


class FedExAggregator(Aggregator):
    """Averaged factors, and the residual for the base weight.

    Args:
        residual_rank: Send only the best approximation of this rank of each layer's residual (paper, eqs. 17, 18);
            `None` sends all of it, which is exact.
        assignment: What clients go on from (paper, section 5), exact in every case. `"average"` is FedEx-LoRA: `Ā`
            and `B̄`. `"reinitialise"`: a fresh `A` and `B = 0`, with the whole update in the base. `"keep"`: each
            client's own `A_i` and `B_i`, with an offset in its copy of the base.
        seed: Of the fresh `A` with `"reinitialise"`, beside the round and the layer.

    Raises:
        ValueError: If `residual_rank` is not positive, `assignment` is unknown, or one would have no effect.

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
    assignment: str = "average"

    def __init__(self, residual_rank: int | None = None, assignment: str = "average", seed: int = 0) -> None:
        if residual_rank is not None and (not isinstance(residual_rank, int) or residual_rank < 1):
            raise ValueError(
                f"`residual_rank={residual_rank!r}`. Allowed: a positive integer, or `None` for the exact residual. "
                "For no residual at all use the aggregator `fedit`."
            )
        _check_assignment(assignment, residual_rank, seed)
        self.residual_rank = residual_rank
        self.is_exact = residual_rank is None
        # What an instance holds tells runs apart, and checkpoints from before the other assignments lack these.
        if assignment != "average":
            self.assignment = assignment
        if assignment == "reinitialise":
            self.seed = seed

    @property
    def keeps_client_adapters(self) -> bool:
        """With `"keep"`."""
        return self.assignment == "keep"

    @property
    def mixes_ranks(self) -> bool:
        """But with `"keep"`: clients that go on from factors of their own would need an offset for each rank."""
        return self.assignment != "keep"

    @property
    def returned_factors(self) -> tuple[str, ...]:
        """None with `"reinitialise"`: clients draw `A` themselves, from what they know, and `B` is zero."""
        return () if self.assignment == "reinitialise" else self.trained_factors

    def assign(
        self, update: GlobalUpdate, updates: Sequence[ClientUpdate], client_weights: torch.Tensor
    ) -> GlobalUpdate:
        if self.assignment == "reinitialise":
            return reinitialise(update, self.seed, updates[0].round)
        if self.assignment == "keep":
            return keep(update, updates, client_weights)
        return update

    def aggregate_layer(
        self, factors: Sequence[LowRankDelta], client_weights: torch.Tensor
    ) -> tuple[LowRankDelta, LowRankDelta | None]:
        mean = mean_factors(factors, client_weights)
        if len(factors) == 1:
            return mean, None
        residual = exact_residual(factors, client_weights)
        if mean.A.dtype not in WIDE:
            residual = concatenate([residual, lost_by_rounding(_unrounded(factors, client_weights), mean)])
        return mean, residual

    def shorten(self, residual: LowRankDelta) -> LowRankDelta:
        if self.residual_rank is not None:
            return compress(residual, self.residual_rank)
        if residual.rank > min(residual.out_features, residual.in_features):
            return compress(residual)  # many clients: no update needs more factors than its smaller side
        return residual


def _check_assignment(assignment: str, residual_rank: int | None, seed: int) -> None:
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"`assignment={assignment!r}` is unknown. Allowed: {', '.join(map(repr, ASSIGNMENTS))}.")
    if residual_rank is not None and assignment != "average":
        raise ValueError(
            f"`residual_rank={residual_rank}` with `assignment={assignment!r}`: the paper truncates the residual of "
            'averaged factors, and here the residual holds much more than that. Use `assignment="average"`, or '
            "`residual_rank=None`."
        )
    if type(seed) is not int or (seed != 0 and assignment != "reinitialise"):
        raise ValueError(
            f"`seed={seed!r}` with `assignment={assignment!r}`. Allowed: an integer, and only with "
            '`assignment="reinitialise"`, which alone draws anything.'
        )


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
    # The k - 1 contrasts of the clients become further rows of A and columns of B; experts stay in front.
    A = torch.einsum("ij,i...rn->...jrn", contrasts, A).flatten(-3, -2)
    B = torch.einsum("ij,i...mr->...mjr", contrasts, B).flatten(-2, -1)
    return LowRankDelta(A.float(), B.float(), factors[0].scaling)


def _unrounded(factors: Sequence[LowRankDelta], client_weights: torch.Tensor) -> LowRankDelta:
    """`Ā` and `B̄` in float64."""
    A = weighted_mean([delta.A for delta in factors], client_weights)
    B = weighted_mean([delta.B for delta in factors], client_weights)
    return LowRankDelta(A, B, factors[0].scaling)


def _centred(tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """`sqrt(w_i) (X_i - X̄)` stacked to shape `(k, ..., rows, columns)`, float64."""
    stacked = torch.stack([tensor.double() for tensor in tensors]) - weighted_mean(tensors, weights)
    return stacked * weights.sqrt().view(-1, *[1] * tensors[0].ndim)


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
