"""The report of a comparison: every number of tables and figures against one that is worked out here."""

import logging
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedex_hf.comparison import figures
from fedex_hf.comparison.figures import (
    deviation_per_layer,
    draw_deviation_per_layer,
    draw_deviation_per_local_epochs,
    draw_deviation_per_round,
    draw_metric_per_round,
    draw_traffic,
    kinds_of,
)
from fedex_hf.comparison.looks import methods_of, styles_of
from fedex_hf.comparison.report import cell, results_markdown, write_report
from fedex_hf.comparison.results import BestRound, LayerDeviation, RoundResult, Run, RunResult


LAST = "Test metrics after the last round"
BEST = "Test metrics of the round that was best on validation"
PAIRED = "Differences after the last round, paired by seed"
FEDEX = [0.80, 0.82, 0.87]
FEDIT = [0.79, 0.80, 0.78]


def round_of(number: int, **changed: Any) -> RoundResult:
    values: dict[str, Any] = {
        "round": number,
        "train_loss": 0.5,
        "aggregation_error": 1e-7 * number,
        "fedit_deviation": 0.2 / number,
        "num_clients": 3,
        "bytes_up_per_client": 1000.0,
        "bytes_down_per_client": 3000.0,
        "seconds": 1.0,
        "validation": {"loss": 0.6, "accuracy": 0.5 + 0.1 * number},
    }
    return RoundResult(**values | changed)


def run_of(
    method: str,
    seed: int,
    test: float | Mapping[str, float],
    task: str = "sst2",
    epochs: float = 1.0,
    rounds: Sequence[RoundResult] | None = None,
    best: BestRound | None = None,
) -> RunResult:
    test = {"accuracy": test} if isinstance(test, float) else dict(test)
    return RunResult(
        run=Run(task, method, seed, epochs),
        metric=next(iter(test)),
        validation_metric="accuracy",
        greater_is_better=True,
        test=test,
        best_on_validation=best,
        rounds=list(rounds if rounds is not None else [round_of(1), round_of(2)]),
        start="",
        data="",
        seconds=2.0,
    )


def runs_of(method: str, values: Sequence[float | Mapping[str, float]], **more: Any) -> list[RunResult]:
    return [run_of(method, seed, value, **more) for seed, value in enumerate(values)]


