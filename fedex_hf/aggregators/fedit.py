"""FedIT: average the LoRA factors (Zhang et al. 2023, arXiv 2305.05644).

Relations: FedAvg applied to the adapter tensors. Inexact: the mean of products is not the product of means; what is
lost is the residual that `fedex.py` adds to the base weight. `ffa.py` avoids the loss by training one factor only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedex_hf.aggregators.base import Aggregator, mean_factors
from fedex_hf.updates import LowRankDelta


class FedITAggregator(Aggregator):
    """`A <- sum w_i A_i`, `B <- sum w_i B_i` (FedEx-LoRA paper, eq. 3); the base weight is left alone."""

    name = "fedit"
    paper = "https://arxiv.org/abs/2305.05644"
    is_exact = False

    def aggregate_layer(
        self, factors: Sequence[LowRankDelta], client_weights: torch.Tensor
    ) -> tuple[LowRankDelta, LowRankDelta | None]:
        return mean_factors(factors, client_weights), None
