"""`FedExStrategy`: Flower carries the messages, the rooms of `FederatedTrainer` do the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedex_hf.flower import wire
from fedex_hf.flower.post import Post
from fedex_hf.flower.replies import read_metrics, read_update, weighted_metrics
from fedex_hf.flower.roster import Member, Roster
from fedex_hf.flower.server import RemoteClients, RemoteDataset, ServerTrainer, wants_evaluation
from fedex_hf.flower.settings import agreed_settings, refuse_unsupported
from fedex_hf.flower.traffic import other_methods
from fedex_hf.ledger_difference import LedgerMismatchError
from fedex_hf.partition import client_names
from fedex_hf.training_args import FederatedTrainingArguments
from fedex_hf.updates import ClientUpdate


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
        connect_timeout: Seconds to wait, at the start of a round, for sampled clients that are not connected; for
            `args.min_clients` of them it waits as long as for replies.
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
        refuse_unsupported(self.trainer)
        self.trainer.strategy = self
        self.timeout, self.connect_timeout = timeout, connect_timeout
        self._post = Post()
        self._roster = Roster(names, agreed_settings(self.trainer), self._post)
        cast(RemoteClients, self.trainer.clients).members = self._roster.known
        self._configs = ConfigRecord(), ConfigRecord()
        self._round_began_at = 0.0
        self._result = Result()

    @property
    def is_running(self) -> bool:
        """Whether `start` is at work, so that clients can be asked."""
        return self._post.grid is not None

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
            RuntimeError: If fewer than `args.min_clients` connect or send an update. The last round is in its
                checkpoint: start again with `args.resume_from_checkpoint=True`.
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
        return self._messages(members, MessageType.TRAIN, server_round, arrays, config)

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
                update = read_update(trainer, member, reply, server_round)
            except ValueError as error:
                self._leave_out(member, server_round, str(error))
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
        self._roster.drop_gone(grid)
        members = [self._roster.members[name] for name in self._roster.clients if name in self._roster.members]
        return self._messages(members, MessageType.EVALUATE, server_round, arrays, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Form the mean of the clients' metrics, weighted by the examples of their `eval_dataset`."""
        self._post.started()
        collected = []
        for member, reply in self._readable(replies, server_round):
            try:
                collected.append(read_metrics(self.trainer, member, reply, server_round, self._needed_metric()))
            except ValueError as error:
                self._leave_out(member, server_round, str(error))
                continue
            member.holds = self.trainer.base_version
        if not collected:
            logger.warning("Round %d: no client evaluated it.", server_round)
            return None
        record = MetricRecord(dict(weighted_metrics(collected)))
        self._result.evaluate_metrics_clientapp[server_round] = record
        return record

    # ---- Messages ----

    def _messages(
        self, members: Sequence[Member], kind: str, round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> Iterator[Message]:
        trainer = self.trainer
        residuals: dict[str | None, tuple[ArrayRecord, str]] = {}  # by the version that they start from
        for member in members:
            about: dict[str, Any] = dict(config) | {
                "round": round,
                "place": trainer.clients.order[member.client_id],
                "num-clients": len(trainer.clients.order),
                "rank": trainer.args.parsed_client_ranks.get(member.client_id, 0),
            }
            records: dict[str, Any] = {wire.ARRAYS: arrays}
            if member.holds != trainer.base_version:
                since = None if member.client_id in self._roster.cannot_replay else member.holds
                if since not in residuals:
                    residuals[since] = wire.encode_difference(trainer.ledger_difference(since))
                records[wire.RESIDUALS], about[wire.DIFFERENCE] = residuals[since]
            content = RecordDict(records | {wire.CONFIG: ConfigRecord(about)})
            yield Message(content, member.node_id, kind, ttl=self._post.timeout, group_id=str(round))

    def _readable(self, replies: Iterable[Message], round: int) -> Iterator[tuple[Member, Message]]:
        """Replies that are no errors, with who sent them; whoever is missing at the end is left out."""
        by_node = {member.node_id: member for member in self._roster.members.values()}
        for reply in replies:
            node_id = self._post.sender_of(reply)
            if node_id is None:
                logger.warning("Round %d: a message that nobody was asked for is ignored.", round)
            elif reply.has_error():
                self._leave_out(by_node[node_id], round, str(reply.error.reason))
            else:
                yield by_node[node_id], reply
        for node_id, reason in self._post.unanswered().items():
            self._leave_out(by_node[node_id], round, reason)

    def _log_traffic(self, round: int, clients: int) -> None:
        post = self._post
        methods = {"here": (post.bytes_received / max(post.received, 1), post.bytes_sent / max(post.sent, 1))}
        methods |= other_methods(self.trainer.adapted, clients)
        told = ", ".join(f"{name} {up / 1e6:.3f} and {down / 1e6:.3f}" for name, (up, down) in methods.items())
        logger.info("Round %d, MB per client up and down: %s", round, told)

    def _leave_out(self, member: Member, round: int, reason: str) -> None:
        if LedgerMismatchError.__name__ in reason:  # replayed rounds end elsewhere there: it needs no replaying
            self._roster.cannot_replay.add(member.client_id)
        logger.warning("Round %d: client `%s` is left out: %s", round, member.client_id, reason[:1000])
        self._roster.release(member.client_id, "it has to say again which base it holds")

    def _needed_metric(self) -> str | None:
        """The clients' metric that the best round is chosen by, if it is one of theirs."""
        name = (self.trainer.args.metric_for_best_model or "").removeprefix("eval_")
        if isinstance(self.trainer.eval_dataset, RemoteDataset):
            return name or None
        return name.removeprefix("clients_") if name.startswith("clients_") else None

    def _arrays(self) -> ArrayRecord:
        return wire.encode_state(self.trainer.federation.state, self.trainer.aggregator.trained_factors)
