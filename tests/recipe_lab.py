"""A few rows of GLUE's form and a tiny encoder with its tokenizer, in folders: what recipe tests run on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fedex_hf.tasks.glue import GLUE_TASKS


GOOD, BAD = ("good", "fine", "great", "warm"), ("bad", "poor", "sad", "cold")
NEUTRAL = ("the", "film", "was", "and", "play", "a")
WORDS = (*GOOD, *BAD, *NEUTRAL)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def glue_rows(task: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a task's columns whose label can be told from their words."""
    spec, draw = GLUE_TASKS[task], random.Random(f"{task} {seed}")
    rows = []
    for index in range(number):
        label = index % max(len(spec.labels), 2)
        words = [draw.choice(GOOD if label % 2 else BAD), *draw.sample(NEUTRAL, 3)]
        row: dict[str, Any] = {column: " ".join(draw.sample(words, len(words))) for column in spec.columns}
        rows.append({**row, "label": label if spec.labels else 5.0 * label, "idx": index})
    return rows


def glue_folder(root: Path, tasks: Sequence[str], train: int = 40, test: int = 16) -> Path:
    """A folder of folders as `--dataset_name` of `recipes/glue.py` takes it."""
    for task in tasks:
        write_rows(root / task / "train.jsonl", glue_rows(task, train))
        for split in GLUE_TASKS[task].tests.values():
            write_rows(root / task / f"{split}.jsonl", glue_rows(task, test, seed=1))
    return root


def encoder(folder: Path, positions: int = 24) -> Path:
    """A BERT of 2 layers and 16 units, with a tokenizer of whole words."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=positions,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=positions,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def glue_flags(root: Path, **more: Any) -> list[str]:
    """Flags of a run of `recipes/glue.py` that takes seconds; `None` leaves a flag out."""
    flags: dict[str, Any] = {
        "tasks": "sst2",
        "dataset_name": root / "glue",
        "model_name_or_path": root / "model",
        "output_dir": root / "out",
        "max_seq_length": 16,
        "num_rounds": 2,
        "num_clients": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "lora_r": 2,
        "lora_target_modules": "query value",
        "aggregators": "fedex fedit",
        "use_cpu": True,
    } | more
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", *str(value).split())]
