"""Many clients on one machine: time, memory and bytes written per round, with states in memory and on the disk.

    python benchmarks/scale.py
    python benchmarks/scale.py --clients 10 100 --sampled 5 10 --rounds 3
    python benchmarks/scale.py --output docs/benchmarks/scale.md

Two claims: a round costs time in proportion to the clients that are sampled, however many there are; and with
`client_state_dir` memory does not grow with the clients that keep a state. Every run is a process of its own, with
`client_optimizer_state="keep"`, in which every client has a state to begin with: what a long run comes to. Each round
is saved, and two checkpoints are kept.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
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
    run_in_child,
    shares_of,
    start,
    train,
    training_arguments,
)

from fedex_hf import FederatedTrainer, FederatedTrainingArguments
from fedex_hf.client_states import StatesOnDisk


MB = 1e6
STATES = {"memory": "in memory", "disk": "on disk"}


@dataclass
class BenchmarkArguments:
    """What to measure."""

    clients: list[int] = field(
        default_factory=lambda: [10, 100, 1000],
        metadata={"help": "Numbers of clients, the first of `--sampled` each."},
    )
    sampled: list[int] = field(
        default_factory=lambda: [10, 5, 20, 50], metadata={"help": "Clients per round, with the most clients each."}
    )
    rounds: int = field(default=6, metadata={"help": "Rounds; the first one is not counted."})
    steps: int = field(default=2, metadata={"help": "Optimizer steps per client and round."})
    repeats: int = field(default=3, metadata={"help": "Processes per row; medians are reported."})
    model: str = field(default="small", metadata={"help": "Model to train.", "choices": list(SIZES)})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as scale.md."}
    )
    child: str | None = field(
        default=None, metadata={"help": "Internal: be one run, and print its figures.", "choices": list(STATES)}
    )


# ---- One run, in a process of its own ----


class WatchedTrainer(FederatedTrainer):
    """Takes the processor's time of rounds and of saving, seconds, and what is written, bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: dict[str, list[float]] = {"round": [], "save": []}
        self.written: list[int] = []

    def run_round(self, round: int) -> dict[str, float]:
        began = time.process_time()
        metrics = super().run_round(round)
        self.seconds["round"].append(time.process_time() - began)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began, written = time.process_time(), _bytes_written()
        super()._save_checkpoint(model, trial)
        self.seconds["save"].append(time.process_time() - began)
        self.written.append(_bytes_written() - written)

    def begin_rounds(self, resume_from_checkpoint: str | None) -> None:
        """What one client's optimizer ends with becomes everyone's state."""
        self.resident_before = resident_memory()
        self.fit_client(next(iter(self.clients.datasets)), round=1)
        self.restore_global_state()
        self.state.global_step = 0
        state = self.clients.optimizer_state()
        self._new_optimizer_states.clear()
        for client_id in self.clients.datasets:
            self.keep_states({client_id: copy.deepcopy(state)})


def run_child(args: BenchmarkArguments) -> dict[str, float]:
    """One run; medians over its rounds."""
    size, (clients,), (sampled,) = SIZES[args.model], args.clients, args.sampled
    per_client = args.steps * size.batch
    data = build_data(size, clients * per_client)
    model = build_model(size)
    with tempfile.TemporaryDirectory() as folder:
        states = {"client_state_dir": f"{folder}/states"} if args.child == "disk" else {}
        settings = training_arguments(
            FederatedTrainingArguments,
            size,
            f"{folder}/out",
            num_rounds=args.rounds,
            client_fraction=sampled / clients,
            client_optimizer_state="keep",
            **states,
        )
        settings.save_strategy, settings.save_total_limit = "epoch", 2
        trainer = WatchedTrainer(model, settings, train_dataset=shares_of(data, clients))
        train(trainer)
        held = trainer.federation.optimizer_states
        return {
            "round": median(trainer.seconds["round"][1:]),
            "save": median(trainer.seconds["save"][1:]),
            "written": median(trainer.written[1:]),
            "held": 0 if isinstance(held, StatesOnDisk) else sum(_nbytes(each) for each in held.values()),
            "resident": resident_memory() - trainer.resident_before,
            "state": _nbytes(held[next(iter(held))]),
        }


def _nbytes(state: Mapping[int, Mapping[str, Any]]) -> int:
    return sum(each.nbytes for moments in state.values() for each in moments.values() if torch.is_tensor(each))


def _bytes_written() -> int:
    counts = Path("/proc/self/io")
    if not counts.is_file():
        raise SystemExit("This benchmark reads memory and bytes written from /proc, which only Linux has.")
    lines = counts.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


# ---- The comparison ----


@dataclass(frozen=True)
class Row:
    """Medians over the processes of one row; seconds of the processor, bytes."""

    states: str
    clients: int
    sampled: int
    figures: dict[str, float]

    def cells(self) -> list[str]:
        """As text, in the order of `HEAD`."""
        each = self.figures
        numbers = [
            f"{1e3 * each['round']:.0f}",
            f"{1e3 * each['round'] / self.sampled:.1f}",
            f"{1e3 * each['save']:.0f}",
        ]
        sizes = [f"{each[name] / MB:.1f}" for name in ("written", "held", "resident")]
        return [self.states, f"{self.clients:,}", str(self.sampled), *numbers, *sizes]


