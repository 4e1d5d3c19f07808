"""Commonsense reasoning by generated answer, as in LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).

The patterns are those of `extract_answer` in its `commonsense_evaluate.py`. For the choice by log-likelihood see
choices.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets

from fedex_hf.metrics.base import MatchingMetric, describe, refuse_config


_ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
# Data set, by the names of LLM-Adapters -> the answers that an output may name.
COMMONSENSE_ANSWERS = {
    "ARC-Challenge": _ANSWERS,
    "ARC-Easy": _ANSWERS,
    "boolq": ("true", "false"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "openbookqa": _ANSWERS,
    "piqa": ("solution1", "solution2"),
    "social_i_qa": _ANSWERS,
    "winogrande": ("option1", "option2"),
}


class Commonsense(MatchingMetric):
    """Share of outputs that name the right answer first, in [0, 1], as `accuracy`.

    Predictions are the outputs; references the data set's `answer`: `"true"`, `"answer3"`. As in LLM-Adapters, case
    counts, the first answer named in the output is taken wherever it stands, also within a word, and an output that
    names none is wrong.

    Args:
        config_name: A key of `COMMONSENSE_ANSWERS`.

    Example:
        >>> outputs = ["the correct answer is true", "false, not true", "yes"]
        >>> Commonsense("boolq").compute(predictions=outputs, references=["true", "false", "true"])
        {'accuracy': 0.6666666666666666}
    """

    expected = "an answer that the set allows"

    def _info(self) -> Any:
        refuse_config("commonsense", self.config_name, COMMONSENSE_ANSWERS)
        value = datasets.Value("string")
        return describe(
            "Accuracy of the first answer named in the output.",
            "Hu et al., LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of LLMs, 2023",
            {"predictions": value, "references": value},
        )

    def gold(self, reference: str) -> str | None:
        """The reference itself, if the set allows it."""
        return reference if reference in COMMONSENSE_ANSWERS[self.config_name] else None

    def matches(self, predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Which outputs name the reference first.

        Raises:
            ValueError: If the set does not allow a reference.
        """
        unknown = sorted({text for text in references if self.gold(text) is None})
        if unknown:
            raise ValueError(
                f"`commonsense` for `{self.config_name}` got the references {unknown[:5]}. Allowed: "
                f"{', '.join(COMMONSENSE_ANSWERS[self.config_name])}. Pass the column `answer` of LLM-Adapters' data."
            )
        return [
            extract_answer(self.config_name, text) == reference for text, reference in zip(predictions, references)
        ]


def extract_answer(dataset: str, output: str) -> str:
    """The first answer that the output names, or an empty string.

    Args:
        dataset: A key of `COMMONSENSE_ANSWERS`.
        output: What the model wrote.

    Example:
        >>> extract_answer("piqa", "the correct answer is solution2")
        'solution2'
    """
    match = re.search("|".join(COMMONSENSE_ANSWERS[dataset]), output)
    return match[0] if match else ""
