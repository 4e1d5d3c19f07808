"""Several clients in one pass beside the same clients one after another: time and memory of their local fits.

    python benchmarks/parallel_clients.py
    python benchmarks/parallel_clients.py --models tiny --batches 1 4 --clients 2 4 --repeats 1
    python benchmarks/parallel_clients.py --device cuda --output docs/benchmarks/parallel_clients.md

Both fit the same clients, with the same batches, from the same state, in one process, taking turns; every pair gives
one ratio, and the median over the pairs is reported. Timed is `FederatedTrainer.collect_updates`: the fits with all
that `Trainer` does around a step, without aggregation. The first fit of each trainer is not timed.

Dropout is 0, as `parallel_clients` asks for. On a GPU matrix products are float32 as torch sets them by default.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from _common import SIZES, build_data, build_model, describe_machine, describe_model, markdown_table, publish, start
from torch import nn
from transformers import PrinterCallback

from fedex_hf import FederatedTrainer, FederatedTrainingArguments
from fedex_hf.trainer_utils import frozen_garbage_collector


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: ["20M"], metadata={"help": "Models to train.", "choices": list(SIZES)}
    )
    batches: list[int] = field(default_factory=lambda: [1, 4, 8, 32], metadata={"help": "Sequences per batch."})
    clients: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Clients in one pass."})
    steps: int = field(default=8, metadata={"help": "Optimizer steps per client."})
    repeats: int = field(default=3, metadata={"help": "Pairs of runs; the median over them is reported."})
    max_examples: int = field(
        default=10**9, metadata={"help": "Leave out what has more examples (clients x batch) in one step."}
    )
    device: str = field(default="cpu", metadata={"help": "Where to train.", "choices": ["cpu", "cuda"]})
    processor_time: bool = field(
        default=False,
        metadata={"help": "Take the time that the processor spent on this process, all threads: for a busy machine."},
    )
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder."}
    )


@dataclass
class Run:
    """One fit of some clients.

    Args:
        seconds: Its time.
        peak: Most memory that torch had allocated on the GPU, bytes; 0 on the CPU.
    """

    seconds: float
    peak: int


@dataclass
class Case:
    """The pairs of one combination."""

    model: str
    batch: int
    clients: int
    one_by_one: list[Run]
    together: list[Run]

    @property
    def ratios(self) -> list[float]:
        """How many times faster the clients are together, pair by pair."""
        return [one.seconds / other.seconds for one, other in zip(self.one_by_one, self.together)]


def build_trainer(model: str, batch: int, clients: int, together: bool, args: BenchmarkArguments) -> FederatedTrainer:
    """A federation whose clients have just the examples that their steps take."""
    size = replace(SIZES[model], batch=batch)
    network = build_model(size)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    federated = FederatedTrainingArguments(
        output_dir=str(Path(tempfile.gettempdir()) / "unused"),
        per_device_train_batch_size=batch,
        max_steps=args.steps,
        num_rounds=1,
        learning_rate=1e-3,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        parallel_clients=clients if together else 1,
    )
    data = build_data(size, args.steps * batch)
    trainer = FederatedTrainer(network, federated, train_dataset={f"{each}": data for each in range(clients)})
    trainer.remove_callback(PrinterCallback)
    return trainer


def fit(trainer: FederatedTrainer, clients: int, now: Callable[[], float] = time.perf_counter) -> Run:
    """Fit the first clients, from the state of round 0; `now` tells the time, in seconds."""
    on_gpu = trainer.args.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = now()
    updates = trainer.collect_updates([f"{each}" for each in range(clients)], round=1)
    if on_gpu:
        torch.cuda.synchronize()
    run = Run(now() - began, torch.cuda.max_memory_allocated() if on_gpu else 0)
    if len(updates) != clients:
        raise RuntimeError(f"{len(updates)} of {clients} clients sent an update: nothing to compare.")
    return run


def measure(model: str, batch: int, args: BenchmarkArguments) -> list[Case]:
    """All numbers of clients for one model and batch; every other pair starts with the clients together."""
    numbers = [each for each in args.clients if each * batch <= args.max_examples]
    if not numbers:
        return []
    trainers = [build_trainer(model, batch, max(numbers), together, args) for together in (False, True)]
    for trainer in trainers:
        fit(trainer, min(numbers))  # what is loaded, checked and compiled on first use is not part of the comparison
    cases = []
    for clients in numbers:
        case = Case(model, batch, clients, [], [])
        pair = list(zip(trainers, (case.one_by_one, case.together), strict=True))
        for repeat in range(args.repeats):
            for trainer, runs in pair if repeat % 2 == 0 else pair[::-1]:
                runs.append(fit(trainer, clients, time.process_time if args.processor_time else time.perf_counter))
        cases.append(case)
    return cases


def table(cases: list[Case], args: BenchmarkArguments) -> str:
    """One row per case; times are of one step of every client."""
    rows = []
    for case in cases:
        before, after = (median(run.seconds for run in runs) for runs in (case.one_by_one, case.together))
        row = [
            f"`{case.model}`",
            str(case.batch),
            str(case.clients),
            f"{1e3 * before / args.steps:.0f}",
            f"{1e3 * after / args.steps:.0f}",
            f"**{median(case.ratios):.2f}** ({min(case.ratios):.2f} to {max(case.ratios):.2f})",
        ]
        if args.device == "cuda":
            row += [f"{max(run.peak for run in runs) / 1e6:.0f}" for runs in (case.one_by_one, case.together)]
        rows.append(row)
    head = ["model", "batch", "clients", "one by one, ms", "together, ms", "times as fast"]
    if args.device == "cuda":
        head += ["one by one, MB", "together, MB"]
    return markdown_table(head, rows)


def verdict(cases: list[Case]) -> str:
    """Where it pays, in words, by the medians."""
    kinds: dict[str, list[Case]] = {
        "pays (1.1 times as fast or more)": [],
        "makes no difference": [],
        "costs time": [],
    }
    pays, same, costs = kinds.values()
    for case in cases:
        ratio = median(case.ratios)
        (pays if ratio >= 1.1 else same if ratio > 0.95 else costs).append(case)
    lines = []
    for kind, found in kinds.items():
        named = [f"`{each.model}` {each.batch} x {each.clients} ({median(each.ratios):.2f})" for each in found]
        lines.append(f"- {kind}: {', '.join(named) or 'nowhere'}")
    return "\n".join(lines)


def answer(cases: list[Case]) -> str:
    """What was found, in a line."""
    ratios: dict[int, list[float]] = {}
    for case in cases:
        ratios.setdefault(case.batch, []).append(median(case.ratios))
    found = [f"{min(each):.1f} to {max(each):.1f} for batches of {batch}" for batch, each in ratios.items()]
    return f"speed relative to one after another: {', '.join(found)}"


def report(cases: list[Case], args: BenchmarkArguments, machine: str) -> str:
    """The whole page."""
    clock = " They are processor time of all threads." if args.processor_time else ""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    models = "\n".join(f"- {describe_model(name)}" for name in args.models)
    memory = " Memory is the peak of what torch had allocated on the GPU." if args.device == "cuda" else ""
    return f"""# Several clients in one pass

What `parallel_clients=N` saves: N clients whose batches go through the frozen base together, beside the same fits one
after another. A ratio above 1 means that together is faster. Times are of one step of all clients, with what `Trainer`
does around it: {args.repeats} pairs of {args.steps} steps, medians, and for the ratio also the range.{clock}{memory}

On {device}, the ratio by model, batch x clients:

{verdict(cases)}

{table(cases, args)}

Models (the batch is that of the table):

{models}

Machine: {device}; {machine}
"""


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    machine, cases = describe_machine(), []
    with frozen_garbage_collector():
        for model in args.models:
            for batch in args.batches:
                measured = measure(model, batch, args)
                for case in measured:
                    print(case.model, case.batch, case.clients, [f"{each:.2f}" for each in case.ratios], flush=True)
                cases += measured
    publish(report(cases, args, machine), args.output, __file__, answer(cases))


if __name__ == "__main__":
    main()
