"""Aggregating adapters without a Trainer, against a dense float64 reference; each check has a twin that fails."""

from __future__ import annotations

import json
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from test_adapter_files import HEAD, QUERY, Bomb, Team, edit_config, edit_tensors, labels, write_team
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    RobertaModel,
)

from fedex_hf import FedExAggregator, UnsupportedModelError
from fedex_hf.adapter_aggregation import AggregationReport, aggregate_adapters
from fedex_hf.tensor_files import AdapterFormatError, TensorFile
from fedex_hf.updates import LowRankDelta


PREFIX = "base_model.model."
WEIGHTS = [3.0, 1.0, 2.0]
SCALING = 2.0  # lora_alpha 8 / r 4
TOLERANCE = 1e-6  # logits of order 1 after float32 arithmetic; 1.4e-7 at most when this was written


# ---- The reference: float64, dense, nothing of fedex_hf ----


def ideal_deltas(
    team: Team, weights: Sequence[float], scaling: Callable[[str], float] = lambda _: SCALING
) -> dict[str, torch.Tensor]:
    """Name of a base weight -> weighted mean of the members' products, in the layout of the weight."""
    shares = [weight / sum(weights) for weight in weights]
    states = team.states()
    found = {}
    for key in states[0]:
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removesuffix(".lora_A.weight")
        mean = sum(
            share * state[f"{layer}.lora_B.weight"].double() @ state[key].double()
            for share, state in zip(shares, states)
        )
        name = layer.removeprefix(PREFIX)
        found[f"{name}.weight"] = scaling(name) * (mean.T if team.kind == "gpt2" else mean)
    return found


def reference(team: Team, weights: Sequence[float], deltas: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The base in float64 with these changes and the mean of the members' other tensors."""
    model = team.auto.from_pretrained(team.base, **labels(team.kind)).double()
    parameters = dict(model.named_parameters())
    states = team.states()
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name] += delta
        for key in states[0]:
            if ".lora_" not in key:
                name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
                mean = sum(weight * state[key].double() for weight, state in zip(weights, states)) / sum(weights)
                parameters[name].copy_(mean)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """On fixed tokens, float64."""
    tokens = torch.randint(3, tiny.VOCAB, (4, tiny.LENGTH), generator=torch.Generator().manual_seed(3))
    return model.eval()(input_ids=tokens).logits.double()


def distance(team: Team, output: Path, expected: PreTrainedModel) -> float:
    """Largest difference of logits between what plain `from_pretrained` makes of `output` and the reference."""
    loaded = team.auto.from_pretrained(output, **({} if (output / "config.json").exists() else labels(team.kind)))
    return float((logits(loaded) - logits(expected)).abs().max())


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Team]:
    return {kind: write_team(tmp_path_factory.mktemp(kind), kind) for kind in ("roberta", "llama", "gpt2")}


def run(team: Team, output: Path, **kwargs: Any) -> AggregationReport:
    given = {"client_weights": WEIGHTS[: len(team.adapters)], "progress": False}
    return aggregate_adapters(team.adapters, team.base, output, **(given | kwargs))


# ---- Exact, in three formats, and the twins that are not ----


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2"])
def test_what_plain_from_pretrained_loads_is_the_mean_of_the_models(
    teams: dict[str, Team], tmp_path: Path, kind: str, format: str
) -> None:
    team = teams[kind]
    report = run(team, tmp_path / "out", format=format)
    expected = reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))
    assert distance(team, tmp_path / "out", expected) < TOLERANCE
    assert report.exactness.aggregation_error < 1e-6
    assert {layer.removeprefix(PREFIX) + ".weight" for layer in report.exactness.layers} == ideal_deltas(
        team, [1] * 3
    ).keys()
    ranks = {"full": {4}, "lora": {12}, "merged": set()}[format]
    assert set(report.ranks.values()) == ranks
    assert (tmp_path / "out" / "adapter_config.json").exists() is (format != "merged")
    assert (tmp_path / "out" / "config.json").exists() is (format != "lora")


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
def test_the_twin_fedit_fails_the_same_check(teams: dict[str, Team], tmp_path: Path, format: str) -> None:
    team = teams["llama"]
    report = run(team, tmp_path / "out", format=format, aggregator="fedit")
    expected = reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))
    assert distance(team, tmp_path / "out", expected) > 100 * TOLERANCE
    assert report.exactness.aggregation_error > 0.1
    assert report.exactness.aggregation_error == pytest.approx(report.exactness.fedit_deviation, rel=1e-5)


