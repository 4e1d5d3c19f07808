"""What a model card says about the model itself, whoever writes the card."""

from __future__ import annotations

from typing import Any, cast

import transformers
from peft import LoraConfig
from transformers import PreTrainedModel

from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_reference import BaseReference
from fedex_hf.saving import SavedModel


# What people fine-tune with LoRA, the more particular class first: a model may stand under several.
_AUTO_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
)


def model_facts(adapted: AdaptedModel, saved: SavedModel) -> dict[str, Any]:
    """The fields of a `RunCard` that the model and the way it was saved decide.

    Args:
        adapted: The model.
        saved: What `save_model` returned.
    """
    base = cast(PreTrainedModel, adapted.model.get_base_model())
    reference = BaseReference.of(adapted.model)
    return {
        "round_format": saved.format,
        "dtype": saved.dtype,
        "cast_survival": saved.cast_survival,
        "base_dtype": saved.base_dtype or "float32",
        "quantization": reference.quantization,
        "residual_storage": adapted.storage,
        "model_class": type(base).__name__,
        "auto_class": auto_class(base),
        "num_labels": base.config.num_labels if "Classification" in type(base).__name__ else None,
        "base_model": reference.name,
        "base_revision": reference.revision,
        "lora": non_default_lora(cast(LoraConfig, adapted.model.peft_config[adapted.adapter])),
    }


def auto_class(base: PreTrainedModel) -> str:
    """Name of the `AutoModelFor*` that loads a model, such as `"AutoModelForCausalLM"`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> auto_class(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)))
        'AutoModelForCausalLM'
    """
    name, model_type = type(base).__name__, base.config.model_type
    for each in _AUTO_CLASSES:
        names = getattr(transformers, each)._model_mapping._model_mapping.get(model_type, ())
        if name in ((names,) if isinstance(names, str) else names):
            return each
    return "AutoModel"


def non_default_lora(config: LoraConfig) -> dict[str, Any]:
    """The fields of a LoRA configuration that a reader wants to know."""
    default = LoraConfig()
    hidden = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
    fields: dict[str, Any] = {"r": config.r, "lora_alpha": config.lora_alpha}
    for name, value in config.to_dict().items():
        if name not in hidden and value != getattr(default, name, None) and value not in (None, {}, []):
            fields[name] = sorted(value) if isinstance(value, set) else value
    return fields
