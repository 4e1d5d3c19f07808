"""What a run's log says about each round: as rows, as a Markdown table, and as PNG files if matplotlib is there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from transformers.utils import logging


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


logger = logging.get_logger(__name__)

# What a round's own log entry may tell, with the heading and form of its column; its other keys (times, layers) are
# not for plots and tables.
_COLUMNS = {
    "num_clients": ("clients", ",.0f"),
    "num_examples": ("examples", ",.0f"),
    "train_loss": ("train loss", ".4g"),
    "aggregation_error": ("aggregation error", ".1e"),
    "fedit_deviation": ("FedIT deviation", ".1e"),
    "bytes_up_per_client": ("{unit} up", ",.1f"),
    "bytes_down_per_client": ("{unit} down", ",.1f"),
}
# Ends of evaluation keys that describe the machine and not the model.
_NO_METRICS = ("runtime", "per_second", "preparation_time", "compilation_time")
_MAX_LINES = 8  # in one panel; more could not be told apart
_MAX_BARS = 12  # rounds; beyond, bars would be hair lines
# Okabe and Ito's colours, which colour-blind readers can tell apart; the marker says the same again.
_STYLES = tuple(
    zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1"), "os^Dv*PX")
)


@dataclass
class RoundLog:
    """One round of a run.

    Args:
        round: Server round, counted from 1.
        logged: What the round's own entry tells; bytes, examples, relative errors without unit.
        metrics: Evaluation after the round, without the prefix `eval_`.
    """

    round: int
    logged: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """A picture that was drawn.

    Args:
        file: Path relative to the folder, such as `"plots/exactness.png"`.
        title: What it shows, in words.
    """

    file: str
    title: str


def rounds_of(log_history: Iterable[Mapping[str, Any]], private_names: Iterable[str] = ()) -> list[RoundLog]:
    """Join each round's log entry with the evaluation that followed it.

    Args:
        log_history: `TrainerState.log_history`. Entries of single clients are left out. Where a round was evaluated
            several times, the first counts: a later one may be of the best round's model, loaded at the end.
        private_names: Names that must not be published. Metrics of a data set with such a name are left out, as are
            those named after a client that the log itself names.

    Example:
        >>> log = [{"round": 1, "train_loss": 0.5, "epoch": 1.0}, {"eval_f1": 0.75, "eval_runtime": 2.0, "epoch": 1.0}]
        >>> rounds_of(log)
        [RoundLog(round=1, logged={'train_loss': 0.5}, metrics={'f1': 0.75})]
    """
    entries = list(log_history)
    private = {*private_names, *(str(entry["client_id"]) for entry in entries if "client_id" in entry)}
    rounds: dict[int, RoundLog] = {}
    for entry in entries:
        if "client_id" in entry:
            continue
        evaluated = [key for key in entry if key.startswith("eval_")]
        number = entry.get("epoch" if evaluated else "round")
        if not _is_number(number) or not float(number).is_integer() or number < 1:
            continue
        row = rounds.setdefault(int(number), RoundLog(int(number)))
        for key in evaluated:
            name = key.removeprefix("eval_")
            hidden = name.endswith(_NO_METRICS) or any(name == each or name.startswith(f"{each}_") for each in private)
            if _is_number(entry[key]) and not hidden:
                row.metrics.setdefault(name, float(entry[key]))
        if not evaluated:
            row.logged |= {key: float(entry[key]) for key in _COLUMNS if _is_number(entry.get(key))}
    return [rounds[number] for number in sorted(rounds)]


def metric_names(rounds: Iterable[RoundLog]) -> list[str]:
    """The metrics of all rounds, each once, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rounds for name in row.metrics))


def byte_unit(values: Iterable[float]) -> tuple[str, float]:
    """A unit in which the largest of some numbers of bytes is easy to read, and its size in bytes.

    Example:
        >>> byte_unit([307_000, 1_192_000])
        ('kB', 1000.0)
    """
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    return ("kB", 1e3) if largest < 1e7 else ("MB", 1e6) if largest < 1e10 else ("GB", 1e9)


def traffic_unit(rounds: Iterable[RoundLog]) -> tuple[str, float] | None:
    """The unit of the traffic of all rounds and its size in bytes; `None` if none was logged."""
    values = [value for row in rounds for key, value in row.logged.items() if key.startswith("bytes_")]
    return byte_unit(values) if values else None