class Transposed(FedExAggregator):
    """The fault of the paper's code: right for square layers' shapes only."""

    def aggregate_layer(self, factors: Any, client_weights: Any) -> Any:
        mean, residual = super().aggregate_layer(factors, client_weights)
        return mean, LowRankDelta(residual.B.T.contiguous(), residual.A.T.contiguous(), residual.scaling)


class Unscaled(FedExAggregator):
    """The residual without `alpha / r`."""

    def aggregate_layer(self, factors: Any, client_weights: Any) -> Any:
        mean, residual = super().aggregate_layer(factors, client_weights)
        return mean, LowRankDelta(residual.A, residual.B, 1.0)


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
@pytest.mark.parametrize("wrong", [Transposed, Unscaled])
def test_the_twins_transposed_and_unscaled_fail_the_same_check(
    teams: dict[str, Team], tmp_path: Path, wrong: Any, format: str
) -> None:
    team = teams["roberta"]
    aggregator = wrong()
    aggregator.is_exact = False  # otherwise refused, see below
    report = run(team, tmp_path / "out", format=format, aggregator=aggregator)
    expected = reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))
    assert distance(team, tmp_path / "out", expected) > 100 * TOLERANCE
    assert report.exactness.aggregation_error > 0.1


def test_the_certificate_is_what_the_files_say(teams: dict[str, Team], tmp_path: Path) -> None:
    team = teams["gpt2"]
    report = run(team, tmp_path / "out", aggregator_kwargs={"residual_rank": 3})
    old, new = (load_file(path / "model.safetensors") for path in (team.base, tmp_path / "out"))
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, ideal in ideal_deltas(team, WEIGHTS).items():
        layer = PREFIX + name.removesuffix(".weight")
        A, B = (adapter[f"{layer}.lora_{factor}.weight"].double() for factor in "AB")
        installed = new[name].double() - old[name].double() + SCALING * (B @ A).T
        measured = report.exactness.layers[layer]
        assert measured.change == pytest.approx(float(ideal.norm()), rel=1e-9)
        assert measured.error == pytest.approx(float((installed - ideal).norm()), rel=1e-6)
        assert measured.fedit == pytest.approx(float((SCALING * (B @ A).T - ideal).norm()), rel=1e-6)
        best = torch.linalg.svdvals(ideal - SCALING * (B @ A).T)
        assert measured.error == pytest.approx(float(best[3:].norm()), rel=1e-3)  # Eckart-Young
    assert report.settings["residual_rank"] == 3


@pytest.mark.parametrize("wrong", [Transposed, Unscaled])
def test_a_wrong_result_of_an_exact_method_is_refused_by_the_layer(
    teams: dict[str, Team], tmp_path: Path, wrong: Any
) -> None:
    for format in ("full", "lora", "merged"):
        with pytest.raises(RuntimeError, match=r"`base_model\.model\.roberta.*query`: .*`fedex` does not allow"):
            run(teams["roberta"], tmp_path / "out", format=format, aggregator=wrong())
    assert not any(tmp_path.iterdir())


