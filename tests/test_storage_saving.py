"""What is saved of every layer kind, on every kind of base, wherever the residuals were held.

The expected effective weights are the live model's, multiplied out in float64 by the formulas of
`effective.py`; that they are the weighted mean of the clients' is shown in `test_layer_kinds.py`. The written ones are
read from what plain `from_pretrained` makes of the files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from effective import base, effective, modules_of
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from fedex_hf import FederatedTrainer
from fedex_hf.exporting import export_round
from fedex_hf.hub_rounds import load_round


TOLERANCE = 1e-6  # of the update; factors are float32
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's: Conv1D, an adapter that is there already
]


# ---- Runs ----


@dataclass
class Kind:
    """A federation, and how its original base is loaded."""

    train: Callable[..., FederatedTrainer]
    load: Callable[[Path], Any] = zoo.Zoo.from_pretrained
    storage: str = "adapter"
    causal: bool = False


def of_zoo(folded: bool = False, **kwargs: Any) -> Callable[[Path], FederatedTrainer]:
    fields = {name: kwargs.pop(name) for name in LoraConfig.__dataclass_fields__ if name in kwargs}
    return lambda folder: zoo.federation(folder, zoo.lora(folded, **fields), save_strategy="epoch", **kwargs)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTIZED = {"nf4": NF4 | {"bnb_4bit_compute_dtype": torch.float32}, "int8": {"load_in_8bit": True}}
TOKENS = [5, 6, 7, 20]


def load_llama(name: str, dtype: torch.dtype) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        config = {"quantization_config": BitsAndBytesConfig(**QUANTIZED[name])} if name in QUANTIZED else {}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **config)

    return load


def llama(name: str, dtype: torch.dtype = torch.float32, storage: str = "adapter", **lora: Any) -> Kind:
    load = load_llama(name, dtype)

    def train(folder: Path, **arguments: Any) -> FederatedTrainer:
        make = tiny.llama()
        make.config.tie_word_embeddings = name == "tied"
        type(make)(make.config).to(dtype).save_pretrained(folder / "base")
        given = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "k_proj", "down_proj"]} | lora
        return FederatedTrainer(
            model=load(folder / "base"),
            args=tiny.arguments(folder / "run", learning_rate=3e-2, save_strategy="epoch", **arguments),
            train_dataset=tiny.clients_of([12, 7, 9], tiny.language_data),
            peft_config=tiny.lora(**given),
        )

    return Kind(train, load, storage, causal=True)


PATTERNS: dict[str, Any] = {"rank_pattern": {"conv2": 3, "turned": 1}, "alpha_pattern": {"straight": 5, "embed": 1}}
KINDS = {
    "all kinds in the base": Kind(
        of_zoo(True, rank_pattern={"experts.down": 3, "matrix.weight": 1}, alpha_pattern={"attention": 5}),
        storage="base",
    ),
    "kinds beside the base": Kind(of_zoo(residual_storage="adapter", **PATTERNS)),
    "dense beside the base": Kind(of_zoo(residual_storage="adapter", r=3, sizes=(4, 3, 5, 4, 2, 4, 3, 4))),
    "bfloat16": Kind(of_zoo(dtype=torch.bfloat16, use_rslora=True)),
    "tokens": llama("plain", torch.bfloat16, trainable_token_indices=TOKENS),
    "tied": llama("tied", target_modules=["embed_tokens", "v_proj"]),
    "nf4": llama("nf4"),
    "int8": llama("int8", torch.bfloat16, modules_to_save=["lm_head"]),
    "started with PiSSA": llama("plain", storage="base", init_lora_weights="pissa"),
}


def key_of(name: str, module: Any) -> str:
    """The adapted parameter's name in the plain base model."""
    attribute = getattr(module, "parameter_name", "in_proj_weight" if hasattr(module, "in_proj_weight") else "weight")
    return f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{attribute}"


def weights_of(model: Any, find: Callable[[Any], dict[str, torch.Tensor]] = effective) -> dict[str, torch.Tensor]:
    """Base key -> effective weight, float64."""
    modules, found = modules_of(model), find(model)
    return {key_of(name, modules[name]): found[name] for name in found}


def norm(tensors: Any) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())


