"""What travels between the rooms: the one page where shapes and dtypes are defined.

Notation of the FedEx-LoRA paper (arXiv 2410.09432, section 2): client i holds `A_i` of shape `(r, in_features)` and
`B_i` of shape `(out_features, r)`; its weight update is `scaling * B_i @ A_i` of shape `(out_features, in_features)`.
How that product lies in a layer's own weight (a `Conv1D` keeps the transpose) is PEFT's business: see `lora_site.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch


class NonFiniteUpdateError(ValueError):
    """A client's update holds NaN or Inf."""


@dataclass(frozen=True)
class LowRankDelta:
    """A weight update in factored form, `scaling * B @ A`.

    A layer that holds several matrices (expert parameters) has a leading dimension `experts` in both factors, and
    everything that is said of one update holds for each expert.

    Args:
        A: Tensor of shape `(rank, in_features)`, floating point, or `(experts, rank, in_features)`.
        B: Tensor of shape `(out_features, rank)`, the dtype of `A`, or `(experts, out_features, rank)`.
        scaling: PEFT's scaling of the layer (`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA), no unit.
        cut: Energy (squared Frobenius norm) that a truncation left out of this update, 0 where there was none.

    Raises:
        ValueError: If `A` and `B` are not matrices that share their rank.

    Example:
        >>> delta = LowRankDelta(A=torch.ones(2, 5), B=torch.ones(3, 2), scaling=0.5)
        >>> delta.rank, delta.nbytes, delta.to_dense().shape
        (2, 64, torch.Size([3, 5]))
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float = 1.0
    cut: float = 0.0

    def __post_init__(self) -> None:
        fits = self.A.ndim in (2, 3) and self.A.ndim == self.B.ndim and self.A.shape[:-2] == self.B.shape[:-2]
        if not fits or self.A.shape[-2] != self.B.shape[-1]:
            raise ValueError(
                f"`A` of shape {tuple(self.A.shape)} and `B` of shape {tuple(self.B.shape)} are not the factors of "
                "one update. Allowed: `A` of shape `(rank, in_features)` and `B` of shape `(out_features, rank)`, "
                "both with the same leading dimension where a layer holds several experts."
            )

    @property
    def rank(self) -> int:
        """Number of rows of `A` = number of columns of `B`; the numerical rank may be smaller."""
        return self.A.shape[-2]

    @property
    def in_features(self) -> int:
        """Columns of `A`."""
        return self.A.shape[-1]

    @property
    def out_features(self) -> int:
        """Rows of `B`."""
        return self.B.shape[-2]

    @property
    def nbytes(self) -> int:
        """Size of the two factors, in bytes."""
        return self.A.nbytes + self.B.nbytes

    @cached_property
    def product(self) -> torch.Tensor | None:
        """`B @ A` where one of them is an identity, so that it needs no product; otherwise `None`."""
        for identity, product in ((self.A, self.B), (self.B, self.A)):
            if identity.shape[-1] == identity.shape[-2]:
                diagonal = identity.diagonal(dim1=-2, dim2=-1)
                if bool((diagonal == 1).all()) and int(identity.count_nonzero()) == diagonal.numel():
                    return product
        return None

    def rows(self, rows: slice) -> LowRankDelta:
        """Some rows of the update, a view."""
        return LowRankDelta(self.A, self.B[..., rows, :], self.scaling)

    def to_dense(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The update as a matrix of shape `(out_features, in_features)`, or one per expert, computed in `dtype`."""
        return self.scaling * (self.B.to(dtype) @ self.A.to(dtype))


class FormedOnDemand:
    """A text field of a dataclass that also takes what has a text form, and asks for it when the field is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> str | None:
        if instance is None:
            return None  # the field's default
        value = vars(instance)[self._name]
        if value is not None and not isinstance(value, str):
            value = vars(instance)[self._name] = str(value)
        return value

    def __set__(self, instance: Any, value: object) -> None:
        vars(instance)[self._name] = value


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends after its local fit.

    Args:
        client_id: The client's name in `train_dataset`.
        round: Server round, counted from 1.
        num_examples: Training examples the client holds (or, for a stream, has read in this round).
        adapters: Layer name -> the client's LoRA factors after training, on the CPU.
        tensors: Parameter name -> every other trained parameter (heads, biases, trained tokens), on the CPU.
        metrics: What the local fit measured, such as `train_loss`.
        offsets: Layer name -> what this client's base weight held during the fit beyond the common one; empty for a
            client that started from the global factors. For one of a smaller rank than the global one: the rows and
            columns that it does not train. Server and client both know it, so it does not travel.
        base_version: The base and ledger that the client trained on, as `FederatedTrainer.base_version` names them;
            `None` if nobody has said. Given as an object with a text form, it is formed when it is read.
    """

    client_id: str
    round: int
    num_examples: int
    adapters: Mapping[str, LowRankDelta]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    offsets: Mapping[str, LowRankDelta] = field(default_factory=dict)
    base_version: FormedOnDemand = FormedOnDemand()

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def was_trained_on(self, version: object) -> bool:
        """Whether the update was trained on this base, or nobody has said; no text is formed for the same object.

        Args:
            version: A base version, or an object whose text form it is.
        """
        own = vars(self)["base_version"]
        return own is None or own is version or str(own) == str(version)

    def check_finite(self) -> None:
        """Refuse an update that would poison the average.

        Raises:
            NonFiniteUpdateError: If any tensor holds NaN or Inf; the message names the client and the tensors.
        """
        bad = [name for name, delta in self.adapters.items() if not _finite(delta.A) or not _finite(delta.B)]
        bad += [name for name, tensor in self.tensors.items() if not _finite(tensor)]
        if bad:
            raise NonFiniteUpdateError(
                f"The update of client `{self.client_id}` in round {self.round} holds NaN or Inf in {len(bad)} "
                f"tensors, the first being `{bad[0]}`. Lower `learning_rate`, set `max_grad_norm`, look at the "
                'client\'s data, or leave such clients out with `client_errors="skip"`.'
            )


@dataclass(frozen=True)
class GlobalUpdate:
    """What the server returns: the state every client continues from.

    Args:
        adapters: Layer name -> new global LoRA factors, in the dtype the clients trained.
        tensors: Parameter name -> averaged remaining parameters.
        residuals: Layer name -> what to add to the frozen base weight (float32 factors); empty for a method that
            changes no base weight.
        client_adapters: Client -> the factors that it goes on from instead of `adapters`, which it holds already, so
            they do not travel; empty for a method after which all clients hold the same.
    """

    adapters: Mapping[str, LowRankDelta]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    residuals: Mapping[str, LowRankDelta] = field(default_factory=dict)
    client_adapters: Mapping[str, Mapping[str, LowRankDelta]] = field(default_factory=dict)


def payload_bytes(update: ClientUpdate | GlobalUpdate, trained_factors: tuple[str, ...] = ("A", "B")) -> int:
    """Bytes of an update on the wire: the factors that were trained, the other tensors, and the residual's factors.

    Args:
        update: What is sent, in either direction.
        trained_factors: The factors that travel: `("A", "B")`, or the one that a method trains, or none.
    """
    adapters = sum(getattr(delta, factor).nbytes for delta in update.adapters.values() for factor in trained_factors)
    tensors = sum(tensor.nbytes for tensor in update.tensors.values())
    residuals = sum(delta.nbytes for delta in update.residuals.values()) if isinstance(update, GlobalUpdate) else 0
    return adapters + tensors + residuals


def _finite(tensor: torch.Tensor) -> bool:
    # NaN and Inf stay in every sum that holds them; only a sum that is too large by itself needs the look at each.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
