"""Training a causal language model on completions: labels are masked on the prompt, the loss is theirs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, TaskType
from transformers import AutoConfig, DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from fedex_hf.comparison.arguments import DataArguments, ModelArguments
from fedex_hf.comparison.task import Task
from fedex_hf.tasks.data import (
    DataError,
    check_columns,
    check_text,
    find_split,
    hold_out,
    load_data,
    require_split,
    take,
)
from fedex_hf.tasks.models import ModelError, context_length, load_causal_lm, load_tokenizer


if TYPE_CHECKING:
    from fedex_hf import FederatedTrainer

logger = logging.get_logger(__name__)

IGNORED = -100  # label that no loss counts
Text = Callable[[Mapping[str, Any]], str]


@dataclass
class CompletionArguments:
    """How texts become tokens."""

    pad_token: str | None = field(
        default=None, metadata={"help": "Token to pad with, for a tokenizer that has none, such as GPT-2's."}
    )
    skip_long_prompts: bool = field(
        default=False,
        metadata={
            "help": "Leave out training and validation examples whose prompt leaves no room for a completion in "
            "--max_seq_length, and say how many, rather than refuse."
        },
    )


def load_completion_tokenizer(
    model: ModelArguments, data: DataArguments, args: CompletionArguments
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which can end and pad completions.

    Raises:
        ModelError: If it cannot, or the model takes fewer tokens than `max_seq_length`.
    """
    tokenizer = load_tokenizer(model, data.max_seq_length, args.pad_token)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of `{model.model_name_or_path}` has no token that ends a text, so a model trained with it "
            "would never stop. Set `eos_token` in its `tokenizer_config.json`, or take another model."
        )
    tokenizer.padding_side = "right"  # for training: models with learned positions count them from the first token
    return tokenizer


def context_of(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens that the model takes; `None` if it does not say."""
    return context_length(
        AutoConfig.from_pretrained(str(model.model_name_or_path), revision=model.model_revision), tokenizer
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokens of a text that goes on: with the tokenizer's own beginning, such as BOS, but without an end."""
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    ended = bool(ids) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
    if ended and len(ids) > len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]):
        return ids[:-1]
    return ids


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows it.

    The prompt's are those that generation begins with. The completion's are its tokens within the whole text, which
    adds no space in front of it as SentencePiece would; where a token of the whole text reaches over the boundary,
    the completion is tokenised by itself.

    Returns:
        Both without the token that ends the text.
    """
    begin, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + completion)
    if whole[: len(begin)] == begin:
        return begin, whole[len(begin) :]
    return begin, tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]


def tokenize_completions(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    make_prompt: Text,
    make_completion: Text,
    max_seq_length: int | None,
    where: str,
    *,
    limit_name: str = "--max_seq_length",
    keep: Sequence[str] = (),
    skip_long_prompts: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise rows as prompt, completion and end; labels are `IGNORED` on the prompt.

    Args:
        dataset: Rows as they came.
        tokenizer: The model's.
        make_prompt, make_completion: Row -> text.
        max_seq_length: Longest example in tokens; longer completions are cut, and it is said how many.
        where: Begins each message.
        limit_name: What `max_seq_length` is in messages.
        keep: Columns of `dataset` to keep.
        skip_long_prompts: Leave out rows without room for a single token of the completion.
        num_proc: Processes.

    Returns:
        `input_ids`, `attention_mask` and `labels`, not padded, beside the columns to keep.

    Raises:
        DataError: If a prompt leaves no room, or none is left.
    """
    limit = max_seq_length or 10**9

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = encode_pair(tokenizer, make_prompt(row), make_completion(row))
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        return {
            "input_ids": ids[:limit],
            "attention_mask": [1] * min(len(ids), limit),
            "labels": labels[:limit],
            "prompt_tokens": len(prompt),
            "all_tokens": len(ids),
        }

    drop = [column for column in dataset.column_names if column not in keep]
    rows = dataset.map(tokenize, remove_columns=drop, num_proc=num_proc)
    prompts, lengths = rows["prompt_tokens"][:], rows["all_tokens"][:]
    rows = rows.remove_columns(["prompt_tokens", "all_tokens"])
    fitting = [index for index, length in enumerate(prompts) if length < limit]
    if len(fitting) < len(rows):
        told = (
            f"{where}: {len(rows) - len(fitting)} of {len(rows)} prompts leave no room for a completion in "
            f"`{limit_name} {max_seq_length}`; the longest has {max(prompts)} tokens."
        )
        if not skip_long_prompts or not fitting:
            raise DataError(f"{told} Raise it, drop those rows, or leave them out with `--skip_long_prompts`.")
        logger.warning(f"{told} They are left out.")
        rows = rows.select(fitting)
    cut = sum(lengths[index] > limit for index in fitting)
    if cut:
        logger.warning(
            f"{where}: {cut} of {len(rows)} completions are cut at `{limit_name} {max_seq_length}`; the longest "
            f"example has {max(lengths[index] for index in fitting)} tokens."
        )
    return rows