@dataclass
class Run:
    kind: Kind
    folder: Path
    trainer: FederatedTrainer
    original: dict[str, torch.Tensor]

    @property
    def expected(self) -> dict[str, torch.Tensor]:
        return weights_of(self.trainer.model)

    def distance(self, found: dict[str, torch.Tensor]) -> float:
        """From the trainer's model, relative to all that training has done."""
        expected = self.expected
        assert found.keys() == expected.keys() == self.original.keys()
        done = norm(expected[key] - self.original[key] for key in expected)
        return norm(found[key] - expected[key] for key in expected) / done

    def auto(self, folder: Path) -> Any:
        return (AutoModelForCausalLM if self.kind.causal else zoo.Zoo).from_pretrained(folder)

    def auto_peft(self, folder: Path) -> Any:
        if self.kind.causal:
            return AutoPeftModelForCausalLM.from_pretrained(folder)
        return AutoPeftModel.from_pretrained(folder, import_allowlist=["zoo"])

    def peft(self, folder: Path) -> Any:
        return PeftModel.from_pretrained(self.kind.load(self.folder / "base"), folder)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    @cache
    def of(name: str) -> Run:
        kind, folder = KINDS[name], tmp_path_factory.mktemp("run")
        torch.manual_seed(0)
        trainer = kind.train(folder)
        modules = modules_of(trainer.model)
        # Before anything is installed, which for PiSSA has happened already.
        started = {name: trainer.adapted.original(name).double() for name in modules if kind.storage == "base"}
        original = {key_of(name, modules[name]): started.get(name, base(modules[name])).clone() for name in modules}
        trainer.train()
        assert trainer.adapted.storage == kind.storage
        assert all(entry.get("aggregation_error", 0.0) < 1e-5 for entry in trainer.state.log_history)
        return Run(kind, folder, trainer, original)

    return of


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards without plots, as where matplotlib is not installed: drawing them is most of the time here."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Of any dtype."""
    bits = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (left, right))
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*bits)


def factor_dtypes(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}


# ---- The function ----


@pytest.mark.parametrize("name", KINDS)
def test_base_and_adapter_in_one_folder(run_of, tmp_path, name):
    run = run_of(name)
    saved = run.trainer.save_model(str(tmp_path))
    low = getattr(torch, saved.base_dtype) != torch.float32
    if run.kind.storage == "adapter":
        assert (saved.dtype, saved.cast_survival) == ("float32", None)
    model = run.auto(tmp_path)
    # The loader of transformers casts an adapter to the base's dtype.
    assert run.distance(weights_of(model)) < (1e-2 if low else TOLERANCE)
    if name not in QUANTIZED:
        assert factor_dtypes(model) == {getattr(torch, saved.base_dtype)}
    if name == "all kinds in the base":  # a limit of PEFT's that the card tells
        with pytest.raises(ValueError, match=r"target the same nn\.Parameter twice"):
            run.auto_peft(tmp_path)
        assert "PEFT's own classes cannot load" in (tmp_path / "README.md").read_text()
        return
    model = run.auto_peft(tmp_path)
    assert run.distance(weights_of(model)) < TOLERANCE
    assert factor_dtypes(model) == {torch.float32}
    assert run.distance(weights_of(model, lambda it: {each: base(m) for each, m in modules_of(it).items()})) > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_one_plain_lora_on_the_original_base(run_of, tmp_path, name):
    run = run_of(name)
    saved = run.trainer.save_model(str(tmp_path), format="lora")
    assert (saved.dtype, saved.base_dtype) == ("float32", None)
    assert run.distance(weights_of(run.peft(tmp_path))) < TOLERANCE
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert (config["use_rslora"], config["init_lora_weights"], config["revision"]) == (False, True, None)
    # The twins: only the trained adapter, and the product with another scaling.
    run.trainer.model.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    assert run.distance(weights_of(run.peft(tmp_path / "trained"))) > 0.01
    file.write_text(json.dumps(config | {"use_rslora": True}))
    assert run.distance(weights_of(run.peft(tmp_path))) > 0.2


def test_a_cast_base_leaves_the_update_in_float32(run_of, tmp_path):
    run = run_of("kinds beside the base")
    saved = run.trainer.save_model(str(tmp_path), dtype="bfloat16")
    assert (saved.dtype, saved.cast_survival, saved.base_dtype) == ("float32", None, "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    model = run.auto_peft(tmp_path)
    cast = weights_of(model, lambda it: {name: base(module) for name, module in modules_of(it).items()})
    assert all(torch.equal(cast[key], each.bfloat16().double()) for key, each in run.original.items())
    found = {key: each - cast[key] + run.original[key] for key, each in weights_of(model).items()}
    assert run.distance(found) < TOLERANCE


QUANTIZED_KINDS = [name for name in KINDS if name in QUANTIZED]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in QUANTIZED])
def test_one_model_rounded_once(run_of, tmp_path, name):
    run = run_of(name)
    saved = run.trainer.save_model(str(tmp_path), format="merged")
    assert not list(tmp_path.glob("adapter*"))
    model = run.auto(tmp_path)
    found, expected = model.state_dict(), run.expected
    for key in expected:
        if found[key].dtype == torch.float32:
            assert (found[key].double() - expected[key]).norm() < 1e-6 * expected[key].norm(), key
        else:
            assert torch.equal(found[key], expected[key].to(found[key].dtype)), key
    distance = run.distance({key: found[key].double() for key in expected})
    if saved.base_dtype == "float32":
        assert distance < 1e-5
        assert saved.cast_survival is None
    else:
        assert 1e-4 < distance < 0.1
        assert saved.cast_survival == pytest.approx(1 - distance, abs=1e-4)
    if name == "tied":  # the other end did not get the update
        assert torch.equal(found["lm_head.weight"].double(), run.original["model.embed_tokens.weight"])
        assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", QUANTIZED_KINDS)
