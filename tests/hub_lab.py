"""One test Hub, one process that trains and one that loads, for all tests that publish: starting them takes seconds.

    @pytest.fixture
    def lab(tmp_path_factory) -> Iterator[Lab]:
        yield from fresh_lab(tmp_path_factory)

`lab.train` and `lab.load` run `hub_target.py` and `hub_loader.py`, a new process each time. Faults are gone after
each test, and a server that a test has killed runs again.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import forks
import pytest
from hub import TESTS, Hub
from programs import untraced


USERS = {"user": "hf_test", "silo": "hf_ThisMustNotBeSeenAnywhere"}
STATE = "federation/state.json"


class Lab:
    """A Hub and the processes that use it.

    Args:
        root: Folder for everything that is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hub = Hub(root / "hub", USERS)
        environment = self.hub.environment(forks.HOME) | {"TOKENIZERS_PARALLELISM": "false"}
        self.targets = forks.Forks(TESTS / "hub_target.py", environment, root / "targets")
        self.loaders = forks.Forks(TESTS / "hub_loader.py", untraced(environment), root / "loaders")
        self._bases: dict[str, str] = {}
        self._names: set[str] = set()

    def stop(self) -> None:
        for each in (self.targets, self.loaders):
            each.stop()
        self.hub.kill()

    def settings(self, name: str, user: str = "user", **settings: Any) -> dict[str, Any]:
        """Of a run in the folder `name` that publishes into `<user>/<name>`, over the defaults of these tests."""
        assert name not in self._names, f"`{name}` is the run of another test"
        self._names.add(name)
        arguments = {"push_to_hub": True, "hub_model_id": f"{user}/{name}", "num_rounds": 3, "learning_rate": 3e-2}
        given = settings.pop("arguments", {})
        output = {"output_dir": str(self.root / name / "run"), "reference": str(self.root / name / "reference")}
        return output | {"folder": str(self.root / name)} | settings | {"arguments": arguments | given}

    def start(self, settings: dict[str, Any], **changes: Any) -> forks.Process:
        """Start `hub_target.py`; `home` among the changes names a machine of its own."""
        settings = settings | changes
        home = Path(settings.pop("folder")) / str(settings.pop("home", "machine"))
        return self.targets.start(home, **settings)

    def train(self, settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """Run `hub_target.py` to its end, and return its result with the key `output` added."""
        process = self.start(settings, **changes)
        return process.result() | {"output": process.output}

    def base(self, family: str, **kwargs: Any) -> str:
        """Repository of a base, published once."""
        key = json.dumps([family, kwargs], sort_keys=True)
        if key not in self._bases:
            repo = f"user/base-{len(self._bases)}"
            folder = self.root / repo
            self.targets.run(folder, upload={"family": family, "repo": repo} | kwargs)
            self._bases[key] = repo
        return self._bases[key]

    def load(self, loads: list[dict[str, Any]], token: str | None = None) -> list[dict[str, Any]]:
        """Run `hub_loader.py`, on a machine of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        results = self.loaders.run(folder, loads=loads, environment={"HF_TOKEN": token or ""})
        return [each | {"folder": str(folder)} for each in results]

    # What the Hub holds -------------------------------------------------------------------------------------------

    def titles(self, repo: str, branch: str = "main") -> list[str]:
        """Of the commits, oldest first, without the one that made the repository."""
        return [commit["title"] for commit in self.hub.commits(repo, branch)][::-1][1:]

    def tags(self, repo: str) -> dict[str, str]:
        return self.hub.refs(repo)["tags"]

    def assert_rounds(self, repo: str, rounds: list[int], branch: str = "main") -> None:
        """One commit and one tag per round, in order, and nothing else."""
        commits = self.hub.commits(repo, branch)[::-1][1:]
        assert [commit["title"] for commit in commits] == [f"Round {round}" for round in rounds]
        assert self.tags(repo) == {
            f"round-{round}": commit["id"] for round, commit in zip(rounds, commits, strict=True)
        }

    def tensors(self, repo: str, revision: str) -> dict[str, str]:
        """SHA-256 of every safetensors file."""
        files = self.hub.files(repo, revision)
        return {name: entry["lfs"] for name, entry in files.items() if name.endswith(".safetensors")}

    def assert_same_rounds(self, repo: str, expected: str, rounds: list[int]) -> None:
        """Tensor for tensor the same bytes."""
        for round in rounds:
            found = self.tensors(repo, f"round-{round}")
            assert len(found) >= 3
            assert found == self.tensors(expected, f"round-{round}"), f"round {round}"

    def download(self, repo: str, revision: str, folder: Path) -> Path:
        """Copy a commit's files from the server's disk."""
        for name in self.hub.files(repo, revision):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.hub.read(repo, revision, name))
        return folder

    # What other people do meanwhile: plain HTTP, so that nothing checks or mends it --------------------------------

    def post(self, path: str, body: Any = None, token: str = "hf_test") -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        with build_opener(ProxyHandler({})).open(
            Request(f"{self.hub.endpoint}{path}", data, headers), timeout=30
        ) as file:
            return json.load(file)

    def commit(self, repo: str, files: dict[str, bytes], title: str = "By hand", branch: str = "main") -> str:
        """Commit files of any name, those of weights as LFS objects; creates the repository if needed."""
        try:
            self.post("/api/repos/create", {"name": repo.split("/")[1], "type": "model"})
        except HTTPError as error:
            if error.code != 409:  # it is there
                raise
        lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": title, "description": ""}}]
        for name, content in files.items():
            if name.endswith((".safetensors", ".bin", ".pt")):
                oid = hashlib.sha256(content).hexdigest()
                (self.hub.store.root / "lfs" / oid).write_bytes(content)
                value = {"path": name, "algo": "sha256", "oid": oid, "size": len(content)}
                lines.append({"key": "lfsFile", "value": value})
            else:
                value = {"path": name, "content": base64.b64encode(content).decode(), "encoding": "base64"}
                lines.append({"key": "file", "value": value})
        body = "\n".join(map(json.dumps, lines)).encode()
        return self.post(f"/api/models/{repo}/commit/{branch}", body)["commitOid"]

    def tag(self, repo: str, name: str, revision: str) -> None:
        self.post(f"/api/models/{repo}/tag/{revision}", {"tag": name})

    def writes(self) -> list[str]:
        """Requests in the log that may change something."""
        reading = ("GET", "HEAD")
        return [f"{each['method']} {each['path']}" for each in self.hub.log() if each["method"] not in reading]

    def requests_at(self, pattern: str) -> list[dict[str, Any]]:
        return [each for each in self.hub.log() if pattern in f"{each['method']} {each['path']}"]


def wait_until(condition: Callable[[], Any], process: forks.Process | None = None, seconds: float = 60) -> None:
    """Poll; a process that ends meanwhile, or the time that is over, is a failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.is_alive(), process.output
        assert time.monotonic() < deadline, "It did not happen."
        time.sleep(0.005)


def state_of(run: str | os.PathLike, round: int) -> Path:
    """Where a round waits."""
    return Path(run) / ".hub" / f"round-{round}"


def waiting(settings: dict[str, Any]) -> list[str]:
    """Names of the rounds that wait."""
    return sorted(path.name for path in (Path(settings["output_dir"]) / ".hub").glob("round-*"))


_SHARED: list[Lab] = []


def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The one of this process, started at the first call."""
    if not _SHARED:
        _SHARED.append(Lab(tmp_path_factory.mktemp("lab")))
        atexit.register(_SHARED[0].stop)
    return _SHARED[0]


def fresh_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A fixture: the lab that all tests share, without faults."""
    shared = shared_lab(tmp_path_factory)
    if shared.hub.process.poll() is not None:
        shared.hub.restart()
    shared.hub.reset()
    yield shared
    if shared.hub.process.poll() is not None:
        shared.hub.restart()
