"""Flower in one process: client apps behind a grid that carries messages through Flower's own serialization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity


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
