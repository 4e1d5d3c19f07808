"""What the command line does with finished rounds: write one in another format, and publish a folder."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from fedex_hf import checkpoint as ckpt
from fedex_hf.adapter_sources import TOKENIZER
from fedex_hf.aggregators import AGGREGATORS
from fedex_hf.base_model import AdaptedModel
from fedex_hf.hub_files import check_name, download_files, parse_repository
from fedex_hf.hub_rounds import find_round, load_round
from fedex_hf.model_card import write_card
from fedex_hf.model_facts import model_facts
from fedex_hf.run_card import RunCard, versions, was_cut
from fedex_hf.saving import SavedModel, save_model


# Only these are sent: a folder of a run also holds pickles, which nobody should have to open.
_SENDABLE = ("*.safetensors", "*.json", "*.md", "*.png", "*.model", "*.jinja", "vocab.txt", "merges.txt", "LICENSE")


@dataclass(frozen=True)
class PublishedFolder:
    """What `publish_folder` did.

    Args:
        repo_id: Repository.
        commit: Its commit.
        tag: Its tag, if asked for.
        files: Names that were sent.
    """

    repo_id: str
    commit: str
    tag: str | None
    files: tuple[str, ...]


def export_round(
    source: str,
    output_dir: str | Path,
    format: str,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    token: str | None = None,
) -> SavedModel:
    """Write a round in another format.

    Args:
        source: A `checkpoint-N` folder, or a published round, `"user/run@round-3"`.
        output_dir: Folder to write; must not exist or be empty.
        format: `"full"`, `"lora"` or `"merged"`.
        dtype: As in `FederatedTrainer.save_model`; what the cast loses of the update is measured.
        max_shard_size: As in `PreTrainedModel.save_pretrained`.
        token: Token with read permission for the run's and the base's repository.

    Raises:
        FileExistsError: If `output_dir` holds something.
        UnloadableRoundError, CheckpointMismatchError: If `source` is no round, or its base cannot be loaded.
    """
    output = Path(output_dir)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"`{output}` is not empty. Choose another folder, or empty it.")
    directory = Path(find_round(source, token))
    adapted, federation = load_round(directory, token)
    with ckpt.atomic_directory(output) as folder:
        saved = save_model(
            adapted,
            federation.ledger,
            folder,
            format,
            dtype=dtype,
            repo_id=str(output.resolve()),
            max_shard_size=max_shard_size,
        )
        for file in _tokenizer_files(source, directory, token):
            shutil.copy(file, folder / file.name)
        write_card(_card_of(directory, adapted, saved), folder)
    return saved


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    tag: str | None = None,
    branch: str | None = None,
    private: bool | None = None,
    message: str = "Upload model",
    token: str | None = None,
) -> PublishedFolder:
    """Publish a saved or aggregated model as one commit, and tag it.

    An adapter whose base is this very folder gets the repository as its base, pinned to the tag: the layout that loads
    right by name, tag, branch and commit.

    Args:
        folder: What `save_model`, `aggregate_adapters` or `export_round` wrote.
        repo_id: `"user/name"`; created if needed.
        tag: Name of the tag, such as `"round-3"`.
        branch: Branch of the commit, created if needed; `None` is `main`.
        private: Whether a new repository is private.
        message: Of the commit.
        token: Token with write permission.

    Raises:
        FileNotFoundError: If the folder holds no model and no adapter.
        HfHubHTTPError: If the Hub refuses.
    """
    root = Path(folder)
    names = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    names = {name: path for name, path in names.items() if _is_sendable(name)}
    if not any(name.endswith(".safetensors") for name in names):
        raise FileNotFoundError(
            f"`{folder}` holds no `.safetensors` file, so there is no model or adapter to publish."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch is not None and branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    operations = [
        CommitOperationAdd(name, _own_base(path, root, repo_id, tag) if name == "adapter_config.json" else str(path))
        for name, path in names.items()
    ]
    commit = api.create_commit(repo_id, operations=operations, commit_message=message, revision=branch)
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return PublishedFolder(repo_id, commit.oid, tag, tuple(names))


def _is_sendable(name: str) -> bool:
    check_name(name, "the folder")
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _SENDABLE)


def _own_base(file: Path, root: Path, repo_id: str, tag: str | None) -> bytes | str:
    config = json.loads(file.read_text())
    base = config.get("base_model_name_or_path")
    if base is None or not Path(base).is_dir() or Path(base).resolve() != root.resolve():
        return str(file)
    config |= {"base_model_name_or_path": repo_id, "revision": tag}
    return json.dumps(config, indent=2, sort_keys=True).encode()


def _tokenizer_files(source: str, directory: Path, token: str | None) -> list[Path]:
    repository = parse_repository(source)
    if repository is not None:
        try:
            directory = download_files(*repository, TOKENIZER, token=token)
        except FileNotFoundError:
            return []
    return [directory / name for name in TOKENIZER if (directory / name).is_file()]


def _card_of(directory: Path, adapted: AdaptedModel, saved: SavedModel) -> RunCard:
    """The card of a round as far as its own files tell."""
    meta = ckpt.read_meta(directory)
    aggregator, clients = meta["fingerprint"]["aggregator"], meta["fingerprint"]["clients"]
    known = AGGREGATORS.get(aggregator["name"])
    state = TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
    exact = known is not None and known.name != "fedit" and not aggregator.get("residual_rank")
    return RunCard(
        round=meta["round"],
        num_rounds=int(state.num_train_epochs),
        method=aggregator["name"],
        paper=known.paper if known is not None else "",
        is_exact=exact and not was_cut(state.log_history),
        log_history=state.log_history,
        repo_id=None,
        tag=None,
        num_clients=len(clients),
        client_examples=list(clients.values()),
        private_names=list(clients),
        arguments={},
        versions=versions(),
        **model_facts(adapted, saved),
    )
