"""What clients go on from: three assignments, each of them exact.

As in `test_exactness.py`, whose formulas are used here, effective weights are read from the live torch modules and
multiplied out in float64; here also at the moment when a client's fit begins.
"""

from __future__ import annotations

import itertools
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from kill_target import assert_same, outcome
from peft import LoraConfig, get_peft_model
from test_aggregators import IN, OUT, RANK, error, factors_of, ideal, product, updates_of, wide
from test_checkpoint import files_of, interrupted, resumed, trained
from test_exactness import (
    TOLERANCE,
    Case,
    RecordingTrainer,
    assert_certificate,
    assert_exact,
    assert_formulas,
    live_layers,
    norm,
)
from transformers.trainer_utils import TrainOutput

from fedex_hf import (
    Aggregator,
    CheckpointMismatchError,
    ClientUpdate,
    FederatedTrainer,
    FedExAggregator,
    GlobalUpdate,
    LowRankDelta,
)
from fedex_hf import checkpoint as ckpt
from fedex_hf.aggregators.assignments import fresh_factor, keep, offsets_of, reinitialise
from fedex_hf.exporting import _is_sendable
from fedex_hf.inspection import inspect


ASSIGNMENTS = ["average", "reinitialise", "keep"]
ROBERTA = Case(tiny.roberta, 3, True, {"r": 4, "lora_alpha": 8})
CASES = {
    "roberta-3-by-size": ROBERTA,
    "gpt2-3-by-size": Case(
        tiny.gpt2, 3, True, {"r": 4, "lora_alpha": 8, "rank_pattern": {"c_attn": 1}, "alpha_pattern": {"c_fc": 10}}
    ),
    "roberta-7-uniform": Case(tiny.roberta, 7, False, {"r": 2, "lora_alpha": 3, "use_rslora": True}),
}


class StartsTrainer(RecordingTrainer):
    """Also looks at the live parameters the moment a client's fit begins."""

    starts: dict[tuple[int, str], dict[str, Any]]

    def fit_client(self, client_id, round):
        fit, starts = self.clients.fit, vars(self).setdefault("starts", {})

        def look_and_fit(*args: Any) -> TrainOutput:
            starts[round, client_id] = live_layers(self.model, self.model.peft_config["default"])
            return fit(*args)

        self.clients.fit = look_and_fit
        try:
            return super().fit_client(client_id, round)
        finally:
            self.clients.fit = fit


def assert_common_start(trainer: StartsTrainer) -> None:
    """Every client starts a round from the weighted mean of what the last round's clients ended with."""
    assert max(round for round, _ in trainer.starts) == len(trainer.rounds)
    for (round, client_id), start in trainer.starts.items():
        record = trainer.rounds[round - 2]
        for layer in start:
            before = record.before[layer].weight()
            expected = trainer.rounds[0].before[layer].weight() if round == 1 else record.ideal(layer)
            distance = norm([start[layer].weight() - expected]) / norm([record.ideal(layer) - before])
            assert distance <= TOLERANCE, f"round {round}, {client_id}, {layer}: starts {distance:.2e} away"


def ends_of(trainer: StartsTrainer, client_id: str, before_round: int) -> dict[str, Any] | None:
    """What a client's last fit before a round ended with."""
    for round in range(before_round - 1, 0, -1):
        clients = [name for number, name in trainer.starts if number == round]
        if client_id in clients:
            return trainer.rounds[round - 1].clients[clients.index(client_id)]
    return None


# ---- Exact, whatever the assignment ----


