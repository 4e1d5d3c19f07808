"""Models and tokenizers of a recipe, with errors that say what to do."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from fedex_hf.comparison.arguments import ModelArguments, RecipeError


class ModelError(RecipeError):
    """A model or tokenizer that cannot be used as given; the message says what to do."""


def load_tokenizer(
    args: ModelArguments, max_seq_length: int | None = None, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, checked before anything is trained.

    Args:
        args: Which model.
        max_seq_length: Tokens per example that are wanted.
        pad_token: A token of the vocabulary to pad with, for a tokenizer without one.

    Raises:
        ModelError: If there is no such model, no padding token, or the model takes fewer tokens.
    """
    name = args.model_name_or_path
    if name is None:
        raise ModelError("`--model_name_or_path` is missing. Name a model on the Hub, or a local folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=args.model_revision)
        config = AutoConfig.from_pretrained(name, revision=args.model_revision)
    except Exception as error:  # of many kinds: no such repository, no network, no tokenizer files
        raise ModelError(
            f"`--model_name_or_path {name}` is neither a local folder with a model and its tokenizer nor a model that "
            f"the Hub gives: {type(error).__name__}: {error}"
        ) from error
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(f"`--pad_token {pad_token}` is not in the vocabulary of `{name}`. Name a token that is.")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        known = tokenizer.eos_token or tokenizer.unk_token or "<token>"
        raise ModelError(
            f"The tokenizer of `{name}` has no padding token, so examples of different length cannot share a batch. "
            f"Name one of its tokens, such as `--pad_token '{known}'`; padding is masked and not trained on."
        )
    longest = context_length(config, tokenizer)
    if max_seq_length is not None and longest is not None and max_seq_length > longest:
        raise ModelError(
            f"`--max_seq_length {max_seq_length}` is more than `{name}` takes: {longest} tokens. Lower it."
        )
    return tokenizer


def context_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens that a model takes, by its tokenizer and its positions; `None` if neither says."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    known = [each for each in (tokenizer.model_max_length, positions) if each is not None and each < 10**9]
    return min(known, default=None)


def load_causal_lm(args: ModelArguments, seed: int) -> PreTrainedModel:
    """The pretrained language model; it has no new parts, the seed decides what follows."""
    set_seed(seed)
    return AutoModelForCausalLM.from_pretrained(
        str(args.model_name_or_path), revision=args.model_revision, **args.loading_kwargs()
    )
