"""Room 5: the LoRA state of a `PeftModel`, and the residual in its base weights.

PEFT is asked for every layer's true update (`get_delta_weight`): orientation, scaling and layout are never written by
hand. What the base holds is a pure function of two things, the original weight and the ledger of residuals,
`W = W0 + ledger` computed in float64 and rounded once. So installing twice changes nothing, going back to an earlier
round is exact, and a checkpoint needs the ledger only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from fedex_hf.low_rank import concatenate, max_useful_rank
from fedex_hf.updates import GlobalUpdate, LowRankDelta


class UnsupportedModelError(ValueError):
    """The model cannot be aggregated exactly; the message says why and what to do instead."""


@dataclass(frozen=True)
class LoraSite:
    """One adapted layer.

    Args:
        name: The layer's name in the `PeftModel`.
        layer: PEFT's LoRA layer; its base is an `nn.Linear` or transformers' `Conv1D`.
        adapter: Name of the trained adapter.
    """

    name: str
    layer: LoraLinear
    adapter: str

    @property
    def A(self) -> nn.Parameter:
        """`lora_A` of shape `(r, in_features)`."""
        return cast(nn.Parameter, _linear(self.layer.lora_A[self.adapter]).weight)

    @property
    def B(self) -> nn.Parameter:
        """`lora_B` of shape `(out_features, r)`."""
        return cast(nn.Parameter, _linear(self.layer.lora_B[self.adapter]).weight)

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight in its own layout: `(out, in)` for `nn.Linear`, `(in, out)` for `Conv1D`."""
        return cast(nn.Parameter, self.layer.get_base_layer().weight)

    @property
    def scaling(self) -> float:
        """PEFT's scaling of this layer, no unit."""
        return float(self.layer.scaling[self.adapter])

    def read(self) -> LowRankDelta:
        """A copy of the layer's factors on the CPU."""
        return LowRankDelta(_snapshot(self.A), _snapshot(self.B), self.scaling)

    @torch.no_grad()
    def write(self, delta: LowRankDelta) -> None:
        """Copy factors of the layer's own rank into the model."""
        self.A.copy_(delta.A)
        self.B.copy_(delta.B)

    @torch.no_grad()
    def dense(self, delta: LowRankDelta) -> torch.Tensor:
        """What a factored update adds to `base_weight`, by PEFT's own `get_delta_weight`.

        Args:
            delta: Factors of any rank for this layer.

        Returns:
            Tensor in the layout of `base_weight`, float64, on the CPU.
        """
        B = delta.B.double() * (delta.scaling / self.scaling)
        lora_A, lora_B = _linear(self.layer.lora_A[self.adapter]), _linear(self.layer.lora_B[self.adapter])
        with _replaced_weight(lora_A, delta.A.double()), _replaced_weight(lora_B, B):
            return self.layer.get_delta_weight(self.adapter)


