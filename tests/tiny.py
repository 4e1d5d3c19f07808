"""Tiny models built from a config, and data for them: what every test builds on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fedex_hf import ClientUpdate, FederatedTrainer, FederatedTrainingArguments, GlobalUpdate, Ledger


VOCAB, LENGTH, LABELS = 64, 10, 3
# Arguments that a plain `Trainer` and a federation take alike: one epoch, every step logged.
PLAIN = {
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}


def roberta(seed: int = 0) -> PreTrainedModel:
    """Encoder with a classification head: square `nn.Linear` (32 x 32)."""
    torch.manual_seed(seed)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=LENGTH + 4,
            num_labels=LABELS,
            pad_token_id=0,
        )
    )


def llama(seed: int = 0) -> PreTrainedModel:
    """Causal LM with grouped-query attention: `nn.Linear` that are not square (32 x 16, 32 x 48)."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=LENGTH + 4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2(seed: int = 0) -> PreTrainedModel:
    """Causal LM with `Conv1D` layers, whose weight is the transpose of a Linear's (32 x 96)."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=LENGTH + 4, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    )


def t5(seed: int = 0) -> PreTrainedModel:
    """Encoder-decoder: `nn.Linear` 32 x 24 (four heads of six)."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=6,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def classification_data(size: int, seed: int = 0) -> Dataset:
    """Sequences whose label the first token decides, so that training has something to learn."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (size, LENGTH), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % LABELS).tolist()})


def language_data(size: int, seed: int = 0) -> Dataset:
    """Sequences that count upwards, as inputs and labels of a language model."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, VOCAB - LENGTH, (size, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def clients_of(sizes: list[int], make: Any = classification_data) -> dict[str, Dataset]:
    """A client per size, each with data of its own."""
    return {f"client-{index}": make(size, seed=100 + index) for index, size in enumerate(sizes)}


def lora(**kwargs: Any) -> LoraConfig:
    """LoRA on query and value, with the classification head trained in full."""
    return LoraConfig(
        **({"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]} | kwargs)
    )


def arguments(output_dir: Path | str, **kwargs: Any) -> FederatedTrainingArguments:
    """Arguments of a short run on the CPU."""
    defaults = {
        "num_rounds": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return FederatedTrainingArguments(output_dir=str(output_dir), **(defaults | kwargs))


def federation(
    output_dir: Path | str,
    sizes: tuple[int, ...] = (12, 7, 9),
    *,
    model: PreTrainedModel | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> FederatedTrainer:
    """A federation of tiny RoBERTa classifiers.

    Args:
        output_dir: Where checkpoints go.
        sizes: Examples per client.
        model: Instead of `roberta()`.
        trainer_kwargs: Arguments of `FederatedTrainer`, instead of the ones here.
        kwargs: Arguments of the run.
    """
    given = {
        "model": roberta() if model is None else model,
        "args": arguments(output_dir, **kwargs),
        "train_dataset": clients_of(list(sizes)),
        "eval_dataset": classification_data(20, seed=1),
        "peft_config": lora(),
    }
    return FederatedTrainer(**(given | (trainer_kwargs or {})))


def peft_roberta(seed: int = 0) -> PeftModel:
    """`roberta()` with LoRA, the same bytes at every call with one seed."""
    model = roberta(seed)
    torch.manual_seed(seed)
    return get_peft_model(model, lora())


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of all that a federation changes in a model: trained parameters, and base weights of adapted layers."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.endswith("base_layer.weight")
    }


def tensors_of(held: ClientUpdate | GlobalUpdate | Ledger) -> dict[str, torch.Tensor]:
    """All tensors of an update, a state or a ledger, by name."""
    is_ledger = isinstance(held, Ledger)
    deltas, others = (held.factors, held.matrices) if is_ledger else (held.adapters, held.tensors)
    factors = {f"{name}.{factor}": getattr(delta, factor) for name, delta in deltas.items() for factor in "AB"}
    return factors | dict(others)


@contextmanager
def fewer_digits(asked: str = "medium") -> Iterator[None]:
    """Torch asked to multiply float32 with fewer digits: by the old setting, or the "newer" one of torch 2.9."""
    if asked == "newer":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    else:
        torch.set_float32_matmul_precision(asked)
    try:
        yield
    finally:
        if asked == "newer":
            torch.backends.mkldnn.matmul.fp32_precision = "none"
        else:
            torch.set_float32_matmul_precision("highest")


def same_bytes(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two dictionaries of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and _bytes(left[name]) == _bytes(right[name]) for name in left
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else repr(tensor).encode()
    )
