"""Batched generation of completions: in the order of the prompts, shared over the processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedex_hf.tasks.completion import encode_prompt
from fedex_hf.tasks.data import DataError


Value = TypeVar("Value")


@dataclass
class GenerationArguments:
    """How test outputs are generated. Without beams it is greedy."""

    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an output."})
    num_beams: int = field(default=1, metadata={"help": "Beams; 1 is greedy decoding."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Beams are ranked by log-likelihood / length ** length_penalty."}
    )
    no_repeat_ngram_size: int = field(
        default=0,
        metadata={
            "help": "No n-gram of that size occurs twice in an output together with its prompt: what the prompt says "
            "cannot be repeated either. 0 allows all."
        },
    )
    generation_batch_size: int = field(default=8, metadata={"help": "Prompts per batch and process."})
    skip_missing_metrics: bool = field(
        default=False,
        metadata={"help": "Go on without the metrics whose Java or extra is not installed, rather than refuse."},
    )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` is not allowed. Allowed: at least 1.")

    def decoding(self) -> dict[str, Any]:
        """Arguments of `GenerationConfig`, which decide the outputs."""
        beams = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            **beams,
        }


def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    description: str = "Generating",
    context: int | None = None,
    **generation_kwargs: Any,
) -> list[str]:
    """Complete prompts without sampling.

    Decoding options that the model brings along, such as a repetition penalty, do not apply. Under `accelerate launch`
    each process completes its share, and all get everything.

    Args:
        model: Causal language model, with or without adapter. It comes back in the mode that it was in.
        tokenizer: The model's, with a padding token and one that ends texts.
        prompts: Texts.
        batch_size: Prompts per batch and process.
        max_new_tokens: Most tokens of a completion.
        description: Of the progress bar.
        context: Most tokens the model takes, if there is a limit.
        generation_kwargs: Further arguments of `GenerationConfig`, such as `num_beams`.

    Returns:
        The new text of each prompt up to its end, without surrounding blanks.

    Raises:
        DataError: If a prompt leaves no room for `max_new_tokens` in the context.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_room([len(ids) for ids in encoded], max_new_tokens, context, "The prompts")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,  # `Trainer` turns it off in the model's config
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **generation_kwargs,
    )

    def complete(indices: list[int]) -> list[str]:
        batch = tokenizer.pad(
            {"input_ids": [encoded[index] for index in indices]}, padding_side="left", return_tensors="pt"
        ).to(language_model.device)
        sequences = language_model.generate(**batch, generation_config=config)
        new = sequences[:, batch["input_ids"].shape[1] :].tolist()
        texts = [tokenizer.decode(until_end(ids, tokenizer), skip_special_tokens=True) for ids in new]
        return [str(text).strip() for text in texts]

    with evaluating(model) as language_model, decoding_by(language_model, config):
        return in_batches([len(ids) for ids in encoded], batch_size, complete, description)


def until_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens before the first that ends the text; all, if none does."""
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


def in_batches(
    lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], list[Value]], description: str
) -> list[Value]:
    """Apply `work` to items in batches of similar length, the longest first, with a progress bar.

    Args:
        lengths: One per item.
        batch_size: Items per batch and process.
        work: Indices of a batch -> one value per index.
        description: Of the progress bar.

    Returns:
        One value per item, in their order, on every process.
    """
    state = PartialState()
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    mine = order[state.process_index :: state.num_processes]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    done: list[tuple[int, Value]] = []
    with tqdm(total=len(mine), desc=description, leave=False, disable=not state.is_main_process) as bar:
        for indices in batches:
            done += zip(indices, work(indices))
            bar.update(len(indices))
    if state.num_processes > 1:
        done = gather_object(done)
    values = dict(done)
    return [values[index] for index in range(len(lengths))]


def check_room(lengths: Sequence[int], new_tokens: int, context: int | None, where: str) -> None:
    """Refuse prompts that leave no room for `new_tokens` in a context of that many tokens.

    Raises:
        DataError: The message says how many, how long, and what to do.
    """
    if context is None:
        return
    room = context - new_tokens
    long = sum(length > room for length in lengths)
    if long:
        lower = (
            f", which `--max_new_tokens {new_tokens}` leaves of the model's context of {context}" if new_tokens else ""
        )
        raise DataError(
            f"{where}: {long} of {len(lengths)} have more than {room} tokens{lower}; the longest has {max(lengths)}. "
            f"{'Lower `--max_new_tokens`, drop' if new_tokens else 'Drop'} those rows, or take a model with a longer "
            "context."
        )


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int, context: int | None, where: str
) -> None:
    """`check_room` for texts, before anything is trained."""
    if context is not None:
        check_room([len(encode_prompt(tokenizer, prompt)) for prompt in prompts], new_tokens, context, where)


@contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """The language model below an adapter, which stays in place, in evaluation mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model.get_base_model() if hasattr(model, "get_base_model") else model
    finally:
        model.train(training)


@contextmanager
def decoding_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put the model's own generation config aside: `generate` takes from it whatever it is not told."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def save_outputs(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write outputs beside their prompts and references, for reading: one JSON object per line, by one process."""
    if PartialState().is_main_process:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
