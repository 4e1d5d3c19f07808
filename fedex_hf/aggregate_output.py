"""What an aggregation writes: the base's files, copied and changed in place, and the adapter."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedex_hf.adapter_round import AdapterRound
from fedex_hf.adapter_sources import COMPANIONS
from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.lora_site import PREFIX, LoraSite
from fedex_hf.low_rank import plain_product
from fedex_hf.plain_lora import plain_lora_config
from fedex_hf.skeleton import base_name
from fedex_hf.tensor_files import (
    FLOATS,
    INDEX,
    MODEL,
    WEIGHTS,
    BaseWeights,
    TensorFile,
    TensorWriter,
    read_json,
    weight_files,
)
from fedex_hf.updates import LowRankDelta


_TRAINED = "model-trained.safetensors"  # tensors that the base's own files have no place for


_RESAVE = "write the base anew with `AutoModelFor*.from_pretrained(...).save_pretrained(...)`"


class Target:
    """Where in the base's files the result goes, found and checked before anything is written.

    Attributes:
        layers: Layer name -> key of the base weight that is changed; empty where the base stays as it is.
        tensors: Key of another trained tensor -> key in the base, or `None` for one that it has no place for.
    """

    def __init__(self, round: AdapterRound, directory: Path, format: str) -> None:
        self.directory, self.format = directory, format
        self.skeleton = round.skeleton
        self.base = BaseWeights(directory) if format != "lora" else None
        self.layers: dict[str, str] = {}
        self.tensors: dict[str, str | None] = {}
        if self.base is None:
            return
        if format == "merged" or round.method.changes_base:
            for layer in self.skeleton.sites:
                self.layers[layer] = self._layer_key(self.base, layer)
        for key in round.others:
            # The adapter holds it too; a base that agrees with it can be used without one.
            if format == "merged" or (".lora_B." not in key and self._is_untied(base_name(key))):
                self.tensors[key] = self._tensor_key(self.base, key)

    @property
    def dtypes(self) -> set[str]:
        """Of the base weights that are changed."""
        if self.base is None:
            return set()
        return {self.base.where[key].entries[key].dtype for key in self.layers.values()}

    @property
    def is_narrow(self) -> bool:
        """Whether what is changed has too few digits for the change."""
        return bool(self.dtypes & {"F16", "BF16"})

    def _is_untied(self, name: str) -> bool:
        return len(self.skeleton.sharing.get(name, ())) == 1

    def _layer_key(self, base: BaseWeights, layer: str) -> str:
        name = f"{layer.removeprefix(PREFIX)}.weight"
        key = base.key_of(name, self.skeleton.base_class.base_model_prefix)
        instead = 'Use `format="lora"`, which leaves the base alone'
        if not self._is_untied(name):
            raise UnsupportedModelError(
                f"The base weight `{name}` is one tensor with several places in the model "
                f"({', '.join(self.skeleton.sharing[name])}): what is added to it would act in all of them. {instead}."
            )
        if key is None:
            raise UnsupportedModelError(
                f"The files of `{self.directory}` hold no `{name}`, with or without the model's prefix. {instead}, or "
                f"{_RESAVE}."
            )
        entry, shape = base.where[key].entries[key], tuple(self.skeleton.sites[layer].base_weight.shape)
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"`{key}` in `{self.directory}` is {entry.dtype} of shape {entry.shape}. Allowed: floating point of "
                f"shape {shape}. {instead}."
            )
        if self.format == "full" and entry.dtype not in ("F32", "F64"):
            raise UnsupportedModelError(
                f"`{key}` in `{self.directory}` is {entry.dtype}: a residual added to it would round away (80 to 99 % "
                f"of it is lost in bfloat16). {instead}, or save the base in float32 first."
            )
        return key

    def _tensor_key(self, base: BaseWeights, key: str) -> str | None:
        name = base_name(key)
        if not self._is_untied(name):
            raise UnsupportedModelError(
                f'`{key}` cannot be merged: the base has no parameter of its own for it. Use `format="full"` or '
                '`format="lora"`, which keep it in the adapter.'
            )
        found = base.key_of(name, self.skeleton.base_class.base_model_prefix)
        if found is None and ".lora_B." in key:
            raise UnsupportedModelError(
                f"The files of `{self.directory}` hold no `{name}` that `{key}` could be added to. Use "
                f'`format="full"` or `format="lora"`, or {_RESAVE}.'
            )
        if found is not None and base.where[found].entries[found].shape != self.skeleton.shapes[key]:
            raise UnsupportedModelError(
                f"`{found}` in `{self.directory}` has the shape {base.where[found].entries[found].shape}, and the "
                f'adapters\' `{key}` has {self.skeleton.shapes[key]}. Use `format="lora"`, or give the base a head of '
                f"this size (`num_labels`) and {_RESAVE}."
            )
        return found


class Output:
    """Writes the result into a folder: the base's copy changed in place, and the adapter."""

    def __init__(self, round: AdapterRound, target: Target, folder: Path) -> None:
        self.round, self.target, self.folder = round, target, folder
        self.ranks: dict[str, int] = {}
        self.copied = 0
        self.base: BaseWeights | None = None
        if target.base is not None:
            names = [*(file.path.name for file in target.base.files), INDEX, *COMPANIONS]
            for name in names:
                if (target.directory / name).is_file():
                    shutil.copyfile(target.directory / name, folder / name)
                    self.copied += (folder / name).stat().st_size
            self.base = BaseWeights(folder)
        homeless = [key for key, place in target.tensors.items() if place is None and target.format == "merged"]
        self.extra = TensorWriter(folder / _TRAINED, homeless) if homeless else None
        keys = list(round.skeleton.shapes) if target.format != "merged" else []
        self.adapter = TensorWriter(folder / WEIGHTS, keys) if keys else None

    def put_layer(self, site: LoraSite, mean: LowRankDelta, residual: LowRankDelta | None) -> None:
        """One layer's new factors, and what goes into its base weight."""
        if self.target.format == "lora":
            mean = _plain([mean] if residual is None else [mean, residual])
        elif mean.rank != site.A.shape[0] or mean.scaling != site.scaling:
            raise ValueError(
                f"The aggregator returned rank {mean.rank} and scaling {mean.scaling} for `{site.name}`, whose "
                f'adapters have {site.A.shape[0]} and {site.scaling}. Use `format="lora"`.'
            )
        added = [residual] if residual is not None and self.target.format != "lora" else []
        added += [mean] if self.target.format == "merged" else []
        if added and self.base is not None:
            key = self.target.layers[site.name]
            weight = self.base.read(key)
            matrix = site.matrix(weight)

            def fill(rows: slice, into: torch.Tensor) -> None:
                total = matrix[rows].double()
                for delta in added:
                    total += site.rows(delta, rows)
                into.copy_(total)

            self.base.overwrite(key, site.assembled(fill, weight.dtype))
        if self.adapter is not None:
            self.adapter.add(f"{site.name}.lora_A.weight", mean.A)
            self.adapter.add(f"{site.name}.lora_B.weight", mean.B)
            self.ranks[site.name] = mean.rank

    def put_tensor(self, key: str, tensor: torch.Tensor) -> None:
        """The mean of a tensor that is trained beside LoRA."""
        layer, _, rest = key.rpartition(".lora_B.")
        if rest == "bias" and self.target.format != "full":  # PEFT scales `lora_bias` as well
            tensor = tensor * self.round.skeleton.sites[layer].scaling
        if self.adapter is not None:
            self.adapter.add(key, tensor)
        place = self.target.tensors.get(key)
        if place is not None and self.base is not None:
            there = self.base.read(place)
            self.base.overwrite(
                place, (there.double() + tensor.double() if rest == "bias" else tensor).to(there.dtype)
            )
        elif self.extra is not None and key in self.target.tensors:
            self.extra.add(base_name(key), tensor)

    def close(self) -> None:
        """Close the files, whether finished or not."""
        for writer in (self.adapter, self.extra):
            if writer is not None:
                writer.file.close()

    def finish(self, base_name: str, revision: str | None) -> None:
        """Finish the files and write the configurations."""
        for writer in (self.adapter, self.extra):
            if writer is not None:
                writer.finish()
        if self.extra is not None:
            self._write_index()
        if self.base is not None:
            self._write_model_config()
        if self.adapter is not None:
            self._write_adapter_config(base_name, revision)

    def _write_adapter_config(self, base_name: str, revision: str | None) -> None:
        skeleton = self.round.skeleton
        config = copy.deepcopy(skeleton.lora)
        if self.target.format == "lora":
            config = plain_lora_config(config, {name.removeprefix(PREFIX): rank for name, rank in self.ranks.items()})
        config.base_model_name_or_path, config.revision = base_name, revision
        config.inference_mode = config.init_lora_weights = True
        config.auto_mapping = None
        classes = {"base_model_class": skeleton.base_class.__name__, "parent_library": skeleton.base_class.__module__}
        config.save_pretrained(str(self.folder), auto_mapping_dict=classes if config.task_type is None else None)

    def _write_model_config(self) -> None:
        """The base's configuration with what has changed: the class, the number of labels, the dtype to load in."""
        path, skeleton = self.folder / "config.json", self.round.skeleton
        given = read_json(path)
        new: dict[str, Any] = {"architectures": [skeleton.base_class.__name__]}
        if skeleton.relabelled:
            new |= {name: getattr(skeleton.config, name) for name in ("id2label", "label2id")}
        wide = next((FLOATS[name] for name in FLOATS if name in self.target.dtypes), None)
        if wide is not None:  # otherwise the file could say float32 and the configuration load it as bfloat16
            new["torch_dtype" if "torch_dtype" in given else "dtype"] = str(wide).removeprefix("torch.")
        path.write_text(json.dumps(given | new, indent=2, sort_keys=True) + "\n")

    def _write_index(self) -> None:
        """List the further file; a lone `model.safetensors` gets another name, as loaders would look no further."""
        if (self.folder / MODEL).is_file():
            (self.folder / MODEL).rename(self.folder / "model-base.safetensors")
            files = ["model-base.safetensors"]
        else:
            files = list(weight_files(self.folder))
        found = {name: TensorFile(self.folder / name) for name in (*files, _TRAINED)}
        index = {
            "metadata": {"total_size": sum(each.nbytes for file in found.values() for each in file.entries.values())},
            "weight_map": {key: name for name, file in found.items() for key in file.entries},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _plain(deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """Their sum as one product with the fewest factors, float32, scaling 1."""
    product = plain_product(deltas)
    root = math.sqrt(product.scaling)
    return LowRankDelta((product.A * root).float(), (product.B * root).float(), 1.0)
