"""What a recipe brings to a comparison: one `Task` per data set, the same for all methods and seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from fedex_hf import FederatedTrainer


@dataclass(frozen=True)
class Task:
    """One data set with everything that all methods and seeds share.

    Args:
        name: Short name, such as `"sst2"`; a folder is named after it.
        train: Training examples, tokenised; they are partitioned over the clients with the run's seed.
        validation: Examples that were held out of training; what is chosen, is chosen on these.
        make_model: Seed -> the pretrained model without adapter, whose new parts (a head) depend on the seed alone.
        peft_config: The adapter, initialised with the run's seed.
        test: Computes the test metrics of the trainer's model, as fractions or in the metric's own unit. May write
            readable outputs into the folder it is given.
        metric: Main key of what `test` returns.
        validation_metric: Key of the validation metrics (without `eval_`) that is followed and chosen by.
        greater_is_better: Whether a larger `validation_metric` is better.
        tests: Name -> the rows that `test` is computed on, by which a changed test is told from the same one.
        partition_by: Column of discrete labels for Dirichlet partitions, where the user names none.
        trainer_kwargs: Further arguments of `FederatedTrainer`, such as `processing_class` and `compute_metrics`.
        client_trainer_cls: The class of the local fits.
    """

    name: str
    train: Dataset
    validation: Dataset
    make_model: Callable[[int], PreTrainedModel]
    peft_config: PeftConfig
    test: Callable[[FederatedTrainer, Path], Mapping[str, float]]
    metric: str
    validation_metric: str
    greater_is_better: bool
    tests: Mapping[str, Dataset] = field(default_factory=dict)
    partition_by: str | None = None
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    client_trainer_cls: type[Trainer] = Trainer

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the rows of each split: read once, whatever the number of runs."""
        splits = {"train": self.train, "validation": self.validation}
        splits |= {f"test {name}": rows for name, rows in self.tests.items()}
        return {name: digest_of_rows(rows) for name, rows in splits.items()}


def digest_of_rows(dataset: Dataset) -> str:
    """SHA-256 of a dataset's values, whatever way it was made."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        digest.update(repr(batch.to_pydict()).encode())
    return digest.hexdigest()