def test_what_was_written_wrongly_is_noticed(
    teams: dict[str, Team], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TensorFile.overwrite
    monkeypatch.setattr(TensorFile, "overwrite", lambda self, key, tensor: original(self, key, tensor * 1.0001))
    with pytest.raises(RuntimeError, match=r"`base_model.*`: what was written is .* away"):
        run(teams["llama"], tmp_path / "out")
    assert not any(tmp_path.iterdir())


# ---- Weights, methods, layouts ----


def test_weights_are_normalised_and_equal_by_default(teams: dict[str, Team], tmp_path: Path) -> None:
    team = teams["llama"]
    weighted = run(team, tmp_path / "weighted", client_weights=[30, 10, 20])
    assert weighted.weights == pytest.approx((1 / 2, 1 / 6, 1 / 3))
    equal = run(team, tmp_path / "equal", client_weights=None)
    assert equal.weights == pytest.approx((1 / 3,) * 3)
    expected = {
        name: reference(team, each, ideal_deltas(team, each))
        for name, each in [("weighted", WEIGHTS), ("equal", [1, 1, 1])]
    }
    assert distance(team, tmp_path / "weighted", expected["weighted"]) < TOLERANCE
    assert distance(team, tmp_path / "equal", expected["equal"]) < TOLERANCE
    assert distance(team, tmp_path / "equal", expected["weighted"]) > 100 * TOLERANCE


def test_one_adapter_is_itself(teams: dict[str, Team], tmp_path: Path) -> None:
    team = Team("llama", teams["llama"].base, teams["llama"].adapters[:1])
    report = run(team, tmp_path / "out")
    assert report.exactness.fedit_deviation == 0.0
    assert distance(team, tmp_path / "out", reference(team, [1.0], ideal_deltas(team, [1.0]))) < TOLERANCE


def test_ffa_is_exact_with_one_frozen_factor_and_names_the_layer_otherwise(tmp_path: Path) -> None:
    team = write_team(tmp_path, "llama", members=2)
    with pytest.raises(ValueError, match=r"Layer `base_model.*_proj`.*`A` factors differ"):
        run(team, tmp_path / "out", aggregator="ffa")
    shared = {key: each for key, each in team.states()[0].items() if ".lora_A." in key}
    edit_tensors(team.adapters[1], lambda tensors: tensors.update(shared))
    report = run(team, tmp_path / "out", aggregator="ffa")
    assert report.exactness.aggregation_error < 1e-6
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(team.base / "model.safetensors").keys()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (team.base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["full", "lora"])
def test_patterns_and_rslora_are_scaled_as_peft_does(tmp_path: Path, format: str) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 6}, "use_rslora": True}
    team = write_team(tmp_path, "llama", **patterns)

    def scaling(name: str) -> float:
        return (6 if "up_proj" in name else 8) / math.sqrt(2 if "q_proj" in name else 4)

    report = run(team, tmp_path / "out", format=format)
    assert distance(team, tmp_path / "out", reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS, scaling))) < TOLERANCE
    if format == "lora":
        assert {report.ranks[layer] for layer in report.ranks if "q_proj" in layer} == {6}
        assert {report.ranks[layer] for layer in report.ranks if "up_proj" in layer} == {12}


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
def test_trained_biases_are_averaged(tmp_path: Path, format: str) -> None:
    team = write_team(tmp_path, "roberta", bias="lora_only")
    run(team, tmp_path / "out", format=format)
    assert distance(team, tmp_path / "out", reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))) < TOLERANCE


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
def test_the_bias_of_lora_b_is_averaged_and_scaled(tmp_path: Path, format: str) -> None:
    team = write_team(tmp_path, "roberta", lora_bias=True)
    run(team, tmp_path / "out", format=format)
    expected = reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))
    with torch.no_grad():
        for key in team.states()[0]:
            if key.endswith(".lora_B.bias"):
                mean = sum(weight * state[key].double() for weight, state in zip(WEIGHTS, team.states())) / sum(
                    WEIGHTS
                )
                expected.get_parameter(key.removeprefix(PREFIX).replace(".lora_B.bias", ".bias")).add_(SCALING * mean)
    assert distance(team, tmp_path / "out", expected) < TOLERANCE


def test_trained_tokens_stay_in_the_adapter(tmp_path: Path) -> None:
    team = write_team(tmp_path, "llama", trainable_token_indices={"embed_tokens": [5, 7]})
    with pytest.raises(UnsupportedModelError, match=r"`base_model\.model\.model\.embed_tokens\..*cannot be merged"):
        run(team, tmp_path / "merged", format="merged")
    key = next(key for key in team.states()[0] if "embed_tokens" in key)
    for format in ("full", "lora"):
        run(team, tmp_path / format, format=format)
        found = load_file(tmp_path / format / "adapter_model.safetensors")[key]
        expected = sum(weight * state[key].double() for weight, state in zip(WEIGHTS, team.states())) / sum(WEIGHTS)
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("format", ["full", "lora"])
def test_adapters_in_bfloat16_are_aggregated_exactly(tmp_path: Path, format: str) -> None:
    team = write_team(tmp_path, "llama")
    for path in team.adapters:
        edit_tensors(path, lambda tensors: tensors.update({key: each.bfloat16() for key, each in tensors.items()}))
    report = run(team, tmp_path / "out", format=format)
    assert report.exactness.aggregation_error < 1e-6
    assert report.exactness.fedit_deviation > 0.1
    assert distance(team, tmp_path / "out", reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))) < TOLERANCE


