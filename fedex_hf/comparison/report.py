"""A comparison as text: Markdown tables of mean and standard deviation over seeds, last round and best round apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fedex_hf.comparison.figures import write_figures
from fedex_hf.comparison.looks import epochs_of, label_of, methods_of, tasks_of
from fedex_hf.comparison.methods import CENTRALIZED
from fedex_hf.comparison.results import RoundResult, RunResult, mean_and_std
from fedex_hf.plots import markdown_table


NOTHING = "-"
Score = Callable[[RunResult], float | None]
Seeds = dict[int, float]  # seed -> value


def write_report(results: Sequence[RunResult], output_dir: Path) -> list[Path]:
    """Write `results.md` and the figures.

    Args:
        results: Finished runs.
        output_dir: Folder of the files.

    Returns:
        The files that were written, `results.md` first. A figure that fails is logged and left out.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    figures = write_figures(results, output_dir)
    text = f"# Results\n\n{results_markdown(results)}"
    if figures:
        images = (f"![{path.stem.replace('_', ' ')}]({path.name})" for path in figures)
        text += "\n\n## Plots\n\n" + "\n\n".join(images)
    path = output_dir / "results.md"
    path.write_text(text + "\n", encoding="utf-8")
    return [path, *figures]


def results_markdown(results: Sequence[RunResult]) -> str:
    """All tables, with what their columns mean."""
    if not results:
        return "No run has finished yet."
    parts = ["## Test metrics after the last round", _about_seeds(results)]
    parts += _per_epochs(results, _last_round)
    parts += [_missing(results), _notes(results)]
    if any(each.best_on_validation for each in results):
        parts += ["## Test metrics of the round that was best on validation", _BEST]
        parts += _per_epochs(results, _best_round)
    for task in tasks_of(results):
        same = [each for each in results if each.run.task == task]
        if len(_metrics(same)) > 1:
            parts.append(f"## All test metrics of {task} after the last round")
            parts += _per_epochs(results, partial(_all_metrics, task=task))
    if _is_paired(results):
        parts += ["## Differences after the last round, paired by seed", _PAIRED]
        parts += _per_epochs(results, _differences)
    return "\n\n".join(part for part in parts if part)


# ---- Tables: columns of cells ----


def _last_round(results: Sequence[RunResult], every: Sequence[RunResult]) -> dict[str, list[str]]:
    methods = methods_of(every)
    columns = {"method": [label_of(method) for method in methods]}
    columns |= _metric_columns(results, every, _test)
    rounds = {
        method: [row for each in results if each.run.method == method for row in each.rounds] for method in methods
    }
    for name, number in _ABOUT_ROUNDS.items():
        columns[name] = [
            number(rounds[method]) if rounds[method] and method != CENTRALIZED else NOTHING for method in methods
        ]
    return columns


def _best_round(results: Sequence[RunResult], every: Sequence[RunResult]) -> dict[str, list[str]]:
    def score(each: RunResult) -> float | None:
        best = each.best_on_validation
        return None if best is None else best.test.get(each.metric, math.nan)

    columns = {"method": [label_of(method) for method in methods_of(every)]}
    columns |= _metric_columns(results, every, score)
    columns["mean best round"] = []
    for method in methods_of(every):
        rounds = [
            each.best_on_validation.round for each in results if each.run.method == method and each.best_on_validation
        ]
        columns["mean best round"].append(f"{mean_and_std(rounds)[0]:.1f}" if rounds else NOTHING)
    return columns


def _all_metrics(results: Sequence[RunResult], every: Sequence[RunResult], task: str) -> dict[str, list[str]]:
    columns = {"method": [label_of(method) for method in methods_of(every)]}
    for metric in _metrics(each for each in every if each.run.task == task):
        columns[metric] = [
            cell(scores(results, method, task, partial(_test, metric=metric)), _seeds(every))
            for method in methods_of(every)
        ]
    return columns


def _differences(results: Sequence[RunResult], every: Sequence[RunResult]) -> dict[str, list[str]]:
    first, *others = methods_of(every)
    columns = {"difference": [f"{label_of(first)} − {label_of(other)}" for other in others]}
    minuend = task_scores(results, every, first, _test)
    for name in minuend:
        columns[name] = []
        for other in others:
            subtrahend = task_scores(results, every, other, _test)[name]
            columns[name].append(cell(difference(minuend[name], subtrahend), _seeds(every), "+"))
    return columns


