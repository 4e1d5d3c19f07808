"""Time, memory and accuracy of the exact residual in factors, beside the dense formula of public implementations.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --models gpt2 --ranks 4 --clients 3 10 --seconds 0.1
    python benchmarks/aggregation.py --threads 1 --output docs/benchmarks/aggregation.md
    python benchmarks/aggregation.py --device cuda

Both sides get the factors of k clients for one layer and end with new factors and a changed weight `W`, float32:

- dense: `M = mean(B_i @ A_i); W += s (M - mean(B_i) @ mean(A_i))`, all in float32
- factored, server: what `FedExAggregator` makes of a layer, new factors and the residual's two, which is what travels
- factored, fold: `W.addmm_(B, A, alpha=s)` with the residual's factors, or `W.add_` where one of them is the identity

One layer of each distinct shape is measured; sums over a model count it as often as the model has it. The other part
of a round on the server, `Ledger.plus`, is timed over many rounds.

On Linux glibc is told to keep the memory that torch gives back (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`), so that
neither side pays for fresh pages; that is to the advantage of the dense side, which needs many. `--fresh_memory`
leaves glibc as it is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from _common import describe_machine, markdown_table, publish, start
from memory import _peak_allocated
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from tqdm import tqdm

from fedex_hf import FedExAggregator, Ledger, LowRankDelta
from fedex_hf.lora_site import sites_of


@dataclass(frozen=True)
class Layer:
    """Adapted layers of one shape.

    Args:
        names: As the model's code calls them.
        out_features, in_features: Sizes.
        count: How many the model has.
    """

    names: str
    out_features: int
    in_features: int
    count: int


MODELS = {
    "roberta-base": [Layer("query, value", 768, 768, 24)],
    "gpt2": [
        Layer("c_attn", 2304, 768, 12),
        Layer("attn.c_proj", 768, 768, 12),
        Layer("mlp.c_proj", 768, 3072, 12),
    ],
    "llama-3.2-3b": [
        Layer("q, o", 3072, 3072, 56),
        Layer("k, v", 1024, 3072, 56),
        Layer("gate, up", 8192, 3072, 56),
        Layer("down", 3072, 8192, 28),
    ],
    "mistral-7b": [
        Layer("q, o", 4096, 4096, 64),
        Layer("k, v", 1024, 4096, 64),
        Layer("gate, up", 14336, 4096, 64),
        Layer("down", 4096, 14336, 32),
    ],
}
LEDGERS = [  # layer, rank, clients: from two thin factors for many rounds to one matrix from the first
    (MODELS["roberta-base"][0], 4, 3),
    (MODELS["roberta-base"][0], 32, 3),
    (MODELS["roberta-base"][0], 32, 50),
    (MODELS["llama-3.2-3b"][1], 32, 3),
    (MODELS["llama-3.2-3b"][1], 32, 10),
]
SCALING = 2.0
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
SIDES = ("dense", "server", "fold")
TOGETHER = 2**24  # numbers in the weights of the layers that take part in one turn
ROWS = 256  # of the update that are compared with float64


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
    fresh_memory: bool = field(default=False, metadata={"help": "Leave glibc as it is."})
    device: str = field(default="cpu", metadata={"help": "Where both sides run.", "choices": ["cpu", "cuda"]})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch; its own choice if not given."})
    output: str | None = field(
        default=None, metadata={"help": "Write the report to this .md file, or into this folder as aggregation.md."}
    )


# ---- The two sides ----


def factors_of(layer: Layer, rank: int, clients: int, device: str, seed: int = 0) -> list[LowRankDelta]:
    """Clients' factors, float32, of which a tenth in norm is the client's own: what a few local steps leave."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, size: float) -> torch.Tensor:
        return size * torch.randn(rows, columns, generator=generator, device=device)

    size = layer.in_features**-0.5
    A, B = draw(rank, layer.in_features, size), draw(layer.out_features, rank, size)
    return [
        LowRankDelta(A + draw(*A.shape, 0.1 * size), B + draw(*B.shape, 0.1 * size), SCALING) for _ in range(clients)
    ]


@torch.no_grad()
def dense(W: torch.Tensor, factors: Sequence[LowRankDelta]) -> LowRankDelta:
    """The formula of public implementations, `W` in place; returns the new factors."""
    k = len(factors)
    M = sum(delta.B @ delta.A for delta in factors) / k
    A, B = sum(delta.A for delta in factors) / k, sum(delta.B for delta in factors) / k
    W += SCALING * (M - B @ A)
    return LowRankDelta(A, B, SCALING)


@torch.no_grad()
def server(factors: Sequence[LowRankDelta]) -> tuple[LowRankDelta, LowRankDelta]:
    """The package's own way to new factors and a residual in factors."""
    aggregator = FedExAggregator()
    weights = torch.full((len(factors),), 1 / len(factors), dtype=torch.float64)
    mean, residual = aggregator.aggregate_layer(factors, weights)
    assert residual is not None
    return mean, aggregator.shorten(residual)


