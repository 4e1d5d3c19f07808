"""Room 2: a local fit is the plain `Trainer`, and depends on its client, its round and the global state only."""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from fedex_hf import FederatedCallback, FederatedTrainer, FederatedTrainingArguments, client
from fedex_hf.client import client_seed


BATCH = tiny.PLAIN["per_device_train_batch_size"]


# ---- What the tests record ----


class Batches(Trainer):
    """Notes the examples of every batch that is trained on, by client and round."""

    def __init__(self, *args, seen, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = seen

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.seen.append([tuple(row) for row in inputs["input_ids"].tolist()])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Updates(FederatedCallback):
    """Keeps every client's update, and the batches since the last one."""

    def __init__(self, seen=None):
        self.updates = {}
        self.batches = {}
        self.seen = [] if seen is None else seen

    def on_client_end(self, args, state, control, update, **kwargs):
        self.updates[update.round, update.client_id] = update
        self.batches[update.round, update.client_id] = list(self.seen)
        self.seen.clear()


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def rows_of(dataset):
    return [tuple(example["input_ids"]) for example in dataset]


def federated(output_dir, clients, *, model=None, callbacks=None, trainer_kwargs=None, **kwargs):
    settings = tiny.PLAIN | {"num_rounds": 1} | kwargs
    return FederatedTrainer(
        model=tiny.peft_roberta() if model is None else model,
        args=FederatedTrainingArguments(output_dir=str(output_dir), **settings),
        train_dataset=clients,
        callbacks=callbacks,
        **(trainer_kwargs or {}),
    )


def recorded(output_dir, clients, **kwargs):
    """Train a federation and return its batches by (round, client), and the trainer."""
    seen = []
    updates = Updates(seen)
    trainer = federated(
        output_dir,
        clients,
        callbacks=[updates],
        trainer_kwargs={"client_trainer_cls": Batches, "client_trainer_kwargs": {"seen": seen}},
        **kwargs,
    )
    trainer.train()
    return updates.batches, trainer


def plain(output_dir, dataset, *, trainer_cls=Trainer, trainer_kwargs=None, **kwargs):
    """The plain `Trainer` with the same arguments on the same model."""
    trainer = trainer_cls(
        model=tiny.peft_roberta(),
        args=TrainingArguments(output_dir=str(output_dir), **(tiny.PLAIN | kwargs)),
        train_dataset=dataset,
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return trainer


def steps_of(trainer):
    """What was logged at each optimizer step."""
    names = ("loss", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]


# ---- One client, one round = plain Trainer ----


class OwnLoss(Trainer):
    """A user's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.multi_margin_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def own_loss_func(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum", label_smoothing=0.2)
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def masking_collator(features):
    """Replaces tokens at random, from torch's global generator."""
    batch = default_data_collator(features)
    masked = torch.rand(batch["input_ids"].shape) < 0.3
    batch["input_ids"] = batch["input_ids"].masked_fill(masked, 2)
    return batch


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="default"),
        pytest.param({"num_train_epochs": 2}, id="epochs"),
        pytest.param({"num_train_epochs": 1.5}, id="half-epoch"),
        pytest.param({"max_steps": 2}, id="less-than-an-epoch"),
        pytest.param({"max_steps": 6}, id="more-than-an-epoch"),
        pytest.param({"gradient_accumulation_steps": 3}, id="accumulation"),
        pytest.param({"data_seed": 11}, id="data-seed"),
        pytest.param({"warmup_steps": 2, "lr_scheduler_type": "linear"}, id="warmup"),
        pytest.param({"warmup_steps": 0.25, "lr_scheduler_type": "cosine"}, id="warmup-fraction"),
        pytest.param({"weight_decay": 0.1, "max_grad_norm": 0.05, "optim": "adamw_torch"}, id="clipping"),
        pytest.param({"optim": "sgd"}, id="sgd"),
        pytest.param({"accelerator_config": {"use_seedable_sampler": False}}, id="unseeded-sampler"),
        pytest.param({"train_sampling_strategy": "group_by_length"}, id="by-length"),
        pytest.param({"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1}, id="noise-and-smoothing"),
    ],
)
def test_one_client_one_round_is_the_plain_trainer(tmp_path, kwargs):
    data = tiny.classification_data(14)  # four batches, the last of two examples
    expected = plain(tmp_path / "plain", data, **kwargs)
    trainer = federated(tmp_path / "federated", {"only": data}, **kwargs)
    assert trainer.model.get_base_model().config.hidden_dropout_prob == 0.1
    before = tiny.trained(trainer.model)
    trainer.train()
    assert len(steps_of(expected)) == expected.state.global_step > 1
    assert steps_of(trainer) == steps_of(expected)
    assert trainer.state.global_step == trainer.state.max_steps == expected.state.max_steps
    assert trainer.state.total_flos == expected.state.total_flos > 0
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected.state.log_history[-1]["train_loss"])
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(expected.model))
    assert not tiny.same_bytes(tiny.trained(trainer.model), before)


