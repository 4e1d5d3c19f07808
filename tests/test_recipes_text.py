"""The text recipes, from their flags to results and saved outputs, and what they refuse before they train."""

from __future__ import annotations

import json

import arithmetic
import commonsense
import e2e_nlg
import numpy as np
import pytest
from text_lab import (
    ALLOWED,
    commonsense_rows,
    e2e_rows,
    gsm8k_rows,
    language_model,
    math_rows,
    metamath_rows,
    text_flags,
    write_splits,
)

from fedex_hf import FederatedTrainer
from fedex_hf.comparison import read_results
from fedex_hf.metrics import load_metric, missing_requirements
from fedex_hf.tasks import completion, data, grading


@pytest.fixture
def lab(tmp_path):
    """A folder with a tiny Llama and no data yet."""
    language_model(tmp_path / "model")
    return tmp_path


def e2e(root, **more):
    return text_flags(root, **({"dataset_name": root / "e2e", "num_beams": 2, "skip_missing_metrics": True} | more))


def sums(root, **more):
    return text_flags(root, **({"dataset_name": root / "train", "gsm8k_name": root / "gsm8k"} | more))


def sense(root, **more):
    given = {"dataset_name": root / "sense", "eval_dataset_dir": root / "sense", "eval_sets": "boolq piqa"}
    return text_flags(root, **(given | more))


def e2e_data(root):
    return write_splits(root / "e2e", train=e2e_rows(16), validation=e2e_rows(6), test=e2e_rows(8))


def sums_data(root):
    write_splits(root / "train", train=gsm8k_rows(20))
    write_splits(root / "gsm8k", test=gsm8k_rows(6))
    write_splits(root / "math", test=math_rows(3))


def sense_data(root, sets=("boolq", "piqa")):
    for name in sets:
        write_splits(root / "sense" / name, train=commonsense_rows(name, 10), test=commonsense_rows(name, 4))


def results(root):
    return read_results(root / "out" / "results.json")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refusal(recipe, flags, root):
    """The message with which the recipe ends, having trained nothing and shown no traceback."""
    with pytest.raises(SystemExit) as error:
        recipe.main(flags)
    assert not list(root.rglob("checkpoint-*"))
    assert not list(root.rglob("result.json"))
    assert isinstance(error.value.code, str)
    return error.value.code


def without_metrics(monkeypatch, *names):
    """As where nothing that these metrics need is installed."""
    real = grading.missing_requirements

    def missing(metric, parts=None):
        lacks = set(names) & {metric, *(parts or [])}
        return ["No `java` is on the PATH."] if lacks else real(metric, parts)

    monkeypatch.setattr(grading, "missing_requirements", missing)


# From flags to results


def test_e2e_runs_through_training_generation_and_results(lab, monkeypatch):
    e2e_data(lab)
    without_metrics(monkeypatch, "meteor", "rougeL", "cider")
    e2e_nlg.main(e2e(lab, num_rounds=2))
    assert "e2e_nlg (bleu)" in (lab / "out" / "results.md").read_text()
    found = results(lab)
    assert {result.run.method for result in found} == {"fedex", "fedit"}
    for result in found:
        assert result.metric == "bleu"
        assert result.test.keys() == {"bleu", "nist", "loss"}
        assert all(np.isfinite(value) for value in result.test.values())
        assert [each.validation.keys() >= {"loss"} for each in result.rounds] == [True, True]
        outputs = lines(lab / "out" / result.run.folder / "last_round" / "outputs.jsonl")
        assert [row["prompt"] for row in outputs] == [
            f"{row['meaning_representation']} ->" for row in e2e_rows(8)[::2]
        ]
        assert outputs[0]["references"] == [row["human_reference"] for row in e2e_rows(8)[:2]]
        bleu = load_metric("e2e_nlg").compute(
            predictions=[row["output"] for row in outputs],
            references=[row["references"] for row in outputs],
            metrics=["bleu"],
        )
        assert result.test["bleu"] == pytest.approx(bleu["bleu"])


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_requirements("e2e_nlg")), reason="needs Java and the extra `metrics`")
def test_e2e_computes_all_five_metrics_where_java_is_there(lab):
    e2e_data(lab)
    e2e_nlg.main(e2e(lab, aggregators="fedex", skip_missing_metrics=False))
    (result,) = results(lab)
    assert result.test.keys() == {"bleu", "nist", "meteor", "rougeL", "cider", "loss"}


