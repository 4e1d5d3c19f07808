"""Weights and certificates are formed a few rows at a time: the same numbers as whole matrices, in less memory."""

import math
from functools import partial

import pytest
import tiny
import torch
from effective import base_bytes, effective, norm
from layer_kinds import SUPPORTED
from memory import _peak_allocated
from peft import LoraConfig, get_peft_model
from test_layer_kinds import WEIGHTS, Federation, perturbed
from torch import nn

from fedex_hf import ClientUpdate, FedExAggregator, GlobalUpdate, Ledger, LowRankDelta, lora_site
from fedex_hf.base_model import AdaptedModel
from fedex_hf.evaluation import measure_exactness
from fedex_hf.low_rank import narrowed


pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's about tied weights, PiSSA, Conv1D


@pytest.fixture
def few_rows(monkeypatch):
    """Blocks of five rows, which divide no layer of the tests."""
    monkeypatch.setattr(lora_site, "_BLOCK", 1)
    monkeypatch.setattr(lora_site, "_ROWS", 5)


def random_delta(site, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*site.A.shape[:-2], rank, site.A.shape[-1], generator=generator)
    B = torch.randn(*site.B.shape[:-1], rank, generator=generator)
    return LowRankDelta(A, B, 0.7)


def add_to_zero(site, delta, rows, into):
    site.add_to(into.zero_(), delta, rows)


@pytest.mark.parametrize("kind", SUPPORTED.values(), ids=SUPPORTED)
def test_rows_of_every_kind(kind, few_rows):
    adapted = kind.federated()
    for site in adapted.sites.values():
        blocks = list(site.blocks())
        assert len(blocks) == math.ceil(site.B.shape[-2] / 5)
        for delta in (random_delta(site, 3), narrowed(random_delta(site, 100))):
            whole = site.matrix(site.dense(delta))
            parts = torch.cat([site.rows(delta, rows) for rows in blocks], dim=-2)
            assert norm([parts - whole]) <= 1e-13 * norm([whole])
            assert torch.equal(site.rows(delta), whole) or delta.product is not None
            for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-7)):
                added = site.assembled(partial(add_to_zero, site, delta), dtype)
                assert added.shape == site.dense_shape == site.dense(delta).shape
                assert norm([site.matrix(added).double() - whole]) <= tolerance * norm([whole])


@pytest.mark.parametrize("kind", SUPPORTED.values(), ids=SUPPORTED)
def test_rounds_in_blocks_are_exact(kind, few_rows):
    federation = Federation(kind)
    for number in range(1, 3):
        federation.round(number).assert_exact()


@pytest.mark.parametrize("name", ["linear", "conv1d-gpt2", "embedding", "conv2d", "linear-bfloat16", "linear-nf4"])
def test_blocks_change_neither_weights_nor_certificates(name, monkeypatch):
    def run():
        federation = Federation(SUPPORTED[name])
        adapted, ledger = federation.adapted, federation.adapted.ledger
        state, updates, update = round_of(adapted)
        adapted.write(update)
        adapted.install(ledger.plus(update.residuals, adapted.sites))
        found = measure_exactness(adapted, state, ledger, updates, WEIGHTS)
        return effective(federation.model), base_bytes(federation.model), found

    weights, stored, whole = run()
    monkeypatch.setattr(lora_site, "_BLOCK", 1)
    monkeypatch.setattr(lora_site, "_ROWS", 5)
    in_blocks = run()
    for layer, weight in weights.items():
        assert norm([weight - in_blocks[0][layer]]) <= 1e-7 * norm([weight])
        for measure in ("change", "fedit", "resolution"):
            expected = getattr(whole.layers[layer], measure)
            assert getattr(in_blocks[2].layers[layer], measure) == pytest.approx(expected, rel=1e-12)
            assert expected > 0
        assert in_blocks[2].layers[layer].aggregation_error < 1e-5
    assert stored.keys() == in_blocks[1].keys()


@pytest.mark.parametrize("name", ["linear", "conv1d-gpt2", "embedding", "conv2d", "experts", "attention"])
def test_the_certificate_knows_what_was_installed_to_the_bit(name, few_rows):
    """It compares with the weights that clients trained on, formed anew."""
    federation = Federation(SUPPORTED[name]).round(1).round(2)
    adapted = federation.adapted
    for layer, site in adapted.sites.items():
        for rows in site.blocks():
            assert torch.equal(adapted.installed(layer, rows), adapted.installed_at(layer, adapted.ledger, rows=rows))
        assert not torch.equal(adapted.installed(layer), adapted.installed_at(layer, Ledger()))  # the twin


