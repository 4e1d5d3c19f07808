"""Time to swap one client for the next: what happens between two fits apart from training.

    python benchmarks/swap.py
    python benchmarks/swap.py --models tiny --repeats 20
    python benchmarks/swap.py --output docs/benchmarks/swap.md

In: the global state goes into the model, and what the client has of its own. Out: the trained tensors are copied and
looked through for NaN, and the model becomes the global one again. The rounds before leave residuals in the base, so
that nothing is empty.
"""

from __future__ import annotations

import tempfile
import time
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
    training_arguments,
)
from transformers import PrinterCallback

from fedex_hf import FederatedTrainer, FederatedTrainingArguments
from fedex_hf.base_model import AdaptedModel
from fedex_hf.client_adapters import install_at_rank, install_client


CLIENT, ROUNDS = "client-0", 2
LIMIT = 1.0  # milliseconds
CASES: dict[str, dict[str, Any]] = {
    "`fedex`": {},
    "`fedit`": {"aggregator": "fedit"},
    "`fedex`, residuals in an adapter": {"residual_storage": "adapter"},
    '`fedex`, `assignment="keep"`': {"aggregator_kwargs": {"assignment": "keep"}},
    "`fedex`, a client of rank 2": {"client_ranks": {CLIENT: 2}},
}
STEPS = ("global state in", "own state in", "trained tensors out", "check for NaN", "global state back")


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: ["22M"], metadata={"help": "Models, one table each.", "choices": list(SIZES)}
    )
    repeats: int = field(default=100, metadata={"help": "Swaps per row; the median is reported."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as swap.md."}
    )


def measure(model: str, repeats: int, settings: dict[str, Any]) -> list[float]:
    """Milliseconds of the processor for each of `STEPS`, medians."""
    size = SIZES[model]
    data = build_data(size, 2 * size.batch)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(FederatedTrainingArguments, size, folder, num_rounds=ROUNDS, **settings)
        trainer = FederatedTrainer(build_model(size), args, train_dataset=shares_of(data, 2))
        trainer.remove_callback(PrinterCallback)
        for round in range(1, ROUNDS + 1):
            trainer.run_round(round)
        update = trainer.fit_client(CLIENT, ROUNDS + 1)
        trainer.restore_global_state()
    rank = args.parsed_client_ranks.get(CLIENT)
    steps: Sequence[Callable[[], Any]] = (
        trainer.restore_global_state,
        lambda: (
            install_client(trainer.adapted, trainer.federation, CLIENT)
            if rank is None
            else install_at_rank(trainer.adapted, trainer.federation, rank, CLIENT)
        ),
        trainer.adapted.read,
        update.check_finite,
        trainer.restore_global_state,
    )
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, own in zip(steps, times, strict=True):
            began = time.process_time()
            step()
            own.append(1e3 * (time.process_time() - began))
    return [median(each) for each in times]


NOTES = """\
Milliseconds that the processor spent on the process, medians over {repeats} swaps; {size:.1f} MB of trained tensors go
in and out. *In and out* are the global state in, the client's own state in and the global state back: at most
{limit:.0f} ms is aimed at. A client that has factors or a rank of its own trains on a base weight of its own: that and
the way back are formed from original, ledger and offset, layer by layer: at least {moved:.1f} MB to read and write."""


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    machine, sections, found = describe_machine(), ["# Time to swap clients"], []
    for model in args.models:
        adapted = AdaptedModel(build_model(SIZES[model]), changes_base=True)
        trained, _ = adapted.model.get_nb_trainable_parameters()
        weights = sum(site.base_weight.nbytes for site in adapted.sites.values())
        rows = []
        for name, settings in CASES.items():
            times = measure(model, args.repeats, settings)
            swap = times[0] + times[1] + times[4]
            rows.append([name, *(f"{each:.2f}" for each in (*times, swap)), "yes" if swap <= LIMIT else "NO"])
            found.append(f"{name} {swap:.2f} ms")
            print(rows[-1], flush=True)
        sections += [
            f"- {describe_model(model)}",
            markdown_table(("clients", *(f"{each}, ms" for each in STEPS), "in and out, ms", "holds"), rows),
            NOTES.format(repeats=args.repeats, size=4 * trained / 1e6, limit=LIMIT, moved=4 * weights / 1e6),
        ]
    publish("\n\n".join([sections[0], machine, *sections[1:]]) + "\n", args.output, __file__, "; ".join(found))


if __name__ == "__main__":
    main()
