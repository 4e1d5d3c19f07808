"""Room 7a: a model directory that plain `from_pretrained` loads, with nothing of ours installed, in three formats.

full     residual-updated base and adapter side by side: bit for bit the trainer's model
lora     one plain LoRA on the *original* base: `ledger + adapter` as one product, exactly recompressed
merged   one plain model, `base + ledger + adapter` rounded once, for servers that know no adapters
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper, transpose
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from fedex_hf.base_model import AdaptedModel, Ledger, LoraSite
from fedex_hf.low_rank import decompose, max_useful_rank, plain_product
from fedex_hf.updates import LowRankDelta


logger = logging.get_logger(__name__)

FORMATS = ("full", "lora", "merged")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PEFT_PREFIX = "base_model.model."
_SAFE_SHARE = 0.99  # of the update; below it a cast is worth a warning
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class BaseReference:
    """Where the original base came from.

    Args:
        name: Hub id or local path, or `None` for a model that was built from a config.
        revision: Commit on the Hub, where known: what the adapter's config names as `revision`, otherwise the one that
            `from_pretrained` last took `main` from.
    """

    name: str | None
    revision: str | None

    @classmethod
    def of(cls, model: PeftModel) -> BaseReference:
        """What transformers noted when it loaded the base, and the commit, which it does not note (5.18 to 5.23)."""
        name = getattr(cast(PreTrainedModel, model.get_base_model()).config, "_name_or_path", None) or None
        return cls(name, _commit_in_cache(name, model.peft_config[model.active_adapters[0]].revision))


@dataclass(frozen=True)
class SavedModel:
    """What was written.

    Args:
        format: `"full"`, `"lora"` or `"merged"`.
        dtype: Of the tensors that carry the update, such as `"float32"`.
        cast_survival: Share of the update that survived a cast to bfloat16 or float16, between 0 and 1; `None`
            where nothing was cast.
    """

    format: str
    dtype: str
    cast_survival: float | None


def _commit_in_cache(name: str | None, revision: str | None) -> str | None:
    """The commit that a repository's branch or tag was last loaded from; `revision` itself where that is unknown."""
    if name is None or Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(file).parent.name if isinstance(file, str) else revision


def check_format(format: str, dtype: str | torch.dtype | None, base: BaseReference | None = None) -> None:
    """Refuse a format or dtype that cannot be written.

    Raises:
        ValueError: If either is unknown, or `"lora"` would name no base that can be loaded.
    """
    if format not in FORMATS:
        raise ValueError(f"`format={format!r}` is unknown. Allowed: {', '.join(map(repr, FORMATS))}.")
    if dtype is not None and _dtype(dtype) is None:
        raise ValueError(f"`dtype={dtype!r}` is not supported. Allowed: {', '.join(map(repr, DTYPES))}, or `None`.")
    if format == "lora" and base is not None and base.name is None:
        raise ValueError(
            'The format "lora" is one LoRA on the original base, and this base has no name to load it by: it was '
            'built from a config. Use "full" or "merged", or load the base with `from_pretrained`.'
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
        ValueError: If `format` or `dtype` is unknown, or `"lora"` has no base to name, or the folder holds files
            of another format.
    """
    base = BaseReference.of(adapted.model)
    check_format(format, dtype, base)
    directory = Path(output_dir).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_other_formats(directory, format)
    target = _dtype(dtype)
    model, adapter = adapted.model, adapted.adapter
    if format == "lora":
        written = {site.name: plain_lora(site, adapted, ledger, target) for site in adapted.sites.values()}
        config = plain_lora_config(
            cast(LoraConfig, model.peft_config[adapter]),
            {name.removeprefix(_PEFT_PREFIX): delta.rank for name, delta in written.items()},
        )
        config.base_model_name_or_path, config.revision = base.name, base.revision
        _write_adapter(adapted, config, directory, written)
    else:
        weights = _trained_modules(model, adapter) if format == "full" else dict(_merged_tensors(adapted, ledger))
        _write_base(model, weights, directory, target, max_shard_size)
        if format == "full":
            config = copy.copy(cast(LoraConfig, model.peft_config[adapter]))
            config.base_model_name_or_path = repo_id or str(directory)
            config.revision = revision
            config.init_lora_weights = True  # any other start would be run again on the saved base
            _write_adapter(adapted, config, directory)
    return _report_cast(adapted, ledger, format, target)


# ---- One plain LoRA on the original base ----


def plain_lora(
    site: LoraSite, adapted: AdaptedModel, ledger: Ledger, dtype: torch.dtype | None = None
) -> LowRankDelta:
    """`ledger + adapter` of one layer as one product of the numerical rank it needs, scaling 1.

    Args:
        site: The layer.
        adapted: The model.
        ledger: All residuals so far.
        dtype: Of the factors; float32 if `None`.
    """
    delta = site.read()
    if site.name in ledger.matrices:
        total = site.dense(delta) + ledger.matrices[site.name].double()
        product = decompose(transpose(total, site.layer.fan_in_fan_out))
    else:
        parts = [ledger.factors[site.name], delta] if site.name in ledger.factors else [delta]
        product = plain_product(parts)
    if product.rank >= max_useful_rank(product):
        logger.info(f"`{site.name}`: rank {product.rank}; two factors are as large as the dense weight.")
    dtype = torch.float32 if dtype is None else dtype
    return LowRankDelta(product.A.to(dtype), (product.B * product.scaling).to(dtype), 1.0)


def plain_lora_config(original: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """`original` with a rank per layer and scaling 1.

    Args:
        original: Targets, modules to save and task are taken from it.
        ranks: Layer name in the base model -> rank.
    """
    config = copy.copy(original)
    config.r = config.lora_alpha = max(ranks.values())
    # `^` anchors the name: PEFT matches the end of a layer's name otherwise.
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora, config.init_lora_weights = False, True
    return config


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
    adapted: AdaptedModel, config: LoraConfig, directory: Path, factors: Mapping[str, LowRankDelta] | None = None
) -> None:
    """PEFT's own state, with `factors` (scaling 1) in the place of the trained ones if given."""
    # "auto" would add the base embedding to the adapter where it is adapted, and ask the Hub about it each time.
    state = get_peft_model_state_dict(adapted.model, adapter_name=adapted.adapter, save_embedding_layers=False)
    for name, delta in (factors or {}).items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = delta.A, delta.B
        if f"{name}.lora_B.bias" in state:  # PEFT scales `lora_bias` as well
            state[f"{name}.lora_B.bias"] = state[f"{name}.lora_B.bias"] * adapted.sites[name].scaling
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
) -> None:
    base = cast(PreTrainedModel, model.get_base_model())
    state = get_base_model_state_dict(model) | dict(replaced)
    if dtype is not None:
        cast_once: dict[int, torch.Tensor] = {}  # tied tensors stay one tensor
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = cast_once.setdefault(tensor.data_ptr(), tensor.to(dtype))
    shards: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    base.save_pretrained(directory, state_dict=state, **shards)
    if dtype is not None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": _name(dtype)}, indent=2, sort_keys=True))


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