def _metric_columns(results: Sequence[RunResult], every: Sequence[RunResult], score: Score) -> dict[str, list[str]]:
    rows = [task_scores(results, every, method, score) for method in methods_of(every)]
    return {name: [cell(row[name], _seeds(every)) for row in rows] for name in rows[0]}


# ---- Numbers ----


def _test(result: RunResult, metric: str | None = None) -> float | None:
    """A test metric after the last round: the main one, NaN where it is missing, or another, `None` likewise."""
    return result.test.get(result.metric, math.nan) if metric is None else result.test.get(metric)


def scores(results: Iterable[RunResult], method: str, task: str, score: Score) -> Seeds:
    """Seed -> score, of the runs of a method on a task that have one."""
    runs = {each.run.seed: score(each) for each in results if (each.run.method, each.run.task) == (method, task)}
    return {seed: value for seed, value in runs.items() if value is not None}


def task_scores(
    results: Sequence[RunResult], every: Sequence[RunResult], method: str, score: Score
) -> dict[str, Seeds]:
    """Heading -> seed -> score of a method: one entry per task and, if there are several, their average.

    Args:
        results: Runs with one number of local epochs.
        every: All runs, which decide on the tasks.
        method: Whose scores.
        score: What counts; `None` where a run has none.

    Returns:
        The average of a seed is the mean over the tasks, and is there only if the seed has all tasks.
    """
    metrics = {task: next(each.metric for each in every if each.run.task == task) for task in tasks_of(every)}
    columns = {f"{task} ({metric})": scores(results, method, task, score) for task, metric in metrics.items()}
    if len(columns) > 1:
        complete = set.intersection(*(set(each) for each in columns.values()))
        average = {seed: mean_and_std([each[seed] for each in columns.values()])[0] for seed in sorted(complete)}
        columns["average"] = average
    return columns


def difference(minuend: Seeds, subtrahend: Seeds) -> Seeds:
    """Of the seeds that both have.

    Example:
        >>> difference({0: 3.0, 1: 5.0}, {1: 4.0, 2: 1.0})
        {1: 1.0}
    """
    return {seed: value - subtrahend[seed] for seed, value in minuend.items() if seed in subtrahend}


def cell(values: Mapping[int, float], seeds: Sequence[int], sign: str = "") -> str:
    """Mean and sample standard deviation as text, with their number if it is not that of all seeds.

    Args:
        values: Seed -> value.
        seeds: All seeds of the comparison.
        sign: `"+"` for a sign in front of positive means.

    Example:
        >>> cell({0: 0.5, 1: 0.75, 2: 1.0}, [0, 1, 2]), cell({1: 0.5}, [0, 1, 2]), cell({}, [0, 1, 2])
        ('0.750 ± 0.250', '0.500 (n = 1)', '-')
    """
    if not values:
        return NOTHING
    mean, deviation = mean_and_std([*values.values()])
    text = format(round(mean, 3) + 0.0, f"{sign}.3f")  # no -0.000
    if math.isfinite(deviation):
        text += f" ± {deviation:.3f}"
    return text if len(values) == len(seeds) else f"{text} (n = {len(values)})"


def _largest_error(rounds: Sequence[RoundResult]) -> str:
    errors = [row.aggregation_error for row in rounds]
    largest = math.nan if any(map(math.isnan, errors)) else max(errors)  # a broken round is not passed over
    return f"{largest:.1e}"


_ABOUT_ROUNDS: dict[str, Callable[[Sequence[RoundResult]], str]] = {
    "largest aggregation error": _largest_error,
    "mean FedIT deviation": lambda rounds: f"{mean_and_std([row.fedit_deviation for row in rounds])[0]:.1e}",
    "kB up / client / round": lambda rounds: _kilobytes([row.bytes_up_per_client for row in rounds]),
    "kB down / client / round": lambda rounds: _kilobytes([row.bytes_down_per_client for row in rounds]),
}


def _kilobytes(values: Sequence[float]) -> str:
    return f"{mean_and_std(values)[0] / 1000:,.1f}"


# ---- Words ----

_BEST = (
    "Not the results: the round was chosen by the validation metric, run by run, and tested afterwards. The mean best "
    "round is over tasks and seeds, counted from 1."
)
_PAIRED = (
    "The same seed means the same initial state and, but for centralized training, the same split over clients, so "
    "differences are taken seed by seed: mean ± sample standard deviation of the differences. The standard error of "
    "the mean is this deviation divided by √n; a mean that is smaller than its spread may be chance."
)


