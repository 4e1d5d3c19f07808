"""The models whose traffic is counted, and what of them travels: see `traffic.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from fedex_hf.aggregators.ranks import WIDE


@dataclass(frozen=True)
class Case:
    """A model of the paper.

    Args:
        config: With the sizes of the published model.
        lora: Arguments of `LoraConfig` beside the rank; `task_type` decides on the head.
        ranks: Those that the paper trains it with.
        dtype: Of the base.
        autocast: Whether the factors are in float32, PEFT's own choice, or else in the base's dtype.
    """

    config: PretrainedConfig
    lora: dict[str, Any]
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    autocast: bool = True


def roberta(**sizes: int) -> RobertaConfig:
    """`FacebookAI/roberta-base`, or with other sizes."""
    return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2, **sizes)


LLAMA = LlamaConfig(  # meta-llama/Llama-3.2-3B
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
CLASSIFY = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
GENERATE = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INSTRUCT = {"task_type": "CAUSAL_LM", "target_modules": ALL_LINEAR}
CASES = {
    "RoBERTa-base": Case(roberta(), CLASSIFY, (4, 1)),
    "GPT-2": Case(GPT2Config(), GENERATE, (4, 1)),
    "Llama-3.2-3B": Case(LLAMA, INSTRUCT, (32,), torch.bfloat16),
    "Llama-3.2-3B, adapters in bfloat16": Case(LLAMA, INSTRUCT, (32,), torch.bfloat16, autocast=False),
}


@dataclass(frozen=True)
class Layer:
    """Shape of an adapted layer's update: `A` is `(rank, in_features)`, `B` is `(out_features, rank)`."""

    out_features: int
    in_features: int
    rank: int
    dtype: torch.dtype

    @property
    def column(self) -> int:
        """Bytes of one rank of a residual: a row of `A` and a column of `B`, float32."""
        return 4 * (self.out_features + self.in_features)

    @property
    def dense(self) -> int:
        """Bytes of a residual as a matrix, float32."""
        return 4 * self.out_features * self.in_features

    def exact_rank(self, clients: int) -> int:
        """Rank of the exact residual; with factors in half precision, 2 r more undo the rounding of their means."""
        rank = (clients - 1) * self.rank + (0 if self.dtype in WIDE else 2 * self.rank)
        return min(rank, self.out_features, self.in_features)


@dataclass(frozen=True)
class Traffic:
    """What a model's parts weigh.

    Args:
        layers: Adapted layer -> how often its shape occurs.
        head: Bytes of the other trained tensors.
        model: Bytes of the base, head included.
    """

    layers: Counter[Layer]
    head: int
    model: int

    def total(self, of_layer: Callable[[Layer], tuple[int, int]]) -> tuple[int, int]:
        """Bytes up and down of all layers and the head."""
        pairs = [(count, of_layer(layer)) for layer, count in self.layers.items()]
        up, down = (sum(count * pair[way] for count, pair in pairs) for way in (0, 1))
        return up + self.head, down + self.head


PAPER_CASES = {  # of the paper's Table 8
    "RoBERTa-base": CASES["RoBERTa-base"],
    "RoBERTa-large": Case(
        roberta(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096), CLASSIFY, (4,)
    ),
    "GPT-2": CASES["GPT-2"],
}


def build(case: Case, rank: int, **lora: Any) -> PeftModel:
    """The model without weights, LoRA added."""
    make = AutoModelForSequenceClassification if case.lora["task_type"] == "SEQ_CLS" else AutoModelForCausalLM
    with torch.device("meta"):
        model = make.from_config(case.config, dtype=case.dtype)
        model = get_peft_model(model, LoraConfig(**(case.lora | lora), r=rank), autocast_adapter_dtype=case.autocast)
    return model if case.autocast else model.to(case.dtype)  # which PEFT does itself, but not on `meta`


def read(model: PeftModel) -> Traffic:
    """Count a wrapped model's parts."""
    layers: Counter[Layer] = Counter()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            layers[Layer(B.shape[0], A.shape[1], A.shape[0], A.dtype)] += 1
    others = [(name, each) for name, each in model.named_parameters() if "lora_" not in name]
    head = sum(each.nbytes for _, each in others if each.requires_grad)
    return Traffic(layers, head, sum(each.nbytes for name, each in others if ".modules_to_save." not in name))
