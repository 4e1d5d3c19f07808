"""Time, memory and accuracy of exact aggregation in factors, beside the dense formula of public implementations.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --models gpt2 --ranks 4 --clients 3 10 --seconds 0.1
    python benchmarks/aggregation.py --threads 1 --output docs/benchmarks/aggregation.md
    python benchmarks/aggregation.py --device cuda

Both sides get the factors of k clients and end with new factors and changed weights `W`, float32:

- dense: `M = mean(B_i @ A_i); W += s (M - mean(B_i) @ mean(A_i))`, all in float32
- the package: *server*, `FedExAggregator().aggregate`, new factors and the residual's two, which is what travels;
  and *install*, `AdaptedModel.install`, `W = W0 + residual`. *ledger*, `Ledger.plus`, is what lets a run be resumed
  and clients catch up; the dense formula has nothing like it

One layer of each distinct shape is measured; sums over a model count it as often as the model has it. Rounds beyond
the first, in which the ledger grows, are measured in a few cases.

On Linux, each side is timed in processes of its own, which take turns, and whose heap is as a training leaves it.

All but these rounds is measured twice: with glibc as it comes, and in processes whose glibc is told to keep what torch
gives back (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`), so that neither side pays for fresh pages. That is to the
advantage of the dense side, which needs many.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from _common import in_own_process, publish, run_in_child, start
from aggregation_report import answer, report, summary_rows
from aggregation_results import LedgerResult, Machine, Result, Results
from aggregation_sides import (
    MODELS,
    Case,
    Findings,
    Ours,
    aggregate,
    dense_all,
    dense_calls,
    look,
    our_calls,
    torch_calls,
    updates_of,
)
from tqdm import tqdm

from fedex_hf import Ledger


T = TypeVar("T")
Times = dict[str, list[float]]
LEDGERS = [  # from two thin factors for many rounds to one matrix from the first
    Case(MODELS["roberta-base"][0], 4, 3),
    Case(MODELS["roberta-base"][0], 32, 3),
    Case(MODELS["roberta-base"][0], 32, 50),
    Case(MODELS["llama-3.2-3b"][1], 32, 3),
    Case(MODELS["llama-3.2-3b"][1], 32, 10),
]
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
MAPPED = 2**25  # bytes from which on glibc takes fresh pages for every tensor
PROCESSES = 3  # of each side
LONG = 5  # times what a case is given


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": f"Whose layers: {', '.join(MODELS)}."}
    )
    ranks: list[int] = field(default_factory=lambda: [4, 32], metadata={"help": "LoRA ranks."})
    clients: list[int] = field(default_factory=lambda: [3, 10, 50], metadata={"help": "Clients per round."})
    seconds: float = field(
        default=1.0,
        metadata={"help": "Time to spend on each side of a case; 3 to 60 times are taken, medians are reported."},
    )
    rounds: int = field(default=20, metadata={"help": "Rounds of the ledger."})
    device: str = field(default="cpu", metadata={"help": "Where both sides run.", "choices": ["cpu", "cuda"]})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as aggregation.md."}
    )
    child: bool = field(default=False, metadata={"help": "Internal: print the first table's rows as JSON."})


class Clock:
    """Times calls: on a CPU in processor time, which what runs beside it disturbs less; on a GPU until it is done."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, what: Callable[[], object]) -> float:
        """Seconds that a call takes."""
        now = time.perf_counter if self.device == "cuda" else time.process_time
        self._wait()
        begin = now()
        what()
        self._wait()
        return now() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure_machine(clock: Clock) -> Machine:
    """Copy bandwidth and matrix products, medians of 7."""
    source = torch.ones(2**26, device=clock.device)
    target = torch.zeros_like(source)
    copy = median(clock(lambda: target.copy_(source)) for _ in range(7))
    products = {}
    for dtype in (torch.float32, torch.float64):
        square = torch.randn(2048, 2048, device=clock.device).to(dtype)
        result = square @ square
        seconds = median(
            clock(lambda square=square, result=result: torch.mm(square, square, out=result)) for _ in range(7)
        )
        products[dtype] = 2 * 2048**3 / seconds
    return Machine(2 * source.nbytes / copy, products)


def use_heap_as_after_training() -> None:
    """Free a tensor of the size from which on glibc maps each anew.

    Now it takes all smaller ones from its heap, of whose free end it keeps twice as much: what the first steps of a
    training do. Before that, it maps and unmaps whatever is larger than the largest that was freed so far.
    """
    torch.empty(MAPPED - 2**16, dtype=torch.uint8)


