"""The certificate: next to nothing for a right installation, and large for each way of getting it wrong."""

import math

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from fedex_hf import (
    AdaptedModel,
    ClientUpdate,
    Exactness,
    FedExAggregator,
    FedITAggregator,
    LayerExactness,
    Ledger,
    LowRankDelta,
    measure_exactness,
)
from fedex_hf.updates import GlobalUpdate


WEIGHTS = [12, 7, 9]


class Federation:
    """A model, its ledger, and rounds whose clients move their factors at random."""

    def __init__(self, make=tiny.gpt2, seed=0, storage="auto", **config):
        defaults = {tiny.gpt2: {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}}
        defaults |= {
            tiny.roberta: {"target_modules": ["query", "value"]},
            tiny.llama: {"target_modules": "all-linear"},
        }
        self.generator = torch.Generator().manual_seed(seed)
        model = get_peft_model(make(), LoraConfig(**({"r": 4, "lora_alpha": 6} | defaults[make] | config)))
        self.adapted = AdaptedModel(model, changes_base=True, storage=storage)
        self.ledger = Ledger()

    def client(self, name="client", step=0.1):
        start = self.adapted.read()
        adapters = {
            layer: LowRankDelta(self._moved(delta.A, step), self._moved(delta.B, step), delta.scaling)
            for layer, delta in start.adapters.items()
        }
        return ClientUpdate(name, 1, 10, adapters)

    def _moved(self, tensor, step):
        return tensor + step * torch.randn(tensor.shape, generator=self.generator)

    def round(self, updates=None, aggregator=None, weights=WEIGHTS, apply=True):
        """One round; returns what `measure_exactness` needs."""
        self.before, self.ledger_before = self.adapted.read(), self.ledger
        self.bases_before = self.bases()
        self.updates = [self.client() for _ in weights] if updates is None else updates
        self.weights = weights
        update = (aggregator or FedExAggregator()).aggregate(self.updates, weights)
        if apply:
            self.ledger = self.ledger.plus(update.residuals, self.adapted.sites)
            self.adapted.write(GlobalUpdate(update.adapters))
            self.adapted.install(self.ledger)
        return update

    def bases(self):
        """Base weights and what carriers add to them, from the live modules."""
        return {name: self._base(site) for name, site in self.adapted.sites.items()}

    def _base(self, site):
        base = site.base_weight.detach().double().numpy().copy()
        if self.adapted.storage == "adapter" and "fedex_residual" in site.layer.active_adapters:
            A, B = (each["fedex_residual"].weight.detach() for each in (site.layer.lora_A, site.layer.lora_B))
            product = site.layer.scaling["fedex_residual"] * (B.double().numpy() @ A.double().numpy())
            base += product.T if isinstance(site.layer.get_base_layer(), Conv1D) else product
        return base

    def measure(self):
        return measure_exactness(self.adapted, self.before, self.ledger_before, self.updates, self.weights)

    def expected(self):
        """The same norms by formulas of this file, from the live parameters."""
        shares = np.array(self.weights) / sum(self.weights)
        layers = {}
        for name, site in self.adapted.sites.items():

            def effective(A, B, base, site=site):
                product = site.scaling * (B.double().numpy() @ A.double().numpy())
                return base + (product.T if isinstance(site.layer.get_base_layer(), Conv1D) else product)

            deltas = [update.adapters[name] for update in self.updates]
            base = self.bases_before[name]
            ideal = sum(w * effective(delta.A, delta.B, base) for w, delta in zip(shares, deltas))
            A = sum(w * delta.A.double() for w, delta in zip(shares.tolist(), deltas))
            B = sum(w * delta.B.double() for w, delta in zip(shares.tolist(), deltas))
            start = self.before.adapters[name]
            installed = effective(site.A.detach(), site.B.detach(), self.bases()[name])
            layers[name] = (
                np.linalg.norm(ideal - effective(start.A, start.B, base)),
                np.linalg.norm(installed - ideal),
                np.linalg.norm(effective(A, B, base) - ideal),
            )
        return layers


MAKERS = pytest.mark.parametrize("make", [tiny.roberta, tiny.llama, tiny.gpt2])


def is_exact(exactness):
    return exactness.aggregation_error <= 1e-5 and all(
        layer.aggregation_error <= 1e-5 for layer in exactness.layers.values()
    )


