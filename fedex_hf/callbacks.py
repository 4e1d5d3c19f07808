"""Events of a federated run, and the bridge from a client's `Trainer` to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fedex_hf.updates import ClientUpdate, GlobalUpdate


if TYPE_CHECKING:
    from fedex_hf.round_trainer import RoundTrainer


class FederatedCallback(TrainerCallback):
    """A `TrainerCallback` with the events of a federation.

    The ordinary events keep their meaning, with an epoch being a round: `on_epoch_begin` and `on_epoch_end` enclose a
    round, `on_step_end` fires for every optimizer step of every client. Each event below also gets the trainer as
    `kwargs["trainer"]`. Ordinary callbacks never see these events.
    """

    def on_round_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        round: int,
        clients: list[str],
        **kwargs: Any,
    ) -> None:
        """A round starts; `clients` were sampled for it. Rounds count from 1."""

    def on_client_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        update: ClientUpdate,
        **kwargs: Any,
    ) -> None:
        """A client's local fit ended and its update was accepted."""

    def on_aggregate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        round: int,
        updates: Sequence[ClientUpdate],
        update: GlobalUpdate,
        **kwargs: Any,
    ) -> None:
        """The round's updates were aggregated; the model still holds the old state."""

    def on_round_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        round: int,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """The new state is installed and the round's metrics are logged; evaluation and saving come next."""


class ClientBridge(TrainerCallback):
    """The one callback of a client's `Trainer`: it turns the events of a fit into events of the federation."""

    def __init__(self, federation: RoundTrainer) -> None:
        self.federation = federation

    def on_train_begin(self, args, state, control, **kwargs):
        for name in ("optimizer", "lr_scheduler", "train_dataloader"):
            setattr(self.federation.callback_handler, name, kwargs.get(name))

    def on_step_begin(self, args, state, control, **kwargs):
        self._forward("on_step_begin")

    def on_substep_end(self, args, state, control, **kwargs):
        self._forward("on_substep_end")

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.federation.learning_rate = optimizer.param_groups[0]["lr"]
        self._forward("on_pre_optimizer_step")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._forward("on_optimizer_step")

    def on_step_end(self, args, state, control, **kwargs):
        # The client's trainer knows the loss since its last log; it logs when the federation's flow says so.
        control.should_log = self.federation.end_client_step()
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "train_loss" not in logs:  # the end of one fit is not the end of training
            self.federation.log_client(logs)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.federation.callback_handler.eval_dataloader = kwargs.get("eval_dataloader")
        self._forward("on_prediction_step")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.federation.tell_evaluation(metrics)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._forward("on_predict", metrics)

    def _forward(self, event: str, *values: Any) -> None:
        federation = self.federation
        call = getattr(federation.callback_handler, event)
        federation.control = call(federation.args, federation.state, federation.control, *values)
