"""Multiple choice by log-likelihood, as in lm-evaluation-harness (`acc`, `acc_norm`, `acc_bytes`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets

from fedex_hf.metrics.base import OfflineMetric, describe


class Choices(OfflineMetric):
    """Share of examples whose likeliest choice is the right one, in [0, 1].

    `acc` compares log-likelihoods as they are, `acc_norm` divides them by the choice's length in characters,
    `acc_bytes` by its length in UTF-8 bytes. lm-evaluation-harness normalises by characters; the two differ where
    choices are not ASCII. Among equals the first is taken. Lengths are those of the choices as passed: pass them as
    the harness does, without the space that joins them to the question.

    Inputs of `compute`:
        predictions: For each example, the summed log-likelihoods of its choices, nats.
        choices: For each example, the texts of its choices.
        references: For each example, the index of the right choice.

    Example:
        >>> Choices().compute(predictions=[[-4.0, -6.0]], choices=[["no", "of course"]], references=[1])
        {'acc': 0.0, 'acc_norm': 1.0, 'acc_bytes': 1.0}
    """

    def _info(self) -> Any:
        return describe(
            "Accuracy of the likeliest choice.",
            "Gao et al., The Language Model Evaluation Harness, https://github.com/EleutherAI/lm-evaluation-harness",
            {
                "predictions": datasets.Sequence(datasets.Value("float64")),
                "choices": datasets.Sequence(datasets.Value("string")),
                "references": datasets.Value("int64"),
            },
        )

    def _compute(
        self, predictions: Sequence[Sequence[float]], choices: Sequence[Sequence[str]], references: Sequence[int]
    ) -> dict[str, float]:
        characters = [[len(text) for text in texts] for texts in choices]
        in_bytes = [[len(text.encode()) for text in texts] for texts in choices]
        return {
            **choice_accuracy(predictions, characters, references),
            "acc_bytes": choice_accuracy(predictions, in_bytes, references)["acc_norm"],
        }


def choice_accuracy(
    log_likelihoods: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], gold: Sequence[int]
) -> dict[str, float]:
    """Accuracy of the likeliest choice, and of the likeliest for its length.

    Args:
        log_likelihoods: For each example, those of its choices, nats; minus infinity is allowed.
        lengths: For each example, those of its choices, in whatever unit they are to be normalised by.
        gold: For each example, the index of the right choice.

    Returns:
        `acc` and `acc_norm`, in [0, 1].

    Raises:
        ValueError: If sizes do not agree, a log-likelihood is NaN, a length is not positive, or an index is no choice.

    Example:
        >>> choice_accuracy([[-2.0, -2.0], [-3.0, -1.0]], [[1, 4], [1, 1]], [0, 1])
        {'acc': 1.0, 'acc_norm': 0.5}
    """
    hits = normalised_hits = 0
    for index, (scores, sizes, right) in enumerate(zip(log_likelihoods, lengths, gold, strict=True)):
        _check(index, scores, sizes, right)
        hits += _first_maximum(scores) == right
        normalised_hits += _first_maximum([score / size for score, size in zip(scores, sizes)]) == right
    return {"acc": hits / len(gold), "acc_norm": normalised_hits / len(gold)}


def _first_maximum(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _check(index: int, scores: Sequence[float], sizes: Sequence[int], right: int) -> None:
    if len(scores) != len(sizes) or not scores:
        raise ValueError(
            f"Example {index} has {len(scores)} log-likelihoods for {len(sizes)} choices. Pass one for each choice, "
            "and at least one."
        )
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"Example {index} has the log-likelihoods {list(scores)}. NaN cannot be compared.")
    if min(sizes) <= 0:
        raise ValueError(f"Example {index} has a choice of length {min(sizes)}. Pass choices that are not empty.")
    if not 0 <= right < len(scores):
        raise ValueError(f"Example {index} has the right choice {right}. Allowed: 0 to {len(scores) - 1}.")
