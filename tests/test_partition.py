import itertools
import random
import re
from collections import Counter
from datetime import date

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from fedex_hf.partition import (
    describe_partition,
    dirichlet_indices,
    iid_indices,
    natural_indices,
    partition_dataset,
)


NUM_EXAMPLES = 200
IID = {}
DIRICHLET = {"dirichlet_alpha": 0.5}
NATURAL = {"partition_by": "user"}


class Rows(torch.utils.data.Dataset):
    """A map-style dataset that is not a `datasets.Dataset`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    """An iterable dataset that knows its length: not to be mistaken for a map-style one."""

    def __len__(self):
        return 10

    def __iter__(self):
        return iter(range(10))


@pytest.fixture
def dataset():
    # 4 balanced labels; 5 users of different sizes, first seen in the order bob, ann, ...
    users = ["bob"] * 3 + ["ann"] * 7 + ["eve", "dan", "carl"] * 10 + ["bob"] * 160
    rows = range(NUM_EXAMPLES)
    return Dataset.from_dict({"row": list(rows), "label": [row % 4 for row in rows], "user": users})


def rows_of(clients):
    return {client_id: [example["row"] for example in part] for client_id, part in clients.items()}


def mean_tv_distance(label_counts):
    """Mean over clients of the total variation distance between a client's labels and everybody's labels."""
    counts = np.array(label_counts, dtype=np.float64)  # (clients, labels)
    overall = counts.sum(axis=0) / counts.sum()
    return np.mean([0.5 * np.abs(row / row.sum() - overall).sum() for row in counts])


@pytest.mark.parametrize("kwargs", [IID, DIRICHLET, NATURAL, {**DIRICHLET, **NATURAL}], ids=str)
@pytest.mark.parametrize("as_torch", [False, True], ids=["datasets", "torch"])
class TestEverySplit:
    def test_every_row_goes_to_exactly_one_client(self, dataset, kwargs, as_torch):
        source = Rows(dataset.to_list()) if as_torch else dataset
        parts = rows_of(partition_dataset(source, **kwargs))
        assert len(parts) == (5 if kwargs == NATURAL else 3)
        assert Counter(row for rows in parts.values() for row in rows) == Counter(range(NUM_EXAMPLES))
        assert all(parts.values())

    def test_same_seed_same_split_and_global_random_state_untouched(self, dataset, kwargs, as_torch):
        source = Rows(dataset.to_list()) if as_torch else dataset
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        expected = random.random(), np.random.rand(), torch.rand(1).item()

        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        first = rows_of(partition_dataset(source, seed=7, **kwargs))
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
        # Now in a different global state.
        assert rows_of(partition_dataset(source, seed=7, **kwargs)) == first
        other = rows_of(partition_dataset(source, seed=8, **kwargs))
        assert (other == first) == (kwargs == NATURAL)

    def test_both_kinds_of_dataset_split_alike(self, dataset, kwargs, as_torch):
        source = Rows(dataset.to_list()) if as_torch else dataset
        parts = partition_dataset(source, **kwargs)
        kind = torch.utils.data.Subset if as_torch else Dataset
        assert all(type(part) is kind for part in parts.values())
        assert rows_of(parts) == rows_of(partition_dataset(dataset, **kwargs))
        assert list(parts) == sorted(parts)


class TestIID:
    @pytest.mark.parametrize("num_clients", [1, 2, 3, 7, 199, 200])
    def test_sizes_differ_by_at_most_one(self, dataset, num_clients):
        sizes = [len(part) for part in partition_dataset(dataset, num_clients).values()]
        assert len(sizes) == num_clients
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == NUM_EXAMPLES

    def test_rows_are_shuffled(self, dataset):
        rows = rows_of(partition_dataset(dataset, 2))
        for share in rows.values():
            assert share != sorted(share)
            # Not one half of the file: about half of each share comes from the first half of the rows.
            assert 30 < sum(row < NUM_EXAMPLES // 2 for row in share) < 70

    def test_client_ids_are_padded_and_sorted(self, dataset):
        assert list(partition_dataset(dataset)) == ["client-0", "client-1", "client-2"]
        assert list(partition_dataset(dataset, 10))[-1] == "client-9"
        clients = list(partition_dataset(dataset, 11))
        assert (clients[0], clients[-1]) == ("client-00", "client-10")
        assert clients == sorted(clients)

    def test_rows_without_columns(self):
        parts = partition_dataset(torch.utils.data.TensorDataset(torch.arange(10)), 2)
        assert sorted(int(row) for part in parts.values() for (row,) in part) == list(range(10))

    def test_numpy_integers_are_integers(self, dataset):
        parts = partition_dataset(dataset, np.int64(4), seed=np.int64(7))
        assert rows_of(parts) == rows_of(partition_dataset(dataset, 4, seed=7))

    def test_the_users_format_is_kept(self, dataset):
        part = partition_dataset(dataset.with_format("torch"), 2)["client-0"]
        assert isinstance(part[0]["label"], torch.Tensor)

    def test_the_dataset_is_left_as_it_was(self, dataset):
        before = dataset.to_dict()
        partition_dataset(dataset)
        assert dataset.to_dict() == before


class TestDirichlet:
    def test_small_alpha_is_more_skewed_than_large(self):
        labels = [row % 4 for row in range(4000)]
        distances = []
        for alpha in (0.05, 1.0, 1000.0):
            counts = [
                [sum(labels[row] == label for row in share) for label in range(4)]
                for seed in range(5)
                for share in dirichlet_indices(labels, num_clients=4, alpha=alpha, seed=seed)
            ]
            distances.append(mean_tv_distance(counts))
        assert distances[0] > 0.5 > distances[1] > 0.1
        assert distances[2] < 0.03

    def test_proportions_per_label_follow_the_dirichlet_moments(self):
        # The share of a label at a client has mean 1 / k and variance (k - 1) / (k^2 (k alpha + 1)).
        k, alpha, num_rows = 3, 2.0, 1000
        labels = [0] * num_rows + [1] * num_rows
        shares = np.array(
            [
                [np.sum(rows < num_rows) / num_rows for rows in dirichlet_indices(labels, k, alpha, seed)]
                for seed in range(400)
            ]
        )
        np.testing.assert_allclose(shares.sum(axis=1), 1.0)
        np.testing.assert_allclose(shares.mean(axis=0), 1 / k, atol=0.03)
        np.testing.assert_allclose(shares.var(axis=0), (k - 1) / (k**2 * (k * alpha + 1)), rtol=0.2)

    def test_rare_labels_favour_no_client(self):
        # 300 labels with one row each: plain truncation of the shares would give all of them to the last client.
        sizes = [len(rows) for rows in dirichlet_indices(list(range(300)), num_clients=3, alpha=1.0, seed=0)]
        assert min(sizes) > 70

    def test_min_examples_is_reached_by_drawing_again(self):
        labels = [row % 2 for row in range(100)]
        draws = [dirichlet_indices(labels, 4, alpha=0.3, seed=seed) for seed in range(20)]
        assert any(min(map(len, shares)) < 10 for shares in draws)
        for seed in range(20):
            shares = dirichlet_indices(labels, 4, alpha=0.3, seed=seed, min_examples=10)
            assert min(map(len, shares)) >= 10
            assert sorted(np.concatenate(shares).tolist()) == list(range(100))

    def test_min_examples_is_handed_on(self, dataset):
        loose = [partition_dataset(dataset, 4, dirichlet_alpha=0.2, seed=seed) for seed in range(5)]
        assert any(min(map(len, parts.values())) < 20 for parts in loose)
        for seed in range(5):
            strict = partition_dataset(dataset, 4, dirichlet_alpha=0.2, seed=seed, min_examples=20)
            assert min(map(len, strict.values())) >= 20

    def test_rows_of_a_client_are_shuffled_across_labels(self, dataset):
        part = partition_dataset(dataset, 2, dirichlet_alpha=100.0)["client-0"]
        labels = part["label"][:]
        assert len(set(labels)) == 4
        assert sum(a != b for a, b in itertools.pairwise(labels)) > len(labels) / 2

    def test_which_rows_of_a_label_a_client_gets_is_random(self):
        # Not a block of the file: with one label, a client's rows spread evenly over the whole of it.
        shares = dirichlet_indices([0] * 3000, num_clients=3, alpha=100.0, seed=0)
        for rows in shares:
            assert abs(np.mean(rows) - 1500) < 100
            assert np.min(rows) < 30
            assert np.max(rows) > 2970

    @pytest.mark.parametrize("name", ["label", "labels"])
    def test_the_label_column_is_found(self, dataset, name):
        renamed = dataset if name == "label" else dataset.rename_column("label", name)
        found = partition_dataset(renamed, dirichlet_alpha=0.5)
        assert rows_of(found) == rows_of(partition_dataset(renamed, partition_by=name, dirichlet_alpha=0.5))
        assert rows_of(found) != rows_of(partition_dataset(renamed, partition_by="user", dirichlet_alpha=0.5))

    @pytest.mark.parametrize("values", [[True, False], ["yes", "no"], [-1, 1]], ids=str)
    def test_kinds_of_labels(self, values):
        parts = partition_dataset(Dataset.from_dict({"label": values * 20}), 2, dirichlet_alpha=1)
        assert Counter(label for part in parts.values() for label in part["label"]) == Counter(values * 20)

    def test_format_of_the_dataset_does_not_matter(self, dataset):
        expected = rows_of(partition_dataset(dataset, dirichlet_alpha=0.5))
        as_torch = partition_dataset(dataset.with_format("torch", columns=["row"]), dirichlet_alpha=0.5)
        assert {client_id: part.with_format(None)["row"][:] for client_id, part in as_torch.items()} == expected
        tensors = Rows([{"row": row["row"], "label": torch.tensor(row["label"])} for row in dataset])
        assert rows_of(partition_dataset(tensors, dirichlet_alpha=0.5)) == expected


class TestNatural:
    def test_one_client_per_value_in_file_order(self, dataset):
        parts = partition_dataset(dataset, partition_by="user")
        assert list(parts) == ["ann", "bob", "carl", "dan", "eve"]
        for user, part in parts.items():
            assert set(part["user"]) == {user}
            assert part["row"][:] == [row for row, name in enumerate(dataset["user"]) if name == user]

    def test_ids_are_strings_and_sorted_as_such(self):
        parts = partition_dataset(Dataset.from_dict({"site": [10, 9, 10]}), partition_by="site")
        assert {client_id: part["site"][:] for client_id, part in parts.items()} == {"10": [10, 10], "9": [9]}
        assert list(parts) == ["10", "9"]

    def test_dates(self):
        days = [date(2024, 1, 2), date(2024, 1, 1)]
        assert list(partition_dataset(Dataset.from_dict({"day": days}), partition_by="day")) == [
            "2024-01-01",
            "2024-01-02",
        ]

    def test_matching_num_clients_is_accepted(self, dataset):
        assert len(partition_dataset(dataset, 5, partition_by="user", min_examples=7)) == 5


class TestIndices:
    def test_iid(self):
        shares = iid_indices(10, 3, seed=0)
        assert [len(share) for share in shares] == [4, 3, 3]
        assert all(share.dtype == np.int64 for share in shares)
        assert sorted(np.concatenate(shares).tolist()) == list(range(10))

    def test_dirichlet(self):
        shares = dirichlet_indices([0] * 5 + [1] * 5, 2, alpha=1.0, seed=0)
        assert all(share.dtype == np.int64 for share in shares)
        assert sorted(np.concatenate(shares).tolist()) == list(range(10))

    def test_natural(self):
        groups = natural_indices(["b", "a", "b"])
        assert [(name, rows.tolist(), rows.dtype) for name, rows in groups.items()] == [
            ("a", [1], np.int64),
            ("b", [0, 2], np.int64),
        ]


def test_describe_partition(dataset):
    clients = {"x": dataset.select([0, 4, 1]), "y": Rows([{"label": 3}])}
    assert describe_partition(clients) == {
        "x": {"0": 2, "1": 1, "3": 0},
        "y": {"0": 0, "1": 0, "3": 1},
    }
    users = describe_partition(partition_dataset(dataset, partition_by="user"), "user")
    assert {client_id: counts[client_id] for client_id, counts in users.items()} == Counter(dataset["user"])


def columns(**values):
    return Dataset.from_dict(values)


# What came, what is allowed, what to do: each error is pinned by a piece of all three.
ERRORS = {
    "dict of splits": (
        lambda: (DatasetDict({"train": columns(label=[0])}), {}),
        TypeError,
        ["`dataset` is a `DatasetDict`", "`train`", "A dict of clients needs no partitioning", "`dataset['train']`"],
    ),
    "streaming": (
        lambda: (columns(label=[0, 1]).to_iterable_dataset(), {}),
        TypeError,
        ["`IterableDataset`", "only map-style datasets", "as a dict of clients, `{client_id: dataset}`"],
    ),
    "streaming for torch": (
        lambda: (columns(label=[0, 1]).to_iterable_dataset().with_format("torch"), {}),
        TypeError,
        ["`IterableDataset`", "only map-style datasets", "as a dict of clients, `{client_id: dataset}`"],
    ),
    "torch stream with a length": (
        lambda: (Stream(), {}),
        TypeError,
        ["`Stream`", "only map-style datasets", "as a dict of clients"],
    ),
    "no length": (
        lambda: (torch.utils.data.Dataset(), {}),
        TypeError,
        ["`Dataset`", "only map-style datasets, with `__len__`", "as a dict of clients"],
    ),
    "name of a dataset": (lambda: ("imdb", {}), TypeError, ["type `str`", "`__len__` and `__getitem__`"]),
    "empty": (
        lambda: (columns(label=[]), {}),
        ValueError,
        ["`dataset` is empty", "at least 1", "Check how it was loaded"],
    ),
    "no clients": (
        lambda: (columns(label=[0]), {"num_clients": 0}),
        ValueError,
        ["`num_clients` is 0", "pass an `int` of at least 1"],
    ),
    "fractional clients": (
        lambda: (columns(label=[0]), {"num_clients": 2.0}),
        TypeError,
        ["`num_clients` is 2.0 (`float`)", "pass an `int` of at least 1"],
    ),
    "bool clients": (
        lambda: (columns(label=[0]), {"num_clients": True}),
        TypeError,
        ["`num_clients` is True (`bool`)", "pass an `int`"],
    ),
    "negative seed": (
        lambda: (columns(label=[0]), {"seed": -1}),
        ValueError,
        ["`seed` is -1", "pass an `int` of at least 0"],
    ),
    "no seed": (
        lambda: (columns(label=[0]), {"seed": None}),
        TypeError,
        ["`seed` is None (`NoneType`)", "pass an `int`"],
    ),
    "zero min_examples": (
        lambda: (columns(label=[0]), {"min_examples": 0}),
        ValueError,
        ["`min_examples` is 0", "at least 1"],
    ),
    "more clients than examples": (
        lambda: (columns(label=[0, 1]), {"num_clients": 5}),
        ValueError,
        ["`dataset` has 2 examples", "`num_clients`=5", "`min_examples`=1", "at least 5", "Lower one of the two"],
    ),
    "min_examples out of reach": (
        lambda: (columns(label=[0] * 10), {"num_clients": 3, "min_examples": 4, "dirichlet_alpha": 1.0}),
        ValueError,
        ["`dataset` has 10 examples", "`num_clients`=3", "`min_examples`=4", "at least 12"],
    ),
    "min_examples not drawn": (
        lambda: (columns(label=[0, 1] * 10), {"num_clients": 4, "min_examples": 5, "dirichlet_alpha": 0.01}),
        ValueError,
        ["`dirichlet_alpha`=0.01", "`num_clients`=4", "100 draws", "`min_examples`=5", "at best", "Raise", "`seed`"],
    ),
    "alpha 0": (
        lambda: (columns(label=[0] * 9), {"dirichlet_alpha": 0}),
        ValueError,
        ["`dirichlet_alpha` is 0", "finite number above 0", "`None` for an IID split"],
    ),
    "alpha negative": (
        lambda: (columns(label=[0] * 9), {"dirichlet_alpha": -0.5}),
        ValueError,
        ["`dirichlet_alpha` is -0.5", "finite number above 0"],
    ),
    "alpha infinite": (
        lambda: (columns(label=[0] * 9), {"dirichlet_alpha": float("inf")}),
        ValueError,
        ["`dirichlet_alpha` is inf", "finite number above 0"],
    ),
    "alpha NaN": (
        lambda: (columns(label=[0] * 9), {"dirichlet_alpha": float("nan")}),
        ValueError,
        ["`dirichlet_alpha` is nan", "finite number above 0"],
    ),
    "alpha a string": (
        lambda: (columns(label=[0] * 9), {"dirichlet_alpha": "0.5"}),
        TypeError,
        ["`dirichlet_alpha` is '0.5' (`str`)", "finite number above 0"],
    ),
    "unknown column": (
        lambda: (columns(text=["a"], user=["x"]), {"partition_by": "usr"}),
        ValueError,
        ["no column `usr`", "Available columns: `text`, `user`"],
    ),
    "unknown column of rows": (
        lambda: (Rows([{"text": "a", "user": "x"}]), {"partition_by": "usr"}),
        ValueError,
        ["no column `usr`", "Available columns: `text`, `user`"],
    ),
    "unknown label column": (
        lambda: (columns(label=[0, 1, 0], text=["a", "b", "c"]), {"partition_by": "y", "dirichlet_alpha": 1.0}),
        ValueError,
        ["no column `y`", "Available columns: `label`, `text`"],
    ),
    "rows without columns": (
        lambda: (Rows([1, 2, 3]), {"partition_by": "user"}),
        TypeError,
        ["type `int`", "no columns to split by", "rows that are mappings", "split IID"],
    ),
    "no label column": (
        lambda: (columns(text=["a", "b", "c"]), {"dirichlet_alpha": 1.0}),
        ValueError,
        ["`label` or `labels`", "has the columns `text`", "in `partition_by`"],
    ),
    "two label columns": (
        lambda: (columns(label=[0] * 3, labels=[1] * 3), {"dirichlet_alpha": 1.0}),
        ValueError,
        ["needs one label column", "has the columns `label`, `labels`", "in `partition_by`"],
    ),
    "missing id": (
        lambda: (columns(user=["x", None]), {"partition_by": "user"}),
        ValueError,
        ["Column `user` is None in row 1", "every example needs a value", "`dataset.filter`"],
    ),
    "missing key": (
        lambda: (Rows([{"user": "x"}, {"text": "a"}]), {"partition_by": "user"}),
        ValueError,
        ["Column `user` is None in row 1", "every example needs a value"],
    ),
    "missing label": (
        lambda: (columns(label=[0, 1, None]), {"dirichlet_alpha": 1.0}),
        ValueError,
        ["Column `label` is None in row 2", "every example needs a value", "`dataset.filter`"],
    ),
    "NaN id": (
        lambda: (columns(user=[1.0, float("nan")]), {"partition_by": "user"}),
        ValueError,
        ["Column `user` is nan in row 1", "every example needs a value"],
    ),
    "list of labels": (
        lambda: (columns(label=[[0], [1], [0]]), {"dirichlet_alpha": 1.0}),
        TypeError,
        ["Column `label` holds a `list` in row 0", "allowed are `str`, `int`", "Add a column"],
    ),
    "continuous labels": (
        lambda: (columns(label=[0.5, 3.8, 5.0]), {"dirichlet_alpha": 1.0}),
        TypeError,
        ["Column `label` holds `float` values", "discrete labels", "column of bins", "or split IID"],
    ),
    "colliding ids": (
        lambda: (Rows([{"user": 1}, {"user": "1"}]), {"partition_by": "user"}),
        ValueError,
        ["Column `user` holds 1 and '1'", "distinct names", "convert the column to one type"],
    ),
    "num_clients and natural ids": (
        lambda: (columns(user=["x", "y", "x"]), {"partition_by": "user", "num_clients": 3}),
        ValueError,
        ["`num_clients` is 3", "`user` has 2 distinct values", "Leave out `num_clients`", "`dirichlet_alpha`"],
    ),
    "small natural clients": (
        lambda: (columns(user=["x", "y", "x"]), {"partition_by": "user", "min_examples": 2}),
        ValueError,
        ["1 of 2 clients", "`user`", "`min_examples`=2, such as `y`", "`dataset.filter`", "lower `min_examples`"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_came_what_is_allowed_and_what_to_do(case):
    make, error, pieces = ERRORS[case]
    dataset, kwargs = make()
    with pytest.raises(error, match=".*".join(map(re.escape, pieces))) as caught:
        partition_dataset(dataset, **kwargs)
    assert type(caught.value) is error
