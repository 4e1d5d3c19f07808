"""What all metrics share: the interface of `evaluate.Metric`, in memory, with refusals that say what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate


class OfflineMetric(evaluate.Metric):
    """A metric that comes with the package.

    Differs from `evaluate.Metric` in where predictions are kept: in memory, unless several processes share them, so
    that nothing is written to the cache folder and metrics of several processes cannot meet there.

    Args:
        config_name: Which variant, where the metric has several.
        num_process: Processes that compute together, as in `evaluate.Metric`.
        keep_in_memory: Default: whenever `num_process` is 1.
        kwargs: As in `evaluate.Metric`.
    """

    def __init__(
        self,
        config_name: str | None = None,
        *,
        num_process: int = 1,
        keep_in_memory: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self._in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(config_name, keep_in_memory=self._in_memory, num_process=num_process, **kwargs)

    def _build_data_dir(self) -> str:
        return self._data_dir_root if self._in_memory else super()._build_data_dir()

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and references.

        Args:
            predictions: One for each example.
            references: One for each example.
            kwargs: Further inputs, for metrics that have them.

        Raises:
            ValueError: If there are none, or not equally many of each, or an input is unknown.
        """
        check_sizes(self.name, {"predictions": predictions, "references": references, **kwargs}, self.features)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _finalize(self) -> None:
        if self.writer is None:
            raise ValueError(f"`{self.name}` has nothing to compute. Pass predictions and references, or add them.")
        super()._finalize()


class MatchingMetric(OfflineMetric):
    """A metric that is the share of outputs that match their reference, in [0, 1].

    Attributes:
        score: Key of what `compute` returns.
        expected: What a reference must hold, in words.
    """

    score = "accuracy"
    expected = ""

    def gold(self, reference: str) -> Any:
        """What outputs are compared with: the answer in a reference, or `None` if there is none."""
        raise NotImplementedError

    def matches(self, predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Which outputs match; `compute` is the share of these.

        Raises:
            ValueError: If a reference has no answer.
        """
        raise NotImplementedError

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        matches = self.matches(predictions, references)
        return {self.score: sum(matches) / len(matches)}


def check_sizes(name: str, inputs: Mapping[str, Any], features: Mapping[str, Any]) -> None:
    """Refuse inputs that are missing, unknown, empty, or not equally many.

    Raises:
        ValueError: With the sizes that came.
    """
    given = {key: value for key, value in inputs.items() if value is not None}
    if set(given) != set(features):
        raise ValueError(f"`{name}` got the inputs {sorted(given)}. It needs {sorted(features)}, and no others.")
    sizes = {key: len(value) for key, value in given.items()}
    if len(set(sizes.values())) > 1 or not min(sizes.values()):
        raise ValueError(f"`{name}` got {sizes} examples. It needs equally many of each, and at least one.")


def describe(summary: str, citation: str, features: Mapping[str, Any], array_format: str | None = None) -> Any:
    """The `evaluate.MetricInfo` of a metric.

    Args:
        summary: What it computes.
        citation: Where it comes from.
        features: Name of an input -> its `datasets` feature.
        array_format: `"numpy"` for arrays instead of lists.
    """
    return evaluate.MetricInfo(
        description=summary,
        citation=citation,
        inputs_description="",
        features=datasets.Features(features),
        format=array_format,
    )


def refuse_config(name: str, config_name: str | None, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Refuse a configuration that a metric does not have.

    Raises:
        ValueError: With the ones it has.
    """
    if config_name not in allowed:
        choices = ", ".join(map(repr, sorted(allowed)))
        raise ValueError(f"`{name}` got `config_name={config_name!r}`. Allowed: {choices}.")
