"""What a model card tells, and its sentences; `model_card.py` puts them into a repository."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import peft
import transformers

from fedex_hf.plots import Plot, RoundLog, markdown_table, rounds_table, traffic_unit
from fedex_hf.run_card import LABELS, RunCard, hub_id, name_of, plain, scrubbed, was_cut


_LONG = 15  # rounds; a longer table is folded


def body_of(card: RunCard, rounds: Sequence[RoundLog], plots: Sequence[Plot]) -> str:
    """The card below its metadata, as Markdown."""
    sections = [
        _introduction(card, rounds),
        _loading(card),
        _results(card, rounds, plots),
        "## Method\n\n" + _method(card),
        _settings(card),
        _limits(card),
        _citation(card),
    ]
    return "\n\n".join(sections)


# ---- Introduction and loading ----


def _introduction(card: RunCard, rounds: Sequence[RoundLog]) -> str:
    base = hub_id(card.base_model)
    revision = f" (revision `{card.base_revision}`)" if card.base_revision else ""
    origin = f", started from [{base}](https://huggingface.co/{base}){revision}," if base else ""
    label = LABELS.get(card.method, f"`{card.method}`")
    changed = card.method not in ("fedit", "ffa")  # an unknown method may have added a residual to the base
    beside = card.residual_storage == "adapter"
    full = "They hold the base model and the LoRA adapter beside it."
    if beside:
        full = (
            "They hold the original base model"
            + (f", quantized with {card.quantization}," if card.quantization else "")
            + " and one LoRA adapter beside it: the trained adapter and all residuals as one product per layer, up to "
            "float32 rounding."
        )
    elif changed:
        full += " Aggregation has changed this base, so the adapter belongs to it and to no other."
    contents = {
        "full": full,
        "lora": "They hold one plain LoRA on the original base model"
        + (": adapter and all residuals as one product per layer, up to float32 rounding." if changed else "."),
        "merged": "They hold one plain model into which everything was folded.",
    }[card.round_format]
    lines = [
        f"# {name_of(card)}",
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
    base, base_where = hub_id(card.base_model), where
    if card.round_format == "lora":
        base_where = f'"{base}"' + (f', revision="{card.base_revision}"' if card.base_revision else "") + labels
    plain = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({where})"
    with_peft = f"from peft import {peft_auto}\n\nmodel = {peft_auto}.from_pretrained({where}{labels})"
    on_base = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"base = {auto}.from_pretrained({base_where})\nmodel = PeftModel.from_pretrained(base, {where})"
    )
    blocks = [plain] if card.round_format != "lora" else []
    if card.round_format != "merged" and not _is_beyond_peft(card):
        blocks += [with_peft] if hasattr(peft, peft_auto) else []
        blocks += [on_base] if card.round_format == "full" or base else []
    return _joined(["## How to load", _loading_notes(card), *(f"```python\n{block}\n```" for block in blocks)])


def _is_beyond_peft(card: RunCard) -> bool:
    """PEFT (0.21.2) puts an adapter that transformers has found beside the base on once more, parameters excepted."""
    return card.round_format == "full" and bool(card.lora.get("target_parameters"))


def _loading_notes(card: RunCard) -> str:
    full, lora, local = card.round_format == "full", card.round_format == "lora", card.repo_id is None
    by_peft = full and not _is_beyond_peft(card)
    low = full and not {"bfloat16", "float16"}.isdisjoint({card.dtype, card.base_dtype})
    notes = {
        f"This needs transformers{'' if card.round_format == 'merged' else ' and peft'} only.": True,
        "Each block is complete, and all give the same model.": by_peft and not low,
        "Each block is complete; PEFT's classes keep the adapter in float32, the first block may cast it.": by_peft
        and low,
        "PEFT's warning that it finds a `peft_config` already is expected here.": by_peft,
        "PEFT's own classes cannot load an adapter of parameters beside its base.": full and not by_peft,
        "Run it in the folder of this file, or put the folder's path in the place of `.`.": local,
        "`AutoPeft…` finds the base by the path in `adapter_config.json`: mend that after a move.": by_peft and local,
        f"`{card.auto_class}.from_pretrained` would look for the `revision` in the repository of the base, where "
        "there is no such tag, so use PEFT's classes.": lora and not local,
        f"The base was quantized with {card.quantization} in training: pass the same `quantization_config` to "
        "`from_pretrained` for the same model.": lora and card.quantization is not None,
        "The base is not on the Hub: `adapter_config.json` says where it was.": lora and not hub_id(card.base_model),
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
    link = f"[{LABELS.get(card.method, card.method)}]({card.paper})"
    problem = (
        "A client's LoRA changes a weight by the product `B A`, and the average of the clients' models changes it by "
        "the mean of these products, which is not the product of the mean `B` and the mean `A`."
    )
    measured = "How far the result is from that average is measured in every round and stands in the table above."
    if card.method == "fedex":
        part = "the difference"
        if not card.is_exact:
            summed = " summed over all rounds" if was_cut(card.log_history) else ""
            part = f"the best low-rank approximation of the difference{summed}"
        verb, place = "adds", "to the frozen base weight"
        if card.residual_storage == "adapter":
            verb, place = (
                "carries",
                "in a second, frozen LoRA in float32 beside the base weight, which stays as it was",
            )
        solution = f"{link} averages both factors and {verb} {part}, the residual, {place}"
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
        values = scrubbed(plain(values), card.private_names)
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
