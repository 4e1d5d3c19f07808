"""Clients of different ranks: after every round, effective weight = weighted mean of the clients'.

Effective weights are read from the live model (`effective.py`): whatever a client trained, at whatever scaling, and
whatever its base or a second adapter held beside it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from effective import effective, modules_of
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from fedex_hf import (
    AdaptedModel,
    CheckpointMismatchError,
    ClientUpdate,
    FederatedCallback,
    FederatedTrainer,
    FedExAggregator,
    FedITAggregator,
    LowRankDelta,
)
from fedex_hf import checkpoint as ckpt


TOLERANCE = 1e-5
Weights = dict[str, torch.Tensor]


# ---- The test's own view ----


def ranks_of(model: nn.Module) -> dict[str, int]:
    found = {}
    for name, module in modules_of(model).items():
        embedded = "default" in module.lora_embedding_A
        A = module.lora_embedding_A["default"] if embedded else module.lora_A["default"].weight
        B = module.lora_embedding_B["default"] if embedded else module.lora_B["default"].weight
        assert A.shape[0] == B.shape[1] == module.r["default"]
        assert A.requires_grad
        assert B.requires_grad
        found[name] = A.shape[0]
    return found


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


@dataclass
class Round:
    """Effective weights before a round, at both ends of each client's fit, and after."""

    before: Weights
    sizes: list[int] = field(default_factory=list)
    starts: dict[str, Weights] = field(default_factory=dict)
    ends: dict[str, Weights] = field(default_factory=dict)
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    scalings: dict[str, dict[str, float]] = field(default_factory=dict)
    after: Weights = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)

    def ideal(self, layer: str) -> torch.Tensor:
        pairs = zip(self.sizes, self.ends.values(), strict=True)
        return sum(size / sum(self.sizes) * end[layer] for size, end in pairs)

    def change(self) -> float:
        return norm([self.ideal(layer) - self.before[layer] for layer in self.before])

    def layer_errors(self) -> dict[str, float]:
        return {
            layer: norm([self.after[layer] - self.ideal(layer)]) / norm([self.ideal(layer) - before])
            for layer, before in self.before.items()
        }

    def error(self) -> float:
        return norm([self.after[layer] - self.ideal(layer) for layer in self.before]) / self.change()


class RecordingTrainer(FederatedTrainer):
    """Looks at the live model at both ends of each fit; a client that `fails` raises after it has trained."""

    def fails(self, client_id: str, round: int) -> bool:
        return False

    def fit_client(self, client_id: str, round: int) -> ClientUpdate:
        record, fit = vars(self).setdefault("rounds", [Round(effective(self.model))])[-1], self.clients.fit

        def look_and_fit(*args: Any) -> Any:
            record.starts[client_id] = effective(self.model)
            return fit(*args)

        self.clients.fit = look_and_fit
        try:
            update = super().fit_client(client_id, round)
        finally:
            self.clients.fit = fit
        if self.fails(client_id, round):
            raise RuntimeError("lost the connection")
        record.ends[client_id] = effective(self.model)
        record.sizes.append(len(self.train_dataset[client_id]))
        record.ranks[client_id] = ranks_of(self.model)
        modules = modules_of(self.model)
        record.scalings[client_id] = {name: module.scaling["default"] for name, module in modules.items()}
        return update


class Recorder(FederatedCallback):
    def on_round_begin(self, args, state, control, trainer, **kwargs):
        vars(trainer).setdefault("rounds", []).append(Round(effective(trainer.model)))

    def on_round_end(self, args, state, control, trainer, round, **kwargs):
        record = trainer.rounds[-1]
        record.after = effective(trainer.model)
        record.logged = next(entry for entry in reversed(state.log_history) if entry.get("round") == round)


def assert_exact(rounds: list[Round]) -> None:
    """The one assertion of this file; its twins below show that it can fail."""
    assert rounds
    for number, record in enumerate(rounds, start=1):
        for layer, error in record.layer_errors().items():
            assert error <= TOLERANCE, f"round {number}, {layer}: relative error {error:.2e}"


def assert_common_start(rounds: list[Round]) -> None:
    """Whatever its rank, a client starts from the global effective weight."""
    for number, record in enumerate(rounds, start=1):
        for client_id, start in record.starts.items():
            distance = norm([start[layer] - before for layer, before in record.before.items()]) / record.change()
            assert distance <= TOLERANCE, f"round {number}, {client_id}: starts {distance:.2e} away"


