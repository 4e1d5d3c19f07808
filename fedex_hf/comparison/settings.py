"""What has to be the same for runs to be compared, and what is refused before any of them starts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import torch
import transformers
from accelerate import PartialState

from fedex_hf.comparison.arguments import ComparisonArguments, RecipeError, RecipeTrainingArguments
from fedex_hf.comparison.results import Run, RunResult, write_json
from fedex_hf.comparison.task import Task


SETTINGS = "settings.json"
_ROWS = "rows of "  # begins the settings that say which data a task has
# Arguments that may differ between the runs of one comparison, or that change no number.
_FREE = {
    "output_dir", "run_name", "disable_tqdm", "report_to", "log_level", "log_level_replica", "log_on_each_node",
    "logging_strategy", "logging_steps", "logging_first_step", "dataloader_num_workers", "preprocessing_num_workers",
    "aggregators", "aggregator", "aggregator_kwargs", "seeds", "seed", "local_epochs",
    "save_strategy", "save_steps", "save_total_limit", "log_layer_exactness", "dataloader_pin_memory",
    "local_rank", "ddp_backend", "ddp_timeout", "project", "dataloader_prefetch_factor", "skip_memory_metrics",
    "dataloader_persistent_workers", "torch_empty_cache_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps",  # they enter as `total_train_batch_size`
}  # fmt: skip


class ComparisonError(RecipeError):
    """The comparison cannot start, or its runs would not be comparable; the message says what to do."""


def check_training(training: RecipeTrainingArguments, comparison: ComparisonArguments) -> None:
    """Refuse arguments that a comparison of many runs cannot follow.

    Raises:
        ComparisonError: The message says what to do.
    """
    if training.push_to_hub:
        raise ComparisonError(
            "`push_to_hub` would publish every run of the comparison into one repository. Leave it out, and publish "
            "the run you want from its folder, with `fedex-hf push`."
        )
    if comparison.local_epochs is not None and training.max_steps > 0:
        raise ComparisonError(
            f"`max_steps={training.max_steps}` overrides epochs, so `local_epochs={comparison.local_epochs}` would "
            "all be the same. Leave one of them out."
        )
    if comparison.best_on_validation and training.save_strategy != "epoch":
        raise ComparisonError(
            f"`save_strategy={str(training.save_strategy)!r}` does not keep every round, so the best one on the "
            "validation split may not be there to be tested. Leave it out, or say `--best_on_validation False`."
        )
    if training.eval_delay or training.prediction_loss_only:
        raise ComparisonError(
            "`eval_delay` and `prediction_loss_only` leave rounds without validation metrics. Leave them out."
        )
    if training.eval_strategy != "epoch":
        raise ComparisonError(
            f"`eval_strategy={str(training.eval_strategy)!r}` is not supported: a comparison validates after every "
            'round, which is "epoch".'
        )
    if training.load_best_model_at_end:
        raise ComparisonError(
            "`load_best_model_at_end` would test the best round in place of the last. Leave it out: the best round is "
            "tested as well, under its own name."
        )


def settings_of(
    tasks: Sequence[Task],
    comparison: ComparisonArguments,
    training: RecipeTrainingArguments,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON values; of the data the SHA-256 of all rows."""
    free = _FREE | ({"num_train_epochs"} if comparison.local_epochs else set())
    own = {each.name for each in fields(training) if each.init}
    arguments = {
        name: value for name, value in training.to_dict().items() if name in own and not name.startswith("hub_")
    }
    everything = {
        **arguments,
        **settings,
        "best_on_validation": comparison.best_on_validation,
        "total_train_batch_size": training.train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size,
    }
    for task in tasks:
        everything[f"{_ROWS}{task.name}"] = hashlib.sha256("".join(task.digests.values()).encode()).hexdigest()
    return json.loads(json.dumps({name: value for name, value in everything.items() if name not in free}, default=str))


def check_settings(output_dir: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of a new comparison, or check that an earlier one is being continued.

    Raises:
        ComparisonError: If `output_dir` holds runs with other settings; the message names them.
    """
    path = output_dir / SETTINGS
    begun = any(output_dir.glob("runs/*/*/*/*/*"))
    before = json.loads(path.read_text(encoding="utf-8")) if begun and path.is_file() else {}
    # Tasks may be added, and the numbers of local epochs belong to the runs.
    free = {"num_train_epochs", *(name for name in {**before, **settings} if name.startswith(_ROWS))}
    names = [
        name
        for name in {**before, **settings}
        if before.get(name) != settings.get(name) and not (name in free and not (name in before and name in settings))
    ]
    if not before or not names:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, {**before, **settings})
    else:
        told = [f"`{name}` was {before.get(name)!r} and is {settings.get(name)!r}" for name in names[:5]]
        raise ComparisonError(
            f"`{output_dir}` holds runs with other settings: {'; '.join(told)}. Go on with the same settings, or name "
            "another `--output_dir`."
        )


def check_comparable(run: Run, start: str, data: str, others: Sequence[RunResult]) -> None:
    """Refuse to compare methods that started from different states or saw different splits.

    Raises:
        ComparisonError: The message names both runs.
    """
    for other in others:
        same_cell = (other.run.task, other.run.seed) == (run.task, run.seed)
        if same_cell and (other.start, other.data) != (start, data):
            what = "initial state" if other.start != start else "split over clients"
            raise ComparisonError(
                f"{describe(run)} and {describe(other.run)} do not have the same {what}, so they cannot be "
                "compared. Were model, data or versions changed in between? Use another `--output_dir`."
            )


def describe(run: Run) -> str:
    """A run in words."""
    return f"{run.task} {run.method}, seed {run.seed}, {run.local_epochs:g} local epochs"


def machine() -> dict[str, Any]:
    """Hardware and versions that the numbers come from."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        **{each.__name__: each.__version__ for each in (torch, transformers, peft, accelerate, datasets)},
    }
