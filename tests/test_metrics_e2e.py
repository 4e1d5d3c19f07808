"""E2E metrics against the official scripts.

The expected values are of https://github.com/tuetschek/e2e-metrics on the outputs below: of mteval-v13a-sig.pl (Perl
5.36), of metrics/pymteval.py, and of the COCO caption code with METEOR 1.5 and the tokeniser of CoreNLP 3.4.1 (Java
17). They were computed once with those scripts; nothing of this package took part.
"""

import math
import sys
from pathlib import Path

import pytest
import sacrebleu
from pycocoevalcap.tokenizer import ptbtokenizer

from fedex_hf.metrics import coco, load_metric, mteval
from fedex_hf.metrics.e2e_nlg import E2E_METRICS, group_by_meaning, one_line


# One to four references; case, non-ASCII letters, decimals, ranges, ampersands, quotes, brackets, repetition.
EXAMPLES = [
    (
        "The Eagle is a cheap coffee shop near Burger King.",
        [
            "The Eagle is a low-priced coffee shop near Burger King.",
            "Near Burger King there is a cheap coffee shop called The Eagle.",
            "A cheap coffee shop, The Eagle, can be found near Burger King.",
        ],
    ),
    (
        "Café Rouge serves french food for £20-25 by the riverside .",
        [
            "Café Rouge, by the riverside, serves French food at £20-25.",
            "For French food priced £20-25, try CAFÉ ROUGE in the riverside area.",
        ],
    ),
    (
        "The Wrestlers is not family-friendly. It has 3.5 out of 5 stars.",
        ["The Wrestlers has a rating of 3.5 out of 5 and isn't family-friendly."],
    ),
    (
        "Zizzi is a pub.",
        [
            "Zizzi is a pub providing Japanese food in the city centre.",
            "In the city centre there's a pub called Zizzi that serves Japanese food.",
            "Zizzi: a Japanese pub in the city centre.",
            "There is a pub named Zizzi.",
        ],
    ),
    (
        'Loch Fyne & Sons offers "fine dining" (wine and cheese), with prices over £30 ; kids are welcome!',
        [
            "Loch Fyne & Sons offers wine and cheese for more than £30. Kids are welcome.",
            "Kids are welcome at Loch Fyne & Sons, where wine and cheese cost more than £30.",
        ],
    ),
    (
        "The Punter the The Punter Indian Indian food in high price range near Express by Holiday Inn",
        [
            "The Punter serves Indian food in the high price range near Express by Holiday Inn.",
            "The Punter, near Express by Holiday Inn, is a high priced Indian restaurant.",
        ],
    ),
]
OUTPUTS = [output for output, _ in EXAMPLES]
REFERENCES = [references for _, references in EXAMPLES]
FIRST_REFERENCES = [references[:1] for references in REFERENCES]
OFFICIAL = {
    "bleu": 0.440651441813,
    "nist": 5.229112554932,
    "meteor": 0.45448218573744253,
    "rougeL": 0.7091791081204991,
    "cider": 3.6634429524167467,
}
BLEU_AND_NIST = ["bleu", "nist"]


def compute(outputs=OUTPUTS, references=REFERENCES, metrics=BLEU_AND_NIST, **options):
    return load_metric("e2e_nlg").compute(predictions=outputs, references=references, metrics=metrics, **options)


def tokens(*texts):
    return [mteval.tokenize(text) for text in texts]


# ---- the official scripts' values ----


def test_all_five_equal_the_official_scripts():
    scores = compute(metrics=None)
    assert list(scores) == list(E2E_METRICS) == ["bleu", "nist", "meteor", "rougeL", "cider"]
    assert scores == pytest.approx(OFFICIAL, rel=1e-10)


@pytest.mark.parametrize(
    ("script", "outputs", "references", "bleu", "nist"),
    [
        ("python", OUTPUTS, REFERENCES, 0.4406514418132456, 5.194431346556225),
        ("perl", OUTPUTS, FIRST_REFERENCES, 0.398824632988, 4.510018807685),
        # An empty output.
        ("perl", [OUTPUTS[0], "", *OUTPUTS[2:]], REFERENCES, 0.397498967186, 4.988220304062),
        ("python", [OUTPUTS[0], "", *OUTPUTS[2:]], REFERENCES, 0.40779519783116214, 4.259832863546356),
        # No 4-grams at all: the Perl script leaves the order out, the Python script divides by 10^-9.
        ("perl", ["A b.", "c"], [["A b."], ["d"]], 0.930604859102, 1.5),
        ("python", ["A b.", "c"], [["A b."], ["d"]], 5.2331756969605285, 1.5),
        # No word in common.
        ("perl", ["x y z w v", "q"], [["A b.", "k j l"], ["d"]], 0.051031036308, 0.0),
        ("python", ["x y z w v", "q"], [["A b.", "k j l"], ["d"]], 6.75600077403517e-14, 0.0),
        # Nothing but empty outputs.
        ("perl", ["", ""], [["A b."], ["d"]], 0.0, 0.0),
        ("python", ["", ""], [["A b."], ["d"]], 1.7395944730633454e-09, 0.0),
        # Perl takes the word "0" for false.
        ("perl", ["0 x y 0 z"], [["0 x y 0 z", "0 x"]], 1.0, 3.710380716131),
        ("python", ["0 x y 0 z"], [["0 x y 0 z", "0 x"]], 1.0, 3.0991845054630534),
    ],
)
def test_bleu_and_nist_of_both_scripts(script, outputs, references, bleu, nist):
    scores = compute(outputs, references, script=script)
    assert scores == pytest.approx({"bleu": bleu, "nist": nist}, rel=1e-9, abs=1e-12)


