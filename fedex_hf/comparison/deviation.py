"""What averaging the factors loses, layer by layer: the data behind Figures 2 and 3 of FedEx-LoRA.

The paper (arXiv 2410.09432) plots a "scaled Frobenius norm" of the difference between FedIT's update and the ideal
one, without saying how it is scaled. Two scalings are written here, and both are defined:

    relative   ||s B̄ Ā - s sum w_i B_i A_i||_F / ||ideal change of the round||_F     no unit, comparable over rounds
    rms        ||s B̄ Ā - s sum w_i B_i A_i||_F / sqrt(number of weights)             in the unit of a weight,
                                                                                      comparable over layers
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedex_hf.comparison.figures import depth_of, kinds_of
from fedex_hf.comparison.results import RunResult, mean_and_std
from fedex_hf.plots import markdown_table


COLUMNS = ("task", "method", "seed", "local_epochs", "round", "layer", "kind", "depth", "relative", "rms")


def deviation_rows(results: Iterable[RunResult]) -> list[dict[str, Any]]:
    """One row per run, round and layer, with the columns `COLUMNS`."""
    rows = []
    for result in results:
        run = result.run
        for each in result.rounds:
            kinds = kinds_of(list(each.layers))
            for name, layer in each.layers.items():
                values = (kinds[name], depth_of(name), layer.fedit_deviation, layer.fedit_rms)
                key = (run.task, run.method, run.seed, run.local_epochs, each.round, name)
                rows.append(dict(zip(COLUMNS, (*key, *values), strict=True)))
    return rows


def write_rows(rows: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """The rows as a CSV file."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def kinds_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown table per method, local epochs, first and last round, kind of layer: means over all else."""
    last = max(row["round"] for row in rows)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["round"] in (1, last):
            groups.setdefault((row["method"], row["local_epochs"], row["round"], row["kind"]), []).append(row)
    keys = sorted(groups)
    columns = {
        "method": [method for method, *_ in keys],
        "local epochs": [f"{epochs:g}" for _, epochs, *_ in keys],
        "round": [str(round) for _, _, round, _ in keys],
        "kind of layer": [kind for *_, kind in keys],
    }
    columns |= {name: [f"{_mean(groups[key], name):.3g}" for key in keys] for name in ("relative", "rms")}
    return markdown_table(columns)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return mean_and_std([row[key] for row in rows])[0]
