"""Room 7b, the way in: a round, published or in a checkpoint, as a model or as a starting point.

Safetensors and JSON only; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel, TrainerState
from transformers.quantizers import AutoQuantizationConfig
from transformers.trainer import TRAINER_STATE_NAME

from fedex_hf import checkpoint as ckpt
from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_reference import BaseReference
from fedex_hf.casting import base_dtype, name_of_dtype
from fedex_hf.evaluation import Exactness, LayerExactness
from fedex_hf.hub_files import UnsafeRepositoryError, download_files, parse_repository, without_tokens


_BASE, _CONFIG, _LORA, _EXACTNESS = "base.json", "model_config.json", "lora_config.json", "exactness.json"
# What continuing needs; the published base is not among it: the original and the ledger make it, bit for bit.
_RESUMABLE = (TRAINER_STATE_NAME, f"{ckpt.FOLDER}/*.json", f"{ckpt.FOLDER}/*.safetensors")


class UnloadableRoundError(ValueError):
    """A published round that no model can be built from; the message says what to do."""


def write_origin(folder: Path, adapted: AdaptedModel, exactness: Exactness | None) -> None:
    """Write what `load_round_model` needs to build the model that a run started from, and the round's certificate.

    Args:
        folder: The round's `federation` folder; created if needed.
        adapted: The model.
        exactness: Every layer's norms, if measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = cast(PreTrainedModel, adapted.model.get_base_model())
    reference = BaseReference.of(adapted.model)
    dtype = name_of_dtype(base_dtype(adapted))
    origin = {"class": type(base).__name__, "name": reference.name, "revision": reference.revision, "dtype": dtype}
    _write_json(folder / _BASE, origin)
    _write_json(folder / _CONFIG, json.loads(base.config.to_json_string(use_diff=False)))
    lora = cast(LoraConfig, adapted.model.peft_config[adapted.adapter]).to_dict()
    sets = {name: sorted(value) for name, value in lora.items() if isinstance(value, set)}
    _write_json(folder / _LORA, lora | sets | {"inference_mode": False})
    if exactness is not None:
        _write_json(folder / _EXACTNESS, {name: asdict(norms) for name, norms in exactness.layers.items()})


def read_exactness(directory: str | os.PathLike) -> Exactness | None:
    """The certificate of a round with every layer's norms, `None` where it has none."""
    file = Path(directory) / ckpt.FOLDER / _EXACTNESS
    if not file.is_file():
        return None
    names = [f.name for f in fields(LayerExactness)]
    try:
        return Exactness(
            {
                layer: LayerExactness(**{name: float(norms[name]) for name in names})
                for layer, norms in _read_json(file).items()
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnloadableRoundError(f"`{_EXACTNESS}` of the round in `{directory}` is damaged: {error!r}.") from error


def find_round(where: str | os.PathLike, token: str | None = None) -> str:
    """A folder to resume from: the one given, or one that the Hub's `user/run@round-3` was downloaded into.

    Args:
        where: A `checkpoint-N` folder, `user/run@revision`, or `user/run` for the newest round.
        token: Token with read permission.

    Raises:
        UnsafeRepositoryError: If the repository holds names that would lead out of the folder.
        UnloadableRoundError: If it cannot be read, or holds no round.
    """
    repository = parse_repository(where)
    if repository is None:
        return str(where)
    try:
        folder = download_files(repository[0], repository[1], _RESUMABLE, token=token)
        TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))  # fails for what is none
        return str(folder)
    except UnsafeRepositoryError:
        raise
    except Exception as error:  # of the Hub, of the network, or for want of the files
        raise UnloadableRoundError(
            f"`{where}` is no run that can be continued: {without_tokens(error, token)} Allowed: a repository that "
            "`FederatedTrainer` has published rounds in, with `@round-N` or without; load any other model with "
            "`from_pretrained` first."
        ) from None


