"""Clients on machines of their own: late, stale and brought up to date without the dense base.

A remote client is a second copy of the model in memory, with an `AdaptedModel` around it. What it holds is compared
with the server's, byte by byte and as effective weights read from the live models (`effective.py`).
"""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import tiny
import torch
from effective import effective
from safetensors.torch import load_file, save_file

from fedex_hf import (
    AdaptedModel,
    ClientUpdate,
    FederatedCallback,
    FederatedTrainer,
    GlobalUpdate,
    Ledger,
    LedgerDifference,
    LedgerMismatchError,
    LowRankDelta,
    StaleUpdateError,
    ledger_difference,
)
from fedex_hf import checkpoint as ckpt
from fedex_hf.base_versions import base_digest, version_of
from fedex_hf.checkpoint import checkpoints_in
from fedex_hf.ledger_difference import LedgerHistory


ROUNDS, MISSED = 9, 5
RANKS = {"client-0": 1, "client-2": 3}
BASES = {
    "float32": (torch.float32, {}),
    "float32, truncated to a rank": (torch.float32, {"residual_rank": 10}),
    "float32, truncated to a tolerance": (torch.float32, {"residual_tolerance": 1e-3}),
    "bfloat16": (torch.bfloat16, {}),
}


def model_in(dtype: torch.dtype) -> Any:
    """The same bytes at every call."""
    model = tiny.roberta().to(dtype)
    torch.manual_seed(0)
    return tiny.get_peft_model(
        model, tiny.lora(r=2, lora_alpha=4, target_modules=["query", "value", "intermediate.dense"])
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in effective(model).items()}


