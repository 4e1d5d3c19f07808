"""Room 7a: a model directory that plain `from_pretrained` loads, with nothing of ours installed, in three formats.

full     base and adapter side by side: with the residuals in the base, bit for bit the trainer's model; with the
         storage "adapter", the untouched base and `ledger + adapter` as one plain LoRA
lora     that one plain LoRA alone, on the *original* base, exactly recompressed
merged   one plain model, `base + ledger + adapter` rounded once, for servers that know no adapters
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_reference import BY_HAND, BaseReference
from fedex_hf.casting import (
    DTYPES,
    base_dtype,
    carrying_dtype,
    dtype_of,
    measure_survival,
    name_of_dtype,
    update_of,
)
from fedex_hf.layouts import AttentionLayout
from fedex_hf.ledger import Ledger
from fedex_hf.lora_site import LoraSite
from fedex_hf.model_checks import places_of
from fedex_hf.plain_lora import config_of, plain_loras
from fedex_hf.updates import LowRankDelta


FORMATS = ("full", "lora", "merged")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class SavedModel:
    """What was written.

    Args:
        format: `"full"`, `"lora"` or `"merged"`.
        dtype: Of the tensors that carry the update, such as `"float32"`.
        cast_survival: Share of the update that survived a cast to bfloat16 or float16, between 0 and 1; `None`
            where nothing was cast.
        base_dtype: Of the base weights in the folder; `None` where it holds none. Of a quantized base, the dtype of
            what is not quantized in it.
    """

    format: str
    dtype: str
    cast_survival: float | None
    base_dtype: str | None = None


def check_format(format: str, dtype: str | torch.dtype | None, base: BaseReference | None = None) -> None:
    """Refuse a format or dtype that cannot be written.

    Raises:
        ValueError: If either is unknown, `"lora"` would name no base that can be loaded, or a quantized base would
            have to be rewritten.
    """
    if format not in FORMATS:
        raise ValueError(f"`format={format!r}` is unknown. Allowed: {', '.join(map(repr, FORMATS))}.")
    if dtype is not None and dtype_of(dtype) is None:
        raise ValueError(f"`dtype={dtype!r}` is not supported. Allowed: {', '.join(map(repr, DTYPES))}, or `None`.")
    if base is None:
        return
    if format == "lora" and base.name is None:
        raise ValueError(
            'The format "lora" is one LoRA on the original base, and this base has no name to load it by: it was '
            'built from a config. Use "full" or "merged", or load the base with `from_pretrained`.'
        )
    if base.quantization is not None and format != "lora":
        _refuse_rewriting(format, dtype, base.quantization)


def _refuse_rewriting(format: str, dtype: str | torch.dtype | None, quantization: str) -> None:
    if format == "merged":
        raise ValueError(
            f'The format "merged" folds the update into base weights that are quantized ({quantization}), where most '
            'of it would round away. Use "full", the quantized base with one LoRA beside it, or "lora", that LoRA '
            "alone."
        )
    if dtype is not None:
        raise ValueError(
            f"`dtype={dtype!r}` would cast a base that is quantized ({quantization}), scales included. Leave it out, "
            'or use `format="lora"`, whose factors can be cast.'
        )
    if quantization == BY_HAND:
        raise ValueError(
            f"The base has quantized {BY_HAND}, of which its config says nothing, so nobody could load it. Quantize "
            'it with `from_pretrained(..., quantization_config=...)`, or use `format="lora"`.'
        )


def save_model(
    adapted: AdaptedModel,
    ledger: Ledger,
    output_dir: str | os.PathLike,
    format: str = "full",
    *,
    dtype: str | torch.dtype | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    max_shard_size: int | str | None = None,
) -> SavedModel:
    """Write the model that `adapted` holds.

    Args:
        adapted: The model with `ledger` installed.
        ledger: All residuals so far.
        output_dir: Created if needed; files of the same names are replaced.
        format: `"full"`, `"lora"` or `"merged"`.
        dtype: Cast what the format writes: base weights (`"full"`, `"merged"`) or factors (`"lora"`). The share of
            the update that survives is measured and logged, with a warning below 99 %. Default: no cast.
        repo_id: Repository that the files will be published in. `"full"` then names it as the adapter's base, where a
            local folder names its own absolute path.
        revision: Tag that `"full"` pins its base to, such as `"round-3"`.
        max_shard_size: As in `PreTrainedModel.save_pretrained`.

    Raises:
        ValueError: If `format` or `dtype` is unknown, `"lora"` has no base to name, a quantized base would have to be
            rewritten, or the folder holds files of another format.
    """
    base = BaseReference.of(adapted.model)
    check_format(format, dtype, base)
    directory = Path(output_dir).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_other_formats(directory, format)
    target = dtype_of(dtype)
    written = None
    if format != "lora":
        weights, untied = _base_weights(adapted, ledger, format, target)
        _write_base(adapted.model, weights, directory, target, max_shard_size, untied)
        written = name_of_dtype(target or base_dtype(adapted))
    factors, config = None, copy.copy(cast(LoraConfig, adapted.model.peft_config[adapted.adapter]))
    config.init_lora_weights = True  # any other start would be run again on the saved base
    if format == "lora" or (format == "full" and adapted.storage == "adapter"):
        factors = plain_loras(adapted.sites, ledger, target if format == "lora" else None)
        config = config_of(config, adapted.sites, factors)
    if format != "merged":
        config.base_model_name_or_path, config.revision = base.name, base.revision
        if format == "full":
            config.base_model_name_or_path, config.revision = repo_id or str(directory), revision
        _write_adapter(adapted, config, directory, factors)
    survival = measure_survival(adapted, ledger, format, target)
    return SavedModel(format, name_of_dtype(carrying_dtype(adapted, format, target)), survival, written)


# ---- Files ----


def _refuse_other_formats(directory: Path, format: str) -> None:
    """An adapter beside a merged model, or a base beside a plain LoRA, would be loaded with it."""
    others = {"full": (), "lora": _BASE_FILES, "merged": _ADAPTER_FILES}[format]
    found = sorted(path.name for pattern in others for path in directory.glob(pattern))
    if found:
        raise ValueError(
            f"`{directory}` holds {', '.join(found)}, which would be loaded together with a model saved as "
            f"`format={format!r}`. Save it to a folder of its own, or delete these files first."
        )


def _write_adapter(
    adapted: AdaptedModel, config: LoraConfig, directory: Path, factors: Mapping[str, LowRankDelta] | None
) -> None:
    """PEFT's own state, with `factors` (scaling 1) in the place of the trained ones if given."""
    # "auto" would add the base embedding to the adapter where it is adapted, and ask the Hub about it each time.
    state = get_peft_model_state_dict(adapted.model, adapter_name=adapted.adapter, save_embedding_layers=False)
    keys = {tensor.data_ptr(): key for key, tensor in state.items() if tensor.numel()}
    for name, delta in (factors or {}).items():
        site = adapted.sites[name]
        A, B = (keys[each.data_ptr()] for each in site.parameters)
        state[A], state[B] = site.layout.shaped(site.layer, site.adapter, delta.A, delta.B)
        bias = B.removesuffix(".weight") + ".bias"
        if bias in state:  # PEFT scales `lora_bias` as well
            state[bias] = state[bias] * site.scaling
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    base_class = type(adapted.model.get_base_model())
    # What `PeftModel.save_pretrained` notes so that `AutoPeftModel` finds a class where no task type names it.
    auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=auto_mapping if config.task_type is None else None)


