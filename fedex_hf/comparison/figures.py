"""A comparison as PNG files, if matplotlib is there: metrics and deviations per round, per layer, and traffic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from fedex_hf.comparison.looks import (
    KNOWN_STYLES,
    count_rounds,
    deviating_method,
    epochs_of,
    further_styles,
    label_of,
    legend,
    linear_or_log,
    log_scale,
    marker_size,
    methods_of,
    panels,
    plain,
    spread,
    styles_of,
    tasks_of,
    whole_numbers,
)
from fedex_hf.comparison.methods import CENTRALIZED
from fedex_hf.comparison.results import RoundResult, RunResult, mean_and_std
from fedex_hf.plots import byte_unit


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Sequence[RunResult]], Figure | None]

logger = logging.get_logger(__name__)

_UNITS = {"accuracy": "share of examples"}  # of metrics; the others have none
_MAX_PANELS = 6  # of layers
_DPI = 130
_DIFFERENCE = r"$s\,\bar{B}\,\bar{A} - s\,\Sigma\,w_i B_i A_i$"  # see `LayerDeviation`


# ---- Files ----


def write_figures(results: Sequence[RunResult], output_dir: Path) -> list[Path]:
    """Write every figure that the results have numbers for.

    Args:
        results: Finished runs.
        output_dir: Folder of the files. Where runs differ in their local epochs, `-epochs-3` ends the names of those
            that show one number of epochs only.

    Returns:
        The files that were written: none without matplotlib, and none that failed, which is logged.
    """
    if not _has_matplotlib():
        return []
    written: list[Path | None] = []
    epochs = epochs_of(results)
    for each in epochs:
        suffix = f"-epochs-{each:g}" if len(epochs) > 1 else ""
        same = [result for result in results if result.run.local_epochs == each]
        for write in (metric_per_round, deviation_per_round, deviation_per_layer):
            written.append(write(same, output_dir / f"{write.__name__}{suffix}.png"))
    written.append(deviation_per_local_epochs(results, output_dir / "deviation_per_local_epochs.png"))
    written.append(traffic(results, output_dir / "traffic.png"))
    return [path for path in written if path is not None]


def metric_per_round(results: Sequence[RunResult], path: Path) -> Path | None:
    """Write `draw_metric_per_round`; the path, or `None` where there is nothing to draw or to draw with."""
    return _write(draw_metric_per_round, results, path)


def deviation_per_round(results: Sequence[RunResult], path: Path) -> Path | None:
    """Write `draw_deviation_per_round`; the path, or `None` where there is nothing to draw or to draw with."""
    return _write(draw_deviation_per_round, results, path)


def deviation_per_layer(results: Sequence[RunResult], path: Path, method: str | None = None) -> Path | None:
    """Write `draw_deviation_per_layer`; the path, or `None` where there is nothing to draw or to draw with."""
    return _write(lambda results: draw_deviation_per_layer(results, method), results, path)


def deviation_per_local_epochs(results: Sequence[RunResult], path: Path, method: str | None = None) -> Path | None:
    """Write `draw_deviation_per_local_epochs`; the path, or `None` where there is nothing to draw or to draw with."""
    return _write(lambda results: draw_deviation_per_local_epochs(results, method), results, path)


def traffic(results: Sequence[RunResult], path: Path) -> Path | None:
    """Write `draw_traffic`; the path, or `None` where there is nothing to draw or to draw with."""
    return _write(draw_traffic, results, path)


def _write(draw: Draw, results: Sequence[RunResult], path: Path) -> Path | None:
    if not _has_matplotlib():
        return None
    try:
        figure = draw(results)
        if figure is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, facecolor="white")
    except Exception as error:  # a picture less is better than results that are not written
        logger.warning(f"`{path.name}` could not be drawn: {type(error).__name__}: {error}")
        return None
    return path


def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        logger.warning("No plots are drawn, because matplotlib is not installed: `pip install matplotlib`.")
        return False
    return True


# ---- Metrics ----


def draw_metric_per_round(results: Sequence[RunResult]) -> Figure | None:
    """Validation metric after each round: a panel per task, a line per method, mean and deviation over seeds.

    Args:
        results: Runs with one number of local epochs.

    Returns:
        The figure; `None` if no run was validated.
    """
    results = [each for each in results if any(each.validation_metric in row.validation for row in each.rounds)]
    if not results:
        return None
    tasks, methods = tasks_of(results), methods_of(results)
    styles = styles_of(methods)
    figure, axes = panels(
        tasks, "Validation metric after each round" + spread(results, "band: ± 1 standard deviation")
    )
    for axis, task in zip(axes, tasks):
        metric = next(each.validation_metric for each in results if each.run.task == task)
        for method in methods:
            runs = [each for each in results if (each.run.task, each.run.method) == (task, method)]
            rounds, values = _by_round(runs, partial(_validation, metric=metric))
            means, deviations = zip(*map(mean_and_std, values)) if values else ((), ())
            color, marker = styles[method]
            dashes = ":" if method == CENTRALIZED else "-"
            look: dict[str, Any] = {"color": color, "marker": marker, "markersize": marker_size(rounds)}
            axis.plot(rounds, means, **look, linestyle=dashes, label=plain(label_of(method)))
            low = [mean - deviation for mean, deviation in zip(means, deviations)]
            high = [mean + deviation for mean, deviation in zip(means, deviations)]
            axis.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_ylabel(f"validation {plain(metric)}\n({_UNITS.get(metric, 'no unit')})")
        axis.ticklabel_format(axis="y", useOffset=False)
        count_rounds(axis)
    legend(figure, axes)
    return figure


# ---- Deviation ----


def draw_deviation_per_round(results: Sequence[RunResult]) -> Figure | None:
    """Aggregation error of each method as installed, and the deviation that FedIT would have had: a panel per task.

    FedIT installs its deviation, and FFA-LoRA has one `A` for all, which averaging does not harm, so for these two
    the second line would say nothing new.

    Args:
        results: Runs with one number of local epochs.

    Returns:
        The figure; `None` if only centralized training is there.
    """
    results = [each for each in results if each.run.method != CENTRALIZED and each.rounds]
    if not results:
        return None
    tasks, methods = tasks_of(results), methods_of(results)
    styles = styles_of(methods)
    figure, axes = panels(tasks, "Error of the averaged model" + spread(results, "band: smallest to largest"))
    positive: list[float] = []
    for axis, task in zip(axes, tasks):
        for method in methods:
            runs = [each for each in results if (each.run.task, each.run.method) == (task, method)]
            look: dict[str, Any] = {"color": styles[method][0], "marker": styles[method][1]}
            name = plain(label_of(method))
            installed = _by_round(runs, lambda row: row.aggregation_error)
            positive += _draw_log_line(axis, *installed, **look, label=f"{name}, as installed")
            if method.partition(":")[0] not in ("fedit", "ffa"):
                look |= {"markerfacecolor": "white", "linestyle": "--", "label": f"{name}: FedIT would have lost"}
                positive += _draw_log_line(axis, *_by_round(runs, lambda row: row.fedit_deviation), **look)
        axis.set_ylabel("error relative to the round's\nweight change (no unit, log)")
        count_rounds(axis)
    for axis in axes:
        log_scale(axis, positive)
    legend(figure, axes)
    return figure


def _draw_log_line(axis: Axes, rounds: Sequence[int], values: Sequence[Sequence[float]], **look: Any) -> list[float]:
    """Mean and range over seeds; 0 stands at the lower edge, infinity at the upper. Returns the other values."""
    if not rounds:
        return []
    look["markersize"] = marker_size(rounds)
    means = [mean_and_std(each)[0] for each in values]
    shown = [mean if 0 < mean < math.inf else math.nan for mean in means]
    if any(math.isfinite(mean) for mean in shown):
        axis.plot(rounds, shown, **look)
        low = [min((value for value in each if value > 0), default=math.nan) for each in values]
        axis.fill_between(rounds, low, [max(each) for each in values], color=look["color"], alpha=0.15, linewidth=0)
    for value, height, text in ((0.0, 0.03, "exactly 0"), (math.inf, 0.97, "infinite")):
        there = [number for number, mean in zip(rounds, means) if mean == value]
        if there:
            edge = look | {"linestyle": "none", "label": f"{look['label']}: {text}"}
            axis.plot(there, [height] * len(there), transform=axis.get_xaxis_transform(), clip_on=False, **edge)
    return [value for each in values for value in each if 0 < value < math.inf]


def draw_deviation_per_layer(results: Sequence[RunResult], method: str | None = None) -> Figure | None:
    """What FedIT loses in each layer, after the first and after the last round: a panel per task, 6 at most.

    Args:
        results: Runs with one number of local epochs.
        method: Whose runs are shown; `None`: `deviating_method`.

    Returns:
        The figure; `None` if no run has layers.
    """
    method = method or deviating_method(results)
    results = [each for each in results if each.run.method == method and any(row.layers for row in each.rounds)]
    if method is None or not results:
        return None
    every = tasks_of(results)
    tasks = every[:_MAX_PANELS]
    names = list(dict.fromkeys(name for each in results for row in each.rounds for name in row.layers))
    kinds = kinds_of(names)
    styles = dict(zip(dict.fromkeys(kinds.values()), [*KNOWN_STYLES.values(), *further_styles(100)]))
    title = f"Deviation of FedIT per layer, in runs of {label_of(method)}{spread(results)}"
    title += f" (first {len(tasks)} of {len(every)} tasks)" if len(every) > len(tasks) else ""
    figure, axes = panels(tasks, title)
    for axis, task in zip(axes, tasks):
        runs = [each for each in results if each.run.task == task]
        numbers = sorted({row.round for each in runs for row in each.rounds if row.layers})
        for kind, (color, marker) in styles.items():
            for number in dict.fromkeys((numbers[0], numbers[-1])):
                depths = _by_depth(runs, number, [name for name in names if kinds[name] == kind])
                first = number == numbers[0]
                look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "-" if first else "--"}
                look |= {"markersize": 5, "markerfacecolor": color if first else "white"}
                axis.plot([*depths], [*depths.values()], **look, label=plain(f"{kind}, after round {number}"))
        axis.set_xlabel("depth (index of the transformer layer)")
        axis.set_ylabel("root mean square over the weights of\n" + _DIFFERENCE + " (no unit)")
        whole_numbers(axis)
        linear_or_log(axis)
    legend(figure, axes)
    return figure


def kinds_of(names: Sequence[str]) -> dict[str, str]:
    """Layer name -> what kind of projection it is: its last part, and more of it where that is not enough.

    Example:
        >>> names = ["h.0.attention.self.query", "h.0.attention.output.dense", "h.0.intermediate.dense"]
        >>> list(kinds_of(names).values())
        ['query', 'attention.output.dense', 'intermediate.dense']
    """
    parts = {name: tuple(part for part in name.split(".") if not part.isdigit()) or (name,) for name in names}
    kinds = {}
    for name, own in parts.items():
        alike = [set(other) for other in parts.values() if other[-1] == own[-1]]
        common = set.intersection(*alike)
        kinds[name] = ".".join([part for part in own[:-1] if part not in common] + [own[-1]])
    return kinds


def depth_of(name: str) -> int:
    """The first number in a layer's name; 0 if there is none.

    Example:
        >>> depth_of("roberta.encoder.layer.11.attention.self.query")
        11
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _by_depth(runs: Sequence[RunResult], number: int, names: Sequence[str]) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for row in (row for each in runs for row in each.rounds if row.round == number):
        for name in names:
            if name in row.layers:
                values.setdefault(depth_of(name), []).append(row.layers[name].fedit_rms)
    return {depth: mean_and_std(values[depth])[0] for depth in sorted(values)}


