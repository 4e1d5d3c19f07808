"""The text of the quickstart: docstrings of the Python standard library, or the user's own dataset.

Both loaders return a `DatasetDict` with the splits `train`, `validation` and `test`, each with the columns `text`
(str) and `label` (`ClassLabel`).
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedex_hf.tasks.data import DataError, load_data, quoted


# The topics follow the chapters of the Python Library Reference. Modules that one of Python 3.10 to 3.13 lacks are
# skipped there; `tkinter`, the largest of all, is left out because Linux distributions package it separately.
TOPICS = {
    "code": "abc ast dataclasses dis enum functools importlib inspect pkgutil pydoc symtable typing",
    "concurrency": "asyncio concurrent multiprocessing queue selectors subprocess threading",
    "files": "_pyio bz2 filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib posixpath shutil stat "
    "tarfile tempfile zipfile",
    "mail": "email imaplib mailbox mimetypes nntplib poplib quopri smtplib",
    "markup": "configparser csv html json plistlib xml",
    "numbers": "_pydatetime _pydecimal _strptime calendar colorsys datetime decimal fractions numbers random "
    "statistics zoneinfo",
    "testing": "bdb cProfile doctest pdb profile pstats timeit trace tracemalloc unittest",
    "web": "cgi ftplib http ipaddress socket socketserver ssl urllib webbrowser wsgiref xmlrpc",
}
MIN_WORDS = 8  # shorter docstrings ("Return the name.") could come from anywhere
SAME_START_WORDS = 10  # docstrings that share this many first words are copies of one another: the first is kept
HIDDEN_NAME = "module"  # stands for every module's name, so that no text spells its own answer
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.06

_NAMES = sorted({module.lstrip("_") for modules in TOPICS.values() for module in modules.split()})
_HIDDEN = re.compile(r"\b_*(?:" + "|".join(_NAMES) + r")\b", re.IGNORECASE)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


# ---- Docstrings of the standard library ----


def load_standard_library(seed: int) -> DatasetDict:
    """About 3,400 docstrings with 8 topics as labels; no class or function has docstrings in two splits.

    Per topic, whole classes and functions are dealt out in the order of a seeded hash, as long as they fit.
    """
    groups: dict[str, dict[str, list[str]]] = {topic: {} for topic in sorted(TOPICS)}
    for row in standard_library_docstrings():
        groups[row["topic"]].setdefault(row["group"], []).append(row["text"])
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for topic, members in groups.items():
        if not members:
            raise DataError(
                f"No docstring on the topic `{topic}` in `{sysconfig.get_paths()['stdlib']}`: this Python does not "
                "carry the sources of its standard library. Give a dataset with `--dataset_name`."
            )
        total = sum(map(len, members.values()))
        room = {"test": round(TEST_SHARE * total), "validation": round(VALIDATION_SHARE * total), "train": total}
        for group in sorted(members, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()):
            split = next(name for name, left in room.items() if left >= len(members[group]))
            room[split] -= len(members[group])
            splits[split] += [{"text": text, "label": topic} for text in members[group]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(groups))})
    datasets = {name: Dataset.from_list(rows, features=features) for name, rows in splits.items()}
    return DatasetDict(datasets).shuffle(seed=seed)


def standard_library_docstrings() -> Iterator[dict[str, str]]:
    """Yield `{"text", "topic", "group"}` for docstrings of the running Python's standard library, without copies.

    The sources are parsed, never imported. `group` names the file and the top-level class or function that the
    docstring belongs to.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for topic, modules in sorted(TOPICS.items()):
        for path in (path for module in modules.split() for path in _source_files(root, module)):
            for group, docstring in _docstrings(path.relative_to(root), path.read_bytes()):
                words = docstring.split()
                start = " ".join(words[:SAME_START_WORDS]).lower()
                if len(words) >= MIN_WORDS and start not in seen:
                    seen.add(start)
                    yield {"text": _HIDDEN.sub(HIDDEN_NAME, " ".join(words)), "topic": topic, "group": group}


def _source_files(root: Path, module: str) -> list[Path]:
    if (root / f"{module}.py").is_file():
        return [root / f"{module}.py"]
    files = sorted((root / module).rglob("*.py"))
    return [path for path in files if not {"test", "tests"} & set(path.relative_to(root).parts)]


def _docstrings(path: Path, source: bytes) -> Iterator[tuple[str, str]]:
    """Yield (group, docstring) for the module, its top-level definitions and everything nested in them."""
    module = ast.parse(source)
    if docstring := ast.get_docstring(module):
        yield path.as_posix(), docstring
    for definition in (node for node in module.body if isinstance(node, _DEFINITIONS)):
        for node in ast.walk(definition):
            if isinstance(node, _DEFINITIONS) and (docstring := ast.get_docstring(node)):
                yield f"{path.as_posix()}:{definition.name}", docstring


