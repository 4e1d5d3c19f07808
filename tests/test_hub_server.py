"""The test Hub, driven by the unmodified clients in processes of their own.

Functions named `client_*` run there: they use huggingface_hub as any program does, and raise if an answer is not the
one that the real Hub gives. The tests start them, and compare with what the server keeps on its disk.
"""

from __future__ import annotations

import hashlib
import http.client
import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from hub import Hub, run_python, running_hub
from hub_store import Store, git_oid
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from programs import untraced


try:
    import httpx2 as httpx
except ModuleNotFoundError:  # the client's HTTP library before huggingface_hub 2
    import httpx


WEIGHTS = bytes(range(256)) * 4096  # 1 MiB that is not text
GOOD_CARD = """---
library_name: peft
license: apache-2.0
base_model: user/model
base_model_relation: adapter
pipeline_tag: text-classification
tags: [lora, federated-learning]
datasets: glue
model-index:
- name: model
  results:
  - task: {type: text-classification}
    dataset: {type: glue, name: RTE}
    metrics: [{type: accuracy, value: 0.5}]
---
# A model
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(shared: Hub) -> Iterator[Hub]:
    yield shared
    shared.reset()


def run_client(client: Callable[..., None], hub: Hub, home: Path, *args: str, token: str | None = "hf_test") -> str:
    environment = untraced(hub.environment(home, token))
    return run_python(Path(__file__), environment, client.__name__, *args, timeout=60).stdout


def refused(error: type[Exception], call: Callable[[], Any], *, status: int | None = None, says: str = "") -> None:
    """Passes if the call raises exactly this."""
    with pytest.raises(error) as raised:
        call()
    assert raised.type is error, repr(raised.value)
    assert says in str(raised.value), str(raised.value)
    assert status in (None, getattr(raised.value, "response", None) and raised.value.response.status_code)


def latest(repo: str) -> str:
    """Title of the last commit."""
    return HfApi().list_repo_commits(repo)[0].title


# Repositories --------------------------------------------------------------------------------------------------------


def client_repository(folder: str) -> None:
    api, repo = HfApi(), "user/life"
    assert api.whoami()["name"] == "user"
    assert api.create_repo("life").repo_id == repo
    refused(HfHubHTTPError, lambda: api.create_repo(repo), status=409)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    initial = api.repo_info(repo).sha

    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="first")
    assert first.oid != initial
    assert api.upload_folder(repo_id=repo, folder_path=folder).oid == first.oid  # nothing has changed: no commit
    api.create_tag(repo, tag="round-1", revision=first.oid)
    refused(HfHubHTTPError, lambda: api.create_tag(repo, tag="round-1"), status=409)
    api.create_tag(repo, tag="round-1", exist_ok=True)

    changes = [CommitOperationAdd("a.txt", b"two"), CommitOperationDelete("sub/"), CommitOperationAdd("new/b", b"")]
    second = api.create_commit(repo, changes, commit_message="second", parent_commit=first.oid)
    late = [CommitOperationAdd("a.txt", b"late")]
    refused(
        HfHubHTTPError,
        lambda: api.create_commit(repo, late, commit_message="late", parent_commit=first.oid),
        status=412,
        says="A commit has happened since",
    )
    missing = [CommitOperationDelete("nothing.txt")]
    refused(RemoteEntryNotFoundError, lambda: api.create_commit(repo, missing, commit_message="-"))

    api.create_branch(repo, branch="runs/a", revision="round-1")
    refused(HfHubHTTPError, lambda: api.create_branch(repo, branch="runs/a"), status=409)
    api.create_branch(repo, branch="runs/a", exist_ok=True)
    third = api.upload_file(repo_id=repo, path_or_fileobj=b"three", path_in_repo="a.txt", revision="runs/a")
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second.oid, "runs/a": third.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"round-1": first.oid}
    history = api.list_repo_commits(repo)
    assert [commit.commit_id for commit in history] == [second.oid, first.oid, initial]
    assert [commit.title for commit in history] == ["second", "first", "initial commit"]
    assert [commit.title for commit in api.list_repo_commits(repo, revision="runs/a")][1:] == [
        "first",
        "initial commit",
    ]

    refused(RevisionNotFoundError, lambda: api.repo_info(repo, revision="round-9"))
    refused(RevisionNotFoundError, lambda: api.create_commit(repo, late, commit_message="-", revision="no-branch"))
    refused(RepositoryNotFoundError, lambda: api.repo_info("user/nothing"))
    refused(RepositoryNotFoundError, lambda: api.repo_info("gpt2"))
    refused(RemoteEntryNotFoundError, lambda: hf_hub_download(repo, "nothing.txt"))
    assert api.file_exists(repo, "a.txt")
    assert not api.file_exists(repo, "nothing.txt")

    refused(BadRequestError, lambda: api.super_squash_history(repo, branch="round-1"))
    api.super_squash_history(repo, branch="runs/a", commit_message="squashed")
    assert [commit.title for commit in api.list_repo_commits(repo, revision="runs/a")] == ["squashed"]
    assert Path(hf_hub_download(repo, "a.txt", revision="runs/a")).read_text() == "three"
    print(json.dumps({"initial": initial, "first": first.oid, "second": second.oid}))


def client_deletion() -> None:
    api, repo = HfApi(), "user/deleted"
    api.create_repo(repo)
    api.create_branch(repo, branch="b")
    api.create_tag(repo, tag="t")
    api.delete_branch(repo, branch="b")
    api.delete_tag(repo, tag="t")
    refused(HfHubHTTPError, lambda: api.delete_branch(repo, branch="main"), status=403)
    refused(RevisionNotFoundError, lambda: api.delete_tag(repo, tag="t"))
    refs = api.list_repo_refs(repo)
    assert ([ref.name for ref in refs.branches], refs.tags) == (["main"], [])
    api.delete_repo(repo)
    assert not api.repo_exists(repo)


def test_a_repository_from_creation_to_squash(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "sub" / "w.safetensors").write_bytes(WEIGHTS)
    commits = json.loads(run_client(client_repository, hub, tmp_path / "home", str(folder)))

    assert hub.refs("user/life")["tags"] == {"round-1": commits["first"]}
    assert [commit["id"] for commit in hub.commits("user/life")] == list(reversed(commits.values()))
    first, second = hub.files("user/life", "round-1"), hub.files("user/life")
    names = {".gitattributes", "a.txt", "empty.safetensors", "picture.png"}
    assert (first.keys(), second.keys()) == (names | {"sub/w.safetensors"}, names | {"new/b"})
    assert first["sub/w.safetensors"]["lfs"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert first["a.txt"] == {"oid": git_oid(b"one"), "size": 3, "lfs": None}
    assert [path for path, entry in first.items() if entry["lfs"]] == ["picture.png", "sub/w.safetensors"]
    assert hub.read("user/life", "round-1", "sub/w.safetensors") == WEIGHTS
    assert hub.read("user/life", "main", "a.txt") == b"two"
    uploads = [entry["path"] for entry in hub.log() if entry["method"] == "PUT"]
    assert len(uploads) == 2, "each object is sent once"

    run_client(client_deletion, hub, tmp_path / "home")
    with pytest.raises(FileNotFoundError):
        hub.refs("user/deleted")


def client_download(repo: str) -> None:
    api = HfApi()
    refs = api.list_repo_refs(repo)
    sha = refs.tags[0].target_commit
    for revision, text in [(None, "2"), ("main", "2"), ("v1", "1"), (sha, "1"), ("side/x", "2"), (sha[:7], "1")]:
        assert Path(hf_hub_download(repo, "a.txt", revision=revision)).read_text() == text, revision
        folder = Path(snapshot_download(repo, revision=revision))
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert names == {".gitattributes", "a.txt", "deep/er/w.bin", "name with spaces & ünïcode.txt"}, names
        assert (folder / "a.txt").read_text() == text
        weights = folder / "deep/er/w.bin"
        assert weights.read_bytes() == WEIGHTS
        assert weights.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()  # the cache names files by ETag
        assert (folder / "a.txt").resolve().name == git_oid(text.encode())
    only = Path(snapshot_download(repo, allow_patterns="deep/*", local_dir="only"))
    assert [path.name for path in (only / "deep").rglob("*.*")] == ["w.bin"]
    assert not (only / "a.txt").exists()
    top = {entry.path for entry in api.list_repo_tree(repo)}
    assert {"deep", "a.txt"} < top
    assert "deep/er" not in top
    assert [entry.path for entry in api.list_repo_tree(repo, "deep/er")] == ["deep/er/w.bin"]
    (info,) = api.get_paths_info(repo, ["deep/er/w.bin"])
    assert (info.size, info.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    sibling = next(each for each in api.model_info(repo, files_metadata=True).siblings if each.lfs)
    assert (sibling.rfilename, sibling.lfs.size) == ("deep/er/w.bin", len(WEIGHTS))


def test_downloads_by_branch_tag_and_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, store = "user/down", hub.store
    store.create(repo, "models", False, "user")
    files = {"a.txt": store.put_blob(b"1"), "name with spaces & ünïcode.txt": store.put_blob(b"x")}
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    store.put_lfs(oid, len(WEIGHTS), [WEIGHTS])
    files = store.files(repo) | files | {"deep/er/w.bin": store.lfs_entry(oid, None)}
    store.add_commit(repo, "models", "main", files, "1", "", "user", root=False)
    store.change_ref(repo, "models", "tags", "v1", store.resolve(repo, "main"))
    store.add_commit(repo, "models", "main", files | {"a.txt": store.put_blob(b"2")}, "2", "", "user", root=False)
    store.change_ref(repo, "models", "branches", "side/x", store.resolve(repo, "main"))
    monkeypatch.chdir(tmp_path)
    run_client(client_download, hub, tmp_path / "home", repo)

    connection = http.client.HTTPConnection("127.0.0.1", hub.port)
    connection.request("HEAD", f"/{repo}/resolve/v1/deep/er/w.bin")
    answer = dict(connection.getresponse().getheaders())
    assert (answer["ETag"], answer["X-Linked-Etag"]) == (f'"{oid}"', f'"{oid}"')
    assert answer["X-Linked-Size"] == answer["Content-Length"] == str(len(WEIGHTS))
    assert answer["X-Repo-Commit"] == store.resolve(repo, "v1")

    def ranged(header: str) -> tuple[int, str | None, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", hub.port)
        connection.request("GET", f"/{repo}/resolve/v1/deep/er/w.bin", headers={"Range": header})
        response = connection.getresponse()
        return response.status, response.getheader("Content-Range"), response.read()

    size = len(WEIGHTS)
    assert ranged("bytes=1000-") == (206, f"bytes 1000-{size - 1}/{size}", WEIGHTS[1000:])
    assert ranged("bytes=5-9") == (206, f"bytes 5-9/{size}", WEIGHTS[5:10])
    assert ranged("bytes=-7") == (206, f"bytes {size - 7}-{size - 1}/{size}", WEIGHTS[-7:])
    assert ranged(f"bytes={size}-") == (416, f"bytes */{size}", b"")


# Tokens --------------------------------------------------------------------------------------------------------------


def client_tokens() -> None:
    alice, bob, nobody, expired = (HfApi(token=token) for token in ("hf_alice", "hf_bob", False, "hf_expired"))
    repo, add = "alice/secret", [CommitOperationAdd("a.txt", b"alice's")]
    alice.create_repo(repo, private=True)
    alice.create_commit(repo, add, commit_message="-")
    assert alice.model_info(repo).private
    assert Path(alice.hf_hub_download(repo, "a.txt")).read_text() == "alice's"
    for other in (nobody, bob):
        refused(RepositoryNotFoundError, lambda other=other: other.model_info(repo))
        refused(RepositoryNotFoundError, lambda other=other: list(other.list_repo_tree(repo)))
        download = {"repo_id": repo, "filename": "a.txt", "cache_dir": "others"}
        refused(RepositoryNotFoundError, lambda other=other, kwargs=download: other.hf_hub_download(**kwargs))
    refused(HfHubHTTPError, lambda: expired.model_info(repo), status=401, says="Invalid credentials")
    refused(HfHubHTTPError, lambda: expired.whoami(), status=401, says="Invalid user token")

    alice.update_repo_settings(repo, private=False)
    assert Path(nobody.hf_hub_download(repo, "a.txt", cache_dir="nobody")).read_text() == "alice's"
    late = {"repo_id": repo, "path_or_fileobj": b"not alice's", "path_in_repo": "a.txt"}
    writes = {
        "commit": lambda api: api.upload_file(**late),
        "tag": lambda api: api.create_tag(repo, tag="t"),
        "squash": lambda api: api.super_squash_history(repo),
        "delete": lambda api: api.delete_repo(repo),
    }
    for write in writes.values():
        refused(RepositoryNotFoundError, lambda write=write: write(nobody), status=401)
        refused(HfHubHTTPError, lambda write=write: write(bob), status=403)
        refused(HfHubHTTPError, lambda write=write: write(expired), status=401)
    refused(HfHubHTTPError, lambda: nobody.create_repo("alice/x"), status=401)
    refused(HfHubHTTPError, lambda: bob.create_repo("alice/x"), status=403)
    bob.create_repo("everyone/x")


def test_tokens_decide_and_are_kept_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with running_hub(tmp_path / "hub", {"alice": "hf_alice", "bob": "hf_bob"}) as hub:
        run_client(client_tokens, hub, tmp_path / "home", token=None)
        assert [commit["title"] for commit in hub.commits("alice/secret")] == ["-", "initial commit"]
        log = hub.log()
        assert {entry["user"] for entry in log} == {"alice", "bob", None}
        assert {entry["status"] for entry in log} >= {200, 401, 403, 404}
        kept = json.dumps(log).encode() + b"".join(path.read_bytes() for path in hub.store.root.rglob("*.json"))
        assert b"hf_alice" not in kept
        assert b"hf_bob" not in kept
        assert b"hf_expired" not in kept


# Model cards ---------------------------------------------------------------------------------------------------------


# Older clients ask the real Hub, whatever their endpoint is, when a card is validated apart from a commit.
CARDS_ASK_THE_ENDPOINT = "huggingface.co" not in inspect.getsource(ModelCard.validate)


def client_cards() -> None:
    if CARDS_ASK_THE_ENDPOINT:
        ModelCard(GOOD_CARD).validate()
    wrong = {
        ("relation: adapter", "relation: child"): '"base_model_relation" must be one of [adapter, merge,',
        ("license: apache-2.0", "license: my-own"): '"license" must be one of [apache-2.0, mit,',
        ("library_name: peft", "library_name: [peft]"): '"library_name" must be a string',
        ("base_model: user/model", "base_model: /tmp/model"): '"base_model" with value "/tmp/model" is not valid',
        ("base_model: user/model", "base_model: [a/b, a/b/c]"): '"base_model[1]" with value "a/b/c" is not valid',
        ("datasets: glue", "datasets: [glue, 'my data']"): '"datasets[1]" with value "my data" is not valid',
        ("tags: [lora, ", "tags: [1, "): '"tags[0]" must be a string',
        (", name: RTE", ""): '"model-index[0].results[0].dataset.name" is required',
        ("task: {type: text-classification}", "task: {}"): '"model-index[0].results[0].task.type" is required',
        (", value: 0.5", ""): '"model-index[0].results[0].metrics[0].value" is required',
        ("- name: model\n ", "-"): '"model-index[0].name" is required',
        ("datasets: glue", "license: mit"): "Invalid YAML in README.md",
    }
    api, repo = HfApi(), "user/card"
    api.create_repo(repo)

    def push(text: str) -> Any:
        return api.upload_file(repo_id=repo, path_or_fileobj=text.encode(), path_in_repo="README.md")

    for (old, new), message in wrong.items():
        assert old in GOOD_CARD, old
        text = GOOD_CARD.replace(old, new)
        refused(ValueError, lambda text=text: push(text), says=message)
    refused(ValueError, lambda: push("---\n- a\n- b\n---\n"), says="must be of type object")
    refused(ValueError, lambda: push("---\nhello\n---\n"), says="The YAML metadata of your README.md is invalid")
    child = ModelCard(GOOD_CARD.replace("relation: adapter", "relation: child"))
    if CARDS_ASK_THE_ENDPOINT:
        refused(ValueError, child.validate, says='- Error: "base_model_relation" must be one of')

    bad = GOOD_CARD.replace("license: apache-2.0", "license: my-own").encode()
    operations = [CommitOperationAdd("README.md", bad), CommitOperationAdd("w.bin", WEIGHTS)]
    refused(ValueError, lambda: api.create_commit(repo, operations, commit_message="-"), says="Invalid metadata")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        push("# no metadata")
    assert "empty or missing yaml metadata in repo card" in str(caught[0].message)
    if CARDS_ASK_THE_ENDPOINT:
        ModelCard(GOOD_CARD).push_to_hub(repo)
    else:
        push(GOOD_CARD)
    assert ModelCard.load(repo).data.base_model == "user/model"
    info = api.model_info(repo)
    assert (info.library_name, info.pipeline_tag, info.card_data.license) == (
        "peft",
        "text-classification",
        "apache-2.0",
    )


def test_model_cards_are_validated(hub: Hub, tmp_path: Path) -> None:
    run_client(client_cards, hub, tmp_path / "home")
    stored = ModelCard(hub.read("user/card", "main", "README.md").decode())
    assert stored.data.to_dict() == ModelCard(GOOD_CARD).data.to_dict()
    assert len(hub.commits("user/card")) == 3
    assert not any(entry["method"] == "PUT" for entry in hub.log()), "refused before the upload"


# A client that is not polite -----------------------------------------------------------------------------------------


def call(hub: Hub, method: str, address: str, body: bytes = b"", token: str | None = "hf_test") -> tuple[int, bytes]:
    """Status and body of a request made by hand."""
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, address.removeprefix(hub.endpoint), body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def commit_by_hand(hub: Hub, repo: str, *lines: tuple[str, dict[str, Any]]) -> int:
    header = ("header", {"summary": "by hand", "description": ""})
    body = b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in (header, *lines))
    return call(hub, "POST", f"/api/models/{repo}/commit/main", body)[0]


def upload_address(hub: Hub, repo: str, content: bytes, size: int | None = None) -> str | None:
    """Where the server wants an object, `None` if it has it."""
    wanted = {"objects": [{"oid": hashlib.sha256(content).hexdigest(), "size": size or len(content)}]}
    _, answer = call(hub, "POST", f"/{repo}.git/info/lfs/objects/batch", json.dumps(wanted).encode())
    actions = json.loads(answer)["objects"][0].get("actions")
    return actions and actions["upload"]["href"]


def test_objects_that_are_not_what_was_announced_are_refused(hub: Hub) -> None:
    repo, content = "user/lfs", b"\0 what was announced"
    hub.store.create(repo, "models", False, "user")
    oid = hashlib.sha256(content).hexdigest()
    line = ("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": oid, "size": len(content)})
    verify = json.dumps({"oid": oid, "size": len(content)}).encode()

    address = upload_address(hub, repo, content)
    assert call(hub, "PUT", address, b"\0 what was xnnounced", token=None)[0] == 400
    assert call(hub, "PUT", address, content + b"!", token=None)[0] == 400
    assert call(hub, "PUT", address, content[:-1], token=None)[0] == 400
    assert call(hub, "PUT", address.replace("signature=", "signature=0"), content, token=None)[0] == 403
    longer = upload_address(hub, repo, content, size=len(content) + 1)
    assert call(hub, "PUT", longer, content, token=None)[0] == 400
    assert commit_by_hand(hub, repo, line) == 400
    assert call(hub, "POST", f"/{repo}.git/info/lfs/objects/verify", verify)[0] == 404
    assert not hub.store.has_lfs(oid)
    assert len(hub.commits(repo)) == 1

    assert call(hub, "PUT", address, content, token=None)[0] == 200
    assert call(hub, "POST", f"/{repo}.git/info/lfs/objects/verify", verify)[0] == 200
    assert upload_address(hub, repo, content) is None
    wrong_size = ("lfsFile", line[1] | {"size": 3})
    assert commit_by_hand(hub, repo, wrong_size) == 400
    assert commit_by_hand(hub, repo, line) == 200
    assert hub.read(repo, "main", "w.bin") == content
    assert not list((hub.store.root / "tmp").iterdir())


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a/..", "a//b", ".git/config", "..\\x", "C:/x", ""])
def test_names_that_escape_are_refused_unless_asked_for(hub: Hub, name: str) -> None:
    repo = f"user/names-{git_oid(name.encode())[:9]}"
    hub.store.create(repo, "models", False, "user")
    before = hub.files(repo)
    good = ("file", {"path": "good.txt", "content": "eA==", "encoding": "base64"})
    bad = ("file", {"path": name, "content": "eA==", "encoding": "base64"})
    assert commit_by_hand(hub, repo, good, bad) == 400
    assert hub.files(repo) == before, "a commit is all or nothing"
    hub.faults([{"fault": "allow_bad_names"}])
    assert commit_by_hand(hub, repo, bad) == 200
    assert name in hub.files(repo)
    listed = json.loads(call(hub, "GET", f"/api/models/{repo}/tree/main?recursive=true")[1])
    assert name in [entry["path"] for entry in listed]
    hub.reset()
    assert commit_by_hand(hub, repo, good, bad) == 400


# Death ---------------------------------------------------------------------------------------------------------------


def client_stubborn(repo: str, rounds: str) -> None:
    """Publishes rounds to a server that dies now and then, as a careful program would."""
    api, published = HfApi(), 0
    while published < int(rounds):
        try:
            head = api.repo_info(repo).sha
            titles = [commit.title for commit in api.list_repo_commits(repo)]
            published = len(titles) - 1
            weights = bytes([published]) * (3 << 20)
            operations = [CommitOperationAdd("w.bin", weights), CommitOperationAdd("n.txt", str(published).encode())]
            if f"round {published}" not in titles and published < int(rounds):
                api.create_commit(repo, operations, commit_message=f"round {published}", parent_commit=head)
        except (HfHubHTTPError, httpx.HTTPError, RuntimeError):
            time.sleep(0.05)


def check_whole(store: Store, repo: str) -> int:
    """Number of rounds; every one of them must be complete and of one piece."""
    rounds = store.history(repo)[:-1][::-1]
    for number, commit in enumerate(rounds):
        contents = {name: store.path_of(entry).read_bytes() for name, entry in commit["files"].items()}
        assert commit["title"] == f"round {number}"
        assert contents["n.txt"] == str(number).encode()
        assert contents["w.bin"] == bytes([number]) * (3 << 20)
    return len(rounds)


def test_kill_9_loses_nothing_that_was_acknowledged(hub: Hub, tmp_path: Path) -> None:
    repo, rounds = "user/kill", 16
    hub.store.create(repo, "models", False, "user")
    command = [sys.executable, __file__, client_stubborn.__name__, repo, str(rounds)]
    client = subprocess.Popen(command, env=untraced(hub.environment(tmp_path / "home")), stderr=subprocess.DEVNULL)
    kills, seen = 0, 0
    while client.poll() is None:
        time.sleep(0.04 + 0.03 * (kills % 5))
        if check_whole(hub.store, repo) > seen and client.poll() is None:  # progress since the last kill
            hub.kill()
            kills, seen = kills + 1, check_whole(hub.store, repo)
            hub.restart()
    assert client.wait() == 0
    assert check_whole(hub.store, repo) == rounds
    assert kills > 1


@pytest.mark.parametrize("who", ["client", "server"])
def test_half_an_upload_is_never_visible(hub: Hub, who: str) -> None:
    repo, content = f"user/{who}-dies", os.urandom(1 << 20)
    hub.store.create(repo, "models", False, "user")
    address = upload_address(hub, repo, content)
    line = json.dumps({"key": "file", "value": {"path": "a", "content": "eA=="}}).encode()
    halves = [
        ("PUT", address.removeprefix(hub.endpoint), content),
        ("POST", f"/api/models/{repo}/commit/main", b'{"key":"header","value":{"summary":"half"}}\n' + line),
    ]
    for method, path, body in halves:
        connection = http.client.HTTPConnection("127.0.0.1", hub.port)
        connection.putrequest(method, path)
        connection.putheader("Authorization", "Bearer hf_test")
        connection.putheader("Content-Length", str(len(body) + 1))
        connection.endheaders()
        connection.send(body)  # all but one byte
        time.sleep(0.1)
        if who == "server":
            hub.kill()
            hub.restart()
        connection.close()
    time.sleep(0.2)  # for a server that would act on the half
    assert not hub.store.has_lfs(hashlib.sha256(content).hexdigest())
    assert len(hub.commits(repo)) == 1
    assert upload_address(hub, repo, content) == address, "the same address is good after a restart"
    assert call(hub, "PUT", address, content, token=None)[0] == 200


# Faults --------------------------------------------------------------------------------------------------------------


def put_faults(*rules: dict[str, Any]) -> None:
    urlopen(Request(f"{constants.ENDPOINT}/_control/faults", json.dumps(rules).encode())).read()


def fired() -> list[tuple[str, int | None, str | None]]:
    """Method, status and fault of the requests about `user/faults` since the last call."""
    log = json.load(urlopen(f"{constants.ENDPOINT}/_control/log"))
    urlopen(Request(f"{constants.ENDPOINT}/_control/reset", b"[]")).read()
    return [(entry["method"], entry["status"], entry["fault"]) for entry in log]


def client_faults() -> None:
    api, repo = HfApi(), "user/faults"
    api.create_repo(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=WEIGHTS, path_in_repo="w.bin")
    fired()
    commit = {"method": "POST", "path": "/commit/"}

    def add(number: int) -> Any:
        return api.create_commit(repo, [CommitOperationAdd("n.txt", str(number).encode())], commit_message=str(number))

    # The client waits a second more than it is told, so one 429 of these is enough.
    too_many = {"fault": "status", "status": 429, "headers": {"Retry-After": "0"}}
    put_faults(too_many | {"match": {"path": "preupload"}}, {"fault": "status", "status": 503, "match": commit})
    refused(HfHubHTTPError, lambda: add(1), status=503)
    assert fired() == [("POST", 429, "status"), ("POST", 200, None), ("POST", 503, "status")]

    put_faults({"fault": "moved", "match": commit}, {"fault": "expired_token", "match": commit})
    refused(HfHubHTTPError, lambda: add(2), status=412, says="A commit has happened since")
    refused(HfHubHTTPError, lambda: add(2), status=401, says="Invalid credentials in Authorization header")
    fired()

    put_faults({"fault": "cut", "match": commit})
    refused_by_network(lambda: add(3))
    assert latest(repo) != "3", "half a commit is no commit"
    put_faults({"fault": "cut", "when": "response", "match": commit})
    refused_by_network(lambda: add(4))
    assert latest(repo) == "4", "it was carried out; its answer was lost"
    fired()

    big = WEIGHTS * 24  # the client keeps what it has in pieces of 10 MB
    put_faults({"fault": "cut", "match": {"method": "PUT"}})
    api.upload_file(repo_id=repo, path_or_fileobj=big, path_in_repo="w2.bin")  # the client tries again
    assert [entry for entry in fired() if entry[0] == "PUT"] == [("PUT", None, "cut"), ("PUT", 200, None)]
    put_faults({"fault": "cut", "match": {"method": "GET", "path": "w2.bin"}})
    assert Path(hf_hub_download(repo, "w2.bin")).read_bytes() == big
    assert fired()[1:] == [("GET", 200, "cut"), ("GET", 206, None)], "the second half only"

    address = f"{constants.ENDPOINT}/api/models/{repo}"
    put_faults({"fault": "slow", "seconds": 0.6})
    refused(httpx.ReadTimeout, lambda: get_session().get(address, timeout=0.2))
    assert get_session().get(address, timeout=5).status_code == 200
    put_faults({"fault": "down"})
    for _ in range(3):
        refused_by_network(lambda: api.repo_info(repo))
    assert {entry[1:] for entry in fired()} >= {(None, "down")}
    assert latest(repo) == "Upload w2.bin with huggingface_hub"


def refused_by_network(call: Callable[[], Any]) -> None:
    with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
        call()


def test_every_fault_reaches_the_client(hub: Hub, tmp_path: Path) -> None:
    run_client(client_faults, hub, tmp_path / "home")
    assert [commit["title"] for commit in hub.commits("user/faults")][1:-2] == ["4"]
    with pytest.raises(OSError, match="400"):
        hub.faults([{"fault": "typo"}])


def test_random_faults_follow_their_seed(hub: Hub) -> None:
    def statuses(**rule: Any) -> list[int]:
        hub.faults([{"fault": "status", "status": 500, "match": {"path": "^/api/"}, **rule}])
        return [call(hub, "GET", "/api/whoami-v2")[0] for _ in range(40)]

    once = statuses(probability=0.3, seed=1)
    assert 4 < once.count(500) < 24
    assert set(once) == {200, 500}
    assert statuses(probability=0.3, seed=1) == once
    assert statuses(probability=0.3, seed=2) != once
    assert statuses(times=2, after=1) == [200, 500, 500] + [200] * 37
    assert statuses(times=None) == [500] * 40
    assert statuses(match={"method": "POST"}) == [200] * 40


# Models --------------------------------------------------------------------------------------------------------------


def client_models() -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    tokens = torch.arange(6)[None]
    api, expected = HfApi(), {}

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(input_ids=tokens).logits

    def publish(model: Any, repo: str, tag: str) -> None:
        sha = model.push_to_hub(repo).oid
        api.create_tag(repo, tag=tag, revision=sha)
        expected[repo, tag] = expected[repo, sha] = expected[repo, None] = logits(model)

    publish(model, "user/base", "v1")
    model.lm_head.weight.data += 1
    publish(model, "user/base", "v2")
    base = AutoModelForCausalLM.from_pretrained("user/base", revision="v1")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], revision="v1"))
    adapted.peft_config["default"].revision = "v1"
    for tag in ("round-1", "round-2"):
        for name, parameter in adapted.named_parameters():
            parameter.data += 0.5 * ("lora_B" in name)
        publish(adapted, "user/adapter", tag)

    same = [torch.equal(a, b) for i, a in enumerate(expected.values()) for b in list(expected.values())[:i]]
    assert sum(same) == 8, "tag = commit, and the last = main, in both repositories; all else differs"
    for (repo, revision), wanted in expected.items():
        loader = AutoModelForCausalLM if repo == "user/base" else AutoPeftModelForCausalLM
        assert torch.equal(logits(loader.from_pretrained(repo, revision=revision)), wanted), (repo, revision)
    base = AutoModelForCausalLM.from_pretrained("user/base", revision="v1")
    by_tag = PeftModel.from_pretrained(base, "user/adapter", revision="round-1")
    assert torch.equal(logits(by_tag), expected["user/adapter", "round-1"])


def test_models_and_adapters_load_by_tag_and_commit(hub: Hub, tmp_path: Path) -> None:
    run_client(client_models, hub, tmp_path / "home")
    assert {"config.json", "model.safetensors"} < hub.files("user/base", "v1").keys()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < hub.files("user/adapter").keys()
    assert hub.refs("user/adapter")["tags"].keys() == {"round-1", "round-2"}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
