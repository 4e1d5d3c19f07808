"""What is left of an update in a file of 16-bit numbers, measured."""

from __future__ import annotations

import math

import torch
from transformers.utils import logging

from fedex_hf.base_model import AdaptedModel
from fedex_hf.ledger import Ledger
from fedex_hf.lora_site import LoraSite
from fedex_hf.plain_lora import plain_lora


logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFE_SHARE = 0.99  # of the update; below it a cast is worth a warning


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype that can be written, `None` for any other."""
    if isinstance(dtype, torch.dtype):
        return dtype if dtype in DTYPES.values() else None
    return DTYPES.get(str(dtype))


def name_of_dtype(dtype: torch.dtype) -> str:
    """Such as `"float32"`."""
    return str(dtype).removeprefix("torch.")


def base_dtype(adapted: AdaptedModel) -> torch.dtype:
    """The dtype of the adapted base weights; of a quantized base, that of what is not quantized in it."""
    site = next(iter(adapted.sites.values()))
    if not site.layout.quantized:
        return site.base_weight.dtype
    return next(each.dtype for each in adapted.model.get_base_model().parameters() if each.is_floating_point())


def carrying_dtype(adapted: AdaptedModel, format: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the tensors that carry the update in a file.

    Args:
        adapted: The model.
        format: `"full"`, `"lora"` or `"merged"`.
        dtype: What the file is cast to, `None` for no cast.
    """
    if format == "lora":
        return dtype or torch.float32
    site = next(iter(adapted.sites.values()))
    if format == "full" and (adapted.storage == "adapter" or site.layout.quantized):
        return torch.float32  # all of it is in the adapter
    return dtype or site.base_weight.dtype


def measure_survival(adapted: AdaptedModel, ledger: Ledger, format: str, dtype: torch.dtype | None) -> float | None:
    """Measure and log the share of the update that survives in a 16-bit file.

    Args:
        adapted: The model with `ledger` installed.
        ledger: All residuals so far.
        format: `"full"`, `"lora"` or `"merged"`.
        dtype: What the file is cast to, `None` for no cast.

    Returns:
        The share, between 0 and 1; `None` where what carries the update has 32 bits.
    """
    written = carrying_dtype(adapted, format, dtype)
    if written not in (torch.bfloat16, torch.float16):
        return None
    lost, whole = 0.0, 0.0
    for site in adapted.sites.values():
        update = update_of(site, ledger)
        lost += float((_carried(site, adapted, ledger, format, written) - update).square().sum())
        whole += float(update.square().sum())
    survival = max(0.0, 1.0 - math.sqrt(lost / whole)) if whole > 0 else 1.0
    told = f"{100 * survival:.2f} % of the update survives in {name_of_dtype(written)} as `format={format!r}`"
    if survival < _SAFE_SHARE:
        logger.warning(f'{told}; the rest rounds away. `format="lora"` keeps it: small factors on the untouched base.')
    else:
        logger.info(f"{told}.")
    return survival


def update_of(site: LoraSite, ledger: Ledger) -> torch.Tensor:
    """All that federated training added to a layer, `ledger + adapter`, in the layout of its weight, float64."""
    added = ledger.dense(site.name, site)
    adapter = site.dense(site.read())
    return adapter if added is None else adapter + added


def _carried(site: LoraSite, adapted: AdaptedModel, ledger: Ledger, format: str, dtype: torch.dtype) -> torch.Tensor:
    """What a file in `dtype` adds to the original base in `dtype`, float64."""
    if format == "lora":
        return site.dense(plain_lora(site, ledger, dtype))
    original = adapted.original(site.name).double()
    adapter = site.dense(site.read())
    total = original + update_of(site, ledger) - (adapter if format == "full" else 0.0)
    added = total.to(dtype).double() - original.to(dtype).double()
    return added + adapter if format == "full" else added  # the adapter beside the base stays in float32
