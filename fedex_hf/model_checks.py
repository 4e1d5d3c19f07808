"""Room 5: which models can be aggregated exactly, and where their residuals can be; what cannot is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from torch import nn

from fedex_hf.carrier import CARRIER
from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.lora_site import LoraSite
from fedex_hf.starts import PLAIN_STARTS, check_start


STORAGES = ("auto", "base", "adapter")


def check_peft_type(what: str, config: PeftConfig) -> None:
    """Refuse adapters other than LoRA.

    Raises:
        UnsupportedModelError: If `config` is of another type; `what` begins the message.
    """
    if config.peft_type != PeftType.LORA:
        raise UnsupportedModelError(
            f"{what} is of the type {config.peft_type}. Allowed: LORA, because the residual of FedEx-LoRA (arXiv "
            "2410.09432) is defined for products of two factors. Use a `LoraConfig`."
        )


def trained_adapter(model: PeftModel) -> str:
    """Name of the one LoRA adapter that is active, beside a carrier of residuals.

    Raises:
        UnsupportedModelError: If there is none, more than one, or one of another type.
    """
    active = [name for name in model.active_adapters if name != CARRIER]
    if len(active) != 1:
        raise UnsupportedModelError(
            f"The model has {len(active)} active adapters ({active}). Allowed: one; call `model.set_adapter(name)`."
        )
    check_peft_type(f"The adapter `{active[0]}`", model.peft_config[active[0]])
    return active[0]


def places_of(model: nn.Module) -> dict[int, list[str]]:
    """Storage of a parameter -> all names that it has in a model; more than one if it is tied."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter.data_ptr(), []).append(name)
    return places


def check_peft_model(model: nn.Module) -> PeftModel:
    """The model itself, if it has the one LoRA adapter that can be trained.

    Raises:
        UnsupportedModelError: If it has none, or one whose base cannot hold a residual.
    """
    if not isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"`model` is a `{type(model).__name__}` without LoRA. Pass `peft_config=LoraConfig(...)`, or a model that "
            "`peft.get_peft_model` has returned."
        )
    adapter = trained_adapter(model)
    check_start(model.peft_config[adapter])
    config = cast(LoraConfig, model.peft_config[adapter])
    if config.init_lora_weights not in PLAIN_STARTS:
        raise UnsupportedModelError(
            f"The adapter `{adapter}` was started with `init_lora_weights={config.init_lora_weights!r}`, which has "
            "already changed the base weights. Pass the plain model together with `peft_config`: the start then "
            "becomes the residual of round 0."
        )
    if config.layer_replication:
        raise UnsupportedModelError(
            f"`layer_replication={config.layer_replication}` makes several layers share one base weight, so a "
            "residual would act in all of them. Replicate the layers in the model itself, and leave it out of your "
            "`LoraConfig`."
        )
    return model


def decide_storage(model: PeftModel, sites: Mapping[str, LoraSite], storage: str) -> str:
    """`"base"` or `"adapter"`.

    Raises:
        ValueError: If `storage` is unknown.
        UnsupportedModelError: If a layer can hold its residual in neither, or not in the one that was asked for.
    """
    if storage not in STORAGES:
        raise ValueError(f"`residual_storage={storage!r}`. Allowed: {', '.join(map(repr, STORAGES))}.")
    not_base, instead = _why_not_base(model, sites)
    if not not_base and storage != "adapter":
        return "base"
    if storage == "base":
        raise UnsupportedModelError(
            f'{not_base} Use `residual_storage="adapter"`, which leaves the base alone{instead}.'
        )
    for name, site in sites.items():
        if not site.layout.carries:
            raise UnsupportedModelError(
                f"Layer `{name}` is a LoRA `{type(site.layer).__name__}`, which PEFT adds to the weight in the "
                "weight's own dtype in every forward pass, so a residual beside the weight would not be exact. "
                f"{not_base or 'You asked for `adapter`.'} Load the model with `dtype=torch.float32` and untied "
                'weights and use `residual_storage="auto"`, or leave such layers out of your `LoraConfig`.'
            )
    return "adapter"


def _why_not_base(model: PeftModel, sites: Mapping[str, LoraSite]) -> tuple[str, str]:
    """Why a residual cannot be added to the base weights, and how it could be; both empty if it can."""
    places = places_of(model)
    for name, site in sites.items():
        weight = site.base_weight
        if site.layout.quantized:
            return (
                f"The base weight of `{name}` is quantized ({type(weight).__name__}): with a residual added it would "
                "have to be quantized again, and most of the residual would be lost.",
                ", or load the model without `quantization_config`, with `dtype=torch.float32`",
            )
        if weight.dtype != torch.float32:
            return (
                f"The base weight of `{name}` is {weight.dtype}: a residual added to it would round away (80 to 99 % "
                "of it is lost in bfloat16).",
                ", or load the model with `dtype=torch.float32`",
            )
        shared = places[weight.data_ptr()]
        if len(shared) > 1:
            return (
                f"The base weight of `{name}` is one tensor with several places in the model ({', '.join(shared)}): "
                "a residual added to it would act in all of them.",
                ", or untie the weights (`tie_word_embeddings=False`)",
            )
    return "", ""


def check_not_shared(sites: Mapping[str, LoraSite]) -> None:
    """Refuse layers that share their factors.

    Raises:
        UnsupportedModelError: If two do.
    """
    owners: dict[int, str] = {}
    for name, site in sites.items():
        for each in site.parameters:
            other = owners.setdefault(each.data_ptr(), name) if each.numel() else name
            if other != name:
                raise UnsupportedModelError(
                    f"The layers `{other}` and `{name}` share their LoRA factors, so their update would be counted "
                    "twice. Train one of them only, or set `ensure_weight_tying=False` in your `LoraConfig`."
                )


def keep_four_bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes (0.50) from packing 4-bit weights anew in the first evaluation on some CPUs.

    There it rounds their scales to bfloat16: the base would be another one from then on.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks what is packed already
            cast(Any, module).support_avx512bf16_for_cpu = False


def check_no_running_statistics(model: nn.Module) -> None:
    """Refuse layers that learn in the forward pass, as batch normalization does.

    Raises:
        UnsupportedModelError: If there is one.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise UnsupportedModelError(
                f"`{name}` keeps running statistics, which would leak from one client to the next. Replace it by "
                "`LayerNorm` or `GroupNorm`, or set `track_running_stats=False`."
            )