def load_round_model(directory: str | os.PathLike, token: str | None = None) -> PeftModel:
    """The model that a run started from: its original base, with the run's LoRA freshly put on.

    The round itself is then read like a checkpoint, which refuses a base with other weights.

    Args:
        directory: What `find_round` returned.
        token: Token for the base's repository.

    Raises:
        CheckpointMismatchError: If the folder holds no round.
        UnloadableRoundError: If the base has no name, cannot be loaded, or is no model of transformers.
    """
    ckpt.read_meta(directory)
    folder = Path(directory) / ckpt.FOLDER
    origin, settings, lora = (_read_json(folder / name) for name in (_BASE, _CONFIG, _LORA))
    if origin.get("name") is None:
        raise UnloadableRoundError(
            f"The run in `{directory}` started from a model that was built from a config, so there is no base to "
            "load. Build the model as that run did, and pass the round as `train(resume_from_checkpoint=...)`."
        )
    cls = getattr(transformers, str(origin.get("class")), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise UnloadableRoundError(
            f"`{origin.get('class')}` is no model class of this transformers ({transformers.__version__}). Build the "
            "model yourself, and pass the round as `train(resume_from_checkpoint=...)`."
        )
    try:
        config = cast(type[PretrainedConfig], cls.config_class).from_dict(settings)
        adapter = PeftConfig.from_peft_type(**lora | {"revision": origin.get("revision")})
    except Exception as error:
        raise UnloadableRoundError(
            f"`{_CONFIG}` or `{_LORA}` of the round in `{directory}` is no configuration of this transformers or PEFT "
            f"({type(error).__name__}: {error}). Build the model yourself, and pass the round as "
            "`train(resume_from_checkpoint=...)`."
        ) from error
    try:
        base = cls.from_pretrained(
            origin["name"],
            revision=origin.get("revision") or "main",
            config=config,
            **_quantization(config, origin, token),
            dtype=getattr(torch, str(origin.get("dtype")), torch.float32),
            token=token,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of a head that the run trained for classes of its own
        )
    except Exception as error:
        raise UnloadableRoundError(
            f"The base `{origin['name']}` of the run in `{directory}` cannot be loaded ({type(error).__name__}: "
            f"{without_tokens(error, token)}). Build the model yourself, and pass the round as "
            "`train(resume_from_checkpoint=...)`."
        ) from None
    return cast(PeftModel, get_peft_model(base, adapter))


def _quantization(config: PretrainedConfig, origin: dict[str, Any], token: str | None) -> dict[str, Any]:
    """How to quantize the base: an argument of `from_pretrained`, where its repository holds plain weights.

    With it in the model's own config, which is where the run left it, quantized weights would be looked for.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return {}
    stored, _ = type(config).get_config_dict(origin["name"], revision=origin.get("revision") or "main", token=token)
    if "quantization_config" in stored:
        return {}
    del config.quantization_config
    return {"quantization_config": AutoQuantizationConfig.from_dict(dict(settings))}


def load_round(directory: str | os.PathLike, token: str | None = None) -> tuple[AdaptedModel, ckpt.RoundState]:
    """The model of a round, installed and ready to evaluate or save.

    Args:
        directory: What `find_round` returned.
        token: Token for the base's repository.

    Raises:
        CheckpointMismatchError, UnloadableRoundError: As `load_round_model`, or if the base has other weights.
    """
    storage = ckpt.read_meta(directory)["fingerprint"].get("residual storage", "base")
    adapted = AdaptedModel(load_round_model(directory, token), changes_base=storage == "adapter", storage=storage)
    federation = ckpt.load_round(directory, ckpt.fingerprint_of(adapted), adapted)
    adapted.write(federation.state)
    adapted.install(federation.ledger)
    return adapted, federation


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, default=str))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnloadableRoundError(
            f"`{file.name}` of the round in `{file.parent.parent}` cannot be read ({error}). It is written when a "
            "round is published; a local checkpoint is resumed with `train(resume_from_checkpoint=...)`."
        ) from error
    if not isinstance(value, dict):
        raise UnloadableRoundError(f"`{file}` holds a {type(value).__name__} where an object is expected.")
    return value
