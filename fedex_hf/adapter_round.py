"""The adapters of one aggregation, checked to fit together and to the base; read one layer at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import logging

from fedex_hf.adapter_files import AdapterFile
from fedex_hf.adapter_sources import commit_of, split_spec
from fedex_hf.aggregators import Aggregator
from fedex_hf.skeleton import Skeleton
from fedex_hf.tensor_files import (
    FLOATS,
    AdapterFormatError,
)
from fedex_hf.updates import ClientUpdate, LowRankDelta


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AdapterRound:
    """The adapters, checked to fit together and to the base."""

    specs: Sequence[str]
    files: Sequence[AdapterFile]
    weights: torch.Tensor
    method: Aggregator
    skeleton: Skeleton

    @classmethod
    def check(
        cls, specs: Sequence[str], files: Sequence[AdapterFile], weights: torch.Tensor, method: Aggregator, base: Path
    ) -> AdapterRound:
        if not (base / "config.json").is_file():
            raise AdapterFormatError(
                f"`{base}` has no `config.json`. Pass a model that `save_pretrained` has written."
            )
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        except Exception as error:  # whatever is in a file from elsewhere
            raise AdapterFormatError(f"`{base / 'config.json'}` is no configuration of a model: {error}") from error
        first, skeleton = files[0], Skeleton.of(config, files[0])
        for spec, file in zip(specs, files, strict=True):
            _check_same_shapes(specs[0], first, spec, file)
            file.check_keys(skeleton.shapes)
            _check_same_scaling(specs[0], skeleton, spec, file)
        return cls(specs, files, weights, method, skeleton)

    @property
    def others(self) -> list[str]:
        """Keys of the tensors that are trained beside LoRA."""
        factors = {f"{layer}.lora_{factor}.weight" for layer in self.skeleton.sites for factor in "AB"}
        return [key for key in self.skeleton.shapes if key not in factors]

    def factors(self, layer: str) -> list[LowRankDelta]:
        """The adapters' factors of one layer."""
        return [file.factors(layer, self.skeleton.sites[layer].scaling) for file in self.files]

    def aggregate(self, layer: str) -> tuple[LowRankDelta, LowRankDelta | None]:
        """One layer's new factors and residual."""
        updates = [
            ClientUpdate(spec, round=1, num_examples=1, adapters={layer: delta})
            for spec, delta in zip(self.specs, self.factors(layer), strict=True)
        ]
        try:
            update = self.method.aggregate(updates, self.weights.tolist())
        except ValueError as error:
            raise ValueError(f"Layer `{layer}`: {error}") from error
        return update.adapters[layer], update.residuals.get(layer)

    def average(self, key: str) -> torch.Tensor:
        """The mean of another trained tensor, in its own dtype; one adapter's is in memory at a time."""
        if type(self.method).aggregate is Aggregator.aggregate:
            mean = torch.zeros(self.skeleton.shapes[key], dtype=torch.float64)
            for file, weight in zip(self.files, self.weights.tolist(), strict=True):
                mean.add_(file.tensors.read(key).double(), alpha=weight)
            return mean.to(FLOATS[self.files[0].tensors.entries[key].dtype])
        updates = [
            ClientUpdate(spec, round=1, num_examples=1, adapters={}, tensors={key: file.tensors.read(key)})
            for spec, file in zip(self.specs, self.files, strict=True)
        ]
        return self.method.aggregate(updates, self.weights.tolist()).tensors[key]


def _check_same_shapes(first_spec: str, first: AdapterFile, spec: str, file: AdapterFile) -> None:
    here, there = file.tensors.entries, first.tensors.entries
    for layer, rank in first.layers.items():
        if file.layers.get(layer, rank) != rank:
            raise ValueError(
                f"`{layer}` has rank {rank} in `{first_spec}` and {file.layers[layer]} in `{spec}`. Adapters "
                "of different ranks are not supported yet: train all with one `r` and `rank_pattern`."
            )
    for key in [*there, *here]:
        shapes = [(found[key].dtype, found[key].shape) if key in found else None for found in (there, here)]
        if shapes[0] != shapes[1]:
            told = [f"{shape[0]} of shape {shape[1]}" if shape else "missing" for shape in shapes]
            raise ValueError(
                f"`{key}` is {told[0]} in `{first_spec}` and {told[1]} in `{spec}`. All adapters must adapt the same "
                "layers and train the same tensors, in one dtype."
            )


def _check_same_scaling(first_spec: str, skeleton: Skeleton, spec: str, file: AdapterFile) -> None:
    decisive = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    if all(getattr(file.config, name) == getattr(skeleton.lora, name) for name in decisive):
        return
    for layer, site in Skeleton(skeleton.config, file.config).sites.items():
        if site.scaling != skeleton.sites[layer].scaling:
            raise ValueError(
                f"`{layer}` is scaled by {skeleton.sites[layer].scaling} in `{first_spec}` and by {site.scaling} in "
                f"`{spec}`. All adapters need the same `lora_alpha`, `use_rslora` and patterns."
            )


def warn_about_other_bases(round: AdapterRound, base_model: str | os.PathLike, base: Path) -> None:
    name, revision = split_spec(base_model)
    for spec, file in zip(round.specs, round.files, strict=True):
        stated, at = file.config.base_model_name_or_path, file.config.revision
        elsewhere = stated and stated != name and Path(stated).resolve() != base.resolve()
        if elsewhere or (stated == name and at not in (None, revision, commit_of(base))):
            logger.warning(
                f"`{spec}` says that it was trained on `{stated}`{f' at `{at}`' if at else ''}, and is aggregated on "
                f"`{base_model}`. If these are different weights, the result is meaningless."
            )
