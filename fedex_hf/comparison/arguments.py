"""Arguments that all recipes share, and how they are read: flags, over a YAML file named by `--config`."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
import yaml
from transformers import BitsAndBytesConfig, HfArgumentParser

from fedex_hf.comparison.methods import CENTRALIZED, Method
from fedex_hf.training_args import FederatedTrainingArguments


class RecipeError(ValueError):
    """A recipe cannot do what it was asked to; the message says what to do."""


@contextmanager
def refusing() -> Iterator[None]:
    """End the process with the message of a `RecipeError` alone: a traceback would hide it."""
    try:
        yield
    except RecipeError as error:
        raise SystemExit(str(error)) from error


def quiet() -> None:
    """Silence what says nothing about a run: bars of mapping and of model loading."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks for it
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")


@dataclass
class ComparisonArguments:
    """Which methods are compared, and how often."""

    aggregators: list[str] = field(
        default_factory=lambda: ["fedex", "fedit", "ffa", CENTRALIZED],
        metadata={
            "help": "Methods to compare: names of aggregators, with arguments as in fedex:residual_rank=8, and "
            "centralized, which is one client that holds everything."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "One run per method and seed; a seed decides partition, initial state and batches."},
    )
    local_epochs: list[float] | None = field(
        default=None,
        metadata={"help": "Compare several numbers of epochs per client and round. Default: --num_train_epochs."},
    )
    best_on_validation: bool = field(
        default=True,
        metadata={"help": "Also test the round that was best on the validation split, reported under that name."},
    )

    def __post_init__(self) -> None:
        for name in ("aggregators", "seeds", "local_epochs"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) != len(values)):
                raise ValueError(f"`{name}={values}` is not allowed. Name at least one, and each once.")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"`seeds={self.seeds}` is not allowed. Allowed: integers of at least 0.")
        if self.local_epochs is not None and min(self.local_epochs) <= 0:
            raise ValueError(f"`local_epochs={self.local_epochs}` is not allowed. Allowed: numbers above 0.")
        for name in self.aggregators:
            Method.parse(name)


@dataclass
class ModelArguments:
    """The model and its adapter."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local folder of a model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the base. A base in 16 bits stays as it is; residuals ride beside it in float32.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the base in 4 bits (nf4, bitsandbytes); it computes in --dtype."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base in 8 bits (int8, bitsandbytes)."})
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha; updates are scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules to adapt, or all-linear. Default: PEFT's for the model type."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale updates by alpha / sqrt(rank) instead."})

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"`lora_r={self.lora_r}` is not allowed. Allowed: at least 1.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`load_in_4bit` and `load_in_8bit` are both set. A base has one of them.")
        if (self.load_in_4bit or self.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "`load_in_4bit` and `load_in_8bit` need bitsandbytes: `pip install 'fedex-hf[quantization]'`."
            )

    def loading_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that decide how the base is stored."""
        dtype = getattr(torch, self.dtype)
        if not (self.load_in_4bit or self.load_in_8bit):
            return {"dtype": dtype}
        quantization = BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=self.load_in_4bit,
        )
        return {"dtype": dtype, "quantization_config": quantization}

    def lora_kwargs(self) -> dict[str, Any]:
        """Arguments of `LoraConfig`."""
        targets: list[str] | str | None = self.lora_target_modules
        if targets == ["all-linear"]:
            targets = "all-linear"
        return {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets,
            "use_rslora": self.use_rslora,
        }


@dataclass
class DataArguments:
    """How much data is used. Where it comes from is a recipe's own argument."""

    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Use that many, drawn by --split_seed."})
    max_validation_examples: int | None = field(default=None, metadata={"help": "Likewise, for validation."})
    max_test_examples: int | None = field(default=None, metadata={"help": "Likewise, for the test."})
    validation_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the training examples held out where the data set has no validation split."},
    )
    split_seed: int = field(
        default=0, metadata={"help": "Draws the held-out and the limited examples: the same for all seeds."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "max_train_examples", "max_validation_examples", "max_test_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` is not allowed. Allowed: at least 1.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction={self.validation_fraction}` is out of range. Allowed: (0, 1).")


@dataclass
class RecipeTrainingArguments(FederatedTrainingArguments):
    """`FederatedTrainingArguments` with the defaults of a comparison: the run decides seed and aggregator."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the runs, the tables and the plots."})
    eval_strategy: str = field(default="epoch", metadata={"help": "epoch validates after every round; no never."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the last and the best one."})
    log_layer_exactness: bool = field(default=True, metadata={"help": "Keep every layer's deviation for the plots."})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("`output_dir` is missing. Name a folder for the runs, the tables and the plots.")
        super().__post_init__()
        fixed = {"aggregator": "fedex", "aggregator_kwargs": None, "seed": 42}
        instead = {
            "aggregator": "--aggregators",
            "aggregator_kwargs": "--aggregators name:key=value",
            "seed": "--seeds",
        }
        for name, default in fixed.items():
            if getattr(self, name) != default:
                raise ValueError(f"`{name}` is decided run by run in a comparison. Use `{instead[name]}`.")


def parse_recipe(
    *classes: type, description: str, defaults: Mapping[str, Any] | None = None, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Read a recipe's arguments; ends the process with a message and no traceback if they are not allowed.

    Args:
        classes: Dataclasses, as for `HfArgumentParser`.
        description: Shown by `--help`.
        defaults: The recipe's own defaults for fields of shared classes.
        argv: Flags; `sys.argv` if `None`. `--config file.yaml` gives values that further flags override.

    Returns:
        One instance per class.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        cast(Any, classes),
        description=description,
        epilog="--config FILE.yaml: read arguments from a file; flags win over it.",
    )
    try:
        parser.set_defaults(**_known(defaults or {}, parser, "the recipe"))
        while "--config" in argv:
            at = argv.index("--config")
            if at + 1 == len(argv):
                raise ValueError("`--config` names no file. Give a YAML file, such as one of recipes/configs.")
            file = argv[at + 1]
            argv = flags_of(_known(read_config(file), parser, f"`{file}`")) + argv[:at] + argv[at + 2 :]
        return parser.parse_args_into_dataclasses(argv)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"Nothing was trained. {error}") from error


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of arguments.

    Raises:
        ValueError: If it is no mapping from names to values.
    """
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` holds a {type(content).__name__}. Allowed: lines of `argument: value`.")
    return content


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """The same arguments as flags, so that a file passes the same checks as a command line.

    Example:
        >>> flags_of({"seeds": [0, 1], "learning_rate": 1e-3, "bf16": True, "max_train_examples": None})
        ['--seeds', '0', '1', '--learning_rate', '0.001', '--bf16', 'True']
    """
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, items)]
    return flags


def _known(values: Mapping[str, Any], parser: HfArgumentParser, where: str) -> dict[str, Any]:
    names = {action.dest for action in parser._actions}
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(f"{where} sets `{'`, `'.join(unknown)}`, which this recipe does not know. See `--help`.")
    return dict(values)
