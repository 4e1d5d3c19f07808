"""The field's metrics as `evaluate.Metric`s that need no network: `load_metric` and what goes with each."""

from fedex_hf.metrics.registry import METRICS, load_metric
from fedex_hf.metrics.requirements import MissingRequirementError, missing_requirements


__all__ = ["METRICS", "MissingRequirementError", "load_metric", "missing_requirements"]
