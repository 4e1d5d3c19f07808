"""Which node is which client, how large its data is, and which base it holds."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedex_hf.checkpoint import difference_between
from fedex_hf.flower import wire
from fedex_hf.flower.post import POLL_SECONDS, Post


logger = logging.getLogger("flwr")

_SAY_WHO_IS_MISSING_SECONDS = 60.0
_ANSWER_SECONDS = 120.0  # a process has to start, and to load the model
_MOST_STEPS = 10**6  # of one fit


@dataclass
class Member:
    """A client that is connected.

    Args:
        client_id: The client.
        node_id: Flower's node that speaks for it.
        num_examples: Training examples that it holds.
        num_steps: Optimizer steps of one fit.
        num_samples: Training samples that one fit reads, epochs counted.
        holds: Version of the base that it holds; `None` if nothing is known, so that it is sent the whole ledger.
    """

    client_id: str
    node_id: int
    num_examples: int
    num_steps: int
    num_samples: float
    holds: str | None


class Roster:
    """The clients that are connected; every node is asked once who it is, and again in the round after it failed.

    Args:
        clients: The federation's clients.
        settings: What both sides have to agree on, see `agreed_settings`.
        post: Sends messages.
    """

    def __init__(self, clients: Sequence[str], settings: Mapping[str, Any], post: Post) -> None:
        self.clients = list(clients)
        self.settings = settings
        self.post = post
        self.members: dict[str, Member] = {}
        self.known: dict[str, Member] = {}  # also those that are away
        self.cannot_replay: set[str] = set()  # clients whose machine rounds differently
        self._refused: set[int] = set()

    def drop_gone(self, grid: Grid) -> dict[int, str]:
        """Drop the clients whose nodes are gone; returns the names that the others are registered with."""
        names = {node.node_id: node.name for node in grid.get_nodes()}
        for member in [each for each in self.members.values() if each.node_id not in names]:
            self.release(member.client_id, "its node is gone")
        return names

    def ask_new(self, names: Mapping[int, str], wanted: Sequence[str], timeout: float) -> None:
        """Ask new nodes who they are, until the clients that are wanted are there.

        Args:
            names: Node -> the name that it is registered with, empty if none.
            wanted: Clients; a node that does not answer delays nobody once they are all there.
            timeout: Seconds to wait for answers.
        """
        taken = {member.node_id for member in self.members.values()} | self._refused
        new = [node_id for node_id in names if node_id not in taken]
        messages = [Message(RecordDict(), node_id, MessageType.QUERY, group_id="join") for node_id in new]
        named = any(names.values())
        for reply in self.post.exchange(messages, timeout):
            node_id = self.post.sender_of(reply)
            if node_id is None:
                continue
            try:
                self._admit(self._read(node_id, reply, names[node_id], named))
            except ValueError as error:
                self._refused.add(node_id)
                logger.warning("Node %d is turned away: %s", node_id, str(error)[:1000])
            if not self.missing(wanted):
                return
        for node_id, reason in self.post.unanswered().items():
            self._refused.add(node_id)
            logger.warning("Node %d does not say which client it is (%s); it is asked again later.", node_id, reason)

    def missing(self, clients: Sequence[str]) -> list[str]:
        """Those of some clients that are not connected."""
        return [client_id for client_id in clients if client_id not in self.members]

    def gather(self, grid: Grid, clients: Sequence[str], least: int, timeout: float) -> list[Member]:
        """The clients of a round that are connected, after waiting for the others.

        Args:
            grid: Flower's connection to the nodes.
            clients: Those that were sampled.
            least: Number of them that a round needs.
            timeout: Seconds to wait for all of them; for the least number, as long as for a round's replies.

        Raises:
            RuntimeError: If fewer than the least number have come by then.
        """
        began, said = time.monotonic(), -_SAY_WHO_IS_MISSING_SECONDS
        while True:
            waited = time.monotonic() - began
            if waited - said >= _SAY_WHO_IS_MISSING_SECONDS:
                self._refused.clear()  # who was turned away may have been mended
            names = self.drop_gone(grid)
            if self.missing(clients):
                self.ask_new(names, clients, min(max(timeout, _ANSWER_SECONDS), self.post.timeout))
            missing = self.missing(clients)
            present = len(clients) - len(missing)
            if not missing or (present >= least and waited >= timeout):
                break
            if waited >= max(timeout, self.post.timeout):
                raise RuntimeError(
                    f"{present} of {len(clients)} clients are connected after {waited:.0f} s, fewer than "
                    f"`min_clients={least}`; missing: {', '.join(missing)}. The last round is in its checkpoint: "
                    "start the nodes named above and resume, or lower `min_clients`."
                )
            if waited - said >= _SAY_WHO_IS_MISSING_SECONDS:
                said = waited
                logger.info("Waiting for %s to connect", ", ".join(f"`{client_id}`" for client_id in missing))
            time.sleep(POLL_SECONDS)
        if missing:
            logger.warning("Left out, because they are not connected: %s", ", ".join(missing))
        return [self.members[client_id] for client_id in clients if client_id in self.members]

    def release(self, client_id: str, reason: str) -> None:
        """Forget the node of a client, which then has to say again who it is and what it holds."""
        if self.members.pop(client_id, None) is not None:
            logger.info("Client `%s` left: %s", client_id, reason)

    def _read(self, node_id: int, reply: Message, name: str, named: bool) -> Member:
        sender = f"Node {node_id}"
        if reply.has_error():
            raise wire.PayloadError(f"its app failed: {reply.error.reason}")
        config = wire.only(reply.content, wire.CONFIG)
        client_id = config.get("client-id")
        if client_id not in self.clients:
            raise wire.PayloadError(
                f"it says that it is {client_id!r}, which is no client of this federation. Allowed: "
                f"{', '.join(map(repr, self.clients[:10]))}."
            )
        if named and name != client_id:
            raise wire.PayloadError(
                f"it is registered as {name!r} and says that it is {client_id!r}. Where one node is registered with "
                "`--name`, all have to be, and each speaks for the client of its name."
            )
        self._refuse_other_settings(str(client_id), str(config.get("settings")))
        holds = config.get("base-version")
        return Member(
            client_id=str(client_id),
            node_id=node_id,
            num_examples=wire.number(config, "num-examples", int, sender, least=1),
            num_steps=wire.number(config, "num-steps", int, sender, least=1, most=_MOST_STEPS),
            num_samples=wire.number(config, "num-samples", float, sender),
            holds=holds if isinstance(holds, str) else None,
        )

    def _refuse_other_settings(self, client_id: str, settings: str) -> None:
        try:
            theirs = dict(json.loads(settings))
        except Exception as error:  # whatever came from elsewhere
            raise wire.PayloadError(f"the settings of `{client_id}` cannot be read: {error}.") from error
        differing = difference_between(theirs, self.settings, f"at `{client_id}`", "on the server")
        if differing:
            raise wire.PayloadError(
                f"{differing[:1000]}. Give server and clients the same model, adapter and arguments."
            )

    def _admit(self, member: Member) -> None:
        other = self.members.get(member.client_id)
        if other is not None:
            raise wire.PayloadError(
                f"`{member.client_id}` is connected already, as node {other.node_id}. If that one was restarted, this "
                "one takes its place once it does not answer any more."
            )
        self.members[member.client_id] = self.known[member.client_id] = member
        logger.info(
            "Client `%s` joined as node %d: %d examples, %d steps per round",
            member.client_id,
            member.node_id,
            member.num_examples,
            member.num_steps,
        )
