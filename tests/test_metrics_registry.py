"""Loading metrics, what they share, and what they say where something is missing."""

import subprocess
import sys

import evaluate
import numpy as np
import pytest

from fedex_hf.metrics import METRICS, MissingRequirementError, load_metric, missing_requirements, requirements
from fedex_hf.metrics.e2e_nlg import E2E_METRICS


CONFIGS = {"glue": "sst2", "commonsense": "boolq"}
# Metric -> a right and a wrong input.
RIGHT = {
    "choices": {"predictions": [[-1.0, -2.0]], "choices": [["a", "b"]], "references": [0]},
    "commonsense": {"predictions": ["true"], "references": ["true"]},
    "e2e_nlg": {"predictions": ["A pub near the river."], "references": [["A pub near the river."]]},
    "glue": {"predictions": [1], "references": [1]},
    "gsm8k": {"predictions": ["18"], "references": ["#### 18"]},
    "math": {"predictions": ["\\boxed{18}"], "references": ["\\boxed{18}"]},
}
OPTIONS = {"e2e_nlg": {"metrics": ["bleu"]}}


@pytest.fixture(params=sorted(METRICS))
def name(request):
    return request.param


def test_every_metric_is_an_evaluate_metric(name):
    metric = load_metric(name, CONFIGS.get(name))
    assert isinstance(metric, evaluate.Metric)
    scores = metric.compute(**RIGHT[name], **OPTIONS.get(name, {}))
    assert all(type(value) is float for value in scores.values())
    assert next(iter(scores.values())) == pytest.approx(1.0)


def test_examples_can_be_added_one_by_one_and_the_metric_used_again(name):
    metric = load_metric(name, CONFIGS.get(name))
    for _ in range(2):
        for _ in range(3):
            metric.add_batch(**RIGHT[name])
        assert next(iter(metric.compute(**OPTIONS.get(name, {})).values())) == pytest.approx(1.0)


def test_nothing_is_written_to_the_cache(name, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    load_metric(name, CONFIGS.get(name)).compute(**RIGHT[name], **OPTIONS.get(name, {}))
    assert not (tmp_path / "cache").exists()


def test_processes_can_share_a_metric_through_the_disk(tmp_path):
    from fedex_hf.metrics.gsm8k import GSM8K

    metric = GSM8K(cache_dir=str(tmp_path), keep_in_memory=False)
    assert metric.compute(**RIGHT["gsm8k"]) == {"exact_match": 1.0}
    assert list(tmp_path.iterdir())  # the twin of the test above


def test_no_examples(name):
    metric = load_metric(name, CONFIGS.get(name))
    with pytest.raises(ValueError, match="has nothing to compute"):
        metric.compute()
    with pytest.raises(ValueError, match=r"0.* examples\. It needs equally many of each, and at least one"):
        metric.compute(**{key: [] for key in RIGHT[name]})


def test_unequal_numbers_of_examples(name):
    inputs = {**RIGHT[name], "references": RIGHT[name]["references"] * 2}
    with pytest.raises(ValueError, match="'references': 2"):
        load_metric(name, CONFIGS.get(name)).compute(**inputs)


def test_missing_input():
    with pytest.raises(ValueError, match=r"It needs \['predictions', 'references'\]"):
        load_metric("gsm8k").compute(predictions=["1"])
    with pytest.raises(ValueError, match="choices"):
        load_metric("choices").compute(predictions=[[1.0]], references=[0])


def test_arrays_are_taken():
    assert load_metric("glue", "rte").compute(predictions=np.array([0, 1]), references=np.array([0, 0])) == {
        "accuracy": 0.5
    }


def test_unknown_names():
    with pytest.raises(ValueError, match=r"`name='rouge'` is no metric\. Allowed: 'choices', 'commonsense'"):
        load_metric("rouge")
    with pytest.raises(ValueError, match="is no metric"):
        missing_requirements("rouge")
    with pytest.raises(ValueError, match="`glue` got `config_name='sst3'`"):
        load_metric("glue", "sst3")
    with pytest.raises(ValueError, match=r"'default'.*'ARC-Challenge', 'ARC-Easy', 'boolq'"):
        load_metric("commonsense")
    with pytest.raises(ValueError, match=r"no scores \['rouge'\]\. Allowed: bleu, nist, meteor, rougeL, cider"):
        missing_requirements("e2e_nlg", ["bleu", "rouge"])
    with pytest.raises(ValueError, match="Allowed: none"):
        missing_requirements("gsm8k", ["bleu"])


def test_one_metric_does_not_import_the_packages_of_another():
    code = (
        "import sys, fedex_hf.metrics as m; m.load_metric('gsm8k'); m.load_metric('e2e_nlg'); m.load_metric('math');"
        "m.missing_requirements('e2e_nlg'); m.missing_requirements('glue');"
        "print([name for name in ('sacrebleu', 'pycocoevalcap', 'math_verify') if name in sys.modules]);"
        "m.load_metric('e2e_nlg').compute(predictions=['a'], references=[['a']], metrics=['nist']);"
        "print([name for name in ('sacrebleu', 'pycocoevalcap', 'math_verify') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "['sacrebleu']"]


# ---- what is missing ----


def test_nothing_is_missing_here(name):
    assert missing_requirements(name) == []


def test_the_registry_and_the_requirements_name_the_same_metrics():
    assert set(METRICS) == set(requirements.REQUIREMENTS)
    assert set(requirements.REQUIREMENTS["e2e_nlg"]) == {
        need for part in requirements.PARTS["e2e_nlg"].values() for need in part
    }


def test_without_java_bleu_and_nist_remain(monkeypatch):
    monkeypatch.setattr(requirements.shutil, "which", lambda name: None)
    possible = [part for part in E2E_METRICS if not missing_requirements("e2e_nlg", [part])]
    assert possible == ["bleu", "nist"]
    (sentence,) = missing_requirements("e2e_nlg")
    assert "No `java` is on the PATH" in sentence
    assert "install a JRE (17 is known to work)" in sentence
    metric = load_metric("e2e_nlg")
    assert set(metric.compute(**RIGHT["e2e_nlg"], metrics=possible)) == {"bleu", "nist"}
    with pytest.raises(
        MissingRequirementError, match=r"`e2e_nlg` \(bleu, cider\) cannot be computed here\. No `java`"
    ):
        metric.compute(**RIGHT["e2e_nlg"], metrics=["bleu", "cider"])


def test_a_java_that_is_only_a_placeholder(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (sentence,) = missing_requirements("e2e_nlg", ["meteor"])
    assert f"`{java} -version` fails" in sentence
    java.write_text("not a program")
    requirements._runs.cache_clear()
    assert missing_requirements("e2e_nlg", ["meteor"]) == [sentence]


@pytest.mark.parametrize(
    ("metric", "package", "distribution"),
    [
        ("math", "math_verify", "math-verify"),
        ("glue", "sklearn", "scikit-learn"),
        ("e2e_nlg", "sacrebleu", "sacrebleu"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, metric, package, distribution):
    find_spec = requirements.find_spec
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == package else find_spec(name))
    (sentence,) = missing_requirements(metric)
    assert sentence == f"The package `{distribution}` is missing: pip install 'fedex-hf[metrics]'."
    with pytest.raises(MissingRequirementError, match=distribution):
        load_metric(metric, CONFIGS.get(metric)).compute(**RIGHT[metric], **OPTIONS.get(metric, {}))
