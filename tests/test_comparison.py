"""Comparisons: identical starts and splits, resumed where they stopped, honest about what is the last round."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import glue
import pytest
from recipe_lab import encoder, glue_flags, glue_folder, glue_rows, write_rows
from safetensors.torch import load_file, save_file

from fedex_hf import FederatedTrainer
from fedex_hf.comparison import (
    ComparisonArguments,
    DataArguments,
    Method,
    ModelArguments,
    RecipeTrainingArguments,
    parse_recipe,
    read_results,
    runner,
)
from fedex_hf.comparison.results import mean_and_std
from fedex_hf.tasks import glue as glue_tasks


ARGUMENTS = (ComparisonArguments, ModelArguments, DataArguments, RecipeTrainingArguments)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Data and model of the module, and one comparison of all methods with two seeds."""
    root = tmp_path_factory.mktemp("lab")
    glue_folder(root / "glue", ["sst2", "stsb", "mrpc", "cola", "mnli"])
    encoder(root / "model")
    methods = "fedex fedit ffa centralized"
    glue.main(glue_flags(root, aggregators=methods, seeds="0 1", tasks="sst2 stsb", dirichlet_alpha=1.0))
    return root


def parse(*flags: str) -> tuple[Any, ...]:
    return parse_recipe(*ARGUMENTS, description="test", argv=list(flags))


def test_all_methods_start_alike_and_see_the_same_splits(lab):
    results = read_results(lab / "out" / "results.json")
    assert len(results) == 4 * 2 * 2
    for task in ("sst2", "stsb"):
        cells = {seed: [r for r in results if (r.run.task, r.run.seed) == (task, seed)] for seed in (0, 1)}
        for cell in cells.values():
            assert {r.run.method for r in cell} == {"fedex", "fedit", "ffa", "centralized"}
            assert len({(r.start, r.data) for r in cell}) == 1
        # The twin: another seed is another start and another split.
        assert cells[0][0].start != cells[1][0].start
        assert cells[0][0].data != cells[1][0].data


def test_results_are_those_of_the_last_round_and_the_best_round_has_its_own_name(lab):
    for result in read_results(lab / "out" / "results.json"):
        state = newest_state(lab / "out" / result.run.folder)
        assert [each.round for each in result.rounds] == [1, 2]
        evaluated = [entry for entry in state["log_history"] if "eval_loss" in entry]
        followed = [entry[f"eval_{result.validation_metric}"] for entry in evaluated]
        assert [each.validation[result.validation_metric] for each in result.rounds] == followed
        best = result.best_on_validation
        assert best.validation == max(followed)
        assert best.round == 1 + followed.index(max(followed))
        if best.round == 2:
            assert best.test == result.test


