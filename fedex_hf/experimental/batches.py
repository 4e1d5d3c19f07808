"""The batches of several clients as one, and one output as those of the clients.

Every client gets the same number of rows and tokens in the common batch, so that the rows of client i are those from
`i * rows` on. What is missing is filled up: with tokens that the attention mask hides, and with copies of the client's
first row. Nothing of that is in what the clients get back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.utils import ModelOutput


# Tensors of shape (rows, tokens) that can be filled up on the right, and with what; `None` is the padding token.
_FILLERS = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0}
# Of the loss; models with a general signature hand it down to their body, which does not use it.
_NOT_OF_THE_BODY = ("num_items_in_batch",)


class UnlikeCallsError(ValueError):
    """The clients call the model in ways that do not go together."""


@dataclass(frozen=True)
class Joined:
    """A common batch.

    Args:
        arguments: Of the body's `forward`; tensors have `len(sizes) * rows` rows.
        sizes: Rows of each client's own batch.
        lengths: Tokens per row of each client's own batch; `None` where the model takes no tokens.
        rows: Rows per client in the common batch.
        length: Tokens per row in it.
    """

    arguments: dict[str, Any]
    sizes: list[int]
    lengths: list[int | None]
    rows: int
    length: int | None


def join(calls: Sequence[Mapping[str, Any]], padding_token: int) -> Joined:
    """Make one call of several.

    Args:
        calls: Each client's arguments of the body's `forward`, by name.
        padding_token: What `input_ids` are filled up with.

    Raises:
        UnlikeCallsError: If an argument differs between clients and is no tensor with one row per example, or if
            lengths differ in one that cannot be filled up.
    """
    calls = [{name: value for name, value in call.items() if name not in _NOT_OF_THE_BODY} for call in calls]
    sizes, lengths = zip(*[_size_of(call) for call in calls], strict=True)
    rows, length = max(sizes), max(lengths, key=lambda each: each or 0)
    if len(set(lengths)) > 1 or any(isinstance(call.get("attention_mask"), torch.Tensor) for call in calls):
        calls = [{**call, "attention_mask": _mask_of(call)} for call in calls]
    arguments: dict[str, Any] = {}
    for name in dict.fromkeys(name for call in calls for name in call):
        values = [call.get(name) for call in calls]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if len(tensors) == len(values):
            filler = padding_token if name == "input_ids" else _FILLERS.get(name)
            arguments[name] = _joined(name, tensors, sizes, rows, length, filler)
        elif any(value is not values[0] and not _equal(value, values[0]) for value in values):
            raise UnlikeCallsError(
                f"The clients call the model with different `{name}`: {[str(value)[:40] for value in values]}. "
                "Allowed: tensors with one row per example, or one value for all."
            )
        else:
            arguments[name] = values[0]
    return Joined(arguments, [*sizes], [*lengths], rows, length)


def split(output: Any, joined: Joined) -> list[Any]:
    """Each client's own part of the body's output for a common batch."""
    return [_part(output, joined, place) for place in range(len(joined.sizes))]


def tensors_in(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, in its order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for each in output for tensor in tensors_in(each)]
    return []


def _part(output: Any, joined: Joined, place: int) -> Any:
    if isinstance(output, torch.Tensor):
        start, own = place * joined.rows, joined.lengths[place]
        part = output[start : start + joined.sizes[place]]
        return part[:, :own] if part.ndim == 3 and own is not None and part.shape[1] == joined.length else part
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _part(value, joined, place) for name, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(_part(each, joined, place) for each in output)
    return None  # such as a cache, which serves generation


def _size_of(call: Mapping[str, Any]) -> tuple[int, int | None]:
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UnlikeCallsError("A client calls the model without any tensor. Allowed: at least one, with a batch.")
    main = next((tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors), None)
    if main is None:
        return len(next(iter(tensors.values()))), None
    return main.shape[0], main.shape[1]


def _mask_of(call: Mapping[str, Any]) -> Any:
    mask = call.get("attention_mask")
    if mask is not None:
        return mask
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def _joined(
    name: str, values: list[torch.Tensor], sizes: Sequence[int], rows: int, length: int | None, filler: int | None
) -> torch.Tensor:
    filled = []
    for value, size in zip(values, sizes, strict=True):
        if value.ndim < 1 or len(value) != size:
            raise UnlikeCallsError(
                f"A client's `{name}` is of shape {tuple(value.shape)}, and its batch has {size} examples. Allowed: "
                "tensors with one row per example."
            )
        if filler is not None and length is not None and value.ndim == 2:
            value = pad(value, (0, length - value.shape[1]), value=filler)
        filled.append(value if size == rows else torch.cat([value, value[:1].expand(rows - size, *value.shape[1:])]))
    if len({each.shape for each in filled}) > 1:
        raise UnlikeCallsError(
            f"The clients' `{name}` have the shapes {[tuple(value.shape) for value in values]}, which cannot be "
            f"filled up. Allowed: equal shapes, or {', '.join(f'`{each}`' for each in _FILLERS)} with lengths that "
            "differ. Pad all examples to one length in the collator."
        )
    return torch.cat(filled)


def _equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and not isinstance(left, torch.Tensor) and bool(left == right)
