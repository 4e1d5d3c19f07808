"""Room 5, the residual beside the base: a second, frozen PEFT adapter in float32 that carries the ledger.

It needs nothing of the base weight, so it is exact beside bfloat16, float16, 4-bit and 8-bit weights, and beside a
weight that is tied to another layer. PEFT adds it in the forward pass like any active adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.ledger import Ledger, densified, fill_sum
from fedex_hf.lora_site import ALL, PREFIX, LoraSite
from fedex_hf.low_rank import concatenate, max_useful_rank
from fedex_hf.updates import LowRankDelta


CARRIER = "fedex_residual"


class FrozenParameter(nn.Parameter):
    """A parameter that no `requires_grad_` thaws.

    PEFT makes the factors of all active adapters trainable whenever adapters are switched on again
    (`enable_adapters`, after `disable_adapter()`); their gradients would then count in gradient clipping.
    """

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> FrozenParameter:
        return super().__new__(cls, data, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        return self


class Identity(nn.Module):
    """The factor `B` of a dense update `I @ A`: costs nothing in the forward pass; PEFT sees a weight.

    Args:
        A: The module that holds the other factor.
        instead: The module in whose place this one stands.
    """

    bias = None

    def __init__(self, A: nn.Module, instead: nn.Module) -> None:
        super().__init__()
        self._held = (A, instead)  # in a tuple: no submodules

    @property
    def instead(self) -> nn.Module:
        """The module in whose place this one stands."""
        return self._held[1]

    @property
    def weight(self) -> torch.Tensor:
        """The identity, made when asked for: of shape `(out_features, out_features)`, or as a kernel of size 1."""
        A, B = (cast(torch.Tensor, module.weight) for module in self._held)
        return torch.eye(len(A), dtype=A.dtype, device=A.device).reshape(len(A), len(A), *[1] * (B.ndim - 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        if prefix + "weight" not in state_dict:
            missing.append(prefix + "weight")
        elif not torch.equal(state_dict[prefix + "weight"].to(self.weight), self.weight):
            errors.append(f"`{prefix}weight` is no identity, and this layer's residual is dense. Install the ledger.")


def attach(model: PeftModel, sites: Mapping[str, LoraSite]) -> dict[str, LoraSite]:
    """Add the carrying adapter, empty, to every adapted layer.

    Args:
        model: The model.
        sites: Layers of the trained adapter.

    Returns:
        The same layers seen through the carrier.
    """
    trained = cast(LoraConfig, model.peft_config[next(iter(sites.values())).adapter])
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=[name.removeprefix(PREFIX) for name in sites],
        fan_in_fan_out=trained.fan_in_fan_out,
        inference_mode=True,
    )
    config.base_model_name_or_path, config.revision = trained.base_model_name_or_path, trained.revision
    model.peft_config[CARRIER] = config
    for site in sites.values():
        with trainability_kept(site.layer):
            site.layer.update_layer(CARRIER, r=1, lora_alpha=1, config=config)
        carrier = site.through(CARRIER)
        empty = [FrozenParameter(torch.zeros_like(each, dtype=torch.float32)) for each in carrier.parameters]
        carrier.layout.replace(carrier.layer, CARRIER, *empty)
        activate(site)
    return {name: site.through(CARRIER) for name, site in sites.items()}


def content(model: PeftModel, sites: Mapping[str, LoraSite]) -> dict[str, LowRankDelta]:
    """What the carrier of a model holds that comes with one: layer name -> its factors.

    Args:
        model: The model.
        sites: Layers of the trained adapter.

    Raises:
        UnsupportedModelError: If it carries anything for a layer that the trained adapter does not adapt.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and CARRIER in layer.r and name not in sites:
            raise UnsupportedModelError(
                f"The adapter `{CARRIER}` carries residuals for the layer `{name}`, which the trained adapter does "
                "not adapt. Train the adapter that they belong to, or fold everything into the base with "
                "`model.merge_and_unload()` and start anew."
            )
    return {name: site.through(CARRIER).read() for name, site in sites.items() if CARRIER in site.layer.r}


def is_active(site: LoraSite) -> bool:
    """Whether the carrier acts in the layer's forward pass, beside the trained adapter."""
    return CARRIER in site.layer.active_adapters and not site.layer.disable_adapters


def activate(site: LoraSite) -> None:
    """Let the carrier act in the layer's forward pass beside the trained adapter."""
    with trainability_kept(site.layer):
        site.layer.set_adapter([site.adapter, CARRIER])


