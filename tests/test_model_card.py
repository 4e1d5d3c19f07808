"""The model card: metadata, tables and plots against the log they come from, and snippets that are run."""

import ast
import math
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hub_card import validate
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard import metadata_load
from PIL import Image
from programs import untraced
from safetensors.torch import save_file
from transformers import TrainingArguments

from fedex_hf import FederatedTrainer, FederatedTrainingArguments, model_card, plots, run_card
from fedex_hf.model_card import write_card
from fedex_hf.plots import rounds_of
from fedex_hf.run_card import RunCard, non_default_arguments, versions


TOKEN = "hf_" + "secret" * 4
PAPERS = {
    "fedex": "https://arxiv.org/abs/2410.09432",
    "fedit": "https://arxiv.org/abs/2305.05644",
    "ffa": "https://arxiv.org/abs/2403.12313",
    "mine": "https://example.org/paper.pdf",
}
ROUND_KEYS = {
    "train loss": "train_loss",
    "clients": "num_clients",
    "examples": "num_examples",
    "aggregation error": "aggregation_error",
    "FedIT deviation": "fedit_deviation",
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half a second a card; `pictures` has them drawn."""
    monkeypatch.setattr(model_card, "draw_plots", lambda *args: [])


@pytest.fixture
def pictures(_no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_card, "draw_plots", plots.draw_plots)


def log_of(num_rounds: int, **changed: Any) -> list[dict[str, Any]]:
    """A log as the trainer writes it: steps of clients, rounds, evaluations, and the end of the run."""
    log: list[dict[str, Any]] = []
    for round in range(1, num_rounds + 1):
        for client_id in ("Charité", "north"):
            log.append({"loss": 9.75, "round": round, "client_id": client_id, "epoch": round - 0.5, "step": round})
        entry = {
            "round": round,
            "train_loss": 1.5 / round,
            "num_clients": 2,
            "num_examples": 1234 + round,
            "aggregation_error": 3.3e-6 / round,
            "fedit_deviation": 0.43 / round,
            "aggregation_error/layer.0": 0.125,
            "bytes_up_per_client": 307_200,
            "bytes_down_per_client": 1_192_400,
            "round_seconds": 77.5,
            "epoch": float(round),
            "step": 2 * round,
        }
        log.append(entry | {key: value for key, value in changed.items() if not key.startswith("eval_")})
        evaluation = {
            "eval_loss": 1.25 / round,
            "eval_accuracy": 1 - 0.5 / round,
            "eval_macro_f1": 1 - 0.625 / round,
            "eval_runtime": 88.5,
            "eval_samples_per_second": 99.25,
        }
        evaluation |= {key: value for key, value in changed.items() if key.startswith("eval_")}
        log.append(evaluation | {"epoch": float(round), "step": 2 * round})
    return [*log, {"train_runtime": 66.5, "train_loss": 0.9, "total_flos": 5.0, "epoch": float(num_rounds), "step": 9}]


def card_of(**changed: Any) -> RunCard:
    given: dict[str, Any] = {
        "round": 3,
        "num_rounds": 3,
        "round_format": "full",
        "method": "fedex",
        "is_exact": True,
        "log_history": log_of(3),
        "model_class": "RobertaForSequenceClassification",
        "auto_class": "AutoModelForSequenceClassification",
        "num_labels": 3,
        "repo_id": "someone/my-run",
        "tag": "round-3",
        "base_model": "FacebookAI/roberta-base",
        "base_revision": "e2da8e2f811d1448a5b465c236feacd80ffbac7b",
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
        "num_clients": 2,
        "client_examples": [400, 837],
        "arguments": {"learning_rate": 1e-3, "num_rounds": 3},
        "versions": {"python": "3.11.1", "peft": "0.21.2"},
    }
    given["paper"] = PAPERS[changed.get("method", "fedex")]
    return RunCard(**(given | changed))


def written(folder: Path, card: RunCard) -> str:
    """The text of a card, after the checks that all cards must pass."""
    write_card(card, folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert validate(text) == ([], [])
    for image in re.findall(r"!\[.+?\]\((.+?)\)", text):
        assert (folder / image).is_file()
    for hidden in ("Charité", "north", "9.75", "66.5", "77.5", "88.5", "99.25", "None", TOKEN):
        assert hidden not in text
    return text


def tables_of(text: str) -> list[list[dict[str, str]]]:
    """All Markdown tables of a text, as one dictionary per line."""
    tables = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *lines = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()]
        assert all(len(line) == len(head) for line in lines)
        tables.append([dict(zip(head, line)) for line in lines])
    return tables


def snippets_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)


def calls_of(snippet: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Class, arguments and keyword arguments of each `from_pretrained` in a snippet; names stand for themselves."""

    def value(node: ast.expr) -> Any:
        return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)

    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    return [
        (
            call.func.value.id,
            [value(arg) for arg in call.args],
            {each.arg: value(each.value) for each in call.keywords},
        )
        for call in sorted(calls, key=lambda call: call.lineno)
    ]


