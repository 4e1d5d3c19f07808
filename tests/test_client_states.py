"""Clients' optimizer states on the disk: the same bytes as in memory, and files that nobody deletes too early."""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import gc
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import collect_garbage
from kill_target import assert_same, outcome

from fedex_hf import CheckpointMismatchError, FederatedCallback, FederatedTrainer
from fedex_hf.checkpoint import checkpoints_in
from fedex_hf.client_states import ClientStateError, StateFile, StateFolder, StatesOnDisk, read_state


SIZES = (8, 5, 4, 7, 8, 4)  # a third of them in a round: some are fitted twice, and some not at all
RUN = {
    "num_rounds": 4,
    "client_fraction": 0.34,
    "client_optimizer_state": "keep",
    "save_strategy": "epoch",
    "logging_steps": 3,
}


class PowerCutError(Exception):
    """Ends a run in the middle of a round."""


class Interrupt(FederatedCallback):
    def __init__(self, round: int) -> None:
        self.round = round

    def on_client_end(self, args, state, control, update, **kwargs):
        if update.round == self.round:
            raise PowerCutError


def federation(folder: Path, on_disk: bool, **kwargs: Any) -> FederatedTrainer:
    """A run in `folder / "out"` with its states in `folder / "states"`, or in memory."""
    states = {"client_state_dir": str(folder / "states")} if on_disk else {}
    return tiny.federation(folder / "out", **({"sizes": SIZES} | RUN | states | kwargs))


def trained(folder: Path, on_disk: bool, **kwargs: Any) -> FederatedTrainer:
    trainer = federation(folder, on_disk, **kwargs)
    trainer.train()
    return trainer


def interrupted(folder: Path, on_disk: bool, round: int = 3, **kwargs: Any) -> FederatedTrainer:
    trainer = federation(folder, on_disk, **kwargs)
    trainer.add_callback(Interrupt(round))
    with pytest.raises(PowerCutError):
        trainer.train()
    trainer.remove_callback(Interrupt)
    return trainer


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pt"))


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the run with its states in memory."""
    return outcome(trained(tmp_path_factory.mktemp("memory"), on_disk=False))


@pytest.fixture
def state() -> dict[str, Any]:
    return {index: {"step": torch.tensor(2.0), "exp_avg": torch.randn(40, 30)} for index in range(3)}


# ---- The same bytes ----


def test_states_on_disk_are_those_in_memory(tmp_path, in_memory):
    trainer = trained(tmp_path, on_disk=True)
    assert isinstance(trainer.federation.optimizer_states, StatesOnDisk)
    assert len(trainer.federation.optimizer_states) == len(in_memory["optimizer_states"]) > 3
    assert_same(outcome(trainer), in_memory)
    # The twin: a client does go on from its state.
    fresh = trained(tmp_path / "reset", on_disk=False, client_optimizer_state="reset")
    assert not torch.equal(*(each["state"][next(iter(in_memory["state"]))] for each in (outcome(fresh), in_memory)))


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_resumed_runs_end_with_the_same_bytes(tmp_path, in_memory, first, then):
    interrupted(tmp_path, first)
    trainer = federation(tmp_path, then)
    trainer.train(resume_from_checkpoint=True)
    assert isinstance(trainer.federation.optimizer_states, StatesOnDisk) == then
    assert_same(outcome(trainer), in_memory)


def test_resumed_in_the_same_trainer(tmp_path, in_memory):
    trainer = interrupted(tmp_path, True)
    for checkpoint in (True, str(checkpoints_in(tmp_path / "out")[0])):
        trainer.train(resume_from_checkpoint=checkpoint)
        assert_same(outcome(trainer), in_memory)


def test_a_checkpoint_outlives_the_folder_of_states(tmp_path, in_memory):
    interrupted(tmp_path, True)
    shutil.rmtree(tmp_path / "states")
    trainer = federation(tmp_path, True)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), in_memory)


def test_states_outlive_the_checkpoint_they_came_from(tmp_path, in_memory):
    interrupted(tmp_path, True)
    trainer = federation(tmp_path, True, save_strategy="no")
    trainer.add_callback(_DeleteCheckpoints(tmp_path / "out"))
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), in_memory)


class _DeleteCheckpoints(FederatedCallback):
    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def on_round_begin(self, *args, **kwargs):
        shutil.rmtree(self.output_dir, ignore_errors=True)


@pytest.mark.parametrize("where", ["writing", "resuming"])
def test_copied_where_there_are_no_links(tmp_path, in_memory, monkeypatch, where):
    def refuse(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        if where == "writing":
            patch.setattr(os, "link", refuse)
        interrupted(tmp_path, True)
    links = {path.stat().st_nlink for path in files_in(tmp_path / "out")}
    assert (links == {1}) == (where == "writing")
    monkeypatch.setattr(os, "link", refuse)
    trainer = federation(tmp_path, True)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), in_memory)


# ---- What is written, and what is held ----


class Watch(FederatedCallback):
    """After every round: the files of the trainer's folder, and the tensors that are alive."""

    def __init__(self) -> None:
        self.files: list[set[Path]] = []
        self.tensors: list[int] = []
        self.kept: list[int] = []

    def on_round_end(self, args, state, control, trainer, **kwargs):
        if trainer.state_folder is not None:
            self.files.append(set(files_in(trainer.state_folder.path)))
        collect_garbage()
        self.tensors.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
        self.kept.append(len(trainer.federation.optimizer_states))


