"""A run that is killed at any moment and resumed ends with the same bytes as one that was not.

The processes here are real ones, and so is the SIGKILL. They run `kill_target.py`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kill_target
import pytest
import torch
from programs import untraced

from fedex_hf import checkpoint


STEPS_PER_ROUND = 3 + 2 + 3  # clients of 12, 7 and 9 examples, 4 to a batch
COMMON = {
    "num_rounds": 4,
    "client_optimizer_state": "keep",
    "lr_schedule": "run",
    "save_strategy": "epoch",
    "eval_strategy": "epoch",
    "logging_steps": 3,
}
# The second of four rounds is the best, and patience runs out in the third.
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
SAMPLED = {"aggregator": "ffa", "client_fraction": 0.67, "save_total_limit": 2}
VARIANTS = {
    "plain": {"arguments": COMMON, "best_round": None, "patience": 0},
    "best": {"arguments": COMMON | BEST | {"save_total_limit": 1}, "best_round": 2, "patience": 1},
    "sampled": {"arguments": COMMON | SAMPLED, "best_round": None, "patience": 0},
    "best, states on disk": {"arguments": COMMON | BEST | {"save_total_limit": 1}, "best_round": 2, "patience": 1},
}


class Process:
    """One training process; lines are what it has told."""

    def __init__(self, server: subprocess.Popen, job: dict[str, Any]) -> None:
        self._server = server
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        self.steps: list[int] = []
        self.operations = 0
        self.pid = int(self._told("pid"))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait_for_step(self, step: int) -> None:
        while not self.steps or self.steps[-1] < step:
            self._told("step")

    def end(self) -> int:
        """Wait for the end; returns the exit status."""
        return int(self._told("ended"))

    def _told(self, word: str) -> str:
        for line in self._server.stdout:
            key, _, value = line.strip().partition(" ")
            if key == "step":
                self.steps.append(int(value))
            elif key == "operations":
                self.operations = int(value)
            if key == word:
                return value
            assert key != "ended", f"The process ended with {value} before it told `{word}`."
        raise AssertionError("The server of processes has died.")


class Runs:
    """Starts processes that continue the run in one output folder."""

    def __init__(self, server: subprocess.Popen, output_dir: Path, variant: str) -> None:
        self.server = server
        self.output_dir = output_dir
        self.result = output_dir.with_name(f"{output_dir.name}.pt")
        self.job = VARIANTS[variant] | {"output_dir": str(output_dir), "result": str(self.result)}
        if "on disk" in variant:
            self.job["arguments"] = self.job["arguments"] | {"client_state_dir": str(output_dir / "states")}

    def start(self, kill_before_operation: int | None = None) -> Process:
        self.result.unlink(missing_ok=True)
        return Process(self.server, self.job | {"kill_before_operation": kill_before_operation})

    def finish(self) -> Process:
        process = self.start()
        assert process.end() == 0
        return process

    def killed(self, at: Callable[[Process], None]) -> bool:
        """Start a process, kill it at a moment; returns whether it was still at work then."""
        process = self.start()
        try:
            at(process)
        finally:
            process.kill()
            status = process.end()
        return status == -signal.SIGKILL

    def unfinished(self) -> list[Path]:
        return list(self.output_dir.glob(".unfinished-*"))

    def bytes(self) -> dict[str, Any]:
        """All that must be the same, of the finished model and of every checkpoint that is left."""
        folders = checkpoint.checkpoints_in(self.output_dir)
        return {
            "outcome": torch.load(self.result, weights_only=True),
            "checkpoints": {folder.name: self._content(folder) for folder in folders},
        }

    def assert_same_as(self, expected: dict[str, Any], where: str = "") -> None:
        """The finished run is the expected one; a death before the deletion of a surplus checkpoint may leave that."""
        assert not self.unfinished()
        assert len(list(self.output_dir.glob("states/*"))) <= 1  # the last process's own: it has ended without a word
        found = self.bytes()
        assert found["checkpoints"].keys() >= expected["checkpoints"].keys(), where
        found["checkpoints"] = {name: found["checkpoints"][name] for name in expected["checkpoints"]}
        kill_target.assert_same(found, expected, where)

    def _content(self, folder: Path) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if name == "trainer_state.json":
                state = json.loads(path.read_text().replace(str(self.output_dir), "<output_dir>"))
                content[name] = state | {"log_history": kill_target.log_history_of(state["log_history"])}
            elif path.suffix == ".pt":
                content[name] = torch.load(path, weights_only=True)
            elif name == "federation/state.json":
                content[name] = json.loads(path.read_text()) | {"files": None}  # their sizes, with times among them
            elif path.suffix == ".safetensors":
                content[name] = path.read_bytes()
        return content


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    environment = untraced() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, kill_target.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture(scope="module")
def uninterrupted(server: subprocess.Popen, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The bytes of a variant's uninterrupted run, and the seconds it took."""
    done: dict[str, tuple[dict[str, Any], float]] = {}

    def of(variant: str) -> tuple[dict[str, Any], float]:
        if variant not in done:
            runs = Runs(server, tmp_path_factory.mktemp(variant) / "out", variant)
            start = time.monotonic()
            runs.finish()
            done[variant] = runs.bytes(), time.monotonic() - start
        return done[variant]

    return of


