"""A federation on Flower: the numbers of one process, only factors on the way, and rounds that survive bad clients."""

from __future__ import annotations

import logging
import math
import random
import re
import shutil
from typing import Any

import numpy as np
import pytest
import tiny
import torch


pytest.importorskip("flwr")

from flower_lab import Lab, LocalGrid, WithoutTheSecond, same
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from hub import run_python, running_hub
from peft import get_peft_model
from programs import untraced
from transformers import EarlyStoppingCallback

from fedex_hf import FederatedTrainer, FFALoRAAggregator, Ledger
from fedex_hf.checkpoint import checkpoints_in
from fedex_hf.flower import FedExStrategy, wire
from fedex_hf.updates import payload_bytes


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What Flower's logger was told."""
    caplog.set_level(logging.INFO, logger="flwr")
    return caplog


def counts(strategy: FedExStrategy) -> list[int]:
    """Clients whose update counted, round by round."""
    return [entry["num_clients"] for entry in strategy.trainer.state.log_history if "num_clients" in entry]


@pytest.fixture(scope="module")
def without_the_second(tmp_path_factory: pytest.TempPathFactory) -> FederatedTrainer:
    """What one process does where `client-1` takes no part in round 2, with the lab's own settings."""
    return Lab(tmp_path_factory.mktemp("reference")).in_process(cls=WithoutTheSecond)


def warnings_of(told: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in told.records if record.levelno >= logging.WARNING)


# ---- The same numbers ----


def bf16_llama():
    model = tiny.llama().to(torch.bfloat16)
    torch.manual_seed(0)
    return get_peft_model(
        model, tiny.lora(task_type="CAUSAL_LM", target_modules="all-linear"), autocast_adapter_dtype=False
    )