def rounds_table(rounds: Sequence[RoundLog], shown: Sequence[RoundLog] | None = None) -> str:
    """A Markdown table with one line per round and the columns that any round has a number for.

    Args:
        rounds: The rounds of the run, which decide on columns and unit.
        shown: Those that get a line; all by default.
    """
    unit, size = traffic_unit(rounds) or ("", 1.0)
    shown = rounds if shown is None else shown
    columns = {"round": [str(row.round) for row in shown]}
    for key, (name, form) in _COLUMNS.items():
        if any(key in row.logged for row in rounds):
            values = [row.logged.get(key) for row in shown]
            if key.startswith("bytes_"):
                values = [None if value is None else value / size for value in values]
            columns[name.format(unit=unit)] = ["-" if value is None else format(value, form) for value in values]
        if key == "train_loss":  # the evaluation stands beside it
            for metric in metric_names(rounds):
                measured = [row.metrics.get(metric) for row in shown]
                name = f"evaluation {metric}" if metric == "loss" or metric in columns else metric
                columns[name] = ["-" if value is None else format(value, ".4g") for value in measured]
    return markdown_table(columns)


def markdown_table(columns: Mapping[str, Sequence[str]], align: str = "---:") -> str:
    """A Markdown table of columns of cells, with numbers to the right unless `align` is `":---"`."""
    head = [name.replace("|", r"\|") for name in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, [align] * len(head), *zip(*columns.values())))


