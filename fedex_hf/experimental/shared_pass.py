"""One pass of the frozen body for the batches of several clients, forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedex_hf.experimental.batches import Joined, join, split, tensors_in
from fedex_hf.experimental.stacked_factors import StackedFactors
from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.lora_site import LoraSite


class SharedPass:
    """Passes through the body of a model in which every client has its own LoRA factors.

    The first pass of each kind (with and without tokens filled up) is also made for every client by itself, and both
    have to give the same outputs and gradients: a body whose examples influence each other would mix the clients up.

    Args:
        body: The part of the model that is shared, such as `model.roberta`.
        sites: The adapted layers in it.
        padding_token: What `input_ids` are filled up with.
        install: Puts one client's parameters, by their names, into the model.
    """

    def __init__(
        self,
        body: nn.Module,
        sites: Sequence[LoraSite],
        padding_token: int,
        install: Callable[[Mapping[str, nn.Parameter]], None],
    ) -> None:
        self.body = body
        self.sites = sites
        self.padding_token = padding_token
        self.install = install
        self.forward: Callable[..., Any] = body.forward
        self._names = [
            name
            for name, parameter in inspect.signature(body.forward).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        self._factors: StackedFactors | None = None
        self._checked: set[bool] = set()
        self._to_check: tuple[Joined, list[Mapping[str, Any]], list[Any]] | None = None

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the body, by name."""
        return dict(zip(self._names, args)) | dict(kwargs)

    def run(self, calls: Sequence[Mapping[str, Any]], clients: Sequence[Mapping[str, nn.Parameter]]) -> list[Any]:
        """The forward pass.

        Args:
            calls: Each client's arguments of the body, by name.
            clients: Each client's parameters, by their names in the model.

        Returns:
            Each client's output of the body, as if it had called it alone.

        Raises:
            UnlikeCallsError: If the calls do not go together.
        """
        joined = join(calls, self.padding_token)
        if self._factors is None or [*map(id, self._factors.clients)] != [*map(id, clients)]:
            self._factors = StackedFactors(self.sites, clients)
        with self._factors.installed():
            output = self.forward(**joined.arguments)
        outputs = split(output, joined)
        if self._kind(joined) not in self._checked:
            self._to_check = joined, [*calls], outputs
            for tensor in tensors_in(outputs):
                if tensor.requires_grad:
                    tensor.retain_grad()
        return outputs

    def backward(self, losses: Sequence[torch.Tensor], run_backward: Callable[[torch.Tensor], None]) -> None:
        """The backward pass: the gradient of a sum of losses is, for each client, that of its own loss.

        Args:
            losses: The clients' own losses, scalars.
            run_backward: Propagates the gradient of a scalar.

        Raises:
            UnsupportedModelError: If the gradients are not those of the clients one by one.
        """
        run_backward(torch.stack([*losses]).sum())
        if self._factors is not None:
            if self._to_check is not None:
                self._check(self._factors, *self._to_check)
                self._to_check = None
            self._factors.hand_out_gradients()

    def forget(self) -> None:
        """Let go of the clients' factors, which are no longer stacked in the next pass."""
        self._factors = self._to_check = None

    def _kind(self, joined: Joined) -> bool:
        return len(set(joined.lengths)) > 1

    def _check(
        self, factors: StackedFactors, joined: Joined, calls: list[Mapping[str, Any]], outputs: list[Any]
    ) -> None:
        for place, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            self.install(factors.clients[place])
            own = tensors_in(self.forward(**call))
            ours = tensors_in(output)
            used = [index for index, tensor in enumerate(ours) if tensor.grad is not None]
            if not used:  # the client failed before its loss
                continue
            parameters, gradients = zip(*factors.gradients(place), strict=True)
            alone = torch.autograd.grad(
                [own[index] for index in used],
                parameters,
                [ours[index].grad for index in used],
                allow_unused=True,
                materialize_grads=True,
            )
            _refuse_different(ours, own)
            _refuse_different(gradients, alone)
        self._checked.add(self._kind(joined))


def _refuse_different(ours: Sequence[torch.Tensor], alone: Sequence[torch.Tensor]) -> None:
    """Compare what a client got with what it gets alone."""
    norms = torch.stack([each.detach().norm() for each in alone]).double()
    if not bool(torch.isfinite(norms).all()):
        return  # its update will be refused
    apart = torch.stack([(each - own).detach().norm() for each, own in zip(ours, alone, strict=True)]).double()
    off = float((apart / (norms + 1e-2 * norms.norm() + 1e-30)).max())
    # Rounding stays far below; a pass that mixes clients up is off by the order of the values themselves.
    allowed = max(1e-2, torch.finfo(alone[0].dtype).eps ** 0.5)
    if not off <= allowed:
        raise UnsupportedModelError(
            f"In one pass with others a client gets values that are {off:.0e} off those it gets alone (allowed: "
            f"{allowed:.0e}, for rounding). Examples influence each other in this model, or tokens that the attention "
            "mask hides do. Set `parallel_clients=1`."
        )