LANGUAGE = {"data": tiny.language_data}
CASES: dict[str, dict[str, Any]] = {
    "fedex": {},
    "fedit": {"aggregator": "fedit"},
    "ffa": {"aggregator": "ffa"},
    "reinitialise": {"aggregator_kwargs": {"assignment": "reinitialise"}},
    "truncated": {"aggregator_kwargs": {"residual_rank": 2}, "residual_rank": 4},
    "sampled": {"client_fraction": 0.67, "num_rounds": 4},
    "uniform, one schedule": {"client_weighting": "uniform", "lr_schedule": "run", "data_seed": 3},
    "ranks": {"client_ranks": {"client-0": 2, "client-2": 7}},
    "a start in the base": {"peft_config": lambda: tiny.lora(init_lora_weights="pissa")},
    "bf16": {"model": bf16_llama, "peft_config": None, **LANGUAGE},
    "Conv1D": {
        "model": tiny.gpt2,
        "peft_config": lambda: tiny.lora(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True),
        **LANGUAGE,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_rounds_over_flower_are_those_of_one_process_bit_for_bit(case, tmp_path):
    lab = Lab(tmp_path, **CASES[case])
    strategy = lab.strategy()
    strategy.start(lab.grid())
    reference = lab.in_process()
    assert same(strategy.trainer, reference)
    assert strategy.trainer.base_version == reference.base_version
    last = lab.clients[-1]  # it has trained on the base of the round before, and was told no more than that
    changes = strategy.trainer.aggregator.changes_base
    assert (last.base_version == reference.base_version) != changes


def test_logs_certificate_and_steps_are_those_of_one_process(tmp_path):
    lab = Lab(tmp_path, logging_steps=2)
    strategy = lab.strategy()
    strategy.start(lab.grid())
    reference = lab.in_process()

    def rounds(trainer: FederatedTrainer) -> list[dict[str, float]]:
        apart = ("round_seconds", "bytes_sent", "bytes_received")
        entries = [entry for entry in trainer.state.log_history if "aggregation_error" in entry]
        return [{name: value for name, value in entry.items() if name not in apart} for entry in entries]

    remote, local = rounds(strategy.trainer), rounds(reference)
    losses = [[entry.pop("train_loss") for entry in entries] for entries in (remote, local)]
    assert remote == local
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # summed between logs, which come at other steps
    certificates = [(entry["aggregation_error"], entry["fedit_deviation"]) for entry in remote]
    assert strategy.trainer.state.global_step == strategy.trainer.state.max_steps == reference.state.global_step
    assert max(error for error, _ in certificates) < 1e-5
    assert min(fedit for _, fedit in certificates) > 1e-3  # FedIT would not pass


def test_another_seed_at_the_clients_gives_another_model(tmp_path):
    """The twin: equality is no matter of course."""
    lab, other = Lab(tmp_path / "a"), Lab(tmp_path / "b", seed=8)
    strategy, different = lab.strategy(), other.strategy()
    strategy.start(lab.grid())
    different.start(other.grid())
    assert not same(strategy.trainer, different.trainer)


# ---- What travels ----


def test_only_factors_travel_and_their_bytes_are_counted(tmp_path):
    lab = Lab(tmp_path)
    strategy, grid = lab.strategy(), lab.grid()
    strategy.start(grid)
    entries = [entry for entry in strategy.trainer.state.log_history if "bytes_sent" in entry]
    headers = 200  # of one tensor
    reference = lab.in_process()
    update = reference.fit_client("client-0", 4)
    up = payload_bytes(update)
    for number, entry in enumerate(entries, start=1):
        sent = [message for message in grid.sent if message.metadata.group_id == str(number)]
        assert entry["bytes_sent"] == sum(wire.nbytes(message.content) for message in sent)
        assert 3 * up < entry["bytes_received"] < 3 * (up + headers * 2 * len(update.adapters) + headers * 8)
    dense = 32 * 32 * 4
    messages = [message for message in (*grid.sent, *grid.received) if message.has_content()]
    arrays = {
        (message.metadata.message_type, record, key): array
        for message in messages
        for record, arrays in message.content.array_records.items()
        for key, array in arrays.items()
    }
    factors = {key: array for key, array in arrays.items() if not key[2].startswith("tensors/")}
    assert all(min(array.shape) <= (3 - 1) * 4 for array in factors.values())
    assert max(len(array.data) for array in factors.values()) < dense
    residual = [array.shape for key, array in factors.items() if key[1] == wire.RESIDUALS and "/A/" in key[2]]
    assert residual
    assert {shape[0] for shape in residual} == {8}


def test_the_log_tells_what_other_methods_would_send(tmp_path, told):
    lab = Lab(tmp_path, num_rounds=2)
    strategy = lab.strategy()
    strategy.start(lab.grid())
    [line] = [each for each in told.messages if each.startswith("Round 2, MB per client")]
    numbers = {
        name: (float(up), float(down))
        for name, up, down in re.findall(r"(here|FedIT|FLoRA|tuning) ([\d.]+) and ([\d.]+)", line)
    }
    layers, factors, head = 4, 2 * 4 * 32 * 4, (32 * 32 + 32 + 32 * 3 + 3) * 4  # float32, r = 4, 32 x 32
    plain = tiny.roberta()
    expected = {
        "FedIT": (layers * factors + head,) * 2,
        "FLoRA": (layers * factors + head, 3 * layers * factors + head),
        # PEFT keeps the untrained head beside the trained one.
        "tuning": (sum(each.nbytes for each in plain.parameters()) + head,) * 2,
    }
    for name, (up, down) in expected.items():
        assert numbers[name] == pytest.approx((up / 1e6, down / 1e6), abs=6e-4), name
    headers = 200 * (2 * layers + 4)
    assert numbers["here"][0] == pytest.approx(expected["FedIT"][0] / 1e6, abs=(headers + 600) / 1e6)
    residuals = 2 * layers * factors  # of rank (k - 1) r = 8
    assert numbers["here"][1] == pytest.approx((expected["FedIT"][1] + residuals) / 1e6, abs=(2 * headers + 600) / 1e6)


HUB_RUN = """
import pathlib, sys
from flower_lab import Lab, same
folder = pathlib.Path(sys.argv[1])
lab = Lab(folder, num_rounds=2, push_to_hub=True, hub_model_id="user/flower")
strategy = lab.strategy()
strategy.start(lab.grid())
lab.arguments["hub_model_id"] = "user/local"
assert same(strategy.trainer, lab.in_process())
"""


def test_rounds_go_to_the_hub_as_from_one_process(tmp_path):
    with running_hub(tmp_path / "hub") as hub:
        run_python(HUB_RUN, untraced(hub.environment(tmp_path / "home")), str(tmp_path))
        found = {}
        for repo in ("user/flower", "user/local"):
            assert sorted(hub.refs(repo)["tags"]) == ["round-1", "round-2"]
            for tag in hub.refs(repo)["tags"]:
                files = hub.files(repo, tag)
                found[repo, tag] = {
                    name: entry["lfs"] for name, entry in files.items() if name.endswith(".safetensors")
                }
    assert len(found["user/flower", "round-2"]) >= 3
    for tag in ("round-1", "round-2"):
        assert found["user/flower", tag] == found["user/local", tag]
    assert found["user/flower", "round-1"] != found["user/flower", "round-2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_travels_bit_for_bit(dtype):
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    back = wire.from_array(wire.to_array(tensor.T), (3, 5), dtype)
    assert back.dtype == dtype
    assert torch.equal(back, tensor.T)


def test_bfloat16_would_not_survive_a_cast_of_float16():
    tensor = torch.tensor([1e-30, 3e38]).to(torch.bfloat16)
    assert torch.equal(wire.from_array(wire.to_array(tensor), (2,), torch.bfloat16), tensor)
    assert not torch.equal(tensor.half().to(torch.bfloat16), tensor)


# ---- Clients that are away, slow, broken or lying ----


def test_a_client_that_was_away_catches_up(tmp_path, told):
    lab = Lab(tmp_path, num_rounds=4)
    strategy, grid = lab.strategy(min_clients=2), lab.grid()
    app = grid.apps[101]

    def leave(node_id: int, reply: Message) -> Message:
        if reply.metadata.group_id == "1" and node_id == 102:  # the last of round 1
            del grid.apps[101]
        if reply.metadata.group_id == "2" and node_id == 102:
            grid.apps[777] = app  # restarted: the same client behind another node
        return reply

    grid.tamper = leave
    strategy.start(grid)
    assert same(strategy.trainer, lab.in_process(cls=WithoutTheSecond))
    assert "Left out, because they are not connected: client-1" in warnings_of(told)
    assert not same(strategy.trainer, lab.in_process("all"))


def nan(reply: Message) -> None:
    arrays = reply.content.array_records[wire.ARRAYS]
    key = next(iter(arrays))
    values = arrays[key].numpy().copy()
    values[0, 0] = float("nan")
    arrays[key] = Array(values)


def with_array(change: Any) -> Any:
    def tamper(reply: Message) -> None:
        arrays = reply.content.array_records[wire.ARRAYS]
        key = next(iter(arrays))
        arrays[key] = change(arrays[key])

    return tamper


def with_records(**changed: Any) -> Any:
    def tamper(reply: Message) -> None:
        for record in (wire.CONFIG, wire.METRICS):
            for key in [key for key in changed if key in reply.content[record]]:
                reply.content[record][key] = changed[key]

    return tamper


def without(record: str, key: str) -> Any:
    def tamper(reply: Message) -> None:
        del reply.content[record][key]

    return tamper


def extra(reply: Message) -> None:
    reply.content.array_records[wire.ARRAYS]["A/unknown"] = wire.to_array(torch.zeros(4, 4))


def no_arrays(reply: Message) -> None:
    del reply.content[wire.ARRAYS]


def declared(array: Array, **fields: Any) -> Array:
    given = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | fields
    return Array(**given)


LAYER = "A/base_model.model.roberta.encoder.layer.0.attention.self.query"
BAD_REPLIES = {
    "NaN": (nan, "NaN or Inf"),
    "another shape": (with_array(lambda array: Array(array.numpy()[:, :-1].copy())), "is expected"),
    "transposed": (with_array(lambda array: Array(array.numpy().T.copy())), "of shape"),
    "another dtype": (with_array(lambda array: Array(array.numpy().astype("float64"))), "float64 of shape"),
    "integers": (with_array(lambda array: Array(array.numpy().view("int32"))), "int32"),
    "far too large": (with_array(lambda array: Array(torch.zeros(2048, 2048).numpy())), "bytes came where"),
    "no array": (with_array(lambda array: declared(array, data=b"x" * len(array.data))), "does not fit"),
    "a pickle": (with_array(lambda array: declared(array, stype="pickle")), "does not fit"),
    "a missing layer": (without(wire.ARRAYS, LAYER), "missing"),
    "an unknown layer": (extra, "unknown"),
    "nothing": (no_arrays, "missing"),
    "another round": (with_records(round=7), "was asked for"),
    "another client's name": (with_records(**{"client-id": "client-0"}), "was asked for"),
    "another base": (with_records(**{"base-version": "0" * 64}), "was asked for"),
    "no examples": (with_records(**{"num-examples": 0}), "num-examples=0"),
    "numbers too large": (with_array(lambda array: Array(array.numpy() * 0 + 1e38)), "does not fit a float32"),
    "infinite loss": (with_records(train_loss=float("inf")), "train_loss=inf"),
    "no steps": (without(wire.METRICS, "steps"), "steps=None"),
}


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_update_is_left_out_and_the_others_count(kind, tmp_path, told, without_the_second):
    tamper, message = BAD_REPLIES[kind]

    def deliver(node_id: int, reply: Message) -> Message:
        if node_id == 101 and reply.metadata.group_id == "2":
            tamper(reply)
        return reply

    lab = Lab(tmp_path)
    strategy = lab.strategy(min_clients=2)
    strategy.start(lab.grid(tamper=deliver))
    assert same(strategy.trainer, without_the_second)
    assert "Round 2: client `client-1` is left out: " in warnings_of(told)
    assert message in warnings_of(told)
    assert counts(strategy) == [3, 2, 3]


def test_clients_that_raise_or_do_not_answer_are_left_out(tmp_path, told):
    lab = Lab(tmp_path)
    grid = lab.grid()

    def deliver(node_id: int, reply: Message) -> Message | None:
        if (node_id, reply.metadata.group_id) == (101, "2"):
            return None
        return reply

    def broken(message: Message, context: Any) -> Message:
        if message.metadata.group_id == "3":
            raise ZeroDivisionError("bad data")
        return app(message, context)

    app, grid.apps[102], grid.tamper = grid.apps[102], broken, deliver
    strategy = lab.strategy(min_clients=2, timeout=5.0)
    strategy.start(grid)
    assert "client `client-1` is left out: no answer in time" in warnings_of(told)
    assert "client `client-2` is left out: <class 'ZeroDivisionError'>:<'bad data'>" in warnings_of(told)
    assert counts(strategy) == [3, 2, 2]


def test_too_few_clients_stop_the_run_which_then_goes_on_from_its_checkpoint(tmp_path, told):
    lab = Lab(tmp_path, save_strategy="epoch")
    grid = lab.grid(tamper=lambda node_id, reply: None if reply.metadata.group_id == "3" and node_id != 100 else reply)
    with pytest.raises(RuntimeError, match=r"Round 3: 1 of 3 clients sent an update, fewer than `min_clients=2`"):
        lab.strategy(min_clients=2, timeout=2.0).start(grid)
    restarted = lab.strategy(min_clients=2, resume_from_checkpoint=True)
    restarted.start(lab.grid())
    assert same(restarted.trainer, lab.in_process())


def test_clients_that_are_ahead_of_a_resumed_server_go_back(tmp_path):
    lab = Lab(tmp_path, save_strategy="epoch")
    first = lab.strategy()
    first.start(lab.grid())
    for path in checkpoints_in(tmp_path / "server")[1:]:
        shutil.rmtree(path)
    grid, resumed = lab.grid(), lab.strategy(resume_from_checkpoint=True)
    resumed.start(grid)
    assert [message.metadata.group_id for message in grid.sent[3:]] == ["2"] * 3 + ["3"] * 3
    assert same(resumed.trainer, first.trainer)


def test_a_client_with_a_damaged_disk_is_sent_the_whole_ledger(tmp_path, told):
    lab = Lab(tmp_path, num_rounds=2, save_strategy="epoch")
    lab.strategy().start(lab.grid())
    ledger = tmp_path / "clients" / "flower" / "client-0" / "ledger.safetensors"
    ledger.write_bytes(b"damaged")
    longer = Lab(tmp_path, num_rounds=4, save_strategy="epoch")
    strategy = longer.strategy(resume_from_checkpoint=True)
    strategy.start(longer.grid())
    assert "ledger.safetensors` is not used" in warnings_of(told)
    assert same(strategy.trainer, longer.in_process("reference"))


# ---- Who is who ----


def refused(lab: Lab, told: pytest.LogCaptureFixture, **changed: Any) -> str:
    """What the log says of `client-1`, who is different, while the other two train."""
    grid = lab.grid()
    grid.apps[101] = lab.app("client-1", **changed)
    strategy = lab.strategy(min_clients=2)
    strategy.start(grid)
    assert counts(strategy) == [2, 2, 2]
    return warnings_of(told)


@pytest.mark.parametrize("settings", ["1", "null", "[1]", "{}", "[" * 100_000, "no JSON"])
def test_a_node_that_describes_itself_badly_is_turned_away(settings, tmp_path, told):
    def deliver(node_id: int, reply: Message) -> Message:
        if (node_id, reply.metadata.message_type) == (101, "query"):
            reply.content[wire.CONFIG]["settings"] = settings
        return reply

    lab = Lab(tmp_path)
    strategy = lab.strategy(min_clients=2)
    strategy.start(lab.grid(tamper=deliver))
    assert counts(strategy) == [2, 2, 2]
    assert "Node 101 is turned away" in warnings_of(told)
    assert max(len(line) for line in warnings_of(told).splitlines()) < 1200


def test_a_silent_node_delays_nobody(tmp_path):
    lab = Lab(tmp_path)
    grid = lab.grid(tamper=lambda node_id, reply: None if node_id == 7 else reply)
    grid.apps[7] = grid.apps[100]
    strategy = lab.strategy(timeout=10_000.0)  # which the run would have to wait
    strategy.start(grid)
    assert same(strategy.trainer, lab.in_process())


def test_a_reply_that_cannot_be_read_costs_only_its_sender(tmp_path, told, without_the_second):
    class Torn(LocalGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            if any((each.metadata.src_node_id, each.metadata.group_id) == (101, "2") for each in replies):
                raise TypeError("an object that cannot be inflated")
            return replies

    lab = Lab(tmp_path)
    strategy = lab.strategy(min_clients=2)
    strategy.start(Torn(lab.grid().apps, lambda node_id, reply: sent_by(node_id, reply)))
    assert "client `client-1` is left out: its reply cannot be read: TypeError" in warnings_of(told)
    assert same(strategy.trainer, without_the_second)


def sent_by(node_id: int, reply: Message) -> Message:
    reply.metadata.__dict__["_src_node_id"] = node_id
    return reply


def test_a_message_that_flower_does_not_take_is_named(tmp_path, told, without_the_second):
    class Full(LocalGrid):
        def push_messages(self, messages):
            [message] = messages
            far = (message.metadata.dst_node_id, message.metadata.group_id) == (101, "2")
            return [""] if far else super().push_messages([message])

    lab = Lab(tmp_path)
    strategy = lab.strategy(min_clients=2)
    strategy.start(Full(lab.grid().apps))
    assert "client `client-1` is left out: Flower did not take the message for it" in warnings_of(told)
    assert same(strategy.trainer, without_the_second)


def test_too_few_connected_clients_end_the_wait(tmp_path):
    lab = Lab(tmp_path)
    grid = lab.grid()
    del grid.apps[101], grid.apps[102]
    with pytest.raises(RuntimeError, match=r"1 of 3 clients are connected after \d+ s, fewer than `min_clients=2`"):
        lab.strategy(min_clients=2, timeout=1.0).start(grid)


def test_a_machine_that_rounds_differently_is_sent_the_whole_ledger(tmp_path, told, monkeypatch):
    lab = Lab(tmp_path, num_rounds=4)
    grid, plus = lab.grid(), Ledger.plus
    app = grid.apps[101]

    def off(self, residuals, *args, **kwargs):
        ledger = plus(self, residuals, *args, **kwargs)
        for delta in ledger.factors.values():
            delta.A.mul_(1 + 1e-6)
        return ledger

    def other_machine(message: Message, context: Any) -> Message:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "plus", off)
            return app(message, context)

    grid.apps[101] = other_machine
    strategy = lab.strategy(min_clients=2)
    strategy.start(grid)
    assert "LedgerMismatchError" in warnings_of(told)
    assert counts(strategy)[2:] == [3, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"says": "mallory"}, "which is no client of this federation"),
        ({"says": "client-0"}, "`client-0` is connected already, as node 100"),
        ({"seed": 9}, "seed is 9 at `client-1` and 7 on the server"),
        ({"lr_schedule": "run"}, "lr_schedule is run at `client-1` and round on the server"),
        ({"aggregator": "fedit"}, "`name` is fedit at `client-1` and fedex on the server"),
    ],
)
def test_a_node_that_does_not_belong_is_turned_away(changed, message, tmp_path, told):
    assert message in refused(Lab(tmp_path), told, **changed)


