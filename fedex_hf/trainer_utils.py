"""What a run in rounds takes from `Trainer` and gives back to it: callbacks, the garbage collector, saved state."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, TrainingArguments
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