@pytest.mark.no_cover
@pytest.mark.parametrize("fraction", [1.0, 0.6], ids=["all", "some"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_client_starts_from_the_mean_of_the_clients(case, assignment, fraction, tmp_path):
    aggregator = FedExAggregator(assignment=assignment)
    trainer = case.run(tmp_path, aggregator=aggregator, trainer_cls=StartsTrainer, client_fraction=fraction)
    assert aggregator.is_exact
    assert {len(record.clients) for record in trainer.rounds} == {round(fraction * case.num_clients)}
    assert_formulas(trainer.model, case.config())
    assert_exact(trainer.rounds)
    assert_certificate(trainer.rounds)
    assert_common_start(trainer)
    # The clients disagree enough for the promise to mean something.
    assert min(record.fedit_deviation() for record in trainer.rounds) > 100 * TOLERANCE


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_what_clients_start_with(assignment, tmp_path):
    trainer = ROBERTA.run(
        tmp_path,
        aggregator=FedExAggregator(assignment=assignment),
        trainer_cls=StartsTrainer,
        client_fraction=0.6,
    )
    own = 0
    for (round, client_id), start in trainer.starts.items():
        before, end = trainer.rounds[round - 1].before, ends_of(trainer, client_id, round)
        for layer, found in start.items():
            if assignment == "keep" and end is not None:
                own += 1
                assert torch.equal(found.A, end[layer].A)
                assert torch.equal(found.B, end[layer].B)
                assert not torch.equal(found.B, before[layer].B)
                assert not torch.equal(found.base, before[layer].base)
            else:
                assert torch.equal(found.A, before[layer].A)
                assert torch.equal(found.B, before[layer].B)
                assert torch.equal(found.base, before[layer].base)
            if assignment == "reinitialise":
                assert not found.B.any()
                assert round == 1 or not torch.equal(found.A, trainer.rounds[round - 2].before[layer].A)
    assert bool(own) == (assignment == "keep")
    # With `keep`, the base that everyone shares goes on and the factors of the model are the averaged ones.
    last = trainer.rounds[-1]
    if assignment == "keep":
        for layer, found in last.after.items():
            A = sum(size * client[layer].A for size, client in zip(last.sizes, last.clients)) / sum(last.sizes)
            assert norm([found.A - A]) <= 1e-6 * norm([A])


@pytest.mark.parametrize(("fraction", "seed"), [(0.2, 35), (0.3, 3)], ids=["one", "two"])
def test_clients_that_sat_out_for_several_rounds(fraction, seed, tmp_path):
    """One or two of seven clients a round: one comes back to a global state that it has not seen before."""
    case = CASES["roberta-7-uniform"]
    sampled = {"client_fraction": fraction, "seed": seed}
    trainer = case.run(tmp_path, aggregator=FedExAggregator(assignment="keep"), trainer_cls=StartsTrainer, **sampled)
    fits: dict[str, list[int]] = {}
    for round, client_id in trainer.starts:
        fits.setdefault(client_id, []).append(round)
    gaps = [later - earlier for each in fits.values() for earlier, later in itertools.pairwise(each)]
    assert max(gaps) == 4
    assert_exact(trainer.rounds)
    assert_certificate(trainer.rounds)
    assert_common_start(trainer)


def test_one_client_that_keeps_its_factors_is_one_that_averages_them(tmp_path):
    outcomes = [
        outcome(trained(tmp_path / name, sizes=(12,), aggregator_kwargs={"assignment": name}))
        for name in ("average", "keep")
    ]
    assert_same(*outcomes)
    assert not outcomes[0]["ledger"]


def test_one_client_that_starts_afresh_folds_its_update(tmp_path):
    trainer = Case(tiny.llama, 1, True, {"r": 4, "lora_alpha": 8}).run(
        tmp_path, aggregator=FedExAggregator(assignment="reinitialise"), trainer_cls=StartsTrainer
    )
    assert_exact(trainer.rounds)
    assert_common_start(trainer)
    assert trainer.federation.ledger.layers() == trainer.adapted.sites.keys()


# ---- Twins that must fail ----


class OffsetsForgotten(FedExAggregator):
    """Clients trained with their offsets, and the server does not count these."""

    def assign(self, update, updates, client_weights):
        return super().assign(update, [replace(each, offsets={}) for each in updates], client_weights)


class NothingFolded(FedExAggregator):
    """Fresh factors, and the base gets the residual of averaged ones only."""

    def assign(self, update, updates, client_weights):
        return replace(super().assign(update, updates, client_weights), residuals=update.residuals)


@pytest.mark.parametrize(
    ("aggregator", "first"), [(OffsetsForgotten(assignment="keep"), 2), (NothingFolded(assignment="reinitialise"), 1)]
)
def test_the_assertion_fails_for(aggregator, first, tmp_path):
    trainer = ROBERTA.run(tmp_path, aggregator=aggregator, trainer_cls=StartsTrainer)
    with pytest.raises(AssertionError, match=rf"round {first}, .*relative error"):
        assert_exact(trainer.rounds)
    with pytest.raises(AssertionError, match=rf"round {first + 1}, .*starts"):
        assert_common_start(trainer)
    assert min(record.error() for record in trainer.rounds[first - 1 :]) > 100 * TOLERANCE
    assert_certificate(trainer.rounds)


def test_the_assertion_fails_for_own_factors_without_an_offset(tmp_path, monkeypatch):
    """The server is right about what it gets, and the clients start from somewhere else."""

    def install_factors(adapted, federation, client_id):
        own = federation.client_adapters.get(client_id, federation.state.adapters)
        adapted.write(GlobalUpdate(own, federation.state.tensors))
        return {}

    monkeypatch.setattr("fedex_hf.trainer.install_client", install_factors)
    trainer = ROBERTA.run(tmp_path, aggregator=FedExAggregator(assignment="keep"), trainer_cls=StartsTrainer)
    assert_exact(trainer.rounds)
    with pytest.raises(AssertionError, match=r"round 2, .*starts"):
        assert_common_start(trainer)


# ---- As functions of tensors ----


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_reinitialise_folds_the_whole_update(k):
    factors, weights = factors_of(k), list(range(1, k + 1))
    update = FedExAggregator(assignment="reinitialise").aggregate(updates_of(factors), weights)
    new, residual = update.adapters["layer"], update.residuals["layer"]
    assert not new.B.any()
    assert new.A.shape == (RANK, IN)
    assert new.B.shape == (OUT, RANK)
    assert new.scaling == factors[0].scaling
    assert residual.rank == min(k * RANK, IN, OUT)  # the paper's bound: the means are in it, not only the contrasts
    assert residual.A.dtype == torch.float32
    assert error(product(residual), ideal(factors, weights)) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reinitialise_in_low_precision_is_as_exact(dtype):
    factors, weights = factors_of(3, dtype=dtype), [12, 7, 9]
    update = FedExAggregator(assignment="reinitialise").aggregate(updates_of(factors), weights)
    assert update.adapters["layer"].A.dtype == dtype
    assert error(product(update.residuals["layer"]), ideal(factors, weights)) < 3e-7


def test_a_fresh_factor_depends_on_seed_round_and_layer_only():
    factors = factors_of(2)
    mean = GlobalUpdate({"one": factors[0], "two": factors[1]})
    first = reinitialise(mean, seed=3, round=2).adapters
    torch.manual_seed(99)
    again = reinitialise(GlobalUpdate({"one": factors[1]}), seed=3, round=2).adapters
    assert torch.equal(first["one"].A, again["one"].A)
    others = [first["two"], reinitialise(mean, 4, 2).adapters["one"], reinitialise(mean, 3, 1).adapters["one"]]
    assert not any(torch.equal(first["one"].A, other.A) for other in others)
    state = torch.random.get_rng_state()
    reinitialise(mean, 3, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_fresh_factor_is_drawn_as_peft_draws_it():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(400, 300)), LoraConfig(r=64, target_modules=["0"]))
    theirs = dict(model.named_modules())["base_model.model.0"].lora_A["default"].weight.detach()
    ours = fresh_factor(theirs, "a key")
    assert ours.shape == theirs.shape
    for each in (ours, theirs):
        assert 0.99 / 20 < each.abs().max().item() <= 1 / 20  # 1 / sqrt(400)
        assert each.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
        assert abs(each.mean().item()) < 1e-3


def with_offsets(factors: list[LowRankDelta], start: LowRankDelta, own: list[LowRankDelta | None]):
    """Updates of clients that started from factors of their own, `None` for the global ones."""
    return [
        replace(update, offsets={} if mine is None else offsets_of({"layer": start}, {"layer": mine}))
        for update, mine in zip(updates_of(factors), own, strict=True)
    ]


@pytest.mark.parametrize("newcomer", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_keep_counts_the_offsets(k, newcomer):
    start, weights = factors_of(1, seed=5)[0], np.arange(1, k + 1)
    own: list[LowRankDelta | None] = [*factors_of(k, seed=6)]
    if newcomer:
        own[-1] = None
    factors = factors_of(k, seed=7)
    updates = with_offsets(factors, start, own)
    update = FedExAggregator(assignment="keep").aggregate(updates, weights.tolist())
    began = [product(start) if mine is None else product(mine) for mine in own]
    offsets = sum(w * (product(start) - each) for w, each in zip(weights / weights.sum(), began))
    expected = ideal(factors, weights) + offsets
    found = product(update.adapters["layer"])
    if "layer" in update.residuals:
        residual = update.residuals["layer"]
        assert residual.A.dtype == torch.float32
        assert residual.rank <= min(2 * k * RANK, IN, OUT)
        found = found + product(residual)
    assert ("layer" in update.residuals) == (k > 1 or not newcomer)
    assert error(found, expected) < 1e-6
    assert {name: adapters["layer"] for name, adapters in update.client_adapters.items()} == {
        f"client-{i}": delta for i, delta in enumerate(factors)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_not_rounded(dtype):
    start, own = factors_of(2, dtype=dtype)
    offset = offsets_of({"layer": start}, {"layer": own})["layer"]
    assert offset.rank == 2 * RANK
    assert error(product(offset), product(start) - product(own)) < 1e-15
    assert error(wide(offset.to_dense()), product(start) - product(own)) < 1e-15


def test_a_client_with_the_global_factors_has_no_offset():
    (start,) = factors_of(1)
    assert offsets_of({"layer": start}, {"layer": LowRankDelta(start.A.clone(), start.B.clone(), start.scaling)}) == {}


def test_the_other_tensors_are_averaged():
    tensors = [{"head": torch.full((2,), float(value))} for value in (1, 4)]
    for assignment in ASSIGNMENTS:
        aggregator = FedExAggregator(assignment=assignment)
        update = aggregator.aggregate(updates_of(factors_of(2), tensors), [1, 2])
        assert update.tensors["head"].tolist() == [3.0, 3.0]
        assert aggregator.keeps_client_adapters == bool(update.client_adapters) == (assignment == "keep")


# ---- The base weight, whatever happens to a client ----


def bases(trainer: FederatedTrainer) -> dict[str, bytes]:
    return {
        name: site.base_weight.detach().contiguous().numpy().tobytes() for name, site in trainer.adapted.sites.items()
    }


@pytest.mark.parametrize("errors", ["raise", "skip"])
def test_a_client_that_fails_leaves_the_base_and_keeps_its_factors(tmp_path, errors):
    trainer = tiny.federation(tmp_path, aggregator_kwargs={"assignment": "keep"}, client_errors=errors)
    trainer.train()
    federation, before = trainer.federation, bases(trainer)
    kept = dict(federation.client_adapters)
    fit, seen = trainer.clients.fit, []

    def failing(client_id, *args):
        output = fit(client_id, *args)
        seen.append(bases(trainer))
        if client_id == "client-1":
            raise RuntimeError("out of memory")
        return output

    trainer.clients.fit = failing
    updates = []
    with pytest.raises(RuntimeError, match="out of memory") if errors == "raise" else nullcontext():
        updates = trainer.collect_updates(trainer.sample_clients(3), 3)
    assert len(seen) == (2 if errors == "raise" else 3)
    assert all(each[name] != before[name] for each in seen for name in before)  # it was really elsewhere
    assert bases(trainer) == before
    for name, site in trainer.adapted.sites.items():
        assert torch.equal(site.B, federation.state.adapters[name].B)
    assert dict(federation.client_adapters) == kept
    if updates:
        trainer.apply_update(trainer.aggregate(3, updates))
        after = trainer.federation.client_adapters
        assert [name for name in kept if after[name] is kept[name]] == ["client-1"]


def test_an_installation_that_ends_half_way_is_undone(tmp_path, monkeypatch):
    trainer = tiny.federation(tmp_path, aggregator_kwargs={"assignment": "keep"})
    trainer.train()
    before, base_weight_at = bases(trainer), trainer.adapted.base_weight_at
    calls = []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return base_weight_at(*args)

    monkeypatch.setattr(trainer.adapted, "base_weight_at", second_fails)
    with pytest.raises(MemoryError):
        trainer.fit_client("client-0", 3)
    assert bases(trainer) != before
    trainer.restore_global_state()
    assert bases(trainer) == before


def test_a_round_that_changes_nothing_is_exact(tmp_path):
    """The mean of the rounded offsets is no change: the certificate takes it for the rounding that it is."""
    trainer = tiny.federation(tmp_path, aggregator_kwargs={"assignment": "keep"})
    trainer.train()
    trainer.clients.fit = lambda *args: TrainOutput(1, 0.0, {})
    metrics = trainer.run_round(3)
    assert metrics["aggregation_error"] == 0.0
    assert all(layer.change == 0.0 for layer in trainer.exactness.layers.values())


# ---- Bytes on the wire ----


def test_logged_bytes(tmp_path):
    """Four layers of 32 x 32 with r = 4 in float32, three clients: a rank of a layer takes 2 x 32 numbers."""
    one_rank, logged = 4 * (2 * 32) * 4, {}
    for assignment in ASSIGNMENTS:
        trainer = tiny.federation(tmp_path / assignment, aggregator_kwargs={"assignment": assignment}, num_rounds=3)
        assert len(trainer.adapted.sites) == 4
        trainer.train()
        logged[assignment] = [entry for entry in trainer.state.log_history if "bytes_down_per_client" in entry]
    head = sum(tensor.nbytes for tensor in trainer.federation.state.tensors.values())
    up = {entry["bytes_up_per_client"] for entries in logged.values() for entry in entries}
    assert up == {head + 4 * one_rank}  # offsets never travel
    down = {name: [entry["bytes_down_per_client"] - head for entry in logged[name]] for name in logged}
    assert down["average"] == [(4 + 8) * one_rank] * 3  # the means, and a residual of rank (k - 1) r
    assert down["reinitialise"] == [12 * one_rank] * 3  # a residual of rank k r; fresh factors are drawn, not sent
    assert down["keep"][0] == (4 + 8) * one_rank
    assert all((4 + 8) * one_rank < later <= (4 + 24) * one_rank for later in down["keep"][1:])  # rank up to 2 k r


# ---- Checkpoints ----


SOME = {"client_fraction": 0.5, "sizes": (12, 7, 9, 5), "num_rounds": 4, "eval_strategy": "no"}


def own_factors(trainer: FederatedTrainer) -> dict[str, torch.Tensor]:
    return {
        f"{client_id}/{name}.{factor}": getattr(delta, factor)
        for client_id, adapters in trainer.federation.client_adapters.items()
        for name, delta in adapters.items()
        for factor in "AB"
    }


@pytest.mark.no_cover
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, assignment):
    kwargs = SOME | {"aggregator_kwargs": {"assignment": assignment}, "client_optimizer_state": "keep"}
    whole = trained(tmp_path / "whole", **kwargs)
    interrupted(tmp_path / "resumed", 3, **kwargs)
    assert len(ckpt.checkpoints_in(tmp_path / "resumed")) == 2
    trainer = resumed(tmp_path / "resumed", **kwargs)
    assert_same(outcome(trainer), outcome(whole))
    assert_same(own_factors(trainer), own_factors(whole))
    assert bool(own_factors(whole)) == (assignment == "keep")
    one, other = (files_of(ckpt.checkpoints_in(tmp_path / name)[-1] / "federation") for name in ("whole", "resumed"))
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name.endswith((".safetensors", ".private")))
    assert ("clients/adapters.private" in one) == (assignment == "keep")


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("kept") / "out"
    trained(output_dir, num_rounds=2, eval_strategy="no", aggregator_kwargs={"assignment": "keep"})
    return output_dir


def resuming(output_dir: Path, path: Path, **kwargs: Any) -> FederatedTrainer:
    arguments = {"num_rounds": 3, "save_strategy": "epoch", "aggregator_kwargs": {"assignment": "keep"}} | kwargs
    trainer = tiny.federation(output_dir, **arguments)
    trainer.train(resume_from_checkpoint=str(path))
    return trainer


def test_the_factors_of_clients_are_sealed_in_the_checkpoint(kept_run, tmp_path):
    (path, _) = ckpt.checkpoints_in(kept_run)
    file = path / ckpt.FOLDER / ckpt.CLIENT_ADAPTERS
    meta = ckpt.read_meta(path)
    assert meta["files"]["federation/clients/adapters.private"] == file.stat().st_size
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointMismatchError, match="its tensors are not those that were written"):
            resuming(tmp_path, path)
        file.write_bytes(whole[:-1])
        with pytest.raises(CheckpointMismatchError, match=r"adapters\.private` should have"):
            resuming(tmp_path, path)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("other", [None, {"assignment": "reinitialise"}])
