"""What metrics need beside this package's own dependencies, and whether it is here. Looks; imports nothing of it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec


JAVA = "java"
_COCO = ("pycocoevalcap", JAVA)

# Metric -> importable packages it needs.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "choices": (),
    "commonsense": (),
    "e2e_nlg": ("sacrebleu", *_COCO),
    "glue": ("scipy", "sklearn"),
    "gsm8k": (),
    "math": ("math_verify",),
}
# Metric -> its scores that can be asked for one by one, and what each needs.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "e2e_nlg": {
        "bleu": ("sacrebleu",),
        "nist": ("sacrebleu",),
        "meteor": _COCO,
        "rougeL": _COCO,
        "cider": _COCO,
    }
}
_DISTRIBUTIONS = {"math_verify": "math-verify", "sklearn": "scikit-learn"}


class MissingRequirementError(RuntimeError):
    """A metric was asked for that cannot be computed here."""


def missing_requirements(name: str, parts: Iterable[str] | None = None) -> list[str]:
    """Tell what a metric lacks here, so that a recipe can refuse or drop it before it trains.

    Args:
        name: A key of `fedex_hf.metrics.METRICS`.
        parts: For `e2e_nlg`, the scores that are wanted (`"bleu"`, `"nist"`, `"meteor"`, `"rougeL"`, `"cider"`).
            Default: all of them.

    Returns:
        One sentence for each missing thing, with what to do about it; empty if nothing is missing.

    Raises:
        ValueError: If the name or a part is unknown.

    Example:
        >>> missing_requirements("gsm8k")
        []
    """
    if name not in REQUIREMENTS:
        raise ValueError(f"`name={name!r}` is no metric. Allowed: {', '.join(map(repr, sorted(REQUIREMENTS)))}.")
    needs = REQUIREMENTS[name]
    if parts is not None:
        parts = list(parts)
        allowed = PARTS.get(name, {})
        unknown = sorted(set(parts) - set(allowed))
        if unknown:
            raise ValueError(f"`{name}` has no scores {unknown}. Allowed: {', '.join(allowed) or 'none'}.")
        needs = tuple(dict.fromkeys(need for part in parts for need in allowed[part]))
    return [sentence for need in needs if (sentence := _missing(need))]


def require(name: str, parts: Iterable[str] | None = None) -> None:
    """Refuse a metric that cannot be computed here.

    Raises:
        MissingRequirementError: If something is missing, with all of `missing_requirements`.
    """
    missing = missing_requirements(name, parts)
    if missing:
        what = f"`{name}`" if parts is None else f"`{name}` ({', '.join(parts)})"
        raise MissingRequirementError(f"The metric {what} cannot be computed here. {' '.join(missing)}")


def _missing(need: str) -> str:
    if need == JAVA:
        return _missing_java()
    if find_spec(need) is not None:
        return ""
    return f"The package `{_DISTRIBUTIONS.get(need, need)}` is missing: pip install 'fedex-hf[metrics]'."


def _missing_java() -> str:
    remedy = "METEOR, and the tokeniser of METEOR, ROUGE-L and CIDEr, need it: install a JRE (17 is known to work)."
    java = shutil.which(JAVA)
    if java is None:
        return f"No `java` is on the PATH. {remedy}"
    return f"`{java} -version` fails. {remedy}" if not _runs(java) else ""


@lru_cache
def _runs(java: str) -> bool:
    """Whether it is more than the placeholder that macOS and some containers have."""
    try:
        return subprocess.run([java, "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