def poll(condition: Callable[[], Any], process: Process, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and _lives(process.pid):
        time.sleep(0)


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_reference_is_a_run_worth_comparing(uninterrupted):
    plain, _ = uninterrupted("plain")
    assert list(plain["checkpoints"]) == [f"checkpoint-{STEPS_PER_ROUND * round}" for round in (1, 2, 3, 4)]
    last = plain["checkpoints"][f"checkpoint-{STEPS_PER_ROUND * 4}"]
    assert {"federation/state.safetensors", "federation/ledger.safetensors", "federation/clients/2.pt"} <= set(last)
    logged = {key for entry in plain["outcome"]["log_history"] for key in entry}
    assert {"loss", "eval_loss", "aggregation_error"} <= logged
    assert plain["outcome"]["round"] == 4
    assert any(tensor.any() for tensor in plain["outcome"]["ledger"].values())
    best, _ = uninterrupted("best")
    assert (best["outcome"]["global_step"], best["outcome"]["round"]) == (3 * STEPS_PER_ROUND, 2)
    assert f"checkpoint-{2 * STEPS_PER_ROUND}" in best["checkpoints"]
    assert f"checkpoint-{STEPS_PER_ROUND}" not in best["checkpoints"]
    with pytest.raises(AssertionError, match="/outcome"):
        kill_target.assert_same(plain, best)


def test_killed_at_four_telling_moments(server, uninterrupted, tmp_path):
    runs = Runs(server, tmp_path / "out", "plain")
    rng = random.Random(2)

    assert runs.killed(lambda process: process.wait_for_step(rng.randint(1, STEPS_PER_ROUND - 1)))
    assert checkpoint.checkpoints_in(runs.output_dir) == []
    runs.killed(lambda process: poll(runs.unfinished, process))  # while it writes, if the poll is quick enough
    assert runs.killed(lambda process: poll(lambda: len(checkpoint.checkpoints_in(runs.output_dir)) >= 2, process))
    in_round_4 = 3 * STEPS_PER_ROUND + rng.randint(1, STEPS_PER_ROUND - 1)
    assert runs.killed(lambda process: process.wait_for_step(in_round_4))
    last = runs.finish()

    assert last.steps[0] > STEPS_PER_ROUND  # it went on, and did not start anew
    runs.assert_same_as(uninterrupted("plain")[0])


@pytest.mark.parametrize(
    ("variant", "seed", "kills"),
    [
        ("best", 0, 2),
        pytest.param("plain", 1, 8, marks=pytest.mark.slow),
        pytest.param("best", 2, 8, marks=pytest.mark.slow),
        pytest.param("sampled", 3, 8, marks=pytest.mark.slow),
        pytest.param("best, states on disk", 4, 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.xdist_group("killed at random moments")
def test_killed_at_random_moments(server, uninterrupted, tmp_path, variant, seed, kills):
    expected, seconds = uninterrupted(variant)
    rng = random.Random(seed)
    killed = run = 0
    while killed < kills:
        run += 1
        runs = Runs(server, tmp_path / f"out-{run}", variant)
        while runs.killed(lambda _: time.sleep(rng.uniform(0.1, 1.0) * seconds)):
            killed += 1
        runs.finish()
        runs.assert_same_as(expected)


@pytest.mark.parametrize("sampled", [5, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["best", "best, states on disk"])
def test_killed_before_each_file_operation(server, uninterrupted, tmp_path, variant, sampled):
    """From the second checkpoint to the end of the run: every state of the disk that a death can leave behind."""
    runs = Runs(server, tmp_path / "out", variant)
    assert runs.killed(lambda process: process.wait_for_step(STEPS_PER_ROUND + 2))
    shutil.copytree(runs.output_dir, tmp_path / "after-round-1")
    moments = list(range(1, runs.finish().operations + 1))
    assert len(moments) > 30
    if sampled is not None:
        moments = random.Random(4).sample(moments, sampled)
    half_written = 0
    for moment in moments:
        shutil.rmtree(runs.output_dir)
        shutil.copytree(tmp_path / "after-round-1", runs.output_dir)
        assert runs.start(kill_before_operation=moment).end() == -signal.SIGKILL
        half_written += bool(runs.unfinished())
        runs.finish()
        runs.assert_same_as(uninterrupted("best")[0], f"killed before operation {moment}: ")
    assert half_written > 0