def assert_certificate(rounds: list[Round]) -> None:
    for record in rounds:
        assert record.logged["aggregation_error"] == pytest.approx(record.error(), rel=1e-3, abs=1e-9)


# ---- Runs ----


class Kinds(nn.Module):
    """An embedding, a convolution and a linear layer, with the loss that `Trainer` wants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(tiny.VOCAB, 12)
        self.conv = nn.Conv1d(12, 10, 3)
        self.mix = nn.Linear(10, 14)
        self.head = nn.Linear(14, tiny.LABELS)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.conv(self.tokens(input_ids).mT).mT.tanh()
        logits = self.head(self.mix(hidden).tanh().mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


QUERY_VALUE = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}


@dataclass(frozen=True)
class Case:
    """A federation whose clients have 4, 8, 4, ... examples, so one or two steps each."""

    ranks: dict[str, int]
    lora: dict[str, Any]
    make_model: Any = tiny.roberta
    num_clients: int = 3
    arguments: dict[str, Any] = field(default_factory=dict)

    def trainer(self, output_dir: Path, cls: type[FederatedTrainer] = RecordingTrainer, **kwargs: Any) -> Any:
        make = tiny.language_data if self.make_model in (tiny.gpt2, tiny.llama) else tiny.classification_data
        given = {"num_rounds": 3, "logging_strategy": "no", "client_ranks": self.ranks} | self.arguments
        aggregator = kwargs.pop("aggregator", None)
        return cls(
            model=self.make_model(),
            args=tiny.arguments(output_dir, **(given | kwargs)),
            train_dataset=tiny.clients_of([4, 8, 4, 8, 4][: self.num_clients], make),
            peft_config=LoraConfig(**self.lora),
            aggregator=aggregator,
            callbacks=[Recorder()],
        )

    def run(self, output_dir: Path, **kwargs: Any) -> Any:
        trainer = self.trainer(output_dir, **kwargs)
        trainer.train()
        return trainer


MIXED = Case({"client-0": 2, "client-2": 8}, QUERY_VALUE | {"r": 4, "lora_alpha": 8})
CASES = {
    "2, 4 and 8 around 4": MIXED,
    "all larger": Case({f"client-{i}": 5 for i in range(3)}, QUERY_VALUE | {"r": 2, "lora_alpha": 3}),
    "all smaller": Case(
        {"client-0": 1, "client-1": 3, "client-2": 2}, QUERY_VALUE | {"r": 5, "lora_alpha": 8, "use_rslora": True}
    ),
    "patterns": Case(
        {"client-0": 3, "client-1": 6},
        {
            "task_type": "CAUSAL_LM",
            "target_modules": ["c_attn", "c_fc"],
            "fan_in_fan_out": True,
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {"c_attn": 6},
            "alpha_pattern": {"c_fc": 5},
        },
        tiny.gpt2,
    ),
    "other kinds of layers": Case(
        {"client-0": 2, "client-2": 5},
        {"target_modules": ["tokens", "conv", "mix"], "modules_to_save": ["head"], "r": 3, "lora_alpha": 6},
        Kinds,
    ),
    "beside the base": Case(
        MIXED.ranks, MIXED.lora | {"lora_alpha": 7}, num_clients=3, arguments={"residual_storage": "adapter"}
    ),
    "afresh every round": Case(
        MIXED.ranks, MIXED.lora, arguments={"aggregator_kwargs": {"assignment": "reinitialise", "seed": 3}}
    ),
}


def by_peft(case: Case, layer: str, rank: int) -> float:
    """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA."""
    alphas = case.lora.get("alpha_pattern", {})
    alpha = next((alphas[key] for key in alphas if layer.endswith(key)), case.lora["lora_alpha"])
    return alpha / math.sqrt(rank) if case.lora.get("use_rslora") else alpha / rank


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def ran(request, tmp_path_factory) -> tuple[Case, Any]:
    trainer = request.param.trainer(tmp_path_factory.mktemp("ran"))
    trainer.parameters_before = {id(parameter) for parameter in trainer.model.parameters()}
    trainer.global_ranks = ranks_of(trainer.model)
    trainer.train()
    return request.param, trainer


def test_effective_weight_is_the_mean_of_the_clients(ran):
    _, trainer = ran
    assert len(trainer.rounds) == 3
    assert_exact(trainer.rounds)
    assert_certificate(trainer.rounds)
    for record in trainer.rounds[1:]:  # the clients disagree, so averaging factors would lose something
        assert record.logged["fedit_deviation"] > 100 * TOLERANCE


def test_every_client_starts_from_the_global_weight(ran):
    _, trainer = ran
    assert_common_start(trainer.rounds)


def test_clients_trained_at_their_own_rank_and_scaling(ran):
    case, trainer = ran
    for record in trainer.rounds:
        assert len(record.ranks) == 3
        for client_id, ranks in record.ranks.items():
            own = case.ranks.get(client_id)
            assert ranks == {layer: own or rank for layer, rank in trainer.global_ranks.items()}
            for layer, rank in ranks.items():
                assert record.scalings[client_id][layer] == by_peft(case, layer, rank)


def test_the_model_ends_at_the_global_rank_with_its_own_parameters(ran):
    case, trainer = ran
    assert ranks_of(trainer.model) == trainer.global_ranks
    trained = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained <= trainer.parameters_before
    for layer, module in modules_of(trainer.model).items():
        assert module.scaling["default"] == by_peft(case, layer, trainer.global_ranks[layer])


def draw(*key: int) -> float:
    seed = sum(number * 1009**place for place, number in enumerate(key, start=1))
    return float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))


class DroppingOut(RecordingTrainer):
    def fails(self, client_id: str, round: int) -> bool:
        return draw(round, int(client_id[-1])) < 0.35


def test_twenty_rounds_with_dropouts(tmp_path):
    """Five clients of four ranks; each round samples four, and some of these fail after they have trained."""
    case = Case(
        {"client-0": 1, "client-1": 2, "client-3": 7, "client-4": 2},
        MIXED.lora,
        num_clients=5,
        arguments={"num_rounds": 20, "client_fraction": 0.8, "client_errors": "skip", "learning_rate": 3e-3},
    )
    trainer = case.run(tmp_path, cls=DroppingOut)
    arrived = [len(record.ends) for record in trainer.rounds]
    assert len(arrived) == 20
    assert min(arrived) < 3 < max(arrived) == 4
    assert {client_id for record in trainer.rounds for client_id in record.ends} == set(trainer.train_dataset)
    assert_exact(trainer.rounds)
    assert_certificate(trainer.rounds)
    assert_common_start(trainer.rounds)


# ---- The assertions can fail ----


class ZeroPadded(FedExAggregator):
    """FedIT for ranks that differ: what a client does not train counts as zero, what does not fit is cut off."""

    def aggregate(self, updates, client_weights, start=None):
        padded = []
        for update in updates:
            own = {}
            for layer, delta in update.adapters.items():
                like = start.adapters[layer]
                A, B = torch.zeros_like(like.A), torch.zeros_like(like.B)
                rank = min(delta.rank, like.rank)
                A[:rank], B[:, :rank] = delta.A[:rank], delta.B[:, :rank] * (delta.scaling / like.scaling)
                own[layer] = LowRankDelta(A, B, like.scaling)
            padded.append(ClientUpdate(update.client_id, update.round, update.num_examples, own, update.tensors))
        return FedITAggregator().aggregate(padded, client_weights)


class SurplusForgotten(FedExAggregator):
    def aggregate(self, updates, client_weights, start=None):
        cut = []
        for update in updates:
            own = {
                layer: LowRankDelta(
                    delta.A[: start.adapters[layer].rank], delta.B[:, : start.adapters[layer].rank], delta.scaling
                )
                for layer, delta in update.adapters.items()
            }
            cut.append(ClientUpdate(**(vars(update) | {"adapters": own})))
        return super().aggregate(cut, client_weights, start)


class ScalingsForgotten(FedExAggregator):
    def aggregate(self, updates, client_weights, start=None):
        same = [
            ClientUpdate(
                **(
                    vars(update)
                    | {
                        "adapters": {
                            layer: LowRankDelta(delta.A, delta.B, start.adapters[layer].scaling)
                            for layer, delta in update.adapters.items()
                        }
                    }
                )
            )
            for update in updates
        ]
        return super().aggregate(same, client_weights, start)


@pytest.mark.parametrize("aggregator", [ZeroPadded, SurplusForgotten, ScalingsForgotten])
def test_the_assertion_fails_for(aggregator, tmp_path):
    trainer = MIXED.run(tmp_path, aggregator=aggregator())
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(trainer.rounds)
    assert max(record.error() for record in trainer.rounds) > 100 * TOLERANCE
    assert_certificate(trainer.rounds)  # the certificate says so as well
    assert_common_start(trainer.rounds)


def test_the_assertion_fails_for_a_start_without_the_rest(tmp_path, monkeypatch):
    """A client of a smaller rank that trains on the base without the rows it does not have."""
    install = AdaptedModel.install
    monkeypatch.setattr(AdaptedModel, "install", lambda self, ledger, offsets=None: install(self, ledger))
    trainer = MIXED.run(tmp_path)
    with pytest.raises(AssertionError, match=r"round 2, client-0: starts"):
        assert_common_start(trainer.rounds)
    with pytest.raises(AssertionError, match=r"round 2, .*relative error"):
        assert_exact(trainer.rounds)


# ---- One client does not see another ----


def test_a_clients_result_depends_on_no_other_client(tmp_path):
    trainer = MIXED.run(tmp_path)
    alone = {client_id: trainer.fit_client(client_id, 4) for client_id in trainer.train_dataset}
    for order in (["client-2", "client-1", "client-0"], ["client-0", "client-2", "client-1"]):
        for client_id in order:
            update = trainer.fit_client(client_id, 4)
            assert tiny.same_bytes(tiny.tensors_of(update), tiny.tensors_of(alone[client_id]))
    assert not tiny.same_bytes(tiny.tensors_of(trainer.fit_client("client-0", 5)), tiny.tensors_of(alone["client-0"]))


def test_the_further_rows_are_a_clients_own_and_new_in_every_round(tmp_path):
    case = Case({f"client-{i}": 6 for i in range(3)}, MIXED.lora, arguments={"learning_rate": 0.0})
    trainer = case.trainer(tmp_path)
    layer = next(iter(trainer.adapted.sites))
    seen = {}
    for round in (1, 2):
        for client_id in ("client-0", "client-1"):
            delta = trainer.fit_client(client_id, round).adapters[layer]  # learning rate 0: as it started
            assert torch.equal(delta.A[:4], trainer.federation.state.adapters[layer].A)
            assert not delta.B[:, 4:].any()
            assert 0.5 < float(delta.A[4:].abs().max()) * math.sqrt(32) <= 1
            seen[round, client_id] = delta.A[4:]
    values = list(seen.values())
    assert not any(torch.equal(one, other) for i, one in enumerate(values) for other in values[:i])
    assert torch.equal(trainer.fit_client("client-1", 1).adapters[layer].A[4:], seen[1, "client-1"])


def test_a_client_that_fails_leaves_the_global_rank(tmp_path):
    trainer = MIXED.trainer(tmp_path, client_errors="raise")
    before = tiny.trained(trainer.model)
    trainer.fails = lambda client_id, round: client_id == "client-2"
    with pytest.raises(RuntimeError, match="lost the connection"):
        trainer.train()
    assert set(ranks_of(trainer.model).values()) == {4}
    assert tiny.same_bytes(tiny.trained(trainer.model), before)


def test_by_hand_as_in_the_docs(tmp_path):
    """`fit_client` leaves a client's model; the next step needs no clean-up in between."""
    trainer = MIXED.trainer(tmp_path, FederatedTrainer)
    updates = [trainer.fit_client(client_id, 1) for client_id in trainer.train_dataset]
    assert set(ranks_of(trainer.model).values()) == {8}
    trainer.apply_update(trainer.aggregate(1, updates))
    assert set(ranks_of(trainer.model).values()) == {4}
    through = MIXED.run(tmp_path / "through", num_rounds=1)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(through.model))
    # Bytes up are the mean of the clients': four layers of 32 x 32, four bytes a number, and the head.
    head = 4 * sum(tensor.numel() for tensor in trainer.federation.state.tensors.values())
    assert through.rounds[0].logged["bytes_up_per_client"] == pytest.approx(4 * 64 * 4 * (2 + 4 + 8) / 3 + head)


