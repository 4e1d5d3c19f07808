"""Room 5, one adapted layer: every kind of LoRA layer as two factors of an update.

PEFT is asked for every layer's true update (`get_delta_weight`): orientation, scaling and layout are never written by
hand. What differs between kinds is where PEFT keeps the factors and how it shapes them: `layouts.py`.

What is dense is formed block by block, a few rows at a time that stay in the processor's cache: several times as fast
as whole matrices, which are mostly fresh memory, and it needs hardly any. What is compared is formed in float64 by
PEFT; what is added to float32 weights is added in float32, whose rounding there is no way around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as peft_layers
from torch import nn

from fedex_hf.layouts import LINEAR, Layout, layout_of
from fedex_hf.low_rank import decompose, multiplies_in_float32
from fedex_hf.updates import LowRankDelta


PREFIX = "base_model.model."  # of a module's name in a `PeftModel`
ALL = slice(None)
# Numbers of a block, 0.5 MB in float64: what is freed of larger ones goes back to the system, and comes back page by
# page. It has a multiple of so many rows: then MKL gives products the same bits, however the rows are cut.
_BLOCK, _ROWS = 2**16, 16
_LARGE_RANK = 32  # from which on float32 products gain more from larger blocks than they lose


@dataclass(frozen=True)
class LoraSite:
    """One adapted layer, seen through one of its adapters.

    Args:
        name: The layer's name in the `PeftModel`.
        layer: PEFT's LoRA layer.
        adapter: Name of the adapter.
        layout: Of the layer's kind.
    """

    name: str
    layer: Any
    adapter: str
    layout: Layout = LINEAR

    @property
    def A(self) -> torch.Tensor:
        """`A` of shape `(r, in_features)`, as it lies in the model."""
        return self.layout.matrices(self.layer, *self.parameters)[0]

    @property
    def B(self) -> torch.Tensor:
        """`B` of shape `(out_features, r)`, as it lies in the model."""
        return self.layout.matrices(self.layer, *self.parameters)[1]

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters that hold the factors, in PEFT's shapes."""
        return self.layout.parameters(self.layer, self.adapter)

    @property
    def module_B(self) -> nn.Module | None:
        """The module of `B`; `None` for an embedding, whose factors are no modules."""
        return dict(self.layer.lora_B.items()).get(self.adapter)

    @property
    def bias(self) -> torch.Tensor | None:
        """The trained bias of `lora_bias`, which PEFT scales like the update; `None` without one."""
        return cast("torch.Tensor | None", getattr(self.module_B, "bias", None))

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight in its own layout, such as `(out, in)` for `nn.Linear` and `(in, out)` for `Conv1D`."""
        return cast(nn.Parameter, getattr(self.layer.get_base_layer(), self._weight_attribute))

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of an update in the layout of the base weight, however the weight itself is stored."""
        return torch.Size((len(self.B), self.A.shape[1])) if self.layout.quantized else self.base_weight.shape

    @property
    def weight_name(self) -> str:
        """The base weight's name in the plain base model, such as `encoder.layer.0.attention.self.query.weight`."""
        return f"{plain_name(self.name)}.{self._weight_attribute}"

    @property
    def _weight_attribute(self) -> str:
        return getattr(self.layer, "parameter_name", self.layout.weight)

    @property
    def scaling(self) -> float:
        """PEFT's scaling of this layer, no unit."""
        return float(self.layer.scaling[self.adapter])

    def read(self) -> LowRankDelta:
        """A copy of the layer's factors on the CPU."""
        return LowRankDelta(snapshot(self.A), snapshot(self.B), self.scaling)

    @torch.no_grad()
    def write(self, delta: LowRankDelta) -> None:
        """Copy factors of the layer's own rank into the model."""
        A, B = self.parameters
        shaped = self.layout.shaped(self.layer, self.adapter, delta.A, delta.B)
        A.copy_(shaped[0])
        B.copy_(shaped[1])

    @torch.no_grad()
    def resize(self, delta: LowRankDelta) -> None:
        """Put factors of any rank, with their scaling, in the place of the layer's own; dtype and device stay."""
        A, B = self.parameters
        new = self.layout.shaped(self.layer, self.adapter, delta.A, delta.B)
        new_A, new_B = (
            type(old)(tensor.to(old, copy=True).contiguous(), requires_grad=old.requires_grad)
            for old, tensor in zip((A, B), new, strict=True)
        )
        self.exchange(new_A, new_B, delta.scaling)

    def exchange(self, A: nn.Parameter, B: nn.Parameter, scaling: float) -> None:
        """Put other parameters, in PEFT's shapes and with their scaling, in the place of the layer's own."""
        self.layout.replace(self.layer, self.adapter, A, B)
        self.layer.r[self.adapter], self.layer.scaling[self.adapter] = self.A.shape[-2], scaling

    @torch.no_grad()
    def dense(self, delta: LowRankDelta) -> torch.Tensor:
        """What a factored update adds to `base_weight`, by PEFT's own `get_delta_weight`.

        Args:
            delta: Factors of any rank for this layer.

        Returns:
            Tensor in the layout of `base_weight`, float64, on the CPU.
        """
        B = delta.B.double()
        B = B if delta.scaling == self.scaling else B * (delta.scaling / self.scaling)
        shaped = self.layout.shaped(self.layer, self.adapter, delta.A.double(), B)
        held = self.parameters
        self.layout.replace(self.layer, self.adapter, *(nn.Parameter(each, requires_grad=False) for each in shaped))
        try:
            with self.layout.in_float64(self.layer):
                dense = self.layer.get_delta_weight(self.adapter)
            return dense if self.layout.times == 1 else dense * self.layout.times
        finally:
            self.layout.replace(self.layer, self.adapter, *held)

    def rows(self, delta: LowRankDelta, rows: slice = ALL) -> torch.Tensor:
        """Rows of `dense` as those of a matrix `(out_features, in_features)`, or of one per expert, float64."""
        if delta.product is not None:
            return delta.product[..., rows, :].double().mul_(delta.scaling * self.layout.times)
        return self.matrix(self.dense(delta if rows == ALL else delta.rows(rows)))

    def blocks(self, rank: int = 0) -> Iterator[slice]:
        """The rows of an update that are formed at a time; with products of a large rank more."""
        out_features, (*experts, _, in_features) = self.B.shape[-2], self.A.shape
        numbers = _BLOCK if rank < _LARGE_RANK else 4 * _BLOCK
        size = max(numbers // (math.prod(experts) * in_features), _ROWS) // _ROWS * _ROWS
        return (slice(start, start + size) for start in range(0, out_features, size))

    def assembled(
        self,
        fill: Callable[[slice, torch.Tensor], object],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
        rank: int = 0,
    ) -> torch.Tensor:
        """What is written block by block, in the layout of `base_weight`.

        Args:
            fill: Takes rows, and a view of them, shaped as by `rows`, to write into.
            dtype: Of the result.
            out: Contiguous tensor to write into, a new one if `None`.
            rank: Of what `fill` multiplies.
        """
        out = torch.empty(self.dense_shape, dtype=dtype) if out is None else out
        matrix = self.matrix(out)
        for rows in self.blocks(rank):
            fill(rows, matrix[..., rows, :])
        return out

    def add_to(self, into: torch.Tensor, delta: LowRankDelta, rows: slice = ALL) -> None:
        """Add rows of an update to those of a matrix, in place.

        Args:
            into: Shaped as by `rows`. Float32 is added to in float32, the product with its rounding errors first;
                anything else, and float32 where torch was told to multiply it with fewer digits, in float64, rounded
                once.
            delta: The update.
            rows: Which rows `into` is.
        """
        narrow = into.dtype == delta.A.dtype == torch.float32 and into.ndim == 2
        if not narrow or (delta.product is None and not multiplies_in_float32()):
            into.copy_(self.rows(delta, rows).add_(into))
        elif delta.product is not None:
            into.add_(delta.product[rows], alpha=delta.scaling * self.layout.times)
        else:
            into.addmm_(delta.B[rows], delta.A, alpha=delta.scaling * self.layout.times)

    def factored(self, dense: torch.Tensor) -> LowRankDelta:
        """The other way round: factors of the numerical rank, float64 and scaling 1, of which `dense` makes this."""
        return decompose(self.matrix(dense) / self.layout.times)

    def matrix(self, dense: torch.Tensor) -> torch.Tensor:
        """A tensor in the layout of `base_weight` as `(out_features, in_features)`, or one such matrix per expert."""
        return self.layout.matrix(self.layer, dense)

    def through(self, adapter: str) -> LoraSite:
        """The same layer seen through another of its adapters."""
        return replace(self, adapter=adapter)


def sites_of(model: nn.Module, adapter: str) -> dict[str, LoraSite]:
    """All layers that an adapter adapts, by their names.

    Raises:
        UnsupportedModelError: If one of them cannot be aggregated exactly.
    """
    layers = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and adapter in layer.r
    ]
    inside_attention = {
        f"{name}.base_layer.out_proj" for name, layer in layers if type(layer) is peft_layers.MultiheadAttention
    }
    return {
        name: LoraSite(name, layer, adapter, layout_of(name, layer, adapter, name in inside_attention))
        for name, layer in layers
    }


def plain_name(name: str) -> str:
    """The name that a layer of a `PeftModel` has in the plain base model."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