def tables_of(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Heading (with that of the local epochs) -> row -> column -> cell."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    top = heading = ""
    for block in text.split("\n\n"):
        if block.startswith("#"):
            level, _, name = block.partition(" ")
            top, heading = (name, name) if len(level) < 3 else (top, f"{top}, {name}")
        elif block.startswith("|"):
            head, rule, *rows = ([each.strip() for each in line.strip("|").split("|")] for line in block.split("\n"))
            assert all(re.fullmatch(":?-+:?", each) for each in rule)
            tables[heading] = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    return tables


def mean_std(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"


# ---- Tables ----


def test_mean_and_std_over_seeds() -> None:
    text = results_markdown(runs_of("fedit", FEDIT) + runs_of("fedex", FEDEX))
    table = tables_of(text)[LAST]
    # (0.80 + 0.82 + 0.87) / 3 = 0.83; deviations -0.03, -0.01, 0.04; sqrt(0.0026 / 2) = 0.0361.
    assert table["FedEx-LoRA"]["sst2 (accuracy)"] == "0.830 ± 0.036"
    assert table["FedIT"]["sst2 (accuracy)"] == "0.790 ± 0.010"
    assert list(table) == ["FedEx-LoRA", "FedIT"]  # whatever the order of the runs
    assert "average" not in table["FedIT"]
    assert "n = 3 seeds (0, 1, 2)" in text
    assert "Missing" not in text


def test_a_wrong_number_would_be_seen() -> None:
    """The twin: one value changed by 0.003 changes mean, deviation and difference."""
    right = tables_of(results_markdown(runs_of("fedex", FEDEX) + runs_of("fedit", FEDIT)))
    wrong = tables_of(results_markdown(runs_of("fedex", [0.80, 0.82, 0.873]) + runs_of("fedit", FEDIT)))
    assert wrong[LAST]["FedEx-LoRA"]["sst2 (accuracy)"] == "0.831 ± 0.038"
    for title, row in ((LAST, "FedEx-LoRA"), (PAIRED, "FedEx-LoRA − FedIT")):
        assert wrong[title][row] != right[title][row]
    assert wrong[LAST]["FedIT"] == right[LAST]["FedIT"]


def test_population_deviation_would_be_another_number() -> None:
    assert cell(dict(enumerate(FEDEX)), [0, 1, 2]) == f"0.830 ± {statistics.stdev(FEDEX):.3f}"
    assert f"{statistics.pstdev(FEDEX):.3f}" != f"{statistics.stdev(FEDEX):.3f}"


def test_average_is_of_seeds_that_have_all_tasks() -> None:
    results = runs_of("fedex", FEDEX) + runs_of("fedex", [0.5, 0.4], task="cola")
    table = tables_of(results_markdown(results))[LAST]["FedEx-LoRA"]
    assert table["sst2 (accuracy)"] == mean_std(FEDEX)
    assert table["cola (accuracy)"] == f"{mean_std([0.5, 0.4])} (n = 2)"
    # Seeds 0 and 1 by task: (0.80 + 0.5) / 2 = 0.65 and (0.82 + 0.4) / 2 = 0.61; sqrt(2 * 0.02 ** 2) = 0.028.
    assert table["average"] == "0.630 ± 0.028 (n = 2)"


def test_missing_runs_are_named() -> None:
    results = runs_of("fedex", FEDEX) + runs_of("fedex", FEDEX, task="rte") + runs_of("ffa", [0.7, 0.7])
    text = results_markdown(results)
    table = tables_of(text)[LAST]["FFA-LoRA"]
    assert (table["rte (accuracy)"], table["average"]) == ("-", "-")
    assert table["sst2 (accuracy)"] == "0.700 ± 0.000 (n = 2)"
    missing = text.partition("Missing")[2].split("\n\n")[1].split("\n")
    assert missing == [
        "- FFA-LoRA on sst2, 1 local epoch: seed 2",
        "- FFA-LoRA on rte, 1 local epoch: seeds 0, 1, 2",
    ]


def test_single_seed_has_no_spread() -> None:
    text = results_markdown([run_of("fedex", 7, 0.8536), run_of("fedit", 7, 0.8)])
    table = tables_of(text)
    assert table[LAST]["FedEx-LoRA"]["sst2 (accuracy)"] == "0.854"
    assert "One seed (7), n = 1" in text
    assert "±" not in "".join(table[LAST]["FedEx-LoRA"].values())
    assert PAIRED not in table  # a single difference says nothing about its spread
    assert results_markdown([]) == "No run has finished yet."


def test_nan_is_shown_and_not_passed_over() -> None:
    results = runs_of("fedex", [0.8, math.nan, 0.9]) + runs_of("fedit", FEDIT)
    results += runs_of("fedex", FEDEX, task="rte") + runs_of("fedit", FEDIT, task="rte")
    tables = tables_of(results_markdown(results))
    assert tables[LAST]["FedEx-LoRA"]["sst2 (accuracy)"] == "nan"
    assert tables[LAST]["FedEx-LoRA"]["average"] == "nan"
    assert tables[LAST]["FedIT"]["sst2 (accuracy)"] == mean_std(FEDIT)
    assert tables[PAIRED]["FedEx-LoRA − FedIT"]["sst2 (accuracy)"] == "+nan"
    assert tables[PAIRED]["FedEx-LoRA − FedIT"]["rte (accuracy)"] != "+nan"


def test_errors_and_traffic() -> None:
    rounds = [round_of(1), round_of(2, bytes_down_per_client=1_500_000.0, aggregation_error=7e-8)]
    results = [run_of("fedex", 0, 0.8, rounds=rounds), run_of("centralized", 0, 0.9)]
    table = tables_of(results_markdown(results))[LAST]
    assert [*table["FedEx-LoRA"].values()][1:] == ["1.0e-07", "1.5e-01", "1.0", "751.5"]  # (3 + 1500) / 2 kB
    assert [*table["centralized LoRA"].values()] == ["0.900", "-", "-", "-", "-"]
    rounds[0].aggregation_error = math.nan
    table = tables_of(results_markdown(results))[LAST]
    assert table["FedEx-LoRA"]["largest aggregation error"] == "nan"


def test_best_round_only_under_its_name() -> None:
    fedex = [
        replace(each, best_on_validation=BestRound(1, 0.9, {"accuracy": 0.99})) for each in runs_of("fedex", FEDEX)
    ]
    fedex[0].best_on_validation = BestRound(2, 0.9, {"accuracy": 0.96})
    text = results_markdown(fedex + runs_of("fedit", FEDIT))
    tables = tables_of(text)
    assert tables[BEST]["FedEx-LoRA"] == {"sst2 (accuracy)": "0.980 ± 0.017", "mean best round": "1.3"}
    assert tables[BEST]["FedIT"] == {"sst2 (accuracy)": "-", "mean best round": "-"}
    assert tables[LAST]["FedEx-LoRA"]["sst2 (accuracy)"] == mean_std(FEDEX)
    assert "0.980" not in text.partition(BEST)[0]
    assert BEST not in tables_of(results_markdown(runs_of("fedex", FEDEX)))


def test_all_metrics_of_a_task() -> None:
    several = [{"bleu": 0.6, "nist": 8.0}, {"bleu": 0.7, "nist": 9.0}]
    tables = tables_of(results_markdown(runs_of("fedex", several, task="e2e") + runs_of("fedex", [0.8, 0.9])))
    title = "All test metrics of e2e after the last round"
    assert tables[title]["FedEx-LoRA"] == {"bleu": "0.650 ± 0.071", "nist": "8.500 ± 0.707"}
    assert tables[LAST]["FedEx-LoRA"]["e2e (bleu)"] == "0.650 ± 0.071"
    assert len([each for each in tables if each.startswith("All test metrics")]) == 1


def test_paired_differences() -> None:
    results = runs_of("fedex", FEDEX) + runs_of("fedit", FEDIT) + runs_of("fedex", [0.5, 0.4], task="cola")
    results += [run_of("fedit", seed, 0.3, task="cola") for seed in (1, 2)]
    text = results_markdown(results)
    row = tables_of(text)[PAIRED]["FedEx-LoRA − FedIT"]
    # 0.01, 0.02, 0.09: mean 0.04, deviation sqrt((0.0009 + 0.0004 + 0.0025) / 2) = 0.044, not that of two means.
    assert row["sst2 (accuracy)"] == "+0.040 ± 0.044"
    assert row["cola (accuracy)"] == "+0.100 (n = 1)"
    assert row["average"] == "+0.060 (n = 1)"  # seed 1 alone has both tasks with both methods
    assert "may be chance" in text
    reverse = runs_of("fedit", FEDEX) + runs_of("fedex", FEDIT)
    assert tables_of(results_markdown(reverse))[PAIRED]["FedEx-LoRA − FedIT"]["sst2 (accuracy)"] == "-0.040 ± 0.044"


def test_local_epochs_have_a_table_each() -> None:
    results = runs_of("fedex", FEDEX) + runs_of("fedex", FEDIT, epochs=3.0)
    tables = tables_of(results_markdown(results))
    assert tables[f"{LAST}, 1 local epoch"]["FedEx-LoRA"]["sst2 (accuracy)"] == mean_std(FEDEX)
    assert tables[f"{LAST}, 3 local epochs"]["FedEx-LoRA"]["sst2 (accuracy)"] == mean_std(FEDIT)
    assert LAST not in tables


def test_columns_line_up_as_plain_text() -> None:
    text = results_markdown(runs_of("fedex:assignment=keep", FEDEX) + runs_of("fedit", FEDIT))
    assert "FedEx-LoRA (assignment=keep)" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({len(line) for line in block.split("\n")}) == 1


# ---- Figures: the data in the axes ----


def lines_of(axis: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [*zip(line.get_xdata(), line.get_ydata())] for line in axis.get_lines()}


def test_metric_per_round() -> None:
    results = [
        run_of(
            "fedex", seed, 0.8, rounds=[round_of(n, validation={"accuracy": value}) for n, value in enumerate(row, 1)]
        )
        for seed, row in enumerate([(0.5, 0.6), (0.7, 0.9)])
    ]
    results += [replace(each, run=replace(each.run, method="centralized")) for each in results]
    figure = draw_metric_per_round(results)
    assert figure is not None
    (axis,) = figure.axes
    lines = lines_of(axis)
    assert lines["FedEx-LoRA"] == [(1, pytest.approx(0.6)), (2, pytest.approx(0.75))]
    assert [line.get_linestyle() for line in axis.get_lines()] == ["-", ":"]
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.75 + statistics.stdev([0.6, 0.9]))
    assert band[:, 1].min() == pytest.approx(0.6 - statistics.stdev([0.5, 0.7]))
    assert axis.get_ylabel() == "validation accuracy\n(share of examples)"
    assert axis.get_xlabel() == "round"
    assert draw_metric_per_round([run_of("fedex", 0, 0.8, rounds=[round_of(1, validation={})])]) is None


def test_deviation_per_round() -> None:
    results = [
        run_of("fedex", 0, 0.8, rounds=[round_of(1, aggregation_error=1e-7), round_of(2, aggregation_error=2e-7)]),
        run_of("fedex", 1, 0.8, rounds=[round_of(1, aggregation_error=3e-7), round_of(2, aggregation_error=math.inf)]),
        run_of("fedit", 0, 0.8, rounds=[round_of(1, aggregation_error=0.2)]),
        run_of("ffa", 0, 0.8, rounds=[round_of(1, aggregation_error=0.0)]),
        run_of("centralized", 0, 0.8),
    ]
    figure = draw_deviation_per_round(results)
    assert figure is not None
    (axis,) = figure.axes
    lines = lines_of(axis)
    assert set(lines) == {
        "FedEx-LoRA, as installed",
        "FedEx-LoRA: FedIT would have lost",
        "FedIT, as installed",
        "FedEx-LoRA, as installed: infinite",
        "FFA-LoRA, as installed: exactly 0",
    }
    assert [x for x, _ in lines["FedEx-LoRA, as installed: infinite"]] == [2]
    assert lines["FedEx-LoRA, as installed"][0] == (1, pytest.approx(2e-7))
    assert math.isnan(lines["FedEx-LoRA, as installed"][1][1])
    first = [y for x, y in axis.collections[0].get_paths()[0].vertices if x == 1]
    assert (min(first), max(first)) == pytest.approx((1e-7, 3e-7))  # the range, not the deviation
    assert lines["FedEx-LoRA: FedIT would have lost"] == [(1, pytest.approx(0.2)), (2, pytest.approx(0.1))]
    assert axis.get_yscale() == "log"
    low, high = axis.get_ylim()
    assert low <= 1e-7
    assert high >= 0.2
    assert draw_deviation_per_round([run_of("centralized", 0, 0.8)]) is None


def layers_of(scale: float) -> dict[str, LayerDeviation]:
    names = {"layer.0.query": 1e-5, "layer.1.query": 2e-5, "layer.10.query": 3e-5, "layer.0.value": 4e-5}
    return {name: LayerDeviation(1e-7, 0.1, scale * value) for name, value in names.items()}


def test_deviation_per_layer() -> None:
    results = [
        run_of("fedit", seed, 0.8, rounds=[round_of(n, layers=layers_of(scale / n)) for n in (1, 2, 4)])
        for seed, scale in enumerate((1.0, 3.0))
    ]
    wrong = replace(results[0], run=replace(results[0].run, method="fedex"), rounds=[round_of(1, layers=layers_of(9))])
    figure = draw_deviation_per_layer([*results, wrong])
    assert figure is not None
    (axis,) = figure.axes
    lines = lines_of(axis)
    assert set(lines) == {f"{kind}, after round {n}" for kind in ("query", "value") for n in (1, 4)}
    assert lines["query, after round 1"] == [
        (0, pytest.approx(2e-5)),
        (1, pytest.approx(4e-5)),
        (10, pytest.approx(6e-5)),
    ]
    assert lines["value, after round 4"] == [(0, pytest.approx(2e-5))]
    chosen = draw_deviation_per_layer([*results, wrong], method="fedex")
    assert chosen is not None
    assert lines_of(chosen.axes[0])["value, after round 1"] == [(0, pytest.approx(36e-5))]
    assert draw_deviation_per_layer(runs_of("fedit", FEDIT)) is None


def test_kinds_of_layers() -> None:
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.v",
        "lm_head",
        "0",
    ]
    assert list(kinds_of(names).values()) == [
        "encoder.SelfAttention.q",
        "decoder.SelfAttention.q",
        "decoder.EncDecAttention.q",
        "v",
        "lm_head",
        "0",
    ]
    assert [figures.depth_of(name) for name in (*names[:2], "lm_head", "h.11.attn.c_attn")] == [0, 0, 0, 11]


