"""Reading repositories of others: named files only, never a pickle, never outside the folder they belong in."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_token


_REPOSITORY = re.compile(r"^([\w.-]+/[\w.-]+)(?:@(\S+))?$")
_READABLE = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")


class UnsafeRepositoryError(ValueError):
    """A repository holds something that is not to be touched; the message names it."""


def parse_repository(text: str | os.PathLike) -> tuple[str, str | None] | None:
    """Split `user/name@revision`; `None` for what is an existing path or no repository.

    Example:
        >>> parse_repository("user/run@round-3"), parse_repository("user/run"), parse_repository("./folder/x/y")
        (('user/run', 'round-3'), ('user/run', None), None)
    """
    if Path(text).exists():
        return None
    found = _REPOSITORY.match(str(text))
    return (found[1], found[2]) if found else None


def download_files(repo_id: str, revision: str | None, patterns: Iterable[str], *, token: str | None = None) -> Path:
    """Download the files of one commit that match, and return the folder they lie in.

    Args:
        repo_id: `"user/name"`.
        revision: Branch, tag or commit; `None` is `main`.
        patterns: Shell patterns of names; `*` does not cross a `/`.
        token: Token with read permission; `None` takes the one that is logged in.

    Raises:
        UnsafeRepositoryError: If a name would leave the folder, or is of a kind that is not read.
        FileNotFoundError: If nothing matches.
        HfHubHTTPError: If the Hub refuses.
    """
    patterns = tuple(patterns)
    api = HfApi(token=token)
    info = api.model_info(repo_id, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    for name in names:
        check_name(name, repo_id)
    wanted = [name for name in names if matches(name, patterns)]
    for name in wanted:
        if PurePosixPath(name).suffix not in _READABLE:
            raise UnsafeRepositoryError(f"`{repo_id}`: `{name}` is of a kind that is never read from a repository.")
    if not wanted:
        raise FileNotFoundError(
            f"`{repo_id}` has none of {', '.join(patterns)} at `{revision or 'main'}`. It holds: "
            f"{', '.join(sorted(names)[:20]) or 'nothing'}."
        )
    for name in wanted:
        file = Path(api.hf_hub_download(repo_id, name, revision=info.sha))
    return file.parents[name.count("/")]


def without_tokens(error: object, token: str | None = None) -> str:
    """The text of an error with no token in it, even if the Hub has repeated one.

    Args:
        error: An error, or a text.
        token: A token beside the one that is logged in.
    """
    text = str(error)
    for each in (token, get_token()):
        text = text.replace(each, "***") if each else text
    return text


def check_name(name: str, where: str) -> None:
    """Refuse a file name that would lead out of a folder.

    Raises:
        UnsafeRepositoryError: For absolute names, `..`, backslashes, drive letters and empty parts.
    """
    parts = name.split("/")
    if "\\" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise UnsafeRepositoryError(
            f"`{where}` names a file {name!r}, which would lead out of its folder. Nothing of it was read; do not "
            "trust this repository."
        )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns; `*` does not cross a `/`.

    Example:
        >>> matches("a/b.json", ["*.json"]), matches("a/b.json", ["a/*.json"])
        (False, True)
    """
    return any(name.count("/") == each.count("/") and fnmatch.fnmatchcase(name, each) for each in patterns)
