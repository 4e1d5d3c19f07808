"""Methods compared in one command: the same task, starts and splits for each, results, tables and plots."""

from fedex_hf.comparison.arguments import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    RecipeError,
    RecipeTrainingArguments,
    parse_recipe,
    quiet,
    refusing,
)
from fedex_hf.comparison.methods import CENTRALIZED, Method
from fedex_hf.comparison.results import Run, RunResult, read_results
from fedex_hf.comparison.runner import compare
from fedex_hf.comparison.settings import ComparisonError
from fedex_hf.comparison.task import Task


__all__ = [
    "CENTRALIZED",
    "ComparisonArguments",
    "ComparisonError",
    "DataArguments",
    "Method",
    "ModelArguments",
    "RecipeError",
    "RecipeTrainingArguments",
    "Run",
    "RunResult",
    "Task",
    "compare",
    "parse_recipe",
    "quiet",
    "read_results",
    "refusing",
]
