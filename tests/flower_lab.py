"""Flower in one process: client apps behind a grid that carries messages through Flower's own serialization.

    lab = Lab(tmp_path, num_rounds=3)
    strategy = lab.strategy()
    strategy.start(lab.grid())
    assert same(strategy.trainer, lab.in_process())

Real processes are in `test_flower_processes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedex_hf import FederatedTrainer
from fedex_hf.flower import FedExStrategy, make_client_app


class LocalGrid(Grid):
    """Runs each node's app when its message is pulled.

    Args:
        apps: Node id -> its app.
        tamper: Called with every reply before it is delivered; what it returns is delivered, `None` never.
        names: Node id -> the name that it is registered with.
    """

    def __init__(
        self,
        apps: Mapping[int, ClientApp],
        tamper: Callable[[int, Message], Message | None] = lambda node_id, reply: reply,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.apps = dict(apps)
        self.tamper = tamper
        self.names = dict(names or {})
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._waiting: dict[str, Message] = {}
        # Flower's own processes set these for the messages that they make.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node_id, name=self.names.get(node_id, "")) for node_id in self.apps]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.sent.append(message)
            self._waiting[message_id] = through_the_wire(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in [each for each in message_ids if each in self._waiting]:
            message = self._waiting.pop(message_id)
            node_id = message.metadata.dst_node_id
            context = Context(1, node_id, {}, RecordDict(), {})
            try:
                reply = self.apps[node_id](message, context)
            except KeyError:
                reply = Message(Error(5, "node unavailable"), reply_to=message)
            except Exception as error:  # as Flower's own process does
                reply = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
            reply = self.tamper(node_id, reply)
            if reply is not None:
                self.received.append(reply)
                replies.append(reply if reply.has_error() else through_the_wire(reply))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def through_the_wire(message: Message) -> Message:
    """A message as it arrives: deflated into objects and inflated again by Flower."""
    message_id = message.metadata.message_id
    message.metadata.__dict__["_message_id"] = message.object_id
    contents = {object_id: each.deflate() for object_id, each in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, contents)
    arrived.metadata.__dict__["_message_id"] = message_id
    return arrived


class Lab:
    """One federation of tiny models, in one process and on Flower.

    Args:
        folder: Where rounds and ledgers go.
        sizes: Examples per client.
        model: Makes the base, the same at every call.
        data: Makes a client's data.
        peft_config: The adapter.
        trainer_kwargs: Further arguments of every trainer.
        arguments: Of the run.
    """

    def __init__(
        self,
        folder: Path,
        sizes: tuple[int, ...] = (12, 7, 9),
        model: Callable[[], Any] = tiny.roberta,
        data: Callable[..., Any] = tiny.classification_data,
        peft_config: Callable[[], Any] | None = tiny.lora,
        trainer_kwargs: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.folder = folder
        self.data = tiny.clients_of(list(sizes), data)
        self.model = model
        self.peft_config = {} if peft_config is None else {"peft_config": peft_config}
        self.arguments = {"num_rounds": 3} | arguments
        self.trainer_kwargs = dict(trainer_kwargs or {})
        self.clients: list[FederatedTrainer] = []  # the trainers that fitted or evaluated

    def _kwargs(self) -> dict[str, Any]:
        return {name: make() for name, make in self.peft_config.items()} | self.trainer_kwargs

    def in_process(self, name: str = "in-process", cls: type[FederatedTrainer] = FederatedTrainer) -> FederatedTrainer:
        """`FederatedTrainer` after the whole run."""
        args = tiny.arguments(self.folder / name, **self.arguments)
        trainer = cls(self.model(), args, train_dataset=self.data, **self._kwargs())
        trainer.train()
        return trainer

    def strategy(self, name: str = "server", timeout: float = 60.0, **kwargs: Any) -> FedExStrategy:
        """The server's side; what is no argument of the run goes to `FedExStrategy`."""
        own = (
            "aggregator",
            "clients",
            "connect_timeout",
            "evaluate_on_clients",
            "eval_dataset",
            "callbacks",
            "compute_metrics",
        )
        given = {key: kwargs.pop(key) for key in own if key in kwargs}
        args = tiny.arguments(self.folder / name, **(self.arguments | kwargs))
        defaults = {"clients": list(self.data), "connect_timeout": 0.0}
        return FedExStrategy(self.model(), args, timeout=timeout, **(defaults | self._kwargs() | given))

    def app(self, client_id: str, mods: tuple = (), says: str | None = None, **changed: Any) -> ClientApp:
        """A client's app; `changed` are arguments that it has differently."""
        of_clients = {"client_ranks", "resume_from_checkpoint", "min_clients", "eval_strategy", "save_strategy"}
        of_clients |= {"push_to_hub", "hub_model_id"}
        arguments = {key: value for key, value in self.arguments.items() if key not in of_clients} | changed

        def trainer_fn(context: Context) -> FederatedTrainer:
            trainer = FederatedTrainer(
                self.model(),
                tiny.arguments(self.folder / "clients", **arguments),
                train_dataset={says or client_id: self.data[client_id]},
                eval_dataset=tiny.classification_data(8, seed=50 + len(client_id)),
                **self._kwargs(),
            )
            self.clients.append(trainer)
            return trainer

        return make_client_app(trainer_fn, mods)

    def grid(self, **kwargs: Any) -> LocalGrid:
        """All clients, connected as nodes 100, 101, ..."""
        return LocalGrid({100 + index: self.app(name) for index, name in enumerate(self.data)}, **kwargs)


class WithoutTheSecond(FederatedTrainer):
    """What one process does where `client-1` takes no part in round 2."""

    def sample_clients(self, round: int) -> list[str]:
        return [name for name in super().sample_clients(round) if (name, round) != ("client-1", 2)]


def same(left: FederatedTrainer, right: FederatedTrainer) -> bool:
    """Whether two trainers hold the same adapter, base and ledger, bit for bit."""
    ledgers = [tiny.tensors_of(each.federation.ledger) for each in (left, right)]
    return tiny.same_bytes(tiny.trained(left.model), tiny.trained(right.model)) and tiny.same_bytes(*ledgers)