# ---- A real run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[FederatedTrainer, Path, str]:
    """A finished run, the folder it was saved to, and the text of its card."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    trainer = tiny.federation(
        folder / "out",
        num_rounds=2,
        logging_steps=1,
        eval_strategy="epoch",
        hub_token=TOKEN,
        weight_decay=0.0625,
        trainer_kwargs={
            "compute_metrics": lambda output: {"accuracy": float((output[0].argmax(-1) == output[1]).mean())}
        },
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    card = card_of(
        round=2,
        num_rounds=2,
        log_history=trainer.state.log_history,
        repo_id=None,
        tag=None,
        base_model=None,
        base_revision=None,
        num_clients=3,
        client_examples=[len(each) for each in trainer.train_dataset.values()],
        arguments=non_default_arguments(trainer.args),
        versions=versions(),
    )
    return trainer, folder / "saved", written(folder / "saved", card)


def test_table_of_a_run_holds_the_numbers_of_its_log(run: tuple[FederatedTrainer, Path, str]) -> None:
    trainer, _, text = run
    table = tables_of(text)[0]
    assert [line["round"] for line in table] == ["1", "2"]
    for line in table:
        epoch = float(line["round"])
        of_round = [each for each in trainer.state.log_history if each["epoch"] == epoch]
        entry = next(each for each in of_round if "aggregation_error" in each)
        evaluation = next(each for each in of_round if "eval_accuracy" in each)
        for column, key in ROUND_KEYS.items():
            assert float(line[column]) == pytest.approx(entry[key], rel=0.05 if "e-" in line[column] else 1e-3)
        assert float(line["accuracy"]) == pytest.approx(evaluation["eval_accuracy"], rel=1e-3)
        assert float(line["evaluation loss"]) == pytest.approx(evaluation["eval_loss"], rel=1e-3)
        for column, key in (("kB up", "bytes_up_per_client"), ("kB down", "bytes_down_per_client")):
            assert float(line[column]) == pytest.approx(entry[key] / 1000, abs=0.051)


def test_metadata_of_a_run_holds_its_last_evaluation(run: tuple[FederatedTrainer, Path, str]) -> None:
    trainer, folder, _ = run
    last = [each for each in trainer.state.log_history if "eval_accuracy" in each][-1]
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {each.metric_type: each.metric_value for each in results} == {
        "loss": last["eval_loss"],
        "accuracy": last["eval_accuracy"],
    }


def test_card_of_a_run_tells_no_client_no_token_and_no_path(run: tuple[FederatedTrainer, Path, str]) -> None:
    trainer, folder, text = run
    assert trainer.args.hub_token == TOKEN
    assert {each.get("client_id") for each in trainer.state.log_history} >= set(trainer.train_dataset)
    for hidden in (TOKEN, "hf_", *trainer.train_dataset, str(folder), str(folder.parent)):
        assert hidden not in text
    arguments = {line["Training argument"]: line["value"] for line in tables_of(text)[2]}
    assert arguments["`weight_decay`"] == "`0.0625`"
    assert "`use_cpu`" not in arguments
    assert "12, 9, 7 training examples (28 in total)" in text


def test_snippets_of_a_saved_run_load_its_model(run: tuple[FederatedTrainer, Path, str], tmp_path: Path) -> None:
    trainer, folder, text = run
    snippets = snippets_of(text)
    classes = [calls_of(snippet)[-1][0] for snippet in snippets]
    assert classes == ["AutoModelForSequenceClassification", "AutoPeftModelForSequenceClassification", "PeftModel"]
    inputs = torch.tensor(trainer.eval_dataset["input_ids"][:])
    trainer.model.eval()
    with torch.no_grad():
        save_file({"inputs": inputs, "logits": trainer.model(inputs).logits}, tmp_path / "expected.safetensors")
    program = textwrap.dedent(
        """
        import sys, warnings
        import torch
        from safetensors.torch import load_file
        warnings.simplefilter("ignore")
        expected = load_file(sys.argv[1])
        for file in sys.argv[2:]:
            namespace = {}
            exec(open(file).read(), namespace)
            with torch.no_grad():
                logits = namespace["model"].eval()(expected["inputs"]).logits
            assert torch.equal(logits, expected["logits"]), file
        assert "fedex_hf" not in sys.modules
        """
    )
    files = [tmp_path / f"snippet_{number}.py" for number in range(len(snippets))]
    for file, snippet in zip(files, snippets):
        file.write_text(snippet)
    arguments = [sys.executable, "-c", program, tmp_path / "expected.safetensors", *files]
    done = subprocess.run(arguments, cwd=folder, env=untraced(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Metadata ----


def test_metadata(tmp_path: Path) -> None:
    written(tmp_path, card_of(datasets=["stanfordnlp/imdb"], language="en", license="Apache-2.0"))
    assert metadata_load(tmp_path / "README.md") == {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["federated-learning", "lora", "fedex-lora", "fedex_hf", "arxiv:2410.09432"],
        "datasets": ["stanfordnlp/imdb"],
        "base_model": "FacebookAI/roberta-base",
        "base_model_relation": "finetune",
        "metrics": ["accuracy", "macro_f1"],
        "model-index": [
            {
                "name": "my-run",
                "results": [
                    {
                        "task": {"type": "text-classification"},
                        "dataset": {"type": "stanfordnlp/imdb", "name": "stanfordnlp/imdb"},
                        "metrics": [
                            {"type": "loss", "name": "Loss", "value": 1.25 / 3},
                            {"type": "accuracy", "name": "Accuracy", "value": 1 - 0.5 / 3},
                            {"type": "macro_f1", "name": "Macro f1", "value": 1 - 0.625 / 3},
                        ],
                    }
                ],
            }
        ],
    }


def test_eval_results_survive_hugging_faces_own_classes(tmp_path: Path) -> None:
    written(tmp_path, card_of(round=2, auto_class="AutoModelForCausalLM"))
    loaded = ModelCard.load(tmp_path / "README.md")
    common = {"task_type": "text-generation", "dataset_type": "private", "dataset_name": "Evaluation data of this run"}
    assert loaded.data.model_name == "my-run"
    assert loaded.data.eval_results == [
        EvalResult(metric_type="loss", metric_name="Loss", metric_value=0.625, **common),
        EvalResult(metric_type="accuracy", metric_name="Accuracy", metric_value=0.75, **common),
        EvalResult(metric_type="macro_f1", metric_name="Macro f1", metric_value=0.6875, **common),
    ]
    assert str(loaded) == (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("round_format", "relation", "library"),
    [("full", "finetune", "peft"), ("lora", "adapter", "peft"), ("merged", "finetune", "transformers")],
)
def test_relation_to_the_base(tmp_path: Path, round_format: str, relation: str, library: str) -> None:
    written(tmp_path, card_of(round_format=round_format))
    data = metadata_load(tmp_path / "README.md")
    assert (data["base_model_relation"], data["library_name"]) == (relation, library)


@pytest.mark.parametrize("round_format", ["full", "lora"])
def test_base_that_is_a_path_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round_format: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bases/mine").mkdir(parents=True)
    for base in (str(tmp_path / "base"), "bases/mine", "./base", None):
        text = written(tmp_path, card_of(base_model=base, base_revision=None, round_format=round_format))
        data = metadata_load(tmp_path / "README.md")
        assert "base_model" not in data
        assert "base_model_relation" not in data
        assert base is None or base not in text
        assert ("The base is not on the Hub" in text) == (round_format == "lora")
    monkeypatch.chdir(tmp_path.parent)  # now it could be a repository
    assert "bases/mine" in written(tmp_path, card_of(base_model="bases/mine"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"license": "My own, v2"}, {"license": "other", "license_name": "my-own-v2"}),
        ({"license": "llama3.1"}, {"license": "llama3.1"}),
        ({"license": None}, {}),
        ({"language": ["en", "German", "de"]}, {"language": ["en", "de"]}),
        ({"datasets": ["glue", "/data/private.csv"]}, {"datasets": ["glue"]}),
        ({"datasets": ["my reviews.csv"]}, {}),
        ({"auto_class": "AutoModelForSeq2SeqLM"}, {}),
        ({"auto_class": "AutoModelForMaskedLM"}, {"pipeline_tag": "fill-mask"}),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_mended(
    tmp_path: Path, changed: dict[str, Any], expected: dict[str, Any]
) -> None:
    written(tmp_path, card_of(**changed))
    data = metadata_load(tmp_path / "README.md")
    keys = ["license", "license_name", "language", "datasets"] + (["pipeline_tag"] if "auto_class" in changed else [])
    assert {key: data[key] for key in keys if key in data} == expected


@pytest.mark.parametrize("datasets", [(), ("glue", "stanfordnlp/imdb"), ("glue",), ("no id at all",)])
def test_data_set_of_the_index_has_a_form_that_the_hub_accepts(tmp_path: Path, datasets: tuple[str, ...]) -> None:
    written(tmp_path, card_of(datasets=datasets))
    dataset = metadata_load(tmp_path / "README.md")["model-index"][0]["results"][0]["dataset"]
    assert re.fullmatch(r"(?:[\w-]+/)?[\w\-.]+", dataset["type"])  # quoted by the Hub's message about one that is not
    assert (dataset["type"] == "glue") == (datasets == ("glue",))


def test_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    log = log_of(
        3,
        eval_macro_f1=math.nan,
        eval_loss=math.inf,
        eval_confusion=[[1, 2], [3, 4]],
        eval_note="good",
        eval_rouge=np.float32(0.25),
        aggregation_error=math.nan,
        fedit_deviation=math.inf,
        train_loss=math.nan,
    )
    text = written(tmp_path, card_of(log_history=log))
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {each.metric_type for each in results} == {"accuracy", "rouge"}
    line = tables_of(text)[0][-1]
    assert (line["macro_f1"], line["evaluation loss"], line["rouge"]) == ("nan", "inf", "0.25")
    assert (line["train loss"], line["aggregation error"], line["FedIT deviation"]) == ("nan", "nan", "inf")
    assert "aggregation error nan, FedIT deviation inf" in text


def test_nothing_measured_nothing_claimed(tmp_path: Path) -> None:
    rounds = [each for each in log_of(3) if not any(key.startswith("eval_") for key in each)]
    text = written(tmp_path, card_of(log_history=rounds))
    assert {"model-index", "metrics", "model_name"} & set(metadata_load(tmp_path / "README.md")) == set()
    assert "accuracy" not in text
    text = written(tmp_path, card_of(round=0, log_history=[]))
    assert "before the first of 3 rounds" in text
    assert "No round has been logged yet" in text
    assert "![" not in text


# ---- The log ----


def test_first_evaluation_of_a_round_counts() -> None:
    """One after the end of training may be of the best round's model."""
    log = [*log_of(2), {"eval_accuracy": 0.125, "eval_late": 7, "epoch": 2.0}, {"eval_accuracy": 0.5, "epoch": 1.5}]
    first, second = rounds_of([{"eval_accuracy": 0.25, "epoch": 0.0}, *log])
    assert (first.round, second.round) == (1, 2)
    assert second.metrics == {"loss": 0.625, "accuracy": 0.75, "macro_f1": 0.6875, "late": 7.0}


