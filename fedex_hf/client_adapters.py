"""Clients that differ: their own factors or ranks go into the model before a fit, and on the disk with a checkpoint.

A client of another rank starts from the global factors anew in every round (`aggregators/ranks.py`), so nothing of it
is stored. With `assignment="keep"` clients go on from factors of their own. These are stored once, whatever the number
of rounds; the offset that makes a client's effective weight the global one is formed at its next fit, from the global
state of that moment. So a client may sit out any number of rounds.

On the disk they are safetensors under a name that nothing publishes: they belong to the clients and stay with them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fedex_hf import checkpoint as ckpt
from fedex_hf.aggregators.assignments import offsets_of
from fedex_hf.aggregators.ranks import start_at_rank
from fedex_hf.base_model import AdaptedModel
from fedex_hf.lora_site import LoraSite
from fedex_hf.state_tensors import flatten, unflatten
from fedex_hf.updates import GlobalUpdate, LowRankDelta


NOT_PUBLISHED = (
    'has no adapters of clients: they are never published, so `assignment="keep"` cannot go on exactly. Resume from a '
    "local checkpoint, or load the round with `from_pretrained` and start a new run from it."
)


def install_client(adapted: AdaptedModel, federation: ckpt.RoundState, client_id: str) -> dict[str, LowRankDelta]:
    """Put a client's own factors into the model, and its offset into the base weights.

    Args:
        adapted: The model, holding the global state.
        federation: The state between the rounds.
        client_id: The client that is to be fitted.

    Returns:
        Layer name -> the offset that was added; empty where the client goes on from the global factors.
    """
    own = federation.client_adapters.get(client_id)
    if own is None:
        return {}
    offsets = offsets_of(federation.state.adapters, own)
    if offsets:
        adapted.install(federation.ledger, offsets)
        adapted.write(GlobalUpdate(adapters=own, tensors=federation.state.tensors))
    return offsets


def install_at_rank(
    adapted: AdaptedModel, federation: ckpt.RoundState, rank: int, key: str
) -> dict[str, LowRankDelta]:
    """Put the global state into the model at another rank, and what that leaves out into the base weights.

    Args:
        adapted: The model, holding the global state.
        federation: The state between the rounds.
        rank: The client's rank in every adapted layer.
        key: With the layer's name it decides the rows that the global factors do not have.

    Returns:
        Layer name -> the offset that was added; empty where the client's rank is at least the global one.
    """
    own, offsets = start_of(adapted, federation.state, rank, key)
    if offsets:
        adapted.install(federation.ledger, offsets)
    adapted.write_client(GlobalUpdate(adapters=own, tensors=federation.state.tensors))
    return offsets


def start_of(
    adapted: AdaptedModel, state: GlobalUpdate, rank: int, key: str
) -> tuple[dict[str, LowRankDelta], dict[str, LowRankDelta]]:
    """What a client of another rank starts from: its factors, and the offsets of its base; installs nothing."""
    own, offsets = {}, {}
    for name, site in adapted.sites.items():
        scaling = scaling_at(adapted, site, rank)
        own[name], offset = start_at_rank(state.adapters[name], rank, scaling, f"{key}/{name}")
        if offset is not None:
            offsets[name] = offset
    return own, offsets


def scaling_at(adapted: AdaptedModel, site: LoraSite, rank: int) -> float:
    """PEFT's scaling of a layer if it had another rank."""
    config = cast(LoraConfig, adapted.model.peft_config[site.adapter])

    def by_peft(r: int) -> float:
        return float(site.layer.lora_alpha[site.adapter] / (math.sqrt(r) if config.use_rslora else r))

    return by_peft(rank) * (site.scaling / by_peft(site.layer.r[site.adapter]))  # 1.0 unless someone has set another


def write_client_adapters(
    directory: Path, client_adapters: Mapping[str, Mapping[str, LowRankDelta]], clients: list[str]
) -> None:
    """Write the clients' factors into a checkpoint that is being written; before `save_round`, which seals it.

    Args:
        directory: The folder of the checkpoint.
        client_adapters: Client -> layer name -> factors; nothing is written if there are none.
        clients: The federation's clients in their order, whose places go into the file instead of their names.
    """
    if not client_adapters:
        return
    file = directory / ckpt.FOLDER / ckpt.CLIENT_ADAPTERS
    file.parent.mkdir(parents=True, exist_ok=True)
    places = {client_id: place for place, client_id in enumerate(clients)}
    tensors = {
        f"{places[client_id]}/{key}": tensor.contiguous()
        for client_id, adapters in client_adapters.items()
        for key, tensor in flatten(adapters).items()
    }
    save_file(tensors, file)


def read_client_adapters(
    directory: str | os.PathLike, adapted: AdaptedModel, clients: list[str]
) -> dict[str, dict[str, LowRankDelta]]:
    """Read the clients' factors of a checkpoint that `load_round` has accepted.

    Args:
        directory: A `checkpoint-N` folder.
        adapted: The model, for the layers' shapes and scalings.
        clients: The federation's clients in their order.

    Raises:
        CheckpointMismatchError: If the folder has none, as a published round has not, or they do not fit the model.
    """
    file = Path(directory) / ckpt.FOLDER / ckpt.CLIENT_ADAPTERS
    if not file.is_file():
        raise ckpt.CheckpointMismatchError(f"`{directory}` {NOT_PUBLISHED}")
    tensors = load_file(file)
    places = {key.partition("/")[0] for key in tensors}
    present = {str(place): client_id for place, client_id in enumerate(clients) if str(place) in places}
    one = {f"{factor}/{name}": getattr(site, factor) for name, site in adapted.sites.items() for factor in "AB"}
    layout = {f"{place}/{key}": (like.shape, like.dtype) for place in present for key, like in one.items()}
    ckpt.check_tensors(str(file), tensors, layout)
    scalings = {name: site.scaling for name, site in adapted.sites.items()}
    return {
        client_id: unflatten({key: tensors[f"{place}/{key}"] for key in one}, scalings)
        for place, client_id in present.items()
    }
