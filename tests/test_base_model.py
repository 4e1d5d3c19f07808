"""Reading and writing the LoRA state of a model, the residual in its base weights, and what is refused."""

import copy

import numpy as np
import pytest
import tiny
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedex_hf import (
    AdaptedModel,
    ClientUpdate,
    FedExAggregator,
    Ledger,
    LowRankDelta,
    UnsupportedModelError,
)
from fedex_hf.low_rank import max_useful_rank


def with_lora(model, seed=3, **kwargs):
    """A `PeftModel` whose factors are both random: PEFT's own `lora_B` is zero."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | kwargs)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def roberta(**kwargs):
    return with_lora(tiny.roberta(), **({"task_type": "SEQ_CLS", "target_modules": ["query", "value"]} | kwargs))


def llama(**kwargs):
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    return with_lora(tiny.llama(), **({"task_type": "CAUSAL_LM", "target_modules": targets} | kwargs))


def gpt2(**kwargs):
    targets = ["c_attn", "c_proj", "c_fc"]
    return with_lora(
        tiny.gpt2(), **({"task_type": "CAUSAL_LM", "target_modules": targets, "fan_in_fan_out": True} | kwargs)
    )


def random_delta(site, rank, scaling=None, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        A=std * torch.randn(rank, site.A.shape[1], generator=generator),
        B=std * torch.randn(site.B.shape[0], rank, generator=generator),
        scaling=site.scaling if scaling is None else scaling,
    )


def residuals_of(adapted, rank=3, seed=0, std=0.1):
    return {
        name: random_delta(site, rank, seed=1000 * seed + index, std=std)
        for index, (name, site) in enumerate(adapted.sites.items())
    }


def expected_dense(delta, site):
    """The update in the layout of the base weight, by a formula of this file."""
    product = delta.scaling * (delta.B.double().numpy() @ delta.A.double().numpy())
    return product.T if isinstance(site.layer.get_base_layer(), Conv1D) else product


def error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


def base_weights(adapted):
    return {name: site.base_weight.detach().clone() for name, site in adapted.sites.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


MODELS = {
    "linear": roberta,
    "linear-rs": lambda: roberta(use_rslora=True, lora_bias=True),
    "linear-not-square": lambda: llama(rank_pattern={"k_proj": 1}, alpha_pattern={"up_proj": 3}),
    "conv1d": gpt2,
    "conv1d-rs": lambda: gpt2(use_rslora=True, r=8),
}
MODEL_CASES = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


# ---- Refusals ----


class Convolutional(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=groups)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)


class LoraOfTheirOwn(LoraLinear):
    """A subclass may compute anything."""


def layer_of_their_own():
    model = roberta()
    for name, module in model.named_modules():
        if name.endswith("layer.0.attention.self.query"):
            module.__class__ = LoraOfTheirOwn
    return model


class NormWithoutStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.head = nn.Linear(4, 2)


def two_active_adapters():
    model = gpt2()  # a classification head could have one active adapter only, says PEFT
    model.add_adapter("second", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged():
    model = roberta()
    model.merge_adapter()
    return model


def ia3():
    return get_peft_model(
        tiny.roberta(), IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
    )


REFUSED = {
    "no-lora": (tiny.roberta, "`RobertaForSequenceClassification` without LoRA. Pass `peft_config=LoraConfig"),
    "no-transformer": (lambda: nn.Linear(2, 2), "`Linear` without LoRA"),
    "ia3": (ia3, "of the type .*IA3.* Allowed: LORA.* Use a `LoraConfig`"),
    "loha": (
        lambda: get_peft_model(tiny.roberta(), LoHaConfig(target_modules=["query"])),
        "of the type .*LOHA.* Allowed: LORA",
    ),
    "prefix-tuning": (
        lambda: get_peft_model(tiny.llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "of the type .*PREFIX_TUNING.* Allowed: LORA",
    ),
    "two-active": (two_active_adapters, r"2 active adapters \(\['default', 'second'\]\).*`model.set_adapter\(name\)`"),
    "dora": (lambda: roberta(use_dora=True), r"`.*query` uses Dora.*full rank.*`use_dora`"),
    "alora": (
        lambda: llama(alora_invocation_tokens=[5, 6]),
        "`.*q_proj` uses ALora.*depends on the input.*plain LoRA and rsLoRA",
    ),
    "of-their-own": (layer_of_their_own, "`.*query` is a LoRA `LoraOfTheirOwn`.*never shown.*Supported.*`exclude_"),
    "grouped-conv": (
        lambda: with_lora(Convolutional(groups=2), target_modules=["conv"]),
        "`.*conv` is a convolution with 2 groups.*`exclude_modules`",
    ),
    "replicated": (
        lambda: llama(layer_replication=[(0, 2), (0, 1)]),
        r"`layer_replication=\[\(0, 2\), \(0, 1\)\]`.*share one base weight.*Replicate the layers in the model itself",
    ),
    "shared-factors": (
        lambda: with_lora(tied(tiny.llama()), target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        "`.*embed_tokens` and `.*lm_head` share their LoRA factors.*counted twice.*`ensure_weight_tying=False`",
    ),
    "merged": (merged, r"`.*query` holds a merged adapter.*`model.unmerge_adapter\(\)`"),
    "pissa": (
        lambda: roberta(init_lora_weights="pissa"),
        "`init_lora_weights='pissa'`, which has already changed the base weights.*together with `peft_config`",
    ),
    "olora": (
        lambda: roberta(init_lora_weights="olora"),
        "`init_lora_weights='olora'`, which has already changed the base weights.*together with `peft_config`",
    ),
    "needs-data": (
        lambda: roberta(init_lora_weights="eva"),
        r"`init_lora_weights='eva'` is not supported: .* needs data.*Allowed: True.*\"pissa\"",
    ),
    "batch-norm": (
        lambda: with_lora(Convolutional(), target_modules=["head"]),
        "`.*norm` keeps running statistics.*`track_running_stats=False`",
    ),
}


@pytest.mark.parametrize("changes_base", [True, False])
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused(make, message, changes_base):
    with pytest.raises(UnsupportedModelError, match=message):
        AdaptedModel(make(), changes_base)


def bfloat16():
    return with_lora(tiny.roberta().bfloat16(), target_modules=["query"])


def tied(model):
    """Token embedding and head as one tensor."""
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def tied_head():
    """GPT-2's `lm_head` is its token embedding."""
    return gpt2(target_modules=["c_attn", "lm_head"], fan_in_fan_out=False)


