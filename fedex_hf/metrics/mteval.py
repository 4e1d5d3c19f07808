"""BLEU and NIST as the E2E challenge computes them: the two scripts of e2e-metrics, Perl and Python.

`measure_scores.py` (https://github.com/tuetschek/e2e-metrics) runs `mteval-v13a-sig.pl` by default and
`metrics/pymteval.py` with `-p`, as LoRA's E2E results do (arXiv 2106.09685). Both take tokens of mteval's rules
"13a", without case, and the closest reference length. They differ in
    length penalty of NIST: the Perl script pads absent references with empty ones, so its mean reference length is
        (words of all references) / (largest number of references); the Python script's is per segment;
    orders without a match in BLEU: 1 / (2^k n-grams), or 10^-15 matches;
    case: Perl lowers A to Z alone;
    segments shorter than n: no n-grams, or a negative number of them, and an empty one is one empty word.
`sacrebleu` differs from both in the last two, and has no NIST; nltk's NIST takes the best reference of each segment.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a


BLEU_ORDER = 4
NIST_ORDER = 5
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_NIST_BETA = math.log(2) / math.log(1.5) ** 2  # the penalty is 1/2 at two thirds of the reference's length

Tokens = Sequence[str]


def tokenize(text: str, script: str = "perl") -> list[str]:
    """Words of a segment by the rules of mteval-v13a.

    Args:
        text: The segment.
        script: `"perl"` or `"python"`.

    Example:
        >>> tokenize("The café, priced £20-25.")
        ['the', 'café', ',', 'priced', '£20', '-', '25', '.']
    """
    words = Tokenizer13a()(text)
    if script == "perl":
        return words.translate(_ASCII_LOWER).split()
    return [word.lower() for word in words.split()] or [""]


def bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], script: str = "perl") -> float:
    """Corpus BLEU-4 in [0, 1] (Papineni et al. 2002), from the words of `tokenize`.

    Args:
        hypotheses: The words of each output.
        references: The words of each reference of each output.
        script: `"perl"` or `"python"`.
    """
    matches, totals = [0] * BLEU_ORDER, [0] * BLEU_ORDER
    hypothesis_length = reference_length = 0
    for hypothesis, candidates in zip(hypotheses, references):
        for index in range(BLEU_ORDER):
            matches[index] += sum(_matches(hypothesis, candidates, index + 1).values())
            totals[index] += _total(hypothesis, index + 1, script)
        hypothesis_length += len(hypothesis)
        lengths = [len(candidate) for candidate in candidates]
        reference_length += min(lengths, key=lambda length: (abs(length - len(hypothesis)), length))
    if not hypothesis_length:
        return 0.0
    precision = _perl_log_precision(matches, totals) if script == "perl" else _python_log_precision(matches, totals)
    return math.exp(min(0.0, 1 - reference_length / hypothesis_length) + precision / BLEU_ORDER)


def nist(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], script: str = "perl") -> float:
    """Corpus NIST-5 (Doddington 2002), from the words of `tokenize`; at least 0, without an upper bound.

    A matched n-gram w1 ... wn counts log2(count(w1 ... wn-1) / count(w1 ... wn)) over all references.

    Args:
        hypotheses: The words of each output.
        references: The words of each reference of each output.
        script: `"perl"` or `"python"`.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for candidate in chain.from_iterable(references):
        counts[()] += len(candidate)
        for order in range(1, NIST_ORDER + 1):
            counts.update(_ngrams(candidate, order))
    score = 0.0
    for order in range(1, NIST_ORDER + 1):
        gained, total = 0.0, 0
        for hypothesis, candidates in zip(hypotheses, references):
            total += _total(hypothesis, order, script)
            for ngram, matched in _matches(hypothesis, candidates, order).items():
                gained += matched * math.log2(counts[_prefix(ngram, script)] / counts[ngram])
        score += gained / (total or 1)
    return score * _length_penalty(sum(map(len, hypotheses)) / _mean_reference_length(references, script))


def _ngrams(tokens: Tokens, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order))))


def _matches(hypothesis: Tokens, candidates: Sequence[Tokens], order: int) -> Counter[tuple[str, ...]]:
    """N-grams of the hypothesis, each at most as often as in the reference that has it most often."""
    most: Counter[tuple[str, ...]] = Counter()
    for candidate in candidates:
        most |= _ngrams(candidate, order)
    return _ngrams(hypothesis, order) & most


def _total(tokens: Tokens, order: int, script: str) -> int:
    total = len(tokens) - order + 1
    return max(total, 0) if script == "perl" else total


def _perl_log_precision(matches: list[int], totals: list[int]) -> float:
    smooth, result = 1, 0.0
    for matched, total in zip(matches, totals):
        if total and not matched:
            smooth *= 2
        result += math.log((matched or 1 / smooth) / total) if total else 0.0
    return result


def _python_log_precision(matches: list[int], totals: list[int]) -> float:
    return sum(math.log(max(matched, 1e-15) / max(total, 1e-9)) for matched, total in zip(matches, totals))


def _prefix(ngram: tuple[str, ...], script: str) -> tuple[str, ...]:
    # To Perl the string "0" is false, and false means "no prefix".
    return () if script == "perl" and ngram[:-1] == ("0",) else ngram[:-1]


def _mean_reference_length(references: Sequence[Sequence[Tokens]], script: str) -> float:
    words = [sum(map(len, candidates)) for candidates in references]
    if script == "perl":
        return sum(words) / max(map(len, references))
    return sum(count / len(candidates) for count, candidates in zip(words, references))


def _length_penalty(ratio: float) -> float:
    if ratio <= 0:
        return 0.0
    return 1.0 if ratio >= 1 else math.exp(-_NIST_BETA * math.log(ratio) ** 2)
