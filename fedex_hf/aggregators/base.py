"""What every aggregation method shares: tensors in, tensors out; no model, no device, no files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from fedex_hf.aggregators.ranks import WIDE, at_global_rank
from fedex_hf.low_rank import at_scaling, concatenate, doubled, padded
from fedex_hf.updates import ClientUpdate, GlobalUpdate, LowRankDelta


class Aggregator(ABC):
    """Turns the clients' updates of one round into the next global state.

    A method is one subclass in one file of this folder plus one line of the registry in `__init__.py`.

    Attributes:
        name: Key in the registry.
        paper: Where the method comes from.
        is_exact: Whether the effective weight after a round is the weighted mean of the clients' effective weights.
        trained_factors: The LoRA factors that clients train and send.
        changes_base: Whether the method adds a residual to the frozen base weight.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    is_exact: bool
    trained_factors: ClassVar[tuple[str, ...]] = ("A", "B")
    changes_base: ClassVar[bool] = False

    @property
    def keeps_client_adapters(self) -> bool:
        """Whether clients go on from factors of their own (`GlobalUpdate.client_adapters`).

        Such a method needs `changes_base`, and has to take the clients' `offsets` into its residuals.
        """
        return False

    @property
    def mixes_ranks(self) -> bool:
        """Whether clients may have other ranks than the global one (`FederatedTrainingArguments.client_ranks`).

        `aggregate_layer` then gets all factors at the global rank, in float64 where any client's differ; what does
        not fit is added to its residual. Such a method needs `changes_base`.
        """
        return False

    @property
    def returned_factors(self) -> tuple[str, ...]:
        """The LoRA factors that the server sends back: those that clients send, unless a method says otherwise."""
        return self.trained_factors

    def configure_model(self, model: torch.nn.Module) -> None:  # noqa: B027  most methods need no preparation
        """Prepare the model once before the first round, for example by freezing a factor. Default: nothing."""

    @abstractmethod
    def aggregate_layer(
        self, factors: Sequence[LowRankDelta], client_weights: torch.Tensor
    ) -> tuple[LowRankDelta, LowRankDelta | None]:
        """Aggregate one layer.

        Args:
            factors: The k clients' factors, `A` of shape `(r, in_features)` and `B` of shape `(out_features, r)`.
            client_weights: Tensor of shape `(k,)`, float64, positive, sum 1.

        Returns:
            The new global factors in the dtype of `factors`, and the residual to add to the base weight (or `None`).
        """

    def aggregate_layers(
        self, layers: Mapping[str, Sequence[LowRankDelta]], client_weights: torch.Tensor
    ) -> Iterator[tuple[str, LowRankDelta, LowRankDelta | None]]:
        """Aggregate all layers. Default: one after another; a method may do it in fewer calls of torch.

        Args:
            layers: Layer name -> `factors` as `aggregate_layer` takes them.
            client_weights: As there.

        Yields:
            Layer name and what `aggregate_layer` returns, in any order: residuals are shortened as they come.
        """
        for name, factors in layers.items():
            yield name, *self.aggregate_layer(factors, client_weights)

    def shorten(self, residual: LowRankDelta) -> LowRankDelta:
        """Decide how much of a layer's residual is sent, once all of it is there. Default: all, as it is.

        Args:
            residual: What `aggregate_layer` returned, and what does not fit into the global rank.
        """
        return residual

    def assign(
        self, update: GlobalUpdate, updates: Sequence[ClientUpdate], client_weights: torch.Tensor
    ) -> GlobalUpdate:
        """Decide what the clients go on from, once all layers are aggregated. Default: the aggregated factors.

        Args:
            update: What `aggregate_layer` made of every layer, and the averaged other tensors.
            updates: The round's updates.
            client_weights: Tensor of shape `(k,)`, float64, positive, sum 1.
        """
        return update

    def aggregate(
        self,
        updates: Sequence[ClientUpdate],
        client_weights: Sequence[float],
        start: GlobalUpdate | None = None,
    ) -> GlobalUpdate:
        """Aggregate a round: adapted layers by `aggregate_layers`, every other tensor by the weighted mean.

        `assign` then has the last word.

        Args:
            updates: At least one client's update; all name the same layers and tensors with the same shapes, but for
                the ranks if `start` is given.
            client_weights: One positive number per update, in the same order; they are normalised to sum 1.
            start: What the clients started from. It says the global rank of every layer, so that clients may have
                others; only for a method that `mixes_ranks`.

        Raises:
            ValueError: If the updates do not fit together, a weight is not positive and finite, or a method returns a
                residual without `changes_base`.
        """
        weights = normalise(client_weights, len(updates))
        surplus: Mapping[str, LowRankDelta] = {}
        given = updates
        if start is None or not self.mixes_ranks:
            self._refuse_ranks(updates, start)
            start = None
        else:
            updates, surplus = at_global_rank(updates, weights, start.adapters)
        _check_same_layout(updates)
        adapters: dict[str, LowRankDelta] = {}
        residuals: dict[str, LowRankDelta] = {}
        layers = {layer: [update.adapters[layer] for update in updates] for layer in updates[0].adapters}
        for layer, mean, residual in self.aggregate_layers(layers, weights):
            parts = [] if residual is None else [residual]
            if start is not None:
                mean, lost = _rounded(mean, start.adapters[layer])
                parts += [each for each in (lost, surplus.get(layer)) if each is not None]
            adapters[layer] = mean
            if not parts:
                continue
            if not self.changes_base:
                raise ValueError(
                    f"`{type(self).__name__}.aggregate_layer` returned a residual for `{layer}`, but the class does "
                    "not say `changes_base = True`, so the base weights were not checked to be able to hold it."
                )
            residuals[layer] = self.shorten(parts[0] if len(parts) == 1 else concatenate(parts))
        tensors = {
            name: weighted_mean([update.tensors[name] for update in updates], weights).to(tensor.dtype)
            for name, tensor in updates[0].tensors.items()
        }
        adapters, residuals = ({name: each[name] for name in layers if name in each} for each in (adapters, residuals))
        return self.assign(GlobalUpdate(adapters=adapters, tensors=tensors, residuals=residuals), given, weights)

    def _refuse_ranks(self, updates: Sequence[ClientUpdate], start: GlobalUpdate | None) -> None:
        for update in updates:
            if update.offsets and not self.keeps_client_adapters:
                raise ValueError(
                    f"Client `{update.client_id}` trained on a base with an offset, which would be left out. Clients "
                    "of other ranks than the global one need a method that `mixes_ranks`, such as `fedex`, and what "
                    "all started from: `aggregate(updates, client_weights, start=state)`."
                )
            for layer, like in () if start is None else start.adapters.items():
                if layer in update.adapters and update.adapters[layer].rank != like.rank:
                    raise ValueError(
                        f"Client `{update.client_id}` has rank {update.adapters[layer].rank} in `{layer}`, and the "
                        f"global rank is {like.rank}. `{type(self).__name__}` does not say `mixes_ranks`: train all "
                        "with one rank, or use `fedex`."
                    )


