"""Several clients in one pass: what comes out is what comes out of one after another.

The reference is the package's own fit of one client after another, which `test_client.py` holds against the plain
`Trainer`. Models in float64 make the claim sharp: there, sums in another order differ by 1e-15, and anything that
clients wrongly share by much more than the bounds below.
"""

import copy
import random
import threading
from dataclasses import replace

import effective
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoModel, Trainer

from fedex_hf import FederatedCallback, NonFiniteUpdateError, UnsupportedModelError
from fedex_hf.experimental import ParallelClients, stacked_factors
from fedex_hf.experimental.shared_pass import SharedPass
from fedex_hf.experimental.stacked_factors import ClientLinear


SIZES = (12, 7, 9)  # batches of 4, the last ones smaller; the first client makes a step more
FLOAT32, FLOAT64 = 3e-5, 1e-12  # largest difference of a trained value, which are up to 1
CAUSAL = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def roberta(**kwargs):
    return without_dropout(tiny.roberta(**kwargs))


def padded(features):
    """Pads to the longest of the batch, and says so."""
    longest = max(len(each["input_ids"]) for each in features)
    rows = [each["input_ids"] + [0] * (longest - len(each["input_ids"])) for each in features]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(rows).ne(0).long(),
        "labels": torch.tensor([each["labels"] for each in features]),
    }


