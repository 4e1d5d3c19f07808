"""What clients go on from: the alternatives to averaging in the FedEx-LoRA paper (2410.09432, section 5, Table 4).

Relations: both functions take the finished round of `fedex.py`, factor means `Ā`, `B̄` and residual `R` with
`s B̄ Ā + R = ideal`, and move parts of that sum between the factors and the base weight `W`. So after each of the three
every client starts from the same effective weight, the weighted mean of the clients':

    average        A_i = Ā,      B_i = B̄      W <- W + R
    reinitialise   A_i fresh,    B_i = 0      W <- W + R + s B̄ Ā
    keep           A_i, B_i as they are       W <- W + R + sum w_i O_i,  and O_i anew in client i's own copy of W

`O_i = s (B̄ Ā - B_i A_i)` is the offset that takes client i's own factors to the global model `W + s B̄ Ā`. A client
that trained on `W + O_i` ends with `W + O_i + s B_i A_i`, hence the mean offset in the residual.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedex_hf.low_rank import concatenate, narrowed, padded, plain_product
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta


ASSIGNMENTS = ("average", "reinitialise", "keep")


def reinitialise(update: GlobalUpdate, seed: int, round: int) -> GlobalUpdate:
    """Fold everything into the base, and start each layer's factors afresh.

    Args:
        update: The averaged round.
        seed, round: Of the draw; with the layer's name they decide it, so nothing of it needs to be stored or sent.

    Returns:
        Residuals of rank at most k r, in float32; factors as PEFT's default draws them, in the dtype that came in.
    """
    adapters, residuals = {}, {}
    for layer, mean in update.adapters.items():
        residual = [update.residuals[layer]] if layer in update.residuals else []
        whole = concatenate([*residual, _in_float32(mean)])
        residuals[layer] = narrowed(whole)
        adapters[layer] = LowRankDelta(
            fresh_factor(mean.A, f"{seed}/{round}/{layer}"), torch.zeros_like(mean.B), mean.scaling
        )
    return replace(update, adapters=adapters, residuals=residuals)


def fresh_factor(A: torch.Tensor, key: str) -> torch.Tensor:
    """A new `lora_A` as PEFT's default draws it for a linear layer: uniform within `1 / sqrt(in_features)`.

    Args:
        A: Tensor of shape `(r, in_features)`, for shape and dtype.
        key: Decides the draw.
    """
    seed = int.from_bytes(hashlib.sha256(f"fedex_hf/{key}".encode()).digest()[:7], "little")
    bound = A.shape[-1] ** -0.5
    fresh = torch.empty(A.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return fresh.to(A.dtype)


def widened(delta: LowRankDelta, rank: int, key: str) -> LowRankDelta:
    """The same update with further rows of `A` to train from, fresh, and columns of `B` that are zero.

    Args:
        delta: Factors of at most that rank.
        rank: Of the result.
        key: Decides the draw.
    """
    more = rank - delta.rank
    if more <= 0:
        return delta
    fresh = fresh_factor(delta.A.new_empty(*delta.A.shape[:-2], more, delta.in_features), key)
    return LowRankDelta(torch.cat([delta.A, fresh], dim=-2), padded(delta, rank).B, delta.scaling)


def keep(update: GlobalUpdate, updates: Sequence[ClientUpdate], client_weights: torch.Tensor) -> GlobalUpdate:
    """Leave each client its own factors; the offsets that they trained on go into the residual.

    Args:
        update: The averaged round; its factors and residuals stay the global model's.
        updates: The round's updates, with the offsets.
        client_weights: Tensor of shape `(k,)`, float64, sum 1.

    Returns:
        Residuals of rank at most 2 k r where clients had offsets, compressed in float64 and rounded once to float32.
    """
    residuals = dict(update.residuals)
    for layer in update.adapters:
        offsets = [
            LowRankDelta(each.offsets[layer].A, each.offsets[layer].B.double() * weight, each.offsets[layer].scaling)
            for each, weight in zip(updates, client_weights.tolist(), strict=True)
            if layer in each.offsets
        ]
        if offsets:
            parts = [residuals[layer], *offsets] if layer in residuals else offsets
            residuals[layer] = _in_float32(plain_product(parts))
    return replace(update, residuals=residuals, client_adapters={each.client_id: each.adapters for each in updates})


def offsets_of(
    global_adapters: Mapping[str, LowRankDelta], own: Mapping[str, LowRankDelta]
) -> dict[str, LowRankDelta]:
    """`O_i = s (B̄ Ā - B_i A_i)` of every layer where a client's own factors are not the global ones.

    The factors are stacked and not multiplied out, so nothing is rounded.

    Args:
        global_adapters: Layer name -> `Ā` and `B̄`.
        own: Layer name -> the client's `A_i` and `B_i`, of the same shapes.

    Returns:
        Layer name -> factors of rank 2 r, in the dtype that came in.
    """
    return {
        layer: concatenate([mean, LowRankDelta(own[layer].A, -own[layer].B, own[layer].scaling)])
        for layer, mean in global_adapters.items()
        if not (torch.equal(mean.A, own[layer].A) and torch.equal(mean.B, own[layer].B))
    }


def _in_float32(delta: LowRankDelta) -> LowRankDelta:
    return LowRankDelta(delta.A.float(), delta.B.float(), delta.scaling)