def draw_deviation_per_local_epochs(results: Sequence[RunResult], method: str | None = None) -> Figure | None:
    """FedIT's relative deviation after the first round against local epochs: a line per task, error bars over seeds.

    Args:
        results: Runs with several numbers of local epochs.
        method: Whose runs are shown; `None`: `deviating_method`.

    Returns:
        The figure; `None` if there are not at least two numbers of local epochs.
    """
    method = method or deviating_method(results)
    results = [each for each in results if each.run.method == method and each.rounds]
    epochs, tasks = epochs_of(results), tasks_of(results)
    if method is None or len(epochs) < 2:
        return None
    band = spread(results, "bars: ± 1 standard deviation")
    figure, (axis,) = panels([""], f"Deviation of FedIT after the first round, in runs of {label_of(method)}{band}")
    for task, (color, marker) in zip(tasks, [*KNOWN_STYLES.values(), *further_styles(100)]):
        runs = [each for each in results if each.run.task == task]
        shown = [each for each in epochs if any(run.run.local_epochs == each for run in runs)]
        values = [[run.rounds[0].fedit_deviation for run in runs if run.run.local_epochs == each] for each in shown]
        means, deviations = zip(*map(mean_and_std, values))
        look: dict[str, Any] = {"color": color, "marker": marker, "capsize": 4}
        axis.errorbar(
            shown, means, [0 if math.isnan(each) else each for each in deviations], **look, label=plain(task)
        )
    axis.set_xticks(epochs, [f"{each:g}" for each in epochs])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("local epochs per client and round")
    axis.set_ylabel("deviation relative to the round's\nweight change (no unit)")
    legend(figure, [axis])
    return figure