def test_the_global_rank_by_name_changes_nothing(tmp_path):
    plain = Case({}, MIXED.lora).run(tmp_path / "plain", num_rounds=2)
    named = Case({"client-1": 4, "client-2": 4}, MIXED.lora).run(tmp_path / "named", num_rounds=2)
    other = Case({"client-1": 3}, MIXED.lora).run(tmp_path / "other", num_rounds=2)
    assert tiny.same_bytes(tiny.trained(named.model), tiny.trained(plain.model))
    assert not tiny.same_bytes(tiny.trained(other.model), tiny.trained(plain.model))
    assert named.base_version == plain.base_version != other.base_version


# ---- Checkpoints ----


class Stop(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["reset", "keep"])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, optimizer):
    settings = {"num_rounds": 3, "save_strategy": "epoch", "client_optimizer_state": optimizer}
    whole = MIXED.run(tmp_path / "whole", **settings)
    assert_exact(whole.rounds)
    stopped = MIXED.trainer(tmp_path / "stopped", **settings)
    stopped.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    path = ckpt.checkpoints_in(tmp_path / "stopped")[-1]
    stopped.fit_client("client-2", 2)  # the model holds another rank when the checkpoint is read
    for trainer in (stopped, MIXED.trainer(tmp_path / "stopped", **settings)):
        trainer.callback_handler.callbacks = [
            each for each in trainer.callback_handler.callbacks if not isinstance(each, Stop)
        ]
        trainer.train(resume_from_checkpoint=str(path))
        assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(whole.model))
        assert trainer.base_version == whole.base_version
    for ranks in ({}, MIXED.ranks | {"client-0": 3}):
        other = Case(ranks, MIXED.lora).trainer(tmp_path / "stopped", **settings)
        with pytest.raises(CheckpointMismatchError, match="client_ranks"):
            other.train(resume_from_checkpoint=str(path))


