"""Room 5: the LoRA state of a `PeftModel`, and the residual in its base weights or beside them.

What the model holds of the residuals is a pure function of the ledger: `W = W0 + ledger`, never a sum of rounded
steps, or the ledger itself in the carrying adapter. So installing twice changes nothing, going back to an earlier
round is exact, and a checkpoint needs the ledger only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from fedex_hf.carrier import CARRIER, activate, attach, carried, carried_rows, carry, content, held, is_active
from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.ledger import Ledger
from fedex_hf.lora_site import ALL, sites_of, snapshot
from fedex_hf.model_checks import (
    check_no_running_statistics,
    check_not_shared,
    check_peft_model,
    decide_storage,
    keep_four_bit_weights,
    trained_adapter,
)
from fedex_hf.updates import GlobalUpdate, LowRankDelta


class AdaptedModel:
    """Reads and writes what the clients train in a `PeftModel`, and installs the ledger.

    Args:
        model: A `PeftModel` with one active LoRA adapter. If it comes with a carrier, as the model of an earlier
            federation does, what that holds is the ledger to begin with.
        changes_base: Whether residuals will be installed.
        storage: Where: `"base"` adds them to the base weights, which must be float32 and untied; `"adapter"` carries
            them in a second, frozen adapter and leaves the base alone; `"auto"` takes the base where it can.

    Attributes:
        storage: `"base"` or `"adapter"`, decided.
        ledger: What is installed.

    Raises:
        UnsupportedModelError: If the model is not supported; see `docs/limits.md` for the list and the reasons.
    """

    def __init__(self, model: nn.Module, changes_base: bool, storage: str = "auto") -> None:
        self.model = check_peft_model(model)
        self.adapter = trained_adapter(self.model)
        keep_four_bit_weights(self.model)
        self.sites = sites_of(self.model, self.adapter)
        if not self.sites:
            raise UnsupportedModelError(
                f"The adapter `{self.adapter}` adapts no layer of `{type(self.model.get_base_model()).__name__}`. "
                "Check `target_modules` of your `LoraConfig`."
            )
        if not any(each.requires_grad for site in self.sites.values() for each in site.parameters):
            raise UnsupportedModelError(
                f"The adapter `{self.adapter}` is frozen, so there is nothing to train. Load it with "
                "`PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        check_no_running_statistics(self.model)
        check_not_shared(self.sites)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise UnsupportedModelError(f"`{name}` holds NaN or Inf before any training. Load or build it anew.")
        carries = content(self.model, self.sites)
        if carries and storage == "base":
            raise UnsupportedModelError(
                f'The model carries residuals in its adapter `{CARRIER}`. Use `residual_storage="auto"` or "adapter", '
                "or fold them into the base with `model.merge_and_unload()` and start anew."
            )
        asked = "adapter" if carries else storage
        self.storage = decide_storage(self.model, self.sites, asked) if changes_base or carries else "base"
        factors = {id(factor) for site in self.sites.values() for factor in site.parameters}
        self.tensors = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in factors
        }
        self.originals = {name: snapshot(site.base_weight) for name, site in self.sites.items() if site.layout.drifts}
        self.ledger = Ledger()
        self.holds_offsets = False
        self._own_rank: dict[str, tuple[tuple[nn.Parameter, nn.Parameter], float]] = {}  # while a client has another
        self._carriers = attach(self.model, self.sites) if self.storage == "adapter" else {}
        if carries:
            self.install(Ledger().plus(carries, self.sites))

    def read(self) -> GlobalUpdate:
        """A copy of everything the clients train, on the CPU.

        Raises:
            RuntimeError: If something has switched a carrier off meanwhile: what was trained since belongs to another
                model.
        """
        for name, site in self.sites.items():
            if self.storage == "adapter" and not is_active(site):
                raise RuntimeError(
                    f"The adapter `{CARRIER}`, which carries the residuals, is switched off in layer `{name}`: "
                    "something called `set_adapter` or `add_adapter`. Call "
                    f"`layer.set_adapter(['{self.adapter}', '{CARRIER}'])` on every adapted layer afterwards."
                )
        return GlobalUpdate(
            adapters={name: site.read() for name, site in self.sites.items()},
            tensors={name: snapshot(parameter) for name, parameter in self.tensors.items()},
        )

    @torch.no_grad()
    def write(self, state: GlobalUpdate) -> None:
        """Copy a state into the model, at the model's own ranks; base weights and carriers are not touched."""
        for name, (factors, scaling) in self._own_rank.items():
            self.sites[name].exchange(*factors, scaling)
        self._own_rank = {}
        self._write(state)

    @torch.no_grad()
    def write_client(self, state: GlobalUpdate) -> None:
        """Copy a client's state into the model, whatever its ranks; the next `write` brings the model's own back."""
        for name, site in self.sites.items():
            own = state.adapters[name]
            if own.rank != site.A.shape[-2]:
                self._own_rank.setdefault(name, (site.parameters, site.scaling))
                site.resize(own)
        self._write(state)

    def _write(self, state: GlobalUpdate) -> None:
        for name, site in self.sites.items():
            site.write(state.adapters[name])
        for name, parameter in self.tensors.items():
            parameter.copy_(state.tensors[name])

    @torch.no_grad()
    def install(self, ledger: Ledger, offsets: Mapping[str, LowRankDelta] | None = None) -> None:
        """Make the model hold a ledger.

        In the base: every weight becomes `original + ledger`, rounded to its dtype; the originals are kept from the
        first call on, one copy of the adapted base weights. In the carrier: the ledger's own factors or matrices.

        Args:
            ledger: All residuals.
            offsets: Layer name -> what one client's base holds beyond them, until the next call.
        """
        offsets = offsets or {}
        self.holds_offsets |= bool(offsets)  # also if it ends half-way
        if self.storage == "adapter":
            for name, carrier in self._carriers.items():
                carry(self.model, carrier, carried(ledger, offsets.get(name), self.sites[name]))
                if not is_active(self.sites[name]):
                    activate(self.sites[name])
        else:
            for name in ledger.layers() | self.originals.keys() | offsets.keys():
                weight = self.sites[name].base_weight
                if name not in self.originals:
                    self.originals[name] = snapshot(weight)
                into = weight.data if weight.device.type == "cpu" and weight.is_contiguous() else None
                new = self.base_weight_at(name, ledger, offsets.get(name), into)
                if new is not into:
                    weight.copy_(new)
        self.holds_offsets = bool(offsets)
        self.ledger = ledger

    @property
    def needs_restoring(self) -> bool:
        """Whether the base may hold more than the ledger: a client's offsets, or what PEFT's folding left behind."""
        return self.holds_offsets or any(site.layout.drifts for site in self.sites.values())

    def original(self, name: str) -> torch.Tensor:
        """A layer's base weight before any residual, in its own dtype and layout, on the CPU."""
        original = self.originals.get(name)
        return self.sites[name].base_weight.detach().cpu() if original is None else original

    def base_weight_at(
        self, name: str, ledger: Ledger, offset: LowRankDelta | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A layer's base weight under a ledger and a client's offset, in its own dtype and layout, on the CPU.

        With the storage `"adapter"`, and where nothing is to be added, that is the original one, and `out` is left
        alone.

        Args:
            name: The layer.
            ledger: All residuals.
            offset: A client's offset.
            out: Contiguous tensor to write into; must not be the original.
        """
        original, site = self.original(name), self.sites[name]
        if self.storage == "adapter" or (offset is None and name not in ledger.layers()):
            return original
        rank = ledger.factors[name].rank if name in ledger.factors else 0
        return site.assembled(partial(self._fill, name, ledger, offset), original.dtype, out, rank)

    def _fill(
        self, name: str, ledger: Ledger, offset: LowRankDelta | None, rows: slice, into: torch.Tensor
    ) -> torch.Tensor:
        """Write rows of `base_weight_at` into those of a matrix."""
        site = self.sites[name]
        into.copy_(site.matrix(self.original(name))[..., rows, :])
        if name in ledger.matrices:
            into.add_(site.matrix(ledger.matrices[name])[..., rows, :])
        for delta in (ledger.factors.get(name), offset):
            if delta is not None:
                site.add_to(into, delta, rows)
        return into

    def installed(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """What a layer holds beside the trained adapter and any untouched base, read from the live model.

        Returns:
            Rows of a matrix of shape `(out_features, in_features)`, or of one per expert, float64, on the CPU: of the
            base weight, or of what the carrier adds to it, which is nothing if it is switched off.
        """
        site = self.sites[name]
        if self.storage == "base":
            return site.matrix(site.base_weight.detach())[..., rows, :].cpu().double()
        if not is_active(site):
            return self.installed_at(name, Ledger(), rows=rows)
        dense = held(self._carriers[name])
        if dense is not None:
            return dense[rows].cpu().double()
        carrier = self._carriers[name]
        return site.rows(LowRankDelta(carrier.A.detach(), carrier.B.detach(), carrier.scaling), rows).cpu()

    def installed_at(
        self, name: str, ledger: Ledger, offset: LowRankDelta | None = None, rows: slice = ALL
    ) -> torch.Tensor:
        """What `installed` would return under another ledger and a client's offset."""
        site = self.sites[name]
        if self.storage == "base":
            original = site.matrix(self.original(name))[..., rows, :]
            return self._fill(name, ledger, offset, rows, torch.empty_like(original)).double()
        return carried_rows(ledger, offset, site, rows)

    def precision(self, name: str) -> float:
        """Relative precision of what holds a layer's residual, no unit."""
        return torch.finfo(torch.float32 if self.storage == "adapter" else self.sites[name].base_weight.dtype).eps
