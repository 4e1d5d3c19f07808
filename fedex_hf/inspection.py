"""What a directory or a repository is: a round, an aggregation, an adapter or a model; as a dictionary and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


STATE, EXACTNESS, TRAINER_STATE = "federation/state.json", "federation/exactness.json", "trainer_state.json"


AGGREGATION, ADAPTER, MODEL = "aggregation.json", "adapter_config.json", "config.json"


_ROUND_TAG = re.compile(r"round-([1-9]\d*)")


def inspect(where: str) -> dict[str, Any]:
    """What a directory or repository is.

    Args:
        where: A directory, `user/name` or `user/name@revision`.

    Returns:
        A dictionary of JSON values; `what` is `"round"`, `"aggregation"`, `"adapter"` or `"model"`.

    Raises:
        AdapterNotFoundError: If there is no such directory, repository or revision.
        AdapterFormatError: If it is none of these, or a file in it is damaged.
    """
    from fedex_hf.adapter_sources import commit_of, download, local_directory
    from fedex_hf.tensor_files import WEIGHTS, AdapterFormatError

    small = (STATE, EXACTNESS, TRAINER_STATE, AGGREGATION, ADAPTER, MODEL)
    local = local_directory(where)
    folder = local or download(where, small, None)
    looks = ((STATE, _round), (AGGREGATION, _aggregation), (ADAPTER, _adapter), (MODEL, _model))
    for name, look in looks:
        if (folder / name).is_file():
            if name == ADAPTER and local is None:
                folder = download(where, (*small, WEIGHTS), None)
            found = look(folder)
            break
    else:
        raise AdapterFormatError(
            f"`{where}` is nothing that is known here. Looked for: `{STATE}` (a round of a federated run), "
            f"`{AGGREGATION}` (an aggregation), `{ADAPTER}` (an adapter), `{MODEL}` (a model)."
        )
    found = {"where": where, "commit": commit_of(folder)} | found
    return found if local else found | {"rounds_on_hub": _round_tags(where)}


def _round(folder: Path) -> dict[str, Any]:
    from fedex_hf.tensor_files import AdapterFormatError, read_json

    state = read_json(folder / STATE)
    history = read_json(folder / TRAINER_STATE) if (folder / TRAINER_STATE).is_file() else {}
    try:
        run = state["fingerprint"]
        layers = {name: norms["A"][0] for name, norms in run.get("LoRA layers", {}).items()}
        settings = dict(run["aggregator"])
        clients = dict(run.get("clients", {}))
        rounds = [entry for entry in history.get("log_history", []) if "aggregation_error" in entry]
        number = int(state["round"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise AdapterFormatError(f"`{folder / STATE}` or `{TRAINER_STATE}` is damaged ({error!r}).") from error
    exactness = {}
    if (folder / EXACTNESS).is_file():
        exactness = {"exactness": _measured(folder / EXACTNESS, read_json(folder / EXACTNESS))}
    return {
        "what": "round",
        "round": number,
        "method": settings.pop("name", None),
        "settings": settings,
        "model": run.get("model"),
        "clients": clients,
        "ranks": layers,
        "rounds": rounds,
    } | exactness


def _aggregation(folder: Path) -> dict[str, Any]:
    from fedex_hf.tensor_files import AdapterFormatError, read_json

    given = read_json(folder / AGGREGATION)
    missing = {"method", "adapters", "weights", "base", "format", "exactness"} - given.keys()
    if missing or "layers" not in given["exactness"]:
        raise AdapterFormatError(f"`{folder / AGGREGATION}` is damaged: it lacks {sorted(missing or {'layers'})}.")
    # Recomputed from the norms, so that what is shown cannot contradict them.
    return given | {"what": "aggregation", "exactness": _measured(folder, given["exactness"]["layers"])}


def _adapter(folder: Path) -> dict[str, Any]:
    from fedex_hf.adapter_files import AdapterFile
    from fedex_hf.tensor_files import WEIGHTS, AdapterFormatError, read_json

    config = read_json(folder / ADAPTER)
    names = ("base_model_name_or_path", "revision", "task_type", "peft_type", "r", "lora_alpha", "use_rslora")
    found = {"what": "adapter"} | {name: config.get(name) for name in names}
    found |= {"target_modules": config.get("target_modules"), "modules_to_save": config.get("modules_to_save")}
    found["has_base_beside"] = (folder / MODEL).is_file()
    try:
        file = AdapterFile.open(folder)
    except AdapterFormatError as error:  # what it is can be told all the same
        return found | {"problem": str(error)}
    entries = file.tensors.entries
    return found | {
        "problem": None,
        "ranks": dict(file.layers),
        "other_tensors": [key for key in entries if ".lora_" not in key],
        "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
        "dtypes": sorted({entry.dtype for entry in entries.values()}),
        "bytes": (folder / WEIGHTS).stat().st_size,
    }


def _model(folder: Path) -> dict[str, Any]:
    from fedex_hf.tensor_files import AdapterFormatError, TensorFile, read_json, weight_files

    config = read_json(folder / MODEL)
    found = {"what": "model"} | {name: config.get(name) for name in ("architectures", "model_type")}
    found |= {"dtype": config.get("dtype", config.get("torch_dtype")), "parameters": None, "bytes": None}
    try:
        files = [TensorFile(folder / name) for name in weight_files(folder)]
    except AdapterFormatError:  # a repository, whose weights are not downloaded, or pickled weights
        return found
    entries = [entry for file in files for entry in file.entries.values()]
    return found | {
        "parameters": sum(math.prod(entry.shape) for entry in entries),
        "bytes": sum(file.path.stat().st_size for file in files),
    }


def _measured(path: Path, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Relative errors over all layers and of each, from the norms in a file."""
    from fedex_hf.evaluation import Exactness, LayerExactness
    from fedex_hf.tensor_files import AdapterFormatError

    try:
        exactness = Exactness({name: LayerExactness(**norms) for name, norms in layers.items()})
        return _relative(exactness) | {"layers": {name: _relative(each) for name, each in exactness.layers.items()}}
    except (TypeError, AttributeError) as error:
        raise AdapterFormatError(f"`{path}` is damaged: its norms cannot be read ({error}).") from error