@pytest.mark.parametrize("kwargs", [{"seed": 8}, {"data_seed": 8}], ids=["seed", "data-seed"])
def test_another_seed_is_another_run(tmp_path, kwargs):
    data = tiny.classification_data(14)
    expected = plain(tmp_path / "plain", data)
    trainer = federated(tmp_path / "federated", {"only": data}, **kwargs)
    trainer.train()
    assert steps_of(trainer) != steps_of(expected)
    assert not tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(expected.model))


@pytest.mark.parametrize(
    ("trainer_cls", "trainer_kwargs"),
    [
        pytest.param(OwnLoss, {}, id="compute_loss"),
        pytest.param(Trainer, {"compute_loss_func": own_loss_func}, id="compute_loss_func"),
        pytest.param(Trainer, {"data_collator": masking_collator}, id="collator"),
        pytest.param(
            Trainer, {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9})}, id="optimizer"
        ),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_the_user_brings_is_used_as_by_the_plain_trainer(tmp_path, trainer_cls, trainer_kwargs, accumulation):
    data, kwargs = tiny.classification_data(14), {"gradient_accumulation_steps": accumulation}
    expected = plain(tmp_path / "plain", data, trainer_cls=trainer_cls, trainer_kwargs=trainer_kwargs, **kwargs)
    trainer = federated(
        tmp_path / "federated",
        {"only": data},
        trainer_kwargs=trainer_kwargs | {"client_trainer_cls": trainer_cls},
        **kwargs,
    )
    trainer.train()
    without = plain(tmp_path / "without", data, **kwargs)
    assert steps_of(trainer) == steps_of(expected) != steps_of(without)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(expected.model))


# ---- Clients are independent ----


def independent_run(output_dir, *, order=None, rounds=2, trainer_kwargs=None, **kwargs):
    """All updates of a run whose last round takes the clients in another order."""

    class Ordered(FederatedTrainer):
        def sample_clients(self, round):
            clients = super().sample_clients(round)
            return [clients[index] for index in order] if order is not None and round == rounds else clients

    updates = Updates()
    trainer = Ordered(
        model=tiny.peft_roberta(),
        args=FederatedTrainingArguments(output_dir=str(output_dir), **(tiny.PLAIN | {"num_rounds": rounds} | kwargs)),
        train_dataset=tiny.clients_of([12, 7, 9]),
        callbacks=[updates],
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return updates.updates, trainer


class LeakyTrainer(Trainer):
    """One optimizer for all fits, so that moments pass from client to client."""

    shared = None

    def create_optimizer(self, *args, **kwargs):
        if type(self).shared is None:
            type(self).shared = super().create_optimizer(*args, **kwargs)
        self.optimizer = type(self).shared
        return self.optimizer


@pytest.mark.parametrize("state", ["reset", "keep"])
@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (2,)], ids=str)
def test_an_update_does_not_depend_on_the_clients_before_it(tmp_path, state, order):
    expected, _ = independent_run(tmp_path / "a", client_optimizer_state=state)
    updates, _ = independent_run(tmp_path / "b", order=order, client_optimizer_state=state)
    assert len(updates) == 3 + len(order)
    for key, update in updates.items():
        assert tiny.same_bytes(tiny.tensors_of(update), tiny.tensors_of(expected[key]))
        assert update.metrics == expected[key].metrics
        assert update.num_examples == expected[key].num_examples


