"""What the benchmarks share: models and data made on the spot, quiet runs on them, and the report."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    HfArgumentParser,
    PrinterCallback,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging


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
    "small": Size(hidden=128, layers=2, heads=4, intermediate=256, vocab=512, batch=4, tokens=16),
    "20M": Size(hidden=384, layers=10, heads=12, intermediate=1536, vocab=8192, batch=8, tokens=32),
    "22M": Size(hidden=384, layers=6, heads=12, intermediate=1536, vocab=30522, batch=8, tokens=32),  # as MiniLM
    "135M-short": Size(hidden=768, layers=12, heads=12, intermediate=3072, vocab=64000, batch=1, tokens=32),
    "135M": Size(hidden=768, layers=12, heads=12, intermediate=3072, vocab=64000, batch=8, tokens=64),
}


def build_model(size: Size, rank: int = 4, targets: list[str] | str | None = None) -> PeftModel:
    """LoRA, by default on query and value, and the classification head trained in full; the same bytes every time."""
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
    lora = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=targets or ["query", "value"])
    return get_peft_model(RobertaForSequenceClassification(config), lora)


def build_data(size: Size, num_examples: int) -> Dataset:
    """Random tokens; the first one decides the label."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, size.vocab, (num_examples, size.tokens), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % 2).tolist()})


def training_arguments(cls: type[TrainingArguments], size: Size, output_dir: str, **kwargs: Any) -> Any:
    """Arguments of a run on the CPU that neither logs nor saves.

    Args:
        cls: What to make, `TrainingArguments` or a subclass.
        size: Whose batches to take.
        output_dir: As in `TrainingArguments`.
        kwargs: Further arguments.
    """
    return cls(
        output_dir=output_dir,
        per_device_train_batch_size=size.batch,
        learning_rate=1e-3,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **kwargs,
    )


def train(trainer: Trainer) -> int:
    """Train without printing; returns the number of optimizer steps."""
    trainer.remove_callback(PrinterCallback)
    return trainer.train().global_step


def shares_of(data: Dataset, clients: int) -> dict[str, Dataset]:
    """The data in equal parts, one per client."""
    return {f"client-{index}": data.shard(clients, index, contiguous=True) for index in range(clients)}


def resident_memory() -> int:
    """Memory of this process as the system counts it, bytes; 0 elsewhere than on Linux."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0


def run_in_child(script: str, flags: Mapping[str, Any], environment: Mapping[str, str], what: str) -> Any:
    """Run a script in a process of its own.

    Args:
        script: Its path.
        flags: Its flags; a list is several words, and `None` leaves the flag out.
        environment: Variables beside those of this process.
        what: What runs, for the message of a failure.

    Returns:
        What its last line says, as JSON.

    Raises:
        RuntimeError: If it fails.
    """
    words = [
        str(word)
        for flag, value in flags.items()
        if value is not None
        for word in (flag, *(value if isinstance(value, list) else [value]))
    ]
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_own_process(function: Callable[..., T], *args: Any) -> T:
    """What a function returns in a process forked for it: its allocator has seen nothing but what is imported.

    This one must not have used several of torch's threads before, which do not survive that, nor a GPU. Elsewhere than
    on Linux, where forking after the imports is not safe, the function runs in this process.
    """
    if sys.platform != "linux":
        return function(*args)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(_undisturbed, function, *args).result()


def _undisturbed(function: Callable[..., T], *args: Any) -> T:
    gc.freeze()  # a collection would write to the pages of all that is imported, and so copy them
    return function(*args)


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


def start(cls: type[T], description: str | None) -> T:
    """Read the arguments, silence the libraries and set torch's threads: what every benchmark begins with.

    Args:
        cls: The dataclass of arguments; its `threads` are torch's, whose own choice stays if `None`.
        description: What `--help` says first, line breaks kept.
    """
    args = parse_arguments(cls, description)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks for it
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


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


def publish(report: str, output: str | None, script: str, answer: str) -> None:
    """Print a report, and write it.

    Args:
        report: Markdown.
        output: A file, a folder to write `<script>.md` into, or `None`.
        script: The benchmark's path.
        answer: What was found, in a line of Markdown. Where an overview lies beside the page's folder, as
            `docs/benchmarks.md` does, its table's row that links to the page ends with it.
    """
    report += f"\nCommand: `python benchmarks/{Path(script).name} {shlex.join(sys.argv[1:])}`".rstrip(" `") + "`\n"
    print(report)
    if output is not None:
        path = Path(output)
        path = path if path.suffix == ".md" else path / f"{Path(script).stem}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report, encoding="utf-8")
        overview = path.absolute().parent.with_suffix(".md")
        if overview.is_file():
            lines = overview.read_text(encoding="utf-8").splitlines(keepends=True)
            overview.write_text("".join(_answered(line, path.name, answer) for line in lines), encoding="utf-8")


def _answered(line: str, page: str, answer: str) -> str:
    if not line.startswith("|") or f"/{page})" not in line:
        return line
    return f"{line.rstrip().rstrip('|').rpartition('|')[0]}| {answer} |\n"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "unknown"
