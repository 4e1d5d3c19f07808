"""Cost of carrying the residuals in a frozen adapter, beside that of adding them to the base.

    python benchmarks/storage.py
    python benchmarks/storage.py --rounds 1 --pairs 3
    python benchmarks/storage.py --output docs/benchmarks/storage.md

Two copies of one model, float32, hold the same ledger of residuals, one in its base weights and one in the carrier.
The ledger is that of so many rounds of three clients whose factors move at random: two thin factors of rank
`2 r x rounds` per layer, and one dense matrix from rank `in x out / (in + out)` on. Taken in turns, in one process:

- step: forward, backward and optimizer step on one batch
- forward: without gradients, as in evaluation
- apply: what a round adds between fits, the new ledger and its installation
- memory: tensors that a storage keeps beside the model, and the peak of what torch allocates in a step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from _common import Size, build_data, build_model, describe_machine, markdown_table, publish, start
from memory import MB, _peak_allocated
from tqdm import tqdm

from fedex_hf import ClientUpdate, FedExAggregator, GlobalUpdate
from fedex_hf.base_model import AdaptedModel
from fedex_hf.ledger import Ledger
from fedex_hf.updates import LowRankDelta


SIZE = Size(hidden=256, layers=6, heads=8, intermediate=1024, vocab=8192, batch=8, tokens=32)
TARGETS: dict[str, list[str] | str] = {"query, value": ["query", "value"], "all linear layers": "all-linear"}
STORAGES = ("base", "adapter")
CLIENTS = 3


@dataclass
class BenchmarkArguments:
    """What to measure."""

    rounds: list[int] = field(
        default_factory=lambda: [1, 10, 50], metadata={"help": "Server rounds to measure after."}
    )
    rank: int = field(default=4, metadata={"help": "LoRA rank."})
    pairs: int = field(default=20, metadata={"help": "Pairs of runs, in turns; medians are reported."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as storage.md."}
    )


class Side:
    """A model with one storage, ready to train.

    Args:
        storage: `"base"` or `"adapter"`.
        targets: As in `LoraConfig`.
        rank: Of LoRA.
    """

    def __init__(self, storage: str, targets: list[str] | str, rank: int) -> None:
        self.model = build_model(SIZE, rank, targets)
        self.adapted = AdaptedModel(self.model, changes_base=True, storage=storage)
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=1e-4)
        data = build_data(SIZE, SIZE.batch)
        self.batch = {"input_ids": torch.tensor(data["input_ids"]), "labels": torch.tensor(data["labels"])}

    def step(self) -> None:
        self.model.train()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def forward(self) -> None:
        self.model.eval()
        self.model(**self.batch)

    def kept(self) -> int:
        """Bytes of what the storage holds in or beside the model, without the ledger."""
        if self.adapted.storage == "base":
            return sum(original.nbytes for original in self.adapted.originals.values())
        return sum(each.nbytes for name, each in self.model.named_parameters() if ".fedex_residual" in name)

    def peak(self) -> int:
        """Peak of what torch allocates in a step beyond what it held before, bytes."""
        self.step()
        with _peak_allocated() as peaks:
            self.step()
        return peaks["whole run"]


@dataclass(frozen=True)
class Cost:
    """What one storage costs after some rounds.

    Args:
        step, forward, apply: Milliseconds of processor time, one per pair.
        kept, ledger, peak: Bytes.
    """

    step: list[float]
    forward: list[float]
    apply: list[float]
    kept: int
    ledger: int
    peak: int


def moved(state: GlobalUpdate, number: int) -> list[ClientUpdate]:
    """Clients' updates whose factors move at random."""
    generator = torch.Generator().manual_seed(number)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1e-2 * torch.randn(tensor.shape, generator=generator)

    return [
        ClientUpdate(
            f"client-{client}",
            number,
            1,
            {name: replace(delta, A=noise(delta.A), B=noise(delta.B)) for name, delta in state.adapters.items()},
        )
        for client in range(CLIENTS)
    ]


def rounds_of(adapted: AdaptedModel, last: int) -> Iterator[tuple[int, dict[str, LowRankDelta], Ledger]]:
    """Round, its residuals, and the ledger before it; the model's factors move on."""
    ledger = Ledger()
    for number in range(1, last + 1):
        state = adapted.read()
        update = FedExAggregator().aggregate(moved(state, number), [1] * CLIENTS)
        residuals = dict(update.residuals)
        yield number, residuals, ledger
        adapted.write(GlobalUpdate(update.adapters, state.tensors))
        ledger = ledger.plus(residuals, adapted.sites)


def measure(targets: list[str] | str, args: BenchmarkArguments, progress: tqdm) -> dict[int, dict[str, Cost]]:
    """Rounds -> storage -> cost."""
    sides = {storage: Side(storage, targets, args.rank) for storage in STORAGES}
    found = {}
    for number, residuals, ledger in rounds_of(sides["base"].adapted, max(args.rounds)):
        if number in args.rounds:
            found[number] = _side_by_side(sides, residuals, ledger, args.pairs)
            progress.update()
    return found


