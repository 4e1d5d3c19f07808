"""Every code block of README.md and docs/ is run, and every relative link resolves.

A page is a program: its `python` blocks are executed in their order, in one namespace and one empty folder, without
network. What a reader sees as output is checked as well. A block in a language without a runner fails the test, so
none can go unrun.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import setuptools
import torch
import yaml
from datasets import Dataset
from hub import run_python as run_child
from hub import running_hub
from programs import untraced
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from fedex_hf import AGGREGATORS, cli


ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
FENCE = re.compile(r"^(\s*)(```+|~~~+)(.*)$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
FLOWER_PAGES = {"docs/howto/flower.md"} if importlib.util.find_spec("flwr") is None else set()  # needs Python 3.11
HUB_PAGES = {"docs/howto/hub.md", "docs/howto/command-line.md"}  # run against the Hub of the tests
ROUNDING = 1e-5  # below it a number is a rounding error, which another machine makes differently


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is the number of its first line of code."""

    page: str
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Program:
    """A page that is being run: its namespace, its folder, and what its last block printed."""

    module: types.ModuleType
    folder: Path
    printed: str | None = None

    def execute(self, code: str, place: str, line: int = 1) -> None:
        """Run code in the page's namespace; tracebacks show the lines of the page."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * (line - 1) + code, ROOT / place.partition(":")[0], "exec"), vars(self.module))
        self.printed = output.getvalue()


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    lines = (text or (ROOT / page).read_text(encoding="utf-8")).splitlines()
    blocks, opened = [], None
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if fence is None:
            continue
        if opened is None:
            opened = (number, fence)
        elif fence[2] == opened[1][2] and not fence[3].strip():
            start, language = opened[0], opened[1][3].strip()
            blocks.append(Block(page, start + 1, language, "\n".join(lines[start : number - 1])))
            opened = None
    assert opened is None, f"{page}:{opened[0]}: the block is never closed"
    return blocks


def prose_of(page: str) -> str:
    """A page without its fenced blocks."""
    lines, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


# ---- Runners: one per language ----


def run_python(program: Program, block: Block) -> None:
    program.execute(block.code, block.place, block.line)


def check_output(program: Program, block: Block) -> None:
    """A `text` block is the end of what the block before it printed; `...` stands for any lines, or for any text."""
    assert program.printed, f"{block.place}: the block before this one has printed nothing"
    assert block.code.strip(), f"{block.place}: the block is empty"
    same = same_lines(["...", *block.code.strip().splitlines()], program.printed.strip().splitlines())
    assert same, f"{block.place}: the page shows\n{block.code}\nand the code prints\n{program.printed}"


def check_bibtex(program: Program, block: Block) -> None:
    assert re.match(r"@\w+\{[\w:-]+,\n(  \w+ = \{.+\},?\n)+\}$", block.code), f"{block.place}: not a BibTeX entry"


def run_diff(program: Program, block: Block) -> None:
    """Both sides of a diff are whole scripts: run the old one beside the page's folder, the new one in it."""
    lines = block.code.splitlines()
    assert all(line == "" or line[0] in " +-" for line in lines), f"{block.place}: a line without its sign"
    assert sum(line.startswith("+") for line in lines) <= 3, f"{block.place}: more than three lines are changed"
    before, after = ("\n".join(line[1:] for line in lines if not line or line[0] in f" {sign}") for sign in "-+")
    assert "fedex_hf" not in before
    assert "fedex_hf" in after
    old = new_program("before", program.folder / "before")
    write_stand_ins(old.folder)
    write_stand_ins(program.folder)
    for each, code in ((old, before), (program, after)):
        os.chdir(each.folder)  # `monkeypatch.chdir` of the test brings us back
        each.execute(code, block.place)
    assert (old.folder / "model").is_dir(), f"{block.place}: the standard script saves no model"


def check_commands(program: Program, block: Block) -> None:
    """Every command of a `bash` block is one that exists; the cheap ones are run."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        name = " ".join(words[:2]) if words[0] in ("pip", "mkdocs", "accelerate") else words[0]
        if name == "fedex-hf":
            run_command_line(program, words, block.place)
            continue
        if name in ("export", "mkdir", "openssl", "printf", "ssh-keygen"):
            subprocess.run(["bash", "-c", line], cwd=program.folder, check=True, capture_output=True)
            continue
        assert name in COMMANDS, f"{block.place}: no check for the command `{line}`"
        COMMANDS[name](words, block.place)


def check_toml(program: Program, block: Block) -> None:
    """It can be read, and names a SuperLink of Flower's configuration."""
    from flwr.cli.flower_config import parse_superlink_connection  # needs Python 3.11, like the next

    tomllib = importlib.import_module("tomllib")
    [(name, connection)] = tomllib.loads(block.code)["superlink"].items()
    parse_superlink_connection(connection, name)


RUNNERS: dict[str, Callable[[Program, Block], None]] = {
    "python": run_python,
    "text": check_output,
    "bash": check_commands,
    "diff": run_diff,
    "toml": check_toml,
    "bibtex": check_bibtex,
}