# ---- Traffic ----


def draw_traffic(results: Sequence[RunResult]) -> Figure | None:
    """What a client sends and receives in the whole run: a bar per method, mean over tasks and seeds.

    Returns:
        The figure; `None` if only centralized training is there, which sends nothing.
    """
    results = [each for each in results if each.run.method != CENTRALIZED and each.rounds]
    if not results:
        return None
    methods = methods_of(results)
    up = [_cumulative(results, method, "bytes_up_per_client") for method in methods]
    down = [_cumulative(results, method, "bytes_down_per_client") for method in methods]
    unit, size = byte_unit([*up, *down])
    figure, (axis,) = panels([""], "Traffic of a client that takes part in every round, mean over tasks and seeds")
    figure.set_size_inches(8, 1.9 + 0.55 * len(methods))
    labels = [plain(label_of(method)) for method in methods]
    sent, received = [each / size for each in up], [each / size for each in down]
    axis.barh(labels, sent, 0.65, color="#0072B2", label="up: client to server")
    axis.barh(labels, received, 0.65, left=sent, color="#E69F00", label="down: server to client")
    ends = [sum(each) for each in zip(sent, received)]
    for row, end in enumerate(ends):
        text = f"{_short(sent[row])} up, {_short(received[row])} down"
        place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(text, (end, row), (6, 0), **place, bbox={"color": "white", "pad": 1})
    axis.grid(visible=False, axis="y")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.45 * max(ends) or 1.0)  # room for the numbers
    axis.set_xlabel(f"{unit} over the whole run (1 {unit} = {size:,.0f} bytes)")
    legend(figure, [axis])
    return figure


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _cumulative(results: Sequence[RunResult], method: str, key: str) -> float:
    totals = [math.fsum(getattr(row, key) for row in each.rounds) for each in results if each.run.method == method]
    return mean_and_std(totals)[0]


def _by_round(
    results: Iterable[RunResult], value: Callable[[RoundResult], float | None]
) -> tuple[list[int], list[list[float]]]:
    """Rounds, and for each of them one value per run that has one."""
    values: dict[int, list[float]] = {}
    for result in results:
        for each in result.rounds:
            number = value(each)
            if number is not None:
                values.setdefault(each.round, []).append(number)
    return sorted(values), [values[number] for number in sorted(values)]


def _validation(row: RoundResult, metric: str) -> float | None:
    return row.validation.get(metric)
