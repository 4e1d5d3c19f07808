"""The frozen adapter that carries the residuals: in every forward pass, in no gradient, and the user's to keep."""

import copy

import layer_kinds
import pytest
import tiny
import torch
from layer_kinds import SUPPORTED
from peft import PeftModel

from fedex_hf import FederatedTrainer, FFALoRAAggregator, GlobalUpdate, Ledger, LowRankDelta, UnsupportedModelError
from fedex_hf.base_model import AdaptedModel
from fedex_hf.carrier import CARRIER


KINDS = ["linear", "conv1d-gpt2", "embedding", "conv2d", "conv1d"]
RANKS = {"factors": 3, "dense": 40}
pytestmark = pytest.mark.filterwarnings("ignore")


def residuals_of(adapted, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRankDelta(
            0.2 * torch.randn(rank, site.A.shape[-1], generator=generator),
            0.2 * torch.randn(site.B.shape[-2], rank, generator=generator),
            site.scaling,
        )
        for name, site in adapted.sites.items()
    }


def carrying(name="linear", rank=3, **kwargs):
    """A float32 model that carries a residual in each layer, and a trained adapter that is not zero."""
    adapted = SUPPORTED[name].federated("adapter", **kwargs)
    state = adapted.read()
    adapters = {
        layer: LowRankDelta(each.A + 0.1, each.B + 0.1, each.scaling) for layer, each in state.adapters.items()
    }
    adapted.write(GlobalUpdate(adapters, state.tensors))
    adapted.install(Ledger().plus(residuals_of(adapted, rank), adapted.sites))
    return adapted


def output(model, name="linear"):
    model.eval()
    with torch.no_grad():
        return model(**SUPPORTED[name].inputs()).logits


def carriers(model):
    return {name: parameter for name, parameter in model.named_parameters() if CARRIER in name.split(".")}


# ---- Frozen ----


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", KINDS)
def test_it_is_in_the_forward_pass_and_in_no_gradient(name, rank):
    adapted = carrying(name, rank)
    model = adapted.model
    with_it = output(model, name)
    model.train()
    with model.disable_adapter():  # as reference models are made: PEFT thaws all active adapters afterwards
        pass
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad)
    model.base_model.set_requires_grad([CARRIER], True)
    model(**SUPPORTED[name].inputs()).logits.sum().backward()
    assert carriers(model)
    assert all(not each.requires_grad and each.grad is None for each in carriers(model).values())
    assert all(each.grad is not None for site in adapted.sites.values() for each in site.parameters)
    assert torch.equal(output(model, name), with_it)
    adapted.install(Ledger())
    assert (output(model, name) - with_it).norm() > 1e-2 * with_it.norm()


def test_gradient_clipping_sees_the_trained_adapter_only(tmp_path):
    trainer = tiny.federation(tmp_path, residual_storage="adapter", num_rounds=2)
    trainer.train()
    assert trainer.federation.ledger.layers()
    trained = {id(each) for site in trainer.adapted.sites.values() for each in site.parameters}
    trained |= {id(each) for each in trainer.adapted.tensors.values()}
    assert {id(each) for each in trainer.model.parameters() if each.requires_grad} == trained
    optimized = {id(each) for group in trainer.clients.trainer.optimizer.param_groups for each in group["params"]}
    assert optimized == trained


def test_what_was_frozen_stays_frozen():
    model, _ = SUPPORTED["lora-bias"].adapted()
    FFALoRAAggregator().configure_model(model)
    bias = next(parameter for name, parameter in model.named_parameters() if name.endswith("lora_B.default.bias"))
    bias.requires_grad_(False)
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    adapted = AdaptedModel(model, changes_base=True, storage="adapter")
    assert {name: each.requires_grad for name, each in model.named_parameters() if name in before} == before
    assert not any(parameters[0].requires_grad for parameters in (site.parameters for site in adapted.sites.values()))