def test_deviation_per_local_epochs() -> None:
    results = [
        run_of("fedit", seed, 0.8, epochs=epochs, rounds=[round_of(1, fedit_deviation=value), round_of(2)])
        for epochs, values in ((1.0, (0.1, 0.3)), (3.0, (0.4, 0.8)))
        for seed, value in enumerate(values)
    ]
    figure = draw_deviation_per_local_epochs(results)
    assert figure is not None
    (axis,) = figure.axes
    assert [*axis.get_lines()[0].get_xdata()] == [1, 3]
    assert [*axis.get_lines()[0].get_ydata()] == pytest.approx([0.2, 0.6])
    (bars,) = axis.collections
    low, high = bars.get_segments()[1][:, 1]
    assert high - low == pytest.approx(2 * statistics.stdev([0.4, 0.8]))
    assert "(no unit)" in axis.get_ylabel()
    assert draw_deviation_per_local_epochs(results[:2]) is None


def test_traffic() -> None:
    results = runs_of("fedex", FEDEX) + runs_of("fedit", FEDIT) + runs_of("centralized", FEDEX)
    results[0].rounds[0].bytes_up_per_client = 4000.0  # (4 + 1) kB, and 2 kB for the other seeds: 3 kB
    figure = draw_traffic(results)
    assert figure is not None
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["FedEx-LoRA", "FedIT"]
    assert [patch.get_width() for patch in axis.patches] == pytest.approx([3, 2, 6, 6])
    assert [text.get_text() for text in axis.texts] == ["3 up, 6 down", "2 up, 6 down"]
    assert axis.get_xlabel() == "kB over the whole run (1 kB = 1,000 bytes)"
    assert draw_traffic(runs_of("centralized", FEDEX)) is None


