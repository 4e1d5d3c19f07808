"""The GLUE tasks: columns, classes, metrics, and a `Task` for each (Wang et al. 2019, arXiv 1804.07461)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig, TaskType
from transformers import AutoModelForSequenceClassification, EvalPrediction, PreTrainedModel, set_seed

from fedex_hf.comparison.arguments import DataArguments, ModelArguments
from fedex_hf.comparison.task import Task
from fedex_hf.metrics import load_metric
from fedex_hf.tasks.data import DataError, check_text, hold_out, require_split, take


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedex_hf import FederatedTrainer

SCORE_BINS = 5  # of STS-B's scores, for partitions by label


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Args:
        columns: Columns of text, one or two.
        labels: Names of the classes in the Hub's order, or empty for a score.
        metric: Main metric, as in the GLUE leaderboard and the FedEx-LoRA paper (arXiv 2410.09432, Table 3).
        tests: Suffix of the test metrics -> split that they are computed on.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str = "accuracy"
    tests: Mapping[str, str] = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        object.__setattr__(self, "tests", self.tests or {"": "validation"})


_ENTAILMENT = ("entailment", "not_entailment")
GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews_correlation"),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": GlueTask(("sentence1", "sentence2"), (), "pearson"),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        tests={"": "validation_matched", "_mismatched": "validation_mismatched"},
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def glue_task(
    name: str,
    data: DatasetDict,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelArguments,
    args: DataArguments,
    partition_by: str | None = None,
) -> Task:
    """Build the `Task` of one GLUE task.

    GLUE hides the labels of its test splits, so the official validation split is the test here, and validation
    examples are held out of the training split: nothing is ever chosen on what is reported.

    Args:
        name: A key of `GLUE_TASKS`.
        data: Splits with the Hub's columns.
        where: Where `data` comes from, for messages.
        tokenizer: The model's.
        model: Which model and adapter.
        args: How much of the data.
        partition_by: Column that clients are formed by, if not by the label.

    Raises:
        DataError: If a split, a column or a label is missing, or a label is outside the head.
    """
    spec = GLUE_TASKS[name]
    columns = [*spec.columns, "label"]
    train = require_split(data, "train", where, columns if partition_by is None else [*columns, partition_by])
    tests = {suffix: require_split(data, split, where, columns) for suffix, split in spec.tests.items()}
    for split, rows in {"train": train, **{spec.tests[suffix]: rows for suffix, rows in tests.items()}}.items():
        check_text(rows, spec.columns, f"`{where}`, split `{split}`")
        check_labels(rows, spec, f"`{where}`, split `{split}`")
    train, validation = hold_out(train, args.validation_fraction, args.split_seed, f"`{where}`")
    limits = (args.max_train_examples, args.max_validation_examples)
    train, validation = (
        _prepare(take(rows, limit, args.split_seed), spec, tokenizer, args, partition_by)
        for rows, limit in zip((train, validation), limits)
    )
    tests = {
        suffix: _prepare(take(rows, args.max_test_examples, args.split_seed), spec, tokenizer, args)
        for suffix, rows in tests.items()
    }

    def test(trainer: FederatedTrainer, folder: Path) -> dict[str, float]:
        return test_metrics(trainer, tests)

    return Task(
        name=name,
        train=train,
        validation=validation,
        make_model=lambda seed: load_classifier(model, spec, tokenizer, seed),
        peft_config=LoraConfig(task_type=TaskType.SEQ_CLS, **model.lora_kwargs()),
        test=test,
        metric=spec.metric,
        validation_metric=spec.metric,
        greater_is_better=True,
        tests={name or "test": rows for name, rows in tests.items()},
        partition_by="label" if spec.labels else "score_bin",
        trainer_kwargs={"processing_class": tokenizer, "compute_metrics": Predictions(name)},
    )


def check_labels(dataset: Dataset, spec: GlueTask, where: str) -> None:
    """Refuse labels that the head has no place for.

    Raises:
        DataError: If a label is hidden (-1), no integer, or beyond the classes; for a score, if it is no number.
    """
    labels = dataset["label"][:]
    if not spec.labels:
        if not all(isinstance(label, (int, float)) and np.isfinite(label) for label in labels):
            raise DataError(f"{where}: column `label` has values that are no finite numbers. Drop those rows.")
        return
    allowed = range(len(spec.labels))
    outside = sorted({label for label in labels if type(label) is not int or label not in allowed}, key=str)
    if outside:
        hidden = " GLUE's test splits hide their labels as -1: use a split that has them." if -1 in outside else ""
        raise DataError(
            f"{where}: column `label` has {outside[:5]}, outside the head. Allowed: 0 to {len(allowed) - 1}, for "
            f"{', '.join(spec.labels)}.{hidden}"
        )


@dataclass
class Predictions:
    """`compute_metrics` of a GLUE task.

    Args:
        name: A key of `GLUE_TASKS`.
    """

    name: str

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = scores.argmax(axis=-1) if GLUE_TASKS[self.name].labels else scores.reshape(-1)
        metric = load_metric("glue", self.name)
        return {
            key: float(value)
            for key, value in metric.compute(predictions=predicted, references=prediction.label_ids).items()
        }


def test_metrics(trainer: FederatedTrainer, tests: Mapping[str, Dataset]) -> dict[str, float]:
    """Metrics of the trainer's model on the test splits, `loss` among them, without prefix."""
    result = {}
    for suffix, rows in tests.items():
        metrics = trainer.evaluate(rows, metric_key_prefix="test")
        for key, value in metrics.items():
            name = key.removeprefix("test_")
            if not name.endswith(("runtime", "per_second", "preparation_time")) and key.startswith("test_"):
                result[f"{name}{suffix}"] = float(value)
    return result


def load_classifier(
    args: ModelArguments, spec: GlueTask, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The pretrained encoder with a new head that depends on the seed alone."""
    set_seed(seed)
    labels: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if spec.labels:
        names = dict(enumerate(spec.labels))
        labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # that the head is new is what we want
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            str(args.model_name_or_path),
            revision=args.model_revision,
            **args.loading_kwargs(),
            ignore_mismatched_sizes=True,  # of the head of a model that was trained for other classes
            **labels,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _prepare(
    rows: Dataset,
    spec: GlueTask,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    partition_by: str | None = None,
) -> Dataset:
    def tokenize(batch: dict[str, list]) -> dict[str, Any]:
        encoded = tokenizer(
            *(batch[column] for column in spec.columns), truncation=True, max_length=args.max_seq_length
        )
        if not spec.labels:
            encoded["label"] = [float(label) for label in batch["label"]]
            encoded["score_bin"] = [min(int(label / 5 * SCORE_BINS), SCORE_BINS - 1) for label in batch["label"]]
        return encoded

    drop = [column for column in rows.column_names if column not in ("label", partition_by)]
    return rows.map(tokenize, batched=True, remove_columns=drop, num_proc=args.preprocessing_num_workers)
