"""What other methods would send in the same round, beside what was sent."""

from __future__ import annotations

from fedex_hf.base_model import AdaptedModel
from fedex_hf.carrier import CARRIER


def other_methods(adapted: AdaptedModel, clients: int) -> dict[str, tuple[int, int]]:
    """Bytes per client and round, up and down, of methods that send other things.

    Args:
        adapted: The model.
        clients: Clients in the round.

    Returns:
        FedIT (arXiv 2305.05644): the adapter both ways. FLoRA (arXiv 2409.05976): all clients' adapters stacked, down.
        Full fine-tuning: every parameter of the base model in its dtype both ways. Trained heads count everywhere.
    """
    factors = sum(parameter.nbytes for site in adapted.sites.values() for parameter in site.parameters)
    heads = sum(parameter.nbytes for parameter in adapted.tensors.values())
    own = {id(parameter) for site in adapted.sites.values() for parameter in site.parameters}
    model = sum(
        parameter.nbytes
        for name, parameter in adapted.model.named_parameters()
        if id(parameter) not in own and CARRIER not in name.split(".")
    )
    return {
        "FedIT": (factors + heads, factors + heads),
        "FLoRA": (factors + heads, clients * factors + heads),
        "full fine-tuning": (model, model),
    }