def test_entries_of_clients_do_not_count() -> None:
    log = log_of(1)
    log.append({"round": 1, "train_loss": 8.5, "client_id": "north", "epoch": 1.0})
    log.append({"eval_own": 8.5, "client_id": "north", "epoch": 1.0})
    (only,) = rounds_of(log)
    assert only.logged["train_loss"] == 1.5
    assert "own" not in only.metrics


def test_metrics_named_after_clients_are_left_out(tmp_path: Path) -> None:
    per_client = {"eval_Charité_accuracy": 0.5, "eval_north_loss": 0.5, "eval_Würzburg_accuracy": 0.5}
    card = card_of(log_history=log_of(3, **per_client), best_round=3, best_metric_name="eval_north_loss")
    assert "Würzburg" in written(tmp_path, card)  # the log names no such client
    text = written(tmp_path, replace(card, private_names=["Würzburg"], arguments={"weights": {"Würzburg": 2, "b": 1}}))
    assert "Würzburg" not in text
    assert "`{'b': 1}`" in text


def test_entries_of_older_runs(tmp_path: Path) -> None:
    """Logs without the number of examples, or with one direction of traffic only."""
    log = log_of(2)
    for entry in log:
        entry.pop("num_examples", None)
        entry.pop("bytes_down_per_client", None)
    line = tables_of(written(tmp_path, card_of(round=2, log_history=log)))[0][0]
    assert "examples" not in line
    assert line["kB up"] == "307.2"


