"""GLUE by hand; the definitions are those of evaluate's metrics/glue/glue.py."""

import math
import warnings

import numpy as np
import pytest

from fedex_hf.metrics import load_metric
from fedex_hf.metrics.glue import GLUE_CONFIGS


# Two right positives, one wrong positive, one missed positive, one right negative.
PREDICTED = [1, 1, 0, 1, 0]
RIGHT = [1, 0, 0, 1, 1]


def compute(config, predictions=PREDICTED, references=RIGHT):
    return load_metric("glue", config).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("config", sorted(config for config, keys in GLUE_CONFIGS.items() if keys == ("accuracy",)))
def test_accuracy(config):
    assert compute(config) == {"accuracy": 3 / 5}


@pytest.mark.parametrize("config", ["mrpc", "qqp"])
def test_accuracy_and_f1_of_the_positive_class(config):
    scores = compute(config)
    assert scores == {"accuracy": 3 / 5, "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}
    assert scores["f1"] != pytest.approx(2 * 1 / (2 * 1 + 1 + 1))  # the twin: of the negative class


def test_matthews_correlation():
    assert compute("cola") == {"matthews_correlation": pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))}


def test_three_classes():
    assert compute("mnli_mismatched", [0, 1, 2, 2], [0, 2, 2, 2]) == {"accuracy": 3 / 4}


def test_correlations_with_ties():
    predicted, right = [0.5, 2.0, 2.0, 4.75], [1.0, 0.0, 3.0, 5.0]
    scores = compute("stsb", predicted, right)
    ranks = [1.0, 2.5, 2.5, 4.0], [2.0, 1.0, 3.0, 4.0]  # ties share the mean rank
    assert scores["pearson"] == pytest.approx(np.corrcoef(predicted, right)[0, 1], abs=1e-7)
    assert scores["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-7)
    assert abs(scores["pearson"] - scores["spearmanr"]) > 0.01


def test_constant_predictions():
    assert compute("cola", [1] * 5) == {"matthews_correlation": 0.0}
    assert compute("mrpc", [0] * 5) == {"accuracy": 2 / 5, "f1": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy's, that it is not defined
        scores = compute("stsb", [2.5] * 3, [1.0, 2.0, 3.0])
    assert math.isnan(scores["pearson"])
    assert math.isnan(scores["spearmanr"])