def bytes_of(model: Any) -> dict[str, torch.Tensor]:
    """All parameters: base, adapter, and what rides beside the base."""
    return {name: each.detach().clone().reshape(-1).view(torch.uint8) for name, each in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class Noted:
    """What a server has done in one round, and held after it."""

    version: str
    update: GlobalUpdate
    ledger: Ledger
    weights: dict[str, torch.Tensor]


class Notes(FederatedCallback):
    """One client takes every round's update, another stops after some rounds."""

    def __init__(self, clients: list[AdaptedModel]) -> None:
        self.clients = clients
        self.rounds: list[Noted] = []
        self.update: GlobalUpdate | None = None

    def on_aggregate(self, args, state, control, update, **kwargs):
        self.update = update

    def on_round_end(self, args, state, control, trainer, **kwargs):
        ledger = trainer.federation.ledger
        self.rounds.append(Noted(trainer.base_version, self.update, ledger, weights_of(trainer.model)))
        settings = (args.residual_rank, args.residual_tolerance)
        for number, client in enumerate(self.clients):
            if number == 0 or len(self.rounds) <= ROUNDS - MISSED:
                residuals = copy.deepcopy(self.update.residuals)  # as they come over the wire
                client.install(client.ledger.plus(residuals, client.sites, *settings))
                client.write(self.update)


@dataclass
class Run:
    """A federation of clients of mixed ranks, and the remote clients that went with it."""

    trainer: FederatedTrainer
    notes: Notes
    every_round: AdaptedModel
    away: AdaptedModel
    dtype: torch.dtype
    settings: dict[str, Any] = field(default_factory=dict)

    def fresh(self) -> AdaptedModel:
        return AdaptedModel(model_in(self.dtype), changes_base=True)

    def away_again(self) -> AdaptedModel:
        """A copy of the client that is away, as it was when it left."""
        client, left = self.fresh(), self.notes.rounds[ROUNDS - MISSED - 1]
        client.install(left.ledger)
        client.write(left.update)
        return client


@pytest.fixture(scope="module", params=BASES.values(), ids=BASES)
def run(request, tmp_path_factory) -> Run:
    dtype, settings = request.param
    clients = [AdaptedModel(model_in(dtype), changes_base=True) for _ in range(2)]
    notes = Notes(clients)
    trainer = FederatedTrainer(
        model=model_in(dtype),
        args=tiny.arguments(
            tmp_path_factory.mktemp("run"),
            num_rounds=ROUNDS,
            client_ranks=RANKS,
            client_fraction=0.67,
            learning_rate=5e-3,
            logging_strategy="no",
            save_strategy="epoch",
            **settings,
        ),
        train_dataset=tiny.clients_of([4, 8, 4]),
        callbacks=[notes],
    )
    trainer.train()
    return Run(trainer, notes, *clients, dtype, settings)


# ---- Catching up ----


def test_every_round_has_a_version_of_its_own(run):
    versions = [noted.version for noted in run.notes.rounds]
    assert len(set(versions)) == len(versions) == ROUNDS
    assert version_of(base_digest(run.fresh()), Ledger()) not in versions
    assert run.trainer.base_version == versions[-1]
    assert run.trainer.adapted.storage == ("adapter" if run.dtype == torch.bfloat16 else "base")


def test_a_client_that_takes_every_round_holds_what_the_server_holds(run):
    assert same(weights_of(run.every_round.model), weights_of(run.trainer.model))
    assert same(bytes_of(run.every_round.model), bytes_of(run.trainer.model))
    assert not same(weights_of(run.away.model), weights_of(run.trainer.model))


def test_a_client_that_missed_five_rounds_catches_up(run):
    client, since = run.away, run.notes.rounds[ROUNDS - MISSED - 1].version
    assert version_of(base_digest(client), client.ledger) == since
    client.write(run.trainer.federation.state)  # the adapter travels every round
    # The twin: with the new adapter on the old base it is another model.
    assert not same(weights_of(client.model), weights_of(run.trainer.model))
    difference = run.trainer.ledger_difference(since)
    if not run.settings:
        assert (difference.since, len(difference.rounds), difference.ledger) == (since, MISSED, None)
        assert difference.nbytes < run.trainer.federation.ledger.nbytes
    ledger = difference.apply(client)
    assert client.ledger is ledger
    assert same(weights_of(client.model), weights_of(run.every_round.model))
    assert same(bytes_of(client.model), bytes_of(run.every_round.model))
    assert same(tiny.tensors_of(ledger), tiny.tensors_of(run.trainer.federation.ledger))
    assert difference.apply(client) is ledger  # once more changes nothing


def test_rounds_are_replayed_as_they_were_added(run):
    """Truncated like the server's, whatever the history would choose to send; and not if that is left out."""
    left, later = run.notes.rounds[ROUNDS - MISSED - 1], run.notes.rounds[ROUNDS - MISSED :]
    settings = {"rank": run.settings.get("residual_rank"), "tolerance": run.settings.get("residual_tolerance")}
    rounds = [noted.update.residuals for noted in later]
    difference = LedgerDifference(left.version, later[-1].version, rounds, **settings)
    client = run.away_again()
    difference.apply(client, base_digest(client))
    assert same(tiny.tensors_of(client.ledger), tiny.tensors_of(run.trainer.federation.ledger))
    if run.settings:
        client = run.away_again()
        with pytest.raises(LedgerMismatchError, match="here it ends at"):
            replace(difference, rank=None, tolerance=None).apply(client)
        assert client.ledger is left.ledger


def test_a_late_joiner_starts_from_the_whole_ledger(run):
    difference = run.trainer.ledger_difference()
    assert difference.since is None
    assert not difference.rounds
    assert difference.nbytes == run.trainer.federation.ledger.nbytes
    for client in (run.fresh(), run.away_again()):
        client.write(run.trainer.federation.state)
        difference.apply(client)
        assert same(weights_of(client.model), weights_of(run.trainer.model))
        assert same(bytes_of(client.model), bytes_of(run.trainer.model))


@pytest.mark.parametrize("whole", [False, True])
def test_it_travels_as_a_file(run, whole, tmp_path):
    left = run.notes.rounds[ROUNDS - MISSED - 1]
    difference = run.trainer.ledger_difference(None if whole else left.version)
    difference.save(tmp_path / "difference.safetensors")
    loaded = LedgerDifference.load(tmp_path / "difference.safetensors")
    assert (loaded.since, loaded.version, loaded.nbytes) == (difference.since, difference.version, difference.nbytes)
    client = run.away_again()
    loaded.apply(client)
    assert same(tiny.tensors_of(client.ledger), tiny.tensors_of(run.trainer.federation.ledger))
    size = (tmp_path / "difference.safetensors").stat().st_size
    assert difference.nbytes < size < difference.nbytes + 40_000


def test_after_a_resume_the_whole_ledger_is_sent(run):
    """The history is not written to checkpoints. The version is the same: it depends on base and ledger only."""
    trainer = FederatedTrainer(
        model=model_in(run.dtype),
        args=replace(run.trainer.args, num_rounds=ROUNDS + 1),
        train_dataset=run.trainer.train_dataset,
        callbacks=[Notes([])],
    )
    trainer._load_from_checkpoint(str(checkpoints_in(run.trainer.args.output_dir)[-1]))
    assert trainer.base_version == run.trainer.base_version
    since = run.notes.rounds[ROUNDS - MISSED - 1].version
    assert trainer.ledger_difference(since).ledger is trainer.federation.ledger
    assert trainer.ledger_difference(trainer.base_version).nbytes == 0
    trainer.run_round(ROUNDS + 1)
    client = run.away_again()
    trainer.ledger_difference(since).apply(client)
    held = run.trainer.ledger_difference().apply(run.fresh())
    assert same(tiny.tensors_of(client.ledger), tiny.tensors_of(trainer.federation.ledger))
    assert not same(tiny.tensors_of(client.ledger), tiny.tensors_of(held))


def test_the_base_itself_is_part_of_the_version(run):
    client, difference = run.fresh(), run.trainer.ledger_difference()
    with torch.no_grad():
        client.model.get_base_model().roberta.embeddings.LayerNorm.bias[0] += 1
    before = bytes_of(client.model)
    with pytest.raises(
        LedgerMismatchError, match=r"leads to the base version .*here it ends at .*the base is another"
    ):
        difference.apply(client)
    assert same(bytes_of(client.model), before)


def test_a_difference_that_starts_elsewhere(run):
    rounds = [noted.update.residuals for noted in run.notes.rounds[-2:]]
    difference = LedgerDifference(run.notes.rounds[-3].version, run.trainer.base_version, rounds)
    client = run.away_again()
    with pytest.raises(LedgerMismatchError, match=rf"starts from the base version {difference.since}, and the model"):
        difference.apply(client)
    missing = replace(difference, since=run.notes.rounds[ROUNDS - MISSED - 1].version)
    with pytest.raises(LedgerMismatchError, match="here it ends at"):
        missing.apply(client)
    assert client.ledger is run.notes.rounds[ROUNDS - MISSED - 1].ledger


# ---- Formed on demand ----


@pytest.fixture
def hashed(monkeypatch):
    """Base weights and ledgers that were hashed, in their order."""
    calls: list[str] = []

    def counted(name: str, real: Any) -> Any:
        return lambda *args: calls.append(name) or real(*args)

    monkeypatch.setattr(ckpt, "base_digest", counted("base_digest", base_digest))
    monkeypatch.setattr(ledger_difference, "version_of", counted("version_of", version_of))
    return calls


@pytest.mark.parametrize("ranks", [{}, {"client-0": 2}], ids=["one rank", "ranks"])
def test_a_run_in_one_process_hashes_nothing(tmp_path, hashed, ranks):
    trainer = tiny.federation(tmp_path, sizes=(4, 8, 4), num_rounds=3, client_ranks=ranks)
    trainer.train()
    assert hashed == []
    assert trainer.federation.ledger.layers()
    # The twin: whoever asks gets the version that hashing gives, once for every ledger.
    assert trainer.base_version == version_of(base_digest(trainer.adapted), trainer.federation.ledger)
    assert trainer.base_version in {trainer.base_version}
    assert hashed == ["base_digest", "version_of"]


def test_an_update_forms_its_version_when_it_is_read(tmp_path, hashed):
    trainer = tiny.federation(tmp_path, sizes=(4, 8, 4), num_rounds=3)
    trainer.run_round(1)
    update = trainer.fit_client("client-0", 2)
    trainer.restore_global_state()
    ledger = trainer.federation.ledger
    trainer.run_round(2)
    assert hashed == []
    sent = pickle.loads(pickle.dumps(update))
    expected = version_of(base_digest(trainer.adapted), ledger)
    assert sent.base_version == update.base_version == replace(update, round=3).base_version == expected
    assert expected in f"{update}"
    assert trainer.base_version != expected
    with pytest.raises(StaleUpdateError, match=rf"base version {expected}, and the present one"):
        trainer.aggregate(3, [sent])
    with pytest.raises(StaleUpdateError, match=rf"base version {expected}, and the present one"):
        trainer.aggregate(3, [update])
    assert trainer.aggregate(3, [replace(sent, base_version=trainer.base_version)]).adapters
    assert ClientUpdate("ann", 1, 1, {}).base_version is None


def test_rounds_are_noted_from_the_first_question_on(tmp_path):
    trainer = tiny.federation(tmp_path, sizes=(4, 8, 4), num_rounds=3)
    before = version_of(base_digest(trainer.adapted), Ledger())
    trainer.run_round(1)
    asked = trainer.base_version
    trainer.run_round(2)
    assert trainer.ledger_difference(before).ledger is trainer.federation.ledger
    assert trainer.ledger_difference(asked).ledger is None
    assert len(trainer.ledger_difference(asked).rounds) == 1


# ---- As functions of tensors ----

SMALL = LowRankDelta(torch.ones(1, 32), torch.ones(32, 1), 2.0)


def small_ledger(rank: int, seed: int = 0, scaling: float = 2.0) -> Ledger:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 32, generator=generator), torch.randn(32, rank, generator=generator)
    return Ledger({"layer": LowRankDelta(A, B, scaling)})


