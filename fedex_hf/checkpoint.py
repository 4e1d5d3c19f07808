"""Room 7a: round checkpoints. Written whole or not at all, and refused where they do not belong.

    checkpoint-N/                 N = optimizer steps so far, as in `Trainer`
        trainer_state.json  rng_state.pth  training_args.bin
        federation/
            state.json            round, fingerprint of the run, the files with their sizes, digest of the tensors
            state.safetensors     adapter factors and every other trained tensor
            ledger.safetensors    the sum of all residuals, float32
            clients/0.pt          optimizer state of client 0, if kept; with `client_state_dir` a hard link
            clients/adapters.private   factors of clients that keep their own: see `client_adapters.py`

The adapter lies one level down, so that nothing takes a checkpoint for a plain adapter on the original base: without
the ledger that would be a different model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fedex_hf.base_model import AdaptedModel
from fedex_hf.base_versions import base_digest
from fedex_hf.client_states import ClientStateError, StateFolder, fsync, read_states, write_states
from fedex_hf.ledger import Ledger
from fedex_hf.state_tensors import ledger_layout, ledger_tensors, state_layout, state_tensors, unflatten, with_prefix
from fedex_hf.updates import GlobalUpdate, LowRankDelta


FOLDER = "federation"
BASE = "base weights (sha256)"  # in a fingerprint
CLIENT_ADAPTERS = "clients/adapters.private"
_STATE, _LEDGER, _META = "state.safetensors", "ledger.safetensors", "state.json"
_FORMAT = 1
_UNFINISHED = ".unfinished-"
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")


class CheckpointMismatchError(ValueError):
    """A checkpoint is damaged, or belongs to another run; the message names what differs."""


@dataclass
class RoundState:
    """Everything a federation is between two rounds.

    Args:
        round: Last completed round, counted from 1; 0 before the first.
        state: Global adapters and other trained tensors.
        ledger: All residuals so far.
        optimizer_states: Client -> state of its optimizer after its last round, where kept.
        client_adapters: Client -> its factors after its last round, where it goes on from them.
    """

    round: int
    state: GlobalUpdate
    ledger: Ledger = field(default_factory=Ledger)
    optimizer_states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    client_adapters: Mapping[str, Mapping[str, LowRankDelta]] = field(default_factory=dict)


def save_round(
    directory: Path, round_state: RoundState, fingerprint: Mapping[str, Any], clients: list[str]
) -> set[Path]:
    """Write a round into `directory/federation`; `atomic_directory` makes the whole durable.

    Adapters that clients keep are not written here, because a published round must not hold them. Last of all that
    goes into `directory`: the sizes of all files in it are noted.

    Returns:
        The files among them that have reached the disk already.
    """
    folder = directory / FOLDER
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    ledger = round_state.ledger
    save_file(_contiguous(state_tensors(round_state.state)), folder / _STATE)
    save_file(_contiguous(ledger_tensors(ledger.factors, ledger.matrices)), folder / _LEDGER)
    places = {client_id: place for place, client_id in enumerate(clients)}
    durable = write_states(folder / "clients", round_state.optimizer_states, places)
    files = {
        path.relative_to(directory).as_posix(): path.stat().st_size for path in directory.rglob("*") if path.is_file()
    }
    meta = {
        "format": _FORMAT,
        "round": round_state.round,
        "fingerprint": fingerprint,
        "files": files,
        "digest": _digest(folder, round_state.round),
    }
    (folder / _META).write_text(json.dumps(meta, indent=2, sort_keys=True))
    return durable


def load_round(
    directory: str | os.PathLike,
    fingerprint: Mapping[str, Any],
    adapted: AdaptedModel,
    clients: list[str] | None = None,
    state_folder: StateFolder | None = None,
) -> RoundState:
    """Read a round back.

    Args:
        directory: A `checkpoint-N` folder.
        fingerprint: Of the run that wants to continue; must equal the stored one.
        adapted: The model, for the layers' scalings.
        clients: The federation's clients in their order; `None` leaves their optimizer states unread.
        state_folder: Where these are linked or copied to; `None` reads them into memory.

    Raises:
        CheckpointMismatchError: If the folder is no round checkpoint, is incomplete or damaged, or is of another run.
    """
    folder = Path(directory) / FOLDER
    meta = read_meta(directory)
    differing = difference_between(meta["fingerprint"], jsonable(fingerprint), "there", "here")
    if differing:
        raise CheckpointMismatchError(
            f"The checkpoint `{directory}` belongs to another run: {differing}. Resume with the model, adapter, "
            "aggregator and clients it was written with, or start anew in another `output_dir`."
        )
    if meta["digest"] != _digest(folder, meta["round"]):
        raise CheckpointMismatchError(
            f"`{directory}` is damaged: its tensors are not those that were written. Resume from another checkpoint."
        )
    state, ledger = load_file(folder / _STATE), load_file(folder / _LEDGER)
    check_tensors(f"{directory}/{FOLDER}/{_STATE}", state, state_layout(adapted))
    check_tensors(f"{directory}/{FOLDER}/{_LEDGER}", ledger, ledger_layout(adapted, ledger))
    scalings = {name: site.scaling for name, site in adapted.sites.items()}
    return RoundState(
        round=meta["round"],
        state=GlobalUpdate(adapters=unflatten(state, scalings), tensors=with_prefix(state, "tensors/")),
        ledger=Ledger(unflatten(ledger, scalings), with_prefix(ledger, "matrices/")),
        optimizer_states=_states_in(folder / "clients", clients, state_folder),
    )


def _states_in(folder: Path, clients: list[str] | None, into: StateFolder | None) -> Mapping[str, Mapping[str, Any]]:
    if clients is None:
        return {}
    try:
        return read_states(folder, clients, into)
    except ClientStateError as error:
        raise CheckpointMismatchError(str(error)) from error


def fingerprint_of(adapted: AdaptedModel, **settings: Any) -> dict[str, Any]:
    """What must be equal for a checkpoint to continue a run.

    Args:
        adapted: The model; its original base weights, layer shapes and scalings go in.
        settings: JSON values that also must be equal, such as the aggregator's name.
    """
    layers = {
        name: {"A": list(site.A.shape), "B": list(site.B.shape), "scaling": site.scaling}
        for name, site in adapted.sites.items()
    }
    return settings | {
        "residual storage": adapted.storage,
        "model": type(adapted.model.get_base_model()).__name__,
        "LoRA layers": layers,
        "other trained tensors": {name: list(tensor.shape) for name, tensor in adapted.tensors.items()},
        BASE: base_digest(adapted),
    }


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """The finished checkpoints of a folder, oldest first by their step."""
    output = Path(output_dir)
    found = [path for path in output.iterdir() if _CHECKPOINT.match(path.name)] if output.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


@contextmanager
def atomic_directory(final: Path, durable: Set[Path] = frozenset()) -> Iterator[Path]:
    """Yield a folder to write into; on success it is on the disk under its final name, otherwise it does not exist.

    Args:
        final: Its name.
        durable: Files inside that have reached the disk before; the block may add to it.

    A process that dies in between leaves a hidden folder, which nothing takes for a checkpoint and
    `remove_unfinished` deletes.
    """
    unfinished = final.with_name(_UNFINISHED + final.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for path in [*unfinished.rglob("*"), unfinished]:
        if path not in durable:
            fsync(path)
    discard(final)
    unfinished.rename(final)
    fsync(final.parent)


def discard(directory: Path) -> None:
    """Delete a checkpoint so that at no moment half of it has the name of a whole one."""
    if directory.exists():
        unfinished = directory.with_name(f"{_UNFINISHED}deleted-{directory.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        directory.rename(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: str | None, keep_newest: bool = True) -> None:
    """Delete the oldest checkpoints down to `limit`.

    Args:
        output_dir: The run's folder.
        limit: Number of checkpoints to keep; `None` or 0 keeps all.
        keep: The best one's path, never deleted.
        keep_newest: Whether the newest is never deleted either, so that `limit + 1` may stay.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = checkpoints_in(output_dir)
    candidates = checkpoints[:-1] if keep_newest else checkpoints
    surplus = [path for path in candidates if keep is None or path != Path(keep)]
    for path in surplus[: max(len(checkpoints) - limit, 0)]:
        discard(path)