def _merged_tensors(adapted: AdaptedModel, ledger: Ledger) -> Iterator[tuple[str, torch.Tensor]]:
    """Base keys -> tensors with everything folded in, each rounded once."""
    yield from _trained_modules(adapted.model, adapted.adapter).items()
    merged_tokens: dict[int, torch.Tensor] = {}  # embeddings that are tied stay one tensor
    for name, module in adapted.model.get_base_model().named_modules():
        if isinstance(module, TrainableTokensWrapper):
            tokens = cast(Any, module.token_adapter)
            place = cast(torch.nn.Embedding, tokens.get_base_layer()).weight.data_ptr()
            if place not in merged_tokens:
                merged_tokens[place] = tokens.get_merged_weights([adapted.adapter]).detach()
            yield f"{name}.weight", merged_tokens[place]
    for site in adapted.sites.values():
        name = site.name.removeprefix(_PEFT_PREFIX)
        total = adapted.original(site.name).double() + _update(site, ledger)
        yield f"{name}.weight", total.to(site.base_weight.dtype)
        bias = cast(torch.nn.Linear, site.layer.lora_B[site.adapter]).bias
        if bias is None:
            continue
        base_bias = cast(torch.nn.Linear, site.layer.get_base_layer()).bias
        if base_bias is None:
            raise ValueError(
                f"`{name}` has no bias that could take `lora_bias`, so it cannot be merged. Save with "
                '`format="full"` or `format="lora"`.'
            )
        yield f"{name}.bias", (base_bias.double() + site.scaling * bias.double()).to(base_bias.dtype).detach()


def _update(site: LoraSite, ledger: Ledger) -> torch.Tensor:
    """All that federated training added to a layer, `ledger + adapter`, in the layout of its weight, float64."""
    added = ledger.dense(site.name, site)
    adapter = site.dense(site.read())
    return adapter if added is None else adapter + added


# ---- What a cast loses ----


def _report_cast(adapted: AdaptedModel, ledger: Ledger, format: str, dtype: torch.dtype | None) -> SavedModel:
    """Measure and log the share of the update that survives in a 16-bit file."""
    native = next(iter(adapted.sites.values())).base_weight.dtype
    written = dtype or (torch.float32 if format == "lora" else native)
    if written not in (torch.bfloat16, torch.float16):
        return SavedModel(format, _name(written), None)
    lost, whole = 0.0, 0.0
    for site in adapted.sites.values():
        update = _update(site, ledger)
        carried = _carried(site, adapted, ledger, format, written)
        lost += float((carried - update).square().sum())
        whole += float(update.square().sum())
    survival = max(0.0, 1.0 - math.sqrt(lost / whole)) if whole > 0 else 1.0
    told = f"{100 * survival:.2f} % of the update survives in {_name(written)} as `format={format!r}`"
    if survival < _SAFE_SHARE:
        logger.warning(f'{told}; the rest rounds away. `format="lora"` keeps it: small factors on the untouched base.')
    else:
        logger.info(f"{told}.")
    return SavedModel(format, _name(written), survival)


def _carried(site: LoraSite, adapted: AdaptedModel, ledger: Ledger, format: str, dtype: torch.dtype) -> torch.Tensor:
    """What a file in `dtype` adds to the original base in `dtype`, float64."""
    if format == "lora":
        return site.dense(plain_lora(site, adapted, ledger, dtype))
    original = adapted.original(site.name).double()
    adapter = site.dense(site.read())
    total = original + _update(site, ledger) - (adapter if format == "full" else 0.0)
    added = total.to(dtype).double() - original.to(dtype).double()
    return added + adapter if format == "full" else added  # the adapter beside the base stays in float32


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype if dtype in DTYPES.values() else None
    return DTYPES.get(str(dtype))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
