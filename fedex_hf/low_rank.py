"""Algebra of `LowRankDelta`: sums, exact recompression, best approximation; no m x n matrix but in `narrowed`.

A product `B @ A` of rank at most rho is described by the QR factors of `B` and of `A` transposed and a rho x rho core;
everything here costs O((m + n) rho^2). Computed in float64, returned in the dtype that came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from fedex_hf.updates import LowRankDelta


_COLUMNS, _RANKS = 768, 64  # of a block in `_product_in_float64`: as many as make fast products, and at least so many


def concatenate(deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """Sum of updates of one layer by stacking their factors; the rank is the sum of the ranks.

    Args:
        deltas: Updates of equal shape. Where scalings differ, the ratio to the first one's goes into `B`.

    Raises:
        ValueError: If `deltas` is empty.

    Example:
        >>> one = LowRankDelta(torch.ones(1, 2), torch.ones(3, 1), scaling=2.0)
        >>> concatenate([one, one]).to_dense()[0]
        tensor([4., 4.], dtype=torch.float64)
    """
    if not deltas:
        raise ValueError("`deltas` is empty: there is nothing to sum, and no shape to return a zero of.")
    scaling = deltas[0].scaling
    deltas = [at_scaling(delta, scaling) for delta in deltas]
    A = torch.cat([delta.A for delta in deltas], dim=-2)
    B = torch.cat([delta.B for delta in deltas], dim=-1)
    return LowRankDelta(A, B, scaling, cut=sum(delta.cut for delta in deltas))


def at_scaling(delta: LowRankDelta, scaling: float) -> LowRankDelta:
    """The same update with another scaling; the ratio goes into `B`, in its dtype."""
    if delta.scaling == scaling:
        return delta
    return LowRankDelta(delta.A, delta.B * (delta.scaling / scaling), scaling, delta.cut)


def padded(delta: LowRankDelta, rank: int) -> LowRankDelta:
    """The same update with rows of `A` and columns of `B` that are zero, up to a rank."""
    more = rank - delta.rank
    if more <= 0:
        return delta
    A, B = torch.nn.functional.pad(delta.A, (0, 0, 0, more)), torch.nn.functional.pad(delta.B, (0, more))
    return LowRankDelta(A, B, delta.scaling, delta.cut)


def narrowed(delta: LowRankDelta) -> LowRankDelta:
    """The same update with no more factors than its smaller side needs: beyond that, the product and an identity.

    Unlike `compress` it decomposes nothing and does not look for a smaller rank.

    Returns:
        `delta` itself up to rank `min(out_features, in_features)`; otherwise factors of that rank, of which one is the
        product in the dtype that came in. Where torch was told to multiply float32 with fewer digits, that is summed
        in float64.
    """
    m, n = delta.out_features, delta.in_features
    if delta.rank <= min(m, n):
        return delta
    full = delta.A.dtype == torch.float64 or (delta.A.dtype == torch.float32 and multiplies_in_float32())
    return beside_identity(delta.B @ delta.A if full else _product_in_float64(delta), delta.scaling, delta.cut)


def beside_identity(product: torch.Tensor, scaling: float, cut: float = 0.0) -> LowRankDelta:
    """A dense update, without its scaling, as two factors of which one is an identity: `LowRankDelta.product`."""
    *experts, m, n = product.shape
    identity = torch.eye(min(m, n), dtype=product.dtype, device=product.device).expand(*experts, -1, -1).contiguous()
    return LowRankDelta(*((identity, product) if n <= m else (product, identity)), scaling, cut)


def multiplies_in_float32() -> bool:
    """Whether float32 products have all their digits, as they do unless somebody has asked for less."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend, by the newer `fp32_precision`
        return False


