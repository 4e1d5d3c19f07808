"""A federated run that publishes, in a process of its own: what the tests of the Hub start, kill and resume.

    python hub_target.py SETTINGS.json          one run
    python hub_target.py --serve                one run per job, see `forks.py`

Keys of the settings, all but `output_dir` optional:

    family, seed, lora      a model of `tiny.py`, of another seed, with other fields of its `LoraConfig`
    base, base_kwargs       load the base from there instead
    model, revision         continue a published run instead
    tokenizer               true: with a tokenizer, which pipelines need; a number: one that takes so long to be saved
    plots                   true: cards with plots, which take most of the time
    arguments               of `FederatedTrainingArguments`
    wait                    seconds before the publisher's first further attempt
    reference               folder that gets `round-N.safetensors`, what the trainer's own model says after each round
    hold                    {round: file}: after this round, write `<file>.reached` and wait until `file` is there
    kill_before_operation   SIGKILL before this file operation below `<output_dir>/.hub`
    refused                 true: return the error that the run ends with
    actions                 "train" (the default), "push", {"train": checkpoint}, {"push": arguments},
                            {"save": arguments}, {"outcome": file}, {"write": file}, {"await": file}

With `snapshot`, a repository, it downloads that instead.
With `upload` it publishes a base instead: `{"family", "seed", "repo", "dtype", "part"}`, the last being the attribute
that holds a model without its head.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import forks
import huggingface_hub
import kill_target
import tiny
import torch
from huggingface_hub import HfApi, snapshot_download
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.utils import logging

from fedex_hf import FederatedCallback, FederatedTrainer


PROMPT = "t5 t6 t7 t8"
NEW_TOKENS = 5


def tied_llama(seed: int = 0) -> PreTrainedModel:
    """`tiny.llama` with one tensor for the embedding and the language-model head."""
    config = tiny.llama(seed).config
    config.tie_word_embeddings = True
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


FAMILIES: dict[str, dict[str, Any]] = {
    "roberta": {"make": tiny.roberta, "lora": {"target_modules": ["query", "value"]}},
    "llama": {"make": tiny.llama, "lora": {"target_modules": "all-linear"}},
    "llama-tied": {"make": tied_llama, "lora": {"target_modules": "all-linear"}},
    "gpt2": {"make": tiny.gpt2, "lora": {"target_modules": ["c_attn", "c_proj"]}},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every token: `t0`, `t1`, ..."""
    words = Tokenizer(WordLevel({f"t{index}": index for index in range(tiny.VOCAB)}, unk_token="t3"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", padding_side="right")


class SlowTokenizer(PreTrainedTokenizerFast):
    """Makes the staging of a round last."""

    seconds = 0.0

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(self.seconds)
        return super().save_pretrained(*args, **kwargs)


def is_classifier(family: str) -> bool:
    return family == "roberta"


def inputs_of(family: str) -> torch.Tensor:
    """What logits are compared on."""
    data = tiny.classification_data if is_classifier(family) else tiny.language_data
    return torch.tensor(data(8, seed=5)["input_ids"][:])


class References(FederatedCallback):
    """Writes what every round's model says: logits, and what a pipeline must answer to `PROMPT`."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family = folder, family
        folder.mkdir(parents=True, exist_ok=True)

    def on_round_end(self, args, state, control, round, metrics, trainer=None, **kwargs):
        trainer.model.eval()
        inputs, prompt = inputs_of(self.family), tokenizer()(PROMPT, return_tensors="pt")
        prompt.pop("token_type_ids", None)
        with torch.no_grad():
            told = {"inputs": inputs, "logits": trainer.model(inputs).logits}
            if is_classifier(self.family):
                told["answer"] = trainer.model(**prompt).logits[0]
            else:
                told["answer"] = trainer.model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        save_file(told, self.folder / f"round-{round}.safetensors")


class Hold(FederatedCallback):
    """Lets a test do something between two rounds."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def on_round_end(self, args, state, control, round, metrics, trainer=None, **kwargs):
        if str(round) in self.files:
            file = Path(self.files[str(round)])
            file.with_name(f"{file.name}.reached").touch()
            wait_for(file)


class Steps(TrainerCallback):
    """Counts the optimizer steps of this process."""

    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"`{file}` did not come."
        time.sleep(0.01)


def lora_of(settings: dict[str, Any]) -> LoraConfig:
    """The `LoraConfig` of a run."""
    family = settings.get("family", "roberta")
    task = "SEQ_CLS" if is_classifier(family) else "CAUSAL_LM"
    return tiny.lora(**({"task_type": task} | FAMILIES[family]["lora"] | settings.get("lora", {})))


def build(settings: dict[str, Any]) -> FederatedTrainer:
    """The trainer; equal settings give equal bytes."""
    family = settings.get("family", "roberta")
    labels = is_classifier(family)
    data = tiny.classification_data if labels else tiny.language_data
    kwargs: dict[str, Any] = {"peft_config": lora_of(settings)}
    if "model" in settings:
        kwargs = {"model": settings["model"], "revision": settings.get("revision")}
    elif "base" in settings:
        auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        kwargs["model"] = auto.from_pretrained(settings["base"], **settings.get("base_kwargs", {}))
    else:
        kwargs["model"] = FAMILIES[family]["make"](settings.get("seed", 0))
    if settings.get("tokenizer"):
        kwargs["processing_class"] = tokenizer()
        if settings["tokenizer"] is not True:
            kwargs["processing_class"].__class__ = SlowTokenizer
            SlowTokenizer.seconds = settings["tokenizer"]
    trainer = FederatedTrainer(
        args=tiny.arguments(settings["output_dir"], **settings.get("arguments", {})),
        train_dataset=tiny.clients_of([12, 7, 9], data),
        eval_dataset=data(20, seed=1),
        **kwargs,
    )
    if trainer.publisher is not None:
        trainer.publisher.wait = settings.get("wait", 0.01)
    if "reference" in settings:
        trainer.add_callback(References(Path(settings["reference"]), family))
    if "hold" in settings:
        trainer.add_callback(Hold(settings["hold"]))
    return trainer


def act(trainer: FederatedTrainer, action: str | dict[str, Any]) -> None:
    """One of the actions above."""
    name, value = next(iter(action.items())) if isinstance(action, dict) else (action, None)
    if name == "train":
        trainer.train(resume_from_checkpoint=value)
    elif name == "push":
        trainer.push_to_hub(**(value or {}))
    elif name == "save":
        trainer.save_model(**value)
    elif name == "outcome":
        torch.save(kill_target.outcome(trainer), value)
    elif name == "write":
        Path(value).touch()
    elif name == "await":
        wait_for(Path(value))
    else:
        raise ValueError(f"Unknown action: {action}")


def upload_base(family: str, repo: str, seed: int = 0, dtype: str = "float32", part: str | None = None) -> None:
    """Publish a base, as anybody would."""
    model = FAMILIES[family]["make"](seed).to(getattr(torch, dtype))
    model = model if part is None else getattr(model, part)
    folder = Path("base")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    api = HfApi()
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Do what the settings say.

    Returns:
        The rounds' certificates, the number of optimizer steps, and the error, if it may end with one.
    """
    torch.set_num_threads(1)
    for library in (logging, huggingface_hub.logging):
        library.set_verbosity(settings.get("verbosity", logging.WARNING))
    if not settings.get("plots"):
        sys.modules["matplotlib.backends.backend_agg"] = None  # as where it is not installed
    if "snapshot" in settings:
        snapshot_download(settings["snapshot"])
        return {}
    if "upload" in settings:
        upload_base(**settings["upload"])
        return {}
    steps, told = Steps(), {"refused": None, "rounds": []}
    operations = kill_target._FileOperations(
        os.path.join(settings["output_dir"], ".hub"), settings.get("kill_before_operation")
    )
    try:
        trainer = build(settings)
        trainer.add_callback(steps)
        sys.addaudithook(operations)
        for action in settings.get("actions", ["train"]):
            act(trainer, action)
        told["rounds"] = [entry for entry in trainer.state.log_history if "aggregation_error" in entry]
    except Exception as error:
        if not settings.get("refused"):
            raise
        told["refused"] = f"{type(error).__name__}: {error}"
    operations.kill_before = None
    return told | {"steps": steps.count, "operations": operations.count}


def main() -> None:
    if sys.argv[1] == "--serve":
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            build({"output_dir": folder})  # brings in what is imported late, and tables that are made once
        forks.serve(run)
    else:
        print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))["rounds"]))


if __name__ == "__main__":
    main()
