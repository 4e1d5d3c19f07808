"""Ordinary callbacks see a `Trainer` whose epoch is a round; federated ones see the rounds too."""

import inspect

import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fedex_hf import ClientUpdate, FederatedCallback, FederatedTrainer, FederatedTrainingArguments, GlobalUpdate


EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
FEDERATED = ["on_round_begin", "on_client_end", "on_aggregate", "on_round_end"]
SETTINGS = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}


def recorder(base):
    """A callback that notes every event it gets, the state at that moment, and the keyword arguments."""

    def note(event):
        def method(self, args, state, control, **kwargs):
            assert isinstance(args, TrainingArguments)
            assert isinstance(state, TrainerState)
            assert isinstance(control, TrainerControl)
            self.seen.append((event, state.global_step, state.epoch))
            self.kwargs.append(kwargs)
            self.states.append((state.max_steps, state.num_train_epochs, state.is_world_process_zero))

        return method

    namespace = {event: note(event) for event in EVENTS + FEDERATED}
    namespace["__init__"] = lambda self: self.__dict__.update(seen=[], kwargs=[], states=[])
    return type("Recorder", (base,), namespace)()


def of(callback, *events):
    return [entry for entry in callback.seen if entry[0] in events]


def federated(output_dir, clients, callbacks, **kwargs):
    args = {"num_rounds": 2} | SETTINGS | kwargs
    return FederatedTrainer(
        model=tiny.peft_roberta(),
        args=FederatedTrainingArguments(output_dir=str(output_dir), **args),
        train_dataset=clients,
        eval_dataset=tiny.classification_data(10, seed=1),
        callbacks=callbacks,
    )


@pytest.mark.parametrize(
    "kwargs", [{}, {"gradient_accumulation_steps": 2}, {"eval_on_start": True, "logging_steps": 2}], ids=str
)
def test_rounds_of_one_client_look_like_epochs_of_the_plain_trainer(tmp_path, kwargs):
    data = tiny.classification_data(14)
    expected, seen = recorder(TrainerCallback), recorder(TrainerCallback)
    plain = Trainer(
        model=tiny.peft_roberta(),
        args=TrainingArguments(output_dir=str(tmp_path / "plain"), num_train_epochs=3, **(SETTINGS | kwargs)),
        train_dataset=data,
        eval_dataset=tiny.classification_data(10, seed=1),
        callbacks=[expected],
    )
    plain.train()
    federated(tmp_path / "federated", {"only": data}, [seen], num_rounds=3, **kwargs).train()
    # The one event more is the round's own log.
    rounds = [index for index, each in enumerate(seen.kwargs) if "aggregation_error" in (each.get("logs") or {})]
    assert len(rounds) == 3
    without = [entry for index, entry in enumerate(seen.seen) if index not in rounds]
    assert [entry[:2] for entry in without] == [entry[:2] for entry in expected.seen]
    assert [entry[2] or 0.0 for entry in without] == pytest.approx([entry[2] or 0.0 for entry in expected.seen])
    assert seen.states[1:] == [expected.states[1]] * (len(seen.states) - 1)


def test_every_event_of_a_run(tmp_path):
    seen = recorder(TrainerCallback)
    federated(tmp_path, tiny.clients_of([8, 4]), [seen]).train()
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    after = ["on_log", "on_epoch_end", "on_prediction_step", "on_prediction_step", "on_log", "on_evaluate", "on_save"]
    round = ["on_epoch_begin", *step * 3, *after]
    names = [entry[0] for entry in seen.seen]
    assert names == ["on_init_end", "on_train_begin", *round * 2, "on_log", "on_train_end"]
    assert [entry[1:] for entry in of(seen, "on_step_end")] == [
        (step, pytest.approx(step / 3)) for step in range(1, 7)
    ]
    for event in ("on_epoch_end", "on_evaluate", "on_save"):
        assert [entry[1:] for entry in of(seen, event)] == [(3, 1.0), (6, 2.0)]
    assert [entry[1] for entry in of(seen, "on_epoch_begin")] == [0, 3]
    assert of(seen, "on_train_end") == [("on_train_end", 6, 2.0)]
    steps = [entry[1] for entry in seen.seen]
    assert steps == sorted(steps)
    assert set(seen.states[1:]) == {(6, 2, True)}


