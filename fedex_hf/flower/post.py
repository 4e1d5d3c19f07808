"""Messages out, replies in: Flower's grid with a clock and a count of bytes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedex_hf.flower import wire


POLL_SECONDS = 0.5


class Post:
    """One exchange of messages at a time.

    Attributes:
        grid: Flower's connection to the nodes; `None` outside `FedExStrategy.start`.
        timeout: Seconds to wait for the replies of one exchange.
        bytes_sent, bytes_received: Arrays of all messages since `begin`.
    """

    def __init__(self) -> None:
        self.grid: Grid | None = None
        self.timeout = 3600.0
        self.bytes_sent = self.bytes_received = 0
        self._asked: dict[str, int] = {}

    def begin(self) -> None:
        """Count from here."""
        self.bytes_sent = self.bytes_received = 0

    def started(self) -> Grid:
        """The grid.

        Raises:
            RuntimeError: If the strategy's methods are called by something else than its own `start`.
        """
        if self.grid is None:
            raise RuntimeError(
                "`FedExStrategy` is driven from outside its `start`, as Flower's differential-privacy wrappers do. "
                "These add noise to the averaged factors, and the residual of FedEx-LoRA, which also depends on the "
                "clients' data, would leave without any; so they are not supported. Call `FedExStrategy.start`, and "
                "let the clients add noise to what they send: `make_client_app(trainer_fn, mods=[LocalDpMod(...)])`."
            )
        return self.grid

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Send, and yield replies as they come, until all have answered or the time is up.

        The messages are pushed when the first reply is asked for. Who has answered is known by `sender_of`.
        """
        grid = self.started()
        self._asked = {}
        for message in messages:  # one by one: a federation's worth of factors need not be in memory at once
            self.bytes_sent += wire.nbytes(message.content)
            for message_id in grid.push_messages([message]):
                self._asked[str(message_id)] = message.metadata.dst_node_id
        end = time.monotonic() + self.timeout
        while self._asked and time.monotonic() < end:
            yield from grid.pull_messages(list(self._asked))
            if self._asked:
                time.sleep(POLL_SECONDS)

    def sender_of(self, reply: Message) -> int | None:
        """The node that was asked for a reply; `None` if none was, or it has answered already."""
        node_id = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if node_id is not None and reply.has_content():
            self.bytes_received += wire.nbytes(reply.content)
        return node_id

    def unanswered(self) -> list[int]:
        """Nodes that have not answered in the last exchange."""
        return list(self._asked.values())
