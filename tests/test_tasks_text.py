"""Prompts, masks, generation and choices: token by token, and batched against one by one."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from programs import untraced
from text_lab import (
    commonsense_rows,
    e2e_rows,
    gpt2,
    gpt2_tokenizer,
    gsm8k_rows,
    language_model,
    llama,
    llama_tokenizer,
    math_rows,
    metamath_rows,
)
from transformers import DataCollatorForSeq2Seq, GenerationConfig, Trainer, TrainingArguments
from transformers.utils import logging

from fedex_hf.comparison import DataArguments, ModelArguments
from fedex_hf.metrics import load_metric
from fedex_hf.tasks import choices as choices_module
from fedex_hf.tasks import grading
from fedex_hf.tasks.choices import ChoiceTest, choice_log_likelihoods
from fedex_hf.tasks.completion import (
    IGNORED,
    CompletionArguments,
    completion_task,
    encode_pair,
    load_completion_tokenizer,
    loss_on,
    tokenize_completions,
)
from fedex_hf.tasks.data import DataError
from fedex_hf.tasks.generation import GenerationArguments, generate, in_batches, save_outputs
from fedex_hf.tasks.models import ModelError
from fedex_hf.tasks.prompts import (
    ARITHMETIC_FORMS,
    arithmetic_form,
    commonsense_choices,
    commonsense_completion,
    commonsense_prompt,
    e2e_completion,
    e2e_prompt,
)


PROMPTS = [
    "name[Zizzi], area[riverside] ->",
    "name[The Mill], area[city centre] -> In the",
    "In",
    "Ann has 3 figs and buys 2. How many are there?",
    "the correct answer",
]
MODELS = {"gpt2": (gpt2_tokenizer, gpt2), "llama": (llama_tokenizer, llama)}


@pytest.fixture(params=sorted(MODELS))
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind):
    return MODELS[kind][0](pad_token="<|endoftext|>") if kind == "gpt2" else llama_tokenizer()


@pytest.fixture
def model(kind, tokenizer):
    """With an adapter whose B is not zero, as after training."""
    adapted = get_peft_model(
        MODELS[kind][1](tokenizer),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", fan_in_fan_out=kind == "gpt2"),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted.train()


def tokenized(tokenizer, rows=None, limit=None, **kwargs):
    rows = Dataset.from_list(e2e_rows(8) if rows is None else rows)
    return tokenize_completions(rows, tokenizer, e2e_prompt, e2e_completion, limit, "`here`", **kwargs)


# Prompts


def test_meaning_representations_and_references_have_the_form_of_the_official_code():
    row = {"meaning_representation": "name[Zizzi]", "human_reference": "Zizzi is a pub.\n"}
    assert e2e_prompt(row) + e2e_completion(row) == "name[Zizzi] -> Zizzi is a pub."


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
FIGS = "Ann has 0 figs and buys 1. How many are there?"


@pytest.mark.parametrize(
    ("rows", "form", "question", "answer"),
    [
        (metamath_rows, "metamath", FIGS, " There are 1.\nThe answer is: 1"),
        (gsm8k_rows, "gsm8k", FIGS, " 0 + 1 = 1\n#### 1\nThe answer is: 1"),
        (math_rows, "math", "What is $0+1$?", " It is $\\boxed{1}$.\nThe answer is: 1"),
    ],
)
def test_questions_have_metamaths_form(rows, form, question, answer):
    (row,) = rows(1)
    expected = f"{ALPACA}### Instruction:\n{question}\n\n### Response: Let's think step by step."
    assert arithmetic_form(list(row)) == form
    assert ARITHMETIC_FORMS[form].prompt(row) == expected
    assert ARITHMETIC_FORMS[form].completion(row) == answer


@pytest.mark.parametrize(
    ("rows", "form", "extra"),
    [
        (math_rows, "math", ["answer"]),
        (math_rows, "math", ["question"]),
        (math_rows, "math", ["response"]),
        (gsm8k_rows, "gsm8k", ["query"]),
        (gsm8k_rows, "gsm8k", ["response"]),
        (gsm8k_rows, "gsm8k", ["problem", "solution"]),
        (metamath_rows, "metamath", ["question", "answer"]),
        (metamath_rows, "metamath", ["problem", "solution"]),
    ],
)
def test_extra_columns_are_not_read(rows, form, extra):
    (row,) = rows(1)
    more = {**dict.fromkeys(extra, "wrong"), **row, "extra": "wrong"}
    assert arithmetic_form(list(more)) == form
    assert ARITHMETIC_FORMS[form].prompt(more) == ARITHMETIC_FORMS[form].prompt(row)
    assert ARITHMETIC_FORMS[form].completion(more) == ARITHMETIC_FORMS[form].completion(row)


def test_a_test_is_read_by_its_own_form_whatever_form_its_columns_have():
    (row,) = gsm8k_rows(1)
    both = {"query": "wrong", "response": "wrong", **row}
    assert arithmetic_form(list(both)) == "metamath"
    assert ARITHMETIC_FORMS["gsm8k"].completion(both) == ARITHMETIC_FORMS["gsm8k"].completion(row)


def test_other_columns_have_no_arithmetic_form():
    assert arithmetic_form(["question", "solution"]) is None


def test_instructions_have_the_form_of_llm_adapters():
    row = commonsense_rows("boolq", 1)[0]
    assert commonsense_prompt(row) == f"{ALPACA}### Instruction:\n{row['instruction']}\n\n### Response:\n"
    assert commonsense_completion(row) == "the correct answer is true"
    assert commonsense_choices(row) == ["true", "false"]
    with_input = commonsense_prompt({**row, "input": "A {text}."})
    assert with_input.endswith(f"{row['instruction']}\n\n### Input:\nA {{text}}.\n\n### Response:\n")
    assert with_input.startswith("Below is an instruction that describes a task, paired with an input")


def test_the_format_of_answers_counts_only_at_the_end():
    assert commonsense_choices({"instruction": "Answer format: a/b\n\nIs it so?"}) is None


# Tokens and masks


@pytest.mark.parametrize("max_seq_length", [None, 200])
def test_labels_are_the_completion_and_its_end_and_nothing_of_the_prompt(tokenizer, kind, max_seq_length):
    for row, tokens in zip(e2e_rows(8), tokenized(tokenizer, limit=max_seq_length)):
        prompt = tokenizer(e2e_prompt(row))["input_ids"]
        own = e2e_completion(row) if kind == "gpt2" else e2e_completion(row).strip()  # Llama's adds a space itself
        completion = [*tokenizer(own, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert tokens["input_ids"] == prompt + completion
        assert tokens["labels"] == [IGNORED] * len(prompt) + completion
        assert tokens["attention_mask"] == [1] * len(tokens["input_ids"])
        if kind == "llama":
            assert tokens["input_ids"].count(tokenizer.bos_token_id) == 1
            assert tokens["input_ids"][0] == tokenizer.bos_token_id


def test_pairs_are_the_whole_text_without_a_blank_too_many(tokenizer):
    for row in gsm8k_rows(5):
        form = ARITHMETIC_FORMS["gsm8k"]
        prompt, completion = encode_pair(tokenizer, form.prompt(row), form.completion(row))
        text = form.prompt(row) + form.completion(row)
        assert tokenizer.decode(prompt + completion, skip_special_tokens=True) == text


def test_prompts_keep_their_tokens_where_a_token_would_reach_over_the_boundary():
    tokenizer = gpt2_tokenizer()
    whole = tokenizer("riverside")["input_ids"]
    prompt, completion = encode_pair(tokenizer, "river", "side")
    assert len(whole) == 1
    assert prompt == tokenizer("river")["input_ids"]
    assert tokenizer.decode(prompt + completion) == "riverside"


def test_a_tokenizer_that_ends_every_text_does_not_end_prompts():
    from tokenizers import processors

    tokenizer = llama_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("In the")["input_ids"][-1] == tokenizer.eos_token_id
    prompt, completion = encode_pair(tokenizer, "In the", " riverside")
    plain = encode_pair(llama_tokenizer(), "In the", " riverside")
    assert (prompt, completion) == plain
    (row,) = tokenized(tokenizer, rows=e2e_rows(1))
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_long_completions_are_cut_and_counted(tokenizer, caplog):
    whole = tokenized(tokenizer)
    lengths = [len(ids) for ids in whole["input_ids"]]
    limit = max(lengths) - 1
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        cut = tokenized(tokenizer, limit=limit)
    finally:
        logging.disable_propagation()
        logging.set_verbosity_error()
    assert [len(ids) for ids in cut["input_ids"]] == [min(length, limit) for length in lengths]
    assert cut["labels"][0] == whole["labels"][0][:limit]
    number = sum(length > limit for length in lengths)
    assert f"{number} of 8 completions are cut at `--max_seq_length {limit}`" in caplog.text


def test_prompts_without_room_are_refused_or_left_out_if_asked(tokenizer):
    rows = [*e2e_rows(2), {"meaning_representation": "name[Zizzi], " * 20, "human_reference": "Zizzi."}]
    long = len(tokenizer(e2e_prompt(rows[2]))["input_ids"])
    with pytest.raises(
        DataError, match=rf"1 of 3 prompts leave no room .*`--max_seq_length {long}`.*has {long} tokens"
    ):
        tokenized(tokenizer, rows, limit=long)
    assert len(tokenized(tokenizer, rows, limit=long + 1)) == 3
    assert len(tokenized(tokenizer, rows, limit=long, skip_long_prompts=True)) == 2
    with pytest.raises(DataError, match="3 of 3"):
        tokenized(tokenizer, rows, limit=2, skip_long_prompts=True)


def test_columns_are_kept_on_request(tokenizer):
    assert tokenized(tokenizer).column_names == ["input_ids", "attention_mask", "labels"]
    kept = tokenized(tokenizer, keep=["human_reference"])
    assert kept["human_reference"][:] == [row["human_reference"] for row in e2e_rows(8)]


def collated(tokenizer, number=8):
    tokenizer.padding_side = "right"
    rows = tokenized(tokenizer).select(range(number))
    task = completion_task("e2e", rows, rows, tokenizer, ModelArguments(), None, "loss", rows)
    return rows, task.trainer_kwargs["data_collator"](list(rows))


def test_padding_is_masked_and_the_end_is_not_even_where_both_are_one_token(tokenizer):
    rows, batch = collated(tokenizer)
    assert len({len(ids) for ids in rows["input_ids"]}) > 1
    for ids, labels, mask, row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], rows):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"]
        assert labels[:length].tolist() == row["labels"]
        assert labels[length - 1] == tokenizer.eos_token_id
        assert (labels[length:] == IGNORED).all()
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)


def nll(model, row, first):
    """Sums over a row's labels from `first` on, in float64: the labels' own loss and the mean over the vocabulary."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    wanted = ids[0, 1:, None]
    own, uniform = -log_probs.gather(1, wanted)[:, 0], -log_probs.mean(-1)
    return own[first - 1 :].sum(), uniform[first - 1 :].sum(), len(own) - first + 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_completions_alone_also_with_label_smoothing(model, tokenizer, tmp_path, smoothing):
    rows, _ = collated(tokenizer)
    args = TrainingArguments(
        str(tmp_path), label_smoothing_factor=smoothing, per_device_eval_batch_size=8, use_cpu=True, report_to="none"
    )
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    trainer = Trainer(model, args, data_collator=collator, processing_class=tokenizer)
    loss = trainer.evaluate(rows)["eval_loss"]

    def expected(first_of):
        own, uniform, count = map(sum, zip(*(nll(model.eval(), row, first_of(row)) for row in rows)))
        return float((1 - smoothing) * own / count + smoothing * uniform / count)

    assert loss == pytest.approx(expected(lambda row: row["labels"].count(IGNORED)), rel=1e-5)
    assert loss != pytest.approx(expected(lambda row: 1), rel=1e-3)  # of the prompts too


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reported_loss_is_the_mean_over_all_tokens_whatever_the_batches(model, tokenizer, tmp_path, smoothing):
    rows = [
        {**row, "human_reference": row["human_reference"] * (1 + 2 * (index % 4 == 1))}
        for index, row in enumerate(e2e_rows(11))
    ]
    references = tokenized(tokenizer, rows)
    assert len({len(ids) for ids in references["labels"]}) > 2
    tokenizer.padding_side = "right"
    given = completion_task(
        "e2e", references, references, tokenizer, ModelArguments(), None, "loss", references
    ).trainer_kwargs
    losses, of_trainer = [], []
    for batch_size in (1, 8):
        args = TrainingArguments(
            str(tmp_path),
            label_smoothing_factor=smoothing,
            per_device_eval_batch_size=batch_size,
            use_cpu=True,
            report_to="none",
        )
        losses.append(Trainer(model, args, eval_dataset=references, **given).evaluate()["eval_loss"])
        losses.append(loss_on(Trainer(model, args, **given), references))
        plain = Trainer(model, args, data_collator=given["data_collator"], processing_class=tokenizer)
        of_trainer.append(plain.evaluate(references)["eval_loss"])
    sums, _, counts = zip(*(nll(model.eval(), row, row["labels"].count(IGNORED)) for row in references))
    expected = float(sum(sums) / sum(counts))
    assert losses == pytest.approx([expected] * 4, rel=1e-6, abs=1e-6)
    assert of_trainer[0] != pytest.approx(of_trainer[1], rel=1e-4)  # the twin: means of batches differ


