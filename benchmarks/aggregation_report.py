"""The page of `aggregation.py`: its results as tables, and what the numbers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from _common import describe_machine, markdown_table
from aggregation_sides import ROWS, Layer


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
    """One layer, one rank, one number of clients.

    Args:
        times: Side -> seconds per layer, median: `dense`, `server`, `install`, and on a CPU `ledger`.
        needs: Seconds that the machine needs at least for the bytes and for the operations, of `server` and `install`.
        errors: Relative Frobenius error of the update to the weight: of `dense`, `install`, and of `server`, which is
            that of the residual as it travels.
        memory: Peak of what the server allocates beyond its results, relative to the clients' factors.
        residual_rank: Of the residual that travels.
    """

    times: Mapping[str, float]
    needs: Mapping[str, tuple[float, float]]
    errors: Mapping[str, float]
    memory: float
    residual_rank: int

    @property
    def seconds(self) -> float:
        """Until the weight is changed."""
        return self.times["server"] + self.times["install"]

    @property
    def ratio(self) -> float:
        """How many times as long the dense side takes for equal work."""
        return self.times["dense"] / self.seconds

    @property
    def with_ledger(self) -> float:
        """The same where the package also keeps its ledger."""
        return self.times["dense"] / (self.seconds + self.times.get("ledger", 0.0))

    @property
    def server_only(self) -> float:
        """The same without changing any weight."""
        return self.times["dense"] / self.times["server"]

    @property
    def floors(self) -> dict[str, float]:
        """Seconds that the machine needs at least, of `server` and `install`."""
        return {side: max(needs) for side, needs in self.needs.items()}

    @property
    def floor_share(self) -> float:
        """How much of the time the machine needs at least."""
        return sum(self.floors.values()) / self.seconds

    @property
    def apart_share(self) -> float:
        """The same where moving bytes and multiplying follow one another instead of overlapping."""
        return sum(map(sum, self.needs.values())) / self.seconds

    @property
    def error(self) -> float:
        """The larger of the package's two."""
        return max(self.errors["server"], self.errors["install"])

    @property
    def at_the_floor(self) -> float:
        """The ratio that an implementation would have that takes no longer than the machine needs."""
        return self.times["dense"] / sum(self.floors.values())


@dataclass(frozen=True)
class LedgerResult:
    """Rounds of one layer on the CPU.

    Args:
        plus: Seconds of `Ledger.plus`, one per round.
        install: Seconds of `AdaptedModel.install`, one per round.
        dense: Seconds of the dense formula's round, median.
        turned: The round in which the sum turned dense, 0 if it never did.
    """

    plus: Sequence[float]
    install: Sequence[float]
    dense: float
    turned: int


Results = Mapping[tuple[str, Layer, int, int], Result]  # model, layer, rank, clients

NOTES = """\
Equal work: both sides begin with the clients' factors and end with new factors and changed weights. *dense* is
`M = mean(B_i @ A_i); W += s (M - mean(B_i) @ mean(A_i))` in float32. The package's side is *server*
(`FedExAggregator().aggregate`: new factors and those of the residual, all that a server has to make and to send) and
*install* ({install}, float32). *ratio* is dense / (server + install), *server only* is dense / server; *with ledger*
also counts `Ledger.plus`, by which a run can be resumed and clients catch up. *At the floor* is dense over the two
floors below: the ratio of an implementation that takes no longer than the machine needs. Times are medians of {clock},
taken in turns, in milliseconds per layer; a turn takes as many layers of one shape as have 16 million weights together
or the model has.

*Errors* are relative Frobenius errors of the update to `W` against the centred formula in float64, over the first
{rows} rows: of *dense*, of the residual that *travels*, and of what is *installed* in zeros. A tenth of each client's
factors, in norm, is its own. *Memory* is the peak of what *server* allocates beside its results, relative to the
factors of all clients.

*Floor* is the share of the time that the machine needs at least, for *server* and *install*: the larger of bytes over
copy bandwidth and operations over matrix-product rate. *server* reads all factors once and writes the means and the
residual, float32; its operations are products only where the residual is multiplied out because `(k - 1) r` exceeds
the layer's smaller side. *install* reads the original and writes `W`, and multiplies. Products are counted at the rate
of float32. The larger of both is a bound that one core reaches only where one of them is small: it reads a few rows,
then multiplies them. So the first table also counts their sum. Where all of it fits into a cache, or is so small that
calling torch takes longer than the arithmetic, the floor says little."""

