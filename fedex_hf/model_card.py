"""Room 7b: the model card that a run writes about itself, offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedex_hf.card_text import body_of
from fedex_hf.plots import RoundLog, draw_plots, rounds_of
from fedex_hf.run_card import LABELS, RunCard, hub_id, name_of, slug


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


def write_card(card: RunCard, folder: Path) -> None:
    """Write `README.md`, replacing any, and `plots/*.png`. Nothing is asked of the network.

    Args:
        card: What there is to tell.
        folder: Where the model's files lie; it must exist.
    """
    rounds = rounds_of(card.log_history, card.private_names)
    plots = draw_plots(rounds, Path(folder), card.method)
    body = body_of(card, rounds, plots)
    ModelCard(f"---\n{_metadata(card, rounds).to_yaml()}\n---\n\n{body}\n").save(Path(folder) / "README.md")


# ---- Metadata ----


def _metadata(card: RunCard, rounds: Sequence[RoundLog]) -> ModelCardData:
    results = _eval_results(card, rounds)
    base = hub_id(card.base_model)
    arxiv = re.search(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", card.paper)
    tags = ["federated-learning", "lora", slug(LABELS.get(card.method, card.method)), "fedex_hf"]
    license = (card.license or "").strip().lower()
    named = bool(license) and not _LICENSES.fullmatch(license)
    data = ModelCardData(
        language=_languages(card.language),
        license="other" if named else license or None,
        license_name=slug(license) if named else None,
        library_name="transformers" if card.round_format == "merged" else "peft",
        pipeline_tag=_PIPELINES.get(card.auto_class),
        tags=[*tags, *([f"arxiv:{arxiv[1]}"] if arxiv else [])],
        datasets=_datasets(card) or None,
        base_model=base,
        metrics=[each.metric_type for each in results if not each.metric_type.endswith("loss")] or None,
        model_name=name_of(card) if results else None,
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
    return [each for each in card.datasets if hub_id(each) is not None]


def _languages(language: str | Sequence[str] | None) -> list[str] | None:
    given = [language] if isinstance(language, str) else language or []
    return [each for each in given if re.fullmatch("[a-z]{2,3}|code|multilingual", each)] or None
