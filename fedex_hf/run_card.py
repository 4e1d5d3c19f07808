"""What a model card tells: collected by the trainer, with nothing in it that is secret or belongs to one machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments


LABELS = {"fedex": "FedEx-LoRA", "fedit": "FedIT", "ffa": "FFA-LoRA"}
_PACKAGES = ("transformers", "peft", "torch", "accelerate", "datasets", "huggingface_hub", "safetensors")
# Arguments that are secret, belong to one machine, or say where files go and not what was trained.
_UNPUBLISHED = re.compile(
    "token|secret|password|credential|api_?key|^(hub|push_to_hub|trackio|ddp|fsdp|log_level)|_(dir|path|file|each_node)$"
    "|^dataloader_(?!drop_last|in_order)|^(accelerator_config|base_model_name_or_path|debug|deepspeed|disable_tqdm"
    "|do_eval|do_predict|do_train|local_rank|no_cuda|parallelism_config|project|report_to|resume_from_checkpoint"
    "|run_name|use_cpu)$",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\bhf_\w{8,}")
_PATH = re.compile(r"(?:^|[\s=,;'\"(\[])(?:~|\.{1,2})?/[\w.~-]|(?:^|\W)[A-Za-z]:[\\/](?!/)|\\\\\w")
# `TrainingArguments` replaces these defaults of its own when it is built.
_REPLACED_DEFAULTS = {"activation_checkpointing": False, "gradient_checkpointing": False}


@dataclass(frozen=True)
class RunCard:
    """Everything a card tells; collected by the trainer.

    Args:
        round: Last round in these files, counted from 1; 0 before the first.
        num_rounds: Rounds that were planned.
        round_format: `"full"`, `"lora"` or `"merged"`.
        method: Name of the aggregator: `"fedex"`, `"fedit"`, `"ffa"`, or a user's own.
        paper: Its URL.
        is_exact: Whether the aggregator says that it is exact, and nothing was cut off the sum of its residuals.
        log_history: `TrainerState.log_history`. Entries of single clients never reach the card.
        model_class: Such as `"RobertaForSequenceClassification"`.
        auto_class: Such as `"AutoModelForSequenceClassification"`.
        num_labels: Where there is a classification head.
        repo_id: Repository that the files go to, or `None` for a local folder.
        tag: The round's tag in it, such as `"round-3"`.
        base_model: Hub id or local path of the original base; `None` if it was built from a config.
        base_revision: Commit of the original base on the Hub.
        lora: Fields of the `LoraConfig` worth telling: `r`, `lora_alpha`, `target_modules`, ...
        num_clients: Clients of the federation.
        client_examples: Training examples of each client; sizes only.
        arguments: Non-default training arguments; scrubbed again here.
        versions: Package -> version.
        datasets: Hub ids of the data sets.
        language: ISO 639 code or codes.
        license: Identifier of the Hub's list; any other is given as a name.
        best_round: Round that was best by `best_metric_name`.
        best_metric_name: With or without the prefix `eval_`.
        dtype: Of the tensors that carry the update.
        cast_survival: Share of the update that survived a cast to `dtype`, between 0 and 1; `None` without a cast.
        base_dtype: Of the base weights in these files, if there are any.
        quantization: Method that the base's weights are quantized with; `None` if they are not.
        residual_storage: `"base"` if residuals were added to the base weights during training, `"adapter"` if a
            second, frozen adapter carried them.
        private_names: Strings that must not be published, such as client ids: metrics of a data set with such a name,
            and arguments that hold one, are left out.
        notes: Further lines for the section about limits, in Markdown.
    """

    round: int
    num_rounds: int
    round_format: str
    method: str
    paper: str
    is_exact: bool
    log_history: Sequence[Mapping[str, Any]]
    model_class: str
    auto_class: str
    num_labels: int | None
    repo_id: str | None
    tag: str | None
    base_model: str | None
    base_revision: str | None
    lora: Mapping[str, Any]
    num_clients: int
    client_examples: Sequence[int]
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    datasets: Sequence[str] = ()
    language: str | Sequence[str] | None = None
    license: str | None = None
    best_round: int | None = None
    best_metric_name: str | None = None
    dtype: str = "float32"
    cast_survival: float | None = None
    base_dtype: str = "float32"
    quantization: str | None = None
    residual_storage: str = "base"
    private_names: Sequence[str] = ()
    notes: Sequence[str] = ()


def name_of(card: RunCard) -> str:
    if card.repo_id is not None:
        return card.repo_id.rpartition("/")[2]
    base = hub_id(card.base_model)
    return f"{base.rpartition('/')[2] if base else card.model_class}-{slug(LABELS.get(card.method, card.method))}"


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository on the Hub, `None` if it is a path or nothing."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not os.path.exists(name) else None


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


def was_cut(log_history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a round left something out of the sum of all residuals, because of `residual_rank` or its tolerance."""
    return any(entry.get("ledger_lost_energy", 0.0) > 0.0 for entry in log_history)


# ---- Arguments and versions ----


def non_default_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from the defaults of their class, without what must not or need not be published.

    No second instance is built to compare with: that would set devices up again in the middle of a run.

    Args:
        args: Of any subclass. Values that are not plain are told by the name of their type.
    """
    changed = {}
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = plain(getattr(args, field.name, None))
        defaults = [plain(default), _REPLACED_DEFAULTS.get(field.name, default)]
        if field.init and not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in defaults
        ):
            changed[field.name] = value
    return scrubbed(changed)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("fedex_hf", *_PACKAGES):
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            found[name] = "not installed" if name != "fedex_hf" else "from source"
    return found


def plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else f"<{type(value).__name__}>"


def scrubbed(value: Any, private: Collection[str] = ()) -> Any:
    """A plain value without the secrets, paths, private names and traits of one machine inside it."""
    if isinstance(value, dict):
        told = {name: each for name, each in value.items() if not _UNPUBLISHED.search(name)}
        told = {name: each for name, each in told.items() if _may_be_told(name, private)}
        return {name: scrubbed(each, private) for name, each in told.items() if _may_be_told(each, private)}
    if isinstance(value, list):
        return [scrubbed(each, private) for each in value if _may_be_told(each, private)]
    return value


def _may_be_told(value: Any, private: Collection[str]) -> bool:
    if not isinstance(value, str):
        return True
    local = "/" in value and os.path.exists(value)
    return not (local or value in private or _TOKEN.search(value) or _PATH.search(value))
