"""What the test Hub keeps on disk: repositories, commits, branches, tags and LFS objects.

Every file is written under a temporary name and renamed, and a commit becomes visible with one rename of `refs.json`
after everything it refers to is in place. A server that is killed at any moment therefore leaves either the old state
or the new one. Nothing is looked up on disk by a name that a client chose: files live under their hashes.

    lfs/<sha256>  blobs/<git sha1>  tmp/  key
    repos/<type>/<namespace>/<name>/    repo.json  refs.json  commits/<commit id>.json
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import threading
from codecs import getincrementaldecoder
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


Files = dict[str, dict[str, Any]]  # path -> {"oid": git sha1, "size": bytes, "lfs": sha256 or None}

# Of the initial commit on the Hub, shortened. It is what makes these files LFS there, whatever their size.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".parquet", ".arrow", ".zip", ".gz")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_BYTES = 10 * 1024 * 1024


class HubError(Exception):
    """An answer other than success: status, message and the Hub's `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


def git_oid(content: bytes) -> str:
    """The sha1 that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(oid: str, size: int) -> bytes:
    """The text that git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def upload_mode(path: str, size: int, sample: bytes) -> str:
    """`"lfs"` for known suffixes, large files and anything that is not text, as on the Hub."""
    if size == 0:
        return "regular"
    try:
        getincrementaldecoder("utf-8")().decode(sample)  # the sample may end in the middle of a character
    except UnicodeDecodeError:
        return "lfs"
    return "lfs" if size > LFS_BYTES or path.endswith(LFS_SUFFIXES) or b"\0" in sample else "regular"