def take_turns(calls_of: Callable[[Case], dict[str, Callable[[], object]]], case: Case, seconds: float) -> Times:
    """Seconds per layer of each of a side's calls, several times.

    The first two times are to warm up, and do not count; of what takes long the first one does.
    """
    use_heap_as_after_training()
    clock, calls = Clock(case.device), calls_of(case)
    if not calls:
        return {}

    def once() -> dict[str, float]:
        return {part: clock(call) for part, call in calls.items()}

    found = [once()]
    if sum(found[0].values()) < LONG * seconds:
        number = seconds / PROCESSES / sum(once().values())
        found = [once() for _ in range(min(max(round(number), 1), 20))]
    return {part: [each[part] / case.copies for each in found] for part in calls}


def measure(case: Case, machine: Machine, seconds: float) -> Result:
    """All sides in turns, each time in a process of its own."""
    times: Times = {}
    for turn in range(PROCESSES):
        for side in (dense_calls, our_calls, torch_calls)[:: -1 if turn % 2 else 1]:
            for part, found in apart(case.device, take_turns, side, case, seconds).items():
                times.setdefault(part, []).extend(found)
    findings = apart(case.device, look, case)
    return Result({part: median(each) for part, each in times.items()}, needs_of(case, findings, machine), findings)


def apart(device: str, function: Callable[..., T], *args: Any) -> T:
    """In a process of its own, unless it takes a GPU: its memory is kept by torch, not by glibc."""
    return function(*args) if device == "cuda" else in_own_process(function, *args)


def needs_of(case: Case, findings: Findings, machine: Machine) -> dict[str, tuple[float, float]]:
    """Seconds that the machine needs at least for the bytes and for the operations of each side."""
    m, n = case.layer.out_features, case.layer.in_features
    stacked, rank = (case.clients - 1) * case.rank, findings.residual_rank
    multiplied_out = stacked > rank
    residual = 4 * (m + n) * rank
    moved = 4 * (m + n) * (case.clients + 1) * case.rank + residual
    products = 2 * m * n * stacked if multiplied_out else 0
    added, operations = (4 * m * n, 0) if multiplied_out else (residual, 2 * m * n * rank)
    rate = machine.products[torch.float32]
    return {
        "server": (moved / machine.copy, products / rate),
        "install": ((8 * m * n + added) / machine.copy, operations / rate),
    }


def measure_ledger(case: Case, rounds: int) -> LedgerResult:
    """Round by round, beside the dense formula."""
    times, turned = apart(case.device, grow_ledger, case, rounds)
    dense = median(apart(case.device, dense_rounds, case, rounds))
    return LedgerResult(**times, dense=dense, turned=turned)


def grow_ledger(case: Case, rounds: int) -> tuple[Times, int]:
    """Seconds of the package's parts round by round, and the round in which the ledger turned dense, or 0."""
    use_heap_as_after_training()
    clock, ours = Clock(case.device), Ours(case.layer, case.rank, 1)
    times: Times = {"server": [], "plus": [], "install": []}
    ledger, turned = Ledger(), 0

    def timed(part: str, call: Callable[[], T]) -> T:
        result: list[T] = []
        times[part].append(clock(lambda: result.append(call())))
        return result[0]

    for number in range(1, rounds + 1):
        updates = updates_of(case.layer, case.rank, case.clients, 1, seed=number)
        update = timed("server", partial(aggregate, updates))
        ledger = timed("plus", partial(ours.ledger, update, ledger))
        timed("install", partial(ours.install, ledger))
        turned = turned or (number if ledger.matrices else 0)
    return times, turned


def dense_rounds(case: Case, rounds: int) -> list[float]:
    """Seconds of the dense formula, round by round."""
    use_heap_as_after_training()
    clock, W = Clock(case.device), torch.zeros(case.layer.out_features, case.layer.in_features)
    updates = [updates_of(case.layer, case.rank, case.clients, 1, seed=number) for number in range(1, rounds + 1)]
    return [clock(lambda each=each: dense_all([W], each)) for each in updates]


def measure_all(args: BenchmarkArguments, machine: Machine) -> Results:
    """Every case of every model."""
    cases = [
        (model, Case(layer, rank, clients, args.device))
        for model in args.models
        for layer in MODELS[model]
        for rank in args.ranks
        for clients in args.clients
    ]
    return {(model, case): measure(case, machine, args.seconds) for model, case in tqdm(cases, unit="case")}


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    # First, while nothing has touched a GPU: these fork.
    ledgers = {} if args.child else {case: measure_ledger(case, args.rounds) for case in tqdm(LEDGERS, unit="ledger")}
    machine = apart(args.device, measure_machine, Clock(args.device))
    results = measure_all(args, machine)
    if args.child:
        print(json.dumps(summary_rows(results, args.clients)))
        return
    reused = None
    if sys.platform == "linux" and args.device == "cpu":
        flags = {f"--{each.name}": getattr(args, each.name) for each in fields(args) if each.name != "output"}
        reused = run_in_child(__file__, flags | {"--child": True}, KEEP, "The run with memory reused")
    publish(report(results, reused, ledgers, machine, args), args.output, __file__, answer(results))


if __name__ == "__main__":
    main()