def test_a_single_fit_is_the_one_of_the_round(tmp_path):
    expected, _ = independent_run(tmp_path / "a")
    trainer = federated(tmp_path / "b", tiny.clients_of([12, 7, 9]))
    update = trainer.fit_client("client-2", 1)
    assert tiny.same_bytes(tiny.tensors_of(update), tiny.tensors_of(expected[1, "client-2"]))
    again = trainer.fit_client("client-2", 1)
    assert tiny.same_bytes(tiny.tensors_of(again), tiny.tensors_of(update))
    assert not tiny.same_bytes(tiny.tensors_of(trainer.fit_client("client-1", 1)), tiny.tensors_of(update))


def test_the_check_of_independence_finds_leaking_moments(tmp_path):
    class Leaky(LeakyTrainer):
        pass

    kwargs = {"trainer_kwargs": {"client_trainer_cls": Leaky}, "rounds": 1}
    expected, _ = independent_run(tmp_path / "a", **kwargs)
    Leaky.shared = None
    updates, _ = independent_run(tmp_path / "b", order=(2,), **kwargs)
    assert not tiny.same_bytes(tiny.tensors_of(updates[1, "client-2"]), tiny.tensors_of(expected[1, "client-2"]))


def test_fits_do_not_disturb_the_callers_generators(tmp_path):
    trainer = federated(tmp_path, tiny.clients_of([12, 7]), num_rounds=2, gradient_accumulation_steps=2)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_constructor_leaves_the_generators_as_trainers_does(tmp_path):
    set_seed(7)
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torch.manual_seed(5)
    federated(tmp_path, tiny.clients_of([12, 7]))
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert np.random.get_state()[1].tolist() == expected[2]


def test_the_callers_generators_do_not_change_the_run(tmp_path):
    results = []
    for seed in (1, 2):
        trainer = federated(tmp_path / str(seed), tiny.clients_of([12, 7]))
        set_seed(seed)
        trainer.train()
        results.append(tiny.trained(trainer.model))
    assert tiny.same_bytes(*results)


def test_a_clients_trainer_reports_nothing_by_itself(tmp_path):
    trainer = federated(
        tmp_path, tiny.clients_of([12, 7]), disable_tqdm=False, report_to="tensorboard", save_strategy="epoch"
    )
    silent = (PrinterCallback, ProgressCallback, TensorBoardCallback)
    assert not any(isinstance(each, silent) for each in trainer.clients.trainer.callback_handler.callbacks)
    assert trainer.clients.trainer.args.save_strategy == "no"


# ---- Batches ----


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="an-epoch"),
        pytest.param({"max_steps": 2}, id="max-steps"),
        pytest.param({"data_seed": 3, "max_steps": 2}, id="data-seed"),
        pytest.param({"accelerator_config": {"use_seedable_sampler": False}, "max_steps": 2}, id="unseeded-sampler"),
    ],
)
def test_every_round_has_its_own_batches(tmp_path, kwargs):
    same = tiny.classification_data(12)
    clients = {"left": same, "right": same}
    batches, _ = recorded(tmp_path / "a", clients, num_rounds=3, **kwargs)
    assert [len(each) for each in batches.values()] == [kwargs.get("max_steps", 3)] * 6
    for index, one in enumerate(batches):
        for other in list(batches)[:index]:
            assert batches[one] != batches[other], (one, other)
            assert batches[one][0] != batches[other][0], (one, other)
    if not kwargs:  # an epoch reads every example once
        assert all(sorted(joined(each)) == sorted(rows_of(same)) for each in batches.values())
    again, _ = recorded(tmp_path / "b", clients, num_rounds=3, **kwargs)
    assert again == batches