def is_safe(path: str) -> bool:
    """Whether a file of this name stays inside the folder that a client downloads to."""
    parts = path.split("/")
    return not ("\\" in path or "\0" in path or re.match("[A-Za-z]:", path) or {"", ".", "..", ".git"} & set(parts))


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Store:
    """The repositories under one folder. Reading is safe beside a server that writes to the same folder.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.lock = threading.RLock()
        for folder in ("lfs", "blobs", "tmp", "repos"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        if not (self.root / "key").exists():
            self._write(self.root / "key", secrets.token_hex(16).encode())

    # Files --------------------------------------------------------------------------------------------------------

    def temporary(self) -> Path:
        return self.root / "tmp" / secrets.token_hex(8)

    def _write(self, path: Path, content: bytes) -> None:
        temporary = self.temporary()
        temporary.write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)

    def signature(self, oid: str, size: int) -> str:
        """What lets a client upload an object without a token, as a presigned S3 URL does."""
        key = (self.root / "key").read_bytes()
        return hmac.new(key, f"{oid} {size}".encode(), "sha256").hexdigest()

    def lfs_path(self, oid: str) -> Path:
        return self.root / "lfs" / oid

    def has_lfs(self, oid: str, size: int | None = None) -> bool:
        path = self.lfs_path(oid)
        return path.exists() and size in (None, path.stat().st_size)

    def put_lfs(self, oid: str, size: int, chunks: Iterable[bytes]) -> None:
        """Stores an object if its bytes are the ones that were announced."""
        temporary, digest, received = self.temporary(), hashlib.sha256(), 0
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
            if received != size:
                raise HubError(400, f"The object has {received} bytes, but {size} were announced.")
            if digest.hexdigest() != oid:
                raise HubError(400, f"The object's sha256 is {digest.hexdigest()}, but {oid} was announced.")
            os.replace(temporary, self.lfs_path(oid))
        finally:
            temporary.unlink(missing_ok=True)

    def put_blob(self, content: bytes) -> dict[str, Any]:
        oid = git_oid(content)
        if not (self.root / "blobs" / oid).exists():
            self._write(self.root / "blobs" / oid, content)
        return {"oid": oid, "size": len(content), "lfs": None}

    def lfs_entry(self, oid: str, size: int | None) -> dict[str, Any]:
        """The entry of an LFS file in a commit. Its object must have been uploaded."""
        if not self.has_lfs(oid, size):
            raise HubError(400, f"LFS object {oid} of {size} bytes was not uploaded.")
        size = self.lfs_path(oid).stat().st_size
        return {"oid": git_oid(lfs_pointer(oid, size)), "size": size, "lfs": oid}

    def path_of(self, entry: dict[str, Any]) -> Path:
        return self.lfs_path(entry["lfs"]) if entry["lfs"] else self.root / "blobs" / entry["oid"]

    # Repositories -------------------------------------------------------------------------------------------------

    def folder(self, repo: str, kind: str = "models") -> Path:
        if not is_safe(repo) or repo.count("/") != 1 or kind not in ("models", "datasets", "spaces"):
            raise HubError(400, f"Invalid repo name: {repo}")
        return self.root / "repos" / kind / repo

    def settings(self, repo: str, kind: str = "models") -> dict[str, Any] | None:
        """What was set at creation, or `None` if there is no such repository."""
        path = self.folder(repo, kind) / "repo.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def create(self, repo: str, kind: str, private: bool, author: str) -> None:
        """A repository with the Hub's initial commit. `repo.json` comes last: with it the repository exists."""
        with self.lock:
            shutil.rmtree(self.folder(repo, kind), ignore_errors=True)  # left by a server that was killed here
            commit = self._commit([], {".gitattributes": self.put_blob(GIT_ATTRIBUTES)}, "initial commit", "", author)
            self._save_commit(repo, kind, commit)
            self._save_refs(repo, kind, {"branches": {"main": commit["id"]}, "tags": {}})
            self.set(repo, kind, private=private, created=now())

    def set(self, repo: str, kind: str, **settings: Any) -> None:
        with self.lock:
            settings = (self.settings(repo, kind) or {}) | settings
            self._write(self.folder(repo, kind) / "repo.json", json.dumps(settings).encode())

    def delete(self, repo: str, kind: str) -> None:
        with self.lock:
            (self.folder(repo, kind) / "repo.json").unlink()
            shutil.rmtree(self.folder(repo, kind))

    # Commits ------------------------------------------------------------------------------------------------------

    def refs(self, repo: str, kind: str = "models") -> dict[str, dict[str, str]]:
        """`{"branches": {name: commit id}, "tags": {name: commit id}}`."""
        return json.loads((self.folder(repo, kind) / "refs.json").read_bytes())

    def _save_refs(self, repo: str, kind: str, refs: dict[str, dict[str, str]]) -> None:
        self._write(self.folder(repo, kind) / "refs.json", json.dumps(refs).encode())

    def change_ref(self, repo: str, kind: str, group: str, name: str, commit: str | None) -> None:
        """Sets or deletes (`None`) a branch or a tag."""
        with self.lock:
            refs = self.refs(repo, kind)
            if commit is None:
                refs[group].pop(name)
            else:
                refs[group][name] = commit
            self._save_refs(repo, kind, refs)

    def resolve(self, repo: str, revision: str, kind: str = "models") -> str:
        """Commit id of a branch, a tag, a commit id or its first seven characters or more."""
        refs = self.refs(repo, kind)
        for group in ("branches", "tags"):
            if revision in refs[group]:
                return refs[group][revision]
        if 7 <= len(revision) <= 40 and set(revision) <= set("0123456789abcdef"):
            for path in (self.folder(repo, kind) / "commits").glob(f"{revision}*.json"):
                return path.stem
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, repo: str, commit_id: str, kind: str = "models") -> dict[str, Any]:
        return json.loads((self.folder(repo, kind) / "commits" / f"{commit_id}.json").read_bytes())

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> Files:
        return self.commit(repo, self.resolve(repo, revision, kind), kind)["files"]

    def history(self, repo: str, revision: str = "main", kind: str = "models") -> list[dict[str, Any]]:
        """Commits from a revision backwards."""
        commits, commit_id = [], self.resolve(repo, revision, kind)
        while commit_id:
            commits.append(self.commit(repo, commit_id, kind))
            commit_id = next(iter(commits[-1]["parents"]), "")
        return commits

    def _commit(self, parents: list[str], files: Files, title: str, message: str, author: str) -> dict[str, Any]:
        about = {"title": title, "message": message, "date": now(), "author": author}
        commit = {"parents": parents, **about, "files": dict(sorted(files.items()))}
        digest = hashlib.sha1((json.dumps(commit) + secrets.token_hex(8)).encode()).hexdigest()
        return {"id": digest} | commit

    def _save_commit(self, repo: str, kind: str, commit: dict[str, Any]) -> None:
        path = self.folder(repo, kind) / "commits" / f"{commit['id']}.json"
        self._write(path, json.dumps(commit).encode())

    def add_commit(
        self, repo: str, kind: str, branch: str, files: Files, title: str, message: str, author: str, *, root: bool
    ) -> str:
        """Moves a branch to a new commit with these files, with no parent if it is a `root`."""
        with self.lock:
            head = self.refs(repo, kind)["branches"][branch]
            commit = self._commit([] if root else [head], files, title, message, author)
            self._save_commit(repo, kind, commit)
            self.change_ref(repo, kind, "branches", branch, commit["id"])
            return commit["id"]
