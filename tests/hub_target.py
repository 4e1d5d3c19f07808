"""A federated run that publishes, in a process of its own: what the tests of the Hub start, kill and resume.

    python hub_target.py SETTINGS.json

Keys of the settings, all but `output_dir` optional: `family` (a model of `tiny.py`), `base` (load the base from
there), `arguments` (of `FederatedTrainingArguments`), `model` and `revision` (continue a published run), `resume`
(passed to `train`), `train` (false: only build the trainer), `push` (call `push_to_hub` at the end), `reference`
(folder that gets `round-N.safetensors`: inputs, and the logits of the trainer's own model after each round).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from fedex_hf import FederatedCallback, FederatedTrainer


FAMILIES: dict[str, dict[str, Any]] = {
    "roberta": {"make": tiny.roberta, "lora": {"target_modules": ["query", "value"]}},
    "llama": {"make": tiny.llama, "lora": {"target_modules": "all-linear"}},
    "gpt2": {"make": tiny.gpt2, "lora": {"target_modules": ["c_attn", "c_proj"]}},
}


class References(FederatedCallback):
    """Writes the logits of every round's model."""

    def __init__(self, folder: Path, inputs: torch.Tensor) -> None:
        self.folder, self.inputs = folder, inputs
        folder.mkdir(parents=True, exist_ok=True)

    def on_round_end(self, args, state, control, round, metrics, trainer=None, **kwargs):
        trainer.model.eval()
        with torch.no_grad():
            logits = trainer.model(self.inputs).logits
        save_file({"inputs": self.inputs, "logits": logits}, self.folder / f"round-{round}.safetensors")


def build(settings: dict[str, Any]) -> FederatedTrainer:
    """The trainer; equal settings give equal bytes."""
    family = FAMILIES[settings.get("family", "roberta")]
    labels = family["make"] is tiny.roberta
    data = tiny.classification_data if labels else tiny.language_data
    kwargs: dict[str, Any] = {
        "peft_config": tiny.lora(task_type="SEQ_CLS" if labels else "CAUSAL_LM", **family["lora"])
    }
    if "model" in settings:
        kwargs = {"model": settings["model"], "revision": settings.get("revision")}
    elif "base" in settings and labels:
        kwargs["model"] = AutoModelForSequenceClassification.from_pretrained(settings["base"], num_labels=tiny.LABELS)
    elif "base" in settings:
        kwargs["model"] = AutoModelForCausalLM.from_pretrained(settings["base"])
    else:
        kwargs["model"] = family["make"](0)
    trainer = FederatedTrainer(
        args=tiny.arguments(settings["output_dir"], **settings.get("arguments", {})),
        train_dataset=tiny.clients_of([12, 7, 9], data),
        eval_dataset=data(20, seed=1),
        **kwargs,
    )
    if "reference" in settings:
        inputs = torch.tensor(data(8, seed=5)["input_ids"][:])
        trainer.add_callback(References(Path(settings["reference"]), inputs))
    return trainer


def main() -> None:
    """Run what the settings say, and print the rounds' certificates."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    logging.set_verbosity_warning()
    trainer = build(settings)
    if settings.get("train", True):
        trainer.train(resume_from_checkpoint=settings.get("resume"))
    if settings.get("push"):
        trainer.push_to_hub()
    print(json.dumps([entry for entry in trainer.state.log_history if "aggregation_error" in entry]))


if __name__ == "__main__":
    main()