@pytest.fixture
def foreign_locale(monkeypatch):
    """Numbers are written with a comma, and text is ASCII."""
    monkeypatch.setenv("LC_ALL", "POSIX")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE -Dfile.encoding=US-ASCII")


def test_the_coco_scores_of_empty_outputs(foreign_locale):
    outputs = [OUTPUTS[0], "", *OUTPUTS[2:-1], "\n"]
    scores = compute(outputs, metrics=["meteor", "rougeL", "cider"])
    official = {"meteor": 0.2805560118310222, "rougeL": 0.4661582257213784, "cider": 2.381190512849185}
    assert scores == pytest.approx(official, rel=1e-10)


# ---- BLEU and NIST ----


def test_bleu_equals_sacrebleu_where_that_is_defined():
    padded = [[texts[i] if i < len(texts) else None for texts in REFERENCES] for i in range(4)]
    expected = sacrebleu.corpus_bleu(OUTPUTS, padded, lowercase=True).score / 100
    assert compute()["bleu"] == pytest.approx(expected, rel=1e-12)
    cased = sacrebleu.corpus_bleu(OUTPUTS, padded, lowercase=False).score / 100
    assert abs(cased - expected) > 0.01  # the twin


def test_one_reference_is_not_all_of_them():
    several, one = compute(), compute(references=FIRST_REFERENCES)
    assert all(abs(several[key] - one[key]) > 0.01 for key in several)


def test_nist_by_hand():
    # Words of the reference: a b c. Each word is worth log2(3 / 1), "b" after "a" log2(1 / 1). Two of three words: the
    # penalty is 1/2.
    assert mteval.nist(tokens("a b"), [tokens("a b c")]) == pytest.approx(math.log2(3) / 2)
    # Over all references, not the best one: a is 3 of 5 words.
    assert mteval.nist(tokens("a a a"), [tokens("a b", "a a c")]) == pytest.approx(
        2 * math.log2(5 / 3) / 3 + math.log2(3 / 1) / 2
    )


def test_bleu_by_hand():
    # Three of five words, one of four pairs, no triple of three, no quadruple of two; one word too few.
    score = mteval.bleu(tokens("a b x y a"), [tokens("a b c d a e")])
    precisions = [3 / 5, 1 / 4, 1 / (2 * 3), 1 / (4 * 2)]
    assert score == pytest.approx(math.exp(1 - 6 / 5) * math.prod(precisions) ** (1 / 4))


def test_the_closest_reference_counts_and_of_two_the_shorter():
    score = mteval.bleu(tokens("a b c d e"), [tokens("a b c d e f", "a b c d", "a b c d e f g h i")])
    assert score == pytest.approx(1.0)
    longer = mteval.bleu(tokens("a b c d e"), [tokens("a b c d e f", "a b c d e f g h i")])
    assert longer == pytest.approx(math.exp(1 - 6 / 5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("It's £20-25, or 3.5!", ["it's", "£20", "-", "25", ",", "or", "3.5", "!"]),
        ("1,000.5 a.b (x)", ["1,000.5", "a", ".", "b", "(", "x", ")"]),
        ("&quot;R&amp;B&quot; &lt;b&gt;", ['"', "r", "&", "b", '"', "<", "b", ">"]),
        ("low-priced", ["low-priced"]),
        ("CAFÉ\u00a0ÉCLAIR…", ["cafÉ", "Éclair…"]),
        ("日本語 Ω", ["日本語", "Ω"]),
    ],
)
def test_words_of_mteval(text, words):
    assert mteval.tokenize(text) == words


