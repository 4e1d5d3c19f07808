"""Bad input is refused before the first training step; the error says what came, what is allowed and what to do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict, Value
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from fedex_hf import (
    CheckpointMismatchError,
    FederatedTrainer,
    FederatedTrainingArguments,
    FedExAggregator,
    UnsupportedModelError,
)
from fedex_hf.hub_rounds import UnloadableRoundError


Make = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def steps() -> Iterator[list[str]]:
    """Every optimizer step in the process, whoever takes it."""
    taken: list[str] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: taken.append(type(optimizer).__name__))
    yield taken
    handle.remove()


@pytest.fixture(autouse=True)
def _no_deepspeed() -> Iterator[None]:
    """Its configuration is global for as long as arguments that had one are alive: until some collection comes."""
    yield
    unset_hf_deepspeed_config()


def train(output_dir: Path, *, trainer_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
    """Build and train: what is accepted takes steps."""
    tiny.federation(output_dir, trainer_kwargs=trainer_kwargs, **kwargs).train()


def with_trainer(**trainer_kwargs: Any) -> Make:
    return lambda out: train(out, trainer_kwargs=trainer_kwargs)


def with_args(**kwargs: Any) -> Make:
    return lambda out: train(out, **kwargs)


def with_clients(make: Callable[[], Any], **kwargs: Any) -> Make:
    return lambda out: train(out, trainer_kwargs={"train_dataset": make()}, **kwargs)


def partitioned(**kwargs: Any) -> Make:
    return with_clients(lambda: tiny.classification_data(30), **kwargs)


def refused(make: Make, output_dir: Path, error: type[Exception], says: tuple[str, ...], steps: list[str]) -> None:
    with pytest.raises(error) as raised:
        make(output_dir)
    assert steps == []
    for part in says:
        assert part in str(raised.value)


def test_what_is_accepted_takes_steps(tmp_path, steps):
    train(tmp_path)
    assert len(steps) == 2 * (3 + 2 + 3)


# ---- Models ----


def peft_model(config: Any = None, model: Any = None, **kwargs: Any) -> PeftModel:
    return get_peft_model(tiny.roberta() if model is None else model, config or tiny.lora(**kwargs))


def with_model(make: Callable[[], Any], **kwargs: Any) -> Make:
    return lambda out: train(out, model=make(), trainer_kwargs={"peft_config": None}, **kwargs)


def two_active() -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny.llama(), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> PeftModel:
    model = peft_model()
    model.merge_adapter()
    return model


def with_nan(part: str) -> Callable[[], PeftModel]:
    def make() -> PeftModel:
        model = peft_model()
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.data.flatten()[0] = float("nan")
        return model

    return make


class BatchNormHead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(32)
        self.out_proj = torch.nn.Linear(32, tiny.LABELS)

    def forward(self, features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.out_proj(self.norm(features[:, 0]))


def with_batch_norm() -> PeftModel:
    model = tiny.roberta()
    model.classifier = BatchNormHead()
    return peft_model(model=model)


def tied() -> PeftModel:
    model = tiny.llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"]))


MODELS: dict[str, tuple[Make, type[Exception], tuple[str, ...]]] = {
    "no LoRA": (
        with_model(tiny.roberta),
        UnsupportedModelError,
        ("RobertaForSequenceClassification", "without LoRA", "peft_config=LoraConfig(", "get_peft_model"),
    ),
    "not LoRA": (
        with_model(lambda: peft_model(IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[]))),
        UnsupportedModelError,
        ("IA3", "Allowed: LORA", "LoraConfig"),
    ),
    "not LoRA by peft_config": (
        with_trainer(peft_config=IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])),
        UnsupportedModelError,
        ("IA3", "Allowed: LORA", "LoraConfig"),
    ),
    "peft_config twice": (
        lambda out: train(out, model=peft_model()),
        ValueError,
        ("`model` already is a `PeftModel`", "drop `peft_config`"),
    ),
    "peft_config is a dict": (
        with_trainer(peft_config={"r": 4}),
        TypeError,
        ("`peft_config`", "dict", "LoraConfig"),
    ),
    "frozen adapter": (
        with_model(lambda: peft_model(inference_mode=True)),
        UnsupportedModelError,
        ("default", "frozen", "is_trainable=True"),
    ),
    "two active adapters": (with_model(two_active), UnsupportedModelError, ("2 active adapters", "Allowed: one")),
    "merged": (with_model(merged), UnsupportedModelError, ("merged adapter", "unmerge_adapter()")),
    "DoRA": (with_model(lambda: peft_model(use_dora=True)), UnsupportedModelError, ("DoraLinear", "use_dora")),
    "DoRA by peft_config": (
        with_trainer(peft_config=tiny.lora(use_dora=True)),
        UnsupportedModelError,
        ("DoraLinear", "full rank", "use_dora"),
    ),
    "PiSSA on a ready model": (
        with_model(lambda: peft_model(init_lora_weights="pissa")),
        UnsupportedModelError,
        ("init_lora_weights='pissa'", "already changed the base weights", "Pass the plain model", "peft_config"),
    ),
    "a start that needs data": (
        with_trainer(peft_config=tiny.lora(init_lora_weights="eva")),
        UnsupportedModelError,
        ("init_lora_weights='eva'", "needs data", "Allowed: True", '"pissa"'),
    ),
    "bfloat16 base that is to hold the residual": (
        with_model(lambda: peft_model(model=tiny.roberta().bfloat16()), residual_storage="base"),
        UnsupportedModelError,
        ("torch.bfloat16", "round away", 'residual_storage="adapter"', "dtype=torch.float32"),
    ),
    "tied weights that are to hold the residual": (
        with_model(tied, residual_storage="base"),
        UnsupportedModelError,
        ("lm_head", "embed_tokens", "act in all of them", 'residual_storage="adapter"', "untie"),
    ),
    "an embedding whose A is frozen": (
        with_trainer(peft_config=tiny.lora(target_modules=["query", "word_embeddings"]), aggregator="ffa"),
        ValueError,
        ("word_embeddings", "`A = 0`", "exclude_modules", "fedex"),
    ),
    "running statistics": (with_model(with_batch_norm), UnsupportedModelError, ("norm", "LayerNorm")),
    "NaN in the adapter": (with_model(with_nan("lora_A")), ValueError, ("NaN", "lora_A")),
    "no model": (with_trainer(model=None, peft_config=None), ValueError, ("needs `model`", "Build it first")),
    "model_init": (
        with_trainer(model_init=tiny.roberta, model=None),
        ValueError,
        ("does not take `model_init`", "Build it first"),
    ),
    "model is a name": (
        with_trainer(model="org/model"),
        UnloadableRoundError,
        ("org/model", "no run that can be continued", "from_pretrained"),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(tmp_path, steps, case):
    refused(MODELS[case][0], tmp_path, *MODELS[case][1:], steps)


@pytest.mark.parametrize("aggregator", ["fedex", "fedit", "ffa"])
def test_a_bfloat16_base_is_fine(tmp_path, steps, aggregator):
    train(tmp_path, model=tiny.roberta().bfloat16(), aggregator=aggregator, num_rounds=1)
    assert steps


def test_a_refusal_leaves_the_model_as_it_was(tmp_path):
    model = tiny.roberta()
    names = set(model.state_dict())
    config = IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
    with pytest.raises(UnsupportedModelError):
        train(tmp_path, model=model, trainer_kwargs={"peft_config": config})
    assert set(model.state_dict()) == names


# ---- Clients ----


def clients(**changed: Any) -> Callable[[], dict[str, Any]]:
    return lambda: tiny.clients_of([8, 8]) | changed


def renamed(**names: str) -> Dataset:
    return tiny.classification_data(6).rename_columns(names)


def with_label_names(*names: str) -> Dataset:
    return tiny.classification_data(8).cast_column("labels", ClassLabel(names=list(names)))


def streams(sizes: dict[str, int]) -> dict[str, Any]:
    return {name: tiny.classification_data(size).to_iterable_dataset() for name, size in sizes.items()}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, size: int) -> None:
        self.rows = list(tiny.classification_data(size)) if size else []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


COLUMNS = ("`odd`", "'input_ids', 'labels'", "same columns")
UNUSABLE = ("`odd`", "Allowed")
REFUSED = (TypeError, ValueError)

CLIENTS: dict[str, tuple[Make, type[Exception], tuple[str, ...]]] = {
    "nothing": (with_clients(lambda: None), ValueError, ("`train_dataset` is missing", "{client_id: dataset}")),
    "no clients": (with_clients(dict), ValueError, ("holds no clients", "at least one")),
    "an empty client": (
        with_clients(clients(odd=tiny.classification_data(8).select([]))),
        ValueError,
        ("`odd` is empty", "Remove the client"),
    ),
    "an empty stream": (
        with_clients(lambda: {"odd": Stream(0), "client-0": Stream(8)}, max_steps=2),
        ValueError,
        ("`odd` is empty", "Remove the client"),
    ),
    "no dataset": (with_clients(clients(odd=None)), ValueError, ("`odd` is `None`", "Remove the client")),
    "a missing column": (
        with_clients(clients(odd=tiny.classification_data(6).remove_columns("labels"))),
        ValueError,
        ("['input_ids']", *COLUMNS),
    ),
    "another column": (
        with_clients(clients(odd=renamed(labels="label"))),
        ValueError,
        ("'label'", "rename or remove", *COLUMNS),
    ),
    "one column more": (
        with_clients(clients(odd=tiny.classification_data(6).add_column("weight", [1.0] * 6))),
        ValueError,
        ("'weight'", *COLUMNS),
    ),
    "another column in a list of rows": (
        with_clients(lambda: {"a": [{"input_ids": [3] * 5, "labels": 0}] * 4, "odd": [{"input_ids": [3] * 5}] * 4}),
        ValueError,
        COLUMNS,
    ),
    "another column in a stream": (
        with_clients(lambda: streams({"a": 8}) | {"odd": renamed(labels="label").to_iterable_dataset()}, max_steps=2),
        ValueError,
        ("'label'", *COLUMNS),
    ),
    "a number as id": (
        with_clients(lambda: {0: tiny.classification_data(6)}),
        TypeError,
        ("client id 0", "`int`", "Allowed: strings"),
    ),
    "a split": (
        with_clients(lambda: DatasetDict(train=tiny.classification_data(8), test=tiny.classification_data(4))),
        ValueError,
        ("['train', 'test']", "dataset['train']", "client ids"),
    ),
    "a split of streams": (
        with_clients(lambda: IterableDatasetDict(streams({"train": 8, "test": 4})), max_steps=2),
        ValueError,
        ("['train', 'test']", "dataset['train']", "client ids"),
    ),
    "a list of datasets": (
        with_clients(lambda: list(tiny.clients_of([8, 8, 8]).values())),
        TypeError,
        ("list", "{client_id: dataset}"),
    ),
    "a stream to partition": (
        with_clients(lambda: tiny.classification_data(8).to_iterable_dataset(), max_steps=2),
        TypeError,
        ("IterableDataset", "{client_id: dataset}"),
    ),
    "a stream without max_steps": (
        with_clients(lambda: streams({"client-0": 8})),
        ValueError,
        ("`client-0` has no length", "Set `max_steps`", "per client and round"),
    ),
    **{
        f"{name} as dataset": (
            with_clients(lambda made=made: {"odd": made}, **kwargs),
            REFUSED,
            (type(made).__name__, *UNUSABLE),
        )
        for name, made, kwargs in (
            ("a path", "data/odd.jsonl", {}),
            ("a frame", pd.DataFrame({"input_ids": [[3, 4]] * 5, "labels": [0] * 5}), {}),
            ("columns", {"input_ids": [[3, 4]] * 5, "labels": [0] * 5}, {}),
            ("splits", DatasetDict(train=tiny.classification_data(8)), {}),
            ("a number", 5, {"max_steps": 2}),
        )
    },
    "labels of other names": (
        with_clients(
            lambda: {"a": with_label_names("no", "maybe", "yes"), "odd": with_label_names("yes", "maybe", "no")}
        ),
        ValueError,
        ("`odd`", "labels", "'yes'"),
    ),
    "labels of another type": (
        with_clients(clients(odd=tiny.classification_data(8).cast_column("labels", Value("float32")))),
        ValueError,
        ("`odd`", "labels", "float32", "int64"),
    ),
    "fewer than a batch, dropped": (
        with_args(sizes=(8, 3), dataloader_drop_last=True),
        ValueError,
        ("`client-1` has 3 examples", "one batch of 4", "dataloader_drop_last=True", "lower the batch size"),
    ),
    "another number of clients": (
        with_args(num_clients=4),
        ValueError,
        ("num_clients=4", "3 clients"),
    ),
    "partition_by with a dictionary": (
        with_args(partition_by="labels"),
        ValueError,
        ("partition_by='labels'", "dictionary"),
    ),
    "dirichlet_alpha with a dictionary": (
        with_args(dirichlet_alpha=0.5),
        ValueError,
        ("dirichlet_alpha=0.5", "dictionary"),
    ),
    "unknown partition column": (
        partitioned(partition_by="author"),
        ValueError,
        ("no column `author`", "`input_ids`, `labels`"),
    ),
    "unknown label column": (
        partitioned(partition_by="author", dirichlet_alpha=0.5),
        ValueError,
        ("no column `author`", "`input_ids`, `labels`"),
    ),
    "alpha of zero": (partitioned(dirichlet_alpha=0.0), ValueError, ("`dirichlet_alpha` is 0.0", "above 0")),
    "more clients than examples": (
        with_clients(lambda: tiny.classification_data(4), num_clients=5),
        ValueError,
        ("4 examples", "`num_clients`=5", "Lower"),
    ),
    "nothing to partition": (
        with_clients(lambda: tiny.classification_data(4).select([])),
        ValueError,
        ("`dataset` is empty",),
    ),
}


@pytest.mark.parametrize("case", CLIENTS)
def test_clients(tmp_path, steps, case):
    refused(CLIENTS[case][0], tmp_path, *CLIENTS[case][1:], steps)


# ---- Arguments ----


FRACTION = ("out of range", "above 0 and at most 1")
ARGUMENTS: dict[str, tuple[Make, type[Exception], tuple[str, ...]]] = {
    **{
        f"num_rounds={value!r}": (
            with_args(num_rounds=value),
            ValueError,
            (f"`num_rounds={value!r}`", "integer of at least 1"),
        )
        for value in (0, -1, 2.5, "3")
    },
    **{
        f"client_fraction={value!r}": (
            with_args(client_fraction=value),
            ValueError,
            (f"`client_fraction={value!r}`", *FRACTION),
        )
        for value in (0, 0.0, -0.1, 1.5, float("nan"))
    },
    **{
        f"{name}={value}": (
            with_args(**{name: value}),
            ValueError,
            (f"`{name}={value}`", "integer of at least 1"),
        )
        for name, value in (("num_clients", 0), ("num_clients", -3), ("min_clients", 0), ("min_clients", -1))
    },
    **{
        f"{name}={value!r}": (with_args(**{name: value}), ValueError, (f"`{name}={value!r}`", "Allowed", *allowed))
        for name, value, allowed in (
            ("client_weighting", "size", ("'num_examples'", "'uniform'")),
            ("client_optimizer_state", True, ("'reset'", "'keep'")),
            ("lr_schedule", "cosine", ("'round'", "'run'")),
            ("residual_storage", "disk", ("'auto'", "'base'", "'adapter'")),
            ("client_errors", "ignore", ("'raise'", "'skip'")),
        )
    },
    "min_clients above num_clients": (
        partitioned(min_clients=4, num_clients=3),
        ValueError,
        ("`min_clients=4`", "`num_clients=3`", "Lower"),
    ),
    "min_clients above the dictionary": (
        with_args(min_clients=4),
        ValueError,
        ("`min_clients=4`", "only 3 of the 3 clients", "Lower `min_clients`"),
    ),
    "min_clients above the sampled": (
        with_args(min_clients=3, client_fraction=0.67),
        ValueError,
        ("`min_clients=3`", "only 2 of the 3 clients", "client_fraction=0.67", "raise `client_fraction`"),
    ),
    "min_clients above the natural partition": (
        partitioned(partition_by="labels", min_clients=4),
        ValueError,
        ("`min_clients=4`", "only 3 of the 3 clients"),
    ),
    "nothing to train": (with_args(num_train_epochs=0), ValueError, ("`num_train_epochs=0`", "trains nothing")),
    "negative epochs": (with_args(num_train_epochs=-1.0), ValueError, ("`num_train_epochs=-1.0`", "trains nothing")),
    "unknown aggregator": (
        with_args(aggregator="fedavg"),
        ValueError,
        ("`aggregator='fedavg'` is unknown", "'fedex', 'fedit', 'ffa'"),
    ),
    "unknown aggregator in the constructor": (
        with_trainer(aggregator="fedavg"),
        ValueError,
        ("`aggregator='fedavg'` is unknown", "'fedex', 'fedit', 'ffa'"),
    ),
    "the class of an aggregator": (
        with_trainer(aggregator=FedExAggregator),
        TypeError,
        ("`aggregator`", "Allowed: an `Aggregator`"),
    ),
    "unknown aggregator_kwargs": (
        with_args(aggregator_kwargs={"rank": 8}),
        TypeError,
        ("{'rank': 8}", "`fedex`", "unexpected keyword argument 'rank'"),
    ),
    "aggregator_kwargs of another aggregator": (
        with_args(aggregator="fedit", aggregator_kwargs={"residual_rank": 8}),
        TypeError,
        ("{'residual_rank': 8}", "`fedit`"),
    ),
    "aggregator_kwargs and an aggregator": (
        lambda out: train(
            out, aggregator_kwargs={"residual_rank": 8}, trainer_kwargs={"aggregator": FedExAggregator()}
        ),
        ValueError,
        ("aggregator_kwargs", "residual_rank"),
    ),
    "aggregator_kwargs and an aggregator's name": (
        lambda out: train(out, aggregator_kwargs={"residual_rank": 8}, trainer_kwargs={"aggregator": "fedit"}),
        (ValueError, TypeError),
        ("aggregator_kwargs", "residual_rank"),
    ),
    **{
        f"{name}={value!r} of the ledger": (with_args(**{name: value}), ValueError, (f"`{name}={value!r}`", *allowed))
        for name, value, allowed in (
            ("residual_rank", 0, ("integer of at least 1",)),
            ("residual_rank", 2.5, ("integer of at least 1",)),
            ("residual_tolerance", 0.0, ("above 0 and below 1", "share of the energy")),
            ("residual_tolerance", 1.0, ("above 0 and below 1", "share of the energy")),
        )
    },
    **{
        f"residual_rank={value!r}": (
            with_args(aggregator_kwargs={"residual_rank": value}),
            (ValueError, TypeError),
            ("residual_rank",),
        )
        for value in (0, -1, 2.5, "8")
    },
    "aggregator_kwargs that are no JSON": (
        with_args(aggregator_kwargs="residual_rank=8"),
        (ValueError, TypeError),
        ("aggregator_kwargs", "residual_rank=8", "JSON"),
    ),
    "a schedule that waits for metrics": (
        with_args(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"),
        ValueError,
        ("`lr_scheduler_type='reduce_lr_on_plateau'`", "function of the step"),
    ),
    "format of rounds": (with_args(hub_round_format="gguf"), ValueError, ("`hub_round_format='gguf'`", "'merged'")),
    "negative retries": (with_args(hub_retries=-1), ValueError, ("`hub_retries=-1`", "at least 0")),
    "auto_find_batch_size": (with_args(auto_find_batch_size=True), ValueError, ("`auto_find_batch_size`", "off")),
    "bf16_full_eval": (with_args(bf16_full_eval=True), ValueError, ("`bf16_full_eval`", "round away", "off")),
    "fp16_full_eval": (with_args(fp16_full_eval=True), ValueError, ("`fp16_full_eval`", "round away", "off")),
    "deepspeed": (
        with_args(deepspeed={"zero_optimization": {"stage": 2}}),
        (ValueError, ImportError),
        ("eepspeed",),
    ),
    "fsdp": (with_args(fsdp="full_shard"), ValueError, ("fsdp",)),
    "plain arguments": (
        lambda out: FederatedTrainer(tiny.roberta(), TrainingArguments(str(out), use_cpu=True)),
        TypeError,
        ("`TrainingArguments`", "Allowed: `FederatedTrainingArguments`", "from_training_args(args"),
    ),
    "evaluation without data": (
        lambda out: train(out, eval_strategy="epoch", trainer_kwargs={"eval_dataset": None}),
        ValueError,
        ("eval_strategy", "eval_dataset"),
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(tmp_path, steps, case):
    refused(ARGUMENTS[case][0], tmp_path, *ARGUMENTS[case][1:], steps)


# ---- Trainers, optimizers, overrides ----


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def scheduler(model: torch.nn.Module) -> Any:
    return torch.optim.lr_scheduler.ConstantLR(optimizer(model))


def plain_trainer(out: Path, model: Any = None, **kwargs: Any) -> Trainer:
    arguments = TrainingArguments(str(out), use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    data = {"train_dataset": tiny.classification_data(30)}
    return Trainer(peft_model() if model is None else model, arguments, **(data | kwargs))


def adopting(**kwargs: Any) -> Make:
    def make(out: Path) -> None:
        model = peft_model()
        made = {name: value(model) if callable(value) else value for name, value in kwargs.items()}
        FederatedTrainer.from_trainer(plain_trainer(out, model, **made), num_rounds=1).train()

    return make


def overriding(**methods: Any) -> Make:
    def make(out: Path) -> None:
        cls = type("MyFederatedTrainer", (FederatedTrainer,), methods)
        cls(tiny.roberta(), tiny.arguments(out), train_dataset=tiny.clients_of([8]), peft_config=tiny.lora()).train()

    return make


def with_client_kwargs(**kwargs: Any) -> Make:
    def make(out: Path) -> None:
        model = peft_model()
        made = {name: value(model) if callable(value) else value for name, value in kwargs.items()}
        train(out, model=model, trainer_kwargs={"peft_config": None, "client_trainer_kwargs": made})

    return make


PREBUILT = ("Every local fit builds its own", "optimizer_cls_and_kwargs=(cls, kwargs)")
CLIENT_METHODS = (
    "compute_loss",
    "create_optimizer",
    "create_scheduler",
    "create_optimizer_and_scheduler",
    "get_train_dataloader",
    "get_eval_dataloader",
    "prediction_step",
    "training_step",
    "get_batch_samples",
    "get_decay_parameter_names",
    "_get_train_sampler",
    "_prepare_inputs",
)

TRAINERS: dict[str, tuple[Make, type[Exception], tuple[str, ...]]] = {
    "a pre-built optimizer": (
        lambda out: (
            lambda model: train(
                out, model=model, trainer_kwargs={"peft_config": None, "optimizers": (optimizer(model), None)}
            )
        )(peft_model()),
        ValueError,
        ("`optimizers` holds SGD", *PREBUILT),
    ),
    "a pre-built schedule": (
        lambda out: (
            lambda model: train(
                out, model=model, trainer_kwargs={"peft_config": None, "optimizers": (None, scheduler(model))}
            )
        )(peft_model()),
        ValueError,
        ("`optimizers` holds ConstantLR", *PREBUILT),
    ),
    "a pre-built optimizer of an adopted trainer": (
        adopting(optimizers=lambda model: (optimizer(model), None)),
        ValueError,
        ("`optimizers` holds SGD", *PREBUILT),
    ),
    "a pre-built optimizer for the clients": (
        with_client_kwargs(optimizers=lambda model: (optimizer(model), None)),
        ValueError,
        ("SGD", *PREBUILT),
    ),
    "another model for the clients": (
        with_client_kwargs(model=lambda model: tiny.roberta(seed=1)),
        (ValueError, TypeError),
        ("client_trainer_kwargs", "model"),
    ),
    "data for the clients": (
        with_client_kwargs(train_dataset=tiny.classification_data(8)),
        (ValueError, TypeError),
        ("train_dataset",),
    ),
    "callbacks for the clients": (
        with_client_kwargs(callbacks=[]),
        (ValueError, TypeError),
        ("callbacks",),
    ),
    "unknown arguments for the clients": (
        with_client_kwargs(max_seq_length=12),
        TypeError,
        ("max_seq_length",),
    ),
    "a client's class that is none": (
        with_trainer(client_trainer_cls=torch.nn.Linear),
        TypeError,
        ("torch.nn.modules.linear.Linear", "Allowed: `Trainer`"),
    ),
    "a trainer instead of its class": (
        lambda out: train(out, trainer_kwargs={"client_trainer_cls": plain_trainer(out)}),
        TypeError,
        ("client_trainer_cls", "Allowed: `Trainer`"),
    ),
    "federated clients": (
        with_trainer(client_trainer_cls=FederatedTrainer),
        TypeError,
        ("itself federated", "Allowed"),
    ),
    "an adopted trainer without data": (adopting(train_dataset=None), ValueError, ("`train_dataset` is missing",)),
    "an adopted trainer without LoRA": (
        lambda out: FederatedTrainer.from_trainer(plain_trainer(out, tiny.roberta())),
        UnsupportedModelError,
        ("without LoRA", "peft_config=LoraConfig("),
    ),
    "args and fields for an adopted trainer": (
        lambda out: FederatedTrainer.from_trainer(plain_trainer(out), args=tiny.arguments(out), num_rounds=3),
        (ValueError, TypeError),
        ("num_rounds",),
    ),
    "an adopted federation": (
        lambda out: FederatedTrainer.from_trainer(tiny.federation(out)),
        TypeError,
        ("federated",),
    ),
    **{
        f"overriding {name}": (
            overriding(**{name: lambda self, *args, **kwargs: None}),
            ValueError,
            (f"`MyFederatedTrainer` overrides `{name}`", "`Trainer` subclass", "client_trainer_cls"),
        )
        for name in CLIENT_METHODS
    },
}


@pytest.mark.parametrize("case", TRAINERS)
def test_trainers(tmp_path, steps, case):
    refused(TRAINERS[case][0], tmp_path, *TRAINERS[case][1:], steps)


def test_adopting_a_trainer_that_has_trained(tmp_path, steps):
    trainer = plain_trainer(tmp_path)
    trainer.train()
    steps.clear()
    make: Make = lambda out: FederatedTrainer.from_trainer(trainer, num_rounds=1).train()  # noqa: E731
    refused(make, tmp_path, ValueError, ("Optimizer", "state", "build a new one first"), steps)


# ---- An output folder that holds another run ----


@pytest.mark.parametrize("resume", [None, False])
def test_an_output_folder_that_holds_another_run(tmp_path, steps, resume):
    tiny.federation(tmp_path, save_strategy="epoch").train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    steps.clear()
    make: Make = lambda out: tiny.federation(out, save_strategy="epoch").train(resume_from_checkpoint=resume)  # noqa: E731
    says = (str(tmp_path), "2 checkpoints up to `checkpoint-16`", "train(resume_from_checkpoint=True)", "another")
    refused(make, tmp_path, ValueError, says, steps)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_folder_that_holds_a_plain_trainers_run(tmp_path, steps):
    trainer = plain_trainer(tmp_path, tiny.roberta())
    trainer.args.save_strategy = "steps"
    trainer.train()
    assert (tmp_path / "checkpoint-1").is_dir()
    steps.clear()
    refused(train, tmp_path, ValueError, ("holds another run", "checkpoint-1", "another"), steps)
    make: Make = lambda out: tiny.federation(out).train(resume_from_checkpoint=True)  # noqa: E731
    refused(make, tmp_path, CheckpointMismatchError, ("not a round checkpoint", "Pass a `checkpoint-N`"), steps)


def test_an_output_folder_that_is_a_file(tmp_path, steps):
    (tmp_path / "out").write_text("")
    refused(train, tmp_path / "out", OSError, (), steps)


def test_other_content_of_the_output_folder_is_no_run(tmp_path, steps):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-final").mkdir()
    train(tmp_path, num_rounds=1)
    assert steps
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_default_arguments_are_federated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = FederatedTrainer(tiny.roberta(), train_dataset=tiny.clients_of([8]), peft_config=tiny.lora())
    assert isinstance(trainer.args, FederatedTrainingArguments)
