"""Where adapters and bases come from: a directory, or a repository of which named files only are fetched."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fedex_hf.tensor_files import CONFIG, INDEX, MODEL, WEIGHTS, weight_files


# By full name, because a pattern such as `vocab.*` would fetch pickles.
TOKENIZER = (
    *("preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
# What belongs to a model beside its weights.
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER)


class AdapterNotFoundError(FileNotFoundError):
    """There is no such directory, repository or revision; the message names it and says what to do."""


def resolve_adapter(spec: str | os.PathLike, token: str | bool | None = None) -> Path:
    """The directory of an adapter, downloaded if it is a repository.

    Args:
        spec: A local directory, or `user/name`, or `user/name@revision` (branch, tag, commit, `refs/pr/N`).
        token: For private repositories; `None` takes the one that is logged in.

    Raises:
        AdapterNotFoundError: If there is no such directory, repository or revision.
    """
    return local_directory(spec) or download(str(spec), (CONFIG, WEIGHTS), token)


def resolve_base(spec: str | os.PathLike, token: str | bool | None = None, weights: bool = True) -> Path:
    """The directory of a base model, downloaded if it is a repository: configuration, tokenizer, safetensors.

    Args:
        spec: As in `resolve_adapter`.
        token: As in `resolve_adapter`.
        weights: Whether the weights are needed too.

    Raises:
        AdapterNotFoundError: If there is no such directory, repository or revision.
        AdapterFormatError: If the index of the weights names a file outside the directory, or there are none.
    """
    local = local_directory(spec)
    if local is not None or not weights:
        return local or download(str(spec), COMPANIONS, token)
    folder = download(str(spec), (*COMPANIONS, MODEL, INDEX), token)
    # The commit that was just resolved, so that a branch that moves meanwhile cannot mix two models.
    return download(f"{split_spec(spec)[0]}@{folder.name}", weight_files(folder), token)


def split_spec(spec: str | os.PathLike) -> tuple[str, str | None]:
    """Repository and revision.

    Example:
        >>> split_spec("user/name@round-3"), split_spec("user/name")
        (('user/name', 'round-3'), ('user/name', None))
    """
    name, _, revision = str(spec).partition("@")
    return name, revision or None


def commit_of(directory: Path) -> str | None:
    """The commit of a directory in huggingface_hub's cache; `None` for any other."""
    return directory.name if directory.parent.name == "snapshots" else None


def local_directory(spec: str | os.PathLike) -> Path | None:
    """A directory that exists; `None` for what can only be a repository.

    Raises:
        AdapterNotFoundError: If a `Path` is given and there is nothing there.
    """
    if os.path.isdir(spec):
        return Path(spec)
    if isinstance(spec, os.PathLike):
        raise AdapterNotFoundError(f"`{spec}` is not a directory. For a repository pass its name as a string.")
    return None


def download(spec: str, names: Iterable[str], token: str | bool | None) -> Path:
    """The files of these names from a repository, in huggingface_hub's cache; what it does not have is left out.

    Raises:
        AdapterNotFoundError: If there is no such repository or revision, or it cannot be reached.
    """
    repository, revision = split_spec(spec)
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(names), token=token)
    except HFValidationError:
        raise AdapterNotFoundError(
            f"`{spec}` is neither a local directory nor a repository on the Hub. Allowed: a directory, `user/name`, "
            "or `user/name@revision`."
        ) from None
    except Exception as error:
        # Not chained: what a library says about a failed request may quote the request's headers, token included.
        raise AdapterNotFoundError(
            f"`{repository}` at the revision `{revision or 'main'}` cannot be had from the Hub, and there is no local "
            f"directory of this name: {_reason(error)}"
        ) from None
    return Path(folder)


def _reason(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated. Accept its conditions on its page with the account whose token you use."
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private. Check the name; pass a token that may read it."
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch, tag or commit. Look them up on its page."
    if isinstance(error, OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE") == "1":
        return "offline mode is on (`HF_HUB_OFFLINE`) and it is not in the cache. Download it beforehand."
    return f"{type(error).__name__}. Check the network, the token and the name, or pass a local directory."