def test_large_traffic_is_told_in_larger_units(tmp_path: Path) -> None:
    log = log_of(1, bytes_up_per_client=52_400_000, bytes_down_per_client=210_000_000)
    text = written(tmp_path, card_of(round=1, log_history=log))
    line = tables_of(text)[0][0]
    assert (line["MB up"], line["MB down"]) == ("52.4", "210.0")
    assert "1 MB is 1,000,000 bytes" in text


def test_long_runs_are_folded(tmp_path: Path) -> None:
    text = written(tmp_path, card_of(round=50, num_rounds=50, log_history=log_of(50), best_round=7))
    few, all_rounds = tables_of(text)[:2]
    assert [line["round"] for line in few] == ["7", "50"]
    assert [line["round"] for line in all_rounds] == [str(round) for round in range(1, 51)]
    assert few[0] == all_rounds[6]


# ---- Loading ----


def test_snippets_of_full_rounds(tmp_path: Path) -> None:
    where = (["someone/my-run"], {"revision": "round-3"})
    plain, peft, on_base = map(calls_of, snippets_of(written(tmp_path, card_of())))
    assert plain == [("AutoModelForSequenceClassification", *where)]
    assert peft == [("AutoPeftModelForSequenceClassification", *where)]
    assert on_base == [*plain, ("PeftModel", ["base", *where[0]], where[1])]


