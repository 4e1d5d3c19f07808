"""Room 2: local fits. One living `Trainer` of the user's class trains every client in turn on the shared model."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput, has_length
from transformers.utils import logging

from fedex_hf.training_args import FederatedTrainingArguments


if TYPE_CHECKING:
    from fedex_hf.callbacks import ClientBridge

logger = logging.get_logger(__name__)

# What the federation does itself, between rounds; a client's trainer only trains, evaluates and predicts.
_FEDERATION_OWNS = {
    "eval_strategy": IntervalStrategy.NO,
    "eval_on_start": False,
    "save_strategy": SaveStrategy.NO,
    "load_best_model_at_end": False,
    "logging_strategy": IntervalStrategy.NO,
    "logging_first_step": False,
    "report_to": [],
    "push_to_hub": False,
    "disable_tqdm": True,
    "use_liger_kernel": False,
    "neftune_noise_alpha": None,
}

# Methods of `Trainer` that decide how many batches a dataset makes.
_LOADING = (
    "_get_dataloader",
    "_get_train_sampler",
    "get_total_train_batch_size",
    "get_train_dataloader",
    "num_examples",
    "set_initial_training_values",
)


@dataclass(frozen=True)
class FitPlan:
    """What is particular about one local fit.

    Args:
        round: Server round, counted from 1.
        num_rounds: Number of rounds of the run.
        continue_schedule: Stretch the learning-rate schedule over all rounds and enter it at this one.
        optimizer_state: State of the client's optimizer after its last round, or `None` for a fresh optimizer.
    """

    round: int
    num_rounds: int
    continue_schedule: bool
    optimizer_state: Mapping[str, Any] | None = None


class _ClientFit(Trainer):
    """Put in front of the user's `Trainer` class: the optimizer and the schedule of one fit."""

    plan = FitPlan(round=1, num_rounds=1, continue_schedule=False)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.plan.optimizer_state is not None:
            # Moments and step counts only: the learning rate belongs to the schedule of this fit.
            # A copy: the optimizer would otherwise go on in the tensors that a failing fit must leave as they were.
            state = _to_cpu(self.plan.optimizer_state)
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if not self.plan.continue_schedule:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        scheduler = super().create_scheduler(num_training_steps * self.plan.num_rounds, *args, **kwargs)
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f'`lr_schedule="run"` cannot continue a `{type(scheduler).__name__}`. Use `lr_schedule="round"`, or a '
                "schedule that is a function of the step."
            )
        done = (self.plan.round - 1) * num_training_steps
        for group in scheduler.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self.lr_scheduler = LambdaLR(scheduler.optimizer, [_shifted(each, done) for each in scheduler.lr_lambdas])
        return self.lr_scheduler


def _shifted(schedule: Callable[[int], float], done: int) -> Callable[[int], float]:
    return lambda step: schedule(step + done)


