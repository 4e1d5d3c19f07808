"""The parts of `parallel_clients`: turns, and batches that are joined and taken apart again."""

import threading

import parallel_clients
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedex_hf.experimental.batches import UnlikeCallsError, join, split, tensors_in
from fedex_hf.experimental.turns import Cancelled, Ended, Turns


PAD = 9


def tokens(rows, length, start=1):
    return torch.arange(start, start + rows * length).reshape(rows, length)


def test_short_batches_are_filled_up_with_hidden_tokens_and_copies_of_a_row():
    calls = [{"input_ids": tokens(1, 2), "flag": True}, {"input_ids": tokens(2, 3, start=50), "flag": True}]
    joined = join(calls, PAD)
    assert joined.arguments["input_ids"].tolist() == [[1, 2, PAD], [1, 2, PAD], [50, 51, 52], [53, 54, 55]]
    assert joined.arguments["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert joined.arguments["flag"] is True


def test_equal_batches_without_a_mask_stay_without():
    assert join([{"input_ids": tokens(2, 3)}, {"input_ids": tokens(2, 3)}], PAD).arguments.keys() == {"input_ids"}
    masked = {"input_ids": tokens(2, 3), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    mask = join([masked, {"input_ids": tokens(2, 3), "attention_mask": None}], PAD).arguments["attention_mask"]
    assert mask.tolist() == [[0, 0, 0]] * 2 + [[1, 1, 1]] * 2


def test_outputs_come_back_in_the_shapes_that_went_in():
    calls = [{"input_ids": tokens(1, 2)}, {"input_ids": tokens(3, 4, start=50)}]
    joined = join(calls, PAD)
    ids = joined.arguments["input_ids"].float()
    output = BaseModelOutputWithPooling(ids[..., None].expand(-1, -1, 5), ids[:, :1].expand(-1, 4), (ids[..., None],))
    for call, part in zip(calls, split(output, joined), strict=True):
        own = call["input_ids"].float()
        assert torch.equal(part.last_hidden_state, own[..., None].expand(-1, -1, 5))
        assert torch.equal(part.pooler_output, own[:, :1].expand(-1, 4))  # as wide as the longest row, and not cut
        assert torch.equal(part.hidden_states[0], own[..., None])
        assert len(tensors_in(part)) == 3
    assert split((ids, "a cache"), joined)[0][1] is None


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"input_ids": tokens(2, 3), "scale": 2.0}, "different `scale`"),
        ({"input_ids": tokens(2, 3), "scale": None}, "different `scale`"),
        ({"input_ids": tokens(2, 3), "scale": 1.0, "boxes": torch.zeros(2, 3, 4)}, "different `boxes`"),
        ({"input_ids": tokens(2, 3), "scale": 1.0, "position_ids": torch.zeros(1, 3)}, "one row per example"),
        ({"scale": 1.0}, "without any tensor"),
    ],
)
def test_calls_that_do_not_go_together_are_refused(second, says):
    first = {"input_ids": tokens(2, 3), "scale": 1.0}
    if "position_ids" in second:
        first["position_ids"] = torch.zeros(2, 3)
    with pytest.raises(UnlikeCallsError, match=says):
        join([first, second], PAD)


def test_shapes_that_cannot_be_filled_up_are_refused():
    calls = [{"pixel_values": torch.zeros(2, 3, width)} for width in (4, 5)]
    with pytest.raises(UnlikeCallsError, match="cannot be filled up"):
        join(calls, PAD)
    assert join(calls[:1] * 2, PAD).arguments["pixel_values"].shape == (4, 3, 4)


def test_only_one_function_runs_at_a_time_and_errors_come_back():
    trace = []

    def count(name, up_to):
        for number in range(up_to):
            trace.append((name, number))
            turns[name].ask(number)
        raise KeyError(name)

    turns = {name: Turns(lambda name=name: count(name, 2)) for name in "ab"}
    ended = [[each.go_on() for each in turns.values()] for _ in range(3)][-1]
    assert trace == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [type(each.error) for each in ended] == [KeyError, KeyError]


def test_an_error_as_the_answer_is_raised_inside():
    turns = Turns(lambda: turns.ask("what?"))
    turns.go_on()
    error = ValueError("this")
    assert turns.go_on(error) == Ended(error=error)


def test_a_function_that_is_cancelled_cleans_up_and_leaves_no_thread():
    cleaned, threads = [], threading.active_count()

    def stubborn():
        try:
            turns.ask("first")
        except Exception:
            cleaned.append("never")
        finally:
            cleaned.append("once")

    turns = Turns(stubborn)
    turns.cancel()  # not started yet
    assert turns.go_on() == "first"
    turns.cancel()
    turns.cancel()
    assert cleaned == ["once"]
    assert threading.active_count() == threads
    assert not issubclass(Cancelled, Exception)


def test_the_benchmark_compares_what_it_says():
    args = parallel_clients.BenchmarkArguments(models=["tiny"], clients=[2, 3], steps=1, repeats=1, max_examples=2)
    cases = parallel_clients.measure("tiny", 1, args)
    assert [(case.model, case.batch, case.clients, len(case.ratios)) for case in cases] == [("tiny", 1, 2, 1)]
    page = parallel_clients.report(cases, args, "a machine")
    assert "| `tiny` | 1 | 2 |" in page
    assert "a machine" in page
    assert parallel_clients.measure("tiny", 4, args) == []
