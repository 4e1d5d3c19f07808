"""One client of a federation on Flower: it catches up with the server's base, fits, and evaluates.

Flower starts a new process for each message, so what a client keeps between two rounds lies on its disk: the ledger,
in `<output_dir>/flower/<client>/`. A client that has lost it is sent the whole ledger again.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from transformers.trainer_utils import has_length

from fedex_hf import checkpoint as ckpt
from fedex_hf.flower import wire
from fedex_hf.flower.settings import agreed_settings, refuse_unsupported
from fedex_hf.ledger_difference import LedgerDifference
from fedex_hf.state_tensors import state_layout
from fedex_hf.trainer import FederatedTrainer


logger = logging.getLogger("flwr")

Call = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Call], Message]


def make_client_app(trainer_fn: Callable[[Context], FederatedTrainer], mods: Sequence[Mod] = ()) -> ClientApp:
    """A Flower `ClientApp` that fits and evaluates with a `FederatedTrainer`.

    Args:
        trainer_fn: Builds the client's trainer from Flower's context: the same model and arguments as on the server,
            and `train_dataset={client_id: dataset}` with this client alone. Called for every message.
        mods: Flower's client mods around each fit, such as `LocalDpMod`. They see one `ArrayRecord` with the factors
            and heads; what belongs to the base is kept from them.

    Example:
        >>> def trainer_fn(context):
        ...     return FederatedTrainer(load_model(), arguments(context), train_dataset={"north": load_data()})
        >>> app = make_client_app(trainer_fn)
    """
    app = ClientApp()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        client = RemoteClient(trainer_fn(context))
        return _reply(message, {wire.CONFIG: ConfigRecord(client.description())})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = RemoteClient(trainer_fn(context))
        client.catch_up(message.content)
        client.take(message.content)
        return client.train(message, context) if not mods else client.train_inside(mods, message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = RemoteClient(trainer_fn(context))
        client.catch_up(message.content)
        return client.evaluate(message)

    return app


class RemoteClient:
    """A trainer with one client, and what that client keeps on its disk.

    Args:
        trainer: The client's trainer.

    Raises:
        TypeError, ValueError: If the trainer is not one of a single client, or asks for what a client cannot do.
    """

    def __init__(self, trainer: FederatedTrainer) -> None:
        if not isinstance(trainer, FederatedTrainer):
            raise TypeError(f"`trainer_fn` returned a `{type(trainer).__name__}`. Allowed: a `FederatedTrainer`.")
        clients = list(trainer.clients.datasets)
        if len(clients) != 1:
            raise ValueError(
                f"`trainer_fn` returned a trainer of {len(clients)} clients. Allowed: one, as in "
                "`train_dataset={client_id: dataset}`; the others train on their own machines."
            )
        if trainer.args.parsed_client_ranks or trainer.args.push_to_hub:
            raise ValueError(
                "A client on Flower takes neither `client_ranks`, which the server sends, nor `push_to_hub`: the "
                "server publishes the rounds. Set them in the server's arguments only."
            )
        refuse_unsupported(trainer)
        self.trainer = trainer
        self.client_id = clients[0]
        self._file = (
            Path(str(trainer.args.output_dir)) / "flower" / quote(self.client_id, safe="") / "ledger.safetensors"
        )
        self._restore()

    @property
    def base_version(self) -> str:
        """The base that the client holds now."""
        return self.trainer.ledger_history.version_of(self.trainer.adapted.ledger)

    def description(self) -> dict[str, Any]:
        """What the server asks before the first round."""
        clients = self.trainer.clients
        return {
            "client-id": self.client_id,
            "num-examples": clients.num_examples(self.client_id),
            "num-steps": clients.num_steps(self.client_id),
            "num-samples": float(clients.num_samples(self.client_id)),
            "base-version": self.base_version,
            "settings": json.dumps(agreed_settings(self.trainer)),
        }

    def catch_up(self, content: RecordDict) -> None:
        """Apply the residuals that a message brings, keep the ledger, and take them out of the message.

        Raises:
            PayloadError, LedgerMismatchError: If they do not lead from here to the server's base.
        """
        config, arrays = wire.only(content, wire.CONFIG), wire.only(content, wire.RESIDUALS)
        about = config.pop(wire.DIFFERENCE, None)
        content.pop(wire.RESIDUALS, None)
        if about is None:
            return
        difference = wire.decode_difference(arrays, str(about), self.trainer.adapted)
        difference.apply(self.trainer.adapted, self.trainer.ledger_history.base)
        self._keep(difference.version)
        logger.info("%s: base brought up to date by %.2f MB of residuals", self.client_id, difference.nbytes / 1e6)

    def take(self, content: RecordDict) -> None:
        """Go on from the global state that a message brings.

        Raises:
            PayloadError: If it does not fit the model.
        """
        trainer, arrays = self.trainer, wire.only(content, wire.ARRAYS)
        round = wire.number(wire.only(content, wire.CONFIG), "round", int, "The server")
        state = wire.decode_state(arrays, trainer.adapted, trainer.aggregator.trained_factors, "The server")
        trainer.federation = ckpt.RoundState(round, state, trainer.adapted.ledger)

    def train(self, message: Message, context: Context) -> Message:
        """Fit from the state that was taken.

        Raises:
            NonFiniteUpdateError: If the result holds NaN or Inf.
        """
        trainer, config = self.trainer, wire.only(message.content, wire.CONFIG)
        round = wire.number(config, "round", int, "The server", least=1)
        place = wire.number(config, "place", int, "The server")
        rank = wire.number(config, "rank", int, "The server")
        others = wire.number(config, "num-clients", int, "The server", least=place + 1)
        # Seeds go by a client's place, and where a stream goes on by the rounds in which that place was sampled.
        trainer.clients.order = {self.client_id if each == place else f"/{each}": each for each in range(others)}
        trainer.args.client_ranks = {self.client_id: rank} if rank else None
        trainer.federation.round = round - 1
        update = trainer.fit_client(self.client_id, round)
        loss, steps = float(update.metrics["train_loss"]), int(update.metrics["steps"])
        logger.info("%s, round %d: %d steps, loss %.4f", self.client_id, round, steps, loss)
        arrays = wire.encode_state(update, trainer.aggregator.trained_factors)
        metrics = {"num-examples": update.num_examples, "train_loss": loss, "steps": steps}
        return self._answer(message, round, metrics, {wire.ARRAYS: arrays})

    def train_inside(self, mods: Sequence[Mod], message: Message, context: Context) -> Message:
        """`train` inside mods, which get numbers to calculate with.

        16-bit floats, some of which travel as integers, are float32 to them; what they make of them is rounded back
        once, so that noise is no less private for it. Their random numbers are new: a trainer has set the seed of the
        run, which all know.
        """
        _draw_anew()
        trainer = self.trainer
        layout = state_layout(trainer.adapted, trainer.aggregator.trained_factors)

        def call(message: Message, context: Context) -> Message:
            reply = self.train(message, context)
            _draw_anew()
            reply.content[wire.ARRAYS] = wire.widened(reply.content.array_records[wire.ARRAYS], layout)
            return reply

        for mod in reversed(mods):
            call = partial(_apply, mod, call)
        message.content[wire.ARRAYS] = wire.widened(message.content.array_records[wire.ARRAYS], layout)
        reply = call(message, context)
        if reply.has_content():
            reply.content[wire.ARRAYS] = wire.narrowed(wire.only(reply.content, wire.ARRAYS), layout)
        return reply

    def evaluate(self, message: Message) -> Message:
        """Evaluate the global state that a message brings on this client's `eval_dataset`.

        Raises:
            ValueError: If there is none, or it has no length to weight its metrics by.
        """
        trainer, dataset = self.trainer, self.trainer.eval_dataset
        parts: list[Any] = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
        if any(part is None or not has_length(part) for part in parts):
            raise ValueError(
                f"Client `{self.client_id}` has no `eval_dataset` of a known length, and the server asks clients to "
                "evaluate. Give its trainer one, or set `evaluate_on_clients=False` on the server."
            )
        self.take(message.content)
        trainer.restore_global_state()
        metrics = {name: value for name, value in trainer.evaluate().items() if isinstance(value, (int, float))}
        return self._answer(message, trainer.federation.round, {"num-examples": sum(map(len, parts)), **metrics}, {})

    def _answer(self, message: Message, round: int, metrics: dict[str, Any], records: dict[str, Any]) -> Message:
        """A reply that says who answers, for which round, and on which base."""
        who: dict[str, Any] = {"client-id": self.client_id, "round": round, "base-version": self.base_version}
        return _reply(message, {**records, wire.METRICS: MetricRecord(metrics), wire.CONFIG: ConfigRecord(who)})

    def _restore(self) -> None:
        if not self._file.is_file():
            return
        try:
            LedgerDifference.load(self._file).apply(self.trainer.adapted, self.trainer.ledger_history.base)
        except ValueError as error:
            logger.warning("%s: `%s` is not used: %s", self.client_id, self._file, error)
        self.trainer.federation.ledger = self.trainer.adapted.ledger

    def _keep(self, version: str) -> None:
        self.trainer.federation.ledger = self.trainer.adapted.ledger
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for left in self._file.parent.glob("*.unfinished"):  # by a process that was killed
            left.unlink(missing_ok=True)
        unfinished = self._file.with_suffix(f".{os.getpid()}.unfinished")
        LedgerDifference(None, version, ledger=self.trainer.adapted.ledger).save(unfinished)
        unfinished.replace(self._file)


def _draw_anew() -> None:
    """Seed Python, NumPy and torch from the operating system."""
    random.seed()
    np.random.seed()
    torch.seed()


def _apply(mod: Mod, call: Call, message: Message, context: Context) -> Message:
    return mod(message, context, call)


def _reply(message: Message, records: dict[str, Any]) -> Message:
    return Message(RecordDict(records), reply_to=message)