def test_other_base_weights_are_noticed_before_training(tmp_path, told):
    lab = Lab(tmp_path)
    app = Lab(tmp_path / "other", model=lambda: tiny.roberta(seed=1)).app("client-1")
    grid = lab.grid()
    grid.apps[101] = app
    lab.strategy(min_clients=2).start(grid)
    assert "base weights (sha256) is" in warnings_of(told)


def test_a_registered_name_binds_its_node(tmp_path, told):
    lab = Lab(tmp_path)
    grid = lab.grid(names={100: "client-0", 101: "client-2", 102: "client-2"})
    strategy = lab.strategy(min_clients=2)
    strategy.start(grid)
    assert "Node 101 is turned away: it is registered as 'client-2' and says that it is 'client-1'" in warnings_of(
        told
    )
    assert counts(strategy) == [2, 2, 2]


def test_where_names_are_registered_a_node_without_one_is_turned_away(tmp_path, told):
    lab = Lab(tmp_path)
    lab.strategy(min_clients=2).start(lab.grid(names={100: "client-0", 102: "client-2"}))
    assert "Node 101 is turned away: it is registered as '' and says that it is 'client-1'" in warnings_of(told)


# ---- Evaluation ----


def test_clients_evaluate_the_global_model(tmp_path):
    lab = Lab(tmp_path, num_rounds=2, eval_strategy="epoch")
    strategy = lab.strategy()
    strategy.start(lab.grid())
    reference = Lab(tmp_path, num_rounds=2).in_process()
    losses = [entry for entry in strategy.trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_num_clients"] for entry in losses] == [3, 3]
    assert losses[-1]["eval_loss"] == pytest.approx(
        reference.evaluate(tiny.classification_data(8, seed=58))["eval_loss"]
    )


def test_server_and_clients_evaluate_side_by_side(tmp_path):
    lab = Lab(tmp_path, num_rounds=2, eval_strategy="epoch")
    strategy = lab.strategy(eval_dataset=tiny.classification_data(20, seed=1), evaluate_on_clients=True)
    result = strategy.start(lab.grid())
    entries = [
        {**left, **right}
        for left, right in zip(strategy.trainer.state.log_history, strategy.trainer.state.log_history[1:])
    ]
    assert any("eval_loss" in entry and "eval_clients_loss" in entry for entry in entries)
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert set(result.train_metrics_clientapp) == {1, 2}


EVALUATIONS = {
    "NaN": with_records(eval_loss=float("nan")),
    "another base": with_records(**{"base-version": "0" * 64}),
    "another round": with_records(round=9),
    "no loss": without(wire.METRICS, "eval_loss"),
    "no examples": with_records(**{"num-examples": 0}),
}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_a_bad_evaluation_is_left_out(kind, tmp_path, told):
    def deliver(node_id: int, reply: Message) -> Message:
        if node_id == 101 and reply.metadata.message_type == "evaluate":
            EVALUATIONS[kind](reply)
        return reply

    lab = Lab(tmp_path, num_rounds=2, eval_strategy="epoch", save_strategy="epoch")
    strategy = lab.strategy(load_best_model_at_end=True)
    strategy.start(lab.grid(tamper=deliver))
    losses = [entry for entry in strategy.trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_num_clients"] for entry in losses] == [2, 2]
    assert all(math.isfinite(entry["eval_loss"]) for entry in losses)
    assert warnings_of(told).count("client `client-1` is left out") == 2


def test_a_round_that_nobody_evaluates_is_not_the_best(tmp_path, told):
    lab = Lab(tmp_path, num_rounds=2, eval_strategy="epoch", save_strategy="epoch")
    silent = ("evaluate", "2")
    strategy = lab.strategy(load_best_model_at_end=True, timeout=2.0)
    grid = lab.grid(
        tamper=lambda _, reply: None if (reply.metadata.message_type, reply.metadata.group_id) == silent else reply
    )
    strategy.start(grid)
    assert "Round 2: no `eval_loss` from any client" in warnings_of(told)
    assert strategy.trainer.federation.round == 1


def test_early_stopping_sees_the_clients_metrics(tmp_path):
    lab = Lab(tmp_path, num_rounds=6, eval_strategy="epoch", save_strategy="epoch")
    strategy = lab.strategy(
        eval_dataset=tiny.classification_data(20, seed=1),
        evaluate_on_clients=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)],
        load_best_model_at_end=True,
        metric_for_best_model="eval_clients_loss",
    )
    strategy.start(lab.grid())
    assert len(counts(strategy)) == 2


