"""FFA-LoRA: freeze A, train and average B (Sun et al. 2024, arXiv 2403.12313).

Relations: FedIT with one factor frozen. All clients hold the same A, so `sum w_i B_i A = (sum w_i B_i) A` is exact
with no residual, half the traffic, and half the trainable parameters. It needs sums only, so it can run under secure
aggregation, which FedEx-LoRA cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedex_hf.aggregators.base import Aggregator, weighted_mean
from fedex_hf.updates import LowRankDelta


class FFALoRAAggregator(Aggregator):
    """`B <- sum w_i B_i` with the one `A` that every client was given."""

    name = "ffa"
    paper = "https://arxiv.org/abs/2403.12313"
    is_exact = True
    trained_factors = ("B",)

    def configure_model(self, model: torch.nn.Module) -> None:
        """Freeze every `lora_A`.

        Raises:
            ValueError: If the model has no `lora_A` parameter, where freezing nothing would silently train plain LoRA;
                or if an embedding is adapted, whose `A` starts at zero, so that `B` alone would train nothing.
        """
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        embeddings = [name.partition(".lora_embedding_A")[0] for name, _ in named if ".lora_embedding_A." in name]
        if embeddings:
            raise ValueError(
                f"`{embeddings[0]}` is an embedding, whose LoRA starts with `A = 0` in PEFT: with `A` frozen, "
                "FFA-LoRA would train nothing there. Leave it out with `exclude_modules` of your `LoraConfig`, train "
                "its tokens with `trainable_token_indices`, or use the aggregator `fedex`."
            )
        frozen = [parameter for name, parameter in model.named_parameters() if ".lora_A." in name]
        if not frozen:
            raise ValueError(
                f"`{type(model).__name__}` has no `lora_A` parameter to freeze. FFA-LoRA needs a model that LoRA has "
                "been added to: pass `peft_config`, or a `PeftModel`."
            )
        for parameter in frozen:
            parameter.requires_grad_(False)

    def aggregate_layer(
        self, factors: Sequence[LowRankDelta], client_weights: torch.Tensor
    ) -> tuple[LowRankDelta, LowRankDelta | None]:
        """Average `B`; see `Aggregator.aggregate_layer`.

        Raises:
            ValueError: If the clients' `A` differ: then they were trained, and the mean of `B` is not exact.
        """
        A = factors[0].A
        if not all(torch.equal(A, delta.A) for delta in factors[1:]):
            raise ValueError(
                "The clients' `A` factors differ, so they were trained. FFA-LoRA needs them frozen and equal: call "
                "`configure_model` before training, or aggregate with `fedex`."
            )
        B = weighted_mean([delta.B for delta in factors], client_weights).to(factors[0].B.dtype)
        return LowRankDelta(A, B, factors[0].scaling), None
