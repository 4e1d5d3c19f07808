"""What travels between Flower's processes: tensors as records, checked on arrival before they touch a model.

    train, down   arrays: factors and other trained tensors of the global state; residuals: what the client's base
                  lacks, if anything; config: round, place of the client, its rank, the ledger difference's description
    train, up     arrays: the client's, under the same keys; metrics: examples, steps, loss; config: who and what
    evaluate      down as for training, up metrics only
    query         up a description of the client; see `roster.py`

Keys are those of `state_tensors.py`. NumPy has no bfloat16, so such tensors travel as int16 with the same bits; what a
key's dtype is, both sides know from their own model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedex_hf.base_model import AdaptedModel
from fedex_hf.client_adapters import scaling_at
from fedex_hf.ledger_difference import LedgerDifference
from fedex_hf.state_tensors import Layout, state_layout, state_tensors
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta


ARRAYS, RESIDUALS, CONFIG, METRICS = "arrays", "residuals", "config", "metrics"
DIFFERENCE = "ledger-difference"  # key in CONFIG
_HEADER = 4096  # bytes that serialization may add to one tensor
_MOST_RESIDUALS = 2**20  # tensors in one difference: far more than any model has layers times rounds


class PayloadError(ValueError):
    """What arrived does not fit the model; the message says who sent it and what is wrong."""


def to_array(tensor: torch.Tensor) -> Array:
    """A tensor of any floating-point dtype as Flower's array, bit for bit."""
    tensor = tensor.detach().cpu().contiguous()
    return Array(tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())