def test_what_a_version_depends_on():
    one = small_ledger(2)
    assert version_of("base", one) == version_of("base", copy.deepcopy(one))
    assert version_of("base", one) == version_of("base", Ledger({"layer": replace(one.factors["layer"], cut=1.0)}))
    factors = one.factors["layer"]
    others = [
        ("base", Ledger()),
        ("other", one),
        ("base", Ledger({"other": factors})),
        ("base", Ledger({"layer": replace(factors, scaling=1.0)})),
        ("base", Ledger({"layer": replace(factors, A=-factors.A)})),
        ("base", Ledger({"layer": replace(factors, B=torch.nextafter(factors.B, torch.tensor(9.0)))})),
        ("base", Ledger({}, {"layer": torch.ones(32, 32)})),
        ("base", Ledger({}, {"layer": torch.ones(16, 64)})),
    ]
    versions = {version_of("base", one), *(version_of(*each) for each in others)}
    assert len(versions) == 1 + len(others)


def test_a_history_is_no_larger_than_the_ledger():
    """Rounds of rank 3 into a ledger that a truncation holds at rank 8: two of them are still less than all of it."""
    history = LedgerHistory("base", rank=8)
    ledgers = [small_ledger(8, seed) for seed in range(6)]
    for before, after in itertools.pairwise(ledgers):
        history.append(before, small_ledger(3).factors, after)
    versions = [version_of("base", ledger) for ledger in ledgers]
    sent = [history.difference(version, ledgers[-1]) for version in versions]
    assert [len(each.rounds) for each in sent] == [0, 0, 0, 2, 1, 0]
    assert [each.ledger is ledgers[-1] for each in sent] == [True, True, True, False, False, False]
    assert [each.nbytes for each in sent] == [number * 64 * 4 for number in (8, 8, 8, 6, 3, 0)]
    assert {each.version for each in sent} == {versions[-1]}
    assert {each.rank for each in sent} == {8}
    assert history.difference("unknown", ledgers[-1]).ledger is ledgers[-1]


