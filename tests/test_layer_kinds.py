"""Every kind of LoRA layer on every kind of base, from the list that the docs and benchmarks share.

Effective weights are read from the live model and multiplied out in float64 by the formulas of `effective.py`; that
they are what the model computes with is shown by its output.
"""

import copy
import re
from pathlib import Path

import bitsandbytes
import exactness
import layer_kinds
import pytest
import storage
import tiny
import torch
from _common import Size
from effective import base, base_bytes, effective, mean, modules_of, norm, parameter_name, same, update_of
from layer_kinds import REFUSED, SUPPORTED, Kind
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

from fedex_hf import (
    ClientUpdate,
    FederatedTrainer,
    FedExAggregator,
    FFALoRAAggregator,
    GlobalUpdate,
    LowRankDelta,
    UnsupportedModelError,
)
from fedex_hf.base_model import AdaptedModel


TOLERANCE = 1e-5
WEIGHTS = [5, 6, 9]
DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's about tied weights, PiSSA, Conv1D


# ---- A federation without training ----


def perturbed(state, seed, std=0.1):
    """What a client could have made of the global state."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor):
        return tensor + std * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    adapters = {
        name: LowRankDelta(moved(each.A), moved(each.B), each.scaling) for name, each in state.adapters.items()
    }
    return GlobalUpdate(adapters, {name: moved(tensor) for name, tensor in state.tensors.items()})


def no_fault(update):
    return update


class Federation:
    """Rounds of a model: before, each client's, and after, as the live model held it."""

    def __init__(self, kind: Kind, storage="auto", aggregator=None):
        self.adapted = kind.federated(storage)
        self.model = self.adapted.model
        self.aggregator = aggregator or FedExAggregator()
        self.aggregator.configure_model(self.model)
        self.ideals, self.tensors = {}, {}
        self.start = effective(self.model)
        self.before = self.start

    def round(self, number, fault=no_fault, install=True):
        adapted, state, ledger = self.adapted, self.adapted.read(), self.adapted.ledger
        self.before = effective(self.model)
        clients, updates = [], []
        for client in range(len(WEIGHTS)):
            local = perturbed(state, seed=100 * number + client)
            if self.aggregator.trained_factors == ("B",):
                kept = {n: LowRankDelta(state.adapters[n].A, d.B, d.scaling) for n, d in local.adapters.items()}
                local = GlobalUpdate(kept, local.tensors)
            adapted.write(local)
            clients.append(effective(self.model))
            updates.append(ClientUpdate(f"client-{client}", number, WEIGHTS[client], local.adapters, local.tensors))
        self.ideals = {name: mean([client[name] for client in clients], WEIGHTS) for name in self.before}
        self.tensors = {name: mean([update.tensors[name] for update in updates], WEIGHTS) for name in adapted.tensors}
        update = fault(self.aggregator.aggregate(updates, WEIGHTS))
        adapted.write(update)
        if install:
            adapted.install(ledger.plus(update.residuals, adapted.sites))
        return self

    def error(self):
        """Relative to the round's change, over all layers."""
        now = effective(self.model)
        lost = norm([now[name] - self.ideals[name] for name in now])
        return lost / norm([self.ideals[name] - self.before[name] for name in now])

    def assert_exact(self):
        now = effective(self.model)
        for name, ideal in self.ideals.items():
            error = norm([now[name] - ideal]) / norm([ideal - self.before[name]])
            assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"
        for name, tensor in self.adapted.tensors.items():
            half = tensor.dtype in (torch.bfloat16, torch.float16)
            error = norm([tensor.detach().double() - self.tensors[name]]) / norm([self.tensors[name]])
            assert error <= (torch.finfo(tensor.dtype).eps if half else 1e-6), name