@pytest.mark.parametrize("storage", ["base", "adapter"])
@MAKERS
def test_a_right_installation(make, storage):
    federation = Federation(make, storage=storage)
    for _ in range(4):  # factors at first, dense later on
        federation.round()
        exactness = federation.measure()
        assert set(exactness.layers) == set(federation.adapted.sites)
        assert is_exact(exactness)
        assert exactness.aggregation_error > 0
        assert exactness.fedit_deviation > 1e-2
        for name, (change, error, fedit) in federation.expected().items():
            layer = exactness.layers[name]
            assert layer.change == pytest.approx(change, rel=1e-6)
            assert layer.error == pytest.approx(error, rel=1e-3)
            assert layer.fedit == pytest.approx(fedit, rel=1e-3)
            assert layer.aggregation_error == pytest.approx(error / change, rel=1e-3)
            assert layer.fedit_deviation == pytest.approx(fedit / change, rel=1e-3)


def test_measuring_changes_nothing():
    federation = Federation()
    federation.round()
    model = federation.adapted.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    identities = dict(model.named_parameters())
    first, second = federation.measure(), federation.measure()
    assert first == second
    for name, parameter in model.named_parameters():
        assert parameter is identities[name]
        assert torch.equal(parameter, before[name])


@MAKERS
def test_fedit_is_certified_as_what_it_is(make):
    federation = Federation(make)
    for _ in range(3):
        federation.round(aggregator=FedITAggregator())
        exactness = federation.measure()
        assert exactness.aggregation_error > 1e-2
        assert exactness.aggregation_error == pytest.approx(exactness.fedit_deviation, rel=1e-4)


# ---- Every way of getting it wrong shows ----


def perturbed_base(federation):
    next(iter(federation.adapted.sites.values())).base_weight.data[0, 0] += 1.0


def transposed_residuals(federation):
    for name, site in federation.adapted.sites.items():
        original = federation.adapted.originals[name]
        if original.shape[0] == original.shape[1]:
            site.base_weight.data.copy_(original + (site.base_weight.data - original).T)


def base_not_installed(federation):
    federation.adapted.install(Ledger())


def adapter_not_installed(federation):
    federation.adapted.write(federation.before)


def one_adapter_not_installed(federation):
    name, site = next(iter(federation.adapted.sites.items()))
    site.write(federation.before.adapters[name])


def adapter_of_one_client(federation):
    federation.adapted.write(GlobalUpdate(federation.updates[0].adapters))


def swapped_layers(federation):
    first, second = [site for name, site in federation.adapted.sites.items() if name.endswith("attn.c_proj")]
    weight = first.base_weight.data.clone()
    first.base_weight.data.copy_(second.base_weight.data)
    second.base_weight.data.copy_(weight)


def residual_twice(federation):
    for name, site in federation.adapted.sites.items():
        original = federation.adapted.originals[name]
        site.base_weight.data.add_(site.base_weight.data - original)


def base_in_bfloat16(federation):
    for site in federation.adapted.sites.values():
        site.base_weight.data.copy_(site.base_weight.data.bfloat16())


def adapter_in_bfloat16(federation):
    for site in federation.adapted.sites.values():
        site.B.data.copy_(site.B.data.bfloat16())


FAULTS = [
    perturbed_base,
    transposed_residuals,
    base_not_installed,
    adapter_not_installed,
    one_adapter_not_installed,
    adapter_of_one_client,
    swapped_layers,
    residual_twice,
    base_in_bfloat16,
    adapter_in_bfloat16,
]


def check_that_it_shows(fault, federation, rounds, least):
    for _ in range(rounds):
        federation.round()
    good = federation.measure()
    assert is_exact(good)
    fault(federation)
    bad = federation.measure()
    assert bad.aggregation_error > least
    assert not is_exact(bad)
    assert bad.fedit_deviation == good.fedit_deviation  # what FedIT would have done is none of the fault's business
    for name, (change, error, _) in federation.expected().items():
        assert bad.layers[name].aggregation_error == pytest.approx(error / change, rel=1e-3)


@pytest.mark.parametrize("first_round", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault, first_round):
    check_that_it_shows(fault, Federation(), rounds=1 if first_round else 3, least=1e-3)


def carrier_switched_off(federation):
    for site in federation.adapted.sites.values():
        site.layer.set_adapter(["default"])


def carrier_perturbed(federation):
    next(iter(federation.adapted.sites.values())).layer.lora_A["fedex_residual"].weight.data[0, 0] += 1.0


def carrier_in_bfloat16(federation):
    for site in federation.adapted.sites.values():
        A = site.layer.lora_A["fedex_residual"].weight.data
        A.copy_(A.bfloat16())


CARRIER_FAULTS = [
    base_not_installed,
    adapter_not_installed,
    adapter_of_one_client,
    adapter_in_bfloat16,
    carrier_switched_off,
    carrier_perturbed,
    carrier_in_bfloat16,
]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("fault", CARRIER_FAULTS)
def test_a_fault_of_the_carrier_shows(fault, rounds):
    check_that_it_shows(fault, Federation(storage="adapter"), rounds, least=1e-4)


