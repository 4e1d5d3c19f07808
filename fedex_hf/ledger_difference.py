"""How a client that was away gets to the present base without being sent it.

A client needs the dense base once: afterwards it is sent the residuals of the rounds that it missed and replays them
with `Ledger.plus`, which ends with the server's own bytes; or the whole ledger, where that is less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_versions import base_digest, version_of
from fedex_hf.ledger import Ledger
from fedex_hf.state_tensors import ledger_tensors
from fedex_hf.updates import LowRankDelta


class LedgerMismatchError(ValueError):
    """A ledger difference does not lead from what a model holds to what the server holds."""


@dataclass(frozen=True)
class LedgerDifference:
    """What leads from one base version to another.

    Args:
        since: The version it starts from; `None` if it starts from the bare base, with the whole ledger.
        version: The version it leads to.
        rounds: Layer name -> residual of each round between the two, oldest first.
        ledger: The whole ledger instead.
        rank: `residual_rank` of the run, with which each round was added.
        tolerance: `residual_tolerance` of the run.
    """

    since: str | None
    version: str
    rounds: Sequence[Mapping[str, LowRankDelta]] = ()
    ledger: Ledger | None = None
    rank: int | None = None
    tolerance: float | None = None

    @property
    def nbytes(self) -> int:
        """Size of all factors and matrices, in bytes."""
        whole = 0 if self.ledger is None else self.ledger.nbytes
        return whole + sum(_nbytes(residuals) for residuals in self.rounds)

    def apply(self, adapted: AdaptedModel, base: str | None = None) -> Ledger:
        """Bring a client's model to the server's base version: bit for bit, or not at all.

        Args:
            adapted: The client's model; its ledger is replaced and installed, its adapter is left alone.
            base: `base_digest(adapted)` if it is at hand, since that reads the whole model.

        Returns:
            The ledger that is now installed.

        Raises:
            LedgerMismatchError: If the model does not hold the version that this starts from, or would not end with
                the version that it leads to; the model is then left as it was.
        """
        base = base_digest(adapted) if base is None else base
        held, ledger = version_of(base, adapted.ledger), adapted.ledger
        if held == self.version:
            return ledger
        if self.ledger is None and held != self.since:
            raise LedgerMismatchError(
                f"This difference starts from the base version {self.since}, and the model holds {held}. Ask for "
                "`ledger_difference` since that one, or for the whole ledger with `None`."
            )
        if self.ledger is not None:
            ledger = self.ledger
        _check_fits(self, adapted)
        for residuals in self.rounds:
            ledger = ledger.plus(residuals, adapted.sites, self.rank, self.tolerance)
        reached = version_of(base, ledger)
        if reached != self.version:
            raise LedgerMismatchError(
                f"This difference leads to the base version {self.version}, and here it ends at {reached}. Either the "
                "base is another one, or this machine rounds differently in replaying the rounds: then ask for the "
                "whole ledger, `ledger_difference(None)`, which needs no arithmetic."
            )
        adapted.install(ledger)
        return ledger

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Its parts, to be written or sent: named float32 tensors, and a dictionary of JSON values."""
        parts: list[Any] = [(f"{number}/", residuals, {}) for number, residuals in enumerate(self.rounds)]
        if self.ledger is not None:
            parts.append(("ledger/", self.ledger.factors, self.ledger.matrices))
        tensors = {
            prefix + key: tensor.contiguous()
            for prefix, factors, matrices in parts
            for key, tensor in ledger_tensors(factors, matrices).items()
        }
        about = {
            "since": self.since,
            "version": self.version,
            "rounds": len(self.rounds),
            "whole": self.ledger is not None,
            "rank": self.rank,
            "tolerance": self.tolerance,
            "scalings": {
                prefix + name: delta.scaling for prefix, factors, _ in parts for name, delta in factors.items()
            },
        }
        return tensors, about

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> LedgerDifference:
        """Put together again what `to_tensors` has taken apart; of anything else it may raise anything."""
        rounds = [_part(tensors, f"{number}/", about["scalings"]) for number in range(about["rounds"])]
        whole = Ledger(*_part_with_matrices(tensors, about["scalings"])) if about["whole"] else None
        return cls(about["since"], about["version"], rounds, whole, about["rank"], about["tolerance"])

    def save(self, path: str | os.PathLike) -> None:
        """Write it as one safetensors file."""
        tensors, about = self.to_tensors()
        save_file(tensors, path, metadata={"ledger_difference": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LedgerDifference:
        """Read what `save` has written.

        Raises:
            LedgerMismatchError: If the file is not one, or a damaged one.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["ledger_difference"])
                # Copies: views into the file's buffer are not aligned, and may then be multiplied differently.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  no mapping
            return cls.from_tensors(tensors, about)
        except Exception as error:  # whatever is in a file from elsewhere
            raise LedgerMismatchError(
                f"`{path}` is no ledger difference ({type(error).__name__}: {error}). Ask the server for another."
            ) from error


class LedgerHistory:
    """On the server: the residuals of the last rounds, as far back as they are smaller than the ledger itself.

    Args:
        base: Of the base, from `base_digest`.
        rank, tolerance: Truncation settings of the run.
    """

    def __init__(self, base: str, rank: int | None = None, tolerance: float | None = None) -> None:
        self.base = base
        self.rank = rank
        self.tolerance = tolerance
        self._named: tuple[Ledger, str] | None = None
        self._rounds: list[tuple[str, Mapping[str, LowRankDelta]]] = []  # the version before it, and the residuals
        self._newest: str | None = None

    def version_of(self, ledger: Ledger) -> str:
        """A ledger's version; that of the ledger asked for last is not formed again."""
        if self._named is None or self._named[0] is not ledger:
            self._named = ledger, version_of(self.base, ledger)
        return self._named[1]

    def append(self, before: Ledger, residuals: Mapping[str, LowRankDelta], after: Ledger) -> None:
        """Note a round.

        Args:
            before: The ledger before it. If that is not the one after the last round noted, as in a run that was
                resumed or has gone back to its best round, the history starts anew.
            residuals: Layer name -> the round's residual.
            after: The ledger after it.
        """
        since = self.version_of(before)
        version = self.version_of(after)
        if since != self._newest:
            self._rounds.clear()
        self._newest = version
        if residuals:
            self._rounds.append((since, residuals))
        size = sum(_nbytes(each) for _, each in self._rounds)
        while size > after.nbytes:
            size -= _nbytes(self._rounds.pop(0)[1])

    def difference(self, since: str | None, ledger: Ledger) -> LedgerDifference:
        """What leads from a version to a ledger: the rounds between, or the whole ledger.

        Args:
            since: The version that a client holds; `None` for a client that holds the bare base.
            ledger: The present ledger.
        """
        version = self.version_of(ledger)
        settings: dict[str, Any] = {"rank": self.rank, "tolerance": self.tolerance}
        if since == version:
            return LedgerDifference(since, version, **settings)
        known = [number for number, (before, _) in enumerate(self._rounds) if before == since]
        if version != self._newest or not known:
            return LedgerDifference(None, version, ledger=ledger, **settings)
        return LedgerDifference(since, version, [each for _, each in self._rounds[known[-1] :]], **settings)


def _nbytes(residuals: Mapping[str, LowRankDelta]) -> int:
    return sum(delta.nbytes for delta in residuals.values())


def _part(tensors: Mapping[str, torch.Tensor], prefix: str, scalings: Mapping[str, float]) -> dict[str, LowRankDelta]:
    names = [key.removeprefix(f"{prefix}A/") for key in tensors if key.startswith(f"{prefix}A/")]
    return {
        name: LowRankDelta(tensors[f"{prefix}A/{name}"], tensors[f"{prefix}B/{name}"], scalings[prefix + name])
        for name in names
    }


def _part_with_matrices(
    tensors: Mapping[str, torch.Tensor], scalings: Mapping[str, float]
) -> tuple[dict[str, LowRankDelta], dict[str, torch.Tensor]]:
    start = "ledger/matrices/"
    matrices = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    return _part(tensors, "ledger/", scalings), matrices


def _check_fits(difference: LedgerDifference, adapted: AdaptedModel) -> None:
    whole = Ledger() if difference.ledger is None else difference.ledger
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for factors in [*difference.rounds, whole.factors]:
        for name, delta in factors.items():
            shapes.setdefault(name, set()).add((*delta.A.shape[:-2], delta.out_features, delta.in_features))
    for name, site in adapted.sites.items():
        fits = (*site.A.shape[:-2], site.B.shape[-2], site.A.shape[-1])
        matrix = whole.matrices.get(name)
        if shapes.pop(name, {fits}) != {fits} or (matrix is not None and matrix.shape != site.dense_shape):
            raise LedgerMismatchError(
                f"This difference has a residual for `{name}` that does not fit its size {fits}. It belongs to "
                "another model."
            )
    unknown = shapes.keys() | (whole.matrices.keys() - adapted.sites.keys())
    if unknown:
        raise LedgerMismatchError(
            f"This difference has residuals for {sorted(unknown)[:3]}, and the model has no LoRA there. It belongs "
            "to another model."
        )