def normalise(client_weights: Sequence[float], num_updates: int) -> torch.Tensor:
    """Client weights as a float64 tensor of shape `(k,)` with sum 1.

    Raises:
        ValueError: If there are no updates, the numbers differ, or a weight is not positive and finite.

    Example:
        >>> normalise([30, 10], 2)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    weights = torch.as_tensor(client_weights, dtype=torch.float64)
    if num_updates == 0 or weights.shape != (num_updates,):
        raise ValueError(
            f"`client_weights` has shape {tuple(weights.shape)} for {num_updates} updates. Allowed: one weight per "
            "update, and at least one update."
        )
    if not bool((torch.isfinite(weights) & (weights > 0)).all()):
        raise ValueError(
            f"`client_weights` is {weights.tolist()}. Allowed: positive finite numbers; leave a client that should "
            "not count out of the round."
        )
    return weights / weights.sum()


def weighted_mean(tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of k tensors of one shape, accumulated in float64 and returned in float64."""
    mean = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        mean.add_(tensor.double(), alpha=weight)
    return mean


def mean_factors(factors: Sequence[LowRankDelta], weights: torch.Tensor) -> LowRankDelta:
    """The averaged factors `Ā = sum w_i A_i` and `B̄ = sum w_i B_i`, rounded once to the dtype of the inputs.

    Where ranks differ, the rows and columns that a client lacks count as zeros (HetLoRA, arXiv 2401.06432), and
    differing scalings are brought to the first one's in `B`.
    """
    first = factors[0]
    if any(delta.rank != first.rank or delta.scaling != first.scaling for delta in factors):
        rank = max(delta.rank for delta in factors)
        factors = [padded(at_scaling(doubled(delta), first.scaling), rank) for delta in factors]
    A = weighted_mean([delta.A for delta in factors], weights).to(first.A.dtype)
    B = weighted_mean([delta.B for delta in factors], weights).to(first.B.dtype)
    return LowRankDelta(A, B, first.scaling)


def lost_by_rounding(mean: LowRankDelta, rounded: LowRankDelta) -> LowRankDelta:
    """`s (B̄ Ā - B̄' Ā')` for factors before rounding and after (primes), as factors of rank 2 r, float32."""
    left = torch.cat([mean.B - rounded.B.double(), mean.B], dim=-1)
    right = torch.cat([rounded.A.double(), mean.A - rounded.A.double()], dim=-2)
    return LowRankDelta(right.float(), left.float(), rounded.scaling)


def _rounded(mean: LowRankDelta, like: LowRankDelta) -> tuple[LowRankDelta, LowRankDelta | None]:
    """Factors in the dtype that clients train, and what that takes away where it is worth its rank."""
    if (mean.A.dtype, mean.B.dtype) == (like.A.dtype, like.B.dtype):
        return mean, None
    rounded = LowRankDelta(mean.A.to(like.A.dtype), mean.B.to(like.B.dtype), mean.scaling)
    return rounded, None if like.A.dtype in WIDE else lost_by_rounding(mean, rounded)


def _check_same_layout(updates: Sequence[ClientUpdate]) -> None:
    first = _layout(updates[0])
    for update in updates[1:]:
        layout = _layout(update)
        if layout != first:
            name = next(key for key in [*first, *layout] if first.get(key) != layout.get(key))
            raise ValueError(
                f"The updates of clients `{updates[0].client_id}` and `{update.client_id}` do not fit together: "
                f"`{name}` is {first.get(name, 'missing')} in the one and {layout.get(name, 'missing')} in the other. "
                "All clients must train the same layers in the same dtype with the same rank and `lora_alpha`; ranks "
                "may differ where `aggregate` is told what the clients started from (`start`)."
            )


def _layout(update: ClientUpdate) -> Mapping[str, tuple]:
    layers = {
        name: (tuple(delta.A.shape), tuple(delta.B.shape), delta.A.dtype, delta.B.dtype, delta.scaling)
        for name, delta in update.adapters.items()
    }
    return layers | {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in update.tensors.items()}