def watched(folder: Path, on_disk: bool, **kwargs: Any) -> tuple[Watch, FederatedTrainer]:
    watch, trainer = Watch(), federation(folder, on_disk, **kwargs)
    trainer.add_callback(watch)
    trainer.train()
    return watch, trainer


def test_one_file_per_client_that_was_fitted(tmp_path):
    watch, trainer = watched(tmp_path, True)
    assert [len(files) for files in watch.files] == watch.kept
    assert {file.path for file in trainer.federation.optimizer_states.files.values()} == watch.files[-1]
    sampled = [set(trainer.sample_clients(round)) for round in range(1, 5)]
    assert any(earlier & later for earlier, later in itertools.pairwise(sampled))  # a file was replaced
    assert watch.kept == [len(set().union(*sampled[: round + 1])) for round in range(4)]


def test_a_checkpoint_writes_the_states_of_its_round_only(tmp_path):
    _, trainer = watched(tmp_path, True)
    before: set[int] = set()
    for round, checkpoint in enumerate(checkpoints_in(tmp_path / "out"), start=1):
        states = {path.stem: path.stat().st_ino for path in files_in(checkpoint / "federation")}
        new = {f"client-{place}" for place, inode in states.items() if inode not in before}
        assert new == set(trainer.sample_clients(round))
        before |= set(states.values())
    assert len(before) == 4 * len(trainer.sample_clients(1))
    # The twin: from memory every checkpoint writes all of them.
    trained(tmp_path / "memory", on_disk=False)
    inodes = [path.stat().st_ino for path in files_in(tmp_path / "memory")]
    assert len(set(inodes)) == len(inodes) > len(before)


def test_memory_does_not_grow_with_the_clients(tmp_path):
    """Live tensors after each round: constant on the disk, and more with every client that keeps its state there."""
    settings = {"num_rounds": 5, "sizes": (4,) * 12, "client_fraction": 0.25, "save_strategy": "no"}
    settings["aggregator"] = "fedit"  # whose ledger does not grow
    disk, _ = watched(tmp_path / "disk", True, **settings)
    memory, trainer = watched(tmp_path / "memory", False, **settings)
    assert disk.kept == memory.kept
    assert disk.kept[-1] > disk.kept[0] + 3
    per_client = sum(len(each) for each in trainer.federation.optimizer_states["client-0"].values())
    assert per_client > 20
    assert max(disk.tensors[1:]) <= disk.tensors[0] + per_client
    for kept, tensors in zip(memory.kept[1:], memory.tensors[1:], strict=True):
        assert tensors >= memory.tensors[0] + (kept - memory.kept[0]) * per_client


