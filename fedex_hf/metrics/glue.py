"""GLUE (Wang et al. 2019, arXiv 1804.07461) by the definitions of `evaluate`'s `metrics/glue/glue.py`."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from fedex_hf.metrics.base import OfflineMetric, describe, refuse_config


GLUE_CONFIGS = {
    "cola": ("matthews_correlation",),
    "hans": ("accuracy",),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
    "wnli": ("accuracy",),
}


class Glue(OfflineMetric):
    """The metrics of one GLUE task, as fractions: accuracy and F1 in [0, 1], correlations in [-1, 1].

    Predictions and references are class indices, int64; for `stsb` scores, float32. As in `evaluate`, F1 is that of
    class 1, a constant prediction has a Matthews correlation of 0 and Pearson and Spearman correlations of NaN (SciPy
    warns), and `stsb` needs two examples.

    Args:
        config_name: A key of `GLUE_CONFIGS`. `evaluate` has no `ax`, whose labels are not public.

    Example:
        >>> Glue("mrpc").compute(predictions=[1, 1, 0, 1], references=[1, 0, 0, 1])
        {'accuracy': 0.75, 'f1': 0.8}
    """

    def _info(self) -> Any:
        refuse_config("glue", self.config_name, GLUE_CONFIGS)
        value = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return describe(
            "Metrics of the GLUE tasks.",
            "Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding, 2019",
            {"predictions": value, "references": value},
            array_format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        # `evaluate` 0.4.3 hands over lazy columns where `datasets` has them; 0.4.6 does not.
        predictions, references = np.asarray(predictions), np.asarray(references)
        return {key: _SCORES[key](predictions, references) for key in GLUE_CONFIGS[self.config_name]}


_SCORES = {
    "accuracy": lambda predictions, references: float((predictions == references).mean()),
    "f1": lambda predictions, references: float(f1_score(y_true=references, y_pred=predictions)),
    "matthews_correlation": lambda predictions, references: float(matthews_corrcoef(references, predictions)),
    "pearson": lambda predictions, references: float(pearsonr(predictions, references)[0]),
    "spearmanr": lambda predictions, references: float(spearmanr(predictions, references)[0]),
}