# ---- Mods ----


def test_local_differential_privacy_composes(tmp_path):
    plain, noisy = Lab(tmp_path / "plain", num_rounds=2), Lab(tmp_path / "noisy", num_rounds=2)
    mod = LocalDpMod(clipping_norm=1e6, sensitivity=1e-3, epsilon=1.0, delta=1e-5)
    grid = LocalGrid({100 + index: noisy.app(name, mods=(mod,)) for index, name in enumerate(noisy.data)})
    strategy, reference = noisy.strategy(), plain.in_process()
    torch.manual_seed(0)
    strategy.start(grid)
    assert counts(strategy) == [3, 3]
    assert not same(strategy.trainer, reference)
    # Aggregation of what arrived stays exact: the noise is the clients', not the server's.
    assert max(e["aggregation_error"] for e in strategy.trainer.state.log_history if "aggregation_error" in e) < 1e-5


def test_the_noise_of_clients_is_their_own_and_new_in_every_round(tmp_path):
    """A trainer sets the run's seed, which the server knows: noise drawn from that would hide nothing."""
    drawn = []

    def draw(message: Message, context: Any, call_next: Any) -> Message:
        before, reply = np.random.normal(size=8), call_next(message, context)
        after = np.random.normal(size=8), torch.randn(8).numpy(), [random.random() for _ in range(8)]
        drawn.append(np.stack([before, *after]))
        return reply

    lab = Lab(tmp_path, num_rounds=2)
    for _ in range(2):
        lab.strategy().start(LocalGrid({100 + index: lab.app(name, (draw,)) for index, name in enumerate(lab.data)}))
    noise = np.stack(drawn)
    np.random.seed(7)  # the run's
    known = np.random.normal(size=8)
    assert len(noise) == 12
    for source in noise.transpose(1, 0, 2):
        differences = np.abs(source[:, None] - source[None]).max(-1)
        assert differences[~np.eye(12, dtype=bool)].min() > 1e-3
        assert np.abs(source - known).max(-1).min() > 1e-3