# Tokenizers that are refused


def load(folder, max_seq_length=64, pad_token=None):
    model = ModelArguments(model_name_or_path=str(folder))
    return load_completion_tokenizer(
        model, DataArguments(max_seq_length=max_seq_length), CompletionArguments(pad_token)
    )


def test_a_tokenizer_without_padding_token_is_refused_unless_one_is_named(tmp_path):
    language_model(tmp_path, "gpt2")
    with pytest.raises(ModelError, match=r"no padding token.*--pad_token '<\|endoftext\|>'"):
        load(tmp_path)
    assert load(tmp_path, pad_token="<|endoftext|>").pad_token_id == 0
    with pytest.raises(ModelError, match="`--pad_token nothing` is not in the vocabulary"):
        load(tmp_path, pad_token="nothing")


def test_a_tokenizer_without_end_is_refused(tmp_path):
    language_model(tmp_path, "llama", eos_token=None)
    with pytest.raises(ModelError, match=r"no token that ends a text.*`eos_token`"):
        load(tmp_path)


def test_more_tokens_than_the_model_takes_are_refused(tmp_path):
    language_model(tmp_path)
    with pytest.raises(ModelError, match=r"`--max_seq_length 257` is more than .* takes: 256"):
        load(tmp_path, max_seq_length=257)