_HEAD = (
    "layers",
    "shape",
    "r",
    "k",
    "rank sent",
    "dense, ms",
    "server, ms",
    "install, ms",
    "ledger, ms",
    "ratio",
    "at the floor",
    "with ledger",
    "server only",
    "error: dense",
    "travels",
    "installed",
    "memory",
    "floor: server",
    "install",
    "both",
)


def report(
    results: Results,
    reused: Sequence[Sequence[str]] | None,
    ledgers: Mapping[tuple[Layer, int, int], LedgerResult],
    machine: Machine,
    args: Any,
) -> str:
    """The whole page, in Markdown.

    Args:
        results: Of all cases, with glibc as it comes.
        reused: `summary_rows` of the run in which memory was reused, if there was one.
        ledgers: Of some layers.
        machine: This one.
        args: The benchmark's arguments.
    """
    on_gpu = args.device == "cuda"
    sections = [
        "# Exact aggregation in factors, beside the dense formula",
        (f"{torch.cuda.get_device_name()}; " if on_gpu else "") + describe_machine(),
        f"In this run a copy moves {machine.copy / 1e9:.1f} GB/s, and matrix products make "
        f"{machine.products[torch.float32] / 1e9:.0f} (float32) and {machine.products[torch.float64] / 1e9:.0f} "
        "(float64) billion operations per second.",
        "## What was aimed at",
        _aims(results),
        "## Over all layers",
        markdown_table(_SUMMARY_HEAD, summary_rows(results, args.clients)),
        *([] if reused is None else [_REUSED, markdown_table(_SUMMARY_HEAD, reused)]),
        "## Per model: its layers times how often they occur",
        _totals(results, args),
        "## Many rounds",
        _LEDGERS,
        _ledger_table(ledgers),
        "## Per layer",
        _details(results),
        NOTES.format(
            rows=ROWS,
            clock="wall-clock time" if on_gpu else "processor time",
            install="`W.addmm_` with the residual's factors"
            if on_gpu
            else "`AdaptedModel.install`: `W = W0 + residual`",
        ),
    ]
    return "\n\n".join(sections) + "\n"


def answer(results: Results) -> str:
    """What was found, in a line."""
    few = min(key[3] for key in results)
    found = [each for key, each in results.items() if key[3] == few]
    ratio, alone = median(each.ratio for each in found), median(each.server_only for each in found)
    least, dense = (min(each) for each in zip(*((r.ratio, r.errors["dense"]) for r in results.values()), strict=True))
    return (
        f"for {few} clients {ratio:.1f} times as fast in the median, with the change of the weights, and {alone:.0f} "
        f"times without; at least {least:.2f} times for any number; error at most "
        f"{max(each.error for each in results.values()):.0e} instead of at least {dense:.0e}"
    )


def _aims(results: Results) -> str:
    few = min(key[3] for key in results)
    ratio = median(each.ratio for key, each in results.items() if key[3] == few)
    possible = median(each.at_the_floor for key, each in results.items() if key[3] == few)
    least, memory = min(each.ratio for each in results.values()), max(each.memory for each in results.values())
    shares = [each.floor_share for each in results.values()]
    apart = [each.apart_share for each in results.values()]
    good, good_apart = (sum(each >= 0.6 for each in found) for found in (shares, apart))
    rows = [
        [
            f"at least 10 times as fast as the dense formula, {few} clients, median",
            f"{ratio:.1f}; at the floor it would be {possible:.1f}",
            ratio >= 10,
        ],
        ["never slower than 0.9 of it", f"least {least:.2f}", least >= 0.9],
        ["temporary memory at most twice the factors", f"most {memory:.2f}", memory <= 2],
        [
            "at least 60 % of the floor",
            f"in {good} of {len(shares)} cases, median {median(shares):.0%}, least {min(shares):.0%}; if memory and "
            f"products cannot overlap in {good_apart}, median {median(apart):.0%}, least {min(apart):.0%}",
            good == len(shares),
        ],
    ]
    cells = [[aim, found, "yes" if holds else "NO"] for aim, found, holds in rows]
    return markdown_table(("aim", "found", "holds"), cells)


