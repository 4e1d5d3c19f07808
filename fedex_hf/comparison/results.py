"""What a comparison measured: one `RunResult` per run, read from and written to `results.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


FORMAT = 1


@dataclass(frozen=True)
class Run:
    """One cell of a comparison.

    Args:
        task: Name of the task, such as `"sst2"`.
        method: An aggregator as it was asked for, such as `"fedex"` or `"fedex:assignment=keep"`, or `"centralized"`.
        seed: Decides the partition, the initial adapter and head, and every batch.
        local_epochs: Epochs per client and round.
    """

    task: str
    method: str
    seed: int
    local_epochs: float

    @property
    def folder(self) -> str:
        """Where the run lies below the comparison's `output_dir`."""
        method = self.method.replace(":", "-").replace("=", "-").replace(",", "-")
        return f"runs/{self.task}/{method}/epochs-{self.local_epochs:g}/seed-{self.seed}"


@dataclass
class LayerDeviation:
    """One adapted layer in one round.

    Args:
        aggregation_error: Error of the installed effective weight, relative to the ideal change; no unit.
        fedit_deviation: What FedIT would have had, `|| s B̄ Ā - s sum w_i B_i A_i ||_F` relative to the Frobenius norm
            of the ideal change; no unit.
        fedit_rms: The same numerator divided by the square root of the number of weights: root mean square per weight.
    """

    aggregation_error: float
    fedit_deviation: float
    fedit_rms: float


@dataclass
class RoundResult:
    """One round of one run.

    Args:
        round: Server round, counted from 1.
        train_loss: Weighted mean of the clients' training losses.
        aggregation_error, fedit_deviation: Over all adapted layers, relative, no unit; see `evaluation.Exactness`.
        num_clients: Clients whose update counted.
        bytes_up_per_client, bytes_down_per_client: Bytes on the wire for one client.
        seconds: Duration of the round, without evaluation.
        validation: Metrics on the validation split after the round, `loss` among them.
        layers: Layer name -> its deviation.
    """

    round: int
    train_loss: float
    aggregation_error: float
    fedit_deviation: float
    num_clients: int
    bytes_up_per_client: float
    bytes_down_per_client: float
    seconds: float
    validation: dict[str, float] = field(default_factory=dict)
    layers: dict[str, LayerDeviation] = field(default_factory=dict)


@dataclass
class BestRound:
    """The round that was best on the validation split, which is never called the run's result.

    Args:
        round: Its number.
        validation: Value of the task's validation metric after it.
        test: Metrics on the test split of that round's model.
    """

    round: int
    validation: float
    test: dict[str, float]


@dataclass
class RunResult:
    """One finished run.

    Args:
        run: Which one.
        metric: The task's main test metric, a key of `test`.
        validation_metric: The metric that is followed over rounds, a key of `RoundResult.validation`.
        greater_is_better: Whether a larger `validation_metric` is better.
        test: Metrics on the test split after the last round.
        best_on_validation: The best round on the validation split, or `None` where it was not looked for.
        rounds: One entry per round.
        start: SHA-256 of the initial adapter and head, and of the frozen weights.
        data: SHA-256 of who holds which training examples; for `centralized`, of the split that it is compared with.
        seconds: Duration of all rounds, without validation and test; also right for a run that was resumed.
    """

    run: Run
    metric: str
    validation_metric: str
    greater_is_better: bool
    test: dict[str, float]
    best_on_validation: BestRound | None
    rounds: list[RoundResult]
    start: str
    data: str
    seconds: float

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunResult:
        """The inverse of `dataclasses.asdict`."""
        rounds = [
            RoundResult(
                **{**each, "layers": {name: LayerDeviation(**value) for name, value in each["layers"].items()}}
            )
            for each in content["rounds"]
        ]
        best = content["best_on_validation"]
        return cls(
            **{
                **content,
                "run": Run(**content["run"]),
                "rounds": rounds,
                "best_on_validation": None if best is None else BestRound(**best),
            }
        )


def read_results(path: str | os.PathLike) -> list[RunResult]:
    """The runs of a `results.json`."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise ValueError(
            f"`{path}` has format {content.get('format')}; this version of fedex_hf reads format {FORMAT}."
        )
    return [RunResult.from_json(each) for each in content["runs"]]


def write_results(
    path: Path, results: Sequence[RunResult], settings: Mapping[str, Any], machine: Mapping[str, Any]
) -> None:
    """Write `results.json`, whole or not at all."""
    content = {
        "format": FORMAT,
        "settings": dict(settings),
        "machine": dict(machine),
        "runs": [asdict(result) for result in results],
    }
    write_json(path, content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1 in the denominator: NaN for a single value.

    Example:
        >>> mean_and_std([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
