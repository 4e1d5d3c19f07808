"""The page of `aggregation.py`: its results as tables, and what the numbers are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from _common import describe_machine, markdown_table
from aggregation_results import LedgerResult, Machine, Result, Results
from aggregation_sides import ROWS, Case


NOTES = """\
Equal work: both sides begin with the clients' factors and end with new factors and changed weights. *dense* is
`M = mean(B_i @ A_i); W += s (M - mean(B_i) @ mean(A_i))` in float32. The package's side is *server*
(`FedExAggregator().aggregate`: new factors and those of the residual, all that a server has to make and to send) and
*install* ({install}, float32). *ratio* is dense / (server + install), *server only* is dense / server; *with ledger*
also counts `Ledger.plus`, by which a run can be resumed and clients catch up. Where that multiplies a residual out
that travels in factors, *ratio* counts it, too. *At the floor* is dense over the two floors below: the ratio of an
implementation that takes no longer than the machine needs. Times are medians of {clock} in milliseconds per layer, of
as many layers of one shape together as have 16 million weights or the model has.{turns}

*Errors* are relative Frobenius errors of the update to `W` against the centred formula in float64, over the first
{rows} rows: of *dense*, of the residual that *travels*, and of what is *installed* in zeros. A tenth of each client's
factors, in norm, is its own. *Memory* is the peak of what *server* allocates beside its results, relative to the
factors of all clients.

*Floor* is the share of the time that the machine needs at least, for *server* and *install*: the larger of bytes over
copy bandwidth and operations over matrix-product rate. *server* reads all factors once and writes the means and the
residual, float32; its operations are products only where the residual is multiplied out because `(k - 1) r` exceeds
the layer's smaller side. *install* reads the original and writes `W`, and multiplies. Products are counted at the rate
of float32. Where all of it fits into a cache, or is so small that calling torch takes longer than the arithmetic, the
floor says little.

