"""Runs every method on every task with every seed, from identical starts and splits, and goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from fedex_hf import FederatedTrainer, FederatedTrainingArguments, partition_dataset
from fedex_hf.carrier import CARRIER
from fedex_hf.checkpoint import checkpoints_in
from fedex_hf.comparison.arguments import ComparisonArguments, RecipeTrainingArguments
from fedex_hf.comparison.methods import Method
from fedex_hf.comparison.progress import LayerDeviations, RoundLines
from fedex_hf.comparison.report import write_report
from fedex_hf.comparison.results import BestRound, RoundResult, Run, RunResult, write_json, write_results
from fedex_hf.comparison.settings import (
    ComparisonError,
    check_comparable,
    check_settings,
    check_training,
    describe,
    machine,
    settings_of,
)
from fedex_hf.comparison.task import Task


RESULT = "result.json"
EVERYONE = "everyone"  # the one client of centralized training


def compare(
    tasks: Sequence[Task],
    comparison: ComparisonArguments,
    training: RecipeTrainingArguments,
    settings: Mapping[str, Any],
) -> list[RunResult]:
    """Run what is not finished yet, then write `results.json`, `results.md` and the plots.

    Every run has a folder of its own below `output_dir/runs`, with its checkpoints, and a `result.json` once it is
    finished. A comparison that was stopped goes on with the same command; further methods and seeds can be added.

    Args:
        tasks: What is compared on.
        comparison: Methods and seeds.
        training: Arguments of every run.
        settings: Everything else that decides the numbers; written into `results.json`, and must stay the same in one
            `output_dir`.

    Returns:
        All finished runs of `output_dir`, those of earlier commands included.

    Raises:
        ComparisonError: If `output_dir` holds runs with other settings, the clients cannot be formed, or two methods
            would start from different states.
    """
    check_training(training, comparison)
    output_dir = Path(str(training.output_dir))
    settings = settings_of(tasks, comparison, training, settings)
    runs = [
        (task, Method.parse(name), Run(task.name, name, seed, epochs))
        for seed in comparison.seeds
        for task in tasks
        for epochs in comparison.local_epochs or [training.num_train_epochs]
        for name in comparison.aggregators
    ]
    for task in tasks:
        for seed in comparison.seeds:
            split_over_clients(task, training, seed)
    state = PartialState()
    if state.is_main_process:
        check_settings(output_dir, settings)
    state.wait_for_everyone()
    open_runs = [(task, method, run) for task, method, run in runs if not (output_dir / run.folder / RESULT).is_file()]
    rehearse(open_runs, training, comparison, output_dir)
    for number, (task, method, run) in enumerate(runs, start=1):
        folder = output_dir / run.folder
        if (folder / RESULT).is_file():
            continue
        if state.is_main_process:
            print(f"\n[{number}/{len(runs)}] {describe(run)}", flush=True)
        result = execute(task, method, run, training, comparison, output_dir)
        if state.is_main_process:
            write_json(folder / RESULT, asdict(result))
        state.wait_for_everyone()
    results = finished(output_dir)
    if state.is_main_process:
        write_results(output_dir / "results.json", results, settings, machine())
        written = write_report(results, output_dir)
        print(f"\n{(output_dir / 'results.md').read_text(encoding='utf-8')}")
        print(f"Written into {output_dir}: results.json, {', '.join(path.name for path in written)}.", flush=True)
    state.wait_for_everyone()
    return results


def execute(
    task: Task,
    method: Method,
    run: Run,
    training: RecipeTrainingArguments,
    comparison: ComparisonArguments,
    output_dir: Path,
) -> RunResult:
    """One run: train, or go on after the last whole round, then test the last and the best round."""
    folder = output_dir / run.folder
    trainer, data_digest = build_trainer(task, method, run, training, comparison, output_dir)
    start = digest_of_start(trainer)
    check_comparable(run, start, data_digest, finished(output_dir))
    trainer.train(resume_from_checkpoint=bool(checkpoints_in(folder)) or None)
    layers = next(each for each in trainer.callback_handler.callbacks if isinstance(each, LayerDeviations))
    rounds = rounds_of(trainer.state.log_history, layers)
    test = dict(task.test(trainer, _outputs(folder / "last_round")))
    best = None
    if comparison.best_on_validation:
        best = test_best(task, trainer, rounds, test, folder)
    return RunResult(
        run=run,
        metric=task.metric,
        validation_metric=task.validation_metric,
        greater_is_better=task.greater_is_better,
        test=test,
        best_on_validation=best,
        rounds=rounds,
        start=start,
        data=data_digest,
        seconds=sum(each.seconds for each in rounds),
    )


def build_trainer(
    task: Task,
    method: Method,
    run: Run,
    training: RecipeTrainingArguments,
    comparison: ComparisonArguments,
    output_dir: Path,
) -> tuple[FederatedTrainer, str]:
    """The trainer of one run, and the digest of who holds which training examples.

    Raises:
        ComparisonError: If model, adapter, method and arguments do not go together.
    """
    clients, digest = split_over_clients(task, training, run.seed)
    try:
        trainer = FederatedTrainer(
            model=task.make_model(run.seed),
            args=run_arguments(task, method, run, training, comparison, output_dir / run.folder),
            train_dataset={EVERYONE: task.train} if method.is_centralized else clients,
            eval_dataset=task.validation,
            peft_config=task.peft_config,
            aggregator=method.make(run.seed),
            client_trainer_cls=task.client_trainer_cls,
            callbacks=[LayerDeviations()],
            **task.trainer_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise ComparisonError(f"{describe(run)} cannot start: {error}") from error
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RoundLines(describe(run), task.validation_metric, not method.is_centralized))
    return trainer, digest


def rehearse(
    runs: Sequence[tuple[Task, Method, Run]],
    training: RecipeTrainingArguments,
    comparison: ComparisonArguments,
    output_dir: Path,
) -> None:
    """Build one trainer per task before anything is trained, of the method that asks most of the model.

    Raises:
        ComparisonError: What the run would end with, possibly hours later.
    """
    strictest: dict[str, tuple[Task, Method, Run]] = {}
    for each in runs:
        known = strictest.get(each[0].name)
        if known is None or (each[1].make().changes_base and not known[1].make().changes_base):
            strictest[each[0].name] = each
    for task, method, run in strictest.values():
        build_trainer(task, method, run, training, comparison, output_dir)


def test_best(
    task: Task, trainer: FederatedTrainer, rounds: Sequence[RoundResult], last: dict[str, float], folder: Path
) -> BestRound | None:
    """Test the round that was best on the validation split; the first of equals, as `Trainer` has it.

    Returns:
        `None` if the metric is defined after no round, as a correlation with equal predictions is not.
    """
    rounds = [each for each in rounds if math.isfinite(each.validation[task.validation_metric])]
    if not rounds:
        return None
    sign = 1 if task.greater_is_better else -1
    best = max(rounds, key=lambda each: (sign * each.validation[task.validation_metric], -each.round))
    value = best.validation[task.validation_metric]
    if best.round == trainer.federation.round:
        return BestRound(best.round, value, last)
    trainer._load_best_model()
    if trainer.federation.round != best.round:
        raise ComparisonError(
            f"The checkpoint of round {best.round}, the best on the validation split, is gone from `{folder}`; round "
            f"{trainer.federation.round} is there. Delete the folder and run it again."
        )
    return BestRound(best.round, value, dict(task.test(trainer, _outputs(folder / "best_on_validation"))))


def run_arguments(
    task: Task,
    method: Method,
    run: Run,
    training: RecipeTrainingArguments,
    comparison: ComparisonArguments,
    folder: Path,
) -> FederatedTrainingArguments:
    """The same arguments for every run, but for what makes it this one.

    Centralized LoRA is a federation of one client that holds everything, keeps its optimizer and stretches its
    schedule over all rounds: one training run that is evaluated as often as the others.
    """
    changed: dict[str, Any] = {
        "output_dir": str(folder),
        "run_name": f"{training.output_dir}/{run.folder}",
        "seed": run.seed,
        "num_train_epochs": run.local_epochs,
        "num_clients": None,
        "partition_by": None,
        "dirichlet_alpha": None,
    }
    if method.is_centralized:
        changed |= {
            "client_optimizer_state": "keep",
            "lr_schedule": "run",
            "client_fraction": 1.0,
            "min_clients": 1,
        }
    if comparison.best_on_validation:
        changed |= {
            "metric_for_best_model": f"eval_{task.validation_metric}",
            "greater_is_better": task.greater_is_better,
        }
    return FederatedTrainingArguments.from_training_args(training, **changed)


def split_over_clients(task: Task, training: RecipeTrainingArguments, seed: int) -> tuple[dict[str, Dataset], str]:
    """Who holds which training examples: a function of the task, the partition's arguments and the seed.

    Returns:
        The clients' datasets, and a SHA-256 of the rows that each holds.
    """
    column = training.partition_by
    if column is None and training.dirichlet_alpha is not None:
        column = task.partition_by
    try:
        if column is not None and column not in task.train.column_names:
            raise ValueError(f"the training examples have no column `{column}`, only {task.train.column_names}.")
        values = {} if column is None else {column: task.train[column][:]}
        rows = Dataset.from_dict({"row": list(range(len(task.train))), **values})
        parts = partition_dataset(
            rows,
            training.num_clients,
            partition_by=column,
            dirichlet_alpha=training.dirichlet_alpha,
            seed=seed,
        )
    except (ValueError, TypeError) as error:
        raise ComparisonError(f"The clients of task `{task.name}` cannot be formed: {error}") from error
    held = {client_id: part["row"][:] for client_id, part in parts.items()}
    digest = hashlib.sha256((task.digests["train"] + json.dumps(held)).encode()).hexdigest()
    return {client_id: task.train.select(rows) for client_id, rows in held.items()}, digest


def finished(output_dir: Path) -> list[RunResult]:
    """All finished runs below a folder, by task, method, epochs and seed."""
    results = [
        RunResult.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in output_dir.glob(f"runs/*/*/*/*/{RESULT}")
    ]
    return sorted(results, key=lambda each: (each.run.task, each.run.method, each.run.local_epochs, each.run.seed))


def rounds_of(log_history: Sequence[Mapping[str, Any]], layers: LayerDeviations) -> list[RoundResult]:
    """Join each round's own log entry with the evaluation that follows it."""
    rounds: list[RoundResult] = []
    for entry in log_history:
        if "aggregation_error" in entry:
            number = int(entry["round"])
            rounds.append(
                RoundResult(
                    round=number,
                    train_loss=float(entry["train_loss"]),
                    aggregation_error=float(entry["aggregation_error"]),
                    fedit_deviation=float(entry["fedit_deviation"]),
                    num_clients=int(entry["num_clients"]),
                    bytes_up_per_client=float(entry["bytes_up_per_client"]),
                    bytes_down_per_client=float(entry["bytes_down_per_client"]),
                    seconds=float(entry["round_seconds"]),
                    layers=layers.of(number),
                )
            )
        elif rounds and not rounds[-1].validation and "eval_loss" in entry:
            rounds[-1].validation = {
                key.removeprefix("eval_"): float(value)
                for key, value in entry.items()
                if key.startswith("eval_") and not key.endswith(("runtime", "per_second", "preparation_time"))
            }
    return rounds


def digest_of_start(trainer: FederatedTrainer) -> str:
    """SHA-256 of what the clients train, before the first round, and of the model below the adapter."""
    digest, state = hashlib.sha256(), trainer.federation.state
    tensors = {f"{name}.{factor}": getattr(delta, factor) for name, delta in state.adapters.items() for factor in "AB"}
    tensors |= state.tensors
    for name, parameter in trainer.adapted.model.named_parameters():
        # Whatever factors a method freezes, and whatever carries its residuals, they are not the base.
        if not {trainer.adapted.adapter, CARRIER}.intersection(name.split(".")):
            tensors[name] = parameter.detach()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _outputs(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