@contextmanager
def trainability_kept(module: nn.Module) -> Iterator[None]:
    """PEFT thaws all of an adapter that it activates, also what was frozen on purpose."""
    before = [(each, each.requires_grad) for each in module.parameters()]
    yield
    for each, requires_grad in before:
        each.requires_grad_(requires_grad)


def carry(model: PeftModel, site: LoraSite, delta: LowRankDelta | torch.Tensor | None) -> None:
    """Put a layer's residual into its carrier.

    Args:
        model: The model.
        site: The layer, seen through the carrier.
        delta: Factors in float32, a dense update in the layout of the base weight, or `None` for nothing.
    """
    if isinstance(delta, torch.Tensor):
        _carry_dense(site, site.matrix(delta))
    else:
        if delta is None:
            A, B = site.A, site.B
            delta = LowRankDelta(torch.zeros_like(A[..., :1, :]), torch.zeros_like(B[..., :, :1]))
        _carry_factors(site, delta)
    config, rank = cast(LoraConfig, model.peft_config[CARRIER]), site.layer.r[CARRIER]
    key = f"^{site.name.removeprefix(PREFIX)}"
    config.rank_pattern = {**(config.rank_pattern or {}), key: rank}
    config.alpha_pattern = {**(config.alpha_pattern or {}), key: site.scaling * rank}


def carried(ledger: Ledger, offset: LowRankDelta | None, site: LoraSite) -> LowRankDelta | torch.Tensor | None:
    """What a layer's carrier holds: the ledger, and what one client has beyond it.

    Args:
        ledger: All residuals.
        offset: A client's offset, if it has one.
        site: The layer, seen through any of its adapters.
    """
    matrix, delta = _parts(ledger, offset, site)
    if delta is None or _stays_factored(matrix, delta, offset):
        return matrix if delta is None else delta
    return densified(site, delta, matrix)


def carried_rows(ledger: Ledger, offset: LowRankDelta | None, site: LoraSite, rows: slice = ALL) -> torch.Tensor:
    """Rows of what `carried` says, as those of a matrix, float64; nothing else of it is formed."""
    matrix, delta = _parts(ledger, offset, site)
    if delta is not None and _stays_factored(matrix, delta, offset):
        return site.rows(delta, rows)
    whole = site.matrix(torch.empty(site.dense_shape, device="meta"))
    into = torch.empty_like(whole[rows], device="cpu")  # as it lies in the whole: products then have the same bits
    if delta is not None:
        return fill_sum(site, delta, matrix, rows, into).double()
    return (into.zero_() if matrix is None else site.matrix(matrix)[rows]).double()


def _parts(
    ledger: Ledger, offset: LowRankDelta | None, site: LoraSite
) -> tuple[torch.Tensor | None, LowRankDelta | None]:
    """What is dense of ledger and offset, and what is factored."""
    matrix, factors = ledger.matrices.get(site.name), ledger.factors.get(site.name)
    if offset is None:
        return matrix, factors
    own = LowRankDelta(offset.A.float(), offset.B.float(), offset.scaling)
    return matrix, own if factors is None else concatenate([factors, own])


def _stays_factored(matrix: torch.Tensor | None, delta: LowRankDelta, offset: LowRankDelta | None) -> bool:
    return matrix is None and (offset is None or delta.rank < max_useful_rank(delta))


def held(site: LoraSite) -> torch.Tensor | None:
    """The dense update in a carrier, of shape `(out_features, in_features)`; `None` where it holds factors."""
    if isinstance(site.module_B, Identity):
        return site.A.detach()
    return None


def _carry_factors(site: LoraSite, delta: LowRankDelta) -> None:
    module = site.module_B
    if isinstance(module, Identity):
        site.layer.lora_B[CARRIER] = module.instead.to(site.A)  # the model may have moved in the meantime
    site.resize(delta)


def _carry_dense(site: LoraSite, matrix: torch.Tensor) -> None:
    """`I @ matrix`; an embedding, whose factors are no modules, holds the identity, small beside its matrix."""
    module = site.module_B
    if module is None:
        site.resize(LowRankDelta(matrix, torch.eye(len(matrix))))
        return
    holder = site.layer.lora_A[CARRIER]
    if not isinstance(module, Identity):
        site.layer.lora_B[CARRIER] = Identity(holder, module)
    A = holder.weight
    holder.weight = FrozenParameter(matrix.reshape(-1, *A.shape[1:]).to(A, copy=True).contiguous())
    site.layer.r[CARRIER], site.layer.scaling[CARRIER] = len(matrix), 1.0
