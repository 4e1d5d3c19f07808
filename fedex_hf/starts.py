"""LoRA put on a plain model, also with a start that PEFT takes out of the base weight (PiSSA, OLoRA).

Such a start writes `W0 - s B0 A0` into the base, rounded to its dtype, and anything that loads the model later would
have to repeat it. Here it is the residual of round 0, `-s B0 A0`: the base stays what it was, and saving, resuming,
continuing and a plain LoRA on the original base need nothing of their own.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.ledger import Ledger
from fedex_hf.lora_site import LoraSite, sites_of
from fedex_hf.updates import LowRankDelta


PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def put_lora_on(model: nn.Module, peft_config: PeftConfig, seed: int) -> tuple[PeftModel, Ledger]:
    """`get_peft_model`, and the residual of round 0.

    Args:
        model: A plain model; it is changed in place, as PEFT does.
        peft_config: A `LoraConfig`; not changed.
        seed: Of the factors' start.

    Raises:
        UnsupportedModelError: If `init_lora_weights` needs data, or does not fit a layer.
    """
    start = getattr(peft_config, "init_lora_weights", True)
    set_seed(seed)
    if start in PLAIN_STARTS:
        return cast(PeftModel, get_peft_model(model, peft_config)), Ledger()
    check_start(peft_config)
    plain = copy.copy(peft_config)
    cast(LoraConfig, plain).init_lora_weights = True
    adapted = cast(PeftModel, get_peft_model(model, plain))
    sites = sites_of(adapted, adapted.active_adapters[0])
    return adapted, Ledger().plus({name: _taken_out(site, str(start)) for name, site in sites.items()}, sites)


def check_start(config: PeftConfig) -> None:
    """Refuse starts that cannot be undone exactly.

    Raises:
        UnsupportedModelError: If `init_lora_weights` is none of the known ones.
    """
    start = getattr(config, "init_lora_weights", True)
    if start not in PLAIN_STARTS and not _comes_from_weight(start):
        raise UnsupportedModelError(
            f"`init_lora_weights={start!r}` is not supported: such a start needs data or another base weight. "
            'Allowed: True, False, "gaussian", "orthogonal", and for a plain model together with `peft_config` also '
            '"pissa", "pissa_niter_N" and "olora".'
        )


def _comes_from_weight(start: Any) -> bool:
    return isinstance(start, str) and (start == "olora" or start.startswith("pissa"))


def _taken_out(site: LoraSite, start: str) -> LowRankDelta:
    """Give a layer its start, put its weight back, and return what the start had taken out of it."""
    weight = site.base_weight
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not hasattr(site.layer, "pissa_init"):
        raise UnsupportedModelError(
            f"`init_lora_weights={start!r}` decomposes the base weight of `{site.name}`, which is {weight.dtype}. "
            "Load the model in float32, float16 or bfloat16, or use another start."
        )
    before, shapes = weight.detach().clone(), [each.shape for each in site.parameters]
    try:
        if start == "olora":
            site.layer.olora_init(site.adapter)
        else:
            site.layer.pissa_init(site.adapter, start)
    except Exception as error:
        raise UnsupportedModelError(f"`init_lora_weights={start!r}` failed for `{site.name}`: {error}") from error
    finally:
        weight.data = before
    # PEFT takes no notice of a transposed weight in OLoRA, which shows only where it is not square.
    if [each.shape for each in site.parameters] != shapes or (start == "olora" and site.layer.fan_in_fan_out):
        raise UnsupportedModelError(
            f"`init_lora_weights={start!r}` does not fit `{site.name}`, a LoRA `{type(site.layer).__name__}` on "
            f"`{type(site.layer.get_base_layer()).__name__}`. Use another start, or leave the layer out."
        )
    taken = site.read()
    return LowRankDelta(taken.A.float(), -taken.B.float(), taken.scaling)