def test_clipping_takes_its_norm_from_the_server(tmp_path):
    lab = Lab(tmp_path, num_rounds=1)
    grid = LocalGrid({100 + index: lab.app(name, mods=(fixedclipping_mod,)) for index, name in enumerate(lab.data)})
    strategy = lab.strategy()
    start = strategy.trainer.federation.state
    strategy.start(grid, train_config=ConfigRecord({"clipping_norm": 1e-3}))
    end = strategy.trainer.federation.state
    change = sum(
        float((getattr(end.adapters[name], f).double() - getattr(start.adapters[name], f).double()).square().sum())
        for name in end.adapters
        for f in "AB"
    )
    assert 0 < change**0.5 <= 1e-3 * 1.001


def test_wrappers_that_leave_the_residual_without_noise_are_refused(tmp_path):
    lab = Lab(tmp_path)
    strategy = lab.strategy()
    wrapped = DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, 1.0, 3)
    with pytest.raises(RuntimeError, match="residual of FedEx-LoRA, which also depends on the clients' data"):
        wrapped.start(lab.grid(), initial_arrays=ArrayRecord(), num_rounds=1)


def test_mods_see_numbers_where_bfloat16_travels_as_integers(tmp_path):
    seen = []

    def look(message: Message, context: Any, call_next: Any) -> Message:
        reply = call_next(message, context)
        seen.extend(each.content[wire.ARRAYS] for each in (message, reply))
        return reply

    lab = Lab(tmp_path, num_rounds=1, **CASES["bf16"])
    grid = LocalGrid({100 + index: lab.app(name, mods=(look,)) for index, name in enumerate(lab.data)})
    strategy = lab.strategy()
    strategy.start(grid)
    assert {array.dtype for arrays in seen for array in arrays.values()} == {"float32"}
    assert {array.dtype for message in grid.received[3:] for array in message.content[wire.ARRAYS].values()} == {
        "int16"
    }
    assert same(strategy.trainer, lab.in_process())


