"""`FederatedTrainer` around the `Trainer` classes people use: their own, `Seq2SeqTrainer`, TRL's `SFTTrainer`."""

import inspect
import random
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from fedex_hf import FederatedTrainer, FederatedTrainingArguments


# What `SFTConfig` would set otherwise: half precision and recomputation, which a CPU need not have.
SFT = tiny.PLAIN | {"bf16": False, "gradient_checkpointing": False}
MAX_LENGTH = 8


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# ---- Models, tokenizer, data ----


def peft_model(make, **config):
    model = make()
    torch.manual_seed(0)
    return get_peft_model(model, tiny.lora(**config))


def peft_llama():
    return peft_model(tiny.llama, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def peft_t5():
    return peft_model(tiny.t5, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])


def tokenizer():
    """One token per word: `w0` is token 3."""
    words = ["[PAD]", "[BOS]", "[EOS]", *(f"w{index}" for index in range(tiny.VOCAB - 3))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


def text_data(size, seed=0, column="text"):
    """Sentences of 4 to 12 words that count upwards."""
    generator = random.Random(seed)
    starts = [(generator.randrange(40), generator.randint(4, 12)) for _ in range(size)]
    sentences = [" ".join(f"w{start + index}" for index in range(length)) for start, length in starts]
    return Dataset.from_dict({column: sentences})


def tokens_of(dataset, column="text"):
    """What SFTTrainer should make of it: the words, the end token, cut at `MAX_LENGTH`."""
    return [([3 + int(word[1:]) for word in sentence.split()] + [2])[:MAX_LENGTH] for sentence in dataset[column][:]]


def steps_of(trainer):
    names = ("loss", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]


def federated_args(output_dir, **kwargs):
    return FederatedTrainingArguments(output_dir=str(output_dir), **(tiny.PLAIN | {"num_rounds": 1} | kwargs))


class TrainedOn(TrainerCallback):
    """The datasets that were trained on, in their order."""

    def __init__(self):
        self.datasets = []

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        rows = train_dataloader.dataset["input_ids"][:]
        if not self.datasets or self.datasets[-1] != rows:
            self.datasets.append(rows)


# ---- Seq2SeqTrainer ----


class Generated:
    """Keeps the tokens that `compute_metrics` was given."""

    def __init__(self):
        self.tokens = []

    def __call__(self, prediction):
        self.tokens.append(prediction.predictions)
        return {"tokens": float(prediction.predictions.shape[-1])}

    @property
    def shapes(self):
        assert all(np.issubdtype(each.dtype, np.integer) for each in self.tokens)  # tokens, not logits
        return [each.shape for each in self.tokens]


def seq2seq_args(output_dir, **kwargs):
    # Predictions are padded to the model's own 20 tokens, so the number asked for is larger.
    return Seq2SeqTrainingArguments(
        output_dir=str(output_dir), predict_with_generate=True, generation_max_length=24, **kwargs
    )


def test_seq2seq_trainer_is_itself_in_one_round(tmp_path):
    data, generated = tiny.language_data(14), Generated()
    plain = Seq2SeqTrainer(
        model=peft_t5(),
        args=seq2seq_args(tmp_path / "plain", **tiny.PLAIN),
        train_dataset=data,
        eval_dataset=tiny.language_data(6, seed=1),
        compute_metrics=generated,
    )
    plain.train()
    trainer = FederatedTrainer(
        model=peft_t5(),
        args=federated_args(tmp_path),
        train_dataset={"only": data},
        eval_dataset=tiny.language_data(6, seed=1),
        compute_metrics=generated,
        client_trainer_cls=Seq2SeqTrainer,
        client_trainer_kwargs={"args": seq2seq_args(tmp_path, use_cpu=True)},
    )
    trainer.train()
    assert steps_of(trainer) == steps_of(plain)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(plain.model))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert generated.shapes == [(6, 24), (6, 24)]  # six examples, 24 generated tokens
    assert np.array_equal(*generated.tokens)
    test = tiny.language_data(5, seed=2)
    assert np.array_equal(trainer.predict(test).predictions, plain.predict(test).predictions)