def test_the_check_of_batches_finds_one_seed_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "client_seed", lambda seed, round, index: seed)
    same = tiny.classification_data(12)
    batches, _ = recorded(tmp_path, {"left": same, "right": same}, num_rounds=2, max_steps=2)
    first = batches[1, "left"]
    assert all(each == first for each in batches.values())


def test_the_data_seed_decides_the_batches_and_the_seed_does_not(tmp_path):
    clients = tiny.clients_of([12, 12])
    one, _ = recorded(tmp_path / "a", clients, num_rounds=2, data_seed=3, seed=1)
    two, _ = recorded(tmp_path / "b", clients, num_rounds=2, data_seed=3, seed=2)
    other, _ = recorded(tmp_path / "c", clients, num_rounds=2, data_seed=4, seed=1)
    assert one == two
    assert all(one[key] != other[key] for key in one)


def test_seeds_differ_between_clients_rounds_and_runs():
    seeds = [client_seed(seed, round, index) for seed in (0, 1, 42) for round in range(1, 30) for index in range(30)]
    assert len(set(seeds)) == len(seeds)
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)  # what NumPy takes
    assert client_seed(42, 1, 0) == 42


def test_a_custom_collator_sees_every_clients_examples(tmp_path):
    seen = []

    def collator(features):
        seen.extend(tuple(feature["input_ids"]) for feature in features)
        return default_data_collator(features)

    clients = tiny.clients_of([6, 5])
    trainer = federated(tmp_path, clients, trainer_kwargs={"data_collator": collator}, num_rounds=2)
    trainer.train()
    assert sorted(seen) == sorted(2 * (rows_of(clients["client-0"]) + rows_of(clients["client-1"])))


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        pytest.param({}, [3, 1, 1, 2], id="an-epoch"),
        pytest.param({"num_train_epochs": 2}, [6, 2, 2, 4], id="two-epochs"),
        pytest.param({"max_steps": 2}, [2, 2, 2, 2], id="max-steps"),
        pytest.param({"gradient_accumulation_steps": 2}, [2, 1, 1, 1], id="accumulation"),
        pytest.param({"gradient_accumulation_steps": 2, "max_steps": 3}, [3, 3, 3, 3], id="accumulation-max-steps"),
        pytest.param({"dataloader_drop_last": True, "per_device_train_batch_size": 1}, [12, 1, 3, 7], id="drop-last"),
    ],
)
def test_steps_and_examples_of_unequal_clients(tmp_path, kwargs, steps):
    sizes = [12, 1, 3, 7]
    updates = Updates()
    trainer = federated(tmp_path, tiny.clients_of(sizes), callbacks=[updates], num_rounds=2, **kwargs)
    trainer.train()
    assert [updates.updates[2, f"client-{i}"].metrics["steps"] for i in range(4)] == steps
    assert [updates.updates[2, f"client-{i}"].num_examples for i in range(4)] == sizes
    assert trainer.state.global_step == trainer.state.max_steps == 2 * sum(steps)


# ---- Streams ----


