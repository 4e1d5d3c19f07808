"""One plain LoRA instead of adapter and residuals, and the way back, on a model in memory.

    trained adapter + residuals  --convert_to_plain_lora-->    one LoRA of the rank that both need together
    one LoRA of large rank       --convert_from_plain_lora-->  an adapter of small rank to train, the rest as residuals

Both keep the function, work in place, and make no copy of the base model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from fedex_hf.aggregators.assignments import widened
from fedex_hf.base_model import AdaptedModel
from fedex_hf.carrier import CARRIER, content, trainability_kept
from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.ledger import Ledger
from fedex_hf.lora_site import LoraSite, sites_of
from fedex_hf.low_rank import at_scaling, compress, concatenate, doubled, energy
from fedex_hf.model_checks import trained_adapter
from fedex_hf.plain_lora import config_of, plain_loras
from fedex_hf.updates import LowRankDelta


@torch.no_grad()
def convert_to_plain_lora(model: AdaptedModel | PeftModel) -> PeftModel:
    """The original base with one standard LoRA that computes the same function.

    Its factors are float32, of the numerical rank that adapter and residuals need together; all else that was trained
    stays. Plain `save_pretrained` and `from_pretrained` of PEFT take it from there. In place, so a trainer that holds
    the model cannot go on with it.

    Args:
        model: `trainer.adapted`; or a `PeftModel` with the residuals in a second adapter, such as `trainer.model`
            where `trainer.adapted.storage` is `"adapter"`, or one that PEFT has loaded both adapters into.

    Raises:
        ValueError: If `model` is a `PeftModel` without residuals beside the base: nothing in it says what the original
            base was. Or if it holds one client's state.
        UnsupportedModelError: If it carries anything for a layer that the trained adapter does not adapt.
    """
    if isinstance(model, AdaptedModel):
        if model.holds_offsets:
            raise ValueError("The model holds what one client has of its own. Convert it between two rounds.")
        sites, ledger = model.sites, model.ledger
    else:
        sites = _trained_sites(model)
        ledger = Ledger(content(model, sites))
        if CARRIER not in model.peft_config:
            raise ValueError(
                f"The model has no adapter `{CARRIER}` with its residuals. If they were added to the base weights, "
                "only the trainer knows the original ones: pass `trainer.adapted` instead of `trainer.model`."
            )
    factors = plain_loras(sites, ledger)
    if isinstance(model, AdaptedModel):
        model.install(Ledger())
        model = model.model
    adapter = next(iter(sites.values())).adapter
    config = config_of(cast(LoraConfig, model.peft_config[adapter]), sites, factors)
    if CARRIER in model.peft_config:
        with trainability_kept(model):  # `delete_adapter` thaws whatever stays active
            model.delete_adapter(CARRIER)
    for name, site in sites.items():
        _put(site, factors[name], factors[name].rank)
    model.peft_config[adapter] = config
    return model


@torch.no_grad()
def convert_from_plain_lora(model: PeftModel, r: int, lora_alpha: float | None = None) -> PeftModel:
    """An adapter of small rank to train, and the rest of one large LoRA as residuals beside the base.

    Each layer's adapter is the best approximation of rank `r` (Eckart-Young), and what it leaves out rides in the
    frozen adapter `fedex_residual`, so the function stays what it was. `FederatedTrainer` goes on from there; any
    base can be under it. In place.

    Args:
        model: A `PeftModel` with one LoRA, such as a round of the format `"lora"` that PEFT has loaded. All that its
            adapter holds becomes trainable.
        r: Rank of the adapter, the same in every layer.
        lora_alpha: PEFT's; the scaling is `lora_alpha / r`. `r` if `None`.

    Raises:
        ValueError: If `r` or `lora_alpha` is not positive, or the model already has residuals beside its base.
        UnsupportedModelError: If a layer cannot have a second adapter beside the trained one.
    """
    if type(r) is not int or r < 1:
        raise ValueError(f"`r={r!r}` is no rank. Allowed: an integer of at least 1.")
    alpha = r if lora_alpha is None else lora_alpha
    if not alpha > 0:
        raise ValueError(f"`lora_alpha={lora_alpha!r}` is not allowed. Allowed: a positive number.")
    if CARRIER in model.peft_config:
        raise ValueError(f"The model has an adapter `{CARRIER}` already. Call `convert_to_plain_lora` first.")
    sites = _trained_sites(model)
    for name, site in sites.items():
        if not site.layout.carries:
            raise UnsupportedModelError(
                f"Layer `{name}` is a LoRA `{type(site.layer).__name__}`, beside which no residual can ride exactly. "
                "Train the LoRA at the rank it has."
            )
    adapter = next(iter(sites.values())).adapter
    rests = {}
    for name, site in sites.items():
        kept, rest = split(site.read(), r, alpha / r, name)
        _put(site, kept, alpha)
        if rest is not None:
            rests[name] = rest
    config = copy.copy(cast(LoraConfig, model.peft_config[adapter]))
    config.r, config.lora_alpha = r, cast(int, alpha)  # PEFT takes any number
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.use_rslora, config.init_lora_weights, config.inference_mode = False, True, False
    model.peft_config[adapter] = config
    model.set_adapter(adapter)  # makes trainable what was loaded frozen, heads included
    adapted = AdaptedModel(model, changes_base=True, storage="adapter")
    adapted.install(Ledger().plus(rests, adapted.sites))
    return adapted.model


def split(delta: LowRankDelta, rank: int, scaling: float, key: str) -> tuple[LowRankDelta, LowRankDelta | None]:
    """A product's best approximation of a rank, and the rest.

    Args:
        delta: Factors of any rank.
        rank: Of the approximation; where the product has less, `A` gets fresh rows and `B` columns of zeros.
        scaling: Of the approximation.
        key: Decides the draw of fresh rows.

    Returns:
        The approximation in float32, and what `delta` is more than that, in float32 and with the same scaling, or
        `None` if that is no more than rounding.
    """
    best = compress(doubled(delta), rank, resolution=torch.float32)
    best = widened(at_scaling(best, scaling), rank, f"{key}/{rank}")
    kept = LowRankDelta(best.A.float(), best.B.float(), scaling)
    rest = concatenate([doubled(delta), replace(doubled(kept), B=-kept.B.double())])
    whole, left = energy(delta), energy(rest)
    rounding = torch.finfo(torch.float32).eps ** 2 * whole
    if left <= rounding:
        return kept, None
    rest = compress(rest, tolerance=rounding / left)
    return kept, LowRankDelta(rest.A.float(), (rest.B * (rest.scaling / scaling)).float(), scaling)


def _trained_sites(model: PeftModel) -> dict[str, LoraSite]:
    return sites_of(model, trained_adapter(model))


def _put(site: LoraSite, delta: LowRankDelta, alpha: float) -> None:
    """Give a layer other factors, with all that PEFT notes about them."""
    layer, adapter, before = site.layer, site.adapter, site.parameters
    if site.bias is not None:  # PEFT scales it as well
        site.bias.mul_(site.scaling / delta.scaling)
    A, B = (
        nn.Parameter(each.to(old.device).contiguous(), requires_grad=old.requires_grad)
        for each, old in zip(site.layout.shaped(layer, adapter, delta.A, delta.B), before, strict=True)
    )
    site.exchange(A, B, delta.scaling)
    layer.lora_alpha[adapter], layer.use_rslora[adapter] = alpha, False
    if adapter in layer.lora_A:  # what the modules show of themselves
        for module, weight in ((layer.lora_A[adapter], A), (layer.lora_B[adapter], B)):
            sizes = (
                ("out_features", "in_features") if isinstance(module, nn.Linear) else ("out_channels", "in_channels")
            )
            module.__dict__ |= dict(zip(sizes, weight.shape, strict=False))