NOT_IN_THE_BASE = {
    "bfloat16": (bfloat16, r"`.*query` is torch.bfloat16.*residual_storage=\"adapter\".*`dtype=torch.float32`"),
    "float16": (
        lambda: with_lora(tiny.llama().half(), target_modules=["k_proj"]),
        "`.*k_proj` is torch.float16.*`dtype=torch.float32`",
    ),
    "tied-head": (tied_head, r"`.*lm_head` is one tensor with several places.*wte.*`tie_word_embeddings=False`"),
    "tied-embedding": (
        lambda: with_lora(tied(tiny.llama()), target_modules=["embed_tokens"]),
        r"`.*embed_tokens` is one tensor with several places.*lm_head.*`tie_word_embeddings=False`",
    ),
}


@pytest.mark.parametrize(("make", "message"), NOT_IN_THE_BASE.values(), ids=NOT_IN_THE_BASE)
@pytest.mark.filterwarnings("ignore")
def test_what_the_base_cannot_hold_goes_beside_it(make, message):
    model = make()
    names = set(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        AdaptedModel(model, changes_base=True, storage="base")
    assert set(model.state_dict()) == names  # a refusal leaves it as it was
    assert AdaptedModel(model, changes_base=False).storage == "base"  # where nothing is added, nothing is lost
    assert AdaptedModel(model, changes_base=True).storage == "adapter"


def test_a_float32_base_holds_the_residual_unless_asked_otherwise():
    assert AdaptedModel(roberta(), changes_base=True).storage == "base"
    assert AdaptedModel(roberta(), changes_base=True, storage="base").storage == "base"
    assert AdaptedModel(roberta(), changes_base=True, storage="adapter").storage == "adapter"
    with pytest.raises(ValueError, match=r"`residual_storage='disk'`. Allowed: 'auto', 'base', 'adapter'"):
        AdaptedModel(roberta(), changes_base=True, storage="disk")


def trainable_base():
    """A base weight that clients would train as well: the next installation would throw its change away."""
    model = roberta()
    for name, parameter in model.named_parameters():
        if name.endswith("query.base_layer.weight"):
            parameter.requires_grad_(True)
    return model


def test_a_base_weight_that_is_trained_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"query.*requires_grad"):
        AdaptedModel(trainable_base(), changes_base=True)


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    """`PeftModel.from_pretrained` freezes the adapter unless it is told `is_trainable=True`."""
    roberta().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.roberta(), tmp_path)
    with pytest.raises(UnsupportedModelError, match="is_trainable=True"):
        AdaptedModel(loaded, changes_base=True)
    assert AdaptedModel(
        PeftModel.from_pretrained(tiny.roberta(), tmp_path, is_trainable=True), changes_base=True
    ).sites


