"""The names that states are hashed, written and sent by, and what lies under them.

A/<layer>  B/<layer>     factors of an adapter, or of a residual
tensors/<parameter>      every other trained tensor
matrices/<layer>         a ledger's dense sum
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedex_hf.base_model import AdaptedModel
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta


FACTORS = ("A", "B")
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # key -> shape and dtype


def flatten(deltas: Mapping[str, LowRankDelta], factors: tuple[str, ...] = FACTORS) -> dict[str, torch.Tensor]:
    """Factors by their names."""
    return {f"{factor}/{name}": getattr(delta, factor) for name, delta in deltas.items() for factor in factors}


def unflatten(tensors: Mapping[str, torch.Tensor], scalings: Mapping[str, float]) -> dict[str, LowRankDelta]:
    """What `flatten` was given, from tensors of a file, with each layer's scaling."""
    A, B = with_prefix(tensors, "A/"), with_prefix(tensors, "B/")
    return {name: LowRankDelta(A[name], B[name], scalings[name]) for name in A}


def with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Copies of the tensors of one kind, without their prefix."""
    # A copy in memory of its own: views into the file's buffer are not aligned, and the matrix products of some
    # libraries then round differently, which would break resuming bit for bit.
    return {name.removeprefix(prefix): tensors[name].clone() for name in tensors if name.startswith(prefix)}


def state_tensors(state: GlobalUpdate | ClientUpdate, factors: tuple[str, ...] = FACTORS) -> dict[str, torch.Tensor]:
    """A state's factors and other tensors, without residuals."""
    return flatten(state.adapters, factors) | {f"tensors/{name}": tensor for name, tensor in state.tensors.items()}


def ledger_tensors(
    factors: Mapping[str, LowRankDelta], matrices: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of residuals or of a ledger."""
    return flatten(factors) | {f"matrices/{name}": matrix for name, matrix in matrices.items()}


def state_layout(adapted: AdaptedModel, factors: tuple[str, ...] = FACTORS, rank: int | None = None) -> Layout:
    """What a state of a model has to look like, in the order of `state_tensors`.

    Args:
        adapted: The model.
        factors: Those that the state has.
        rank: Its rank in every layer; that of the model if `None`.
    """
    layout: Layout = {}
    for name, site in adapted.sites.items():
        *experts, own, in_features = site.A.shape
        rows = own if rank is None else rank
        shapes = {"A": (*experts, rows, in_features), "B": (*experts, site.B.shape[-2], rows)}
        for factor in factors:
            layout[f"{factor}/{name}"] = shapes[factor], getattr(site, factor).dtype
    for name, tensor in adapted.tensors.items():
        layout[f"tensors/{name}"] = tuple(tensor.shape), tensor.dtype
    return layout


def ledger_layout(adapted: AdaptedModel, ledger: Mapping[str, torch.Tensor]) -> Layout:
    """A ledger may lack layers, and its factors may have any rank, but both of one layer the same."""
    layout: Layout = {}
    for key in ledger:
        kind, _, name = key.partition("/")
        site = adapted.sites.get(name)
        if site is not None and kind == "matrices":
            layout[key] = (site.dense_shape, torch.float32)
        elif site is not None and kind in FACTORS:
            shape = ledger[key].shape if ledger[key].ndim == site.A.ndim else (0, 0)
            rank = shape[-2] if kind == "A" else shape[-1]
            *experts, _, in_features = site.A.shape
            layout[f"A/{name}"] = ((*experts, rank, in_features), torch.float32)
            layout[f"B/{name}"] = ((*experts, site.B.shape[-2], rank), torch.float32)
    return layout