def of_any_length(size, seed):
    lengths = torch.randint(3, tiny.LENGTH, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = zip(tiny.classification_data(size, seed), lengths, strict=True)
    return Dataset.from_list(
        [{"input_ids": row["input_ids"][:length], "labels": row["labels"]} for row, length in rows]
    )


CASES = {
    "head": (roberta, tiny.clients_of([*SIZES]), tiny.lora()),
    "lengths": (roberta, tiny.clients_of([*SIZES], of_any_length), tiny.lora(target_modules="all-linear")),
    "llama": (
        tiny.llama,
        tiny.clients_of([*SIZES], tiny.language_data),
        LoraConfig(**CAUSAL, target_modules="all-linear"),
    ),
    "gpt2": (
        lambda: without_dropout(tiny.gpt2()),
        tiny.clients_of([*SIZES], tiny.language_data),
        LoraConfig(**CAUSAL, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
}
CLIPPED = {"max_grad_norm": 0.05, "weight_decay": 0.1, "num_train_epochs": 2}


class Updates(FederatedCallback):
    """Keeps the updates."""

    def __init__(self):
        self.updates = []

    def on_client_end(self, args, state, control, update, **kwargs):
        self.updates.append(update)


def federated(output_dir, parallel, case="head", *, double=False, clients=None, trainer_kwargs=None, **kwargs):
    model, data, config = CASES[case]
    model = model().double() if double else model()
    given = {"train_dataset": data if clients is None else clients, "peft_config": config, "eval_dataset": None}
    if case == "lengths":
        given["data_collator"] = padded
    return tiny.federation(
        output_dir,
        model=model,
        parallel_clients=parallel,
        logging_steps=1,
        trainer_kwargs=given | (trainer_kwargs or {}),
        **({"remove_unused_columns": False} | kwargs),
    )


def fitted(output_dir, parallel, case="head", **kwargs):
    """The updates of the first round, before any aggregation."""
    trainer = federated(output_dir, parallel, case, aggregator="fedit", **kwargs)
    return trainer.collect_updates(trainer.sample_clients(round=1), round=1)


def apart(left, right):
    """The largest difference between two lists of updates, client by client."""
    assert [each.client_id for each in left] == [each.client_id for each in right]
    pairs = [(tiny.tensors_of(one), tiny.tensors_of(other)) for one, other in zip(left, right, strict=True)]
    return max(float((one[name] - other[name]).abs().max()) for one, other in pairs for name in one)


def steps_of(trainer):
    """Client -> what was logged at its steps."""
    names = ("round", "loss", "grad_norm", "learning_rate")
    return {
        client_id: [
            [entry[name] for name in names]
            for entry in trainer.state.log_history
            if "loss" in entry and entry["client_id"] == client_id
        ]
        for client_id in trainer.train_dataset
    }


# ---- The same as one after another ----


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_one_after_another_in_float64(tmp_path, case):
    one_by_one = fitted(tmp_path / "1", 1, case, double=True, **CLIPPED)
    together = fitted(tmp_path / "3", 3, case, double=True, **CLIPPED)
    assert next(iter(together[0].adapters.values())).A.dtype == torch.float64
    assert apart(one_by_one, together) < FLOAT64
    # What clients might wrongly share is far more apart than that: the clipping, the factors and the head of another.
    unclipped = fitted(tmp_path / "unclipped", 1, case, double=True, **CLIPPED | {"max_grad_norm": 0.0})
    assert apart(one_by_one, unclipped) > 1e6 * FLOAT64
    first = [replace(one_by_one[0], client_id=each.client_id) for each in one_by_one]
    assert apart(one_by_one, first) > 1e6 * FLOAT64


@pytest.mark.parametrize(
    ("case", "kwargs"),
    [
        pytest.param("head", {"lr_schedule": "run", "warmup_steps": 2}, id="schedule over the run"),
        pytest.param("lengths", {"client_optimizer_state": "keep"}, id="kept optimizers, lengths that differ"),
        pytest.param("llama", {"residual_storage": "adapter"}, id="residuals in a second adapter"),
        pytest.param("gpt2", {"gradient_accumulation_steps": 2}, id="gradient accumulation"),
        pytest.param("head", {"gradient_accumulation_steps": 2, "aggregator": "ffa"}, id="A frozen"),
        pytest.param("head", {"optim": "adafactor", "data_seed": 3, "client_fraction": 0.7}, id="another optimizer"),
        pytest.param("head", {"max_steps": 4, "label_smoothing_factor": 0.1}, id="steps, smoothed labels"),
    ],
)
def test_whole_runs_are_those_of_one_after_another(tmp_path, case, kwargs):
    one_by_one, together = (federated(tmp_path / str(n), n, case, **CLIPPED | kwargs) for n in (1, 2))
    outputs = [trainer.train() for trainer in (one_by_one, together)]
    expected, ours = (tiny.trained(trainer.model) for trainer in (one_by_one, together))
    assert max(float((expected[name] - ours[name]).abs().max()) for name in expected) < FLOAT32
    assert steps_of(one_by_one).keys() == steps_of(together).keys()
    for client_id, steps in steps_of(one_by_one).items():
        assert torch.tensor(steps_of(together)[client_id]).allclose(torch.tensor(steps), rtol=1e-3, atol=1e-5)
    assert outputs[0].global_step == outputs[1].global_step
    assert outputs[1].training_loss == pytest.approx(outputs[0].training_loss, rel=1e-5)


def test_a_bfloat16_base_agrees_to_its_own_rounding(tmp_path):
    def run(parallel):
        given = {"trainer_kwargs": {"model": tiny.llama().to(torch.bfloat16)}}
        updates = fitted(tmp_path / str(parallel), parallel, "llama", **given)
        return [torch.cat([each.flatten() for each in tiny.tensors_of(update).values()]) for update in updates]

    one_by_one, together = run(1), run(3)
    for place, expected in enumerate(one_by_one):
        assert (together[place] - expected).norm() < 1e-2 * expected.norm()
        assert (together[place] - one_by_one[place - 1]).norm() > 0.1 * expected.norm()


def test_runs_repeat_and_resume_bit_for_bit(tmp_path):
    kwargs = {"save_strategy": "epoch", "client_optimizer_state": "keep"}
    first, second = (federated(tmp_path / name, 2, **kwargs) for name in ("first", "second"))
    first.train()
    second.args.num_rounds = 1
    second.train()
    resumed = federated(tmp_path / "second", 2, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same_bytes(tiny.trained(first.model), tiny.trained(resumed.model))


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = nn.functional.multi_margin_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def masking(features):
    """Replaces tokens at random, from three global generators."""
    rows = torch.tensor([each["input_ids"] for each in features])
    rows = rows.masked_fill(torch.rand(rows.shape) < 0.3, 1 + int(2 * random.random()))
    rows[0, np.random.randint(tiny.LENGTH)] = 2
    return {"input_ids": rows, "labels": torch.tensor([each["labels"] for each in features])}


def drops_in_the_head():
    model = roberta()
    model.classifier.dropout.p = 0.5
    return model


class Endless(IterableDataset):
    def __init__(self, seed):
        self.rows = tiny.classification_data(7, seed).to_list()

    def __iter__(self):
        while True:
            yield from self.rows


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"trainer_kwargs": {"client_trainer_cls": OwnLoss}}, id="own loss"),
        pytest.param({"trainer_kwargs": {"data_collator": masking}}, id="random collator"),
        pytest.param({"trainer_kwargs": {"model": drops_in_the_head()}}, id="dropout in the head"),
        pytest.param({"clients": {f"{seed}": Endless(seed) for seed in range(3)}, "max_steps": 3}, id="streams"),
    ],
)
def test_what_surrounds_the_pass_is_each_clients_own(tmp_path, kwargs):
    one_by_one, together = (fitted(tmp_path / str(n), n, **copy.deepcopy(kwargs)) for n in (1, 3))
    assert apart(one_by_one, together) < FLOAT32