def test_a_run_with_another_assignment_is_another_run(kept_run, tmp_path, other):
    with pytest.raises(CheckpointMismatchError, match="`assignment` is keep there"):
        resuming(tmp_path, ckpt.checkpoints_in(kept_run)[0], aggregator_kwargs=other)


def test_checkpoints_from_before_the_assignments_are_resumed(tmp_path):
    """Their fingerprint knows nothing of it, and neither does that of a run that averages."""
    trainer = trained(tmp_path, num_rounds=1)
    assert trainer.fingerprint()["aggregator"] == {"name": "fedex", "residual_rank": None, "is_exact": True}
    found = inspect(str(ckpt.checkpoints_in(tmp_path)[0]))
    assert "assignment" not in found["settings"]
    assert not list(tmp_path.rglob("*.private"))


def test_what_is_published_holds_no_clients_factors(kept_run, tmp_path):
    trainer = resuming(tmp_path / "out", ckpt.checkpoints_in(kept_run)[0], save_strategy="no")
    (tmp_path / "round").mkdir()
    trainer._write_round(tmp_path / "round", "user/run")
    assert trainer.federation.client_adapters
    published = files_of(tmp_path / "round")
    assert "federation/state.safetensors" in published
    assert not any("clients" in name for name in published)
    assert not _is_sendable(f"checkpoint-8/federation/{ckpt.CLIENT_ADAPTERS}")  # `fedex-hf push` of a run's folder
    with pytest.raises(CheckpointMismatchError, match='never published, so `assignment="keep"` cannot'):
        resuming(tmp_path / "other", tmp_path / "round")


