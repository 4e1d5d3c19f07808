"""The GLUE recipe: its tasks, what it refuses, and two processes against one."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import glue
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from programs import free_port, untraced
from recipe_lab import encoder, glue_flags, glue_folder, glue_rows, write_rows
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoTokenizer, EvalPrediction

from fedex_hf import FederatedTrainer
from fedex_hf.comparison import read_results
from fedex_hf.tasks.data import DataError, check_columns, hold_out, load_data, take
from fedex_hf.tasks.glue import GLUE_TASKS, Predictions


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def lab(tmp_path):
    glue_folder(tmp_path / "glue", ["sst2"])
    encoder(tmp_path / "model")
    return tmp_path


def refusal(root: Path, **flags) -> str:
    """The message with which the recipe ends, having trained nothing and shown no traceback."""
    with pytest.raises(SystemExit) as error:
        glue.main(glue_flags(root, **flags))
    assert not list(root.rglob("checkpoint-*"))
    return str(error.value)


@pytest.mark.no_cover
@pytest.mark.parametrize("task", sorted(GLUE_TASKS))
def test_every_task_runs_through_training_evaluation_and_results(tmp_path, task):
    glue_folder(tmp_path / "glue", [task])
    encoder(tmp_path / "model")
    glue.main(glue_flags(tmp_path, tasks=task, aggregators="fedex"))
    (result,) = read_results(tmp_path / "out" / "results.json")
    assert result.metric in result.test
    assert np.isfinite(result.test["loss"])
    if task == "mnli":
        assert {"accuracy", "accuracy_mismatched"} <= result.test.keys()
    assert task in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.no_cover
def test_the_words_are_learned(tmp_path):
    """Enough steps tell good words from bad ones on rows that were never seen: the test measures the model."""
    glue_folder(tmp_path / "glue", ["sst2"], train=240, test=40)
    encoder(tmp_path / "model")
    glue.main(
        glue_flags(tmp_path, aggregators="fedex", num_rounds=3, num_train_epochs=5, lora_target_modules="all-linear")
    )
    (result,) = read_results(tmp_path / "out" / "results.json")
    assert result.test["accuracy"] >= 0.8


def test_test_rows_are_the_official_validation_split_and_are_never_trained_or_chosen_on(lab, monkeypatch):
    seen: dict[str, list] = {"train": [], "validation": [], "test": []}
    init, evaluate = FederatedTrainer.__init__, FederatedTrainer.evaluate

    def keep(self, *args, **kwargs):
        seen["train"] = [tuple(ids) for part in kwargs["train_dataset"].values() for ids in part["input_ids"]]
        seen["validation"] = [tuple(ids) for ids in kwargs["eval_dataset"]["input_ids"]]
        init(self, *args, **kwargs)

    def watch(self, eval_dataset=None, *args, **kwargs):
        if eval_dataset is not None:
            seen["test"] = [tuple(ids) for ids in eval_dataset["input_ids"]]
        return evaluate(self, eval_dataset, *args, **kwargs)

    monkeypatch.setattr(FederatedTrainer, "__init__", keep)
    monkeypatch.setattr(FederatedTrainer, "evaluate", watch)
    glue.main(glue_flags(lab, aggregators="fedex"))
    tokenizer = AutoTokenizer.from_pretrained(lab / "model")
    data = load_data(str(lab / "glue"), "sst2")
    official = {split: [tuple(tokenizer(row["sentence"])["input_ids"]) for row in data[split]] for split in data}
    assert sorted(seen["train"] + seen["validation"]) == sorted(official["train"])
    assert len(seen["validation"]) == 4  # a tenth
    assert seen["test"] == official["validation"]


def test_a_missing_path_is_refused(lab):
    assert "no such file or folder" in refusal(lab, dataset_name=lab / "nowhere")


def test_a_dataset_that_the_hub_does_not_give_is_refused(lab):
    message = refusal(lab, dataset_name="no-one/nothing")
    assert message.startswith("`--dataset_name no-one/nothing` is neither a local file")


def test_a_missing_model_is_refused(lab):
    assert "neither a local folder with a model" in refusal(lab, model_name_or_path=lab / "nothing")
    assert "`--model_name_or_path` is missing" in refusal(lab, model_name_or_path=None)


def test_a_missing_column_is_refused(lab):
    rows = [{"text": row["sentence"], "label": row["label"]} for row in glue_rows("sst2", 20)]
    write_rows(lab / "glue" / "sst2" / "train.jsonl", rows)
    message = refusal(lab)
    assert "no column `sentence`" in message
    assert "`text`" in message


def test_a_missing_split_is_refused(lab):
    (lab / "glue" / "sst2" / "validation.jsonl").unlink()
    assert "has no split `validation`. It has `train`" in refusal(lab)


def test_an_empty_split_is_refused(lab):
    (lab / "glue" / "sst2" / "train.jsonl").write_text("")
    assert "split `train`: there are no rows" in refusal(lab)


@pytest.mark.parametrize(
    ("label", "message"),
    [(2, "outside the head. Allowed: 0 to 1"), (-1, "hide their labels"), (1.0, "outside the head"), ("1", "outside")],
)
def test_a_label_outside_the_head_is_refused(lab, label, message):
    write_rows(lab / "glue" / "sst2" / "validation.jsonl", [{"sentence": "good", "label": label}])
    assert message in refusal(lab)


def test_a_missing_value_is_refused(lab):
    write_rows(
        lab / "glue" / "sst2" / "train.jsonl", [*glue_rows("sst2", 20), {"sentence": None, "label": 1, "idx": 20}]
    )
    assert "column `sentence` has missing values" in refusal(lab)


def test_a_column_of_numbers_is_no_text(lab):
    write_rows(lab / "glue" / "sst2" / "train.jsonl", [{"sentence": 3, "label": 1}] * 20)
    assert "column `sentence` holds" in refusal(lab)


def test_a_score_that_is_no_number_is_refused(tmp_path):
    glue_folder(tmp_path / "glue", ["stsb"])
    encoder(tmp_path / "model")
    rows = [{**row, "label": "high"} for row in glue_rows("stsb", 8)]
    write_rows(tmp_path / "glue" / "stsb" / "train.jsonl", rows)
    assert "no finite numbers" in refusal(tmp_path, tasks="stsb")


def test_more_tokens_than_the_model_takes_are_refused(lab):
    assert "`--max_seq_length 25` is more than" in refusal(lab, max_seq_length=25)


def test_a_tokenizer_without_pad_token_is_refused_until_one_is_named(lab):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = lab / "model" / name
        if path.is_file():
            content = json.loads(path.read_text())
            content.pop("pad_token", None)
            path.write_text(json.dumps(content))
    assert "no padding token" in refusal(lab)
    assert "is not in the vocabulary" in refusal(lab, pad_token="<none>")
    glue.main(glue_flags(lab, aggregators="fedex", num_rounds=1, pad_token="[PAD]"))


def test_too_few_rows_to_hold_some_out_are_refused(lab):
    write_rows(lab / "glue" / "sst2" / "train.jsonl", glue_rows("sst2", 1))
    assert "too few to hold out 1" in refusal(lab)


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as ended:
        glue.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--aggregators" in text
    assert "--config FILE.yaml" in text
    assert "Methods to compare" in text


# ---- Metrics of a prediction ----


def test_predictions_are_scored_as_glue_defines_it():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([1, 0, 0, 0, 1])
    predicted = [1, 0, 1, 0, 1]
    assert Predictions("cola")(EvalPrediction(logits, labels)) == {
        "matthews_correlation": pytest.approx(matthews_corrcoef(labels, predicted))
    }
    assert Predictions("mrpc")(EvalPrediction(logits, labels)) == {
        "accuracy": pytest.approx(accuracy_score(labels, predicted)),
        "f1": pytest.approx(f1_score(labels, predicted)),
    }
    scores, targets = np.array([[1.0], [2.5], [2.0]]), np.array([0.0, 5.0, 3.0])
    assert Predictions("stsb")(EvalPrediction(scores, targets))["pearson"] == pytest.approx(
        pearsonr(scores[:, 0], targets)[0]
    )


# ---- Data ----


def test_data_are_read_from_files_folders_and_saved_datasets(tmp_path):
    rows = glue_rows("sst2", 6)
    expected = [row["sentence"] for row in rows]
    with gzip.open(make(tmp_path / "a" / "train.jsonl.gz"), "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    Dataset.from_list(rows).to_csv(make(tmp_path / "b" / "train.csv"))
    Dataset.from_list(rows).to_parquet(make(tmp_path / "c" / "train-00000-of-00001.parquet"))
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "d")
    Dataset.from_list(rows).save_to_disk(tmp_path / "e")
    for name in ("a", "b", "c", "d", "e", "b/train.csv"):
        assert load_data(str(tmp_path / name))["train"]["sentence"][:] == expected, name
    assert load_data(str(tmp_path), "a")["train"]["sentence"][:] == expected


def test_a_folder_without_data_and_mixed_kinds_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no data files"):
        load_data(str(tmp_path))
    write_rows(tmp_path / "train.jsonl", glue_rows("sst2", 3))
    (tmp_path / "test.csv").write_text("sentence,label\na,1\n")
    with pytest.raises(DataError, match="one kind of"):
        load_data(str(tmp_path))
    (tmp_path / "some.txt").write_text("a")
    with pytest.raises(DataError, match="one kind of"):
        load_data(str(tmp_path / "some.txt"))


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "a", \n{')
    with pytest.raises(DataError, match="split `train` cannot be read"):
        load_data(str(tmp_path))


def test_a_limit_draws_the_same_rows_and_keeps_their_order():
    rows = Dataset.from_dict({"x": list(range(50))})
    taken = take(rows, 10, seed=3)["x"][:]
    assert taken == sorted(taken)
    assert len(set(taken)) == 10
    assert taken == take(rows, 10, seed=3)["x"][:]
    assert taken != take(rows, 10, seed=4)["x"][:]
    assert take(rows, None, seed=3) is rows


def test_held_out_rows_are_not_trained_on():
    rows = Dataset.from_dict({"x": list(range(50))})
    train, validation = hold_out(rows, 0.1, seed=0, where="here")
    assert len(validation) == 5
    assert sorted(train["x"][:] + validation["x"][:]) == list(range(50))


def test_columns_are_checked():
    rows = Dataset.from_dict({"x": [1, 2]})
    assert check_columns(rows, ["x"], "here") is rows
    with pytest.raises(DataError, match="here: no column `y`"):
        check_columns(rows, ["y"], "here")


# ---- Two processes ----


def test_two_processes_give_the_metrics_of_one(lab):
    """`accelerate launch` with two CPU processes: halves of the same batches, the same weights up to rounding.

    40 training and 16 test examples, so that no batch is cut short: accelerate fills a short one with examples seen
    before, which `Trainer`'s loss then counts. `--multi_gpu` is how `accelerate launch` starts several processes on a
    machine without GPUs too; with `--cpu` it starts one, unless there is MPI. The port is named: accelerate 1.4, which
    is the oldest we admit, waits forever on port 0.
    """
    glue_folder(lab / "glue", ["sst2"], train=44)
    flags = {"aggregators": "fedex fedit", "train_sampling_strategy": "random"}
    glue.main(glue_flags(lab, output_dir=lab / "one", per_device_train_batch_size=4, **flags))
    two = glue_flags(lab, output_dir=lab / "two", per_device_train_batch_size=2, **flags)
    environment = {**untraced(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [sys.executable, *launch, str(RECIPES / "glue.py"), *two]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for single, double in zip(*(read_results(lab / name / "results.json") for name in ("one", "two"))):
        assert single.run == double.run
        assert single.data == double.data
        assert double.test["loss"] == pytest.approx(single.test["loss"], rel=1e-4)
        assert double.test["accuracy"] == pytest.approx(single.test["accuracy"])
        for a, b in zip(single.rounds, double.rounds):
            assert b.fedit_deviation == pytest.approx(a.fedit_deviation, rel=1e-3)
            assert b.validation["loss"] == pytest.approx(a.validation["loss"], rel=1e-4)
    content = json.loads((lab / "two" / "results.json").read_text())
    assert content["machine"]["processes"] == 2


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