# ---- Bases as they come ----


@pytest.mark.parametrize("format", ["full", "merged"])
def test_a_sharded_base_stays_sharded(tmp_path: Path, format: str) -> None:
    team = write_team(tmp_path, "llama")
    AutoModelForCausalLM.from_pretrained(team.base).save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    team.base = tmp_path / "sharded"
    names = {path.name for path in team.base.glob("*.safetensors")}
    assert len(names) > 2
    run(team, tmp_path / "out", format=format)
    assert {path.name for path in (tmp_path / "out").glob("model*.safetensors")} == names
    assert distance(team, tmp_path / "out", reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))) < TOLERANCE


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_without_prefix_and_head_gets_the_head_that_was_trained(
    tmp_path: Path, format: str, sharded: bool
) -> None:
    encoder = RobertaModel(tiny.roberta().config, add_pooling_layer=False)
    encoder.config.num_labels = 2  # the default: the file knows nothing of the task
    team = write_team(tmp_path, "roberta", base=encoder)
    if sharded:
        encoder.save_pretrained(team.base, max_shard_size="60kB")
        (team.base / "model.safetensors").unlink()
    run(team, tmp_path / "out", format=format)
    expected = reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS))
    assert distance(team, tmp_path / "out", expected) < TOLERANCE
    if format == "merged":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["RobertaForSequenceClassification"]
        assert len(config["id2label"]) == tiny.LABELS


@pytest.mark.parametrize("format", ["full", "merged"])
def test_a_base_whose_head_has_another_size_is_refused_by_the_key(tmp_path: Path, format: str) -> None:
    team = write_team(tmp_path, "roberta")
    for path in team.adapters:
        edit_tensors(
            path,
            lambda tensors: tensors.update({HEAD: torch.ones(5, 32), HEAD.replace("weight", "bias"): torch.ones(5)}),
        )
    with pytest.raises(UnsupportedModelError, match=r"`classifier\.out_proj\.\w+`.*lora.*num_labels"):
        run(team, tmp_path / "out", format=format)
    run(team, tmp_path / "out", format="lora")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=5, ignore_mismatched_sizes=True
    )
    assert torch.equal(loaded.classifier.out_proj.weight, torch.ones(5, 32))


def test_the_next_round_starts_from_the_last_output(teams: dict[str, Team], tmp_path: Path) -> None:
    first = teams["llama"]
    run(first, tmp_path / "first")
    second = Team("llama", tmp_path / "first", write_team(tmp_path, "llama").adapters)
    report = run(second, tmp_path / "second")
    assert report.exactness.aggregation_error < 1e-6
    base = load_file(tmp_path / "first" / "model.safetensors")
    new = load_file(tmp_path / "second" / "model.safetensors")
    assert base.keys() == new.keys()
    assert any(not torch.equal(base[key], new[key]) for key in base)


def test_peft_finds_the_base_that_was_written(teams: dict[str, Team], tmp_path: Path) -> None:
    team = teams["llama"]
    expected = logits(reference(team, WEIGHTS, ideal_deltas(team, WEIGHTS)))
    for format, base in (("full", tmp_path / "full"), ("lora", team.base)):
        run(team, tmp_path / format, format=format)
        config = json.loads((tmp_path / format / "adapter_config.json").read_text())
        assert Path(config["base_model_name_or_path"]) == base.resolve()
        assert (
            float((logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / format)) - expected).abs().max())
            < TOLERANCE
        )


def in_bfloat16(team: Team, folder: Path) -> Team:
    """The same adapters on the base rounded to bfloat16."""
    AutoModelForCausalLM.from_pretrained(team.base).bfloat16().save_pretrained(folder)
    return Team(team.kind, folder, team.adapters)


def test_a_bfloat16_base_is_refused_by_the_key_where_the_residual_would_round_away(
    teams: dict[str, Team], tmp_path: Path
) -> None:
    team = in_bfloat16(teams["llama"], tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match=r"`model\.layers\.0\..*\.weight`.* BF16.*`format=\"lora\"`"):
        run(team, tmp_path / "out")
    assert run(team, tmp_path / "lora", format="lora").exactness.aggregation_error < 1e-6
    assert run(team, tmp_path / "fedit", aggregator="fedit").cast_survival is None  # leaves the base alone


