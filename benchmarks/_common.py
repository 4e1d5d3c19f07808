"""What the benchmarks share: models and data made on the spot, and the report."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import HfArgumentParser, RobertaConfig, RobertaForSequenceClassification


T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """A RoBERTa classifier with random weights, and the batches it is trained on.

    Args:
        hidden, layers, heads, intermediate, vocab: As in `RobertaConfig`.
        batch: Sequences per batch.
        tokens: Tokens per sequence, no padding.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    batch: int
    tokens: int


SIZES = {
    "tiny": Size(hidden=32, layers=2, heads=4, intermediate=64, vocab=512, batch=4, tokens=16),
    "20M": Size(hidden=384, layers=10, heads=12, intermediate=1536, vocab=8192, batch=8, tokens=32),
}


def build_model(size: Size, rank: int = 4) -> PeftModel:
    """LoRA on query and value, and the classification head trained in full; the same bytes at every call."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=size.tokens + 4,
        num_labels=2,
        pad_token_id=0,
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    return get_peft_model(RobertaForSequenceClassification(config), lora)


def build_data(size: Size, num_examples: int) -> Dataset:
    """Random tokens; the first one decides the label."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, size.vocab, (num_examples, size.tokens), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % 2).tolist()})


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_arguments(cls: type[T], description: str | None) -> T:
    """Read a dataclass of arguments from the command line.

    Args:
        cls: The dataclass.
        description: What `--help` says first, line breaks kept.
    """
    parser = HfArgumentParser(cls, description=description, formatter_class=_Formatter)
    return parser.parse_args_into_dataclasses()[0]


def describe_model(name: str, rank: int = 4) -> str:
    """The model in words, its sizes counted."""
    size, model = SIZES[name], build_model(SIZES[name], rank)
    trained, total = model.get_nb_trainable_parameters()
    return (
        f"`{name}`: RoBERTa, {size.layers} layers of width {size.hidden}, {total / 1e6:.3g}M parameters, {trained:,} "
        f"of them trained (LoRA of rank {rank} on query and value, and the head); batches of {size.batch} x "
        f"{size.tokens} tokens"
    )


def describe_machine() -> str:
    """Processor, threads and versions of this run."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{_processor()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads, load "
        f"{_load()}; {platform.system()}, Python {platform.python_version()}, {versions}"
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are right-aligned."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def publish(report: str, output: str | None, script: str) -> None:
    """Print a report, and write it.

    Args:
        report: Markdown.
        output: A file, a folder to write `<script>.md` into, or `None`.
        script: The benchmark's path.
    """
    report += f"\nCommand: `python benchmarks/{Path(script).name} {shlex.join(sys.argv[1:])}`".rstrip(" `") + "`\n"
    print(report)
    if output is not None:
        path = Path(output)
        path = path if path.suffix == ".md" else path / f"{Path(script).stem}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report, encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "unknown"