_REUSED = """\
The same in a process whose glibc keeps what torch gives back, so that neither side pays for fresh pages; above, and in
all tables below, glibc is as it comes, and tensors of more than 32 MB are fresh pages each time."""
_LEDGERS = """\
A round of `Ledger.plus` and `AdaptedModel.install` beside one of the dense formula. The ledger is the sum of all
residuals: two factors until they are as large as a matrix, a matrix afterwards. It is brought down to the rank that it
needs now and then, unless a bound shows that all of it is needed."""
_SUMMARY_HEAD = (
    "clients",
    "ratio, median",
    "least",
    "at the floor, median",
    "with ledger, median",
    "least",
    "server only, median",
    "least",
    "largest error",
    "least of dense",
    "memory, most",
)


def summary_rows(results: Results, clients: Sequence[int]) -> list[list[str]]:
    """One row per number of clients."""
    rows = []
    for number in clients:
        found = [result for key, result in results.items() if key[3] == number]
        pairs = [[each.ratio for each in found], [each.with_ledger for each in found]]
        alone = [each.server_only for each in found]
        rows.append(
            [
                str(number),
                f"{median(pairs[0]):.1f}",
                f"{min(pairs[0]):.2f}",
                f"{median(each.at_the_floor for each in found):.1f}",
                f"{median(pairs[1]):.1f}",
                f"{min(pairs[1]):.2f}",
                f"{median(alone):.0f}",
                f"{min(alone):.1f}",
                f"{max(each.error for each in found):.0e}",
                f"{min(each.errors['dense'] for each in found):.0e}",
                f"{max(each.memory for each in found):.2f}",
            ]
        )
    return rows


def _totals(results: Results, args: Any) -> str:
    """One row per model, rank and number of clients."""
    rows = []
    for model, rank, clients in dict.fromkeys((key[0], key[2], key[3]) for key in results):
        of_case = [
            (key[1].count, each) for key, each in results.items() if (key[0], key[2], key[3]) == (model, rank, clients)
        ]
        sums = [
            sum(count * each.times.get(side, 0.0) for count, each in of_case)
            for side in ("dense", "server", "install", "ledger")
        ]
        dense, server, install, ledger = sums
        rows.append(
            [
                model,
                str(rank),
                str(clients),
                *(f"{each:.3g}" for each in sums),
                f"{dense / (server + install):.1f}",
                f"{dense / (server + install + ledger):.1f}",
                f"{dense / server:.0f}",
            ]
        )
    head = ("model", "r", "k", "dense, s", "server, s", "install, s", "ledger, s", "ratio", "with ledger")
    return markdown_table((*head, "server only"), rows)


def _details(results: Results) -> str:
    """One row per case."""
    rows = []
    for (model, layer, rank, clients), each in results.items():
        rows.append(
            [
                f"{model}: {layer.names}",
                f"{layer.out_features} x {layer.in_features}",
                str(rank),
                str(clients),
                str(each.residual_rank),
                *(f"{1e3 * each.times.get(side, 0.0):.3g}" for side in ("dense", "server", "install", "ledger")),
                *(f"{ratio:.1f}" for ratio in (each.ratio, each.at_the_floor, each.with_ledger)),
                f"{each.server_only:.0f}",
                *(f"{each.errors[side]:.0e}" for side in ("dense", "server", "install")),
                f"{each.memory:.2f}",
                *(f"{each.floors[side] / each.times[side]:.0%}" for side in ("server", "install")),
                f"{each.floor_share:.0%}",
            ]
        )
    return markdown_table(_HEAD, rows)


def _ledger_table(ledgers: Mapping[tuple[Layer, int, int], LedgerResult]) -> str:
    rows = []
    for (layer, rank, clients), each in ledgers.items():
        rows.append(
            [
                f"{layer.out_features} x {layer.in_features}",
                str(rank),
                str(clients),
                str(each.turned or "-"),
                *(f"{1e3 * seconds:.3g}" for seconds in (median(each.plus), max(each.plus))),
                *(f"{1e3 * seconds:.3g}" for seconds in (median(each.install), max(each.install))),
                f"{1e3 * each.dense:.3g}",
                f"{each.dense * len(each.plus) / sum((*each.plus, *each.install)):.2f}",
            ]
        )
    head = ("shape", "r", "k", "dense from round", "plus, ms: median", "most", "install, ms: median", "most")
    return markdown_table((*head, "dense formula, ms", "ratio"), rows)
