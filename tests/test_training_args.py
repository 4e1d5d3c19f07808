"""`FederatedTrainingArguments`: as flags, from YAML and dictionaries, from other arguments, and back."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import SFTConfig

from fedex_hf import FederatedTrainingArguments, get_aggregator


# As in the design: the fields that are ours, with their defaults.
OURS = {
    "num_rounds": 5,
    "num_clients": None,
    "client_fraction": 1.0,
    "min_clients": 1,
    "client_errors": "raise",
    "aggregator": "fedex",
    "aggregator_kwargs": None,
    "client_weighting": "num_examples",
    "client_ranks": None,
    "residual_storage": "auto",
    "residual_rank": None,
    "residual_tolerance": None,
    "log_layer_exactness": False,
    "partition_by": None,
    "dirichlet_alpha": None,
    "client_optimizer_state": "reset",
    "client_state_dir": None,
    "lr_schedule": "round",
    "parallel_clients": 1,
    "hub_round_format": "full",
    "hub_retries": 5,
    "hub_max_shard_size": None,
}
# Fields of `TrainingArguments` with another default here.
CHANGED = {
    "num_train_epochs": 1.0,
    "save_strategy": SaveStrategy.EPOCH,
    "restore_callback_states_from_checkpoint": True,
}
# A value other than the default for each, as a flag and as it must arrive.
FLAGS: dict[str, tuple[list[str], Any]] = {
    "num_rounds": (["3"], 3),
    "num_clients": (["7"], 7),
    "client_fraction": (["0.5"], 0.5),
    "min_clients": (["2"], 2),
    "client_errors": (["skip"], "skip"),
    "aggregator": (["fedit"], "fedit"),
    "aggregator_kwargs": (['{"residual_rank": 8}'], {"residual_rank": 8}),
    "client_weighting": (["uniform"], "uniform"),
    "client_ranks": (['{"north": 2}'], '{"north": 2}'),  # parsed when asked for
    "residual_storage": (["adapter"], "adapter"),
    "residual_rank": (["16"], 16),
    "residual_tolerance": (["0.01"], 0.01),
    "log_layer_exactness": ([], True),
    "partition_by": (["author"], "author"),
    "dirichlet_alpha": (["0.1"], 0.1),
    "client_optimizer_state": (["keep"], "keep"),
    "client_state_dir": (["states", "--client_optimizer_state", "keep"], "states"),
    "lr_schedule": (["run"], "run"),
    "parallel_clients": (["4"], 4),
    "hub_round_format": (["lora"], "lora"),
    "hub_retries": (["2"], 2),
    "hub_max_shard_size": (["5GB"], "5GB"),
}
COMMON = ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none"]


def parse(*flags: str) -> FederatedTrainingArguments:
    (args,) = HfArgumentParser(FederatedTrainingArguments).parse_args_into_dataclasses([*COMMON, *flags])
    return args


def own_fields() -> set[str]:
    return {f.name for f in dataclasses.fields(FederatedTrainingArguments)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }


# ---- Defaults ----


def test_defaults():
    args = FederatedTrainingArguments(output_dir="out")
    assert {name: getattr(args, name) for name in OURS} == OURS
    assert own_fields() == set(OURS)
    assert {name: getattr(args, name) for name in CHANGED} == CHANGED


def test_every_other_default_is_that_of_training_arguments():
    ours, plain = FederatedTrainingArguments(output_dir="out"), TrainingArguments(output_dir="out")
    for each in dataclasses.fields(TrainingArguments):
        if each.init and each.name not in {*CHANGED, "logging_dir", "accelerator_config"}:
            assert getattr(ours, each.name) == getattr(plain, each.name), each.name


def test_a_subclass_can_add_fields():
    @dataclasses.dataclass
    class MyArguments(FederatedTrainingArguments):
        extra: int = 3

    args = MyArguments(output_dir="out", num_rounds=2)
    assert (args.extra, args.num_rounds, args.save_strategy) == (3, 2, SaveStrategy.EPOCH)


# ---- Flags, files, dictionaries ----


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_for_each_field(name):
    values, expected = FLAGS[name]
    assert getattr(parse(f"--{name}", *values), name) == expected
    assert expected != OURS[name]


def test_a_test_for_each_flag():
    assert FLAGS.keys() == OURS.keys()


def test_all_flags_at_once():
    chosen = {name: value for name, value in FLAGS.items() if name != "aggregator"}
    args = parse(*(word for name, (values, _) in chosen.items() for word in (f"--{name}", *values)))
    assert {name: getattr(args, name) for name in chosen} == {name: value for name, (_, value) in chosen.items()}
    aggregator = get_aggregator(args.aggregator, **args.aggregator_kwargs)
    assert (aggregator.name, aggregator.residual_rank) == ("fedex", 8)


def test_client_ranks_as_a_flag_and_as_a_dictionary():
    given = FederatedTrainingArguments("out", client_ranks={"north": 2})
    for args in (parse("--client_ranks", '{"north": 2}'), given):
        assert args.parsed_client_ranks == {"north": 2}
    assert parse().parsed_client_ranks == {}


def test_flags_of_trainer_keep_their_meaning():
    args = parse("--learning_rate", "0.01", "--eval_strategy", "epoch", "--max_steps", "3", "--num_train_epochs", "2")
    assert (args.learning_rate, args.max_steps, args.num_train_epochs) == (0.01, 3, 2.0)
    assert args.eval_strategy == IntervalStrategy.EPOCH


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_rounds", "three"],
        ["--client_weighting", "size"],
        ["--lr_schedule", "cosine"],
        ["--client_errors", "ignore"],
        ["--client_optimizer_state", "drop"],
        ["--residual_storage", "disk"],
        ["--number_of_rounds", "3"],
    ],
)
def test_flags_that_do_not_parse(flags, capsys):
    with pytest.raises((SystemExit, ValueError)) as raised:
        parse(*flags)
    told = capsys.readouterr().err + str(raised.value)
    assert flags[0].lstrip("-") in told
    assert flags[1] in told


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_rounds", "0"], "`num_rounds=0`"),
        (["--client_fraction", "1.5"], "`client_fraction=1.5`"),
        (["--aggregator", "fedavg"], "'fedex', 'fedit', 'ffa'"),
        (["--aggregator_kwargs", '{"rank": 8}'], "{'rank': 8}"),
        (["--residual_rank", "0"], "`residual_rank=0`"),
        (["--residual_tolerance", "1.0"], "`residual_tolerance=1.0`"),
        (["--residual_tolerance", "-0.1"], "`residual_tolerance=-0.1`"),
    ],
)
def test_flags_that_are_out_of_range(flags, says):
    with pytest.raises((ValueError, TypeError)) as raised:
        parse(*flags)
    assert says in str(raised.value)


def test_help_of_each_field(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    told = " ".join(capsys.readouterr().out.split())
    for name in {*OURS, *CHANGED}:
        text = FederatedTrainingArguments.__dataclass_fields__[name].metadata["help"]
        assert f"--{name} " in told
        assert len(text) > 20
        assert " ".join(text.split()) in told, name
    for choices in ("{raise,skip}", "{num_examples,uniform}", "{reset,keep}", "{round,run}", "{auto,base,adapter}"):
        assert choices in told


def test_the_docstring_explains_each_field():
    documentation = FederatedTrainingArguments.__doc__
    for name in OURS:
        assert f"{name} (`" in documentation, name


SETTINGS = {
    "output_dir": "out",
    "num_rounds": 3,
    "client_fraction": 0.5,
    "aggregator_kwargs": {"residual_rank": 8},
    "learning_rate": 0.001,
    "client_optimizer_state": "keep",
    "eval_strategy": "epoch",
    "report_to": "none",
}


def check_settings(args: FederatedTrainingArguments) -> None:
    assert {name: getattr(args, name) for name in list(SETTINGS)[:-2]} == {
        name: SETTINGS[name] for name in list(SETTINGS)[:-2]
    }
    assert args.eval_strategy == IntervalStrategy.EPOCH
    assert args.save_strategy == SaveStrategy.EPOCH


def test_from_yaml_json_and_a_dictionary(tmp_path):
    parser = HfArgumentParser(FederatedTrainingArguments)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS))
    for (args,) in (
        parser.parse_yaml_file(str(tmp_path / "run.yaml")),
        parser.parse_json_file(str(tmp_path / "run.json")),
        parser.parse_dict(SETTINGS),
    ):
        check_settings(args)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="num_round"):
        HfArgumentParser(FederatedTrainingArguments).parse_dict(SETTINGS | {"num_round": 3})


# ---- From other arguments ----


def test_from_training_args_keeps_every_field(tmp_path):
    plain = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=3e-3,
        num_train_epochs=2,
        per_device_train_batch_size=3,
        save_strategy="steps",
        save_steps=7,
        eval_strategy="steps",
        eval_steps=7,
        load_best_model_at_end=True,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        seed=11,
        report_to=[],
        use_cpu=True,
    )
    args = FederatedTrainingArguments.from_training_args(plain, num_rounds=3)
    for each in dataclasses.fields(TrainingArguments):
        if each.init:
            assert getattr(args, each.name) == getattr(plain, each.name), each.name
    assert args.num_rounds == 3
    assert {name: getattr(args, name) for name in OURS if name != "num_rounds"} == {
        name: value for name, value in OURS.items() if name != "num_rounds"
    }


def test_keywords_win_over_the_given_arguments():
    plain = TrainingArguments(output_dir="out", learning_rate=3e-3, num_train_epochs=3)
    args = FederatedTrainingArguments.from_training_args(plain, learning_rate=1e-2, num_train_epochs=1, num_rounds=2)
    assert (args.learning_rate, args.num_train_epochs, args.num_rounds) == (1e-2, 1, 2)


def test_the_given_arguments_are_left_as_they_are():
    plain = TrainingArguments(output_dir="out")
    before = plain.to_dict()
    FederatedTrainingArguments.from_training_args(plain, num_rounds=2, learning_rate=1.0)
    assert plain.to_dict() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: SFTConfig(max_length=12, packing=False, **kwargs),
        lambda **kwargs: Seq2SeqTrainingArguments(predict_with_generate=True, generation_max_length=5, **kwargs),
        lambda **kwargs: FederatedTrainingArguments(num_rounds=9, aggregator="ffa", **kwargs),
    ],
    ids=["SFTConfig", "Seq2SeqTrainingArguments", "FederatedTrainingArguments"],
)
def test_from_arguments_of_a_subclass(make):
    given = make(output_dir="out", learning_rate=3e-3, logging_steps=7, use_cpu=True, bf16=False, report_to=[])
    args = FederatedTrainingArguments.from_training_args(given, min_clients=2)
    assert type(args) is FederatedTrainingArguments
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    if isinstance(given, FederatedTrainingArguments):
        names |= set(OURS) - {"min_clients"}
    for name in names:
        assert getattr(args, name) == getattr(given, name), name
    assert args.min_clients == 2


def test_a_class_that_joins_ours_with_another_keeps_both():
    @dataclasses.dataclass
    class FederatedSFTConfig(FederatedTrainingArguments, SFTConfig):
        pass

    given = SFTConfig(output_dir="out", max_length=12, use_cpu=True, bf16=False, report_to=[])
    args = FederatedSFTConfig.from_training_args(given, num_rounds=2)
    assert (args.max_length, args.num_rounds) == (12, 2)


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="num_round"):
        FederatedTrainingArguments.from_training_args(TrainingArguments(output_dir="out"), num_round=3)


# ---- And back ----


def test_round_trip_of_to_dict_and_to_json_string():
    args = HfArgumentParser(FederatedTrainingArguments).parse_dict(SETTINGS)[0]
    for settings in (args.to_dict(), json.loads(args.to_json_string())):
        names = {f.name for f in dataclasses.fields(FederatedTrainingArguments) if f.init}
        again = FederatedTrainingArguments(**{name: value for name, value in settings.items() if name in names})
        check_settings(again)
        assert again.to_dict() == args.to_dict()


def test_to_sanitized_dict_is_what_reporters_take():
    sanitized = FederatedTrainingArguments(
        output_dir="out", aggregator_kwargs={"residual_rank": 2}
    ).to_sanitized_dict()
    assert set(OURS) <= set(sanitized)
    assert all(isinstance(value, (bool, int, float, str, torch.Tensor)) for value in sanitized.values())


@pytest.mark.parametrize("copy", [lambda args: pickle.loads(pickle.dumps(args)), dataclasses.replace])
def test_copies(copy):
    args = parse("--num_rounds", "3", "--aggregator_kwargs", '{"residual_rank": 8}')
    assert copy(args).to_dict() == args.to_dict()


def test_saved_with_a_checkpoint(tmp_path: Path):
    args = parse("--num_rounds", "3")
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).num_rounds == 3