def from_array(array: Array, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `to_array` was given, in memory of its own.

    Args:
        array: What arrived.
        shape: What it has to be.
        dtype: What it has to be.

    Raises:
        ValueError: If it is anything else; nothing larger is deserialized.
    """
    travels_as = torch.int16 if dtype == torch.bfloat16 else dtype
    like = torch.empty(0, dtype=travels_as).numpy().dtype
    expected = int(np.prod(shape)) * like.itemsize
    if not expected <= len(array.data) <= expected + _HEADER:
        raise ValueError(f"{len(array.data)} bytes came where {expected} are expected")
    values = array.numpy()
    if values.shape != tuple(shape) or values.dtype != like:
        raise ValueError(
            f"{values.dtype} of shape {values.shape} came where {like} of shape {tuple(shape)} is expected"
        )
    tensor = torch.from_numpy(values.copy())
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


def encode_state(state: GlobalUpdate | ClientUpdate, factors: tuple[str, ...]) -> ArrayRecord:
    """Adapters and other tensors, without residuals."""
    return _record(state_tensors(state, factors))


def decode_state(
    arrays: ArrayRecord, adapted: AdaptedModel, factors: tuple[str, ...], sender: str, rank: int | None = None
) -> GlobalUpdate:
    """Read a state, after checking keys, sizes, shapes, dtypes and values.

    Args:
        arrays: What arrived.
        adapted: The model; factors that do not travel are taken from it.
        factors: The factors that travel.
        sender: Who sent it, for messages.
        rank: The sender's rank in every layer; that of the model if `None`.

    Raises:
        PayloadError: If it does not fit the model, or holds NaN or Inf.
    """
    layout = state_layout(adapted, factors, rank)
    unexpected, missing = [key for key in arrays if key not in layout], [key for key in layout if key not in arrays]
    if unexpected or missing:
        raise PayloadError(
            f"{sender} sent {len(arrays)} tensors where the model has {len(layout)}: missing {missing[:3]}, unknown "
            f"{unexpected[:3]}. Both sides need the same model and `LoraConfig`."
        )
    tensors: dict[str, torch.Tensor] = {}
    for key, (shape, dtype) in layout.items():
        try:
            tensors[key] = from_array(arrays[key], shape, dtype)
        except Exception as error:  # whatever an array from elsewhere makes of NumPy
            raise PayloadError(
                f"{sender} sent `{key}`, which does not fit: {error}. Both sides need the same model and "
                "`LoraConfig`, and mods must keep the dtypes."
            ) from error
        if not bool(torch.isfinite(tensors[key]).all()):
            raise PayloadError(f"{sender} sent NaN or Inf in `{key}`. Lower `learning_rate` or set `max_grad_norm`.")
    return _state_from(tensors, adapted, rank)


def _state_from(tensors: Mapping[str, torch.Tensor], adapted: AdaptedModel, rank: int | None) -> GlobalUpdate:
    adapters = {}
    for name, site in adapted.sites.items():
        own = None if f"A/{name}" in tensors and f"B/{name}" in tensors else site.read()
        A, B = (tensors.get(f"{factor}/{name}", getattr(own, factor, None)) for factor in "AB")
        scaling = site.scaling if rank is None else scaling_at(adapted, site, rank)
        adapters[name] = LowRankDelta(A, B, scaling)  # type: ignore[arg-type]  # there or in `own`
    return GlobalUpdate(adapters=adapters, tensors={name: tensors[f"tensors/{name}"] for name in adapted.tensors})


def widened(arrays: ArrayRecord, layout: Layout) -> ArrayRecord:
    """The same values with 16-bit floats as float32, for who calculates with them."""
    half = (torch.bfloat16, torch.float16)
    return ArrayRecord(
        {
            key: to_array(from_array(array, tuple(array.shape), layout[key][1]).float())
            if key in layout and layout[key][1] in half
            else array
            for key, array in arrays.items()
        }
    )


def narrowed(arrays: ArrayRecord, layout: Layout) -> ArrayRecord:
    """Values of any float dtype in the model's own, rounded once."""
    return ArrayRecord(
        {
            key: to_array(torch.from_numpy(array.numpy().copy()).to(layout[key][1])) if key in layout else array
            for key, array in arrays.items()
        }
    )


def encode_difference(difference: LedgerDifference) -> tuple[ArrayRecord, str]:
    """A ledger difference as arrays and the JSON that describes them."""
    tensors, about = difference.to_tensors()
    return _record(tensors), json.dumps(about)


def _record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    return ArrayRecord({key: to_array(tensor) for key, tensor in tensors.items()})


def decode_difference(arrays: ArrayRecord, about: str, adapted: AdaptedModel) -> LedgerDifference:
    """Read a ledger difference; `LedgerDifference.apply` then proves it by its hash.

    Raises:
        PayloadError: If it cannot be one, or is larger than the layers that it is for.
    """
    largest = 0
    for site in adapted.sites.values():
        largest = max(largest, site.B.numel() // site.A.shape[-2] * site.A.shape[-1])
    try:
        if len(arrays) > _MOST_RESIDUALS:
            raise ValueError(f"{len(arrays)} tensors")
        tensors = {}
        for key, array in arrays.items():
            if len(array.data) > 16 * largest + _HEADER:  # float32 factors of up to four times the full rank
                raise ValueError(f"{len(array.data)} bytes in `{key}`")
            tensors[key] = from_array(array, tuple(array.shape), torch.float32)
        return LedgerDifference.from_tensors(tensors, json.loads(about))
    except Exception as error:  # whatever came from elsewhere
        raise PayloadError(f"The server's residuals cannot be read: {error}.") from error


def number(
    record: Mapping[str, Any],
    key: str,
    kind: type[int] | type[float],
    sender: str,
    least: float = 0,
    most: float = 2**53,
) -> Any:
    """A number of a record.

    Raises:
        PayloadError: If it is missing, of another type, not finite, below `least` or above `most`.
    """
    value: Any = record.get(key)
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not least <= value <= most:
        raise PayloadError(f"{sender} sent `{key}={value!r}`. Allowed: a `{kind.__name__}` from {least} to {most}.")
    return value


def nbytes(content: RecordDict) -> int:
    """Size of all arrays of a message as they travel, in bytes, with their headers of about 128 bytes each."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def only(content: RecordDict, kind: str) -> Any:
    """The record of a name, empty if there is none: what is missing then shows by its key."""
    record = content.get(kind)
    expected: dict[str, type] = {
        ARRAYS: ArrayRecord,
        RESIDUALS: ArrayRecord,
        CONFIG: ConfigRecord,
        METRICS: MetricRecord,
    }
    return record if isinstance(record, expected[kind]) else expected[kind]()
