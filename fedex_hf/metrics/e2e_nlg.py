"""The metrics of the E2E NLG challenge (Novikova et al. 2017, arXiv 1706.09254), as its official scripts compute them.

BLEU and NIST are in mteval.py, METEOR, ROUGE-L and CIDEr in coco.py. For the same outputs and references they equal
`measure_scores.py` of https://github.com/tuetschek/e2e-metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

from fedex_hf.metrics.base import OfflineMetric, describe
from fedex_hf.metrics.requirements import PARTS, require


E2E_METRICS = tuple(PARTS["e2e_nlg"])
E2E_SCRIPTS = ("perl", "python")  # of BLEU and NIST
# What `measure_scores.py` mends in the tables it reads.
_ENCODING = {"Ł": "£", "Â£": "£", "Ã©": "é", "ã©": "é"}


class E2ENLG(OfflineMetric):
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr of one output per meaning representation, against all its references.

    In the units of the official scripts: `bleu`, `meteor` and `rougeL` in [0, 1], `cider` in [0, 10], `nist` without
    an upper bound. An output is one line: line ends within it count as spaces. It may be empty. METEOR, ROUGE-L and
    CIDEr need Java (`missing_requirements("e2e_nlg", ["meteor"])`).

    Arguments of `compute`:
        metrics: Which of `E2E_METRICS`; default all.
        script: `"perl"` for BLEU and NIST of `mteval-v13a-sig.pl`, the official default, or `"python"` for those of
            `pymteval.py`, the official `-p`, which LoRA's results use.

    Example:
        >>> scores = E2ENLG().compute(
        ...     predictions=["Zizzi is a cheap pub."],
        ...     references=[["Zizzi is a cheap pub.", "There is a cheap pub, Zizzi."]],
        ...     metrics=["bleu"],
        ... )
        >>> round(scores["bleu"], 4)
        1.0
    """

    def _info(self) -> Any:
        return describe(
            "BLEU, NIST, METEOR, ROUGE-L and CIDEr as in the E2E NLG challenge.",
            "Novikova et al., The E2E Dataset: New Challenges For End-to-End Generation, 2017",
            {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))},
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        metrics: Iterable[str] | None = None,
        script: str = "perl",
    ) -> dict[str, float]:
        wanted = list(E2E_METRICS if metrics is None else metrics)
        if script not in E2E_SCRIPTS:
            allowed = ", ".join(map(repr, E2E_SCRIPTS))
            raise ValueError(f"`script={script!r}` is none of the official ones. Allowed: {allowed}.")
        require("e2e_nlg", wanted)
        outputs = [one_line(text) for text in predictions]
        truth = [[line for text in texts if (line := one_line(text))] for texts in references]
        bare = [index for index, lines in enumerate(truth) if not lines]
        if bare:
            raise ValueError(
                f"{len(bare)} of {len(truth)} examples have no reference, example {bare[0]} first. Pass for each "
                "output the list of its references, each a text."
            )
        scores = {}
        if {"bleu", "nist"} & set(wanted):
            scores.update(_mteval_scores(outputs, truth, wanted, script))
        if {"meteor", "rougeL", "cider"} & set(wanted):
            scores.update(_coco_scores(outputs, truth, wanted))
        return {name: scores[name] for name in E2E_METRICS if name in wanted}


def group_by_meaning(
    rows: Iterable[Mapping[str, Any]],
    meaning: str = "meaning_representation",
    reference: str = "human_reference",
) -> tuple[list[str], list[list[str]]]:
    """Group rows of the E2E data set, one per reference, by what they express.

    As the official scripts do, letters that the data set's files have in a wrong encoding are mended in references.

    Args:
        rows: With the columns below; a `datasets.Dataset` is fine.
        meaning: Column of meaning representations, which are taken as equal where their text is.
        reference: Column of references.

    Returns:
        The different meaning representations, and the references of each, both in the order of appearance.

    Example:
        >>> rows = [("name[Zizzi]", "A."), ("name[Loch Fyne]", "B."), ("name[Zizzi]", "C.")]
        >>> group_by_meaning({"meaning_representation": mr, "human_reference": text} for mr, text in rows)
        (['name[Zizzi]', 'name[Loch Fyne]'], [['A.', 'C.'], ['B.']])
    """
    groups: dict[str, list[str]] = {}
    for row in rows:
        text = row[reference]
        for wrong, right in _ENCODING.items():
            text = text.replace(wrong, right)
        groups.setdefault(row[meaning], []).append(text)
    return list(groups), list(groups.values())


def one_line(text: str) -> str:
    """The text as a line of the files that the official scripts read."""
    return " ".join(text.splitlines()).strip()


def _mteval_scores(
    outputs: list[str], references: list[list[str]], wanted: list[str], script: str
) -> dict[str, float]:
    from fedex_hf.metrics import mteval

    hypotheses = [mteval.tokenize(text, script) for text in outputs]
    truth = [[mteval.tokenize(text, script) for text in texts] for texts in references]
    scorers = {"bleu": mteval.bleu, "nist": mteval.nist}
    return {name: scorer(hypotheses, truth, script) for name, scorer in scorers.items() if name in wanted}


def _coco_scores(outputs: list[str], references: list[list[str]], wanted: list[str]) -> dict[str, float]:
    from fedex_hf.metrics import coco

    truth, hypotheses = coco.tokenize_all(outputs, references)
    scorers = {"meteor": coco.meteor, "rougeL": coco.rouge_l, "cider": coco.cider}
    return {name: scorer(truth, hypotheses) for name, scorer in scorers.items() if name in wanted}