def test_a_quantized_base_is_never_rewritten(run_of, tmp_path, name):
    run = run_of(name)
    for kwargs, message in (
        ({"format": "merged"}, 'Use "full", the quantized base with one LoRA beside it, or "lora"'),
        ({"dtype": "bfloat16"}, "would cast a base that is quantized (bitsandbytes), scales included"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run.trainer.save_model(str(tmp_path / "refused"), **kwargs)
        assert not (tmp_path / "refused").exists()
    saved = run.trainer.save_model(str(tmp_path / "cast"), format="lora", dtype="bfloat16")
    factors = load_file(tmp_path / "cast" / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in factors.items() if "lora_" in key} == {torch.bfloat16}
    assert 1 - run.distance(weights_of(run.peft(tmp_path / "cast"))) == pytest.approx(saved.cast_survival, abs=1e-4)
    assert 0.99 < saved.cast_survival < 1.0


def test_a_run_that_would_have_to_rewrite_it_does_not_start(tmp_path):
    with pytest.raises(ValueError, match='The format "merged" folds the update into base weights that are quantized'):
        llama("nf4").train(tmp_path, push_to_hub=True, hub_model_id="user/never", hub_round_format="merged")


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].storage == "adapter"])
def test_the_base_beside_the_adapter_is_the_original_byte_for_byte(run_of, tmp_path, name):
    run = run_of(name)
    run.trainer.save_model(str(tmp_path / "run"))
    run.kind.load(run.folder / "base").save_pretrained(tmp_path / "untouched")
    found, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("run", "untouched"))
    assert found.keys() == expected.keys()
    heads = {key for key in found if not same_bits(found[key], expected[key])}
    assert heads == {
        "all kinds in the base": set(),
        "int8": {"lm_head.weight"},
    }.get(name, {"score.bias", "score.weight"} if not run.kind.causal else set())
    if name in QUANTIZED:
        assert {torch.uint8, torch.int8} & {tensor.dtype for tensor in found.values()}


# ---- Going on ----