# ---- Commands of `bash` blocks ----


def run_command_line(program: Program, words: list[str], place: str) -> None:
    """`fedex-hf` is run for real, in the page's folder; in a process of its own it would import torch again."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(program.folder)
        patch.setenv("COLUMNS", "120")
        code = cli.main(words[1:])
    assert code == 0, f"{place}: {out.getvalue()}{err.getvalue()}"
    program.printed = out.getvalue()


def check_make(words: list[str], place: str) -> None:
    """The target exists and its recipe can be worked out."""
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{place}: {done.stderr}"
    arguments = [word.removeprefix("ARGS=") for word in words[1:] if word.startswith("ARGS=")]
    for line in done.stdout.splitlines():
        script = re.search(r"python (recipes/\S+\.py)(.*)", line)
        if script and arguments:
            assert arguments[0] in script[2], f"{place}: the target does not use ARGS"
            check_python(["python", script[1], *shlex.split(script[2])], place)


def check_install(words: list[str], place: str) -> None:
    """What is installed is this package, with extras that setup.py has."""
    packaging = setup_arguments()
    for word in (word for word in words[2:] if not word.startswith("-")):
        name, _, extras = word.rstrip("]").partition("[")
        assert name in (".", packaging["name"]), f"{place}: `{name}` is not this package"
        assert not extras or set(extras.split(",")) <= set(packaging["extras_require"]), f"{place}: no extra {extras}"


def check_python(words: list[str], place: str) -> None:
    """The script exists and has every flag; a one-liner is run."""
    if words[1] == "-c":
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
        return
    assert (ROOT / words[1]).is_file(), f"{place}: no script `{words[1]}`"
    flags = [word for word in words[2:] if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in help_of(words[1])]
    assert not unknown, f"{place}: `{words[1]}` has no flags {unknown}"


def check_launch(words: list[str], place: str) -> None:
    """As `check_python`, after the flags of `accelerate launch`."""
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    check_python(["python", *words[script:]], place)


def check_mkdocs(words: list[str], place: str) -> None:
    assert any(each.startswith("mkdocs-material") for each in setup_arguments()["extras_require"]["docs"]), place


def check_tensorboard(words: list[str], place: str) -> None:
    assert any(each.startswith("tensorboard") for each in setup_arguments()["extras_require"]["test"]), place


def check_flower(words: list[str], place: str) -> None:
    """Flower's program exists and has every flag; the app is there."""
    program = words[:3] if words[:2] == ["flwr", "supernode"] else words[: 2 if words[0] == "flwr" else 1]
    flags = [word for word in words if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in help_of_program(*program)]
    assert not unknown, f"{place}: `{' '.join(program)}` has no flags {unknown}"
    if program == ["flwr", "run"]:
        assert (ROOT / "recipes" / words[2] / "pyproject.toml").is_file(), f"{place}: no app `{words[2]}`"


@functools.cache
def help_of_program(*words: str) -> str:
    program = Path(sys.executable).parent / words[0]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([program, *words[1:], "--help"], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "make": check_make,
    "pip install": check_install,
    "python": check_python,
    "accelerate launch": check_launch,
    "mkdocs serve": check_mkdocs,
    "tensorboard": check_tensorboard,
    "flower-superlink": check_flower,
    "flower-supernode": check_flower,
    "flwr": check_flower,
}


