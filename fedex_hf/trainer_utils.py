"""What a run in rounds takes from `Trainer` and gives back to it: callbacks, the garbage collector, saved state."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import DEFAULT_CALLBACKS, DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME


def without_token(args: TrainingArguments) -> TrainingArguments:
    """A copy that can be written to a file."""
    args = copy.copy(args)
    args.hub_token = None
    return args


def default_callback_types(args: TrainingArguments) -> set[type]:
    """Types of the callbacks that every `Trainer` with these arguments gets by itself."""
    given = [*DEFAULT_CALLBACKS, *get_reporting_integration_callbacks(args.report_to)]
    return {*given, DEFAULT_PROGRESS_CALLBACK, ProgressCallback, PrinterCallback}


def adopted_from(trainer: Trainer) -> dict[str, Any]:
    """What a federation takes over from a configured `Trainer`, as arguments of `FederatedTrainer`."""
    defaults = default_callback_types(trainer.args)
    adopted: dict[str, Any] = {
        "model": trainer.model,
        "data_collator": trainer.data_collator,
        "eval_dataset": trainer.eval_dataset,
        "processing_class": trainer.processing_class,
        "compute_loss_func": trainer.compute_loss_func,
        "compute_metrics": trainer.compute_metrics,
        "callbacks": [each for each in trainer.callback_handler.callbacks if type(each) not in defaults],
        "optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "client_trainer_cls": type(trainer),
    }
    if type(trainer.args) is not TrainingArguments:
        adopted["client_trainer_kwargs"] = {"args": trainer.args}
    return adopted


@contextmanager
def frozen_garbage_collector() -> Iterator[None]:
    """Every `Trainer.train()` begins with a full collection, 0.2 s over torch's own objects; exempt what lives now."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def was_stopped_early(checkpoint: Path) -> bool:
    """Whether a callback had stopped the run by this checkpoint, as opposed to its last step being reached."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    control = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]