def test_it_has_no_dropout_and_the_trained_adapter_keeps_its_own():
    adapted = carrying("dropout")
    inputs = torch.randn(1, 1, 32).expand(1, 64, 32)  # the same row 64 times
    layer = next(iter(adapted.sites.values())).layer.train()
    assert layer(inputs)[0].unique(dim=0).shape[0] > 1  # the trained adapter drops another part of each
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    alone = layer(inputs)[0]
    assert torch.allclose(alone, alone[:1].expand_as(alone), atol=1e-6)
    assert (alone - layer.base_layer(inputs)[0]).norm() > 0.1


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        adapted = carrying()
        model = adapted.model.train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**SUPPORTED["linear"].inputs()).logits.square().sum().backward()
        return [each.grad for site in adapted.sites.values() for each in site.parameters]

    pairs = list(zip(gradients(True), gradients(False), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(each.norm() > 0 for each, _ in pairs)


# ---- Switched off ----


def switched_off():
    adapted = carrying()
    adapted.model.set_adapter("default")  # as PEFT does when an adapter is added, and trainers between two of them
    return adapted


def test_a_fit_without_it_is_refused():
    adapted = switched_off()
    with pytest.raises(RuntimeError, match=rf"`{CARRIER}`.* is switched off in layer .*q_proj.*set_adapter"):
        adapted.read()
    for site in adapted.sites.values():
        site.layer.set_adapter(["default", CARRIER])
    assert adapted.read().adapters


def test_the_certificate_does_not_count_what_is_switched_off():
    adapted = carrying()
    name = next(iter(adapted.sites))
    assert adapted.installed(name).norm() > 0
    adapted = switched_off()
    assert adapted.installed(name).norm() == 0
    assert adapted.installed_at(name, adapted.ledger).norm() > 0


def test_installing_switches_it_on():
    adapted, reference = switched_off(), output(carrying().model)
    assert not torch.equal(output(adapted.model), reference)
    adapted.install(adapted.ledger)
    assert torch.equal(output(adapted.model), reference)
    assert not any(each.requires_grad for each in carriers(adapted.model).values())
    assert adapted.read().adapters


# ---- A model that comes with one ----


@pytest.mark.parametrize("changes_base", [True, False])
@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", KINDS)
def test_it_is_taken_over(name, rank, changes_base):
    first = carrying(name, rank)
    before = output(first.model, name)
    second = AdaptedModel(first.model, changes_base)
    assert second.storage == "adapter"
    assert (output(second.model, name) - before).norm() <= 1e-6 * before.norm()
    for layer, site in second.sites.items():
        there, here = first.ledger.dense(layer, site), second.ledger.dense(layer, site)
        assert (here - there).norm() <= 1e-6 * there.norm()
        assert second.installed(layer).norm() > 0


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", KINDS)
def test_it_is_taken_over_as_peft_saves_and_loads_it(tmp_path, name, rank):
    first = carrying(name, rank)
    first.model.save_pretrained(tmp_path, save_embedding_layers=False)
    model = PeftModel.from_pretrained(SUPPORTED[name].plain(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path / CARRIER, CARRIER)
    second = AdaptedModel(model, changes_base=True)
    before = output(first.model, name)
    assert (output(second.model, name) - before).norm() <= 1e-5 * before.norm()
    second.install(Ledger())
    assert (output(second.model, name) - before).norm() > 1e-2 * before.norm()


def test_a_federation_goes_on_with_the_model_of_another(tmp_path):
    first = tiny.federation(tmp_path / "first", residual_storage="adapter", num_rounds=2)
    first.train()
    before = first.evaluate()["eval_loss"]
    second = FederatedTrainer(
        first.model,
        tiny.arguments(tmp_path / "second", num_rounds=1),
        train_dataset=tiny.clients_of([8, 8]),
        eval_dataset=tiny.classification_data(20, seed=1),
    )
    assert second.federation.ledger.layers() == first.federation.ledger.layers() != set()
    assert second.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)
    assert second.train().metrics["max_aggregation_error"] <= 1e-5
    first.adapted.install(Ledger())
    assert second.evaluate()["eval_loss"] != pytest.approx(before, rel=1e-4)


def test_it_cannot_go_into_the_base():
    with pytest.raises(
        UnsupportedModelError, match=rf"carries residuals in its adapter `{CARRIER}`.*merge_and_unload"
    ):
        AdaptedModel(carrying().model, changes_base=True, storage="base")


def test_it_is_refused_for_layers_that_nothing_is_trained_in():
    model = carrying().model
    model.add_adapter("other", layer_kinds.LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    with pytest.raises(UnsupportedModelError, match=rf"`{CARRIER}` carries residuals for the layer .*q_proj"):
        AdaptedModel(model, changes_base=True)


# ---- What users do with a model ----


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", [*KINDS, "rslora", "lora-bias", "modules-to-save"])
def test_merging_keeps_the_function(name, rank):
    adapted = carrying(name, rank)
    before = output(adapted.model, name)
    adapted.install(Ledger())
    without = output(adapted.model, name)
    adapted = carrying(name, rank)
    merged = adapted.model.merge_and_unload()
    assert not any("lora" in key for key in merged.state_dict())
    assert (output(merged, name) - before).norm() <= 1e-5 * before.norm()
    assert (without - before).norm() > 1e-2 * before.norm()


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", KINDS)
def test_copies_are_whole_and_apart(name, rank):
    adapted = carrying(name, rank)
    before = output(adapted.model, name)
    copied = copy.deepcopy(adapted.model)
    adapted.install(Ledger())
    assert not torch.equal(output(adapted.model, name), before)
    assert torch.equal(output(copied, name), before)
    copied.requires_grad_(True)
    assert not any(each.requires_grad for each in carriers(copied).values())


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", KINDS)
def test_a_state_dictionary_goes_out_and_in(name, rank):
    adapted = carrying(name, rank)
    state = {key: tensor.clone() for key, tensor in adapted.model.state_dict().items()}
    before = output(adapted.model, name)
    adapted.install(Ledger().plus(residuals_of(adapted, rank, seed=1), adapted.sites))
    assert not torch.equal(output(adapted.model, name), before)
    adapted.model.load_state_dict(state)
    assert torch.equal(output(adapted.model, name), before)


def test_a_state_dictionary_with_another_factor_for_the_identity_is_refused():
    adapted = carrying("linear", RANKS["dense"])
    state = adapted.model.state_dict()
    key = next(key for key in state if f"lora_B.{CARRIER}" in key)
    with pytest.raises(RuntimeError, match="is no identity, and this layer's residual is dense"):
        adapted.model.load_state_dict(state | {key: 2 * state[key]})
    with pytest.raises(RuntimeError, match=f"Missing key.*{CARRIER}"):
        adapted.model.load_state_dict({name: tensor for name, tensor in state.items() if name != key})


@pytest.mark.parametrize("name", KINDS)
def test_factors_after_a_dense_residual_and_a_move(name):
    """`Identity` keeps the module that it stands for out of the model, so `.to` does not reach it."""
    adapted = carrying(name, RANKS["dense"])
    adapted.model.double()
    adapted.install(Ledger().plus(residuals_of(adapted, 3), adapted.sites))
    expected = output(carrying(name, 3).model, name)
    assert {each.dtype for each in carriers(adapted.model).values()} == {torch.float64}
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in SUPPORTED[name].inputs().items()}
    with torch.no_grad():
        found = adapted.model(**inputs).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
