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

All of it is measured twice: with glibc as it comes, and in a process whose glibc is told to keep the memory that torch
gives back (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`), so that neither side pays for fresh pages. That is to the
advantage of the dense side, which needs many.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from statistics import median

import torch
from _common import publish, run_in_child, start
from aggregation_report import LedgerResult, Machine, Result, answer, report, summary_rows
from aggregation_sides import (
    MODELS,
    Layer,
    Ours,
    aggregate,
    dense_all,
    errors_of,
    fold,
    name_of,
    temporary_memory,
    updates_of,
)
from tqdm import tqdm

from fedex_hf import ClientUpdate, Ledger, LowRankDelta


LEDGERS = [  # layer, rank, clients: from two thin factors for many rounds to one matrix from the first
    (MODELS["roberta-base"][0], 4, 3),
    (MODELS["roberta-base"][0], 32, 3),
    (MODELS["roberta-base"][0], 32, 50),
    (MODELS["llama-3.2-3b"][1], 32, 3),
    (MODELS["llama-3.2-3b"][1], 32, 10),
]
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
TOGETHER = 2**24  # numbers in the weights of the layers that take part in one turn


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": f"Whose layers: {', '.join(MODELS)}."}
    )
    ranks: list[int] = field(default_factory=lambda: [4, 32], metadata={"help": "LoRA ranks."})
    clients: list[int] = field(default_factory=lambda: [3, 10, 50], metadata={"help": "Clients per round."})
    seconds: float = field(
        default=1.0, metadata={"help": "Time to spend on each case; 3 to 50 turns are taken, medians are reported."}
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


def measure(layer: Layer, rank: int, clients: int, machine: Machine, clock: Clock, seconds: float) -> Result:
    """Both sides, in turns."""
    copies = min(layer.count, max(TOGETHER // (layer.out_features * layer.in_features), 1))
    updates = updates_of(layer, rank, clients, copies, clock.device)
    weights = [torch.zeros(layer.out_features, layer.in_features, device=clock.device) for _ in range(copies)]
    update = aggregate(updates)
    residual = update.residuals[name_of(0)]
    calls = {"dense": lambda: dense_all(weights, updates), "server": lambda: aggregate(updates)}
    if clock.device == "cuda":
        installed = [torch.zeros_like(each) for each in weights]
        fold(installed, update)
        errors = errors_of(layer, updates, residual, installed[0])
        calls |= {"install": lambda: fold(installed, update)}
    else:
        ours = Ours(layer, rank, copies)
        ledger = ours.ledger(update)
        ours.install(ledger)
        errors = errors_of(layer, updates, residual, ours.weight(0))
        calls |= {"ledger": lambda: ours.ledger(update), "install": lambda: ours.install(ledger)}
    once = sum(clock(call) for call in calls.values())  # the first calls also warm up
    times: dict[str, list[float]] = {side: [] for side in calls}
    for turn in range(min(max(round(seconds / once), 3), 50)):
        for side in list(calls)[:: -1 if turn % 2 else 1]:
            times[side].append(clock(calls[side]) / copies)
    return Result(
        times={side: median(each) for side, each in times.items()},
        needs=needs_of(layer, updates, residual, machine),
        errors=errors,
        memory=temporary_memory(updates, clock.device),
        residual_rank=residual.rank,
    )


def needs_of(
    layer: Layer, updates: list[ClientUpdate], residual: LowRankDelta, machine: Machine
) -> dict[str, tuple[float, float]]:
    """Seconds that the machine needs at least for the bytes and for the operations of each side."""
    factors = [update.adapters[name_of(0)] for update in updates]
    stacked = (len(factors) - 1) * factors[0].rank
    numbers = layer.out_features * layer.in_features
    moved = sum(delta.nbytes for delta in factors) + factors[0].nbytes + residual.nbytes
    multiplied_out = stacked > residual.rank
    products = 2 * numbers * stacked if multiplied_out else 0
    added, operations = (4 * numbers, 0) if multiplied_out else (residual.nbytes, 2 * numbers * residual.rank)
    rate = machine.products[torch.float32]
    return {
        "server": (moved / machine.copy, products / rate),
        "install": ((8 * numbers + added) / machine.copy, operations / rate),
    }


def measure_ledger(layer: Layer, rank: int, clients: int, rounds: int) -> LedgerResult:
    """Round by round, in turns with the dense formula."""
    clock, ours = Clock("cpu"), Ours(layer, rank, 1)
    ledger, W = Ledger(), torch.zeros(layer.out_features, layer.in_features)
    times: dict[str, list[float]] = {"dense": [], "plus": [], "install": []}
    turned = 0
    for number in range(1, rounds + 1):
        updates = updates_of(layer, rank, clients, 1, seed=number)
        update, after = aggregate(updates), []
        times["dense"].append(clock(lambda updates=updates: dense_all([W], updates)))
        times["plus"].append(
            clock(lambda update=update, ledger=ledger, after=after: after.append(ours.ledger(update, ledger)))
        )
        ledger = after[0]
        times["install"].append(clock(lambda ledger=ledger: ours.install(ledger)))
        turned = turned or (number if ledger.matrices else 0)
    return LedgerResult(times["plus"], times["install"], median(times["dense"]), turned)


def measure_all(args: BenchmarkArguments, machine: Machine, clock: Clock) -> dict[tuple[str, Layer, int, int], Result]:
    """Every case: model, layer, rank, number of clients."""
    cases = [
        (model, layer, rank, clients)
        for model in args.models
        for layer in MODELS[model]
        for rank in args.ranks
        for clients in args.clients
    ]
    return {case: measure(*case[1:], machine, clock, args.seconds) for case in tqdm(cases, unit="case")}


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    clock = Clock(args.device)
    machine = measure_machine(clock)
    results = measure_all(args, machine, clock)
    if args.child:
        print(json.dumps(summary_rows(results, args.clients)))
        return
    reused = None
    if sys.platform == "linux" and args.device == "cpu":
        flags = {f"--{each.name}": getattr(args, each.name) for each in fields(args) if each.name != "output"}
        reused = run_in_child(__file__, flags | {"--child": True}, KEEP, "The run with memory reused")
    ledgers = {case: measure_ledger(*case, args.rounds) for case in tqdm(LEDGERS, unit="ledger")}
    publish(report(results, reused, ledgers, machine, args), args.output, __file__, answer(results))


if __name__ == "__main__":
    main()
