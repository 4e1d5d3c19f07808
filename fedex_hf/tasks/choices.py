"""Answers chosen by log-likelihood, as EleutherAI's lm-evaluation-harness does for multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fedex_hf.metrics import load_metric
from fedex_hf.tasks.completion import encode_pair
from fedex_hf.tasks.data import DataError
from fedex_hf.tasks.generation import GenerationArguments, check_room, evaluating, in_batches, save_outputs


ANSWER = "the correct answer is {}"  # of LLM-Adapters' data (Hu et al. 2023, arXiv 2304.01933)


@dataclass(frozen=True)
class ChoiceTest:
    """A test split whose answers are chosen among those that each row allows.

    Args:
        name: Of the test.
        prompts: One per row.
        choices: The allowed answers of each row, such as `["true", "false"]`.
        right: Index of the right one.
        context: Most tokens the model takes.
    """

    name: str
    prompts: list[str]
    choices: list[list[str]]
    right: list[int]
    context: int | None

    @classmethod
    def prepare(
        cls,
        name: str,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str] | None],
        answers: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        where: str,
    ) -> ChoiceTest:
        """Make a test of prompts, their allowed answers and the right one; `where` begins messages.

        Raises:
            DataError: If a row does not say which answers it allows, or its own is not among them, or does not fit.
        """
        bad = [index for index, (each, answer) in enumerate(zip(choices, answers)) if answer not in (each or [])]
        if bad:
            raise DataError(
                f"{where}: {len(bad)} of {len(answers)} rows do not name their answer among the allowed ones, row "
                f"{bad[0]} first: {answers[bad[0]]!r} of {choices[bad[0]]}. Instructions end in `Answer format: a/b`, "
                "as LLM-Adapters writes them. Correct those rows, or use `--scoring generated`."
            )
        allowed = [list(each or []) for each in choices]
        lengths = [
            sum(map(len, encode_pair(tokenizer, prompt, ANSWER.format(choice))))
            for prompt, each in zip(prompts, allowed)
            for choice in each
        ]
        check_room(lengths, 0, context, where)
        right = [each.index(answer) for each, answer in zip(allowed, answers)]
        return cls(name, list(prompts), allowed, right, context)

    def run(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationArguments,
        folder: Path,
    ) -> dict[str, float]:
        """Choose all answers, and save their log-likelihoods.

        Returns:
            Shares of right ones as in lm-evaluation-harness: `acc`, and `acc_norm` by the log-likelihood per character
            of the text that is scored, which is `ANSWER` with the choice in it.
        """
        texts = [[ANSWER.format(choice) for choice in each] for each in self.choices]
        scores = choice_log_likelihoods(
            model,
            tokenizer,
            self.prompts,
            texts,
            generation.generation_batch_size,
            description=self.name,
            context=self.context,
        )
        rows = [
            {"prompt": prompt, "log_likelihoods": dict(zip(choices, each)), "references": choices[right]}
            for prompt, choices, each, right in zip(self.prompts, self.choices, scores, self.right)
        ]
        save_outputs(folder / f"{self.name}_choices.jsonl", rows)
        shares = load_metric("choices").compute(predictions=scores, choices=texts, references=self.right)
        return {name: float(shares[name]) for name in ("acc", "acc_norm")}


def choice_log_likelihoods(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    batch_size: int,
    description: str = "Scoring",
    context: int | None = None,
) -> list[list[float]]:
    """Score the choices of each prompt.

    Args:
        model: Causal language model, with or without adapter. It comes back in the mode that it was in.
        tokenizer: The model's, with a padding token.
        prompts: Texts.
        choices: For each prompt, the texts that may follow it; they are not empty.
        batch_size: Sequences per batch and process.
        description: Of the progress bar.
        context: Most tokens the model takes, if there is a limit.

    Returns:
        For each prompt, the natural log of the probability of each choice's tokens after it; on every process.

    Raises:
        DataError: If a prompt and a choice do not fit into the context.
    """
    pairs = [encode_pair(tokenizer, prompt, choice) for prompt, allowed in zip(prompts, choices) for choice in allowed]
    lengths = [len(prompt) + len(choice) for prompt, choice in pairs]
    check_room(lengths, 0, context, "Prompts with their choices")

    def score(indices: list[int]) -> list[float]:
        batch = tokenizer.pad(
            {"input_ids": [pairs[index][0] + pairs[index][1] for index in indices]},
            padding_side="right",
            return_tensors="pt",
        ).to(language_model.device)
        logits = language_model(**batch, use_cache=False).logits
        return [log_likelihood(row, *pairs[index]) for row, index in zip(logits, indices)]

    with evaluating(model) as language_model:
        scored = iter(in_batches(lengths, batch_size, score, description))
    return [[next(scored) for _ in allowed] for allowed in choices]


def log_likelihood(logits: torch.Tensor, prompt: Sequence[int], choice: Sequence[int]) -> float:
    """Log-likelihood of a choice's tokens.

    Args:
        logits: Of one sequence, of shape `(length, vocabulary)`; what lies beyond prompt and choice is padding.
        prompt, choice: Tokens.
    """
    predicted = logits[len(prompt) - 1 : len(prompt) + len(choice) - 1].float().log_softmax(dim=-1)
    return predicted.gather(1, torch.tensor(choice, device=logits.device)[:, None]).sum().item()
