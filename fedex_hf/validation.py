"""Bad input is refused here, before the first training step: what came, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, IterableDatasetDict, Value
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from fedex_hf.aggregators import Aggregator, get_aggregator
from fedex_hf.base_model import AdaptedModel
from fedex_hf.model_checks import check_peft_type
from fedex_hf.partition import partition_dataset
from fedex_hf.training_args import FederatedTrainingArguments


# Methods of `Trainer` that act inside a local fit or an evaluation. Those run in `client_trainer_cls`, so overriding
# them in a subclass of `FederatedTrainer` would silently do nothing.
_CLIENT_METHODS = (
    "_get_eval_sampler",
    "_get_train_sampler",
    "_prepare_inputs",
    "compute_loss",
    "create_optimizer",
    "create_optimizer_and_scheduler",
    "create_scheduler",
    "evaluation_loop",
    "get_batch_samples",
    "get_decay_parameter_names",
    "get_eval_dataloader",
    "get_test_dataloader",
    "get_train_dataloader",
    "prediction_step",
    "training_step",
)


def refuse_overrides(
    cls: type[Trainer], args: Any, model: nn.Module | str | None, model_init: Any, client_trainer_cls: Any
) -> None:
    """Refuse what `FederatedTrainer` would otherwise ignore.

    Raises:
        TypeError: If `args` are not federated, or `client_trainer_cls` is no `Trainer` class.
        ValueError: If `model_init` is given, `model` is not, or a subclass overrides a method that clients run.
    """
    if not isinstance(args, FederatedTrainingArguments):
        raise TypeError(
            f"`args` is a `{type(args).__name__}`. Allowed: `FederatedTrainingArguments`; convert with "
            "`FederatedTrainingArguments.from_training_args(args, num_rounds=...)`."
        )
    if not (isinstance(client_trainer_cls, type) and issubclass(client_trainer_cls, Trainer)):
        raise TypeError(f"`client_trainer_cls={client_trainer_cls!r}`. Allowed: `Trainer` or a subclass of it.")
    if issubclass(client_trainer_cls, cls):
        raise TypeError("`client_trainer_cls` is itself federated. Allowed: the `Trainer` class of one client.")
    if model_init is not None or model is None:
        raise ValueError(
            "`FederatedTrainer` needs `model`, and does not take `model_init`: all clients start from one model, "
            "whose adapter and base are exchanged. Build it first and pass it."
        )
    if not isinstance(model, (nn.Module, str)):
        raise TypeError(
            f"`model={model!r}` is a `{type(model).__name__}`. Allowed: a model, or the repository of "
            "a run to continue."
        )
    overridden = [name for name in _CLIENT_METHODS if getattr(cls, name) is not getattr(Trainer, name)]
    if overridden:
        raise ValueError(
            f"`{cls.__name__}` overrides `{'`, `'.join(overridden)}`, which clients run in `client_trainer_cls`. Move "
            "the override to a `Trainer` subclass and pass that as `client_trainer_cls`."
        )


def refuse_revision(model: Any, revision: str | None) -> None:
    """Refuse a revision that would be ignored.

    Raises:
        ValueError: If `revision` comes with a model that is loaded already.
    """
    if revision is not None and not isinstance(model, str):
        raise ValueError(
            f"`revision={revision!r}` says which round of a run to continue, and `model` is a "
            f"`{type(model).__name__}`. Pass the run's repository as `model`, or leave `revision` out."
        )


def refuse_peft_config(model: nn.Module, peft_config: Any) -> None:
    """Refuse a configuration before it changes the model.

    Raises:
        TypeError, ValueError, UnsupportedModelError: If it is none, is not LoRA, or the model has LoRA already.
    """
    if isinstance(model, PeftModel):
        raise ValueError("`model` already is a `PeftModel`: drop `peft_config`, or pass the plain model.")
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` is a `{type(peft_config).__name__}`. Allowed: a `peft.LoraConfig`.")
    check_peft_type("peft_config", peft_config)


def refuse_prebuilt_optimizer(optimizers: tuple[Any, Any]) -> None:
    """Refuse an optimizer or scheduler object: each client's fit needs its own, so its state would be discarded.

    Raises:
        ValueError: If either of the pair is given.
    """
    if any(each is not None for each in optimizers):
        given = ", ".join(type(each).__name__ for each in optimizers if each is not None)
        raise ValueError(
            f"`optimizers` holds {given}. Every local fit builds its own optimizer and schedule, so the state of a "
            "pre-built one would be discarded. Pass `optimizer_cls_and_kwargs=(cls, kwargs)`, or set `optim` and "
            "`lr_scheduler_type` in the arguments; for a `Trainer` that has already trained, build a new one first."
        )


def refuse_kept_adapters(aggregator: Aggregator) -> None:
    """Refuse a method whose clients keep their factors and whose base weights would not be checked to hold offsets.

    Raises:
        ValueError: If it says `keeps_client_adapters` without `changes_base`.
    """
    if aggregator.keeps_client_adapters and not aggregator.changes_base:
        raise ValueError(
            f"`{type(aggregator).__name__}` says `keeps_client_adapters` without `changes_base = True`. Clients that "
            "keep their factors need an offset in their base weight, which has to be able to hold it."
        )


def refuse_client_ranks(ranks: Mapping[str, int], aggregator: Aggregator, clients: Mapping[str, Any]) -> None:
    """Refuse ranks that belong to no client, or that the method cannot bring together exactly.

    Args:
        ranks: Client -> its rank.
        aggregator: The method.
        clients: The federation's clients.

    Raises:
        ValueError: If there are any.
    """
    unknown = [client_id for client_id in ranks if client_id not in clients]
    if unknown:
        known = ", ".join([*map(repr, [*clients][:10]), *["..."] * (len(clients) > 10)])
        raise ValueError(f"`client_ranks` names {unknown[:5]}, which are no clients. Allowed: {known}.")
    if not ranks:
        return
    if aggregator.keeps_client_adapters:
        reason = (
            "its clients go on from factors of their own, and what one of another rank does not train would have to "
            "be part of these"
        )
    elif not aggregator.mixes_ranks or not aggregator.changes_base:
        reason = "it has nowhere to put what does not fit into the global rank, so its result would not be exact"
    elif "start" not in signature(aggregator.aggregate).parameters:
        reason = "its `aggregate` does not take `start`, which says the global ranks"
    else:
        return
    raise ValueError(
        f"`client_ranks` with the aggregator `{aggregator.name}`: {reason}. Use `fedex` with the assignment "
        '"average" or "reinitialise", or leave `client_ranks` out.'
    )


def refuse_scaled_biases(ranks: Mapping[str, int], adapted: AdaptedModel) -> None:
    """Refuse `lora_bias` with ranks that differ.

    Raises:
        ValueError: If there is both.
    """
    biases = [name for name in adapted.tensors if name.endswith(f".lora_B.{adapted.adapter}.bias")]
    if ranks and biases:
        raise ValueError(
            f"`client_ranks` with `lora_bias=True`: PEFT scales `{biases[0]}` by the layer's scaling, which differs "
            "between clients of different ranks, so its mean would not be exact. Leave out one of the two."
        )


def resolve_aggregator(args: FederatedTrainingArguments, aggregator: Aggregator | str | None) -> Aggregator:
    """The method: what the constructor was given, or what the arguments name.

    Raises:
        ValueError: If both come, so that arguments would be ignored.
    """
    if aggregator is None:
        return get_aggregator(args.aggregator, **args.parsed_aggregator_kwargs)
    if args.parsed_aggregator_kwargs:
        raise ValueError(
            f"`aggregator_kwargs={args.aggregator_kwargs}` would be ignored, because `aggregator` is passed to the "
            "constructor. Give them to it, or name it in the arguments."
        )
    return get_aggregator(aggregator)


def refuse_federation_kwargs(client_trainer_kwargs: Mapping[str, Any]) -> None:
    """Refuse constructor arguments that belong to the federation among those of a client's trainer.

    Raises:
        ValueError: If there are any; the message names them.
    """
    refuse_prebuilt_optimizer(client_trainer_kwargs.get("optimizers", (None, None)))
    reserved = ("model", "model_init", "train_dataset", "eval_dataset", "callbacks")
    owned = [name for name in reserved if name in client_trainer_kwargs]
    if owned:
        raise ValueError(
            f"`client_trainer_kwargs` holds `{'`, `'.join(owned)}`, which clients get from the federation. Pass them "
            "to `FederatedTrainer` itself."
        )


def client_datasets(train_dataset: Any, args: FederatedTrainingArguments) -> dict[str, Any]:
    """The clients' datasets: the dictionary as given, or one dataset partitioned by the arguments.

    Raises:
        TypeError: If a client id is not a string.
        ValueError: If there are no clients, one is empty, columns differ, or the numbers contradict the arguments.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is missing. Pass `{client_id: dataset}`, or one dataset to partition.")
    if isinstance(train_dataset, (DatasetDict, IterableDatasetDict)) and "train" in train_dataset:
        raise ValueError(
            f"`train_dataset` holds the splits {list(train_dataset)}, not clients. Pass `dataset['train']` to have it "
            "partitioned, or a dictionary from client ids to datasets."
        )
    if isinstance(train_dataset, Mapping):
        clients = dict(train_dataset)
        for name in ("partition_by", "dirichlet_alpha"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` with a dictionary of clients: there is nothing to partition. "
                    "Leave it out, or pass one dataset."
                )
    elif isinstance(train_dataset, (list, tuple)) and any(_is_dataset(each) for each in train_dataset[:1]):
        raise TypeError(
            f"`train_dataset` is a `{type(train_dataset).__name__}` of datasets. Pass `{{client_id: dataset}}`."
        )
    else:
        clients = partition_dataset(
            train_dataset,
            args.num_clients,
            partition_by=args.partition_by,
            dirichlet_alpha=args.dirichlet_alpha,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
    _check_clients(clients, args)
    return clients


def sampled_per_round(args: FederatedTrainingArguments, num_clients: int) -> int:
    """Number of clients that train in each round: the fraction, rounded, at least one.

    Example:
        >>> sampled_per_round(FederatedTrainingArguments(output_dir="out", client_fraction=0.1), 30)
        3
    """
    return max(1, round(args.client_fraction * num_clients))


def _check_clients(clients: Mapping[str, Any], args: FederatedTrainingArguments) -> None:
    if not clients:
        raise ValueError("`train_dataset` holds no clients. Pass at least one `{client_id: dataset}`.")
    if args.num_clients is not None and len(clients) != args.num_clients:
        raise ValueError(f"`num_clients={args.num_clients}`, but `train_dataset` has {len(clients)} clients.")
    sampled = sampled_per_round(args, len(clients))
    if args.min_clients > sampled:
        raise ValueError(
            f"`min_clients={args.min_clients}`, but only {sampled} of the {len(clients)} clients are sampled per "
            f"round (`client_fraction={args.client_fraction}`). Lower `min_clients` or raise `client_fraction`."
        )
    first_id, first = next(iter(clients.items()))
    for client_id, dataset in clients.items():
        if not isinstance(client_id, str):
            raise TypeError(f"The client id {client_id!r} is a `{type(client_id).__name__}`. Allowed: strings.")
        _check_type(client_id, dataset)
        _check_length(client_id, dataset, args)
        if _columns(dataset) != _columns(first):
            raise ValueError(
                f"Client `{client_id}` has the columns {_columns(dataset)}, and client `{first_id}` has "
                f"{_columns(first)}. All clients need the same columns; rename or remove the others."
            )
        _check_features(first_id, first, client_id, dataset)


def _check_length(client_id: str, dataset: Any, args: FederatedTrainingArguments) -> None:
    if dataset is None:
        raise ValueError(f"The dataset of client `{client_id}` is `None`. Remove the client, or pass its dataset.")
    if not has_length(dataset):
        if args.max_steps <= 0:
            raise ValueError(
                f"The dataset of client `{client_id}` has no length, so an epoch has none. Set `max_steps` (optimizer "
                "steps per client and round)."
            )
    elif len(dataset) == 0:
        raise ValueError(f"The dataset of client `{client_id}` is empty. Remove the client; a mean needs examples.")
    elif args.dataloader_drop_last and len(dataset) < args.train_batch_size:
        raise ValueError(
            f"Client `{client_id}` has {len(dataset)} examples, fewer than one batch of {args.train_batch_size}, and "
            "`dataloader_drop_last=True` drops them all. Set it to `False`, or lower the batch size."
        )


def _columns(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "column_names", None)
    if names is None and isinstance(dataset, Sequence) and isinstance(dataset[0], Mapping):
        names = dataset[0]
    return None if names is None else sorted(names)


def _check_features(first_id: str, first: Any, client_id: str, dataset: Any) -> None:
    here, there = getattr(dataset, "features", None) or {}, getattr(first, "features", None) or {}
    for name in [name for name in here if name in there and _meaning(here[name]) != _meaning(there[name])]:
        raise ValueError(
            f"The column `{name}` of client `{client_id}` is {here[name]}, and that of client `{first_id}` is "
            f"{there[name]}: equal values would not mean the same. Cast with `cast_column`."
        )


def _meaning(feature: Any) -> Any:
    """What must agree between clients: class names, and the kind of a number but not its width."""
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    if isinstance(feature, Value):
        return feature.dtype.removeprefix("large_").removeprefix("u").rstrip("0123456789")
    return None


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "column_names") or isinstance(value, torch.utils.data.Dataset)


def _check_type(client_id: str, dataset: Any) -> None:
    if dataset is None:
        return
    is_rows = isinstance(dataset, Sequence) and not isinstance(dataset, str)
    if isinstance(dataset, Mapping) or not (_is_dataset(dataset) or is_rows):
        raise TypeError(
            f"The dataset of client `{client_id}` is a `{type(dataset).__name__}`. Allowed: a `datasets.Dataset`, a "
            "`torch.utils.data.Dataset`, or a list of rows."
        )
