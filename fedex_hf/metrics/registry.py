"""The registry of metrics. A metric's module, and with it the packages it needs, is imported when it is loaded."""

from __future__ import annotations

from importlib import import_module

import evaluate

from fedex_hf.metrics.requirements import PARTS, require


# Name -> module of `fedex_hf.metrics` and class. A new metric is one file, one line here, one in requirements.py.
METRICS = {
    "choices": "choices.Choices",
    "commonsense": "commonsense.Commonsense",
    "e2e_nlg": "e2e_nlg.E2ENLG",
    "glue": "glue.Glue",
    "gsm8k": "gsm8k.GSM8K",
    "math": "math_answers.MathAnswers",
}


def load_metric(name: str, config_name: str | None = None) -> evaluate.Metric:
    """Load a metric as `evaluate.load` does, from this package instead of the Hub.

    Args:
        name: A key of `METRICS`.
        config_name: The task of `glue` (`"cola"`) and the data set of `commonsense` (`"boolq"`).

    Raises:
        ValueError: If the name or the configuration is unknown.
        MissingRequirementError: If a package is missing. `e2e_nlg` checks when it computes, for the scores asked for.

    Example:
        >>> load_metric("gsm8k").compute(predictions=["So she pays $1,200."], references=["... #### 1200"])
        {'exact_match': 1.0}
    """
    if name not in METRICS:
        raise ValueError(f"`name={name!r}` is no metric. Allowed: {', '.join(map(repr, sorted(METRICS)))}.")
    if name not in PARTS:
        require(name)
    module, attribute = METRICS[name].split(".")
    return getattr(import_module(f"fedex_hf.metrics.{module}"), attribute)(config_name)