def training_splits(
    data: DatasetDict,
    where: str,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    make_prompt: Text,
    make_completion: Text,
    args: DataArguments,
    completion: CompletionArguments,
    partition_by: str | None = None,
) -> tuple[Dataset, Dataset]:
    """Training and validation examples, tokenised; without a validation split, some are held out of the training.

    Raises:
        DataError: If a split, a row or a column is missing, a column does not hold text, or a prompt is too long.
    """
    keep = [] if partition_by is None else [partition_by]
    train = require_split(data, "train", where, [*columns, *keep])
    validation = find_split(data, "validation")
    if validation is None:
        train, validation = hold_out(train, args.validation_fraction, args.split_seed, f"`{where}`")
    check_columns(validation, columns, f"`{where}`, split `validation`")
    for split, rows in (("train", train), ("validation", validation)):
        check_text(rows, columns, f"`{where}`, split `{split}`")
    splits = {
        "train": take(train, args.max_train_examples, args.split_seed),
        "validation": take(validation, args.max_validation_examples, args.split_seed),
    }
    train, validation = (
        tokenize_completions(
            rows,
            tokenizer,
            make_prompt,
            make_completion,
            args.max_seq_length,
            f"`{where}`, split `{split}`",
            keep=keep if split == "train" else (),
            skip_long_prompts=completion.skip_long_prompts,
            num_proc=args.preprocessing_num_workers,
        )
        for split, rows in splits.items()
    )
    return train, validation


def load_test_rows(name: str, config: str | None, columns: Sequence[str], flag: str, args: DataArguments) -> Dataset:
    """Rows of a test split, or of a local file that is one.

    Raises:
        DataError: If there is no such data, row or column, or one does not hold text.
    """
    data = load_data(name, config, flag)
    if Path(name).is_file():
        data = DatasetDict(test=data["train"])
    rows = require_split(data, "test", name, columns)
    check_text(rows, columns, f"`{name}`, split `test`")
    return take(rows, args.max_test_examples, args.split_seed)


def completion_task(
    name: str,
    train: Dataset,
    validation: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelArguments,
    test: Callable[[FederatedTrainer, Path], Mapping[str, float]],
    metric: str,
    references: Dataset,
    partition_by: str | None = None,
) -> Task:
    """The `Task` of a causal language model that is validated by its loss on completions, as `mean_nll` has it.

    What is trained on is `Trainer`'s loss, with label smoothing if it is asked for. `references` are the test rows,
    tokenised.
    """
    return Task(
        name=name,
        train=train,
        validation=validation,
        make_model=lambda seed: load_causal_lm(model, seed),
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, **model.lora_kwargs()),
        test=test,
        metric=metric,
        validation_metric="loss",
        greater_is_better=False,
        tests={"test": references},
        partition_by=partition_by,
        trainer_kwargs={
            "processing_class": tokenizer,
            "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            "preprocess_logits_for_metrics": row_nll,
            "compute_metrics": mean_nll,
        },
    )


def loss_on(trainer: FederatedTrainer, references: Dataset) -> float:
    """`mean_nll` of tokenised test references."""
    return float(trainer.evaluate(references, metric_key_prefix="test")["test_loss"])


def row_nll(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row's completion: all that evaluation keeps of the logits.

    Args:
        logits: Of shape `(rows, length, vocabulary)`; the first, if the model returns more.
        labels: Of shape `(rows, length)`, `IGNORED` on prompts and padding.

    Returns:
        Sums in nats and numbers of tokens, of shape `(rows, 2)`, float32.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    predicted, wanted = logits[:, :-1], labels[:, 1:]
    sums = [  # row by row: in float32, the logits of a batch are large
        torch.nn.functional.cross_entropy(row.float(), tokens, ignore_index=IGNORED, reduction="sum")
        for row, tokens in zip(predicted, wanted)
    ]
    return torch.stack([torch.stack(sums), (wanted != IGNORED).sum(dim=1).float()], dim=1)


def mean_nll(prediction: EvalPrediction) -> dict[str, float]:
    """Mean negative log-likelihood of completions per token, nats, from what `row_nll` keeps.

    Replaces the loss that `Trainer` reports, a mean of means of batches, with label smoothing: that depends on the
    batch size and on how rows are put together.
    """
    total, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {"loss": float(total / tokens)}
