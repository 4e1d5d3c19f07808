"""Every kind of LoRA layer and base that is supported, and what is refused: one list for tests, benchmarks and docs.

All models have a few thousand random weights, are built from a configuration and are the same bytes at every call.
`python benchmarks/layer_kinds.py` prints the tables of `docs/limits.md`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from fedex_hf.base_model import AdaptedModel
from fedex_hf.ledger import Ledger
from fedex_hf.starts import put_lora_on


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("nf4", "int8")
VOCAB = 48
_LANGUAGE = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _LANGUAGE | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
_EXPERTS = _LLAMA | {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "experts_implementation": "eager"}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass(frozen=True)
class Kind:
    """One kind of layer on one kind of base.

    Args:
        name: For tests and the command line.
        what: The kind in words; a row of the tables.
        model: Makes the plain model, float32.
        lora: Arguments of `LoraConfig`.
        base: Dtype of the base weights: a key of `DTYPES`, or one of `QUANTIZED`.
        storage: What `residual_storage="auto"` decides; `None` where the kind is refused.
        says: What a refusal says.
        why: Why it is refused, for the table.
        low_precision_adapter: Whether the adapter has the base's dtype; PEFT's default is float32.
        is_option: Whether it is an option of `LoraConfig` on layers that are in the list without it.
        custom_layers: Layers of a user's own, and the LoRA for them, that PEFT is told of.
    """

    name: str
    what: str
    model: Callable[[], nn.Module]
    lora: Mapping[str, Any] = field(default_factory=dict)
    base: str = "float32"
    storage: str | None = "base"
    says: str = ""
    why: str = ""
    low_precision_adapter: bool = False
    is_option: bool = False
    custom_layers: Mapping[type, type] = field(default_factory=dict)

    def config(self) -> LoraConfig:
        """LoRA of rank 2, scaling 1.5 unless the kind says otherwise."""
        config = LoraConfig(**({"r": 2, "lora_alpha": 3} | dict(self.lora)))
        if self.custom_layers:
            config._register_custom_module(dict(self.custom_layers))
        return config

    def plain(self) -> nn.Module:
        """The plain model with its weights in the base's dtype."""
        torch.manual_seed(0)
        model = self.model()
        if self.base in QUANTIZED:
            assert isinstance(model, PreTrainedModel)
            return quantize(model, self.base)
        return model.to(DTYPES[self.base]).eval()

    def adapted(self) -> tuple[PeftModel, Ledger]:
        """The model with LoRA, as `FederatedTrainer` puts it on, and the ledger of round 0."""
        if self.low_precision_adapter:
            return get_peft_model(self.plain(), self.config(), autocast_adapter_dtype=False), Ledger()
        return put_lora_on(self.plain(), self.config(), seed=1)

    def federated(self, storage: str = "auto") -> AdaptedModel:
        """The model as `FederatedTrainer` takes it, with the ledger of round 0 installed.

        Raises:
            UnsupportedModelError: If it is refused.
        """
        model, start = self.adapted()
        adapted = AdaptedModel(model, changes_base=True, storage=storage)
        adapted.install(start)
        return adapted

    def inputs(self) -> dict[str, torch.Tensor]:
        """Two examples."""
        generator = torch.Generator().manual_seed(0)
        name, shape = _INPUTS[self.model]
        if name == "input_ids":
            return {name: torch.randint(3, VOCAB, shape, generator=generator)}
        return {name: torch.randn(shape, generator=generator)}


# ---- Models ----


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(
        RobertaConfig(
            **_LANGUAGE,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_LLAMA))


def two_layers() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**(_LLAMA | {"num_hidden_layers": 2})))


def tied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**_LANGUAGE, n_embd=32, n_layer=1, n_head=4, n_positions=16))


def qwen3_moe() -> nn.Module:
    """Experts as parameters of shape `(experts, out, in)`."""
    config = _EXPERTS | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))


