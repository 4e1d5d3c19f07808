"""Tests whose generated answers are right or wrong, row by row: the metrics of fedex_hf.metrics are the shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fedex_hf.comparison.arguments import RecipeError
from fedex_hf.metrics import load_metric, missing_requirements
from fedex_hf.tasks.completion import tokenize_completions
from fedex_hf.tasks.data import DataError
from fedex_hf.tasks.generation import GenerationArguments, check_prompts, generate, save_outputs


class MetricError(RecipeError):
    """A metric that was asked for cannot be computed here; the message says what to do."""


@dataclass(frozen=True)
class GradedTest:
    """A test split, ready to be answered by any model of one kind.

    Args:
        name: Of the test; its outputs lie in a file of that name.
        metric: `"gsm8k"`, `"math"` or `"commonsense"`, whose config is the test's name.
        prompts, references: One of each per row.
        tokenized: Prompts with their reference completions, for the loss.
        context: Most tokens the model takes.
    """

    name: str
    metric: str
    prompts: list[str]
    references: list[str]
    tokenized: Dataset
    context: int | None

    @classmethod
    def prepare(
        cls,
        name: str,
        metric: str,
        rows: Dataset,
        reference: str,
        make_prompt: Callable[[Mapping[str, Any]], str],
        make_completion: Callable[[Mapping[str, Any]], str],
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        max_new_tokens: int,
        where: str,
    ) -> GradedTest:
        """Make a test of rows, whose references are in the column `reference`; `where` begins messages.

        Raises:
            DataError: If a row has no usable reference, or a prompt is too long.
        """
        prompts, references = [make_prompt(row) for row in rows], rows[reference][:]
        check_references(metric, references, where, name)
        check_prompts(tokenizer, prompts, max_new_tokens, context, where)
        tokenized = tokenize_completions(
            rows, tokenizer, make_prompt, make_completion, context, where, limit_name="context"
        )
        return cls(name, metric, prompts, references, tokenized, context)

    def run(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationArguments,
        folder: Path,
    ) -> float:
        """Have all prompts answered, and save the outputs.

        Returns:
            The share of right answers.
        """
        outputs = generate(
            model,
            tokenizer,
            self.prompts,
            generation.generation_batch_size,
            description=self.name,
            context=self.context,
            **generation.decoding(),
        )
        correct = grade(self.metric, outputs, self.references, self.name)
        rows = rows_to_read(self.prompts, outputs, self.references, correct=correct)
        save_outputs(folder / f"{self.name}.jsonl", rows)
        return sum(correct) / len(correct)


def grade(metric: str, outputs: Sequence[str], references: Sequence[str], config: str | None = None) -> list[bool]:
    """Tell which outputs are right, as the metric itself does: its value is their share.

    Args:
        metric: `"gsm8k"`, `"math"` or `"commonsense"`.
        outputs: What the model wrote.
        references: As for the metric.
        config: The data set of `commonsense`.

    Example:
        >>> grade("gsm8k", ["She has 1,000.", "None."], ["... #### 1000", "#### 3"])
        [True, False]
    """
    return _load(metric, config).matches(outputs, references)


def check_references(metric: str, references: Sequence[Any], where: str, config: str | None = None) -> None:
    """Refuse references that no output could be compared with, before anything is trained.

    Args:
        metric, references, config: As for `grade`.
        where: Begins the message.

    Raises:
        DataError: With the first one, and what is expected.
    """
    grader = _load(metric, config)
    bad = [index for index, text in enumerate(references) if not isinstance(text, str) or grader.gold(text) is None]
    if bad:
        raise DataError(
            f"{where}: {len(bad)} of {len(references)} rows have no reference to compare with, row {bad[0]} first: "
            f"{str(references[bad[0]])[-80:]!r}. Expected: {grader.expected}. Correct or drop those rows."
        )


def computable(metric: str, scores: Sequence[str] | None, skip_missing: bool) -> list[str]:
    """Which scores of a metric can be computed here, told before anything is trained.

    Args:
        metric: Its name.
        scores: The scores that are wanted; `None` if the metric has one alone.
        skip_missing: Go on without those that lack something, and say so.

    Returns:
        The scores, or the metric's own name if it has one alone; without what was left out.

    Raises:
        MetricError: If one lacks something and must not be left out.
    """
    names = [metric] if scores is None else list(scores)
    lacking = {name: missing_requirements(metric, None if scores is None else [name]) for name in names}
    left_out = [name for name, sentences in lacking.items() if sentences]
    if left_out:
        sentences = " ".join(dict.fromkeys(sentence for name in left_out for sentence in lacking[name]))
        told = f"The metric `{metric}` cannot be computed here ({', '.join(left_out)}). {sentences}"
        if not skip_missing:
            raise MetricError(f"{told} Or go on without, with `--skip_missing_metrics`. Nothing was trained.")
        print(f"{told} The results go without.", flush=True)
    return [name for name in names if name not in left_out]


def rows_to_read(
    prompts: Sequence[str], outputs: Sequence[str], references: Sequence[Any], **columns: Sequence[Any]
) -> list[dict[str, Any]]:
    """Outputs beside their prompts and references, with further columns such as `correct`."""
    named = {"prompt": prompts, "output": outputs, "references": references, **columns}
    return [dict(zip(named, values)) for values in zip(*named.values())]


def _load(metric: str, config: str | None) -> Any:
    """The metric; the test's name is the config of `commonsense` alone."""
    return load_metric(metric, config if metric == "commonsense" else None)
