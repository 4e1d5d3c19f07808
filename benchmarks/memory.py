"""Memory that a round takes as its clients become more: peak with 64 clients beside peak with 3.

    python benchmarks/memory.py
    python benchmarks/memory.py --rounds 1 --repeats 1 --model tiny
    python benchmarks/memory.py --output docs/benchmarks/memory.md

The claim: a round of k clients needs no more than a round of 3 clients and k - 3 adapters, an adapter being what one
client sends (its LoRA factors and its head). Each run is a process of its own, with the same model, data and steps per
client. Three peaks are taken:

- allocated: bytes that torch has allocated and not freed since `train()` began, to the byte, from the memory events of
  torch's profiler, in a run of its own, split by what the round was doing
- resident: memory of the process during `train()`, as the system counts it (Linux: `VmHWM`, reset before `train()`).
  It also holds what the C library keeps of freed memory, which differs by tens of megabytes from run to run
- resident, tidy: the same with glibc told to give every block over 64 kB back when it is freed
  (`MALLOC_MMAP_THRESHOLD_=65536`), so that resident memory follows what is held
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    run_in_child,
    start,
    train,
    training_arguments,
)
from torch.profiler import ProfilerActivity, profile, record_function

from fedex_hf import ClientUpdate, FederatedTrainer, FederatedTrainingArguments, GlobalUpdate
from fedex_hf.updates import payload_bytes


MB = 1e6


@dataclass
class BenchmarkArguments:
    """What to measure."""

    clients: list[int] = field(default_factory=lambda: [3, 64], metadata={"help": "Clients per round: few, many."})
    rounds: list[int] = field(default_factory=lambda: [1, 3], metadata={"help": "Server rounds, one comparison each."})
    steps: int = field(default=2, metadata={"help": "Optimizer steps per client and round."})
    model: str = field(default="20M", metadata={"help": "Model to train.", "choices": list(SIZES)})
    rank: int = field(default=4, metadata={"help": "LoRA rank."})
    repeats: int = field(default=3, metadata={"help": "Processes per number of clients; the median is reported."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as memory.md."}
    )
    child: str | None = field(
        default=None,
        metadata={
            "help": "Internal: be one run, print its figures as JSON, and take this peak.",
            "choices": ["resident", "allocated"],
        },
    )


# How a run is started, by what it is to find: the value of `--child`, and its further environment.
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "allocated": ("allocated", {}),
    "resident": ("resident", {}),
    "resident, tidy": ("resident", {"MALLOC_MMAP_THRESHOLD_": "65536"}),
}


# ---- One run, in a process of its own ----


class WatchedFederatedTrainer(FederatedTrainer):
    """Marks the phases of a round for the profiler, and counts the bytes that are held when most is held."""

    held: dict[str, int] = {}
    adapter_bytes = 0

    def fit_client(self, client_id: str, round: int) -> ClientUpdate:
        _mark("fit")
        update = super().fit_client(client_id, round)
        self.adapter_bytes = payload_bytes(update)
        return update

    def aggregate(self, round: int, updates: Sequence[ClientUpdate]) -> GlobalUpdate:
        _mark("aggregate")
        self._before = (self.federation.state, self.federation.ledger)
        return super().aggregate(round, updates)

    def apply_update(self, update: GlobalUpdate) -> None:
        _mark("apply")
        super().apply_update(update)
        _mark("certificate")

    def round_metrics(self, updates: Sequence[ClientUpdate], update: GlobalUpdate, *args: Any) -> dict[str, float]:
        _mark("rest")
        old_state, old_ledger = self._before
        del self._before
        held = _count(
            {
                "model": list(self.adapted.model.parameters()),
                "original base weights": self.adapted.originals,
                "clients' updates": [(each.adapters, each.tensors) for each in updates],
                "global state, old and new": [(each.adapters, each.tensors) for each in (old_state, update)],
                "residual factors of the round": update.residuals,
                "ledger, old and new": [
                    (each.factors, each.matrices) for each in (old_ledger, self.federation.ledger)
                ],
            }
        )
        self.held = max(self.held, held, key=lambda each: sum(each.values()))
        return super().round_metrics(updates, update, *args)


def _mark(phase: str) -> None:
    with record_function(f"phase {phase}"):
        pass


def _count(holders: dict[str, Any]) -> dict[str, int]:
    """Bytes of every holder's tensors; a tensor that two hold counts for the first."""
    seen: set[int] = set()
    result = {}
    for name, holder in holders.items():
        new = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(holder) if tensor.data_ptr() not in seen}
        seen |= new.keys()
        result[name] = sum(new.values())
    return result


