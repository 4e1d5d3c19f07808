"""The deviation recipe: its numbers are those of the factors, and its files hold them."""

from __future__ import annotations

import csv
from pathlib import Path

import deviation
import pytest
import torch
from recipe_lab import encoder, glue_flags, glue_folder

from fedex_hf import FederatedTrainer
from fedex_hf.comparison import read_results
from fedex_hf.comparison.deviation import COLUMNS


@pytest.fixture
def lab(tmp_path):
    glue_folder(tmp_path / "glue", ["sst2"])
    encoder(tmp_path / "model")
    return tmp_path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_rows_hold_what_the_factors_give(lab, monkeypatch):
    """Both scalings against a dense computation in float64 from the updates themselves."""
    expected = {}
    aggregate = FederatedTrainer.aggregate

    def watch(self, round, updates):
        weights = torch.tensor([float(update.num_examples) for update in updates], dtype=torch.float64)
        weights /= weights.sum()
        for name, before in self.federation.state.adapters.items():
            pairs = [update.adapters[name] for update in updates]
            A = sum(w * pair.A.double() for w, pair in zip(weights, pairs))
            B = sum(w * pair.B.double() for w, pair in zip(weights, pairs))
            scaling = pairs[0].scaling
            ideal = scaling * sum(w * pair.B.double() @ pair.A.double() for w, pair in zip(weights, pairs))
            lost = torch.linalg.matrix_norm(scaling * B @ A - ideal)
            change = torch.linalg.matrix_norm(ideal - scaling * before.B.double() @ before.A.double())
            expected[round, name] = (float(lost / change), float(lost / ideal.numel() ** 0.5))
        return aggregate(self, round, updates)

    monkeypatch.setattr(FederatedTrainer, "aggregate", watch)
    deviation.main(glue_flags(lab, aggregators=None))
    rows = read(lab / "out" / "deviation.csv")
    assert len(rows) == len(expected) == 2 * 4  # rounds, layers
    for row in rows:
        relative, rms = expected[int(row["round"]), row["layer"]]
        assert float(row["relative"]) == pytest.approx(relative, rel=1e-6)
        assert float(row["rms"]) == pytest.approx(rms, rel=1e-6)
        assert rms != pytest.approx(relative)  # the twin: one scaling does not pass for the other
    assert {row["kind"] for row in rows} == {"query", "value"}
    assert {row["depth"] for row in rows} == {"0", "1"}


@pytest.mark.no_cover
def test_local_epochs_are_compared_and_runs_that_are_there_are_read_again(lab):
    deviation.main(glue_flags(lab, aggregators=None, local_epochs="1 2"))
    assert {each.run.method for each in read_results(lab / "out" / "results.json")} == {"fedit"}
    flags = ["--results", str(lab / "out" / "results.json"), "--output_dir", str(lab / "again")]
    deviation.main(flags)
    assert read(lab / "again" / "deviation.csv") == read(lab / "out" / "deviation.csv")
    assert set(read(lab / "again" / "deviation.csv")[0]) == set(COLUMNS)
    table = (lab / "again" / "deviation.md").read_text()
    assert "query" in table
    for name in ("deviation_per_layer-epochs-1.png", "deviation_per_local_epochs.png"):
        assert (lab / "again" / name).is_file(), sorted(path.name for path in (lab / "again").iterdir())


def test_a_missing_file_is_refused(lab):
    with pytest.raises(SystemExit, match="there is no such file"):
        deviation.main(["--results", str(lab / "nothing.json"), "--output_dir", str(lab / "again")])
