"""The Hub's rules for the metadata of a model card, as far as they are known.

Status, envelope and the messages about YAML itself are those that `POST https://huggingface.co/api/validate-yaml` was
seen to give; the list of licences is the one it printed in July 2026. The other rules follow the specification
(`modelcard.md` of huggingface/hub-docs) and messages quoted in bug reports. A card that passes here may still be
refused by the Hub. PyYAML is used because every client of this server has it: huggingface_hub depends on it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


BLOCK = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))")
REPO_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
RELATIONS = ["adapter", "merge", "quantized", "finetune"]
LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other""".split()  # noqa: SIM905 as a list it would be seventy lines


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, as the Hub's parser does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError("duplicated mapping key")
        return super().construct_mapping(node, deep)


def metadata_of(content: str) -> dict[str, Any]:
    """The metadata of a card, empty if it has none or it is broken."""
    match = BLOCK.search(content)
    try:
        data = yaml.load(match.group(2), _Loader) if match else None
    except (yaml.YAMLError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def validate(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    match = BLOCK.search(content)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.load(match.group(2), _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        return [f"Invalid YAML in README.md: {error}"], []
    if isinstance(data, list):
        return ['"value" must be of type object'], []
    if not isinstance(data, dict):
        return ["The YAML metadata of your README.md is invalid."], []
    return _errors(data), []


def _errors(data: dict[str, Any]) -> list[str]:
    errors = [f'"{key}" must be a string' for key in ("library_name", "pipeline_tag") if not _is_text(data, key)]
    for key in ("license", "tags", "datasets", "language", "base_model"):
        for name, value in _entries(data, key):
            if not isinstance(value, str):
                errors.append(f'"{name}" must be a string')
            elif message := _entry_error(key, value):
                errors.append(f'"{name}" {message}')
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    return errors + _index_errors(data.get("model-index"))


def _is_text(data: dict[str, Any], key: str) -> bool:
    return isinstance(data.get(key, ""), str)


def _entries(data: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """A value, or the values of a list, with the names that the Hub gives them in messages."""
    value = data.get(key, [])
    return [(f"{key}[{i}]", entry) for i, entry in enumerate(value)] if isinstance(value, list) else [(key, value)]


def _entry_error(key: str, value: str) -> str | None:
    if key == "license" and value not in LICENSES:
        return f"must be one of [{', '.join(LICENSES)}, array]"
    if key == "base_model" and not REPO_ID.fullmatch(value):
        return f'with value "{value}" is not valid. Use a model id from https://hf.co/models.'
    if key == "datasets" and not REPO_ID.fullmatch(value):
        return f'with value "{value}" is not valid. If possible, use a dataset id from https://hf.co/datasets.'
    if key == "language" and not re.fullmatch("[a-z]{2,3}|code|multilingual", value):
        return (
            f'with value "{value}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code (two/three letters), '
            'or a special value like "code", "multilingual".'
        )
    return None


def _index_errors(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        name = f"model-index[{number}]"
        errors += _required(model, name, {"name": str, "results": list})
        results = model.get("results") if isinstance(model, dict) else None
        for position, result in enumerate(results if isinstance(results, list) else []):
            errors += _result_errors(result, f"{name}.results[{position}]")
    return errors


def _result_errors(result: Any, name: str) -> list[str]:
    errors = _required(result, name, {"task": dict, "dataset": dict, "metrics": list})
    if errors:
        return errors
    errors += _required(result["task"], f"{name}.task", {"type": str})
    errors += _required(result["dataset"], f"{name}.dataset", {"type": str, "name": str})
    for position, metric in enumerate(result["metrics"]):
        errors += _required(metric, f"{name}.metrics[{position}]", {"type": str, "value": object})
    return errors


def _required(value: Any, name: str, keys: dict[str, Any]) -> list[str]:
    kinds: dict[Any, str] = {str: "a string", list: "an array", dict: "of type object"}
    if not isinstance(value, dict):
        return [f'"{name}" must be of type object']
    errors = [f'"{name}.{key}" is required' for key in keys if value.get(key) is None]
    wrong = [key for key, kind in keys.items() if value.get(key) is not None and not isinstance(value[key], kind)]
    return errors + [f'"{name}.{key}" must be {kinds[keys[key]]}' for key in wrong]