def test_what_the_events_bring_along(tmp_path):
    seen = recorder(TrainerCallback)
    trainer = federated(tmp_path, tiny.clients_of([8, 4]), [seen], gradient_accumulation_steps=2)
    trainer.train()
    assert len(of(seen, "on_substep_end")) == 2
    for (event, _, _), kwargs in zip(seen.seen, seen.kwargs):
        if event != "on_init_end":
            assert kwargs["model"] is trainer.model, event
        if "step" in event and event != "on_prediction_step":
            assert kwargs["lr_scheduler"].get_last_lr(), event
            assert len(kwargs["train_dataloader"].dataset) in (8, 4), event
            trained = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
            assert trained == {id(each) for each in trainer.model.parameters() if each.requires_grad}, event
        if event == "on_prediction_step":
            assert len(kwargs["eval_dataloader"]) == 2
        if event == "on_evaluate":
            assert {"eval_loss", "epoch"} <= kwargs["metrics"].keys()
        if event == "on_log":
            assert kwargs["logs"]["epoch"] >= 0
    numbers = [value for kwargs in seen.kwargs for value in (kwargs.get("logs") or {}).values()]
    assert all(isinstance(value, (int, float)) for value in numbers)  # what a reporter can plot


def test_predict_is_an_event(tmp_path):
    seen = recorder(TrainerCallback)
    trainer = federated(tmp_path, tiny.clients_of([8, 4]), [seen])
    trainer.predict(tiny.classification_data(10))
    trainer.evaluate()
    assert [entry[0] for entry in seen.seen] == [
        "on_init_end",
        "on_prediction_step",
        "on_prediction_step",
        "on_predict",
        "on_prediction_step",
        "on_prediction_step",
        "on_log",
        "on_evaluate",
    ]


def test_ordinary_callbacks_do_not_get_federated_events(tmp_path):
    ordinary, federation = recorder(TrainerCallback), recorder(FederatedCallback)
    federated(tmp_path, tiny.clients_of([8, 4]), [ordinary, federation]).train()
    assert of(ordinary, *FEDERATED) == []
    assert len(of(federation, *FEDERATED)) == 2 * 5
    assert of(ordinary, *EVENTS) == of(federation, *EVENTS)


def test_a_federated_callback_need_not_define_anything(tmp_path):
    federated(tmp_path, tiny.clients_of([8, 4]), [FederatedCallback], num_rounds=1).train()


def test_every_federated_event_has_a_default(tmp_path):
    own = {name for name in vars(FederatedCallback) if name.startswith("on_")}
    assert own == set(FEDERATED)
    assert not own & set(EVENTS)
    for name in own:
        assert [*inspect.signature(getattr(FederatedCallback, name)).parameters][:4] == [
            "self",
            "args",
            "state",
            "control",
        ]


class Watch(FederatedCallback):
    """Checks what each federated event says against the trainer at that moment."""

    def __init__(self):
        self.order, self.before, self.clients, self.updates = [], None, None, []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.append("epoch begins")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.order.append("epoch ends")

    def on_round_begin(self, args, state, control, round, clients, trainer, **kwargs):
        self.order.append(f"round {round} begins")
        self.clients, self.updates = clients, []
        self.before = tiny.trained(trainer.model)
        assert clients == trainer.sample_clients(round)
        assert trainer.federation.round == round - 1

    def on_client_end(self, args, state, control, update, trainer, **kwargs):
        self.order.append(update.client_id)
        assert isinstance(update, ClientUpdate)
        assert update.metrics["train_loss"] > 0
        self.updates.append(update)
        assert state.global_step == (update.round - 1) * 3 + sum(int(each.metrics["steps"]) for each in self.updates)

    def on_aggregate(self, args, state, control, round, updates, update, trainer, **kwargs):
        self.order.append("aggregated")
        assert isinstance(update, GlobalUpdate)
        assert [id(each) for each in updates] == [id(each) for each in self.updates]
        assert [each.client_id for each in updates] == self.clients
        assert tiny.same_bytes(tiny.trained(trainer.model), self.before)
        self.update = update

    def on_round_end(self, args, state, control, round, metrics, trainer, **kwargs):
        self.order.append(f"round {round} ends")
        after = tiny.trained(trainer.model)
        assert not tiny.same_bytes(after, self.before)
        for name, tensor in self.update.tensors.items():
            assert torch.equal(after[name], tensor)
        for name, delta in self.update.adapters.items():
            assert torch.equal(after[f"{name}.lora_A.default.weight"], delta.A)
            assert torch.equal(after[f"{name}.lora_B.default.weight"], delta.B)
        assert metrics.items() <= state.log_history[-1].items()
        assert metrics["round"] == trainer.federation.round == round
        assert metrics["aggregation_error"] == trainer.exactness.aggregation_error


