"""METEOR, ROUGE-L and CIDEr of the COCO caption evaluation, on the words of its Penn Treebank tokeniser.

`pycocoevalcap` carries the code and the jars that e2e-metrics runs. ROUGE-L and CIDEr are its own. The two Java
programs are started from here instead, with the same arguments: its wrappers write into the installed package, which
may be read-only, fail in locales with a decimal comma, and do not say what Java says.
ROUGE-L is not the package `rouge-score`'s: it takes the best precision and the best recall over the references, and
weights recall by beta = 1.2.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_module
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer


_METEOR_JAR = Path(meteor_module.__file__).with_name(meteor_module.METEOR_JAR)
_TOKENIZER_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
# Whatever the machine's locale: METEOR cannot read its own numbers where they are written with a comma.
_JAVA = ["java", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8"]
_SEPARATOR = "|||"  # of METEOR's protocol


class JavaError(RuntimeError):
    """METEOR or the tokeniser failed."""


def ptb_tokenize(sentences: Sequence[str]) -> list[str]:
    """Words of each sentence, lowered, without punctuation, joined by spaces.

    Args:
        sentences: Each on one line.

    Raises:
        JavaError: If Java fails, or gives another number of lines.

    Example:
        >>> ptb_tokenize(["Isn't it cheap (under £20)?"])
        ["is n't it cheap -lrb- under # 20 -rrb-"]
    """
    command = [*_JAVA, "-cp", str(_TOKENIZER_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    result = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input="\n".join(sentences).encode(), capture_output=True
    )
    lines = result.stdout.decode().split("\n")
    # The last line has an end only where it had words.
    lines += [""] * (len(sentences) - len(lines))
    if result.returncode or any(lines[len(sentences) :]):
        raise JavaError(
            f"The tokeniser gave {len(lines)} lines for {len(sentences)} sentences. Java says: "
            f"{result.stderr.decode(errors='replace').strip()}"
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS)
        for line in lines[: len(sentences)]
    ]


def tokenize_all(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """What `pycocoevalcap`'s scorers take: example -> its references, and example -> its one output."""
    words = iter(ptb_tokenize(list(chain.from_iterable(references))))
    truth = {index: [next(words) for _ in candidates] for index, candidates in enumerate(references)}
    return truth, {index: [line] for index, line in enumerate(ptb_tokenize(hypotheses))}


def meteor(truth: dict[int, list[str]], outputs: dict[int, list[str]]) -> float:
    """Corpus METEOR 1.5 in [0, 1] (Denkowski and Lavie 2014), from `tokenize_all`. Needs 2 GB for Java.

    Raises:
        JavaError: If Java ends early or answers with something else than numbers.
    """
    command = [*_JAVA, "-Xmx2G", "-jar", str(_METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=_METEOR_JAR.parent, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8"
        )
        try:
            statistics = [_ask(process, ["SCORE", *truth[index], *outputs[index]]) for index in truth]
            scores = [float(_ask(process, ["EVAL", *statistics]))]
            scores += [float(process.stdout.readline()) for _ in truth]  # type: ignore[union-attr]
        except (OSError, ValueError) as error:
            _stop(process)
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise JavaError(f"METEOR failed ({error}). Java says: {said or 'nothing'}") from error
        finally:
            _stop(process)
    return scores[-1]  # after those of the examples, that of all of them


def rouge_l(truth: dict[int, list[str]], outputs: dict[int, list[str]]) -> float:
    """Mean ROUGE-L in [0, 1] (Lin 2004), from `tokenize_all`."""
    return float(Rouge().compute_score(truth, outputs)[0])


def cider(truth: dict[int, list[str]], outputs: dict[int, list[str]]) -> float:
    """Mean CIDEr in [0, 10] (Vedantam et al. 2015), from `tokenize_all`; 0 for a single example."""
    return float(Cider().compute_score(truth, outputs)[0])


def _ask(process: subprocess.Popen, fields: list[str]) -> str:
    line = f" {_SEPARATOR} ".join(
        [fields[0], *(field.replace(_SEPARATOR, "").replace("  ", " ") for field in fields[1:])]
    )
    process.stdin.write(f"{line}\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    answer = process.stdout.readline().strip()  # type: ignore[union-attr]
    if not answer:
        raise ValueError("it answered nothing")
    return answer


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()
