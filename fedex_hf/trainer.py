"""The corridor: `FederatedTrainer`, a `Trainer` whose epoch is a server round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from fedex_hf import checkpoint as ckpt
from fedex_hf.aggregators import Aggregator
from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_versions import present_updates, refuse_stale
from fedex_hf.callbacks import ClientBridge
from fedex_hf.client import ClientRunner, FitPlan
from fedex_hf.client_adapters import install_at_rank, install_client
from fedex_hf.client_states import StateFile
from fedex_hf.evaluation import Exactness, measure_exactness
from fedex_hf.hub_rounds import load_round_model
from fedex_hf.ledger import Ledger
from fedex_hf.low_rank import lost_energy
from fedex_hf.publishing import PublishingTrainer
from fedex_hf.starts import put_lora_on
from fedex_hf.trainer_utils import adopted_from
from fedex_hf.training_args import FederatedTrainingArguments
from fedex_hf.updates import ClientUpdate, GlobalUpdate, payload_bytes
from fedex_hf.validation import (
    client_datasets,
    refuse_client_ranks,
    refuse_federation_kwargs,
    refuse_kept_adapters,
    refuse_overrides,
    refuse_peft_config,
    refuse_prebuilt_optimizer,
    refuse_revision,
    refuse_scaled_biases,
    resolve_aggregator,
    sampled_per_round,
)


logger = logging.get_logger(__name__)


class FederatedTrainer(PublishingTrainer):
    """Federated LoRA fine-tuning with exact aggregation, as a `Trainer`.

    Constructor words, `train`, `evaluate`, `predict`, `save_model`, callbacks and arguments are `Trainer`'s. One
    epoch of the run is a server round: sample clients, fit each from the same global state, aggregate, install,
    measure, evaluate, save. See `docs/rooms.md`.

    Args:
        model: A `PeftModel` with one active LoRA adapter, a plain model together with `peft_config`, or a run to
            continue: its repository on the Hub (`"user/run"`), or a folder with one of its rounds. `train()` then
            goes on after that round.
        args: [`FederatedTrainingArguments`].
        train_dataset: `{client_id: dataset}`, or one dataset that is partitioned by the arguments.
        peft_config: A `LoraConfig` for a model without LoRA.
        aggregator: An [`Aggregator`], or `None` to take `args.aggregator`.
        client_trainer_cls: The `Trainer` class that runs the local fits, evaluation and prediction. Its loss,
            collation, optimizer and generation are used, so override them there and not here.
        client_trainer_kwargs: Further arguments of its constructor. `args` among them is a template, such as an
            `SFTConfig`, whose own fields are kept; all fields of `TrainingArguments` come from `args`.
        data_collator, eval_dataset, processing_class, compute_loss_func, compute_metrics, callbacks,
            optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As in `Trainer`.
        revision: With a repository as `model`: the round's tag, such as `"round-3"`; the newest one if `None`.
        optimizers, model_init: Refused; see Raises.

    Raises:
        UnsupportedModelError: If the model cannot be aggregated; the message says what to do.
        ValueError, TypeError: If the clients' data, the arguments or the optimizer cannot be used as given.

    Attributes:
        exactness: The certificate of the last round, with every layer's norms; `None` before the first round.
        federation: The `RoundState` after the last completed round.
    """

    runner_class: ClassVar[type[ClientRunner]] = ClientRunner

    def __init__(
        self,
        model: nn.Module | str = None,  # type: ignore[assignment]  # optional in `Trainer`; refused if missing
        args: FederatedTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        peft_config: PeftConfig | None = None,
        aggregator: Aggregator | str | None = None,
        client_trainer_cls: type[Trainer] = Trainer,
        client_trainer_kwargs: Mapping[str, Any] | None = None,
        revision: str | None = None,
    ) -> None:
        args = FederatedTrainingArguments(output_dir="tmp_trainer") if args is None else args
        refuse_revision(model, revision)
        refuse_overrides(type(self), args, model, model_init, client_trainer_cls)
        refuse_prebuilt_optimizer(optimizers)
        refuse_federation_kwargs(client_trainer_kwargs or {})
        clients = client_datasets(train_dataset, args)
        self.aggregator = resolve_aggregator(args, aggregator)
        refuse_kept_adapters(self.aggregator)
        refuse_client_ranks(args.parsed_client_ranks, self.aggregator, clients)
        continued, start = None, Ledger()
        if isinstance(model, str):
            self.args = args
            continued = self.find_round(model if revision is None else f"{model}@{revision}")
            model = load_round_model(continued, args.hub_token)
        if peft_config is not None:
            refuse_peft_config(model, peft_config)
            model, start = put_lora_on(model, peft_config, args.seed)
        changes_base = self.aggregator.changes_base or bool(start.layers())
        self.adapted = AdaptedModel(model, changes_base, args.residual_storage)
        if start.layers():
            self.adapted.install(start)
        refuse_scaled_biases(args.parsed_client_ranks, self.adapted)
        self.aggregator.configure_model(model)
        shared = {
            "data_collator": data_collator,
            "processing_class": processing_class,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        shared = {name: value for name, value in shared.items() if value is not None}
        super().__init__(model=model, args=args, eval_dataset=eval_dataset, callbacks=callbacks, **shared)
        self.train_dataset = clients
        trainer_kwargs = {"model": model, **shared, **(client_trainer_kwargs or {})}
        bridge = ClientBridge(self)
        self.clients = self.runner_class(client_trainer_cls, trainer_kwargs, args, clients, eval_dataset, bridge)
        self.eval_dataset = self.clients.trainer.eval_dataset  # a client's class may have prepared it
        self.data_collator = self.clients.trainer.data_collator
        self.processing_class = self.clients.trainer.processing_class
        self.federation = ckpt.RoundState(round=0, state=self.adapted.read(), ledger=self.adapted.ledger)
        self.keep_states({})  # a folder that cannot be written to is refused now
        self.exactness = None
        if continued is not None:
            self._load_from_checkpoint(continued)
        self._continued = continued
        self._new_optimizer_states: dict[str, Mapping[str, Any] | StateFile] = {}
        self._parallel = None
        if args.parallel_clients > 1:
            from fedex_hf.experimental import ParallelClients  # only where it is asked for

            self._parallel = ParallelClients(self)

    @classmethod
    def from_trainer(
        cls, trainer: Trainer, train_dataset: Any = None, args: FederatedTrainingArguments | None = None, **kwargs: Any
    ) -> FederatedTrainer:
        """Adopt a configured `Trainer` of any class.

        Args:
            trainer: Model, data, collator, metrics, callbacks and arguments are taken from it, and its class becomes
                `client_trainer_cls`.
            train_dataset: `{client_id: dataset}`, or one dataset to partition; `None` partitions the trainer's.
            args: Federated arguments; `None` builds them from the trainer's.
            kwargs: Fields of `FederatedTrainingArguments` such as `num_rounds` (only with `args=None`), and further
                arguments of this class's constructor.

        Raises:
            ValueError: If the trainer holds an optimizer, whose state would be discarded.
        """
        refuse_prebuilt_optimizer((trainer.optimizer, trainer.lr_scheduler))
        fields = FederatedTrainingArguments.__dataclass_fields__
        if args is None:
            federated = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
            args = FederatedTrainingArguments.from_training_args(trainer.args, **federated)
        adopted = adopted_from(trainer)
        if "client_trainer_kwargs" in adopted:
            adopted["client_trainer_kwargs"] |= kwargs.pop("client_trainer_kwargs", {})
        train_dataset = trainer.train_dataset if train_dataset is None else train_dataset
        return cls(args=args, train_dataset=train_dataset, **(adopted | kwargs))

    # ---- One round ----

    def run_round(self, round: int) -> dict[str, float]:
        """One server round; every step is a hook. Returns the metrics that were logged."""
        start_time = time.perf_counter()
        clients = self.sample_clients(round)
        self._call_federated("on_round_begin", round=round, clients=clients)
        return self.complete_round(round, self.collect_updates(clients, round), start_time)

    def complete_round(self, round: int, updates: Sequence[ClientUpdate], start_time: float) -> dict[str, float]:
        """What follows once a round's updates are there: aggregate, install, measure, log.

        Args:
            round: Server round, counted from 1.
            updates: What the clients sent.
            start_time: Of the round, by `time.perf_counter`, seconds.
        """
        updates = self.leave_out_stale(updates)
        before, ledger_before = self.federation.state, self.federation.ledger
        update = self.aggregate(round, updates)
        self._call_federated("on_aggregate", round=round, updates=updates, update=update)
        self.apply_update(update)
        self.exactness = measure_exactness(self.adapted, before, ledger_before, updates, self.client_weights(updates))
        self.federation.round = round
        self.state.epoch = float(round)
        metrics = self.round_metrics(updates, update, self.exactness)
        metrics["round_seconds"] = time.perf_counter() - start_time
        self.log(dict(metrics))
        self._call_federated("on_round_end", round=round, metrics=metrics)
        return metrics

    # ---- The steps of a round ----

    def sample_clients(self, round: int) -> list[str]:
        """The clients of a round: a pure function of `args.seed` and `round`, in the federation's order."""
        order = list(self.clients.order)
        wanted = sampled_per_round(self.args, len(order))
        if wanted == len(order):
            return order
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + round)
        chosen = torch.randperm(len(order), generator=generator)[:wanted].tolist()
        return [order[index] for index in sorted(chosen)]

    def collect_updates(self, clients: Sequence[str], round: int) -> list[ClientUpdate]:
        """Fit the clients, `args.parallel_clients` at a time; leave out those that fail if `client_errors="skip"`.

        Raises:
            RuntimeError: If fewer than `args.min_clients` updates arrive.
        """
        updates: list[ClientUpdate] = []
        self._new_optimizer_states = {}
        before = planned = self.state.global_step
        one_by_one = ((client_id, partial(self.fit_client, client_id, round)) for client_id in clients)
        for client_id, fit in one_by_one if self._parallel is None else self._parallel.fits(clients, round):
            planned += self.clients.num_steps(client_id)
            try:
                update = fit()
                refuse_stale(update, self.pending_version)
            except Exception as error:
                if self.args.client_errors == "raise":
                    raise
                self._new_optimizer_states.pop(client_id, None)
                logger.warning(f"Round {round}: client `{client_id}` is left out: {type(error).__name__}: {error}")
            else:
                updates.append(update)
                self._call_federated("on_client_end", update=update)
            finally:
                # Whatever happened, the model is the last good round's again, and the steps are those planned.
                self.restore_global_state()
                self.state.global_step = planned
        self.check_quorum(round, clients, updates)
        self.add_train_loss(updates, self.state.global_step - before)
        return updates

    def check_quorum(self, round: int, clients: Sequence[str], updates: Sequence[ClientUpdate]) -> None:
        """Refuse a round that too few clients took part in.

        Raises:
            RuntimeError: If there are fewer than `args.min_clients` updates.
        """
        if len(updates) < self.args.min_clients:
            raise RuntimeError(
                f"Round {round}: {len(updates)} of {len(clients)} clients sent an update, fewer than "
                f"`min_clients={self.args.min_clients}`. The model is that of round {self.federation.round}; mend the "
                "clients named above and resume, or lower `min_clients`."
            )

    def add_train_loss(self, updates: Sequence[ClientUpdate], planned_steps: int) -> None:
        """Add a round to the run's training loss, which `Trainer` divides by all steps that were planned.

        The steps of clients left out count with the mean of the others.
        """
        steps = sum(update.metrics["steps"] for update in updates)
        loss = sum(update.metrics["train_loss"] * update.metrics["steps"] for update in updates)
        self._tr_loss = self._tr_loss + loss * (planned_steps / steps)

    def fit_client(self, client_id: str, round: int) -> ClientUpdate:
        """One client's local fit from the global state; the model is left holding the client's weights.

        A client with factors of its own, or of another rank, starts from them, with an offset in the base weights
        that makes the effective weights the global ones.

        Raises:
            NonFiniteUpdateError: If the result holds NaN or Inf.
        """
        self.restore_global_state()
        base_version, rank = self.pending_version, self.args.parsed_client_ranks.get(client_id)
        self._holds_client = True
        if rank is None:
            offsets = install_client(self.adapted, self.federation, client_id)
        else:
            offsets = install_at_rank(self.adapted, self.federation, rank, self.rank_key(client_id, round))
        plan = FitPlan(
            round=round,
            num_rounds=self.args.num_rounds,
            continue_schedule=self.args.lr_schedule == "run",
            optimizer_state=self.federation.optimizer_states.get(client_id),
        )
        earlier = 0
        if self.clients.is_stream(client_id):
            earlier = sum(client_id in self.sample_clients(before) for before in range(1, round))
        with self._fit_of(client_id, round):
            output = self.clients.fit(client_id, plan, earlier)
        self.current_flos += int(self.clients.trainer.state.total_flos)
        self.state.num_input_tokens_seen += self.clients.trainer.state.num_input_tokens_seen
        trained = self.adapted.read()
        update = ClientUpdate(
            client_id=client_id,
            round=round,
            num_examples=self.clients.num_examples(client_id),
            adapters=trained.adapters,
            tensors=trained.tensors,
            metrics={"train_loss": output.training_loss, "steps": output.global_step},
            offsets=offsets,
            base_version=base_version,
        )
        update.check_finite()
        if self.args.client_optimizer_state == "keep":
            state = self.clients.optimizer_state()
            self._new_optimizer_states[client_id] = (
                state if self.state_folder is None else self.state_folder.write(state)
            )
        return update

    def rank_key(self, client_id: str, round: int) -> str:
        """What decides the rows that a client of larger rank than the global one starts with."""
        return f"{self.args.seed}/{round}/{client_id}"

    def client_weights(self, updates: Sequence[ClientUpdate]) -> list[float]:
        """Weights of the updates, not normalised: examples, or one each, by `args.client_weighting`."""
        uniform = self.args.client_weighting == "uniform"
        return [1.0 if uniform else float(update.num_examples) for update in updates]

    def leave_out_stale(self, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """The updates that were trained on the present base; with `args.client_errors="skip"` the others are left out.

        Raises:
            StaleUpdateError: If one was trained on another base, and `args.client_errors="raise"`.
        """
        return present_updates(updates, self.pending_version, skip=self.args.client_errors == "skip")

    def aggregate(self, round: int, updates: Sequence[ClientUpdate]) -> GlobalUpdate:
        """The round's global update, without stale updates; changes nothing in the model."""
        updates = self.leave_out_stale(updates)
        # Only where ranks may differ is the method told what all started from: others need not take it.
        start = {"start": self.federation.state} if self.args.parsed_client_ranks else {}
        return self.aggregator.aggregate(updates, self.client_weights(updates), **start)

    def apply_update(self, update: GlobalUpdate) -> None:
        """Install an update: adapters and other tensors are replaced, residuals are added to the ledger."""
        state = GlobalUpdate(adapters=update.adapters, tensors=update.tensors)
        self.adapted.write(state)
        ledger = self.federation.ledger.plus(
            update.residuals, self.adapted.sites, self.args.residual_rank, self.args.residual_tolerance
        )
        self.adapted.install(ledger)
        self.note_round(update.residuals, ledger)
        self.federation.state, self.federation.ledger = state, ledger
        self.federation.client_adapters = {**self.federation.client_adapters, **update.client_adapters}
        self.keep_states(self._new_optimizer_states)
        self._new_optimizer_states = {}

    def round_metrics(
        self, updates: Sequence[ClientUpdate], update: GlobalUpdate, exactness: Exactness
    ) -> dict[str, float]:
        """What a round logs. Bytes are those of one client in each direction; up the mean where ranks differ."""
        weights = self.client_weights(updates)
        loss = sum(weight * each.metrics["train_loss"] for weight, each in zip(weights, updates, strict=True))
        metrics = {
            "round": self.federation.round,
            "train_loss": loss / sum(weights),
            "num_clients": len(updates),
            "num_examples": sum(update.num_examples for update in updates),
            "aggregation_error": exactness.aggregation_error,
            "fedit_deviation": exactness.fedit_deviation,
            "bytes_up_per_client": mean(payload_bytes(each, self.aggregator.trained_factors) for each in updates),
            "bytes_down_per_client": payload_bytes(update, self.aggregator.returned_factors),
        }
        if self.args.residual_rank is not None or self.args.residual_tolerance is not None:
            metrics["ledger_lost_energy"] = self.federation.ledger.lost_energy
        if not self.aggregator.is_exact and update.residuals:
            metrics["residual_lost_energy"] = lost_energy(update.residuals.values())
        if self.args.log_layer_exactness:
            for layer, norms in exactness.layers.items():
                metrics[f"aggregation_error/{layer}"] = norms.aggregation_error
                metrics[f"fedit_deviation/{layer}"] = norms.fedit_deviation
        return metrics
