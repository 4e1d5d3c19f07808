"""Adapters from elsewhere, read without trusting them: JSON and safetensors only, header first, tensors one by one.

A directory or repository that somebody else has written is input like any other. Nothing in it is unpickled or
imported, no name in it can lead out of it, and what does not fit is refused by its key before anything is computed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from fedex_hf.adapter_sources import AdapterNotFoundError
from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.lora_site import PREFIX
from fedex_hf.model_checks import check_peft_type
from fedex_hf.tensor_files import CONFIG, FLOATS, WEIGHTS, AdapterFormatError, TensorFile, read_json
from fedex_hf.updates import LowRankDelta


_FACTOR = re.compile(rf"({re.escape(PREFIX)}.+)\.lora_([AB])\.weight")
# Fields of an adapter's configuration that may hold anything; every other one must have its default value, so that a
# variant that is younger than this list is refused and not aggregated as if it were plain LoRA.
_FREE = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "lora_bias", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
}
_TEXTS = {  # field -> may it be a text, may it be a list of texts
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "bias"), (True, False)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (True, True)),
    "modules_to_save": (False, True),
}
_NOTES = {"peft_version", "runtime_config", "megatron_core"}  # no effect here: left out
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


# ---- One adapter ----


@dataclass(frozen=True)
class AdapterFile:
    """A PEFT adapter of plain LoRA in a directory: its configuration and its header; tensors are read on request.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.
        config: PEFT's configuration, checked.
        tensors: The safetensors file.
        layers: Layer name in the `PeftModel` -> rank of its factors.
    """

    directory: Path
    config: LoraConfig
    tensors: TensorFile
    layers: Mapping[str, int]

    @classmethod
    def open(cls, directory: str | os.PathLike) -> AdapterFile:
        """Read and check the configuration and the header; no tensor is read.

        Raises:
            AdapterNotFoundError: If there is no such directory.
            AdapterFormatError: If a file is missing or damaged, the configuration is not that of plain LoRA, or keys,
                shapes, dtypes and ranks do not fit together; the message names the key.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise AdapterNotFoundError(f"`{folder}` is not a directory. Pass the folder that holds `{CONFIG}`.")
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                pickled = " It holds `adapter_model.bin`, a pickle." if (folder / "adapter_model.bin").exists() else ""
                raise AdapterFormatError(
                    f"`{folder}` has no `{name}`.{pickled} Only JSON and safetensors are read, never a pickle, which "
                    "can run code. Whoever trained the adapter can write it anew with `model.save_pretrained(...)` of "
                    "a current PEFT."
                )
        config, tensors = _read_config(folder / CONFIG), TensorFile(folder / WEIGHTS)
        return cls(folder, config, tensors, _check_layers(tensors, config))

    def factors(self, layer: str, scaling: float) -> LowRankDelta:
        """A layer's factors, `A` of shape `(r, in_features)` and `B` of shape `(out_features, r)`.

        Args:
            layer: A key of `layers`.
            scaling: PEFT's scaling of the layer, which depends on the configuration only.

        Raises:
            AdapterFormatError: If a factor holds NaN or Inf.
        """
        A, B = (self.tensors.read(f"{layer}.lora_{factor}.weight") for factor in "AB")
        return LowRankDelta(A, B, scaling)

    def check_finite(self) -> None:
        """Read every tensor once.

        Raises:
            AdapterFormatError: If one holds NaN or Inf; the message names it.
        """
        for key in self.tensors.entries:
            self.tensors.read(key)

    def check_keys(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the header with what PEFT makes of this configuration on the base model.

        Args:
            expected: Key -> shape.

        Raises:
            AdapterFormatError: If a key is missing or unexpected, or a shape differs; the message names it.
        """
        here, where = self.tensors.entries, f"`{self.tensors.path}`"
        missing = [key for key in expected if key not in here]
        unexpected = [key for key in here if key not in expected]
        if missing or unexpected:
            what = f"lacks `{missing[0]}`" if missing else f"holds `{unexpected[0]}`, which has no place there"
            raise AdapterFormatError(
                f"{where} does not fit its configuration on this base: it {what} ({len(missing)} keys missing, "
                f"{len(unexpected)} unexpected). Check that it was trained on this base, and save it without "
                "`save_embedding_layers`."
            )
        for key, shape in expected.items():
            if here[key].shape != shape:
                raise AdapterFormatError(
                    f"`{key}` in {where} has the shape {here[key].shape}, and on this base it has {shape}. Check that "
                    "the adapter was trained on this base."
                )


def _read_config(path: Path) -> LoraConfig:
    given = {name: value for name, value in read_json(path).items() if name not in _NOTES}
    try:
        check_peft_type(f"The adapter `{path}`", PeftConfig(peft_type=given.get("peft_type")))
    except UnsupportedModelError as error:
        raise AdapterFormatError(str(error)) from None
    defaults = vars(LoraConfig())
    for name, value in given.items():
        if name not in _FREE and value and value != defaults.get(name):
            raise AdapterFormatError(
                f"`{name}` is {value!r} in `{path}`. Supported so far: plain LoRA and rsLoRA, where the update is "
                "`scaling * B @ A` on the base's own layers. Train without it."
            )
    if given.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise AdapterFormatError(
            f"`init_lora_weights` is {given['init_lora_weights']!r} in `{path}`: such a start changes the base that "
            "the adapter belongs to. Save it with PEFT's `path_initial_model_for_weight_conversion`, which gives "
            "plain LoRA on the untouched base."
        )
    _check_texts(path, given)
    _check_numbers(path, given)
    try:
        return LoraConfig(**{name: value for name, value in given.items() if name in _FREE})
    except (TypeError, ValueError) as error:
        raise AdapterFormatError(f"PEFT does not take `{path}`: {error}") from error


def _check_texts(path: Path, given: Mapping[str, Any]) -> None:
    for name, (one, several) in _TEXTS.items():
        value = given.get(name)
        is_list = several and isinstance(value, list) and all(isinstance(each, str) for each in value)
        if value is not None and not is_list and not (one and isinstance(value, str)):
            allowed = " or ".join(["a text"] * one + ["a list of texts"] * several)
            raise AdapterFormatError(f"`{name}` is {value!r} in `{path}`. Allowed: {allowed}.")


def _check_numbers(path: Path, given: Mapping[str, Any]) -> None:
    """Ranks are whole and positive, alphas are positive and finite, patterns are dictionaries of them."""
    for name, whole in (("r", True), ("lora_alpha", False)):
        pattern = f"{'rank' if whole else 'alpha'}_pattern"
        of_layers = given.get(pattern) or {}
        if not isinstance(of_layers, dict):
            raise AdapterFormatError(f"`{pattern}` is {of_layers!r} in `{path}`. Allowed: an object, layer -> number.")
        for label, value in [
            (name, given.get(name, 8)),
            *((f"{pattern}[{key!r}]", of_layers[key]) for key in of_layers),
        ]:
            is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value <= 0:
                raise AdapterFormatError(
                    f"`{label}` is {value!r} in `{path}`. Allowed: a positive {'integer' if whole else 'number'}."
                )
        for key in of_layers:
            try:
                re.compile(key)
            except re.error as error:
                raise AdapterFormatError(f"`{pattern}[{key!r}]` is no pattern in `{path}`: {error}.") from None


def _check_layers(tensors: TensorFile, config: LoraConfig) -> dict[str, int]:
    """Layer -> rank, once every key is known to be a factor with its partner or a tensor the configuration names."""
    layers: dict[str, int] = {}
    for key, entry in tensors.entries.items():
        match = _FACTOR.fullmatch(key)
        if entry.dtype not in FLOATS:
            raise AdapterFormatError(
                f"`{key}` in `{tensors.path}` is of the dtype {entry.dtype}. Allowed: {', '.join(FLOATS)}."
            )
        if match is None and not _is_named(key, config):
            raise AdapterFormatError(
                f"`{key}` in `{tensors.path}` is neither a factor of plain LoRA (`{PREFIX}<layer>.lora_A.weight`) nor "
                f"a tensor that `{CONFIG}` names in `modules_to_save`, `bias` or `trainable_token_indices`. If it is "
                "a weight of the base, save the adapter with `save_embedding_layers=False`."
            )
        if match is not None:
            layers[match[1]] = _check_pair(tensors, match[1], config)
    if not layers:
        raise AdapterFormatError(f"`{tensors.path}` holds no LoRA factors, such as `{PREFIX}<layer>.lora_A.weight`.")
    return layers


def _check_pair(tensors: TensorFile, layer: str, config: LoraConfig) -> int:
    """The rank that both factors and the configuration agree on."""
    A, B = (tensors.entries.get(f"{layer}.lora_{factor}.weight") for factor in "AB")
    if A is None or B is None:
        raise AdapterFormatError(
            f"`{tensors.path}` lacks `{layer}.lora_{'A' if A is None else 'B'}.weight`, whose partner it holds."
        )
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or A.dtype != B.dtype:
        raise AdapterFormatError(
            f"`{layer}.lora_A.weight` is {A.dtype} of shape {A.shape} and `{layer}.lora_B.weight` is {B.dtype} of "
            f"shape {B.shape} in `{tensors.path}`. Allowed: `(r, in)` and `(out, r)` with one `r` and one dtype."
        )
    name = layer.removeprefix(PREFIX)
    pattern = config.rank_pattern or {}
    stated = pattern.get(get_pattern_key(list(pattern), name), config.r)
    if A.shape[0] != stated:
        raise AdapterFormatError(
            f"`{layer}.lora_A.weight` in `{tensors.path}` has rank {A.shape[0]}, and `{CONFIG}` states {stated} for "
            "it (`r`, `rank_pattern`). One of the two files is of another adapter."
        )
    return A.shape[0]


def _is_named(key: str, config: LoraConfig) -> bool:
    """Whether a tensor may belong to what is trained beside LoRA; `check_keys` knows for certain."""
    if not key.startswith(PREFIX):
        return False
    if ".lora_" in key:
        return config.lora_bias and key.endswith(".lora_B.bias")
    if any(name in key for name in config.modules_to_save or ()):
        return True
    tokens = config.trainable_token_indices is not None and "trainable_tokens" in key
    return tokens or (config.bias != "none" and key.endswith(".bias"))
