"""Federated LoRA on GLUE: FedEx-LoRA beside FedIT, FFA-LoRA and centralized LoRA, over several seeds.

    python recipes/glue.py --config recipes/configs/glue_minilm.yaml --output_dir glue-output
    python recipes/glue.py --config recipes/configs/glue_roberta_base.yaml --tasks cola rte --output_dir roberta
    python recipes/glue.py --config recipes/configs/glue_minilm.yaml --dataset_name my/glue --dirichlet_alpha 0.5 \
        --seeds 0 1 2 --output_dir non-iid

The official validation split is the test; validation examples are held out of the training split. The same command
goes on where it was stopped. It writes results.json, results.md and plots into `--output_dir`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedex_hf.comparison import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    RecipeTrainingArguments,
    compare,
    parse_recipe,
    quiet,
    refusing,
)
from fedex_hf.tasks.data import load_data
from fedex_hf.tasks.glue import GLUE_TASKS, glue_task
from fedex_hf.tasks.models import load_tokenizer


@dataclass
class GlueArguments:
    """Which tasks."""

    tasks: list[str] = field(
        default_factory=lambda: ["cola", "rte", "mrpc", "sst2", "qnli", "stsb"],
        metadata={"help": "GLUE tasks.", "choices": list(GLUE_TASKS)},
    )
    dataset_name: str = field(
        default="nyu-mll/glue",
        metadata={"help": "Hub id, or a folder with one folder per task, each with train and validation files."},
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Token to pad with, for a tokenizer that has none, such as GPT-2's."}
    )


def main(argv: Sequence[str] | None = None, **defaults: Any) -> str:
    """Load and check all tasks, then compare; returns the folder of the results.

    Args:
        argv: Flags; those of the command line if `None`.
        defaults: Of arguments, for a recipe that builds on this one.
    """
    glue, comparison, model, data, training = parse_recipe(
        GlueArguments,
        ComparisonArguments,
        ModelArguments,
        DataArguments,
        RecipeTrainingArguments,
        description=__doc__.split("\n\n")[0],
        # Classification heads take the mean over their own process's rows, whatever `num_items_in_batch` says; scaled
        # for several processes on top of that (transformers 5.23), their gradient would be that many times too large.
        defaults={"average_tokens_across_devices": False, **defaults},
        argv=argv,
    )
    quiet()
    with refusing():
        tokenizer = load_tokenizer(model, data.max_seq_length, glue.pad_token)
        tasks = [
            glue_task(
                name,
                load_data(glue.dataset_name, name),
                f"{glue.dataset_name}/{name}",
                tokenizer,
                model,
                data,
                training.partition_by,
            )
            for name in dict.fromkeys(glue.tasks)
        ]
        settings = {"dataset_name": glue.dataset_name, "pad_token": glue.pad_token, **asdict(model), **asdict(data)}
        compare(tasks, comparison, training, settings)
    return training.output_dir


if __name__ == "__main__":
    main()