@pytest.mark.parametrize(
    "make",
    [
        roberta,
        lambda: roberta(use_rslora=True, bias="all", lora_bias=True),
        lambda: roberta(init_lora_weights="gaussian"),
        lambda: with_lora(tiny.t5(), target_modules=["q", "wo"]),
        lambda: with_lora(NormWithoutStatistics(), target_modules=["head"]),
        lambda: with_lora(tiny.roberta().bfloat16().float(), target_modules=["query"]),
    ],
)
def test_accepted(make):
    assert AdaptedModel(make(), changes_base=True).sites


def test_an_adapter_that_is_not_active_is_not_read():
    model = roberta()
    model.add_adapter("other", tiny.lora(r=2, target_modules=["key"]))
    model.set_adapter("default")
    adapted = AdaptedModel(model, changes_base=True)
    assert adapted.adapter == "default"
    assert {name.rsplit(".", 1)[1] for name in adapted.sites} == {"query", "value"}
    model.set_adapter("other")
    adapted = AdaptedModel(model, changes_base=True)
    assert {name.rsplit(".", 1)[1] for name in adapted.sites} == {"key"}
    assert all("other" in name for name in adapted.tensors)


def test_refusals_are_value_errors():
    assert issubclass(UnsupportedModelError, ValueError)


# ---- A factored update in a weight ----


@MODEL_CASES
def test_dense_is_what_peft_merges(make):
    model = make().double()  # so that nothing is rounded away in the comparison
    adapted = AdaptedModel(model, changes_base=False)
    before = base_weights(adapted)
    dense = {name: site.dense(site.read()) for name, site in adapted.sites.items()}
    model.merge_adapter()
    for name, site in adapted.sites.items():
        assert dense[name].dtype == torch.float64
        assert dense[name].shape == site.base_weight.shape
        assert error(dense[name], (site.base_weight.detach() - before[name]).numpy()) < 1e-12


@MODEL_CASES
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_dense_of_any_rank_and_scaling(make, rank):
    for site in AdaptedModel(make(), changes_base=True).sites.values():
        for scaling in (0.7, -3.0, site.scaling):
            delta = random_delta(site, rank, scaling)
            assert error(site.dense(delta), expected_dense(delta, site)) < 1e-14


def test_scaling_is_that_of_peft():
    sites = AdaptedModel(
        roberta(r=4, lora_alpha=6, rank_pattern={"value": 1}, use_rslora=True), changes_base=True
    ).sites
    assert {name.rsplit(".", 1)[1]: site.scaling for name, site in sites.items()} == {"query": 3.0, "value": 6.0}


