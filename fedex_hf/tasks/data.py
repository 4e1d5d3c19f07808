"""Data of a recipe: from the Hub or from local files with the Hub's column names, checked before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, load_dataset, load_from_disk

from fedex_hf.comparison.arguments import RecipeError


_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tsv": "csv"}
_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


class DataError(RecipeError):
    """A dataset that cannot be used as given; the message says what to do."""


def load_data(name: str, config: str | None = None, flag: str = "--dataset_name") -> DatasetDict:
    """Load all splits of a dataset.

    Args:
        name: Hub id, or local path of a csv, tsv, json, jsonl or parquet file (also with `.gz`), of a folder of such
            files named after their splits, or of a folder written by `save_to_disk`.
        config: Configuration of a Hub dataset, such as `"sst2"` of `"nyu-mll/glue"`. Of a local folder, the folder of
            that name in it, if there is one.
        flag: The argument that errors name.

    Raises:
        DataError: If nothing is found there.
    """
    path = Path(name)
    if path.is_dir() and config is not None and (path / config).is_dir():
        path, config = path / config, None
    if path.is_file():
        return _from_files({"train": [path]}, name, flag)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = load_from_disk(str(path))
        return DatasetDict(train=loaded) if isinstance(loaded, Dataset) else loaded
    if path.is_dir():
        return _from_files(_files_of_splits(path, flag), name, flag)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(f"`{flag} {name}`: there is no such file or folder. Name one, or a dataset on the Hub.")
    try:
        loaded = load_dataset(name, config)
    except Exception as error:  # of many kinds: no such repository, no network, no data files, bad configuration
        raise DataError(
            f"`{flag} {name}` is neither a local file or folder with data nor a dataset that the Hub gives: "
            f"{type(error).__name__}: {error}"
        ) from error
    return DatasetDict(train=loaded) if isinstance(loaded, Dataset) else loaded


def find_split(data: DatasetDict, split: str) -> Dataset | None:
    """A split by its usual names: `validation` also as `valid` or `dev`; `None` if there is none."""
    found = [alias for alias in _ALIASES.get(split, (split,)) if alias in data]
    return data[found[0]] if found else None


def require_split(data: DatasetDict, split: str, name: str, columns: Sequence[str]) -> Dataset:
    """A split that has to be there, with rows and with certain columns.

    Raises:
        DataError: If the split, a row or a column is missing, or a value is `None`.
    """
    dataset = find_split(data, split)
    if dataset is None:
        raise DataError(f"`{name}` has no split `{split}`. It has {quoted(data)}; rename one of them.")
    return check_columns(dataset, columns, f"`{name}`, split `{split}`")


def check_columns(dataset: Dataset, columns: Sequence[str], where: str) -> Dataset:
    """Check that a split has rows, and columns without gaps.

    Raises:
        DataError: If not; `where` begins the message.
    """
    if not len(dataset):
        raise DataError(f"{where}: there are no rows.")
    for column in columns:
        if column not in dataset.column_names:
            raise DataError(
                f"{where}: no column `{column}`. There are {quoted(dataset.column_names)}. Rename yours, for example "
                "with `dataset.rename_column`."
            )
        if any(value is None for value in dataset[column]):
            raise DataError(f"{where}: column `{column}` has missing values. Drop those rows.")
    return dataset


def check_text(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Check that columns hold strings.

    Raises:
        DataError: If not; `where` begins the message.
    """
    for column in columns:
        kind = dataset.features[column]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise DataError(f"{where}: column `{column}` holds {kind}, not text. Convert it, or name another file.")


def take(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn by `seed` and left in their order; all rows if `limit` is `None`."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(sorted(np.random.default_rng(seed).permutation(len(dataset))[:limit].tolist()))


def hold_out(dataset: Dataset, fraction: float, seed: int, where: str) -> tuple[Dataset, Dataset]:
    """Cut a validation split from training examples.

    Returns:
        The rest, and at least one held-out row, drawn by `seed`.

    Raises:
        DataError: If one of the two would be empty.
    """
    size = max(round(fraction * len(dataset)), 1)
    if size >= len(dataset):
        raise DataError(
            f"{where}: {len(dataset)} training examples are too few to hold out {size} for validation. Give more, or "
            "lower `--validation_fraction`."
        )
    parts = dataset.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def quoted(names: Iterable[Any]) -> str:
    """Names in backticks, for messages.

    Example:
        >>> quoted(["a", "b"])
        '`a`, `b`'
    """
    return ", ".join(f"`{name}`" for name in names)


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _files_of_splits(folder: Path, flag: str) -> dict[str, list[Path]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and _suffix(path) in _BUILDERS)
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(path.name.split(".")[0].split("-")[0], []).append(path)
    if not files:
        raise DataError(
            f"`{flag} {folder}`: the folder holds no data files. Expected files such as `train.jsonl` and "
            f"`test.jsonl`, with one of the endings {quoted(sorted(_BUILDERS))}, also with `.gz`."
        )
    return splits


def _from_files(splits: dict[str, list[Path]], name: str, flag: str) -> DatasetDict:
    suffixes = {_suffix(path) for paths in splits.values() for path in paths}
    if len({_BUILDERS.get(suffix) for suffix in suffixes}) != 1 or not suffixes <= _BUILDERS.keys():
        raise DataError(
            f"`{flag} {name}` has files with the endings {quoted(sorted(suffixes))}. Allowed: one kind of "
            f"{quoted(sorted(_BUILDERS))}."
        )
    separator = {"sep": "\t"} if ".tsv" in suffixes else {}
    builder = _BUILDERS[suffixes.pop()]
    loaded = {}
    for split, paths in splits.items():
        try:  # each split by itself: an empty file would make the others fail
            files = [str(path) for path in paths]
            loaded[split] = load_dataset(builder, data_files={split: files}, split=split, **separator)
        except Exception as error:
            if all(path.stat().st_size == 0 for path in paths):
                loaded[split] = Dataset.from_dict({}, features=Features({}))
                continue
            raise DataError(f"`{flag} {name}`: split `{split}` cannot be read: {error}") from error
    return DatasetDict(loaded)
