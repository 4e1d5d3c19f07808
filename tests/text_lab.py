"""A few rows of the text tasks' forms, and tiny language models with their tokenizers: what text tests run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recipe_lab import write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedex_hf.tasks.prompts import (
    ARITHMETIC_FORMS,
    COMMONSENSE_SETS,
    commonsense_completion,
    commonsense_prompt,
    e2e_completion,
    e2e_prompt,
)


NAMES = ("Blue Spice", "The Mill", "Café Rouge", "Zizzi")
AREAS = ("riverside", "city centre")
ALLOWED = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    "ARC-Easy": ["answer1", "answer2", "answer3", "answer4"],
    "ARC-Challenge": ["answer1", "answer2", "answer3", "answer4"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}


def e2e_rows(number: int) -> list[dict[str, Any]]:
    """Meaning representations, each twice in a row with its own reference."""
    rows = []
    for index in range(number):
        name, area = NAMES[index // 2 % 4], AREAS[index // 8 % 2]
        reference = f"{name} is in the {area}." if index % 2 else f"In the {area} there is {name}."
        rows.append({"meaning_representation": f"name[{name}], area[{area}]", "human_reference": reference})
    return rows


def gsm8k_rows(number: int) -> list[dict[str, Any]]:
    """Sums with a calculator's annotation and a final answer."""
    sums = [(index, index % 3 + 1) for index in range(number)]
    return [
        {
            "question": f"Ann has {a} figs and buys {b}. How many are there?",
            "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
        }
        for a, b in sums
    ]


def metamath_rows(number: int) -> list[dict[str, Any]]:
    """The same sums in MetaMathQA's form."""
    return [
        {
            "type": f"GSM_{'Rephrased' if index % 2 else 'AnsAug'}",
            "query": row["question"],
            "original_question": row["question"],
            "response": f"There are {index + index % 3 + 1}.\nThe answer is: {index + index % 3 + 1}",
        }
        for index, row in enumerate(gsm8k_rows(number))
    ]


def math_rows(number: int) -> list[dict[str, Any]]:
    """Problems whose answers are boxed."""
    return [
        {"problem": f"What is ${a}+1$?", "level": "Level 1", "solution": f"It is $\\boxed{{{a + 1}}}$."}
        for a in range(number)
    ]


def commonsense_rows(name: str, number: int) -> list[dict[str, Any]]:
    """Questions of one of the eight sets; the right answer goes round."""
    allowed = ALLOWED[name]
    rows = []
    for index in range(number):
        answer = allowed[index % len(allowed)]
        instruction = f"Please choose: is {answer[-1]} warm {index}?\n\nAnswer format: {'/'.join(allowed)}"
        output = f"the correct answer is {answer}"
        rows.append({"instruction": instruction, "input": "", "output": output, "answer": answer})
    return rows


def corpus() -> list[str]:
    """Every kind of text that the rows above become."""
    texts = [e2e_prompt(row) + e2e_completion(row) for row in e2e_rows(16)]
    for form, rows in (("gsm8k", gsm8k_rows), ("metamath", metamath_rows), ("math", math_rows)):
        texts += [ARITHMETIC_FORMS[form].prompt(row) + ARITHMETIC_FORMS[form].completion(row) for row in rows(20)]
    for name in COMMONSENSE_SETS:
        texts += [commonsense_prompt(row) + commonsense_completion(row) for row in commonsense_rows(name, 8)]
    return texts


def gpt2_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token and no padding token, as GPT-2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    given = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "model_max_length": 256} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def llama_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """BPE with SentencePiece's blanks, a space before every text and a token that begins it, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **given)


def gpt2(tokenizer: PreTrainedTokenizerFast, positions: int = 256) -> GPT2LMHeadModel:
    """Learned positions and `Conv1D` layers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(tokenizer: PreTrainedTokenizerFast, positions: int = 256) -> LlamaForCausalLM:
    """Rotary positions and grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=positions, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def language_model(folder: Path, kind: str = "llama", **kwargs: Any) -> Path:
    """A folder with model and tokenizer, as `--model_name_or_path` takes it."""
    tokenizer = {"llama": llama_tokenizer, "gpt2": gpt2_tokenizer}[kind](**kwargs)
    tokenizer.save_pretrained(folder)
    {"llama": llama, "gpt2": gpt2}[kind](tokenizer).save_pretrained(folder)
    return folder


def text_flags(root: Path, **more: Any) -> list[str]:
    """Flags of a run that takes seconds; `None` leaves a flag out."""
    flags: dict[str, Any] = {
        "model_name_or_path": root / "model",
        "output_dir": root / "out",
        "max_seq_length": 160,
        "max_new_tokens": 6,
        "num_rounds": 1,
        "num_clients": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lora_r": 2,
        "lora_target_modules": "all-linear",
        "aggregators": "fedex fedit",
        "use_cpu": True,
    } | more
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", *str(value).split())]


def write_splits(folder: Path, **splits: Sequence[dict[str, Any]]) -> Path:
    """A folder as `--dataset_name` takes it."""
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)
    return folder