def test_dense_leaves_the_layer_ready_to_train():
    model = gpt2()
    adapted = AdaptedModel(model, changes_base=True)
    parameters = dict(model.named_parameters())
    inputs = torch.arange(3, 11)[None]

    def step(with_dense):
        copied = copy.deepcopy(model)
        sites = AdaptedModel(copied, changes_base=True).sites
        optimizer = torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=0.1)
        losses = []
        copied.eval()
        for _ in range(3):
            loss = copied(input_ids=inputs, labels=inputs).loss
            loss.backward()
            if with_dense:  # between backward and step, where a lost gradient or parameter would be noticed
                for site in sites.values():
                    site.dense(random_delta(site, 7))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, {name: parameter.detach() for name, parameter in copied.named_parameters()}

    plain_losses, plain = step(with_dense=False)
    losses, trained = step(with_dense=True)
    assert losses == plain_losses
    assert losses[0] > losses[-1]
    assert same(trained, plain)

    model(input_ids=inputs, labels=inputs).loss.backward()
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    trainable = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for site in adapted.sites.values():
        site.dense(random_delta(site, 7))
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    for name, parameter in now.items():
        assert parameter is parameters[name]
        assert parameter.grad is gradients[name]
        assert parameter.requires_grad == trainable[name]
        assert torch.equal(parameter, values[name])
    assert any(gradient is not None for gradient in gradients.values())


# ---- Reading and writing ----


@pytest.mark.parametrize(
    ("make", "others"),
    [
        (roberta, {"classifier.modules_to_save.default.dense.weight"}),
        (lambda: roberta(bias="lora_only"), {"encoder.layer.1.attention.self.query.base_layer.bias"}),
        (lambda: roberta(lora_bias=True), {"encoder.layer.0.attention.self.query.lora_B.default.bias"}),
        (lambda: llama(trainable_token_indices=[3, 5]), {"embed_tokens.token_adapter.trainable_tokens_delta.default"}),
        (gpt2, set()),
    ],
)
def test_everything_that_is_trained_is_read_once(make, others):
    model = make()
    adapted = AdaptedModel(model, changes_base=True)
    state = adapted.read()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"{name}.lora_{letter}.default.weight" for name in state.adapters for letter in ("A", "B")}
    assert factors | set(state.tensors) == trained
    assert not factors & set(state.tensors)
    for suffix in others:
        assert [name for name in state.tensors if name.endswith(suffix)]
    if not others:
        assert state.tensors == {}
    assert state.residuals == {}
    parameters = dict(model.named_parameters())
    for name, delta in state.adapters.items():
        assert torch.equal(delta.A, parameters[f"{name}.lora_A.default.weight"])
        assert torch.equal(delta.B, parameters[f"{name}.lora_B.default.weight"])
    for name, tensor in state.tensors.items():
        assert torch.equal(tensor, parameters[name])


