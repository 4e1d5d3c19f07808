"""Federated LoRA on commonsense reasoning: FedEx-LoRA beside FedIT, FFA-LoRA and centralized LoRA, over several seeds.

    python recipes/commonsense.py --config recipes/configs/commonsense_llama.yaml \
        --eval_dataset_dir LLM-Adapters/dataset --output_dir commonsense-output
    python recipes/commonsense.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name LLM-Adapters/dataset \
        --eval_dataset_dir LLM-Adapters/dataset --scoring both --num_clients 3 --partition_by set --output_dir by-set

Trains on Commonsense170K, or on the training files of its sets, and is tested on each of the eight: BoolQ, PIQA, SIQA,
HellaSwag, WinoGrande, ARC easy and challenge, OpenBookQA. Answers are generated, as in the paper, chosen by their
log-likelihood, or both. Rounds are validated by the loss on training examples that were held out; nothing is chosen on
a test split. The outputs lie in one file per set of each run; results.json, results.md and plots in `--output_dir`.
The same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from fedex_hf import FederatedTrainer
from fedex_hf.comparison import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    RecipeTrainingArguments,
    Task,
    compare,
    parse_recipe,
    quiet,
    refusing,
)
from fedex_hf.tasks.choices import ChoiceTest
from fedex_hf.tasks.completion import (
    CompletionArguments,
    completion_task,
    context_of,
    load_completion_tokenizer,
    load_test_rows,
    loss_on,
    training_splits,
)
from fedex_hf.tasks.data import DataError, check_columns, check_text, find_split, load_data
from fedex_hf.tasks.generation import GenerationArguments
from fedex_hf.tasks.grading import GradedTest
from fedex_hf.tasks.prompts import (
    COMMONSENSE_SETS,
    commonsense_choices,
    commonsense_completion,
    commonsense_kind,
    commonsense_prompt,
)


COLUMNS = ("instruction", "input", "output")


@dataclass
class CommonsenseArguments:
    """Which data, and how answers are scored."""

    dataset_name: str = field(
        default="zwhe99/commonsense_170k",
        metadata={
            "help": "Training data in the form of LLM-Adapters: Hub id, local file, or a folder with one folder per "
            "set, whose training files are put together."
        },
    )
    eval_dataset_dir: str = field(
        default="dataset",
        metadata={"help": "Folder with one folder per set, as dataset of LLM-Adapters, each with a test file."},
    )
    eval_sets: list[str] = field(
        default_factory=lambda: list(COMMONSENSE_SETS),
        metadata={"help": "Sets to test on.", "choices": list(COMMONSENSE_SETS)},
    )
    scoring: str = field(
        default="generated",
        metadata={
            "help": "generated: the first answer in the generated text. choices: the most likely of the allowed "
            "answers, with the suffix _choices, and the most likely per character, with _choices_norm. both: "
            "generated and choices.",
            "choices": ["generated", "choices", "both"],
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Load and check everything, then compare."""
    commonsense, completion, generation, comparison, model, data, training = parse_recipe(
        CommonsenseArguments,
        CompletionArguments,
        GenerationArguments,
        ComparisonArguments,
        ModelArguments,
        DataArguments,
        RecipeTrainingArguments,
        description=__doc__.split("\n\n")[0],
        defaults={"max_seq_length": 256, "max_new_tokens": 32, "validation_fraction": 0.01},
        argv=argv,
    )
    quiet()
    with refusing():
        tokenizer = load_completion_tokenizer(model, data, completion)
        task = commonsense_task(commonsense, tokenizer, completion, generation, model, data, training.partition_by)
        settings = {**asdict(commonsense), **asdict(completion), **generation.decoding()}
        compare([task], comparison, training, {**settings, **asdict(model), **asdict(data)})


