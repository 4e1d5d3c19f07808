"""Several clients in one pass: the base is frozen and shared, so their batches go through it together.

Each client keeps all that is its own: LoRA factors, heads, batches, loss, optimizer, schedule, clipping. So the result
is that of one after another, up to the rounding of sums in another order.

    client 0: batch --.                                          .-- head, loss --.               .-- clip, step
    client 1: batch --+-- body: base(x) + s (x A_i^T) B_i^T -----+-- head, loss --+-- backward ---+-- clip, step
    client 2: batch --'   base once, factors in batched products '-- head, loss --'   of the sum  '-- clip, step

What is on the sides is `FederatedTrainer.fit_client` itself, once per client, each with a `Trainer` of its own. They
run in turns (`turns.py`) and stop at two places: where the model calls its body, and where the loss is propagated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedex_hf.callbacks import ClientBridge
from fedex_hf.experimental.batches import UnlikeCallsError
from fedex_hf.experimental.global_state import GlobalState
from fedex_hf.experimental.refusals import body_of, refuse_parallel_clients
from fedex_hf.experimental.shared_pass import SharedPass
from fedex_hf.experimental.turns import Ended, Turns
from fedex_hf.updates import ClientUpdate


if TYPE_CHECKING:
    from fedex_hf.trainer import FederatedTrainer


@dataclass(frozen=True)
class _BodyCall:
    """A client's model calls its body with these arguments; to be answered with the body's output."""

    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Backward:
    """A client's loss, a scalar, is to be propagated; `run` does it for any scalar."""

    loss: torch.Tensor
    run: Callable[[torch.Tensor], None]


@dataclass
class _Client:
    """A client that is being fitted.

    Args:
        trainer: The `Trainer` of its fit.
        parameters: Name in the model -> its own parameter.
        turns: Its fit.
        globals: Its share of what is global, while it waits.
        waits_for: The question where it stands, or how it ended.
    """

    trainer: Any
    parameters: dict[str, nn.Parameter]
    turns: Turns
    globals: GlobalState
    waits_for: Any = None

    @property
    def error(self) -> BaseException | None:
        """What its fit raised."""
        return self.waits_for.error if isinstance(self.waits_for, Ended) else None


