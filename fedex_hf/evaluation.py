"""Room 6: the exactness certificate, measured on what is installed in the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedex_hf.aggregators.base import mean_factors, normalise
from fedex_hf.base_model import AdaptedModel
from fedex_hf.ledger import Ledger
from fedex_hf.lora_site import LoraSite
from fedex_hf.low_rank import concatenate
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta


NOISE = 1e-12  # well above float64 rounding, well below anything that training does


@dataclass(frozen=True)
class LayerExactness:
    """Frobenius norms for one layer and one round, float64.

    Args:
        change: Norm of the ideal change of the effective weight, `sum w_i (W_i + dW_i) - (W + dW)`; 0 where it is
            nothing but rounding. `W_i` is `W` but for clients that keep factors of their own.
        error: Norm of (effective weight that is installed - ideal effective weight).
        fedit: Norm of (effective weight that FedIT would have installed - ideal effective weight): the base weight
            common to all clients with the averaged factors, and no residual, whatever the method assigns.
        resolution: Norm below which the dtype of what holds the residual resolves nothing. Where nothing should have
            changed, a ratio has no denominator: an error up to this counts as 0, one above as infinite.
    """

    change: float
    error: float
    fedit: float
    resolution: float = 0.0

    @property
    def aggregation_error(self) -> float:
        """`error` relative to `change`."""
        return _ratio(self.error, self.change, self.resolution)

    @property
    def fedit_deviation(self) -> float:
        """`fedit` relative to `change`."""
        return _ratio(self.fedit, self.change, self.resolution)


@dataclass(frozen=True)
class Exactness:
    """The certificate of one round: how far the installed effective weights are from the float64 ideal.

    Args:
        layers: Layer name -> its norms.
    """

    layers: Mapping[str, LayerExactness]

    @property
    def aggregation_error(self) -> float:
        """Relative error over all adapted layers: root of the summed squares, relative to that of the ideal change."""
        return _ratio(self._norm("error"), self._norm("change"), self._norm("resolution"))

    @property
    def fedit_deviation(self) -> float:
        """The relative error that averaging the factors would have had in this round."""
        return _ratio(self._norm("fedit"), self._norm("change"), self._norm("resolution"))

    def _norm(self, name: str) -> float:
        return math.sqrt(math.fsum(getattr(layer, name) ** 2 for layer in self.layers.values()))


@torch.no_grad()
def measure_exactness(
    adapted: AdaptedModel,
    before: GlobalUpdate,
    ledger_before: Ledger,
    updates: Sequence[ClientUpdate],
    client_weights: Sequence[float],
) -> Exactness:
    """Compare the effective weights that the model holds now with the weighted mean of the clients'.

    Nothing is taken from the aggregator: the installed side is read from the live parameters, the ideal side is
    formed densely in float64 from the clients' factors, and PEFT says how a factored update lies in a weight. A few
    rows of one layer are dense at a time.

    Args:
        adapted: The model after the round's update was applied.
        before: The adapters that the clients started the round from.
        ledger_before: The ledger that was installed while they trained.
        updates: The clients' updates of this round.
        client_weights: One positive number per update.
    """
    weights = normalise(client_weights, len(updates))
    return Exactness(
        {name: _measure_layer(adapted, name, before, ledger_before, updates, weights) for name in adapted.sites}
    )


def _measure_layer(
    adapted: AdaptedModel,
    name: str,
    before: GlobalUpdate,
    ledger_before: Ledger,
    updates: Sequence[ClientUpdate],
    weights: torch.Tensor,
) -> LayerExactness:
    site, factors = adapted.sites[name], [update.adapters[name] for update in updates]
    products, now, averaged = weighted_sum(factors, weights), site.read(), mean_factors(factors, weights)
    offsets = [
        (share, update.offsets[name])
        for update, share in zip(updates, weights.tolist(), strict=True)
        if name in update.offsets
    ]

    def norms_of(rows: slice) -> tuple[float, ...]:
        # Relative to what the clients' layers hold in common.
        ideal, start = site.rows(products, rows), site.rows(before.adapters[name], rows)
        installed, common = adapted.installed(name, rows), adapted.installed_at(name, ledger_before, rows=rows)
        largest = _norm(ideal), _norm(start), _norm(installed)
        for share, offset in offsets:  # as this client's layer held it, rounded
            ideal += share * (adapted.installed_at(name, ledger_before, offset, rows) - common)
        error = _norm((installed - common).add_(site.rows(now, rows)).sub_(ideal))
        return error, _norm(site.rows(averaged, rows).sub_(ideal)), _norm(ideal.sub_(start)), *largest

    error, fedit, change, ideal, start, installed = norms_over(site, norms_of)
    resolution = adapted.precision(name) * installed
    noise = max(NOISE * (ideal + start), resolution if offsets else 0.0)
    return LayerExactness(change if change > noise else 0.0, error, fedit, resolution)


def norms_over(site: LoraSite, norms_of: Callable[[slice], Sequence[float]]) -> tuple[float, ...]:
    """Frobenius norms of matrices of a layer's shape, from those of their rows, a few at a time."""
    return tuple(math.hypot(*each) for each in zip(*map(norms_of, site.blocks()), strict=True))


def weighted_sum(factors: Sequence[LowRankDelta], weights: torch.Tensor) -> LowRankDelta:
    """`sum w_i B_i A_i` with the factors stacked, float64."""
    return concatenate(
        [
            LowRankDelta(delta.A.double(), delta.B.double() * weight, delta.scaling)
            for delta, weight in zip(factors, weights.tolist(), strict=True)
        ]
    )


def _norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor).item()


def _ratio(part: float, whole: float, resolution: float) -> float:
    if whole > 0:
        return part / whole
    return 0.0 if part <= resolution else math.inf