def _tensors(holder: Any) -> Iterator[torch.Tensor]:
    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, dict):
        yield from _tensors(list(holder.values()))
    elif isinstance(holder, (list, tuple)):
        for each in holder:
            yield from _tensors(each)
    else:  # a LowRankDelta
        yield from (holder.A, holder.B)


def run_child(args: BenchmarkArguments, clients: int, rounds: int) -> dict[str, Any]:
    """One federated run; returns its figures, in bytes."""
    size = SIZES[args.model]
    model = build_model(size, args.rank)
    # The data of the larger federation in either case: what differs is the number of clients.
    data = build_data(size, max(args.clients) * args.steps * size.batch)
    shares = [data.shard(max(args.clients), index, contiguous=True) for index in range(max(args.clients))]
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = WatchedFederatedTrainer(
            model,
            training_arguments(FederatedTrainingArguments, size, output_dir, num_rounds=rounds),
            train_dataset={f"client-{index}": share for index, share in enumerate(shares[:clients])},
        )
        with _peak_allocated() if args.child == "allocated" else _peak_resident() as peaks:
            train(trainer)
    return {"adapter": trainer.adapter_bytes, "held": trainer.held, "peaks": peaks}


@contextmanager
def _peak_resident() -> Iterator[dict[str, int]]:
    """Peak of the process's resident memory while the block runs, bytes."""
    peaks: dict[str, int] = {}
    reset = Path("/proc/self/clear_refs")
    with suppress(OSError):  # elsewhere than on Linux: the peak since the process began
        reset.write_text("5")  # sets VmHWM to what is resident now
    yield peaks
    status = Path("/proc/self/status")
    if status.is_file():  # of this process alone; ru_maxrss starts with what the parent had at the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peaks["whole run"] = int(line.split()[1]) * 1024
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["whole run"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _peak_allocated() -> Iterator[dict[str, int]]:
    """Peaks of what torch allocates and has not freed since the block began, bytes, by phase."""
    peaks: dict[str, int] = {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peaks
    phase, now = "rest", 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name().startswith("phase "):
            phase = event.name().removeprefix("phase ")
        elif event.name() == "[memory]":
            now += event.nbytes()
            peaks[phase] = max(peaks.get(phase, 0), now)
    peaks["whole run"] = max(peaks.values(), default=0)


# ---- The comparison ----


@dataclass
class Comparison:
    """Figures of the runs with few and with many clients, bytes.

    Args:
        rounds: Server rounds of each run.
        clients: Clients per round, few and many.
        adapter: What one client sends.
        peaks: Key of `RUNS` -> clients -> peak of every repeat.
        phases: Clients -> peak of what torch allocated, by phase.
        held: Clients -> bytes held at the end of the round that held most, by holder.
    """

    rounds: int
    clients: tuple[int, int]
    adapter: int
    peaks: dict[str, dict[int, list[int]]]
    phases: dict[int, dict[str, int]]
    held: dict[int, dict[str, int]]

    def row(self, run: str) -> list[str]:
        """A row of the summary: few clients, allowed for many, measured with many, verdict."""
        few, many = (median(self.peaks[run][clients]) for clients in self.clients)
        allowed = few + (self.clients[1] - self.clients[0]) * self.adapter
        verdict = "yes" if many <= allowed else f"NO, by {(many - allowed) / MB:.1f} MB"
        return [run, str(self.rounds), *(f"{each / MB:.1f}" for each in (few, allowed, many)), verdict]


def compare(args: BenchmarkArguments, rounds: int) -> Comparison:
    """Run few and many clients, in turns."""
    few, many = args.clients
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {run: {few: [], many: []} for run in RUNS}
    for run, of_clients in runs.items():
        for _ in range(1 if run == "allocated" else args.repeats):  # which is the same every time
            for clients, results in of_clients.items():
                results.append(_spawn(args, clients, rounds, run))
    exact = {clients: results[0] for clients, results in runs["allocated"].items()}
    return Comparison(
        rounds=rounds,
        clients=(few, many),
        adapter=exact[few]["adapter"],
        peaks={
            run: {clients: [each["peaks"]["whole run"] for each in results] for clients, results in of_clients.items()}
            for run, of_clients in runs.items()
        },
        phases={clients: each["peaks"] for clients, each in exact.items()},
        held={clients: each["held"] for clients, each in exact.items()},
    )


def _spawn(args: BenchmarkArguments, clients: int, rounds: int, run: str) -> dict[str, Any]:
    child, environment = RUNS[run]
    flags = {
        "--child": child,
        "--clients": [clients, max(args.clients)],
        "--rounds": rounds,
        "--steps": args.steps,
        "--model": args.model,
        "--rank": args.rank,
        "--threads": args.threads,
    }
    figures = run_in_child(__file__, flags, environment, f"A run of {clients} clients")
    print(f"{rounds} rounds, {clients} clients, {run}: done", flush=True)
    return figures


# ---- The report ----


NOTES = """\
1 MB = 1,000,000 bytes. *Allowed* is the peak with {few} clients and {more} adapters of {adapter:.3f} MB, each what one
client sends. *Allocated* is what torch has taken and not given back since `train()` began, so without the model, and
is exact. *Resident* is the peak of the whole process while `train()` runs, with libraries and model, the median over
{repeats} processes; it also counts freed memory that the C library keeps, which *tidy* makes it give back, and the
Python objects around the tensors."""


def answer(comparisons: Sequence[Comparison]) -> str:
    """What was found, in a line."""
    rows = [(each.rounds, *each.row("allocated")[2:]) for each in comparisons]
    few, many = comparisons[0].clients
    told = [f"{low} and {high} MB after {rounds} rounds, {allowed} allowed" for rounds, low, allowed, high, _ in rows]
    return f"what torch allocates with {few} and {many} clients: {'; '.join(told)}"


def report(comparisons: Sequence[Comparison], args: BenchmarkArguments) -> str:
    """The whole page, in Markdown."""
    few, many = args.clients
    head = ("peak", "rounds", f"{few} clients, MB", f"allowed for {many}, MB", f"{many} clients, MB", "holds")
    rows = [each.row(run) for run in RUNS for each in comparisons]
    adapter = comparisons[0].adapter / MB
    sections = [
        f"# Memory of a round with {many} clients",
        f"Claim: at most the peak with {few} clients and {many - few} adapters.",
        f"- {describe_model(args.model, args.rank)}",
        describe_machine(),
        markdown_table(head, rows),
        NOTES.format(few=few, more=many - few, adapter=adapter, repeats=args.repeats),
    ]
    for each in comparisons:
        sections += [f"## {each.rounds} rounds" if each.rounds > 1 else "## 1 round", *_details(each)]
    return "\n\n".join(sections) + "\n"


def _details(each: Comparison) -> list[str]:
    few, many = each.clients
    head = (f"{few} clients, MB", f"{many} clients, MB", "per further client, adapters")

    def table(first: str, figures: dict[int, dict[str, int]]) -> str:
        rows = []
        for name in figures[few]:
            low, high = figures[few][name], figures[many].get(name, 0)
            further = (high - low) / (many - few) / each.adapter
            rows.append([name, f"{low / MB:.2f}", f"{high / MB:.2f}", f"{further:.2f}"])
        return markdown_table((first, *head), rows)

    repeats = "".join(
        f"- {run}, {clients} clients: {', '.join(f'{peak / MB:.1f}' for peak in each.peaks[run][clients])}\n"
        for run in RUNS
        for clients in each.clients
    )
    return [
        "Allocated by torch, peak by phase of a round:",
        table("phase", each.phases),
        "Held at the end of the round, before the clients' updates are dropped:",
        table("tensors", each.held),
        f"Every peak, MB:\n\n{repeats}".rstrip(),
    ]


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    if args.child is not None:
        print(json.dumps(run_child(args, clients=args.clients[0], rounds=args.rounds[0])))
        return
    if len(args.clients) != 2 or args.clients[0] >= args.clients[1]:
        raise SystemExit(f"`--clients {args.clients}`: give two numbers, the smaller one first.")
    found = [compare(args, rounds) for rounds in args.rounds]
    publish(report(found, args), args.output, __file__, answer(found))


if __name__ == "__main__":
    main()