@torch.no_grad()
def fold(W: torch.Tensor, residual: LowRankDelta) -> None:
    """Add a residual to `W` in place, float32."""
    for identity, product in ((residual.A, residual.B), (residual.B, residual.A)):
        if product.shape == W.shape and torch.equal(identity, torch.eye(*identity.shape, device=W.device)):
            W.add_(product, alpha=residual.scaling)
            return
    W.addmm_(residual.B, residual.A, alpha=residual.scaling)


# ---- Measuring ----


@dataclass(frozen=True)
class Machine:
    """What this device does in this run.

    Args:
        copy: Bytes per second that a copy of a large tensor reads and writes.
        products: Operations per second of a product of two large square matrices, by dtype.
    """

    copy: float
    products: dict[torch.dtype, float]


@dataclass(frozen=True)
class Result:
    """One layer, one rank, one number of clients.

    Args:
        times: Side -> seconds, median.
        floors: Side -> seconds that the machine needs at least, of `server` and `fold`.
        errors: Relative Frobenius error of the update to the weight: `dense`, `fold`, and of `server`, which is that
            of the residual as it travels.
        memory: Peak of what `server` allocates beyond its results, relative to the clients' factors.
        residual_rank: Of the residual that travels.
    """

    times: dict[str, float]
    floors: dict[str, float]
    errors: dict[str, float]
    memory: float
    residual_rank: int

    @property
    def factored(self) -> float:
        """Seconds until the weight is changed."""
        return self.times["server"] + self.times["fold"]

    @property
    def ratio(self) -> float:
        """How many times as long the dense side takes for equal work."""
        return self.times["dense"] / self.factored


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
    copies = range(min(layer.count, max(TOGETHER // (layer.out_features * layer.in_features), 1)))
    factors = [factors_of(layer, rank, clients, clock.device, seed) for seed in copies]
    weights = [torch.zeros(layer.out_features, layer.in_features, device=clock.device) for _ in copies]
    residuals = [server(each)[1] for each in factors]
    errors = errors_of(layer, factors[0], residuals[0])
    calls = {
        "dense": lambda: [dense(*each) for each in zip(weights, factors, strict=True)],
        "server": lambda: [server(each) for each in factors],
        "fold": lambda: [fold(*each) for each in zip(weights, residuals, strict=True)],
    }
    once = sum(clock(call) for call in calls.values())  # the first calls also warm up
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(min(max(round(seconds / once), 3), 50)):
        for side in SIDES[:: -1 if turn % 2 else 1]:
            times[side].append(clock(calls[side]) / len(copies))
    return Result(
        times={side: median(each) for side, each in times.items()},
        floors=floors_of(layer, factors[0], residuals[0], machine),
        errors=errors,
        memory=temporary_memory(factors[0], clock.device) / sum(delta.nbytes for delta in factors[0]),
        residual_rank=residuals[0].rank,
    )


def floors_of(
    layer: Layer, factors: Sequence[LowRankDelta], residual: LowRankDelta, machine: Machine
) -> dict[str, float]:
    """Seconds that moving the bytes or the operations alone would take, whichever is more."""
    stacked = (len(factors) - 1) * factors[0].rank
    numbers = layer.out_features * layer.in_features
    moved = sum(delta.nbytes for delta in factors) + factors[0].nbytes + residual.nbytes
    multiplied_out = stacked > residual.rank
    products = 2 * numbers * stacked if multiplied_out else 0
    folded, added = (0, 4 * numbers) if multiplied_out else (2 * numbers * residual.rank, residual.nbytes)
    return {
        "server": max(moved / machine.copy, products / machine.products[torch.float64]),
        "fold": max((8 * numbers + added) / machine.copy, folded / machine.products[torch.float32]),
    }


def errors_of(layer: Layer, factors: Sequence[LowRankDelta], residual: LowRankDelta) -> dict[str, float]:
    """Each side's error against the centred formula in float64, in the first rows of the update."""
    A, B = torch.stack([delta.A for delta in factors]).double(), torch.stack([delta.B for delta in factors]).double()
    A, B = A - A.mean(0), B[:, :ROWS] - B.mean(0)[:ROWS]
    expected = SCALING * torch.einsum("kmr,krn->mn", B, A) / len(factors)
    found = {"server": residual.scaling * (residual.B[:ROWS].double() @ residual.A.double())}
    W = torch.zeros(layer.out_features, layer.in_features, device=A.device)
    dense(W, factors)
    found["dense"] = W[:ROWS].double()
    fold(W.zero_(), residual)
    found["fold"] = W[:ROWS].double()
    return {side: float((update - expected).norm() / expected.norm()) for side, update in found.items()}


def temporary_memory(factors: Sequence[LowRankDelta], device: str) -> int:
    """Peak of what `server` allocates, without its results, bytes."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = server(factors)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with _peak_allocated() as peaks:
            results = server(factors)
        peak = peaks["whole run"]
    return peak - sum(each.nbytes for each in results)


@dataclass(frozen=True)
class LedgerResult:
    """Rounds of one layer's ledger on the CPU.

    Args:
        seconds: Of `Ledger.plus`, one per round.
        dense: Seconds of the dense formula's round, median.
        turned: The round in which the sum turned dense, 0 if it never did.
    """

    seconds: list[float]
    dense: float
    turned: int


def measure_ledger(layer: Layer, rank: int, clients: int, rounds: int) -> LedgerResult:
    """`Ledger.plus` round by round, in turns with the dense formula."""
    clock = Clock("cpu")
    model = nn.ModuleDict({"layer": nn.Linear(layer.in_features, layer.out_features, bias=False)})
    lora = LoraConfig(r=rank, lora_alpha=round(SCALING * rank), target_modules=["layer"])
    sites = sites_of(inject_adapter_in_model(lora, model), "default")
    ledger, W = Ledger(), torch.zeros(layer.out_features, layer.in_features)
    seconds, dense_seconds, turned = [], [], 0
    for number in range(1, rounds + 1):
        factors = factors_of(layer, rank, clients, "cpu", seed=number)
        residuals = dict.fromkeys(sites, server(factors)[1])
        dense_seconds.append(clock(lambda factors=factors: dense(W, factors)))
        after: list[Ledger] = []
        seconds.append(
            clock(lambda ledger=ledger, residuals=residuals, after=after: after.append(ledger.plus(residuals, sites)))
        )
        ledger = after[0]
        turned = turned or (number if ledger.matrices else 0)
    return LedgerResult(seconds, median(dense_seconds), turned)


# ---- The report ----

Results = dict[tuple[str, Layer, int, int], Result]  # model, layer, rank, clients

NOTES = """\
Equal work: both sides begin with the clients' factors and end with new factors and a changed `W`. *dense* is
`M = mean(B_i @ A_i); W += s (M - mean(B_i) @ mean(A_i))` in float32. The factored side is *server*
(`FedExAggregator`: new factors and those of the residual, all that a server has to make and to send) and *fold*
(`W.addmm_` with the residual's factors, float32; `W.add_` where the residual is one matrix and an identity). *ratio*
is dense / (server + fold), *server only* is dense / server. Times are medians of {clock}, taken in turns, in
milliseconds; a turn takes several layers of one shape after another, as many as have {together} million weights
together or the model has, and their mean counts. {memory}

*Errors* are relative Frobenius errors of the update to `W` against the centred formula in float64, over the first
{rows} rows: of *dense*, of the residual that *travels*, and of that once it is *folded* into zeros. A tenth of each
client's factors, in norm, is its own. *Memory* is the peak of what *server* allocates beside its results, relative to
the factors of all clients.

*Floor* is the share of the time that the machine needs at least, for *server* and *fold*: the larger of bytes over
copy bandwidth and operations over matrix-product rate. *server* reads all factors once and writes the means and the
residual, float32; its operations are products only where the residual is multiplied out because `(k - 1) r` exceeds
the layer's smaller side, in float64. *fold* reads and writes `W` and multiplies in float32. Where all of it fits into
a cache, or is so small that calling torch takes longer than the arithmetic, the floor says little."""

_KEPT = """\
On Linux both sides reuse memory that they have used before; with glibc as it comes (`--fresh_memory`) large tensors
are fresh pages each time, and the dense side, which needs more of them, takes several times as long."""
_FRESH = """\
glibc is as it comes: tensors of more than 32 MB are fresh pages each time."""

_HEAD = (
    "layers",
    "shape",
    "r",
    "k",
    "rank sent",
    "dense, ms",
    "server, ms",
    "fold, ms",
    "ratio",
    "server only",
    "error: dense",
    "travels",
    "folded",
    "memory",
    "floor: server",
    "fold",
    "both",
)


def report(results: Results, ledgers: Sequence[LedgerResult], machine: Machine, args: BenchmarkArguments) -> str:
    """The whole page, in Markdown."""
    sections = [
        "# The exact residual in factors, beside the dense formula",
        _device(args.device),
        f"In this run a copy moves {machine.copy / 1e9:.1f} GB/s, and matrix products make "
        f"{machine.products[torch.float32] / 1e9:.0f} (float32) and {machine.products[torch.float64] / 1e9:.0f} "
        "(float64) billion operations per second.",
        "## Over all layers",
        summary(results, args),
        "## Per model: its layers times how often they occur",
        totals(results, args),
        "## The ledger",
        ledger_table(ledgers),
        "## Per layer",
        details(results),
        NOTES.format(
            rows=ROWS,
            together=TOGETHER // 10**6,
            clock="wall-clock time" if args.device == "cuda" else "processor time",
            memory=_FRESH if args.fresh_memory else _KEPT,
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _device(device: str) -> str:
    return (f"{torch.cuda.get_device_name()}; " if device == "cuda" else "") + describe_machine()


def summary(results: Results, args: BenchmarkArguments) -> str:
    """One row per number of clients."""
    rows = []
    for clients in args.clients:
        of_clients = [result for key, result in results.items() if key[3] == clients]
        ratios = [each.ratio for each in of_clients]
        alone = [each.times["dense"] / each.times["server"] for each in of_clients]
        error = max(each.errors["server"] for each in of_clients)
        rows.append(
            [
                str(clients),
                f"{median(ratios):.1f}",
                f"{min(ratios):.2f}",
                f"{median(alone):.0f}",
                f"{min(alone):.1f}",
                f"{error:.0e}",
                f"{min(each.errors['dense'] for each in of_clients):.0e}",
                f"{max(each.memory for each in of_clients):.2f}",
            ]
        )
    head = ("clients", "ratio, median", "least", "server only, median", "least", "largest error", "least of dense")
    return markdown_table((*head, "memory, most"), rows)


def totals(results: Results, args: BenchmarkArguments) -> str:
    """One row per model, rank and number of clients."""
    rows = []
    for model in args.models:
        for rank in args.ranks:
            for clients in args.clients:
                of_case = [
                    (key[1].count, each)
                    for key, each in results.items()
                    if (key[0], key[2], key[3]) == (model, rank, clients)
                ]
                sums = {side: sum(count * each.times[side] for count, each in of_case) for side in SIDES}
                factored = sums["server"] + sums["fold"]
                rows.append(
                    [
                        model,
                        str(rank),
                        str(clients),
                        *(f"{sums[side]:.3g}" for side in SIDES),
                        f"{sums['dense'] / factored:.1f}",
                        f"{sums['dense'] / sums['server']:.0f}",
                    ]
                )
    head = ("model", "r", "k", "dense, s", "server, s", "fold, s", "ratio", "server only")
    return markdown_table(head, rows)


def details(results: Results) -> str:
    """One row per case."""
    rows = []
    for (model, layer, rank, clients), each in results.items():
        rows.append(
            [
                f"{model}: {layer.names}",
                f"{layer.out_features} x {layer.in_features}",
                str(rank),
                str(clients),
                str(each.residual_rank),
                *(f"{1e3 * each.times[side]:.3g}" for side in SIDES),
                f"{each.ratio:.1f}",
                f"{each.times['dense'] / each.times['server']:.0f}",
                *(f"{each.errors[side]:.0e}" for side in SIDES),
                f"{each.memory:.2f}",
                *(f"{each.floors[side] / each.times[side]:.0%}" for side in ("server", "fold")),
                f"{sum(each.floors.values()) / each.factored:.0%}",
            ]
        )
    return markdown_table(_HEAD, rows)


def ledger_table(ledgers: Sequence[LedgerResult]) -> str:
    """One row per case of `LEDGERS`."""
    rows = []
    for (layer, rank, clients), each in zip(LEDGERS, ledgers, strict=True):
        rows.append(
            [
                f"{layer.out_features} x {layer.in_features}",
                str(rank),
                str(clients),
                str(each.turned or "-"),
                *(f"{1e3 * seconds:.3g}" for seconds in (each.seconds[0], median(each.seconds), max(each.seconds))),
                f"{1e3 * each.dense:.3g}",
                f"{each.dense * len(each.seconds) / sum(each.seconds):.2f}",
            ]
        )
    head = ("shape", "r", "k", "dense from round", "first, ms", "median, ms", "most, ms", "dense formula, ms", "ratio")
    return markdown_table(head, rows)


def keep_memory() -> None:
    """Start this program again with a glibc that keeps what is given back."""
    if sys.platform == "linux" and any(os.environ.get(name) != value for name, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)


def main() -> None:
    args = start(BenchmarkArguments, __doc__)
    if not args.fresh_memory:
        keep_memory()
    clock = Clock(args.device)
    machine = measure_machine(clock)
    cases = [
        (model, layer, rank, clients)
        for model in args.models
        for layer in MODELS[model]
        for rank in args.ranks
        for clients in args.clients
    ]
    results = {
        (model, layer, rank, clients): measure(layer, rank, clients, machine, clock, args.seconds)
        for model, layer, rank, clients in tqdm(cases, unit="case")
    }
    ledgers = [measure_ledger(*case, args.rounds) for case in tqdm(LEDGERS, unit="ledger")]
    publish(report(results, ledgers, machine, args), args.output, __file__)


if __name__ == "__main__":
    main()