def test_the_python_script_lowers_all_letters():
    assert mteval.tokenize("CAFÉ", "python") == ["café"]
    upper, lower = ["VISIT THE CAFÉ"], [["visit the café"]]
    assert compute(upper, lower, ["nist"], script="python")["nist"] == pytest.approx(math.log2(3))
    assert compute(upper, lower, ["nist"], script="perl")["nist"] == pytest.approx(math.log2(3) * 2 / 3)


# ---- METEOR, ROUGE-L, CIDEr ----


def test_rouge_l_by_hand():
    truth, outputs = {0: ["a b c d e f", "x a"]}, {0: ["a b q"]}
    # Best precision 2/3 (of the first reference), best recall 1/2 (of the second), beta 1.2.
    precision, recall = 2 / 3, 1 / 2
    assert coco.rouge_l(truth, outputs) == pytest.approx(
        (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    )


def test_cider_of_one_example_is_zero():
    # Every n-gram is in every example, and so says nothing about this one.
    assert coco.cider({0: ["a b c d e"]}, {0: ["a b c d e"]}) == 0.0
    assert coco.cider({0: ["a b c d e"], 1: ["v w x y z"]}, {0: ["a b c d e"], 1: ["v w x y z"]}) == pytest.approx(10)


def test_the_tokeniser_needs_neither_a_locale_nor_a_folder_to_write_to(foreign_locale):
    folder = Path(ptbtokenizer.__file__).parent
    before = folder.stat().st_mtime_ns
    assert coco.ptb_tokenize(["INDIAN CAFÉ.", "", "It's 日本 (naïve)", ""]) == [
        "indian café",
        "",
        "it 's 日本 -lrb- naïve -rrb-",
        "",
    ]
    assert folder.stat().st_mtime_ns == before
    ptbtokenizer.PTBTokenizer().tokenize({0: [{"caption": "a"}]})
    assert folder.stat().st_mtime_ns != before  # the twin: pycocoevalcap's own


@pytest.mark.slow  # METEOR takes 10 seconds to start
def test_meteor_fails_in_a_locale_that_is_not_overridden(foreign_locale, monkeypatch):
    monkeypatch.setattr(coco, "_JAVA", ["java"])
    with pytest.raises(coco.JavaError, match="InputMismatchException"):  # the twin of the scores of empty outputs
        coco.meteor({0: ["a pub"]}, {0: ["a pub"]})


def test_java_that_fails_is_quoted(monkeypatch):
    monkeypatch.setattr(coco, "_JAVA", ["java", "-Xnonsense"])
    with pytest.raises(coco.JavaError, match="Unrecognized option: -Xnonsense"):
        coco.ptb_tokenize(["a"])
    with pytest.raises(coco.JavaError, match="Unrecognized option: -Xnonsense"):
        coco.meteor({0: ["a"]}, {0: ["a"]})


def test_java_that_answers_nonsense(monkeypatch):
    monkeypatch.setattr(coco, "_JAVA", [sys.executable, "-c", "import sys; print('x\\n' * 9); sys.stdin.read()"])
    with pytest.raises(coco.JavaError, match=r"METEOR failed .*'x'.*Java says: nothing"):
        coco.meteor({0: ["a"]}, {0: ["a"]})
    with pytest.raises(coco.JavaError, match="for 1 sentences"):
        coco.ptb_tokenize(["a"])


# ---- inputs ----


def test_an_output_is_one_line():
    assert one_line(" The Eagle\nis\u2028a pub.\r\n") == "The Eagle is a pub."
    broken = [output.replace(" ", "\n", 2) for output in OUTPUTS]
    assert compute(broken) == compute()


def test_examples_without_references():
    with pytest.raises(ValueError, match="2 of 3 examples have no reference, example 1 first"):
        compute(["a", "b", "c"], [["a"], [], ["", " "]])


def test_blank_references_count_for_nothing():
    assert compute(references=[[*texts, " "] for texts in REFERENCES]) == compute()


def test_unknown_options():
    with pytest.raises(ValueError, match=r"`script='mteval'`.*Allowed: 'perl', 'python'"):
        compute(script="mteval")
    with pytest.raises(ValueError, match=r"no scores \['rouge'\]"):
        compute(metrics=["rouge"])


def test_references_are_grouped_by_meaning():
    meanings = ["name[A]", "name[B]", "name[A]", "name[ B]"]
    texts = ["Less than Â£20.", "CafÃ© B.", "A, Ł20.", "B."]
    rows = [{"meaning_representation": mr, "human_reference": text} for mr, text in zip(meanings, texts)]
    assert group_by_meaning(rows) == (
        ["name[A]", "name[B]", "name[ B]"],
        [["Less than £20.", "A, £20."], ["Café B."], ["B."]],
    )
    renamed = [{"mr": mr, "ref": text} for mr, text in zip(meanings, texts)]
    assert group_by_meaning(renamed, "mr", "ref") == group_by_meaning(rows)
