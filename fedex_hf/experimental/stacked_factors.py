"""LoRA factors of several clients in one tensor, used in one batched product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fedex_hf.lora_site import LoraSite


class ClientLinear(nn.Module):
    """A linear map without bias of which every client has its own.

    Args:
        weight: Tensor of shape `(clients, out_features, in_features)`.
    """

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Client i maps the i-th of `clients` equal shares of the rows.

        Args:
            x: Tensor of shape `(clients * rows, ..., in_features)`.

        Returns:
            Tensor of shape `(clients * rows, ..., out_features)`.
        """
        shares = x.reshape(len(self.weight), -1, x.shape[-1])
        return torch.bmm(shares, self.weight.mT).reshape(*x.shape[:-1], self.weight.shape[1])


class StackedFactors:
    """The factors of some clients, stacked once: the clients' own parameters become views into the stack.

    So an optimizer that changes a client's parameter in place changes the stack, and nothing is copied between steps.

    Args:
        sites: The adapted layers, all of them PEFT's `Linear`.
        clients: One dictionary per client: name of a parameter in the model -> the client's own.
    """

    def __init__(self, sites: Iterable[LoraSite], clients: Sequence[Mapping[str, nn.Parameter]]) -> None:
        self.clients = list(clients)
        self._own: dict[str, list[nn.Parameter]] = {}
        self._stacks: dict[str, torch.Tensor] = {}
        self._modules: list[tuple[nn.ModuleDict, str, ClientLinear]] = []
        for site in sites:
            for factor in ("lora_A", "lora_B"):
                name = f"{site.name}.{factor}.{site.adapter}.weight"
                stack = self._stack(name)
                self._modules.append((getattr(site.layer, factor), site.adapter, ClientLinear(stack)))

    def _stack(self, name: str) -> torch.Tensor:
        own = [parameters[name] for parameters in self.clients]
        stack = torch.stack([each.detach() for each in own])
        for each, view in zip(own, stack.unbind(), strict=True):
            each.data = view
        self._own[name] = own
        self._stacks[name] = stack.requires_grad_(own[0].requires_grad)
        return stack

    @contextmanager
    def installed(self) -> Iterator[None]:
        """PEFT's layers use the stacks instead of one client's factors; everything else in them stays PEFT's own."""
        before = [(modules, adapter, modules[adapter]) for modules, adapter, _ in self._modules]
        for modules, adapter, stacked in self._modules:
            modules[adapter] = stacked
        try:
            yield
        finally:
            for modules, adapter, single in before:
                modules[adapter] = single

    def gradients(self, client: int) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The trained factors of one client, with their gradients of the last backward pass."""
        return [
            (self._own[name][client], torch.zeros_like(stack[client]) if stack.grad is None else stack.grad[client])
            for name, stack in self._stacks.items()
            if stack.requires_grad
        ]

    def hand_out_gradients(self) -> None:
        """Add the stacks' gradients to the clients' parameters, and forget them."""
        for name, stack in self._stacks.items():
            if stack.grad is None:
                continue
            for own, gradient in zip(self._own[name], stack.grad.unbind(), strict=True):
                own.grad = gradient if own.grad is None else own.grad + gradient
            stack.grad = None
