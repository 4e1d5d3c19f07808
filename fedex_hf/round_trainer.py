"""The run around the rounds: a `Trainer` whose epoch is a round, with its state, logs and evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput, TrainOutput
from transformers.utils import logging

from fedex_hf import checkpoint as ckpt
from fedex_hf.callbacks import FederatedCallback
from fedex_hf.round_checkpoints import CheckpointedTrainer
from fedex_hf.trainer_utils import frozen_garbage_collector, was_stopped_early


logger = logging.get_logger(__name__)


class RoundTrainer(CheckpointedTrainer):
    """What `FederatedTrainer` shares with any run in rounds; subclasses bring `run_round` and `sample_clients`."""

    # The hooks can be called without `train()`: these hold outside a run.
    learning_rate: float = 0.0
    _fitting: dict[str, Any] | None = None
    _evaluate_after_round: bool = False
    _save_after_round: bool = False
    _continued: str | None = None  # the round that the constructor was given as `model`
    _round_began_at: int = 0
    _steps_of_round: Mapping[int, int] = {}
    _tr_loss: torch.Tensor = torch.tensor(0.0)

    def run_round(self, round: int) -> dict[str, float]:
        raise NotImplementedError

    def sample_clients(self, round: int) -> list[str]:
        raise NotImplementedError

    def begin_rounds(self, resume_from_checkpoint: str | None) -> None:
        """Before the first round of this call of `train()`, with state and model as they will start. A hook."""

    def end_round(self, round: int) -> None:
        """After a round was evaluated and saved. A hook."""

    # ---- The run ----

    def train(  # type: ignore[override]  # `trial` and `ignore_keys_for_eval` are passed on
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Run all rounds; see `Trainer.train`.

        Args:
            resume_from_checkpoint: A `checkpoint-N` folder, a published round (`"user/run@round-3"`), or `True` for
                the newest finished checkpoint of `output_dir`. With `True` and none written yet, the run starts at
                round 1, so that the same command line works whenever the process died.
            kwargs: As in `Trainer.train`.

        Returns:
            As `Trainer.train`; `metrics` also hold the certificate of the run, over all rounds so far:
            `max_aggregation_error` and `mean_fedit_deviation`.

        Raises:
            ValueError: If `output_dir` holds another run and this one is not to continue it.
            CheckpointMismatchError: If the checkpoint is of another model, rank, aggregator or set of clients.
        """
        output_dir = str(self.args.output_dir)
        found = ckpt.checkpoints_in(output_dir)
        ckpt.remove_unfinished(output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(found[-1]) if found else self._continued
            if resume_from_checkpoint is None:
                logger.warning(f"No checkpoint in `{output_dir}` yet: starting at round 1.")
        elif resume_from_checkpoint:
            resume_from_checkpoint = self.find_round(str(resume_from_checkpoint))
        elif found:
            raise ValueError(
                f"`output_dir={output_dir!r}` holds another run ({len(found)} checkpoints up to "
                f"`{found[-1].name}`). Continue it with `train(resume_from_checkpoint=True)`, choose another "
                "`output_dir`, or delete the checkpoints."
            )
        else:
            resume_from_checkpoint = self._continued
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        start_time = time.time()
        with frozen_garbage_collector():
            stopped = self._begin_run(resume_from_checkpoint)
            self.begin_rounds(resume_from_checkpoint)
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            if self.args.eval_on_start:
                self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
            first = self.args.num_rounds + 1 if stopped else self.federation.round + 1
            for round in range(first, self.args.num_rounds + 1):
                self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
                self._round_began_at = self.state.global_step
                self.run_round(round)
                self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
                self._evaluate_and_save(round, trial, ignore_keys_for_eval, start_time)
                self.end_round(round)
                if self.control.should_training_stop:
                    break
            output = self._finish_run(trial, start_time)
        return TrainOutput(output.global_step, output.training_loss, output.metrics | self._certificate())

    def _begin_run(self, resume_from_checkpoint: str | None) -> bool:
        """Set the run's state up; returns whether a resumed run had already been stopped early."""
        if self._holds_client:
            self.restore_global_state()
        if resume_from_checkpoint is None:
            self.federation = ckpt.RoundState(0, self.adapted.read(), self.federation.ledger)
        self._steps_of_round = self.planned_steps(first=1)
        max_steps = sum(self._steps_of_round.values())
        self._init_training_state(max_steps, max_steps, self.args.num_rounds, resume_from_checkpoint, None)
        self._find_best_checkpoint()
        stopped = resume_from_checkpoint is not None and was_stopped_early(Path(resume_from_checkpoint))
        self._load_rng_state(resume_from_checkpoint)
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        self._total_loss_scalar = 0.0
        self.learning_rate = self.args.learning_rate
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._evaluate_after_round = self._save_after_round = False
        logger.info(
            f"***** Running federated training: {self.args.num_rounds} rounds, {len(self.clients.datasets)} clients, "
            f"{max_steps:,} optimizer steps, from round {self.federation.round + 1} *****"
        )
        return stopped

    def _evaluate_and_save(self, round: int, trial: Any, ignore_keys: list[str] | None, start_time: float) -> None:
        """What `Trainer` does at the end of an epoch; a round whose evaluation fails is saved all the same."""
        self.control.should_evaluate |= self._evaluate_after_round
        self.control.should_save |= self._save_after_round
        self._evaluate_after_round = self._save_after_round = False
        should_save, model = self.control.should_save, self.adapted.model
        try:
            self._maybe_log_save_evaluate(
                self._tr_loss, None, model, trial, round, ignore_keys, start_time, self.learning_rate
            )
        except Exception:
            if should_save and not self._checkpoint_path().exists():
                self._save_checkpoint(model, trial)
            raise

    def _finish_run(self, trial: Any, start_time: float) -> TrainOutput:
        """End the run as `Trainer` does, but for the surplus checkpoint under `save_total_limit=1`.

        `Trainer` deletes that file by file under its own name, so that a process killed meanwhile would leave half of
        it where a whole one is looked for.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = self._finalize_training(trial, self._num_train_samples(), start_time)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if limit == 1 and self.args.should_save and best is not None:
            ckpt.rotate(Path(str(self.args.output_dir)), limit, keep=best, keep_newest=False)
        return output

    def _num_train_samples(self) -> float:
        return sum(
            self.clients.num_samples(client_id)
            for round in self._steps_of_round
            for client_id in self.sample_clients(round)
        )

    def _certificate(self) -> dict[str, float]:
        rounds = [entry for entry in self.state.log_history if "aggregation_error" in entry]
        if not rounds:
            return {}
        return {
            "max_aggregation_error": max(entry["aggregation_error"] for entry in rounds),
            "mean_fedit_deviation": sum(entry["fedit_deviation"] for entry in rounds) / len(rounds),
        }

    # ---- Steps of clients, told by `ClientBridge` ----

    @contextmanager
    def _fit_of(self, client_id: str, round: int) -> Iterator[None]:
        """Names the client in the progress bar and in the logs of the steps inside.

        A fit that is no part of a run, as on a machine of its own, is to callbacks a training of its own.
        """
        self._fitting = {"client_id": client_id, "round": round}
        alone = not self.is_in_train
        if alone:
            self.state.max_steps = self.state.global_step + self.clients.num_steps(client_id)
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(f"round {round}/{self.args.num_rounds} {client_id}")
        try:
            yield
        finally:
            self._fitting = None
            if alone:
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
                self.control.should_training_stop = False

    def planned_steps(self, first: int) -> dict[int, int]:
        """Optimizer steps of all sampled clients in each round from this one on."""
        return {
            round: sum(self.clients.num_steps(client_id) for client_id in self.sample_clients(round))
            for round in range(first, self.args.num_rounds + 1)
        }

    def end_client_step(self) -> bool:
        """An optimizer step of a client is over: count it and tell callbacks; returns whether to log now."""
        self.count_client_step()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        return self.take_step_flags()

    def count_client_step(self) -> None:
        """One optimizer step of the client that is being fitted."""
        self.state.global_step += 1
        round = self.federation.round + 1
        if round in self._steps_of_round:
            share = (self.state.global_step - self._round_began_at) / self._steps_of_round[round]
            self.state.epoch = round - 1 + min(share, 1.0)

    def take_step_flags(self) -> bool:
        """Keep what the flow callbacks asked for at this step until the round's end; returns whether to log now."""
        self._evaluate_after_round |= self.control.should_evaluate
        self._save_after_round |= self.control.should_save
        should_log = self.control.should_log
        self.control.should_evaluate = self.control.should_save = self.control.should_log = False
        return should_log

    def log_client(self, logs: dict[str, float]) -> None:
        """Log what a client's trainer logs; `log_history` also names the client, which reporters could not plot."""
        if self._fitting is not None:
            logs["round"] = self._fitting["round"]
        self.log(logs)
        if self._fitting is not None:
            self.state.log_history[-1]["client_id"] = self._fitting["client_id"]

    def tell_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Tell callbacks that an evaluation is over."""
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def _call_federated(self, event: str, **values: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FederatedCallback):
                getattr(callback, event)(self.args, self.state, self.control, trainer=self, **values)

    # ---- Evaluation, by the clients' class: its loss, its collator, its generation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate the global model; see `Trainer.evaluate`. Further `kwargs` go to the clients' class."""
        return self._evaluating_trainer().evaluate(
            eval_dataset=eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **kwargs
        )

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test", **kwargs: Any
    ) -> PredictionOutput:
        """Predict with the global model; see `Trainer.predict`. Further `kwargs` go to the clients' class."""
        return self._evaluating_trainer().predict(
            test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **kwargs
        )

    def _evaluating_trainer(self) -> Trainer:
        trainer = self.clients.trainer
        trainer.is_in_train = self.is_in_train
        trainer.eval_dataset, trainer.compute_metrics = self.eval_dataset, self.compute_metrics
        return trainer