class AdaptedModel:
    """Reads and writes what the clients train in a `PeftModel`, and installs the ledger in its base weights.

    Args:
        model: A `PeftModel` with one active LoRA adapter.
        changes_base: Whether residuals will be added to base weights; then these must be float32 and untied.

    Raises:
        UnsupportedModelError: If the model is not supported; see `docs/limits.md` for the list and the reasons.
    """

    def __init__(self, model: nn.Module, changes_base: bool) -> None:
        self.model = _check_peft_model(model)
        self.adapter = self.model.active_adapters[0]
        self.sites = {
            name: LoraSite(name, check_layer(name, layer, self.adapter), self.adapter)
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoraLayer) and self.adapter in layer.r
        }
        if not self.sites:
            raise UnsupportedModelError(
                f"The adapter `{self.adapter}` adapts no layer of `{type(self.model.get_base_model()).__name__}`. "
                "Check `target_modules` of your `LoraConfig`."
            )
        if not any(site.B.requires_grad for site in self.sites.values()):
            raise UnsupportedModelError(
                f"The adapter `{self.adapter}` is frozen, so there is nothing to train. Load it with "
                "`PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        _check_no_running_statistics(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise UnsupportedModelError(f"`{name}` holds NaN or Inf before any training. Load or build it anew.")
        if changes_base:
            _check_base_weights(self.model, self.sites)
        factors = {id(factor) for site in self.sites.values() for factor in (site.A, site.B)}
        self.tensors = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in factors
        }
        self.originals: dict[str, torch.Tensor] = {}
        self.holds_offsets = False

    def read(self) -> GlobalUpdate:
        """A copy of everything the clients train, on the CPU."""
        return GlobalUpdate(
            adapters={name: site.read() for name, site in self.sites.items()},
            tensors={name: _snapshot(parameter) for name, parameter in self.tensors.items()},
        )

    @torch.no_grad()
    def write(self, state: GlobalUpdate) -> None:
        """Copy a state into the model; base weights are not touched."""
        for name, site in self.sites.items():
            site.write(state.adapters[name])
        for name, parameter in self.tensors.items():
            parameter.copy_(state.tensors[name])

    @torch.no_grad()
    def install(self, ledger: Ledger, offsets: Mapping[str, LowRankDelta] | None = None) -> None:
        """Set every base weight to `original + ledger`, rounded once to the weight's dtype.

        The originals are kept from the first call on, one copy of the adapted base weights.

        Args:
            ledger: All residuals.
            offsets: Layer name -> what one client's base holds beyond them, until the next call.
        """
        offsets = offsets or {}
        self.holds_offsets |= bool(offsets)  # also if it ends half-way
        for name in ledger.layers() | self.originals.keys() | offsets.keys():
            weight = self.sites[name].base_weight
            if name not in self.originals:
                self.originals[name] = _snapshot(weight)
            weight.copy_(self.base_weight_at(name, ledger, offsets.get(name)))
        self.holds_offsets = bool(offsets)

    def original(self, name: str) -> torch.Tensor:
        """A layer's base weight before any residual, in its own dtype and layout, on the CPU."""
        original = self.originals.get(name)
        return self.sites[name].base_weight.detach().cpu() if original is None else original

    def base_weight_at(self, name: str, ledger: Ledger, offset: LowRankDelta | None = None) -> torch.Tensor:
        """A layer's base weight under a ledger and a client's offset, in its own dtype and layout, on the CPU."""
        original, site = self.original(name), self.sites[name]
        added, own = ledger.dense(name, site), None if offset is None else site.dense(offset)
        if added is None and own is None:
            return original
        total = original.double()
        for each in (added, own):
            total = total if each is None else total + each
        return total.to(original.dtype)


@dataclass
class Ledger:
    """The sum of all residuals so far, layer by layer, in float32.

    A layer's sum stays two thin factors as long as they are smaller than the dense matrix, and is dense afterwards.

    Args:
        factors: Layer name -> concatenated residual factors.
        matrices: Layer name -> dense sum in the layout of the base weight, float32.
    """

    factors: dict[str, LowRankDelta] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)

    def layers(self) -> set[str]:
        """Names of the layers that hold a residual."""
        return self.factors.keys() | self.matrices.keys()

    def dense(self, name: str, site: LoraSite) -> torch.Tensor | None:
        """A layer's sum in the layout of its base weight, float64; `None` where there is none."""
        if name in self.matrices:
            return self.matrices[name].double()
        return site.dense(self.factors[name]) if name in self.factors else None

    def plus(self, residuals: Mapping[str, LowRankDelta], sites: Mapping[str, LoraSite]) -> Ledger:
        """A new ledger with one round's residuals added; this one is left as it is."""
        factors, matrices = dict(self.factors), dict(self.matrices)
        for name, residual in residuals.items():
            if name in matrices:
                matrices[name] = (matrices[name].double() + sites[name].dense(residual)).float()
                continue
            total = concatenate([factors[name], residual]) if name in factors else residual
            if total.rank < max_useful_rank(total):
                factors[name] = total
            else:
                factors.pop(name, None)
                matrices[name] = sites[name].dense(total).float()
        return Ledger(factors, matrices)