def test_nothing_is_left_of_a_fit(tmp_path):
    """Objects that the garbage collector knows: the same after every round, but for what is logged and kept."""

    class Count(FederatedCallback):
        def __init__(self, leak: list[Any] | None = None) -> None:
            self.objects: list[int] = []
            self.leak = leak

        def on_client_end(self, args, state, control, update, **kwargs):
            if self.leak is not None:
                self.leak.append(update)

        def on_round_end(self, args, state, control, **kwargs):
            state.log_history.clear()
            collect_garbage()
            self.objects.append(len(gc.get_objects()))

    settings = {"num_rounds": 8, "sizes": (4,) * 4, "client_fraction": 1.0, "save_strategy": "no", "aggregator": "ffa"}
    counts = []
    for leak in (None, []):
        count, trainer = Count(leak), federation(tmp_path, True, **settings)
        trainer.add_callback(count)
        trainer.train()
        counts.append(count.objects)
    fine, leaking = counts
    assert fine[-1] <= fine[3] + 4  # fewer than one for every fit
    assert leaking[-1] > leaking[3] + 100  # the twin


def test_a_round_looks_at_its_own_clients_only(tmp_path):
    """Neither their data nor their number of steps is asked for again."""
    looks: list[str] = []

    class Looked(torch.utils.data.Dataset):
        def __init__(self, client_id: str, rows: Any) -> None:
            self.client_id, self.rows = client_id, rows

        def __len__(self) -> int:
            looks.append(self.client_id)
            return len(self.rows)

        def __getitem__(self, index: int) -> Any:
            looks.append(self.client_id)
            return self.rows[index]

    class Begin(FederatedCallback):
        def on_round_begin(self, args, state, control, round, clients, **kwargs):
            if round == 2:
                looks.clear()

        def on_round_end(self, args, state, control, round, trainer, **kwargs):
            if round > 1:
                assert set(looks) == set(trainer.sample_clients(round))
            looks.clear()

    clients = {client_id: Looked(client_id, rows) for client_id, rows in tiny.clients_of([4] * 30).items()}
    settings = {"train_dataset": clients, "callbacks": [Begin()], "eval_dataset": None}
    trained(tmp_path, True, client_fraction=0.1, trainer_kwargs=settings)
    assert not looks


def test_a_client_that_fails_leaves_no_file(tmp_path):
    class Flaky(FederatedTrainer):
        def fit_client(self, client_id: str, round: int) -> Any:
            update = super().fit_client(client_id, round)
            if (client_id, round) == ("client-1", 2):
                raise ConnectionError("gone after training")
            return update

    trainer = Flaky(
        model=tiny.peft_roberta(),
        args=tiny.arguments(
            tmp_path / "out",
            client_state_dir=str(tmp_path / "states"),
            client_optimizer_state="keep",
            client_errors="skip",
        ),
        train_dataset=tiny.clients_of([4, 8]),
    )
    trainer.train()
    states = trainer.federation.optimizer_states
    assert set(files_in(trainer.state_folder.path)) == {file.path for file in states.files.values()}
    steps = {client_id: {int(each["step"]) for each in state.values()} for client_id, state in states.items()}
    assert steps == {"client-0": {2}, "client-1": {2}}  # one step in each of two rounds; two steps in the first


# ---- Files and folders ----


def test_a_file_lives_as_long_as_something_refers_to_it(tmp_path, state):
    folder = StateFolder(tmp_path)
    states = StatesOnDisk(folder) | {"ann": state, "ben": folder.write(state)}
    assert list(states) == ["ann", "ben"]
    assert "cid" not in states
    assert_same(states["ann"], state)
    before, held = states, copy.deepcopy(states.files["ben"])
    states = states | {"ben": state}
    assert len(files_in(tmp_path)) == 3
    del before
    assert len(files_in(tmp_path)) == 3
    del held
    assert len(files_in(tmp_path)) == 2
    del states
    assert files_in(tmp_path) == []
    path = folder.path
    assert path.is_dir()
    del folder
    assert not path.exists()


def test_a_checkpoint_keeps_its_file(tmp_path, state):
    folder = StateFolder(tmp_path / "states")
    file = folder.write(state)
    assert file.put_into(tmp_path / "0.pt")
    again = folder.take_in(tmp_path / "0.pt")
    del file
    assert_same(again.load(), state)
    (tmp_path / "0.pt").unlink()
    assert_same(again.load(), state)
    del again
    assert files_in(tmp_path) == []


def test_a_fork_deletes_nothing(tmp_path, state):
    folder = StateFolder(tmp_path)
    files: list[StateFile] = [folder.write(state)]
    pid = os.fork()
    if pid == 0:
        files.clear()
        del folder
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_same(files[0].load(), state)


