"""`convert_to_plain_lora` and the way back: the same function, in one adapter or in two.

Effective weights are multiplied out in float64 from the live parameters, by the formulas of `effective.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from effective import effective
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from fedex_hf import (
    FederatedTrainer,
    UnsupportedModelError,
    convert_from_plain_lora,
    convert_to_plain_lora,
)


TOLERANCE = 1e-6  # of the update; factors are float32
CARRIER, ADAPTER = "fedex_residual", "default"
RANK, ALPHA = 2, 5
MANY = (4, 3, 5, 4, 2, 4, 3, 4)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's: Conv1D, a LoRA bias taken for a shard
]


@dataclass
class Kind:
    """A federation, and how its base is loaded again."""

    train: Callable[[Path], FederatedTrainer]
    load: Callable[[Path], Any] = lambda folder: zoo.Zoo.from_pretrained(folder / "base")
    storage: str = "adapter"


def of_zoo(folded: bool = False, **kwargs: Any) -> Callable[[Path], FederatedTrainer]:
    fields = {
        name: kwargs.pop(name) for name in ("r", "rank_pattern", "alpha_pattern", "use_rslora") if name in kwargs
    }
    return lambda folder: zoo.federation(folder, zoo.lora(folded, **fields), **kwargs)


def load_roberta(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder / "base")


def of_roberta(folder: Path) -> FederatedTrainer:
    tiny.roberta().save_pretrained(folder / "base")
    lora = tiny.lora(use_rslora=True, lora_bias=True, r=2, target_modules=["query", "dense"])
    given = {"model": load_roberta(folder), "peft_config": lora}
    return tiny.federation(folder / "run", learning_rate=3e-2, residual_storage="adapter", trainer_kwargs=given)


def load_nf4(folder: Path) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, dtype=torch.float32)


def of_nf4(folder: Path) -> FederatedTrainer:
    tiny.llama().save_pretrained(folder / "base")
    return FederatedTrainer(
        model=load_nf4(folder),
        args=tiny.arguments(folder / "run", learning_rate=3e-2),
        train_dataset=tiny.clients_of([12, 7, 9], tiny.language_data),
        peft_config=tiny.lora(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj", "down_proj"]),
    )


PATTERNS: dict[str, Any] = {"rank_pattern": {"conv2": 3, "turned": 1}, "alpha_pattern": {"straight": 5, "embed": 1}}
KINDS = {
    "patterns": Kind(of_zoo(residual_storage="adapter", **PATTERNS)),
    "bfloat16": Kind(of_zoo(dtype=torch.bfloat16, use_rslora=True)),
    "dense": Kind(of_zoo(residual_storage="adapter", sizes=MANY, r=3)),
    "nf4": Kind(of_nf4, load_nf4),
    "biases": Kind(of_roberta, load_roberta),
    "in the base": Kind(of_zoo(folded=True, rank_pattern={"experts.down": 3, "matrix.weight": 1}), storage="base"),
}
BESIDE = [name for name in KINDS if name != "in the base"]


# ---- The test's own arithmetic ----


def named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def norm(tensors: Any) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], update: dict[str, torch.Tensor]) -> float:
    """Of two models, relative to an update."""
    assert left.keys() == right.keys() == update.keys()
    return norm(left[name] - right[name] for name in left) / norm(update.values())


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: left[name] - right[name] for name in left}


def with_adapters(model: Any, *adapters: str) -> dict[str, torch.Tensor]:
    """Effective weights with only these adapters."""
    before = {module: list(module.active_adapters) for module in model.modules() if hasattr(module, "lora_A")}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for module in before:
        module.set_adapter(list(adapters))
    found = named(effective(model))
    for module, active in before.items():
        module.set_adapter(active)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return found


def as_matrix(layer: str, update: torch.Tensor) -> torch.Tensor:
    """`(out, in)`, or one per expert, up to a transpose: for singular values."""
    return update.flatten(1) if "conv" in layer else update


def numerical_rank(matrix: torch.Tensor) -> int:
    values = torch.linalg.svdvals(matrix)
    return int((values > torch.finfo(torch.float32).eps * values.amax(-1, keepdim=True)).sum(-1).max())


def logits_of(model: Any, causal: bool) -> torch.Tensor:
    data = tiny.language_data if causal else tiny.classification_data
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes rounds its scales to bfloat16 to be faster
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(data(6, seed=5)["input_ids"][:])).logits.double()


# ---- One run per kind, converted there and back ----


@dataclass
class Story:
    """What the test saw on the way: effective weights by stage."""

    original: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]
    fields: dict[str, Any]
    logits: dict[str, torch.Tensor]
    trainable: dict[str, set[str]]
    folder: Path

    @property
    def update(self) -> dict[str, torch.Tensor]:
        return difference(self.before, self.original)


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def story_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Story]:
    @cache
    def of(name: str) -> Story:
        kind, folder = KINDS[name], tmp_path_factory.mktemp("kind")
        torch.manual_seed(0)
        trainer = kind.train(folder)
        original = with_adapters(trainer.model)
        trainer.train()
        assert trainer.adapted.storage == kind.storage
        dense = {each.removeprefix("base_model.model.") for each in trainer.federation.ledger.matrices}
        assert len(dense) > len(trainer.adapted.sites) / 2 if name == "dense" else trainer.federation.ledger.factors
        causal = name == "nf4"
        before, logits = named(effective(trainer.model)), logits_of(trainer.model, causal)
        first = trainable(trainer.model)
        model = convert_to_plain_lora(trainer.model if kind.storage == "adapter" else trainer.adapted)
        assert model is trainer.model
        plain = named(effective(model))
        model.save_pretrained(folder / "plain")
        return Story(
            original,
            before,
            plain,
            {
                "dense": dense,
                "names": list(model.peft_config),
                "base": with_adapters(model),
                "active": model.active_adapters,
            },
            {"before": logits, "plain": logits_of(model, causal)},
            {"before": first, "plain": trainable(model)},
            folder,
        )

    return of


def plain_model(story: Story, name: str, **kwargs: Any) -> PeftModel:
    """What PEFT makes of the files."""
    return PeftModel.from_pretrained(KINDS[name].load(story.folder), story.folder / "plain", **kwargs)


@pytest.mark.parametrize("name", KINDS)
def test_one_plain_lora_on_the_original_base_is_the_same_function(story_of, name):
    story = story_of(name)
    assert distance(story.plain, story.before, story.update) < TOLERANCE
    assert distance(story.original, story.before, story.update) == 1.0  # training has moved it
    assert story.fields["names"] == story.fields["active"] == [ADAPTER]
    base = story.fields["base"]
    assert all(torch.equal(base[layer], story.original[layer]) for layer in base)
    assert story.trainable["plain"] == story.trainable["before"]
    error = (story.logits["plain"] - story.logits["before"]).abs().max() / story.logits["before"].abs().max()
    assert error < (2e-2 if name == "bfloat16" else 2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_peft_loads_it_bit_for_bit(story_of, name):
    story = story_of(name)
    loaded = plain_model(story, name)
    found = named(effective(loaded))
    assert all(torch.equal(found[layer], story.plain[layer]) for layer in story.plain)
    assert torch.equal(logits_of(loaded, name == "nf4"), story.logits["plain"])
    # The twin: another scaling than the files say.
    file = story.folder / "plain" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert (config["use_rslora"], config["init_lora_weights"]) == (False, True)
    file.write_text(json.dumps(config | {"use_rslora": True}))
    other = named(effective(plain_model(story, name)))
    file.write_text(json.dumps(config))
    assert distance(other, story.before, story.update) > 0.05


@pytest.mark.parametrize("name", KINDS)
def test_it_has_the_rank_that_the_update_needs(story_of, name):
    story = story_of(name)
    ranks = {
        layer.removeprefix("base_model.model."): module.r[ADAPTER]
        for layer, module in plain_model(story, name).named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "r")
    }
    needed = {layer: numerical_rank(as_matrix(layer, update)) for layer, update in story.update.items()}
    if "attention" in needed:  # PEFT knows its two projections by one name
        both = ("attention", "attention.base_layer.out_proj")
        needed |= dict.fromkeys(both, max(needed[each] for each in both))
    for layer, rank in ranks.items():
        whole = min(as_matrix(layer, story.update[layer]).shape[-2:])
        if name == "in the base":  # of which float32 has rounded the sum with the weight
            assert 1 < rank <= min(whole, 5 * 3)  # two rounds of two contrasts each, and the adapter
        elif layer in story.fields["dense"]:  # what float32 rounds has a rank, too
            assert needed[layer] <= rank <= whole
        else:
            assert rank == needed[layer], layer
    assert ranks.keys() == needed.keys()


@pytest.mark.parametrize("name", BESIDE)
def test_the_way_back(story_of, name):
    story = story_of(name)
    model = convert_from_plain_lora(plain_model(story, name), RANK, ALPHA)
    assert distance(named(effective(model)), story.before, story.update) < TOLERANCE
    error = (logits_of(model, name == "nf4") - story.logits["before"]).abs().max()
    assert error < (2e-2 if name == "bfloat16" else 2e-6) * story.logits["before"].abs().max()
    config = model.peft_config[ADAPTER]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (RANK, ALPHA, {}, {})
    # Its adapter is the best of its rank (Eckart-Young), so dropping the carrier loses just that.
    dropped = difference(with_adapters(model, ADAPTER), story.before)
    for layer, update in story.update.items():
        values = torch.linalg.svdvals(as_matrix(layer, update))
        lost = float(values[RANK:].square().sum().sqrt())
        assert norm([dropped[layer]]) == pytest.approx(lost, rel=1e-4, abs=1e-6 * float(values[0])), layer
    assert norm(dropped.values()) > 1e-2 * norm(story.update.values())
    assert {each for each in trainable(model) if CARRIER in each} == set()
    assert {each for each in trainable(model) if "lora_" in each} >= {
        each for each in story.trainable["before"] if "lora_" in each
    }


@pytest.mark.parametrize("name", ["patterns", "nf4"])
def test_a_federation_goes_on_from_there_and_converts_again(story_of, tmp_path, name):
    story = story_of(name)
    model = convert_from_plain_lora(plain_model(story, name), RANK)
    data = tiny.language_data if name == "nf4" else tiny.classification_data
    trainer = FederatedTrainer(
        model=model,
        args=tiny.arguments(tmp_path, num_rounds=1, learning_rate=3e-2),
        train_dataset=tiny.clients_of([12, 7, 9], data),
    )
    assert trainer.adapted.storage == "adapter"
    assert len(trainer.federation.ledger.layers()) > 0
    assert distance(named(effective(trainer.model)), story.before, story.update) < TOLERANCE
    clients: list[dict[str, torch.Tensor]] = []
    fit = trainer.fit_client

    def fit_and_look(client_id: str, round: int) -> Any:
        update = fit(client_id, round)
        clients.append(named(effective(trainer.model)))
        return update

    trainer.fit_client = fit_and_look
    trainer.train()
    shares = torch.tensor([12.0, 7.0, 9.0], dtype=torch.float64) / 28
    mean = {
        layer: sum(share * each[layer] for share, each in zip(shares, clients, strict=True)) for layer in clients[0]
    }
    after, moved = named(effective(trainer.model)), difference(mean, story.before)
    assert norm(moved.values()) > 1e-2 * norm(story.update.values())
    assert distance(after, mean, moved) < 1e-5
    assert distance(with_adapters(trainer.model, ADAPTER), mean, moved) > 0.05  # the residual left out
    plain = convert_to_plain_lora(trainer.model)
    assert distance(named(effective(plain)), after, story.update) < TOLERANCE


def test_a_lora_of_less_rank_is_kept_whole_and_can_grow(story_of):
    """Rows without a column of their own: `B` is zero there, and its gradient is not."""
    story = story_of("biases")
    model = convert_from_plain_lora(plain_model(story, "biases"), 20)
    assert distance(named(effective(model)), story.before, story.update) < TOLERANCE
    assert distance(with_adapters(model, ADAPTER), story.before, story.update) < TOLERANCE
    layer = model.base_model.model.roberta.encoder.layer[0].attention.self.query
    batch = tiny.classification_data(6, seed=5)
    model(input_ids=torch.tensor(batch["input_ids"][:]), labels=torch.tensor(batch["labels"][:])).loss.backward()
    B = layer.lora_B[ADAPTER].weight
    assert B.shape[1] == 20
    assert int(B[:, -1].count_nonzero()) == 0
    assert int(B.grad[:, -1].count_nonzero()) > 0


# ---- Refused, with nothing changed ----


def test_what_cannot_be_converted(tmp_path):
    trainer = zoo.federation(tmp_path, zoo.lora(True), num_rounds=1)
    trainer.train()
    before = named(effective(trainer.model))
    with pytest.raises(ValueError, match=r"pass `trainer\.adapted` instead of `trainer\.model`"):
        convert_to_plain_lora(trainer.model)
    for arguments, message in (
        ((0,), "`r=0` is no rank"),
        ((True,), "`r=True` is no rank"),
        ((2, 0), "`lora_alpha=0` is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_from_plain_lora(trainer.model, *arguments)
    with pytest.raises(UnsupportedModelError, match="beside which no residual can ride exactly"):
        convert_from_plain_lora(trainer.model, 2)
    after = named(effective(trainer.model))
    assert all(torch.equal(before[layer], after[layer]) for layer in before)


def test_a_model_that_carries_residuals_is_not_split_again(tmp_path):
    trainer = zoo.federation(tmp_path, zoo.lora(False), residual_storage="adapter")
    with pytest.raises(ValueError, match="Call `convert_to_plain_lora` first"):
        convert_from_plain_lora(trainer.model, 2)


def test_a_clients_own_state_is_not_converted(tmp_path):
    trainer = zoo.federation(
        tmp_path, zoo.lora(False), num_rounds=1, residual_storage="adapter", aggregator_kwargs={"assignment": "keep"}
    )
    trainer.train()
    trainer.fit_client("client-0", 2)
    with pytest.raises(ValueError, match="Convert it between two rounds"):
        convert_to_plain_lora(trainer.adapted)
    trainer.restore_global_state()
    before = named(effective(trainer.model))
    after = named(effective(convert_to_plain_lora(trainer.adapted)))
    assert norm(after[layer] - before[layer] for layer in after) < 1e-6 * norm(before.values())
