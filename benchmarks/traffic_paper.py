"""The communication ratios of the FedEx-LoRA paper (arXiv 2410.09432, Table 8), counted again: see `traffic.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from _common import markdown_table


CLIENTS, ROUNDS = 3, 5
Ratios = tuple[float, float, float]  # full fine-tuning, FedIT and FFA-LoRA, each over FedEx-LoRA
PRINTED: dict[str, Ratios] = {
    "RoBERTa-base": (7.032, 0.979, 0.972),
    "RoBERTa-large": (10.396, 0.984, 0.979),
    "GPT-2": (9.475, 0.917, 0.886),
}
HALF_DIGIT = 0.0005  # what printing three decimals rounds away, at most
_ROBERTA: list[list[str] | str] = [
    ["query", "value"],
    ["query", "key", "value"],
    ["query", "key", "value", "attention.output.dense"],
    "all-linear",
]
# The first is what the authors' code adapts.
TARGETS: dict[str, list[list[str] | str]] = {
    "RoBERTa-base": _ROBERTA,
    "RoBERTa-large": _ROBERTA,
    "GPT-2": [["c_attn", "c_proj"], ["c_attn", "attn.c_proj"], ["c_attn"], "all-linear"],
}


@dataclass(frozen=True)
class Sent:
    """Numbers of parameters: of the whole model, of all `A`, of all `B`, and of the head."""

    model: int
    A: int
    B: int
    head: int


@dataclass(frozen=True)
class Counting:
    """What the ratios count.

    Args:
        transfers: How often adapters and head go up and how often they come down.
        head: Whether the head is counted.
        adapters: How often each adapter parameter counts.
        residual: Adapters' worth of a residual, in each download.
        download: Whether the one-off download of the model is counted.
    """

    transfers: tuple[int, int] = (ROUNDS, ROUNDS)
    head: bool = True
    adapters: float = 1
    residual: int = CLIENTS
    download: bool = True


def ratios(sent: Sent, how: Counting) -> Ratios:
    """Traffic of full fine-tuning, FedIT and FFA-LoRA, over that of FedEx-LoRA."""
    start, times = sent.model * how.download, sum(how.transfers)
    head, adapter = sent.head * how.head, how.adapters * (sent.A + sent.B)
    fedit = start + times * (head + adapter)
    fedex = fedit + how.transfers[1] * how.residual * adapter
    ffa = start + times * (head + how.adapters * sent.B)
    return (start + times * sent.model) / fedex, fedit / fedex, ffa / fedex


def implied(printed: Ratios, model: int) -> tuple[float, float, float]:
    """Parameters of adapter, `A` and head that three ratios imply, if they count as `Counting()` does."""
    full, fedit, ffa = printed
    total = (1 + 2 * ROUNDS) * model / full
    adapter = (1 - fedit) * total / (ROUNDS * CLIENTS)
    head = (total - model - ROUNDS * (2 + CLIENTS) * adapter) / (2 * ROUNDS)
    return adapter, (fedit - ffa) * total / (2 * ROUNDS), head


def implied_ranges(printed: Ratios, model: int) -> list[tuple[float, float]]:
    """The same with all that the rounding of the ratios leaves open: least and largest."""
    corners = product(*((value - HALF_DIGIT, value + HALF_DIGIT) for value in printed))
    return [(min(each), max(each)) for each in zip(*(implied(corner, model) for corner in corners))]


def distance(found: Ratios, printed: Ratios) -> float:
    """Largest relative deviation of the three ratios."""
    return max(abs(value / want - 1) for value, want in zip(found, printed))


def countings(has_head: bool) -> Iterator[Counting]:
    """All ways of counting that are tried."""
    both, down, up = (ROUNDS, ROUNDS), (0, ROUNDS), (ROUNDS, 0)
    heads = (True, False) if has_head else (False,)
    for values in product((both, down, up), heads, (1, 2, 0.5), (CLIENTS, CLIENTS - 1), (True, False)):
        yield Counting(*values)


def closest(model: str, count: Callable[[str, list[str] | str], Sent]) -> list[tuple[float, str, Counting, Ratios]]:
    """All target modules and ways of counting for one row, the closest first: distance, targets, counting, ratios."""
    found = []
    for targets in TARGETS[model]:
        sent = count(model, targets)
        for how in countings(bool(sent.head)):
            value = ratios(sent, how)
            found.append((distance(value, PRINTED[model]), words(targets), how, value))
    return sorted(found, key=lambda each: each[0])


def words(targets: list[str] | str) -> str:
    """Target modules in one cell."""
    return targets if isinstance(targets, str) else ", ".join(targets)


# ---- The report ----

FORMULA = """\
## The paper's Table 8