class Stream(IterableDataset):
    """A stream without a length, of plain Python."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from ({"input_ids": each["input_ids"], "labels": each["labels"]} for each in self.dataset)


STREAMS = {"torch": Stream, "datasets": Dataset.to_iterable_dataset}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_the_plain_trainers_in_one_round(tmp_path, kind):
    data = tiny.classification_data(14)
    expected = plain(tmp_path / "plain", STREAMS[kind](data), max_steps=3)
    trainer = federated(tmp_path / "federated", {"only": STREAMS[kind](data)}, max_steps=3)
    trainer.train()
    assert steps_of(trainer) == steps_of(expected)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(expected.model))


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_goes_on_in_the_next_round_and_wraps_around(tmp_path, kind, accumulation):
    data = tiny.clients_of([10, 30])
    clients = {client_id: STREAMS[kind](each) for client_id, each in data.items()}
    batches, trainer = recorded(tmp_path, clients, num_rounds=3, max_steps=2, gradient_accumulation_steps=accumulation)
    per_round = 2 * BATCH * accumulation
    for client_id, dataset in data.items():
        rows = rows_of(dataset) * 6
        for round in (1, 2, 3):
            assert joined(batches[round, client_id]) == rows[(round - 1) * per_round : round * per_round]
    assert trainer.clients.num_examples("client-0") == trainer.clients.num_examples("client-1") == per_round


def test_a_stream_waits_while_its_client_is_not_sampled(tmp_path):
    data = tiny.clients_of([40, 40, 40])
    clients = {client_id: each.to_iterable_dataset() for client_id, each in data.items()}
    batches, _ = recorded(tmp_path, clients, num_rounds=6, max_steps=1, client_fraction=0.67)
    rounds = {client_id: [round for round, sampled in batches if sampled == client_id] for client_id in data}
    assert any(later - earlier > 1 for each in rounds.values() for earlier, later in itertools.pairwise(each))
    for client_id, dataset in data.items():
        read = joined(joined(batches[round, client_id]) for round in rounds[client_id])
        assert read == rows_of(dataset)[: BATCH * len(rounds[client_id])]


def test_a_shuffled_stream_is_shuffled_anew_when_it_starts_again(tmp_path):
    data = tiny.classification_data(8)
    orders = data.to_iterable_dataset().shuffle(seed=3, buffer_size=8)
    expected = []
    for epoch in (0, 1):
        orders.set_epoch(epoch)
        expected.append(rows_of(orders))
    assert expected[0] != expected[1]
    stream = data.to_iterable_dataset().shuffle(seed=3, buffer_size=8)
    batches, _ = recorded(tmp_path, {"only": stream}, num_rounds=2, max_steps=2)
    assert [joined(batches[round, "only"]) for round in (1, 2)] == expected


def test_clients_may_mix_streams_and_tables(tmp_path):
    data = tiny.clients_of([20, 12])
    clients = {"stream": data["client-0"].to_iterable_dataset(), "table": data["client-1"]}
    batches, trainer = recorded(tmp_path, clients, num_rounds=2, max_steps=2)
    assert joined(batches[2, "stream"]) == rows_of(data["client-0"])[8:16]
    assert {row for batch in batches[2, "table"] for row in batch} <= set(rows_of(data["client-1"]))
    assert (trainer.clients.num_examples("stream"), trainer.clients.num_examples("table")) == (8, 12)


# ---- Optimizer state ----


class Moments(FederatedCallback):
    """The optimizer's state before the first step and after the last step of each fit."""

    def __init__(self):
        self.before, self.after, self.fits = [], {}, []
        self.fresh = True

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.fresh:
            self.before.append(copy.deepcopy(optimizer.state_dict()["state"]))
            self.fresh = False

    def on_client_end(self, args, state, control, update, trainer=None, **kwargs):
        self.fresh = True
        self.fits.append((update.round, update.client_id))
        self.after[self.fits[-1]] = copy.deepcopy(trainer.clients.trainer.optimizer.state_dict()["state"])


def flat(state):
    return {f"{index}/{name}": value for index, values in state.items() for name, value in values.items()}


def moments_of(tmp_path, state, **kwargs):
    moments = Moments()
    trainer = federated(
        tmp_path, tiny.clients_of([12, 7]), callbacks=[moments], num_rounds=3, client_optimizer_state=state, **kwargs
    )
    trainer.train()
    return moments, trainer