def test_what_killed_processes_left_is_removed(tmp_path, state):
    for name in ("run-dead", "run-unlocked", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.pt").write_bytes(b"")
    (tmp_path / "run-dead" / "lock").write_bytes(b"")
    (tmp_path / "run-alive").mkdir()
    living = StateFolder(tmp_path / "run-alive")  # not the folder's own name: only its lock protects what follows
    with (tmp_path / "run-alive" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one, other = StateFolder(tmp_path), StateFolder(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run-unlocked", "mine", "run-alive", one.path.name, other.path.name}
    assert living.path.is_dir()
    assert_same(one.write(state).load(), state)


def test_trainers_that_share_a_folder(tmp_path, in_memory):
    one, other = federation(tmp_path / "one", False), federation(tmp_path / "other", False)
    for trainer in (one, other):
        trainer.args.client_state_dir = str(tmp_path / "states")
        vars(trainer).pop("state_folder")
        trainer.train()
    assert one.state_folder.path != other.state_folder.path
    for trainer in (one, other):
        assert_same(outcome(trainer), in_memory)


# ---- Damage ----


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "changed":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:-100])
    elif how == "other":
        path.write_bytes(b"no archive")


def test_every_changed_byte_of_a_tensor_is_found(tmp_path, state):
    folder = StateFolder(tmp_path)
    file = folder.write(state)
    content = file.path.read_bytes()
    found = harmless = 0
    for position in range(0, len(content), 397):
        changed = bytearray(content)
        changed[position] ^= 1
        file.path.write_bytes(changed)
        with contextlib.suppress(ClientStateError):
            assert_same(file.load(), state)  # in the padding between tensors
            harmless += 1
            continue
        found += 1
    assert found > harmless
    # The twin: torch itself does not look at the checksums.
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    file.path.write_bytes(changed)
    with pytest.raises(ClientStateError, match="checksum"):
        read_state(file.path)
    assert not torch.equal(torch.load(file.path, weights_only=True)[1]["exp_avg"], state[1]["exp_avg"])


@pytest.mark.parametrize("how", ["changed", "cut", "other", "missing"])
def test_a_damaged_file_is_refused_when_its_client_is_fitted(tmp_path, how):
    trainer = federation(tmp_path, True, client_fraction=1.0, sizes=(4, 4))
    trainer.run_round(1)
    damage(trainer.federation.optimizer_states.files["client-1"].path, how)
    expected = "is not there any more" if how == "missing" else "is damaged"
    with pytest.raises(ClientStateError, match=rf"run-.*\.pt`, the state of a client, {expected}"):
        trainer.run_round(2)
    if how == "missing":
        with pytest.raises(ClientStateError, match="is not there any more"):
            trainer._save_checkpoint(trainer.model, None)
        assert checkpoints_in(tmp_path / "out") == []


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_checkpoint_is_refused(tmp_path, on_disk, how):
    settings = {"sizes": (4, 4), "client_fraction": 1.0}
    trained(tmp_path, on_disk, num_rounds=1, **settings)
    damage(files_in(tmp_path / "out")[1], how)
    trainer = federation(tmp_path, on_disk, **settings)
    # What has kept its size is found when it is read: at once, or when its client is fitted.
    error = ClientStateError if on_disk and how == "changed" else CheckpointMismatchError
    with pytest.raises(error, match="is damaged" if how == "changed" else "should have"):
        trainer.train(resume_from_checkpoint=True)


# ---- Bad input ----


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`client_state_dir='.*file'` is no folder"):
        tiny.arguments(tmp_path, client_state_dir=str(tmp_path / "file"), client_optimizer_state="keep")
    with pytest.raises(ValueError, match="`client_state_dir=''` is no folder"):
        tiny.arguments(tmp_path, client_state_dir="", client_optimizer_state="keep")
    args = tiny.arguments(tmp_path, client_state_dir=str(tmp_path / "file" / "below"), client_optimizer_state="keep")
    with pytest.raises(ClientStateError, match=r"cannot be used: .*Not a directory"):
        FederatedTrainer(tiny.peft_roberta(), args, train_dataset=tiny.clients_of([4, 4]))


def test_a_folder_for_nothing(tmp_path):
    with pytest.raises(ValueError, match="with `client_optimizer_state='reset'`: clients keep no states"):
        tiny.arguments(tmp_path, client_state_dir=str(tmp_path / "states"))
