"""`FederatedTrainer` as a `Trainer`: rounds, clients, evaluation, logs, checkpoints and what it saves."""

import inspect
import logging
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import DatasetDict
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from programs import untraced
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    LlamaForCausalLM,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fedex_hf import (
    FederatedCallback,
    FederatedTrainer,
    FederatedTrainingArguments,
    NonFiniteUpdateError,
    partition_dataset,
)


SIZES = (12, 7, 9)  # three, two and three steps of four examples
STEPS = 8
HEAD = "base_model.model.classifier.modules_to_save.default.out_proj.weight"


class Rounds(FederatedCallback):
    """What each round started from, received and ended with."""

    def __init__(self):
        self.clients, self.updates, self.ends, self.head = {}, {}, {}, {}

    def on_round_begin(self, args, state, control, round, clients, **kwargs):
        self.clients[round] = clients

    def on_aggregate(self, args, state, control, round, updates, update, **kwargs):
        self.updates[round] = updates
        self.head[round] = update.tensors[HEAD]

    def on_round_end(self, args, state, control, round, metrics, trainer=None, **kwargs):
        self.ends[round] = tiny.trained(trainer.model)


def run(
    output_dir, sizes=SIZES, *, cls=FederatedTrainer, data=None, eval_data=None, callbacks=(), given=None, **kwargs
):
    """Train a federation from one and the same model; returns the trainer and what its rounds were."""
    trainer, rounds = built(
        output_dir, sizes, cls=cls, data=data, eval_data=eval_data, callbacks=callbacks, given=given, **kwargs
    )
    trainer.train()
    return trainer, rounds


def built(
    output_dir, sizes=SIZES, *, cls=FederatedTrainer, data=None, eval_data=None, callbacks=(), given=None, **kwargs
):
    rounds = Rounds()
    trainer = cls(
        model=tiny.peft_roberta(),
        args=tiny.arguments(output_dir, **kwargs),
        train_dataset=tiny.clients_of(list(sizes)) if data is None else data,
        eval_dataset=tiny.classification_data(20, seed=1) if eval_data is None else eval_data,
        callbacks=[rounds, *callbacks],
        **(given or {}),
    )
    return trainer, rounds


def entries(trainer, key):
    return [entry for entry in trainer.state.log_history if key in entry]


def without_times(history):
    timed = ("runtime", "per_second", "round_seconds")
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in history]


def ledger_of(trainer):
    factors = trainer.federation.ledger.factors.items()
    tensors = {f"{name}.A": delta.A for name, delta in factors} | {f"{name}.B": delta.B for name, delta in factors}
    return tensors | dict(trainer.federation.ledger.matrices)


def test_the_constructor_takes_trainers_arguments_in_trainers_order():
    expected = list(inspect.signature(Trainer.__init__).parameters)
    assert list(inspect.signature(FederatedTrainer.__init__).parameters)[: len(expected)] == expected


# ---- Reproducibility ----


def test_two_runs_with_one_seed_give_the_same_bytes(tmp_path):
    kwargs = {"logging_steps": 1, "eval_strategy": "epoch", "client_fraction": 0.7, "num_rounds": 3}
    one, _ = run(tmp_path / "one", **kwargs)
    two, _ = run(tmp_path / "two", **kwargs)
    assert tiny.same_bytes(tiny.trained(one.model), tiny.trained(two.model))
    assert ledger_of(one)
    assert tiny.same_bytes(ledger_of(one), ledger_of(two))
    assert without_times(one.state.log_history) == without_times(two.state.log_history)
    assert len(one.state.log_history) > 10
    other, _ = run(tmp_path / "other", seed=8, **kwargs)
    assert not tiny.same_bytes(tiny.trained(one.model), tiny.trained(other.model))
    assert not tiny.same_bytes(ledger_of(one), ledger_of(other))


def test_what_is_observed_does_not_change_the_run(tmp_path):
    plain, _ = run(tmp_path / "plain")
    observed, _ = run(
        tmp_path / "observed",
        logging_steps=1,
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        log_layer_exactness=True,
    )
    assert tiny.same_bytes(tiny.trained(plain.model), tiny.trained(observed.model))


def test_train_can_be_called_again(tmp_path):
    trainer, _ = run(tmp_path)
    first = tiny.trained(trainer.model)
    output = trainer.train()
    assert output.global_step == trainer.state.global_step == 2 * STEPS
    assert output.metrics["max_aggregation_error"] <= 1e-5
    assert not tiny.same_bytes(tiny.trained(trainer.model), first)


# ---- Sampling ----


@pytest.mark.parametrize(
    ("fraction", "clients", "count"), [(1.0, 5, 5), (0.4, 5, 2), (0.1, 5, 1), (0.01, 3, 1), (0.67, 3, 2), (0.9, 10, 9)]
)
def test_a_fraction_of_the_clients_is_sampled(tmp_path, fraction, clients, count):
    trainer, _ = built(tmp_path, [4] * clients, client_fraction=fraction)
    order = list(trainer.clients.datasets)
    rounds = [trainer.sample_clients(round) for round in range(1, 21)]
    assert {len(sampled) for sampled in rounds} == {count}
    for sampled in rounds:
        assert sampled == sorted(set(sampled), key=order.index)
    assert (len({tuple(sampled) for sampled in rounds}) > 1) == (count < clients)
    assert {client_id for sampled in rounds for client_id in sampled} == set(order)