def _linear(module: nn.Module) -> nn.Linear:
    return cast(nn.Linear, module)


def _snapshot(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)


@contextmanager
def _replaced_weight(linear: nn.Linear, weight: torch.Tensor) -> Iterator[None]:
    original = linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = original


def check_peft_type(what: str, config: PeftConfig) -> None:
    """Refuse adapters other than LoRA.

    Raises:
        UnsupportedModelError: If `config` is of another type; `what` begins the message.
    """
    if config.peft_type != PeftType.LORA:
        raise UnsupportedModelError(
            f"{what} is of the type {config.peft_type}. Allowed: LORA, because the residual of FedEx-LoRA (arXiv "
            "2410.09432) is defined for products of two factors. Use a `LoraConfig`."
        )


def _check_peft_model(model: nn.Module) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"`model` is a `{type(model).__name__}` without LoRA. Pass `peft_config=LoraConfig(...)`, or a model that "
            "`peft.get_peft_model` has returned."
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise UnsupportedModelError(
            f"The model has {len(active)} active adapters ({active}). Allowed: one; call `model.set_adapter(name)`."
        )
    config = model.peft_config[active[0]]
    check_peft_type(f"The adapter `{active[0]}`", config)
    start = cast(LoraConfig, config).init_lora_weights
    if start not in (True, False, "gaussian", "orthogonal"):
        raise UnsupportedModelError(
            f"`init_lora_weights={start!r}` is not supported yet: such a start sets the base weight or the factors "
            'from the weights or the data. Allowed: True, False, "gaussian", "orthogonal".'
        )
    return model


def check_layer(name: str, layer: LoraLayer, adapter: str) -> LoraLinear:
    if type(layer) is not LoraLinear:
        raise UnsupportedModelError(
            f"Layer `{name}` is a LoRA `{type(layer).__name__}`. Supported so far: LoRA on `nn.Linear` and `Conv1D`. "
            "Leave it out with `target_modules` or `exclude_modules` of your `LoraConfig`."
        )
    variant = layer.lora_variant.get(adapter)
    if variant is not None:
        raise UnsupportedModelError(
            f"Layer `{name}` uses {type(variant).__name__}, whose update is not `scaling * B @ A`. Supported so far: "
            "plain LoRA and rsLoRA; switch the variant (for example `use_dora`) off in your `LoraConfig`."
        )
    if layer.get_base_layer().weight.requires_grad:
        raise UnsupportedModelError(
            f"The base weight of `{name}` is itself trained (`requires_grad`), so there is no frozen weight to hold "
            "the residual. Freeze it with `requires_grad_(False)`, or train the layer in full with `modules_to_save`."
        )
    if layer.merged:
        raise UnsupportedModelError(
            f"Layer `{name}` holds a merged adapter, which would be counted twice. Call `model.unmerge_adapter()`."
        )
    return layer


def _check_base_weights(model: PeftModel, sites: Mapping[str, LoraSite]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for name, site in sites.items():
        weight = site.base_weight
        if weight.dtype != torch.float32:
            raise UnsupportedModelError(
                f"The base weight of `{name}` is {weight.dtype}: a residual added to it would round away (80 to 99 % "
                "of it is lost in bfloat16). Load the model with `dtype=torch.float32`, or use an aggregator that "
                "leaves the base alone (`fedit`, `ffa`)."
            )
        shared = owners[weight.data_ptr()]
        if len(shared) > 1:
            raise UnsupportedModelError(
                f"The base weight of `{name}` is one tensor with several places in the model ({', '.join(shared)}): "
                "its residual would act in all of them. Leave the layer out of `target_modules`, or untie the weights "
                "(`tie_word_embeddings=False`)."
            )


def _check_no_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise UnsupportedModelError(
                f"`{name}` keeps running statistics, which would leak from one client to the next. Replace it by "
                "`LayerNorm` or `GroupNorm`, or set `track_running_stats=False`."
            )