@pytest.mark.parametrize(
    "make", [roberta, lambda: roberta(bias="all", lora_bias=True), gpt2, bfloat16, lambda: llama(use_rslora=True)]
)
def test_write_restores_what_was_read(make):
    model = make()
    adapted = AdaptedModel(model, changes_base=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    state = adapted.read()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    # What was read is a copy: the change above did not reach it, and the next one will not either.
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapted.write(state)
    assert same({name: parameter.detach() for name, parameter in model.named_parameters()}, before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for delta in state.adapters.values():
        delta.A.zero_()
        delta.B.zero_()
    assert same({name: parameter.detach() for name, parameter in model.named_parameters()}, before)


# ---- The residual in the base ----


@MODEL_CASES
def test_install_adds_the_ledger_to_the_original(make):
    model = make()
    adapted = AdaptedModel(model, changes_base=True)
    others = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not name.endswith("base_layer.weight")
    }
    originals = base_weights(adapted)
    identities = {name: site.base_weight for name, site in adapted.sites.items()}
    residuals = residuals_of(adapted)
    adapted.install(Ledger().plus(residuals, adapted.sites))
    for name, site in adapted.sites.items():
        expected = originals[name].double().numpy() + expected_dense(residuals[name], site)
        assert site.base_weight is identities[name]
        assert not site.base_weight.requires_grad
        rounding = error(expected.astype(np.float32), expected)
        assert error(site.base_weight.numpy(force=True), expected) < 3 * rounding < 1e-7
        # The twin: in the wrong layout, or not at all, this could not hold.
        assert error(originals[name], expected) > 0.1
    now = {name: parameter.detach() for name, parameter in model.named_parameters() if name in others}
    assert same(now, others)


@MODEL_CASES
def test_install_is_idempotent_and_reversible(make):
    adapted = AdaptedModel(make(), changes_base=True)
    originals = base_weights(adapted)
    ledgers = [Ledger()]
    for seed in range(4):
        ledgers.append(ledgers[-1].plus(residuals_of(adapted, seed=seed), adapted.sites))
    installed = []
    for ledger in ledgers:
        adapted.install(ledger)
        installed.append(base_weights(adapted))
        adapted.install(ledger)
        assert same(base_weights(adapted), installed[-1])
    assert not same(installed[1], installed[2])
    for index in (2, 4, 1, 0, 3, 0):  # any round, in any order, to the bit
        adapted.install(ledgers[index])
        assert same(base_weights(adapted), installed[index])
    assert same(base_weights(adapted), originals)


def test_install_touches_only_layers_of_the_ledger():
    adapted = AdaptedModel(roberta(), changes_base=True)
    originals = base_weights(adapted)
    name, *others = adapted.sites
    adapted.install(Ledger().plus({name: residuals_of(adapted)[name]}, adapted.sites))
    assert not torch.equal(adapted.sites[name].base_weight, originals[name])
    assert all(torch.equal(adapted.sites[other].base_weight, originals[other]) for other in others)
    assert set(adapted.originals) == {name}
    other = others[0]
    adapted.install(Ledger().plus({other: residuals_of(adapted)[other]}, adapted.sites))
    assert torch.equal(adapted.sites[name].base_weight, originals[name])
    assert not torch.equal(adapted.sites[other].base_weight, originals[other])


def test_base_weight_at_any_ledger():
    adapted = AdaptedModel(gpt2(), changes_base=True)
    originals = base_weights(adapted)
    first = Ledger().plus(residuals_of(adapted), adapted.sites)
    name = next(iter(adapted.sites))
    expected = adapted.base_weight_at(name, first)  # before anything was installed
    adapted.install(first)
    assert torch.equal(adapted.sites[name].base_weight, expected)
    assert torch.equal(adapted.base_weight_at(name, first), expected)
    assert torch.equal(adapted.base_weight_at(name, Ledger()), originals[name])


def test_many_rounds_do_not_drift():
    """The base is rounded once from the original, not once per round: the twin adds in place and drifts."""
    adapted = AdaptedModel(llama(), changes_base=True)
    ledger = Ledger()
    name, site = next(iter(adapted.sites.items()))
    original = site.base_weight.detach().double().numpy()
    exact, in_place = original.copy(), site.base_weight.detach().clone()
    for seed in range(40):
        residuals = residuals_of(adapted, rank=1, seed=seed, std=0.01)
        ledger = ledger.plus(residuals, adapted.sites)
        adapted.install(ledger)
        dense = expected_dense(residuals[name], site)
        exact += dense
        in_place += torch.from_numpy(dense).float()
    assert error(site.base_weight.detach().double(), exact) < 1e-7
    assert np.linalg.norm(in_place.double().numpy() - exact) > 2 * np.linalg.norm(
        site.base_weight.detach().double().numpy() - exact
    )


# ---- The ledger ----


@MODEL_CASES
def test_the_ledger_turns_dense_where_factors_stop_paying(make):
    adapted = AdaptedModel(make(), changes_base=True)
    originals = base_weights(adapted)
    ledger, rank = Ledger(), 3
    sums = dict.fromkeys(adapted.sites, 0.0)
    kinds = {name: [] for name in adapted.sites}
    for seed in range(14):
        residuals = residuals_of(adapted, rank, seed=seed)
        ledger = ledger.plus(residuals, adapted.sites)
        assert ledger.layers() == set(adapted.sites)
        assert not ledger.factors.keys() & ledger.matrices.keys()
        adapted.install(ledger)
        for name, site in adapted.sites.items():
            sums[name] = sums[name] + expected_dense(residuals[name], site)
            assert error(ledger.dense(name, site), sums[name]) < 1e-6
            expected = originals[name].double().numpy() + sums[name]
            assert error(site.base_weight.detach().double(), expected) < 1e-6
            kinds[name].append("factors" if name in ledger.factors else "matrix")
            if name in ledger.factors:
                assert ledger.factors[name].nbytes < 4 * expected.size
                assert ledger.factors[name].A.dtype == torch.float32
            else:
                assert ledger.matrices[name].shape == site.base_weight.shape
                assert ledger.matrices[name].dtype == torch.float32
    for name, site in adapted.sites.items():
        threshold = max_useful_rank(random_delta(site, 1))
        expected = ["factors" if rank * rounds < threshold else "matrix" for rounds in range(1, 15)]
        assert kinds[name] == expected
        assert set(expected) == {"factors", "matrix"}


def test_a_residual_of_large_rank_is_dense_at_once():
    adapted = AdaptedModel(llama(), changes_base=True)
    residuals = residuals_of(adapted, rank=200)
    ledger = Ledger().plus(residuals, adapted.sites)
    assert not ledger.factors
    for name, site in adapted.sites.items():
        assert error(ledger.dense(name, site), expected_dense(residuals[name], site)) < 1e-6


def test_plus_leaves_the_old_ledger_as_it_is():
    adapted = AdaptedModel(roberta(), changes_base=True)
    ledgers = [Ledger()]
    for seed in range(6):  # across the change from factors to a matrix
        ledgers.append(ledgers[-1].plus(residuals_of(adapted, rank=4, seed=seed), adapted.sites))
    name, site = next(iter(adapted.sites.items()))
    total = 0.0
    assert ledgers[0].layers() == set()
    assert ledgers[0].dense(name, site) is None
    for seed, ledger in enumerate(ledgers[1:]):
        total = total + expected_dense(residuals_of(adapted, rank=4, seed=seed)[name], site)
        assert error(ledger.dense(name, site), total) < 1e-6
    assert name in ledgers[1].factors
    assert name in ledgers[-1].matrices


def test_plus_nothing_changes_nothing():
    adapted = AdaptedModel(roberta(), changes_base=True)
    ledger = Ledger().plus(residuals_of(adapted), adapted.sites)
    again = ledger.plus({}, adapted.sites)
    assert again.factors.keys() == ledger.factors.keys() == adapted.sites.keys()
    for name, delta in ledger.factors.items():
        assert torch.equal(again.factors[name].A, delta.A)
        assert torch.equal(again.factors[name].B, delta.B)
    assert again.matrices == ledger.matrices == {}


def test_the_ledger_of_real_aggregation_keeps_the_sum():
    """Rounds of FedEx-LoRA on one model, through the change to a matrix: base = original + all residuals."""
    adapted = AdaptedModel(gpt2(), changes_base=True)
    originals = base_weights(adapted)
    ledger, sums = Ledger(), dict.fromkeys(adapted.sites, 0.0)
    for round in range(1, 9):
        updates = [
            ClientUpdate(
                f"client-{client}",
                round,
                10,
                {
                    name: random_delta(site, 4, site.scaling, seed=100 * round + client, std=0.3)
                    for name, site in adapted.sites.items()
                },
            )
            for client in range(3)
        ]
        update = FedExAggregator().aggregate(updates, [1, 2, 3])
        ledger = ledger.plus(update.residuals, adapted.sites)
        adapted.write(update)
        adapted.install(ledger)
        for name, site in adapted.sites.items():
            ideal = sum(w / 6 * expected_dense(u.adapters[name], site) for w, u in zip([1, 2, 3], updates))
            fedit = expected_dense(site.read(), site)
            sums[name] = sums[name] + ideal - fedit
            expected = originals[name].double().numpy() + sums[name]
            assert error(site.base_weight.detach().double(), expected) < 1e-6
    assert ledger.matrices


def test_factors_have_the_scaling_of_the_layer():
    """Checkpoints do not store a scaling: a method may return residuals of any."""
    adapted = AdaptedModel(roberta(), changes_base=True)
    name, site = next(iter(adapted.sites.items()))
    first, second = random_delta(site, 3, 0.7), random_delta(site, 3, -5.0, seed=1)
    ledger = Ledger().plus({name: first}, adapted.sites).plus({name: second}, adapted.sites)
    assert ledger.factors[name].scaling == site.scaling == 2.0
    expected = expected_dense(first, site) + expected_dense(second, site)
    assert error(ledger.dense(name, site), expected) < 1e-6
    half = LowRankDelta(first.A.bfloat16(), first.B.bfloat16(), 0.7)
    ledger = Ledger().plus({name: half}, adapted.sites)
    assert ledger.factors[name].A.dtype == torch.float32
    assert error(ledger.dense(name, site), expected_dense(half, site)) < 1e-6


def test_the_ledger_does_not_grow_where_rounds_repeat_themselves():
    adapted = AdaptedModel(roberta(), changes_base=True)
    residuals = residuals_of(adapted, rank=2)
    ledger, ranks = Ledger(), []
    name, site = next(iter(adapted.sites.items()))
    for rounds in range(1, 21):
        ledger = ledger.plus(residuals, adapted.sites)
        ranks.append(ledger.factors[name].rank)
        assert error(ledger.dense(name, site), rounds * expected_dense(residuals[name], site)) < 1e-6
    assert max(ranks) < 8
    assert not ledger.matrices


@pytest.mark.parametrize("storage", ["base", "adapter"])
def test_a_ledger_of_bounded_rank_is_the_best_approximation(storage):
    adapted = AdaptedModel(llama(), changes_base=True, storage=storage)
    ledger = Ledger()
    for seed in range(4):
        residuals = residuals_of(adapted, rank=4, seed=seed)
        before = {name: ledger.dense(name, site) for name, site in adapted.sites.items()}
        ledger = ledger.plus(residuals, adapted.sites, rank=6)
        lost = whole = 0.0
        for name, site in adapted.sites.items():
            total = expected_dense(residuals[name], site) + (0.0 if before[name] is None else before[name].numpy())
            U, S, Vh = np.linalg.svd(total)
            assert ledger.factors[name].rank == min(6, 4 * (seed + 1))
            assert error(ledger.dense(name, site), (U[:, :6] * S[:6]) @ Vh[:6]) < 1e-5
            lost, whole = lost + np.square(S[6:]).sum(), whole + np.square(S).sum()
        assert ledger.lost_energy == pytest.approx(lost / whole, rel=1e-4, abs=1e-12)
        assert (ledger.lost_energy == 0.0) == (seed == 0)
        adapted.install(ledger)
        for name, site in adapted.sites.items():
            held = adapted.installed(name) - adapted.installed_at(name, Ledger())
            assert error(held, ledger.dense(name, site).numpy()) < 1e-4
    assert ledger.plus({}, adapted.sites, rank=6).lost_energy == 0.0  # of the last round, and it added nothing


def test_a_tolerance_counts_each_round_and_a_dense_sum_keeps_all():
    adapted = AdaptedModel(roberta(), changes_base=True)
    name, site = next(iter(adapted.sites.items()))
    large, small = random_delta(site, 2, std=1.0), random_delta(site, 2, std=0.03, seed=1)
    ledger = Ledger().plus({name: large}, adapted.sites, tolerance=1e-3)
    assert (ledger.factors[name].rank, ledger.lost_energy) == (2, 0.0)
    ledger = ledger.plus({name: small}, adapted.sites, tolerance=1e-3)
    assert ledger.factors[name].rank == 2
    assert 0 < ledger.lost_energy < 1e-3
    before = ledger.dense(name, site)
    flat = random_delta(site, 40, seed=2)  # nothing to cut: larger as factors than as a matrix
    ledger = ledger.plus({name: flat}, adapted.sites, rank=30, tolerance=1e-3)
    assert ledger.lost_energy == 0.0
    assert error(ledger.matrices[name], before.numpy() + expected_dense(flat, site)) < 1e-6
