"""The test Hub as tests use it: a server process, environments for clients, and a look at what it stored.

    with running_hub(tmp_path / "hub") as hub:
        run_python("import huggingface_hub as h; h.create_repo('user/x')", hub.environment(tmp_path / "home"))
        assert hub.files("user/x").keys() == {".gitattributes"}

Clients read their endpoint when they are imported, so they run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from hub_store import Files, Store
from programs import untraced


TESTS = Path(__file__).resolve().parent


class Hub:
    """A server process over a folder.

    Args:
        root: Where the server keeps everything.
        tokens: Token of each user. The default is one user, `user`, with `hf_test`.
    """

    def __init__(self, root: Path, tokens: dict[str, str] | None = None) -> None:
        self.tokens = tokens or {"user": "hf_test"}
        self.store = Store(root)
        self.port = 0
        self.restart()

    def restart(self) -> None:
        """Starts the server again on the same port and folder, after `kill`."""
        tokens = [part for name, token in self.tokens.items() for part in ("--token", f"{name}={token}")]
        command = [sys.executable, str(TESTS / "hub_server.py"), "--root", str(self.store.root), "--stop-with-stdin"]
        command += ["--port", str(self.port), *tokens]
        self.process = subprocess.Popen(
            command, env=untraced(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        if not self.endpoint:
            raise RuntimeError("the test Hub did not start; its error is above")
        self.port = int(self.endpoint.rsplit(":", 1)[1])

    def kill(self) -> None:
        """SIGKILL: no chance to finish anything."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def environment(self, home: Path, token: str | None = "hf_test") -> dict[str, str]:
        """Variables for a client process that knows this Hub and nothing else."""
        private = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(private)}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    # Faults -------------------------------------------------------------------------------------------------------

    def _control(self, name: str, rules: list[dict[str, Any]] | None = None) -> Any:
        data = None if rules is None else json.dumps(rules).encode()
        with build_opener(ProxyHandler({})).open(
            Request(f"{self.endpoint}/_control/{name}", data), timeout=30
        ) as file:
            return json.load(file)

    def faults(self, rules: list[dict[str, Any]]) -> None:
        """Puts these rules in force, in place of those before. `hub_server.py` says what a rule is."""
        self._control("faults", rules)

    def reset(self) -> None:
        """No rules, an empty log."""
        self._control("reset", [])

    def log(self) -> list[dict[str, Any]]:
        """Requests since the start or the last `reset`: method, path, status, fault and user."""
        return self._control("log")

    # What is stored: read from disk, so it is no request, and works while the server is down ----------------------

    def refs(self, repo: str) -> dict[str, dict[str, str]]:
        """`{"branches": {name: commit id}, "tags": {name: commit id}}`."""
        return self.store.refs(repo)

    def commits(self, repo: str, branch: str = "main") -> list[dict[str, Any]]:
        """Newest first: id, parents, title, message, date, author and files."""
        return self.store.history(repo, branch)

    def files(self, repo: str, revision: str = "main") -> Files:
        """Path -> git sha1 (`oid`), `size` in bytes and sha256 (`lfs`) or None."""
        return self.store.files(repo, revision)

    def read(self, repo: str, revision: str, path: str) -> bytes:
        """The bytes of a file."""
        return self.store.path_of(self.files(repo, revision)[path]).read_bytes()


@contextmanager
def running_hub(root: Path, tokens: dict[str, str] | None = None) -> Iterator[Hub]:
    """A Hub that ends with the block."""
    hub = Hub(root, tokens)
    try:
        yield hub
    finally:
        hub.kill()


def run_python(
    code_or_script: str | Path, env: dict[str, str], *args: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a child process to its end.

    Args:
        code_or_script: Source code, or the path of a script.
        env: Its whole environment.
        args: Its `sys.argv[1:]`.
        timeout: Seconds.

    Raises:
        AssertionError: It failed; the message holds its output.
    """
    source = [str(code_or_script)] if isinstance(code_or_script, Path) else ["-c", code_or_script]
    command = [sys.executable, *source, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
