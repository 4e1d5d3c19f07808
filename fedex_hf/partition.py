"""Room 1: one dataset in, one dataset per client out.

`partition_dataset` reads the column it needs, asks one of three pure functions (`iid_indices`, `dirichlet_indices`,
`natural_indices`) who gets which row, and selects the rows. Global random state is neither read nor written.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch


if TYPE_CHECKING:
    import datasets

    MapDataset: TypeAlias = datasets.Dataset | torch.utils.data.Dataset[Any]

DEFAULT_NUM_CLIENTS = 3
_MAX_DRAWS = 100


def partition_dataset(
    dataset: MapDataset,
    num_clients: int | None = None,
    *,
    partition_by: str | None = None,
    dirichlet_alpha: float | None = None,
    seed: int = 42,
    min_examples: int = 1,
) -> dict[str, MapDataset]:
    """Split one dataset into one dataset per client; every row goes to exactly one client.

    - IID, if neither `partition_by` nor `dirichlet_alpha` is given: shuffled, client sizes differ by at most one.
    - Label skew, if `dirichlet_alpha` is given: Yurochkin et al. 2019, see `dirichlet_indices`.
    - Natural, if only `partition_by` is given: one client per distinct value of that column, rows in their order.

    Args:
        dataset: A `datasets.Dataset`, or any map-style dataset with `__len__` and `__getitem__`. To split the latter
            by a column its rows must be mappings; each of them is read once.
        num_clients: Number of clients. `None` means 3, or one per distinct value for a natural split.
        partition_by: Name of the id column or, with `dirichlet_alpha`, of the label column, where `None` means
            `"label"` or `"labels"`, whichever exists.
        dirichlet_alpha: Concentration, above 0. Small: each label sits at few clients. Large: close to IID.
        seed: At least 0. The same seed gives the same split.
        min_examples: Fewest examples a client may have, at least 1.

    Returns:
        `{client_id: dataset}`, sorted. A `client_id` is `str(value)` for a natural split, else `"client-0"`, ... with
        zero-padded numbers. The datasets are `datasets.Dataset` (by `select`) or `torch.utils.data.Subset`.

    Raises:
        TypeError: `dataset` is streamed or already split, or an argument or a column has an unsuitable type.
        ValueError: A number is out of range, the column is unknown or incomplete, or no such split exists.

    Example:
        >>> from datasets import Dataset
        >>> dataset = Dataset.from_dict({"text": ["a", "b", "c", "d"], "author": ["Yu", "Ann", "Yu", "Yu"]})
        >>> {client_id: len(part) for client_id, part in partition_dataset(dataset, num_clients=2).items()}
        {'client-0': 2, 'client-1': 2}
        >>> {author: part["text"][:] for author, part in partition_dataset(dataset, partition_by="author").items()}
        {'Ann': ['b'], 'Yu': ['a', 'c', 'd']}
    """
    num_examples = _check_dataset(dataset)
    _check_int("seed", seed, least=0)
    _check_int("min_examples", min_examples, least=1)
    if num_clients is not None:
        _check_int("num_clients", num_clients, least=1)

    if partition_by is not None and dirichlet_alpha is None:
        groups = natural_indices(_column_values(dataset, partition_by), partition_by)
        _check_natural(groups, partition_by, num_clients, min_examples)
        return {client_id: _select(dataset, rows) for client_id, rows in groups.items()}

    num_clients = DEFAULT_NUM_CLIENTS if num_clients is None else num_clients
    if num_examples < num_clients * min_examples:
        raise ValueError(
            f"`dataset` has {num_examples} examples, but `num_clients`={num_clients} with `min_examples`="
            f"{min_examples} needs at least {num_clients * min_examples}. Lower one of the two or pass more data."
        )
    if dirichlet_alpha is None:
        shares = iid_indices(num_examples, num_clients, seed)
    else:
        _check_alpha(dirichlet_alpha)
        labels = _labels(dataset, partition_by)
        shares = dirichlet_indices(labels, num_clients, dirichlet_alpha, seed, min_examples)
    return {name: _select(dataset, rows) for name, rows in zip(client_names(len(shares)), shares, strict=True)}


def client_names(number: int) -> list[str]:
    """Names of clients that nobody has named, sorted: `"client-0"`, ... with zero-padded numbers.

    Example:
        >>> client_names(11)[-2:]
        ['client-09', 'client-10']
    """
    width = len(str(number - 1))
    return [f"client-{index:0{width}d}" for index in range(number)]


def describe_partition(clients: Mapping[str, MapDataset], label_column: str = "label") -> dict[str, dict[str, int]]:
    """Count the examples of each label at each client: `{client_id: {str(label): num_examples}}`, zeros included.

    Example:
        >>> from datasets import Dataset
        >>> describe_partition({"a": Dataset.from_dict({"label": [0, 0]}), "b": Dataset.from_dict({"label": [1]})})
        {'a': {'0': 2, '1': 0}, 'b': {'0': 0, '1': 1}}
    """
    counts = {client_id: Counter(map(str, _column_values(part, label_column))) for client_id, part in clients.items()}
    labels = sorted(set().union(*counts.values()))
    return {client_id: {label: count[label] for label in labels} for client_id, count in counts.items()}


def iid_indices(num_examples: int, num_clients: int, seed: int) -> list[np.ndarray]:
    """Shuffle the rows and deal them out; returns one int64 array of rows per client, sizes differ by at most one.

    Example:
        >>> [len(rows) for rows in iid_indices(num_examples=8, num_clients=3, seed=0)]
        [3, 3, 2]
    """
    return np.array_split(np.random.default_rng(seed).permutation(num_examples), num_clients)


def dirichlet_indices(
    labels: Sequence[Any], num_clients: int, alpha: float, seed: int, min_examples: int = 1
) -> list[np.ndarray]:
    """Spread the rows of each label over the clients by shares `p ~ Dirichlet(alpha, ..., alpha)`, one draw per label.

    Paper: Yurochkin et al. 2019, arXiv 1905.12022; client sizes vary too. Relations: Hsu et al. 2019, arXiv
    1909.06335, draws a label distribution per client over equal sizes, which in general cannot use every row once.

    Of a label with n rows a client gets `p * n`, rounded at random so that this is also the mean (systematic
    sampling): truncating instead would hand every rare label to the last client. All labels are drawn again, at most
    100 times, until every client has `min_examples`. Returns one int64 array of shuffled rows per client.

    Example:
        >>> shares = dirichlet_indices(["no", "no", "no", "yes", "yes"], num_clients=2, alpha=1.0, seed=0)
        >>> sorted(np.concatenate(shares).tolist())
        [0, 1, 2, 3, 4]
    """
    rng = np.random.default_rng(seed)
    groups = list(natural_indices(labels).values())
    smallest = 0
    for _ in range(_MAX_DRAWS):
        pieces = []
        for rows in groups:
            ends = np.cumsum(rng.dirichlet([alpha] * num_clients))[:-1]
            cuts = np.floor(ends * len(rows) + rng.random()).astype(np.int64)
            pieces.append(np.split(rng.permutation(rows), cuts))
        shares = [rng.permutation(np.concatenate(share)) for share in zip(*pieces, strict=True)]
        smallest = max(smallest, min(map(len, shares)))
        if smallest >= min_examples:
            return shares
    raise ValueError(
        f"`dirichlet_alpha`={alpha} with `num_clients`={num_clients} gave no split in {_MAX_DRAWS} draws where every "
        f"client has `min_examples`={min_examples} examples (the smallest client had {smallest} at best). Raise "
        "`dirichlet_alpha`, lower `num_clients` or `min_examples`, or try another `seed`."
    )


def natural_indices(values: Sequence[Any], column: str = "values") -> dict[str, np.ndarray]:
    """Group the rows by value: `{str(value): int64 rows in their order}`, sorted; `column` is named in errors.

    Example:
        >>> {value: rows.tolist() for value, rows in natural_indices(["b", "a", "b"]).items()}
        {'a': [1], 'b': [0, 2]}
    """
    first: dict[str, Any] = {}
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        name = str(value)
        if first.setdefault(name, value) != value:
            raise ValueError(
                f"Column `{column}` holds {first[name]!r} and {value!r}, which have the same name {name!r}. Distinct "
                "values need distinct names: convert the column to one type."
            )
        groups.setdefault(name, []).append(row)
    return {name: np.array(groups[name]) for name in sorted(groups)}


def _select(dataset: Any, rows: np.ndarray) -> MapDataset:
    return dataset.select(rows) if _is_hf(dataset) else torch.utils.data.Subset(dataset, rows.tolist())


def _is_hf(dataset: Any) -> bool:
    # By what it can do: `datasets` stays optional, as in Trainer.
    return hasattr(dataset, "select") and hasattr(dataset, "column_names")


def _column_names(dataset: Any) -> list[str]:
    if _is_hf(dataset):
        return list(dataset.column_names)
    if isinstance(dataset[0], Mapping):
        return list(dataset[0])
    raise TypeError(
        f"Rows of `dataset` are of type `{type(dataset[0]).__name__}` and have no columns to split by. Use a "
        "`datasets.Dataset` or rows that are mappings, or split IID: no `partition_by`, no `dirichlet_alpha`."
    )


def _column_values(dataset: Any, column: str) -> list[Any]:
    """One Python scalar per row, none missing."""
    names = _column_names(dataset)
    if column not in names:
        raise ValueError(f"`dataset` has no column `{column}`. Available columns: {_quoted(names)}.")
    if _is_hf(dataset):
        # Python objects, whatever format or transform the user set.
        values = list(dataset.with_format(None)[column][:])
    else:
        values = [dataset[row].get(column) for row in range(len(dataset))]
        values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(
                f"Column `{column}` is {value} in row {row}, but every example needs a value. Fill in the missing "
                "ones or drop their rows, for example with `dataset.filter`."
            )
        if not isinstance(value, (str, int, float, datetime.date)):
            raise TypeError(
                f"Column `{column}` holds a `{type(value).__name__}` in row {row}; allowed are `str`, `int`, `bool`, "
                "`float` and dates. Add a column with one such value per example and name it in `partition_by`."
            )
    return values


def _labels(dataset: Any, column: str | None) -> list[Any]:
    """The label column for a Dirichlet split: found if not named, discrete."""
    if column is None:
        names = _column_names(dataset)
        found = [name for name in ("label", "labels") if name in names]
        if len(found) != 1:
            raise ValueError(
                "`dirichlet_alpha` needs one label column, `label` or `labels`, but `dataset` has the columns "
                f"{_quoted(names)}. Name the label column in `partition_by`."
            )
        column = found[0]
    labels = _column_values(dataset, column)
    if any(isinstance(label, float) for label in labels):
        raise TypeError(
            f"Column `{column}` holds `float` values, but `dirichlet_alpha` needs discrete labels. Cast classes to "
            "`int`; for scores add a column of bins with `dataset.map` and name it in `partition_by`, or split IID."
        )
    return labels


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _check_dataset(dataset: Any) -> int:
    """Refuse what is not one finite map-style dataset; returns the number of examples."""
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"`dataset` is a `{type(dataset).__name__}` with keys such as {_quoted(list(dataset)[:5])}. A dict of "
            "clients needs no partitioning; of a dict of splits pass one, such as `dataset['train']`."
        )
    is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not is_map_style or isinstance(dataset, (str, torch.utils.data.IterableDataset)):
        raise TypeError(
            f"`dataset` is of type `{type(dataset).__name__}`; only map-style datasets, with `__len__` and "
            "`__getitem__`, can be partitioned. Pass streamed data as a dict of clients, `{client_id: dataset}`."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty, but at least 1 example is needed. Check how it was loaded or filtered.")
    return len(dataset)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r} (`{type(value).__name__}`); pass an `int` of at least {least}.")
    if int(value) < least:
        raise ValueError(f"`{name}` is {value}; pass an `int` of at least {least}.")


def _check_alpha(alpha: Any) -> None:
    allowed = "pass a finite number above 0 (0.1 is very skewed, 100 nearly IID), or `None` for an IID split."
    if not isinstance(alpha, Real) or isinstance(alpha, bool):
        raise TypeError(f"`dirichlet_alpha` is {alpha!r} (`{type(alpha).__name__}`); {allowed}")
    if not (math.isfinite(alpha) and float(alpha) > 0):
        raise ValueError(f"`dirichlet_alpha` is {alpha}; {allowed}")


def _check_natural(groups: dict[str, np.ndarray], column: str, num_clients: int | None, min_examples: int) -> None:
    if num_clients not in (None, len(groups)):
        raise ValueError(
            f"`num_clients` is {num_clients}, but `{column}` has {len(groups)} distinct values and each becomes "
            "a client. Leave out `num_clients`, or add `dirichlet_alpha` to spread the values over the clients."
        )
    small = [client_id for client_id, rows in groups.items() if len(rows) < min_examples]
    if small:
        raise ValueError(
            f"{len(small)} of {len(groups)} clients from column `{column}` have fewer examples than "
            f"`min_examples`={min_examples}, such as {_quoted(small[:5])}. Drop their rows with `dataset.filter` or "
            "lower `min_examples`."
        )
