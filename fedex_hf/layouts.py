"""Room 5, the kinds of LoRA layers: where PEFT keeps the factors of each, in which shape, and what cannot be exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as peft_layers
from peft.utils.other import transpose
from torch import nn


class UnsupportedModelError(ValueError):
    """The model cannot be aggregated exactly; the message says why and what to do instead."""


class Layout:
    """Where PEFT keeps the factors of `nn.Linear`, `Conv1D` and quantized linear layers, and in which shape.

    Attributes:
        weight: Name of the adapted parameter in the base layer.
        carries: Whether a second adapter can carry a residual beside the trained one without rounding.
        quantized: Whether the parameter holds packed integers, whatever its dtype says.
        times: How often PEFT adds the update to the weight in a forward pass.
        drifts: Whether PEFT folds the adapter into the base weight and out again in every forward pass, which leaves
            rounding behind.
    """

    weight = "weight"
    carries: ClassVar[bool] = True
    times: int = 1
    quantized: ClassVar[bool] = False
    drifts: ClassVar[bool] = False

    def parameters(self, layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters of `A` and `B`."""
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def replace(self, layer: Any, adapter: str, A: nn.Parameter, B: nn.Parameter) -> None:
        """Put other parameters in their place."""
        layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = A, B

    def matrices(self, layer: Any, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """PEFT's shapes as those of a `LowRankDelta`."""
        return A, B

    def shaped(self, layer: Any, adapter: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shapes of a `LowRankDelta` as PEFT's."""
        return A, B

    def matrix(self, layer: Any, dense: torch.Tensor) -> torch.Tensor:
        """An update in the layout of the base weight as `(out_features, in_features)`, or one per expert."""
        return transpose(dense, layer.fan_in_fan_out)

    @contextmanager
    def in_float64(self, layer: Any) -> Iterator[None]:
        """Keep PEFT from rounding `get_delta_weight` to the base weight's dtype."""
        yield


class QuantizedLayout(Layout):
    """Linear layers of bitsandbytes, 4-bit and 8-bit."""

    quantized = True


class EmbeddingLayout(Layout):
    """`nn.Embedding`: parameters instead of modules, and the update is the transpose of `B A`."""

    def parameters(self, layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]

    def replace(self, layer: Any, adapter: str, A: nn.Parameter, B: nn.Parameter) -> None:
        layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = A, B

    def matrix(self, layer: Any, dense: torch.Tensor) -> torch.Tensor:
        return dense.T


class ConvLayout(Layout):
    """Convolutions: `A` is a kernel of shape `(r, in_channels, *kernel)`, `B` one of size 1."""

    def matrices(self, layer: Any, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return A.flatten(1), B.flatten(1)

    def shaped(self, layer: Any, adapter: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        there_A, there_B = self.parameters(layer, adapter)
        return A.reshape(-1, *there_A.shape[1:]), B.reshape(*B.shape, *[1] * (there_B.ndim - 2))

    def matrix(self, layer: Any, dense: torch.Tensor) -> torch.Tensor:
        return dense.flatten(1)


class AttentionLayout(Layout):
    """The joint input projection of `nn.MultiheadAttention`; its output projection is a linear layer of its own."""

    weight = "in_proj_weight"
    carries = False
    drifts = True

    def matrix(self, layer: Any, dense: torch.Tensor) -> torch.Tensor:
        return dense


class AttentionOutputLayout(Layout):
    """The output projection inside `nn.MultiheadAttention`, which is folded in and out together with it."""

    carries = False
    drifts = True

    @property
    def times(self) -> int:  # type: ignore[override]
        """Twice, up to PEFT 0.21.2 at least."""
        return _times_in_attention()


@cache
def _times_in_attention() -> int:
    """How often PEFT adds LoRA to an attention's output projection: its `merge` does, and calls another `merge`."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        attention: Any = nn.MultiheadAttention(1, 1)
        layer = peft_layers.MultiheadAttention(attention, "probe", config=LoraConfig(), r=1, lora_alpha=1)
        projection = attention.out_proj
        for each in (projection.base_layer, projection.lora_A["probe"], projection.lora_B["probe"]):
            each.weight.fill_(1.0)
        layer.merge()
        return round(float(projection.base_layer.weight)) - 1


class ExpertsLayout(Layout):
    """`target_parameters`: a parameter of shape `(experts, ., .)`, or a matrix; PEFT stacks the experts' factors."""

    carries = False

    def matrices(self, layer: Any, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer.num_experts == 1:
            return A, B
        A = A.reshape(layer.num_experts, -1, A.shape[-1])
        return A, B.reshape(B.shape[0], -1, layer.num_experts).permute(2, 0, 1)

    def shaped(self, layer: Any, adapter: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer.num_experts == 1:
            return A, B
        return A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)

    def matrix(self, layer: Any, dense: torch.Tensor) -> torch.Tensor:
        if layer.num_experts == 1:
            return dense
        return dense if layer._did_swap_in_out_features else dense.mT

    @contextmanager
    def in_float64(self, layer: Any) -> Iterator[None]:
        layer.get_param = lambda: torch.empty(0, dtype=torch.float64)
        try:
            yield
        finally:
            del layer.get_param


LINEAR, _EMBEDDING, _CONV = Layout(), EmbeddingLayout(), ConvLayout()
_LAYOUTS: dict[type, Layout] = {
    peft_layers.Linear: LINEAR,
    peft_layers.Embedding: _EMBEDDING,
    peft_layers.Conv1d: _CONV,
    peft_layers.Conv2d: _CONV,
    peft_layers.Conv3d: _CONV,
    peft_layers.MultiheadAttention: AttentionLayout(),
    peft_layers.ParamWrapper: ExpertsLayout(),
}
# bitsandbytes' layers, which PEFT defines where it is installed; by name, so that nothing is imported for it.
_QUANTIZED = ("Linear4bit", "Linear8bitLt")
_QUANTIZED_LINEAR, _ATTENTION_OUTPUT = QuantizedLayout(), AttentionOutputLayout()


def layout_of(name: str, layer: LoraLayer, adapter: str, inside_attention: bool = False) -> Layout:
    """The layout of a layer's kind.

    Raises:
        UnsupportedModelError: If the layer cannot be aggregated exactly; the message names it and says why.
    """
    layout = _LAYOUTS.get(type(layer))
    if layout is None and type(layer).__name__ in _QUANTIZED:
        layout = _QUANTIZED_LINEAR
    if layout is None:
        raise UnsupportedModelError(
            f"Layer `{name}` is a LoRA `{type(layer).__name__}`, for which exactness was never shown. Supported: LoRA "
            f"on {', '.join(sorted(cls.__name__ for cls in _LAYOUTS))}, {', '.join(_QUANTIZED)}. Leave it out with "
            "`target_modules` or `exclude_modules` of your `LoraConfig`."
        )
    variant = layer.lora_variant.get(adapter)
    if variant is not None:
        raise UnsupportedModelError(
            f"Layer `{name}` uses {type(variant).__name__}: {_why_not(type(variant).__name__)}. Supported: plain LoRA "
            "and rsLoRA; switch the variant (for example `use_dora`) off in your `LoraConfig`."
        )
    if layout is _CONV and cast(Any, layer.get_base_layer()).groups > 1:
        raise UnsupportedModelError(
            f"Layer `{name}` is a convolution with {cast(Any, layer.get_base_layer()).groups} groups: PEFT cannot say "
            "what its LoRA adds to the weight. Leave it out with `exclude_modules`."
        )
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", layout.weight))
    if weight.requires_grad:
        raise UnsupportedModelError(
            f"The base weight of `{name}` is itself trained (`requires_grad`), so there is no frozen weight to hold "
            "the residual. Freeze it with `requires_grad_(False)`, or train the layer in full with `modules_to_save`."
        )
    if layer.merged:
        raise UnsupportedModelError(
            f"Layer `{name}` holds a merged adapter, which would be counted twice. Call `model.unmerge_adapter()`."
        )
    return _ATTENTION_OUTPUT if inside_attention else layout


def _why_not(variant: str) -> str:
    if variant.startswith("Dora"):
        return (
            "DoRA rescales every row of the base weight, so the exact residual has full rank; it is neither two thin "
            "factors to send nor anything that could ride beside a low-precision base"
        )
    if variant.startswith("ALora"):
        return "its update depends on the input (tokens before the invocation do not get it), a residual's cannot"
    return "its update is not `scaling * B @ A`"
