"""The command line: exit codes and output of real processes, and every kind of thing that `inspect` knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from programs import command_line
from test_adapter_files import Team, edit_config, write_team

from fedex_hf import cli


ROOT = Path(__file__).resolve().parents[1]
# What it prints when it is imported: on a CPU with certain instructions, and (0.47, the oldest we admit) on any.
BY_BITSANDBYTES = (
    "Failed to load CPU gemm_4bit_forward from kernels-community",
    "The 8-bit optimizer is not available on your device",
)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    return write_team(tmp_path_factory.mktemp("team"), "llama", members=2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federated run of two rounds with a checkpoint each."""
    folder = tmp_path_factory.mktemp("run")
    tiny.federation(folder, num_rounds=2, save_strategy="epoch", max_steps=1).train()
    return folder


@pytest.fixture(scope="module")
def processes(team: Team, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and errors of real processes; one is started anew, so that what imports print is seen too."""
    folder = tmp_path_factory.mktemp("processes")
    adapters, base = [str(path) for path in team.adapters], str(team.base)
    commands = {
        "aggregate": [
            "aggregate",
            *adapters,
            "--base",
            base,
            "--output",
            str(folder / "out"),
            "--weights",
            "3,1",
            "--json",
        ],
        "inspect": ["inspect", adapters[0], "--json"],
        "failed": ["aggregate", *adapters, "--base", str(team.base.parent), "--output", str(folder / "none")],
        "usage": ["aggregate", *adapters, "--output", str(folder / "none")],
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    anew = [sys.executable, "-m", "fedex_hf.cli", *commands.pop("failed")]
    done = {"failed": subprocess.run(anew, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)}
    with command_line(environment, folder / "server") as run:
        done |= {name: run(*words, folder=folder) for name, words in commands.items()}
    finished = {name: (each.returncode, each.stdout, each.stderr) for name, each in done.items()}
    assert not (folder / "none").exists()
    assert (folder / "out" / "model.safetensors").is_file()
    return finished


# ---- Processes ----


def test_aggregate_exits_with_0_and_prints_its_report(processes: dict[str, Any], team: Team) -> None:
    code, output, errors = processes["aggregate"]
    assert code == 0, errors
    report = json.loads(output)
    assert report["what"] == "aggregation"
    assert report["adapters"] == [str(path) for path in team.adapters]
    assert report["weights"] == [0.75, 0.25]
    assert report["exactness"]["aggregation_error"] < 1e-6 < 1e-2 < report["exactness"]["fedit_deviation"]
    assert "100%" in errors  # the progress bar


def test_inspect_exits_with_0_and_prints_json(processes: dict[str, Any], team: Team) -> None:
    code, output, errors = processes["inspect"]
    assert code == 0, errors
    found = json.loads(output)
    assert (found["what"], found["r"], found["problem"]) == ("adapter", 4, None)
    assert found["base_model_name_or_path"] == str(team.base)
    assert len(found["ranks"]) == 14


def test_a_failure_exits_with_1_and_one_line(processes: dict[str, Any], team: Team) -> None:
    code, output, errors = processes["failed"]
    assert (code, output) == (1, "")
    (line,) = [each for each in errors.splitlines() if not each.startswith(BY_BITSANDBYTES)]
    assert line.startswith("fedex-hf: error: ")
    assert str(team.base.parent) in line
    assert "Traceback" not in errors


def test_wrong_usage_exits_with_2(processes: dict[str, Any]) -> None:
    code, output, errors = processes["usage"]
    assert (code, output) == (2, "")
    assert "--base" in errors
    assert "Traceback" not in errors


# ---- Usage ----


def main(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Exit code, output and errors of the command in this process."""
    capsys.readouterr()
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("words", [["--help"], ["aggregate", "--help"], ["inspect", "--help"]])
def test_help_explains_with_examples(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, output, _ = main(capsys, *words)
    assert code == 0
    assert ("examples:\n  fedex-hf " in output) is (len(words) == 2)
    assert max(len(line) for line in output.splitlines()) < 121


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "COMMAND"),
        (["melt"], "melt"),
        (["inspect"], "PATH_OR_REPO"),
        (["aggregate", "a", "--base", "b", "--output", "c", "--format", "gguf"], "gguf"),
        (["aggregate", "a", "--base", "b", "--output", "c", "--weights", "one"], "300,100"),
        (["aggregate", "a", "--base", "b", "--output", "c", "--weights", "1,2"], "2 numbers for 1 adapters"),
        (["aggregate", "a", "--base", "b", "--output", "c", "--aggregator", "magic"], "Allowed: fedex, fedit, ffa"),
        (["aggregate", "a", "--base", "b", "--output", "c", "--aggregator-kwargs", "{"], "is not JSON"),
        (["aggregate", "a", "--base", "b", "--output", "c", "--aggregator-kwargs", "[1]"], "is not a JSON object"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_right(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    code, output, errors = main(capsys, *words)
    assert (code, output) == (2, "")
    assert told in errors


def test_debug_shows_where_an_error_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(capsys, "inspect", tmp_path)[0] == 1
    with pytest.raises(ValueError, match="nothing that is known"):
        cli.main(["inspect", str(tmp_path), "--debug"])


def test_aggregate_passes_its_options_on(team: Team, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["aggregate", *team.adapters, "--base", team.base, "--output", tmp_path / "out", "--format", "lora"]
    words += ["--aggregator-kwargs", '{"residual_rank": 2}', "--quiet"]
    code, output, errors = main(capsys, *words)
    assert code == 0
    assert "aggregate:" not in errors
    assert "method             fedex (residual_rank=2)" in output
    assert "14 LoRA layers of rank 6" in output
    written = json.loads((tmp_path / "out" / "aggregation.json").read_text())
    assert written["settings"]["residual_rank"] == 2
    assert main(capsys, *words)[0] == 1  # the output is taken now


# ---- What `inspect` knows ----


def test_a_round_checkpoint_is_told_with_all_rounds(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    expected = [entry for entry in history if "aggregation_error" in entry]
    assert [entry["round"] for entry in expected] == [1, 2]
    code, output, _ = main(capsys, "inspect", checkpoint, "--json")
    assert code == 0
    found = json.loads(output)
    assert (found["what"], found["round"], found["method"]) == ("round", 2, "fedex")
    assert found["rounds"] == expected
    assert found["clients"] == {"client-0": 12, "client-1": 7, "client-2": 9}
    assert set(found["ranks"].values()) == {4}
    assert len(found["ranks"]) == 4
    code, output, _ = main(capsys, "inspect", checkpoint)
    assert "round 2 of a federated run" in output
    assert "3 with 28 examples" in output
    assert len([line for line in output.splitlines() if line.strip()[:1] in ("1", "2")]) == 2


def test_norms_per_layer_are_read_where_they_lie_beside(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "federation").mkdir()
    for name in ("federation/state.json", "trainer_state.json"):
        (tmp_path / name).write_bytes((next(run_dir.glob("checkpoint-*")) / name).read_bytes())
    assert "No norms per layer" in main(capsys, "inspect", tmp_path, "--layers")[1]
    norms = {"a.query": {"change": 3.0, "error": 3e-7, "fedit": 0.6, "resolution": 1e-6}}
    norms["a.value"] = {"change": 4.0, "error": 4e-7, "fedit": 0.0, "resolution": 1e-6}
    (tmp_path / "federation" / "exactness.json").write_text(json.dumps(norms))
    found = json.loads(main(capsys, "inspect", tmp_path, "--json")[1])
    assert found["exactness"]["aggregation_error"] == pytest.approx(1e-7)
    assert found["exactness"]["fedit_deviation"] == pytest.approx(0.6 / 5)
    assert found["exactness"]["layers"]["a.query"]["fedit_deviation"] == pytest.approx(0.2)
    output = main(capsys, "inspect", tmp_path, "--layers")[1]
    assert any("a.query" in line and "1.00e-07" in line and "0.2" in line for line in output.splitlines())


def test_an_aggregation_is_told_from_its_norms(team: Team, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["aggregate", *team.adapters, "--base", team.base, "--output", tmp_path / "out", "--weights", "1,3"]
    assert main(capsys, *words, "--quiet")[0] == 0
    written = json.loads((tmp_path / "out" / "aggregation.json").read_text())
    found = json.loads(main(capsys, "inspect", tmp_path / "out", "--json")[1])
    assert (found["what"], found["format"], found["method"]) == ("aggregation", "full", "fedex")
    assert found["weights"] == [0.25, 0.75]
    assert found["exactness"]["aggregation_error"] == pytest.approx(written["exactness"]["aggregation_error"])
    layer = next(iter(written["exactness"]["layers"]))
    norms = written["exactness"]["layers"][layer]
    assert found["exactness"]["layers"][layer]["fedit_deviation"] == pytest.approx(norms["fedit"] / norms["change"])
    output = main(capsys, "inspect", tmp_path / "out", "--layers")[1]
    assert f"weight 0.7500      {team.adapters[1]}" in output
    assert sum("base_model.model." in line for line in output.splitlines()) == 14


def test_an_adapter_that_cannot_be_aggregated_is_told_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_team(tmp_path, "roberta", members=1).adapters[0]
    output = main(capsys, "inspect", adapter, "--layers")[1]
    assert "a LORA adapter" in output
    assert "4 LoRA layers of rank 4; 4 other tensors" in output
    assert "encoder.layer.1.attention.self.value" in output
    edit_config(adapter, use_dora=True, base_model_name_or_path="\x1b[31mred")
    code, output, _ = main(capsys, "inspect", adapter)
    assert code == 0
    assert "problem  `use_dora` is True" in output
    assert "?[31mred" in output  # no control characters of a stranger's file


def test_a_plain_model_is_told(team: Team, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = main(capsys, "inspect", team.base)
    assert code == 0
    assert "a model without federated rounds or adapter" in output
    found = json.loads(main(capsys, "inspect", team.base, "--json")[1])
    assert (found["what"], found["architectures"]) == ("model", ["LlamaForCausalLM"])
    assert found["parameters"] == tiny.llama().num_parameters()
    assert found["bytes"] == (team.base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("content", [None, "README.md"])
def test_anything_else_is_1_and_says_what_was_looked_for(tmp_path: Path, capsys: Any, content: str | None) -> None:
    if content is not None:
        (tmp_path / content).write_text("nothing")
    code, output, errors = main(capsys, "inspect", tmp_path)
    assert (code, output) == (1, "")
    for name in ("federation/state.json", "aggregation.json", "adapter_config.json", "config.json"):
        assert name in errors
    assert main(capsys, "inspect", tmp_path / "nowhere" / "at" / "all")[0] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("federation/state.json", "{}"),
        ("federation/state.json", '{"round": 1, "fingerprint": {"aggregator": 3}}'),
        ("federation/state.json", "["),
        ("aggregation.json", '{"method": "fedex"}'),
        (
            "aggregation.json",
            '{"method": 1, "adapters": [], "weights": [], "base": 1, "format": 1, "exactness": {"layers": {"a": 1}}}',
        ),
        ("adapter_config.json", "[1]"),
    ],
)
def test_damaged_files_are_1_and_named(tmp_path: Path, capsys: Any, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    code, output, errors = main(capsys, "inspect", tmp_path)
    assert (code, output) == (1, "")
    assert name in errors or str(tmp_path) in errors
    assert len(errors.splitlines()) == 1


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    assert json.loads(cli._as_json({"a": [float("nan"), 1.0], "b": float("inf")})) == {"a": [None, 1.0], "b": None}