def _notes(results: Sequence[RunResult]) -> str:
    lines = [
        "Metrics are of the test split, in their own unit: fractions of 1, not percent, where they are shares or "
        "correlations. Validation data decide nothing here.",
    ]
    if len(tasks_of(results)) > 1:
        lines.append(
            "average: mean over the tasks, seed by seed, of the seeds that have all tasks. It weighs every task "
            "alike, whatever its metric's scale."
        )
    lines += [
        "largest aggregation error: distance of the effective weights as installed from the float64 mean of the "
        "clients' effective weights, relative to the round's change; largest of all rounds, tasks and seeds; no unit.",
        "mean FedIT deviation: what averaging A and B apart would have lost from the same updates, likewise; mean "
        "over rounds, tasks and seeds; no unit. What FedIT itself installs is off by just that.",
        "kB up, kB down: what one client sends and receives in one round, mean over rounds, tasks and seeds; "
        "1 kB = 1000 bytes.",
    ]
    if CENTRALIZED in methods_of(results):
        lines.append(f"{label_of(CENTRALIZED)}: one place holds all data, so nothing is averaged or sent (`-`).")
    return "What the columns say:\n\n" + "\n".join(f"- {line}" for line in lines)


def _about_seeds(results: Sequence[RunResult]) -> str:
    seeds = _seeds(results)
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}), n = 1: nothing is known about the spread, and differences may be chance."
    return (
        f"Mean ± sample standard deviation (n - 1 in the denominator) over n = {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))}); where fewer have finished, n stands in the cell, and `-` is none."
    )


def _missing(results: Sequence[RunResult]) -> str:
    """The cells of the grid of everything that occurs in the results, without those that do."""
    there = {(each.run.method, each.run.task, each.run.local_epochs, each.run.seed) for each in results}
    lines = []
    for epochs in epochs_of(results):
        for method in methods_of(results):
            for task in tasks_of(results):
                seeds = [seed for seed in _seeds(results) if (method, task, epochs, seed) not in there]
                if seeds:
                    word = "seed" if len(seeds) == 1 else "seeds"
                    numbers = ", ".join(map(str, seeds))
                    lines.append(f"- {label_of(method)} on {task}, {_local_epochs(epochs)}: {word} {numbers}")
    return "\n".join(["Missing (not finished, or not asked for):\n", *lines]) if lines else ""


def _per_epochs(
    results: Sequence[RunResult],
    columns: Callable[[Sequence[RunResult], Sequence[RunResult]], dict[str, list[str]]],
) -> list[str]:
    """One table per number of local epochs, with a heading where there are several."""
    parts = []
    for epochs in epochs_of(results):
        if len(epochs_of(results)) > 1:
            parts.append(f"### {_local_epochs(epochs)}")
        parts.append(_table(columns([each for each in results if each.run.local_epochs == epochs], results)))
    return parts


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table that also lines up as plain text: the first column to the left, numbers to the right."""
    padded: dict[str, list[str]] = {}
    rule = []
    for name, cells in columns.items():
        width = max(map(len, (name, *cells)))
        side = ">" if padded else "<"
        padded[f"{name:{side}{width}}"] = [f"{text:{side}{width}}" for text in cells]
        rule.append("-" * (width + 1) + (":" if side == ">" else "-"))
    head, _, *rows = markdown_table(padded).split("\n")
    return "\n".join([head, f"|{'|'.join(rule)}|", *rows])


def _local_epochs(epochs: float) -> str:
    return f"{epochs:g} local epoch{'' if epochs == 1 else 's'}"


def _metrics(results: Iterable[RunResult]) -> list[str]:
    """Names of the test metrics, each once, the main one first."""
    results = list(results)
    return list(dict.fromkeys([*(each.metric for each in results), *(name for each in results for name in each.test)]))


def _seeds(results: Iterable[RunResult]) -> list[int]:
    return sorted({each.run.seed for each in results})


def _is_paired(results: Sequence[RunResult]) -> bool:
    """Whether the first method and another one share two seeds somewhere: a single difference has no spread."""
    first, *others = methods_of(results)
    runs = {(each.run.task, each.run.local_epochs, each.run.method, each.run.seed) for each in results}
    return any(
        sum((*cell, first, seed) in runs and (*cell, other, seed) in runs for seed in _seeds(results)) > 1
        for cell in {each[:2] for each in runs}
        for other in others
    )