def output(model, kind, dtype):
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in kind.inputs().items()}
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def with_weights(model, weights):
    """A copy in float64 whose base weights are these, and whose adapters add nothing."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, module in modules_of(model).items():
            weight = nn.Parameter(weights[name].clone(), requires_grad=False)  # a new one: the old may be tied
            setattr(module.get_base_layer(), parameter_name(module), weight)
            if isinstance(module, lora.Embedding):
                factors = module.lora_embedding_A.values()
            else:
                factors = [each.weight for each in module.lora_A.values()]
            for factor in factors:
                factor.zero_()
    return model


def assert_output_of(federation, kind):
    """The model computes with the ideal effective weights."""
    model = federation.model
    if kind.base in layer_kinds.QUANTIZED:
        return assert_layers_add_their_update(federation, kind)
    ideal = output(with_weights(model, federation.ideals), kind, torch.float64)
    found = output(copy.deepcopy(model).double().eval(), kind, torch.float64)
    start = output(with_weights(model, federation.start), kind, torch.float64)
    change = norm([ideal - start])
    assert change > 1e-3 * norm([start])
    assert norm([found - ideal]) <= 1e-4 * change
    return None


def assert_layers_add_their_update(federation, kind):
    """Quantized layers: what a layer computes beyond its base layer is its input times the ideal update."""
    seen = {}
    modules = modules_of(federation.model)
    names = {module: name for name, module in modules.items()}

    def look(module, args, out):
        seen[names[module]] = (args[0], out)

    hooks = [module.register_forward_hook(look) for module in modules.values()]
    output(federation.model.eval(), kind, torch.float32)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == modules.keys()
    for name, (x, out) in seen.items():
        with torch.no_grad():
            added = (out - modules[name].base_layer(x)).double()
        expected = x.double() @ (federation.ideals[name] - base(modules[name])).T
        assert norm([added - expected]) <= 1e-4 * norm([expected]), name


# ---- What is supported ----


@pytest.mark.parametrize("kind", SUPPORTED.values(), ids=SUPPORTED)
def test_exact_after_every_round(kind):
    federation = Federation(kind)
    assert federation.adapted.storage == kind.storage
    original = base_bytes(federation.model)
    for number in range(1, 4):
        federation.round(number).assert_exact()
    assert_output_of(federation, kind)
    assert same(base_bytes(federation.model), original) == (kind.storage == "adapter")


BOTH_WAYS = [kind for kind in SUPPORTED.values() if kind.storage == "base" and kind.name not in layer_kinds.NOT_BESIDE]


@pytest.mark.parametrize("kind", BOTH_WAYS, ids=[kind.name for kind in BOTH_WAYS])
def test_a_float32_base_can_be_left_alone(kind):
    federation = Federation(kind, storage="adapter")
    original = base_bytes(federation.model)
    for number in range(1, 3):
        federation.round(number).assert_exact()
    assert same(base_bytes(federation.model), original)
    assert_output_of(federation, kind)


def without_residual(update):
    return GlobalUpdate(update.adapters, update.tensors)


def unscaled(update):
    residuals = {name: LowRankDelta(each.A, each.B, 1.0) for name, each in update.residuals.items()}
    return GlobalUpdate(update.adapters, update.tensors, residuals)


def transposed(update):
    """Where the layer is square, or it would not even fit."""
    residuals = {
        name: LowRankDelta(each.B.mT, each.A.mT, each.scaling) if each.in_features == each.out_features else each
        for name, each in update.residuals.items()
    }
    return GlobalUpdate(update.adapters, update.tensors, residuals)


TWINS = {
    "fedit": ({"fault": without_residual}, list(SUPPORTED)),
    "unscaled": ({"fault": unscaled}, list(SUPPORTED)),
    "not-installed": ({"install": False}, ["linear", "linear-bfloat16", "conv2d-float16", "linear-nf4", "experts"]),
    "transposed": ({"fault": transposed}, ["linear", "conv1d-gpt2", "attention", "linear-nf4", "linear-bfloat16"]),
}


@pytest.mark.parametrize("twin", TWINS)
def test_the_assertion_fails_for(twin):
    wrong, kinds = TWINS[twin]
    for name in kinds:
        federation = Federation(SUPPORTED[name]).round(1, **wrong)
        assert federation.error() > 100 * TOLERANCE, name
        with pytest.raises(AssertionError, match="relative error"):
            federation.assert_exact()


@pytest.mark.parametrize("name", ["linear-bfloat16", "embedding-bfloat16", "conv2d", "linear-nf4"])
def test_the_output_is_another_one_without_the_carrier(name):
    kind = SUPPORTED[name]
    federation = Federation(kind, storage="adapter").round(1)
    assert_output_of(federation, kind)
    for module in modules_of(federation.model).values():
        module.set_adapter(["default"])
    with pytest.raises(AssertionError):
        assert_output_of(federation, kind)


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa-fast", "pissa-bfloat16", "olora-bfloat16"])
def test_a_start_that_peft_takes_out_of_the_base_is_the_residual_of_round_0(name):
    kind = SUPPORTED[name]
    adapted = kind.federated()
    plain = dict(kind.plain().named_parameters())
    for layer, site in adapted.sites.items():
        weight = plain[site.weight_name].detach().double()
        module = modules_of(adapted.model)[layer]
        taken = update_of(module, "default")
        assert norm([taken]) > 0.1 * norm([weight])  # it starts from the weight, and not from nothing
        found = effective(adapted.model)[layer]
        assert norm([found - weight]) <= 1e-6 * norm([weight])
        # PEFT's own way in bfloat16 would not pass: it rounds what is left of the weight.
        rounded = (weight - taken).to(site.base_weight.dtype).double() + taken
        assert (norm([rounded - weight]) <= 1e-6 * norm([weight])) == (kind.base == "float32")
    if kind.storage == "adapter":
        for site in adapted.sites.values():
            assert torch.equal(site.base_weight, plain[site.weight_name])


@pytest.mark.parametrize("name", ["tied-embedding", "tied-head", "tied-embedding-bfloat16"])
def test_of_tied_weights_only_the_adapted_end_changes(name):
    """The other end keeps the base weight, which is still one tensor."""
    federation = Federation(SUPPORTED[name]).round(1)
    inner = federation.model.get_base_model()
    ends = {"embedding": inner.model.embed_tokens, "head": inner.lm_head}
    adapted = "head" if "head" in name else "embedding"
    other = ends.pop("embedding" if adapted == "head" else "head")
    assert other.weight is ends[adapted].get_base_layer().weight
    layer = next(layer for layer, module in modules_of(federation.model).items() if module is ends[adapted])
    assert norm([federation.ideals[layer] - other.weight.detach().double()]) > 0.1 * norm([federation.ideals[layer]])
    with pytest.raises(UnsupportedModelError, match="one tensor with several places"):
        SUPPORTED[name.removesuffix("-bfloat16")].federated(storage="base")


# ---- What is refused ----


@pytest.mark.parametrize("kind", REFUSED.values(), ids=REFUSED)
def test_refused_with_its_reason(kind):
    with pytest.raises(UnsupportedModelError) as raised:
        kind.federated()
    assert kind.says in str(raised.value)


@pytest.mark.parametrize("name", layer_kinds.NOT_BESIDE)
def test_no_adapter_beside_what_peft_adds_in_the_dtype_of_the_weight(name):
    with pytest.raises(UnsupportedModelError, match=r"beside the weight would not be exact.*You asked for `adapter`"):
        SUPPORTED[name].federated(storage="adapter")


@pytest.mark.parametrize("name", ["linear-bfloat16", "linear-nf4", "linear-int8"])
def test_no_residual_in_a_base_that_would_round_it_away(name):
    with pytest.raises(UnsupportedModelError, match=r"q_proj` is (torch.bfloat16|quantized).*dtype=torch.float32"):
        SUPPORTED[name].federated(storage="base")


def test_a_quantized_weight_in_float32_storage_is_no_float32_weight():
    """`bnb_4bit_quant_storage` packs the integers into any dtype."""
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 48, quant_type="nf4", quant_storage=torch.float32)).to("cpu")
    model.is_loaded_in_4bit = True
    model = layer_kinds.get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    adapted = AdaptedModel(model, changes_base=True)
    (site,) = adapted.sites.values()
    assert site.base_weight.dtype == torch.float32
    assert adapted.storage == "adapter"
    assert site.dense_shape == (48, 64)


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_evaluation_does_not_pack_four_bit_weights_anew(evaluated_before):
    """bitsandbytes does on some CPUs, and rounds their scales; here only what it did before is left."""
    plain = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")).to("cpu").eval()
    plain.is_loaded_in_4bit = True
    inputs = torch.randn(3, 64)
    weight = base(layer_kinds.get_peft_model(plain, LoraConfig(r=2, target_modules=["0"])).base_model.model[0])
    if evaluated_before:
        plain(inputs)
    model = layer_kinds.get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))
    AdaptedModel(model, changes_base=True)
    stored = base_bytes(model)
    assert norm([base(model.base_model.model[0]) - weight]) <= (1e-2 if evaluated_before else 0) * norm([weight])
    with torch.no_grad():
        for each in (model.eval(), model.train()):
            each(inputs)
    assert same(base_bytes(model), stored)


def test_the_docs_list_the_same():
    page = (DOCS / "limits.md").read_text()
    for part in (layer_kinds.supported_table(), layer_kinds.options(), layer_kinds.refused_table()):
        assert part in page, "out of date: take what `python benchmarks/layer_kinds.py` prints"


# ---- FFA-LoRA ----


@pytest.mark.parametrize("name", ["linear-bfloat16", "conv2d", "conv3d-float16", "attention", "experts", "linear-nf4"])
def test_ffa_freezes_a_of_every_kind(name):
    federation = Federation(SUPPORTED[name], aggregator=FFALoRAAggregator())
    for site in federation.adapted.sites.values():
        assert [each.requires_grad for each in site.parameters] == [False, True]
    federation.round(1).round(2).assert_exact()


def test_ffa_refuses_an_embedding_whose_a_starts_at_zero():
    adapted = SUPPORTED["embedding"].federated()
    with pytest.raises(ValueError, match=r"embed_tokens` is an embedding.*A = 0.*trainable_token_indices"):
        FFALoRAAggregator().configure_model(adapted.model)


# ---- Attention layers, in which PEFT folds adapters in and out ----


class AttentionClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tiny.VOCAB, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, tiny.LABELS)

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        logits = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_client_does_not_depend_on_who_trained_before_it(tmp_path):
    def trainer():
        return FederatedTrainer(
            AttentionClassifier(),
            tiny.arguments(tmp_path, num_rounds=2),
            train_dataset=tiny.clients_of([12, 12]),
            peft_config=LoraConfig(r=2, lora_alpha=3, target_modules=["attention"]),
        )

    together, alone = trainer(), trainer()
    in_proj = next(name for name in together.adapted.sites if name.endswith("attention"))
    original = together.adapted.original(in_proj).clone()
    together.fit_client("client-0", 1)
    left = together.adapted.sites[in_proj].base_weight.detach().clone()
    assert not torch.equal(left, original)  # the twin: what a fit leaves behind is not what it began with
    second, only = together.fit_client("client-1", 1), alone.fit_client("client-1", 1)
    for name in only.adapters:
        assert torch.equal(second.adapters[name].A, only.adapters[name].A)
        assert torch.equal(second.adapters[name].B, only.adapters[name].B)
    output = together.train()
    assert output.metrics["max_aggregation_error"] <= TOLERANCE


# ---- The benchmarks ----


@pytest.mark.parametrize("name", ["linear", "linear-bfloat16", "embedding-float16", "linear-nf4", "linear-int8"])
def test_measured_error_after_many_rounds(name):
    """Small changes as they are measured for the docs, beside residuals that are added in place."""
    kind = SUPPORTED[name]
    found = exactness.measure(kind, [1, 3], residual=1e-3)
    assert list(found) == [1, 3]
    for errors in found.values():
        assert 0 < errors.auto <= TOLERANCE
        assert (errors.in_place > TOLERANCE) == (kind.base != "float32")
        low, high = {"float32": (0, 1e-4), "bfloat16": (0.6, 1), "float16": (0.1, 0.4)}.get(kind.base, (1, 3))
        assert low < errors.lost < high


def test_exactness_writes_a_page_and_the_answer_of_the_overview(tmp_path, monkeypatch, capsys):
    folder, overview = tmp_path / "benchmarks", tmp_path / "benchmarks.md"
    rows = [f"| {name}? | [{name}](benchmarks/{name}.md) | as it was |\n" for name in ("storage", "exactness")]
    overview.write_text("".join(["# Overview of benchmarks/exactness.md\n", *rows, "The end\n"]))
    monkeypatch.setattr(
        "sys.argv", ["exactness.py", "--rounds", "2", "1", "--kinds", "conv2d", "tied-head", "--output", str(folder)]
    )
    exactness.main()
    page = (folder / "exactness.md").read_text()
    lines = overview.read_text().splitlines()
    worst = re.search("the largest is (.+)\\.\n", page).group(1)
    answer = f"relative error of at most {worst} on 2 kinds, up to 2 rounds"
    assert lines[2] == f"| exactness? | [exactness](benchmarks/exactness.md) | {answer} |"
    assert [*lines[:2], lines[3]] == ["# Overview of benchmarks/exactness.md", rows[0].strip(), "The end"]
    assert "It holds: the largest is" in page
    assert "| auto, 1 round | in place, 1 round | auto, 2 rounds | in place, 2 rounds |" in page
    for name in ("conv2d", "tied-head"):
        assert f"| {' | '.join(exactness.cells_of(SUPPORTED[name]))} |" in page
    assert page.strip() in capsys.readouterr().out


def test_storage_writes_a_page(tmp_path, monkeypatch, capsys):
    small = Size(hidden=32, layers=1, heads=2, intermediate=48, vocab=64, batch=2, tokens=8)
    monkeypatch.setattr(storage, "SIZE", small)
    monkeypatch.setattr("sys.argv", ["storage.py", "--rounds", "1", "6", "--pairs", "2", "--output", str(tmp_path)])
    storage.main()
    page = (tmp_path / "storage.md").read_text()
    for targets in storage.TARGETS:
        for rounds in (1, 6):
            rows = [line for line in page.splitlines() if line.startswith(f"| {targets} | {rounds} |")]
            assert len(rows) == 2  # times and memory
    assert page.strip() in capsys.readouterr().out


def test_the_published_page_has_a_row_for_every_kind():
    page = (DOCS / "benchmarks/exactness.md").read_text()
    rows = [line for line in page.splitlines() if " | `base` | " in line or " | `adapter` | " in line]
    assert len(rows) == len(exactness.KINDS)
    for name, row in zip(exactness.KINDS, rows, strict=True):
        assert row.startswith(f"| {' | '.join(exactness.cells_of(SUPPORTED[name]))} |")
        auto = [float(cell) for cell in row.split(" | ")[3:9:2]]
        assert len(auto) == 3
        assert max(auto) <= TOLERANCE
    assert "after many rounds" in page
    assert "It holds" in page