def test_seq2seq_evaluation_generates_every_round(tmp_path):
    generated = Generated()
    trainer = FederatedTrainer(
        model=peft_t5(),
        args=federated_args(tmp_path, num_rounds=2, eval_strategy="epoch"),
        train_dataset=tiny.clients_of([8, 5], tiny.language_data),
        eval_dataset=tiny.language_data(6, seed=1),
        compute_metrics=generated,
        client_trainer_cls=Seq2SeqTrainer,
        client_trainer_kwargs={"args": seq2seq_args(tmp_path, use_cpu=True)},
    )
    output = trainer.train()
    assert output.metrics["max_aggregation_error"] <= 1e-5
    assert [entry["eval_tokens"] for entry in trainer.state.log_history if "eval_tokens" in entry] == [24.0, 24.0]
    trainer.evaluate(max_length=30)
    trainer.predict(tiny.language_data(3, seed=2), max_length=22, num_beams=2)
    assert generated.shapes == [(6, 24), (6, 24), (6, 30), (3, 22)]


# ---- SFTTrainer ----


def sft_template(tmp_path, **kwargs):
    return SFTConfig(output_dir=str(tmp_path / "template"), **(SFT | {"max_length": MAX_LENGTH} | kwargs))


def sft_federation(tmp_path, clients, *, eval_dataset=None, template=None, callbacks=None, more=None, **kwargs):
    return FederatedTrainer(
        model=peft_llama(),
        args=federated_args(tmp_path / "federated", **kwargs),
        train_dataset=clients,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        callbacks=callbacks,
        client_trainer_cls=SFTTrainer,
        client_trainer_kwargs={"args": sft_template(tmp_path) if template is None else template, **(more or {})},
    )


@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 2}], ids=["default", "accumulation"])
def test_sft_trainer_is_itself_in_one_round(tmp_path, kwargs):
    data, evaluation = text_data(14), text_data(6, seed=1)
    plain = SFTTrainer(
        model=peft_llama(),
        args=SFTConfig(output_dir=str(tmp_path / "plain"), max_length=MAX_LENGTH, **(SFT | kwargs)),
        train_dataset=data,
        eval_dataset=evaluation,
        processing_class=tokenizer(),
    )
    plain.train()
    trainer = sft_federation(tmp_path, {"only": data}, eval_dataset=evaluation, **kwargs)
    trainer.train()
    assert len(steps_of(plain)) > 1
    assert steps_of(trainer) == steps_of(plain)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(plain.model))
    # SFTTrainer's own metrics arrive in the federation's logs.
    [expected] = {frozenset(entry) for entry in plain.state.log_history if "loss" in entry}
    [logged] = {frozenset(entry) for entry in trainer.state.log_history if "loss" in entry}
    assert "mean_token_accuracy" in expected
    assert logged == expected | {"round", "client_id"}
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    unseen = text_data(5, seed=2)
    assert trainer.evaluate(unseen)["eval_loss"] == plain.evaluate(unseen)["eval_loss"]


def test_sft_trainer_prepares_every_clients_text(tmp_path):
    clients = {f"client-{index}": text_data(4 + index, seed=index) for index in range(3)}
    seen = TrainedOn()
    trainer = sft_federation(tmp_path, clients, callbacks=[seen], num_rounds=2)
    output = trainer.train()
    assert seen.datasets == [tokens_of(dataset) for dataset in clients.values()] * 2
    assert any(len(row) == MAX_LENGTH for row in seen.datasets[0])
    assert any(len(row) < MAX_LENGTH for rows in seen.datasets for row in rows)
    assert output.metrics["max_aggregation_error"] <= 1e-5
    assert [trainer.clients.num_examples(client_id) for client_id in clients] == [4, 5, 6]


def test_sft_trainer_with_prompts_and_completions(tmp_path):
    def pairs(size, seed):
        data = text_data(size, seed)
        return Dataset.from_dict({"prompt": data["text"][:], "completion": [" w1 w2 w3"] * size})

    clients = {"a": pairs(6, 0), "b": pairs(5, 1)}
    template = sft_template(tmp_path, max_length=None)
    trainer = sft_federation(tmp_path, clients, template=template, num_rounds=2)
    losses = []
    trainer.add_callback(type("Losses", (TrainerCallback,), {"on_log": lambda *args, **kw: losses.append(kw["logs"])}))
    assert trainer.train().metrics["max_aggregation_error"] <= 1e-5
    dataset = trainer.clients.trainer.train_dataset
    assert {"input_ids", "labels"} <= set(dataset.column_names) or "completion_mask" in dataset.column_names
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert losses[-1] < losses[0]  # the completion is always the same, and nothing else counts


def test_sft_trainer_with_a_formatting_function(tmp_path):
    clients = {"a": text_data(6, column="sentence"), "b": text_data(5, seed=1, column="sentence")}
    seen = TrainedOn()
    trainer = sft_federation(
        tmp_path, clients, callbacks=[seen], more={"formatting_func": lambda example: example["sentence"]}
    )
    trainer.train()
    assert seen.datasets == [tokens_of(dataset, "sentence") for dataset in clients.values()]


