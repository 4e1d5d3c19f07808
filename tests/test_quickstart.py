"""The quickstart as a user runs it, cut down to a minute."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent.parent / "recipes" / "quickstart.py"


def run(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_help_explains_every_flag(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for flag in ("--model_name_or_path", "--dataset_name", "--aggregators", "--dirichlet_alpha", "--num_rounds"):
        assert flag in done.stdout


def test_a_dataset_without_the_column_is_refused_before_training(tmp_path):
    (tmp_path / "reviews.csv").write_text("review,stars\ngood,1\nbad,0\n")
    done = run("--dataset_name", "reviews.csv", cwd=tmp_path)
    assert done.returncode != 0
    assert "no column `text`" in done.stderr
    assert "`review`, `stars`" in done.stderr


@pytest.mark.slow
def test_own_data_through_all_methods_and_back(tmp_path):
    words = {"fruit": "apple pear plum grape melon cherry", "metal": "iron copper zinc silver tin lead"}
    rows = [
        f"a {first} and a {second},{kind}"
        for kind, names in words.items()
        for first in names.split()
        for second in names.split()
    ]
    (tmp_path / "things.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    flags = "--dataset_name things.csv --num_rounds 2 --num_clients 3 --max_seq_length 12 --output_dir out"
    done = run(*shlex.split(flags), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bit-equal") == 2
    assert {"results.md", "results.json", "rounds.png", "fedex-model"} <= {
        path.name for path in tmp_path.glob("out/*")
    }
    results = {each["method"]: each for each in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]}
    assert results.keys() == {"fedex", "fedit", "ffa", "centralized"}
    errors = {name: max(each["aggregation_error"] for each in result["rounds"]) for name, result in results.items()}
    assert errors["fedex"] < 1e-5
    assert errors["fedit"] > 1e-3