def test_a_history_does_not_lead_through_a_gap():
    """A run that goes back to its best round, and on from there."""
    history, (one, two, three, other) = LedgerHistory("base"), [small_ledger(8, seed) for seed in range(4)]
    history.append(one, small_ledger(1).factors, two)
    assert history.difference(version_of("base", one), two).rounds
    assert history.difference(version_of("base", one), other).ledger is other  # not the one that was noted last
    history.append(three, small_ledger(1).factors, other)
    assert history.difference(version_of("base", one), other).ledger is other
    assert len(history.difference(version_of("base", three), other).rounds) == 1


def test_a_round_without_a_residual_is_the_same_version():
    history, ledger = LedgerHistory("base"), small_ledger(8)
    history.append(ledger, {}, ledger)
    difference = history.difference(version_of("base", ledger), ledger)
    assert difference.nbytes == 0
    assert difference.ledger is None


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        (Ledger({"elsewhere": SMALL}), r"has residuals for \['elsewhere'\]"),
        (Ledger({}, {"elsewhere": torch.ones(32, 32)}), r"has residuals for \['elsewhere'\]"),
        (Ledger({"query": LowRankDelta(torch.ones(1, 31), torch.ones(32, 1))}), "does not fit its size"),
        (Ledger({}, {"query": torch.ones(31, 32)}), "does not fit its size"),
    ],
)
def test_a_difference_of_another_model(ledger, message):
    client = AdaptedModel(tiny.peft_roberta(), changes_base=True)
    full = {"query": "base_model.model.roberta.encoder.layer.0.attention.self.query"}
    ledger = Ledger(
        {full.get(name, name): delta for name, delta in ledger.factors.items()},
        {full.get(name, name): matrix for name, matrix in ledger.matrices.items()},
    )
    with pytest.raises(LedgerMismatchError, match=message):
        LedgerDifference(None, version_of(base_digest(client), ledger), ledger=ledger).apply(client)
    assert not client.ledger.layers()