def draw_plots(rounds: Sequence[RoundLog], folder: Path, method: str) -> list[Plot]:
    """Draw what the rounds hold into `folder/plots`.

    Args:
        rounds: The rounds of the run.
        folder: Where the model card lies.
        method: Name of the aggregator; with `"fedex"` the traffic is compared with FedIT's.

    Returns:
        The plots that were drawn: none without matplotlib, and none that failed, which is logged.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("The model card gets no plots, because matplotlib is not installed.")
        return []
    drawn = []
    for name, title, draw in _plots_for(rounds, method):
        file = folder / "plots" / f"{name}.png"
        try:
            figure = Figure(layout="constrained")  # no pyplot: nothing of the user's notebook is touched
            FigureCanvasAgg(figure)
            draw(figure)
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=120, facecolor="white")
        except Exception as error:  # a picture less is better than a run that ends here
            logger.warning(f"The model card's plot `{name}` could not be drawn: {type(error).__name__}: {error}")
        else:
            drawn.append(Plot(f"plots/{name}.png", title))
    return drawn


def _plots_for(rounds: Sequence[RoundLog], method: str) -> list[tuple[str, str, Callable[[Figure], None]]]:
    """Name, title and drawing function of each plot that the rounds have numbers for."""
    plots: list[tuple[str, str, Callable[[Figure], None]]] = []
    if _any(rounds, "aggregation_error", "fedit_deviation"):
        title = "Aggregation error and FedIT deviation of each round, on a logarithmic scale"
        plots.append(("exactness", title, lambda figure: _draw_exactness(figure, rounds)))
    panels = _panels(rounds)
    if panels:
        plots.append(("metrics", "Loss and metrics after each round", lambda figure: _draw_metrics(figure, panels)))
    if _any(rounds, "bytes_up_per_client", "bytes_down_per_client"):
        title = "What one client sends and receives in each round"
        plots.append(("traffic", title, lambda figure: _draw_traffic(figure, rounds, method)))
    return plots


# ---- Exactness ----


def _draw_exactness(figure: Figure, rounds: Sequence[RoundLog]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    figure.set_size_inches(7, 4.2)
    axis = figure.subplots()
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:.0e}")  # as in the table; formulas are slow to set
    lines = (
        ("aggregation_error", "aggregation error: the weights as installed", "-", 5),
        ("fedit_deviation", "FedIT deviation: had A and B been averaged apart", "--", 8),
    )
    positive = []
    for (key, label, dashes, size), (color, marker) in zip(lines, _STYLES):
        values = [row.logged.get(key, math.nan) for row in rounds]
        shown = [value if value > 0 and math.isfinite(value) else math.nan for value in values]
        if any(math.isfinite(value) for value in shown):
            face = color if dashes == "-" else "none"  # where both are equal, both stay visible
            look: dict[str, Any] = {"markersize": size / _thin(rounds), "markerfacecolor": face, "linestyle": dashes}
            axis.plot([row.round for row in rounds], shown, color=color, marker=marker, label=label, **look)
        positive += [value for value in shown if math.isfinite(value)]
        _mark_at_edge(axis, [row.round for row, value in zip(rounds, values) if value == 0], 0.03, color, label)
        _mark_at_edge(axis, [row.round for row, value in zip(rounds, values) if value == math.inf], 0.97, color, label)
    low, high = (min(positive), max(positive)) if positive else (1e-8, 1.0)
    bottom, top = math.floor(math.log10(low) - 0.1), math.ceil(math.log10(high) + 0.1)
    axis.set_ylim(10.0**bottom, 10.0**top)
    axis.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)) if top - bottom <= 2 else NullLocator())
    axis.yaxis.set_minor_formatter(axis.yaxis.get_major_formatter())
    axis.set(title="Error of the aggregation", ylabel="relative to the round's weight change\n(no unit, log scale)")
    _finish(axis, rounds)


def _mark_at_edge(axis: Axes, rounds: Sequence[int], height: float, color: str, label: str) -> None:
    """Values that a logarithmic axis has no place for: zero at its lower edge, infinity at its upper one."""
    if rounds:
        zero = height < 0.5
        text = f"{label.partition(':')[0]}: {'exactly 0' if zero else 'infinite'}"
        style: dict[str, Any] = {"color": color, "marker": "v" if zero else "^", "linestyle": "none", "label": text}
        axis.plot(rounds, [height] * len(rounds), transform=axis.get_xaxis_transform(), clip_on=False, **style)


# ---- Loss and metrics ----


@dataclass(frozen=True)
class _Panel:
    title: str
    rounds: Sequence[RoundLog]
    lines: Mapping[str, Sequence[float]]


def _panels(rounds: Sequence[RoundLog]) -> list[_Panel]:
    """One panel for losses, one for metrics between -1 and 1, one for larger ones: they share no scale."""
    groups: dict[str, dict[str, list[float]]] = {"Loss": {}, "Metrics": {}, "Metrics (another scale)": {}}
    series = {"train loss": [row.logged.get("train_loss", math.nan) for row in rounds]}
    series |= {name: [row.metrics.get(name, math.nan) for row in rounds] for name in metric_names(rounds)}
    for name, values in series.items():
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            loss = name == "train loss" or re.search(r"(^|_)loss$", name)
            large = max(map(abs, finite)) > 1
            group = "Loss" if loss else "Metrics (another scale)" if large else "Metrics"
            label = name if name == "train loss" else f"evaluation {name}"
            groups[group][label] = [value if math.isfinite(value) else math.nan for value in values]
    return [_Panel(title, rounds, lines) for title, lines in groups.items() if lines]


def _draw_metrics(figure: Figure, panels: Sequence[_Panel]) -> None:
    figure.set_size_inches(max(6.0, 4.8 * len(panels)), 4.2)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for (label, values), (color, marker) in zip(panel.lines.items(), _STYLES):
            text = label.replace("$", r"\$")  # no formula
            size = 6 / _thin(panel.rounds)
            numbers = [row.round for row in panel.rounds]
            axis.plot(numbers, values, color=color, marker=marker, markersize=size, label=text)
        left_out = len(panel.lines) - _MAX_LINES
        title = f"{panel.title} (first {_MAX_LINES} of {len(panel.lines)})" if left_out > 0 else panel.title
        axis.set(title=title, ylabel="loss" if panel.title == "Loss" else "value")
        axis.ticklabel_format(axis="y", useOffset=False)
        _finish(axis, panel.rounds)


# ---- Traffic ----


def _draw_traffic(figure: Figure, rounds: Sequence[RoundLog], method: str) -> None:
    figure.set_size_inches(7, 4.2)
    axis = figure.subplots()
    numbers = [row.round for row in rounds]
    up = [row.logged.get("bytes_up_per_client", math.nan) for row in rounds]
    down = [row.logged.get("bytes_down_per_client", math.nan) for row in rounds]
    unit, size = byte_unit([*up, *down])
    bars = len(rounds) <= _MAX_BARS
    for values, label, shift, (color, marker) in zip((up, down), ("up", "down"), (-0.2, 0.2), _STYLES):
        heights = [value / size for value in values]
        if bars:
            axis.bar([number + shift for number in numbers], heights, 0.38, color=color, label=label)
        else:
            axis.plot(numbers, heights, color=color, marker=marker, markersize=3, label=label)
    if method == "fedex":  # what goes down without the residual is what goes up: adapter and head
        for number, value in zip(numbers, up):
            label = "FedIT would need, each way" if number == numbers[0] else "_"
            axis.plot([number - 0.45, number + 0.45], [value / size] * 2, color="black", linestyle=":", label=label)
    axis.set_ylim(bottom=0)
    axis.set(title="Traffic of one client", ylabel=f"{unit} per round (1 {unit} = {size:,.0f} bytes)")
    _finish(axis, rounds)


# ---- All of them ----


def _any(rounds: Sequence[RoundLog], *keys: str) -> bool:
    return any(not math.isnan(row.logged.get(key, math.nan)) for row in rounds for key in keys)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _thin(rounds: Sequence[RoundLog]) -> float:
    """What to divide marker sizes by, so that many rounds do not become one blot."""
    return 1.0 if len(rounds) <= 20 else 2.0


def _finish(axis: Axes, rounds: Sequence[RoundLog]) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = [row.round for row in rounds]
    margin = 1.5 if len(numbers) == 1 else max(0.6, 0.03 * (numbers[-1] - numbers[0]))
    axis.set_xlim(numbers[0] - margin, numbers[-1] + margin)
    if len(numbers) <= _MAX_BARS:
        axis.set_xticks(numbers)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.set_xlabel("round")
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = 3 if max(map(len, labels)) < 30 else 2
        axis.legend(handles, labels, fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.16))