@pytest.mark.parametrize("rank", [3, 200])
@pytest.mark.parametrize("held", ["nothing", "factors", "a matrix"])
@pytest.mark.parametrize("name", ["linear-bfloat16", "conv1d-gpt2", "embedding", "conv2d"])
def test_rows_of_what_a_carrier_holds_with_an_offset(name, held, rank, few_rows):
    """A certificate asks for a client's carrier row by row: what was carried, without forming the whole of it."""
    adapted = SUPPORTED[name].federated(storage="adapter")
    for layer, site in adapted.sites.items():
        offset, residual = random_delta(site, rank), random_delta(site, 2, seed=1)
        ledger = {
            "nothing": Ledger(),
            "factors": Ledger().plus({layer: residual}, adapted.sites),
            "a matrix": Ledger(matrices={layer: site.dense(residual).float()}),
        }[held]
        adapted.install(ledger, {layer: offset})
        whole = site.dense(offset) if held == "nothing" else site.dense(offset) + ledger.dense(layer, site)
        for rows in site.blocks():
            found = adapted.installed_at(layer, ledger, offset, rows)
            assert norm([found - adapted.installed(layer, rows)]) <= 1e-7 * norm([found])
            assert norm([found - site.matrix(whole)[rows]]) <= 1e-6 * norm([found])
            assert norm([found - adapted.installed_at(layer, ledger, rows=rows)]) > 0.1 * norm([found])  # the twin
        adapted.install(ledger)


WAYS = ["medium", "high", *(["newer"] if hasattr(torch.backends.mkldnn, "matmul") else [])]  # from torch 2.9 on


@pytest.mark.parametrize("ask", WAYS)
def test_float32_with_fewer_digits_is_not_used(ask, monkeypatch):
    """Torch multiplies float32 in bfloat16 on some processors if it is asked to: then weights are added in float64."""
    site = next(iter(SUPPORTED["linear"].federated().sites.values()))
    delta, calls = random_delta(site, 3), []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args, **kwargs: calls.append(args))
    site.add_to(torch.zeros(site.B.shape[0], site.A.shape[1]), delta)
    assert calls
    calls.clear()
    into = torch.zeros(site.B.shape[0], site.A.shape[1])
    with tiny.fewer_digits(ask):
        site.add_to(into, delta)
    assert not calls
    assert norm([into.double() - site.rows(delta)]) <= 1e-7 * norm([site.rows(delta)])


# ---- Memory ----


@pytest.fixture
def wide():
    """A layer of many blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    return AdaptedModel(get_peft_model(model, LoraConfig(r=4, target_modules=["0"])), changes_base=True)


def peak_of(what):
    with _peak_allocated() as peaks:
        what()
    return peaks["whole run"]


def round_of(adapted):
    state = adapted.read()
    locals_ = [perturbed(state, seed) for seed in range(3)]
    updates = [
        ClientUpdate(f"client-{i}", 1, WEIGHTS[i], each.adapters, each.tensors) for i, each in enumerate(locals_)
    ]
    return state, updates, FedExAggregator().aggregate(updates, WEIGHTS)


def test_nothing_as_large_as_a_layer_is_formed_in_float64(wide):
    state, updates, update = round_of(wide)
    ledger = Ledger().plus(update.residuals, wide.sites)
    wide.write(GlobalUpdate(update.adapters))
    wide.install(ledger)  # keeps the original
    (site,) = wide.sites.values()
    dense = 8 * site.base_weight.numel()
    assert peak_of(lambda: wide.install(ledger)) < dense
    assert peak_of(lambda: measure_exactness(wide, state, Ledger(), updates, WEIGHTS)) < 2 * dense
    # The twin: one matrix alone, scaled.
    assert peak_of(lambda: site.dense(update.residuals[site.name])) > dense


def test_a_dense_ledger_grows_in_blocks(wide):
    (site,) = wide.sites.values()
    residual = random_delta(site, 8)
    ledger = Ledger(matrices={site.name: torch.zeros(1024, 1024)})
    matrix = 4 * site.base_weight.numel()
    assert matrix <= peak_of(lambda: ledger.plus({site.name: residual}, wide.sites)) < 3 * matrix
    assert peak_of(lambda: site.dense(residual)) > 3 * matrix  # the twin