def commonsense_task(
    commonsense: CommonsenseArguments,
    tokenizer: PreTrainedTokenizerBase,
    completion: CompletionArguments,
    generation: GenerationArguments,
    model: ModelArguments,
    data: DataArguments,
    partition_by: str | None,
) -> Task:
    """The task, with a share of right answers for each set, and the loss on all their references."""
    folders = folders_of_tests(commonsense)
    context = context_of(model, tokenizer)
    partition_by = partition_by or "kind"
    train, validation = training_splits(
        load_training(commonsense.dataset_name),
        commonsense.dataset_name,
        COLUMNS,
        tokenizer,
        commonsense_prompt,
        commonsense_completion,
        data,
        completion,
        partition_by,
    )
    generated, chosen, references = [], [], []
    for name, folder in folders.items():
        rows = load_test_rows(str(folder), None, [*COLUMNS, "answer"], "--eval_dataset_dir", data)
        where = f"`{folder}`, split `test`"
        graded = GradedTest.prepare(
            name,
            "commonsense",
            rows,
            "answer",
            commonsense_prompt,
            commonsense_completion,
            tokenizer,
            context,
            0 if commonsense.scoring == "choices" else generation.max_new_tokens,
            where,
        )
        references.append(graded.tokenized)
        if commonsense.scoring != "choices":
            generated.append(graded)
        if commonsense.scoring != "generated":
            allowed = [commonsense_choices(row) for row in rows]
            chosen.append(
                ChoiceTest.prepare(name, graded.prompts, allowed, graded.references, tokenizer, context, where)
            )
    everything = concatenate_datasets(references)

    def test(trainer: FederatedTrainer, folder: Path) -> dict[str, float]:
        here = (trainer.model, tokenizer, generation, folder)
        shares = with_average({each.name: each.run(*here) for each in generated}, "")
        chosen_shares = {each.name: each.run(*here) for each in chosen}
        for score, suffix in (("acc", "_choices"), ("acc_norm", "_choices_norm")):
            shares |= with_average({name: each[score] for name, each in chosen_shares.items()}, suffix)
        return {**shares, "loss": loss_on(trainer, everything)}

    metric = "average_choices" if commonsense.scoring == "choices" else "average"
    return completion_task("commonsense", train, validation, tokenizer, model, test, metric, everything, partition_by)


def folders_of_tests(commonsense: CommonsenseArguments) -> dict[str, Path]:
    """Set -> the folder of its test file.

    Raises:
        DataError: If one is not there. The Hub, which would be asked for a dataset of that name, has none of them.
    """
    root = Path(commonsense.eval_dataset_dir)
    folders = {name: root / name for name in dict.fromkeys(commonsense.eval_sets)}
    absent = [folder for folder in (root, *folders.values()) if not folder.is_dir()]
    if absent:
        raise DataError(
            f"`--eval_dataset_dir {root}`: there is no folder `{absent[0]}`. Name the folder `dataset` of a clone of "
            "https://github.com/AGI-Edgerunners/LLM-Adapters, which holds one folder per set, and with `--eval_sets` "
            "the sets to test on."
        )
    return folders


def with_average(shares: Mapping[str, float], suffix: str) -> dict[str, float]:
    """The shares of all sets and before them their mean, with a suffix; nothing, if there are none.

    Example:
        >>> with_average({"boolq": 0.5, "piqa": 1.0}, "_choices")
        {'average_choices': 0.75, 'boolq_choices': 0.5, 'piqa_choices': 1.0}
    """
    named = {f"{name}{suffix}": share for name, share in shares.items()}
    return {f"average{suffix}": sum(named.values()) / len(named), **named} if named else {}


def load_training(name: str) -> DatasetDict:
    """The training data, with a column `kind`, and `set` where each set has a folder of its own.

    Raises:
        DataError: If there are none.
    """
    parts = [folder for folder in COMMONSENSE_SETS if (Path(name) / folder).is_dir()]
    if not parts:
        splits = load_data(name)
        return DatasetDict({split: _with_kind(rows, f"`{name}`, split `{split}`") for split, rows in splits.items()})
    trains = {part: find_split(load_data(name, part), "train") for part in parts}
    used = {part: rows for part, rows in trains.items() if rows is not None}
    if not used:
        raise DataError(f"`--dataset_name {name}`: none of the folders of its sets holds a training file.")
    print(f"Training on {', '.join(f'{part} ({len(rows)})' for part, rows in used.items())}.", flush=True)
    return DatasetDict(train=concatenate_datasets([_of_set(part, rows, name) for part, rows in used.items()]))


def _of_set(part: str, rows: Dataset, name: str) -> Dataset:
    rows = _with_kind(rows, f"`{name}/{part}`, split `train`")
    return rows.select_columns([*COLUMNS, "kind"]).add_column("set", [part] * len(rows))


def _with_kind(rows: Dataset, where: str) -> Dataset:
    check_columns(rows, COLUMNS, where)
    check_text(rows, COLUMNS, where)
    if "kind" in rows.column_names:
        print(f"{where}: the column `kind` is replaced by the kind of question.", flush=True)
        rows = rows.remove_columns("kind")
    return rows.add_column("kind", [commonsense_kind({"instruction": text}) for text in rows["instruction"]])


if __name__ == "__main__":
    main()