# ---- Refused ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"assignment": "median"}, "`assignment='median'` is unknown. Allowed: 'average', 'reinitialise', 'keep'."),
        ({"assignment": None}, "`assignment=None` is unknown"),
        ({"assignment": "keep", "residual_rank": 2}, "`residual_rank=2` with `assignment='keep'`"),
        ({"assignment": "reinitialise", "residual_rank": 2}, "`residual_rank=2` with `assignment='reinitialise'`"),
        ({"seed": 3}, "`seed=3` with `assignment='average'`"),
        ({"assignment": "keep", "seed": 3}, "`seed=3` with `assignment='keep'`"),
        ({"assignment": "reinitialise", "seed": "3"}, "`seed='3'` with `assignment='reinitialise'`"),
    ],
)
def test_refused(tmp_path, kwargs, message):
    for make in (lambda: FedExAggregator(**kwargs), lambda: tiny.arguments(tmp_path, aggregator_kwargs=kwargs)):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


@pytest.mark.parametrize("way", ["model", "resume"])
def test_a_published_round_cannot_be_continued_with_factors_of_clients(tmp_path, monkeypatch, way):
    monkeypatch.setattr("fedex_hf.round_checkpoints.find_round", lambda where, token: str(tmp_path / "downloaded"))
    given = {"model": "user/run", "peft_config": None} if way == "model" else {}

    def go_on() -> None:
        trainer = tiny.federation(tmp_path, trainer_kwargs=given, aggregator_kwargs={"assignment": "keep"})
        trainer.train(resume_from_checkpoint="user/run@round-1")

    with pytest.raises(
        ValueError, match=r"`user/run(@round-1)?` has no adapters of clients: they are never published"
    ):
        go_on()


def test_own_factors_need_a_base_that_is_checked(tmp_path):
    class Careless(Aggregator):
        name, paper, is_exact, keeps_client_adapters = "careless", "", True, True

        def aggregate_layer(self, factors, client_weights):
            return factors[0], None

    with pytest.raises(ValueError, match="`Careless` says `keeps_client_adapters` without `changes_base = True`"):
        tiny.federation(tmp_path, trainer_kwargs={"aggregator": Careless()})


def test_a_method_may_assign_what_it_likes():
    class Personal(FedExAggregator):
        keeps_client_adapters = True

        def assign(self, update, updates, client_weights):
            return keep(update, updates, client_weights)

    update = Personal().aggregate([ClientUpdate("ann", 1, 1, {"layer": factors_of(1)[0]})], [1])
    assert list(update.client_adapters) == ["ann"]
