"""What one client sends and receives in a round, by method, model and number of clients.

    python benchmarks/traffic.py
    python benchmarks/traffic.py --clients 3 10
    python benchmarks/traffic.py --output docs/benchmarks/traffic.md

Layers, dtypes and sizes are read from models that PEFT has wrapped, on the `meta` device: no weights are made or
loaded. For the methods of this package, random updates of one layer of each shape go through the real aggregator and
their bytes are counted; they must be those of `formula`, which also covers the methods that the package does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from _common import markdown_table, publish, start
from memory import MB
from tqdm import tqdm
from traffic_models import CASES, PAPER_CASES, Layer, Traffic, build, read
from traffic_paper import Sent, compare_with_paper

from fedex_hf import Aggregator, ClientUpdate, FedExAggregator, FedITAggregator, FFALoRAAggregator, LowRankDelta
from fedex_hf.updates import payload_bytes


@dataclass
class BenchmarkArguments:
    """What to count."""

    clients: list[int] = field(default_factory=lambda: [3, 10, 50], metadata={"help": "Clients in a round, each > 1."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as traffic.md."}
    )

    def __post_init__(self) -> None:
        if min(self.clients, default=0) < 2:
            raise ValueError(f"`clients={self.clients}`. Allowed: numbers from 2 on; one client has no residual.")


# ---- Methods ----

EXACT, BOUNDED, PAPER, DENSE = "FedEx-LoRA", "FedEx-LoRA, `residual_rank=r`", "FedEx-LoRA, bound k r", "dense residual"
FEDIT, FLORA, FFA, FULL = "FedIT", "FLoRA", "FFA-LoRA", "full fine-tuning"
METHODS = (EXACT, BOUNDED, PAPER, DENSE, FEDIT, FLORA, FFA, FULL)
OURS: dict[str, Callable[[int], Aggregator]] = {
    EXACT: lambda rank: FedExAggregator(),
    BOUNDED: lambda rank: FedExAggregator(residual_rank=rank),
    FEDIT: lambda rank: FedITAggregator(),
    FFA: lambda rank: FFALoRAAggregator(),
}


def formula(method: str, layer: Layer, clients: int) -> tuple[int, int]:
    """Bytes up and down of one layer, per client and round; not for full fine-tuning, which has no layers here."""
    factor = layer.rank * layer.dtype.itemsize
    up = factor * (layer.out_features + (0 if method == FFA else layer.in_features))
    more = {
        EXACT: layer.column * layer.exact_rank(clients),
        BOUNDED: layer.column * min(layer.rank, layer.exact_rank(clients)),
        PAPER: layer.column * clients * layer.rank,
        DENSE: layer.dense,
        FLORA: (clients - 1) * up,  # all clients' factors instead of their mean
    }
    return up, up + more.get(method, 0)


def measured(method: str, layer: Layer, clients: int) -> tuple[int, int]:
    """What the package's aggregator makes of random updates of one layer, in bytes up and down."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(layer.dtype)

    A = noise(layer.rank, layer.in_features)
    updates = []
    for client in range(clients):
        A = A if method == FFA else noise(*A.shape)
        delta = LowRankDelta(A, noise(layer.out_features, layer.rank), scaling=2.0)
        updates.append(ClientUpdate(f"client-{client}", 1, 1, {"layer": delta}))
    aggregator = OURS[method](layer.rank)
    update = aggregator.aggregate(updates, range(1, clients + 1))
    sent = payload_bytes(updates[0], aggregator.trained_factors)
    return sent, payload_bytes(update, aggregator.returned_factors)


def count(method: str, traffic: Traffic, clients: int) -> tuple[int, int]:
    """Bytes up and down of a whole model.

    Raises:
        RuntimeError: If the package's aggregator sends other bytes than the formula says.
    """
    if method == FULL:
        return traffic.model, traffic.model
    for layer in traffic.layers if method in OURS else ():
        found, expected = measured(method, layer, clients), formula(method, layer, clients)
        if found != expected:
            raise RuntimeError(
                f"{method} with {clients} clients: {layer} takes {found} bytes up and down, and the formula says "
                f"{expected}. One of the two has to be mended."
            )
    return traffic.total(lambda layer: formula(method, layer, clients))


# ---- The report ----

