"""Federated LoRA on E2E NLG: FedEx-LoRA beside FedIT, FFA-LoRA and centralized LoRA, over several seeds.

    python recipes/e2e_nlg.py --config recipes/configs/e2e_gpt2.yaml --output_dir e2e-output
    python recipes/e2e_nlg.py --config recipes/configs/e2e_gpt2.yaml --dataset_name my/e2e --seeds 0 1 2 \
        --output_dir my-e2e --skip_missing_metrics

A model learns to put meaning representations into words. Rounds are validated by the loss on the validation split; the
test split is completed by beam search, once per meaning representation, and compared with all its references. METEOR,
ROUGE-L and CIDEr need Java. The outputs lie in outputs.jsonl of each run; results.json, results.md and plots in
`--output_dir`. The same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
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
from fedex_hf.metrics import load_metric
from fedex_hf.metrics.e2e_nlg import E2E_METRICS, E2E_SCRIPTS, group_by_meaning
from fedex_hf.tasks.completion import (
    CompletionArguments,
    completion_task,
    context_of,
    load_completion_tokenizer,
    loss_on,
    tokenize_completions,
    training_splits,
)
from fedex_hf.tasks.data import check_text, load_data, require_split, take
from fedex_hf.tasks.generation import GenerationArguments, check_prompts, generate, save_outputs
from fedex_hf.tasks.grading import computable, rows_to_read
from fedex_hf.tasks.prompts import e2e_completion, e2e_prompt


COLUMNS = ("meaning_representation", "human_reference")
DECODING = {  # of LoRA (Hu et al. 2021, arXiv 2106.09685), with the length penalty of arXiv 2410.09432
    "max_new_tokens": 64,
    "num_beams": 10,
    "length_penalty": 0.9,
    "no_repeat_ngram_size": 4,
}


@dataclass
class E2EArguments:
    """Which data."""

    dataset_name: str = field(
        default="tuetschek/e2e_nlg",
        metadata={"help": "Hub id, or a folder with train, validation and test files and the same columns."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    bleu_script: str = field(
        default="perl",
        metadata={
            "help": "Which official script's BLEU and NIST: perl is its default, python its -p, which LoRA used.",
            "choices": list(E2E_SCRIPTS),
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Load and check everything, then compare."""
    e2e, completion, generation, comparison, model, data, training = parse_recipe(
        E2EArguments,
        CompletionArguments,
        GenerationArguments,
        ComparisonArguments,
        ModelArguments,
        DataArguments,
        RecipeTrainingArguments,
        description=__doc__.split("\n\n")[0],
        defaults={"max_seq_length": 128, **DECODING},
        argv=argv,
    )
    quiet()
    with refusing():
        tokenizer = load_completion_tokenizer(model, data, completion)
        scores = computable("e2e_nlg", E2E_METRICS, generation.skip_missing_metrics)
        task = e2e_task(e2e, tokenizer, completion, generation, model, data, scores, training.partition_by)
        settings = {"metrics": scores, **asdict(e2e), **asdict(completion), **generation.decoding()}
        compare([task], comparison, training, {**settings, **asdict(model), **asdict(data)})


def e2e_task(
    e2e: E2EArguments,
    tokenizer: PreTrainedTokenizerBase,
    completion: CompletionArguments,
    generation: GenerationArguments,
    model: ModelArguments,
    data: DataArguments,
    scores: Sequence[str],
    partition_by: str | None,
) -> Task:
    """The task; of the test split, `--max_test_examples` counts meaning representations."""
    context = context_of(model, tokenizer)
    splits = load_data(e2e.dataset_name, e2e.dataset_config)
    train, validation = training_splits(
        splits, e2e.dataset_name, COLUMNS, tokenizer, e2e_prompt, e2e_completion, data, completion, partition_by
    )
    where = f"`{e2e.dataset_name}`, split `test`"
    rows = require_split(splits, "test", e2e.dataset_name, COLUMNS)
    check_text(rows, COLUMNS, where)
    rows = take_meanings(rows, data)
    meanings, references = group_by_meaning(rows)
    prompts = [e2e_prompt({COLUMNS[0]: meaning}) for meaning in meanings]
    check_prompts(tokenizer, prompts, generation.max_new_tokens, context, where)
    tokenized = tokenize_completions(rows, tokenizer, e2e_prompt, e2e_completion, context, where, limit_name="context")

    def test(trainer: FederatedTrainer, folder: Path) -> dict[str, float]:
        outputs = generate(
            trainer.model,
            tokenizer,
            prompts,
            generation.generation_batch_size,
            context=context,
            **generation.decoding(),
        )
        save_outputs(folder / "outputs.jsonl", rows_to_read(prompts, outputs, references))
        metrics: dict[str, Any] = {}
        if scores:
            metrics = load_metric("e2e_nlg").compute(
                predictions=outputs, references=references, metrics=scores, script=e2e.bleu_script
            )
        return {**metrics, "loss": loss_on(trainer, tokenized)}

    metric = scores[0] if scores else "loss"
    return completion_task("e2e_nlg", train, validation, tokenizer, model, test, metric, tokenized, partition_by)


def take_meanings(rows: Dataset, data: DataArguments) -> Dataset:
    """All rows of at most `max_test_examples` meaning representations: none loses a part of its references."""
    meanings = Dataset.from_dict({"meaning": list(dict.fromkeys(rows[COLUMNS[0]]))})
    kept = set(take(meanings, data.max_test_examples, data.split_seed)["meaning"])
    return rows.select([index for index, meaning in enumerate(rows[COLUMNS[0]]) if meaning in kept])


if __name__ == "__main__":
    main()
