"""Where a run's base model came from, and how it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME


BY_HAND = "layers that were put in by hand"


@dataclass(frozen=True)
class BaseReference:
    """Where the original base came from, and how it is stored.

    Args:
        name: Hub id or local path, or `None` for a model that was built from a config.
        revision: Commit on the Hub, where known: what the adapter's config names as `revision`, otherwise the one that
            `from_pretrained` last took `main` from.
        quantization: Method that its weights are quantized with, such as `"bitsandbytes"`; `None` if they are not.
    """

    name: str | None
    revision: str | None
    quantization: str | None = None

    @classmethod
    def of(cls, model: PeftModel) -> BaseReference:
        """What transformers noted when it loaded the base, and the commit, which it does not note (5.18 to 5.23)."""
        base = cast(PreTrainedModel, model.get_base_model())
        name = getattr(base.config, "_name_or_path", None) or None
        adapter = model.active_adapters[0]
        return cls(name, _commit_in_cache(name, model.peft_config[adapter].revision), quantization_of(base))


def quantization_of(base: torch.nn.Module) -> str | None:
    """The method that a model's weights are quantized with, `None` if they are plain numbers."""
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        return str(getattr(method, "value", method))
    plain = all(each.is_floating_point() for name, each in base.named_parameters() if name.endswith("weight"))
    return None if plain else BY_HAND


def _commit_in_cache(name: str | None, revision: str | None) -> str | None:
    """The commit that a repository's branch or tag was last loaded from; `revision` itself where that is unknown."""
    if name is None or Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(file).parent.name if isinstance(file, str) else revision
