"""Loads published models in a process that has no fedex_hf, and compares them with what the trainer's model said.

    python hub_loader.py --serve        see `forks.py`

A job has `loads`, a list of objects: `repo`, `revision`, `path` (a key of `PATHS`), `task`, `reference` (a file of
`hub_target.py`), and optional `base` and `base_revision` (where `PeftModel` takes the base from) and `kwargs` of
`from_pretrained`. The result is a list, in the order of `loads`, of objects: `equal` (`torch.equal` of the logits),
`difference` (the largest, relative to the largest logit), `answers` (whether a pipeline's answer is equal too),
`digest` (of the logits), or `error`.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import sys
import traceback
from typing import Any

import forks
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)
from transformers.utils import logging


PROMPT, NEW_TOKENS = "t5 t6 t7 t8", 5
AUTO = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}
AUTO_PEFT = {"SEQ_CLS": AutoPeftModelForSequenceClassification, "CAUSAL_LM": AutoPeftModelForCausalLM}
PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}


class NoFedexHf(importlib.abc.MetaPathFinder):
    """The virtual environment of the tests has fedex_hf; this process has not."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "fedex_hf":
            raise ModuleNotFoundError("This process has no fedex_hf.", name=fullname)


def by_auto_model(task: str, repo: str, kwargs: dict[str, Any], load: dict[str, Any]) -> Any:
    return AUTO[task].from_pretrained(repo, **kwargs)


def by_auto_peft(task: str, repo: str, kwargs: dict[str, Any], load: dict[str, Any]) -> Any:
    return AUTO_PEFT[task].from_pretrained(repo, **kwargs)


def by_peft(task: str, repo: str, kwargs: dict[str, Any], load: dict[str, Any]) -> Any:
    """`PeftModel` on the base that stands in the same repository, or on the one that `load` names."""
    revision = {"revision": load["base_revision"] if "base" in load else load.get("revision")}
    base = AUTO[task].from_pretrained(load.get("base", repo), **(kwargs | revision))
    return PeftModel.from_pretrained(base, repo, revision=load.get("revision"))


def by_pipeline(task: str, repo: str, kwargs: dict[str, Any], load: dict[str, Any]) -> Any:
    revision = kwargs.pop("revision")
    return pipeline(PIPELINES[task], model=repo, revision=revision, model_kwargs=kwargs)


PATHS = {"auto": by_auto_model, "auto-peft": by_auto_peft, "peft": by_peft, "pipeline": by_pipeline}


def answer_of(pipe: Any) -> torch.Tensor:
    """What a pipeline says to the prompt, as numbers."""
    if pipe.task == "text-classification":
        scores = {each["label"]: each["score"] for each in pipe(PROMPT, function_to_apply="none", top_k=None)}
        return torch.tensor([scores[name] for _, name in sorted(pipe.model.config.id2label.items())])
    (answer,) = pipe(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, return_tensors=True)
    return torch.tensor(answer["generated_token_ids"])


def compare(load: dict[str, Any]) -> dict[str, Any]:
    """One load."""
    reference = load_file(load["reference"])
    task = load.get("task", "SEQ_CLS")
    kwargs = {"revision": load.get("revision")} | load.get("kwargs", {})
    try:
        model = PATHS[load["path"]](task, load["repo"], kwargs, load)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    told: dict[str, Any] = {}
    # The file's bytes lie in memory at any address, and some CPU kernels round differently by alignment.
    for parameter in (model.model if load["path"] == "pipeline" else model).parameters():
        parameter.data = parameter.data.clone()
    if load["path"] == "pipeline":
        told["answers"] = torch.equal(answer_of(model), reference["answer"])
        model = model.model
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes rounds its scales to bfloat16 to be faster
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logits = model.eval()(reference["inputs"]).logits
    told["digest"] = hashlib.sha256(logits.contiguous().view(torch.uint8).numpy()).hexdigest()
    expected = reference["logits"]
    difference = float((logits.double() - expected.double()).abs().max() / expected.double().abs().max())
    return told | {"equal": torch.equal(logits, expected), "difference": difference}


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All loads of a job."""
    torch.set_num_threads(1)  # again: some kernels do not take the setting from before a fork
    results = [compare(load) for load in job["loads"]]
    assert "fedex_hf" not in sys.modules
    return results


if __name__ == "__main__":
    assert "fedex_hf" not in sys.modules
    sys.meta_path.insert(0, NoFedexHf())
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tiny = LlamaForCausalLM(
        LlamaConfig(vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    )
    get_peft_model(tiny, LoraConfig(target_modules=["q_proj"]))  # makes tables that all jobs use
    forks.serve(run)