def test_every_method_has_a_look_of_its_own() -> None:
    names = ["fedex", "fedit", "ffa", "centralized", *(f"fedex:residual_rank={rank}" for rank in range(1, 20))]
    styles = styles_of(names)
    assert len({styles[name] for name in names}) == len(names)
    assert styles["fedex"] == styles_of(["fedex"])["fedex"]
    methods = methods_of(
        [run_of(name, 0, 0.5) for name in reversed(["fedex", "fedex:a=1", "fedit", "own", "centralized"])]
    )
    assert methods == ["fedex", "fedex:a=1", "fedit", "own", "centralized"]


# ---- Files ----


def full(epochs: Sequence[float] = (1.0,), tasks: Sequence[str] = ("cola", "sst2")) -> list[RunResult]:
    rounds = [round_of(number, layers=layers_of(1 / number)) for number in (1, 2, 3)]
    return [
        run_of(method, seed, 0.8, task=task, epochs=each, rounds=rounds)
        for method in ("fedex", "fedit", "centralized")
        for task in tasks
        for each in epochs
        for seed in (0, 1)
    ]


def check_picture(path: Path) -> None:
    picture = Image.open(path)
    assert picture.format == "PNG"
    assert min(picture.size) > 300
    assert max(picture.size) < 4000
    assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or ()) > 10  # something is drawn