def test_reset_starts_every_fit_with_an_empty_optimizer(tmp_path):
    moments, trainer = moments_of(tmp_path, "reset")
    assert moments.before == [{}] * 6
    assert trainer.federation.optimizer_states == {}
    steps = [{int(each["step"]) for each in state.values()} for state in moments.after.values()]
    assert steps == [{3}, {2}] * 3


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_keep_goes_on_with_the_clients_own_moments(tmp_path, optim):
    moments, trainer = moments_of(tmp_path, "keep", optim=optim)
    assert moments.before[:2] == [{}, {}]
    for (round, client_id), before in zip(moments.fits[2:], moments.before[2:]):
        own = flat(moments.after[round - 1, client_id])
        assert tiny.same_bytes(flat(before), own)
        other = next(flat(moments.after[key]) for key in moments.after if key[0] == round - 1 and key[1] != client_id)
        assert not tiny.same_bytes(flat(before), other)
    steps = [{int(each["step"]) for each in state.values()} for state in moments.after.values()]
    assert steps == [{3}, {2}, {6}, {4}, {9}, {6}]
    for client_id, state in trainer.federation.optimizer_states.items():
        assert tiny.same_bytes(flat(state), flat(moments.after[3, client_id]))


def test_keep_and_reset_differ_from_the_second_round_on(tmp_path):
    results = {}
    for state in ("keep", "reset"):
        updates, _ = independent_run(tmp_path / state, client_optimizer_state=state)
        results[state] = updates
    for (round, client_id), update in results["keep"].items():
        same = tiny.same_bytes(tiny.tensors_of(update), tiny.tensors_of(results["reset"][round, client_id]))
        assert same == (round == 1)


def test_a_fit_does_not_change_the_kept_state_it_starts_from(tmp_path):
    _, trainer = moments_of(tmp_path, "keep")
    kept = copy.deepcopy(trainer.federation.optimizer_states)
    first = trainer.fit_client("client-1", 3)
    for client_id, state in kept.items():
        assert tiny.same_bytes(flat(trainer.federation.optimizer_states[client_id]), flat(state))
    assert tiny.same_bytes(tiny.tensors_of(trainer.fit_client("client-1", 3)), tiny.tensors_of(first))


def test_a_fit_that_fails_leaves_the_kept_state_of_the_last_good_round(tmp_path):
    class Flaky(FederatedTrainer):
        def fit_client(self, client_id, round):
            update = super().fit_client(client_id, round)
            if (client_id, round) == ("client-1", 2):
                raise ConnectionError("gone after training")
            return update

    moments = Moments()
    trainer = Flaky(
        model=tiny.peft_roberta(),
        args=FederatedTrainingArguments(
            output_dir=str(tmp_path),
            **(tiny.PLAIN | {"num_rounds": 3, "client_optimizer_state": "keep", "client_errors": "skip"}),
        ),
        train_dataset=tiny.clients_of([7, 12]),
        callbacks=[moments],
    )
    trainer.train()
    assert moments.fits == [(1, "client-0"), (1, "client-1"), (2, "client-0"), (3, "client-0"), (3, "client-1")]
    assert {int(each["step"]) for each in moments.after[3, "client-1"].values()} == {6}


# ---- Steps of a fit ----


class OwnLoader(Trainer):
    """Reads data of an even length twice."""

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        return loader if len(self.train_dataset) % 2 else [*loader, *loader]


@pytest.mark.parametrize(("client_trainer_cls", "loaders"), [(Trainer, 3), (OwnLoader, 9)])
def test_steps_are_counted_once_per_length(tmp_path, monkeypatch, client_trainer_cls, loaders):
    """A class that loads in its own way is asked for every client."""
    sizes = [12, 7, 9] * 3
    kwargs = {"client_trainer_cls": client_trainer_cls}
    trainer = federated(tmp_path, tiny.clients_of(sizes), trainer_kwargs=kwargs)
    inner, calls = trainer.clients.trainer, []
    real = inner.get_train_dataloader
    monkeypatch.setattr(inner, "get_train_dataloader", lambda: calls.append(inner.train_dataset) or real())
    steps = [trainer.clients.num_steps(client_id) for client_id in trainer.clients.datasets]
    assert steps == [6 if client_trainer_cls is OwnLoader else 3, 2, 3] * 3
    assert [trainer.clients.num_samples(client_id) for client_id in trainer.clients.datasets][1:3] == [7, 9]
    assert len(calls) == loaders