def test_random_numbers_and_the_model_are_left_as_they_were(tmp_path):
    trainer = federated(tmp_path, 3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    parameters, tensors = {*map(id, trainer.model.parameters())}, {**trainer.adapted.tensors}
    values = tiny.trained(trainer.model)
    trainer.collect_updates(["client-0", "client-2"], round=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert {*map(id, trainer.model.parameters())} == parameters
    assert [*map(id, trainer.adapted.tensors.values())] == [*map(id, tensors.values())]
    assert tiny.same_bytes(values, tiny.trained(trainer.model))
    assert "forward" not in vars(trainer.model.get_base_model().roberta)


def test_the_certificate_stays_exact(tmp_path):
    updates = Updates()
    trainer = federated(tmp_path, 3, trainer_kwargs={"callbacks": [updates]}, num_rounds=1)
    before = effective.effective(trainer.model)
    start = trainer.adapted.read()
    trainer.train()
    weights = [len(trainer.train_dataset[each.client_id]) for each in updates.updates]
    assert weights == [*SIZES]
    ours = effective.effective(trainer.model)
    for name, weight in before.items():
        deltas = [each.adapters[name].to_dense() for each in updates.updates]
        ideal = weight - start.adapters[name].to_dense() + effective.mean(deltas, weights)
        fedit = [effective.mean([getattr(u.adapters[name], f) for u in updates.updates], weights) for f in "BA"]
        assert torch.allclose(ours[name], ideal, rtol=0, atol=1e-7)
        off = weight + updates.updates[0].adapters[name].scaling * fedit[0] @ fedit[1] - ideal
        assert not torch.allclose(off, torch.zeros_like(off), rtol=0, atol=1e-7)
    rounds = [entry for entry in trainer.state.log_history if "aggregation_error" in entry]
    assert all(entry["aggregation_error"] < 1e-4 < entry["fedit_deviation"] for entry in rounds)


# ---- Clients that fail ----


def regression(size, seed, values=None):
    labels = torch.linspace(-1, 1, size).tolist() if values is None else values
    return tiny.classification_data(size, seed).remove_columns("labels").add_column("labels", labels)


def broken_rows(size, seed):
    """Fails when an example is read."""
    return tiny.classification_data(size, seed).with_transform(lambda rows: 1 / 0)


def impossible_labels(size, seed):
    """Fails in the loss, in the middle of an epoch."""
    data = tiny.classification_data(size, seed)
    return data.map(lambda row: {"labels": 99 if row["input_ids"] == data[0]["input_ids"] else row["labels"]})


def impossible_tokens(size, seed):
    """Fails in the common pass, where all clients are."""
    data = tiny.classification_data(size, seed).to_list()
    data[0]["input_ids"][0] = 10**6
    return Dataset.from_list(data)


@pytest.mark.parametrize("make", [broken_rows, impossible_labels, impossible_tokens])
def test_a_client_that_fails_is_left_out_and_the_others_are_as_without_it(tmp_path, make):
    clients = tiny.clients_of([*SIZES])
    expected = fitted(tmp_path / "1", 1, clients=clients)
    broken = clients | {"client-1": make(7, 101)}
    trainer = federated(tmp_path / "3", 3, clients=broken, aggregator="fedit", client_errors="skip")
    updates = trainer.collect_updates([*clients], round=1)
    assert [each.client_id for each in updates] == ["client-0", "client-2"]
    assert apart(updates, [expected[0], expected[2]]) < FLOAT32
    assert trainer.state.global_step == sum(trainer.clients.num_steps(each) for each in clients)
    trainer = federated(tmp_path / "raise", 3, clients=broken)
    with pytest.raises((ZeroDivisionError, IndexError)):
        trainer.collect_updates([*clients], round=1)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(federated(tmp_path / "new", 3).model))


def test_nan_in_the_data_of_a_client_stays_there(tmp_path):
    clients = {f"client-{index}": regression(size, index) for index, size in enumerate(SIZES)}
    broken = clients | {"client-1": regression(7, 1, values=[float("nan")] * 7)}
    kwargs = {"trainer_kwargs": {"model": without_dropout(regressor())}, "client_errors": "skip"}
    expected = fitted(tmp_path / "1", 1, clients=clients, **copy.deepcopy(kwargs))
    updates = fitted(tmp_path / "3", 3, clients=broken, **copy.deepcopy(kwargs))
    assert [each.client_id for each in updates] == ["client-0", "client-2"]
    assert apart(updates, [expected[0], expected[2]]) < FLOAT32
    kwargs["client_errors"] = "raise"
    with pytest.raises(NonFiniteUpdateError, match="client-1"):
        fitted(tmp_path / "raise", 3, clients=broken, **kwargs)


def regressor():
    torch.manual_seed(0)
    config = tiny.roberta().config
    config.num_labels = 1
    config.problem_type = "regression"
    return type(tiny.roberta())(config)


class Interrupts(FederatedCallback):
    """The user presses a key in the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_round_leaves_no_threads_and_the_last_rounds_model(tmp_path):
    trainer = federated(tmp_path, 3, client_errors="skip", trainer_kwargs={"callbacks": [Interrupts()]})
    before, threads = tiny.trained(trainer.model), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert threading.active_count() == threads
    assert tiny.same_bytes(before, tiny.trained(trainer.model))
    trainer.remove_callback(Interrupts)
    trainer.train()
    fresh = federated(tmp_path / "fresh", 3)
    fresh.train()
    assert tiny.same_bytes(tiny.trained(fresh.model), tiny.trained(trainer.model))


# ---- What would mix clients up is found out before the first step ----


class Centred(nn.Module):
    """Subtracts the mean over the batch: examples influence each other."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        x = self.inner(x)
        return x - x.mean(0, keepdim=True)


def centred():
    model = roberta()
    model.roberta.encoder.layer[0].output.LayerNorm = Centred(model.roberta.encoder.layer[0].output.LayerNorm)
    return model


class CallsTwice(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) + super().compute_loss(model, inputs)


class FirstClientsFactors(ClientLinear):
    """All clients use the factors of the first."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight[0])


class ClipsTogether(SharedPass):
    """One gradient norm over all clients."""

    def backward(self, losses, run_backward):
        super().backward(losses, run_backward)
        parameters = [each for own in self._factors.clients for each in own.values() if each.requires_grad]
        nn.utils.clip_grad_norm_(parameters, CLIPPED["max_grad_norm"])


def test_a_pass_that_mixes_factors_up_is_found_out_and_would_be_far_off(tmp_path, monkeypatch):
    expected = fitted(tmp_path / "1", 1, double=True)
    monkeypatch.setattr(stacked_factors, "ClientLinear", FirstClientsFactors)
    trainer = federated(tmp_path / "3", 3, double=True, aggregator="fedit")
    with pytest.raises(UnsupportedModelError, match="off those it gets alone"):
        trainer.collect_updates(trainer.sample_clients(1), round=1)
    trainer._parallel._pass._checked = {False, True}  # as if it had not looked
    assert apart(trainer.collect_updates(trainer.sample_clients(1), round=1), expected) > 1e6 * FLOAT64


def test_one_gradient_norm_over_all_clients_would_be_far_off(tmp_path):
    trainer = federated(tmp_path / "3", 3, double=True, aggregator="fedit", **CLIPPED)
    trainer._parallel._pass.__class__ = ClipsTogether
    updates = trainer.collect_updates(trainer.sample_clients(1), round=1)
    assert apart(updates, fitted(tmp_path / "1", 1, double=True, **CLIPPED)) > 1e6 * FLOAT64


@pytest.mark.parametrize(
    ("error", "says", "kwargs"),
    [
        (UnsupportedModelError, "Examples influence each other", {"trainer_kwargs": {"model": centred()}}),
        (ValueError, "calls the model more than once", {"trainer_kwargs": {"client_trainer_cls": CallsTwice}}),
    ],
    ids=["examples that influence each other", "two calls per loss"],
)
def test_found_out_in_the_first_pass(tmp_path, error, says, kwargs):
    trainer = federated(tmp_path, 3, client_errors="skip", **kwargs)
    before = tiny.trained(trainer.model)
    with pytest.raises(error, match=says):
        trainer.train()
    assert tiny.same_bytes(before, tiny.trained(trainer.model))


class OwnStep(Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


def bare():
    return AutoModel.from_config(roberta().config)


def with_config(**kwargs):
    return {"trainer_kwargs": {"peft_config": tiny.lora(**kwargs)}}


@pytest.mark.parametrize(
    ("says", "kwargs"),
    [
        (("dropout", "embeddings.dropout", "p=0.1"), {"trainer_kwargs": {"model": tiny.roberta()}}),
        (("dropout", "lora_dropout", "p=0.2"), with_config(lora_dropout=0.2)),
        (("`client_ranks`", "do not stack"), {"client_ranks": {"client-0": 2}}),
        (("fedex", "base weights of their own"), {"aggregator_kwargs": {"assignment": "keep"}}),
        (("`bf16`", "autocast"), {"bf16": True}),
        (("checkpointing", "Switch it off"), {"gradient_checkpointing": True}),
        (("`optim=", "backward pass"), {"optim": "lomo"}),
        (("`OwnStep`", "`training_step`"), {"trainer_kwargs": {"client_trainer_cls": OwnStep}}),
        (("LoRA `Embedding`", "word_embeddings"), with_config(target_modules=["word_embeddings", "query"])),
        (("trained in full", "LayerNorm"), with_config(modules_to_save=["classifier", "LayerNorm"])),
        (("trained in full", "lora_B"), with_config(lora_bias=True)),
        (
            ("encoder-decoder",),
            {
                "trainer_kwargs": {
                    "model": without_dropout(tiny.t5()),
                    "peft_config": tiny.lora(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]),
                }
            },
        ),
        (
            ("`RobertaModel`", "with a head"),
            {"trainer_kwargs": {"model": without_dropout(bare()), "peft_config": tiny.lora(task_type=None)}},
        ),
    ],
)
def test_refused_by_name_in_the_constructor(tmp_path, says, kwargs):
    with pytest.raises((ValueError, UnsupportedModelError)) as raised:
        federated(tmp_path, 2, **kwargs)
    for part in (*says, "parallel_clients"):
        assert part in str(raised.value)


def test_one_client_at_a_time_goes_without(tmp_path):
    assert federated(tmp_path, 1)._parallel is None
    assert isinstance(federated(tmp_path, 2)._parallel, ParallelClients)
    with pytest.raises(ValueError, match="`parallel_clients=0` is not allowed"):
        federated(tmp_path, 0)


class Watching(FederatedCallback):
    """Notes what callbacks are told."""

    def __init__(self):
        self.ends, self.rates = [], []

    def on_client_end(self, args, state, control, update, **kwargs):
        self.ends.append((update.round, update.client_id, state.global_step))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.rates.append((optimizer.param_groups[0]["lr"], lr_scheduler.get_last_lr()[0]))


def test_callbacks_are_told_what_they_are_told_one_after_another(tmp_path):
    watching = []
    for parallel in (1, 2):
        watching.append(Watching())
        federated(tmp_path / str(parallel), parallel, trainer_kwargs={"callbacks": [watching[-1]]}).train()
    assert watching[0].ends == watching[1].ends
    assert sorted(watching[0].rates) == sorted(watching[1].rates)