def test_federated_events_come_in_order_with_what_they_promise(tmp_path):
    watch = Watch()
    federated(tmp_path, tiny.clients_of([8, 4]), [watch]).train()
    expected = []
    for round in (1, 2):
        clients = ["client-0", "client-1"]
        events = [f"round {round} begins", *clients, "aggregated", f"round {round} ends"]
        expected += ["epoch begins", *events, "epoch ends"]
    assert watch.order == expected


# ---- Control ----


class At(TrainerCallback):
    """Sets a flag at one step."""

    def __init__(self, step, flag, event="on_step_end"):
        self.step, self.flag = step, flag
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.flag, True)
            return control
        return None


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_log"])
def test_a_stop_inside_a_round_ends_the_run_after_the_round(tmp_path, event):
    seen, stop = recorder(TrainerCallback), At(4, "should_training_stop", event)
    trainer = federated(tmp_path, tiny.clients_of([8, 4]), [stop, seen], num_rounds=4)
    output = trainer.train()
    assert output.global_step == trainer.state.global_step == 6
    assert trainer.federation.round == 2
    assert [entry[1] for entry in of(seen, "on_evaluate", "on_save")] == [3, 3, 6, 6]
    assert of(seen, "on_train_end") == [("on_train_end", 6, 2.0)]
    # The model is a whole round's, as of a run that was to have two rounds.
    expected = federated(tmp_path / "expected", tiny.clients_of([8, 4]), [], num_rounds=2)
    expected.train()
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(expected.model))


@pytest.mark.parametrize("event", ["on_round_end", "on_client_end"])
def test_a_federated_callback_can_stop_the_run(tmp_path, event):
    class Stop(FederatedCallback):
        pass

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3

    setattr(Stop, event, stop)
    trainer = federated(tmp_path, tiny.clients_of([8, 4]), [Stop()], num_rounds=4)
    trainer.train()
    assert trainer.federation.round == 1


def test_a_run_that_was_stopped_can_be_trained_again(tmp_path):
    trainer = federated(
        tmp_path, tiny.clients_of([8, 4]), [At(2, "should_training_stop")], num_rounds=2, save_strategy="no"
    )
    assert trainer.train().global_step == 3
    trainer.remove_callback(At)
    assert trainer.train().global_step == 6


@pytest.mark.parametrize(("flag", "event"), [("should_evaluate", "on_evaluate"), ("should_save", "on_save")])
def test_a_callback_can_ask_for_evaluation_or_saving(tmp_path, flag, event):
    seen = recorder(TrainerCallback)
    kwargs = {"eval_strategy": "no", "save_strategy": "no"}
    federated(tmp_path, tiny.clients_of([8, 4]), [At(4, flag), seen], num_rounds=3, **kwargs).train()
    assert [entry[1:] for entry in of(seen, event)] == [(6, 2.0)]


def test_a_callback_can_ask_for_a_log(tmp_path):
    trainer = federated(
        tmp_path, tiny.clients_of([8, 4]), [At(4, "should_log")], logging_strategy="no", eval_strategy="no"
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(entry["step"], entry["client_id"]) for entry in logged] == [(4, "client-0")]


def test_callbacks_can_be_added_and_removed(tmp_path):
    seen, gone = recorder(TrainerCallback), At(1, "should_training_stop")
    trainer = federated(tmp_path, tiny.clients_of([8, 4]), [gone], num_rounds=2)
    trainer.add_callback(seen)
    assert trainer.pop_callback(At) is gone
    trainer.train()
    assert [entry[1] for entry in of(seen, "on_step_end")] == [1, 2, 3, 4, 5, 6]