def _side_by_side(
    sides: dict[str, Side], residuals: dict[str, LowRankDelta], ledger: Ledger, pairs: int
) -> dict[str, Cost]:
    times: dict[str, dict[str, list[float]]] = {}
    after = dict.fromkeys(sides, ledger)

    def apply(storage: str) -> None:
        adapted = sides[storage].adapted
        after[storage] = ledger.plus(residuals, adapted.sites)
        adapted.install(after[storage])

    for storage in sides:
        apply(storage)
    for pair in range(pairs):
        for storage in STORAGES[:: -1 if pair % 2 else 1]:
            of_storage = times.setdefault(storage, {})
            for name in ("step", "forward", "apply"):
                what = (lambda storage=storage: apply(storage)) if name == "apply" else getattr(sides[storage], name)
                of_storage.setdefault(name, []).append(_milliseconds(what))
    return {
        storage: Cost(**times[storage], kept=side.kept(), ledger=after[storage].nbytes, peak=side.peak())
        for storage, side in sides.items()
    }


def _milliseconds(what: Callable[[], None]) -> float:
    begin = time.process_time()  # of this process alone, whatever runs beside it
    what()
    return 1e3 * (time.process_time() - begin)


# ---- The report ----

NOTES = """\
Two copies of one model, one with each storage, hold the same ledger and are measured in turns: *ratio* is the median
over {pairs} pairs of `"adapter"` to `"base"`, the times are medians of processor time. *step* is forward, backward and
optimizer step on one batch, *forward* is without gradients, *apply* is the new ledger and its installation, once per
round. *Originals*: `"base"` keeps the original weights, on the CPU, to round only once; *carrier*: `"adapter"` keeps
that on the model's device. The ledger itself, on the CPU, is the same for both. *Peak* is the most that torch has
allocated during a step beyond what it held before. 1 MB = 1,000,000 bytes."""

_HEAD = ("LoRA on", "rounds", "ledger, MB", "step, ms", "ratio", "forward, ms", "ratio", "apply, ms", "ratio")
_MEMORY = ("LoRA on", "rounds", "base: originals, MB", "adapter: carrier, MB", "peak of a step, MB", "ratio")


def answer(found: dict[str, dict[int, dict[str, Cost]]]) -> str:
    """What was found, in a line."""
    ratios = [
        [float(_pair(*(costs[storage].step for storage in STORAGES))[1]) for costs in of_rounds.values()]
        for of_rounds in found.values()
    ]
    told = [f"{min(each):.2f} to {max(each):.2f} times with LoRA on {name}" for name, each in zip(found, ratios)]
    return f"a step takes {', '.join(told)}"


def report(found: dict[str, dict[int, dict[str, Cost]]], args: BenchmarkArguments) -> str:
    """The whole page, in Markdown."""
    times, memory = [], []
    for targets, of_rounds in found.items():
        for number, costs in of_rounds.items():
            base, adapter = (costs[storage] for storage in STORAGES)
            cells = [targets, str(number)]
            pairs = [_pair(getattr(base, what), getattr(adapter, what)) for what in ("step", "forward", "apply")]
            times.append([*cells, f"{base.ledger / MB:.1f}", *(cell for pair in pairs for cell in pair)])
            memory.append(
                [
                    *cells,
                    f"{base.kept / MB:.1f}",
                    f"{adapter.kept / MB:.1f}",
                    f"{base.peak / MB:.1f} and {adapter.peak / MB:.1f}",
                    f"{adapter.peak / base.peak:.2f}",
                ]
            )
    sections = [
        '# Residuals in a frozen adapter: what it costs beside `"base"`',
        _describe_model(args.rank),
        describe_machine(),
        markdown_table(_HEAD, times),
        markdown_table(_MEMORY, memory),
        NOTES.format(pairs=args.pairs),
    ]
    return "\n\n".join(sections) + "\n"


def _pair(base: list[float], adapter: list[float]) -> tuple[str, str]:
    ratio = median(right / left for left, right in zip(base, adapter, strict=True))
    return f"{median(base):.0f} and {median(adapter):.0f}", f"{ratio:.2f}"


def _describe_model(rank: int) -> str:
    count = Side("base", ["query"], rank).model.get_nb_trainable_parameters()[1]
    return (
        f"RoBERTa, {SIZE.layers} layers of width {SIZE.hidden}, {count / 1e6:.1f}M parameters in float32; LoRA of "
        f"rank {rank}, {CLIENTS} clients; batches of {SIZE.batch} x {SIZE.tokens} tokens."
    )


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    args.rounds = sorted(set(args.rounds))
    progress = tqdm(total=len(TARGETS) * len(args.rounds), unit="measurement")
    found = {name: measure(targets, args, progress) for name, targets in TARGETS.items()}
    progress.close()
    publish(report(found, args), args.output, __file__, answer(found))


if __name__ == "__main__":
    main()