# ---- The user's own dataset ----


def load_own(
    name: str, config: str | None = None, text_column: str = "text", label_column: str = "label", seed: int = 0
) -> DatasetDict:
    """Load a text classification dataset and give it the three splits and two columns of this recipe.

    Args:
        name: Hub id, or local path of a csv, tsv, json, jsonl or parquet file, of a folder of such files, or of a
            folder written by `save_to_disk`.
        config: Configuration of a Hub dataset, such as `"sst2"` of `"nyu-mll/glue"`.
        text_column: Column of strings.
        label_column: Column of classes: `ClassLabel`, integers, booleans or strings.
        seed: For the splits that the dataset does not have; they are cut from `train`.

    Raises:
        DataError: If the dataset is not found, is empty, or its columns are missing or of another kind.
    """
    loaded = load_data(name, config)
    if len(loaded) == 1:
        loaded = DatasetDict(train=next(iter(loaded.values())))
    if "train" not in loaded:
        raise DataError(f"`{name}` has the splits {quoted(loaded)}, but no `train`. Rename one of them.")
    splits = {"train": _two_columns(loaded["train"], text_column, label_column, f"{name}, split train")}
    for split, aliases in (("validation", ("validation", "valid", "dev")), ("test", ("test",))):
        found = next((alias for alias in aliases if alias in loaded), None)
        if found is not None and _is_labelled(loaded[found], label_column):
            splits[split] = _two_columns(loaded[found], text_column, label_column, f"{name}, split {found}")
    return _complete(_same_classes(splits, name), seed)


def _two_columns(dataset: Dataset, text_column: str, label_column: str, where: str) -> Dataset:
    """Check both columns, then select and rename them to `text` and `label`."""
    for flag, column in (("text_column", text_column), ("label_column", label_column)):
        if column not in dataset.column_names:
            raise DataError(
                f"{where}: no column `{column}`. There are {quoted(dataset.column_names)}; name one with `--{flag}`."
            )
        if any(value is None for value in dataset[column]):
            raise DataError(f"{where}: column `{column}` has missing values. Drop those rows.")
    if not len(dataset):
        raise DataError(f"{where}: there are no rows.")
    texts, labels = dataset[text_column][:], dataset[label_column][:]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: column `{text_column}` is {dataset.features[text_column]}, not strings.")
    if not all(isinstance(label, (str, int)) for label in labels):
        raise DataError(
            f"{where}: column `{label_column}` is {dataset.features[label_column]}, but classes are needed: strings, "
            "integers or booleans. This recipe is for classification."
        )
    kind = dataset.features[label_column]
    names = [kind.int2str(label) for label in labels] if isinstance(kind, ClassLabel) else list(map(str, labels))
    return Dataset.from_dict({"text": texts, "label": names})


def _is_labelled(dataset: Dataset, label_column: str) -> bool:
    """Whether a test split has labels: public benchmarks such as GLUE hide them as -1."""
    return label_column not in dataset.column_names or -1 not in set(dataset[label_column])


def _same_classes(splits: dict[str, Dataset], name: str) -> DatasetDict:
    """Number the classes of the training split, and the same classes in the other splits."""
    names = sorted(set(splits["train"]["label"]), key=_by_number)
    if len(names) < 2:
        raise DataError(f"`{name}` has {len(names)} class in its training split; at least 2 are needed.")
    if 2 * len(names) > len(splits["train"]):
        raise DataError(
            f"`{name}` has {len(names)} classes for {len(splits['train'])} training examples. Is `--label_column` the "
            "right one?"
        )
    for split, dataset in splits.items():
        if unknown := set(dataset["label"]) - set(names):
            raise DataError(f"`{name}`: the split `{split}` has classes that train lacks: {quoted(sorted(unknown))}.")
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return DatasetDict({split: dataset.cast(features) for split, dataset in splits.items()})


def _complete(splits: DatasetDict, seed: int) -> DatasetDict:
    """Cut the splits that are missing from the shuffled training split, test first."""
    for split, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if split not in splits:
            rows = splits["train"].shuffle(seed=seed)
            size = round(share * len(rows))
            if size == 0:
                raise DataError(f"{len(rows)} training examples are too few to cut a {split} split from.")
            splits["train"], splits[split] = rows.skip(size), rows.take(size)
    return splits.shuffle(seed=seed)


def _by_number(name: str) -> tuple[bool, Any]:
    return (False, int(name)) if name.lstrip("-").isdigit() else (True, name)
