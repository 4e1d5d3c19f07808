"""Time that `FederatedTrainer` adds: N client fits of S steps beside one plain `Trainer` of N x S steps.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --cases tiny-20x5 --repeats 2
    python benchmarks/overhead.py --output docs/benchmarks/overhead.md

Both train the same model on the same examples with the same batch size, in one process, taking turns; every pair gives
one ratio, and the median over the pairs is reported. Timed is everything from the trainer's constructor to the return
of `train()`. The plain `Trainer` sees all clients' data as one dataset, once per round.

`Trainer.train()` begins with a full garbage collection, about 0.2 s over the objects of torch and transformers. A
plain run pays it once, and so does a federated one, which exempts those objects for its clients' fits. What the
collector took is measured in every run, and all figures are given with and without it.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from _common import (
    SIZES,
    build_data,
    build_model,
    describe_machine,
    describe_model,
    markdown_table,
    publish,
    shares_of,
    start,
    train,
    training_arguments,
)
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedex_hf import ClientUpdate, FederatedTrainer, FederatedTrainingArguments, GlobalUpdate


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        model: Key of `SIZES`.
        clients: Clients, all of which train in every round.
        rounds: Server rounds.
        steps: Optimizer steps per client and round.
        target: What is aimed at, as text and as a test of (extra share of time, extra milliseconds per fit).
    """

    model: str
    clients: int
    rounds: int
    steps: int
    target: tuple[str, Callable[[float, float], bool]]

    @property
    def fits(self) -> int:
        """Local fits of the whole run."""
        return self.clients * self.rounds


_SHARE = ("at most 5 %", lambda share, per_fit: share <= 0.05)
_PER_FIT = ("at most 10 ms per fit", lambda share, per_fit: per_fit <= 10)
CASES = {
    "tiny-20x5": Case("tiny", clients=20, rounds=1, steps=5, target=_PER_FIT),
    "tiny-20x20": Case("tiny", clients=20, rounds=1, steps=20, target=_PER_FIT),
    "tiny-5x20-4-rounds": Case("tiny", clients=5, rounds=4, steps=20, target=_PER_FIT),
    "20M-8x20": Case("20M", clients=8, rounds=1, steps=20, target=_SHARE),
    "20M-2x20-4-rounds": Case("20M", clients=2, rounds=4, steps=20, target=_SHARE),
    "135M-4x20": Case("135M-short", clients=4, rounds=1, steps=20, target=_SHARE),
}