def test_a_saved_sft_model_loads_with_its_tokenizer(tmp_path):
    trainer = sft_federation(tmp_path, {"a": text_data(6), "b": text_data(5, seed=1)}, num_rounds=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    text = AutoTokenizer.from_pretrained(tmp_path / "saved")("w5 w6 w7 w8", return_tensors="pt")
    assert text["input_ids"].tolist() == [[8, 9, 10, 11]]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=text["input_ids"]).logits
        for loader in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
            model = loader.from_pretrained(tmp_path / "saved").eval()
            assert torch.equal(model(input_ids=text["input_ids"]).logits, expected)


def test_sft_trainer_on_a_plain_model(tmp_path):
    trainer = FederatedTrainer(
        model=tiny.llama(),
        args=federated_args(tmp_path, num_rounds=2),
        train_dataset={"a": text_data(6), "b": text_data(5, seed=1)},
        processing_class=tokenizer(),
        peft_config=tiny.lora(task_type="CAUSAL_LM", target_modules="all-linear"),
        client_trainer_cls=SFTTrainer,
        client_trainer_kwargs={"args": sft_template(tmp_path)},
    )
    assert trainer.train().metrics["max_aggregation_error"] <= 1e-5
    assert len(trainer.exactness.layers) == 2 * 7


def test_sft_trainer_streams(tmp_path):
    clients = {"a": text_data(10).to_iterable_dataset(), "b": text_data(10, seed=1).to_iterable_dataset()}
    trainer = sft_federation(tmp_path, clients, num_rounds=2, max_steps=2)
    assert trainer.train().metrics["max_aggregation_error"] <= 1e-5
    assert trainer.state.global_step == 8


def test_sft_trainer_does_not_pile_up_in_the_model(tmp_path):
    """SFTTrainer patches `model.forward` in its constructor; the calls must not get deeper with every client."""
    depths = []
    for clients in (1, 4):
        trainer = sft_federation(tmp_path, {f"client-{index}": text_data(4, seed=index) for index in range(clients)})
        trainer.train()
        embedding = trainer.model.get_base_model().get_input_embeddings()
        handle = embedding.register_forward_hook(lambda *args: depths.append(len(inspect.stack(0))))
        trainer.model(input_ids=torch.tensor([[3, 4, 5]]))
        handle.remove()
    assert depths[0] == depths[1]


def test_the_federations_precision_wins_over_the_templates(tmp_path):
    template = sft_template(tmp_path, bf16=None)  # as `SFTConfig` has it if nothing is said
    assert template.bf16
    trainer = sft_federation(tmp_path, {"only": text_data(6)}, template=template)
    assert not trainer.clients.trainer.args.bf16
    assert trainer.clients.trainer.args.mixed_precision == "no"
    trainer.train()


def test_arguments_that_join_both_kinds(tmp_path):
    @dataclass
    class Joined(FederatedTrainingArguments, SFTConfig):
        pass

    seen = TrainedOn()
    data = text_data(6)
    trainer = FederatedTrainer(
        model=peft_llama(),
        args=Joined(output_dir=str(tmp_path), num_rounds=1, max_length=MAX_LENGTH, **SFT),
        train_dataset={"only": data},
        processing_class=tokenizer(),
        callbacks=[seen],
        client_trainer_cls=SFTTrainer,
    )
    trainer.train()
    assert seen.datasets == [tokens_of(data)]


# ---- A user's own Trainer ----


class Distilled(Trainer):
    """A loss of its own, with a constructor argument of its own."""

    def __init__(self, *args, temperature, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits / self.temperature, inputs["labels"])
        self.log({"temperature": self.temperature})
        return (loss, outputs) if return_outputs else loss


def test_a_users_own_trainer(tmp_path):
    data = tiny.classification_data(14)
    plain = Distilled(
        temperature=3.0,
        model=tiny.peft_roberta(),
        args=TrainingArguments(output_dir=str(tmp_path / "plain"), **tiny.PLAIN),
        train_dataset=data,
        eval_dataset=tiny.classification_data(6, seed=1),
    )
    plain.train()
    trainers = {}
    for temperature in (3.0, 4.0):
        trainers[temperature] = FederatedTrainer(
            model=tiny.peft_roberta(),
            args=federated_args(tmp_path / str(temperature)),
            train_dataset={"only": data},
            eval_dataset=tiny.classification_data(6, seed=1),
            client_trainer_cls=Distilled,
            client_trainer_kwargs={"temperature": temperature},
        )
        trainers[temperature].train()
    assert steps_of(trainers[3.0]) == steps_of(plain) != steps_of(trainers[4.0])
    assert tiny.same_bytes(tiny.trained(trainers[3.0].model), tiny.trained(plain.model))
    assert trainers[3.0].evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    own = [entry for entry in trainers[3.0].state.log_history if "temperature" in entry and "round" in entry]
    assert [(entry["round"], entry["client_id"]) for entry in own] == [(1, "only")] * 4


