"""Prompts and completions of the text tasks, in the forms of the paper's sources. Rows have the Hub's columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedex_hf.metrics.math_answers import final_answer


Row = Mapping[str, Any]

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
)
_CALCULATION = re.compile(r"<<[^<>]*>>")
_FINAL_ANSWER = re.compile(r"####\s*(.+?)\s*$")
_ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")

COMMONSENSE_SETS = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)


def e2e_prompt(row: Row) -> str:
    """A meaning representation, as the code of FedEx-LoRA gives it to GPT-2 (`create_e2e_data`).

    Example:
        >>> e2e_prompt({"meaning_representation": "name[Blue Spice], area[city centre]"})
        'name[Blue Spice], area[city centre] ->'
    """
    return f"{row['meaning_representation']} ->"


def e2e_completion(row: Row) -> str:
    """A reference after its meaning representation."""
    return f" {row['human_reference'].strip()}"


def gsm8k_response(answer: str) -> str:
    """GSM8K's answer as MetaMathQA writes it: without the calculator's annotations, the result also in words.

    Example:
        >>> gsm8k_response("He sold 48/2 = <<48/2=24>>24 clips.\\n#### 24")
        'He sold 48/2 = 24 clips.\\n#### 24\\nThe answer is: 24'
    """
    text = _CALCULATION.sub("", answer).strip()
    final = _FINAL_ANSWER.search(text)
    return text if final is None else f"{text}\nThe answer is: {final[1]}"


def math_response(solution: str) -> str:
    r"""MATH's solution as MetaMathQA writes it: the result, which is boxed, also in words.

    Example:
        >>> math_response(r"So $x = \boxed{\frac{1}{2}}$.")
        'So $x = \\boxed{\\frac{1}{2}}$.\nThe answer is: \\frac{1}{2}'
    """
    text = solution.strip()
    answer = final_answer(text)
    return text if answer is None else f"{text}\nThe answer is: {answer}"


@dataclass(frozen=True)
class ArithmeticForm:
    """Rows of questions and worked answers, by the columns that hold them; others are not read.

    Args:
        question, answer: Names of the columns.
        respond: A value of `answer` -> the response as MetaMathQA writes it, which ends in `The answer is: ...`.
    """

    question: str
    answer: str
    respond: Callable[[str], str]

    @property
    def columns(self) -> tuple[str, str]:
        """What a row must have."""
        return self.question, self.answer

    def prompt(self, row: Row) -> str:
        """The question in MetaMath's form (Yu et al. 2024, arXiv 2309.12284), the same for training and test."""
        return _ALPACA.format(instruction=row[self.question].strip()) + "### Response: Let's think step by step."

    def completion(self, row: Row) -> str:
        """The response to it."""
        return f" {self.respond(row[self.answer])}"


ARITHMETIC_FORMS = {
    "metamath": ArithmeticForm("query", "response", str.strip),
    "gsm8k": ArithmeticForm("question", "answer", gsm8k_response),
    "math": ArithmeticForm("problem", "solution", math_response),
}


def arithmetic_form(columns: Sequence[str]) -> str | None:
    """Which form rows with these columns have: the first of `ARITHMETIC_FORMS` that finds both its columns, or `None`.

    Example:
        >>> arithmetic_form(["type", "query", "original_question", "response"])
        'metamath'
    """
    return next((name for name, form in ARITHMETIC_FORMS.items() if set(form.columns) <= set(columns)), None)


def commonsense_prompt(row: Row) -> str:
    """An instruction in the form of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), without its indentation."""
    form = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
    return form.format(instruction=row["instruction"], input=row.get("input")) + "### Response:\n"


def commonsense_completion(row: Row) -> str:
    """The response, such as `the correct answer is answer1`."""
    return row["output"].strip()


def commonsense_choices(row: Row) -> list[str] | None:
    """The answers that an instruction allows in its last line, or `None` if it does not say.

    Example:
        >>> commonsense_choices({"instruction": "Is ice cold?\\n\\nAnswer format: true/false"})
        ['true', 'false']
    """
    found = _ANSWER_FORMAT.search(row["instruction"])
    return None if found is None else found[1].split("/")


def commonsense_kind(row: Row) -> str:
    """What kind of question it is, by its first answer without number: the rows' label for Dirichlet partitions.

    Example:
        >>> commonsense_kind({"instruction": "Ice is _. Option1: hot Option2: cold Answer format: option1/option2"})
        'option'
    """
    choices = commonsense_choices(row)
    return "other" if choices is None else choices[0].rstrip("0123456789")