HEAD = (
    "states in",
    "clients",
    "sampled",
    "round, ms",
    "per sampled client, ms",
    "save, ms",
    "written per save, MB",
    "states held, MB",
    "resident growth, MB",
)


def measure(args: BenchmarkArguments, states: str, clients: int, sampled: int) -> Row:
    """One row, from processes of its own."""
    runs = [_spawn(args, states, clients, sampled) for _ in range(args.repeats)]
    row = Row(states, clients, sampled, {name: median(run[name] for run in runs) for name in runs[0]})
    print(" | ".join(row.cells()), flush=True)
    return row


def _spawn(args: BenchmarkArguments, states: str, clients: int, sampled: int) -> dict[str, float]:
    flags = {
        "--child": states,
        "--clients": clients,
        "--sampled": sampled,
        "--rounds": args.rounds,
        "--steps": args.steps,
        "--model": args.model,
        "--threads": args.threads,
    }
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back to the system
    return run_in_child(__file__, flags, environment, f"A run of {clients} clients")


# ---- The report ----


NOTES = """\
Medians over {repeats} processes and the rounds of each but the first. Times are those that the processor spent on the
process, so that other work on the machine disturbs them less; waiting for the disk is not part of them. *Round* is
everything from sampling to the logged certificate; *save* is its checkpoint. *Written* are the bytes that the process
passed to the system while saving. *Held* are the bytes of the clients' states in memory, exact; *resident growth* is
how much more memory the process holds after the last round than before the states were there. A client's state takes
{state:.2f} MB (AdamW: two moments per trained parameter)."""


def report(rows: Sequence[Row], args: BenchmarkArguments, plot: str | None) -> str:
    """The whole page, in Markdown."""
    of_clients = [row for row in rows if row.sampled == args.sampled[0]]
    of_sampled = sorted((row for row in rows if row.clients == max(args.clients)), key=lambda row: row.sampled)
    sections = [
        "# Many clients on one machine",
        "Claims: a round takes time in proportion to the clients sampled, however many there are; with "
        "`client_state_dir` memory does not grow with the clients that keep a state.",
        f"- {describe_model(args.model)}; {args.steps} steps per client and round",
        describe_machine(),
        f"## As the clients become more, {args.sampled[0]} sampled",
        *(markdown_table(HEAD, [row.cells() for row in of_clients if row.states == each]) for each in STATES),
        f"## As more are sampled, of {max(args.clients):,} clients",
        *(markdown_table(HEAD, [row.cells() for row in of_sampled if row.states == each]) for each in STATES),
        *([f"![Time of a round and memory of the states, over clients]({plot})"] if plot else []),
        NOTES.format(repeats=args.repeats, state=rows[0].figures["state"] / MB),
        LEFT,
    ]
    return "\n\n".join(sections) + "\n"


def answer(rows: Sequence[Row]) -> str:
    """What was found, in a line."""
    each = [1e3 * row.figures["round"] / row.sampled for row in rows if row.states == "disk"]
    held = {row.states: row.figures["held"] / MB for row in rows if row.clients == max(row.clients for row in rows)}
    sizes = ", ".join(f"{size:.1f} MB with states {STATES[states]}" for states, size in held.items())
    return f"{min(each):.1f} to {max(each):.1f} ms per sampled client, however many there are; {sizes}"


LEFT = """\
What still grows with all clients: saving hard-links each kept state, lists it with its size, and writes every client's
number of examples into `state.json`; sampling draws a permutation of the clients; the start of a run counts the steps
of every client that any round will sample. With states in memory every fit also pays for Python's garbage collector:
`Trainer.train()` begins with a full collection, which looks at every tensor that was kept since the run began."""


def draw(rows: Sequence[Row], args: BenchmarkArguments, path: Path) -> None:
    """Two panels, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 8}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(6.4, 2.4), layout="constrained")
        for states in STATES:
            own = [row for row in rows if row.states == states]
            sampled = sorted(
                (row.sampled, 1e3 * row.figures["round"]) for row in own if row.clients == max(args.clients)
            )
            left.plot(*zip(*sampled, strict=True), marker="o", label=f"states in {states}")
            few = sorted((row.clients, row.figures["held"] / MB) for row in own if row.sampled == args.sampled[0])
            right.plot(*zip(*few, strict=True), marker="o", label=f"states in {states}")
        left.set(
            xlabel=f"sampled of {max(args.clients):,} clients", ylabel="round, ms", xlim=(0, None), ylim=(0, None)
        )
        right.set(xlabel="clients", ylabel="states held, MB", xscale="log")
        left.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    if args.child is not None:
        print(json.dumps(run_child(args)))
        return
    pairs = [(clients, args.sampled[0]) for clients in args.clients]
    pairs += [(max(args.clients), sampled) for sampled in args.sampled[1:]]
    rows = [measure(args, states, *pair) for pair in pairs for states in STATES]
    plot = None
    if args.output is not None:
        output = Path(args.output)
        page = output if output.suffix == ".md" else output / "scale.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, args, page.with_suffix(".svg"))
        plot = page.with_suffix(".svg").name
    publish(report(rows, args, plot), args.output, __file__, answer(rows))


if __name__ == "__main__":
    main()