@pytest.mark.parametrize(
    "method",
    [
        "compute_loss",
        "training_step",
        "prediction_step",
        "create_optimizer",
        "create_scheduler",
        "get_train_dataloader",
    ],
)
def test_what_clients_run_cannot_be_overridden_in_the_federation(tmp_path, method):
    overriding = type("Overriding", (FederatedTrainer,), {method: lambda self, *args, **kwargs: None})
    given = {
        "model": tiny.peft_roberta(),
        "args": federated_args(tmp_path),
        "train_dataset": {"a": tiny.classification_data(4)},
    }
    type("Plain", (FederatedTrainer,), {"log": Trainer.log})(**given)  # what the federation does may be overridden
    with pytest.raises(ValueError, match=rf"`Overriding` overrides `{method}`.*`client_trainer_cls`"):
        overriding(**given)


def test_what_is_not_a_trainer_class_is_refused(tmp_path):
    for wrong in (FederatedTrainer, object, Trainer.train):
        with pytest.raises(TypeError, match="`client_trainer_cls"):
            tiny.federation(tmp_path, trainer_kwargs={"client_trainer_cls": wrong})


@pytest.mark.parametrize("name", ["callbacks", "train_dataset", "eval_dataset"])
def test_arguments_that_belong_to_the_federation_are_refused_by_name(tmp_path, name):
    kwargs = {"client_trainer_cls": Distilled, "client_trainer_kwargs": {"temperature": 1.0, name: []}}
    with pytest.raises((ValueError, TypeError), match=f"`client_trainer_kwargs`.*`{name}`"):
        tiny.federation(tmp_path, trainer_kwargs=kwargs)


# ---- from_trainer ----


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Marker(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def configured_trainer(tmp_path, cls=Trainer, data=None, report_to="none", **kwargs):
    settings = tiny.PLAIN | {
        "report_to": report_to,
        "learning_rate": 5e-3,
        "seed": 3,
        "weight_decay": 0.01,
        "label_smoothing_factor": 0.1,
    }
    return cls(
        model=tiny.peft_roberta(),
        args=TrainingArguments(output_dir=str(tmp_path), **settings),
        data_collator=DataCollatorWithPadding(tokenizer(), padding="max_length", max_length=12),
        train_dataset=tiny.classification_data(14) if data is None else data,
        eval_dataset=tiny.classification_data(10, seed=1),
        processing_class=tokenizer(),
        compute_metrics=accuracy,
        **kwargs,
    )


def test_from_trainer_adopts_a_configured_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    marker, clients = Marker(), tiny.clients_of([8, 5])
    plain = configured_trainer(tmp_path, report_to="tensorboard", callbacks=[marker, EarlyStoppingCallback])
    trainer = FederatedTrainer.from_trainer(plain, train_dataset=clients, num_rounds=2, client_weighting="uniform")
    assert trainer.model is plain.model
    assert trainer.data_collator is plain.data_collator
    assert trainer.processing_class is plain.processing_class
    assert trainer.eval_dataset is plain.eval_dataset
    assert trainer.compute_metrics is accuracy
    assert isinstance(trainer.args, FederatedTrainingArguments)
    assert (trainer.args.num_rounds, trainer.args.client_weighting) == (2, "uniform")
    for name in ("learning_rate", "seed", "weight_decay", "label_smoothing_factor", "output_dir", "num_train_epochs"):
        assert getattr(trainer.args, name) == getattr(plain.args, name), name
    expected = [type(each) for each in plain.callback_handler.callbacks]
    assert sorted(map(str, (type(each) for each in trainer.callback_handler.callbacks))) == sorted(map(str, expected))
    trainer.remove_callback(EarlyStoppingCallback)
    trainer.train()
    assert marker.steps == list(range(1, 9))
    assert len(list((tmp_path / "board").iterdir())) == 1
    assert trainer.evaluate().keys() >= {"eval_loss", "eval_accuracy"}


def test_from_trainer_with_one_client_and_one_round_is_the_trainer(tmp_path):
    plain = configured_trainer(tmp_path / "plain")
    adopted = configured_trainer(tmp_path / "adopted")
    trainer = FederatedTrainer.from_trainer(adopted, train_dataset={"only": adopted.train_dataset}, num_rounds=1)
    plain.train()
    trainer.train()
    assert steps_of(trainer) == steps_of(plain)
    assert tiny.same_bytes(tiny.trained(trainer.model), tiny.trained(plain.model))


def test_from_trainer_adds_lora_to_a_plain_model(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), **tiny.PLAIN)
    plain = Trainer(model=tiny.roberta(), args=args, train_dataset=tiny.classification_data(14))
    trainer = FederatedTrainer.from_trainer(plain, num_rounds=2, peft_config=tiny.lora())
    assert trainer.train().metrics["max_aggregation_error"] <= 1e-5


