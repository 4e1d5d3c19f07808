"""What server and clients share: the model, the adapter, the arguments and the data."""

from __future__ import annotations

from typing import Any

from flwr.app import Context

from fedex_hf import FederatedTrainingArguments
from fedex_hf.comparison import DataArguments, ModelArguments, quiet
from fedex_hf.comparison.task import Task
from fedex_hf.tasks.data import load_data
from fedex_hf.tasks.glue import glue_task
from fedex_hf.tasks.models import load_tokenizer


def load_task(context: Context) -> Task:
    """Tokenised data, the model's maker and the adapter; the same everywhere but for a node's own data.

    A node with `data="folder"` in its `--node-config` uses the task's files in that folder instead of a part of the
    run's dataset.
    """
    quiet()
    config: dict[str, Any] = dict(context.run_config)
    name, where = config["task"], str(context.node_config.get("data", config["dataset"]))
    model = ModelArguments(
        model_name_or_path=config["model"],
        lora_r=config["lora-r"],
        lora_alpha=config["lora-alpha"],
        lora_target_modules=["query", "value"],
    )
    data = DataArguments(max_seq_length=config["max-seq-length"], max_train_examples=config["max-train-examples"])
    tokenizer = load_tokenizer(model, data.max_seq_length)
    return glue_task(name, load_data(where, name), f"{where}/{name}", tokenizer, model, data)


def arguments(context: Context, **more: Any) -> FederatedTrainingArguments:
    """Arguments of the run. Seeds and rounds must agree; `more` and a node's own changes are each side's affair."""
    config: dict[str, Any] = dict(context.run_config)
    return FederatedTrainingArguments(
        output_dir=config["output-dir"],
        aggregator=config["aggregator"],
        num_rounds=config["num-rounds"],
        learning_rate=config["learning-rate"],
        per_device_train_batch_size=config["batch-size"],
        per_device_eval_batch_size=64,
        seed=config["seed"],
        report_to="none",
        **more,
    )