def _relative(measured: Any) -> dict[str, float]:
    return {name: getattr(measured, name) for name in ("aggregation_error", "fedit_deviation")}


def _round_tags(where: str) -> list[int]:
    from huggingface_hub import HfApi

    tags = [_ROUND_TAG.fullmatch(tag.name) for tag in HfApi().list_repo_refs(where.partition("@")[0]).tags]
    return sorted(int(match[1]) for match in tags if match)


def tell_round(found: Mapping[str, Any], layers: bool) -> list[str]:
    examples = sum(found["clients"].values())
    lines = [
        f"{found['where']}: round {found['round']} of a federated run",
        f"  method   {found['method']}{_settings(found['settings'])}",
        f"  model    {found['model']}, {_ranks(found['ranks'])}",
        f"  clients  {len(found['clients'])} with {examples} examples: {_some(list(found['clients']))}",
        *_tell_tags(found),
    ]
    names = ("round", "aggregation_error", "fedit_deviation", "num_clients", "train_loss")
    rows = [[_number(entry.get(name)) for name in names] for entry in found["rounds"]]
    head = ["round", "aggregation error", "FedIT deviation", "clients", "train loss"]
    lines += ["", *_table(head, rows)] if rows else ["  rounds   no log beside it"]
    return lines + (_tell_layers(found) if layers else [])


def tell_aggregation(found: Mapping[str, Any], layers: bool) -> list[str]:
    exactness = found["exactness"]
    sources = zip(found["adapters"], found["weights"], strict=False)
    lines = [
        f"{found['where']}: aggregation of {len(found['adapters'])} adapters, format {found['format']}",
        f"  method             {found['method']}{_settings(found.get('settings', {}))}",
        f"  base               {found['base']}",
        f"  aggregation error  {_number(exactness['aggregation_error'])}",
        f"  FedIT deviation    {_number(exactness['fedit_deviation'])}",
    ]
    if found.get("ranks"):
        lines.append(f"  adapter            {_ranks(found['ranks'])}")
    if found.get("cast_survival") is not None:
        lines.append(f"  survives 16 bits   {100 * found['cast_survival']:.2f} % of the update")
    lines += [f"  weight {weight:.4f}      {spec}" for spec, weight in sources]
    return [*lines, *_tell_tags(found), *(_tell_layers(found) if layers else [])]


def tell_adapter(found: Mapping[str, Any], layers: bool) -> list[str]:
    beside = ", which lies in the same directory" if found["has_base_beside"] else ""
    revision = f" at {found['revision']}" if found["revision"] else ""
    lines = [
        f"{found['where']}: a {found['peft_type']} adapter",
        f"  base     {found['base_model_name_or_path']}{revision}{beside}",
        f"  targets  {_targets(found['target_modules'])}, r={found['r']}, lora_alpha={found['lora_alpha']}",
    ]
    if found["problem"] is not None:
        return [*lines, f"  problem  {found['problem']}", *_tell_tags(found)]
    lines += [
        f"  layers   {_ranks(found['ranks'])}; {len(found['other_tensors'])} other tensors",
        f"  size     {found['parameters']:,} parameters in {', '.join(found['dtypes'])}, {_size(found['bytes'])}",
    ]
    rows = [[name, str(rank)] for name, rank in found["ranks"].items()]
    return [*lines, *_tell_tags(found), *(["", *_table(["layer", "rank"], rows)] if layers else [])]


def tell_model(found: Mapping[str, Any], layers: bool) -> list[str]:
    known = found["parameters"] is not None
    size = f"{found['parameters']:,} parameters, {_size(found['bytes'])}" if known else "weights not looked at"
    return [
        f"{found['where']}: a model without federated rounds or adapter",
        f"  class    {', '.join(found['architectures'] or ['unknown'])} ({found['model_type']}, {found['dtype']})",
        f"  size     {size}",
        *_tell_tags(found),
    ]


def _tell_tags(found: Mapping[str, Any]) -> list[str]:
    tags = found.get("rounds_on_hub")
    return [f"  on Hub   rounds {', '.join(map(str, tags))}"] if tags else []


def _tell_layers(found: Mapping[str, Any]) -> list[str]:
    if "exactness" not in found:
        return ["", f"No norms per layer: there is no `{EXACTNESS}`."]
    layers = found["exactness"]["layers"]
    rows = [
        [name, _number(each["aggregation_error"]), _number(each["fedit_deviation"])] for name, each in layers.items()
    ]
    return ["", *_table(["layer", "aggregation error", "FedIT deviation"], rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _ranks(ranks: Mapping[str, int]) -> str:
    sizes = sorted(set(ranks.values()))
    return f"{len(ranks)} LoRA layers of rank {_some([str(size) for size in sizes])}"


def _targets(targets: Any) -> str:
    """PEFT writes `all-linear` out as the full name of every layer: their last parts say it shortly."""
    return (
        _some(sorted({str(each).rpartition(".")[2] for each in targets}), 8) if isinstance(targets, list) else targets
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _settings(settings: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name}={value}" for name, value in settings.items() if name != "is_exact")
    return f" ({told})" if told else ""


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.2e}" if isinstance(value, float) and (value == 0 or not 1e-2 <= abs(value) < 1e4) else f"{value:.4g}"
    )


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
