r"""MATH (Hendrycks et al. 2021, arXiv 2103.03874): symbolic equivalence of the final answers, by math-verify.

Which part of an output is its answer is decided here: the last `\boxed{}`, as in the data set's own script, else what
follows MetaMath's last "The answer is:" (Yu et al. 2024, arXiv 2309.12284). Whether two answers are equal, math-verify
decides.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from fedex_hf.metrics.base import MatchingMetric, describe
from fedex_hf.metrics.gsm8k import ascii_digits


METAMATH_MARK = re.compile(r"the answer is:", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_MATH_SIGNS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
# Of an output without a marked answer math-verify looks for one in the end alone: its search is slow on long texts.
_TAIL = 2000
# One answer has up to six steps of at most 5 seconds each, by math-verify's own limits, which cannot interrupt
# everything.
_HARD_LIMIT = 60.0


class MathAnswers(MatchingMetric):
    r"""Share of outputs whose answer is mathematically that of the reference, in [0, 1], as `accuracy`.

    Predictions are the outputs; references are solutions with a `\boxed{}`, texts with "The answer is:", or bare
    answers. An output without an answer, or one that cannot be parsed or compared in time, is wrong.

    Example:
        >>> outputs = [r"So it is \boxed{\frac{1}{2}}.", "The answer is: 3"]
        >>> MathAnswers().compute(predictions=outputs, references=[r"We get $\boxed{0.5}$", "4"])
        {'accuracy': 0.5}
    """

    expected = "a solution that has an answer"

    def _info(self) -> Any:
        value = datasets.Value("string")
        return describe(
            "Symbolic equivalence of final answers.",
            "Hendrycks et al., Measuring Mathematical Problem Solving With the MATH Dataset, 2021",
            {"predictions": value, "references": value},
        )

    def gold(self, reference: str) -> str | None:
        """As `gold_answer`."""
        return gold_answer(reference)

    def matches(self, predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Which outputs are `equivalent` to the reference.

        Raises:
            ValueError: If a reference has no answer.
        """
        with Verifier() as verifier:
            return [
                equivalent(prediction, reference, verifier) for prediction, reference in zip(predictions, references)
            ]


class VerifierError(RuntimeError):
    """The process that runs math-verify does not start."""


class Verifier:
    """math-verify in a process of its own, started when it is needed, and again after it had to be stopped.

    Args:
        command: The process: it writes a line when it is ready, then answers lines as math_worker.py does.
        limit: Seconds for one answer; then it counts as "not equal", and the process is stopped.
    """

    def __init__(self, command: Sequence[str] | None = None, limit: float = _HARD_LIMIT) -> None:
        self.command = list(command or [sys.executable, str(Path(__file__).with_name("math_worker.py"))])
        self.limit = limit
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, gold: str, prediction: str) -> bool:
        """Whether the answers are equal, each with its `\\boxed{}`. Their order counts: 5 answers a gold x = 5.

        Raises:
            VerifierError: If the process does not start.
        """
        line = json.dumps({"gold": gold, "prediction": prediction}) + "\n"
        answer, in_time = self._ask(line)
        if not answer and in_time:  # out of memory, or it was stopped before: its last limit ended after its answer
            answer, _ = self._ask(line)
        return answer.strip() == "true"

    def close(self) -> None:
        """Stop the process."""
        if self._process is not None:
            _stop(self._process)
            self._process = None

    def _ask(self, line: str) -> tuple[str, bool]:
        """The answer, empty if the process has ended, and whether it ended, if at all, before the limit."""
        process = self._process or self._start()
        limit_reached = threading.Event()

        def stop() -> None:
            limit_reached.set()
            process.kill()

        timer = threading.Timer(self.limit, stop)
        timer.start()
        try:
            process.stdin.write(line)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = process.stdout.readline()  # type: ignore[union-attr]
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            self.close()
        return answer, not limit_reached.is_set()

    def _start(self) -> subprocess.Popen[str]:
        with tempfile.TemporaryFile() as errors:
            pipe = subprocess.PIPE
            process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
            if not process.stdout.readline():  # type: ignore[union-attr]
                _stop(process)
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()
                raise VerifierError(f"`{' '.join(self.command)}` does not start: {said[-500:] or 'it says nothing'}")
        self._process = process
        return process


def equivalent(prediction: str, reference: str, verifier: Verifier) -> bool:
    """Whether the answer of an output is that of the reference.

    Args:
        prediction: The whole output.
        reference: A solution, or a bare answer.
        verifier: Decides where the two are not the same text.

    Raises:
        ValueError: If the reference is blank.
    """
    gold = gold_answer(reference)
    if gold is None:
        raise ValueError(f"The reference {reference[-80:]!r} has no answer. Pass the solution, or the answer alone.")
    answer = final_answer(prediction)
    if answer is None:
        return verifier(_boxed(gold), ascii_digits(prediction[-_TAIL:]))
    if "".join(answer.split()) == "".join(gold.split()):
        return True
    return bool(answer) and verifier(_boxed(gold), _boxed(answer))


def gold_answer(reference: str) -> str | None:
    """The answer of a solution, or the bare answer that a reference is; `None` if it is empty."""
    marked = final_answer(reference)
    return (_bare(reference) if marked is None else marked) or None


def final_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, else what follows the last "The answer is:", without signs of math mode.

    Args:
        text: A solution or an output.

    Returns:
        The answer, which may be empty; `None` if it is not marked, or its braces are not closed.

    Example:
        >>> final_answer(r"First \boxed{1}, then $\boxed{\frac{2}{3}}$.")
        '\\frac{2}{3}'
        >>> final_answer("Half of it.\nThe answer is: $0.5$.")
        '0.5'
    """
    text = ascii_digits(text)
    boxes = list(_BOXED.finditer(text))
    if boxes:
        return _content(text[boxes[-1].end() :])
    marks = list(METAMATH_MARK.finditer(text))
    if marks:
        # As in MetaMath's own script: up to the end of the sentence that ends a line.
        return _bare(text[marks[-1].end() :].split(".\n")[0].strip().removesuffix("."))
    return None


def _content(text: str) -> str | None:
    r"""What stands in the braces that the text begins with, or, for `\boxed 5`, up to the end of math mode."""
    if not text.startswith("{"):
        return _bare(text.split("$")[0])
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth and match[0] == "}":
            return _bare(text[1 : match.start()])
    return None


def _bare(text: str) -> str:
    text = ascii_digits(text).strip()
    for left, right in _MATH_SIGNS:
        inner = text[len(left) : len(text) - len(right)]
        if text.startswith(left) and text.endswith(right) and left not in inner:
            return inner.strip()
    return text


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