def remove_unfinished(output_dir: str | os.PathLike) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    for path in Path(output_dir).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_meta(directory: str | os.PathLike) -> dict[str, Any]:
    """What `federation/state.json` of a round says, after checking that the files it lists are there.

    Raises:
        CheckpointMismatchError: If the folder is no round checkpoint, or is incomplete.
    """
    folder = Path(directory) / FOLDER
    try:
        meta = json.loads((folder / _META).read_text())
        if not isinstance(meta, dict):
            raise ValueError(f"it holds a {type(meta).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointMismatchError(
            f"`{folder.parent}` is not a round checkpoint of `FederatedTrainer`: `{FOLDER}/{_META}` cannot be read "
            f"({error}). Pass a `checkpoint-N` folder that a federated run has written."
        ) from error
    if meta.get("format") != _FORMAT:
        raise CheckpointMismatchError(
            f"`{folder.parent}` has format {meta.get('format')}; this version of fedex_hf reads format {_FORMAT}."
        )
    missing = {"round", "fingerprint", "files", "digest"} - meta.keys()
    if missing:
        raise CheckpointMismatchError(
            f"`{folder.parent}` is damaged: `{FOLDER}/{_META}` lacks {sorted(missing)}. Resume from an older "
            "checkpoint."
        )
    for name, size in meta["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointMismatchError(f"`{folder.parent}` lists the file `{name}`, which is not inside it.")
        path = folder.parent / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointMismatchError(
                f"`{folder.parent}` is incomplete: `{name}` should have {size} bytes. Resume from an older checkpoint."
            )
    return meta


def _digest(folder: Path, round: int) -> str:
    """SHA-256 of the round's number and tensors: equal for equal rounds of equal runs."""
    digest = hashlib.sha256(f"round {round}\n".encode())
    for path in (folder / _STATE, folder / _LEDGER, *folder.glob(CLIENT_ADAPTERS)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_tensors(file: str, tensors: Mapping[str, torch.Tensor], layout: Mapping[str, tuple]) -> None:
    for key in [*layout, *tensors]:
        found = (tensors[key].shape, tensors[key].dtype) if key in tensors else None
        if key not in layout or found != layout[key]:
            expected = "nothing" if key not in layout else f"{tuple(layout[key][0])} {layout[key][1]}"
            came = "nothing" if found is None else f"{tuple(found[0])} {found[1]}"
            raise CheckpointMismatchError(f"`{file}` holds {came} as `{key}`, where the model has {expected}.")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise CheckpointMismatchError(f"`{file}` holds NaN or Inf in `{key}`. Resume from another round.")


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def jsonable(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def difference_between(theirs: Mapping[str, Any], ours: Mapping[str, Any], there: str, here: str) -> str:
    """In words, where settings differ from ours; empty if ours are all the same there.

    Args:
        theirs, ours: JSON values.
        there, here: Where each was found.
    """

    def told(key: str, their: Any, our: Any) -> str:
        return f"{key} is {their} {there} and {our} {here}"

    parts = []
    for key in [key for key in ours if theirs.get(key) != ours[key]]:
        their, our = theirs.get(key), ours[key]
        if isinstance(their, dict) and isinstance(our, dict):
            names = [name for name in {**their, **our} if their.get(name) != our.get(name)]
            inner = [told(f"`{name}`", their.get(name), our.get(name)) for name in names[:3]]
            parts.append(f"{key}: {', '.join(inner)}{' and more' if len(names) > 3 else ''}")
        else:
            parts.append(told(key, their, our))
    return "; ".join(parts)