def test_the_best_round_is_tested_with_its_own_weights(lab, tmp_path, monkeypatch):
    """Rounds are made to score in falling order, so the best is the first, and its model is another one."""
    scores = iter([0.9, 0.5, 0.4])
    evaluate = FederatedTrainer.evaluate

    def falling(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        if "eval_accuracy" in metrics:
            metrics["eval_accuracy"] = next(scores)
            self.state.log_history[-1]["eval_accuracy"] = metrics["eval_accuracy"]
        return metrics

    monkeypatch.setattr(FederatedTrainer, "evaluate", falling)
    glue.main(glue_flags(lab, output_dir=tmp_path / "out", aggregators="fedex", num_rounds=3))
    (result,) = read_results(tmp_path / "out" / "results.json")
    assert (result.best_on_validation.round, result.best_on_validation.validation) == (1, 0.9)
    monkeypatch.undo()
    glue.main(glue_flags(lab, output_dir=tmp_path / "one", aggregators="fedex", num_rounds=1))
    (one,) = read_results(tmp_path / "one" / "results.json")
    assert result.best_on_validation.test["loss"] == pytest.approx(one.test["loss"], rel=1e-6)
    assert result.best_on_validation.test["loss"] != pytest.approx(result.test["loss"], rel=1e-6)


def test_deviation_of_the_layers_is_that_of_the_certificate(lab):
    results = {r.run.method: r for r in read_results(lab / "out" / "results.json") if r.run.task == "sst2"}
    for method, result in results.items():
        for each in result.rounds:
            assert len(each.layers) == 4  # query and value of two layers
            deviations = [layer.fedit_deviation for layer in each.layers.values()]
            # The whole is a weighted mean of the layers' squares.
            assert min(deviations) * 0.999 <= each.fedit_deviation <= max(deviations) * 1.001
            assert all(layer.fedit_rms >= 0 for layer in each.layers.values())
        errors = [each.aggregation_error for each in result.rounds]
        if method == "fedit":
            assert errors == pytest.approx([each.fedit_deviation for each in result.rounds], rel=1e-6)
            assert min(errors) > 1e-3
        else:
            assert max(errors) < 1e-4


def test_tables_and_plots_are_written(lab):
    files = {path.name for path in (lab / "out").iterdir()}
    assert {"results.json", "results.md", "settings.json", "metric_per_round.png", "traffic.png"} <= files
    text = (lab / "out" / "results.md").read_text()
    assert "FedEx-LoRA" in text
    assert "±" in text


def test_a_finished_comparison_trains_nothing_again_and_more_methods_and_seeds_can_be_added(
    lab, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    glue.main(glue_flags(lab, output_dir=out, aggregators="fedex"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    trained = []
    train = FederatedTrainer.train
    monkeypatch.setattr(FederatedTrainer, "train", lambda self, *a, **k: trained.append(self) or train(self, *a, **k))
    glue.main(glue_flags(lab, output_dir=out, aggregators="fedex"))
    assert not trained
    glue.main(glue_flags(lab, output_dir=out, aggregators="fedit", seeds="0 1"))
    assert len(trained) == 2
    assert len(read_results(out / "results.json")) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.no_cover
def test_a_stopped_run_goes_on_and_ends_with_the_same_numbers(lab, tmp_path, monkeypatch):
    flags = {"aggregators": "fedex centralized", "num_rounds": 3}
    glue.main(glue_flags(lab, output_dir=tmp_path / "whole", **flags))

    class StoppedError(Exception):
        pass

    run_round = FederatedTrainer.run_round

    def stop_in_third(self, round):
        if round == 3:
            raise StoppedError
        return run_round(self, round)

    monkeypatch.setattr(FederatedTrainer, "run_round", stop_in_third)
    with pytest.raises(StoppedError):
        glue.main(glue_flags(lab, output_dir=tmp_path / "stopped", **flags))
    monkeypatch.undo()
    rounds = []
    monkeypatch.setattr(FederatedTrainer, "run_round", lambda self, r: rounds.append(r) or run_round(self, r))
    glue.main(glue_flags(lab, output_dir=tmp_path / "stopped", **flags))
    assert rounds == [3, 1, 2, 3]  # the stopped one goes on; the other starts
    for whole, resumed in zip(*(read_results(tmp_path / name / "results.json") for name in ("whole", "stopped"))):
        assert whole.test == resumed.test
        assert whole.best_on_validation == resumed.best_on_validation
        assert [each.layers for each in whole.rounds] == [each.layers for each in resumed.rounds]
        assert [each.validation for each in whole.rounds] == [each.validation for each in resumed.rounds]


def test_a_run_that_died_in_its_test_is_tested_and_not_trained_again(lab, tmp_path, monkeypatch):
    flags = {"output_dir": tmp_path / "out", "aggregators": "fedex", "num_rounds": 3}
    glue.main(glue_flags(lab, **flags | {"output_dir": tmp_path / "whole"}))

    def broken(trainer, tests):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(glue_tasks, "test_metrics", broken)
    with pytest.raises(RuntimeError, match="the disk is full"):
        glue.main(glue_flags(lab, **flags))
    monkeypatch.undo()
    monkeypatch.setattr(FederatedTrainer, "run_round", lambda self, round: pytest.fail("a round was trained again"))
    glue.main(glue_flags(lab, **flags))
    (whole,), (again,) = (read_results(tmp_path / name / "results.json") for name in ("whole", "out"))
    assert (again.test, again.best_on_validation) == (whole.test, whole.best_on_validation)
    assert [each.layers for each in again.rounds] == [each.layers for each in whole.rounds]


def test_other_settings_need_another_folder(lab):
    with pytest.raises(SystemExit, match=r"`learning_rate` was 0\.01 and is 0\.5"):
        glue.main(glue_flags(lab, aggregators="fedex", tasks="sst2 stsb", dirichlet_alpha=1.0, learning_rate=0.5))


def test_methods_that_would_not_be_comparable_are_refused(lab):
    results = runner.finished(lab / "out")
    one, other = [r for r in results if r.run.task == "sst2" and r.run.seed == 0][:2]
    runner.check_comparable(other.run, one.start, one.data, [one])
    with pytest.raises(runner.ComparisonError, match="do not have the same initial state"):
        runner.check_comparable(other.run, "another", one.data, [one])
    with pytest.raises(runner.ComparisonError, match="do not have the same split over clients"):
        runner.check_comparable(other.run, one.start, "another", [one])


def test_other_base_weights_are_noticed_before_training(lab, tmp_path):
    shutil.copytree(lab / "model", tmp_path / "model")
    shutil.copytree(lab / "glue", tmp_path / "glue")
    flags = {"dataset_name": tmp_path / "glue", "model_name_or_path": tmp_path / "model", "num_rounds": 1}
    glue.main(glue_flags(tmp_path, aggregators="fedit", **flags))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(SystemExit, match="do not have the same initial state"):
        glue.main(glue_flags(tmp_path, aggregators="fedex", **flags))
    assert not list(tmp_path.glob("out/runs/sst2/fedex/*/*/checkpoint-*"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_rows_are_noticed(lab, tmp_path, split):
    shutil.copytree(lab / "glue" / "sst2", tmp_path / "glue" / "sst2")
    flags = {"dataset_name": tmp_path / "glue", "model_name_or_path": lab / "model", "num_rounds": 1}
    glue.main(glue_flags(tmp_path, aggregators="fedit", **flags))
    path = tmp_path / "glue" / "sst2" / f"{split}.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(SystemExit, match="`rows of sst2` was"):
        glue.main(glue_flags(tmp_path, aggregators="fedex", seeds="1", **flags))


def test_settings_of_a_comparison_that_never_began_do_not_stay(lab, tmp_path):
    flags = {"output_dir": tmp_path / "out", "aggregators": "fedex", "num_rounds": 1}
    with pytest.raises(SystemExit, match="cannot start: No modules were targeted"):
        glue.main(glue_flags(lab, lora_target_modules="nothing", **flags))
    glue.main(glue_flags(lab, **flags))
    assert len(read_results(tmp_path / "out" / "results.json")) == 1


def test_what_the_strictest_method_refuses_is_refused_before_the_first_run(lab, tmp_path):
    flags = {"output_dir": tmp_path / "out", "aggregators": "fedit fedex", "dtype": "bfloat16"}
    flags["residual_storage"] = "base"
    with pytest.raises(SystemExit, match=r"fedex, seed 0, 1 local epochs cannot start: .*bfloat16"):
        glue.main(glue_flags(lab, **flags))
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_base_in_16_bits_starts_all_methods_alike(lab, tmp_path):
    """FedEx-LoRA carries its residuals beside such a base and FedIT does not, which is no other start."""
    flags = {"output_dir": tmp_path / "out", "aggregators": "fedit fedex", "dtype": "bfloat16", "num_rounds": 2}
    glue.main(glue_flags(lab, **flags))
    results = {result.run.method: result for result in read_results(tmp_path / "out" / "results.json")}
    assert results["fedit"].start == results["fedex"].start
    assert max(each.aggregation_error for each in results["fedex"].rounds) < 1e-5
    assert min(each.aggregation_error for each in results["fedit"].rounds) > 1e-3


def test_a_metric_that_is_undefined_costs_no_run(lab, tmp_path, monkeypatch):
    """Equal predictions have no correlation: such a round is never the best, and the run's result stands."""
    compute = glue_tasks.Predictions.__call__
    calls = []

    def undefined(self, prediction):
        calls.append(prediction)
        return {**compute(self, prediction), **({"accuracy": math.nan} if len(calls) != 2 else {})}

    monkeypatch.setattr(glue_tasks.Predictions, "__call__", undefined)
    glue.main(glue_flags(lab, output_dir=tmp_path / "out", aggregators="fedex", num_rounds=3))
    (result,) = read_results(tmp_path / "out" / "results.json")
    assert result.best_on_validation.round == 2
    monkeypatch.setattr(glue_tasks.Predictions, "__call__", lambda self, p: {**compute(self, p), "accuracy": math.nan})
    glue.main(glue_flags(lab, output_dir=tmp_path / "none", aggregators="fedex"))
    (result,) = read_results(tmp_path / "none" / "results.json")
    assert result.best_on_validation is None


def test_a_column_of_the_user_forms_the_clients(lab, tmp_path):
    flags = {"output_dir": tmp_path / "out", "aggregators": "fedex", "num_rounds": 1, "num_clients": None}
    rows = [{**row, "site": f"site {row['idx'] % 3}"} for row in glue_rows("sst2", 40)]
    write_rows(tmp_path / "glue" / "sst2" / "train.jsonl", rows)
    write_rows(tmp_path / "glue" / "sst2" / "validation.jsonl", glue_rows("sst2", 16, seed=1))
    glue.main(glue_flags(lab, dataset_name=tmp_path / "glue", partition_by="site", **flags))
    (result,) = read_results(tmp_path / "out" / "results.json")
    assert result.rounds[0].num_clients == 3
    with pytest.raises(SystemExit, match="no column `place`"):
        glue.main(glue_flags(lab, dataset_name=tmp_path / "glue", partition_by="place", **flags))


def test_centralized_is_one_client_that_keeps_its_optimizer(lab):
    results = {(r.run.method, r.run.task, r.run.seed): r for r in runner.finished(lab / "out")}
    result = results["centralized", "sst2", 0]
    assert {each.num_clients for each in result.rounds} == {1}
    newest = max((lab / "out" / result.run.folder).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert list((newest / "federation" / "clients").glob("*.pt"))


def test_assignments_can_be_compared(lab, tmp_path):
    methods = "fedex fedex:assignment=reinitialise fedex:assignment=keep"
    glue.main(glue_flags(lab, output_dir=tmp_path / "out", aggregators=methods))
    results = {r.run.method: r for r in read_results(tmp_path / "out" / "results.json")}
    assert len(results) == 3
    assert len({r.test["loss"] for r in results.values()}) == 3  # three different methods
    assert max(each.aggregation_error for r in results.values() for each in r.rounds) < 1e-4


def test_local_epochs_are_compared(lab, tmp_path):
    glue.main(glue_flags(lab, output_dir=tmp_path / "out", aggregators="fedit", local_epochs="1 3"))
    few, many = read_results(tmp_path / "out" / "results.json")
    assert (few.run.local_epochs, many.run.local_epochs) == (1.0, 3.0)
    # The paper's observation (Figure 2): the deviation grows with the local epochs.
    assert many.rounds[0].fedit_deviation > few.rounds[0].fedit_deviation
    assert (tmp_path / "out" / "deviation_per_local_epochs.png").is_file()


def test_flags_win_over_a_file(tmp_path):
    config = tmp_path / "some.yaml"
    config.write_text("learning_rate: 1.0e-3\nseeds: [3, 4]\nuse_rslora: true\noutput_dir: there\nlora_r: 4\n")
    comparison, model, _, training = parse("--config", str(config), "--seeds", "7", "--lora_r", "2")
    assert (comparison.seeds, model.lora_r, model.use_rslora, training.learning_rate) == ([7], 2, True, 1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "sets `learning_rat`, which this recipe does not know"),
        ("- 1", "holds a list"),
        ("a: [", "while parsing a flow"),
        ("lora_r: 0", "`lora_r=0` is not allowed"),
        ("seeds: [1, 1]", "each once"),
        ("aggregators: [fedavg]", "`aggregator='fedavg'` is unknown"),
        ("aggregators: ['fedex:rank=3']", "do not fit the aggregator"),
        ("aggregators: ['fedex:rank']", "is not `key=value`"),
        ("aggregators: ['centralized:rank=3']", "takes no arguments"),
        ("local_epochs: [0]", "numbers above 0"),
        ("validation_fraction: 1.5", "out of range"),
        ("aggregator: fedit", "Use `--aggregators`"),
        ("seed: 3", "Use `--seeds`"),
        ("output_dir:", "`output_dir` is missing"),
    ],
)
def test_files_that_are_not_understood_are_refused(tmp_path, content, message):
    config = tmp_path / "some.yaml"
    keys = "" if "output_dir" in content or content.startswith("-") else "output_dir: there\n"
    config.write_text(f"{content}\n{keys}")
    with pytest.raises(SystemExit) as refusal:
        parse("--config", str(config))
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("Nothing was trained.")


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="No such file"):
        parse("--config", "nowhere.yaml")
    with pytest.raises(SystemExit, match="names no file"):
        parse("--config")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"push_to_hub": True}, "`push_to_hub` would publish every run"),
        ({"local_epochs": "1 2", "max_steps": 3}, "overrides epochs"),
        ({"save_strategy": "no"}, "does not keep every round"),
        ({"save_strategy": "steps"}, "does not keep every round"),
        ({"eval_delay": 1}, "leave rounds without validation"),
        ({"client_fraction": 0.5, "min_clients": 2}, "cannot start: "),
        ({"eval_strategy": "no"}, "validates after every round"),
        ({"load_best_model_at_end": True}, "would test the best round"),
        ({"num_clients": 400}, "The clients of task `sst2` cannot be formed"),
    ],
)
def test_arguments_that_a_comparison_cannot_follow_are_refused(lab, tmp_path, flags, message):
    with pytest.raises(SystemExit) as refusal:
        glue.main(glue_flags(lab, output_dir=tmp_path / "out", **flags))
    assert message in str(refusal.value)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_method_reads_its_arguments():
    assert Method.parse("fedex:residual_rank=8").make().residual_rank == 8
    assert Method.parse("centralized").is_centralized
    assert not Method.parse("fedex").is_centralized


def test_standard_deviation_is_the_sample_one():
    assert mean_and_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)))
    assert math.isnan(mean_and_std([1.0])[1])


def newest_state(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    return json.loads((newest / "trainer_state.json").read_text())
