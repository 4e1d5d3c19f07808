"""The two sides of `aggregation.py`: the dense formula of public implementations, and what the package does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from memory import _peak_allocated
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import skip_init

from fedex_hf import ClientUpdate, FedExAggregator, GlobalUpdate, Ledger, LowRankDelta
from fedex_hf.base_model import AdaptedModel


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
SCALING = 2.0
ROWS = 256  # of the update that are compared with float64
TOGETHER = 2**24  # numbers in the weights of the layers that take part in one turn


def updates_of(
    layer: Layer, rank: int, clients: int, copies: int, device: str = "cpu", seed: int = 0
) -> list[ClientUpdate]:
    """Clients' factors of some layers, float32; a tenth in norm is the client's own: what a few local steps leave."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, size: float) -> torch.Tensor:
        return size * torch.randn(rows, columns, generator=generator, device=device)

    size = layer.in_features**-0.5
    starts = [(draw(rank, layer.in_features, size), draw(layer.out_features, rank, size)) for _ in range(copies)]
    return [
        ClientUpdate(
            f"client-{client}",
            1,
            1,
            {
                name_of(place): LowRankDelta(A + draw(*A.shape, 0.1 * size), B + draw(*B.shape, 0.1 * size), SCALING)
                for place, (A, B) in enumerate(starts)
            },
        )
        for client in range(clients)
    ]


def name_of(place: int) -> str:
    """The layer's name in `Ours.adapted`."""
    return f"base_model.model.{place}"


@torch.no_grad()
def dense(W: torch.Tensor, factors: Sequence[LowRankDelta]) -> LowRankDelta:
    """The formula of public implementations, `W` in place; returns the new factors."""
    k = len(factors)
    M = sum(delta.B @ delta.A for delta in factors) / k
    A, B = sum(delta.A for delta in factors) / k, sum(delta.B for delta in factors) / k
    W += SCALING * (M - B @ A)
    return LowRankDelta(A, B, SCALING)


@torch.no_grad()
def dense_all(weights: Sequence[torch.Tensor], updates: Sequence[ClientUpdate]) -> None:
    """`dense` for layer after layer."""
    for place, W in enumerate(weights):
        dense(W, [update.adapters[name_of(place)] for update in updates])


def aggregate(updates: Sequence[ClientUpdate]) -> GlobalUpdate:
    """The server's part of a round in the package: new factors and the residual's, which is what travels."""
    return FedExAggregator().aggregate(updates, [1.0] * len(updates))


class Ours:
    """Some layers of one shape as the package holds them, weights zero.

    Args:
        layer: Their shape.
        rank: Of the adapter.
        copies: How many.
    """

    def __init__(self, layer: Layer, rank: int, copies: int) -> None:
        model = nn.Sequential(
            *(skip_init(nn.Linear, layer.in_features, layer.out_features, bias=False) for _ in range(copies))
        )
        for module in model:
            nn.init.zeros_(module.weight)
        lora = LoraConfig(
            r=rank, lora_alpha=round(SCALING * rank), target_modules=[str(each) for each in range(copies)]
        )
        self.adapted = AdaptedModel(get_peft_model(model, lora), changes_base=True)

    def ledger(self, update: GlobalUpdate, before: Ledger | None = None) -> Ledger:
        """All residuals so far."""
        return (before or Ledger()).plus(update.residuals, self.adapted.sites)

    def install(self, ledger: Ledger) -> None:
        """Change the weights in place."""
        self.adapted.install(ledger)

    def weight(self, place: int) -> torch.Tensor:
        """A live weight."""
        return self.adapted.sites[name_of(place)].base_weight.detach()


@torch.no_grad()
def fold(weights: Sequence[torch.Tensor], update: GlobalUpdate) -> None:
    """Add residuals in float32, in place: for a GPU, where the package does not install anything."""
    for place, W in enumerate(weights):
        residual = update.residuals[name_of(place)]
        if residual.product is None:
            W.addmm_(residual.B, residual.A, alpha=residual.scaling)
        else:
            W.add_(residual.product, alpha=residual.scaling)


