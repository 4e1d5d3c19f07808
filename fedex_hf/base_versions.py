"""Which base a client trained on: a hash of the original base and of the ledger, whichever run wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from transformers.utils import logging

from fedex_hf.base_model import AdaptedModel
from fedex_hf.carrier import CARRIER
from fedex_hf.ledger import Ledger
from fedex_hf.state_tensors import ledger_tensors
from fedex_hf.updates import ClientUpdate


logger = logging.get_logger(__name__)


class StaleUpdateError(ValueError):
    """A client trained on another base than the present one."""


class PendingVersion:
    """The version of a base with a ledger; hashing both waits until someone asks for the text.

    Args:
        ledger: All residuals.
        name: Gives a ledger's version.
    """

    def __init__(self, ledger: Ledger, name: Callable[[Ledger], str]) -> None:
        self.ledger = ledger
        self._name = name

    def __str__(self) -> str:
        return self._name(self.ledger)


def base_digest(adapted: AdaptedModel) -> str:
    """SHA-256 of a model's frozen weights as they were before any residual; reads all of them."""
    digest = hashlib.sha256()
    # By place: PEFT's attention layers make their parameters anew whenever modules are listed.
    originals = {adapted.sites[name].base_weight.data_ptr(): weight for name, weight in adapted.originals.items()}
    unused = {  # the heads that trained ones stand in for: random in a base that has none, and never used
        id(parameter)
        for module in adapted.model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for parameter in module.original_module.parameters()
    }
    # bitsandbytes moves the scales of an 8-bit weight from the parameter to its layer when it is first used.
    eight_bit: dict[int, Any] = {
        id(module.weight): module.state.SCB  # type: ignore[union-attr]  # of `Linear8bitLt`
        for module in adapted.model.modules()
        if getattr(getattr(module, "state", None), "SCB", None) is not None
    }
    for name, parameter in adapted.model.named_parameters():
        if CARRIER in name.split("."):
            continue
        if not parameter.requires_grad and parameter.numel() and id(parameter) not in unused:
            weight = originals.get(parameter.data_ptr(), parameter.detach())
            for part in [weight, *_scales_of(parameter, eight_bit)]:
                digest.update(_bytes_of(part))
    return digest.hexdigest()


def version_of(base: str, ledger: Ledger) -> str:
    """The name of a base with a ledger.

    Args:
        base: Of the base, from `base_digest`.
        ledger: All residuals.

    Example:
        >>> version_of("1234", Ledger()) == version_of("1234", Ledger())
        True
    """
    digest = hashlib.sha256(f"fedex_hf base {base}\n".encode())
    for key, tensor in sorted(ledger_tensors(ledger.factors, ledger.matrices).items()):
        name = key.partition("/")[2]
        scaling = ledger.factors[name].scaling if name in ledger.factors else 1.0
        digest.update(f"{key} {tuple(tensor.shape)} {scaling!r}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def refuse_stale(update: ClientUpdate, version: str | PendingVersion) -> None:
    """Refuse an update that was trained on another base; one that does not say is taken at its word.

    Args:
        update: The update.
        version: The present base version. Pending, it is not formed for an update that holds the same object.

    Raises:
        StaleUpdateError: If it names another version.
    """
    if not update.was_trained_on(version):
        raise StaleUpdateError(
            f"The update of client `{update.client_id}` for round {update.round} was trained on the base version "
            f"{update.base_version}, and the present one is {version}. Bring the client up to date with "
            f"`trainer.ledger_difference({update.base_version!r})` and have it train again, or leave such clients out "
            'with `client_errors="skip"`.'
        )


def present_updates(updates: Sequence[ClientUpdate], version: str | PendingVersion, skip: bool) -> list[ClientUpdate]:
    """The updates that were trained on the present base.

    Args:
        updates: Of one round.
        version: The present base version, formed or pending.
        skip: Whether to leave the others out, with a warning.

    Raises:
        StaleUpdateError: If there are others, and they are not to be left out.
    """
    present = []
    for update in updates:
        try:
            refuse_stale(update, version)
        except StaleUpdateError as error:
            if not skip:
                raise
            logger.warning(f"Client `{update.client_id}` is left out: {error}")
        else:
            present.append(update)
    return present


def _scales_of(parameter: torch.nn.Parameter, eight_bit: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
    """What belongs to a quantized weight of bitsandbytes beside its integers."""
    state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
    scales = eight_bit.get(id(parameter)) if scales is None else scales
    parts = [] if state is None else [value for _, value in sorted(state.as_dict(packed=True).items())]
    return parts if scales is None else [*parts, scales]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
