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
        sent, received: Number of these messages.
    """

    def __init__(self) -> None:
        self.grid: Grid | None = None
        self.timeout = 3600.0
        self._asked: dict[str, int] = {}
        self._failed: dict[int, str] = {}
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.bytes_sent = self.bytes_received = self.sent = self.received = 0

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

    def exchange(self, messages: Iterable[Message], timeout: float | None = None) -> Iterator[Message]:
        """Send, and yield replies as they come, until all have answered or the time is up.

        The messages are pushed when the first reply is asked for. Who has answered is known by `sender_of`, who has
        not by `unanswered`.

        Args:
            messages: One per node.
            timeout: Seconds; `None` takes that of a round.
        """
        grid = self.started()
        self._asked, self._failed = {}, {}
        for message in messages:  # one by one: a federation's worth of factors need not be in memory at once
            ids = [str(message_id) for message_id in grid.push_messages([message]) if message_id]
            if not ids:
                self._failed[message.metadata.dst_node_id] = "Flower did not take the message for it"
                continue
            self._asked[ids[0]] = message.metadata.dst_node_id
            self.bytes_sent += wire.nbytes(message.content)
            self.sent += 1
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while self._asked and time.monotonic() < end:
            for message_id in list(self._asked):
                yield from self._pull(grid, message_id)
            if self._asked:
                time.sleep(POLL_SECONDS)
        self._failed |= dict.fromkeys(self._asked.values(), "no answer in time")

    def _pull(self, grid: Grid, message_id: str) -> list[Message]:
        """A reply, if it is there: each by itself, so that one that cannot be read costs no other."""
        try:
            return list(grid.pull_messages([message_id]))
        except Exception as error:  # whatever a node has made of a message
            self._failed[self._asked.pop(message_id)] = f"its reply cannot be read: {type(error).__name__}: {error}"
            return []

    def sender_of(self, reply: Message) -> int | None:
        """The node that was asked for a reply; `None` if none was, or it has answered already."""
        node_id = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if node_id is not None and reply.has_content():
            self.bytes_received += wire.nbytes(reply.content)
            self.received += 1
        return node_id

    def unanswered(self) -> dict[int, str]:
        """Nodes that have not answered in the last exchange, and why."""
        return self._failed
