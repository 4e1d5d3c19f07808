"""Error of the effective weights after many rounds, for every kind of layer and base.

    python benchmarks/exactness.py
    python benchmarks/exactness.py --rounds 1 2 --kinds linear linear-nf4
    python benchmarks/exactness.py --output docs/benchmarks/exactness.md

Each kind of `layer_kinds.py` goes through rounds of three clients, whose factors are moved at random by as much as
makes a round's residual a given share of the base weight. The ideal is the sum of the clients' weighted mean updates,
in float64. Measured beside it, from the same updates:

- auto: what the model holds with `residual_storage="auto"`
- in place: each round's residual added to the base weight in the weight's own dtype, as other implementations do;
  4-bit and 8-bit weights are dequantized, added to, and quantized again, as PEFT's `merge` does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from _common import describe_machine, markdown_table, publish, start
from layer_kinds import SUPPORTED, Kind
from tqdm import tqdm
from transformers.utils import logging

from fedex_hf import ClientUpdate, FedExAggregator, GlobalUpdate, LowRankDelta
from fedex_hf.aggregators.fedex import exact_residual
from fedex_hf.base_model import AdaptedModel
from fedex_hf.lora_site import LoraSite


LIMIT = 1e-5
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
KINDS = [name for name, kind in SUPPORTED.items() if not kind.is_option]


@dataclass
class BenchmarkArguments:
    """What to measure."""

    rounds: list[int] = field(
        default_factory=lambda: [1, 10, 50], metadata={"help": "Server rounds to measure after."}
    )
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": "Kinds of layer and base.", "choices": list(SUPPORTED)}
    )
    residual: float = field(
        default=1e-3, metadata={"help": "Norm of a round's residual, as a share of that of the base weight."}
    )
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as exactness.md."}
    )


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius norms after some rounds, over all adapted layers of a model.

    Args:
        auto: Error of the update since the start as the model holds it.
        in_place: Error of the same with residuals added in place.
        lost: Share of the sum of residuals that is not in the base with residuals added in place.
    """

    auto: float
    in_place: float
    lost: float


# ---- The base weight, changed in place ----


class InPlace:
    """A base weight to which residuals are added in its own dtype.

    Args:
        site: The layer; its weight is copied.
    """

    def __init__(self, site: LoraSite) -> None:
        self.weight, self.layer = site.base_weight, site.layer.get_base_layer()
        self.four_bit = getattr(self.weight, "quant_state", None)
        self.scales = None if self.four_bit is not None else _scales(self.layer)
        self.stored = self.weight.detach().clone()
        self.start = self.numbers()

    def numbers(self) -> torch.Tensor:
        """The weight, float64."""
        if self.four_bit is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(self.stored, self.four_bit).double()
        if self.scales is not None:
            return self.stored.double() * self.scales.double()[:, None] / 127
        return self.stored.double()

    def add(self, residual: torch.Tensor) -> None:
        """Add a residual of the weight's shape, float64."""
        if self.four_bit is not None:
            from bitsandbytes.functional import quantize_4bit

            changed = (self.numbers() + residual).float()
            self.stored, self.four_bit = quantize_4bit(
                changed, blocksize=self.four_bit.blocksize, quant_type=self.four_bit.quant_type
            )
        elif self.scales is not None:
            from bitsandbytes.functional import int8_vectorwise_quant

            self.stored, self.scales, _ = int8_vectorwise_quant((self.numbers() + residual).half())
        else:
            self.stored.add_(residual.to(self.stored.dtype))


def _scales(layer: Any) -> torch.Tensor | None:
    """The scales of an 8-bit layer's rows; they move from the weight to the layer with its first use."""
    scales = getattr(layer.weight, "SCB", None) if hasattr(layer, "weight") else None
    return layer.state.SCB if scales is None and hasattr(layer, "state") else scales


# ---- Rounds of a model ----


