"""An adapted model without its weights: what PEFT says about names, shapes, layout and scaling."""

from __future__ import annotations

import copy
import warnings
from typing import cast

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedConfig, PreTrainedModel

from fedex_hf.adapter_files import AdapterFile
from fedex_hf.layouts import Layout, UnsupportedModelError
from fedex_hf.lora_site import PREFIX, sites_of


class Skeleton:
    """The adapted model on the meta device: what PEFT says about names, shapes, layout and scaling.

    Args:
        config: Of the base model.
        lora: Of an adapter.

    Attributes:
        sites: Layer name -> the layer.
        shapes: Key of an adapter's file -> shape.
        sharing: Name of a base parameter -> all names it has in the model; more than one if it is tied.
        relabelled: Whether the number of labels is the adapter's, and not that of the base's own configuration.

    Raises:
        UnsupportedModelError: If the class of the model is not known, or a layer cannot be aggregated exactly.
    """

    relabelled = False

    def __init__(self, config: PreTrainedConfig, lora: LoraConfig) -> None:
        self.config = config
        lora = copy.deepcopy(lora)
        lora.inference_mode = lora.init_lora_weights = False  # nothing here has values to initialise
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # PEFT: that it sets `fan_in_fan_out` for Conv1D
            try:
                base = _build(copy.deepcopy(config), lora)
                base.tie_weights()
            except UnsupportedModelError:
                raise
            except Exception as error:  # whatever a configuration from elsewhere makes of it
                raise UnsupportedModelError(
                    f"No model can be built from a `{type(config).__name__}` for the task {lora.task_type}: {error}"
                ) from error
            try:
                model = get_peft_model(base, lora, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
            except Exception as error:  # whatever a configuration from elsewhere makes of it
                raise UnsupportedModelError(
                    f"PEFT cannot put the adapter on `{type(base).__name__}`: {error}"
                ) from error
        self.model, self.lora = cast(PeftModel, model), lora
        self.base_class = type(base)
        self.sites = sites_of(self.model, "default")
        for name, site in self.sites.items():
            if type(site.layout) is not Layout:
                raise UnsupportedModelError(
                    f"Layer `{name}` is a LoRA `{type(site.layer).__name__}`. Adapters in files can be aggregated for "
                    "LoRA on `nn.Linear` and `Conv1D` so far; a `FederatedTrainer` takes the other kinds as well."
                )
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        self.shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not any(part in name for part in (".lora_", ".modules_to_save.", ".token_adapter.")):
                names.setdefault(id(parameter), []).append(base_name(name))
        self.sharing = {name: together for together in names.values() for name in together}

    @classmethod
    def of(cls, config: PreTrainedConfig, adapter: AdapterFile) -> Skeleton:
        """For a base whose configuration knows nothing of the task: with as many labels as the adapter's head has."""
        skeleton = cls(config, adapter.config)
        entries, labels = adapter.tensors.entries, getattr(config, "num_labels", None)
        sizes = {
            entries[key].shape[0]
            for key, shape in skeleton.shapes.items()
            if ".lora_" not in key and key in entries and shape and shape[0] == labels
            if entries[key].shape[1:] == shape[1:] and entries[key].shape != shape
        }
        if len(sizes) != 1:
            return skeleton
        config = copy.deepcopy(config)
        config.num_labels = sizes.pop()
        skeleton = cls(config, adapter.config)
        skeleton.relabelled = True
        return skeleton


def base_name(name: str) -> str:
    """The name that a parameter, or an adapter's tensor that replaces one, has in the plain base model."""
    name = name.removeprefix(PREFIX)
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(".lora_B.bias", ".bias")


def _build(config: PreTrainedConfig, lora: LoraConfig) -> PreTrainedModel:
    """A base model by the adapter's task, by the class PEFT noted, or by the base's own configuration."""
    # A configuration can name a repository to fetch code for either from.
    config._attn_implementation = config._experts_implementation = "eager"
    if lora.task_type is not None:
        wrapper = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(lora.task_type)
        for each in vars(peft.auto).values():
            if wrapper is not None and getattr(each, "_target_peft_class", None) is wrapper:
                return each._target_class.from_config(config, trust_remote_code=False)
        raise UnsupportedModelError(f"`task_type={lora.task_type!r}` of the adapter is not one that PEFT knows.")
    name = (lora.auto_mapping or {}).get("base_model_class") or next(iter(config.architectures or []), None)
    # By name from transformers alone: what an adapter's file says is never imported.
    found = getattr(transformers, str(name), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if found is None or not is_model or type(config) is not found.config_class:
        raise UnsupportedModelError(
            f"The class of the base model is not known: `{name}` is no model of transformers for a "
            f"`{type(config).__name__}`. Save the adapters with a `task_type`, such as `CAUSAL_LM`."
        )
    return found(config)
