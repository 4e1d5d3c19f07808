"""What importing the package brings in, beyond what a script with `Trainer` and LoRA has imported anyway."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest
from programs import ROOT, untraced

import fedex_hf


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
    return json.loads(ran(SCRIPT.format(imported=imported)).splitlines()[-1])


def ran(code: str) -> str:
    """What a script prints, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=untraced() | {"PYTHONPATH": str(ROOT)},
    ).stdout


def third_party(modules: list[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"fedex_hf"}


@pytest.fixture(scope="module", params=["FederatedTrainer, FederatedTrainingArguments", "*"])
def added(request) -> list[str]:
    return modules_of(f"from fedex_hf import {request.param}")


def test_no_further_third_party_module_is_imported(added):
    assert "fedex_hf.trainer" in added
    # `packaging` is there already; the parts of it that compare versions may not be.
    assert third_party(added) <= {"lazy_loader", "packaging"}


def test_what_is_needed_later_is_imported_later(added):
    assert [name for name in LATE if f"fedex_hf.{name}" in added] == []


def test_the_check_can_fail():
    added = modules_of("import fedex_hf, fedex_hf.plots, pytest")
    assert "pytest" in third_party(added)
    assert "fedex_hf.plots" in added


# ---- Names on first use ----


@pytest.mark.parametrize("words", [[], ["aggregate"], ["inspect"], ["push"], ["export"]], ids=str)
def test_help_does_not_wait_for_torch(words):
    code = f"""
import sys
from fedex_hf.cli import main
try:
    main({[*words, "--help"]})
except SystemExit:
    print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    printed = ran(code)
    assert "usage: fedex-hf" in printed
    assert printed.splitlines()[-1] == "[]"


def test_the_trainer_waits_for_torch():
    """The twin."""
    assert ran("import fedex_hf.trainer, sys; print('torch' in sys.modules)") == "True\n"


def test_every_name_is_there():
    modules = {module.name for module in pkgutil.iter_modules(fedex_hf.__path__)}
    assert modules.isdisjoint(fedex_hf.__all__)  # the older of two imports would hide what the other has
    code = """
import fedex_hf
from fedex_hf import *
for name in fedex_hf.__all__:
    assert name in dir(fedex_hf)
    offered = getattr(fedex_hf, name)
    assert offered is globals()[name]
    assert not isinstance(offered, type(fedex_hf)), name
print(len(fedex_hf.__all__))
"""
    assert int(ran(code)) == len(fedex_hf.__all__) > 30


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        fedex_hf.nothing  # noqa: B018