def gpt_oss() -> nn.Module:
    """Experts as parameters of shape `(experts, in, out)`."""
    config = _EXPERTS | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 12}
    return GptOssForCausalLM(GptOssConfig(**config, layer_types=["full_attention"]))


def wav2vec2() -> nn.Module:
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            **_SMALL,
            conv_dim=(8, 10),
            conv_kernel=(4, 3),
            conv_stride=(2, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            classifier_proj_size=8,
            num_labels=3,
        )
    )


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**_SMALL, image_size=12, patch_size=4, num_labels=3))


def video_mae() -> nn.Module:
    return VideoMAEForVideoClassification(
        VideoMAEConfig(**_SMALL, image_size=8, patch_size=4, num_frames=4, tubelet_size=2, num_labels=3)
    )


class Attention(nn.Module):
    """`nn.MultiheadAttention` before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Mixer(nn.Module):
    """Holds a matrix that is a parameter of its own, and no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(5, 6) / 6**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.mixing.T


class MatrixParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(x)


class GroupedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 6, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)


class Doubled(nn.Linear):
    """A layer of a user's own, with a LoRA of its own beside it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class LoraDoubled(LoraLinear):
    """May compute anything."""


class LayerOfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.doubled = Doubled(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.doubled(x)


_TOKENS = ("input_ids", (2, 7))
_INPUTS: dict[Callable[[], nn.Module], tuple[str, tuple[int, ...]]] = {
    roberta: _TOKENS,
    llama: _TOKENS,
    two_layers: _TOKENS,
    tied_llama: _TOKENS,
    gpt2: _TOKENS,
    qwen3_moe: _TOKENS,
    gpt_oss: _TOKENS,
    wav2vec2: ("input_values", (2, 40)),
    vit: ("pixel_values", (2, 3, 12, 12)),
    video_mae: ("pixel_values", (2, 4, 3, 8, 8)),
    Attention: ("x", (2, 4, 16)),
    MatrixParameter: ("x", (2, 6)),
    GroupedConvolution: ("x", (2, 4, 8)),
    LayerOfItsOwn: ("x", (2, 4)),
}


def quantize(model: PreTrainedModel, kind: str) -> nn.Module:
    """The model with its linear layers quantized by bitsandbytes, by way of the disk as users load it."""
    options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (
            type(model)
            .from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32)
            .eval()
        )


# ---- The list ----

_LINEAR = {"target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"}
_CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
_HEAD = {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
_BOTH_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}

_FLOAT32 = [
    Kind("linear", "`nn.Linear`", llama, _LINEAR),
    Kind("conv1d-gpt2", "`Conv1D` of GPT-2", gpt2, _CONV1D),
    Kind("embedding", "`nn.Embedding`", llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    Kind("conv1d", "`nn.Conv1d`", wav2vec2, {"target_modules": ["0.conv", "1.conv"]}),
    Kind("conv2d", "`nn.Conv2d`", vit, {"target_modules": ["projection"]}),
    Kind("conv3d", "`nn.Conv3d`", video_mae, {"target_modules": ["projection"]}),
    Kind("attention", "`nn.MultiheadAttention`", Attention, {"target_modules": ["attention"]}),
    Kind("experts", "experts of shape `(experts, out, in)`, by `target_parameters`", qwen3_moe, _BOTH_EXPERTS),
    Kind(
        "experts-transposed", "experts of shape `(experts, in, out)`, by `target_parameters`", gpt_oss, _BOTH_EXPERTS
    ),
    Kind("matrix", "a matrix, by `target_parameters`", MatrixParameter, {"target_parameters": ["mixer.mixing"]}),
]
# Options of `LoraConfig`, on layers that have a row above.
_OPTIONS = [
    replace(kind, is_option=True)
    for kind in (
        Kind("rslora", "rsLoRA", llama, _LINEAR | {"use_rslora": True}),
        Kind(
            "patterns",
            "`rank_pattern`, `alpha_pattern`",
            gpt2,
            _CONV1D | {"rank_pattern": {"c_attn": 4}, "alpha_pattern": {"mlp.c_proj": 5}},
        ),
        Kind("dropout", "`lora_dropout`", llama, _LINEAR | {"lora_dropout": 0.3}),
        Kind("lora-bias", "`lora_bias`", roberta, _HEAD | {"lora_bias": True}),
        Kind("bias", "`bias`", roberta, _HEAD | {"bias": "lora_only"}),
        Kind("modules-to-save", "`modules_to_save`", llama, _LINEAR | {"modules_to_save": ["norm", "lm_head"]}),
        Kind("tokens", "`trainable_token_indices`", llama, _LINEAR | {"trainable_token_indices": [4, 9]}),
        Kind("pissa", "PiSSA (`peft_config` with a plain model)", llama, _LINEAR | {"init_lora_weights": "pissa"}),
        Kind(
            "pissa-fast",
            "PiSSA by a fast SVD",
            gpt2,
            _CONV1D | {"init_lora_weights": "pissa_niter_4"},
        ),
        Kind("olora", "OLoRA", llama, _LINEAR | {"init_lora_weights": "olora"}),
    )
]
_TIED = [
    Kind("tied-embedding", "tied `nn.Embedding`", tied_llama, {"target_modules": ["embed_tokens"]}, storage="adapter"),
    Kind("tied-head", "tied `lm_head`", tied_llama, {"target_modules": ["lm_head", "q_proj"]}, storage="adapter"),
]
NOT_BESIDE = ("attention", "experts", "experts-transposed", "matrix")


def _on(base: str, kind: Kind, **changes: Any) -> Kind:
    """The same kind on a base of lower precision."""
    return replace(kind, **({"name": f"{kind.name}-{base}", "base": base, "storage": "adapter"} | changes))


_HALF = [
    _on(base, kind) for kind in (*_FLOAT32, *_TIED) if kind.name not in NOT_BESIDE for base in ("bfloat16", "float16")
]
_WHOLLY_HALF = [
    _on(
        base,
        kind,
        name=f"{kind.name}-wholly-{base}",
        what=f"{kind.what}, adapters of the base's dtype (`autocast_adapter_dtype=False`)",
        low_precision_adapter=True,
    )
    for kind in (_FLOAT32[0], _FLOAT32[2])
    for base in ("bfloat16", "float16")
]
_IN_BITS = [_on(base, kind) for kind in _FLOAT32[:2] for base in QUANTIZED]
_ON_LOWER = [_on("bfloat16", kind) for kind in _OPTIONS]
_OPTIONS_IN_BITS = [_on("nf4", kind) for kind in _OPTIONS if kind.name in ("rslora", "modules-to-save", "tokens")]

SUPPORTED = {
    kind.name: kind
    for kind in (*_FLOAT32, *_TIED, *_HALF, *_WHOLLY_HALF, *_IN_BITS, *_OPTIONS, *_ON_LOWER, *_OPTIONS_IN_BITS)
}

_OWN_DTYPE = "PEFT adds their LoRA to the weight in the weight's own dtype, so nothing beside it would be exact"


def _refused(name: str, what: str, model: Callable[[], nn.Module], says: str, why: str, **kwargs: Any) -> Kind:
    base, custom = kwargs.pop("base", "float32"), kwargs.pop("custom_layers", {})
    return Kind(name, what, model, kwargs, base, storage=None, says=says, why=why, custom_layers=custom)


_REFUSED = [
    _refused(
        "custom",
        "any other class of LoRA layer: GPTQ, AWQ, HQQ, torchao, tensor-parallel, your own",
        LayerOfItsOwn,
        "is a LoRA `LoraDoubled`, for which exactness was never shown",
        "exactness was never shown for it",
        target_modules=["doubled"],
        custom_layers={Doubled: LoraDoubled},
    ),
    _refused(
        "dora",
        "DoRA",
        llama,
        "DoRA rescales every row",
        "it rescales every row of the base weight, so the exact residual has full rank: neither two thin factors to "
        "send nor anything that could ride beside a low-precision base",
        **_LINEAR | {"use_dora": True},
    ),
    _refused(
        "alora",
        "aLoRA",
        llama,
        "depends on the input",
        "its update depends on the input (tokens before the invocation do not get it), a residual's cannot",
        **_LINEAR | {"alora_invocation_tokens": [5, 6]},
    ),
    _refused(
        "grouped",
        "convolutions with groups",
        GroupedConvolution,
        "with 2 groups",
        "PEFT cannot say what their LoRA adds to the weight",
        target_modules=["convolution"],
    ),
    _refused(
        "replicated",
        "`layer_replication`",
        two_layers,
        "share one base weight",
        "several layers share one base weight, so a residual would act in all of them",
        **_LINEAR | {"layer_replication": [(0, 2), (0, 1)]},
    ),
    _refused(
        "shared-factors",
        "LoRA factors that two layers share (`ensure_weight_tying=True`)",
        tied_llama,
        "share their LoRA factors",
        "their update would be counted twice",
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    ),
    _refused(
        "attention-bfloat16",
        "`nn.MultiheadAttention` on a bfloat16 or float16 base",
        Attention,
        "LoRA `MultiheadAttention`, which PEFT adds to the weight",
        _OWN_DTYPE,
        target_modules=["attention"],
        base="bfloat16",
    ),
    _refused(
        "experts-bfloat16",
        "`target_parameters` on a bfloat16 or float16 base",
        qwen3_moe,
        "LoRA `ParamWrapper`, which PEFT adds to the weight",
        _OWN_DTYPE,
        **_BOTH_EXPERTS,
        base="bfloat16",
    ),
    _refused(
        "pissa-nf4",
        "PiSSA, OLoRA on a quantized base",
        llama,
        "decomposes the base weight",
        "they decompose the weight, which is there in four or eight bits only",
        **_LINEAR | {"init_lora_weights": "pissa"},
        base="nf4",
    ),
    _refused(
        "pissa-embedding",
        "PiSSA on other layers than `nn.Linear` and `Conv1D`, OLoRA on others than `nn.Linear`",
        llama,
        "failed for",
        "PEFT defines them for the matrices of these",
        target_modules=["embed_tokens"],
        init_lora_weights="pissa",
    ),
    _refused(
        "olora-conv1d",
        "",
        gpt2,
        "does not fit",
        "",
        **_CONV1D | {"target_modules": ["attn.c_proj"], "init_lora_weights": "olora"},
    ),
    _refused(
        "eva",
        "starts that need data (EVA, CorDA, LoRA-GA) or another base weight (LoftQ)",
        llama,
        "needs data or another base weight",
        "they cannot be taken back exactly",
        **_LINEAR | {"init_lora_weights": "eva"},
    ),
]

REFUSED = {kind.name: kind for kind in _REFUSED}


# ---- The tables ----


BASES = ("float32", "bfloat16", "float16", *QUANTIZED)


def supported_table() -> str:
    """Where `"auto"` holds the residual of every kind of layer, in Markdown."""
    cells: dict[str, dict[str, str]] = {}
    for kind in SUPPORTED.values():
        if not kind.is_option:
            cells.setdefault(kind.what, {})[kind.base] = f"`{kind.storage}`"
    for kind in _FLOAT32:
        if kind.name in NOT_BESIDE:
            cells[kind.what] |= {"bfloat16": "refused", "float16": "refused"}
    rows = [[what, *(found.get(base, "") for base in BASES)] for what, found in cells.items()]
    return _table(("LoRA on", *(f"{base} base" for base in BASES)), rows)


def options() -> str:
    """What else is supported, on all of these."""
    return ", ".join(kind.what for kind in _OPTIONS)


def refused_table() -> str:
    """What is refused and why, in Markdown."""
    return _table(("refused", "why"), [[kind.what, kind.why] for kind in _REFUSED if kind.what])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(supported_table(), options(), refused_table(), sep="\n\n")