class Rounds:
    """A model of one kind, its clients, and the ideal.

    Args:
        kind: The kind of layer and base.
        residual: Norm of a round's residual, as a share of that of the base weight.
    """

    def __init__(self, kind: Kind, residual: float) -> None:
        self.adapted: AdaptedModel = kind.federated()
        self.sites = self.adapted.sites
        self.in_place = {name: InPlace(site) for name, site in self.sites.items()}
        self.generator = torch.Generator().manual_seed(0)
        self.step = {name: self._step(name, site, residual) for name, site in self.sites.items()}
        zeros = {name: torch.zeros_like(base.start) for name, base in self.in_place.items()}
        self.ideal = zeros
        self.residuals = {name: zero.clone() for name, zero in zeros.items()}
        self.before = self.adapted.read()
        self.installed = {name: self.adapted.installed(name) for name in self.sites}

    def _step(self, name: str, site: LoraSite, residual: float) -> float:
        """By how much to move factors: the residual grows with the square of it."""
        like = site.read()
        clients = [replace(like, A=self._noise(like.A), B=self._noise(like.B)) for _ in WEIGHTS]
        size = site.dense(exact_residual(clients, WEIGHTS)).norm() / self.in_place[name].start.norm()
        return float((residual / size).sqrt())

    def _noise(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=self.generator)

    def _moved(self, delta: LowRankDelta, common: LowRankDelta, step: float) -> LowRankDelta:
        """All clients move in one direction, and each by as much in one of its own."""
        A = delta.A.double() + step * (common.A + self._noise(delta.A))
        B = delta.B.double() + step * (common.B + self._noise(delta.B))
        return replace(delta, A=A.to(delta.A.dtype), B=B.to(delta.B.dtype))

    def round(self, number: int) -> None:
        """One round, with both ways to hold its residual."""
        state, ledger = self.adapted.read(), self.adapted.ledger
        common = {name: replace(d, A=self._noise(d.A), B=self._noise(d.B)) for name, d in state.adapters.items()}
        updates = []
        for client in range(len(WEIGHTS)):
            moved = {name: self._moved(d, common[name], self.step[name]) for name, d in state.adapters.items()}
            updates.append(ClientUpdate(f"client-{client}", number, 1, moved))
        update = FedExAggregator().aggregate(updates, WEIGHTS.tolist())
        for name, site in self.sites.items():
            change = -site.dense(state.adapters[name])
            for each, weight in zip(updates, WEIGHTS.tolist(), strict=True):
                change += weight * site.dense(each.adapters[name])
            self.ideal[name] = self.ideal[name] + change
            residual = site.dense(update.residuals[name])
            self.residuals[name] += residual
            self.in_place[name].add(residual)
        self.adapted.write(GlobalUpdate(update.adapters, state.tensors))
        self.adapted.install(ledger.plus(update.residuals, self.sites))

    def errors(self) -> Errors:
        """After the rounds so far."""
        auto, in_place, lost = [], [], []
        for name, site in self.sites.items():
            ideal, base = site.matrix(self.ideal[name]), self.in_place[name]
            adapter = site.matrix(site.dense(site.read()) - site.dense(self.before.adapters[name]))
            added = site.matrix(base.numbers() - base.start)
            auto.append(adapter + self.adapted.installed(name) - self.installed[name] - ideal)
            in_place.append(adapter + added - ideal)
            lost.append(added - site.matrix(self.residuals[name]))
        whole = _norm(list(self.ideal.values()))
        return Errors(_norm(auto) / whole, _norm(in_place) / whole, _norm(lost) / _norm(list(self.residuals.values())))


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt().item()


def measure(kind: Kind, rounds: Sequence[int], residual: float = 1e-3) -> dict[int, Errors]:
    """Rounds -> errors after as many.

    Args:
        kind: The kind of layer and base.
        rounds: When to measure.
        residual: Norm of a round's residual, as a share of that of the base weight.
    """
    run, found = Rounds(kind, residual), {}
    for number in range(1, max(rounds) + 1):
        run.round(number)
        if number in rounds:
            found[number] = run.errors()
    return found


# ---- The report ----

NOTES = """\
Each number is the Frobenius norm of the error of a model's effective weights, relative to that of their whole change
since the start, which includes what the averaged adapter itself brings. *auto* is what `residual_storage="auto"`
holds, in the base or in a frozen adapter beside it; *in place* adds each round's residual to the base weight in the
weight's own dtype (4-bit and 8-bit weights: dequantized, added to and quantized again). *Residuals lost* is the share
of the sum of all residuals that is then missing from the base, or wrong: above 100 % it would have been better to add
nothing.

Three clients with weights 0.2, 0.3 and 0.5 and LoRA of rank 2, whose factors move at random: half of each step is
common to all clients. The steps are such that the residual of a round is {residual:g} of the base weight in norm.
Models have a few thousand random weights; see `benchmarks/layer_kinds.py`."""


def worst_of(found: dict[str, dict[int, Errors]]) -> float:
    """The largest error of the package's own choice of storage."""
    return max(errors.auto for each in found.values() for errors in each.values())


def answer(found: dict[str, dict[int, Errors]]) -> str:
    """What was found, in a line."""
    rounds = max(next(iter(found.values())))
    return f"relative error of at most {worst_of(found):.1e} on {len(found)} kinds, up to {_rounds(rounds)}"


def report(found: dict[str, dict[int, Errors]], residual: float) -> str:
    """The whole page, in Markdown."""
    rounds = list(next(iter(found.values())))
    worst = worst_of(found)
    head = ["LoRA on", "base", "residual in"]
    head += [f"{way}, {_rounds(number)}" for number in rounds for way in ("auto", "in place")]
    rows = [_row(SUPPORTED[name], errors) for name, errors in found.items()]
    verdict = "holds" if worst <= LIMIT else "does NOT hold"
    sections = [
        "# Error after many rounds",
        f'Claim: at most {LIMIT:.0e} with `residual_storage="auto"`. It {verdict}: the largest is {worst:.1e}.',
        describe_machine(),
        markdown_table([*head, f"residuals lost in place, {_rounds(rounds[-1])}"], rows),
        NOTES.format(residual=residual),
    ]
    return "\n\n".join(sections) + "\n"


def _rounds(number: int) -> str:
    return "1 round" if number == 1 else f"{number} rounds"


def _row(kind: Kind, errors: dict[int, Errors]) -> list[str]:
    numbers = [f"{value:.0e}" for each in errors.values() for value in (each.auto, each.in_place)]
    lost = list(errors.values())[-1].lost
    return [*cells_of(kind), *numbers, f"{lost:.0%}" if lost > 0.01 else f"{lost:.0e}"]


def cells_of(kind: Kind) -> list[str]:
    """The first cells of a kind's row."""
    return [kind.what, kind.base, f"`{kind.storage}`"]


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    logging.disable_progress_bar()  # of loading the small models
    progress = tqdm(args.kinds, unit="kind")
    found = {}
    for name in progress:
        progress.set_description(name)
        found[name] = measure(SUPPORTED[name], sorted(set(args.rounds)), args.residual)
    publish(report(found, args.residual), args.output, __file__, answer(found))


if __name__ == "__main__":
    main()
