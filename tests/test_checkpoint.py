"""Round checkpoints: what is in them, whole or not at all, and resuming from them bit for bit."""

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kill_target
import pytest
import tiny
import torch
from kill_target import assert_same, log_history_of, outcome
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from fedex_hf import CheckpointMismatchError, FederatedCallback, FederatedTrainer, FedExAggregator
from fedex_hf.checkpoint import atomic_directory, checkpoints_in


STEPS_PER_ROUND = 3 + 2 + 3  # clients of 12, 7 and 9 examples, 4 to a batch
RUN = {"num_rounds": 3, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 3}
KEEP = {"client_optimizer_state": "keep"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "score", "save_total_limit": 2}


class PowerCutError(Exception):
    """Ends a run at a given moment."""


class Interrupt(FederatedCallback):
    """Ends the run once, in the middle of a round: after its second client."""

    def __init__(self, round: int) -> None:
        self.round: int | None = round
        self.fits = 0

    def on_round_begin(self, args, state, control, round, clients, **kwargs):
        self.fits = 0

    def on_client_end(self, args, state, control, update, **kwargs):
        self.fits += 1
        if update.round == self.round and self.fits == 2:
            self.round = None
            raise PowerCutError


class CountSteps(TrainerCallback):
    """Counts optimizer steps and remembers the first round."""

    def __init__(self) -> None:
        self.steps = 0
        self.first_epoch: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.first_epoch is None:
            self.first_epoch = state.epoch
        self.steps += 1


def federation(output_dir: Path, best_round: int | None = None, **kwargs: Any) -> FederatedTrainer:
    return kill_target.federation(output_dir, best_round, **(RUN | kwargs))


def trained(output_dir: Path, **kwargs: Any) -> FederatedTrainer:
    trainer = federation(output_dir, **kwargs)
    trainer.train()
    return trainer


def resumed(output_dir: Path, **kwargs: Any) -> FederatedTrainer:
    trainer = federation(output_dir, **kwargs)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def interrupted(output_dir: Path, round: int, **kwargs: Any) -> FederatedTrainer:
    trainer = federation(output_dir, **kwargs)
    trainer.add_callback(Interrupt(round))
    with pytest.raises(PowerCutError):
        trainer.train()
    return trainer


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The outcome of an uninterrupted run with the given arguments; each is run once."""
    done: dict[str, dict[str, Any]] = {}

    def of(**kwargs: Any) -> dict[str, Any]:
        if repr(kwargs) not in done:
            done[repr(kwargs)] = outcome(trained(tmp_path_factory.mktemp("reference"), **kwargs))
        return done[repr(kwargs)]

    return of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run of two rounds, to be copied or only read."""
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    trained(output_dir, num_rounds=2, **KEEP)
    return output_dir


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


# ---- What lies on the disk ----


def test_layout(finished):
    assert sorted(path.name for path in finished.iterdir()) == ["checkpoint-16", "checkpoint-8"]
    assert sorted(files_of(finished / "checkpoint-8")) == [
        "federation/base.json",
        "federation/clients/0.pt",
        "federation/clients/1.pt",
        "federation/clients/2.pt",
        "federation/exactness.json",
        "federation/ledger.safetensors",
        "federation/lora_config.json",
        "federation/model_config.json",
        "federation/state.json",
        "federation/state.safetensors",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    ]
    meta = json.loads((finished / "checkpoint-16/federation/state.json").read_text())
    assert meta["round"] == 2
    assert meta["fingerprint"]["clients"] == {"client-0": 12, "client-1": 7, "client-2": 9}


def test_nothing_takes_a_checkpoint_for_a_plain_adapter_or_model(finished):
    model = tiny.roberta()
    with pytest.raises((OSError, ValueError)):
        type(model).from_pretrained(finished / "checkpoint-16")
    for folder in [finished / "checkpoint-16", *(finished / "checkpoint-16").iterdir()]:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        assert not names & {"adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"}
        assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}


