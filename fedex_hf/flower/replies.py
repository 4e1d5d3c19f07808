"""What clients answer, read and checked: whatever does not fit is a `PayloadError`, and touches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import Message

from fedex_hf.client_adapters import start_of
from fedex_hf.flower import wire
from fedex_hf.flower.roster import Member
from fedex_hf.trainer import FederatedTrainer
from fedex_hf.updates import ClientUpdate, LowRankDelta


LARGEST_UPDATE = 1e30  # norm of a layer's update: sums of products stay far below float32's largest number


def read_update(trainer: FederatedTrainer, member: Member, reply: Message, round: int) -> ClientUpdate:
    """A client's update.

    Raises:
        PayloadError: If it is of another client, round or base, does not fit the model, or holds NaN, Inf or numbers
            whose products would be.
    """
    sender = _check_identity(trainer, member, reply, round)
    rank = trainer.args.parsed_client_ranks.get(member.client_id)
    arrays, numbers = wire.only(reply.content, wire.ARRAYS), wire.only(reply.content, wire.METRICS)
    state = wire.decode_state(arrays, trainer.adapted, trainer.aggregator.trained_factors, sender, rank)
    _check_size(state.adapters, sender)
    offsets: Mapping[str, LowRankDelta] = {}
    if rank is not None:
        key = trainer.rank_key(member.client_id, round)
        _, offsets = start_of(trainer.adapted, trainer.federation.state, rank, key)
    return ClientUpdate(
        client_id=member.client_id,
        round=round,
        num_examples=wire.number(numbers, "num-examples", int, sender, least=1),
        adapters=state.adapters,
        tensors=state.tensors,
        metrics={
            "train_loss": wire.number(numbers, "train_loss", float, sender, least=float("-inf")),
            "steps": wire.number(numbers, "steps", int, sender, least=1),
        },
        offsets=offsets,
        base_version=trainer.base_version,
    )


def read_metrics(
    trainer: FederatedTrainer, member: Member, reply: Message, round: int, needed: str | None
) -> tuple[int, dict[str, float]]:
    """The number of examples that a client evaluated on, and its metrics without `eval_`.

    Args:
        trainer: The server's.
        member: The client.
        reply: Its answer.
        round: The round that was evaluated.
        needed: A metric that has to be among them.

    Raises:
        PayloadError: If it is of another client, round or base, or a metric is missing or not finite.
    """
    sender, numbers = _check_identity(trainer, member, reply, round), wire.only(reply.content, wire.METRICS)
    metrics = {
        name.removeprefix("eval_"): float(wire.number(numbers, name, type(numbers[name]), sender, least=float("-inf")))
        for name in numbers
        if name.startswith("eval_") and isinstance(numbers[name], (int, float))
    }
    if needed is not None and needed not in metrics:
        raise wire.PayloadError(
            f"{sender} sent no `eval_{needed}`, by which the best round is chosen. Give its trainer the "
            "`compute_metrics` of the others."
        )
    return wire.number(numbers, "num-examples", int, sender, least=1), metrics


def weighted_metrics(collected: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Means of the metrics that all have, weighted by examples; and the number of clients and of examples."""
    total = sum(weight for weight, _ in collected)
    common = [name for name in collected[0][1] if all(name in named for _, named in collected)]
    means = {name: sum(weight * named[name] for weight, named in collected) / total for name in common}
    return means | {"num_clients": len(collected), "num_examples": total}


def _check_identity(trainer: FederatedTrainer, member: Member, reply: Message, round: int) -> str:
    sender, config = f"Client `{member.client_id}`", wire.only(reply.content, wire.CONFIG)
    said = config.get("client-id"), config.get("round"), config.get("base-version")
    expected = member.client_id, round, trainer.base_version
    if said != expected:
        raise wire.PayloadError(f"{sender} answered for {said}, where {expected} was asked for.")
    return sender


def _check_size(adapters: Mapping[str, LowRankDelta], sender: str) -> None:
    for name, delta in adapters.items():
        norms = [float(torch.linalg.vector_norm(factor.double())) for factor in (delta.A, delta.B)]
        if delta.scaling * norms[0] * norms[1] > LARGEST_UPDATE:
            raise wire.PayloadError(
                f"{sender} sent factors of `{name}` with the norms {norms[0]:.0e} and {norms[1]:.0e}, whose product "
                "does not fit a float32 weight. Lower `learning_rate` or set `max_grad_norm`."
            )
