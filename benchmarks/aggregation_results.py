"""What `aggregation.py` measures, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from aggregation_sides import Case, Findings


@dataclass(frozen=True)
class Machine:
    """What this device does in this run.

    Args:
        copy: Bytes per second that a copy of a large tensor reads and writes.
        products: Operations per second of a product of two large square matrices, by dtype.
    """

    copy: float
    products: dict[torch.dtype, float]


@dataclass(frozen=True)
class Result:
    """Layers of one shape, one rank, one number of clients.

    Args:
        times: Part -> seconds per layer, median: `dense`, `server`, `install`, and on a CPU `ledger`; `copy` and
            `product` where installing is made of these.
        needs: Seconds that the machine needs at least for the bytes and for the operations, of `server` and `install`.
        findings: Errors and memory.
    """

    times: Mapping[str, float]
    needs: Mapping[str, tuple[float, float]]
    findings: Findings

    @property
    def installing(self) -> float:
        """Seconds from the residual to the weight: with the ledger where that is what multiplies."""
        return self.times["install"] + (self.times["ledger"] if self.findings.ledger_multiplies else 0.0)

    @property
    def seconds(self) -> float:
        """Until the weight is changed."""
        return self.times["server"] + self.installing

    @property
    def ratio(self) -> float:
        """How many times as long the dense side takes for equal work."""
        return self.times["dense"] / self.seconds

    @property
    def with_ledger(self) -> float:
        """The same where the package also keeps its ledger."""
        return self.times["dense"] / sum(self.times.get(part, 0.0) for part in ("server", "install", "ledger"))

    @property
    def server_only(self) -> float:
        """The same without changing any weight."""
        return self.times["dense"] / self.times["server"]

    @property
    def floors(self) -> dict[str, float]:
        """Seconds that the machine needs at least, of `server` and `install`."""
        return {side: max(needs) for side, needs in self.needs.items()}

    @property
    def floor(self) -> float:
        """Seconds that the machine needs at least for both."""
        return sum(self.floors.values())

    @property
    def calls(self) -> float | None:
        """Seconds of the server's floor and of the two calls that installing is made of; `None` where it is not."""
        if "copy" not in self.times:
            return None
        return self.floors["server"] + self.times["copy"] + self.times["product"]

    @property
    def error(self) -> float:
        """The larger of the package's two."""
        return max(self.findings.errors["server"], self.findings.errors["install"])

    @property
    def at_the_floor(self) -> float:
        """The ratio that an implementation would have that takes no longer than the machine needs."""
        return self.times["dense"] / self.floor


@dataclass(frozen=True)
class LedgerResult:
    """Rounds of one layer on the CPU.

    Args:
        server: Seconds of the server, one per round.
        plus: Seconds of `Ledger.plus`, one per round.
        install: Seconds of `AdaptedModel.install`, one per round.
        dense: Seconds of the dense formula's round, median.
        turned: The round in which the sum turned dense, 0 if it never did.
    """

    server: Sequence[float]
    plus: Sequence[float]
    install: Sequence[float]
    dense: float
    turned: int


Results = Mapping[tuple[str, Case], Result]  # with the model's name
