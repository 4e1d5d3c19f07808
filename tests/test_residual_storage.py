"""Federations whose residuals ride in a frozen adapter: on bases of every precision, and truncated."""

import functools

import numpy as np
import pytest
import tiny
import torch
from effective import base_bytes, effective, mean, norm, same, update_of
from kill_target import assert_same, outcome
from layer_kinds import quantize
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from fedex_hf import FederatedCallback, FederatedTrainer, FedExAggregator, LowRankDelta
from fedex_hf.checkpoint import checkpoints_in


SIZES = (12, 7, 9)
ROUNDS = 4
TOLERANCE = 1e-5
LEARNING_RATE = 3e-2
LORA = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
BASES = ["bfloat16", "float16", "nf4", "int8"]
pytestmark = pytest.mark.filterwarnings("ignore")


def model_on(base):
    model = tiny.llama()
    return quantize(model, base) if base in ("nf4", "int8") else model.to(getattr(torch, base))


class Recorder(FederatedCallback):
    """Effective weights of the live model at both ends of a round and after each fit."""

    def __init__(self):
        self.before, self.clients, self.errors, self.loss = {}, [], [], []

    def on_round_begin(self, args, state, control, trainer, **kwargs):
        self.before, self.clients = effective(trainer.model), []

    def on_client_end(self, args, state, control, trainer, update, **kwargs):
        self.clients.append((update.num_examples, effective(trainer.model)))

    def on_round_end(self, args, state, control, trainer, **kwargs):
        now, weights = effective(trainer.model), [weight for weight, _ in self.clients]
        ideal = {name: mean([each[name] for _, each in self.clients], weights) for name in now}
        change = norm([ideal[name] - self.before[name] for name in now])
        self.errors.append(norm([now[name] - ideal[name] for name in now]) / change)


def federation(output_dir, base="float32", trainer_cls=FederatedTrainer, trainer_kwargs=None, **kwargs):
    given = {
        "model": model_on(base),
        "args": tiny.arguments(
            output_dir, **({"num_rounds": ROUNDS, "learning_rate": LEARNING_RATE, "logging_strategy": "no"} | kwargs)
        ),
        "train_dataset": tiny.clients_of(list(SIZES), tiny.language_data),
        "eval_dataset": tiny.language_data(16, seed=1),
        "peft_config": LoraConfig(**LORA),
    }
    return trainer_cls(**(given | (trainer_kwargs or {})))


def rounds_of(trainer):
    return [entry for entry in trainer.state.log_history if "aggregation_error" in entry]


