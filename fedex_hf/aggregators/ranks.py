"""Clients whose rank is not the global one: what they start from, and how their factors are brought together.

Global factors `A`, `B` have g rows and columns and the scaling `s`, those of client i have r and `s_i`:

    r < g   starts from   A_i = A[:r]                  B_i = s/s_i B[:, :r]   and O_i = s B[:, r:] A[r:] in its base
    r > g   starts from   A_i = A over r - g fresh rows   B_i = s/s_i B beside r - g columns of zeros

so that every client starts from the global effective weight. At the server a client's rows and those of its offset
`O_i` are stacked, in the global scaling. The first g of them are its factors in every formula of the method; the rest,
its surplus, goes into the residual as it is: `sum w_i s_i B_i[:, g:] A_i[g:]`.

Relations: HetLoRA (Cho et al. 2024, arXiv 2401.06432) pads the factors with zeros and cuts the mean, FLoRA (Wang et
al. 2024, arXiv 2409.05976) stacks all factors and folds them into the base; the first is not exact, and the second
leaves nothing to go on from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedex_hf.aggregators.assignments import widened
from fedex_hf.low_rank import at_scaling, concatenate, doubled
from fedex_hf.updates import ClientUpdate, LowRankDelta


WIDE = (torch.float32, torch.float64)  # in these one rounding of a factor is not worth the rank that undoes it


def start_at_rank(mean: LowRankDelta, rank: int, scaling: float, key: str) -> tuple[LowRankDelta, LowRankDelta | None]:
    """What a client of some rank starts from in one layer.

    Args:
        mean: The global factors, of rank g.
        rank: The client's rank r.
        scaling: The client's scaling `s_i`.
        key: Decides the draw of the fresh rows.

    Returns:
        The client's factors, in the dtype of `mean`, and its offset: the rows that it does not train, and after them
        what rounding `B_i` to bfloat16 or float16 took away. `None` where there is nothing of either.

    Example:
        >>> mean = LowRankDelta(torch.randn(4, 6), torch.randn(5, 4), scaling=2.0)
        >>> own, offset = start_at_rank(mean, rank=2, scaling=4.0, key="")
        >>> torch.allclose(own.to_dense() + offset.to_dense(), mean.to_dense()), own.rank, offset.rank
        (True, 2, 2)
    """
    if rank == mean.rank and scaling == mean.scaling:
        return mean, None
    kept, offset = min(rank, mean.rank), []
    A, wanted = mean.A[..., :kept, :], mean.B[..., :, :kept].double() * (mean.scaling / scaling)
    B = wanted.to(mean.B.dtype)
    if kept < mean.rank:
        offset.append(LowRankDelta(mean.A[..., kept:, :], mean.B[..., :, kept:], mean.scaling))
    if mean.B.dtype not in WIDE:
        offset.append(LowRankDelta(A.float(), (wanted - B.double()).float(), scaling))
    own = widened(LowRankDelta(A.contiguous(), B.contiguous(), scaling), rank, key)
    return own, concatenate(offset) if offset else None


def at_global_rank(
    updates: Sequence[ClientUpdate], client_weights: torch.Tensor, start: Mapping[str, LowRankDelta]
) -> tuple[Sequence[ClientUpdate], dict[str, LowRankDelta]]:
    """Every client's factors at the global rank and scaling, and what does not fit.

    Args:
        updates: The round's updates.
        client_weights: Tensor of shape `(k,)`, float64, sum 1.
        start: Layer name -> the global factors that the clients started from.

    Returns:
        The updates, with float64 factors in each layer where any client's differ from the global rank or come with an
        offset; and layer name -> the clients' surplus, `sum w_i s_i B_i[:, g:] A_i[g:]` in factors, float32.

    Raises:
        ValueError: If an update has other layers, other sizes than a layer, or too few rows for the global rank.
    """
    for update in updates:
        _check_fits(update, start)
    adapters = [dict(update.adapters) for update in updates]
    surplus: dict[str, LowRankDelta] = {}
    for layer, like in start.items():
        if all(update.adapters[layer].rank == like.rank and layer not in update.offsets for update in updates):
            continue
        rests = []
        for update, own, weight in zip(updates, adapters, client_weights.tolist(), strict=True):
            whole = _stacked(update, layer, like)
            own[layer] = LowRankDelta(whole.A[..., : like.rank, :], whole.B[..., :, : like.rank], like.scaling)
            if whole.rank > like.rank:
                rest_A, rest_B = whole.A[..., like.rank :, :], whole.B[..., :, like.rank :] * weight
                rests.append(LowRankDelta(rest_A.float(), rest_B.float(), like.scaling))
        if rests:
            surplus[layer] = concatenate(rests)
    return [
        replace(each, adapters=own, base_version=None) for each, own in zip(updates, adapters, strict=True)
    ], surplus


def _stacked(update: ClientUpdate, layer: str, like: LowRankDelta) -> LowRankDelta:
    """A client's rows and those of its offset, float64, in the global scaling."""
    own = at_scaling(doubled(update.adapters[layer]), like.scaling)
    return concatenate([own, doubled(update.offsets[layer])]) if layer in update.offsets else own


def _check_fits(update: ClientUpdate, start: Mapping[str, LowRankDelta]) -> None:
    for layer in [*start, *update.adapters]:
        if layer not in update.adapters or layer not in start:
            where = "in the update" if layer in update.adapters else "among the layers that all started from"
            raise ValueError(
                f"Client `{update.client_id}`: `{layer}` is only {where}. All clients must train the same layers."
            )
        like, own, offset = start[layer], update.adapters[layer], update.offsets.get(layer)
        sizes = [(*each.A.shape[:-2], each.out_features, each.in_features) for each in (like, own, offset or own)]
        rows = own.rank + (0 if offset is None else offset.rank)
        if len(set(sizes)) > 1 or rows < like.rank:
            raise ValueError(
                f"Client `{update.client_id}`: its {rows} rows in `{layer}`, of size {sizes[1]}, do not complete the "
                f"{like.rank} global ones, of size {sizes[0]}. A client of a smaller rank comes with the `offsets` "
                "that it trained on."
            )