@functools.cache
def setup_arguments() -> dict:
    """What setup.py passes to `setup`."""
    given: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
        exec(compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return given


@functools.cache
def help_of(script: str) -> str:
    """What a script prints for `--help`: run as `__main__`, without importing torch again in a process of its own."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.syspath_prepend(str((ROOT / script).parent))
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code, f"{script}: {out.getvalue()}"
    return out.getvalue()


# ---- What pages need ----


def new_program(name: str, folder: Path) -> Program:
    folder.mkdir(parents=True, exist_ok=True)
    module = types.ModuleType(f"page_{re.sub(r'[^0-9a-z]', '_', name.lower())}")
    sys.modules[module.__name__] = module  # dataclasses and pickle look their classes up there
    return Program(module, folder)


def write_stand_ins(folder: Path) -> None:
    """Tiny things under the names of the README's: a local folder goes before a Hub id."""
    reviews = [f"{word} film" for word in ("good", "fine", "great", "bad", "poor", "dull")] * 8
    Dataset.from_dict({"text": reviews, "label": [1, 1, 1, 0, 0, 0] * 8}).to_csv(folder / "reviews.csv")
    words = ["<pad>", "<unk>", *sorted({word for review in reviews for word in review.split()})]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    encoder = folder / "FacebookAI" / "roberta-base"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(encoder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    RobertaForSequenceClassification(config).save_pretrained(encoder)


def same_lines(want: list[str], got: list[str]) -> bool:
    """Whether lines are the same, with a line `...` for any number of others."""
    if not want:
        return not got
    if want[0] == "...":
        return any(same_lines(want[1:], got[start:]) for start in range(len(got) + 1))
    return bool(got) and same_line(want[0], got[0]) and same_lines(want[1:], got[1:])


def same_line(want: str, got: str) -> bool:
    """Whether two lines are equal, but for the digits of floats that depend on the machine.

    Text and integers are equal; a float is within a factor of two of the other, or both are rounding errors. A line
    that ends in `...` is the beginning of the other.
    """
    if want.endswith("..."):
        return got.startswith(want.removesuffix("..."))
    if NUMBER.sub("#", want).split() != NUMBER.sub("#", got).split():
        return False
    for left, right in zip(NUMBER.findall(want), NUMBER.findall(got), strict=True):
        a, b = abs(float(left)), abs(float(right))
        if left == right or max(a, b) < ROUNDING:
            continue
        if not {".", "e"} & set(left) or max(a, b) > 2 * min(a, b):
            return False
    return True


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# ---- Tests ----


@pytest.fixture
def _own_registry():
    """A page that registers an aggregator does so for its own run only."""
    before = dict(AGGREGATORS)
    yield
    AGGREGATORS.clear()
    AGGREGATORS.update(before)


def run_page(page: str, folder: Path) -> None:
    """Run the blocks of a page in their order."""
    program = new_program(page, folder)
    os.chdir(program.folder)
    for block in blocks_of(page):
        assert block.language in RUNNERS, (
            f"{block.place}: no runner for a block of `{block.language or 'no language'}`"
        )
        RUNNERS[block.language](program, block)


@pytest.mark.no_cover
@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("page", sorted(set(PAGES) - HUB_PAGES - FLOWER_PAGES))
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # and back afterwards, wherever the page goes
    run_page(page, tmp_path / "page")


@pytest.mark.parametrize("page", sorted(HUB_PAGES))
def test_every_block_runs_against_a_hub(page, tmp_path):
    """In a process of its own: the client reads the Hub's address when it is imported."""
    code = "import sys, pathlib, test_docs; test_docs.run_page(sys.argv[1], pathlib.Path(sys.argv[2]))"
    with running_hub(tmp_path / "hub") as hub:
        run_child(code, untraced(hub.environment(tmp_path / "home")), page, str(tmp_path / "page"))


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page):
    source = ROOT / page
    for target in LINK.findall(prose_of(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (source.parent / path).resolve() if path else source
        assert linked.exists(), f"{page}: `{target}` does not exist"
        if source != ROOT / "README.md":
            assert linked.is_relative_to(DOCS), f"{page}: `{target}` lies outside docs/, so the site lacks it"
        if anchor:
            assert anchor in anchors_of(linked), f"{page}: `{target}` has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_no_code_outside_of_fences(page):
    """An indented block would be code that nothing runs."""
    lines = prose_of(page).splitlines()
    indented = [line for before, line in zip(["", *lines], lines) if not before.strip() and line.startswith("    ")]
    assert not indented, f"{page}: indented code {indented}"


def test_the_navigation_holds_every_page():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages(each)]

    navigation = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(navigation) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- The checks can fail ----


def test_an_unknown_language_has_no_runner():
    blocks = blocks_of("page.md", "```\nplain\n```\n\n```yaml\na: 1\n```\n")
    assert [block.language in RUNNERS for block in blocks] == [False, False]


def test_the_parser_keeps_nested_fences_and_line_numbers():
    (block,) = blocks_of("page.md", "a\n````python\nx = '''\n```\n'''\n````\n")
    assert (block.line, block.code) == (3, "x = '''\n```\n'''")


@pytest.mark.parametrize(
    ("want", "got", "same"),
    [
        ("error 2.0e-07", "error 1.3e-07", True),
        ("error 2.0e-07", "error 2.0e-02", False),
        ("deviation 0.05", "deviation 0.06", True),
        ("deviation 0.05", "deviation 0.15", False),
        ("rounds 3", "rounds 4", False),
        ("north  3", "north 3", True),
        ("north 3", "south 3", False),
        ("[0.5, 0.5]", "[0.5]", False),
    ],
)
def test_shown_output_may_differ_only_in_a_machines_digits(want, got, same):
    assert same_line(want, got) is same


def test_wrong_output_and_failing_code_are_found(tmp_path):
    program = new_program("wrong", tmp_path)
    run_python(program, Block("page.md", 1, "python", "print(1)\nprint(2)"))
    check_output(program, Block("page.md", 1, "text", "2"))
    with pytest.raises(AssertionError, match="the page shows"):
        check_output(program, Block("page.md", 1, "text", "3"))
    with pytest.raises(ZeroDivisionError):
        run_python(program, Block("page.md", 1, "python", "1 / 0"))


@pytest.mark.parametrize(
    "command",
    ["make no-such-target", "pip install another-package", "pip install '.[no-such-extra]'", "rm -rf outputs"],
)
def test_commands_that_do_not_exist_are_found(command, tmp_path):
    with pytest.raises(AssertionError):
        check_commands(new_program("command", tmp_path), Block("page.md", 1, "bash", command))
