"""What server and clients have to agree on, and what cannot be had across machines."""

from __future__ import annotations

from typing import Any

from fedex_hf.checkpoint import jsonable
from fedex_hf.trainer import FederatedTrainer


_OF_THE_SERVER = ("clients", "order of clients", "client_ranks")
_ARGUMENTS = ("num_rounds", "client_fraction", "lr_schedule")


def agreed_settings(trainer: FederatedTrainer) -> dict[str, Any]:
    """What decides the numbers and must be the same on both sides: model, base weights, adapter, method, seeds.

    Learning rate, batch size and epochs are each client's own affair.
    """
    settings = {name: value for name, value in trainer.fingerprint().items() if name not in _OF_THE_SERVER}
    settings |= {name: getattr(trainer.args, name) for name in _ARGUMENTS}
    return jsonable(settings)


def refuse_unsupported(trainer: FederatedTrainer) -> None:
    """Refuse what clients would have to keep and the server to count, and methods that return more than they get.

    Raises:
        ValueError: With `client_optimizer_state="keep"`, a method whose clients go on from their own factors, or one
            that returns factors which clients do not train.
    """
    extra = set(trainer.aggregator.returned_factors) - set(trainer.aggregator.trained_factors)
    if extra:
        raise ValueError(
            f"The aggregator `{trainer.aggregator.name}` returns the factors {sorted(extra)}, which clients do not "
            "train. On Flower what goes down has the keys of what comes up. Let it train them, too."
        )
    if trainer.args.client_optimizer_state == "keep":
        raise ValueError(
            '`client_optimizer_state="keep"` is not supported on Flower: a client does not learn whether its last '
            'update counted, so it cannot know which state to go on from. Use "reset".'
        )
    if trainer.aggregator.keeps_client_adapters:
        raise ValueError(
            'Methods whose clients go on from factors of their own (`assignment="keep"`) are not supported on Flower: '
            'a client does not learn whether its last update counted. Use `assignment="average"`.'
        )