@dataclass(frozen=True)
class Case:
    """Adapted layers of one shape, and who trains them.

    Args:
        layer: Their shape.
        rank: Of the adapters.
        clients: How many.
        device: Where both sides run.
    """

    layer: Layer
    rank: int
    clients: int
    device: str = "cpu"

    @property
    def cells(self) -> list[str]:
        """Of a table: shape, rank, clients."""
        return [f"{self.layer.out_features} x {self.layer.in_features}", str(self.rank), str(self.clients)]

    @property
    def copies(self) -> int:
        """How many layers take part in one turn."""
        return min(self.layer.count, max(TOGETHER // (self.layer.out_features * self.layer.in_features), 1))

    def updates(self) -> list[ClientUpdate]:
        """The clients'."""
        return updates_of(self.layer, self.rank, self.clients, self.copies, self.device)

    def weights(self) -> list[torch.Tensor]:
        """Zeros."""
        size = (self.layer.out_features, self.layer.in_features)
        return [torch.zeros(size, device=self.device) for _ in range(self.copies)]


def dense_calls(case: Case) -> dict[str, Callable[[], object]]:
    """What is timed of the dense side."""
    weights, updates = case.weights(), case.updates()
    return {"dense": lambda: dense_all(weights, updates)}


def our_calls(case: Case) -> dict[str, Callable[[], object]]:
    """What is timed of the package; `Ledger` and `AdaptedModel` work on the CPU."""
    updates = case.updates()
    update = aggregate(updates)
    server = {"server": lambda: aggregate(updates)}
    if case.device != "cpu":
        weights = case.weights()
        return server | {"install": lambda: fold(weights, update)}
    ours = Ours(case.layer, case.rank, case.copies)
    ledger = ours.ledger(update)
    return server | {"ledger": lambda: ours.ledger(update), "install": lambda: ours.install(ledger)}


def torch_calls(case: Case) -> dict[str, Callable[[], object]]:
    """The two things that installing is made of, each alone: copying weights, and products of the residual's depth.

    Products go into a block that stays in the cache. Nothing where the residual is multiplied out, and on a GPU.
    """
    residual = aggregate(case.updates()).residuals[name_of(0)] if case.device == "cpu" else None
    if residual is None or residual.product is not None:
        return {}
    originals, weights = case.weights(), case.weights()
    site = Ours(case.layer, case.rank, 1).adapted.sites[name_of(0)]
    left = [residual.B[rows] for rows in site.blocks(residual.rank)]
    buffer = torch.empty(len(left[0]), case.layer.in_features)

    def copy() -> None:
        for original, weight in zip(originals, weights, strict=True):
            weight.copy_(original)

    def multiply() -> None:
        for _ in range(case.copies):
            for rows in left:
                torch.mm(rows, residual.A, out=buffer[: len(rows)])

    return {"copy": copy, "product": multiply}


@dataclass(frozen=True)
class Findings:
    """What is not a time.

    Args:
        errors: Relative Frobenius error of the update to the weight: of `dense`, `install`, and of `server`, which is
            that of the residual as it travels.
        memory: Peak of what the server allocates beside its results, relative to the clients' factors.
        residual_rank: Of the residual that travels.
        ledger_multiplies: Whether the ledger multiplies a residual out that travels in factors; installing only adds.
    """

    errors: dict[str, float]
    memory: float
    residual_rank: int
    ledger_multiplies: bool


def look(case: Case) -> Findings:
    """Errors and memory of a case."""
    updates = case.updates()
    update = aggregate(updates)
    residual, multiplies = update.residuals[name_of(0)], False
    if case.device == "cpu":
        ours = Ours(case.layer, case.rank, case.copies)
        ledger = ours.ledger(update)
        ours.install(ledger)
        installed = ours.weight(0)
        multiplies = residual.product is None and name_of(0) in ledger.matrices
    else:
        weights = case.weights()
        fold(weights, update)
        installed = weights[0]
    errors = errors_of(case.layer, updates, residual, installed)
    return Findings(errors, temporary_memory(updates, case.device), residual.rank, multiplies)


def errors_of(
    layer: Layer, updates: Sequence[ClientUpdate], residual: LowRankDelta, installed: torch.Tensor
) -> dict[str, float]:
    """Each side's error against the centred formula in float64, in the first rows of the first layer's update."""
    factors = [update.adapters[name_of(0)] for update in updates]
    A, B = torch.stack([delta.A for delta in factors]).double(), torch.stack([delta.B for delta in factors]).double()
    A, B = A - A.mean(0), B[:, :ROWS] - B.mean(0)[:ROWS]
    expected = SCALING * torch.einsum("kmr,krn->mn", B, A) / len(factors)
    W = torch.zeros(layer.out_features, layer.in_features, device=A.device)
    dense(W, factors)
    found = {
        "dense": W[:ROWS].double(),
        "server": residual.scaling * (residual.B[:ROWS].double() @ residual.A.double()),
        "install": installed[:ROWS].double(),
    }
    return {side: float((update - expected).norm() / expected.norm()) for side, update in found.items()}


def temporary_memory(updates: Sequence[ClientUpdate], device: str) -> float:
    """Peak of what `aggregate` allocates beside its results, relative to the clients' factors."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = aggregate(updates)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with _peak_allocated() as peaks:
            results = aggregate(updates)
        peak = peaks["whole run"]
    made = sum(each.nbytes for part in (results.adapters, results.residuals) for each in part.values())
    return (peak - made) / sum(each.nbytes for update in updates for each in update.adapters.values())