class ParallelClients:
    """Fits several clients of a federation at once.

    Args:
        federation: The trainer whose clients they are; `args.parallel_clients` of them go through the base together.

    Raises:
        UnsupportedModelError, ValueError: If the result could not be that of one after another; the message says why.
    """

    def __init__(self, federation: FederatedTrainer) -> None:
        refuse_parallel_clients(federation)
        self.federation = federation
        model, sites = federation.adapted.model, federation.adapted.sites.values()
        factors = {id(factor) for site in sites for factor in site.parameters}
        self._places = _places_of(model, lambda each: each.requires_grad or id(each) in factors)
        self._body = body_of(model)
        inside = {*self._body.modules()}
        self._pass = SharedPass(
            self._body, [site for site in sites if site.layer in inside], _padding_token(self._body), self._install
        )
        self._trainers: list[Any] = []
        self._current: _Client | None = None
        self._between_passes = False  # after the forward pass, before the backward pass

    def fits(self, clients: Sequence[str], round: int) -> Iterator[tuple[str, Callable[[], ClientUpdate]]]:
        """Each client with a function that returns its update, or raises what its fit raised.

        A group of clients is fitted when the first of them is asked for.
        """
        size = self.federation.args.parallel_clients
        for start in range(0, len(clients), size):
            group = clients[start : start + size]
            for client_id, ended in zip(group, self.fit_group(group, round), strict=True):
                yield client_id, partial(self._result, ended)

    def fit_group(self, group: Sequence[str], round: int) -> list[Ended]:
        """Fit clients together, each from the global state.

        Args:
            group: The clients.
            round: Server round, counted from 1.

        Returns:
            How each fit ended: a `ClientUpdate`, or an error. The model is left holding the global state.

        Raises:
            Exception: What a client's fit raised, with `args.client_errors="raise"`.
            UnsupportedModelError, ValueError: If it turns out that the clients cannot share a pass.
        """
        federation = self.federation
        before, own, trainer = GlobalState.of(federation), self._parameters(), federation.clients.trainer
        steps_before = federation.state.global_step
        clients = [self._client(place, client_id, round) for place, client_id in enumerate(group)]
        try:
            with self._interrupted_body():
                for client in clients:
                    self._go_on(client)
                while any(not isinstance(client.waits_for, Ended) for client in clients):
                    self._pass_once([client for client in clients if not isinstance(client.waits_for, Ended)])
        finally:
            for client in clients:
                client.turns.cancel()
            self._install(own)
            self._pass.forget()
            self._between_passes = False
            federation.clients.trainer = trainer
            federation.state.global_step = steps_before  # each update adds its own, as after a fit of its own
            before.restore(federation)
            federation.restore_global_state()
        return [client.waits_for for client in clients if isinstance(client.waits_for, Ended)]

    def _result(self, ended: Ended) -> ClientUpdate:
        if ended.error is not None:
            raise ended.error
        self.federation.state.global_step += ended.value.metrics["steps"]
        return ended.value

    # ---- Passes ----

    def _pass_once(self, clients: Sequence[_Client]) -> None:
        """Bring all clients from one question to the next."""
        calls = [client for client in clients if isinstance(client.waits_for, _BodyCall)]
        if len(calls) not in (0, len(clients)) or (calls and self._between_passes):
            raise ValueError(
                "A training step of the clients calls the model more than once, or not in every step. Allowed with "
                "`parallel_clients`: one call and one loss. Set `parallel_clients=1`."
            )
        if calls:
            self._forward(calls)
        else:
            self._backward(clients)

    def _forward(self, clients: Sequence[_Client]) -> None:
        calls = [client.waits_for.arguments for client in clients]
        try:
            outputs = self._pass.run(calls, [client.parameters for client in clients])
        except UnlikeCallsError:
            raise
        except Exception:
            if not self._end_those_at_fault(clients):
                raise
            return  # the others have not moved and are asked again
        self._between_passes = True
        for client, output in zip(clients, outputs, strict=True):
            self._go_on(client, output)

    def _end_those_at_fault(self, clients: Sequence[_Client]) -> bool:
        """Raise in those clients whose call fails by itself; returns whether there are any."""
        at_fault = []
        for client in clients:
            self._install(client.parameters)
            try:
                with torch.no_grad():
                    self._pass.forward(**client.waits_for.arguments)
            except Exception as error:
                at_fault.append((client, error))
        for client, raised in at_fault:
            self._go_on(client, raised)
        return bool(at_fault)

    def _backward(self, clients: Sequence[_Client]) -> None:
        self._pass.backward([client.waits_for.loss for client in clients], clients[0].waits_for.run)
        self._between_passes = False
        for client in clients:
            self._go_on(client)

    # ---- Turns ----

    def _client(self, place: int, client_id: str, round: int) -> _Client:
        if place == len(self._trainers):
            self._trainers.append(self._new_trainer())
        parameters = {
            name: nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            for name, parameter in self._parameters().items()
        }
        turns = Turns(partial(self.federation.fit_client, client_id, round))
        return _Client(self._trainers[place], parameters, turns, GlobalState.of(self.federation))

    def _new_trainer(self) -> Any:
        trainer = self.federation.clients.further_trainer(ClientBridge(self.federation))
        propagate = trainer.accelerator.backward

        def backward(loss: torch.Tensor, **kwargs: Any) -> None:
            self._ask(_Backward(loss, partial(propagate, **kwargs)))

        trainer.accelerator.backward = backward
        return trainer

    def _go_on(self, client: _Client, answer: Any = None) -> None:
        """Let a client's fit run to its next question, with all that is its own in place."""
        self._install(client.parameters)
        self.federation.clients.trainer = client.trainer
        for name in ("optimizer", "lr_scheduler", "train_dataloader"):
            setattr(self.federation.callback_handler, name, getattr(client.trainer.callback_handler, name))
        client.globals.restore(self.federation)
        self._current = client
        client.waits_for = client.turns.go_on(answer)
        self._current = None
        client.globals = GlobalState.of(self.federation)
        if client.error is not None and (
            self.federation.args.client_errors == "raise" or not isinstance(client.error, Exception)
        ):
            raise client.error

    def _ask(self, question: _BodyCall | _Backward) -> Any:
        assert self._current is not None
        return self._current.turns.ask(question)

    @contextmanager
    def _interrupted_body(self) -> Iterator[None]:
        """A client's call of the body becomes a question; without gradients it stays a call."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return self._pass.forward(*args, **kwargs)
            return self._ask(_BodyCall(self._pass.named(args, kwargs)))

        held = vars(self._body).get("forward")
        self._body.forward = forward
        try:
            yield
        finally:
            del self._body.forward
            if held is not None:
                self._body.forward = held

    # ---- Parameters ----

    def _parameters(self) -> dict[str, nn.Parameter]:
        """What is in the model now, of all that each client has of its own."""
        return {name: getattr(*places[0]) for name, places in self._places.items()}

    def _install(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, places in self._places.items():
            for module, attribute in places:
                module._parameters[attribute] = parameters[name]
        adapted = self.federation.adapted
        adapted.tensors = {name: parameters[name] for name in adapted.tensors}


def _places_of(model: nn.Module, chosen: Callable[[nn.Parameter], bool]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of a parameter -> the modules that hold it, and under which attribute; more than one if it is tied."""
    first: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if chosen(parameter):
            module, _, attribute = name.rpartition(".")
            known = first.setdefault(id(parameter), name)
            places.setdefault(known, []).append((model.get_submodule(module), attribute))
    return places


def _padding_token(body: nn.Module) -> int:
    token = getattr(getattr(body, "config", None), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0
