"""Federated LoRA on arithmetic reasoning: FedEx-LoRA beside FedIT, FFA-LoRA and centralized LoRA, over several seeds.

    python recipes/arithmetic.py --config recipes/configs/arithmetic_mistral.yaml --output_dir arithmetic-output
    python recipes/arithmetic.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name openai/gsm8k \
        --dataset_config main --gsm8k_name openai/gsm8k --num_clients 3 --output_dir gsm8k-output

Trains on MetaMathQA, or on the training split of GSM8K or MATH: rows are told by their columns. The test splits of
GSM8K and MATH are answered greedily, step by step. Rounds are validated by the loss on training examples that were
held out; nothing is chosen on a test split. MATH needs the extra `metrics`. The outputs lie in gsm8k.jsonl and
math.jsonl of each run; results.json, results.md and plots in `--output_dir`. The same command goes on
where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import concatenate_datasets
from transformers import PreTrainedTokenizerBase

from fedex_hf import FederatedTrainer
from fedex_hf.comparison import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    RecipeError,
    RecipeTrainingArguments,
    Task,
    compare,
    parse_recipe,
    quiet,
    refusing,
)
from fedex_hf.tasks.completion import (
    CompletionArguments,
    completion_task,
    context_of,
    load_completion_tokenizer,
    load_test_rows,
    loss_on,
    training_splits,
)
from fedex_hf.tasks.data import DataError, load_data, quoted, require_split
from fedex_hf.tasks.generation import GenerationArguments
from fedex_hf.tasks.grading import GradedTest, computable
from fedex_hf.tasks.prompts import ARITHMETIC_FORMS, arithmetic_form


@dataclass
class ArithmeticArguments:
    """Which data."""

    dataset_name: str = field(
        default="meta-math/MetaMathQA",
        metadata={
            "help": "Training data: Hub id, or local file or folder, with the columns query and response, question "
            "and answer, or problem and solution."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, such as main of GSM8K."})
    gsm8k_name: str | None = field(
        default=None, metadata={"help": "GSM8K, to test on: openai/gsm8k, or a local file or folder with its columns."}
    )
    gsm8k_config: str | None = field(default="main", metadata={"help": "Its configuration on the Hub."})
    math_name: str | None = field(
        default=None,
        metadata={
            "help": "MATH, to test on: Hub id, or a local file or folder, with the columns problem and solution."
        },
    )
    math_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})

    def tests(self) -> dict[str, tuple[str, str | None]]:
        """Name of a test -> where its data come from, and their configuration."""
        named = {"gsm8k": (self.gsm8k_name, self.gsm8k_config), "math": (self.math_name, self.math_config)}
        return {test: (name, config) for test, (name, config) in named.items() if name is not None}


def main(argv: Sequence[str] | None = None) -> None:
    """Load and check everything, then compare."""
    arithmetic, completion, generation, comparison, model, data, training = parse_recipe(
        ArithmeticArguments,
        CompletionArguments,
        GenerationArguments,
        ComparisonArguments,
        ModelArguments,
        DataArguments,
        RecipeTrainingArguments,
        description=__doc__.split("\n\n")[0],
        defaults={"max_seq_length": 512, "max_new_tokens": 512, "validation_fraction": 0.05},
        argv=argv,
    )
    quiet()
    with refusing():
        tokenizer = load_completion_tokenizer(model, data, completion)
        if not arithmetic.tests():
            raise RecipeError("There is nothing to test on. Name data with `--gsm8k_name`, `--math_name` or both.")
        tests = [test for test in arithmetic.tests() if computable(test, None, generation.skip_missing_metrics)]
        if not tests:
            raise RecipeError("None of the tests can be graded here, so nothing was trained.")
        task = arithmetic_task(
            arithmetic, tokenizer, completion, generation, model, data, tests, training.partition_by
        )
        settings = {"metrics": tests, **asdict(arithmetic), **asdict(completion), **generation.decoding()}
        compare([task], comparison, training, {**settings, **asdict(model), **asdict(data)})


def arithmetic_task(
    arithmetic: ArithmeticArguments,
    tokenizer: PreTrainedTokenizerBase,
    completion: CompletionArguments,
    generation: GenerationArguments,
    model: ModelArguments,
    data: DataArguments,
    tests: Sequence[str],
    partition_by: str | None,
) -> Task:
    """The task, with the share of right answers for each test, and the loss on all their references."""
    context = context_of(model, tokenizer)
    splits = load_data(arithmetic.dataset_name, arithmetic.dataset_config)
    found = arithmetic_form(require_split(splits, "train", arithmetic.dataset_name, ()).column_names)
    if found is None:
        forms = ", or ".join(quoted(form.columns) for form in ARITHMETIC_FORMS.values())
        raise DataError(
            f"`{arithmetic.dataset_name}` has the columns {quoted(splits['train'].column_names)}. Expected: {forms}. "
            "Rename yours, for example with `dataset.rename_column`."
        )
    train, validation = training_splits(
        splits,
        arithmetic.dataset_name,
        ARITHMETIC_FORMS[found].columns,
        tokenizer,
        ARITHMETIC_FORMS[found].prompt,
        ARITHMETIC_FORMS[found].completion,
        data,
        completion,
        partition_by,
    )
    graded = []
    for name in tests:
        source, config = arithmetic.tests()[name]
        form = ARITHMETIC_FORMS[name]  # the metric's own, whatever other columns there are
        rows = load_test_rows(source, config, form.columns, f"--{name}_name", data)
        graded.append(
            GradedTest.prepare(
                name,
                name,
                rows,
                form.answer,
                form.prompt,
                form.completion,
                tokenizer,
                context,
                generation.max_new_tokens,
                f"`{source}`, split `test`",
            )
        )
    references = concatenate_datasets([each.tokenized for each in graded])

    def test(trainer: FederatedTrainer, folder: Path) -> dict[str, float]:
        shares = {each.name: each.run(trainer.model, tokenizer, generation, folder) for each in graded}
        return {**shares, "loss": loss_on(trainer, references)}

    return completion_task("arithmetic", train, validation, tokenizer, model, test, tests[0], references, partition_by)


if __name__ == "__main__":
    main()
