"""The three formats of `save_model`, and what a cast to 16 bits leaves of them.

Effective weights are computed here, in float64: the expected ones from what each client sent, round by round, the
written ones from the files and their configs. Neither asks the package or PEFT for a number.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hub_target
import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fedex_hf import FederatedCallback, FederatedTrainer


TOLERANCE = 1e-5  # of the update; float32 rounds at 6e-8 of the weight
FORMATS = ("full", "lora", "merged")


# ---- The test's own arithmetic: products are (out_features, in_features), float64 ----


@dataclass
class Expected(FederatedCallback):
    """The weighted mean of the clients' models, from the factors they sent.

    `residuals` is what the base has to hold, `products` the adapter's share, `tensors` all else that is trained.
    Without `is_exact` it is the method's own result: factors averaged apart, and no residuals.
    """

    scalings: dict[str, float]
    is_exact: bool = True
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    products: dict[str, torch.Tensor] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_aggregate(self, args, state, control, round, updates, update, trainer=None, **kwargs):
        shares = [each.num_examples / sum(one.num_examples for one in updates) for each in updates]
        for name, scaling in self.scalings.items():
            sent = [(each.adapters[name].A.double(), each.adapters[name].B.double()) for each in updates]
            ideal = sum(share * scaling * (B @ A) for share, (A, B) in zip(shares, sent, strict=True))
            kept = update.adapters[name]
            self.products[name] = scaling * (kept.B.double() @ kept.A.double())
            residual = ideal - self.products[name] if self.is_exact else torch.zeros_like(ideal)
            self.residuals[name] = self.residuals.get(name, 0.0) + residual
        self.tensors = {
            name: sum(share * each.tensors[name].double() for share, each in zip(shares, updates, strict=True))
            for name in updates[0].tensors
        }

    def update(self, name: str) -> torch.Tensor:
        """All that a layer's weight must have gained."""
        return self.residuals[name] + self.products[name]


def matching(patterns: dict[str, float], name: str, default: float) -> float:
    """PEFT's rule for `rank_pattern`: a key names the end of a layer's name, `^` all of it."""
    found = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
    return found[0] if found else default