class ClientRunner:
    """Runs the local fits of a federation on one shared model.

    A `Trainer` class that prepares its dataset in its constructor (TRL's `SFTTrainer`) is constructed once per client
    to prepare it; all fits then run in the first trainer, whose dataset is exchanged. Optimizer and scheduler are new
    in every fit, so nothing passes from one client to the next.

    Args:
        trainer_cls: The user's `Trainer` class.
        trainer_kwargs: Arguments of its constructor; `train_dataset`, `eval_dataset` and `callbacks` come from here.
        args: Arguments of the federation.
        datasets: Client -> its dataset.
        eval_dataset: Dataset(s) for evaluation.
        bridge: Callback that forwards events.
    """

    def __init__(
        self,
        trainer_cls: type[Trainer],
        trainer_kwargs: dict[str, Any],
        args: FederatedTrainingArguments,
        datasets: Mapping[str, Any],
        eval_dataset: Any,
        bridge: ClientBridge,
    ) -> None:
        self.args = args
        self.datasets = datasets
        self.order = {client_id: index for index, client_id in enumerate(datasets)}
        self._class = type(f"Client{trainer_cls.__name__}", (_ClientFit, trainer_cls), {})
        template = trainer_kwargs.pop("args", None)
        self._kwargs = trainer_kwargs
        self._client_args = client_args(args, template)
        self._sizes: dict[str, tuple[int, float]] = {}
        self._counted: dict[str | int, tuple[int, float]] = {}  # by the length of a dataset, or by client
        self._loads_plainly = all(getattr(trainer_cls, name) is getattr(Trainer, name) for name in _LOADING)
        first = next(iter(datasets))
        self.trainer = self._build(datasets[first], eval_dataset, bridge)
        self._prepares_dataset = self.trainer.train_dataset is not datasets[first]
        self._prepared = {first: self.trainer.train_dataset}

    def num_steps(self, client_id: str) -> int:
        """Optimizer steps of one fit of this client."""
        return self._size(client_id)[0]

    def num_samples(self, client_id: str) -> float:
        """Training samples that one fit of this client reads, epochs counted."""
        return self._size(client_id)[1]

    def num_examples(self, client_id: str) -> int:
        """Examples the client holds, or, for a stream, examples it reads in one round."""
        if self.is_stream(client_id):
            return self.num_steps(client_id) * self._examples_per_step
        return len(self.datasets[client_id])

    def is_stream(self, client_id: str) -> bool:
        """Whether the client's dataset has no length, so that it is read on from round to round."""
        return not has_length(self.datasets[client_id])

    def fit(self, client_id: str, plan: FitPlan, earlier_rounds: int) -> TrainOutput:
        """Train the shared model on one client's data.

        Args:
            client_id: The client.
            plan: What is particular about this fit.
            earlier_rounds: Rounds in which this client was sampled before; a stream goes on where it stopped.
        """
        trainer, dataset = self.trainer, self._dataset(client_id)
        if self.is_stream(client_id):
            dataset = _ContinuedStream(client_id, dataset, skip=earlier_rounds * self.num_examples(client_id))
        trainer.train_dataset = dataset
        trainer.plan = plan
        trainer.optimizer = trainer.lr_scheduler = None
        seed = self._seed(self.args.seed, plan.round, client_id)
        if self.args.data_seed is not None:
            data_seed = self._seed(self.args.data_seed, plan.round, client_id)
            trainer.accelerator.dataloader_config.data_seed = data_seed
        with isolated_rng():
            set_seed(seed)
            return trainer.train()

    def optimizer_state(self) -> dict[str, Any]:
        """State of the optimizer after the last fit, copied to the CPU."""
        return _to_cpu(cast(torch.optim.Optimizer, self.trainer.optimizer).state_dict()["state"])

    def further_trainer(self, bridge: ClientBridge) -> Trainer:
        """Another trainer of the clients' class, for a fit that runs beside others."""
        with _same_forward(self._kwargs["model"]):
            return self._build(next(iter(self._prepared.values())), None, bridge)

    def _size(self, client_id: str) -> tuple[int, float]:
        if client_id not in self._sizes:
            dataset = self._dataset(client_id)
            # `Trainer` asks a dataset for its length only; a class that loads otherwise is asked for every client.
            key = len(dataset) if self._loads_plainly and has_length(dataset) else client_id
            if key not in self._counted:
                self.trainer.train_dataset = dataset
                loader = self.trainer.get_train_dataloader()
                values = self.trainer.set_initial_training_values(self.trainer.args, loader)
                self._counted[key] = values[-1], values[3]  # max_steps, num_train_samples
            self._sizes[client_id] = self._counted[key]
        return self._sizes[client_id]

    def _dataset(self, client_id: str) -> Any:
        if client_id not in self._prepared:
            dataset = self.datasets[client_id]
            if self._prepares_dataset:
                with _same_forward(self._kwargs["model"]):
                    dataset = self._build(dataset, None, None).train_dataset
            self._prepared[client_id] = dataset
        return self._prepared[client_id]

    def _build(self, dataset: Any, eval_dataset: Any, bridge: ClientBridge | None) -> _ClientFit:
        with isolated_rng():
            trainer = self._class(
                args=copy.copy(self._client_args),
                train_dataset=dataset,
                **({} if eval_dataset is None else {"eval_dataset": eval_dataset}),
                **({} if bridge is None else {"callbacks": [bridge]}),
                **self._kwargs,
            )
        trainer.pop_callback(PrinterCallback)
        return trainer

    def _seed(self, seed: int, round: int, client_id: str) -> int:
        return client_seed(seed, round, self.order[client_id])

    @property
    def _examples_per_step(self) -> int:
        args = self.trainer.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def client_seed(seed: int, round: int, index: int) -> int:
    """Seed of one client's fit in one round: a pure function, so that it depends on nothing that ran before.

    The first client of the first round gets `seed` itself, so that a federation of one client and one round is the
    plain `Trainer`, step for step.

    Args:
        seed: The run's seed.
        round: Server round, counted from 1.
        index: Position of the client in the federation, from 0.
    """
    if round == 1 and index == 0:
        return seed
    digest = hashlib.sha256(f"fedex_hf/{seed}/{round}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % 2**31


def client_args(args: FederatedTrainingArguments, template: TrainingArguments | None) -> TrainingArguments:
    """Arguments of a client's trainer.

    Args:
        args: Arguments of the federation; they decide every field of `TrainingArguments`.
        template: Arguments of the class that the client's trainer wants (`SFTConfig`, `Seq2SeqTrainingArguments`);
            its own further fields are kept.
    """
    shared = {f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init}
    if template is not None:
        own = {f.name: getattr(template, f.name) for f in fields(template) if f.init}
        _warn_of_overridden(template, shared)
        result = type(template)(**(own | shared))
    elif type(args) is FederatedTrainingArguments:
        result = TrainingArguments(**shared)
    else:  # the user's own class that joins ours with, say, SFTConfig
        result = copy.copy(args)
    for name, value in _FEDERATION_OWNS.items():
        setattr(result, name, value)
    return result


def _warn_of_overridden(template: TrainingArguments, shared: Mapping[str, Any]) -> None:
    """Name the fields that the user set in the template and that `args` decide otherwise."""
    defaults = {f.name: f.default for f in fields(template)}
    overridden = [
        f"{name}={getattr(template, name)!r}"
        for name, value in shared.items()
        if name != "output_dir" and getattr(template, name) not in (defaults[name], value)
    ]
    if overridden:
        logger.warning(
            f"`client_trainer_kwargs['args']` sets {', '.join(overridden)}, which `args` override: the template keeps "
            "only the fields that `TrainingArguments` does not have. Set them in `args`."
        )


@contextmanager
def _same_forward(model: torch.nn.Module) -> Iterator[None]:
    """Undo what is done to `forward` inside: a `Trainer` that wraps it would wrap it once more for every client."""
    before = {module: vars(module).get("forward") for module in model.modules()}
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random number generators of Python, NumPy and torch (all devices) on leaving."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class _ContinuedStream(torch.utils.data.IterableDataset):
    """A stream read on from where the client's last round stopped; at its end it starts again."""

    def __init__(self, client_id: str, dataset: Any, skip: int) -> None:
        self.client_id = client_id
        self.dataset = dataset
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        to_skip, epoch = self.skip, 0
        while True:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            empty = True
            for example in self.dataset:
                empty = False
                if to_skip > 0:
                    to_skip -= 1
                else:
                    yield example
            if empty:
                raise ValueError(f"The dataset of client `{self.client_id}` is empty. Remove the client.")
            epoch += 1


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _to_cpu(item) for key, item in value.items()}
    return value