@dataclass
class BenchmarkArguments:
    """What to measure."""

    cases: list[str] = field(
        default_factory=lambda: list(CASES), metadata={"help": "Comparisons to run.", "choices": list(CASES)}
    )
    repeats: int = field(default=5, metadata={"help": "Pairs of runs per case; the median over them is reported."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    processor_time: bool = field(
        default=False,
        metadata={"help": "Take the time that the processor spent on this process, all threads: for a busy machine."},
    )
    separate_trainers: bool = field(
        default=False, metadata={"help": "Also time one new plain Trainer per fit, without any aggregation."}
    )
    profile: bool = field(
        default=False, metadata={"help": "Only profile one federated run of each case, with cProfile."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as overhead.md."}
    )


# ---- The clock ----


class Clock(TrainerCallback):
    """Splits the time of a run into parts that, with the garbage collector, add up to it.

    Attributes:
        now: Where time is read from, seconds.
        parts: Part -> seconds, without what the collector took meanwhile.
        collector_seconds: What Python's garbage collector took.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.parts: defaultdict[str, float] = defaultdict(float)
        self.collector_seconds = 0.0

    @property
    def seconds(self) -> float:
        """The whole run."""
        return self.seconds_without_collector + self.collector_seconds

    @property
    def seconds_without_collector(self) -> float:
        """The whole run but the garbage collector."""
        return sum(self.parts.values())

    def _now(self) -> float:
        return self.now() - self.collector_seconds

    def __enter__(self) -> Clock:
        gc.callbacks.append(self._on_collection)
        self._current = "set-up"
        self._since = self._last_step = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        self.enter("")
        gc.callbacks.remove(self._on_collection)

    def enter(self, part: str) -> None:
        """From here on time belongs to `part`."""
        now = self._now()
        if self._current == "steps":
            self.parts["steps"] += self._last_step - self._since
            self._since, self._current = self._last_step, "end of fits"
        self.parts[self._current] += now - self._since
        self._since, self._current = now, part

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._current != "steps":
            self.enter("steps")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._last_step = self._now()

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collection_began = self.now()
        else:
            self.collector_seconds += self.now() - self._collection_began


class ClockedFederatedTrainer(FederatedTrainer):
    """Tells the clock, by the public hooks, what a round is doing."""

    clock: Clock

    def fit_client(self, client_id: str, round: int) -> ClientUpdate:
        self.clock.enter("begin of fits")
        update = super().fit_client(client_id, round)
        self.clock.enter("between fits")
        return update

    def aggregate(self, round: int, updates: Sequence[ClientUpdate]) -> GlobalUpdate:
        self.clock.enter("aggregate")
        update = super().aggregate(round, updates)
        self.clock.enter("rest of rounds")
        return update

    def apply_update(self, update: GlobalUpdate) -> None:
        self.clock.enter("apply")
        super().apply_update(update)
        self.clock.enter("certificate")

    def round_metrics(self, *args: Any) -> dict[str, float]:
        self.clock.enter("rest of rounds")
        return super().round_metrics(*args)


# ---- The runs ----


def run_plain(case: Case, data: Dataset, output_dir: str) -> Clock:
    """One plain `Trainer` over all the data, once per round."""
    model = build_model(SIZES[case.model])
    args = training_arguments(TrainingArguments, SIZES[case.model], output_dir, num_train_epochs=case.rounds)
    return _timed(lambda clock: train(Trainer(model, args, train_dataset=data, callbacks=[clock])), case)


def run_federated(case: Case, data: Dataset, output_dir: str) -> Clock:
    """`FederatedTrainer` with a client per share of the data."""
    model = build_model(SIZES[case.model])
    args = training_arguments(FederatedTrainingArguments, SIZES[case.model], output_dir, num_rounds=case.rounds)
    clients = shares_of(data, case.clients)

    def run(clock: Clock) -> int:
        trainer = ClockedFederatedTrainer(model, args, train_dataset=clients, callbacks=[clock])
        trainer.clock = clock
        return train(trainer)

    return _timed(run, case)


def run_separate(case: Case, data: Dataset, output_dir: str) -> Clock:
    """A new plain `Trainer` for every fit, one after another on the same model: no swapping, no aggregation."""
    model = build_model(SIZES[case.model])
    args = training_arguments(TrainingArguments, SIZES[case.model], output_dir, num_train_epochs=1)
    shares = [*shares_of(data, case.clients).values()] * case.rounds

    def run(clock: Clock) -> int:
        return sum(train(Trainer(model, args, train_dataset=share)) for share in shares)

    return _timed(run, case)


def _timed(run: Callable[[Clock], int], case: Case) -> Clock:
    gc.collect()
    with Clock() as clock:
        steps = run(clock)
    if steps != case.fits * case.steps:
        raise RuntimeError(f"The run made {steps} steps instead of {case.fits * case.steps}: nothing to compare.")
    return clock


@dataclass
class Measurement:
    """The runs of one case, in pairs that were made one right after the other."""

    case: Case
    plain: list[Clock]
    federated: list[Clock]
    separate: list[Clock]


def measure(case: Case, repeats: int, separate_trainers: bool) -> Measurement:
    """Run the pairs of one case; every other pair starts with the federated run, so that a drift cancels."""
    data = build_data(SIZES[case.model], case.clients * case.steps * SIZES[case.model].batch)
    result = Measurement(case, [], [], [])
    runs = [(run_plain, result.plain), (run_federated, result.federated)]
    with tempfile.TemporaryDirectory() as output_dir:
        for repeat in range(repeats):
            for run, clocks in runs if repeat % 2 == 0 else runs[::-1]:
                clocks.append(run(case, data, output_dir))
            if separate_trainers:
                result.separate.append(run_separate(case, data, output_dir))
    return result


def warm_up(case: Case) -> None:
    """One short run of each kind: what is loaded and compiled on first use is not part of the comparison."""
    short = Case(case.model, clients=2, rounds=1, steps=2, target=case.target)
    measure(short, repeats=1, separate_trainers=False)


def profile(name: str) -> None:
    """Print where the processor time of one federated run goes (inflated by the profiler)."""
    case = CASES[name]
    warm_up(case)
    data = build_data(SIZES[case.model], case.clients * case.steps * SIZES[case.model].batch)
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as output_dir:
        profiler.runcall(run_federated, case, data, output_dir)
    print(f"{name}: by cumulative time, functions of fedex_hf; then by own time, all\n")
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats("fedex_hf", 40)
    stats.sort_stats("tottime").print_stats(40)


# ---- The report ----


def extra(measurement: Measurement, seconds: Callable[[Clock], float]) -> tuple[float, float]:
    """Median over the pairs of the extra time, as a share of the plain run and in milliseconds per fit."""
    pairs = [(seconds(plain), seconds(fed)) for plain, fed in zip(measurement.plain, measurement.federated)]
    share = median(fed / plain - 1 for plain, fed in pairs)
    return share, median(1e3 * (fed - plain) / measurement.case.fits for plain, fed in pairs)


def summary(measurements: dict[str, Measurement]) -> str:
    """One row per case."""
    rows = []
    for name, measurement in measurements.items():
        case = measurement.case
        share, per_fit = extra(measurement, lambda clock: clock.seconds)
        bare_share, bare_per_fit = extra(measurement, lambda clock: clock.seconds_without_collector)
        _, outside_steps = extra(measurement, lambda clock: clock.seconds_without_collector - clock.parts["steps"])
        text, holds = case.target
        rows.append(
            [
                f"`{name}`",
                f"{case.rounds} x {case.clients} x {case.steps}",
                _spread(measurement.plain),
                _spread(measurement.federated),
                f"{share:+.1%}",
                f"{per_fit:+.1f} ms",
                f"{bare_share:+.1%}",
                f"{bare_per_fit:+.1f} ms",
                f"{outside_steps:+.1f} ms",
                text,
                "yes" if holds(share, per_fit) else "NO",
            ]
        )
    head = ("case", "rounds x clients x steps", "plain, s", "federated, s", "extra", "extra per fit")
    return markdown_table(
        (*head, "extra w/o collector", "per fit w/o collector", "per fit outside steps", "target", "holds"), rows
    )


def _spread(clocks: Sequence[Clock]) -> str:
    seconds = [clock.seconds for clock in clocks]
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


PARTS = {
    "set-up": "constructor, start of the run (in the plain one, also of its fit)",
    "begin of fits": "state into the model, `Trainer.train()` up to the first step",
    "steps": "first step's begin to last step's end",
    "end of fits": "from the last step's end, state out of the model, check for NaN",
    "between fits": "global state back into the model",
    "aggregate": "`aggregate`",
    "apply": "`apply_update`: ledger, base weights",
    "certificate": "`measure_exactness`",
    "rest of rounds": "sampling, metrics, log, end of the run",
}


def breakdown(measurement: Measurement) -> str:
    """Where the time of one case goes: medians per part."""
    rows = []
    for part, meaning in PARTS.items():
        plain = median(clock.parts[part] for clock in measurement.plain)
        federated = median(clock.parts[part] for clock in measurement.federated)
        difference = (federated - plain) / measurement.case.fits
        rows.append([f"{part}: {meaning}", *(f"{1e3 * each:.1f}" for each in (plain, federated, difference))])
    collector = [
        median(clock.collector_seconds for clock in clocks) for clocks in (measurement.plain, measurement.federated)
    ]
    difference = (collector[1] - collector[0]) / measurement.case.fits
    rows.append(["garbage collector", *(f"{1e3 * each:.1f}" for each in (*collector, difference))])
    return markdown_table(("part", "plain, ms", "federated, ms", "difference per fit, ms"), rows)


NOTES = """\
Medians over {repeats} pairs of runs (least to largest), made in turns in one process. *Extra* is the median over the
pairs of federated to plain; *w/o collector* leaves Python's garbage collector out of both runs (each pays one full
collection, with which `Trainer.train()` begins); *outside steps* also leaves out the time between the first step's
begin and the last step's end of each fit, which is most of a run and nearly all of its noise. A run is timed from its
constructor to the return of `train()`.
{clock}"""


_CLOCKS = {
    False: "Times are wall-clock times.",
    True: "Times are processor times of the process, all threads: other work on the machine disturbs them less.",
}


def answer(measurements: dict[str, Measurement]) -> str:
    """What was found, in a line."""
    found = {name: extra(measurement, lambda clock: clock.seconds) for name, measurement in measurements.items()}
    return "; ".join(f"`{name}` {share:+.1%}, {per_fit:+.1f} ms per fit" for name, (share, per_fit) in found.items())


def report(measurements: dict[str, Measurement], args: BenchmarkArguments, machine: str) -> str:
    """The whole page, in Markdown."""
    models = "\n".join(
        f"- {describe_model(name)}" for name in dict.fromkeys(m.case.model for m in measurements.values())
    )
    sections = [
        "# Time that federated fits add",
        "N client fits of S steps under `FederatedTrainer` beside one plain `Trainer` of N x S steps, same data.",
        models,
        machine,
        summary(measurements),
        NOTES.format(repeats=args.repeats, clock=_CLOCKS[args.processor_time]),
    ]
    if args.separate_trainers:
        sections += ["## Beside a new `Trainer` per fit", _separate(measurements)]
    sections.append("## Where it goes")
    for name, measurement in measurements.items():
        sections += [f"`{name}`, {measurement.case.fits} fits:", breakdown(measurement)]
    return "\n\n".join(sections) + "\n"


def _separate(measurements: dict[str, Measurement]) -> str:
    rows = []
    for name, measurement in measurements.items():
        times = (measurement.plain, measurement.federated, measurement.separate)
        rows.append([f"`{name}`", *map(_spread, times)])
    return markdown_table(("case", "plain, s", "federated, s", "a new `Trainer` per fit, no aggregation, s"), rows)


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    if args.processor_time:
        Clock.now = staticmethod(time.process_time)
    if args.profile:
        for name in args.cases:
            profile(name)
        return
    machine = describe_machine()
    measurements = {}
    for name in args.cases:
        warm_up(CASES[name])
        measurements[name] = measure(CASES[name], args.repeats, args.separate_trainers)
        print(f"{name}: done", flush=True)
    publish(report(measurements, args, machine), args.output, __file__, answer(measurements))


if __name__ == "__main__":
    main()
