"""One plain LoRA on the original base: ledger and trained adapter as one product per layer, scaling 1."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig
from transformers.utils import logging

from fedex_hf.layouts import AttentionOutputLayout, ExpertsLayout
from fedex_hf.ledger import Ledger
from fedex_hf.lora_site import LoraSite
from fedex_hf.low_rank import max_useful_rank, padded, plain_product
from fedex_hf.updates import LowRankDelta


logger = logging.get_logger(__name__)


def plain_loras(
    sites: Mapping[str, LoraSite], ledger: Ledger, dtype: torch.dtype | None = None
) -> dict[str, LowRankDelta]:
    """`ledger + adapter` of every layer as one product of the numerical rank it needs, scaling 1.

    Args:
        sites: The adapted layers.
        ledger: All residuals so far.
        dtype: Of the factors; float32 if `None`.

    Returns:
        Layer name -> factors. Layers that PEFT knows by one name (the two projections of an attention layer) get the
        larger one's rank, because a configuration can give a name one rank only.
    """
    found = {name: plain_lora(site, ledger, dtype) for name, site in sites.items()}
    ranks: dict[str, int] = {}
    for name, delta in found.items():
        key = config_key(sites[name])
        ranks[key] = max(ranks.get(key, 0), delta.rank)
    return {name: padded(delta, ranks[config_key(sites[name])]) for name, delta in found.items()}


def plain_lora(site: LoraSite, ledger: Ledger, dtype: torch.dtype | None = None) -> LowRankDelta:
    """`ledger + adapter` of one layer as one product of the numerical rank it needs, scaling 1.

    Args:
        site: The layer.
        ledger: All residuals so far, factors or dense.
        dtype: Of the factors; float32 if `None`.
    """
    delta = site.read()
    if site.name in ledger.matrices:
        product = site.factored(site.dense(delta) + ledger.matrices[site.name].double())
    else:
        parts = [ledger.factors[site.name], delta] if site.name in ledger.factors else [delta]
        product = plain_product(parts)
    if product.rank >= max_useful_rank(product):
        logger.info(f"`{site.name}`: rank {product.rank}; two factors are as large as the dense weight.")
    dtype = torch.float32 if dtype is None else dtype
    return LowRankDelta(product.A.to(dtype), (product.B * product.scaling).to(dtype), 1.0)


def plain_lora_config(original: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """`original` with a rank per layer and scaling 1.

    Args:
        original: Targets, modules to save and task are taken from it.
        ranks: Layer, by the name that `config_key` gives -> rank.
    """
    config = copy.copy(original)
    config.r = config.lora_alpha = max(ranks.values())
    # `^` anchors the name: PEFT matches the end of a layer's name otherwise.
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    # Any other start would be run again by whoever loads the adapter.
    config.use_rslora, config.init_lora_weights = False, True
    return config


def config_of(original: LoraConfig, sites: Mapping[str, LoraSite], factors: Mapping[str, LowRankDelta]) -> LoraConfig:
    """The configuration with which PEFT loads what `plain_loras` returned.

    Args:
        original: Of the trained adapter.
        sites: The adapted layers.
        factors: Layer name -> factors.
    """
    return plain_lora_config(original, {config_key(sites[name]): delta.rank for name, delta in factors.items()})


def config_key(site: LoraSite) -> str:
    """The name by which PEFT's `rank_pattern` and `alpha_pattern` know a layer: a module's, or a parameter's."""
    if isinstance(site.layout, ExpertsLayout):
        return site.weight_name
    module = site.weight_name.rpartition(".")[0]
    return module.removesuffix(".out_proj") if isinstance(site.layout, AttentionOutputLayout) else module