def scaling_of(config: dict[str, Any], name: str) -> float:
    rank = matching(config["rank_pattern"], name, config["r"])
    alpha = matching(config["alpha_pattern"], name, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


class Written:
    """A folder that `save_model` wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = read_base(folder) if any(folder.glob("model*.safetensors")) else None
        file = folder / "adapter_model.safetensors"
        self.adapter = load_file(file) if file.exists() else {}
        self.config = json.loads((folder / "adapter_config.json").read_text()) if self.adapter else {}

    def layers(self) -> list[str]:
        """Names of the adapted layers, in the base's own words."""
        ends = ".lora_A.weight"
        return [key.removeprefix("base_model.model.").removesuffix(ends) for key in self.adapter if key.endswith(ends)]

    def product(self, layer: str) -> torch.Tensor:
        """What the adapter adds."""
        if not self.adapter:
            return torch.zeros(())
        A, B = (self.adapter[f"base_model.model.{layer}.lora_{factor}.weight"].double() for factor in "AB")
        rank = matching(self.config["rank_pattern"], layer, self.config["r"])
        assert A.shape[0] == B.shape[1] == rank, "the config lies about a rank"
        return scaling_of(self.config, layer) * (B @ A)

    def weight(self, layer: str, original: dict[str, torch.Tensor], is_conv1d: bool) -> torch.Tensor:
        """The effective weight as somebody with these files and the original base has it, (out, in)."""
        base = (original if self.base is None else self.base)[f"{layer}.weight"].double()
        return (base.T if is_conv1d else base) + self.product(layer)

    def size(self) -> int:
        """Bytes of weights."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def read_base(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    return tensors


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def numerical_rank(matrix: torch.Tensor) -> int:
    """Singular values that float32 can tell from nothing."""
    values = torch.linalg.svdvals(matrix)
    return int((values > torch.finfo(torch.float32).eps * values.max()).sum())


# ---- Runs on a base that has a name ----


@dataclass(frozen=True)
class Kind:
    make: Callable[[], PreTrainedModel]
    lora: dict[str, Any]
    sizes: tuple[int, ...] = (12, 7, 9)

    @property
    def is_causal(self) -> bool:
        return self.lora.get("task_type") == "CAUSAL_LM"

    @property
    def is_conv1d(self) -> bool:
        return self.make is tiny.gpt2


CAUSAL = {"task_type": "CAUSAL_LM"}
KINDS = {
    "roberta": Kind(tiny.roberta, {}),
    "roberta-rslora-bias": Kind(tiny.roberta, {"use_rslora": True, "lora_bias": True, "target_modules": "all-linear"}),
    "llama-gqa": Kind(tiny.llama, CAUSAL | {"target_modules": "all-linear"}),
    "llama-patterns": Kind(
        tiny.llama,
        CAUSAL
        | {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"k_proj": 1, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"q_proj": 2},
            "modules_to_save": ["lm_head"],
        },
    ),
    "llama-tokens": Kind(
        tiny.llama, CAUSAL | {"target_modules": ["v_proj"], "trainable_token_indices": [5, 6, 7, 20]}
    ),
    "llama-tied-tokens": Kind(
        hub_target.tied_llama, CAUSAL | {"target_modules": ["v_proj"], "trainable_token_indices": [5, 6, 7, 20]}
    ),
    "gpt2": Kind(tiny.gpt2, CAUSAL | {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-rslora": Kind(
        tiny.gpt2,
        CAUSAL
        | {"target_modules": ["c_attn", "mlp.c_proj"], "use_rslora": True, "rank_pattern": {"c_attn": 2}}
        | {"fan_in_fan_out": True},
    ),
    # One step each: in the first round all clients still have the same `A`, so there is no residual.
    "roberta-one-step": Kind(tiny.roberta, {}, sizes=(4, 3, 4)),
    "roberta-dense-ledger": Kind(tiny.roberta, {"r": 4}, sizes=(4, 3, 5, 4, 2, 4, 3, 4)),
    "gpt2-dense-ledger": Kind(
        tiny.gpt2, CAUSAL | {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, (4, 3, 5, 4, 2, 4, 3, 4)
    ),
}


@dataclass
class Run:
    kind: Kind
    base: Path
    trainer: FederatedTrainer
    expected: Expected

    @property
    def original(self) -> dict[str, torch.Tensor]:
        return read_base(self.base)

    def names(self) -> dict[str, str]:
        """Layer in the base's own words -> in the `PeftModel`'s."""
        return {name.removeprefix("base_model.model."): name for name in self.expected.scalings}

    def original_weight(self, layer: str) -> torch.Tensor:
        weight = self.original[f"{layer}.weight"].double()
        return weight.T if self.kind.is_conv1d else weight

    def ideal(self, layer: str) -> torch.Tensor:
        return self.original_weight(layer) + self.expected.update(self.names()[layer])

    def error(self, weight: Callable[[str], torch.Tensor]) -> float:
        """How far effective weights are from the expected ones, relative to the update."""
        layers = self.names()
        wrong = [weight(layer) - self.ideal(layer) for layer in layers]
        return norm(wrong) / norm([self.expected.update(name) for name in layers.values()])

    def error_of(self, written: Written) -> float:
        return self.error(lambda layer: written.weight(layer, self.original, self.kind.is_conv1d))

    def save(self, folder: Path, **kwargs: Any) -> Written:
        self.trainer.save_model(str(folder), **kwargs)
        return Written(folder)


def train(kind: Kind, folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> Run:
    """A run of two rounds on a base that lies in a folder."""
    base = folder / "base"
    kind.make().to(dtype).save_pretrained(base)
    auto = AutoModelForCausalLM if kind.is_causal else AutoModelForSequenceClassification
    data = tiny.language_data if kind.is_causal else tiny.classification_data
    trainer = FederatedTrainer(
        model=auto.from_pretrained(base),
        args=tiny.arguments(folder / "run", **({"learning_rate": 3e-2} | arguments)),
        train_dataset=tiny.clients_of(list(kind.sizes), data),
        peft_config=tiny.lora(**({"r": 2, "lora_alpha": 4} | kind.lora)),
    )
    config = trainer.model.peft_config["default"].to_dict()
    layers = [name.removesuffix(".lora_A") for name, _ in trainer.model.named_modules() if name.endswith(".lora_A")]
    expected = Expected({name: scaling_of(config, name) for name in layers}, trainer.aggregator.name != "fedit")
    trainer.add_callback(expected)
    trainer.train()
    return Run(kind, base, trainer, expected)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards without plots, as where matplotlib is not installed: drawing them is most of the time here."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    @cache
    def of(name: str, **arguments: Any) -> Run:
        torch.manual_seed(0)
        return train(KINDS[name], tmp_path_factory.mktemp(name), **arguments)

    return of


def inputs() -> torch.Tensor:
    return torch.tensor(tiny.classification_data(6, seed=5)["input_ids"][:])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        for parameter in model.parameters():  # a file's mapping is not aligned, and some kernels round by alignment
            parameter.data = parameter.data.clone()
        return model.eval()(input_ids=inputs()).logits


AUTO = {True: AutoModelForCausalLM, False: AutoModelForSequenceClassification}
AUTO_PEFT = {True: AutoPeftModelForCausalLM, False: AutoPeftModelForSequenceClassification}


def factor_dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}


def loaded(folder: Path, kind: Kind, base: Path, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Logits by every path that a folder has."""
    auto, auto_peft = AUTO[kind.is_causal], AUTO_PEFT[kind.is_causal]
    logits = {"auto": logits_of(auto.from_pretrained(folder, **kwargs))}
    if (folder / "adapter_config.json").exists():
        beside = folder if (folder / "config.json").exists() else base
        logits["auto-peft"] = logits_of(auto_peft.from_pretrained(folder, **kwargs))
        logits["peft"] = logits_of(PeftModel.from_pretrained(auto.from_pretrained(beside, **kwargs), folder))
    return logits


# ---- Effective weights ----


@pytest.mark.no_cover
@pytest.mark.parametrize("name", KINDS)
def test_every_format_holds_the_mean_of_the_clients_models(run_of, tmp_path, name):
    run = run_of(name)
    assert bool(run.trainer.federation.ledger.matrices) == ("dense-ledger" in name)
    for format in FORMATS:
        written = run.save(tmp_path / format, format=format)
        assert run.error_of(written) < TOLERANCE, format


@pytest.mark.parametrize("name", ["roberta", "llama-gqa", "gpt2"])
def test_the_same_check_fails_for_what_people_do_instead(run_of, tmp_path, name):
    run = run_of(name)
    full, lora = (run.save(tmp_path / format, format=format) for format in ("full", "lora"))
    adapter_alone = run.error(lambda layer: run.original_weight(layer) + full.product(layer))
    assert adapter_alone > 0.05
    if name == "roberta":  # its layers are square, so that nothing else would notice
        assert run.error(lambda layer: run.original_weight(layer) + lora.product(layer).T) > 0.05
    fedit = train(run.kind, tmp_path / "fedit", aggregator="fedit")
    for format in FORMATS:
        assert run.error_of(fedit.save(tmp_path / f"fedit-{format}", format=format)) > 0.05, format


def trained_tensor(written: Written, original: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """A tensor other than factors as the files have it: of the adapter, or of the base where that stands alone."""
    key = name.replace(".default", "").replace(".modules_to_save", "")
    if written.adapter:
        return written.adapter.get(key)
    key = key.removeprefix("base_model.model.")
    if key.endswith(".lora_B.bias"):
        layer = key.removesuffix(".lora_B.bias")
        return written.base[f"{layer}.bias"].double() - original[f"{layer}.bias"].double()
    if "token_adapter" in key:
        return written.base[f"{key.split('.token_adapter')[0]}.weight"][[5, 6, 7, 20]]
    return written.base[key]


@pytest.mark.parametrize("name", ["roberta", "roberta-rslora-bias", "llama-patterns", "llama-tokens"])
def test_every_format_holds_the_mean_of_all_else_that_is_trained(run_of, tmp_path, name):
    run = run_of(name)
    assert run.expected.tensors
    for format in FORMATS:
        written = run.save(tmp_path / format, format=format)
        for tensor_name, mean in run.expected.tensors.items():
            found = trained_tensor(written, run.original, tensor_name)
            assert found is not None, (format, tensor_name)
            if tensor_name.endswith("lora_B.default.bias") and format != "full":
                # PEFT scales a LoRA's bias as well; these two formats have no scaling of its own left.
                mean = mean * run.expected.scalings[tensor_name.removesuffix(".lora_B.default.bias")]
            assert torch.allclose(found.double(), mean, rtol=1e-5, atol=1e-7), (format, tensor_name)


# ---- Logits ----


@pytest.mark.no_cover
@pytest.mark.parametrize("name", [name for name in KINDS if name != "gpt2-dense-ledger"])
def test_every_path_loads_the_same_model(run_of, tmp_path, name):
    run = run_of(name)
    expected = logits_of(run.trainer.model)
    run.save(tmp_path / "full")
    for path, logits in loaded(tmp_path / "full", run.kind, run.base).items():
        assert torch.equal(logits, expected), path
    bare = loaded(run.base, run.kind, run.base)["auto"]
    assert (bare - expected).abs().max() > 1e-2 * expected.abs().max()  # training has moved them
    for format in ("lora", "merged"):
        run.save(tmp_path / format, format=format)
        paths = loaded(tmp_path / format, run.kind, run.base)
        assert len(paths) == (3 if format == "lora" else 1)
        for path, logits in paths.items():
            assert torch.equal(logits, paths["auto"]), (format, path)
            assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max(), (format, path)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_a_folder_holds_one_format(run_of, tmp_path, first, second):
    """What another format leaves would be loaded with it: an adapter on a merged model, a base under a plain LoRA."""
    run = run_of("roberta")
    run.save(tmp_path / "both", format=first)
    before = {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()}
    if first != second != "full":
        with pytest.raises(ValueError, match="would be loaded together"):
            run.save(tmp_path / "both", format=second)
        assert {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()} == before
        return
    run.save(tmp_path / "both", format=second)
    run.save(tmp_path / "alone", format=second)
    expected = loaded(tmp_path / "alone", run.kind, run.base)
    for path, logits in loaded(tmp_path / "both", run.kind, run.base).items():
        assert torch.equal(logits, expected[path]), path


@pytest.mark.parametrize("format", ["full", "merged"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_shards_and_tied_tensors(run_of, tmp_path, format, dtype):
    run = run_of("llama-tied-tokens")
    whole, shards = (
        run.save(tmp_path / name, format=format, dtype=dtype, max_shard_size=size)
        for name, size in (("whole", None), ("shards", "20KB"))
    )
    assert len(list(shards.folder.glob("model-*-of-*.safetensors"))) > 1 == len(list(whole.folder.glob("model*")))
    assert "lm_head.weight" not in whole.base
    assert shards.base.keys() == whole.base.keys()
    assert all(torch.equal(shards.base[key], whole.base[key]) for key in whole.base)
    assert {tensor.dtype for tensor in whole.base.values()} == {torch.bfloat16 if dtype else torch.float32}
    paths = loaded(shards.folder, run.kind, run.base)
    for path, logits in loaded(whole.folder, run.kind, run.base).items():
        assert torch.equal(logits, paths[path]), path


# ---- The rank of the plain LoRA ----


@pytest.mark.parametrize("name", KINDS)
def test_the_plain_lora_has_the_rank_that_the_update_needs(run_of, tmp_path, name):
    run = run_of(name)
    written = run.save(tmp_path / "lora", format="lora")
    assert written.config["lora_alpha"] == written.config["r"]
    assert not written.config["use_rslora"]
    clients = len(run.kind.sizes)
    for layer in written.layers():
        update = run.expected.update(run.names()[layer])
        rank = written.adapter[f"base_model.model.{layer}.lora_A.weight"].shape[0]
        own = run.trainer.adapted.sites[run.names()[layer]].A.shape[0]
        # Each round's residual has rank (k - 1) r at most, and the adapter r.
        bound = min(*update.shape, (2 * (clients - 1) + 1) * own)
        assert rank <= bound
        if "dense-ledger" in name:  # float32 numbers, whose rounding has a rank too
            assert numerical_rank(update) <= rank
        elif "one-step" in name:
            assert rank == numerical_rank(update) < bound
        else:
            assert rank == numerical_rank(update) == bound < min(update.shape)


# ---- Casts to 16 bits ----


def surviving_share(run: Run, written: Written, dtype: torch.dtype) -> float:
    """From the files: what they add to the original base in `dtype`, beside the update that was to be added."""
    original = {name: tensor.to(dtype) for name, tensor in run.original.items()}
    lost, whole = [], []
    for layer, name in run.names().items():
        before = original[f"{layer}.weight"].double()
        before = before.T if run.kind.is_conv1d else before
        lost.append(written.weight(layer, original, run.kind.is_conv1d) - before - run.expected.update(name))
        whole.append(run.expected.update(name))
    return max(0.0, 1 - norm(lost) / norm(whole))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged about casts, warnings only, since the last call."""

    def warnings() -> list[str]:
        found = [each.getMessage() for each in caplog.records if "survives in" in each.getMessage()]
        levels = {each.levelno for each in caplog.records if "survives in" in each.getMessage()}
        caplog.clear()
        return found if levels == {logging.WARNING} else []

    return warnings


@pytest.mark.parametrize(
    ("name", "learning_rate", "format", "dtype", "survives"),
    [
        ("roberta", 3e-2, "full", "bfloat16", True),
        ("roberta", 3e-2, "merged", "bfloat16", True),
        ("roberta", 3e-2, "lora", "bfloat16", True),
        ("gpt2", 3e-2, "merged", "float16", True),
        ("llama-gqa", 3e-2, "lora", "float16", True),
        ("roberta", 1e-4, "merged", "bfloat16", False),
        ("roberta", 1e-4, "merged", "float16", False),
        ("gpt2", 1e-4, "merged", "bfloat16", False),
        ("roberta", 1e-4, "full", "bfloat16", True),  # the adapter beside the base stays in float32
        ("roberta", 1e-4, "lora", "bfloat16", True),
    ],
)
def test_what_a_cast_loses_is_measured_and_told(run_of, tmp_path, told, name, learning_rate, format, dtype, survives):
    run = run_of(name, learning_rate=learning_rate)
    told()
    saved = run.trainer.save_model(str(tmp_path), format=format, dtype=dtype)
    share = surviving_share(run, Written(tmp_path), getattr(torch, dtype))
    assert saved.cast_survival == pytest.approx(share, abs=1e-4)
    assert (share >= 0.99) == survives
    warnings = told()
    assert len(warnings) == (not survives)
    if not survives:
        assert share < 0.9
        assert f"{100 * share:.2f} %" in warnings[0]
        assert 'format="lora"' in warnings[0]
    card = (tmp_path / "README.md").read_text()
    assert f"{100 * share:.2f} % of the update survived the cast to {dtype}" in card
    assert ("lora` in float32 keeps it" in card) == (not survives)


def test_the_file_of_a_cast_is_of_that_dtype_and_loads_in_it(run_of, tmp_path):
    run = run_of("roberta")
    expected = logits_of(run.trainer.model)
    for format in FORMATS:
        written = run.save(tmp_path / format, format=format, dtype="bfloat16")
        tensors = written.base or {key: written.adapter[key] for key in written.adapter if ".lora_" in key}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        for path, logits in loaded(tmp_path / format, run.kind, run.base).items():
            assert logits.dtype == (torch.float32 if format == "lora" else torch.bfloat16)
            difference = (logits.float() - expected).abs().max() / expected.abs().max()
            assert 0 < difference < 3e-2, (format, path)


def test_without_a_cast_nothing_is_measured(run_of, tmp_path, told):
    run = run_of("roberta")
    for format in FORMATS:
        saved = run.trainer.save_model(str(tmp_path / format), format=format)
        assert (saved.dtype, saved.cast_survival) == ("float32", None)
        assert "survived the cast" not in (tmp_path / format / "README.md").read_text()
    assert told() == []


@pytest.mark.parametrize("aggregator", ["fedit", "ffa"])
@pytest.mark.parametrize("name", ["roberta", "llama-gqa"])
def test_a_bfloat16_base(tmp_path, name, aggregator):
    """PEFT keeps the adapter in float32; the loader of transformers casts it, and the trained head, to the base's."""
    run = train(KINDS[name], tmp_path, dtype=torch.bfloat16, aggregator=aggregator)
    expected = logits_of(run.trainer.model)
    assert {weight.dtype for weight in run.original.values()} == {torch.bfloat16}
    saved = {format: run.trainer.save_model(str(tmp_path / format), format=format) for format in FORMATS}
    full = loaded(tmp_path / "full", run.kind, run.base)
    assert torch.equal(full["auto-peft"], expected)
    assert torch.equal(full["peft"], expected)
    assert full["auto"].dtype == torch.bfloat16
    # Why the docs name it: logits may or may not show it, depending on how a kernel rounds; the factors always do.
    assert (full["auto"].float() - expected.float()).abs().max() < 5e-2
    assert factor_dtypes(AUTO[run.kind.is_causal].from_pretrained(tmp_path / "full")) == {torch.bfloat16}
    assert factor_dtypes(AUTO_PEFT[run.kind.is_causal].from_pretrained(tmp_path / "full")) == {torch.float32}
    lora = loaded(tmp_path / "lora", run.kind, run.base)
    assert torch.equal(lora["auto-peft"], lora["peft"])
    assert lora["peft"].dtype == expected.dtype
    assert (lora["peft"].float() - expected.float()).abs().max() <= 1e-2 * expected.float().abs().max()
    merged = loaded(tmp_path / "merged", run.kind, run.base)["auto"]
    assert (merged.float() - expected.float()).abs().max() < 5e-2
    assert (saved["full"].cast_survival, saved["lora"].dtype) == (1.0, "float32")
    share = surviving_share(run, Written(tmp_path / "merged"), torch.bfloat16)
    assert saved["merged"].cast_survival == pytest.approx(share, abs=1e-4)


# ---- Refused, with nothing written ----


def test_formats_that_cannot_be_written(run_of, tmp_path):
    run = run_of("roberta")
    refused = [
        ({"format": "gguf"}, "`format='gguf'` is unknown. Allowed: 'full', 'lora', 'merged'"),
        ({"dtype": "int8"}, "`dtype='int8'` is not supported. Allowed: 'float32', 'bfloat16', 'float16'"),
        ({"dtype": torch.float64}, "`dtype=torch.float64` is not supported"),
    ]
    for kwargs, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            run.trainer.save_model(str(tmp_path / "saved"), **kwargs)
    with pytest.raises(ValueError, match="would be loaded together"):
        run.trainer.save_model(str(run.base), format="lora")
    assert read_base(run.base).keys() == run.original.keys()
    unnamed = tiny.federation(tmp_path / "run")
    with pytest.raises(ValueError, match="no name to load it by: it was built from a config"):
        unnamed.save_model(str(tmp_path / "saved"), format="lora")
    assert not (tmp_path / "saved").exists()


def test_a_lora_bias_without_a_bias_to_take_it_is_not_merged(tmp_path):
    run = train(Kind(tiny.llama, CAUSAL | {"target_modules": ["q_proj"], "lora_bias": True}), tmp_path)
    with pytest.raises(ValueError, match=r"q_proj` has no bias that could take `lora_bias`.*`format=\"full\"`"):
        run.save(tmp_path / "saved", format="merged")
    for format in ("full", "lora"):
        for path, logits in loaded(run.save(tmp_path / format, format=format).folder, run.kind, run.base).items():
            expected = logits_of(run.trainer.model)
            assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max(), (format, path)