@pytest.mark.parametrize(("assignment", "installs"), [("average", 1), ("keep", 7)])
def test_swapping_clients_leaves_the_base_alone(tmp_path, monkeypatch, assignment, installs):
    """Base weights are written once a round; by clients that keep their factors also before and after each fit."""
    trainer = tiny.federation(tmp_path, aggregator_kwargs={"assignment": assignment})
    trainer.run_round(1)
    calls, install = [], trainer.adapted.install
    monkeypatch.setattr(trainer.adapted, "install", lambda *args: calls.append(args) or install(*args))
    trainer.run_round(2)
    assert len(calls) == installs


def test_sampling_is_a_function_of_the_seed_and_the_round(tmp_path):
    def sampled(seed):
        trainer, _ = built(tmp_path, [4] * 8, client_fraction=0.4, seed=seed)
        torch.manual_seed(seed + 100)  # whatever happened before
        backwards = {round: trainer.sample_clients(round) for round in range(12, 0, -1)}
        assert backwards == {round: trainer.sample_clients(round) for round in range(1, 13)}
        return [backwards[round] for round in range(1, 13)]

    assert sampled(1) == sampled(1) != sampled(2)


def test_only_the_sampled_clients_train(tmp_path):
    trainer, rounds = run(tmp_path, [4, 8, 12, 5], client_fraction=0.5, num_rounds=4, logging_steps=1)
    for round, clients in rounds.clients.items():
        assert clients == trainer.sample_clients(round)
        assert [update.client_id for update in rounds.updates[round]] == clients
        logged = [entry["client_id"] for entry in entries(trainer, "client_id") if entry["round"] == round]
        assert list(dict.fromkeys(logged)) == clients
    assert [entry["num_clients"] for entry in entries(trainer, "num_clients")] == [2] * 4
    steps = {"client-0": 1, "client-1": 2, "client-2": 3, "client-3": 2}
    expected = sum(steps[client_id] for clients in rounds.clients.values() for client_id in clients)
    assert trainer.state.global_step == trainer.state.max_steps == expected


# ---- Weights of the clients ----


def mean(tensors, weights):
    """Weighted mean in float64, by NumPy."""
    weights = np.array(weights, dtype=np.float64)
    return np.einsum("i,i...->...", weights / weights.sum(), np.stack([each.double().numpy() for each in tensors]))


@pytest.mark.parametrize("weighting", ["num_examples", "uniform"])
def test_clients_are_weighted(tmp_path, weighting):
    trainer, rounds = run(tmp_path, client_weighting=weighting)
    for round, updates in rounds.updates.items():
        assert [update.num_examples for update in updates] == list(SIZES)
        heads = [update.tensors[HEAD] for update in updates]
        expected = {"num_examples": mean(heads, SIZES), "uniform": mean(heads, [1, 1, 1])}
        right, wrong = expected.pop(weighting), *expected.values()
        for installed in (rounds.head[round], rounds.ends[round][HEAD]):
            assert np.abs(installed.numpy() - right).max() < 1e-7
            assert np.abs(installed.numpy() - wrong).max() > 1e-5
    assert tiny.same_bytes({"": trainer.model.get_parameter(HEAD)}, {"": rounds.head[2]})


def test_the_rounds_train_loss_is_weighted_too(tmp_path):
    trainer, rounds = run(tmp_path, logging_steps=1)
    for round, entry in enumerate(entries(trainer, "num_clients"), start=1):
        losses = []
        for update in rounds.updates[round]:
            logged = [each["loss"] for each in entries(trainer, "loss") if each["round"] == round]
            own = [
                each["loss"]
                for each in entries(trainer, "loss")
                if each["round"] == round and each["client_id"] == update.client_id
            ]
            assert update.metrics["train_loss"] == pytest.approx(np.mean(own))
            losses.append(update.metrics["train_loss"])
        assert len(logged) == STEPS
        assert entry["train_loss"] == pytest.approx(np.average(losses, weights=SIZES))


# ---- Clients that fail ----


def flaky(failures, error=ConnectionError):
    """A federation where some fits, given as (client, round), fail after the model was trained."""

    class Flaky(FederatedTrainer):
        def fit_client(self, client_id, round):
            before = tiny.trained(self.model)
            update = super().fit_client(client_id, round)
            if (client_id, round) in failures:
                assert not tiny.same_bytes(tiny.trained(self.model), before)
                raise error(f"no answer from {client_id}")
            return update

    return Flaky


class Picky(Trainer):
    """Cannot take its second batch of a client whose sequences begin with token 1, or turns its loss into NaN."""

    def __init__(self, *args, on_poison, **kwargs):
        super().__init__(*args, **kwargs)
        self.on_poison = on_poison
        self.batches = 0

    def train(self, *args, **kwargs):
        self.batches = 0
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        poisoned = model.training and bool((inputs["input_ids"][:, 0] == 1).all())
        self.batches += model.training
        if poisoned and self.on_poison == "raise" and self.batches == 2:
            raise ValueError("cannot read this shard")
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return output * math.nan if poisoned and self.on_poison == "nan" else output


