"""`FedExStrategy`: Flower carries the messages, the rooms of `FederatedTrainer` do the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedex_hf.client_adapters import start_of
from fedex_hf.flower import wire
from fedex_hf.flower.post import Post
from fedex_hf.flower.roster import Member, Roster
from fedex_hf.flower.server import RemoteClients, RemoteDataset, ServerTrainer, wants_evaluation
from fedex_hf.flower.settings import agreed_settings, refuse_kept_states
from fedex_hf.flower.traffic import other_methods
from fedex_hf.partition import client_names
from fedex_hf.training_args import FederatedTrainingArguments
from fedex_hf.updates import ClientUpdate, LowRankDelta


logger = logging.getLogger("flwr")


class FedExStrategy(Strategy):
    """Exact federated LoRA (FedEx-LoRA, arXiv 2410.09432, and every other registered aggregator) as a Flower strategy.

    A round is `FederatedTrainer`'s: the same sampling, weights, aggregation, certificate, logs, checkpoints, model
    cards and pushes to the Hub. Only the fits happen elsewhere. What travels is factors: each client's `A_i`, `B_i`
    and heads up; the new adapter and the residuals that this client lacks down.

    A client that does not answer in time, raises, or sends what does not fit is left out of the round, with a line in
    the log, as long as `args.min_clients` remain (`args.client_errors` is about fits in this process). It is asked
    again in the next round, and sent what it has missed.

    Args:
        model: As in `FederatedTrainer`.
        args: Arguments of the run; clients need the same seeds and schedule.
        clients: The federation's clients, in the order that decides their seeds; `client-0`, `client-1`, ... of
            `args.num_clients` if `None`.
        timeout: Seconds to wait for the replies of a round or an evaluation.
        connect_timeout: Seconds to wait, at the start of a round, for sampled clients that are not connected. For
            `args.min_clients` of them it waits for ever.
        evaluate_on_clients: Whether clients evaluate each evaluated round on their own `eval_dataset`; if `None`, only
            where the server has no dataset.
        trainer_kwargs: Further arguments of `FederatedTrainer`, such as `peft_config`, `eval_dataset`,
            `compute_metrics`, `callbacks`.

    Attributes:
        trainer: The server's `FederatedTrainer`.

    Raises:
        ValueError: If the arguments ask for what cannot be had across machines.
    """

    def __init__(
        self,
        model: nn.Module | str,
        args: FederatedTrainingArguments,
        clients: Sequence[str] | None = None,
        timeout: float = 3600.0,
        connect_timeout: float = 60.0,
        evaluate_on_clients: bool | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        names = client_names(args.num_clients or 3) if clients is None else list(clients)
        if len(set(names)) != len(names):
            raise ValueError(f"`clients={names}` names a client twice. Give each its own name.")
        if args.parallel_clients > 1:
            raise ValueError(
                f"`parallel_clients={args.parallel_clients}` is for clients of one process, and on Flower each has "
                "its own. Leave it out."
            )
        has_data = trainer_kwargs.get("eval_dataset") is not None
        self.evaluates_on_clients = not has_data if evaluate_on_clients is None else evaluate_on_clients
        if not has_data and self.evaluates_on_clients and wants_evaluation(args):
            trainer_kwargs["eval_dataset"] = RemoteDataset()
        self.trainer = ServerTrainer(
            model, args, train_dataset={name: RemoteDataset() for name in names}, **trainer_kwargs
        )
        refuse_kept_states(self.trainer)
        self.trainer.strategy = self
        self.timeout, self.connect_timeout = timeout, connect_timeout
        self._post = Post()
        self._roster = Roster(names, agreed_settings(self.trainer), self._post)
        cast(RemoteClients, self.trainer.clients).members = self._roster.known
        self._configs = ConfigRecord(), ConfigRecord()
        self._round_began_at = 0.0
        self._result = Result()

    @property
    def traffic(self) -> dict[str, float]:
        """Bytes sent to and received from all clients since the round or the evaluation began."""
        return {"bytes_sent": self._post.bytes_sent, "bytes_received": self._post.bytes_received}

    def summary(self) -> None:
        """Log what this strategy is about to do."""
        args, trainer = self.trainer.args, self.trainer
        logger.info("\t├──> Method: %s (%s)", trainer.aggregator.name, trainer.aggregator.paper)
        logger.info("\t├──> Clients: %s", ", ".join(self._roster.clients))
        logger.info("\t├──> Rounds: %d, at least %d clients in each", args.num_rounds, args.min_clients)
        logger.info("\t├──> Residuals are held in the %s", trainer.adapted.storage)
        logger.info("\t└──> Rounds are kept in `%s`", args.output_dir)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[..., Any] | None = None,
    ) -> Result:
        """Run all rounds: `FederatedTrainer.train`, with the fits on Flower's nodes.

        Args:
            grid: Flower's connection to the nodes.
            initial_arrays, num_rounds, evaluate_fn: Refused: the model, the arguments and `eval_dataset` say these.
            timeout: Seconds to wait for replies; clients that have not answered by then are left out. `None` takes the
                strategy's.
            train_config, evaluate_config: Further entries of the messages, for mods.

        Returns:
            The final adapter and the metrics of every round of this call.

        Raises:
            ValueError: If an argument would be ignored; and as `FederatedTrainer.train`.
            RuntimeError: If fewer than `args.min_clients` updates arrive. The last round is in its checkpoint: start
                again with `args.resume_from_checkpoint=True`.
        """
        given = {"initial_arrays": initial_arrays, "num_rounds": num_rounds, "evaluate_fn": evaluate_fn}
        ignored = [name for name, value in given.items() if value is not None]
        if ignored:
            raise ValueError(
                f"`FedExStrategy.start` takes no `{'`, `'.join(ignored)}`: the model, `args.num_rounds` and "
                "`eval_dataset` of `FedExStrategy` say these."
            )
        logger.info("Starting %s:", type(self).__name__)
        self.summary()
        self._post.grid, self._post.timeout = grid, self.timeout if timeout is None else timeout
        self._configs = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        self._result = Result()
        try:
            self.trainer.train(resume_from_checkpoint=self.trainer.args.resume_from_checkpoint)
        finally:
            self._post.grid = None
        self._result.arrays = self._arrays()
        return self._result

    # ---- Training ----

    def run_round(self, round: int, start_time: float) -> dict[str, float]:
        """One round of the trainer: messages out, replies in."""
        self._round_began_at = start_time
        messages = self.configure_train(round, self._arrays(), self._configs[0], self._post.started())
        _, metrics = self.aggregate_train(round, self._post.exchange(messages))
        return {name: value for name, value in (metrics or {}).items() if isinstance(value, (int, float))}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each sampled client that is connected: the global state, and what its base lacks."""
        self._post.started()
        self._post.begin()
        clients, least = self.trainer.sample_clients(server_round), self.trainer.args.min_clients
        members = self._roster.gather(grid, clients, least, self.connect_timeout)
        self.trainer.plan_steps(server_round)
        return (self._message(member, MessageType.TRAIN, server_round, arrays, config) for member in members)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Read the updates, leave out those that do not fit, and complete the round.

        Raises:
            RuntimeError: If fewer than `args.min_clients` remain.
        """
        self._post.started()
        trainer, before = self.trainer, self.trainer.state.global_step
        sampled = trainer.sample_clients(server_round)
        arrived: dict[str, ClientUpdate] = {}
        for member, reply in self._readable(replies, server_round):
            try:
                update = self._read_update(member, reply, server_round)
            except ValueError as error:
                self._leave_out(member, server_round, error)
                continue
            member.holds = update.base_version
            arrived[member.client_id] = update
            trainer.count_steps(member.num_steps)
            trainer._call_federated("on_client_end", update=update)
        updates = [arrived[client_id] for client_id in trainer.clients.order if client_id in arrived]
        trainer.check_quorum(server_round, sampled, updates)
        trainer.state.global_step = before + sum(trainer.clients.num_steps(client_id) for client_id in sampled)
        trainer.add_train_loss(updates, trainer.state.global_step - before)
        metrics = trainer.complete_round(server_round, updates, self._round_began_at)
        self._log_traffic(server_round, len(updates))
        record = MetricRecord(dict(metrics))
        self._result.train_metrics_clientapp[server_round] = record
        return self._arrays(), record

    def _read_update(self, member: Member, reply: Message, round: int) -> ClientUpdate:
        trainer, sender = self.trainer, f"Client `{member.client_id}`"
        config, numbers = wire.only(reply.content, wire.CONFIG), wire.only(reply.content, wire.METRICS)
        said = config.get("client-id"), config.get("round"), config.get("base-version")
        expected = member.client_id, round, trainer.base_version
        if said != expected:
            raise wire.PayloadError(f"{sender} sent an update of {said}, where {expected} was asked for.")
        rank = trainer.args.parsed_client_ranks.get(member.client_id)
        arrays = wire.only(reply.content, wire.ARRAYS)
        state = wire.decode_state(arrays, trainer.adapted, trainer.aggregator.trained_factors, sender, rank)
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

    # ---- Evaluation ----

    def run_evaluation(self, round: int) -> dict[str, float]:
        """Evaluate the present round on the clients; empty where no client can."""
        messages = self.configure_evaluate(round, self._arrays(), self._configs[1], self._post.started())
        metrics = self.aggregate_evaluate(round, self._post.exchange(messages))
        return {name: value for name, value in (metrics or {}).items() if isinstance(value, (int, float))}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each connected client: the global state, and what its base lacks."""
        self._post.started()
        self._post.begin()
        self._roster.refresh(grid)
        members = [self._roster.members[name] for name in self._roster.clients if name in self._roster.members]
        return (self._message(member, MessageType.EVALUATE, server_round, arrays, config) for member in members)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Form the mean of the clients' metrics, weighted by the examples of their `eval_dataset`."""
        self._post.started()
        collected: list[tuple[int, Mapping[str, float]]] = []
        for member, reply in self._readable(replies, server_round):
            numbers, sender = wire.only(reply.content, wire.METRICS), f"Client `{member.client_id}`"
            try:
                weight = wire.number(numbers, "num-examples", int, sender, least=1)
                named = {
                    name.removeprefix("eval_"): float(numbers[name]) for name in numbers if name.startswith("eval_")
                }
            except (TypeError, ValueError) as error:
                self._leave_out(member, server_round, error)
                continue
            member.holds = self.trainer.base_version
            collected.append((weight, named))
        if not collected:
            logger.warning("Round %d: no client evaluated it.", server_round)
            return None
        total = sum(weight for weight, _ in collected)
        common = [name for name in collected[0][1] if all(name in named for _, named in collected)]
        metrics: dict[str, Any] = {
            name: sum(weight * named[name] for weight, named in collected) / total for name in common
        }
        record = MetricRecord(metrics | {"num_clients": len(collected), "num_examples": total})
        self._result.evaluate_metrics_clientapp[server_round] = record
        return record

    # ---- Messages ----

    def _message(self, member: Member, kind: str, round: int, arrays: ArrayRecord, config: ConfigRecord) -> Message:
        trainer = self.trainer
        about: dict[str, Any] = dict(config) | {
            "round": round,
            "place": trainer.clients.order[member.client_id],
            "num-clients": len(trainer.clients.order),
            "rank": trainer.args.parsed_client_ranks.get(member.client_id, 0),
        }
        records: dict[str, Any] = {wire.ARRAYS: arrays}
        if member.holds != trainer.base_version:
            residuals, about[wire.DIFFERENCE] = wire.encode_difference(trainer.ledger_difference(member.holds))
            records[wire.RESIDUALS] = residuals
        content = RecordDict(records | {wire.CONFIG: ConfigRecord(about)})
        return Message(content, member.node_id, kind, ttl=self._post.timeout, group_id=str(round))

    def _readable(self, replies: Iterable[Message], round: int) -> Iterator[tuple[Member, Message]]:
        """Replies that are no errors, with who sent them; whoever is missing at the end is left out."""
        by_node = {member.node_id: member for member in self._roster.members.values()}
        for reply in replies:
            node_id = self._post.sender_of(reply)
            if node_id is None:
                logger.warning("Round %d: a message that nobody was asked for is ignored.", round)
            elif reply.has_error():
                self._leave_out(by_node[node_id], round, RuntimeError(reply.error.reason))
            else:
                yield by_node[node_id], reply
        for node_id in self._post.unanswered():
            self._leave_out(by_node[node_id], round, TimeoutError(f"no answer within {self._post.timeout:g} s"))

    def _log_traffic(self, round: int, clients: int) -> None:
        methods = {"here": (self._post.bytes_received / clients, self._post.bytes_sent / clients)}
        methods |= other_methods(self.trainer.adapted, clients)
        told = ", ".join(f"{name} {up / 1e6:.3f} and {down / 1e6:.3f}" for name, (up, down) in methods.items())
        logger.info("Round %d, MB per client up and down: %s", round, told)

    def _leave_out(self, member: Member, round: int, error: Exception) -> None:
        logger.warning(
            "Round %d: client `%s` is left out: %s: %s",
            round,
            member.client_id,
            type(error).__name__,
            str(error)[:1000],
        )
        self._roster.release(member.client_id, "it has to say again which base it holds")

    def _arrays(self) -> ArrayRecord:
        return wire.encode_state(self.trainer.federation.state, self.trainer.aggregator.trained_factors)