def test_e2e_limits_meaning_representations_and_keeps_all_their_references(lab, monkeypatch):
    e2e_data(lab)
    without_metrics(monkeypatch, "meteor", "rougeL", "cider")
    e2e_nlg.main(e2e(lab, aggregators="fedex", max_test_examples=2))
    outputs = lines(lab / "out/runs/e2e_nlg/fedex/epochs-1/seed-0/last_round/outputs.jsonl")
    assert [len(row["references"]) for row in outputs] == [2, 2]


@pytest.mark.no_cover
def test_gpt2_learns_the_sentences_of_e2e(tmp_path, monkeypatch):
    """Beam search writes a reference word for word after enough steps: the masks and the prompts fit each other."""
    language_model(tmp_path / "model", "gpt2")
    rows = [
        {**row, "human_reference": e2e_rows(16)[index // 2 * 2]["human_reference"]}
        for index, row in enumerate(e2e_rows(16))
    ]
    write_splits(tmp_path / "e2e", train=rows * 4, validation=rows, test=rows)
    without_metrics(monkeypatch, "meteor", "rougeL", "cider")
    e2e_nlg.main(
        e2e(
            tmp_path,
            aggregators="fedex",
            pad_token="<|endoftext|>",
            label_smoothing_factor=0.1,
            num_train_epochs=8,
            num_clients=1,
            lora_r=16,
            lora_alpha=32,
            max_new_tokens=16,
            per_device_train_batch_size=8,
        )
    )
    (result,) = results(tmp_path)
    outputs = lines(tmp_path / "out" / result.run.folder / "last_round" / "outputs.jsonl")
    assert result.test["bleu"] > 0.8
    assert any(row["output"] in row["references"] for row in outputs)


@pytest.mark.parametrize("form", ["metamath", "gsm8k", "math"])
def test_arithmetic_runs_on_every_form_of_training_data(lab, form):
    sums_data(lab)
    rows = {"metamath": metamath_rows, "gsm8k": gsm8k_rows, "math": math_rows}[form](20)
    write_splits(lab / "train", train=rows)
    methods = "fedex fedit" if form == "metamath" else "fedex"
    partition = {"partition_by": "type", "dirichlet_alpha": 1.0} if form == "metamath" else {}
    arithmetic.main(sums(lab, aggregators=methods, **partition))
    assert len(results(lab)) == len(methods.split())
    for result in results(lab):
        assert result.metric == "gsm8k"
        outputs = lines(lab / "out" / result.run.folder / "last_round" / "gsm8k.jsonl")
        assert [row["references"] for row in outputs] == [row["answer"] for row in gsm8k_rows(6)]
        assert result.test["gsm8k"] == pytest.approx(sum(row["correct"] for row in outputs) / 6)
        assert np.isfinite(result.test["loss"])


@pytest.mark.skipif(bool(missing_requirements("math")), reason="needs the extra `metrics`")
def test_arithmetic_tests_on_math_and_takes_a_file_as_the_test_split(lab):
    sums_data(lab)
    arithmetic.main(
        sums(lab, aggregators="fedex", gsm8k_name=None, math_name=lab / "math" / "test.jsonl", max_test_examples=2)
    )
    (result,) = results(lab)
    assert result.metric == "math"
    assert len(lines(lab / "out" / result.run.folder / "last_round" / "math.jsonl")) == 2


def test_commonsense_scores_generated_and_chosen_answers(lab):
    sense_data(lab)
    commonsense.main(sense(lab, scoring="both", aggregators="fedex centralized", partition_by="set"))
    for result in results(lab):
        test, folder = result.test, lab / "out" / result.run.folder / "last_round"
        assert result.metric == "average"
        assert test["average"] == pytest.approx((test["boolq"] + test["piqa"]) / 2)
        for score in ("choices", "choices_norm"):
            mean = (test[f"boolq_{score}"] + test[f"piqa_{score}"]) / 2
            assert test[f"average_{score}"] == pytest.approx(mean)
        for name in ("boolq", "piqa"):
            outputs = lines(folder / f"{name}.jsonl")
            assert [row["references"] for row in outputs] == [row["answer"] for row in commonsense_rows(name, 4)]
            assert test[name] == pytest.approx(sum(row["correct"] for row in outputs) / 4)
            assert list(lines(folder / f"{name}_choices.jsonl")[0]["log_likelihoods"]) == ALLOWED[name]


def test_commonsense_takes_one_file_and_chooses_without_generating(lab):
    sense_data(lab)
    rows = [*commonsense_rows("boolq", 8), *commonsense_rows("hellaswag", 8)]
    (lab / "all.json").write_text(json.dumps(rows))
    commonsense.main(
        sense(lab, dataset_name=lab / "all.json", scoring="choices", aggregators="fedex", dirichlet_alpha=0.5)
    )
    (result,) = results(lab)
    assert result.metric == "average_choices"
    names = ("average", "boolq", "piqa")
    scores = {f"{name}_{score}" for name in names for score in ("choices", "choices_norm")}
    assert result.test.keys() == {*scores, "loss"}


def test_commonsense_replaces_a_column_kind_that_the_data_bring(lab, capsys):
    sense_data(lab)
    rows = [{**row, "kind": "theirs"} for row in commonsense_rows("boolq", 8)]
    (lab / "all.json").write_text(json.dumps(rows))
    split = commonsense.load_training(str(lab / "all.json"))["train"]
    assert set(split["kind"]) == {"true"}
    assert "split `train`: the column `kind` is replaced" in capsys.readouterr().out
    write_splits(lab / "sense" / "boolq", train=rows)
    assert set(commonsense.load_training(str(lab / "sense"))["train"]["kind"]) == {"true", "solution"}


@pytest.mark.no_cover
def test_commonsense_learns_the_form_of_answers(lab):
    """After enough steps every output names an answer: what is generated is what was trained."""
    for name in ("boolq", "piqa"):
        rows = commonsense_rows(name, 40)
        write_splits(lab / "sense" / name, train=rows, test=rows[:6])
    commonsense.main(
        sense(lab, aggregators="fedex", num_train_epochs=6, num_clients=1, lora_r=16, lora_alpha=32, max_new_tokens=12)
    )
    (result,) = results(lab)
    for name in ("boolq", "piqa"):
        outputs = lines(lab / "out" / result.run.folder / "last_round" / f"{name}.jsonl")
        assert all(row["output"].removeprefix("the correct answer is ") in ALLOWED[name] for row in outputs)


# Splits


def test_test_rows_are_never_trained_or_chosen_on(lab, monkeypatch):
    seen = {"train": [], "validation": [], "test": []}
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
    write_splits(lab / "train", train=gsm8k_rows(20), test=gsm8k_rows(40)[20:24])
    arithmetic.main(sums(lab, aggregators="fedex", gsm8k_name=lab / "train", validation_fraction=0.2))
    assert {split: len(rows) for split, rows in seen.items()} == {"train": 16, "validation": 4, "test": 4}
    rows = [row for split in seen.values() for row in split]
    assert len(set(rows)) == len(rows)


# Refusals


def test_metrics_that_cannot_be_computed_are_refused_or_left_out(lab, monkeypatch):
    e2e_data(lab)
    without_metrics(monkeypatch, "bleu", "nist", "meteor", "rougeL", "cider")
    message = refusal(e2e_nlg, e2e(lab, skip_missing_metrics=False), lab)
    assert "No `java` is on the PATH." in message
    assert "--skip_missing_metrics" in message
    e2e_nlg.main(e2e(lab, aggregators="fedex"))
    (result,) = results(lab)
    assert result.test.keys() == {"loss"}


def test_arithmetic_without_anything_to_test_is_refused(lab, monkeypatch):
    sums_data(lab)
    assert "`--gsm8k_name`, `--math_name` or both" in refusal(arithmetic, sums(lab, gsm8k_name=None), lab)
    without_metrics(monkeypatch, "math")
    flags = sums(lab, gsm8k_name=None, math_name=lab / "math")
    assert "--skip_missing_metrics" in refusal(arithmetic, flags, lab)
    assert "None of the tests" in refusal(arithmetic, [*flags, "--skip_missing_metrics"], lab)


def test_missing_columns_are_refused(lab):
    e2e_data(lab)
    write_splits(lab / "e2e", validation=[{"mr": "name[Zizzi]", "human_reference": "Zizzi."}])
    assert "no column `meaning_representation`. There are `mr`" in refusal(e2e_nlg, e2e(lab), lab)
    write_splits(lab / "train", train=[{"prompt": "1 + 1", "result": "2"}] * 4)
    message = refusal(arithmetic, sums(lab), lab)
    assert "has the columns `prompt`, `result`. Expected: `query`, `response`, or `question`, `answer`" in message
    sense_data(lab)
    write_splits(lab / "sense" / "piqa", train=[{"instruction": "x", "input": ""}])
    assert "no column `output`" in refusal(commonsense, sense(lab), lab)
    sense_data(lab)
    assert "no column `topic`" in refusal(commonsense, sense(lab, partition_by="topic"), lab)


def test_empty_splits_are_refused(lab):
    e2e_data(lab)
    write_splits(lab / "e2e", test=[])
    assert "split `test`: there are no rows" in refusal(e2e_nlg, e2e(lab), lab)


def test_paths_that_do_not_exist_are_refused(lab):
    e2e_data(lab)
    sense_data(lab)
    sums_data(lab)
    gone = lab / "gone"
    for recipe, flags, flag in (
        (e2e_nlg, e2e(lab, dataset_name=gone), "--dataset_name"),
        (e2e_nlg, e2e(lab, model_name_or_path=gone), "--model_name_or_path"),
        (arithmetic, sums(lab, gsm8k_name=gone), "--gsm8k_name"),
        (commonsense, sense(lab, eval_sets="boolq hellaswag"), "--eval_dataset_dir"),
        (commonsense, sense(lab, dataset_name=gone), "--dataset_name"),
    ):
        assert f"`{flag} {lab}" in refusal(recipe, flags, lab)


def test_absent_test_folders_are_refused_without_asking_the_hub(lab, monkeypatch):
    sense_data(lab)
    monkeypatch.chdir(lab)
    load = data.load_dataset

    def from_files(name, *args, **kwargs):
        assert name == "json", f"The Hub is asked for {name}"
        return load(name, *args, **kwargs)

    monkeypatch.setattr(data, "load_dataset", from_files)
    message = refusal(commonsense, sense(lab, eval_dataset_dir=None), lab)
    assert message.startswith(
        "`--eval_dataset_dir dataset`: there is no folder `dataset`. Name the folder `dataset` of"
    )
    message = refusal(commonsense, sense(lab, eval_sets="boolq ARC-Easy"), lab)
    assert f"there is no folder `{lab / 'sense' / 'ARC-Easy'}`" in message


def test_columns_that_hold_no_text_are_refused(lab):
    sums_data(lab)
    write_splits(lab / "gsm8k", test=[{"question": "1 + 1?", "answer": 2}])
    assert "split `test`: column `answer` holds" in refusal(arithmetic, sums(lab), lab)
    sums_data(lab)
    write_splits(lab / "train", train=[{"question": "1 + 1?", "answer": 2}] * 8)
    assert "split `train`: column `answer` holds" in refusal(arithmetic, sums(lab), lab)
    sense_data(lab)
    write_splits(lab / "sense" / "boolq", test=[{**commonsense_rows("boolq", 1)[0], "answer": True}])
    assert "split `test`: column `answer` holds" in refusal(commonsense, sense(lab), lab)
    write_splits(lab / "sense" / "boolq", train=[{**commonsense_rows("boolq", 1)[0], "instruction": 1}])
    assert "split `train`: column `instruction` holds" in refusal(commonsense, sense(lab), lab)
    e2e_data(lab)
    write_splits(lab / "e2e", test=[{"meaning_representation": 1, "human_reference": "Zizzi."}])
    assert "split `test`: column `meaning_representation` holds" in refusal(e2e_nlg, e2e(lab), lab)


def test_extra_columns_of_another_form_are_neither_trained_nor_tested_on(lab, monkeypatch):
    seen = []
    prepare = grading.tokenize_completions

    def watch(rows, tokenizer, make_prompt, make_completion, *args, **kwargs):
        seen.extend(make_prompt(row) + make_completion(row) for row in rows)
        return prepare(rows, tokenizer, make_prompt, make_completion, *args, **kwargs)

    for module in (grading, completion):
        monkeypatch.setattr(module, "tokenize_completions", watch)
    sums_data(lab)
    write_splits(lab / "train", train=[{**row, "answer": "wrong", "query": "wrong"} for row in math_rows(20)])
    write_splits(lab / "gsm8k", test=[{**row, "query": "wrong", "response": "wrong"} for row in gsm8k_rows(6)])
    arithmetic.main(sums(lab, aggregators="fedex"))
    assert len(seen) == 26
    assert not any("wrong" in text for text in seen)


def test_prompts_longer_than_the_context_are_refused(lab):
    e2e_data(lab)
    assert "leave no room for a completion in `--max_seq_length 4`" in refusal(
        e2e_nlg, e2e(lab, max_seq_length=4), lab
    )
    message = refusal(e2e_nlg, e2e(lab, max_new_tokens=254), lab)
    assert "have more than 2 tokens, which `--max_new_tokens 254` leaves of the model's context of 256" in message
    assert "takes: 256 tokens" in refusal(e2e_nlg, e2e(lab, max_seq_length=300), lab)


def test_a_tokenizer_without_padding_token_is_refused(tmp_path):
    language_model(tmp_path / "model", "gpt2")
    e2e_data(tmp_path)
    assert "--pad_token '<|endoftext|>'" in refusal(e2e_nlg, e2e(tmp_path), tmp_path)


def test_answers_that_cannot_be_compared_are_refused(lab):
    sums_data(lab)
    write_splits(lab / "gsm8k", test=[{"question": "1 + 1?", "answer": "unknown"}])
    assert "Expected: a number after `####`" in refusal(arithmetic, sums(lab), lab)
    sense_data(lab)
    write_splits(lab / "sense" / "boolq", test=[{**commonsense_rows("boolq", 1)[0], "answer": "maybe"}])
    assert "'maybe'" in refusal(commonsense, sense(lab), lab)


def test_values_that_are_not_allowed_are_refused(lab):
    assert "`num_beams=0` is not allowed" in refusal(e2e_nlg, e2e(lab, num_beams=0), lab)
    for flags in (e2e(lab, bleu_script="ruby"), e2e(lab, unknown="1")):
        with pytest.raises(SystemExit):
            e2e_nlg.main(flags)


@pytest.mark.parametrize("recipe", [e2e_nlg, arithmetic, commonsense])
def test_help_names_every_argument(recipe, capsys):
    with pytest.raises(SystemExit) as error:
        recipe.main(["--help"])
    assert error.value.code == 0
    told = capsys.readouterr().out
    for name in ("--dataset_name", "--pad_token", "--max_new_tokens", "--aggregators", "--lora_r", "--num_rounds"):
        assert name in told