def test_client_names_do_not_become_paths(tmp_path):
    names = ["../../escape", "a/b", "/etc", "..", ".", "", "ünïcode ☃", "line\nbreak", "nul\0", "long" * 200]
    clients = dict(zip(names, tiny.clients_of([5] * len(names)).values(), strict=True))
    kwargs = KEEP | {"client_fraction": 0.5, "num_rounds": 2, "trainer_kwargs": {"train_dataset": clients}}
    output_dir = tmp_path / "run" / "out"
    reference = trained(tmp_path / "reference", **kwargs)
    interrupted(output_dir, 2, **kwargs)
    trainer = resumed(output_dir, **kwargs)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference", "run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["out"]
    states = sorted(path.name for path in (checkpoints_in(output_dir)[-1] / "federation/clients").iterdir())
    assert all(name.removesuffix(".pt").isdigit() for name in states)
    assert len(trainer.federation.optimizer_states) == len(states) > 5
    assert_same(outcome(trainer), outcome(reference))


def test_the_ledger_is_stored_and_not_a_copy_of_the_base(finished):
    base = sum(parameter.nbytes for parameter in tiny.roberta().parameters())
    stored = files_of(finished / "checkpoint-8")
    assert len(stored["federation/state.safetensors"]) < base / 2
    assert len(stored["federation/ledger.safetensors"]) < base / 2


# ---- Whole or not at all ----


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_inside_leaves_what_was_there(tmp_path, error, existing):
    final = tmp_path / "checkpoint-8"
    if existing:
        final.mkdir()
        (final / "old").write_text("whole")

    def write() -> None:
        with atomic_directory(final) as folder:
            (folder / "new").write_text("half")
            assert not (final / "new").exists()
            raise error

    with pytest.raises(error):
        write()
    assert files_of(tmp_path) == ({"checkpoint-8/old": b"whole"} if existing else {})
    assert [path.name for path in tmp_path.iterdir()] == (["checkpoint-8"] if existing else [])


def test_success_replaces_what_was_there(tmp_path):
    for content in ("old", "new"):
        with atomic_directory(tmp_path / "sub" / "checkpoint-8") as folder:
            (folder / content).mkdir()
            (folder / content / "file").write_text(content)
    assert files_of(tmp_path) == {"sub/checkpoint-8/new/file": b"new"}