def test_snippets_of_lora_rounds(tmp_path: Path) -> None:
    """No `AutoModelFor*` on the repository: it would look for the tag in the repository of the base."""
    card = card_of(round_format="lora")
    text = written(tmp_path, card)
    peft, on_base = map(calls_of, snippets_of(text))
    where = (["someone/my-run"], {"revision": "round-3"})
    assert peft == [("AutoPeftModelForSequenceClassification", where[0], where[1] | {"num_labels": 3})]
    assert on_base == [
        (
            "AutoModelForSequenceClassification",
            ["FacebookAI/roberta-base"],
            {"revision": card.base_revision, "num_labels": 3},
        ),
        ("PeftModel", ["base", *where[0]], where[1]),
    ]
    assert "there is no such tag" in text
    generator = {"auto_class": "AutoModelForCausalLM", "num_labels": None, "base_revision": None}
    peft, on_base = map(calls_of, snippets_of(written(tmp_path, replace(card, **generator))))
    assert peft == [("AutoPeftModelForCausalLM", *where)]
    assert on_base[0] == ("AutoModelForCausalLM", ["FacebookAI/roberta-base"], {})
    (only,) = map(calls_of, snippets_of(written(tmp_path, replace(card, base_model=None, base_revision=None))))
    assert only == [("AutoPeftModelForSequenceClassification", where[0], where[1] | {"num_labels": 3})]