def with_poisoned(sizes, index):
    clients = tiny.clients_of(list(sizes))
    rows = clients[f"client-{index}"].to_dict()
    rows["input_ids"] = [[1, *row[1:]] for row in rows["input_ids"]]
    clients[f"client-{index}"] = type(clients["client-0"]).from_dict(rows)
    return clients


def picky(on_poison):
    return {"client_trainer_cls": Picky, "client_trainer_kwargs": {"on_poison": on_poison}}


@pytest.mark.parametrize(("errors", "error"), [("raise", ConnectionError), ("skip", KeyboardInterrupt)])
def test_an_error_stops_the_run_and_the_model_is_the_last_good_rounds(tmp_path, errors, error):
    trainer, rounds = built(tmp_path, cls=flaky({("client-1", 3)}, error), num_rounds=4, client_errors=errors)
    with pytest.raises(error, match="no answer from client-1"):
        trainer.train()
    assert list(rounds.ends) == [1, 2]
    assert trainer.federation.round == 2
    assert tiny.same_bytes(tiny.trained(trainer.model), rounds.ends[2])
    assert not tiny.same_bytes(rounds.ends[2], rounds.ends[1])


def test_raising_is_the_default(tmp_path):
    trainer, _ = built(tmp_path, data=with_poisoned(SIZES, 0), given=picky("raise"))
    before = tiny.trained(trainer.model)
    with pytest.raises(ValueError, match="cannot read this shard"):
        trainer.train()
    assert tiny.same_bytes(tiny.trained(trainer.model), before)


def test_a_nan_is_an_error_that_names_the_client(tmp_path):
    trainer, _ = built(tmp_path, data=with_poisoned(SIZES, 1), given=picky("nan"))
    before = tiny.trained(trainer.model)
    with pytest.raises(NonFiniteUpdateError, match=r"client `client-1` in round 1 holds NaN"):
        trainer.train()
    assert tiny.same_bytes(tiny.trained(trainer.model), before)


def test_a_client_that_fails_is_left_out_and_the_weights_renormalised(tmp_path, caplog):
    trainer, rounds = run(tmp_path, cls=flaky({("client-1", 2)}), num_rounds=3, client_errors="skip")
    assert [len(rounds.updates[round]) for round in (1, 2, 3)] == [3, 2, 3]
    assert [entry["num_clients"] for entry in entries(trainer, "num_clients")] == [3, 2, 3]
    assert max(entry["aggregation_error"] for entry in entries(trainer, "aggregation_error")) <= 1e-5
    heads = [update.tensors[HEAD] for update in rounds.updates[2]]
    assert np.abs(rounds.ends[2][HEAD].numpy() - mean(heads, [12, 9])).max() < 1e-7
    assert np.abs(rounds.ends[2][HEAD].numpy() - mean(heads, [1, 1])).max() > 1e-5
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    named = [message for message in warnings if "`client-1`" in message]
    assert len(named) == 1
    assert "Round 2" in named[0]
    assert "ConnectionError: no answer from client-1" in named[0]
    assert trainer.state.global_step == trainer.state.max_steps == 3 * STEPS


