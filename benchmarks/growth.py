"""Memory over many fits: what 500 local fits leave behind.

    python benchmarks/growth.py
    python benchmarks/growth.py --fits 50
    python benchmarks/growth.py --output docs/benchmarks/growth.md

Taken at the ends of rounds, after a full garbage collection: resident memory of the process, Python's own allocations
as `tracemalloc` counts them, and the objects that the garbage collector knows, tensors among them. The run logs every
round, as runs do, so its log history grows; what that comes to is measured by itself.
"""

from __future__ import annotations

import gc
import json
import tempfile
import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import torch
from _common import (
    SIZES,
    build_data,
    build_model,
    describe_machine,
    describe_model,
    markdown_table,
    publish,
    resident_memory,
    shares_of,
    start,
    train,
    training_arguments,
)

from fedex_hf import FederatedCallback, FederatedTrainer, FederatedTrainingArguments


@dataclass
class BenchmarkArguments:
    """What to measure."""

    fits: int = field(default=500, metadata={"help": "Local fits."})
    clients: int = field(default=5, metadata={"help": "Clients, all of which train in every round."})
    looks: int = field(default=4, metadata={"help": "Rows of the table after the first."})
    model: str = field(default="tiny", metadata={"help": "Model to train.", "choices": list(SIZES)})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as growth.md."}
    )


# The method, and what its clients keep; the ledger of `fedex` grows until it is dense, which is no leak.
CASES: dict[str, dict[str, Any]] = {
    "`fedex`, fresh optimizers": {},
    "`fedex`, optimizers kept in memory": {"client_optimizer_state": "keep"},
    "`fedex`, optimizers kept on the disk": {"client_optimizer_state": "keep", "client_state_dir": "states"},
}


class Looks(FederatedCallback):
    """Counts at the ends of some rounds."""

    def __init__(self, every: int, clients: int) -> None:
        self.every = every
        self.clients = clients
        self.rows: list[tuple[int, ...]] = []

    def on_round_end(self, args: Any, state: Any, control: Any, round: int, **kwargs: Any) -> None:
        if round % self.every == 0:
            gc.unfreeze()
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
            traced = tracemalloc.get_traced_memory()[0]
            logged = len(json.dumps(state.log_history))
            self.rows.append((round * self.clients, len(objects), tensors, traced, logged, resident_memory()))
            del objects
            gc.freeze()


def run(args: BenchmarkArguments, settings: dict[str, Any]) -> list[tuple[int, ...]]:
    """One federated run; its rows."""
    size, rounds = SIZES[args.model], args.fits // args.clients
    looks = Looks(max(1, rounds // (args.looks + 1)), args.clients)
    data = build_data(size, args.clients * size.batch)
    with tempfile.TemporaryDirectory() as folder:
        if "client_state_dir" in settings:
            settings = settings | {"client_state_dir": f"{folder}/states"}
        trainer = FederatedTrainer(
            build_model(size),
            training_arguments(FederatedTrainingArguments, size, folder, num_rounds=rounds, **settings),
            train_dataset=shares_of(data, args.clients),
            callbacks=[looks],
        )
        tracemalloc.start()
        train(trainer)
        tracemalloc.stop()
    return looks.rows


HEAD = ("fits", "objects", "tensors", "traced, MB", "log history as JSON, MB", "resident, MB")
NOTES = """\
After a full collection at the end of a round. *Traced* are Python's allocations since the run began, *objects* those
that the garbage collector knows, the log's among them. One step per fit."""


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    machine, sections, answers = describe_machine(), [], []
    for name, settings in CASES.items():
        rows = run(args, settings)
        cells = [
            [f"{fits}", f"{objects:,}", f"{tensors:,}", *(f"{each / 1e6:.2f}" for each in sizes)]
            for fits, objects, tensors, *sizes in rows
        ]
        (fits, *first), (later, *last) = rows[0], rows[-1]
        growth = [(b - a) / (later - fits) for a, b in zip(first, last, strict=True)]
        told = (
            f"Per fit, from {fits} to {later}: {growth[0]:.2f} objects, {growth[1]:.2f} tensors, {growth[2]:,.0f} "
            f"bytes traced, of which the log is {growth[3]:,.0f} as JSON; {growth[4]:,.0f} bytes resident."
        )
        answers.append(
            f"{growth[0]:.2f} objects, {growth[1]:.2f} tensors and {growth[2]:,.0f} bytes a fit, log included"
        )
        print(name, told, flush=True)
        sections += [f"## {name}", markdown_table(HEAD, cells), told]
    title = f"# Memory over {args.fits} fits"
    report = "\n\n".join([title, f"- {describe_model(args.model)}", machine, NOTES, *sections]) + "\n"
    publish(report, args.output, __file__, answers[0])


if __name__ == "__main__":
    main()
