"""Room 7b: the model card that a run writes about itself, offline."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peft
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from fedex_hf.plots import Plot, RoundLog, draw_plots, markdown_table, rounds_of, rounds_table, traffic_unit


_PACKAGES = ("transformers", "peft", "torch", "accelerate", "datasets", "huggingface_hub", "safetensors")
_LABELS = {"fedex": "FedEx-LoRA", "fedit": "FedIT", "ffa": "FFA-LoRA"}
_LONG = 15  # rounds; a longer table is folded
# The Hub lists what is not here as a license of its own: `other` with a `license_name`.
_LICENSES = re.compile(
    r"apache-2\.0|mit|openrail(\+\+)?|bigscience-(openrail-m|bloom-rail-1\.0)|(creativeml|bigcode)-openrail-m|afl-3\.0"
    r"|artistic-2\.0|bsl-1\.0|bsd(-2-clause|-3-clause|-3-clause-clear)?|c-uda|cc|cc0-1\.0|cc-by-(2\.0|2\.5|3\.0|4\.0)"
    r"|cc-by-(sa|nc-nd)-[34]\.0|cc-by-(nc|nc-sa)-[234]\.0|cc-by-nd-4\.0|cdla-(sharing-1|permissive-[12])\.0|wtfpl|ecl-2\.0"
    r"|epl-[12]\.0|etalab-2\.0|eupl-1\.[12]|agpl-3\.0|gfdl|gpl(-[23]\.0)?|lgpl(-2\.1|-3\.0|-lr)?|isc|lppl-1\.3c|ms-pl"
    r"|mpl-2\.0|odc-by|odbl|osl-3\.0|postgresql|ofl-1\.1|ncsa|unlicense|zlib|pddl|llama(2|3|3\.[123]|4)|gemma|unknown|other"
)
# Where the auto class leaves no doubt about what the model is for.
_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
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
        is_exact: Whether the aggregator says that it is exact.
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
    private_names: Sequence[str] = ()
    notes: Sequence[str] = ()


def write_card(card: RunCard, folder: Path) -> None:
    """Write `README.md`, replacing any, and `plots/*.png`. Nothing is asked of the network.

    Args:
        card: What there is to tell.
        folder: Where the model's files lie; it must exist.
    """
    rounds = rounds_of(card.log_history, card.private_names)
    plots = draw_plots(rounds, Path(folder), card.method)
    sections = [
        _introduction(card, rounds),
        _loading(card),
        _results(card, rounds, plots),
        "## Method\n\n" + _method(card),
        _settings(card),
        _limits(card),
        _citation(card),
    ]
    body = "\n\n".join(sections)
    ModelCard(f"---\n{_metadata(card, rounds).to_yaml()}\n---\n\n{body}\n").save(Path(folder) / "README.md")


# ---- Metadata ----


def _metadata(card: RunCard, rounds: Sequence[RoundLog]) -> ModelCardData:
    results = _eval_results(card, rounds)
    base = _hub_id(card.base_model)
    arxiv = re.search(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", card.paper)
    tags = ["federated-learning", "lora", _slug(_LABELS.get(card.method, card.method)), "fedex_hf"]
    license = (card.license or "").strip().lower()
    named = bool(license) and not _LICENSES.fullmatch(license)
    data = ModelCardData(
        language=_languages(card.language),
        license="other" if named else license or None,
        license_name=_slug(license) if named else None,
        library_name="transformers" if card.round_format == "merged" else "peft",
        pipeline_tag=_PIPELINES.get(card.auto_class),
        tags=[*tags, *([f"arxiv:{arxiv[1]}"] if arxiv else [])],
        datasets=_datasets(card) or None,
        base_model=base,
        metrics=[each.metric_type for each in results if not each.metric_type.endswith("loss")] or None,
        model_name=_name(card) if results else None,
        eval_results=results or None,
    )
    if base is not None:
        # The Hub knows adapter, finetune, merge and quantized. "adapter" promises that the files work on the base that
        # is named, which holds for the one plain LoRA only: the adapter of "full" belongs to the changed base beside
        # it. "merge" is for several models merged into one, not for a LoRA folded into its base.
        data["base_model_relation"] = "adapter" if card.round_format == "lora" else "finetune"
    return data


def _eval_results(card: RunCard, rounds: Sequence[RoundLog]) -> list[EvalResult]:
    """What was measured after the card's round; NaN and infinity have no place in the Hub's index."""
    datasets = _datasets(card)
    # The Hub asks for an id here. With several data sets it is not known which one was evaluated.
    dataset = datasets[0] if len(datasets) == 1 else "mixed" if datasets else "private"
    task = _PIPELINES.get(card.auto_class, "text-generation" if "Seq2SeqLM" in card.auto_class else "other")
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset if len(datasets) == 1 else "Evaluation data of this run",
            metric_type=name,
            metric_name=name[:1].upper() + name[1:].replace("_", " "),
            metric_value=value,
        )
        for row in rounds
        if row.round == card.round
        for name, value in row.metrics.items()
        if abs(value) < float("inf")
    ]


def _datasets(card: RunCard) -> list[str]:
    return [each for each in card.datasets if _hub_id(each) is not None]


def _languages(language: str | Sequence[str] | None) -> list[str] | None:
    given = [language] if isinstance(language, str) else language or []
    return [each for each in given if re.fullmatch("[a-z]{2,3}|code|multilingual", each)] or None


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository on the Hub, `None` if it is a path or nothing."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not os.path.exists(name) else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


def _name(card: RunCard) -> str:
    if card.repo_id is not None:
        return card.repo_id.rpartition("/")[2]
    base = _hub_id(card.base_model)
    return f"{base.rpartition('/')[2] if base else card.model_class}-{_slug(_LABELS.get(card.method, card.method))}"


# ---- Introduction and loading ----


def _introduction(card: RunCard, rounds: Sequence[RoundLog]) -> str:
    base = _hub_id(card.base_model)
    revision = f" (revision `{card.base_revision}`)" if card.base_revision else ""
    origin = f", started from [{base}](https://huggingface.co/{base}){revision}," if base else ""
    label = _LABELS.get(card.method, f"`{card.method}`")
    changed = card.method not in ("fedit", "ffa")  # an unknown method may have added a residual to the base
    contents = {
        "full": "They hold the base model and the LoRA adapter beside it."
        + (" Aggregation has changed this base, so the adapter belongs to it and to no other." if changed else ""),
        "lora": "They hold one plain LoRA on the original base model"
        + (": adapter and all residuals as one product per layer, up to float32 rounding." if changed else "."),
        "merged": "They hold one plain model into which everything was folded.",
    }[card.round_format]
    lines = [
        f"# {_name(card)}",
        f"A `{card.model_class}`{origin} fine-tuned with LoRA by {_clients(card)}, each on data of its own, and "
        f"aggregated with {label} by the Python package `fedex_hf`.",
        f"{_progress(card, rounds)} {contents}",
    ]
    if card.cast_survival is not None:
        line = f"{100 * card.cast_survival:.2f} % of the update survived the cast to {card.dtype}."
        if card.cast_survival < 0.99:
            line += " The rest rounded away; the format `lora` in float32 keeps it."
        lines.append(line)
    return _joined(lines)


def _clients(card: RunCard) -> str:
    return f"{card.num_clients} client{'s' if card.num_clients != 1 else ''}"


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _progress(card: RunCard, rounds: Sequence[RoundLog]) -> str:
    logged = max((row.round for row in rounds), default=card.round)
    if card.round == 0:
        return f"These files are from before the first of {card.num_rounds} rounds."
    text = f"These files are from after round {card.round} of {card.num_rounds}"
    names = {name for row in rounds for name in row.metrics}
    if card.round == card.best_round and (card.best_metric_name or "").removeprefix("eval_") in names:
        text += f", the best so far by `{str(card.best_metric_name).removeprefix('eval_')}`"
    if logged > card.round:
        return f"{text}; the log below goes on to round {logged}."
    if card.round < card.num_rounds:
        return f"{text}: the run was still going on when they were written, or was stopped early."
    return f"{text}, the last."


def _loading(card: RunCard) -> str:
    """Ways to load that need transformers and PEFT only; each block is a program of its own."""
    auto = card.auto_class
    if not hasattr(transformers, auto):
        return (
            f"## How to load\n\nWith the class `{card.model_class}`, as any adapter of PEFT or model of transformers."
        )
    peft_auto = "AutoPeftModelForFeatureExtraction" if auto == "AutoModel" else f"AutoPeft{auto.removeprefix('Auto')}"
    where = f'"{card.repo_id or "."}"' + (f', revision="{card.tag}"' if card.repo_id and card.tag else "")
    labels = f", num_labels={card.num_labels}" if card.num_labels is not None and card.round_format == "lora" else ""
    base, base_where = _hub_id(card.base_model), where
    if card.round_format == "lora":
        base_where = f'"{base}"' + (f', revision="{card.base_revision}"' if card.base_revision else "") + labels
    plain = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({where})"
    with_peft = f"from peft import {peft_auto}\n\nmodel = {peft_auto}.from_pretrained({where}{labels})"
    on_base = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"base = {auto}.from_pretrained({base_where})\nmodel = PeftModel.from_pretrained(base, {where})"
    )
    blocks = [plain] if card.round_format != "lora" else []
    if card.round_format != "merged":
        blocks += [with_peft] if hasattr(peft, peft_auto) else []
        blocks += [on_base] if card.round_format == "full" or base else []
    return _joined(["## How to load", _loading_notes(card), *(f"```python\n{block}\n```" for block in blocks)])


def _loading_notes(card: RunCard) -> str:
    full, lora, local = card.round_format == "full", card.round_format == "lora", card.repo_id is None
    low = full and card.dtype in ("bfloat16", "float16")
    notes = {
        f"This needs transformers{'' if card.round_format == 'merged' else ' and peft'} only.": True,
        "Each block is complete, and all give the same model.": full and not low,
        "Each block is complete; PEFT's classes keep the adapter in float32, the first block casts it.": low,
        "Run it in the folder of this file, or put the folder's path in the place of `.`.": local,
        "`AutoPeft…` finds the base by the path in `adapter_config.json`: mend that after a move.": full and local,
        f"`{card.auto_class}.from_pretrained` would look for the `revision` in the repository of the base, where "
        "there is no such tag, so use PEFT's classes.": lora and not local,
        "The base is not on the Hub: `adapter_config.json` says where it was.": lora and not _hub_id(card.base_model),
    }
    return " ".join(note for note, holds in notes.items() if holds)


# ---- Results ----


def _results(card: RunCard, rounds: Sequence[RoundLog], plots: Sequence[Plot]) -> str:
    if not rounds:
        return "## Results\n\nNo round has been logged yet."
    parts = ["## Results", _certificate(rounds), rounds_table(rounds)]
    if len(rounds) > _LONG:
        few = [row for row in rounds if row.round in (card.round, card.best_round, rounds[-1].round)]
        folded = f"<details><summary>All {len(rounds)} rounds</summary>\n\n{parts.pop()}\n\n</details>"
        parts += [rounds_table(rounds, few), folded]
    parts.append(
        "The train loss is the mean over the clients' fits; the evaluation is of the global model after the round."
    )
    traffic = traffic_unit(rounds)
    if traffic is not None:
        unit, size = traffic
        parts[-1] += f" Traffic is what one client sends (up) and receives (down); 1 {unit} is {size:,.0f} bytes."
    return _joined([*parts, *(f"![{plot.title}]({plot.file})" for plot in plots)])


def _certificate(rounds: Sequence[RoundLog]) -> str:
    errors = [row.logged["aggregation_error"] for row in rounds if "aggregation_error" in row.logged]
    deviations = [row.logged["fedit_deviation"] for row in rounds if "fedit_deviation" in row.logged]
    if not errors or not deviations:
        return ""
    return (
        "The *aggregation error* is how far the installed effective weights (base and adapter) are from the weighted "
        "mean of the clients' effective weights in float64, relative to the round's change; the *FedIT deviation* is "
        "what averaging the factors `A` and `B` apart would have lost from the same updates. "
        f"Largest in this run: aggregation error {_largest(errors):.1e}, FedIT deviation {_largest(deviations):.1e}."
    )


def _largest(values: Sequence[float]) -> float:
    """The largest value; NaN if any is, so that a broken round is not passed over."""
    return float("nan") if any(value != value for value in values) else max(values)


# ---- Method, settings, limits, citation ----


def _method(card: RunCard) -> str:
    """Three sentences."""
    link = f"[{_LABELS.get(card.method, card.method)}]({card.paper})"
    problem = (
        "A client's LoRA changes a weight by the product `B A`, and the average of the clients' models changes it by "
        "the mean of these products, which is not the product of the mean `B` and the mean `A`."
    )
    measured = "How far the result is from that average is measured in every round and stands in the table above."
    if card.method == "fedex":
        part = "the difference" if card.is_exact else "the best low-rank approximation of the difference"
        solution = f"{link} averages both factors and adds {part}, the residual, to the frozen base weight"
        end = "so every client continues from that average" if card.is_exact else "so what was cut off is lost"
        return f"{problem} {solution}, {end}. {measured}"
    if card.method == "fedit":
        return (
            f"{problem} {link} averages the factors all the same and leaves the base alone, so it is not exact: its "
            f"aggregation error is the FedIT deviation. {measured}"
        )
    if card.method == "ffa":
        return (
            f"{problem} {link} gives all clients one frozen `A` and trains `B` alone, for which the two are equal, so "
            f"that averaging `B` is exact and needs no residual. {measured}"
        )
    says = "exact" if card.is_exact else "not exact"
    return f"{problem} This run aggregated with {link}, which describes itself as {says}. {measured}"


def _settings(card: RunCard) -> str:
    sizes = sorted(card.client_examples, reverse=True)
    text = _clients(card)
    if sizes and len(sizes) <= 10:
        text += f" with {', '.join(f'{size:,}' for size in sizes)} training examples ({sum(sizes):,} in total)"
    elif sizes:
        text += f" with {sizes[-1]:,} to {sizes[0]:,} training examples each ({sum(sizes):,} in total)"
    settings = {"LoRA": card.lora, "Training argument": card.arguments}
    parts = ["## Training", f"{text}. Arguments that are not named have their default."]
    for name, values in settings.items():
        values = _scrubbed(_plain(values), card.private_names)
        if values:
            shown = [f"`{_code(value)}`" for value in values.values()]
            parts.append(markdown_table({name: [f"`{key}`" for key in values], "value": shown}, align=":---"))
    parts.append("Versions: " + ", ".join(f"{name} {value}" for name, value in card.versions.items()) + ".")
    return _joined(parts)


def _code(value: Any) -> str:
    return repr(value).replace("`", "'").replace("|", "\\|").replace("\n", " ")


def _limits(card: RunCard) -> str:
    server = {
        "fedex": "The server sees the factors `A` and `B` of every client, so this cannot run under secure "
        "aggregation that reveals sums only, and the residual tells clients about each other's updates.",
        "fedit": "The server needs no more than sums of the clients' factors, but sees each of them unless they are "
        "summed under secure aggregation.",
        "ffa": "The server needs no more than sums of the clients' `B`, but sees each of them unless they are summed "
        "under secure aggregation.",
    }.get(card.method, "What the server sees of a client's factors depends on the method.")
    lines = [
        f"{server} There is no differential privacy.",
        "Exact aggregation does not make a better model by itself: compare methods on your data.",
        "The limits and biases of the base model and of the clients' data remain.",
        *card.notes,
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _citation(card: RunCard) -> str:
    return "## Citation\n\n" + _CITATIONS.get(card.method, f"The method: {card.paper}")


_CITATIONS = {
    "fedex": """```bibtex
@inproceedings{singhal-etal-2025-fedex,
  title = {{FedEx-LoRA}: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models},
  author = {Singhal, Raghav and Ponkshe, Kaustubh and Vepakomma, Praneeth},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics (Volume 1: Long Papers)},
  pages = {1316--1336},
  year = {2025},
  url = {https://aclanthology.org/2025.acl-long.67/},
  note = {arXiv 2410.09432}
}
```""",  # noqa: E501
    "fedit": "Zhang et al., *Towards Building the Federated GPT: Federated Instruction Tuning*, 2023, "
    "https://arxiv.org/abs/2305.05644",
    "ffa": "Sun, Li, Li and Ding, *Improving LoRA in Privacy-preserving Federated Learning*, ICLR 2024, "
    "https://arxiv.org/abs/2403.12313",
}


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
        value = _plain(getattr(args, field.name, None))
        defaults = [_plain(default), _REPLACED_DEFAULTS.get(field.name, default)]
        if field.init and not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in defaults
        ):
            changed[field.name] = value
    return _scrubbed(changed)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("fedex_hf", *_PACKAGES):
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            found[name] = "not installed" if name != "fedex_hf" else "from source"
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else f"<{type(value).__name__}>"


def _scrubbed(value: Any, private: Collection[str] = ()) -> Any:
    """A plain value without the secrets, paths, private names and traits of one machine inside it."""
    if isinstance(value, dict):
        told = {name: each for name, each in value.items() if not _UNPUBLISHED.search(name)}
        told = {name: each for name, each in told.items() if _may_be_told(name, private)}
        return {name: _scrubbed(each, private) for name, each in told.items() if _may_be_told(each, private)}
    if isinstance(value, list):
        return [_scrubbed(each, private) for each in value if _may_be_told(each, private)]
    return value


def _may_be_told(value: Any, private: Collection[str]) -> bool:
    if not isinstance(value, str):
        return True
    local = "/" in value and os.path.exists(value)
    return not (local or value in private or _TOKEN.search(value) or _PATH.search(value))