@pytest.mark.parametrize("on_poison", ["raise", "nan"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_with_a_failing_client_is_the_run_without_it(tmp_path, caplog, on_poison, accumulation):
    sizes, kwargs = (12, 10, 16), {"client_errors": "skip", "gradient_accumulation_steps": accumulation}
    # The last client, so that the others have the seeds they would have without it.
    poisoned, rounds = run(tmp_path / "poisoned", data=with_poisoned(sizes, 2), given=picky(on_poison), **kwargs)
    assert [len(updates) for updates in rounds.updates.values()] == [2, 2]
    assert sum("client `client-2` is left out" in record.getMessage() for record in caplog.records) == 2
    expected, _ = run(tmp_path / "expected", sizes[:2], given=picky(on_poison), **kwargs)
    assert tiny.same_bytes(tiny.trained(poisoned.model), tiny.trained(expected.model))
    assert tiny.same_bytes(ledger_of(poisoned), ledger_of(expected))


@pytest.mark.parametrize("on_poison", ["raise", "nan"])
def test_a_failing_client_leaves_nothing_for_the_next(tmp_path, on_poison):
    data, kwargs = with_poisoned((16, 12), 0), {"client_errors": "skip", "gradient_accumulation_steps": 2}
    _, rounds = run(tmp_path / "a", data=data, given=picky(on_poison), num_rounds=1, **kwargs)
    alone, _ = built(tmp_path / "b", data=data, given=picky(on_poison), **kwargs)
    expected = alone.fit_client("client-1", 1)
    [update] = rounds.updates[1]
    assert tiny.same_bytes(dict(update.tensors), dict(expected.tensors))
    for name, delta in expected.adapters.items():
        assert torch.equal(update.adapters[name].A, delta.A)
        assert torch.equal(update.adapters[name].B, delta.B)


@pytest.mark.parametrize("kwargs", [{}, {"logging_nan_inf_filter": False}], ids=["default", "no-nan-filter"])
@pytest.mark.parametrize("on_poison", ["raise", "nan"])
def test_the_loss_of_the_run_is_that_of_the_clients_that_count(tmp_path, on_poison, kwargs):
    trainer, rounds = built(
        tmp_path, data=with_poisoned(SIZES, 0), given=picky(on_poison), client_errors="skip", **kwargs
    )
    output = trainer.train()
    accepted = [update.metrics for updates in rounds.updates.values() for update in updates]
    expected = np.average([each["train_loss"] for each in accepted], weights=[each["steps"] for each in accepted])
    assert output.training_loss == pytest.approx(expected)


def test_too_few_clients_end_the_run_with_the_last_rounds_model(tmp_path):
    failures = {("client-0", 2), ("client-1", 3), ("client-2", 3)}
    trainer, rounds = built(tmp_path, cls=flaky(failures), num_rounds=4, client_errors="skip", min_clients=2)
    with pytest.raises(RuntimeError, match=r"Round 3: 1 of 3 clients .*`min_clients=2`.*round 2"):
        trainer.train()
    assert len(rounds.updates[2]) == 2
    assert trainer.federation.round == 2
    assert tiny.same_bytes(tiny.trained(trainer.model), rounds.ends[2])


def test_no_client_at_all_is_too_few(tmp_path):
    trainer, _ = built(tmp_path, cls=flaky({(f"client-{index}", 1) for index in range(3)}), client_errors="skip")
    before = tiny.trained(trainer.model)
    with pytest.raises(RuntimeError, match="Round 1: 0 of 3 clients"):
        trainer.train()
    assert tiny.same_bytes(tiny.trained(trainer.model), before)


# ---- The clients' datasets ----


class Rows(torch.utils.data.Dataset):
    """A map-style dataset of plain Python."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize(
    "kind",
    [
        DatasetDict,
        lambda data: {k: list(d) for k, d in data.items()},
        lambda data: {k: Rows(list(d)) for k, d in data.items()},
    ],
    ids=["DatasetDict", "lists", "torch"],
)
def test_clients_in_other_containers(tmp_path, kind):
    expected, _ = run(tmp_path / "expected", num_rounds=1)
    trainer, _ = run(tmp_path / "other", data=kind(tiny.clients_of(list(SIZES))), num_rounds=1)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(expected.model))


def labelled_by_user(size):
    users = [f"user-{index % 3}" for index in range(size)]
    return tiny.classification_data(size).add_column("user", users)


@pytest.mark.parametrize(
    ("kwargs", "clients"),
    [
        pytest.param({}, ["client-0", "client-1", "client-2"], id="three-by-default"),
        pytest.param({"num_clients": 2}, ["client-0", "client-1"], id="iid"),
        pytest.param({"num_clients": 2, "dirichlet_alpha": 0.5}, ["client-0", "client-1"], id="dirichlet"),
        pytest.param(
            {"num_clients": 2, "dirichlet_alpha": 0.5, "partition_by": "labels"},
            ["client-0", "client-1"],
            id="by-label",
        ),
        pytest.param({"partition_by": "user"}, ["user-0", "user-1", "user-2"], id="natural"),
    ],
)
def test_one_dataset_is_partitioned(tmp_path, kwargs, clients):
    data = labelled_by_user(26)
    trainer, _ = run(tmp_path / "one", data=data, num_rounds=1, **kwargs)
    assert list(trainer.train_dataset) == clients
    assert sum(len(part) for part in trainer.train_dataset.values()) == len(data)
    parts = partition_dataset(data, seed=7, **kwargs)
    assert {name: part["input_ids"][:] for name, part in trainer.train_dataset.items()} == {
        name: part["input_ids"][:] for name, part in parts.items()
    }
    expected, _ = run(tmp_path / "dict", data=parts, num_rounds=1)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(expected.model))


# ---- Evaluation ----


def test_evaluation_every_round(tmp_path):
    trainer, _ = run(tmp_path, num_rounds=3, eval_strategy="epoch")
    evaluations = entries(trainer, "eval_loss")
    assert [entry["epoch"] for entry in evaluations] == [1.0, 2.0, 3.0]
    assert [entry["step"] for entry in evaluations] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert len({entry["eval_loss"] for entry in evaluations}) == 3


def test_evaluation_and_saving_by_steps_act_at_the_end_of_the_round(tmp_path):
    trainer, _ = run(
        tmp_path,
        num_rounds=4,
        eval_strategy="steps",
        eval_steps=2 * STEPS + 2,
        save_strategy="steps",
        save_steps=STEPS + 3,
    )
    # Step 18 falls in round 3, and the last step is evaluated in any case, as by Trainer.
    assert [entry["epoch"] for entry in entries(trainer, "eval_loss")] == [3.0, 4.0]
    # Steps 11 and 22 fall in rounds 2 and 3, and the last step is saved in any case.
    steps = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == [2 * STEPS, 3 * STEPS, 4 * STEPS]


def test_steps_that_fall_in_every_round(tmp_path):
    trainer, _ = run(tmp_path, num_rounds=2, eval_strategy="steps", eval_steps=3)
    assert [entry["step"] for entry in entries(trainer, "eval_loss")] == [STEPS, 2 * STEPS]


def test_eval_delay_counts_rounds(tmp_path):
    trainer, _ = run(tmp_path, num_rounds=4, eval_strategy="epoch", eval_delay=3)
    assert [entry["epoch"] for entry in entries(trainer, "eval_loss")] == [3.0, 4.0]


def test_eval_on_start(tmp_path):
    trainer, _ = built(tmp_path, eval_strategy="epoch", eval_on_start=True)
    expected = trainer.evaluate()["eval_loss"]
    trainer.train()
    evaluations = entries(trainer, "eval_loss")
    assert [entry["step"] for entry in evaluations] == [0, STEPS, 2 * STEPS]
    assert evaluations[0]["eval_loss"] == expected
    assert evaluations[0].get("epoch", 0) == 0


def plain_trainer(trainer, tmp_path, **kwargs):
    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"), per_device_eval_batch_size=8, use_cpu=True, disable_tqdm=True
    )
    return Trainer(model=trainer.model, args=args, eval_dataset=trainer.eval_dataset, **kwargs)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluate_and_predict_are_the_plain_trainers(tmp_path):
    trainer, _ = run(tmp_path, eval_strategy="epoch", given={"compute_metrics": accuracy})
    plain = plain_trainer(trainer, tmp_path, compute_metrics=accuracy)
    metrics, expected = trainer.evaluate(), plain.evaluate()
    timed = ("runtime", "per_second", "preparation_time")
    compared = [key for key in expected if not key.endswith(timed) and key != "epoch"]
    assert {"eval_loss", "eval_accuracy"} <= set(compared)
    assert [metrics[key] for key in compared] == [expected[key] for key in compared]
    assert metrics["epoch"] == 2.0
    assert metrics["eval_loss"] == entries(trainer, "eval_loss")[-1]["eval_loss"]
    assert metrics["eval_accuracy"] == entries(trainer, "eval_accuracy")[-2]["eval_accuracy"]
    test = tiny.classification_data(9, seed=3)
    prediction, expected = trainer.predict(test), plain.predict(test)
    assert prediction.predictions.tobytes() == expected.predictions.tobytes()
    assert prediction.label_ids.tolist() == expected.label_ids.tolist()
    assert prediction.metrics["test_accuracy"] == expected.metrics["test_accuracy"]
    assert trainer.evaluate(test, metric_key_prefix="test")["test_accuracy"] == expected.metrics["test_accuracy"]


def test_evaluate_before_training(tmp_path):
    trainer, _ = built(tmp_path)
    assert trainer.evaluate()["eval_loss"] == plain_trainer(trainer, tmp_path).evaluate()["eval_loss"]


def test_several_evaluation_datasets(tmp_path):
    data = {"near": tiny.classification_data(9, seed=3), "far": tiny.classification_data(5, seed=4)}
    trainer, _ = run(tmp_path, eval_data=data, eval_strategy="epoch", num_rounds=2)
    for name, dataset in data.items():
        evaluations = entries(trainer, f"eval_{name}_loss")
        assert [entry["epoch"] for entry in evaluations] == [1.0, 2.0]
        assert trainer.evaluate(dataset)["eval_loss"] == evaluations[-1][f"eval_{name}_loss"]
    assert {"eval_near_loss", "eval_far_loss"} <= trainer.evaluate().keys()


def test_preprocess_logits_for_metrics(tmp_path):
    def labels_only(logits, labels):
        return logits.argmax(-1)

    def metrics(prediction):
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    given = {"compute_metrics": metrics, "preprocess_logits_for_metrics": labels_only}
    trainer, _ = run(tmp_path, eval_strategy="epoch", given=given)
    plain = plain_trainer(trainer, tmp_path, compute_metrics=accuracy).evaluate()
    assert entries(trainer, "eval_accuracy")[-1]["eval_accuracy"] == plain["eval_accuracy"]


# ---- The best round, early stopping, checkpoints ----


def scripted(scores):
    """Metrics that say which round is best, whatever the model does."""
    remaining = iter(scores)
    return {"compute_metrics": lambda prediction: {"score": next(remaining, 0.0)}}


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


@pytest.mark.parametrize("aggregator", ["fedex", "fedit", "ffa"])
def test_the_best_round_comes_back_whole(tmp_path, aggregator):
    trainer, rounds = run(tmp_path, num_rounds=4, given=scripted([0.1, 0.8, 0.3, 0.2]), aggregator=aggregator, **BEST)
    assert trainer.state.best_metric == 0.8
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * STEPS}")
    assert tiny.same_bytes(tiny.trained(trainer.model), rounds.ends[2])
    losses = [entry["eval_loss"] for entry in entries(trainer, "eval_loss")]
    assert trainer.evaluate()["eval_loss"] == losses[1]
    assert losses[1] not in losses[2:]
    bases = {name for name in rounds.ends[2] if name.endswith("base_layer.weight")}
    assert len(bases) == 4
    changed = {name for name in bases if not torch.equal(rounds.ends[2][name], rounds.ends[4][name])}
    assert changed == (bases if aggregator == "fedex" else set())


def test_the_best_loss_is_what_evaluate_gives_afterwards(tmp_path):
    kwargs = BEST | {"metric_for_best_model": "loss", "greater_is_better": False, "learning_rate": 0.3}
    trainer, _ = run(tmp_path, num_rounds=4, **kwargs)
    losses = [entry["eval_loss"] for entry in entries(trainer, "eval_loss")]
    assert losses.index(min(losses)) < 3  # the rate is so high that the last round is not the best
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric == min(losses)


def test_the_best_model_is_what_is_saved(tmp_path):
    trainer, rounds = run(tmp_path, num_rounds=3, given=scripted([0.8, 0.3, 0.2]), **BEST)
    trainer.save_model(str(tmp_path / "best"))
    saved = load_file(tmp_path / "best" / "model.safetensors")
    name = "roberta.encoder.layer.0.attention.self.query"
    installed = rounds.ends[1][f"base_model.model.{name}.base_layer.weight"]
    assert torch.equal(saved[f"{name}.weight"], installed)


@pytest.mark.parametrize(("patience", "rounds_run"), [(1, 3), (2, 4), (9, 6)])
def test_early_stopping_counts_rounds(tmp_path, patience, rounds_run):
    trainer, rounds = run(
        tmp_path,
        num_rounds=6,
        given=scripted([0.1, 0.8, 0.3, 0.2, 0.1, 0.1]),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)],
        **BEST,
    )
    assert list(rounds.ends) == list(range(1, rounds_run + 1))
    assert trainer.state.global_step == rounds_run * STEPS
    assert tiny.same_bytes(tiny.trained(trainer.model), rounds.ends[2])


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (2, [3, 4]), (1, [4])])
def test_save_total_limit(tmp_path, limit, kept):
    run(tmp_path, num_rounds=4, save_strategy="epoch", save_total_limit=limit)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {f"checkpoint-{round * STEPS}" for round in kept}


@pytest.mark.parametrize(("limit", "kept"), [(2, [2, 4]), (1, [2])])
def test_save_total_limit_keeps_the_best(tmp_path, limit, kept):
    run(tmp_path, num_rounds=4, given=scripted([0.1, 0.8, 0.3, 0.2]), save_total_limit=limit, **BEST)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{round * STEPS}" for round in kept}


def test_save_strategy_best(tmp_path):
    kwargs = BEST | {"save_strategy": "best"}
    trainer, rounds = run(tmp_path, num_rounds=4, given=scripted([0.1, 0.8, 0.3, 0.2]), **kwargs)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{round * STEPS}" for round in (1, 2)}
    assert tiny.same_bytes(tiny.trained(trainer.model), rounds.ends[2])


# ---- Logs ----


def test_what_a_step_and_an_evaluation_log(tmp_path):
    trainer, _ = run(tmp_path / "federated", logging_steps=1, eval_strategy="epoch")
    plain = Trainer(
        model=tiny.peft_roberta(),
        args=TrainingArguments(
            output_dir=str(tmp_path / "plain"),
            logging_steps=1,
            eval_strategy="epoch",
            num_train_epochs=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=tiny.classification_data(8),
        eval_dataset=tiny.classification_data(8, seed=1),
    )
    plain.train()
    for key, more in (("loss", {"round", "client_id"}), ("eval_loss", set()), ("train_runtime", set())):
        expected = {frozenset(entry.keys() | more) for entry in entries(plain, key)}
        assert {frozenset(entry) for entry in entries(trainer, key)} == expected, key
    steps = entries(trainer, "loss")
    assert [entry["step"] for entry in steps] == list(range(1, 2 * STEPS + 1))
    assert [entry["epoch"] for entry in steps] == pytest.approx(np.arange(1, 2 * STEPS + 1) / STEPS)
    assert [entry["client_id"] for entry in steps] == 2 * (["client-0"] * 3 + ["client-1"] * 2 + ["client-2"] * 3)
    assert [entry["round"] for entry in steps] == [1] * STEPS + [2] * STEPS


def test_what_a_round_logs(tmp_path):
    trainer, rounds = run(tmp_path / "plain", num_rounds=3)
    logged = entries(trainer, "aggregation_error")
    assert [(entry["round"], entry["epoch"], entry["step"]) for entry in logged] == [
        (1, 1.0, STEPS),
        (2, 2.0, 2 * STEPS),
        (3, 3.0, 3 * STEPS),
    ]
    names = {"train_loss", "num_clients", "fedit_deviation", "bytes_up_per_client", "bytes_down_per_client"}
    assert all(entry.keys() >= names | {"round_seconds"} for entry in logged)
    assert all(0 < entry["aggregation_error"] <= 1e-5 < entry["fedit_deviation"] < 1 for entry in logged)
    # Four layers of two factors (4 x 32) in float32, and the head; down also the residual of rank (3 - 1) * 4.
    head = sum(tensor.nbytes for tensor in rounds.updates[1][0].tensors.values())
    assert {entry["bytes_up_per_client"] for entry in logged} == {4 * 2 * 4 * 32 * 4 + head}
    assert {entry["bytes_down_per_client"] for entry in logged} == {4 * 2 * (4 + 8) * 32 * 4 + head}
    by_layer, _ = run(tmp_path / "layers", num_rounds=1, log_layer_exactness=True)
    [entry] = entries(by_layer, "aggregation_error")
    layers = {key.partition("/")[2] for key in entry if key.startswith("aggregation_error/")}
    assert len(layers) == 4
    assert layers == set(by_layer.exactness.layers)
    assert all(entry[f"aggregation_error/{layer}"] <= 1e-5 < entry[f"fedit_deviation/{layer}"] for layer in layers)


def test_the_output_holds_the_certificate_of_the_run(tmp_path):
    trainer, _ = built(tmp_path, num_rounds=3)
    output = trainer.train()
    errors = [entry["aggregation_error"] for entry in entries(trainer, "aggregation_error")]
    deviations = [entry["fedit_deviation"] for entry in entries(trainer, "fedit_deviation")]
    assert output.metrics["max_aggregation_error"] == max(errors)
    assert output.metrics["mean_fedit_deviation"] == pytest.approx(np.mean(deviations))
    assert {"train_runtime", "train_loss", "epoch"} <= output.metrics.keys()
    assert output.global_step == 3 * STEPS
    assert output.training_loss == output.metrics["train_loss"]
    assert trainer.exactness.aggregation_error == errors[-1]


def test_logging_by_round_is_the_mean_over_the_rounds_steps(tmp_path):
    every, _ = run(tmp_path / "steps", num_rounds=2, logging_steps=1)
    trainer, _ = run(tmp_path / "rounds", num_rounds=2, logging_strategy="epoch")
    steps = [entry["loss"] for entry in entries(every, "loss")]
    logged = entries(trainer, "loss")
    assert [entry["epoch"] for entry in logged] == [1.0, 2.0]
    assert [entry["loss"] for entry in logged] == pytest.approx([np.mean(steps[:STEPS]), np.mean(steps[STEPS:])])


def test_logging_every_few_steps_restarts_with_the_client(tmp_path):
    trainer, _ = run(tmp_path, num_rounds=1, logging_steps=2, logging_first_step=True)
    assert [(entry["step"], entry["client_id"]) for entry in entries(trainer, "loss")] == [
        (1, "client-0"),
        (2, "client-0"),
        (4, "client-1"),
        (6, "client-2"),
        (8, "client-2"),
    ]


def test_counting_tokens_leaves_the_logs_as_they_are(tmp_path):
    without, _ = run(tmp_path / "without", logging_steps=1)
    trainer, _ = run(tmp_path / "with", logging_steps=1, include_num_input_tokens_seen="all")
    steps = entries(trainer, "loss")
    assert [entry["loss"] for entry in steps] == [entry["loss"] for entry in entries(without, "loss")]
    seen = [entry["num_input_tokens_seen"] for entry in steps]
    assert seen == sorted(seen)
    assert trainer.state.num_input_tokens_seen == 2 * sum(SIZES) * tiny.LENGTH


def test_nothing_is_logged_for_steps_if_not_wanted(tmp_path):
    trainer, _ = run(tmp_path, logging_strategy="no")
    assert entries(trainer, "loss") == []
    assert len(entries(trainer, "aggregation_error")) == 2


def test_one_tensorboard_run_with_monotone_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(tmp_path, report_to="tensorboard", logging_steps=1, eval_strategy="epoch", num_rounds=3)
    files = [path for path in tmp_path.rglob("*tfevents*") if path.is_file()]
    assert len(files) == 1
    assert files[0].is_relative_to(tmp_path / "board")
    events = [event for event in EventFileLoader(str(files[0])).Load() if event.HasField("summary")]
    steps = [event.step for event in events]
    assert steps == sorted(steps)
    assert steps[-1] == 3 * STEPS
    scalars = {}
    for event in events:
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append(event.step)
    assert scalars["train/loss"] == list(range(1, 3 * STEPS + 1))
    for tag in ("train/aggregation_error", "train/fedit_deviation", "eval/loss"):
        assert scalars[tag] == [STEPS, 2 * STEPS, 3 * STEPS]


class Bars(TrainerCallback):
    """Looks at the progress bar at every step."""

    def __init__(self):
        self.bars, self.shown, self.texts = {}, [], set()
        self.trainer = None

    def on_epoch_end(self, args, state, control, **kwargs):
        self.look(state)

    def on_step_begin(self, args, state, control, **kwargs):
        self.look(state)

    def look(self, state):
        [callback] = [each for each in self.trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)]
        bar = callback.training_bar
        self.bars[id(bar)] = bar.total
        self.shown.append((state.global_step, bar.n))
        self.texts.add(bar.desc.removesuffix(": "))


def test_one_progress_bar_over_the_whole_federation(tmp_path):
    bars = Bars()
    trainer, _ = built(tmp_path, num_rounds=3, disable_tqdm=False, eval_strategy="epoch", callbacks=[bars])
    bars.trainer = trainer
    trainer.train()
    assert list(bars.bars.values()) == [3 * STEPS]
    assert all(step == shown for step, shown in bars.shown)
    assert bars.shown[-1] == (3 * STEPS, 3 * STEPS)
    assert {f"round {round}/3 client-{index}" for round in (1, 2, 3) for index in range(3)} <= bars.texts


# ---- Saving ----


def untied_or_tied_llama(tied):
    config = tiny.llama().config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


CAUSAL = {"task_type": "CAUSAL_LM"}
LLAMA = CAUSAL | {"target_modules": ["q_proj", "v_proj", "down_proj"]}
MODELS = {
    "roberta": (tiny.roberta, {}, "default"),
    "roberta-named-adapter": (tiny.roberta, {}, "federated"),
    "llama": (lambda: untied_or_tied_llama(False), LLAMA, "default"),
    "llama-tied": (lambda: untied_or_tied_llama(True), LLAMA, "default"),
    "llama-rslora-bias": (
        lambda: untied_or_tied_llama(False),
        LLAMA | {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "lora_bias": True},
        "default",
    ),
    "gpt2": (tiny.gpt2, CAUSAL | {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "default"),
}


def saved_federation(tmp_path, kind):
    make, config, adapter = MODELS[kind]
    causal = bool(config)
    torch.manual_seed(0)
    trainer = FederatedTrainer(
        model=get_peft_model(make(), tiny.lora(**config), adapter_name=adapter),
        args=tiny.arguments(tmp_path / "run", num_rounds=2, learning_rate=3e-2),
        train_dataset=tiny.clients_of([8, 4], tiny.language_data if causal else tiny.classification_data),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    return trainer, make(), causal


def logits_of(model):
    inputs = torch.tensor(tiny.classification_data(6, seed=5)["input_ids"][:])
    with torch.no_grad():
        return model.eval()(input_ids=inputs).logits


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_loads_with_plain_from_pretrained(tmp_path, kind):
    trainer, original, causal = saved_federation(tmp_path, kind)
    saved = tmp_path / "saved"
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    auto_peft = AutoPeftModelForCausalLM if causal else AutoPeftModelForSequenceClassification
    expected = logits_of(trainer.model)
    assert expected.dtype == torch.float32
    loaded = {
        "auto": auto.from_pretrained(saved),
        "auto peft": auto_peft.from_pretrained(saved),
        "peft on auto": PeftModel.from_pretrained(auto.from_pretrained(saved), saved),
    }
    for name, model in loaded.items():
        assert torch.equal(logits_of(model), expected), name
    # What a save of the adapter alone would give: the method silently lost.
    on_original = PeftModel.from_pretrained(original, saved)
    assert (logits_of(on_original) - expected).abs().max() > 1e-4


def test_a_saved_model_loads_in_a_fresh_process_without_this_package(tmp_path):
    trainer, _, _ = saved_federation(tmp_path, "roberta")
    script = """
        import sys
        import torch
        from peft import AutoPeftModelForSequenceClassification
        from transformers import AutoModelForSequenceClassification

        saved, inputs = sys.argv[1], torch.load(sys.argv[2])
        logits = []
        for loader in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
            model = loader.from_pretrained(saved).eval()
            with torch.no_grad():
                logits.append(model(input_ids=inputs).logits)
        assert "fedex_hf" not in sys.modules
        torch.save(logits, sys.argv[3])
    """
    inputs, result = tmp_path / "inputs.pt", tmp_path / "logits.pt"
    torch.save(torch.tensor(tiny.classification_data(6, seed=5)["input_ids"][:]), inputs)
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "saved"), str(inputs), str(result)]
    done = subprocess.run(command, cwd=tmp_path, env=untraced(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = logits_of(trainer.model)
    assert [torch.equal(logits, expected) for logits in torch.load(result)] == [True, True]


def test_a_saved_directory_can_be_moved(tmp_path):
    trainer, _, _ = saved_federation(tmp_path, "roberta")
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "elsewhere")
    assert torch.equal(logits_of(model), logits_of(trainer.model))


def test_saving_changes_nothing_in_the_trainer(tmp_path):
    trainer, _, _ = saved_federation(tmp_path, "roberta-named-adapter")
    before, config = tiny.trained(trainer.model), trainer.model.peft_config["federated"]
    trainer.save_model(str(tmp_path / "again"))
    assert trainer.model.peft_config["federated"] is config
    assert trainer.model.active_adapters == ["federated"]
    assert tiny.same_bytes(tiny.trained(trainer.model), before)
    names = {str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*")}
    assert {"model.safetensors", "config.json", "adapter_model.safetensors", "adapter_config.json"} <= names
    assert not any(Path(name).parts[0] == "federated" for name in names)
    assert isinstance(
        torch.load(tmp_path / "again" / "training_args.bin", weights_only=False), FederatedTrainingArguments
    )


def test_save_model_goes_to_the_output_dir_by_default(tmp_path):
    trainer, _ = run(tmp_path, num_rounds=1)
    trainer.save_model()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(model), logits_of(trainer.model))
