"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): exact match of the last number of the output.

lm-evaluation-harness and MetaMath's script differ from each other in what they tolerate (the former compares strings
without "," and "$", the latter rounds). Here the last number is read as an exact fraction, so that 18, 18.00, $18 and
36/2 are one number, and 18.01 is another.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import datasets

from fedex_hf.metrics.base import MatchingMetric, describe


GOLD_MARK = "####"  # in the data set, before the answer
# Signs and separators that stand for ASCII ones.
_ASCII = str.maketrans("−－–，．／⁄∕＄％", "---,.///$%")
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[!,;: ])(?=[0-9]{3})")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]}.%])[-+])?                   # of a number, not of a difference
    (?:\\?[$€£¥₹]\s?(?P<inner>-)?)?
    (?:
        (?:(?P<whole>[0-9]+)[ ]+)?(?P<top>[0-9]+)/(?P<bottom>0*[1-9][0-9]*)
      | (?P<decimal>
            (?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?
          | (?<![0-9])\.[0-9]+
        )
        (?P<exponent>[eE][-+]?[0-9]{1,3}(?!\w|\.[0-9]))?
    )
    """,
    re.VERBOSE,
)


class GSM8K(MatchingMetric):
    r"""Share of outputs whose last number equals the answer's, in [0, 1], as `exact_match`.

    Predictions are the outputs; references are answers of the data set (the number is read after the last `####`) or
    texts of which the last number counts. An output without a number is wrong. What is read as a number, and how,
    tells `last_number`.

    Example:
        >>> outputs = ["9 * 2 = $18 every day.", "The answer is 1,000.", "None."]
        >>> GSM8K().compute(predictions=outputs, references=["<<9*2=18>>18\n#### 18", "#### 1000", "#### 3"])
        {'exact_match': 0.6666666666666666}
    """

    score = "exact_match"
    expected = f"a number after `{GOLD_MARK}`"

    def _info(self) -> Any:
        value = datasets.Value("string")
        return describe(
            "Exact match of the last number.",
            "Cobbe et al., Training Verifiers to Solve Math Word Problems, 2021",
            {"predictions": value, "references": value},
        )

    def gold(self, reference: str) -> Fraction | None:
        """The number after the last `####`, else the last one of all."""
        return last_number(reference.rsplit(GOLD_MARK, 1)[-1])

    def matches(self, predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Which outputs end in the reference's number.

        Raises:
            ValueError: If a reference has no number.
        """
        answers = [self.gold(text) for text in references]
        if None in answers:
            bad = references[answers.index(None)]
            raise ValueError(f"The reference {bad[-80:]!r} has no number. Pass the answer column, or the numbers.")
        return [last_number(text) == answer for text, answer in zip(predictions, answers)]


def last_number(text: str) -> Fraction | None:
    r"""The last number in the text.

    Read as part of it: a sign, thousands grouped by commas (also LaTeX's), decimals, an exponent, fractions and mixed
    numbers without spaces at the stroke (`3/4`, `1 1/2`, `½`, `\frac{3}{4}`), digits of any script. Read over:
    currencies, percent signs (50 % is 50) and units, which answers of the data set do not have either; a full stop
    at the end. A comma that does not group thousands separates two numbers. Words are no numbers.

    Args:
        text: Any text.

    Returns:
        The exact number, or `None` if there is none, or one with more digits than Python reads.

    Example:
        >>> last_number("It costs $1,234.50 in all.")
        Fraction(2469, 2)
        >>> last_number("10-5 eggs, or 3 1/2 dozens")
        Fraction(7, 2)
    """
    matches = list(_NUMBER.finditer(_plain(text)))
    if not matches:
        return None
    parts = matches[-1].groupdict()
    try:
        if parts["decimal"]:
            number = Fraction(parts["decimal"].replace(",", "") + (parts["exponent"] or ""))
        else:
            number = Fraction(int(parts["top"]), int(parts["bottom"])) + int(parts["whole"] or 0)
    except ValueError:  # Python's limit on the digits of an integer, against attacks by length
        return None
    return -number if "-" in (parts["sign"], parts["inner"]) else number


def ascii_digits(text: str) -> str:
    """The text with decimal digits of all scripts, full-width ones among them, as ASCII digits.

    Example:
        >>> ascii_digits("４２ ٤٢ 10²")
        '42 42 10²'
    """
    return "".join(str(unicodedata.decimal(char)) if unicodedata.category(char) == "Nd" else char for char in text)


def _plain(text: str) -> str:
    text = re.sub(r"([0-9]?)([¼-¾⅐-⅞])", _spell_out, ascii_digits(text))
    text = _LATEX_COMMA.sub(",", text.translate(_ASCII))
    return _LATEX_FRACTION.sub(lambda match: f"{_gap(match)}{match[1]}/{match[2]}", text)


def _spell_out(match: re.Match[str]) -> str:
    gap = " " if match[1] else ""
    return f"{match[1]}{gap}{unicodedata.normalize('NFKC', match[2])}"


def _gap(match: re.Match[str]) -> str:
    """A space where a whole number stands right before, as in mixed numbers."""
    return " " if match.string[: match.start()][-1:].isdigit() else ""