# Generation


def by_hand(model, tokenizer, prompt, new_tokens):
    """Greedy decoding of one prompt, without batch, padding or cache."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new: list[int] = []
    for _ in range(new_tokens):
        token = model.eval()(input_ids=ids).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_greedy_outputs_are_those_of_one_prompt_at_a_time_in_their_order(model, tokenizer):
    with torch.no_grad():
        expected = [by_hand(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 8):
        assert generate(model, tokenizer, PROMPTS, batch_size, 8) == expected


def test_padding_on_the_wrong_side_would_show(model, tokenizer, monkeypatch):
    expected = generate(model, tokenizer, PROMPTS, 5, 8)
    pad = type(tokenizer).pad
    monkeypatch.setattr(
        type(tokenizer), "pad", lambda self, *args, **kwargs: pad(self, *args, **{**kwargs, "padding_side": "right"})
    )
    assert generate(model, tokenizer, PROMPTS, 5, 8) != expected


def test_beams_are_those_of_one_prompt_at_a_time(model, tokenizer):
    beams = {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 2}
    expected = [generate(model, tokenizer, [prompt], 1, 8, **beams)[0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, 3, 8, **beams) == expected
    assert generate(model, tokenizer, PROMPTS, 3, 8) != expected


def test_decoding_follows_the_arguments_and_not_the_models_own_config(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, 5, 8)
    inner = model.get_base_model()
    own = GenerationConfig(repetition_penalty=50.0, do_sample=True, max_length=3, eos_token_id=7, pad_token_id=0)
    inner.generation_config = model.generation_config = own
    assert generate(model, tokenizer, PROMPTS, 5, 8) == expected
    assert inner.generation_config is own
    assert own.to_diff_dict()["repetition_penalty"] == 50.0


def test_the_model_comes_back_as_it_was(model, tokenizer):
    model.config.use_cache = False
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for training in (True, False):
        model.train(training)
        generate(model, tokenizer, PROMPTS[:1], 1, 2)
        choice_log_likelihoods(model, tokenizer, ["In"], [[" the"]], 1)
        assert model.training is training
    assert model.config.use_cache is False
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_outputs_stop_at_the_end_of_the_text(model, tokenizer, kind):
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        for _ in range(3):
            third = model.eval()(input_ids=ids).logits[0, -1].argmax().item()
            ids = torch.cat([ids, torch.tensor([[third]])], dim=1)
    new = ids[0, -3:].tolist()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    expected = new[: new.index(third)]
    (output,) = generate(model, tokenizer, PROMPTS[:1], 1, 8)
    assert output == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_prompts_that_leave_no_room_for_the_output_are_refused(model, tokenizer):
    length = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    generate(model, tokenizer, PROMPTS, 5, 4, context=length + 4)
    with pytest.raises(DataError, match=rf"more than {length - 1} tokens.*`--max_new_tokens 5`.*longest has {length}"):
        generate(model, tokenizer, PROMPTS, 5, 5, context=length + 4)


def test_long_items_come_first_and_values_in_order():
    seen = []

    def work(indices):
        seen.append(indices)
        return [index * 10 for index in indices]

    assert in_batches([3, 9, 1, 7], 2, work, "x") == [0, 10, 20, 30]
    assert seen == [[1, 3], [0, 2]]
    assert in_batches([], 2, work, "x") == []


def test_outputs_are_written_as_they_read(tmp_path):
    rows = grading.rows_to_read(["q →"], ["Café\nRouge"], [["a", "b"]], correct=[True])
    save_outputs(tmp_path / "outputs.jsonl", rows)
    (line,) = (tmp_path / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    assert "Café" in line
    assert json.loads(line) == {"prompt": "q →", "output": "Café\nRouge", "references": ["a", "b"], "correct": True}


TWO_PROCESSES = """
import json, sys
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from fedex_hf.comparison import ModelArguments
from fedex_hf.tasks.choices import choice_log_likelihoods
from fedex_hf.tasks.completion import completion_task, loss_on
from fedex_hf.tasks.generation import generate
state = PartialState(cpu=True)
model, tokenizer = (each.from_pretrained(sys.argv[1]) for each in (AutoModelForCausalLM, AutoTokenizer))
prompts = json.loads(sys.argv[2])
outputs = generate(model, tokenizer, prompts, 2, 6)
scores = choice_log_likelihoods(model, tokenizer, prompts, [[" the", " In it"]] * len(prompts), 2)
rows = Dataset.from_list(json.load(open(f"{sys.argv[3]}/rows.json")))
args = TrainingArguments(sys.argv[3], per_device_eval_batch_size=2, use_cpu=True, report_to="none")
tokenizer.padding_side = "right"
task = completion_task("x", rows, rows, tokenizer, ModelArguments(), None, "loss", rows)
loss = loss_on(Trainer(model, args, **task.trainer_kwargs), rows)
assert state.num_processes == 2
json.dump([outputs, scores, loss], open(f"{sys.argv[3]}/{state.process_index}.json", "w"))
"""


def test_processes_share_the_prompts_and_all_get_everything(tmp_path):
    language_model(tmp_path / "model")
    rows = tokenized(llama_tokenizer(), e2e_rows(5))
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    command = [sys.executable, *launch, str(tmp_path / "model"), json.dumps(PROMPTS), str(tmp_path)]
    subprocess.run(command, env=untraced(), check=True, capture_output=True, timeout=300)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    tokenizer = llama_tokenizer()
    model = llama(tokenizer)
    scores = choice_log_likelihoods(model, tokenizer, PROMPTS, [[" the", " In it"]] * len(PROMPTS), 2)
    assert first == second
    assert first[0] == generate(model, tokenizer, PROMPTS, 2, 6)
    assert torch.allclose(torch.tensor(first[1]), torch.tensor(scores), rtol=1e-5)
    sums, _, counts = zip(*(nll(model.eval(), row, row["labels"].count(IGNORED)) for row in rows))
    assert first[2] == pytest.approx(float(sum(sums) / sum(counts)), rel=1e-6)


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams", "generation_batch_size"])
def test_generation_arguments_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}=0` is not allowed"):
        GenerationArguments(**{name: 0})


def test_greedy_decoding_is_not_told_a_length_penalty():
    assert "length_penalty" not in GenerationArguments(length_penalty=0.5).decoding()
    assert GenerationArguments(num_beams=2, length_penalty=0.5).decoding()["length_penalty"] == 0.5


# Choices


def test_log_likelihoods_are_those_of_one_text_at_a_time(model, tokenizer):
    choices = [
        [" In the riverside there is Zizzi.", " the"],
        [" a"],
        [" the", " In the city centre"],
        [" 5"],
        [" is", " true"],
    ]
    scored = choice_log_likelihoods(model, tokenizer, PROMPTS, choices, 3)
    for prompt, allowed, scores in zip(PROMPTS, choices, scored):
        assert len(scores) == len(allowed)
        for choice, score in zip(allowed, scores):
            begin, end = encode_pair(tokenizer, prompt, choice)
            with torch.no_grad():
                log_probs = model.eval()(input_ids=torch.tensor([begin + end])).logits[0].double().log_softmax(-1)
            by_token = [log_probs[len(begin) + at - 1, token].item() for at, token in enumerate(end)]
            assert score == pytest.approx(math.fsum(by_token), rel=1e-5)
            assert score != pytest.approx(math.fsum(by_token[1:]), rel=1e-3)


def test_chosen_answers_are_the_likeliest_allowed_ones(model, tokenizer, tmp_path):
    rows = commonsense_rows("social_i_qa", 6)
    prompts = [commonsense_prompt(row) for row in rows]
    allowed, answers = [commonsense_choices(row) for row in rows], [row["answer"] for row in rows]
    test = ChoiceTest.prepare("social_i_qa", prompts, allowed, answers, tokenizer, 256, "`here`")
    shares = test.run(model, tokenizer, GenerationArguments(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "social_i_qa_choices.jsonl").read_text().splitlines()]
    right = [max(line["log_likelihoods"], key=line["log_likelihoods"].get) == line["references"] for line in lines]
    assert shares["acc"] == pytest.approx(sum(right) / 6)
    assert [line["references"] for line in lines] == answers


def test_choices_are_normalised_by_the_characters_of_the_text_that_is_scored(tokenizer, tmp_path, monkeypatch):
    """Per character of `the correct answer is ...`, that is 22 + 2 and 22 + 11, the two differ as they should."""
    scored = {"no": -2.4, "solution100": -3.2}  # -0.1 and -0.097 per character; of the bare choices, -1.2 and -0.29
    near = {"no": -2.4, "solution100": -3.5}  # -0.1 and -0.106; the bare choices would choose the longer one
    seen = []

    def score(model, tokenizer, prompts, choices, *args, **kwargs):
        seen.extend(choices)
        return [list(scored.values()), list(near.values())]

    monkeypatch.setattr(choices_module, "choice_log_likelihoods", score)
    test = ChoiceTest.prepare("piqa", ["x", "y"], [list(scored)] * 2, ["solution100", "no"], tokenizer, 256, "`here`")
    shares = test.run(None, tokenizer, GenerationArguments(), tmp_path)
    assert seen[0] == ["the correct answer is no", "the correct answer is solution100"]
    assert [len(text) for text in seen[0]] == [24, 33]
    assert shares == {"acc": 0.5, "acc_norm": 1.0}


def test_rows_that_do_not_allow_their_own_answer_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"2 of 2 rows .*row 0 first: 'c' of \['a', 'b'\].*--scoring generated"):
        ChoiceTest.prepare("boolq", ["x", "y"], [["a", "b"], None], ["c", "a"], tokenizer, 256, "`here`")


def test_choices_beyond_the_context_are_refused(tokenizer):
    with pytest.raises(DataError, match="have more than 8 tokens"):
        ChoiceTest.prepare("boolq", ["In the riverside " * 9], [["true"]], ["true"], tokenizer, 8, "`here`")


# Grading


GRADED = {
    "gsm8k": (["It is 1,000.", "5", "none"], ["#### 1000", "<<1+1=2>>2\n#### 2", "#### 3"], None),
    "math": (["\\boxed{\\frac{1}{2}}", "The answer is: 3", ""], ["\\boxed{0.5}", "\\boxed{4}", "\\boxed{5}"], None),
    "commonsense": (["the correct answer is true", "false", ""], ["true", "true", "false"], "boolq"),
}


@pytest.mark.parametrize("metric", sorted(GRADED))
def test_the_share_of_right_outputs_is_the_metric(metric):
    outputs, references, config = GRADED[metric]
    if grading.missing_requirements(metric):
        pytest.skip("needs an extra")
    right = grading.grade(metric, outputs, references, config)
    assert right == [True, False, False]
    (value,) = load_metric(metric, config).compute(predictions=outputs, references=references).values()
    assert value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("metric", "reference", "config"),
    [
        ("gsm8k", "#### none", None),
        ("gsm8k", 12, None),
        ("math", " ", None),
        ("math", "So $\\boxed{}$.", None),
        ("commonsense", "yes", "boolq"),
        ("commonsense", True, "boolq"),
    ],
)
def test_references_that_nothing_can_equal_are_refused(metric, reference, config):
    if grading.missing_requirements(metric):
        pytest.skip("needs an extra")
    good = GRADED[metric][1][0]
    with pytest.raises(DataError, match="`here`: 1 of 2 rows have no reference to compare with, row 1 first"):
        grading.check_references(metric, [good, reference], "`here`", config)
    grading.check_references(metric, [good], "`here`", config)


def test_missing_requirements_are_refused_or_left_out_if_asked(monkeypatch, capsys):
    lack = {"meteor": ["No `java` is on the PATH."], "cider": ["No `java` is on the PATH."]}
    monkeypatch.setattr(grading, "missing_requirements", lambda metric, parts: lack.get(parts[0], []) if parts else [])
    with pytest.raises(grading.MetricError, match=r"\(meteor, cider\)\. No `java`.*`--skip_missing_metrics`"):
        grading.computable("e2e_nlg", ["bleu", "meteor", "cider"], skip_missing=False)
    assert grading.computable("e2e_nlg", ["bleu", "meteor", "cider"], skip_missing=True) == ["bleu"]
    assert capsys.readouterr().out.count("No `java`") == 1
    assert grading.computable("gsm8k", None, skip_missing=False) == ["gsm8k"]