Traffic of 5 rounds with 3 clients and r = 4, over that of FedEx-LoRA, with the one-off download of the model. With W,
L, L_B and H in numbers of parameters (model, adapter, all `B`, head), it counts

- full fine-tuning: W + 10 W
- FedIT: W + 10 (L + H)
- FFA-LoRA: W + 10 (L_B + H)
- FedEx-LoRA: W + 10 (L + H) + 5 · 3 L with the bound k r, 5 · 2 L with (k − 1) r

for LoRA on the modules that the authors' code adapts. The model's download hides what a round costs: without it, FedEx
with the bound k r sends 2.5 times as much as FedIT where there is no head."""
IMPLIED = """\
The formula turned around: what the printed ratios say that was sent, in millions of parameters, with the range that
their rounding leaves open, beside what PEFT counts."""
SEARCH = """\
All ways to count that were tried, the closest three of each row: LoRA on the modules named, head counted or not, both
directions or one, adapters counted once, twice or by half (as bytes in other dtypes than the base's would), bound k r
or (k − 1) r, with or without the model's download. *Off* is the largest relative deviation of the three ratios. Where
two rows count the same parameters, as with half of twice the modules, they tie."""
VERDICT = """\
- **RoBERTa-large is reproduced** with query, value and head, both directions, bound k r: FedIT and FFA-LoRA to all
  printed digits, full fine-tuning within 0.1 %.
- **GPT-2 is reproduced within 0.2 %, but only if each adapter parameter counts twice**, and then no ratio to its last
  digit. A base in bfloat16 with adapters in float32 would count like that, and so would rank 8; but RoBERTa-large
  counted twice is off by 2.5 %.
- **RoBERTa-base is not reproduced**: nothing that was tried comes within 10 %, and the printed ratios contradict the
  count. They imply a head ten times as large as RoBERTa-base's, and an adapter between those of three and of four
  modules.
- One direction alone explains no row: full fine-tuning could then be 6 times FedEx-LoRA at most."""


def compare_with_paper(count: Callable[[str, list[str] | str], Sent]) -> str:
    """The section on Table 8, in Markdown.

    Args:
        count: What is sent for a model's name and target modules.
    """
    sents = {model: count(model, TARGETS[model][0]) for model in PRINTED}
    found = {model: closest(model, count) for model in PRINTED}
    parts = [FORMULA, _ratios_table(sents), VERDICT, IMPLIED, _implied_table(sents), SEARCH, _search_table(found)]
    tried = ", ".join(f"{len(each)} for {model}" for model, each in found.items())
    return "\n\n".join([*parts, f"Tried: {tried}."])


def _ratios_table(sents: dict[str, Sent]) -> str:
    ways = {"bound k r": Counting(), "(k − 1) r": Counting(residual=CLIENTS - 1)}
    ways |= {f"{name}, without the model": replace(how, download=False) for name, how in ways.items()}
    rows = []
    for model, sent in sents.items():
        rows.append([model, "printed", *_digits(PRINTED[model])])
        if model == "GPT-2":
            rows.append([model, "bound k r, adapters twice", *_digits(ratios(sent, Counting(adapters=2)))])
        rows += [[model, name, *_digits(ratios(sent, how))] for name, how in ways.items()]
    return markdown_table(["model", "count", "full fine-tuning", "FedIT", "FFA-LoRA"], rows)


def _implied_table(sents: dict[str, Sent]) -> str:
    rows = []
    for model, sent in sents.items():
        values = zip(implied(PRINTED[model], sent.model), implied_ranges(PRINTED[model], sent.model))
        cells = [f"{value / 1e6:.3f} ({low / 1e6:.3f} to {high / 1e6:.3f})" for value, (low, high) in values]
        rows.append([model, "implied", *cells])
        rows.append([model, "counted", *(f"{value / 1e6:.3f}" for value in (sent.A + sent.B, sent.A, sent.head))])
    return markdown_table(["model", "", "adapter, M", "all `A`, M", "head, M"], rows)


def _search_table(found: dict[str, list[tuple[float, str, Counting, Ratios]]]) -> str:
    rows = []
    for model, tried in found.items():
        for off, targets, how, value in tried[:3]:
            counted = [
                {(ROUNDS, ROUNDS): "both", (0, ROUNDS): "down", (ROUNDS, 0): "up"}[how.transfers],
                "yes" if how.head else "no",
                f"{how.adapters:g}",
                "k r" if how.residual == CLIENTS else "(k − 1) r",
                "yes" if how.download else "no",
            ]
            rows.append([model, targets, *counted, *_digits(value), f"{off:.2%}"])
    head = ["model", "LoRA on", "directions", "head", "adapters x", "bound", "model", "full", "FedIT", "FFA", "off"]
    return markdown_table(head, rows)


def _digits(values: Ratios) -> list[str]:
    return [f"{value:.3f}" for value in values]
