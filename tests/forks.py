"""Child processes that start at once: a script imports what it needs and then forks for every job.

Importing torch, transformers and peft takes seconds, and the clients of the Hub read `HF_ENDPOINT` and `HF_HOME` when
they are imported. So a script is started once per Hub, and every job is a process of its own, with a working directory
of its own: `HF_HOME` lies below `/proc/self/cwd`, which is another place in each of them.

    script     serve(run)                          reads jobs from standard input, a line of JSON each
    test       with started(script, environment) as forks:
                   forks.run(folder, answer=42)    waits; raises with what the job printed if it failed
                   process = forks.start(folder)   has `pid`, `kill()`, `end()`
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


HOME = Path("/proc/self/cwd/home")


def serve(run: Callable[[dict[str, Any]], Any]) -> None:
    """Fork for each job, one after another; what `run` returns must be JSON."""
    gc.collect()
    gc.freeze()  # what has been imported is neither looked through by every job's collections nor copied for them
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_run(run, json.loads(line)))
        print("pid", pid, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(run: Callable[[dict[str, Any]], Any], job: dict[str, Any]) -> int:
    try:
        os.chdir(job["folder"])
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ |= job["environment"]
        Path("result.json").write_text(json.dumps(run(job)))
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


class Process:
    """One job that is under way."""

    def __init__(self, forks: Forks, folder: Path) -> None:
        self._forks, self._folder = forks, folder
        self.status: int | None = None
        self.pid = int(forks.told("pid"))

    @property
    def output(self) -> str:
        """What it has printed so far, on both streams."""
        file = self._folder / "output.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def is_alive(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()

    def kill(self) -> int:
        """SIGKILL, then its exit status: -9 unless it was faster."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.end()

    def end(self) -> int:
        """Wait for its end; returns the exit status."""
        if self.status is None:
            self.status = int(self._forks.told("ended"))
        return self.status

    def result(self) -> Any:
        """Wait for its end; returns what the job returned.

        Raises:
            AssertionError: It failed; the message holds its output.
        """
        assert self.end() == 0, self.output
        return json.loads((self._folder / "result.json").read_text())


class Forks:
    """A started script.

    Args:
        script: Calls `serve`.
        environment: Of the script and its jobs.
        folder: Where the script itself runs.
    """

    def __init__(self, script: Path, environment: dict[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._server = subprocess.Popen(
            [sys.executable, str(script), "--serve"],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._is_ready = False
        self._last: Process | None = None

    def start(self, folder: Path, *, environment: dict[str, str] | None = None, **job: Any) -> Process:
        """Start a job in `folder`, which is created, and whose `home` becomes its `HF_HOME`."""
        if self._last is not None:
            self._last.kill()  # left over by a test that failed
        if not self._is_ready:
            assert self._server.stdout.readline() == "ready\n"
            self._is_ready = True
        folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(job | {"folder": str(folder), "environment": environment or {}})
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        self._last = Process(self, folder)
        return self._last

    def run(self, folder: Path, **job: Any) -> Any:
        """Start a job and return its result."""
        return self.start(folder, **job).result()

    def told(self, word: str) -> str:
        key, _, value = self._server.stdout.readline().strip().partition(" ")
        assert key == word, f"The server of processes said `{key} {value}` where `{word}` was expected."
        return value

    def stop(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        for stream in (self._server.stdin, self._server.stdout):
            stream.close()


@contextlib.contextmanager
def started(script: Path, environment: dict[str, str], folder: Path) -> Iterator[Forks]:
    """A script that ends, with its jobs, with the block."""
    forks = Forks(script, environment, folder)
    try:
        yield forks
    finally:
        forks.stop()