# ---- Bad input, before any training ----


class TakesNoStart(FedExAggregator):
    name = "own"

    def aggregate(self, updates, client_weights):
        return super().aggregate(updates, client_weights)


REFUSED = {
    "unknown client": ({"client_ranks": {"client-7": 2}}, r"\['client-7'\], which are no clients.*'client-0'"),
    "rank 0": ({"client_ranks": {"client-0": 0}}, "the rank 0 for the client 'client-0'"),
    "half a rank": ({"client_ranks": {"client-0": 2.5}}, "the rank 2.5 "),
    "a truth": ({"client_ranks": {"client-0": True}}, "the rank True "),
    "a string": ({"client_ranks": '{"client-0": "2"}'}, "the rank '2' "),
    "no JSON": ({"client_ranks": "{client-0: 2"}, "`client_ranks='{client-0: 2'` is not a JSON object"),
    "a list": ({"client_ranks": "[2, 4]"}, r"`client_ranks='\[2, 4\]'` is not a JSON object"),
    "fedit": ({"aggregator": "fedit"}, "`client_ranks` with the aggregator `fedit`: it has nowhere to put"),
    "ffa": ({"aggregator": "ffa"}, "`client_ranks` with the aggregator `ffa`: it has nowhere to put"),
    "keep": ({"aggregator_kwargs": {"assignment": "keep"}}, "`client_ranks`.*: its clients go on from factors of"),
    "own method": ({"aggregator": TakesNoStart()}, "`client_ranks`.*`own`: its `aggregate` does not take `start`"),
}