def losses_of(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of four rounds with checkpoints, each made once: base -> trainer, recorder, base bytes at the start."""

    @functools.cache
    def of(base, storage="auto"):
        recorder = Recorder()
        trainer = federation(
            tmp_path_factory.mktemp(f"{base}-{storage}"),
            base,
            trainer_kwargs={"callbacks": [recorder]},
            residual_storage=storage,
            eval_strategy="epoch",
            eval_on_start=True,
            save_strategy="epoch",
        )
        start = base_bytes(trainer.model)
        trainer.train()
        return trainer, recorder, start

    return of


# ---- Every base ----


@pytest.mark.parametrize("base", BASES)
def test_it_trains_as_with_a_float32_base(finished, base):
    trainer, _, _ = finished(base)
    reference, _, _ = finished("float32")
    losses, expected = losses_of(trainer), losses_of(reference)
    assert len(losses) == len(expected) == ROUNDS + 1
    assert losses == sorted(losses, reverse=True)
    falls = [[of[0] - loss for loss in of[1:]] for of in (losses, expected)]
    assert falls[1][-1] > 0.05
    for here, there in zip(*falls, strict=True):  # as close as the bases themselves
        assert here == pytest.approx(there, rel=0.15)


@pytest.mark.parametrize("base", BASES)
def test_the_stored_base_is_unchanged(finished, base):
    trainer, _, start = finished(base)
    assert trainer.adapted.storage == "adapter"
    assert start
    assert same(base_bytes(trainer.model), start)
    folded, _, before = finished("float32")
    assert folded.adapted.storage == "base"
    assert not same(base_bytes(folded.model), before)


@pytest.mark.parametrize("base", [*BASES, "float32"])
def test_every_round_is_exact_and_the_certificate_says_so(finished, base):
    """Effective weight = weighted mean of the clients', by the formulas of `effective.py`, from the live model."""
    trainer, recorder, _ = finished(base)
    assert len(recorder.errors) == ROUNDS
    for entry, found in zip(rounds_of(trainer), recorder.errors, strict=True):
        assert 0 < found <= TOLERANCE
        assert entry["aggregation_error"] == pytest.approx(found, rel=1e-2)
        assert entry["fedit_deviation"] > 100 * TOLERANCE


class Forgotten(FederatedTrainer):
    """Leaves the residuals out."""

    def apply_update(self, update):
        super().apply_update(type(update)(update.adapters, update.tensors))


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_a_forgotten_residual_shows(tmp_path, base):
    recorder = Recorder()
    trainer = federation(tmp_path, base, Forgotten, {"callbacks": [recorder]}, num_rounds=2)
    trainer.train()
    assert min(recorder.errors) > 100 * TOLERANCE
    for entry, found in zip(rounds_of(trainer), recorder.errors, strict=True):
        assert entry["aggregation_error"] == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_a_client_sees_the_residuals(finished, base):
    """Evaluation and generation as well: without the carrier it would be another model."""
    trainer, _, _ = finished(base)
    ledger, loss = trainer.federation.ledger, trainer.evaluate()["eval_loss"]
    assert loss == losses_of(trainer)[-1]
    prompt = {"input_ids": torch.tensor([[5, 6, 7]])}
    generate = functools.partial(trainer.model.generate, **prompt, max_new_tokens=3, output_logits=True)
    with_it = generate(return_dict_in_generate=True, do_sample=False).logits[0]
    predicted = trainer.predict(trainer.eval_dataset).metrics["test_loss"]
    assert predicted == pytest.approx(loss, rel=1e-6)
    try:
        trainer.adapted.install(type(ledger)())
        assert abs(trainer.evaluate()["eval_loss"] - loss) > 1e-4 * loss
        without = generate(return_dict_in_generate=True, do_sample=False).logits[0]
        assert (with_it - without).norm() > 1e-4 * with_it.norm()
    finally:
        trainer.adapted.install(ledger)
    assert trainer.evaluate()["eval_loss"] == loss


@pytest.mark.parametrize(("base", "round"), [("nf4", 1), ("nf4", 3), ("int8", 2), ("bfloat16", 3)])
def test_resumed_equals_uninterrupted(finished, tmp_path, base, round):
    """Bit for bit; the ledger of the square layers turns dense in round 4."""
    reference, _, _ = finished(base)
    checkpoint = checkpoints_in(reference.args.output_dir)[round - 1]
    trainer = federation(tmp_path, base, eval_strategy="epoch", eval_on_start=True, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    expected, found = outcome(reference), outcome(trainer)
    assert reference.federation.ledger.matrices
    assert reference.federation.ledger.factors
    # What an evaluation at the start adds to the log, a resumed run has twice.
    for each in (expected, found):
        each["log_history"] = [entry for entry in each["log_history"] if "aggregation_error" in entry]
        each.pop("best_metric")
    assert_same(found, expected)


def test_a_checkpoint_of_another_base_is_refused(finished, tmp_path):
    checkpoint = checkpoints_in(finished("nf4")[0].args.output_dir)[0]
    for base in ("float32", "int8"):
        trainer = federation(tmp_path / base, base, save_strategy="no")
        with pytest.raises(ValueError, match="belongs to another run"):
            trainer.train(resume_from_checkpoint=str(checkpoint))


# ---- The two storages ----


def test_both_storages_are_the_same_run(finished):
    folded, _, _ = finished("float32", "base")
    carried, _, start = finished("float32", "adapter")
    assert (folded.adapted.storage, carried.adapted.storage) == ("base", "adapter")
    assert same(base_bytes(carried.model), start)
    assert losses_of(carried) == pytest.approx(losses_of(folded), rel=1e-4)
    one, other = effective(folded.model), effective(carried.model)
    begin = finished("float32", "base")[2]
    assert begin.keys() == start.keys()
    assert norm([one[name] - other[name] for name in one]) < 1e-3 * norm(list(one.values()))


@pytest.mark.parametrize("assignment", ["reinitialise", "keep"])
def test_other_assignments_are_exact_beside_a_low_precision_base(tmp_path, assignment):
    trainer = federation(tmp_path, "bfloat16", num_rounds=3, aggregator_kwargs={"assignment": assignment})
    start = base_bytes(trainer.model)
    assert trainer.train().metrics["max_aggregation_error"] <= TOLERANCE
    assert same(base_bytes(trainer.model), start)


@pytest.mark.parametrize("aggregator", ["fedit", "ffa"])
def test_a_method_without_residuals_carries_none(tmp_path, aggregator):
    trainer = federation(tmp_path, "bfloat16", num_rounds=1, aggregator=aggregator, residual_storage="adapter")
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]


@pytest.mark.parametrize("storage", ["base", "adapter"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weights(tmp_path, start, storage):
    kwargs = {"peft_config": LoraConfig(**LORA, init_lora_weights=start)}
    made = functools.partial(
        federation, trainer_kwargs=kwargs, residual_storage=storage, num_rounds=3, save_strategy="epoch"
    )
    trainer = made(tmp_path / "whole")
    plain = federation(tmp_path / "plain")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    layer = next(iter(trainer.adapted.sites.values())).layer
    assert norm([update_of(layer, "default")]) > 0.1  # it does start from the weights
    assert trainer.train().metrics["max_aggregation_error"] <= TOLERANCE
    resumed = made(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoints_in(tmp_path / "whole")[0]))
    assert_same(outcome(resumed)["model"], outcome(trainer)["model"])


def test_the_best_round_comes_back_whole(tmp_path):
    trainer = federation(
        tmp_path,
        "bfloat16",
        num_rounds=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last
    )
    trainer.train()
    losses = losses_of(trainer)
    assert trainer.state.best_metric == losses[0] > losses[2]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


# ---- Half precision in training ----


@pytest.mark.parametrize(
    ("base", "storage"), [("float32", "base"), ("float32", "adapter"), ("bfloat16", "adapter"), ("nf4", "adapter")]
)
def test_bfloat16_autocast(tmp_path, base, storage):
    """Activations are rounded, effective weights are not."""
    trainer = federation(tmp_path, base, bf16=True, residual_storage=storage, num_rounds=3, eval_strategy="epoch")
    assert trainer.clients.trainer.accelerator.native_amp
    start = base_bytes(trainer.model)
    result = trainer.train()
    assert result.metrics["max_aggregation_error"] <= TOLERANCE
    assert same(base_bytes(trainer.model), start) == (storage == "adapter")
    assert losses_of(trainer) == sorted(losses_of(trainer), reverse=True)
    assert all(each.A.dtype == torch.float32 for each in trainer.federation.state.adapters.values())


def test_float16_autocast_is_none_without_a_gpu(tmp_path):
    """accelerate ignores `fp16=True` on the CPU, for a plain `Trainer` as well: the run is the one without it."""
    plain = Trainer(tiny.llama(), TrainingArguments(str(tmp_path), fp16=True, use_cpu=True))
    trainers = [federation(tmp_path / str(fp16), "bfloat16", fp16=fp16, num_rounds=2) for fp16 in (True, False)]
    assert not plain.accelerator.native_amp
    assert not trainers[0].clients.trainer.accelerator.native_amp
    for trainer in trainers:
        assert trainer.train().metrics["max_aggregation_error"] <= TOLERANCE
    assert_same(outcome(trainers[0])["model"], outcome(trainers[1])["model"])


# ---- Truncated ----


class Truncated(FederatedTrainer):
    """Keeps what went into each ledger, dense."""

    sums: list

    def apply_update(self, update):
        def dense(delta):
            return delta.scaling * delta.B.double().numpy() @ delta.A.double().numpy()

        ledger = self.federation.ledger.factors
        self.sums.append(
            {
                name: dense(residual) + (dense(ledger[name]) if name in ledger else 0.0)
                for name, residual in update.residuals.items()
            }
        )
        super().apply_update(update)


def lost_of(sums, ranks):
    """Share of the energy beyond these ranks, by SVD."""
    lost = whole = 0.0
    for name, matrix in sums.items():
        S = np.linalg.svd(matrix, compute_uv=False)
        lost, whole = lost + np.square(S[ranks[name] :]).sum(), whole + np.square(S).sum()
    return lost / whole


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("limits", [{"residual_rank": 3}, {"residual_tolerance": 0.05}], ids=str)
def test_a_truncated_ledger_says_what_it_loses(tmp_path, base, limits):
    trainer = federation(tmp_path, base, Truncated, num_rounds=3, **limits)
    trainer.sums = []
    trainer.train()
    for number, (entry, sums) in enumerate(zip(rounds_of(trainer), trainer.sums, strict=True)):
        if "residual_rank" in limits:
            ranks = dict.fromkeys(sums, 3)
        else:  # the fewest that lose at most 5 % of each layer's energy
            ranks = {}
            for name, matrix in sums.items():
                energy = np.square(np.linalg.svd(matrix, compute_uv=False))
                ranks[name] = next(k for k in range(1, 33) if energy[k:].sum() <= 0.05 * energy.sum())
        expected = lost_of(sums, ranks)
        assert entry["ledger_lost_energy"] == pytest.approx(expected, rel=1e-3)
        assert 0 < expected < (1 if "residual_rank" in limits else 0.05)
        assert entry["aggregation_error"] > 10 * TOLERANCE  # and the certificate shows it
        assert entry["aggregation_error"] < entry["fedit_deviation"]
        if number == 2:
            assert {name: delta.rank for name, delta in trainer.federation.ledger.factors.items()} == ranks


def test_a_limit_that_is_not_reached_costs_nothing(tmp_path):
    trainer = federation(tmp_path, "bfloat16", num_rounds=2, residual_rank=30)
    trainer.train()
    for entry in rounds_of(trainer):
        assert entry["ledger_lost_energy"] == 0.0
        assert entry["aggregation_error"] <= TOLERANCE
    whole = federation(tmp_path / "whole", "bfloat16", num_rounds=1)
    whole.train()
    assert all("ledger_lost_energy" not in entry for entry in rounds_of(whole))


class Untruncated(FederatedTrainer):
    """Keeps each round's exact residuals, dense, from the clients' factors."""

    residuals: list

    def aggregate(self, round, updates):
        weights = np.array(self.client_weights(updates)) / sum(self.client_weights(updates))
        found = {}
        for name in updates[0].adapters:
            deltas = [update.adapters[name] for update in updates]
            A, B = ([getattr(delta, factor).double().numpy() for delta in deltas] for factor in "AB")
            mean_A, mean_B = (sum(w * x for w, x in zip(weights, xs)) for xs in (A, B))
            products = sum(w * (b @ a) for w, a, b in zip(weights, A, B))
            found[name] = deltas[0].scaling * (products - mean_B @ mean_A)
        self.residuals.append(found)
        return super().aggregate(round, updates)


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_a_truncated_residual_says_what_it_loses(tmp_path, base):
    """The paper's best inexact approximation (section 3), with the energy that it leaves out."""
    trainer = federation(tmp_path, base, Untruncated, {"aggregator": FedExAggregator(residual_rank=2)}, num_rounds=3)
    trainer.residuals = []
    trainer.train()
    for entry, residuals in zip(rounds_of(trainer), trainer.residuals, strict=True):
        expected = lost_of(residuals, dict.fromkeys(residuals, 2))
        assert entry["residual_lost_energy"] == pytest.approx(expected, rel=1e-3)
        assert 0.001 < expected < 0.9
        assert 10 * TOLERANCE < entry["aggregation_error"] < entry["fedit_deviation"]
        # What is lost of the residuals is all that the certificate sees.
        assert entry["aggregation_error"] == pytest.approx(entry["fedit_deviation"] * expected**0.5, rel=1e-3)
    exact = federation(tmp_path / "exact", base, trainer_kwargs={"aggregator": FedExAggregator()}, num_rounds=1)
    exact.train()
    assert "residual_lost_energy" not in rounds_of(exact)[0]


def test_dense_and_factored_residuals_of_one_round_are_the_same(tmp_path):
    """What the certificate compares does not depend on the form that the carrier has."""
    trainer = federation(tmp_path, "bfloat16", num_rounds=1)
    trainer.train()
    name, site = next(iter(trainer.adapted.sites.items()))
    delta = trainer.federation.ledger.factors[name]
    wide = LowRankDelta(delta.A.repeat(20, 1), delta.B.repeat(1, 20) / 20, delta.scaling)
    carrier = site.layer.lora_A["fedex_residual"].weight
    before = effective(trainer.model)
    trainer.adapted.install(type(trainer.federation.ledger)(matrices={name: site.dense(wide).float()}))
    assert site.layer.lora_A["fedex_residual"].weight.shape != carrier.shape
    assert norm([effective(trainer.model)[name] - before[name]]) <= 1e-6 * norm([before[name]])