def _write_base(
    model: PeftModel,
    replaced: Mapping[str, torch.Tensor],
    directory: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str | None,
    untied: bool,
) -> None:
    base = cast(PreTrainedModel, model.get_base_model())
    state = get_base_model_state_dict(model) | dict(replaced)
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if dtype is not None:
        changes["dtype"] = name_of_dtype(dtype)
        cast_once: dict[int, torch.Tensor] = {}  # tied tensors stay one tensor
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = cast_once.setdefault(tensor.data_ptr(), tensor.to(dtype))
    shards: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with _state_instead(base, state):
        base.save_pretrained(directory, state_dict=state, **shards)
    if changes:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2, sort_keys=True))


@contextmanager
def _state_instead(base: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have a quantized model saved with the state that is given: its own has PEFT's names.

    `save_pretrained` takes that of the quantizer or else of the model, whatever `state_dict` is (5.18 to 5.23).
    """
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    _, metadata = quantizer.get_state_dict_and_metadata(base)
    quantizer.get_state_dict_and_metadata = lambda *args, **kwargs: (state, metadata)
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata


# ---- What is written in the place of base weights ----


def _base_weights(
    adapted: AdaptedModel, ledger: Ledger, format: str, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], bool]:
    """Base keys -> tensors that differ from the model's own, and whether that unties what was tied."""
    weights = _trained_modules(adapted.model, adapted.adapter)
    if format == "merged":
        weights |= dict(_merged_tensors(adapted, ledger, dtype))
        return weights, _shares_adapted(adapted)
    for site in adapted.sites.values():
        if site.layout.drifts:  # by what PEFT's folding has rounded since
            weights[site.weight_name] = adapted.base_weight_at(site.name, ledger)
    return weights, False


def _trained_modules(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """The trained copies of `modules_to_save` under the base's own names.

    Some transformers versions (before 5.18) load the adapter beside a base without its `modules_to_save`; the head
    that they take from the base is then the trained one.
    """
    return {
        f"{name}.{key}": tensor
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, tensor in module.modules_to_save[adapter].state_dict().items()
    }


def _merged_tensors(
    adapted: AdaptedModel, ledger: Ledger, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Base keys -> tensors with everything folded in, each rounded once."""
    merged_tokens: dict[int, torch.Tensor] = {}  # embeddings that are tied stay one tensor
    for name, module in adapted.model.get_base_model().named_modules():
        if isinstance(module, TrainableTokensWrapper):
            tokens = cast(Any, module.token_adapter)
            place = cast(torch.nn.Embedding, tokens.get_base_layer()).weight.data_ptr()
            if place not in merged_tokens:
                merged_tokens[place] = tokens.get_merged_weights([adapted.adapter]).detach()
            yield f"{name}.weight", merged_tokens[place]
    for site in adapted.sites.values():
        total = adapted.original(site.name).double() + update_of(site, ledger)
        yield site.weight_name, total.to(dtype or site.base_weight.dtype)
        yield from _merged_bias(site, dtype)


def _merged_bias(site: LoraSite, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    bias = site.bias
    if bias is None or isinstance(site.layout, AttentionLayout):  # which never adds its own
        return
    name = site.weight_name.rpartition(".")[0]
    base_bias = cast(torch.nn.Linear, site.layer.get_base_layer()).bias
    if base_bias is None:
        raise ValueError(
            f"`{name}` has no bias that could take `lora_bias`, so it cannot be merged. Save with "
            '`format="full"` or `format="lora"`.'
        )
    yield f"{name}.bias", (base_bias.double() + site.scaling * bias.double()).to(dtype or base_bias.dtype).detach()


def _shares_adapted(adapted: AdaptedModel) -> bool:
    """Whether an adapted weight is also the weight of another place in the model, which does not get its update."""
    places = places_of(adapted.model)
    return any(len(places[site.base_weight.data_ptr()]) > 1 for site in adapted.sites.values())