@pytest.mark.parametrize(("kwargs", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(kwargs, message, tmp_path):
    given = {"client_ranks": {"client-0": 2}} | kwargs
    trainer_kwargs = {"aggregator": given.pop("aggregator", None)}
    with pytest.raises(ValueError, match=message):
        tiny.federation(tmp_path, trainer_kwargs=trainer_kwargs, **given)


def test_biases_of_the_factors_are_refused(tmp_path):
    biased = {"peft_config": tiny.lora(lora_bias=True)}
    tiny.federation(tmp_path, trainer_kwargs=biased)
    with pytest.raises(ValueError, match=re.escape("`client_ranks` with `lora_bias=True`")):
        tiny.federation(tmp_path, client_ranks={"client-0": 2}, trainer_kwargs=biased)


def test_ranks_as_a_flag(tmp_path):
    args = tiny.arguments(tmp_path, client_ranks='{"client-0": 2}')
    assert args.parsed_client_ranks == {"client-0": 2}
    assert tiny.arguments(tmp_path).parsed_client_ranks == {}


def test_a_method_of_ones_own_needs_no_start_without_ranks(tmp_path):
    trainer = tiny.federation(tmp_path, num_rounds=1, trainer_kwargs={"aggregator": TakesNoStart()})
    trainer.train()
    assert trainer.exactness.aggregation_error <= TOLERANCE