def checkpoints_of(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def same_state(left: FederatedTrainer, right: FederatedTrainer) -> bool:
    def tensors(trainer: FederatedTrainer) -> dict[str, torch.Tensor]:
        state, ledger = trainer.federation.state, trainer.federation.ledger
        parts = {"state": state.adapters, "ledger": ledger.factors}
        found = {f"{part}/{key}/A": delta.A for part, deltas in parts.items() for key, delta in deltas.items()}
        found |= {f"{part}/{key}/B": delta.B for part, deltas in parts.items() for key, delta in deltas.items()}
        live = {
            key: tensor.detach() for key, tensor in trainer.model.state_dict().items() if "original_module" not in key
        }
        return found | ledger.matrices | dict(state.tensors) | live

    one, other = tensors(left), tensors(right)
    return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["all kinds in the base", "dense beside the base", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bytes(run_of, tmp_path, name):
    run = run_of(name)
    run.trainer.restore_global_state()
    torch.manual_seed(1)
    resumed = run.kind.train(tmp_path)
    assert not same_state(resumed, run.trainer)
    resumed.train(resume_from_checkpoint=str(checkpoints_of(run.folder)[0]))
    assert [entry["round"] for entry in resumed.state.log_history if "aggregation_error" in entry] == [1, 2]
    assert same_state(resumed, run.trainer)


@pytest.mark.parametrize("name", ["started with PiSSA", "tied", "tokens", "nf4", "int8"])
def test_a_round_brings_its_model(run_of, tmp_path, name):
    """From a checkpoint, with nothing else in hand: as a model, in another format, and to go on from."""
    run = run_of(name)
    first, last = checkpoints_of(run.folder)
    adapted, _ = load_round(last)
    assert adapted.storage == run.kind.storage
    found, expected = weights_of(adapted.model), run.expected
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    earlier, _ = load_round(first)
    assert run.distance(weights_of(earlier.model)) > 0.1
    export_round(str(last), tmp_path / "exported", "lora")
    assert run.distance(weights_of(run.peft(tmp_path / "exported"))) < TOLERANCE
    going_on = FederatedTrainer(
        str(first),
        tiny.arguments(tmp_path / "run", learning_rate=3e-2),
        train_dataset=tiny.clients_of([12, 7, 9], tiny.language_data),
    )
    going_on.train()
    assert same_state(going_on, run.trainer)


def test_a_base_that_was_quantized_before_is_loaded_as_it_is(run_of, tmp_path):
    load_llama("nf4", torch.float32)(run_of("nf4").folder / "base").save_pretrained(tmp_path / "stored")
    trainer = FederatedTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "stored"),
        args=tiny.arguments(tmp_path / "run", learning_rate=3e-2, num_rounds=1, save_strategy="epoch"),
        train_dataset=tiny.clients_of([12, 7, 9], tiny.language_data),
        peft_config=tiny.lora(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    adapted, _ = load_round(tmp_path / "run" / "checkpoint-8")
    found = weights_of(adapted.model)
    assert all(torch.equal(found[key], each) for key, each in weights_of(trainer.model).items())


# ---- Two adapters, as PEFT itself saves them ----


@pytest.mark.parametrize("name", ["dense beside the base", "nf4"])
def test_peft_saves_and_loads_the_adapter_and_the_carrier(run_of, tmp_path, name):
    """The carrier first: then a classifier's head, which PEFT wants of every further adapter, is the trained one's."""
    run = run_of(name)
    run.trainer.model.save_pretrained(tmp_path)
    base_model = run.kind.load(run.folder / "base")
    model = PeftModel.from_pretrained(base_model, tmp_path / "fedex_residual", adapter_name="fedex_residual")
    model.load_adapter(tmp_path, "default")
    model.base_model.set_adapter(["default", "fedex_residual"])
    found = weights_of(model)
    assert all(torch.equal(found[key], each) for key, each in run.expected.items())
    model.base_model.set_adapter(["default"])
    assert run.distance(weights_of(model)) > 0.02


def test_a_classifier_of_peft_is_loaded_with_its_carrier(tmp_path):
    tiny.roberta().save_pretrained(tmp_path / "base")
    load = AutoModelForSequenceClassification.from_pretrained
    given = {"model": load(tmp_path / "base")}
    trainer = tiny.federation(tmp_path / "run", residual_storage="adapter", learning_rate=3e-2, trainer_kwargs=given)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    carrier = tmp_path / "saved" / "fedex_residual"
    model = PeftModel.from_pretrained(load(tmp_path / "base"), carrier, adapter_name="fedex_residual")
    model.load_adapter(tmp_path / "saved", "default")
    inputs = torch.tensor(tiny.classification_data(6, seed=5)["input_ids"][:])
    logits = {}
    for adapters in (["default", "fedex_residual"], ["default"]):
        model.base_model.set_adapter(adapters)
        logits[len(adapters)] = model.eval()(input_ids=inputs).logits
    expected = trainer.model.eval()(input_ids=inputs).logits
    assert torch.equal(logits[2], expected)
    assert not torch.allclose(logits[1], expected, atol=1e-4)


# ---- What the card says ----


def card_of(trainer: FederatedTrainer, folder: Path, **kwargs: Any) -> str:
    trainer.save_model(str(folder), **kwargs)
    return (folder / "README.md").read_text()


def test_the_card_tells_where_the_residuals_were(run_of, tmp_path):
    beside = "in a second, frozen LoRA in float32 beside the base weight, which stays as it was"
    card = card_of(run_of("nf4").trainer, tmp_path / "nf4")
    assert beside in card
    assert "They hold the original base model, quantized with bitsandbytes, and one LoRA adapter beside it" in card
    assert "pass the same `quantization_config`" in card_of(run_of("nf4").trainer, tmp_path / "lora", format="lora")
    card = card_of(run_of("bfloat16").trainer, tmp_path / "bfloat16")
    assert "They hold the original base model and one LoRA adapter beside it" in card
    assert "PEFT's classes keep the adapter in float32, the first block may cast it" in card
    card = card_of(run_of("started with PiSSA").trainer, tmp_path / "base")
    assert beside not in card
    assert "the residual, to the frozen base weight" in card
    assert "Aggregation has changed this base" in card


@pytest.mark.parametrize(
    ("kept", "is_cut"), [({"residual_rank": 1}, True), ({"residual_tolerance": 0.3}, True), ({}, False)]
)
def test_a_truncated_ledger_is_not_called_exact(tmp_path, kept, is_cut):
    trainer = llama("plain").train(tmp_path, residual_storage="adapter", **kept)
    trainer.train()
    lost = [entry["ledger_lost_energy"] for entry in trainer.state.log_history if "ledger_lost_energy" in entry]
    assert any(share > 0 for share in lost) == is_cut
    export_round(str(checkpoints_of(tmp_path)[-1]), tmp_path / "exported", "lora")
    for card in (card_of(trainer, tmp_path / "saved"), (tmp_path / "exported" / "README.md").read_text()):
        assert ("the best low-rank approximation of the difference summed over all rounds" in card) == is_cut
        assert ("so every client continues from that average" in card) != is_cut