def test_from_trainer_partitions_the_trainers_own_dataset(tmp_path):
    plain = configured_trainer(tmp_path)
    trainer = FederatedTrainer.from_trainer(plain, num_rounds=1, num_clients=2)
    assert {name: len(part) for name, part in trainer.train_dataset.items()} == {"client-0": 7, "client-1": 7}
    trainer.train()


def test_from_trainer_with_arguments_of_its_own(tmp_path):
    plain = configured_trainer(tmp_path)
    args = federated_args(tmp_path / "own", learning_rate=1e-4)
    trainer = FederatedTrainer.from_trainer(
        plain, train_dataset=tiny.clients_of([8, 5]), args=args, aggregator="fedit"
    )
    assert trainer.args is args
    assert trainer.aggregator.name == "fedit"
    trainer.train()


def test_from_trainer_takes_the_class_with_its_loss(tmp_path):
    plain = configured_trainer(tmp_path, cls=type("Doubled", (Trainer,), {"compute_loss": doubled_loss}))
    trainer = FederatedTrainer.from_trainer(plain, train_dataset={"only": plain.train_dataset}, num_rounds=1)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    reference = configured_trainer(tmp_path / "reference")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(2 * reference.evaluate()["eval_loss"])


def doubled_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
    return (2 * loss, outputs) if return_outputs else 2 * loss


def test_from_trainer_needs_the_constructor_arguments_of_the_class_again(tmp_path):
    plain = configured_trainer(tmp_path, cls=Distilled, temperature=2.0)
    clients = tiny.clients_of([8, 5])
    trainer = FederatedTrainer.from_trainer(
        plain, train_dataset=clients, num_rounds=1, client_trainer_kwargs={"temperature": 2.0}
    )
    trainer.train()
    assert trainer.clients.trainer.temperature == 2.0


def test_from_trainer_refuses_a_trainer_that_has_trained(tmp_path):
    plain = configured_trainer(tmp_path)
    plain.train()
    with pytest.raises(ValueError, match="optimizer"):
        FederatedTrainer.from_trainer(plain, train_dataset=tiny.clients_of([8, 5]), num_rounds=1)


def test_from_trainer_adopts_a_seq2seq_trainer(tmp_path):
    generated = Generated()
    plain = Seq2SeqTrainer(
        model=peft_t5(),
        args=seq2seq_args(tmp_path, **tiny.PLAIN),
        train_dataset=tiny.language_data(8),
        eval_dataset=tiny.language_data(6, seed=1),
        compute_metrics=generated,
    )
    trainer = FederatedTrainer.from_trainer(
        plain, train_dataset=tiny.clients_of([8, 5], tiny.language_data), num_rounds=2
    )
    trainer.train()
    trainer.evaluate()
    assert generated.shapes == [(6, 24)]
    assert trainer.state.global_step == 2 * (2 + 2)


def test_from_trainer_adopts_an_sft_trainer(tmp_path):
    seen, clients = TrainedOn(), {"a": text_data(6), "b": text_data(5, seed=1)}
    evaluation = text_data(6, seed=2)
    plain = SFTTrainer(
        model=tiny.llama(),
        args=SFTConfig(output_dir=str(tmp_path), max_length=MAX_LENGTH, **SFT),
        train_dataset=clients["a"],
        eval_dataset=evaluation,
        processing_class=tokenizer(),
        peft_config=tiny.lora(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        callbacks=[seen],
    )
    trainer = FederatedTrainer.from_trainer(plain, train_dataset=clients, num_rounds=2)
    before = trainer.evaluate()["eval_loss"]
    assert before == plain.evaluate()["eval_loss"]
    output = trainer.train()
    assert seen.datasets == [tokens_of(dataset) for dataset in clients.values()] * 2
    assert output.metrics["max_aggregation_error"] <= 1e-5
    assert trainer.evaluate()["eval_loss"] < before