def test_half_written_and_half_deleted_folders_are_ignored_and_removed(copied):
    for name in (".unfinished-checkpoint-24", ".unfinished-deleted-checkpoint-8"):
        shutil.copytree(copied / "checkpoint-16", copied / name)
        (copied / name / "federation/state.json").unlink()
    (copied / "checkpoint-best").mkdir()  # the user's own
    assert [path.name for path in checkpoints_in(copied)] == ["checkpoint-8", "checkpoint-16"]
    resumed(copied, num_rounds=2, **KEEP)
    assert sorted(path.name for path in copied.iterdir()) == ["checkpoint-16", "checkpoint-8", "checkpoint-best"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (100, 9, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert checkpoints_in(tmp_path / "missing") == []


class _LimitFileSize(FederatedCallback):
    """From the end of round 2 on, the system refuses files beyond a size, as a full disk would."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_round_end(self, args, state, control, round, metrics, **kwargs):
        if round == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def file_size_limit_restored() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 10_000, 20_000])
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_resumable(tmp_path, uninterrupted, limit):
    kwargs = KEEP | {"save_total_limit": 1}
    trainer = federation(tmp_path, **kwargs)
    callback = _LimitFileSize(limit)
    trainer.add_callback(callback)
    with file_size_limit_restored(), pytest.raises(Exception, match=r"File too large|write|enforce") as raised:
        trainer.train()
    assert not isinstance(raised.value, CheckpointMismatchError)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    assert max(map(len, files_of(tmp_path).values())) > limit
    trainer.remove_callback(callback)

    trainer.train(resume_from_checkpoint=True)
    fresh = resumed(tmp_path, **kwargs)
    for each in (trainer, fresh):
        assert_same(outcome(each), uninterrupted(**kwargs))


# ---- Resuming is bit for bit ----


RESUMED = {
    "keep": KEEP,
    "one schedule": {"lr_schedule": "run", "lr_scheduler_type": "cosine", "warmup_steps": 5},
    "fedit, sampled": {"aggregator": "fedit", "client_fraction": 0.5, "sizes": (12, 7, 9, 5)},
    "ffa, one log a round": {"aggregator": "ffa", "logging_strategy": "epoch"} | KEEP,
    "truncated, accumulated": {
        "aggregator_kwargs": {"residual_rank": 2},
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.no_cover
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_a_fresh_trainer_equals_uninterrupted(tmp_path, uninterrupted, name):
    kwargs = RESUMED[name]
    interrupted(tmp_path, 3, **kwargs)
    assert len(checkpoints_in(tmp_path)) == 2
    trainer = federation(tmp_path, **kwargs)
    counter = CountSteps()
    trainer.add_callback(counter)
    output = trainer.train(resume_from_checkpoint=True)

    assert counter.first_epoch == 2.0
    assert_same(outcome(trainer), uninterrupted(**kwargs))
    assert output.global_step == trainer.state.global_step == trainer.state.max_steps


@pytest.mark.no_cover
@pytest.mark.parametrize("name", ["keep", "ffa, one log a round"])
def test_resumed_in_the_same_trainer_equals_uninterrupted(tmp_path, uninterrupted, name):
    trainer = interrupted(tmp_path, 3, **RESUMED[name])
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), uninterrupted(**RESUMED[name]))
    trainer.train(resume_from_checkpoint=str(checkpoints_in(tmp_path)[0]))
    assert_same(outcome(trainer), uninterrupted(**RESUMED[name]))


def test_a_stream_goes_on_where_it_stopped(tmp_path):
    def streams() -> dict[str, Any]:
        return {name: dataset.to_iterable_dataset() for name, dataset in tiny.clients_of([12, 30, 9]).items()}

    def kwargs() -> dict[str, Any]:
        return {"max_steps": 2, "trainer_kwargs": {"train_dataset": streams()}}

    reference = trained(tmp_path / "reference", **kwargs())
    interrupted(tmp_path / "out", 3, **kwargs())
    assert_same(outcome(resumed(tmp_path / "out", **kwargs())), outcome(reference))


@pytest.mark.parametrize(
    ("sizes", "num_rounds", "interrupted_in"),
    [((8,) * 7, 2, 2), ((5, 6), 5, 4), ((5, 6), 5, 5)],
    ids=["many clients", "before it is dense", "after it is dense"],
)
def test_a_dense_ledger_survives(tmp_path, uninterrupted, sizes, num_rounds, interrupted_in):
    """Residuals of rank 24 in a round, or of rank 4 growing by 4: from rank 16 on, the sum of 32 x 32 is dense."""
    kwargs = {"sizes": sizes, "num_rounds": num_rounds, "eval_strategy": "no"}
    interrupted(tmp_path, interrupted_in, **kwargs)
    stored = (checkpoints_in(tmp_path)[-1] / "federation/ledger.safetensors").read_bytes()
    assert (b"matrices/" in stored) == (len(sizes) == 7 or interrupted_in == 5)
    trainer = resumed(tmp_path, **kwargs)
    assert trainer.federation.ledger.matrices.keys() == trainer.adapted.sites.keys()
    assert not trainer.federation.ledger.factors
    assert_same(outcome(trainer), uninterrupted(**kwargs))


@pytest.mark.parametrize("form", [str, Path, lambda path: f"{path}/", os.path.relpath])
def test_an_explicit_path_that_is_not_the_newest(finished, copied, form):
    trainer = federation(copied, num_rounds=2, **KEEP)
    counter = CountSteps()
    trainer.add_callback(counter)
    trainer.train(resume_from_checkpoint=form(copied / "checkpoint-8"))
    assert counter.steps == STEPS_PER_ROUND
    for name in ("state.safetensors", "ledger.safetensors"):
        path = Path("checkpoint-16/federation") / name
        assert (copied / path).read_bytes() == (finished / path).read_bytes()


def test_a_checkpoint_of_another_output_folder(finished, tmp_path):
    trainer = federation(tmp_path / "elsewhere", num_rounds=2, **KEEP)
    trainer.train(resume_from_checkpoint=str(finished / "checkpoint-8"))
    assert kept(tmp_path / "elsewhere") == ["checkpoint-16"]
    name = "checkpoint-16/federation/state.safetensors"
    assert (tmp_path / "elsewhere" / name).read_bytes() == (finished / name).read_bytes()


def test_resuming_a_finished_run_does_nothing(finished, copied):
    trainer = federation(copied, num_rounds=2, **KEEP)
    counter = CountSteps()
    trainer.add_callback(counter)
    for _ in range(2):
        output = trainer.train(resume_from_checkpoint=True)
        assert counter.steps == 0
        assert output.global_step == 2 * STEPS_PER_ROUND
        assert 0 < output.metrics["max_aggregation_error"] < 1e-5
        assert trainer.federation.round == 2
        assert files_of(copied) == files_of(finished)


def test_resuming_a_run_that_was_stopped_early_does_nothing(tmp_path):
    trainers, steps = [], []
    for _ in range(2):
        trainer = federation(tmp_path, 1, trainer_kwargs={"callbacks": [EarlyStoppingCallback(1)]}, **BEST)
        counter = CountSteps()
        trainer.add_callback(counter)
        trainer.train(resume_from_checkpoint=True)
        trainers.append(trainer)
        steps.append(counter.steps)
    assert steps == [2 * STEPS_PER_ROUND, 0]
    assert trainers[0].federation.round == 1  # the best
    assert_same(outcome(trainers[1]), outcome(trainers[0]))


def test_patience_is_counted_across_a_resume(tmp_path):
    """Worse in rounds 2 and 3 with patience 2: stopped after 3 of 4, though it died in between."""
    for run in (lambda **kwargs: interrupted(tmp_path, 3, **kwargs), lambda **kwargs: resumed(tmp_path, **kwargs)):
        callbacks = {"callbacks": [EarlyStoppingCallback(2)]}
        trainer = run(best_round=1, num_rounds=4, trainer_kwargs=callbacks, **BEST)
    assert trainer.state.epoch == 3.0


def test_more_rounds_on_resuming(finished, copied, uninterrupted):
    trainer = resumed(copied, **KEEP)
    assert_same(outcome(trainer), uninterrupted(**KEEP))
    assert trainer.state.max_steps == 3 * STEPS_PER_ROUND


def test_true_without_a_checkpoint_starts_at_round_1(tmp_path, uninterrupted):
    assert_same(outcome(resumed(tmp_path / "not" / "there", **KEEP)), uninterrupted(**KEEP))


def test_the_log_of_a_resumed_run_has_no_gap_and_no_double(tmp_path):
    interrupted(tmp_path, 3)
    history = log_history_of(resumed(tmp_path).state.log_history)
    assert [entry["round"] for entry in history if "aggregation_error" in entry] == [1, 2, 3]
    assert [entry["epoch"] for entry in history if "eval_loss" in entry] == [1.0, 2.0, 3.0]
    steps = [entry["step"] for entry in history if "loss" in entry]
    assert steps == sorted(set(steps))
    assert len(steps) >= 6


# ---- The best round, and how many are kept ----


def kept(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoints_in(output_dir)]


def names(*rounds: int) -> list[str]:
    return [f"checkpoint-{STEPS_PER_ROUND * round}" for round in rounds]


@pytest.mark.parametrize(("limit", "expected"), [(1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_save_total_limit(tmp_path, limit, expected):
    trained(tmp_path, save_total_limit=limit)
    assert kept(tmp_path) == names(*expected)


@pytest.mark.parametrize(("strategy", "expected"), [("no", []), ("steps", [2, 3]), ("best", [1, 2])])
def test_save_strategies(tmp_path, strategy, expected):
    """`steps` (14 of 8 a round) saves at the end of the round in which the step falls, and at the end of the run."""
    trained(tmp_path, best_round=2, save_strategy=strategy, save_steps=14, metric_for_best_model="score")
    assert kept(tmp_path) == names(*expected)


@pytest.mark.no_cover
@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_best_round_is_kept_and_loaded_with_its_base_after_a_resume(tmp_path, uninterrupted, best):
    interrupted(tmp_path, 3, best_round=best, **BEST)
    trainer = resumed(tmp_path, best_round=best, **BEST)
    assert trainer.federation.round == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / names(best)[0])
    assert kept(tmp_path) == names(*sorted({best, 3} | ({2} if best == 3 else set())))
    assert_same(outcome(trainer), uninterrupted(best_round=best, **BEST))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == losses[best - 1]


@pytest.mark.no_cover
@pytest.mark.parametrize("moved_after_round", [2, 3])
def test_the_best_round_is_found_in_a_folder_that_was_moved(tmp_path, uninterrupted, moved_after_round):
    if moved_after_round == 3:
        trained(tmp_path / "old", best_round=1, **BEST)
    else:
        interrupted(tmp_path / "old", 3, best_round=1, **BEST)
    shutil.move(tmp_path / "old", tmp_path / "new")
    trainer = resumed(tmp_path / "new", best_round=1, **BEST)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "new" / names(1)[0])
    assert_same(outcome(trainer), uninterrupted(best_round=1, **BEST))


def test_the_best_round_is_kept_when_the_folder_is_named_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(Path("out"), 3, best_round=1, **BEST)
    assert resumed(tmp_path / "out", best_round=1, **BEST).federation.round == 1
    assert kept(tmp_path / "out") == names(1, 3)


# ---- Damaged ----


FILES = [
    "federation/state.json",
    "federation/state.safetensors",
    "federation/ledger.safetensors",
    "federation/clients/1.pt",
    "trainer_state.json",
    "rng_state.pth",
]


def refused(output_dir: Path, *says: str, trainer: FederatedTrainer | None = None, path: Any = True) -> str:
    """Resuming is refused with `CheckpointMismatchError`, no step was run, the model is as it was."""
    if trainer is None:
        trainer = federation(output_dir, **KEEP)
    counter = CountSteps()
    trainer.add_callback(counter)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError) as raised:
        trainer.train(resume_from_checkpoint=path)
    assert counter.steps == 0
    assert_same(dict(trainer.model.state_dict()), before)
    message = str(raised.value)
    for part in says:
        assert part in message
    return message


@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(copied, name, damage):
    path = copied / "checkpoint-16" / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    refused(copied, "checkpoint-16", name)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b'{"format": 1}'])
def test_corrupted_json(copied, content):
    (copied / "checkpoint-16/federation/state.json").write_bytes(content)
    refused(copied, "checkpoint-16")


def test_another_format(copied):
    path = copied / "checkpoint-16/federation/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    refused(copied, "format 2", "reads format 1")


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["federation/clients/0.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_checkpoint_is_not_run(copied, tmp_path, name):
    path, marker = copied / "checkpoint-16" / name, tmp_path / "executed"
    torch.save({"state": _Bomb(marker)}, path)
    meta = copied / "checkpoint-16/federation/state.json"
    content = json.loads(meta.read_text())
    for key in content["files"]:
        file = next(folder / key for folder in (meta.parent, meta.parents[1]) if (folder / key).exists())
        content["files"][key] = file.stat().st_size
    meta.write_text(json.dumps(content))
    trainer = federation(copied, num_rounds=2, **KEEP)
    if name == "training_args.bin":  # not read at all
        trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises((pickle.UnpicklingError, CheckpointMismatchError)):
            trainer.train(resume_from_checkpoint=True)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the bomb is a real one
    assert marker.exists()


# ---- Not of this run ----


def _clients(sizes: dict[str, int]) -> dict[str, Any]:
    return {"trainer_kwargs": {"train_dataset": {name: tiny.classification_data(n) for name, n in sizes.items()}}}


def _lora(**kwargs: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"trainer_kwargs": {"peft_config": tiny.lora(**kwargs)}}


def _other_frozen_layer() -> dict[str, Any]:
    model = tiny.roberta()
    with torch.no_grad():
        model.roberta.encoder.layer[0].intermediate.dense.weight.mul_(2)
    return {"model": model}


OTHER_RUNS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "base weights": (lambda: {"model": tiny.roberta(seed=1)}, ("base weights",)),
    "a frozen layer without LoRA": (_other_frozen_layer, ("base weights",)),
    "rank": (_lora(r=2, lora_alpha=4), ("LoRA layers", "[4, 32]", "[2, 32]")),
    "alpha": (_lora(lora_alpha=16), ("LoRA layers", "'scaling': 2.0", "'scaling': 4.0")),
    "rsLoRA": (_lora(use_rslora=True), ("LoRA layers", "'scaling': 2.0", "'scaling': 4.0")),
    "layers": (_lora(target_modules=["query", "key"]), ("LoRA layers", "self.value")),
    "trained tensors": (_lora(bias="lora_only"), ("other trained tensors", "query.base_layer.bias")),
    "aggregator": (lambda: {"aggregator": "fedit"}, ("aggregator", "fedex", "fedit")),
    "residual rank": (
        lambda: {"trainer_kwargs": {"aggregator": FedExAggregator(residual_rank=2)}},
        ("aggregator", "residual_rank", "None", "2"),
    ),
    "clients' names": (lambda: _clients({"a": 12, "b": 7, "c": 9}), ("clients", "client-0")),
    "clients' sizes": (lambda: _clients({"client-0": 12, "client-1": 8, "client-2": 9}), ("client-1", "7", "8")),
    "more clients": (lambda: {"sizes": (12, 7, 9, 4)}, ("clients", "client-3")),
    "fewer clients": (lambda: {"sizes": (12, 7)}, ("clients", "client-2")),
    # Seeds and stored optimizer states go by a client's place.
    "order of clients": (lambda: _clients({"client-2": 9, "client-1": 7, "client-0": 12}), ("clients", "order")),
    "seed": (lambda: {"seed": 8}, ("seed", "7", "8")),
    "data_seed": (lambda: {"data_seed": 8}, ("data_seed", "8")),
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(copied, what):
    make, says = OTHER_RUNS[what]
    trainer = federation(copied, **(KEEP | make()))
    refused(copied, "belongs to another run", "another `output_dir`", *says, trainer=trainer)
    assert kept(copied) == ["checkpoint-8", "checkpoint-16"]


def test_what_may_change_on_resuming(copied):
    """As with `Trainer`: the hyperparameters of the training."""
    trainer = resumed(copied, learning_rate=1e-3, per_device_train_batch_size=2, logging_steps=1)
    assert trainer.federation.round == 3


@pytest.mark.parametrize("newest", [True, False])
def test_a_plain_trainers_checkpoint_is_refused(tmp_path, newest):
    plain = Trainer(
        tiny.roberta(),
        TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, disable_tqdm=True),
        train_dataset=tiny.classification_data(4),
    )
    plain.train()
    path = True if newest else str(tmp_path / "checkpoint-1")
    refused(tmp_path, "checkpoint-1", "not a round checkpoint of `FederatedTrainer`", "Pass a", path=path)


def test_other_folders_are_refused(tmp_path, finished):
    tiny.federation(tmp_path / "a").save_model(str(tmp_path / "saved"))
    for path in (tmp_path / "saved", tmp_path / "missing", finished, finished / "checkpoint-8/federation"):
        refused(tmp_path / "out", str(path), "Pass a `checkpoint-N` folder", path=str(path))


def test_the_model_can_be_trained_after_a_refusal(copied, tmp_path):
    trainer = federation(copied, seed=8, num_rounds=1)
    refused(copied, trainer=trainer)
    trainer.args.output_dir = str(tmp_path / "anew")
    trainer.train()
    assert_same(outcome(trainer), outcome(trained(tmp_path / "reference", seed=8, num_rounds=1)))
