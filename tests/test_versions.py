"""The range of transformers versions: one range in two places, and checked before anything is imported."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from fedex_hf import _versions


ROOT = Path(__file__).parents[1]


def range_in_setup() -> str:
    """The specifier of transformers among the requirements, read as text."""
    (found,) = re.findall(r'"transformers([^"\[]*)"', (ROOT / "setup.py").read_text())
    return found


def import_with(transformers_version: str, folder: Path, code: str = "import fedex_hf") -> subprocess.CompletedProcess:
    """Import in a new process that finds the metadata of another transformers version first."""
    metadata = folder / f"transformers-{transformers_version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {transformers_version}\n")
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


def test_setup_and_the_check_at_import_hold_the_same_range():
    assert SpecifierSet(range_in_setup()) == SpecifierSet(_versions.SUPPORTED_TRANSFORMERS)


def test_the_range_has_two_ends_and_holds_the_installed_version():
    supported = SpecifierSet(_versions.SUPPORTED_TRANSFORMERS)
    assert sorted(each.operator for each in supported) == ["<", ">="]
    assert version("transformers") in supported


def outside() -> list[str]:
    """The last versions below and the first above the range."""
    ends = {each.operator: each.version for each in SpecifierSet(_versions.SUPPORTED_TRANSFORMERS)}
    major, minor = map(int, ends[">="].split(".")[:2])
    below = f"{major}.{minor - 1}.9" if minor else f"{major - 1}.99.0"
    return [below, f"{ends['<']}.0", f"{int(ends['<'].split('.')[0]) + 1}.0.0", "4.57.0"]


@pytest.mark.parametrize("unsupported", outside())
def test_an_unsupported_version_is_refused_at_import(tmp_path, unsupported):
    done = import_with(unsupported, tmp_path)
    assert done.returncode != 0
    told = done.stderr.splitlines()[-1]
    assert told.startswith("ImportError: ")
    assert f"{unsupported} is installed" in told
    assert f'pip install "transformers{_versions.SUPPORTED_TRANSFORMERS}"' in told


def test_it_is_refused_before_transformers_is_imported(tmp_path):
    code = "import sys\ntry:\n    import fedex_hf\nexcept ImportError:\n    print('transformers' in sys.modules)"
    done = import_with("4.57.0", tmp_path, code)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_supported_version_passes_the_check(tmp_path):
    """So that the refusals above are due to the version."""
    ends = {each.operator: each.version for each in SpecifierSet(_versions.SUPPORTED_TRANSFORMERS)}
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    done = import_with(ends[">="], tmp_path, code.replace("sys.argv[1]", repr(_versions.__file__)))
    assert done.returncode == 0, done.stderr
