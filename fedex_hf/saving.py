"""Room 7a: a model directory that plain `from_pretrained` loads, with nothing of ours installed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.save_and_load import get_base_model_state_dict
from transformers import PreTrainedModel


def save_full_model(model: PeftModel, output_dir: str | os.PathLike) -> None:
    """Write the residual-updated base and the adapter side by side in one directory.

    `AutoModelFor*.from_pretrained(dir)` finds the base beside the adapter; `AutoPeftModelFor*` and `PeftConfig` follow
    `base_model_name_or_path`, which is the directory's absolute path. After moving the directory, either use the
    first, or set that field in `adapter_config.json` to the new place.

    Args:
        model: The model with one active adapter.
        output_dir: Created if needed; files of the same names are replaced.
    """
    directory = Path(output_dir).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    base, adapter = cast(PreTrainedModel, model.get_base_model()), model.active_adapters[0]
    base.save_pretrained(directory, state_dict=get_base_model_state_dict(model) | _trained_modules(base, adapter))
    original = model.peft_config[adapter]
    saved = copy.copy(original)
    saved.base_model_name_or_path = str(directory)
    saved.revision = None
    saved.inference_mode = True
    model.peft_config[adapter] = saved
    try:
        # "auto" would add the base embedding to the adapter where it is adapted, and ask the Hub about it each time.
        model.save_pretrained(str(directory), selected_adapters=[adapter], save_embedding_layers=False)
    finally:
        model.peft_config[adapter] = original
    if adapter != "default":  # PEFT puts any other adapter into a folder of its name, where loaders do not look
        for file in (directory / adapter).iterdir():
            file.replace(directory / file.name)
        (directory / adapter).rmdir()


def _trained_modules(base: PreTrainedModel, adapter: str) -> dict[str, torch.Tensor]:
    """The trained copies of `modules_to_save` under the base's own names.

    Some transformers versions (before 5.18) load the adapter beside a base without its `modules_to_save`; the head
    that they take from the base is then the trained one.
    """
    return {
        f"{name}.{key}": tensor
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, tensor in module.modules_to_save[adapter].state_dict().items()
    }