def test_files(tmp_path: Path) -> None:
    written = write_report(full(), tmp_path / "new")
    names = ["metric_per_round.png", "deviation_per_round.png", "deviation_per_layer.png", "traffic.png"]
    assert [path.name for path in written] == ["results.md", *names]
    text = written[0].read_text(encoding="utf-8")
    assert re.findall(r"!\[.+?\]\((.+?)\)", text) == names
    assert results_markdown(full()) in text
    for path in written[1:]:
        check_picture(path)


def test_files_per_local_epochs(tmp_path: Path) -> None:
    written = write_report(full(epochs=(1.0, 3.0), tasks=("sst2",)), tmp_path)
    per_epochs = [
        f"{name}-epochs-{epochs}.png"
        for epochs in (1, 3)
        for name in ("metric_per_round", "deviation_per_round", "deviation_per_layer")
    ]
    names = ["results.md", *per_epochs, "deviation_per_local_epochs.png", "traffic.png"]
    assert [path.name for path in written] == names
    check_picture(written[-2])


def test_layers_of_many_tasks_are_limited(tmp_path: Path) -> None:
    results = full(tasks=[f"task{number}" for number in range(8)])
    figure = draw_deviation_per_layer(results)
    assert figure is not None
    assert len(figure.axes) == 6
    assert "(first 6 of 8 tasks)" in figure.get_suptitle()
    path = deviation_per_layer(results, tmp_path / "a" / "layers.png")
    assert path == tmp_path / "a" / "layers.png"
    check_picture(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"aggregation_error": 0.0, "fedit_deviation": 0.0},
        {"aggregation_error": math.inf, "fedit_deviation": math.nan, "validation": {"accuracy": math.nan}},
        {"bytes_up_per_client": 0.0, "bytes_down_per_client": 0.0},
    ],
    ids=["zeros", "not finite", "no traffic"],
)
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_odd_numbers_are_drawn(tmp_path: Path, changed: dict[str, Any]) -> None:
    results = [replace(each, rounds=[replace(row, **changed) for row in each.rounds]) for each in full()]
    assert len(write_report(results, tmp_path)) == 5


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the library warns of while the test runs."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = figures.logger.level
    figures.logger.addHandler(handler)
    figures.logger.setLevel(logging.WARNING)
    yield said
    figures.logger.removeHandler(handler)
    figures.logger.setLevel(level)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    for name in ["matplotlib", "matplotlib.figure", *(each for each in sys.modules if each.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    (path,) = write_report(full(), tmp_path)
    assert path.name == "results.md"
    assert "![" not in path.read_text(encoding="utf-8")
    assert len(warnings) == 1
    assert "pip install matplotlib" in warnings[0]


def test_a_plot_that_fails_costs_the_plot_only(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "traffic.png").mkdir()  # cannot be written
    written = write_report(full(), tmp_path)
    assert [path.name for path in written][-1] == "deviation_per_layer.png"
    assert len(warnings) == 1
    assert "`traffic.png` could not be drawn" in warnings[0]


def test_results_survive_json() -> None:
    results = full()
    assert results_markdown([RunResult.from_json(asdict(each)) for each in results]) == results_markdown(results)
