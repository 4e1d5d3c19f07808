"""A federation in a process of its own, to be killed: run as a script by `test_kill_resume.py`.

The script imports everything once and then forks a process per job, a line of JSON on its standard input. Each process
writes its progress to standard output, a line each: `pid 123`, `step 5` (optimizer steps), `operations 17` (file
operations on the checkpoints), and the script ends it with `ended 0` (exit status; -9 for SIGKILL).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from typing import Any

import tiny
import torch
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback
from transformers.utils import logging

from fedex_hf import FederatedTrainer


# What a clock has measured, and the number of floating-point operations.
_RUN_TIME_KEYS = ("_runtime", "_per_second", "round_seconds", "total_flos")
_FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")


def log_history_of(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries without run-time keys and without the summary of one `train()` call."""
    return [
        {key: value for key, value in entry.items() if not key.endswith(_RUN_TIME_KEYS)}
        for entry in entries
        if "train_runtime" not in entry
    ]


def outcome(trainer: FederatedTrainer) -> dict[str, Any]:
    """What must be the same bytes, resumed or not."""
    federation = trainer.federation
    return {
        "round": federation.round,
        "model": {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()},
        "state": {
            f"{name}.{factor}": getattr(delta, factor)
            for name, delta in federation.state.adapters.items()
            for factor in "AB"
        }
        | dict(federation.state.tensors),
        "ledger": {
            f"{name}.{factor}": getattr(delta, factor)
            for name, delta in federation.ledger.factors.items()
            for factor in "AB"
        }
        | dict(federation.ledger.matrices),
        "optimizer_states": {client: dict(state) for client, state in federation.optimizer_states.items()},
        "global_step": trainer.state.global_step,
        "best_metric": trainer.state.best_metric,
        "log_history": log_history_of(trainer.state.log_history),
    }


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equality bit for bit, with the place where it fails."""
    assert type(left) is type(right), f"{where}: {type(left)} and {type(right)}"
    if isinstance(left, dict):
        assert left.keys() == right.keys(), f"{where}: {list(left)} and {list(right)}"
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), f"{where}: {len(left)} and {len(right)} entries"
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, f"{where}: {left.dtype} and {right.dtype}"
        assert torch.equal(left, right), f"{where}: differ by up to {(left - right).abs().max().item()}"
    else:
        assert left == right, f"{where}: {left!r:.200} and {right!r:.200}"


class Score:
    """A metric, to be maximised, that is best in a given round; the `trainer` is set once it is built."""

    def __init__(self, best_round: int) -> None:
        self.best_round = best_round
        self.trainer: FederatedTrainer | None = None

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return {"score": -float(abs(self.trainer.federation.round - self.best_round))}


def federation(output_dir: str | os.PathLike, best_round: int | None, **kwargs: Any) -> FederatedTrainer:
    """A tiny federation; with `best_round` it has the metric `score`."""
    score = None if best_round is None else Score(best_round)
    trainer_kwargs = kwargs.pop("trainer_kwargs", {}) | {"compute_metrics": score}
    trainer = tiny.federation(output_dir, trainer_kwargs=trainer_kwargs, **kwargs)
    if score is not None:
        score.trainer = trainer
    return trainer


class _TellSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)


class _FileOperations:
    """Counts the file operations on the checkpoints and kills the process just before a given one."""

    def __init__(self, output_dir: str, kill_before: int | None) -> None:
        self.output_dir = output_dir
        self.kill_before = kill_before
        self.count = 0

    def __call__(self, event: str, args: tuple) -> None:
        if event not in _FILE_OPERATIONS:
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        # `shutil.rmtree` names what it deletes relative to an open folder.
        if path.startswith(self.output_dir) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
            self.count += 1
            if self.count == self.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)


def run(job: dict[str, Any]) -> None:
    """Continue the run in `output_dir` to its end, and write its outcome to `result`."""
    callbacks: list[TrainerCallback] = [_TellSteps()]
    if job["patience"]:
        callbacks.append(EarlyStoppingCallback(job["patience"]))
    trainer = federation(
        job["output_dir"], job["best_round"], trainer_kwargs={"callbacks": callbacks}, **job["arguments"]
    )
    operations = _FileOperations(job["output_dir"], job["kill_before_operation"])
    sys.addaudithook(operations)
    trainer.train(resume_from_checkpoint=True)
    print("operations", operations.count, flush=True)
    operations.kill_before = None
    torch.save(outcome(trainer), job["result"])


def main() -> None:
    """Serve jobs until standard input ends."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tiny.federation(folder)  # brings in what is imported late
    gc.collect()
    gc.freeze()  # what has been imported is neither looked through by every job's collections nor copied for them
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                print("pid", os.getpid(), flush=True)
                run(json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
