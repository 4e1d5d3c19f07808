"""The traffic benchmark: its formulas against whole updates of tiny models, and its count of the paper's Table 8."""

from pathlib import Path

import pytest
import tiny
import torch
import traffic
import traffic_paper
from peft import LoraConfig, get_peft_model
from traffic_models import Case, Layer, build, read
from traffic_paper import PRINTED, Counting, Sent, implied, ratios

from fedex_hf import ClientUpdate, LowRankDelta
from fedex_hf.base_model import AdaptedModel
from fedex_hf.updates import payload_bytes


PAGE = Path(__file__).parents[1] / "docs/benchmarks/traffic.md"
RANK = 7  # five clients' residual then passes the smaller side, 16, of Llama's key and value
MODELS = {
    "roberta": (tiny.roberta, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "gpt2": (tiny.gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama": (
        tiny.llama,
        {"task_type": "CAUSAL_LM", "target_modules": traffic.CASES["Llama-3.2-3B"].lora["target_modules"]},
    ),
}


def wrapped(name, dtype=torch.float32):
    make, lora = MODELS[name]
    return get_peft_model(make().to(dtype), LoraConfig(**lora, r=RANK), autocast_adapter_dtype=dtype == torch.float32)


def updates_of(model, method, clients):
    """Whole updates, head included, of clients that have trained."""
    state = AdaptedModel(model, changes_base=True).read()
    generator = torch.Generator().manual_seed(clients)

    def moved(tensor):
        return tensor + torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    def trained(delta):
        A = delta.A if method == traffic.FFA else moved(delta.A)
        return LowRankDelta(A, moved(delta.B), delta.scaling)

    return [
        ClientUpdate(
            f"client-{client}",
            1,
            1,
            {layer: trained(delta) for layer, delta in state.adapters.items()},
            {name: moved(tensor) for name, tensor in state.tensors.items()},
        )
        for client in range(clients)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clients", [2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_formula_is_what_the_aggregators_send(name, clients, dtype):
    model = wrapped(name, dtype)
    counted = read(model)
    others = set(traffic.METHODS) - {traffic.FULL}
    for method, make in traffic.OURS.items():
        aggregator = make(RANK)
        updates = updates_of(model, method, clients)
        update = aggregator.aggregate(updates, range(1, clients + 1))
        sent = payload_bytes(updates[0], aggregator.trained_factors)
        returned = payload_bytes(update, aggregator.returned_factors)
        totals = {
            each: counted.total(lambda layer, each=each: traffic.formula(each, layer, clients)) for each in others
        }
        assert totals[method] == (sent, returned)
        assert traffic.count(method, counted, clients) == (sent, returned)
        for twin in (traffic.DENSE, traffic.PAPER):  # a check that could not fail would take these too
            assert totals[twin] != (sent, returned)


def test_formula_of_what_others_send():
    """By hand: 3 clients, a layer of 6 outputs and 5 inputs, rank 2, with 22 numbers in an adapter."""
    layer = Layer(6, 5, 2, torch.float32)
    assert traffic.formula(traffic.PAPER, layer, 3) == (4 * 22, 4 * (22 + 3 * 22))
    assert traffic.formula(traffic.DENSE, layer, 3) == (4 * 22, 4 * (22 + 30))
    assert traffic.formula(traffic.FLORA, layer, 3) == (4 * 22, 4 * 3 * 22)
    assert traffic.formula(traffic.EXACT, layer, 3) == (4 * 22, 4 * (22 + 2 * 22))
    assert traffic.formula(traffic.EXACT, layer, 50) == (4 * 22, 4 * (22 + 5 * 11))
    half = Layer(6, 5, 2, torch.bfloat16)
    assert traffic.formula(traffic.FLORA, half, 3) == (2 * 22, 2 * 3 * 22)
    assert traffic.formula(traffic.DENSE, half, 3) == (2 * 22, 2 * 22 + 4 * 30)


def test_count_refuses_a_wrong_formula(monkeypatch):
    monkeypatch.setattr(traffic, "formula", lambda method, layer, clients: (88, 88 + layer.dense))
    with pytest.raises(RuntimeError, match=r"FedEx-LoRA with 3 clients.*\(88, 264\).*\(88, 208\).*mended"):
        traffic.count(traffic.EXACT, traffic.Traffic({Layer(6, 5, 2, torch.float32): 1}, 0, 0), 3)


@pytest.mark.parametrize("name", MODELS)
def test_read_counts_every_parameter_once(name):
    plain, counted = MODELS[name][0](), read(wrapped(name))
    assert counted.model == 4 * plain.num_parameters()
    head = sum(each.numel() for key, each in plain.named_parameters() if key.startswith("classifier."))
    assert counted.head == 4 * head
    assert (head > 0) == (name == "roberta")
    assert counted == read(build(Case(plain.config, MODELS[name][1], (RANK,)), RANK))  # without weights


def test_factors_without_weights_have_the_dtype_of_real_ones():
    config, lora = tiny.llama().config, MODELS["llama"][1]
    for case, dtype in (
        (Case(config, lora, (RANK,), torch.bfloat16), torch.float32),
        (Case(config, lora, (RANK,), torch.bfloat16, autocast=False), torch.bfloat16),
    ):
        real = get_peft_model(
            tiny.llama().to(torch.bfloat16), LoraConfig(**lora, r=RANK), autocast_adapter_dtype=case.autocast
        )
        assert read(build(case, RANK)) == read(real)
        assert {layer.dtype for layer in read(real).layers} == {dtype}


# ---- The paper's Table 8 ----


def test_ratios_by_hand():
    """100 parameters, an adapter of 3 + 2, a head of 1, five rounds."""
    sent = Sent(model=100, A=3, B=2, head=1)
    assert ratios(sent, Counting()) == pytest.approx((1100 / 235, 160 / 235, 130 / 235))
    assert ratios(sent, Counting(residual=2, download=False)) == pytest.approx((1000 / 110, 60 / 110, 30 / 110))
    assert ratios(sent, Counting(head=False, adapters=2)) == pytest.approx((1100 / 350, 200 / 350, 140 / 350))
    down = ratios(sent, Counting(transfers=(0, 5)))
    assert down == pytest.approx((600 / 205, 130 / 205, 115 / 205))
    assert ratios(sent, Counting(transfers=(5, 0))) == pytest.approx((600 / 130, 1, 115 / 130))


def test_implied_turns_the_formula_around():
    sent = Sent(model=1_000_000, A=3000, B=2000, head=700)
    assert implied(ratios(sent, Counting()), sent.model) == pytest.approx((5000, 3000, 700))
    tight = implied(ratios(sent, Counting(residual=2)), sent.model)
    assert tight != pytest.approx((5000, 3000, 700), rel=0.1)
    for value, (low, high) in zip(
        implied((9.0, 0.95, 0.93), 1000), traffic_paper.implied_ranges((9.0, 0.95, 0.93), 1000)
    ):
        assert low < value < high


def test_what_the_page_says_of_table_8():
    off, targets, how, values = traffic_paper.closest("RoBERTa-large", traffic.sent)[0]
    assert (targets, how) == ("query, value", Counting())
    assert off < 0.001
    assert [f"{value:.3f}" for value in values[1:]] == [f"{value:.3f}" for value in PRINTED["RoBERTa-large"][1:]]
    twice = ratios(traffic.sent("RoBERTa-large", ["query", "value"]), Counting(adapters=2))
    assert traffic_paper.distance(twice, PRINTED["RoBERTa-large"]) == pytest.approx(0.025, abs=5e-4)

    tried = traffic_paper.closest("GPT-2", traffic.sent)
    off, targets, how, values = tried[0]
    assert (targets, how) == ("c_attn, c_proj", Counting(head=False, adapters=2))
    assert off < 0.002
    assert all(f"{value:.3f}" != f"{want:.3f}" for value, want in zip(values, PRINTED["GPT-2"]))
    assert min(each for each, _, how, _ in tried if how.adapters != 2) > 0.02

    tried = traffic_paper.closest("RoBERTa-base", traffic.sent)
    assert tried[0][0] > 0.1
    three, four = (traffic.sent("RoBERTa-base", targets) for targets in traffic_paper.TARGETS["RoBERTa-base"][1:3])
    adapter, _, head = traffic_paper.implied_ranges(PRINTED["RoBERTa-base"], three.model)
    assert three.A + three.B < adapter[0] < adapter[1] < four.A + four.B
    assert 10 * three.head < head[0]


def test_writes_a_page(tmp_path, monkeypatch, capsys):
    case = Case(tiny.roberta().config, MODELS["roberta"][1], (4,))
    small = Case(tiny.gpt2().config, MODELS["gpt2"][1], (4,))
    monkeypatch.setattr(traffic, "CASES", {"tiny": case})
    monkeypatch.setattr(traffic, "PAPER_CASES", {"RoBERTa-base": case, "RoBERTa-large": case, "GPT-2": small})
    monkeypatch.setattr("sys.argv", ["traffic.py", "--clients", "12", "3", "--output", str(tmp_path)])
    traffic.main()
    page = (tmp_path / "traffic.md").read_text()
    assert "| method | by | up | down, k = 3 | down, k = 12 |" in page
    assert "| tiny, r = 4 | 12 | 4 of 32 x 32 | 44 | 32 |" in page  # compressed
    for method in traffic.METHODS:
        assert f"\n| {method} | {'aggregator' if method in traffic.OURS else 'formula'} | " in page
    assert page.strip() in capsys.readouterr().out


def test_refuses_one_client():
    with pytest.raises(ValueError, match=r"`clients=\[1, 3\]`.*Allowed"):
        traffic.BenchmarkArguments(clients=[1, 3])


def test_the_published_page_is_what_is_counted():
    """Without the aggregators, which the script itself holds against the formula."""
    page = PAGE.read_text()
    for name, case in traffic.CASES.items():
        for rank in case.ranks:
            _, _, rest = page.partition(f"## {name}, r = {rank}\n")
            lines = rest.partition("\n## ")[0].splitlines()
            counted = read(build(case, rank))
            for method in set(traffic.METHODS) - {traffic.FULL}:
                totals = [
                    counted.total(lambda layer, k=k, method=method: traffic.formula(method, layer, k))
                    for k in (3, 10, 50)
                ]
                cells = [f"{value / 1e6:,.2f}" for value in (totals[0][0], *(down for _, down in totals))]
                by = "aggregator" if method in traffic.OURS else "formula"
                assert f"| {' | '.join([method, by, *cells])} |" in lines