# ---- Learning-rate schedule ----


class Rates(TrainerCallback):
    """The learning rate of every optimizer step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def plain_rates(name, total, warmup, **kwargs):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=tiny.PLAIN["learning_rate"])
    warmup = math.ceil(total * warmup) if warmup < 1 else warmup
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total, **kwargs)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SCHEDULES = [
    pytest.param("linear", 0, id="linear"),
    pytest.param("linear", 5, id="linear-warmup"),
    pytest.param("linear", 0.3, id="linear-warmup-fraction"),
    pytest.param("cosine", 0, id="cosine"),
    pytest.param("constant_with_warmup", 4, id="constant-warmup"),
]
ROUNDS = 4


def rates_of(tmp_path, sizes, name, warmup, **kwargs):
    rates = Rates()
    trainer = federated(
        tmp_path,
        tiny.clients_of(sizes),
        callbacks=[rates],
        num_rounds=ROUNDS,
        lr_scheduler_type=name,
        warmup_steps=warmup,
        **kwargs,
    )
    trainer.train()
    return rates.rates, trainer


@pytest.mark.parametrize(("name", "warmup"), SCHEDULES)
def test_lr_schedule_run_is_one_plain_schedule(tmp_path, name, warmup):
    rates, _ = rates_of(tmp_path, [12], name, warmup, lr_schedule="run")
    assert rates == pytest.approx(plain_rates(name, ROUNDS * 3, warmup), abs=1e-12, rel=0)


@pytest.mark.parametrize(("name", "warmup"), SCHEDULES)
def test_lr_schedule_round_starts_again(tmp_path, name, warmup):
    rates, _ = rates_of(tmp_path, [12], name, min(warmup, 2), lr_schedule="round")
    assert rates == pytest.approx(plain_rates(name, 3, min(warmup, 2)) * ROUNDS, abs=1e-12, rel=0)


def test_every_client_has_its_part_of_the_run_schedule(tmp_path):
    rates, trainer = rates_of(tmp_path, [12, 7], "cosine", 4, lr_schedule="run")
    long, short = plain_rates("cosine", ROUNDS * 3, 4), plain_rates("cosine", ROUNDS * 2, 4)
    expected = []
    for round in range(ROUNDS):
        expected += long[3 * round : 3 * round + 3] + short[2 * round : 2 * round + 2]
    assert rates == pytest.approx(expected, abs=1e-12, rel=0)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, abs=1e-12, rel=0)


def test_the_run_schedule_goes_on_with_kept_optimizers(tmp_path):
    rates, _ = rates_of(tmp_path, [12], "linear", 5, lr_schedule="run", client_optimizer_state="keep")
    assert rates == pytest.approx(plain_rates("linear", ROUNDS * 3, 5), abs=1e-12, rel=0)


def test_a_kept_optimizer_does_not_bring_back_its_last_learning_rate(tmp_path):
    rates, _ = rates_of(tmp_path, [12], "linear", 0, lr_schedule="round", client_optimizer_state="keep")
    assert rates == pytest.approx(plain_rates("linear", 3, 0) * ROUNDS, abs=1e-12, rel=0)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("lr_schedule", ["run", "round"])
def test_a_schedule_that_waits_for_metrics_is_refused(tmp_path, lr_schedule, name):
    # No fit ever sees a metric of the global model, so such a schedule would never change the learning rate.
    with pytest.raises(ValueError, match=f"`lr_scheduler_type='{name}'`"):
        tiny.arguments(
            tmp_path,
            lr_schedule=lr_schedule,
            lr_scheduler_type=name,
            eval_strategy="epoch",
            metric_for_best_model="loss",
        )
