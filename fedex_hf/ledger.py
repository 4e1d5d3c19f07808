"""The sum of all residuals so far, layer by layer, in float32: what is added to the base, or rides beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fedex_hf.lora_site import LoraSite
from fedex_hf.low_rank import (
    at_scaling,
    compress,
    concatenate,
    doubled,
    lost_energy,
    max_useful_rank,
    narrowed,
    needs_every_factor,
)
from fedex_hf.updates import LowRankDelta


@dataclass
class Ledger:
    """The sum of all residuals so far, layer by layer, in float32.

    A layer's sum stays two thin factors as long as they are smaller than the dense matrix, and is dense afterwards.

    Args:
        factors: Layer name -> factors of the sum, with the layer's scaling.
        matrices: Layer name -> dense sum in the layout of the base weight, float32.
    """

    factors: dict[str, LowRankDelta] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)

    def layers(self) -> set[str]:
        """Names of the layers that hold a residual."""
        return self.factors.keys() | self.matrices.keys()

    def dense(self, name: str, site: LoraSite) -> torch.Tensor | None:
        """A layer's sum in the layout of its base weight, float64; `None` where there is none."""
        if name in self.matrices:
            return self.matrices[name].double()
        return site.dense(self.factors[name]) if name in self.factors else None

    def plus(
        self,
        residuals: Mapping[str, LowRankDelta],
        sites: Mapping[str, LoraSite],
        rank: int | None = None,
        tolerance: float | None = None,
    ) -> Ledger:
        """A new ledger with one round's residuals added; this one is left as it is.

        Stacked factors are the exact sum. They are brought down to the rank that they need whenever they have doubled
        and before a sum of rounds turns dense, so that doing it costs little, unless a bound shows that all of it is
        needed; with `rank` or `tolerance` each time.

        Args:
            residuals: Layer name -> the round's residual.
            sites: The adapted layers.
            rank: Largest rank of a layer's sum (Eckart-Young); `None` keeps all of it. A layer whose dense matrix is
                no larger than factors of this rank keeps all of it, too.
            tolerance: Largest share of a layer's energy (squared Frobenius norm) to leave out each time.
        """
        factors = {name: replace(delta, cut=0.0) for name, delta in self.factors.items()}
        matrices = dict(self.matrices)
        for name, residual in residuals.items():
            site = sites[name]
            if name in matrices:
                matrices[name] = densified(site, residual, matrices[name])
                continue
            before, residual = factors.pop(name, None), _float32_at(residual, site.scaling)
            total = smallest = residual if before is None else concatenate([before, residual])
            limit = max_useful_rank(total)
            if rank is not None or tolerance is not None:
                smallest = compress(total, rank, tolerance=tolerance)
            elif total.rank < limit if before is None else (total.rank >= limit or _has_doubled(before, total)):
                smallest = total if needs_every_factor(narrowed(total)) else compress(total)
            if smallest.rank < limit:
                factors[name] = smallest if smallest.rank < total.rank else total
            else:
                matrices[name] = densified(site, total)
        return Ledger(factors, matrices)

    @property
    def lost_energy(self) -> float:
        """Share of the energy that the last `plus` left out, over all layers, between 0 and 1."""
        return lost_energy(self.factors.values(), self.matrices.values())

    @property
    def nbytes(self) -> int:
        """Size of factors and matrices, in bytes."""
        return sum(delta.nbytes for delta in self.factors.values()) + sum(m.nbytes for m in self.matrices.values())


def densified(site: LoraSite, delta: LowRankDelta, onto: torch.Tensor | None = None) -> torch.Tensor:
    """A factored update of a layer, and a dense one that it is added to, in the layout of the base weight, float32."""
    return site.assembled(partial(fill_sum, site, delta, onto), torch.float32, rank=delta.rank)


def fill_sum(
    site: LoraSite, delta: LowRankDelta, onto: torch.Tensor | None, rows: slice, into: torch.Tensor
) -> torch.Tensor:
    """Write rows of `densified` into those of a matrix."""
    into.zero_() if onto is None else into.copy_(site.matrix(onto)[..., rows, :])
    site.add_to(into, delta, rows)
    return into


def _float32_at(delta: LowRankDelta, scaling: float) -> LowRankDelta:
    """The same update in float32 with another scaling, which checkpoints take from the layer."""
    exact = at_scaling(doubled(delta), scaling)
    return LowRankDelta(exact.A.float(), exact.B.float(), scaling)


def _has_doubled(before: LowRankDelta, after: LowRankDelta) -> bool:
    """Whether the rank has passed a power of two: a function of the state, so that resumed runs do the same."""
    return after.rank.bit_length() > before.rank.bit_length()