def test_a_fault_in_one_layer_shows_in_that_layer():
    federation = Federation()
    federation.round()
    good = federation.measure()
    one_adapter_not_installed(federation)
    bad = federation.measure()
    changed = [name for name in good.layers if good.layers[name] != bad.layers[name]]
    assert changed == [next(iter(federation.adapted.sites))]


def test_the_weights_count():
    federation = Federation()
    federation.round()
    federation.weights = [1, 1, 1]
    assert federation.measure().aggregation_error > 1e-3
    federation.weights = [weight * 8 for weight in WEIGHTS]
    assert is_exact(federation.measure())


def test_a_missing_client_shows():
    federation = Federation()
    federation.round()
    federation.updates, federation.weights = federation.updates[:2], WEIGHTS[:2]
    assert federation.measure().aggregation_error > 1e-3


def test_the_ledger_the_clients_trained_on_counts():
    federation = Federation()
    for _ in range(2):
        federation.round()
    federation.ledger_before = Ledger()
    assert federation.measure().aggregation_error > 1e-3


# ---- Where nothing changes ----


def test_clients_that_did_not_train_from_zero():
    """PEFT's first `lora_B` is zero: no change, no error."""
    federation = Federation()
    federation.round([federation.client(step=0.0) for _ in WEIGHTS])
    exactness = federation.measure()
    assert exactness.aggregation_error == 0.0
    assert exactness.fedit_deviation == 0.0


@MAKERS
@pytest.mark.parametrize("rank", [1, 4])  # in the second round, the ledger's factors stay factors, or become a matrix
def test_clients_that_did_not_train_later_on(make, rank):
    """A learning rate of zero, or a layer without gradients: rounding noise over rounding noise is no error."""
    federation = Federation(make, r=rank)
    federation.round()
    federation.round([federation.client(step=0.0) for _ in WEIGHTS])
    exactness = federation.measure()
    assert exactness.aggregation_error <= 1e-5
    assert exactness.fedit_deviation <= 1e-5
    assert all(layer.aggregation_error <= 1e-5 for layer in exactness.layers.values())
    assert all(layer.fedit_deviation <= 1e-5 for layer in exactness.layers.values())


def test_a_layer_that_did_not_train():
    federation = Federation()
    federation.round()
    updates = [federation.client() for _ in WEIGHTS]
    frozen = next(iter(federation.adapted.sites))
    kept = federation.adapted.sites[frozen].read()
    updates = [ClientUpdate(u.client_id, 1, 10, dict(u.adapters) | {frozen: kept}) for u in updates]
    federation.round(updates)
    exactness = federation.measure()
    assert exactness.aggregation_error <= 1e-5
    assert exactness.layers[frozen].aggregation_error <= 1e-5


def test_a_change_where_there_should_be_none():
    federation = Federation()
    federation.round([federation.client(step=0.0) for _ in WEIGHTS])
    perturbed_base(federation)
    exactness = federation.measure()
    assert exactness.aggregation_error == math.inf
    assert exactness.fedit_deviation == 0.0


# ---- The numbers of a run from those of its layers ----


def test_norms_of_layers_add_up_in_squares():
    exactness = Exactness(
        {
            "one": LayerExactness(change=3.0, error=0.3, fedit=1.2),
            "two": LayerExactness(change=4.0, error=0.4, fedit=0.5),
        }
    )
    assert exactness.aggregation_error == pytest.approx(0.1)
    assert exactness.fedit_deviation == pytest.approx(1.3 / 5)
    assert exactness.layers["one"].aggregation_error == pytest.approx(0.1)
    assert exactness.layers["two"].fedit_deviation == pytest.approx(0.125)


def test_resolution_counts_only_where_nothing_should_have_changed():
    def layer(**norms):
        return LayerExactness(**({"fedit": 0.0, "resolution": 1e-8} | norms))

    assert layer(change=0.0, error=1e-9).aggregation_error == 0.0
    assert layer(change=0.0, error=1e-7).aggregation_error == math.inf
    assert layer(change=1e-7, error=1e-9).aggregation_error == pytest.approx(1e-2)
    both = Exactness({"still": layer(change=0.0, error=1e-9), "trained": layer(change=1.0, error=1e-7)})
    assert both.aggregation_error == pytest.approx(1e-7, rel=1e-3)
    assert Exactness({"still": layer(change=0.0, error=1e-9)}).aggregation_error == 0.0
    assert Exactness({"still": layer(change=0.0, error=1e-7)}).aggregation_error == math.inf


def test_a_large_layer_cannot_hide_an_infinite_error():
    layer = LayerExactness(change=0.0, error=1.0, fedit=0.0)
    assert layer.aggregation_error == math.inf
    assert layer.fedit_deviation == 0.0