The larger of both is a bound that one core reaches only where one of them is small, and where products are as fast as
those of large square matrices.{calls}"""
_CALLS = """ *Torch's calls* are the server's floor and the two calls that installing is
made of, each timed alone: a copy of the weights, and products of the residual's depth into a block that stays in the
cache. The column says what share of the whole they are. Less than that takes a kernel of one's own, which copies and
multiplies at once. Where the residual travels multiplied out, installing is an addition instead."""

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
    "torch's calls",
)


def report(
    results: Results,
    reused: Sequence[Sequence[str]] | None,
    ledgers: Mapping[Case, LedgerResult],
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
            turns=_TURNS if sys.platform == "linux" and not on_gpu else "",
            calls="" if on_gpu else _CALLS,
            install="`W.addmm_` with the residual's factors"
            if on_gpu
            else "`AdaptedModel.install`: `W = W0 + residual`",
        ),
    ]
    return "\n\n".join(sections) + "\n"


def answer(results: Results) -> str:
    """What was found, in a line."""
    few, found = _fewest_clients(results)
    ratio, alone = median(each.ratio for each in found), median(each.server_only for each in found)
    least = min(each.ratio for each in results.values())
    dense = min(each.findings.errors["dense"] for each in results.values())
    return (
        f"for {few} clients {ratio:.1f} times as fast in the median, with the change of the weights, and {alone:.0f} "
        f"times without; at least {least:.2f} times for any number; error at most "
        f"{max(each.error for each in results.values()):.0e} instead of at least {dense:.0e}"
    )


def _fewest_clients(results: Results) -> tuple[int, list[Result]]:
    """The smallest number of clients, and its cases."""
    few = min(case.clients for _, case in results)
    return few, [each for (_, case), each in results.items() if case.clients == few]


def _aims(results: Results) -> str:
    few, found = _fewest_clients(results)
    every = list(results.values())
    ratio, possible = median(each.ratio for each in found), median(each.at_the_floor for each in found)
    least, memory = min(each.ratio for each in every), max(each.findings.memory for each in every)
    shares = [each.floor / each.seconds for each in every]
    by_torch = [each.times["dense"] / each.calls for each in found if each.calls is not None]
    of_calls = [each.calls / each.seconds for each in every if each.calls is not None]
    rows = [
        [
            f"at least 10 times as fast as the dense formula, {few} clients, median",
            f"{ratio:.1f}; at the floor it would be {possible:.1f}"
            + (f", with torch's calls alone {median(by_torch):.1f}" if by_torch else ""),
            ratio >= 10,
        ],
        ["never slower than 0.9 of it", f"least {least:.2f}", least >= 0.9],
        ["temporary memory at most twice the factors", f"most {memory:.2f}", memory <= 2],
        [
            "at least 60 % of the floor",
            _enough(shares) + (f"; of torch's calls alone {_enough(of_calls)}" if of_calls else ""),
            min(shares) >= 0.6,
        ],
    ]
    cells = [[aim, found, "yes" if holds else "NO"] for aim, found, holds in rows]
    return markdown_table(("aim", "found", "holds"), cells)


def _enough(shares: Sequence[float]) -> str:
    enough = sum(each >= 0.6 for each in shares)
    return f"in {enough} of {len(shares)} cases, median {median(shares):.0%}, least {min(shares):.0%}"


_TURNS = """
Each side is timed in processes of its own, which take turns, so that none finds what another has left of glibc's heap.
What it finds is what a training leaves: tensors below 32 MB come from the heap, larger ones are fresh pages."""
_REUSED = """\
The same in a process whose glibc keeps what torch gives back, so that neither side pays for fresh pages; above, and in
all tables below, glibc is as it comes."""
_LEDGERS = """\
A round of the server, `Ledger.plus` and `AdaptedModel.install` beside one of the dense formula. The ledger is the sum
of all residuals: two factors until they are as large as a matrix, a matrix afterwards. It is brought down to the rank
that it needs now and then, unless a bound shows that all of it is needed."""
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
        found = [result for (_, case), result in results.items() if case.clients == number]
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
                f"{min(each.findings.errors['dense'] for each in found):.0e}",
                f"{max(each.findings.memory for each in found):.2f}",
            ]
        )
    return rows


def _totals(results: Results, args: Any) -> str:
    """One row per model, rank and number of clients."""
    rows = []
    for model, rank, clients in dict.fromkeys((model, case.rank, case.clients) for model, case in results):
        of_case = [
            (case.layer.count, each)
            for (name, case), each in results.items()
            if (name, case.rank, case.clients) == (model, rank, clients)
        ]
        sums = [
            sum(count * each.times.get(side, 0.0) for count, each in of_case)
            for side in ("dense", "server", "install", "ledger")
        ]
        dense, server, *_ = sums
        changed = sum(count * each.seconds for count, each in of_case)
        rows.append(
            [
                model,
                str(rank),
                str(clients),
                *(f"{each:.3g}" for each in sums),
                f"{dense / changed:.1f}",
                f"{dense / sum(sums[1:]):.1f}",
                f"{dense / server:.0f}",
            ]
        )
    head = ("model", "r", "k", "dense, s", "server, s", "install, s", "ledger, s", "ratio", "with ledger")
    return markdown_table((*head, "server only"), rows)


def _details(results: Results) -> str:
    """One row per case."""
    rows = []
    for (model, case), each in results.items():
        rows.append(
            [
                f"{model}: {case.layer.names}",
                *case.cells,
                str(each.findings.residual_rank),
                *(f"{1e3 * each.times.get(side, 0.0):.3g}" for side in ("dense", "server", "install", "ledger")),
                *(f"{ratio:.1f}" for ratio in (each.ratio, each.at_the_floor, each.with_ledger)),
                f"{each.server_only:.0f}",
                *(f"{each.findings.errors[side]:.0e}" for side in ("dense", "server", "install")),
                f"{each.findings.memory:.2f}",
                f"{each.floors['server'] / each.times['server']:.0%}",
                f"{each.floors['install'] / each.installing:.0%}",
                f"{each.floor / each.seconds:.0%}",
                "-" if each.calls is None else f"{each.calls / each.seconds:.0%}",
            ]
        )
    return markdown_table(_HEAD, rows)


def _ledger_table(ledgers: Mapping[Case, LedgerResult]) -> str:
    rows = []
    for case, each in ledgers.items():
        parts = (each.server, each.plus, each.install)
        rows.append(
            [
                *case.cells,
                str(each.turned or "-"),
                *(f"{1e3 * seconds:.3g}" for part in parts for seconds in (median(part), max(part))),
                f"{1e3 * each.dense:.3g}",
                f"{each.dense * len(each.plus) / sum(map(sum, parts)):.2f}",
            ]
        )
    head = ("shape", "r", "k", "dense from round", "server, ms: median", "most", "plus, ms: median", "most")
    return markdown_table((*head, "install, ms: median", "most", "dense formula, ms", "ratio"), rows)
