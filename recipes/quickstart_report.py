"""What the quickstart shows of its runs: progress, one table, one figure, one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedex_hf.comparison.looks import KNOWN_STYLES as STYLES
from fedex_hf.comparison.looks import LABELS


TABLE_HEAD = (
    "method",
    "test accuracy",
    "test macro-F1",
    "aggregation error",
    "FedIT deviation",
    "kB up / client / round",
    "kB down / client / round",
    "seconds",
)


@dataclass
class Result:
    """One finished run. `rounds` holds one dict per round: what the trainer logged and what it evaluated."""

    method: str
    rounds: list[dict[str, float]]
    test_accuracy: float
    test_macro_f1: float
    seconds: float

    def mean(self, key: str) -> float:
        """Mean over the rounds of a logged value."""
        return sum(each[key] for each in self.rounds) / len(self.rounds)

    def largest(self, key: str) -> float:
        """Largest value over the rounds."""
        return max(each[key] for each in self.rounds)


def rounds_of(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Join each round's log entry with the evaluation that follows it."""
    rounds: list[dict[str, float]] = []
    for entry in log_history:
        if "aggregation_error" in entry:
            rounds.append(dict(entry))
        elif rounds and "eval_accuracy" in entry:
            rounds[-1] |= {key: value for key, value in entry.items() if key.startswith("eval_")}
    return rounds


def clients_table(shares: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown table of the number of training examples per client and label."""
    labels = list(next(iter(shares.values())))
    head = ("client", *labels, "all")
    rows = [(client, *(str(n) for n in share.values()), str(sum(share.values()))) for client, share in shares.items()]
    return _markdown(head, rows)


def comparison_table(results: Sequence[Result]) -> str:
    """Markdown table of all runs: test metrics of the last round, largest errors and mean traffic over the rounds."""
    rows = []
    for result in results:
        row = [LABELS[result.method], f"{result.test_accuracy:.3f}", f"{result.test_macro_f1:.3f}"]
        if result.method == "centralized":
            row += ["-"] * 4  # one client: nothing is averaged, nothing is sent
        else:
            row += [f"{result.largest(key):.1e}" for key in ("aggregation_error", "fedit_deviation")]
            row += [f"{result.mean(key) / 1000:.0f}" for key in ("bytes_up_per_client", "bytes_down_per_client")]
        rows.append((*row, f"{result.seconds:.0f}"))
    return _markdown(TABLE_HEAD, rows)


def table_note(results: Sequence[Result], num_test: int) -> str:
    """What the columns mean, and how much of a difference may be chance."""
    spread = max((result.test_accuracy * (1 - result.test_accuracy) / num_test) ** 0.5 for result in results)
    return (
        f"Metrics: {num_test} test examples, after the last round; one standard error of an accuracy is about "
        f"{spread:.3f}, so smaller gaps may be chance.\n"
        "Aggregation error: the weight change that was installed against the float64 mean of the clients', relative, "
        "largest of all rounds.\n"
        "FedIT deviation: what averaging A and B apart would have lost from the same updates, likewise.\n"
        "Traffic: mean over rounds, 1 kB = 1000 bytes. Seconds: training and validation."
    )


def write_json(path: Path, settings: Mapping[str, Any], shares: Any, results: Sequence[Result]) -> None:
    """Write settings, clients and every round of every run."""
    content = {"settings": dict(settings), "clients": shares, "runs": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw(path: Path, shares: Mapping[str, Mapping[str, int]], results: Sequence[Result], majority: float) -> None:
    """Write the figure: who holds what, accuracy per round, error per round."""
    figure = Figure(figsize=(17, 4.8), layout="constrained")  # no pyplot: files only, no display needed
    axes = figure.subplots(1, 3)
    _draw_shares(axes[0], shares)
    _draw_accuracy(axes[1], results, majority)
    _draw_errors(axes[2], [result for result in results if result.method != "centralized"])
    figure.savefig(path, dpi=150)


def _draw_shares(axis: Axes, shares: Mapping[str, Mapping[str, int]]) -> None:
    labels = list(next(iter(shares.values())))
    colors = colormaps["tab10"] if len(labels) <= 10 else colormaps["viridis"].resampled(len(labels))
    left = [0] * len(shares)
    for index, label in enumerate(labels):
        counts = [share[label] for share in shares.values()]
        axis.barh(list(shares), counts, left=left, color=colors(index), label=label, height=0.7)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axis.invert_yaxis()
    axis.set_xlim(0, 1.03 * max(left))  # after the loop: the clients' totals
    axis.set(title="What each client holds", xlabel="training examples")
    if len(labels) <= 20:
        axis.legend(title="label", fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.14))


def _draw_accuracy(axis: Axes, results: Sequence[Result], majority: float) -> None:
    for result in results:
        color, marker = STYLES[result.method]
        rounds = [each["round"] for each in result.rounds]
        accuracy = [each["eval_accuracy"] for each in result.rounds]
        dashes = ":" if result.method == "centralized" else "-"
        axis.plot(rounds, accuracy, color=color, marker=marker, linestyle=dashes, label=LABELS[result.method])
    axis.axhline(majority, color="0.7", linewidth=1, label="always the largest class")
    axis.set(title="Accuracy on the validation split", xlabel="round", ylabel="accuracy (share of examples)")
    _finish(axis)


def _draw_errors(axis: Axes, results: Sequence[Result]) -> None:
    for result in results:
        color, marker = STYLES[result.method]
        for key, dashes, text in (
            ("aggregation_error", "-", "as installed"),
            ("fedit_deviation", "--", "FedIT would have lost"),
        ):
            if key == "fedit_deviation" and result.method != "fedex":
                continue  # FedIT installs just that; FFA-LoRA has one A for all, so averaging loses nothing
            points = [(each["round"], each[key]) for each in result.rounds if each[key] > 0]
            if points:
                face = color if dashes == "-" else "white"
                line: dict[str, Any] = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": dashes}
                axis.plot(*zip(*points, strict=True), **line, label=f"{LABELS[result.method]}: {text}")
    axis.set_yscale("log")
    axis.set(
        title="Error of the averaged model",
        xlabel="round",
        ylabel="relative error of the weight change (no unit, log)",
    )
    _finish(axis)


def _finish(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, labels, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table whose columns also line up as plain text: the first to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in others) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if not index else ":") for index, width in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])
