"""FedEx-LoRA: exact aggregation by a residual in the frozen base weight (Singhal et al. 2024, arXiv 2410.09432).

Relations: FedIT's factor means plus the one matrix that makes their product exact. With `w` the client weights, `s`
the scaling, bars for weighted means:

    ideal     s sum w_i B_i A_i               (eq. 4, left: what averaging the clients' models gives)
    FedIT     s B̄ Ā                           (eq. 3)
    residual  s sum w_i (B_i - B̄)(A_i - Ā)    (eq. 14 in centred form: equal, without cancellation)

The paper bounds the residual's rank by k r. The k centred factors obey one linear relation, `sum w_i (B_i - B̄) = 0`,
so the rank is at most (k - 1) r. An orthonormal change of basis over the clients, the Householder reflection that
takes `sqrt(w)` to the first axis, leaves k - 1 pairs of factors with the same sum of products. Multiplied out, each is
one client's distance from a point between the mean and the first client, `u = sqrt(w_1)`:

    residual  s sum_{j > 1} w_j (B_j - P)(A_j - Q),  P = (u B_1 + B̄) / (1 + u),  Q = (u A_1 + Ā) / (1 + u)

So no m x n matrix, no product and no decomposition is needed, unless (k - 1) r exceeds the layer's smaller side: then
the product itself is what travels.

The paper's other two assignments (section 5, Table 4) rearrange this result: see `assignments.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from fedex_hf.aggregators.assignments import ASSIGNMENTS, keep, reinitialise
from fedex_hf.aggregators.base import Aggregator, lost_by_rounding, mean_factors, weighted_mean
from fedex_hf.aggregators.ranks import WIDE
from fedex_hf.low_rank import beside_identity, compress, concatenate, multiplies_in_float32, narrowed
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta


# How many numbers of all clients are float64 at a time, at least and at most, by device: 2 MB stay in a CPU's cache, a
# GPU wants more.
_BLOCKS = defaultdict(lambda: (2**16, 2**24), cpu=(2**14, 2**18))
_DEPTH = 384  # of the products that `means_and_product` adds up: enough for them to be fast


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
        if len(factors) == 1:
            return mean_factors(factors, client_weights), None
        first = factors[0]
        if first.A.dtype in WIDE:
            made = means_and_product if self._multiplies_out(factors) else means_and_residual
            return made(factors, client_weights, first.A.dtype)
        unrounded, residual = means_and_residual(factors, client_weights)
        mean = LowRankDelta(unrounded.A.to(first.A.dtype), unrounded.B.to(first.B.dtype), first.scaling)
        return mean, concatenate([residual, lost_by_rounding(unrounded, mean)])

    def _multiplies_out(self, factors: Sequence[LowRankDelta]) -> bool:
        """Whether `shorten` would multiply all of the residual out, and float32 is fit for it."""
        first = factors[0]
        more = (len(factors) - 1) * first.rank > min(first.out_features, first.in_features)
        return more and self.residual_rank is None and first.A.ndim == 2 and multiplies_in_float32()

    def aggregate_layers(
        self, layers: Mapping[str, Sequence[LowRankDelta]], client_weights: torch.Tensor
    ) -> Iterator[tuple[str, LowRankDelta, LowRankDelta | None]]:
        """Small layers of one shape together, as if they were the experts of one: the same bits in fewer calls."""
        if type(self).aggregate_layer is not FedExAggregator.aggregate_layer:  # a subclass that may not know experts
            yield from super().aggregate_layers(layers, client_weights)
            return
        for names in _alike(layers):
            together = [_stacked(each) for each in zip(*(layers[name] for name in names), strict=True)]
            mean, residual = self.aggregate_layer(together, client_weights)
            residuals = [None] * len(names) if residual is None else _unstacked(residual, len(names))
            yield from zip(names, _unstacked(mean, len(names)), residuals, strict=True)

    def shorten(self, residual: LowRankDelta) -> LowRankDelta:
        return narrowed(residual) if self.residual_rank is None else compress(residual, self.residual_rank)


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


def _alike(layers: Mapping[str, Sequence[LowRankDelta]]) -> Iterator[list[str]]:
    """Names of layers of one shape, as many together as three quarters of a block hold."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, factors in layers.items():
        groups[tuple((each.A.shape, each.B.shape, each.A.dtype, each.A.device, each.scaling) for each in factors)] += [
            name
        ]
    for names in groups.values():
        factors = layers[names[0]]
        numbers = sum(each.A.numel() + each.B.numel() for each in factors)
        _, largest = _BLOCKS[factors[0].A.device.type]
        size = max(largest * 3 // 4 // numbers, 1) if factors[0].A.ndim == 2 else 1
        yield from (names[start : start + size] for start in range(0, len(names), size))


def _stacked(layers: Sequence[LowRankDelta]) -> LowRankDelta:
    first = layers[0]
    if len(layers) == 1:
        return first
    A, B = torch.stack([each.A for each in layers]), torch.stack([each.B for each in layers])
    return LowRankDelta(A, B, first.scaling)


def _unstacked(delta: LowRankDelta, number: int) -> list[LowRankDelta]:
    if number == 1:
        return [delta]
    return [LowRankDelta(A, B, delta.scaling) for A, B in zip(delta.A.unbind(), delta.B.unbind(), strict=True)]


def exact_residual(factors: Sequence[LowRankDelta], client_weights: torch.Tensor) -> LowRankDelta:
    """The residual `s sum w_i (B_i - B̄)(A_i - Ā)` of one layer as two thin factors; see `means_and_residual`."""
    return means_and_residual(factors, client_weights)[1]


def means_and_residual(
    factors: Sequence[LowRankDelta], client_weights: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[LowRankDelta, LowRankDelta]:
    """What the server makes of one layer, computed in float64.

    Args:
        factors: k >= 2 clients' factors, `A` of shape `(r, in_features)`, `B` of shape `(out_features, r)`.
        client_weights: Tensor of shape `(k,)`, float64, sum 1.
        dtype: That the means are rounded to.

    Returns:
        `Ā` and `B̄`, and the residual around them before that rounding: factors of rank `(k - 1) r`, float32.
    """
    first, k = factors[0], len(factors)
    *experts, r, n = first.A.shape
    m = first.out_features
    # The k - 1 contrasts of the clients become further rows of A and columns of B; experts stay in front.
    A = torch.empty(*experts, k - 1, r, n, device=first.A.device)
    B = torch.empty(*experts, m, k - 1, r, device=first.B.device)
    mean_A = torch.empty(*experts, r, n, device=first.A.device, dtype=dtype)
    mean_B = torch.empty(*experts, m, r, device=first.B.device, dtype=dtype)
    # Blocks are taken along the long dimension of each factor.
    _contrasts([delta.A for delta in factors], client_weights, mean_A, A.movedim(-3, 0), dim=-1)
    _contrasts([delta.B for delta in factors], client_weights, mean_B, B.movedim(-2, 0), dim=-2)
    return (
        LowRankDelta(mean_A, mean_B, first.scaling),
        LowRankDelta(A.flatten(-3, -2), B.flatten(-2), first.scaling),
    )


def means_and_product(
    factors: Sequence[LowRankDelta], client_weights: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[LowRankDelta, LowRankDelta]:
    """What the server makes of one layer whose residual would have more factors than its smaller side.

    The same sum as in `means_and_residual`, a few clients at a time, so that nothing is as large as all clients'
    factors. Distances are float64, rounded once; products are float32.

    Args:
        factors: k >= 2 clients' factors, `A` of shape `(r, in_features)`, `B` of shape `(out_features, r)`.
        client_weights: Tensor of shape `(k,)`, float64, sum 1.
        dtype: That the means are rounded to.

    Returns:
        `Ā` and `B̄`, and the residual around them before that rounding: a product beside an identity, float32.
    """
    first, (root, *roots) = factors[0], client_weights.sqrt().tolist()
    mean_A = weighted_mean([delta.A for delta in factors], client_weights)
    mean_B = weighted_mean([delta.B for delta in factors], client_weights)
    Q, P = (_point(mean.clone(), own.double(), root) for mean, own in ((mean_A, first.A), (mean_B, first.B)))
    product = torch.zeros(first.out_features, first.in_features, device=first.A.device)
    others, together = list(zip(factors[1:], roots, strict=True)), max(_DEPTH // first.rank, 1)
    for start in range(0, len(others), together):
        part = others[start : start + together]
        left = torch.cat([(delta.B - P).mul_(root).float() for delta, root in part], dim=1)
        right = torch.cat([(delta.A - Q).mul_(root).float() for delta, root in part])
        product.addmm_(left, right)
    mean = LowRankDelta(mean_A.to(dtype), mean_B.to(dtype), first.scaling)
    return mean, beside_identity(product, first.scaling)


def _contrasts(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    mean: torch.Tensor,
    contrasts: torch.Tensor,
    dim: int,
) -> None:
    """The mean, and `sqrt(w_j) (X_j - P)` of all clients but the first, with `P` of this file's docstring.

    Args:
        tensors: The k clients' factors, of one shape.
        weights: Tensor of shape `(k,)`, float64, sum 1.
        mean: Tensor of that shape to write the mean into.
        contrasts: Tensor of shape `(k - 1, ...)`, float32, to write the others into.
        dim: Dimension to take block by block, so that what is float64 stays in the processor's cache.
    """
    numbers, (smallest, largest) = len(tensors) * mean.numel(), _BLOCKS[mean.device.type]
    # Half of the numbers in float64 are as large as all of them in float32.
    block = min(largest, max(smallest, numbers // 2))
    size = max(block * mean.shape[dim] // numbers, 1)
    first, weights = math.sqrt(weights[0]), weights.to(mean.device)
    given = (weights, weights.sqrt().view(-1, *[1] * mean.ndim), first)
    blocks = [each.split(size, dim) for each in (mean, contrasts, *tensors)]
    doubled = torch.empty(len(tensors), *blocks[0][0].shape, dtype=torch.float64, device=mean.device)
    for to_mean, to_contrasts, *pieces in zip(*blocks, strict=True):
        _contrast_block(pieces, *given, to_mean, to_contrasts, doubled.narrow(dim, 0, to_mean.shape[dim]))


def _contrast_block(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    roots: torch.Tensor,
    first: float,
    mean: torch.Tensor,
    contrasts: torch.Tensor,
    doubled: torch.Tensor,
) -> None:
    """`_contrasts` of one block.

    Args:
        tensors, weights, mean, contrasts: As there.
        roots: Those of the weights, of shape `(k, 1, ...)`, float64.
        first: The first of them.
        doubled: Memory for all tensors in float64.
    """
    total = (_sum_in_cache if mean.device.type == "cpu" else _sum_in_few_calls)(tensors, weights, doubled)
    mean.copy_(total)
    contrasts.copy_(doubled.sub_(_point(total, doubled[0], first)).mul_(roots)[1:])


def _sum_in_cache(tensors: Sequence[torch.Tensor], weights: torch.Tensor, doubled: torch.Tensor) -> torch.Tensor:
    """The weighted sum, float64, of tensors that are written into `doubled`: each while it is in the cache."""
    total = torch.zeros_like(doubled[0])
    for client, tensor, weight in zip(doubled, tensors, weights.tolist(), strict=True):
        total.add_(client.copy_(tensor), alpha=weight)
    return total


def _sum_in_few_calls(tensors: Sequence[torch.Tensor], weights: torch.Tensor, doubled: torch.Tensor) -> torch.Tensor:
    """The same in as many calls for many tensors as for few."""
    torch.stack(list(tensors), out=doubled)
    return torch.tensordot(weights, doubled, dims=1)


def _point(mean: torch.Tensor, first: torch.Tensor, root: float) -> torch.Tensor:
    """`P` of this file's docstring, in the place of the mean."""
    return mean.add_(first, alpha=root).div_(1.0 + root)
