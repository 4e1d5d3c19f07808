"""Every knob of a federated run, beside those of `TrainingArguments`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, SchedulerType

from fedex_hf.aggregators import get_aggregator


_CHOICES = {
    "client_weighting": ("num_examples", "uniform"),
    "client_optimizer_state": ("reset", "keep"),
    "lr_schedule": ("round", "run"),
    "client_errors": ("raise", "skip"),
    "hub_round_format": ("full", "lora", "merged"),
    "residual_storage": ("auto", "base", "adapter"),
}
# Schedules that react to metrics.
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


@dataclass
class FederatedTrainingArguments(TrainingArguments):
    r"""Arguments of a federated run.

    All of [`~transformers.TrainingArguments`] keep their names. Where the meaning differs:

    - `num_train_epochs` and `max_steps` are per client and round; `num_train_epochs` defaults to 1.
    - An "epoch" of the run is a round: `eval_strategy`, `save_strategy` and `logging_strategy="epoch"` mean every
      round, `state.epoch` counts rounds, and `EarlyStoppingCallback` counts them. `eval_strategy` and `save_strategy`
      `"steps"` act at the end of the round in which the step falls: between rounds there is one model, within a round
      there is none. `save_strategy` defaults to `"epoch"`, so that a killed run can be resumed.
    - `warmup_steps` and `lr_scheduler_type` follow `lr_schedule`.
    - `push_to_hub` publishes every round as one commit with the tag `round-N`, whatever `save_strategy` says;
      `hub_strategy="end"` publishes the last one only. Rounds can be resumed from, so `"checkpoint"` and
      `"all_checkpoints"` are the same as `"every_save"`, and none is ever skipped, so `hub_always_push` is moot.

    Args:
        > Rounds and clients

        num_rounds (`int`, *optional*, defaults to 5):
            Number of server rounds.
        num_clients (`int`, *optional*):
            Number of clients that one dataset is split into (3 if not given). With a dictionary of clients it must be
            their number, if given.
        client_fraction (`float`, *optional*, defaults to 1.0):
            Fraction of the clients that train in each round, in (0, 1]; rounded to at least one client.
        min_clients (`int`, *optional*, defaults to 1):
            Least number of clients whose update must arrive for a round to count.
        client_errors (`"raise"` or `"skip"`, *optional*, defaults to `"raise"`):
            What to do with a client that raises or returns NaN or Inf: stop the run, or leave the client out of the
            round and renormalise the other clients' weights.

        > Aggregation

        aggregator (`str`, *optional*, defaults to `"fedex"`):
            Name in `fedex_hf.AGGREGATORS`: `"fedex"`, `"fedit"`, `"ffa"`.
        aggregator_kwargs (`dict`, *optional*):
            Arguments of the aggregator, such as `{"residual_rank": 8}` or `{"assignment": "keep"}` for `fedex`. As a
            flag: a JSON object.
        client_weighting (`"num_examples"` or `"uniform"`, *optional*, defaults to `"num_examples"`):
            Weight of a client in the average. The paper writes uniform weights in every equation.
        client_ranks (`dict`, *optional*):
            Client -> LoRA rank in every adapted layer, for clients of another rank than the `LoraConfig`'s, which is
            the global one. Their scaling is what PEFT gives that rank. As a flag: a JSON object. Aggregation stays
            exact: what a smaller client does not train stays as it was in its copy of the base, and what a larger one
            trains beyond the global rank goes into the residual.
        residual_storage (`"auto"`, `"base"` or `"adapter"`, *optional*, defaults to `"auto"`):
            Where the model holds the sum of all residuals (the ledger): added to the base weights, which must be
            float32 and untied; or in a second, frozen PEFT adapter in float32 beside the trained one, which leaves
            bfloat16, float16, 4-bit and 8-bit bases as they are. `"auto"` takes the base where it can.
        residual_rank (`int`, *optional*):
            Largest rank of a layer's ledger; the best approximation of this rank is kept after each round, and the
            share of its energy that is lost is logged as `ledger_lost_energy`. `None` keeps everything, which is
            exact. Not to be confused with `FedExAggregator(residual_rank=...)`, which truncates what one round sends.
        residual_tolerance (`float`, *optional*):
            Largest share of a layer's energy, in (0, 1), that may be left out after each round to keep the rank low.

        log_layer_exactness (`bool`, *optional*, defaults to `False`):
            Log the exactness certificate of every layer each round, as `aggregation_error/<layer>` and
            `fedit_deviation/<layer>`. `trainer.exactness.layers` holds the last round's in any case.

        > Partition of one dataset

        partition_by (`str`, *optional*):
            Column to partition by: one client per value, or, with `dirichlet_alpha`, the label column.
        dirichlet_alpha (`float`, *optional*):
            Concentration of the label skew; small is skewed. Without it and `partition_by`, clients are IID.

        > Local training

        client_optimizer_state (`"reset"` or `"keep"`, *optional*, defaults to `"reset"`):
            Start each local fit with a fresh optimizer, as the paper's code does, or with the state that this client's
            optimizer had at the end of its last round.
        client_state_dir (`str`, *optional*):
            Folder for the kept optimizer states, which then take no memory: each client's lies in a file that is read
            when the client is fitted. A trainer uses a folder of its own in it and deletes that in the end;
            checkpoints hold hard links, or copies if `output_dir` is on another file system. `None` keeps the states
            in memory.
        lr_schedule (`"round"` or `"run"`, *optional*, defaults to `"round"`):
            Run the whole learning-rate schedule in every round, as the paper's code does, or once over the run.
        parallel_clients (`int`, *optional*, defaults to 1):
            Experimental. Clients whose batches go through the frozen base in one pass, each with factors, head,
            optimizer and clipping of its own: the result of one after another, up to rounding, in less time where
            batches are small. Needs memory for as many batches. See `docs/howto/clients.md`.

        > Hub

        hub_round_format (`"full"`, `"lora"` or `"merged"`, *optional*, defaults to `"full"`):
            What a round's commit holds: residual-updated base and adapter; one plain LoRA on the original base; or one
            plain model with everything folded in.
        hub_retries (`int`, *optional*, defaults to 5):
            Further attempts at publishing a round after one that failed for a reason that may pass, with waits of 1,
            2, 4, ... seconds, or what the Hub asks for. Training does not wait for them.
        hub_max_shard_size (`str`, *optional*):
            Largest weight file in a commit, such as `"5GB"`; as `max_shard_size` of `save_pretrained` if not given.

    Raises:
        ValueError: If a value is out of its range, or two arguments contradict each other.
    """

    # `client_ranks` is parsed here: `TrainingArguments` would take a rank of "4" for 4.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "aggregator_kwargs"]

    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Restore callback states, such as early stopping's patience, on resuming."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs per client and round."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps per client and round; overrides epochs."})
    save_strategy: SaveStrategy | str = field(
        default="epoch", metadata={"help": 'When to save: "epoch" is every round, "no", "steps", "best".'}
    )
    num_rounds: int = field(default=5, metadata={"help": "Number of server rounds."})
    num_clients: int | None = field(
        default=None, metadata={"help": "Number of clients that one dataset is split into (3 if not given)."}
    )
    client_fraction: float = field(default=1.0, metadata={"help": "Fraction of the clients per round, in (0, 1]."})
    min_clients: int = field(default=1, metadata={"help": "Least number of updates for a round to count."})
    client_errors: str = field(
        default="raise",
        metadata={
            "help": "What to do with a client that raises or returns NaN or Inf: stop the run, or leave it out.",
            "choices": _CHOICES["client_errors"],
        },
    )
    aggregator: str = field(default="fedex", metadata={"help": 'Aggregation method: "fedex", "fedit" or "ffa".'})
    aggregator_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the aggregator, as a JSON object."}
    )
    client_weighting: str = field(
        default="num_examples",
        metadata={"help": "Weight of a client in the average.", "choices": _CHOICES["client_weighting"]},
    )
    client_ranks: dict[str, int] | str | None = field(
        default=None, metadata={"help": "LoRA ranks of clients that differ from the global one, as a JSON object."}
    )
    residual_storage: str = field(
        default="auto",
        metadata={
            "help": "Where the residuals are held: added to float32 base weights, or in a frozen adapter beside them.",
            "choices": _CHOICES["residual_storage"],
        },
    )
    residual_rank: int | None = field(
        default=None, metadata={"help": "Largest rank of a layer's accumulated residual; all of it if not given."}
    )
    residual_tolerance: float | None = field(
        default=None, metadata={"help": "Share of its energy, in (0, 1), that may be left out after each round."}
    )
    log_layer_exactness: bool = field(
        default=False, metadata={"help": "Log the exactness certificate of every layer each round."}
    )
    partition_by: str | None = field(
        default=None, metadata={"help": "Column to partition by: a client per value, or the label for Dirichlet."}
    )
    dirichlet_alpha: float | None = field(
        default=None, metadata={"help": "Concentration of the Dirichlet label skew; small is skewed."}
    )
    client_optimizer_state: str = field(
        default="reset",
        metadata={
            "help": "Fresh optimizer each round, or the state this client's optimizer ended its last round with.",
            "choices": _CHOICES["client_optimizer_state"],
        },
    )
    client_state_dir: str | None = field(
        default=None, metadata={"help": "Folder for the kept optimizer states; in memory if not given."}
    )
    lr_schedule: str = field(
        default="round",
        metadata={
            "help": "Learning-rate schedule once per round, or once over the run.",
            "choices": _CHOICES["lr_schedule"],
        },
    )
    parallel_clients: int = field(
        default=1, metadata={"help": "Experimental: clients whose batches go through the frozen base in one pass."}
    )
    hub_round_format: str = field(
        default="full",
        metadata={
            "help": "What a round's commit holds: base and adapter, one LoRA on the original base, or one model.",
            "choices": _CHOICES["hub_round_format"],
        },
    )
    hub_retries: int = field(default=5, metadata={"help": "Further attempts at publishing a round, with back-off."})
    hub_max_shard_size: str | None = field(
        default=None, metadata={"help": 'Largest weight file in a commit, such as "5GB".'}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_numbers(self)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}={value!r}` is not allowed. Allowed: {', '.join(map(repr, allowed))}.")
        schedule = SchedulerType(self.lr_scheduler_type).value
        if schedule in _STATEFUL_SCHEDULES:
            raise ValueError(
                f"`lr_scheduler_type={schedule!r}` waits for metrics, and a client's fit has none: evaluation comes "
                "after the round. Use a schedule that is a function of the step."
            )
        _check_unsupported(self)
        _check_state_dir(self)
        _check_ranks(self.parsed_client_ranks)
        get_aggregator(self.aggregator, **self.parsed_aggregator_kwargs)

    @property
    def parsed_aggregator_kwargs(self) -> dict[str, Any]:
        """`aggregator_kwargs` as a dictionary, empty if not given."""
        return _parsed("aggregator_kwargs", self.aggregator_kwargs)

    @property
    def parsed_client_ranks(self) -> dict[str, int]:
        """`client_ranks` as a dictionary, empty if not given."""
        return _parsed("client_ranks", self.client_ranks)

    @classmethod
    def from_training_args(cls, args: TrainingArguments, **kwargs: Any) -> FederatedTrainingArguments:
        """Take over every field of plain `TrainingArguments` (or of a subclass), and set the federated ones.

        Args:
            args: Arguments of an existing script. `save_strategy` is taken as it is.
            kwargs: Fields of this class; they win over `args`.

        Example:
            >>> plain = TrainingArguments(output_dir="out", learning_rate=1e-3)
            >>> FederatedTrainingArguments.from_training_args(plain, num_rounds=3).learning_rate
            0.001
        """
        known = {f.name for f in fields(cls) if f.init}
        taken = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
        return cls(**(taken | kwargs))


def _parsed(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    if not isinstance(value, str):
        return dict(value or {})
    try:
        return dict(json.loads(value)) if value else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}={value!r}` is not a JSON object ({error}).") from error


def _check_ranks(ranks: dict[str, int]) -> None:
    for client_id, rank in ranks.items():
        if not isinstance(client_id, str) or type(rank) is not int or rank < 1:
            raise ValueError(
                f"`client_ranks` has the rank {rank!r} for the client {client_id!r}. Allowed: a dictionary from "
                "client ids, which are strings, to integers of at least 1."
            )


def _check_numbers(args: FederatedTrainingArguments) -> None:
    for name, least in (
        ("num_rounds", 1),
        ("num_clients", 1),
        ("min_clients", 1),
        ("parallel_clients", 1),
        ("hub_retries", 0),
        ("residual_rank", 1),
    ):
        value = getattr(args, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"`{name}={value!r}` is not allowed. Allowed: an integer of at least {least}.")
    if not 0 < args.client_fraction <= 1:
        raise ValueError(
            f"`client_fraction={args.client_fraction!r}` is out of range. Allowed: above 0 and at most 1; it is the "
            "fraction of the clients that train in each round."
        )
    if args.residual_tolerance is not None and not 0 < args.residual_tolerance < 1:
        raise ValueError(
            f"`residual_tolerance={args.residual_tolerance!r}` is out of range. Allowed: above 0 and below 1; it is a "
            "share of the energy. Leave it out to keep all of it."
        )
    if args.num_clients is not None and args.min_clients > args.num_clients:
        raise ValueError(
            f"`min_clients={args.min_clients}` is more than `num_clients={args.num_clients}`. Lower `min_clients`."
        )
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"`num_train_epochs={args.num_train_epochs}` with `max_steps={args.max_steps}` trains nothing. Set one of "
            "them to a positive number (per client and round)."
        )


def _check_state_dir(args: FederatedTrainingArguments) -> None:
    if args.client_state_dir is None:
        return
    where = f"`client_state_dir={args.client_state_dir!r}`"
    if not args.client_state_dir or Path(args.client_state_dir).is_file():
        raise ValueError(f"{where} is no folder. Allowed: a folder, which is created if it is not there.")
    if args.client_optimizer_state != "keep":
        raise ValueError(
            f"{where} with `client_optimizer_state={args.client_optimizer_state!r}`: clients keep no states that "
            'could lie there. Set `client_optimizer_state="keep"`, or leave the folder out.'
        )


def _check_unsupported(args: FederatedTrainingArguments) -> None:
    reasons = {
        "auto_find_batch_size": "a retry would restart a client's fit from a half-trained adapter",
        "deepspeed": "its engine owns the optimizer, which changes hands between clients here",
        "fsdp": "sharded base weights cannot take the residual yet",
        "bf16_full_eval": "evaluation would cast the shared model, and the residual in its base would round away",
        "fp16_full_eval": "evaluation would cast the shared model, and the residual in its base would round away",
        "enable_jit_checkpoint": "a checkpoint inside a round would hold one client's model",
    }
    for name, reason in reasons.items():
        if getattr(args, name, None):
            raise ValueError(f"`{name}` is not supported by `FederatedTrainer`: {reason}. Switch it off.")
