"""What importing the package brings in, beyond what a script with `Trainer` and LoRA has imported anyway."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from programs import ROOT, untraced


SCRIPT = """
import json, sys
import peft, transformers
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
earlier = set(sys.modules)
{imported}
print(json.dumps(sorted(set(sys.modules) - earlier)))
"""
# Rooms that a run in one process, without card and Hub, does not enter.
LATE = (
    "card_text",
    "cli",
    "comparison",
    "exporting",
    "flower",
    "inspection",
    "metrics",
    "model_card",
    "plots",
    "tasks",
)


def modules_of(imported: str) -> list[str]:
    """Modules that an import adds to those of a plain script, in a process of its own."""
    code = SCRIPT.format(imported=imported)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=untraced() | {"PYTHONPATH": str(ROOT)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def third_party(modules: list[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"fedex_hf"}


@pytest.fixture(scope="module")
def added() -> list[str]:
    return modules_of("import fedex_hf")


def test_no_further_third_party_module_is_imported(added):
    assert "fedex_hf.trainer" in added
    # `packaging` is there already; the parts of it that compare versions may not be.
    assert third_party(added) <= {"packaging"}


def test_what_is_needed_later_is_imported_later(added):
    assert [name for name in LATE if f"fedex_hf.{name}" in added] == []


def test_the_check_can_fail():
    added = modules_of("import fedex_hf, fedex_hf.plots, pytest")
    assert "pytest" in third_party(added)
    assert "fedex_hf.plots" in added