def _product_in_float64(delta: LowRankDelta) -> torch.Tensor:
    """`B @ A`, summed in float64 and rounded once, without either factor in float64 as a whole."""
    m, n = delta.out_features, delta.in_features
    A, B = (factor.reshape(-1, *factor.shape[-2:]) for factor in (delta.A, delta.B))
    product = A.new_empty(len(A), m, n)
    # Of float32 factors, what is float64 at a time is as large as 0.8 (sums) and 0.125 (factors) of them.
    width, ranks = min(_COLUMNS, max(2 * delta.rank * (m + n) // (5 * m), 1)), max(_RANKS, delta.rank // 16)
    for columns, out in zip(A.split(width, -1), product.split(width, -1), strict=True):
        total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
        for right, left in zip(columns.split(ranks, -2), B.split(ranks, -1), strict=True):
            total.baddbmm_(left.double(), right.double())
        out.copy_(total)
    return product.view(*delta.A.shape[:-2], m, n)


def needs_every_factor(delta: LowRankDelta) -> bool:
    """Whether `compress` is certain to find no smaller rank, at a fraction of its cost; if `False`, it may or may not.

    With Cholesky factors `L_B`, `L_A` of the Gram matrices, the smallest singular value of `B @ A` is at least
    `1 / (|L_B^-1| |L_A^-1|)`, the largest at most `|B @ A|` (Frobenius norms).
    """
    if delta.rank > min(delta.out_features, delta.in_features):
        return False
    A, B = delta.A.double(), delta.B.double()
    grams = B.mT @ B, A @ A.mT
    smallest = _least_eigenvalue(grams[0], delta.out_features) * _least_eigenvalue(grams[1], delta.in_features)
    largest = (grams[0] * grams[1]).sum((-2, -1))
    return bool(smallest.gt(_noise(delta.A.dtype) ** 2 * largest).any())  # the rank is that of the largest expert's


def compress(
    delta: LowRankDelta,
    rank: int | None = None,
    resolution: torch.dtype | None = None,
    tolerance: float | None = None,
) -> LowRankDelta:
    """The same update with the fewest factors, or its best approximation of a given rank (Eckart-Young).

    FedEx-LoRA eqs. 17, 18 name the truncated SVD of the residual; here it is taken from the factors.

    Args:
        delta: Update of shape `(out_features, in_features)` in factored form.
        rank: Largest rank to keep; `None` keeps everything above rounding.
        resolution: The dtype whose rounding counts; that of `delta` if `None`.
        tolerance: Largest share of the energy (squared Frobenius norm), in [0, 1), to leave out beside that.

    Returns:
        Factors of rank at most `min(rank, in_features, out_features)`, each singular value split evenly between `A`
        and `B`, with the scaling of `delta`; `cut` counts the energy that `rank` and `tolerance` leave out.

    Raises:
        ValueError: If `rank` is below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"`rank={rank}` keeps nothing. Allowed: at least 1, or `None` to keep everything.")
    left, core, right = _core(delta)
    small = decompose(core, rank, delta.A.dtype if resolution is None else resolution, tolerance)
    B, A = (left @ small.B).to(delta.B.dtype), (small.A @ right.mT).to(delta.A.dtype)
    cut = delta.cut + small.cut * delta.scaling**2
    return LowRankDelta(A.contiguous(), B.contiguous(), delta.scaling, cut)


def decompose(
    matrix: torch.Tensor,
    rank: int | None = None,
    resolution: torch.dtype = torch.float32,
    tolerance: float | None = None,
) -> LowRankDelta:
    """A matrix as two factors of its numerical rank, by SVD in float64.

    Args:
        matrix: Tensor of shape `(out_features, in_features)`, or one per expert: the rank is the largest of theirs.
        rank: Largest rank to keep; `None` keeps everything above rounding.
        resolution: The dtype whose rounding counts.
        tolerance: Largest share of the energy to leave out beside that.

    Returns:
        Factors in float64, each singular value split evenly between them, scaling 1.
    """
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    numerical = keep = max(int(S.gt(_noise(resolution) * S.amax(-1, keepdim=True)).sum(-1).max()), 1)
    energies = S.square()
    if tolerance is not None:
        tail = energies.flip(-1).cumsum(-1).flip(-1)  # what keeping only the singular values before each would lose
        keep = min(keep, max(int(tail.gt(tolerance * tail[..., :1]).sum(-1).max()), 1))
    keep = keep if rank is None else min(keep, rank)
    root = S[..., :keep].sqrt()
    cut = float(energies[..., keep:numerical].sum())
    return LowRankDelta(root[..., :, None] * Vh[..., :keep, :], U[..., :keep] * root[..., None, :], cut=cut)


def energy(delta: LowRankDelta) -> float:
    """Squared Frobenius norm of an update, from its factors, in float64."""
    _, core, _ = _core(delta)
    return float(core.square().sum()) * delta.scaling**2


def lost_energy(deltas: Iterable[LowRankDelta], matrices: Iterable[torch.Tensor] = ()) -> float:
    """Share of the energy that truncations left out of some updates together, between 0 and 1.

    Args:
        deltas: Updates, truncated or not.
        matrices: Further updates, dense, of which nothing was left out.
    """
    deltas = list(deltas)
    cut = sum(delta.cut for delta in deltas)
    if not cut:
        return 0.0
    kept = sum(energy(delta) for delta in deltas) + sum(float(each.double().square().sum()) for each in matrices)
    return cut / (cut + kept)


def doubled(delta: LowRankDelta) -> LowRankDelta:
    """The same factors in float64."""
    return LowRankDelta(delta.A.double(), delta.B.double(), delta.scaling, delta.cut)


def plain_product(deltas: Sequence[LowRankDelta], resolution: torch.dtype = torch.float32) -> LowRankDelta:
    """Sum of updates of one layer as one product with the fewest factors, in float64 and with their scaling.

    Args:
        deltas: Updates of equal shape.
        resolution: The dtype whose rounding counts.
    """
    return compress(concatenate([doubled(delta) for delta in deltas]), resolution=resolution)


def max_useful_rank(delta: LowRankDelta) -> int:
    """The rank at which two factors hold as many numbers as the dense update: in * out / (in + out), rounded up."""
    return math.ceil(delta.in_features * delta.out_features / (delta.in_features + delta.out_features))


def _core(delta: LowRankDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal `left`, `right` and a small `core` with `B @ A = left @ core @ right.mT`, in float64."""
    left, left_core = torch.linalg.qr(delta.B.double())
    right, right_core = torch.linalg.qr(delta.A.double().mT)
    return left, left_core @ right_core.mT, right


def _noise(resolution: torch.dtype) -> float:
    """Singular values below this share of the largest are rounding of a dtype: they carry nothing, and cost rank."""
    return 1e-2 * torch.finfo(resolution).eps


def _least_eigenvalue(gram: torch.Tensor, terms: int) -> torch.Tensor:
    """A lower bound for a Gram matrix in float64 whose entries are sums of so many terms, or one per expert."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    rounding = 4 * (terms + gram.shape[-1]) * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    bound = (1 / inverse.square().sum((-2, -1)) - rounding).clamp(min=0)
    return torch.where(failed == 0, bound, 0)