def test_files_that_are_none(tmp_path):
    path = tmp_path / "difference.safetensors"
    with pytest.raises(LedgerMismatchError, match="is no ledger difference"):
        LedgerDifference.load(path)
    path.write_bytes(b"anything")
    with pytest.raises(LedgerMismatchError, match="is no ledger difference"):
        LedgerDifference.load(path)
    LedgerDifference("a", "b", [{"layer": SMALL}]).save(path)
    assert LedgerDifference.load(path).rounds[0]["layer"].scaling == 2.0
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(LedgerMismatchError, match="is no ledger difference"):
        LedgerDifference.load(path)


# ---- Stale updates ----


class LateClient(FederatedTrainer):
    """From round 2 on, `client-1` sends what it trained in round 1."""

    def fit_client(self, client_id: str, round: int) -> ClientUpdate:
        update = super().fit_client(client_id, round)
        if client_id == "client-1":
            self.first = getattr(self, "first", update)
            return replace(self.first, round=round)
        return update


def late(output_dir: Any, **kwargs: Any) -> LateClient:
    return LateClient(
        model=tiny.roberta(),
        args=tiny.arguments(output_dir, **({"num_rounds": 3, "client_ranks": {"client-0": 2}} | kwargs)),
        train_dataset=tiny.clients_of([4, 8, 4]),
        peft_config=tiny.lora(),
    )


@pytest.fixture
def warned():
    """The package's warnings, whose logger does not propagate."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    loggers = [logging.getLogger(f"fedex_hf.{name}") for name in ("trainer", "base_versions")]
    handler = Handler(logging.WARNING)
    levels = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.WARNING)
    yield messages
    for each, level in zip(loggers, levels, strict=True):
        each.removeHandler(handler)
        each.setLevel(level)


def test_a_stale_client_stops_the_run(tmp_path):
    trainer = late(tmp_path)
    with pytest.raises(StaleUpdateError) as caught:
        trainer.train()
    assert trainer.federation.round == 1
    message = str(caught.value)
    assert "`client-1`" in message
    assert trainer.first.base_version in message
    assert trainer.base_version in message
    assert f"trainer.ledger_difference('{trainer.first.base_version}')" in message


def test_a_stale_client_is_left_out(tmp_path, warned):
    trainer = late(tmp_path, client_errors="skip")
    trainer.train()
    rounds = [entry for entry in trainer.state.log_history if "num_clients" in entry]
    assert [entry["num_clients"] for entry in rounds] == [3, 2, 2]
    assert all(entry["aggregation_error"] < 1e-5 for entry in rounds)
    told = [message for message in warned if "`client-1` is left out: StaleUpdateError" in message]
    assert len(told) == 2


def test_aggregate_refuses_or_leaves_out(tmp_path, warned):
    """Also updates that did not come through `collect_updates`."""
    trainer = tiny.federation(tmp_path, sizes=(4, 8, 4), client_ranks={"client-1": 2})
    now = trainer.base_version
    updates = [trainer.fit_client(client_id, 1) for client_id in trainer.train_dataset]
    assert {update.base_version for update in updates} == {now}
    stale = replace(updates[1], base_version="0" * 64)
    unknown = replace(updates[2], base_version=None)
    for raises in (trainer.aggregate, lambda round, updates: trainer.leave_out_stale(updates)):
        with pytest.raises(StaleUpdateError, match=rf"`client-1` for round 1 .*version {'0' * 64}, .* is {now}"):
            raises(1, [updates[0], stale, unknown])
    trainer.args.client_errors = "skip"
    found = trainer.aggregate(1, [updates[0], stale, unknown])
    without = trainer.aggregate(1, [updates[0], unknown])
    everyone = trainer.aggregate(1, updates)
    layer = next(iter(found.adapters))
    assert torch.equal(found.adapters[layer].B, without.adapters[layer].B)
    assert not torch.equal(found.adapters[layer].B, everyone.adapters[layer].B)
    assert any("`client-1` is left out" in message for message in warned)


def test_a_version_does_not_depend_on_the_adapter(tmp_path):
    """One client alone leaves no residual: its next update is on the same base, and is not stale."""
    trainer = tiny.federation(tmp_path, sizes=(8,), num_rounds=2)
    before = trainer.base_version
    trainer.train()
    assert trainer.base_version == before
    assert not trainer.federation.ledger.layers()
