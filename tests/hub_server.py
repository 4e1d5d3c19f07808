"""A Hub on a loopback socket, for the unmodified huggingface_hub, transformers and peft clients.

    python tests/hub_server.py --root DIR --port 0 [--token NAME=TOKEN ...]

prints its endpoint (`http://127.0.0.1:PORT`) and serves until it is killed. Clients need `HF_ENDPOINT` set to that
line and `HF_HUB_DISABLE_XET=1`; the default token is `hf_test`. `hub.py` does all of this for tests. What is stored
is in `hub_store.py`, the rules for model cards are in `hub_card.py`, faults and the request log are explained in
`hub_http.py`. Not here: Xet, pull requests, multipart uploads, gated repositories, discussions, search.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from hub_card import metadata_of, validate
from hub_http import INVALID_TOKEN, MOVED, Answer, Handler, HubServer, as_json, commit_header
from hub_store import Files, HubError, git_oid, is_safe, lfs_pointer, upload_mode


PAGE = {"tree": 1000, "commits": 50}  # entries per page, as on the Hub
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
GIT = r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects"


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def add(handler: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return add


class HubHandler(Handler):
    """The Hub's endpoints."""

    def reply(self) -> Answer:
        self.store = self.server.store
        self.user = self.entry["user"] = self._user()
        for method, pattern, handler in ROUTES:
            match = pattern.fullmatch(self.url.path)
            if match and (method == self.command or (method, self.command) == ("GET", "HEAD")):
                return handler(self, *(group and unquote(group) for group in match.groups()))
        if re.match(r"/api/(models|datasets|spaces)/[^/]+$|/[^/]+/resolve/", self.url.path):
            raise self._not_found()  # a name without a namespace
        raise HubError(404, f"The test Hub has no {self.command} {unquote(self.url.path)}")

    # Who may do what ----------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if header.removeprefix("Bearer ") not in self.server.tokens:
            raise HubError(401, INVALID_TOKEN)
        return self.server.tokens[header.removeprefix("Bearer ")]

    def _owns(self, repo: str) -> bool:
        """A namespace belongs to its user; one that is no user's is an organization of everybody."""
        namespace = repo.split("/")[0]
        return self.user is not None and (namespace == self.user or namespace not in self.server.tokens.values())

    def _not_found(self) -> HubError:
        """The Hub does not tell whether a private repository exists.

        Without a token it says 401 with no error code. Clients take that for a missing repository, but only from an
        https endpoint; the code makes them do the same here.
        """
        if self.user is None:
            return HubError(401, "Invalid username or password.", "RepoNotFound")
        return HubError(404, "Repository not found", "RepoNotFound")

    def _login(self) -> str:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def _open(self, kind: str, repo: str, write: bool = False) -> dict[str, Any]:
        """The settings of a repository that the user may read, or also write."""
        settings = self.store.settings(repo, kind) if is_safe(repo) else None
        if settings is None or (settings["private"] and not self._owns(repo)) or (write and self.user is None):
            raise self._not_found()
        if write and not self._owns(repo):
            raise HubError(403, f"You don't have write access to {repo}")
        return settings

    # Users and repositories ---------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        name = self._login()
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return as_json({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        errors, warnings = validate(self.body.json()["content"])
        status = 400 if errors else 200
        if "text/plain" in self.headers.get("Accept", ""):
            text = "\n".join([f"- Error: {e}" for e in errors] + [f"- Warning: {w}" for w in warnings])
            return Answer(status, text.encode(), {"Content-Type": "text/plain"})
        found = {"errors": errors, "warnings": warnings}
        return as_json({key: [{"message": message} for message in found[key]] for key in found}, status)

    def _named(self, given: dict[str, Any]) -> tuple[str, str]:
        return given.get("type", "model") + "s", f"{given.get('organization') or self._login()}/{given['name']}"

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Answer:
        given = self.body.json()
        user, (kind, repo) = self._login(), self._named(given)
        prefix = "" if kind == "models" else f"{kind}/"
        names = {"url": f"{self.server.endpoint}/{prefix}{repo}", "name": repo, "id": repo}
        if not is_safe(repo) or repo.count("/") != 1:
            raise HubError(400, f"Invalid repo name: {repo}")
        if not self._owns(repo):
            raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under this namespace")
        with self.store.lock:
            if self.store.settings(repo, kind):
                raise HubError(409, f"You already created this {kind[:-1]} repo: {repo}", **names)
            self.store.create(repo, kind, given.get("visibility") == "private", user)
        return as_json(names)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> Answer:
        kind, repo = self._named(self.body.json())
        self._open(kind, repo, write=True)
        self.store.delete(repo, kind)
        return as_json({})

    @route("PUT", f"{REPO}/settings")
    def change_settings(self, kind: str, repo: str) -> Answer:
        self._open(kind, repo, write=True)
        visibility = self.body.json().get("visibility", "public")
        self.store.set(repo, kind, private=visibility == "private")
        return as_json({"private": visibility == "private"})

    @route("GET", f"{REPO}/auth-check(/write)?")
    def auth_check(self, kind: str, repo: str, write: str | None) -> Answer:
        self._open(kind, repo, write=write is not None)
        return as_json({})

    @route("GET", f"{REPO}(?:/revision/([^/]+))?")
    def info(self, kind: str, repo: str, revision: str | None) -> Answer:
        settings = self._open(kind, repo)
        sha = self.store.resolve(repo, revision or "main", kind)
        commit = self.store.commit(repo, sha, kind)
        card = {}
        if "README.md" in commit["files"]:
            card = metadata_of(self.store.path_of(commit["files"]["README.md"]).read_bytes().decode(errors="replace"))
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": sha, "private": settings["private"]}
        info |= {"createdAt": settings["created"], "lastModified": commit["date"], "downloads": 0, "likes": 0}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        info |= {"gated": False, "disabled": False, "cardData": card, "tags": card.get("tags", [])}
        info["siblings"] = [self._sibling(path, entry) for path, entry in commit["files"].items()]
        return as_json(info)

    def _sibling(self, path: str, entry: dict[str, Any]) -> dict[str, Any]:
        if self.query.get("blobs", "").lower() not in ("1", "true"):
            return {"rfilename": path}
        lfs = entry["lfs"] and {"sha256": entry["lfs"], "size": entry["size"], "pointerSize": pointer_size(entry)}
        return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]} | ({"lfs": lfs} if lfs else {})

    # Branches, tags, history --------------------------------------------------------------------------------------

    @route("GET", f"{REPO}/refs")
    def refs(self, kind: str, repo: str) -> Answer:
        self._open(kind, repo)
        refs, prefixes = self.store.refs(repo, kind), {"branches": "heads", "tags": "tags"}
        listed = {
            group: [
                {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": sha}
                for name, sha in refs[group].items()
            ]
            for group, prefix in prefixes.items()
        }
        return as_json(listed | {"converts": [], "pullRequests": []})

    @route("GET", f"{REPO}/commits/([^/]+)")
    def commits(self, kind: str, repo: str, revision: str) -> Answer:
        self._open(kind, repo)
        return self._page(
            "commits",
            [
                {key: commit[key] for key in ("id", "title", "message", "date")}
                | {"authors": [{"user": commit["author"]}]}
                for commit in self.store.history(repo, revision, kind)
            ],
        )

    def _page(self, name: str, items: list[Any]) -> Answer:
        start = int(self.query.get("cursor", 0))
        end = start + PAGE[name]
        query = urlencode(self.query | {"cursor": end})
        link = {"Link": f'<{self.server.endpoint}{self.url.path}?{query}>; rel="next"'} if end < len(items) else {}
        return as_json(items[start:end], headers=link)

    def _new_ref(self, kind: str, repo: str, group: str, name: str, revision: str) -> Answer:
        self._open(kind, repo, write=True)
        if not name or not is_safe(name) or name.startswith("refs/") or re.search(r"[\s~^:?*\[]", name):
            raise HubError(400, f"Invalid reference for a {'branch' if group == 'branches' else 'tag'}: {name}")
        with self.store.lock:
            sha = self.store.resolve(repo, revision, kind)
            if name in self.store.refs(repo, kind)[group]:
                raise HubError(409, f"Reference already exists: {name}")
            self.store.change_ref(repo, kind, group, name, sha)
        return as_json({})

    def _delete_ref(self, kind: str, repo: str, group: str, name: str) -> Answer:
        self._open(kind, repo, write=True)
        if group == "branches" and name == "main":
            raise HubError(403, "The main branch cannot be deleted")
        with self.store.lock:
            if name not in self.store.refs(repo, kind)[group]:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            self.store.change_ref(repo, kind, group, name, None)
        return as_json({})

    @route("POST", f"{REPO}/branch/([^/]+)")
    def create_branch(self, kind: str, repo: str, name: str) -> Answer:
        return self._new_ref(kind, repo, "branches", name, self.body.json().get("startingPoint", "main"))

    @route("POST", f"{REPO}/tag/([^/]+)")
    def create_tag(self, kind: str, repo: str, revision: str) -> Answer:
        return self._new_ref(kind, repo, "tags", self.body.json().get("tag", ""), revision)

    @route("DELETE", f"{REPO}/branch/([^/]+)")
    def delete_branch(self, kind: str, repo: str, name: str) -> Answer:
        return self._delete_ref(kind, repo, "branches", name)

    @route("DELETE", f"{REPO}/tag/([^/]+)")
    def delete_tag(self, kind: str, repo: str, name: str) -> Answer:
        return self._delete_ref(kind, repo, "tags", name)

    @route("POST", f"{REPO}/super-squash/([^/]+)")
    def super_squash(self, kind: str, repo: str, branch: str) -> Answer:
        self._open(kind, repo, write=True)
        message = self.body.json().get("message", "Super-squash")
        with self.store.lock:
            files = self.store.files(repo, branch, kind)
            self._check_branch(kind, repo, branch)
            self.store.add_commit(repo, kind, branch, files, message, "", self._login(), root=True)
        return as_json({})

    def _check_branch(self, kind: str, repo: str, branch: str) -> str:
        """The head of a branch. A tag or a commit id cannot be written to."""
        refs = self.store.refs(repo, kind)
        if branch in refs["branches"]:
            return refs["branches"][branch]
        if branch in refs["tags"]:
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")

    # Upload -------------------------------------------------------------------------------------------------------

    @route("POST", f"{REPO}/preupload/([^/]+)")
    def preupload(self, kind: str, repo: str, revision: str) -> Answer:
        self._open(kind, repo, write=True)
        present, modes = self.store.files(repo, revision, kind), []
        for file in self.body.json()["files"]:
            mode = upload_mode(file["path"], file["size"], base64.b64decode(file["sample"]))
            entry = present.get(file["path"])
            oid = {"oid": entry["lfs"] or entry["oid"]} if entry else {}
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        return as_json({"files": modes})

    @route("POST", f"{GIT}/batch")
    def lfs_batch(self, kind: str | None, repo: str) -> Answer:
        self._open(kind or "models", repo, write=True)
        objects = []
        for wanted in self.body.json()["objects"]:
            oid, size = wanted["oid"], int(wanted["size"])
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not re.fullmatch("[0-9a-f]{64}", oid):
                answer["error"] = {"code": 422, "message": "Invalid oid"}
            elif not self.store.has_lfs(oid, size):
                query = urlencode({"size": size, "signature": self.store.signature(oid, size)})
                verify = f"{self.server.endpoint}{self.url.path.removesuffix('batch')}verify"
                answer["actions"] = {
                    "upload": {"href": f"{self.server.endpoint}/_storage/{oid}?{query}"},
                    "verify": {"href": verify},
                }
            objects.append(answer)
        return as_json({"transfer": "basic", "objects": objects})

    @route("PUT", "/_storage/([0-9a-f]{64})")
    def lfs_put(self, oid: str) -> Answer:
        size = int(self.query.get("size", 0))
        if self.query.get("signature") != self.store.signature(oid, size):
            raise HubError(403, "The signature of the upload address is wrong")
        self.store.put_lfs(oid, size, self.body.chunks())
        return Answer(headers={"ETag": f'"{oid}"'})

    @route("POST", f"{GIT}/verify")
    def lfs_verify(self, kind: str | None, repo: str) -> Answer:
        self._open(kind or "models", repo, write=True)
        wanted = self.body.json()
        if not self.store.has_lfs(wanted["oid"], wanted["size"]):
            raise HubError(404, f"LFS object {wanted['oid']} was not uploaded")
        return as_json({})

    @route("POST", f"{REPO}/commit/([^/]+)")
    def commit(self, kind: str, repo: str, branch: str) -> Answer:
        self._open(kind, repo, write=True)
        if "create_pr" in self.query:
            raise HubError(400, "The test Hub has no pull requests")
        try:
            lines = [json.loads(line) for line in self.body.read().splitlines() if line.strip()]
            header = next(line["value"] for line in lines if line["key"] == "header")
        except (ValueError, KeyError, StopIteration) as error:
            raise HubError(400, f"Invalid commit: {error!r}") from error
        with self.store.lock:
            head = self._check_branch(kind, repo, branch)
            if not head.startswith(header.get("parentCommit") or ""):
                raise HubError(412, MOVED)
            files = self.store.files(repo, head, kind)
            for line in lines:
                self._apply(files, line["key"], line["value"], kind)
            self._check_tree(files)
            title, message = header.get("summary", ""), header.get("description", "")
            sha = self.store.add_commit(repo, kind, branch, files, title, message, self._login(), root=False)
        url = f"{self.server.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo}/commit/{sha}"
        return as_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: Files, key: str, value: dict[str, Any], kind: str) -> None:
        """One line of a commit."""
        if key == "header":
            return
        path = value["path"]
        if not self.server.faults.allow_bad_names and not is_safe(path.rstrip("/")):
            raise HubError(400, f"Invalid file name: {path}")
        if key == "file":
            files[path] = self.store.put_blob(self._content(path, value, kind))
        elif key == "lfsFile":
            files[path] = self.store.lfs_entry(value["oid"], value.get("size"))
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path.rstrip('/')}/"))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation in a commit: {key}")

    def _content(self, path: str, value: dict[str, Any], kind: str) -> bytes:
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise HubError(400, f"Invalid content of {path}: {error}") from error
        if path == "README.md" and kind == "models":
            errors, _ = validate(content.decode(errors="replace"))
            if errors:
                raise HubError(400, "Invalid metadata in README.md", errors=[{"message": error} for error in errors])
        return content

    def _check_tree(self, files: Files) -> None:
        """A name cannot be both a file and a folder."""
        clash = set(files) & set(folders(files))
        if clash:
            raise HubError(400, f"Both a file and a folder: {sorted(clash)[0]}")

    # Download -----------------------------------------------------------------------------------------------------

    @route("GET", f"{REPO}/tree/([^/]+)(?:/(.+))?")
    def tree(self, kind: str, repo: str, revision: str, folder: str | None) -> Answer:
        self._open(kind, repo)
        files, prefix = self.store.files(repo, revision, kind), f"{folder}/" if folder else ""
        deep = self.query.get("recursive", "").lower() in ("1", "true")
        listed = [
            entry
            for entry in tree_entries(files)
            if entry["path"].startswith(prefix) and (deep or "/" not in entry["path"][len(prefix) :])
        ]
        if folder and not listed:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return self._page("tree", listed)

    @route("POST", f"{REPO}/paths-info/([^/]+)")
    def paths_info(self, kind: str, repo: str, revision: str) -> Answer:
        self._open(kind, repo)
        wanted = parse_qs(self.body.read().decode()).get("paths", [])
        files = self.store.files(repo, revision, kind)
        return as_json([entry for entry in tree_entries(files) if entry["path"] in wanted])

    @route("GET", "/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> Answer:
        kind = kind or "models"
        self._open(kind, repo)
        commit = self.store.resolve(repo, revision, kind)
        entry = self.store.commit(repo, commit, kind)["files"].get(path)
        if entry is None:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", commit=commit)
        etag, size = f'"{entry["lfs"] or entry["oid"]}"', entry["size"]
        headers = commit_header(commit) | {"ETag": etag, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
        start, end = byte_range(self.headers.get("Range"), size)
        if start >= end and size:
            return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
        if (start, end) != (0, size):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        status = 206 if "Content-Range" in headers else 200
        return Answer(status, self.store.path_of(entry), headers, start, end - start)


def pointer_size(entry: dict[str, Any]) -> int:
    return len(lfs_pointer(entry["lfs"], entry["size"]))


def folders(files: Files) -> list[str]:
    """The folders that hold the files, directly or not."""
    parts = (path.split("/")[:-1] for path in files)
    return sorted({"/".join(names[: i + 1]) for names in parts for i in range(len(names))} - {""})


def folder_oid(files: Files, folder: str) -> str:
    """Stands for git's hash of a tree: it changes when something in the folder does."""
    return git_oid(repr([(path, files[path]) for path in files if path.startswith(f"{folder}/")]).encode())


def tree_entries(files: Files) -> list[dict[str, Any]]:
    """Folders and files as the tree endpoint lists them."""
    entries: list[dict[str, Any]] = [
        {"type": "directory", "oid": folder_oid(files, path), "size": 0, "path": path} for path in folders(files)
    ]
    for path, entry in files.items():
        entries.append({"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path})
        if entry["lfs"]:
            entries[-1]["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": pointer_size(entry)}
    return entries


def byte_range(header: str | None, size: int) -> tuple[int, int]:
    """First byte and one past the last of a `Range` header. An unknown form asks for all, as RFC 9110 says."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match.groups() == ("", ""):
        return 0, size
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder that keeps everything")
    parser.add_argument("--port", type=int, default=0, help="0 for any free port")
    parser.add_argument("--token", action="append", metavar="NAME=TOKEN", help="default: user=hf_test")
    parser.add_argument("--stop-with-stdin", action="store_true", help="exit when standard input closes")
    args = parser.parse_args()
    pairs = [pair.split("=", 1) for pair in args.token or ["user=hf_test"]]
    server = HubServer(args.root, args.port, {token: name for name, token in pairs}, HubHandler)
    if args.stop_with_stdin:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(server.endpoint, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