# ---- Refusals before anything is trained ----


class Returning(FFALoRAAggregator):
    """Sends a factor that its clients do not train."""

    returned_factors = ("A", "B")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"client_optimizer_state": "keep"}, 'client_optimizer_state="keep"` is not supported on Flower'),
        ({"aggregator_kwargs": {"assignment": "keep"}}, '`assignment="keep"`\\) are not supported on Flower'),
        ({"aggregator": Returning()}, "returns the factors"),
        ({"parallel_clients": 2}, "is for clients of one process"),
        ({"clients": ["north", "north"]}, "names a client twice"),
    ],
)
def test_the_server_refuses_what_cannot_be_had(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Lab(tmp_path).strategy(**kwargs)


def test_start_refuses_what_it_would_ignore(tmp_path):
    lab = Lab(tmp_path)
    with pytest.raises(ValueError, match="takes no `num_rounds`"):
        lab.strategy().start(lab.grid(), num_rounds=3)


def test_a_client_refuses_residuals_that_lead_elsewhere(tmp_path):
    lab = Lab(tmp_path)
    grid = lab.grid()
    strategy = lab.strategy()
    strategy.start(grid)
    message = next(each for each in grid.sent if wire.RESIDUALS in each.content)
    client = lab.clients[-1]
    about = str(message.content[wire.CONFIG][wire.DIFFERENCE])
    arrays = message.content[wire.RESIDUALS]
    key = next(iter(arrays))
    good = wire.decode_difference(arrays, about, client.adapted)
    assert good.rounds
    with pytest.raises(wire.PayloadError, match="cannot be read"):
        wire.decode_difference(arrays, "{}", client.adapted)
    with pytest.raises(wire.PayloadError, match="bytes in"):
        wire.decode_difference(ArrayRecord({key: Array(torch.zeros(600, 600).numpy())}), about, client.adapted)
    with pytest.raises(wire.PayloadError, match="cannot be read"):
        wire.decode_difference(
            ArrayRecord({f"0/A/{index}": Array(torch.zeros(1).numpy()) for index in range(3)}), about, client.adapted
        )