INTRO = """\
MB (1,000,000 bytes) per client and round, without headers. Shapes and dtypes are those of the models as transformers
{transformers} and PEFT {peft} build them. *Aggregator*: random updates of one layer of each shape went through the
package's own aggregator, and its bytes are those of the formula, to the byte; *formula*: what the package does not
send. Adapters travel in their own dtype, residuals in float32, full models in the dtype of the base. *Bound k r* is
the paper's rank of the residual. *Dense residual* is one matrix per layer, which is what the authors' code adds to the
base; of a bfloat16 base it has twice the bytes. FLoRA sends all clients' factors down instead of their mean. Heads
have two labels.

| method | up | down |
| --- | --- | --- |
| FedEx-LoRA | L + H | L + H + 4 Σ min((k − 1) r, in, out) (in + out) |
| FedEx-LoRA, `residual_rank=r` | L + H | L + H + 4 Σ r (in + out) |
| FedEx-LoRA, bound k r | L + H | L + H + 4 Σ k r (in + out) |
| dense residual | L + H | L + H + 4 Σ in · out |
| FedIT | L + H | L + H |
| FLoRA | L + H | k L + H |
| FFA-LoRA | L_B + H | L_B + H |
| full fine-tuning | W | W |

Bytes: L of all factors, L_B of the `B` alone, H of the head, W of the model; sums are over the adapted layers. With
factors in bfloat16 or float16 the exact residual has 2 r ranks more, which undo the rounding of their means: such
adapters halve what goes up, and what comes down grows by half with three clients."""
RANKS = """\
## Many clients

A residual never gets more ranks than the layer's smaller side: from there on one factor is the product and the other
an identity. Two factors are
larger than a matrix from rank `in · out / (in + out)` on, which comes before; the package sends factors all the same.
With 50 clients of rank 32, exact FedEx-LoRA of Llama-3.2-3B sends more down than full fine-tuning in bfloat16: lower
it with `residual_rank`, which is then not exact, or with fewer clients per round. Shapes where either happens:"""


def section(name: str, traffic: Traffic, clients: list[int], progress: tqdm) -> str:
    """One model's table."""
    rows = []
    for method in METHODS:
        pairs = [count(method, traffic, number) for number in clients]
        progress.update()
        cells = [f"{value / MB:,.2f}" for value in (pairs[0][0], *(down for _, down in pairs))]
        rows.append([method, "aggregator" if method in OURS else "formula", *cells])
    shapes = ", ".join(
        f"{number} of {each.out_features} x {each.in_features}" for each, number in traffic.layers.items()
    )
    head = f"; head of {traffic.head / MB:.2f} MB" if traffic.head else ""
    return "\n\n".join(
        [
            f"## {name}",
            f"{sum(traffic.layers.values())} layers (out x in): {shapes}{head}.",
            markdown_table(["method", "by", "up", *(f"down, k = {number}" for number in clients)], rows),
        ]
    )


def ranks_table(found: dict[str, Traffic], clients: list[int]) -> str:
    """Shapes whose residual is compressed, or would be smaller as a matrix."""
    rows = []
    for name, traffic in found.items():
        for layer, number in traffic.layers.items():
            for k in clients:
                rank, factors = layer.exact_rank(k), layer.column * layer.exact_rank(k)
                if rank == min(layer.out_features, layer.in_features) or factors > layer.dense:
                    shape, sizes = f"{layer.out_features} x {layer.in_features}", (factors, layer.dense)
                    cells = [f"{number * size / MB:,.1f}" for size in sizes]
                    rows.append([name, str(k), f"{number} of {shape}", str((k - 1) * layer.rank), str(rank), *cells])
    head = ["model", "k", "layers", "(k − 1) r", "rank sent", "as factors, MB", "as matrices, MB"]
    return markdown_table(head, rows) if rows else "None."


def sent(model: str, targets: list[str] | str) -> Sent:
    """The parts that the paper's Table 8 counts, at its rank 4, in parameters."""
    traffic = read(build(PAPER_CASES[model], 4, target_modules=targets))
    A = sum(number * layer.rank * layer.in_features for layer, number in traffic.layers.items())
    B = sum(number * layer.rank * layer.out_features for layer, number in traffic.layers.items())
    return Sent(traffic.model // 4, A, B, traffic.head // 4)


def answer(found: dict[str, Traffic], clients: list[int]) -> str:
    """What was found for the first model, in a line."""
    name, traffic = next(iter(found.items()))
    exact, dense = (count(method, traffic, clients[0])[1] / MB for method in (EXACT, DENSE))
    return f"{name}: {exact:.1f} MB down to each of {clients[0]} clients; {dense:.1f} with a dense residual"


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    clients = sorted(set(args.clients))
    found = {f"{name}, r = {rank}": read(build(case, rank)) for name, case in CASES.items() for rank in case.ranks}
    with tqdm(total=len(found) * len(METHODS), unit="row") as progress:
        tables = [section(name, traffic, clients, progress) for name, traffic in found.items()]
    sections = [
        "# Traffic per client and round",
        INTRO.format(transformers=version("transformers"), peft=version("peft")),
        *tables,
        RANKS,
        ranks_table(found, clients),
        compare_with_paper(sent),
    ]
    publish("\n\n".join(sections) + "\n", args.output, __file__, answer(found, clients))


if __name__ == "__main__":
    main()