def test_merging_into_bfloat16_tells_what_survives(
    teams: dict[str, Team], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    team = in_bfloat16(teams["llama"], tmp_path / "base")
    report = run(team, tmp_path / "out", format="merged")
    old, new = (load_file(path / "model.safetensors") for path in (team.base, tmp_path / "out"))
    lost = whole = 0.0
    for name, ideal in ideal_deltas(team, WEIGHTS).items():
        assert new[name].dtype == torch.bfloat16
        lost += float((new[name].double() - old[name].double() - ideal).square().sum())
        whole += float(ideal.square().sum())
    survives = 1 - math.sqrt(lost / whole)
    assert 0.5 < survives < 0.9999
    assert report.cast_survival == pytest.approx(survives, rel=1e-9)
    assert f"{100 * survives:.2f} % of the update survives" in caplog.text


def test_the_configuration_does_not_load_the_result_in_less_than_it_is_written_in(tmp_path: Path) -> None:
    team = write_team(tmp_path, "llama")
    edit = team.base / "config.json"
    edit.write_text(json.dumps(json.loads(edit.read_text()) | {"dtype": "bfloat16"}))
    run(team, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("format", ["full", "merged"])
def test_a_tied_weight_is_refused_by_its_names(tmp_path: Path, format: str) -> None:
    team = write_team(tmp_path, "gpt2", target_modules=["c_attn", "lm_head"])
    with pytest.raises(UnsupportedModelError, match=r"`lm_head\.weight`.*transformer\.wte\.weight.*`format=\"lora\"`"):
        run(team, tmp_path / "out", format=format)


def test_an_assignment_that_gives_each_client_its_own_base_is_refused(teams: dict[str, Team], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter directories do not say which"):
        run(teams["llama"], tmp_path / "out", aggregator_kwargs={"assignment": "keep"})
    assert not (tmp_path / "out").exists()


def test_a_weight_that_the_base_does_not_hold_is_refused_by_its_name(tmp_path: Path) -> None:
    team = write_team(tmp_path, "llama")
    path = team.base / "model.safetensors"
    tensors = load_file(path)
    tensors["renamed"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight`.*save_pretrained"):
        run(team, tmp_path / "out")
    run(team, tmp_path / "out", format="lora")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "evil/kernel"},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
    ],
)
def test_a_configuration_that_names_code_runs_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    team = write_team(tmp_path, "llama")
    edit = team.base / "config.json"
    edit.write_text(json.dumps(json.loads(edit.read_text()) | changes))
    (team.base / "modeling.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')")
    run(team, tmp_path / "out", format="lora")
    assert not (tmp_path / "boom").exists()


def test_no_pickle_of_a_base_or_an_adapter_is_read_or_copied(tmp_path: Path) -> None:
    team = write_team(tmp_path, "llama")
    for path in [team.base, *team.adapters]:
        for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    run(team, tmp_path / "out")
    assert not (tmp_path / "boom").exists()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


# ---- Adapters that do not fit together, or not to the base ----


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"r": 8, "lora_alpha": 16}, r"`base_model.*` has rank 4 in .*member-0` and 8 in .*not supported yet"),
        ({"lora_alpha": 4}, r"`base_model.*query` is scaled by 2\.0 in .* and by 1\.0 in"),
        ({"use_rslora": True}, r"`base_model.*query` is scaled by 2\.0 in .* and by 4\.0 in"),
        ({"target_modules": ["query"]}, r"`base_model.*value\.lora_A\.weight` is F32 .* and missing in"),
        ({"target_modules": ["query", "value", "key"]}, r"`base_model.*key\.lora_A\.weight` is missing in"),
        ({"bias": "lora_only"}, r"`base_model.*query\.base_layer\.bias` is missing in"),
    ],
)
def test_adapters_that_differ_are_refused_by_the_layer(tmp_path: Path, other: dict[str, Any], told: str) -> None:
    team = write_team(tmp_path / "one", members=1)
    team.adapters += write_team(tmp_path / "two", members=1, **other).adapters
    with pytest.raises(ValueError, match=told):
        run(team, tmp_path / "out", client_weights=None)
    assert not (tmp_path / "out").exists()


def test_patterns_that_mean_the_same_are_no_difference(tmp_path: Path) -> None:
    team = write_team(tmp_path / "one", "llama", members=1)
    same = {"r": 8, "lora_alpha": 16, "rank_pattern": {"proj": 4}, "alpha_pattern": {"proj": 8}}
    team.adapters += write_team(
        tmp_path / "two",
        "llama",
        members=1,
        **(same | {"rank_pattern": {".*proj": 4}, "alpha_pattern": {".*proj": 8}}),
    ).adapters
    assert run(team, tmp_path / "out", client_weights=None).exactness.aggregation_error < 1e-6


def test_another_dtype_is_refused_by_the_key(tmp_path: Path) -> None:
    team = write_team(tmp_path, members=2)
    edit_tensors(team.adapters[1], lambda tensors: tensors.update({HEAD: tensors[HEAD].half()}))
    with pytest.raises(ValueError, match=rf"`{HEAD}` is F32 of shape .* and F16"):
        run(team, tmp_path / "out", client_weights=None)


def test_adapters_of_another_base_are_refused_by_the_key(teams: dict[str, Team], tmp_path: Path) -> None:
    with pytest.raises((AdapterFormatError, UnsupportedModelError), match=r"lacks `base_model|PEFT cannot put"):
        aggregate_adapters(teams["llama"].adapters, teams["gpt2"].base, tmp_path / "out", progress=False)
    wide = write_team(tmp_path, "llama", 1)
    config = json.loads((wide.base / "config.json").read_text()) | {"intermediate_size": 40}
    (wide.base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFormatError, match=r"`base_model.*mlp\.\w+\.lora_[AB]\.weight` in .* has the shape"):
        run(wide, tmp_path / "out")


def test_tensors_that_the_configuration_does_not_ask_for_are_refused_by_the_key(tmp_path: Path) -> None:
    team = write_team(tmp_path, members=1)
    key = "base_model.model.classifier.extra.weight"
    edit_tensors(team.adapters[0], lambda tensors: tensors.update({key: torch.ones(2)}))
    with pytest.raises(AdapterFormatError, match=rf"holds `{key}`"):
        run(team, tmp_path / "out")
    edit_tensors(team.adapters[0], lambda tensors: [tensors.pop(each) for each in (key, HEAD)])
    with pytest.raises(AdapterFormatError, match=rf"lacks `{HEAD}`"):
        run(team, tmp_path / "out")


def test_another_stated_base_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    team = write_team(tmp_path, "llama", members=2)
    run(team, tmp_path / "silent", format="lora")
    assert not caplog.text
    edit_config(team.adapters[1], base_model_name_or_path="somebody/else", revision="v2")
    run(team, tmp_path / "out", format="lora")
    assert "member-1` says that it was trained on `somebody/else` at `v2`" in caplog.text
    assert "member-0" not in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"client_weights": [1.0]}, "one weight per update"),
        ({"client_weights": [1.0, -1.0, 1.0]}, "positive finite"),
        ({"format": "gguf"}, "`format='gguf'`"),
        ({"aggregator": "none"}, "`aggregator='none'` is unknown"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(
    teams: dict[str, Team], tmp_path: Path, kwargs: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        run(teams["llama"], tmp_path / "out", **kwargs)
    with pytest.raises(ValueError, match="`adapters="):
        aggregate_adapters([], teams["llama"].base, tmp_path / "out")
    with pytest.raises(ValueError, match="`adapters="):
        aggregate_adapters("user/name", teams["llama"].base, tmp_path / "out")


# ---- Whole or not at all, and in little memory ----


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", ["nan in the last layer", "nan in the head", "interrupted"])
@pytest.mark.parametrize("format", ["full", "lora", "merged"])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    team = write_team(tmp_path / "team", members=2)
    key = {"nan in the last layer": QUERY.replace("layer.0", "layer.1").replace("query", "value") + ".lora_B.weight"}
    aggregator: Any = "fedex"
    if failure == "interrupted":
        aggregator = FedExAggregator()
        monkeypatch.setattr(aggregator, "aggregate_layer", _interrupt)
    else:
        name = key.get(failure, HEAD)
        edit_tensors(team.adapters[1], lambda tensors: tensors[name].fill_(float("nan")))
    error = KeyboardInterrupt if failure == "interrupted" else AdapterFormatError
    with pytest.raises(error, match=None if failure == "interrupted" else f"`{name}`.*member-1.* NaN"):
        run(team, tmp_path / "out", format=format, client_weights=None, aggregator=aggregator)
    assert [path.name for path in tmp_path.iterdir()] == ["team"]


def test_an_output_that_is_taken_is_left_alone(teams: dict[str, Team], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(teams["llama"], tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(teams["llama"], teams["llama"].base)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    run(teams["llama"], tmp_path / "empty", format="lora")
    assert (tmp_path / "empty" / "aggregation.json").is_file()


def test_the_inputs_are_not_changed(teams: dict[str, Team], tmp_path: Path) -> None:
    team = teams["llama"]
    files = [path for folder in [team.base, *team.adapters] for path in sorted(folder.rglob("*")) if path.is_file()]
    before = [path.read_bytes() for path in files]
    for format in ("full", "lora", "merged"):
        run(team, tmp_path / format, format=format)
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("format", ["full", "lora", "merged"])
@pytest.mark.parametrize(("kind", "largest"), [("llama", (32, 48)), ("roberta", (32, 32))])
def test_one_layer_is_in_memory_at_a_time(
    tmp_path: Path, kind: str, largest: tuple[int, int], format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = write_team(tmp_path, kind, members=6)
    live = peak = 0

    def forget(size: int) -> None:
        nonlocal live
        live -= size

    original = TensorFile.read

    def read(self: TensorFile, key: str) -> torch.Tensor:
        nonlocal live, peak
        tensor = original(self, key)
        live += tensor.nbytes
        peak = max(peak, live)
        weakref.finalize(tensor, forget, tensor.nbytes)
        return tensor

    monkeypatch.setattr(TensorFile, "read", read)
    run(team, tmp_path / "out", format=format, client_weights=None)
    factors = 6 * 4 * sum(largest) * 4  # bytes of six members' factors of the largest layer
    weight = math.prod(largest) * 4  # also that of a head, of which six would not fit under the limit
    assert live == 0
    assert factors <= peak <= 2 * factors + 2 * weight  # the last layer's may still be held when the next are read
    assert kind == "llama" or 6 * weight > 2 * factors + 2 * weight
    assert sum(tensor.nbytes for state in team.states() for tensor in state.values()) > 2 * peak


class Median(FedExAggregator):
    """A method with an opinion of its own on the other tensors."""

    def aggregate(self, updates: Any, client_weights: Any) -> Any:
        update = super().aggregate(updates, client_weights)
        for name in update.tensors:
            stacked = torch.stack([each.tensors[name] for each in updates])
            update.tensors[name] = stacked.median(dim=0).values
        return update


def test_a_method_decides_on_the_other_tensors_too(teams: dict[str, Team], tmp_path: Path) -> None:
    team = teams["roberta"]
    run(team, tmp_path / "out", format="lora", aggregator=Median())
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[HEAD]
    assert torch.equal(found, torch.stack([state[HEAD] for state in team.states()]).median(dim=0).values)


def test_the_report_is_on_the_disk(teams: dict[str, Team], tmp_path: Path) -> None:
    team = teams["llama"]
    report = run(team, tmp_path / "out", aggregator=FedExAggregator())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "out" / "aggregation.json").read_text(), parse_constant=refuse)
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["method"] == "fedex"
    assert written["adapters"] == [str(path) for path in team.adapters]
    assert written["weights"] == pytest.approx([1 / 2, 1 / 6, 1 / 3])
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    assert written["ranks"][layer] == 4
    assert written["exactness"]["layers"][layer].keys() == {"change", "error", "fedit", "resolution"}
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    base = sizes["model.safetensors"]
    assert base < report.bytes_written < 3 * base
    assert report.bytes_read > base + 2 * sum(each.nbytes for state in team.states() for each in state.values())


def test_adapters_that_cancel_out_are_not_reported_as_infinitely_wrong(tmp_path: Path) -> None:
    team = write_team(tmp_path, "llama", members=2)
    opposite = {key: -each if ".lora_B." in key else each for key, each in team.states()[0].items()}
    edit_tensors(team.adapters[1], lambda tensors: tensors.update(opposite))
    for format in ("full", "lora", "merged"):
        report = run(team, tmp_path / format, format=format, client_weights=None)
        assert report.exactness.aggregation_error == 0.0
    written = json.loads((tmp_path / "full" / "aggregation.json").read_text())
    assert all(each["change"] == 0.0 for each in written["exactness"]["layers"].values())
