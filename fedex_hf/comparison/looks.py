"""How the figures of a comparison look: order, names and colours of methods, panels, scales and legends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedex_hf import run_card
from fedex_hf.comparison.methods import CENTRALIZED
from fedex_hf.comparison.results import RunResult


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {**run_card.LABELS, CENTRALIZED: "centralized LoRA"}
# Okabe and Ito's colours, which colour-blind readers can tell apart; the marker says the same again.
KNOWN_STYLES = {
    "fedex": ("#0072B2", "o"),
    "fedit": ("#D55E00", "s"),
    "ffa": ("#009E73", "^"),
    CENTRALIZED: ("#555555", "D"),
}
_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1", "#999933", "#882255")
_MARKERS = "v*PX<>phd"
_MAX_COLUMNS = 3


def methods_of(results: Iterable[RunResult]) -> list[str]:
    """The methods, each once: FedEx-LoRA with its variants, FedIT, FFA-LoRA, others, and centralized training last.

    Example:
        >>> sorted(["centralized", "mine", "ffa", "fedex:assignment=keep", "fedex"], key=_rank)
        ['fedex', 'fedex:assignment=keep', 'ffa', 'mine', 'centralized']
    """
    return sorted({result.run.method for result in results}, key=_rank)


def tasks_of(results: Iterable[RunResult]) -> list[str]:
    """The tasks, each once, in the order of their first appearance."""
    return list(dict.fromkeys(result.run.task for result in results))


def epochs_of(results: Iterable[RunResult]) -> list[float]:
    """The numbers of local epochs, each once, ascending."""
    return sorted({result.run.local_epochs for result in results})


def label_of(method: str) -> str:
    """A method's name in tables and plots.

    Example:
        >>> label_of("fedex:assignment=keep")
        'FedEx-LoRA (assignment=keep)'
    """
    name, _, arguments = method.partition(":")
    label = LABELS.get(name, name)
    return f"{label} ({arguments.replace(',', ', ')})" if arguments else label


def styles_of(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Method -> colour and marker: always the same for known ones, and different for each of the others."""
    others = sorted(method for method in methods if method not in KNOWN_STYLES)
    return KNOWN_STYLES | dict(zip(others, further_styles(len(others))))


def deviating_method(results: Sequence[RunResult]) -> str | None:
    """Whose deviation is shown where only one can be: FedIT, which lives with it, or else the first that has one."""
    methods = [method for method in methods_of(results) if method.partition(":")[0] not in ("ffa", CENTRALIZED)]
    return "fedit" if "fedit" in methods else next(iter(methods), None)


def _rank(method: str) -> tuple[int, str]:
    name = method.partition(":")[0]
    known = [*LABELS][:-1]
    return len(LABELS) if name == CENTRALIZED else known.index(name) if name in known else len(known), method


def further_styles(number: int) -> list[tuple[str, str]]:
    return [(_COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]) for index in range(number)]


def panels(names: Sequence[str], title: str) -> tuple[Figure, list[Axes]]:
    """A figure (no pyplot: nothing of the user's notebook is touched) with one panel per name."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(names) / _MAX_COLUMNS)
    columns = math.ceil(len(names) / rows)
    width = max(7.5, 4.7 * columns)
    figure = Figure(figsize=(width, 1.4 + 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name in zip(axes, names):
        axis.set_title(plain(name), fontsize=11)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    lines = [part for line in plain(title).split("\n") for part in textwrap.wrap(line, int(10.5 * width))]
    figure.suptitle("\n".join(lines), fontsize=12)
    return figure, axes[: len(names)]


def spread(results: Iterable[RunResult], band: str = "") -> str:
    """The end of a title: local epochs, seeds, and what a band is."""
    results = list(results)
    epochs, seeds = epochs_of(results), {each.run.seed for each in results}
    text = f", {epochs[0]:g} local epoch{'' if epochs[0] == 1 else 's'}" if len(epochs) == 1 else ""
    if len(seeds) == 1:
        return f"{text}, seed {seeds.pop()}"
    return f"{text}, mean over {len(seeds)} seeds" + (f"\n({band})" if band else "")


def plain(text: str) -> str:
    return text.replace("$", r"\$")  # no formula


def marker_size(rounds: Sequence[int]) -> float:
    return 6.0 if len(rounds) <= 20 else 3.0  # so that many rounds do not become one blot


def count_rounds(axis: Axes) -> None:
    axis.set_xlabel("round")
    whole_numbers(axis)


def whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axis.dataLim.intervalx
    if low == high:
        axis.set_xlim(low - 1, high + 1)


def linear_or_log(axis: Axes) -> None:
    """From 0, or logarithmic where small values could not be seen beside large ones."""
    every: list[Any] = [value for line in axis.get_lines() for value in line.get_ydata()]  # type: ignore[union-attr]
    values = [float(value) for value in every if 0 < value < math.inf]
    if values and max(values) > 30 * min(values):
        log_scale(axis, values)
    else:
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", scilimits=(-3, 3))


def log_scale(axis: Axes, positive: Sequence[float]) -> None:
    """Whole decades around the values, with ticks in between where there are few."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = (min(positive), max(positive)) if positive else (1e-8, 1.0)
    bottom, top = math.floor(math.log10(low) - 0.1), math.ceil(math.log10(high) + 0.1)
    axis.set_yscale("log")
    axis.set_ylim(10.0**bottom, 10.0**top)
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:.0e}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)) if top - bottom <= 2 else NullLocator())
    axis.yaxis.set_minor_formatter(axis.yaxis.get_major_formatter())


def legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    entries: Mapping[str, Any] = {
        label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())
    }
    if not entries:
        return
    fit = int(figure.get_figwidth() / (0.6 + 0.07 * max(map(len, entries))))
    figure.legend(
        [*entries.values()], [*entries], fontsize=9, ncols=max(1, min(fit, len(entries))), loc="outside lower center"
    )