def test_snippets_of_merged_rounds(tmp_path: Path) -> None:
    (plain,) = snippets_of(written(tmp_path, card_of(round_format="merged", tag=None)))
    assert calls_of(plain) == [("AutoModelForSequenceClassification", ["someone/my-run"], {})]
    assert "peft" not in plain


@pytest.mark.parametrize(
    ("auto_class", "classes"),
    [
        ("AutoModel", ["AutoModel", "AutoPeftModelForFeatureExtraction", "PeftModel"]),
        ("AutoModelForMaskedLM", ["AutoModelForMaskedLM", "PeftModel"]),  # PEFT has no auto class for it
        ("MyOwnAuto", []),
    ],
)
def test_snippets_name_classes_that_exist(tmp_path: Path, auto_class: str, classes: list[str]) -> None:
    snippets = snippets_of(written(tmp_path, card_of(auto_class=auto_class)))
    assert [calls_of(snippet)[-1][0] for snippet in snippets] == classes
    for snippet in snippets:
        for line in ast.parse(snippet).body:
            if isinstance(line, ast.ImportFrom):
                exec(ast.unparse(line))


# ---- Words ----


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=\.)\s+(?=[A-Z\[])", paragraph.strip())


def method_of(text: str) -> str:
    return text.partition("## Method\n\n")[2].partition("\n\n##")[0]


@pytest.mark.parametrize(
    ("method", "is_exact", "says", "says_not", "tag"),
    [
        ("fedex", True, "adds the difference, the residual", "not exact", "fedex-lora"),
        ("fedex", False, "best low-rank approximation", "continues from that average", "fedex-lora"),
        ("fedit", False, "is not exact: its aggregation error is the FedIT deviation", "residual", "fedit"),
        ("ffa", True, "is exact and needs no residual", "not exact", "ffa-lora"),
        ("mine", True, "describes itself as exact", "residual", "mine"),
        ("mine", False, "describes itself as not exact", "residual", "mine"),
    ],
)
def test_method_in_three_sentences(
    tmp_path: Path, method: str, is_exact: bool, says: str, says_not: str, tag: str
) -> None:
    text = written(tmp_path, card_of(method=method, is_exact=is_exact))
    told = method_of(text)
    assert len(sentences(told)) == 3
    assert says in told
    assert says_not not in told
    assert PAPERS[method] in told
    tags = metadata_load(tmp_path / "README.md")["tags"]
    arxiv = re.search(r"\d{4}\.\d{5}", PAPERS[method])
    assert tags == ["federated-learning", "lora", tag, "fedex_hf", *([f"arxiv:{arxiv[0]}"] if arxiv else [])]
    assert PAPERS[method].rpartition("/")[2] in text.partition("## Citation")[2]
    assert ("sums only, and the residual tells clients" in text) == (method == "fedex")
    assert ("Aggregation has changed this base" in text) == (method in ("fedex", "mine"))


def test_citation_is_that_of_the_readme(tmp_path: Path) -> None:
    entry = re.search(r"```bibtex\n.*?\n```", written(tmp_path, card_of()), re.DOTALL)
    assert entry is not None
    assert entry[0] in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "after round 3 of 3, the last."),
        ({"num_rounds": 5}, "after round 3 of 5: the run was still going on"),
        ({"round": 2}, "after round 2 of 3; the log below goes on to round 3."),
        (
            {"round": 2, "best_round": 2, "best_metric_name": "eval_accuracy"},
            "after round 2 of 3, the best so far by `accuracy`; the log below goes on to round 3.",
        ),
        ({"best_round": 2, "best_metric_name": "accuracy"}, "after round 3 of 3, the last."),
    ],
)
def test_which_round(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    assert f"These files are from {says}" in written(tmp_path, card_of(**changed))


def test_cast(tmp_path: Path) -> None:
    assert "survived" not in written(tmp_path, card_of())
    text = written(tmp_path, card_of(cast_survival=0.99543, dtype="float16"))
    assert "99.54 % of the update survived the cast to float16." in text
    assert "format `lora`" not in text
    assert "all give the same model" not in text
    text = written(tmp_path, card_of(cast_survival=0.2, dtype="bfloat16"))
    assert "20.00 % of the update survived the cast to bfloat16. The rest rounded away; the format `lora`" in text


def test_clients_are_told_by_size(tmp_path: Path) -> None:
    assert "2 clients with 837, 400 training examples (1,237 in total)" in written(tmp_path, card_of())
    many = card_of(num_clients=40, client_examples=list(range(11, 51)))
    assert "40 clients with 11 to 50 training examples each (1,220 in total)" in written(tmp_path, many)
    assert "by 1 client, each" in written(tmp_path, card_of(num_clients=1, client_examples=[5]))


# ---- Plots ----


@pytest.mark.parametrize(
    "log",
    [
        log_of(1),
        log_of(50),
        log_of(3, aggregation_error=0.0, fedit_deviation=0.0),
        log_of(3, aggregation_error=math.inf, fedit_deviation=math.nan, eval_accuracy=math.nan, train_loss=math.inf),
        log_of(2, **{f"eval_metric_{number}": float(number) for number in range(12)}, **{"eval_$x^": 0.5}),
    ],
    ids=["one", "fifty", "zeros", "not finite", "many metrics"],
)
@pytest.mark.usefixtures("pictures")
def test_plots(tmp_path: Path, log: list[dict[str, Any]], recwarn: pytest.WarningsRecorder) -> None:
    text = written(tmp_path, card_of(round=1, log_history=log))
    images = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert images == ["plots/exactness.png", "plots/metrics.png", "plots/traffic.png"]
    for image in images:
        picture = Image.open(tmp_path / image)
        assert picture.format == "PNG"
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or ()) > 10  # something is drawn
    assert not [each for each in recwarn if "matplotlib" in str(each.filename)]


@pytest.mark.usefixtures("pictures")
def test_same_log_same_bytes(tmp_path: Path) -> None:
    """A round that is published twice is one commit."""
    files: list[dict[str, bytes]] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, card_of())
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        files.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths})
    assert len(files[0]) == 4
    assert files[0] == files[1]


@pytest.mark.usefixtures("pictures")
def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["matplotlib", *(each for each in sys.modules if each.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    text = written(tmp_path, card_of())
    assert "![" not in text
    assert "plot" not in text
    assert not (tmp_path / "plots").exists()
    assert len(tables_of(text)[0]) == 3


@pytest.mark.usefixtures("pictures")
def test_plot_that_fails_costs_the_plot_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "_draw_exactness", fail)
    text = written(tmp_path, card_of())
    assert re.findall(r"\((plots/.+?)\)", text) == ["plots/metrics.png", "plots/traffic.png"]


# ---- Arguments and versions ----


@dataclass
class OwnArguments(FederatedTrainingArguments):
    learning_rate: float = 3e-4
    schedule: dict[str, Any] = field(default_factory=lambda: {"warm": 1})
    cache_dir: str | None = None
    my_api_key: str | None = None
    remark: str | None = None


@pytest.mark.parametrize("cls", [TrainingArguments, FederatedTrainingArguments, OwnArguments])
def test_default_arguments_are_not_told(tmp_path: Path, cls: type[TrainingArguments]) -> None:
    assert non_default_arguments(cls(output_dir=str(tmp_path))) == {}


def test_arguments_that_were_set(tmp_path: Path) -> None:
    args = OwnArguments(
        output_dir=str(tmp_path),
        learning_rate=5e-5,  # `TrainingArguments`' default, and not this class's
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        num_rounds=7,
        data_seed=0,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        aggregator_kwargs={"residual_rank": 2},
        schedule={"warm": 2, "file": str(tmp_path / "x"), "hub_token": "abc", "nested": [TOKEN, 3]},
        cache_dir="cache",
        my_api_key="abc",
        hub_token=TOKEN,
        hub_model_id="someone/else",
        run_name=str(tmp_path),
        use_cpu=True,
        dataloader_num_workers=2,
        dataloader_drop_last=True,
        logging_steps=3,
    )
    assert non_default_arguments(args) == {
        "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "epoch",
        "num_rounds": 7,
        "data_seed": 0,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        "aggregator_kwargs": {"residual_rank": 2},
        "schedule": {"warm": 2, "nested": [3]},
        "dataloader_drop_last": True,
        "logging_steps": 3,
    }


@pytest.mark.parametrize(
    "remark",
    [
        TOKEN,
        f"see {TOKEN}",
        "/srv/x",
        "~/x",
        "../x",
        "file=/srv/x",
        r"C:\Users\me",
        r"\\server\x",
        "s3:/bucket/x y=/z",
    ],
)
def test_values_that_are_not_told(tmp_path: Path, remark: str) -> None:
    assert non_default_arguments(OwnArguments(output_dir=str(tmp_path), remark=remark)) == {}
    text = written(tmp_path, card_of(arguments={"remark": remark, "list": [remark, 1]}, lora={"r": 8, "x": remark}))
    assert remark not in text
    assert "`[1]`" in text


@pytest.mark.parametrize("remark", ["glue/sst2", "https://arxiv.org/abs/2410.09432", r".*\.(q|v)_proj", "half_life"])
def test_values_that_look_like_paths_and_are_none(tmp_path: Path, remark: str) -> None:
    assert non_default_arguments(OwnArguments(output_dir=str(tmp_path), remark=remark)) == {"remark": remark}
    assert rf"`{remark!r}`".replace("|", r"\|") in written(tmp_path, card_of(arguments={"remark": remark}))


def test_values_of_other_types(tmp_path: Path) -> None:
    lora = {"target_modules": {"value", "query"}, "dtype": torch.float16, "text": "a`b\nc|d"}
    table = {line["LoRA"]: line["value"] for line in tables_of(written(tmp_path, card_of(lora=lora)))[1]}
    assert table == {
        "`target_modules`": "`['query', 'value']`",
        "`dtype`": "`'<dtype>'`",
        "`text`": r"`'a'b\nc\|d'`",
    }


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert torch.__version__.partition("+")[0] == found["torch"].partition("+")[0]
    assert list(found)[:3] == ["python", "fedex_hf", "transformers"]

    def missing(name: str) -> str:
        raise run_card.PackageNotFoundError(name)

    monkeypatch.setattr(run_card, "version", missing)
    assert versions()["fedex_hf"] == "from source"
    assert versions()["torch"] == "not installed"
